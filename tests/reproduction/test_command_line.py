"""`python -m reproduction`: options, errors and interruption."""
import errno
import math
import os
import runpy
import signal
import subprocess
import sys

import pytest
from small_study import pretend

from reproduction import experiment, schedule
from reproduction.__main__ import main
from timm_spikformer import training
from timm_spikformer.images import FASHION_MNIST


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


def command_line(study, monkeypatch, command, *options):
    """Run the command line on a study in this process."""
    folders = dict(protocol=study.runs.parent / 'protocol.yaml', runs=study.runs)
    if command != 'report':
        folders.update(checkpoints=study.checkpoints, data=study.data)
    defaults = [f'--{name}={path}' for name, path in folders.items()]
    monkeypatch.setattr(sys, 'argv', ['reproduction', command, *defaults, *options])
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


def test_run_without_a_result_is_not_repeated(study, fake_processes):
    """The result of a run is outdated if the protocol was changed after `run` had started."""
    assert schedule.run_missing(study, ['mae'], None, 1, []) == ['mae/seed-0', 'mae/seed-1']
    assert fake_processes.started == ['mae/seed-0', 'mae/seed-1']


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
    ('status', ['--runs', 'nothing'], 'nothing is not a folder with results'),
    ('status', ['--runs', __file__], 'is not a folder with results'),
    ('report', [], 'A report of another protocol or other results requires --output'),
    ('report', ['--runs', 'nothing', '--output', 'x'], 'nothing is not a folder with results'),
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


@pytest.mark.parametrize('change, message', [
    ('{"a": 1', 'JSONDecodeError'), ('{"a": 1}', "KeyError.'training'"), ('[1]', 'TypeError'),
    ('{"a": 1, "a": 2}', "the key 'a' appears twice"), ('[' * 10 ** 5, 'RecursionError'),
    (dict(cell='tuned'), "cell is 'tuned', expected 'mae'"), (dict(seed=7), 'seed is 7, expected 0'),
    (dict(test={}), "KeyError.'loss'"), (dict(cpu_seconds=10 ** 400), 'cpu_seconds must be at least 0 and finite'),
    (dict(validation={'loss': math.nan}), 'validation: loss must be at least 0 and finite, got nan'),
    (dict(operations=3), 'TypeError'), (dict(machine={}), "KeyError.'cpu'"), (dict(config={'recipe': {}}), 'config is'),
    (dict(operations=dict(parameters=1, total_macs=2)), "KeyError.'firing_rate'"),
    (dict(operations=dict(parameters=1, total_macs=2, firing_rate='x')), "firing_rate must be .*, got 'x'"),
    (dict(history=[dict(loss=1, seconds=1, gpu=5)]), 'gpu must be a string, got 5'),
    (dict(history=[5]), 'TypeError'),
], ids=lambda value: str(value)[:40])
def test_damaged_results(change, message, study, monkeypatch):
    run = study.final_runs(study.protocol.cells['mae'])[0]
    if isinstance(change, dict):
        pretend(study, run, **change)
    else:
        study.result_path(run).parent.mkdir(parents=True)
        study.result_path(run).write_text(change)
    for command, *options in ('status',), ('run',), ('report', '--output', str(study.runs.parent)):
        with pytest.raises(SystemExit, match=f'error: .*seed-0.json is damaged or is not the result .*{message}'):
            command_line(study, monkeypatch, command, *options)


def test_accuracy_above_100_percent_is_rejected(study, monkeypatch):
    pretend(study, study.tries(study.protocol.cells['scratch'])[0], validation=dict(accuracy=101.))
    with pytest.raises(SystemExit, match='validation: accuracy must be at least 0 and at most 100, got 101.0'):
        command_line(study, monkeypatch, 'status')


def test_result_that_cannot_be_written_is_noticed_before_training(study, monkeypatch):
    def no_space(path, parent):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(training, 'save_checkpoint', lambda *args, **kwargs: pytest.fail('trained'))
    monkeypatch.setattr(experiment, 'create_temporary', no_space)
    with pytest.raises(SystemExit, match='error: .*mae/seed-1.json: No space left on device'):
        command_line(study, monkeypatch, 'run-one', 'mae/seed-1')
    study.result_path(study.final_runs(study.protocol.cells['mae'])[0]).mkdir()
    with pytest.raises(SystemExit, match='seed-0.json is a folder. Remove it'):
        command_line(study, monkeypatch, 'run', '--only', 'mae')


@pytest.mark.parametrize('options, message', [
    (['--full'], '--full requires --output'),
    (['--full', '--output', 'x'], 'lacks train-images-idx3-ubyte.gz, train-'),
])
def test_conversion_of_images_with_wrong_options(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['make_slice.py', str(tmp_path), *options])
    with pytest.raises(SystemExit):
        runpy.run_path(str(FASHION_MNIST / 'make_slice.py'), run_name='__main__')
    assert message in capsys.readouterr().err
