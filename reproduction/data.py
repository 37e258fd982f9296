"""Datasets of the study."""
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple

import timm

from timm_spikformer.event_data.names import read_event_splits
from timm_spikformer.images import DATA_KEYS, Images, read_splits

__all__ = ['DATASETS', 'IMAGE_DATASETS', 'SPLITS', 'Data', 'read_data']

SPLITS = ('train', 'validation', 'test')

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
IMAGE_DATASETS = tuple(_CONFIGS)
_EVENTS = 'events/simulated_fashion_mnist?time_steps=4&split_by=time'
_EVENT_CONFIG = dict(
    input_size=(2, 28, 28), mean=(0., 0.), std=(1., 1.), interpolation='bilinear', crop_pct=1.)


class Data(NamedTuple):
    """Splits of a dataset, and its timm data config."""
    train: Images
    validation: Images
    test: Images
    config: Dict[str, Any]

    @property
    def num_classes(self) -> int:
        classes = self.train.classes  # None if the files contain no class names
        return int(self.train.labels.max()) + 1 if classes is None else len(classes)


def read_data(folder: Path, dataset: str, expected: Mapping[str, Any]) -> Data:
    """Read a dataset, and hold out validation images from the training images, the same share of each class.

    Args:
        folder: Contains `DATASET/train.parquet` and `DATASET/test.parquet`, or one of the other layouts of
            `timm_spikformer.images.read_splits`.
        dataset: 'fashion_mnist', 'cifar10', or 'simulated_events', which needs no files: its events are simulated from
            the images in the package, with four time steps.
        expected: Numbers of images by split and, if they are read from files, the digests of the splits train and
            test: see `Protocol`. The selection of the validation images is the same in every call.

    Raises:
        ValueError: The dataset is missing, or has other images.
    """
    if dataset == 'simulated_events':
        splits, config = read_event_splits(_EVENTS), _EVENT_CONFIG
    else:
        root = folder / dataset
        if not root.is_dir():
            raise ValueError(f'{root} is missing. See reproduction/README.md for how to get the images.')
        splits = read_splits(root)
        if not {'train', 'test'} <= splits.keys():
            raise ValueError(f'{root} must contain the splits train and test, got {", ".join(splits)}.')
        cfg = timm.get_pretrained_cfg(_CONFIGS[dataset])
        config = {key: getattr(cfg, key) for key in DATA_KEYS}
    count = expected['train'] + expected['validation']
    for split, size in (('train', count), ('test', expected['test'])):
        if len(splits[split]) != size:
            raise ValueError(f'{splits[split].description}: the protocol requires {size:,} images.')
        if splits[split].labels is None:
            raise ValueError(f'{splits[split].description}: the study requires labels.')
    for split, digest in expected.get('sha256', {}).items():
        found = splits[split].digest()
        if found != digest:
            raise ValueError(
                f'{splits[split].description}: the images or labels are not those of the protocol: their sha256 is '
                f'{found}, expected {digest}. To use them, set this sha256 in a copy of the protocol, and use other '
                f'folders for --runs and --checkpoints.')
    train, validation = splits['train'].hold_out(seed=0, fraction=expected['validation'] / count)
    if len(validation) != expected['validation']:
        raise ValueError(
            f'{splits["train"].description}: {expected["validation"]:,} validation images are not the same share of '
            f'each class; the nearest possible number is {len(validation):,}. Change the protocol.')
    return Data(train, validation, splits['test'], config)
