"""timm's scripts, unmodified, run with `python -m timm_spikformer` on real images.

The scripts are not part of the timm package: set TIMM_SCRIPTS to the root of a clone of timm's repository.
"""
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from conftest import write_images
from event_files import write_cifar10_dvs, write_dvs128_gesture
from huggingface_hub import ModelCard

from timm_spikformer.images import FASHION_MNIST, make_loader, read_splits, training_data_config
from timm_spikformer.publishing import publish
from timm_spikformer.publishing.card import Dataset
from timm_spikformer.training import evaluate

pytestmark = pytest.mark.scripts

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / 'recipes'
OF_TIMM = sorted(p for p in RECIPES.glob('*.yaml') if not p.name.startswith('accelerate'))
OF_EVENTS = {  # recipe: dataset, and function that writes small files in the original format
    'cifar10_dvs': ('cifar10_dvs', write_cifar10_dvs), 'dvs128_gesture': ('dvs128_gesture', write_dvs128_gesture),
    'simulated_events': ('simulated_fashion_mnist', None)}
MODEL = 'spikformer_v2_2_64_patch4_32'
TRAIN = ['--model', MODEL, '--num-classes', 10, '--device', 'cpu', '-j', 1, '-b', 16, '--epochs', 1, '--opt', 'adamw',
         '--lr', 1e-3, '--warmup-epochs', 0, '--experiment', 'run']


@pytest.fixture(scope='module')
def run_script(tmp_path_factory):
    """Function that runs a script and returns its output."""
    source = os.environ.get('TIMM_SCRIPTS')
    if not source or not (Path(source) / 'train.py').is_file():
        raise pytest.UsageError(f"Set TIMM_SCRIPTS to a clone of timm's repository, with train.py in it; got {source}.")
    folder = tmp_path_factory.mktemp('scripts')  # outside the clone, whose timm package may be of another version
    for script in Path(source).glob('*.py'):
        shutil.copy(script, folder)

    def run(script: str, *args, launcher=('-m', 'timm_spikformer')) -> str:
        result = subprocess.run(
            list(map(str, [sys.executable, *launcher, folder / script, *args])),
            cwd=ROOT, env=dict(os.environ, HF_HUB_OFFLINE='1'), capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout + result.stderr

    return run


def read_summary(output: Path) -> list:
    with open(output / 'run' / 'summary.csv') as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Image folders with 20 training and 5 validation images per class."""
    root = tmp_path_factory.mktemp('images')
    write_images(root / 'train', 'train', classes=10, count=20)
    write_images(root / 'validation', 'test', classes=10, count=5)
    return root


@pytest.fixture(scope='module')
def checkpoint(run_script, folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp('output')
    run_script('train.py', folder, *TRAIN, '--epochs', 2, '--model-kwargs', 'time_steps=1', '--output', output)
    return output / 'run' / 'model_best.pth.tar'


@pytest.mark.parametrize('options', [
    ['--amp', '--amp-dtype', 'bfloat16'],
    ['--model-ema', '--model-ema-decay', 0.9],
    ['--grad-accum-steps', 2],
    ['--channels-last'],
    ['--layer-decay', 0.75],
    ['--mixup', 0.8, '--cutmix', 1.0],
    ['--grad-checkpointing'],
    ['--torchcompile'],
    ['--torchscript'],
    ['--model-kwargs', 'time_steps=1'],
    ['--model', 'test_spikformer_v2', '--img-size', 48],
    ['--model', 'spikformer_4_384_patch4_32', '--model-kwargs', 'time_steps=1', 'depth=1', '--drop-path', 0.1],
    ['--aa', 'rand-m9-mstd0.5-mmax9-inc1', '--reprob', 0.25, '--drop', 0.1, '--clip-grad', 1.0],
], ids=lambda options: ' '.join(map(str, options)))
def test_train(run_script, options, folder, tmp_path):
    log = run_script('train.py', folder, *TRAIN, *options, '--output', tmp_path)
    (row,) = read_summary(tmp_path)
    assert np.isfinite(list(row.values())).all() and 0 < row['train_loss'] < 10
    assert 'graph break' not in log
    saved = torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=False, map_location='cpu')
    assert ('state_dict_ema' in saved) == ('--model-ema' in options)


def test_train_with_device_modules(run_script, folder, tmp_path):
    run_script('train.py', folder, *TRAIN, '--device-modules', 'timm_spikformer', '--output', tmp_path, launcher=())
    assert len(read_summary(tmp_path)) == 1


def test_train_resumes(run_script, folder, tmp_path):
    run_script('train.py', folder, *TRAIN, '--model-ema', '--output', tmp_path / 'a')
    last = tmp_path / 'a' / 'run' / 'last.pth.tar'
    log = run_script(
        'train.py', folder, *TRAIN, '--model-ema', '--epochs', 2, '--resume', last, '--output', tmp_path / 'b')
    assert 'Loaded checkpoint' in log
    assert [row['epoch'] for row in read_summary(tmp_path / 'b')] == [1]


def test_fashion_mnist_recipe(run_script, tmp_path):
    run_script(
        'train.py', '-c', RECIPES / 'fashion_mnist.yaml', '--device', 'cpu', '--epochs', 2, '--output', tmp_path,
        '--experiment', 'run', launcher=())
    assert read_summary(tmp_path)[-1]['eval_top1'] > 50


@pytest.mark.parametrize('ema', [False, True])
def test_publish_train_py_run(ema, run_script, tmp_path):
    """After train.py and validate.py, the published folder holds the checkpoint and the accuracy of validate.py."""
    name = 'spikformer_v2_2_64_patch4_32'
    run_script(
        'train.py', '-c', RECIPES / 'fashion_mnist.yaml', '--device', 'cpu', '--epochs', 2, '--output', tmp_path,
        '--experiment', 'run', launcher=())
    checkpoint = tmp_path / 'run' / 'last.pth.tar'
    run_script(
        'validate.py', '--model', name, '--checkpoint', checkpoint, *(['--use-ema'] if ema else []), '--dataset',
        f'hfds/{FASHION_MNIST}', '--split', 'test', '--device', 'cpu', '--input-size', 3, 28, 28, '--num-classes', 10,
        '--results-file', tmp_path / 'results.json', '--results-format', 'json', '--model-kwargs', 'time_steps=1')
    dataset = Dataset('zalando-datasets/fashion_mnist', 'Fashion-MNIST', 'test')
    publish(
        checkpoint, f'me/{name}.fashion_mnist', 'mit', ema=ema, results=tmp_path / 'results.json', dataset=dataset,
        output=tmp_path / 'published', dry_run=True)
    top1 = json.loads((tmp_path / 'results.json').read_text())['top1']
    card = ModelCard.load(tmp_path / 'published' / 'README.md')
    assert card.data.eval_results[0].metric_value == top1 > 30
    assert str(tmp_path) not in card.content and 'sched_on_updates' in card.content
    loaded = timm.create_model(f'local-dir:{tmp_path / "published"}', pretrained=True).eval()
    measured, rates = evaluate(loaded, make_loader(read_splits()['test'], training_data_config(), 250))
    assert measured == pytest.approx(top1, abs=0.01) and min(rates.values()) > 0.


@pytest.mark.parametrize('recipe', [p.name for p in OF_TIMM if p.stem not in ('fashion_mnist', *OF_EVENTS)])
def test_recipe(run_script, recipe, folder, tmp_path):
    """Run the recipe with a smaller model, other data and another device."""
    is_cifar = recipe == 'cifar10.yaml'
    model = [] if is_cifar else ['--img-size', 32]
    run_script(
        'train.py', folder, '-c', RECIPES / recipe, *model, '--dataset', '', '--device', 'cpu', '-j', 1, '-b', 4,
        '--num-classes', 10, '--model-kwargs', 'time_steps=1', 'depth=1', 'embed_dim=96', '--epochs', 1,
        '--warmup-epochs', 0, '--cooldown-epochs', 0, '--amp-dtype', 'bfloat16', '--output', tmp_path,
        '--experiment', 'run', launcher=())
    (row,) = read_summary(tmp_path)
    assert 0 < row['train_loss'] < 10


@pytest.mark.parametrize('recipe', OF_EVENTS)
def test_event_recipe(run_script, recipe, tmp_path):
    """Run the recipe with a smaller model on few recordings or few time steps, then validate.py on the result."""
    name, write_files = OF_EVENTS[recipe]
    dataset, folder = f'events/{name}?time_steps=2', []
    if write_files:
        write_files(tmp_path / 'data')
        dataset, folder = f'{dataset}&roll=5', ['--data-dir', tmp_path / 'data', '-b', 4]
    settings = yaml.safe_load((RECIPES / f'{recipe}.yaml').read_text())
    kwargs = ['--model-kwargs', 'time_steps=2', 'depth=1', 'embed_dim=64', 'num_heads=4']
    run_script(
        'train.py', '-c', RECIPES / f'{recipe}.yaml', *folder, '--dataset', dataset, '--device', 'cpu', '-j', 1,
        *kwargs, '--epochs', 1, '--warmup-epochs', 0, '--cooldown-epochs', 0, '--cutmix', 0.5, '--output', tmp_path,
        '--experiment', 'run')
    (row,) = read_summary(tmp_path)
    assert 0 < row['train_loss'] < 10
    image = ['--img-size', settings['img_size'], '--mean', 0, 0, '--std', 1, 1] if 'img_size' in settings else []
    run_script(
        'validate.py', '--model', settings['model'], *folder, '--dataset', dataset, '--split', 'test', '--checkpoint',
        tmp_path / 'run' / 'last.pth.tar', '--num-classes', settings['num_classes'], '--in-chans', 2, *image,
        '--no-prefetcher', '--device', 'cpu', '-j', 1, *kwargs, '--results-file', tmp_path / 'results.json',
        '--results-format', 'json')
    measured = json.loads((tmp_path / 'results.json').read_text())
    measured = measured[0] if isinstance(measured, list) else measured
    assert measured['top1'] == pytest.approx(row['eval_top1'], abs=0.01)


def test_recipes_name_their_models():
    for path in OF_TIMM:
        recipe = yaml.safe_load(path.read_text())
        assert recipe['model'] in timm.list_models(module='spikformer')
        is_events = path.stem in OF_EVENTS  # these need the launcher, which registers the models
        assert recipe.get('device_modules') == (None if is_events else ['timm_spikformer'])


@pytest.mark.parametrize('options', [
    [], ['--channels-last'], ['--amp', '--amp-dtype', 'bfloat16'], ['--torchscript'], ['--torchcompile'],
    ['--reparam'], ['--reparam', '--torchcompile'],
], ids=lambda options: ' '.join(map(str, options)) or 'plain')
def test_validate(run_script, options, folder, checkpoint, tmp_path):
    results = tmp_path / 'results.json'
    run_script(
        'validate.py', folder, '--model', MODEL, '--num-classes', 10, '--checkpoint', checkpoint, '--device', 'cpu',
        '-j', 1, '-b', 25, '--model-kwargs', 'time_steps=1', '--results-file', results, '--results-format', 'json',
        *options)
    measured = json.loads(results.read_text())
    measured = measured[0] if isinstance(measured, list) else measured
    best = max(row['eval_top1'] for row in read_summary(checkpoint.parents[1]))
    assert measured['top1'] == pytest.approx(best, abs=0.0 if not options else 4.0)


def test_benchmark_of_folded_model(run_script):
    log = run_script(
        'benchmark.py', '--model', MODEL, '--bench', 'infer', '--device', 'cpu', '-b', 8, '--num-warm-iter', 1,
        '--num-bench-iter', 5, '--model-kwargs', 'time_steps=1', '--reparam')
    assert '"infer_samples_per_sec"' in log


@pytest.mark.parametrize('bench', ['infer', 'train'])
def test_benchmark(run_script, bench, tmp_path):
    log = run_script(
        'benchmark.py', '--model', MODEL, '--bench', bench, '--device', 'cpu', '-b', 8, '--num-warm-iter', 1,
        '--num-bench-iter', 5, '--model-kwargs', 'time_steps=1')
    results = json.loads(log[log.index('--result\n') + len('--result\n'):log.rindex('}') + 1])
    num_params = sum(p.numel() for p in timm.create_model(MODEL, device='meta').parameters())
    assert results[f'{bench}_samples_per_sec'] > 0 and results['param_count'] == round(num_params / 1e6, 2)


def test_inference(run_script, folder, checkpoint, tmp_path):
    run_script(
        'inference.py', folder / 'validation', '--model', MODEL, '--num-classes', 10, '--checkpoint', checkpoint,
        '--device', 'cpu', '-j', 1, '-b', 25, '--model-kwargs', 'time_steps=1', '--results-dir', tmp_path,
        '--results-file', 'predictions', '--label-type', 'name', '--topk', 1)
    with open(tmp_path / 'predictions.csv') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 50


@pytest.mark.parametrize('options', [[], ['--reparam']], ids=['plain', 'folded'])
def test_onnx_export(run_script, options, checkpoint, tmp_path):
    path = tmp_path / 'model.onnx'
    run_script(
        'onnx_export.py', path, '--model', MODEL, '--num-classes', 10, '--checkpoint', checkpoint, '--dynamo', *options)
    model = timm.create_model(MODEL, num_classes=10, checkpoint_path=str(checkpoint)).eval()
    x = torch.randn(1, 3, 28, 28)
    session = onnxruntime.InferenceSession(str(path))
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(logits, model(x).numpy(), rtol=1e-4, atol=1e-4)
