"""Names of event datasets for timm's scripts and the command line: `events/NAME?time_steps=16&split_by=number`."""
from typing import Any, Dict, NamedTuple, Optional, Tuple
from urllib.parse import parse_qsl

import numpy as np
import timm.data
from torch.utils.data import Dataset

from ..arguments import check_integer
from ..images import read_splits
from .catalog import DATASETS
from .dataset import EventSequences, RecordedSource, SimulatedSource, create_loader
from .frames import check_integration
from .readers import read_recordings, warn_about_overlap
from .transforms import SequenceMixup

__all__ = ['EventName', 'SIMULATED', 'install', 'is_event_name', 'parse_name', 'read_event_splits']

_PREFIX = 'events/'
SIMULATED = 'simulated_fashion_mnist'
_SIMULATED_SIZE = (28, 28)
# names that timm's scripts use for the splits
_TRAIN, _TEST = ('train', 'training'), ('test', 'val', 'valid', 'validation', 'eval', 'evaluation')


class EventName(NamedTuple):
    """Parsed name of an event dataset, `events/DATASET?OPTION=VALUE&OPTION=VALUE`.

    Args:
        dataset: Name of the dataset.
        time_steps: Number of frames per sequence.
        split_by: 'number': each frame has the same number of events; 'time': each frame has the same duration.
        split: How to split the dataset into train and test, see `read_recordings`; '' selects the default.
        roll: Largest random shift in training, in pixels.

    >>> EventName('n_mnist', time_steps=10).split_by
    'number'
    """
    dataset: str
    time_steps: int = 16
    split_by: str = 'number'
    split: str = ''
    roll: int = 0

    @property
    def sensor_size(self) -> Tuple[int, int]:
        """Height and width of the sensor in pixels."""
        return _SIMULATED_SIZE if self.dataset == SIMULATED else DATASETS[self.dataset].size


def is_event_name(name: Optional[str]) -> bool:
    """Return whether a value of timm's `--dataset` is the name of an event dataset."""
    return (name or '').lower().startswith(_PREFIX)


def parse_name(name: str) -> EventName:
    """Parse the name of an event dataset.

    Raises:
        ValueError: There is no such dataset, or an option is unknown or has an invalid value.

    >>> parse_name('events/cifar10_dvs?time_steps=10')
    EventName(dataset='cifar10_dvs', time_steps=10, split_by='number', split='', roll=0)
    """
    if not is_event_name(name):
        raise ValueError(f'The name of an event dataset must start with {_PREFIX}, got {name!r}.')
    dataset, _, query = name[len(_PREFIX):].partition('?')
    known = (*DATASETS, SIMULATED)
    if dataset not in known:
        raise ValueError(f'There is no event dataset {dataset!r}, expected one of {", ".join(known)}.')
    options: Dict[str, Any] = {}
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError:
        pairs = [(query, '')]
    for key, value in pairs:
        if key in options:
            raise ValueError(f'{name}: the option {key!r} is given twice.')
        if key not in EventName._fields[1:]:
            raise ValueError(
                f'{name}: unknown option {key!r}. Expected {", ".join(EventName._fields[1:])}, for example '
                f'{_PREFIX}{dataset}?time_steps=16&split_by=number.')
        options[key] = int(value) if value.isdecimal() else value
    parsed = EventName(dataset, **options)
    check_integer('roll', parsed.roll, 0)
    check_integration(parsed.time_steps, parsed.split_by)
    return parsed


def read_event_splits(name: str, folder: Optional[str] = None) -> Dict[str, EventSequences]:
    """Return the splits 'train' and 'test' of an event dataset.

    Args:
        name: Name with options, such as `events/dvs128_gesture?time_steps=16`.
        folder: Folder with the original files of the dataset. For `events/simulated_fashion_mnist`, a folder with
            images of 28x28 pixels; by default the Fashion-MNIST images that are shipped with the package.

    Raises:
        ValueError: The name is invalid, or the folder does not contain the dataset.
    """
    parsed = parse_name(name)
    splits = _simulate(name, parsed, folder) if parsed.dataset == SIMULATED else _read(name, parsed, folder)
    for sequences in splits.values():
        sequences.roll = parsed.roll
    return splits


def _simulate(name: str, parsed: EventName, folder: Optional[str]) -> Dict[str, EventSequences]:
    if parsed.split:
        raise ValueError(f'{name}: the option split is for datasets without an official split.')
    return {
        split: EventSequences(
            SimulatedSource(images, parsed.time_steps, parsed.split_by, _SIMULATED_SIZE), images.labels,
            images.classes, f'{images.name} (simulated events)', split)
        for split, images in read_splits(folder or None).items()
    }


def _read(name: str, parsed: EventName, folder: Optional[str]) -> Dict[str, EventSequences]:
    if not folder:
        raise ValueError(f'{name} requires the folder of the dataset (timm scripts: --data-dir DIR).')
    splits = read_recordings(parsed.dataset, folder, parsed.split or None)
    if parsed.dataset != 'n_mnist':  # the split of its 70,000 files is official, and reading them takes a minute
        warn_about_overlap(splits)
    return {
        split: EventSequences(
            RecordedSource(recordings, parsed.time_steps, parsed.split_by), np.asarray(recordings.labels),
            recordings.classes, DATASETS[parsed.dataset].title, split)
        for split, recordings in splits.items()
    }


def _create_dataset(name: str, root: Optional[str] = None, split: str = 'validation', *args: Any, **kwargs: Any):
    """Replacement for `timm.data.create_dataset` that also creates event datasets."""
    if not is_event_name(name):
        return _timm_create_dataset(name, root, split, *args, **kwargs)
    if kwargs.get('class_map'):
        raise ValueError(f'class_map is for image folders, got {kwargs["class_map"]!r} for {name}.')
    splits = read_event_splits(name, root)
    wanted = 'train' if split in _TRAIN else 'test' if split in _TEST and split not in splits else split
    if wanted not in splits:
        raise ValueError(f'{name} has no split {split!r}, expected one of {", ".join(splits)}.')
    return splits[wanted]


def _create_loader(dataset: Dataset, *args: Any, **kwargs: Any):
    """Replacement for `timm.data.create_loader` that also loads event datasets."""
    is_events = isinstance(dataset, EventSequences)
    return (create_loader if is_events else _timm_create_loader)(dataset, *args, **kwargs)


_timm_create_dataset, _timm_create_loader = timm.data.create_dataset, timm.data.create_loader


def install() -> None:
    """Replace functions in `timm.data`, so that timm's scripts, which import them from there, accept event datasets."""
    timm.data.create_dataset = _create_dataset
    timm.data.create_loader = _create_loader
    timm.data.Mixup = SequenceMixup
