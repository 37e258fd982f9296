"""Demo command with a tiny model and few images."""
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import write_images
from PIL import Image

from timm_spikformer import cli, training
from timm_spikformer.demo.progress import Progress, Stage
from timm_spikformer.folders import MANIFEST
from timm_spikformer.images import make_loader, read_splits, select_train_test, training_data_config
from timm_spikformer.linear import fit_linear
from timm_spikformer.training import Recipe

TINY = ['--model', 'test_spikformer_v2', '--batch-size', '8', '--lr', '3e-3', '--device', 'cpu', '--labeled', '40',
        '--pretrain-epochs', '1', '--finetune-epochs', '1']


def run_demo(output, *args):
    cli.main(['demo', *TINY, '--output', str(output), *map(str, args)])
    return json.loads((output / 'results.json').read_text())


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """100 training and 20 test images of two classes."""
    root = tmp_path_factory.mktemp('data')
    write_images(root / 'train', 'train', classes=2, count=50)
    write_images(root / 'test', 'test', classes=2, count=10)
    return root


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp('demo')
    run_demo(output, '--data', folder, '--epochs', 5)
    return output


def saved_weights(output: Path) -> bytes:
    return (output / 'model' / 'model.safetensors').read_bytes()


def test_linear_classifier_matches_scikit_learn():
    """scikit-learn's LogisticRegression(max_iter=1000) on the same pixels, scaled to 0 to 1, gives 83.6%."""
    train, test = select_train_test(read_splits())
    accuracy = fit_linear(train, test, training_data_config(), torch.device('cpu'))
    assert accuracy == pytest.approx(83.6, abs=0.3)


def test_linear_classifier_with_color_images_in_one_split():
    train, test = (images.sample_evenly(50) for images in select_train_test(read_splits()))
    decode = test._decode
    test._decode = lambda i: Image.merge('RGB', (decode(i).convert('L'), *2 * [Image.new('L', (28, 28))]))
    assert 0 <= fit_linear(train, test, training_data_config(), torch.device('cpu')) <= 100


def test_results_and_saved_model(finished, folder):
    results = json.loads((finished / 'results.json').read_text())
    assert results['accuracy'] >= 75 and results['linear_accuracy'] >= 75
    assert min(results['firing_rates'].values()) > 0
    assert results['labeled'] == 40
    assert all(0 <= results[f'{name}_accuracy'] <= 100 for name in ('finetuned', 'scratch'))
    assert 0 < results['reconstruction_loss'] and 0 < results['reconstruction_loss_of_mean'] <= 1
    with Image.open(finished / 'reconstruction.png') as picture:
        assert picture.width > picture.height > 3 * 64  # three rows of images of 64 pixels
        assert np.asarray(picture).std() > 10
    model = timm.create_model(f'local-dir:{finished / "model"}', pretrained=True).eval()
    assert model.num_classes == 2
    assert model.pretrained_cfg['label_names'] == ['class_0', 'class_1']
    loader = make_loader(read_splits(folder)['test'], training_data_config('test_spikformer_v2'), 8)
    accuracy, rates = training.evaluate(model, loader)
    assert accuracy == results['accuracy'] and rates == pytest.approx(results['firing_rates'])


@pytest.mark.parametrize('stage, epoch', [('supervised', 1), ('scratch', 0)])
def test_resumed_run_equals_uninterrupted_run(
        stage, epoch, finished, folder, tmp_path, monkeypatch):
    """A run with the same seed, interrupted after an epoch and resumed, gives equal weights and results."""
    save = training.save_checkpoint

    def save_and_interrupt(path, kind, **state):
        save(path, kind, **state)
        if path.stem.startswith(stage) and state['epoch'] == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, 'save_checkpoint', save_and_interrupt)
    with pytest.raises(SystemExit, match=f'--resume --output {tmp_path}'):
        run_demo(tmp_path, '--data', folder, '--epochs', 5)
    assert not (tmp_path / 'results.json').exists()
    monkeypatch.undo()
    resumed, uninterrupted = run_demo(tmp_path, '--resume'), json.loads((finished / 'results.json').read_text())
    assert saved_weights(tmp_path) == saved_weights(finished)
    assert {k: v for k, v in resumed.items() if 'seconds' not in k} == {
        k: v for k, v in uninterrupted.items() if 'seconds' not in k}


def test_new_run_removes_checkpoints_of_previous_run(finished, folder, tmp_path, monkeypatch):
    """Otherwise, --resume would use checkpoints of the previous run as finished stages of the new one."""
    output = tmp_path / 'output'
    shutil.copytree(finished, output)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_spikformer.demo.demo.train', interrupt)
    with pytest.raises(SystemExit, match='--resume'):
        run_demo(output, '--data', folder, '--epochs', 5, '--seed', 1)
    assert not list(output.glob('*.pth.tar')) and not (output / 'results.json').exists()


@pytest.mark.parametrize('args', [
    ['--epochs', 0], ['--model', 'resnet18'], ['--device', 'unknown'], ['--data', 'nowhere'], ['--batch-size', 128],
    ['--mask-ratio', 0.9999],
])
def test_bad_arguments_do_not_change_output_folder(args, folder, tmp_path):
    """The folder holds a checkpoint of train.py."""
    (tmp_path / 'model_best.pth.tar').write_bytes(b'user data')
    with pytest.raises(SystemExit, match='error: '):
        run_demo(tmp_path, '--data', folder, *args)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [('model_best.pth.tar', b'user data')]


def test_foreign_files_are_kept(finished, folder, tmp_path):
    output = tmp_path / 'output'
    shutil.copytree(finished, output)
    (output / 'model_best.pth.tar').write_bytes(b'user data')
    (output / 'notes.txt').write_text('user data')
    run_demo(output, '--data', folder, '--stages', 'train', '--epochs', 1)
    assert (output / 'model_best.pth.tar').read_bytes() == b'user data'
    assert (output / 'notes.txt').read_text() == 'user data'
    assert {path.name for path in output.iterdir()} == {
        'model_best.pth.tar', 'notes.txt', 'args.json', 'model', 'results.json', 'supervised.pth.tar', MANIFEST}


@pytest.mark.parametrize('name', [
    'supervised.pth.tar', 'scratch.pth.tar', 'args.json', 'results.json', 'predictions.png', 'reconstruction.png',
    'model/config.json'])
def test_foreign_output_file_is_rejected_before_training(name, folder, tmp_path, monkeypatch):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b'user data')
    monkeypatch.setattr('timm_spikformer.demo.demo.train', lambda *args, **kwargs: pytest.fail('trained'))
    with pytest.raises(SystemExit, match=f'error: .*{Path(name).name}'):
        run_demo(tmp_path, '--data', folder)
    assert [path for path in tmp_path.rglob('*') if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_bytes() == b'user data'


def test_other_commands_reject_folders_of_demo(finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'demo')
    model, weights = tmp_path / 'demo' / 'model', saved_weights(tmp_path / 'demo')
    torch.save(timm.create_model('test_spikformer_v2').state_dict(), tmp_path / 'a.pth')
    for command in (
            ['config', 'spikformer_v2_8_512'], ['convert', tmp_path / 'a.pth', '--model', 'test_spikformer_v2'],
            ['publish', finished / 'model', '--repo', 'a/test_spikformer_v2.x', '--license', 'mit', '--dry-run']):
        with pytest.raises(SystemExit, match='error: .*model contains a model that `timm-spikformer demo` wrote. '):
            cli.main([*map(str, command), '--output', str(model)])
    with pytest.raises(SystemExit, match='demo contains args.json, which `timm-spikformer demo` wrote. Choose an'):
        cli.main(['profile', 'x', '--output', str(tmp_path / 'demo')])
    assert saved_weights(tmp_path / 'demo') == weights


def test_output_folder_inside_data_is_rejected(folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'data')
    torch.save(timm.create_model('test_spikformer_v2').state_dict(), tmp_path / 'a.pth')
    output, before = tmp_path / 'data' / 'train' / 'out', sorted(tmp_path.rglob('*'))
    for command in (
            ['demo', '--data', tmp_path / 'data'], ['profile', 'test_spikformer_v2', '--data', tmp_path / 'data'],
            ['publish', tmp_path / 'a.pth', '--model', 'test_spikformer_v2', '--repo', 'a/b', '--license', 'mit',
             '--dry-run', '--eval-data', tmp_path / 'data', '--dataset', 'c/d']):
        with pytest.raises(SystemExit, match='error: .*out is inside .*data, so its files would be read as images'):
            cli.main([*map(str, command), '--output', str(output)])
    assert sorted(tmp_path.rglob('*')) == before


def test_concurrent_demo_in_same_folder_is_rejected(folder, tmp_path, monkeypatch):
    results = []
    command = [sys.executable, '-m', 'timm_spikformer.cli', 'demo', *TINY, '--data', folder]

    def run_second_demo(*args, **kwargs):
        results.append(subprocess.run(
            [*command, '--output', tmp_path / 'out'],
            env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True))
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_spikformer.demo.demo.train', run_second_demo)
    with pytest.raises(SystemExit, match='--resume'):
        run_demo(tmp_path / 'out', '--data', folder, '--epochs', 5)
    assert results[0].returncode == 1
    assert f'error: Another run of timm-spikformer is writing to {tmp_path / "out"}. Wait until' in results[0].stderr
    assert json.loads((tmp_path / 'out' / 'args.json').read_text())['epochs'] == 5
    assert sorted(os.listdir(tmp_path / 'out')) == [MANIFEST, 'args.json']


@pytest.mark.parametrize('size', [500, 3_000])
def test_full_disk(size, folder, tmp_path):
    """A limit on the file size simulates a full disk: too small for the arguments, or only for a checkpoint."""
    code = textwrap.dedent(f"""
        import resource, signal, sys
        from timm_spikformer import cli
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
        cli.main(sys.argv[1:])""")
    done = subprocess.run(
        [sys.executable, '-c', code, 'demo', *TINY, '--data', folder, '--epochs', '1', '--output', tmp_path / 'out'],
        env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(f'error: {tmp_path / "out"}') and 'Traceback' not in done.stderr
    assert 'File too large; nothing was written' in done.stderr
    assert os.listdir(tmp_path) == []


def test_interrupted_save_keeps_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'last.pth.tar'
    training.save_checkpoint(path, 'demo', epoch=0)

    def write_half_and_interrupt(path, data):
        with path.open('wb') as f:
            f.write(data[:len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, 'write_bytes', write_half_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.save_checkpoint(path, 'demo', epoch=1)
    assert torch.load(path, weights_only=True) == {'epoch': 0}
    assert sorted(os.listdir(tmp_path)) == [MANIFEST, 'last.pth.tar']


def test_quick(tmp_path, capsys):
    """Run all stages on the included images."""
    results = run_demo(tmp_path, '--quick', '--model', 'spikformer_v2_2_64_patch4_32')
    assert results['labeled'] == 40 and results['seconds'] > 0 and 92 < results['shipped_accuracy'] < 95
    out = capsys.readouterr().out
    assert 'Accuracy 93.6% on 1,000 images of Fashion-MNIST, test split' in out and 'Ankle boot' in out


@pytest.mark.parametrize('args', [
    ['--data', 'DIR', '--epochs', 1], ['--quick', '--model', 'spikformer_v2_2_64_patch4_32']], ids=str)
def test_recorded_command_reproduces_weights(args, folder, tmp_path, monkeypatch):
    (tmp_path / 'DIR').symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    run_demo(tmp_path / 'first', '--stages', 'train', *args)
    record = yaml.safe_load((tmp_path / 'first' / 'model' / 'training_args.yaml').read_text())
    cli.main([*shlex.split(record['command'])[1:], '--device', 'cpu', '--output', 'second'])
    assert saved_weights(tmp_path / 'second') == saved_weights(tmp_path / 'first')


def test_stages(tmp_path):
    """Run single stages."""
    results = run_demo(tmp_path, '--stages', 'classify')
    assert set(results) == {'shipped_accuracy', 'seconds'} and results['seconds'] > 0
    with Image.open(tmp_path / 'predictions.png') as picture:
        assert np.asarray(picture).std() > 10
    results = run_demo(tmp_path, '--quick', '--stages', 'pretrain', '--model', 'spikformer_v2_2_64_patch4_32')
    assert 'finetuned_accuracy' in results and 'accuracy' not in results
    assert not (tmp_path / 'predictions.png').exists() and (tmp_path / 'reconstruction.png').exists()


def test_class_with_one_image_and_300_classes(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (300, 8, 8), dtype=np.uint8)
    for label in range(300):
        (tmp_path / 'data' / str(label)).mkdir(parents=True)
        for i in range(1 if label == 7 else 2):
            Image.fromarray(pixels[label]).save(tmp_path / 'data' / str(label) / f'{i}.png')
    results = run_demo(tmp_path / 'out', '--quick', '--data', tmp_path / 'data', '--stages', 'train')
    assert results['tested_on'] == '100 images of data, held-out 10%'
    assert results['linear_accuracy'] is None  # not fitted to large problems


def test_ctrl_c(folder, tmp_path):
    """Interrupt a process at an arbitrary point after its first checkpoint."""
    output = tmp_path / 'a folder'
    command = [sys.executable, '-m', 'timm_spikformer.cli', 'demo', *TINY, '--output', str(output)]
    env = dict(os.environ, OMP_NUM_THREADS='1')
    process = subprocess.Popen(
        [*command, '--data', str(folder), '--epochs', '1000'], env=env, stderr=subprocess.PIPE, text=True,
        # background jobs of a shell ignore SIGINT, which child processes inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    deadline = time.monotonic() + 120
    while not (output / 'supervised.pth.tar').is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"timm-spikformer demo --resume --output '{output}'" in err and 'Traceback' not in err
    assert torch.load(output / 'supervised.pth.tar', weights_only=True)['state_dict']


def test_printed_commands(folder, tmp_path, capsys):
    """Compare the printed commands, and run those that are fast."""
    output = tmp_path / "it's [red] here"
    run_demo(output, '--data', folder, '--stages', 'train', '--epochs', 1)
    lines = capsys.readouterr().out.splitlines()
    printed = {line[2:22].strip(): shlex.split(line[24:]) for line in lines if line[22:24] == '  '}
    code = printed['load it'][2]
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0
    assert printed['profile it'] == [
        'timm-spikformer', 'profile', 'test_spikformer_v2', '--checkpoint', str(output / 'model'), '--data',
        str(folder)]
    assert printed['use your own images'] == ['timm-spikformer', 'demo', '--data', 'DIR']
    assert printed['train a larger model'] == ['timm-spikformer', 'recipe', 'cifar10']
    cli.main(printed['train a larger model'][1:])
    assert 'train.py -c' in capsys.readouterr().out


def test_resume_rejects_changed_checkpoint(finished, tmp_path):
    output = tmp_path / 'output'
    shutil.copytree(finished, output)
    torch.save({'epoch': -5}, output / 'supervised.pth.tar')
    with pytest.raises(SystemExit, match='error: .*supervised.pth.tar has been changed since timm-spikformer wrote it'):
        run_demo(output, '--resume')


RUN_CONFIG = {'lr': 0.2, 'data': 'a'}


def load_checkpoint(path):
    return training.load_checkpoint(path, torch.device('cpu'), {'model': torch.nn.Linear(1, 1)}, 3, RUN_CONFIG)


@pytest.mark.parametrize('changes, message', [
    ({'epoch': -5}, 'it was saved after epoch -5, expected 0 to 2'),
    ({'epoch': 99}, 'it was saved after epoch 99, expected 0 to 2'),
    ({'epoch': '1'}, 'it was saved after epoch 1, expected 0 to 2'),
    ({'history': []}, 'it records 0 epochs, expected 1'),
    ({'seconds': math.nan}, 'its training time is nan seconds'),
    ({'trained_with': {'lr': 0.1, 'data': 'a'}}, 'it was trained with lr = 0.1, now it is 0.2'),
    ({'model': 3}, 'Expected state_dict'),
    ({'model': {}}, r'Error\(s\) in loading state_dict .*Missing key\(s\)'),
], ids=repr)
def test_load_checkpoint_rejects_damaged_files_and_other_runs(changes, message, tmp_path):
    path, history = tmp_path / 'x.pth.tar', [{'loss': 0.1}]
    checkpoint = {
        'epoch': 0, 'history': history, 'seconds': 0.5, 'trained_with': RUN_CONFIG,
        'model': torch.nn.Linear(1, 1).state_dict()}
    torch.save(checkpoint, path)
    assert load_checkpoint(path) == (1, history, 0.5)
    torch.save({**checkpoint, **changes}, path)
    with pytest.raises(ValueError, match=f'x.pth.tar is damaged or is not a checkpoint of this run: {message}'):
        load_checkpoint(path)


@pytest.mark.parametrize('content, message', [
    ([1], 'list indices must be integers'),
    ({'state_dict': {}}, "it does not contain 'epoch'"),
    ({'state_dict': {}, 'epoch': 0}, "it does not contain 'history'"),
], ids=repr)
def test_load_checkpoint_rejects_other_files(content, message, tmp_path):
    torch.save(content, tmp_path / 'x')
    with pytest.raises(ValueError, match=f'x is damaged or is not a checkpoint of this run: {message}'):
        load_checkpoint(tmp_path / 'x')


def test_load_checkpoint_rejects_truncated_file(tmp_path):
    torch.save({'epoch': 0}, tmp_path / 'x')
    (tmp_path / 'x').write_bytes((tmp_path / 'x').read_bytes()[:500])
    with pytest.raises(ValueError, match='x is damaged or is not a checkpoint of this run'):
        load_checkpoint(tmp_path / 'x')


@pytest.mark.parametrize('text', ['', '[]', '{"epochs": 6}'])
def test_resume_rejects_changed_arguments_file(text, finished, tmp_path):
    output = tmp_path / 'output'
    shutil.copytree(finished, output)
    (output / 'args.json').write_text(text)
    with pytest.raises(SystemExit, match='error: .*args.json has been changed since timm-spikformer wrote it'):
        run_demo(output, '--resume')


def test_resume_rejects_other_arguments_or_data(finished, folder, tmp_path):
    output, data = tmp_path / 'output', tmp_path / 'data'
    shutil.copytree(finished, output)
    for args, message in ((['--epochs', 7], '--epochs is 7, but the run to resume was started with 5'),
                          (['--data', data], '--data is .*data, but the run to resume was started with .*')):
        with pytest.raises(SystemExit, match=f'error: {message}'):
            run_demo(output, '--resume', *args)
    with pytest.raises(SystemExit, match='--epochs is 10, but the run'):  # the default, given explicitly
        cli.main(['demo', '--resume', '--output', str(output), '--epochs', '10'])
    shutil.copytree(folder, data)
    other = tmp_path / 'other'
    run_demo(other, '--data', data, '--epochs', 1, '--stages', 'train')
    assert 'accuracy' in run_demo(other, '--resume', '--epochs', 1)
    extra = data / 'train' / 'class_0' / 'extra.png'
    shutil.copy(next((data / 'train' / 'class_0').iterdir()), extra)
    with pytest.raises(SystemExit, match='it was trained with training images = 100 images, .* now it is 101 images'):
        run_demo(other, '--resume')


def test_progress_covers_all_stages(monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    stages = [Stage('a', 'A', Recipe(2, 0.1, 8)), Stage('b', 'B', Recipe(1, 0.1, 8), cost=0.5)]
    images = read_splits()['test'].sample_evenly(20)
    total = sum(stage.work(images) for stage in stages)
    assert total == 2 * 16 + 0.5 * 16
    with Progress(total) as progress:
        progress.skip(16)
        progress.update(16)
        progress.update(100)
        assert progress.bar.n == total and progress.bar.initial == 16


def test_piped_output_has_one_line_per_epoch(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'timm_spikformer.cli', 'demo', *TINY, '--data', folder, '--stages', 'train', '--epochs',
         '3', '--output', tmp_path / 'out'],
        env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True)
    assert done.stderr == '' and '\r' not in done.stdout
    assert sum(line.startswith('Training, epoch') for line in done.stdout.splitlines()) == 3


def test_fewer_images_than_a_batch(folder, tmp_path):
    """The error is raised before the first stage, even if it concerns a later stage."""
    with pytest.raises(SystemExit, match='Training has 100 images, fewer than its batch size of 128'):
        run_demo(tmp_path, '--data', folder, '--batch-size', 128)
    with pytest.raises(SystemExit, match='Fine-tuning has 4 images, fewer than its batch size of 8'):
        run_demo(tmp_path, '--data', folder, '--labeled', 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('encoding', ['ascii', pytest.param('utf-8', marks=pytest.mark.slow)])
def test_output_encodings(encoding, tmp_path):
    env = dict(os.environ, PYTHONIOENCODING=encoding, OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, '-m', 'timm_spikformer.cli', 'demo', '--stages', 'classify', '--output', tmp_path / 'é µ'],
        env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b'Ankle boot' in done.stdout


@pytest.mark.parametrize('args, message', [
    (['--model', 'resnet18'], "no Spikformer 'resnet18', expected one of .*spikformer_v2_8_512"),
    (['--resume'], 'no .*args.json to resume from'),
    (['--time-steps', 0], '--time-steps must be at least 1, got 0'),
    (['--epochs', 0], '--epochs must be at least 1, got 0'),
    (['--mask-ratio', 1], '--mask-ratio must be greater than 0 and less than 1, got 1'),
    (['--lr', 0], '--lr must be greater than 0 and finite, got 0'),
    (['--lr', 'nan'], '--lr must be greater than 0 and finite, got nan'),
    (['--pretrain-lr', 'inf'], '--pretrain-lr must be greater than 0 and finite, got inf'),
    (['--weight-decay', -1], '--weight-decay must be at least 0 and finite, got -1'),
    (['--weight-decay', 'nan'], '--weight-decay must be at least 0 and finite, got nan'),
    (['--mask-ratio', 'nan'], '--mask-ratio must be greater than 0 and less than 1, got nan'),
    (['--time-steps', 10 ** 25], '--time-steps must be at most 2147483647, got 1'),
    (['--batch-size', 10 ** 25], '--batch-size must be at most 2147483647, got 1'),
    (['--labeled', 1], 'Fine-tuning has 1 image.*Raise --labeled, which is 1, or lower --batch-size'),
    (['--batch-size', 10_000], 'Training has .* fewer than its batch size of 10000. Lower --batch-size'),
    (['--seed', -1], '--seed must be from 0'),
    (['--device', 'unknown'], '--device unknown cannot be used'),
    (['--stages', 'classify', '--data', '.'], '--data has no effect on it. Omit --data or classify'),
    (['--data', ''], '--data is empty'),
])
def test_bad_arguments(args, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run_demo(tmp_path, *args)
