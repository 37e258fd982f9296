"""Throughput of data loaders compared with that of training, to show whether data loading is the bottleneck.

    python -m benchmarks data
"""
import statistics
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import numpy as np
import timm
import torch
import yaml
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torchvision.transforms import v2

from timm_spikformer.event_data.dataset import EventSequences
from timm_spikformer.event_data.names import read_event_splits
from timm_spikformer.images import make_loader, read_splits, training_data_config
from timm_spikformer.training import classify

from .images import crop_photographs, open_photographs
from .measure import interleave, ratio
from .model import create, training_step

RECIPE = Path(__file__).parents[1] / 'recipes' / 'spikformer_v2_imagenet.yaml'


class Source(NamedTuple):
    """A function that consumes or produces `count` images per call."""
    call: Callable[[], object]
    count: int


def _epoch(loader) -> Source:
    return Source(lambda: [None for _ in loader], sum(len(x) for x, _ in loader))


def _compare(model: str, training: Source, loaders: Dict[str, Source], rounds: int) -> Dict[str, Any]:
    """Return the images/s of training a model and of each loader, and the ratios of loader to training."""
    sources = {model: training, **loaders}
    times = interleave({name: source.call for name, source in sources.items()}, rounds)
    per_image = {name: [t / sources[name].count for t in seconds] for name, seconds in times.items()}
    speed = {name: 1 / statistics.median(seconds) for name, seconds in per_image.items()}
    print(f'  training of {model}: {speed[model]:.4g} images/s')
    rows = []
    for name in loaders:
        relative = ratio(per_image[model], per_image[name])
        print(f'    {name}: {speed[name]:.4g} images/s, {relative} times as many')
        rows.append(dict(loader=name, images_per_second=speed[name], relative_to_training=relative._asdict()))
    return dict(model=model, images_per_second=speed[model], loaders=rows)


def _demo(quick: bool) -> Dict[str, Any]:
    """Compare the demo's loader with its training on all labels."""
    name = 'spikformer_v2_2_64_patch4_32'
    images = read_splits()['train'].sample_stratified(320 if quick else 6000, seed=0)
    loader = make_loader(images, training_data_config(), 32, augment=True)
    x, y = next(iter(loader))
    x = x.contiguous(memory_format=torch.channels_last)
    model = timm.create_model(name, time_steps=1, img_size=x.shape[-2:]).to(memory_format=torch.channels_last).train()
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-2, weight_decay=0.05)
    ema = ModelEmaV3(model, decay=0.99, use_warmup=True)

    def steps() -> None:
        for _ in range(len(loader)):
            loss, _ = classify(model, x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)

    return _compare(
        'the demo, batch 32', Source(steps, len(loader) * len(x)), {'loader of the demo': _epoch(loader)},
        2 if quick else 5)


def _write_jpegs(folder: Path, count: int) -> None:
    """Write crops of the photographs, about as large as ImageNet images, to one folder per photograph."""
    crop = v2.RandomCrop((375, 500))
    for name, photograph in open_photographs().items():
        (folder / name).mkdir()
        for i in range(count // 2):
            crop(photograph).save(folder / name / f'{i}.jpg', quality=90)


def _imagenet(quick: bool) -> Dict[str, Any]:
    """Compare timm's loader, configured as in the ImageNet recipe, with a training step."""
    recipe = yaml.safe_load(RECIPE.read_text())
    name = 'test_spikformer_v2' if quick else recipe['model']
    x = crop_photographs(2, timm.get_pretrained_cfg(name).input_size[-1])
    model = create(name, recipe['model_kwargs']['time_steps'], x)

    def make(num_workers: int):
        return create_loader(
            create_dataset('', folder),
            input_size=(3, 224, 224),
            batch_size=recipe['batch_size'],
            is_training=True,
            auto_augment=recipe['aa'],
            re_prob=recipe['reprob'],
            re_mode='pixel',
            interpolation=recipe['train_interpolation'],
            num_workers=num_workers,
            device=torch.device('cpu'),
        )

    with tempfile.TemporaryDirectory() as folder:
        _write_jpegs(Path(folder), 64 if quick else 384)
        loaders = {f'JPEGs with {n} worker{"s" * (n > 1)}': _epoch(make(n)) for n in (1, 2)}
        return _compare(
            f'{name}, T = {model.time_steps}, batch {len(x)}',
            Source(training_step(model.train(), x), len(x)), loaders, 1 if quick else 5)


def _simulated_events(quick: bool) -> Dict[str, Any]:
    """Compare the simulation of events with training on them."""
    sequences = read_event_splits('events/simulated_fashion_mnist?time_steps=4&split_by=time')['train']
    config = dict(input_size=(2, 28, 28), mean=(0., 0.), std=(1., 1.), interpolation='bilinear', crop_pct=1.)
    loader = make_loader(sequences.sample_stratified(64 if quick else 640, seed=0), config, 32, augment=True)
    x, _ = next(iter(loader))
    model = timm.create_model('spikformer_v2_2_64_patch4_32', in_chans=2)
    return _compare(
        'spikformer_v2_2_64_patch4_32 on sequences, T = 4, batch 32',
        Source(training_step(model.train(), x), len(x)), {'simulated events': _epoch(loader)}, 2 if quick else 5)


def _cached_events(quick: bool) -> Dict[str, Any]:
    """Compare frames of the size of CIFAR10-DVS from a memory-mapped file with training on them."""
    count, shape = (16, (2, 2, 128, 128)) if quick else (256, (16, 2, 128, 128))
    config = dict(input_size=shape[1:], mean=(0., 0.), std=(1., 1.), interpolation='bilinear', crop_pct=1.)

    class RandomCounts:
        """Counts of events in a memory-mapped file."""

        def __init__(self, path: Path):
            self.path = path
            counts = np.random.default_rng(0).poisson(0.1, (count, *shape)).astype(np.uint8)
            np.save(path, counts)

        def __len__(self) -> int:
            return count

        def frames(self, i: int) -> np.ndarray:
            return np.load(self.path, mmap_mode='r')[i]

    with tempfile.TemporaryDirectory() as folder:
        sequences = EventSequences(
            RandomCounts(Path(folder, 'frames.npy')), np.arange(count) % 10, list('0123456789'), 'random counts',
            'train')
        loader = make_loader(sequences, config, 16, augment=True)
        x, _ = next(iter(loader))
        name = 'test_spikformer_v2' if quick else 'spikformer_2_256_patch16_128'
        model = timm.create_model(name, in_chans=2, num_classes=10)
        return _compare(
            f'{name} on sequences, T = {len(x[0])}, batch 2',
            Source(training_step(model.train(), x[:2]), 2),
            {'frames from a memory-mapped file': _epoch(loader)}, 1 if quick else 3)


def run(quick: bool) -> List[Dict[str, Any]]:
    return [measure(quick) for measure in (_demo, _imagenet, _simulated_events, _cached_events)]
