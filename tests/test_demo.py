"""The demo at the size of a test: a tiny model, few images, the console script's own entry point."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from conftest import write_images
from PIL import Image

from timm_spikformer import cli
from timm_spikformer.demo import data as demo_data
from timm_spikformer.demo import training

TINY = ['--model', 'test_spikformer_v2', '--batch-size', '8', '--lr', '3e-3', '--device', 'cpu', '--labelled', '40',
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


def test_shipped_data():
    data = demo_data.load_data(None, 'spikformer_v2_2_64_patch4_32')
    assert len(data.train) == 6000 and len(data.test) == 1000
    assert data.classes[0] == 'T-shirt/top' and len(data.classes) == 10
    for split in (data.train, data.test):
        assert set(np.bincount(split.reader.dataset['label'])) == {len(split) // 10}
    x, _ = next(iter(demo_data.make_loader(data, 100, torch.device('cpu'), is_training=False)))
    assert x.shape == (100, 3, 28, 28)
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1


def test_linear_classifier_agrees_with_scikit_learn():
    """scikit-learn's LogisticRegression(max_iter=1000) on the same pixels of 0 to 1 gives 83.6 %."""
    data = demo_data.load_data(None, 'spikformer_v2_2_64_patch4_32')
    assert training.fit_linear(data, torch.device('cpu')) == pytest.approx(83.6, abs=0.3)


def test_results_and_the_folder_that_loads(finished, folder):
    results = json.loads((finished / 'results.json').read_text())
    assert results['accuracy'] >= 75 and results['linear_accuracy'] >= 75
    assert min(results['firing_rates'].values()) > 0
    assert results['labelled'] == 40
    assert all(0 <= results[f'{name}_accuracy'] <= 100 for name in ('finetuned', 'scratch'))
    assert 0 < results['reconstruction_loss'] and 0 < results['reconstruction_loss_of_mean'] <= 1
    with Image.open(finished / 'reconstruction.png') as picture:
        assert picture.width > picture.height > 3 * 64  # three rows of images of 64 pixels
        assert np.asarray(picture).std() > 10
    model = timm.create_model(f'local-dir:{finished / "model"}', pretrained=True).eval()
    assert model.num_classes == 2
    assert model.pretrained_cfg['label_names'] == ['class_0', 'class_1']
    data = demo_data.load_data(folder, 'test_spikformer_v2')
    accuracy, rates = training.evaluate(model, demo_data.make_loader(data, 8, torch.device('cpu'), is_training=False))
    assert accuracy == results['accuracy'] and rates == pytest.approx(results['firing_rates'])


@pytest.mark.parametrize('stage, epoch', [('supervised', 1), ('scratch', 0)])
def test_the_same_seed_gives_the_same_and_resuming_changes_nothing(
        stage, epoch, finished, folder, tmp_path, monkeypatch):
    """Interrupted after an epoch and resumed, the run ends as the uninterrupted one."""
    save = training.save_checkpoint

    def save_and_interrupt(path, **state):
        save(path, **state)
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


def test_a_new_run_is_not_resumed_from_an_old_one(finished, folder, tmp_path, monkeypatch):
    """Nothing of what another run has left in the folder is taken for a stage of the run that is resumed."""
    output = tmp_path / 'output'
    shutil.copytree(finished, output)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_spikformer.demo.load_data', interrupt)
    with pytest.raises(SystemExit, match='--resume'):
        run_demo(output, '--data', folder, '--epochs', 5, '--seed', 1)
    assert not list(output.glob('*.pth.tar'))


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / 'last.pth.tar'
    training.save_checkpoint(path, epoch=0)

    def interrupted(state, f):
        Path(f).write_bytes(b'half')
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.save_checkpoint(path, epoch=1)
    assert torch.load(path, weights_only=True) == {'epoch': 0}


def test_quick(tmp_path):
    """On the shipped images."""
    results = run_demo(tmp_path, '--quick', '--model', 'spikformer_v2_2_64_patch4_32')
    assert results['labelled'] == 40 and results['seconds'] < 300


def test_ctrl_c(folder, tmp_path):
    """A real interrupt of a real process, at whatever it is doing after its first checkpoint."""
    command = [sys.executable, '-m', 'timm_spikformer.cli', 'demo', *TINY, '--output', str(tmp_path)]
    env = dict(os.environ, OMP_NUM_THREADS='1')
    process = subprocess.Popen(
        [*command, '--data', str(folder), '--epochs', '1000'], env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'supervised.pth.tar').is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f'timm-spikformer demo --resume --output {tmp_path}' in err and 'Traceback' not in err
    assert torch.load(tmp_path / 'supervised.pth.tar', weights_only=True)['state_dict']


def test_parquet_without_a_test_split(folder, tmp_path):
    """A tenth of each class is held out, the same at the same seed."""
    train = datasets.load_dataset(str(folder), split='train')
    train.to_parquet(tmp_path / 'train.parquet')
    data = demo_data.load_data(tmp_path, 'test_spikformer_v2', seed=3)
    assert (len(data.train), len(data.test)) == (90, 10)
    again = demo_data.load_data(tmp_path, 'test_spikformer_v2', seed=3)
    assert data.test.reader.dataset['label'] == again.test.reader.dataset['label']
    assert set(data.test.reader.dataset['label']) == {0, 1}


def test_parquet_of_plain_integers(folder, tmp_path):
    train = datasets.load_dataset(str(folder), split='train').cast_column('label', datasets.Value('int64'))
    train.to_parquet(tmp_path / 'train.parquet')
    data = demo_data.load_data(tmp_path, 'test_spikformer_v2')
    assert data.classes == ['0', '1'] and len(data.test) == 10


@pytest.mark.parametrize('files, message', [
    (None, 'is not a folder'),
    ({}, 'holds no images'),
    ({'notes.txt': b'no picture'}, 'has the columns text'),
], ids=['missing', 'empty', 'text'])
def test_folder_without_images(files, message, tmp_path):
    data = tmp_path / 'data'
    if files is not None:
        data.mkdir()
        for name, content in files.items():
            (data / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message + '.*Expected DIR'):
        run_demo(tmp_path / 'out', '--data', data)


def test_folder_of_one_class(tmp_path):
    write_images(tmp_path / 'data' / 'train', 'train', classes=1, count=4)
    write_images(tmp_path / 'data' / 'test', 'test', classes=1, count=4)
    with pytest.raises(SystemExit, match='images of one class only, or no labels'):
        run_demo(tmp_path / 'out', '--data', tmp_path / 'data')


def test_parquet_of_other_columns(tmp_path):
    datasets.Dataset.from_dict({'pixels': [[1, 2]], 'target': [0]}).to_parquet(tmp_path / 'train.parquet')
    with pytest.raises(SystemExit, match='columns pixels, target.*columns image and label'):
        run_demo(tmp_path / 'out', '--data', tmp_path)


def test_parquet_of_text_labels(folder, tmp_path):
    train = datasets.load_dataset(str(folder), split='train')
    train = train.cast_column('label', datasets.Value('string'))
    train.to_parquet(tmp_path / 'train.parquet')
    with pytest.raises(SystemExit, match="labels such as '0', expected integers or a ClassLabel"):
        run_demo(tmp_path / 'out', '--data', tmp_path)


def test_fewer_images_than_a_batch(folder, tmp_path):
    with pytest.raises(SystemExit, match='100 training images, fewer than --batch-size 128'):
        run_demo(tmp_path, '--data', folder, '--batch-size', 128)


def test_nan_in_the_images(folder, tmp_path):
    data = demo_data.load_data(folder, 'test_spikformer_v2')
    loader = [(torch.full((2, 3, 32, 32), float('nan')), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ValueError, match='not finite'):
        training.evaluate(timm.create_model('test_spikformer_v2', num_classes=len(data.classes)), loader)


@pytest.mark.parametrize('args, message', [
    (['--model', 'resnet18'], "no Spikformer 'resnet18', expected one of .*spikformer_v2_8_512"),
    (['--resume'], 'no .*args.json to resume from'),
    (['--time-steps', 0], 'time_steps must be an integer of at least 1, got 0'),
    (['--epochs', 0], '--epochs must be at least 1, got 0'),
    (['--mask-ratio', 1], '--mask-ratio must be greater than 0 and less than 1, got 1'),
    (['--device', 'abacus'], 'device'),
])
def test_bad_arguments(args, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run_demo(tmp_path, *args)
