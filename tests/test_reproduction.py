"""The study in reproduction/: protocol, statistics, scheduling, resuming and report."""
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import calibrate
from safetensors import safe_open
from scipy import stats

from reproduction import experiment, models, report, schedule, shipping
from reproduction.__main__ import main
from reproduction.data import Data
from reproduction.experiment import Study
from reproduction.protocol import PROTOCOL, Run, read_protocol
from reproduction.report import FOLDER, write_report
from reproduction.statistics import paired_difference, summarize
from timm_spikformer import training
from timm_spikformer.folders import lock_folder_for_run
from timm_spikformer.images import FASHION_MNIST, make_loader, read_splits, training_data_config
from timm_spikformer.profiling import profile

TINY = dict(
    seeds=[0, 1],
    datasets={'fashion_mnist': {'train': 5700, 'validation': 300, 'test': 1000}},
    defaults=dict(
        dataset='fashion_mnist', model='spikformer_v2_2_64_patch4_32', model_kwargs={'embed_dim': 16}, labels=96,
        recipe=dict(epochs=3, lr=1e-2, batch_size=32, weight_decay=0.05, warmup_epochs=0.25),
        tries=[{}, {'epochs': '2x'}]),
    cells=dict(
        mae=dict(title='masked', objective='reconstruct', tries=[{}]),
        tuned=dict(title='pre-trained', init='mae'),
        scratch=dict(title='scratch')),
    questions=dict(Q=dict(
        title='Does it help?', text='An example.', rows=['tuned', 'scratch'],
        claims={'it helps': ['tuned', 'scratch']})),
)


@pytest.fixture
def study(tmp_path) -> Study:
    (tmp_path / 'protocol.yaml').write_text(yaml.safe_dump(TINY))
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'fashion_mnist').symlink_to(FASHION_MNIST)
    return Study(
        read_protocol(tmp_path / 'protocol.yaml'), tmp_path / 'runs', tmp_path / 'checkpoints', tmp_path / 'data')


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(x) for key, x in value.items() if 'seconds' not in key}
    return [without_times(x) for x in value] if isinstance(value, list) else value


def pretend(study: Study, run: Run, **values) -> None:
    """Write a result without training."""
    empty = dict(cpu_seconds=0., machine={}, validation={}, test={}, operations={})
    experiment.write_json(
        study.result_path(run), {**empty, 'training': study.protocol.digest(run), 'attempt': run.attempt, **values})


def test_committed_report_matches_committed_runs(tmp_path):
    write_report(read_protocol(), FOLDER / 'runs', tmp_path)
    assert (tmp_path / 'README.md').read_bytes() == (FOLDER / 'README.md').read_bytes()
    for path in (tmp_path / 'figures').iterdir():
        committed = (FOLDER / 'figures' / path.name).read_bytes()
        version = re.search(rb'Matplotlib v([\d.]+)', committed)[1].decode()
        if version == matplotlib.__version__:  # the output differs between versions
            assert path.read_bytes() == committed, path.name


def test_compared_cells_have_equal_conditions():
    """Compared cells have the same seeds, number of tries and training images."""
    protocol = read_protocol()
    compared = [cells for question in protocol.questions.values() for cells in question['claims'].values()]
    pairs = [pair for cells in compared for pair in zip(cells[::2], cells[1::2])]
    assert pairs
    for a, b in pairs:
        first, second = protocol.cells[a], protocol.cells[b]
        assert (len(first.tries), first.seeds, first.dataset) == (len(second.tries), second.seeds, second.dataset)
        if {a, b} != {'time-steps-1-to-4', 'time-steps-4'}:
            assert first.labels == second.labels


def test_interval_matches_scipy():
    a, b = [90.1, 90.9, 89.7], [89.9, 90.2, 89.8]
    ours = paired_difference(a, b)
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.mean == pytest.approx(np.mean(a) - np.mean(b)) and ours.count == 3 and not ours.excludes_zero
    # by hand: differences 1, 2, 3 have mean 2 and standard deviation 1, and t(0.975, 2) = 4.303
    margin = 4.303 / 3 ** 0.5
    assert paired_difference([1, 2, 3], [0, 0, 0])[:3] == pytest.approx((2, 2 - margin, 2 + margin), abs=1e-3)
    for pair in ([1, 1.1, 1.2], [0, 0, 0]), ([0, 0, 0], [1, 1.1, 1.2]):
        assert paired_difference(*pair).excludes_zero
    assert summarize([1, 2, 3]).deviation == pytest.approx(np.std([1, 2, 3], ddof=1))
    with pytest.raises(ValueError, match='got 1 and 1 values'):
        paired_difference([1], [2])


@pytest.mark.parametrize('change, message', [
    ({'cells': {'a': {'title': 'x', 'labelled': 3}}}, 'cell a: unknown keys: labelled'),
    ({'cells': {'a': {'title': 'x', 'init': 'b'}, 'b': {'title': 'y'}}}, "init must be a cell .* earlier .*, got 'b'"),
    ({'cells': {'a': {'title': 'x', 'attention': 'linear'}}}, "attention must be one of .*got 'linear'"),
    ({'cells': {'a': {'title': 'x', 'dataset': 'mnist'}}}, "dataset must be one of fashion_mnist, got 'mnist'"),
    ({'cells': {**TINY['cells'], 'scratch': {'title': 'x', 'tries': [{}]}}}, 'must have the same number of tries'),
    ({'questions': {'Q': {**TINY['questions']['Q'], 'rows': ['nothing']}}}, 'cells that do not exist: nothing'),
    ({'questions': {'Q': {**TINY['questions']['Q'], 'claims': {'it helps': ['mae']}}}}, 'needs 2 or 4 different .*mae'),
    ({'seeds': [0, 0, 1]}, r'cell mae: seeds must be a list of different integers, got \[0, 0, 1\]'),
    ({'seeds': [0]}, 'Q: tuned cannot be compared: it has only one seed'),
    ({'seeds': None}, 'cell mae: seeds must be a list'),
    ({'datasets': {'fashion_mnist': {'train': 5700, 'validation': 0, 'test': 1}}}, 'integer of at least 1, got 0'),
    ({'datasets': {'mnist': {}}}, "unknown dataset 'mnist', expected one of fashion_mnist, "),
    ({'defaults': {'recipe': {}, 'attnetion': 'none'}}, 'defaults: unknown keys: attnetion'),
    ({'cells': {'a': {'title': 'x', 'recipe': {'lr': '1e-2'}}}}, "lr must be at least 0 and finite, got '1e-2'"),
    ({'cells': {'a': {'title': 'x', 'tries': [{'lrr': 1}]}}}, 'cell a: the recipe: unknown keys: lrr'),
    ({'cells': {'a': {'title': 'x', 'tries': [{'epochs': '1.5x'}]}}}, 'or a factor such as 2x, got .1.5x'),
    ({'cells': {'a': {'title': 'x', 'labels': 0}}}, 'cell a: labels must be an integer of at least 1, got 0'),
    ({'cells': {'a': {'title': 'x', 'model': 'nothing'}}}, "model must be the name of a timm model, got 'nothing'"),
    ({'cells': {'../a': {'title': 'x'}}}, 'the name must consist of letters, digits, .*, got ....a'),
    ({'cells': {'a': {'title': 'x', 'objective': 'reconstruct'}}}, "'reconstruct' allows one try only"),
    ({'cells': {'a': {}}}, 'cell a: missing keys: title'),
    ({'cells': [1]}, r'cells must be a mapping, got \[1\]'),
    ({'questions': {'Q': {}}}, 'Q: missing keys: claims, rows, text, title'),
    ({'label_curves': {'a': {'b': {50: 'scratch'}}}}, 'scratch is not a cell with 50 labels'),
    ({'lable_curves': {}}, 'the file: unknown keys: lable_curves'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_bad_protocols(change, message, tmp_path):
    path = tmp_path / 'x.yaml'
    text = {**TINY, **change}
    if 'scratch' not in text['cells']:
        text['questions'] = {}
    path.write_text(yaml.safe_dump(text))
    with pytest.raises(ValueError, match=message):
        read_protocol(path)


@pytest.mark.parametrize('content, message', [
    ('a: [1', 'x.yaml is not a YAML file: .*expected'), ('', 'the file must be a mapping, got None'),
    ('a: 1\nb: 2\na: 3', "the key 'a' appears twice"), (None, 'x.yaml cannot be read: No such file')], ids=repr)
def test_files_that_are_not_protocols(content, message, tmp_path):
    if content is not None:
        (tmp_path / 'x.yaml').write_text(content)
    with pytest.raises(ValueError, match=message):
        read_protocol(tmp_path / 'x.yaml')


@pytest.mark.parametrize('change, message', [
    ({'labels': 6000}, 'tuned/try-0: labels is 6000, but there are 5,700 images'),
    ({'model_kwargs': {'x': 1}}, "cannot be created with {'x': 1}: .*unexpected keyword argument 'x'"),
    ({'model': 'vit_tiny_patch16_224', 'model_kwargs': {}, 'attention': 'softmax'}, 'is not a Spikformer, so'),
    ({'model': 'vit_tiny_patch16_224', 'model_kwargs': {}}, 'the weights of mae/seed-0 are those of another model'),
], ids=str)
def test_settings_that_do_not_fit(change, message, study, monkeypatch):
    """These errors are raised before training."""
    run = Run(study.protocol.cells['tuned']._replace(**change), 0, 0, False)
    weights = models.create(Run(study.protocol.cells['scratch'], 0, 0, False).config(), 10, 28).state_dict()
    monkeypatch.setattr(Study, '_weights', lambda self, run, data: weights)
    with pytest.raises(ValueError, match=message):
        study.train(run, study.read_data(run))
    assert not study.checkpoints.exists()


def test_part_of_a_dataset_raises(study):
    """The slice in the package has the file names and classes of the whole dataset."""
    with pytest.raises(ValueError, match='6,000 images of fashion_mnist, train split: the protocol requires 60,000'):
        study._replace(protocol=read_protocol()).read_data(Run(read_protocol().cells['ssa'], 0, 0, True))


def test_null_removes_a_default_of_the_recipe(tmp_path):
    text = {**TINY, 'questions': {}, 'cells': {
        'mae': {'title': 'x', 'recipe': {'weight_decay': 0.5}},
        'other': {'title': 'y', 'recipe': {'weight_decay': None}}}}
    (tmp_path / 'x.yaml').write_text(yaml.safe_dump(text))
    cells = read_protocol(tmp_path / 'x.yaml').cells
    assert cells['mae'].recipe['weight_decay'] == 0.5
    assert cells['other'].recipe.keys() == cells['mae'].recipe.keys() - {'weight_decay'}


def test_changed_pretraining_invalidates_results_that_start_from_it(study):
    cells, digest = study.protocol.cells, study.protocol.digest
    tuned, scratch = (Run(cells[name], 0, 0, True) for name in ('tuned', 'scratch'))
    before = digest(tuned), digest(scratch)
    cells['mae'].recipe['epochs'] += 1
    assert digest(tuned) != before[0] and digest(scratch) == before[1]


def test_doubled_epochs_double_the_warmup(study):
    recipe = study.protocol.cells['scratch'].recipe_of(1)
    assert recipe['epochs'] == 6 and recipe['warmup_epochs'] == 0.5
    assert study.protocol.cells['scratch'].recipe_of(0)['epochs'] == 3


def test_order_of_jobs(study):
    """Tries run before final runs, and runs before those that start from their weights; the best try is selected."""
    def names(*patterns):
        jobs = schedule.next_jobs(study, patterns or ('*',))
        return [job.run.name + (' weights' if job.weights_only else '') for job in jobs]

    assert names() == ['mae/seed-0', 'mae/seed-1', 'scratch/try-0', 'scratch/try-1']
    assert names('tuned') == ['mae/seed-0', 'mae/seed-1']
    assert [job.run.name for job in schedule.next_jobs(study, ['mae'], seeds=[1])] == ['mae/seed-1']
    cells = study.protocol.cells
    for run in study.final_runs(cells['mae']):
        pretend(study, run)
    assert names('tuned') == ['mae/seed-0 weights']
    study.checkpoint_folder(Run(cells['mae'], 0, 0, True)).mkdir(parents=True)
    for name in ('last.pth.tar', 'finished'):
        (study.checkpoint_folder(Run(cells['mae'], 0, 0, True)) / name).touch()
    assert names('tuned') == ['tuned/try-0', 'tuned/try-1']
    for run, accuracy in zip(study.tries(cells['tuned']), (70., 71.)):
        assert study.final_runs(cells['tuned']) == []
        pretend(study, run, validation=dict(accuracy=accuracy))
    assert [run.attempt for run in study.final_runs(cells['tuned'])] == [1, 1]
    assert names('tuned') == ['tuned/seed-0', 'mae/seed-1 weights']
    for run in study.final_runs(cells['tuned']):
        pretend(study, run)
    assert names('tuned') == []
    other = read_protocol(study.runs.parent / 'protocol.yaml')
    other.cells['tuned'].recipe['lr'] = 0.5  # results of other settings are ignored
    assert study._replace(protocol=other).result(Run(other.cells['tuned'], 1, 0, True)) is None


def test_tries_with_other_seeds_require_seed_0_of_the_initial_cell(study):
    names = [job.run.name for job in schedule.next_jobs(study, ['tuned'], seeds=[1])]
    assert names == ['mae/seed-0', 'mae/seed-1']


class FakeProcess:
    """Process that ends without an error and without a result."""
    started, returncode, poll = [], 0, lambda self: 0

    def __init__(self, command, env):
        self.started.append(command[4])
        assert len(self.started) < 10


@pytest.fixture
def fake_processes(monkeypatch):
    monkeypatch.setattr(FakeProcess, 'started', [])
    monkeypatch.setattr(schedule.subprocess, 'Popen', FakeProcess)
    monkeypatch.setattr(schedule.time, 'sleep', lambda seconds: None)
    return FakeProcess


def test_run_without_a_result_is_not_repeated(study, fake_processes):
    """The result of a run is outdated if the protocol was changed after `run` had started."""
    assert schedule.run_missing(study, ['mae'], None, 1, []) == ['mae/seed-0', 'mae/seed-1']
    assert fake_processes.started == ['mae/seed-0', 'mae/seed-1']


def command_line(study, monkeypatch, command, *options):
    """Run the command line on a study in this process."""
    folders = dict(protocol=study.runs.parent / 'protocol.yaml', runs=study.runs)
    if command != 'report':
        folders.update(checkpoints=study.checkpoints, data=study.data)
    defaults = [f'--{name}={path}' for name, path in folders.items()]
    monkeypatch.setattr(sys, 'argv', ['reproduction', command, *defaults, *options])
    monkeypatch.setattr(report, 'write', lambda path, content: pytest.fail('the committed report would be replaced'))
    before = signal.getsignal(signal.SIGTERM)
    try:
        main()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_finished_study_says_so(study, monkeypatch, capsys):
    for run in study.final_runs(study.protocol.cells['mae']):
        pretend(study, run)
    command_line(study, monkeypatch, 'run', '--only', 'mae')
    assert 'There are no missing runs. To repeat a run, remove its result from ' in capsys.readouterr().out


def test_terminated_study_ends_its_processes(study, fake_processes, monkeypatch):
    """Otherwise they would lock the folders of the runs that the next `run` starts."""
    ended = []
    monkeypatch.setattr(fake_processes, 'poll', lambda self: os.kill(os.getpid(), signal.SIGTERM))
    for name in ('terminate', 'wait'):
        monkeypatch.setattr(fake_processes, name, lambda self, name=name: ended.append(name), raising=False)
    before = signal.signal(signal.SIGTERM, lambda *args: pytest.fail('not handled'))
    try:
        with pytest.raises(SystemExit, match='Terminated'):
            command_line(study, monkeypatch, 'run')
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == ['terminate', 'wait']


@pytest.mark.parametrize('command, options, message', [
    ('run', ['--only', 'mae', 'typo'], "No cell matches 'typo'. Cells: mae, scratch, tuned"),
    ('run', ['--seeds', '7'], 'None of the selected cells has the seed 7'),
    ('run', ['--jobs', '0'], '--jobs must be at least 1, got 0'),
    ('run', ['--data', 'nothing'], 'error: nothing/fashion_mnist is missing'),
    ('run-one', ['scratch/seed-0'], 'There is no run scratch/seed-0, or it is a final run and not all tries'),
    ('run-one', ['mae/seed-0', '--data', 'nothing'], 'nothing/fashion_mnist is missing'),
    ('run-one', ['mae/seed-0', '--runs', __file__], f'error: {__file__}/mae: Not a directory'),
    ('run-one', ['mae/seed-0', '--checkpoints', __file__], f'error: {__file__}/.*: Not a directory'),
    ('status', ['--protocol', 'nothing'], 'nothing cannot be read: No such file'),
    ('report', ['--runs', 'nothing'], 'nothing is not a folder with results'),
], ids=str)
def test_wrong_options(command, options, message, study, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        command_line(study, monkeypatch, command, *options)


def test_closed_pipe():
    process = subprocess.Popen(
        [sys.executable, '-m', 'reproduction', 'status'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `| head` does
    error = process.stderr.read()
    assert 'Traceback' not in error and 'error' not in error and process.wait() == 1


@pytest.mark.parametrize('options, message', [
    (['--full'], '--full requires --output'),
    (['--full', '--output', 'x'], 'lacks train-images-idx3-ubyte.gz, train-'),
])
def test_conversion_of_images_with_wrong_options(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['make_slice.py', str(tmp_path), *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(FASHION_MNIST / 'make_slice.py'), run_name='__main__')
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('content, message', [
    ('{"a": 1', 'JSONDecodeError'), ('{"a": 1}', "KeyError.'training'"), ('[1]', 'TypeError'),
    (None, "KeyError.'test'"),
], ids=str)
def test_damaged_results(content, message, study, monkeypatch):
    """Also the result of a try that was copied to that of a final run, which has the same settings."""
    run = study.final_runs(study.protocol.cells['mae'])[0]
    pretend(study, run)
    result = json.loads(study.result_path(run).read_text())
    del result['test']
    study.result_path(run).write_text(json.dumps(result) if content is None else content)
    for command in ('status', 'run', 'report'):
        with pytest.raises(SystemExit, match=f'error: .*seed-0.json is damaged or is not the result .*{message}'):
            command_line(study, monkeypatch, command)


def test_tries_do_not_use_test_images_and_share_weights_with_final_runs(study, monkeypatch):
    run = study.tries(study.protocol.cells['scratch'])[0]
    read = Study.read_data
    monkeypatch.setattr(Study, 'read_data', lambda self, run: read(self, run)._replace(test=None))
    result = study.execute(run)
    assert 'test' not in result and 0 < result['validation']['accuracy'] < 100 and len(result['history']) == 3
    monkeypatch.undo()
    monkeypatch.setattr(experiment.Study, 'tries', lambda self, cell: [run])
    monkeypatch.setattr(training, 'save_checkpoint', lambda *args, **kwargs: pytest.fail('trained again'))
    final = study.execute(Run(run.cell, 0, 0, True))
    assert final['validation'] == result['validation'] and final['training'] == result['training']
    assert 0 < final['test']['accuracy'] < 100 and min(final['firing_rates'].values()) > 0
    assert final['operations']['parameters'] == sum(
        p.numel() for p in timm.create_model(run.cell.model, num_classes=10, embed_dim=16).parameters())


@pytest.mark.parametrize('name, fixed_bn', [('mae', 0.), ('tuned', 0.), ('tuned', 0.5)])
def test_interrupted_run_gives_same_result(name, fixed_bn, study, tmp_path, monkeypatch):
    """Interrupt each epoch except the last one, also while the initial weights are trained."""
    cell = study.protocol.cells[name]
    cell.recipe['fixed_bn'] = fixed_bn
    run = Run(cell, 0, 0, len(cell.tries) == 1)
    expected = study.execute(run)
    shutil.rmtree(study.checkpoints)
    study.result_path(run).unlink()
    save, stops = training.save_checkpoint, [1, 2]

    def save_and_stop(path, kind, **state):
        save(path, kind, **state)
        if stops:
            stops.pop()
            raise KeyboardInterrupt

    monkeypatch.setattr(training, 'save_checkpoint', save_and_stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            study.execute(run)
        assert not study.result_path(run).exists()
    assert without_times(study.execute(run)) == without_times(expected)
    assert json.loads(study.result_path(run).read_text())['history'] != []


def test_finished_weights_are_verified_and_can_be_read_by_several_runs(study):
    """`run --jobs 2` starts several tries at once, which load the same initial weights."""
    run = study.final_runs(study.protocol.cells['mae'])[0]
    data, path = study.read_data(run), study.checkpoint_folder(run) / 'last.pth.tar'
    expected = study.train(run, data).model.state_dict()
    with lock_folder_for_run(path.parent):
        loaded = study.train(run, data).model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())
        (path.parent / 'finished').unlink()
        with pytest.raises(ValueError, match='Another run of timm-spikformer is writing'):
            study.train(run, data)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in a tensor
    path.write_bytes(content)
    with pytest.raises(ValueError, match='last.pth.tar has been changed since timm-spikformer wrote it'):
        study.train(run, data)


@pytest.mark.slow
def test_killed_study_resumes(study, tmp_path):
    """After two SIGKILLs at arbitrary times, results and report equal those of an uninterrupted study."""
    def command(folder):
        return [
            sys.executable, '-m', 'reproduction', 'run', '--jobs', '2', '--protocol', str(tmp_path / 'protocol.yaml'),
            '--runs', str(folder / 'runs'), '--checkpoints', str(folder / 'checkpoints'), '--data', str(study.data)]

    env = dict(os.environ, OMP_NUM_THREADS='1')
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    subprocess.run(command(whole), env=env, check=True)
    for seconds in (17, 23):
        process = subprocess.Popen(command(killed), env=env, start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(killed), env=env, check=True)

    def results(folder):
        return {
            str(path.relative_to(folder)): without_times(json.loads(path.read_text()))
            for path in (folder / 'runs').rglob('*.json')}

    assert len(results(whole)) == 2 + 2 * 4 and results(killed) == results(whole)
    for folder in (whole, killed):
        write_report(study.protocol, folder / 'runs', folder)
    assert ' points, 95% interval ' in (whole / 'README.md').read_text()

    def text(folder):
        return [line for line in (folder / 'README.md').read_text().splitlines() if 'CPU hours' not in line]
    assert text(whole) == text(killed)


def test_shipped_weights(study, tmp_path, monkeypatch):
    """Runs use initial weights from the package if the same settings have trained them."""
    text = {**TINY, 'cells': {**TINY['cells'], 'mae': {**TINY['cells']['mae'], 'ships': 'x.mae_y'}}}
    (tmp_path / 'protocol.yaml').write_text(yaml.safe_dump(text))
    study = study._replace(protocol=read_protocol(tmp_path / 'protocol.yaml'))
    cell, folder = study.protocol.cells['mae'], tmp_path / 'weights'
    folder.mkdir()
    (folder / 'SHA256SUMS').write_text('0123  other.safetensors\n')
    with pytest.raises(ValueError, match='The result of mae is missing'):
        shipping.ship(study, folder)
    run = study.final_runs(cell)[0]
    study.execute(run)
    shipping.ship(study, folder)
    file = folder / 'x.mae_y.safetensors'
    assert (folder / 'SHA256SUMS').read_text() == (
        f'0123  other.safetensors\n{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n')
    note = yaml.safe_load(file.with_suffix('.yaml').read_text())
    assert note['command'] == 'python -m reproduction run --only mae --seeds 0' and note['epochs'] == 3
    with safe_open(file, 'pt') as f:
        assert json.loads(f.metadata()['autoencoder'])['decoder_embed_dim'] == 64
        assert json.loads(f.metadata()['model_args'])['time_steps'] == 1

    shutil.rmtree(study.checkpoints)
    assert not study.has_weights(run)
    monkeypatch.setattr(experiment, 'WEIGHTS_FOLDER', folder)
    assert study.has_weights(run) and not study.has_weights(study.final_runs(cell)[1])
    tuned = Run(study.protocol.cells['tuned'], 0, 0, False)
    study.train(tuned, study.read_data(tuned))
    assert [path.name for path in study.checkpoints.iterdir()] == [study.protocol.digest(tuned)]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (content, content[:1000]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match='x.mae_y.safetensors is damaged: its sha256 is not'):
            study.has_weights(run)
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    cell.recipe['lr'] = 0.5
    assert not study.has_weights(run)


def test_failed_export_changes_nothing(study, tmp_path):
    """Otherwise, SHA256SUMS would not match the weights that were written before the error."""
    cells = study.protocol.cells
    for name in ('mae', 'scratch'):
        cells[name] = cells[name]._replace(ships=f'x.{name}')
    run = study.final_runs(cells['mae'])[0]
    study.train(run, study.read_data(run))
    pretend(study, run, test={})
    with pytest.raises(ValueError, match='The result of scratch is missing'):
        shipping.ship(study, tmp_path / 'weights')
    assert not (tmp_path / 'weights').exists()


def pretend_final_runs(study: Study, **accuracies) -> None:
    """Write results of all tries and final runs of cells; `accuracies` are the test accuracies by seed."""
    for name, values in accuracies.items():
        cell = study.protocol.cells[name]
        for run in study.tries(cell):
            pretend(study, run, validation=dict(accuracy=50.), cpu_seconds=1800.)
        for run, accuracy in zip(study.final_runs(cell), values):
            pretend(
                study, run, cpu_seconds=1800., test=dict(accuracy=accuracy), machine=dict.fromkeys(
                    ('cpu', 'python', 'torch', 'timm'), 'x'),
                operations=dict(parameters=1e6, dense_macs=2e6, energy_uj=3., firing_rate=0.2))


def test_report_of_incomplete_study(study, tmp_path):
    pretend_final_runs(study, tuned=(80., 81.), scratch=(79., 79.5))
    old = Run(study.protocol.cells['mae']._replace(labels=5), 0, 0, True)  # a result of settings that have been changed
    pretend(study, old, cpu_seconds=9000.)
    write_report(study.protocol, study.runs, tmp_path)
    text = (tmp_path / 'README.md').read_text()
    assert 'mae 0/2' in text and '80.50 ± 0.71' in text
    # a try and a final run with the same seed and settings count once: 2 cells, 3 trainings each, half an hour each
    assert 'took 3.0 CPU hours' in text
    interval = stats.ttest_rel([80., 81.], [79., 79.5]).confidence_interval(0.95)
    assert (
        f'- It helps: **not shown** (+1.25 points, 95% interval {interval.low:+.2f} to {interval.high:+.2f})'
        in text)


@pytest.mark.parametrize('tuned, verdict', [
    ((80., 80.5), 'shown'), ((78., 78.5), 'contradicted'), ((80., 79.), 'not shown'), ((80.,), 'runs are missing'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_verdict(tuned, verdict, study, tmp_path):
    pretend_final_runs(study, tuned=tuned, scratch=(79., 79.51))
    write_report(study.protocol, study.runs, tmp_path)
    assert f'- It helps: **{verdict}**' in (tmp_path / 'README.md').read_text()


def test_difference_of_differences(study, tmp_path):
    text = yaml.safe_load((tmp_path / 'protocol.yaml').read_text())
    text['cells'].update(deep=dict(title='deep, scratch'), tuned_deep=dict(title='deep, pre-trained', init='mae'))
    text['questions']['Q']['claims'] = {'it helps more': ['tuned_deep', 'deep', 'tuned', 'scratch']}
    (tmp_path / 'protocol.yaml').write_text(yaml.safe_dump(text, sort_keys=False))
    study = study._replace(protocol=read_protocol(tmp_path / 'protocol.yaml'))
    pretend_final_runs(study, tuned_deep=(86., 87.), deep=(80., 82.), tuned=(81., 83.), scratch=(79., 81.5))
    write_report(study.protocol, study.runs, tmp_path)
    low, high = stats.ttest_rel([6., 5.], [2., 1.5]).confidence_interval(0.95)  # 4, 3.5
    line = f'- It helps more: **shown** (+3.75 points, 95% interval {low:+.2f} to {high:+.2f})'
    assert line in (tmp_path / 'README.md').read_text()


def test_softmax_attention_matches_pytorch():
    torch.manual_seed(0)
    layer = models.SoftmaxAttention(16, 2)
    x = torch.randint(0, 3, (2, 3, 5, 16)).float()
    for _ in range(3):
        layer(x)
    layer.eval()
    q, k, v = layer.qkv(x).unflatten(3, (3, 2, 8)).permute(3, 0, 1, 4, 2, 5)
    assert 0 < q.mean() < 1
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)
    torch.testing.assert_close(layer(x), layer.proj(expected))


@pytest.mark.parametrize('attention, layer', [('softmax', models.SoftmaxAttention), ('none', models.NoAttention)])
def test_attention_of_cell(attention, layer):
    config = read_protocol().cells['ssa']
    config = dict(Run(config, 0, 0, True).config(), attention=attention)
    model = models.create(config, 10, 28)
    assert all(type(block.attn) is layer for block in model.blocks)
    assert model(torch.rand(2, 3, 28, 28)).isfinite().all()


@pytest.mark.parametrize('name, by', [('sps-parameters', 'parameters'), ('sps-operations', 'dense_macs')])
def test_stems_are_compared_at_equal_size(name, by):
    """Sizes differ by at most 1%."""
    def size(name):
        model = models.create(Run(read_protocol().cells[name], 0, 0, True).config(), 10, 28)
        x = torch.rand(8, 3, 28, 28)
        return getattr(profile(calibrate(model, x), [x]).totals, by)

    assert size(name) == pytest.approx(size('ssa'), rel=0.01)


def test_operations_of_non_spiking_networks():
    """Multiply-accumulates of all products, also of attention, and their energy."""
    cell = read_protocol().cells['vit']
    model = models.create(Run(cell, 0, 0, True).config(), 10, 28).eval()
    images = read_splits()['test'].sample_evenly(2)
    operations = experiment._operations(model, Data(images, images, images, training_data_config()))
    C, depth, N = 104, 4, 7 * 7 + 1
    expected = 49 * C * 3 * 4 ** 2 + depth * (N * 12 * C ** 2 + 2 * N ** 2 * C) + C * 10
    assert operations['macs'] == operations['dense_macs'] == expected and operations['acs'] == 0
    assert operations['energy_uj'] == pytest.approx(4.6e-6 * expected)


def test_operations_of_autoencoder():
    """The encoder processes 12 of the 49 patches, and the decoder all of them."""
    cell = read_protocol().cells['mae-2']
    model = models.create_autoencoder(models.create(Run(cell, 0, 0, True).config(), 10, 28))
    images = read_splits()['test'].sample_evenly(32)
    data = Data(images, images, images, training_data_config())
    calibrate(model, next(iter(make_loader(images, data.config, 32)))[0])
    operations = experiment._operations(model, data)
    C, N, visible, pixels = 64, 49, 12, 3 * 4 ** 2
    decoder = visible * C * C + 2 * (N * 12 * C ** 2 + 2 * N ** 2 * C) + N * C * pixels
    assert operations['total_macs'] == operations['dense_macs'] + decoder
    classifier = profile(calibrate(models.create(Run(cell, 0, 0, True).config(), 10, 28), torch.rand(8, 3, 28, 28)), [
        torch.rand(1, 3, 28, 28)]).totals
    assert operations['dense_macs'] == pytest.approx(classifier.dense_macs * visible / N, rel=0.02)
    committed = json.loads((FOLDER / 'runs' / 'mae-2' / 'seed-0.json').read_text())['operations']
    assert {key: operations[key] for key in ('total_macs', 'dense_macs', 'parameters')} == {
        key: committed[key] for key in ('total_macs', 'dense_macs', 'parameters')}


def test_default_path_of_protocol():
    assert PROTOCOL == Path(experiment.__file__).with_name('protocol.yaml') and PROTOCOL.is_file()
