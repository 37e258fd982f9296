"""Datasets of the study."""
from pathlib import Path
from typing import Any, Dict, NamedTuple

import timm

from timm_spikformer.event_data.names import read_event_splits
from timm_spikformer.images import DATA_KEYS, Images, read_splits

__all__ = ['DATASETS', 'Data', 'read_data']

# display names
DATASETS = {
    'fashion_mnist': 'Fashion-MNIST',
    'cifar10': 'CIFAR-10 (JPEG copies of the images)',
    'simulated_events': 'Fashion-MNIST (6,000 images, simulated events)',
}
# pretrained configurations of timm that contain the pixel statistics of each dataset
_CONFIGS = {
    'fashion_mnist': 'spikformer_v2_2_64_patch4_32.fashion_mnist',
    'cifar10': 'spikformer_v2_2_128_patch4_32.cifar10',
}
_EVENTS = 'events/simulated_fashion_mnist?time_steps=4&split_by=time'
_EVENT_CONFIG = dict(
    input_size=(2, 28, 28), mean=(0., 0.), std=(1., 1.), interpolation='bilinear', crop_pct=1.)


class Data(NamedTuple):
    """Splits of a dataset, and its timm data config."""
    train: Images
    validation: Images
    test: Images
    config: Dict[str, Any]


def read_data(folder: Path, dataset: str, held_out: float) -> Data:
    """Read a dataset, and hold out a fraction of the training images of each class for validation.

    Args:
        folder: Contains `DATASET/train.parquet` and `DATASET/test.parquet`, or one of the other layouts of
            `timm_spikformer.images.read_splits`.
        dataset: 'fashion_mnist', 'cifar10', or 'simulated_events', which needs no files: its events are simulated from
            the images in the package, with four time steps.
        held_out: Fraction of the training images to hold out. The selection is the same in every call.

    Raises:
        ValueError: The dataset is missing or incomplete.
    """
    if dataset == 'simulated_events':
        splits = read_event_splits(_EVENTS)
        return Data(*splits['train'].hold_out(seed=0, fraction=held_out), splits['test'], _EVENT_CONFIG)
    root = folder / dataset
    if not root.is_dir():
        raise ValueError(f'{root} is missing. See reproduction/README.md for how to get the images.')
    splits = read_splits(root)
    if not {'train', 'test'} <= splits.keys():
        raise ValueError(f'{root} must contain the splits train and test, got {", ".join(splits)}.')
    train, validation = splits['train'].hold_out(seed=0, fraction=held_out)
    cfg = timm.get_pretrained_cfg(_CONFIGS[dataset])
    return Data(train, validation, splits['test'], {key: getattr(cfg, key) for key in DATA_KEYS})
