"""Datasets of the package tonic as recordings. This module does not import tonic."""
import hashlib
import numbers
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

from ..arguments import check_positive
from .frames import Events, check_events, check_size, sort_events
from .recordings import sha256_of_lines

__all__ = ['TonicRecordings', 'from_tonic']


class TonicRecordings:
    """Recordings of a dataset of tonic. Create them with `from_tonic`.

    The attributes and methods are those of `Recordings`, except for `paths`.
    """

    def __init__(self, dataset: Any, split: str, size: Tuple[int, int], time_unit: float):
        self.dataset = dataset
        self.name = type(dataset).__name__
        self.split = split
        self.folder = Path(getattr(dataset, 'location_on_system', '.'))
        self.size = size
        self.time_unit = time_unit
        self.labels, self.classes = _labels_and_classes(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, i: int) -> Events:
        """Read the events of a recording, sorted by time; events with equal time stamps keep their order.

        Polarities of -1 and 1 become 0 and 1, and time stamps are rounded to microseconds.

        Raises:
            ValueError: The recording is not an array of events or has no events, or an event is outside of the sensor.
        """
        array = self.dataset[i][0]
        names = getattr(getattr(array, 'dtype', None), 'names', None) or ()
        if not {*names} >= {*Events._fields}:
            raise ValueError(
                f'Recording {i} of {self.name} must be a structured array with the fields t, x, y and p, got '
                f'{f"the fields {names}" if names else type(array).__name__}. Remove transforms '
                f'from the dataset that convert events to frames.')
        p = array['p'].astype(np.int64)
        if len(p) and p.min() == -1 and not np.any(p == 0):
            p = (p + 1) // 2
        events = Events(
            np.rint(array['t'] * self.time_unit).astype(np.int64), array['x'].astype(np.int64),
            array['y'].astype(np.int64), p)
        try:
            check_events(events, self.size)
        except ValueError as e:
            raise ValueError(f'Recording {i} of {self.name}: {e}') from e
        return sort_events(events)

    def names(self) -> List[str]:
        """Return the name of each recording: folder and file name without suffix, or its index."""
        paths = _file_paths(self.dataset)
        if paths is None:
            return [str(i) for i in range(len(self))]
        return [f'{path.parent.name}/{path.stem}' for path in paths]

    def fingerprint(self) -> str:
        """Return a SHA-256 digest of everything that determines the events: files, settings and transforms.

        If the dataset does not list its files, all events are read.
        """
        settings = {k: v for k, v in vars(self.dataset).items() if isinstance(v, (str, numbers.Number))}
        transforms = [repr(getattr(self.dataset, name, None)) for name in ('transform', 'transforms')]
        paths = _file_paths(self.dataset)
        if paths is None:
            contents = [hashlib.sha256(np.stack(self.read(i)).tobytes()).hexdigest() for i in range(len(self))]
        else:
            contents = [f'{name} {path.stat().st_size}' for name, path in zip(self.names(), paths)]
        settings.pop('location_on_system', None)  # moving a dataset does not change it
        return sha256_of_lines([
            self.name, str(self.time_unit), str(sorted(settings.items())), *transforms, *map(str, self.labels),
            *contents])


def from_tonic(
        dataset: Any,
        split: str = 'train',
        size: Optional[Tuple[int, int]] = None,
        time_unit: float = 1.,
) -> TonicRecordings:
    """Return the recordings of a dataset of tonic 1.6 or later, for example for `cache_frames`.

    Args:
        dataset: Dataset object whose items are a structured array of events and a target, such as
            `tonic.datasets.NMNIST`. The fields t, x, y and p may be in any order.
        split: Name of the split, for messages and file names.
        size: Height and width of the sensor; by default, from the dataset's `sensor_size` (width, height, polarities).
        time_unit: Unit of t in microseconds: 1 for microseconds, as in tonic's own datasets, 1000 for milliseconds.

    Raises:
        ValueError: The dataset is empty or does not have two polarities; it has no `sensor_size` and `size` is None; or
            its targets are neither class indices nor class names.
    """
    sensor_size = getattr(dataset, 'sensor_size', None)
    name = type(dataset).__name__
    if not len(dataset):
        raise ValueError(f'{name} has no recordings, expected at least one.')
    if size is None:
        if sensor_size is None:
            raise ValueError(f'{name} has no sensor_size. Set size=(height, width).')
        if len(sensor_size) != 3 or sensor_size[2] != 2:
            raise ValueError(f'{name} must have a sensor_size of (width, height, 2 polarities), got {sensor_size}.')
        size = sensor_size[1], sensor_size[0]
    check_positive('time_unit', time_unit)
    return TonicRecordings(dataset, split, check_size(size), time_unit)


def _file_paths(dataset: Any) -> Optional[List[Path]]:
    """Return the file of each item, or None if the dataset does not list its files."""
    data = getattr(dataset, 'data', None)
    if isinstance(data, list) and len(data) == len(dataset) and all(isinstance(d, (str, os.PathLike)) for d in data):
        paths = [Path(d) for d in data]
        return paths if all(path.is_file() for path in paths) else None
    return None


def _labels_and_classes(dataset: Any) -> Tuple[List[int], Tuple[str, ...]]:
    """Return the class index of each item, and the names of the classes."""
    targets: Optional[Sequence[Any]] = getattr(dataset, 'targets', None)
    is_transformed = any(getattr(dataset, name, None) is not None for name in ('target_transform', 'transforms'))
    if targets is None or len(targets) != len(dataset) or is_transformed:
        targets = [dataset[i][1] for i in range(len(dataset))]
    if all(isinstance(target, str) for target in targets):
        classes = tuple(sorted({*targets}))
        index: Dict[str, int] = {name: i for i, name in enumerate(classes)}
        return [index[target] for target in targets], classes
    if not all(isinstance(target, numbers.Integral) and target >= 0 for target in targets):
        raise ValueError(f'Targets of {type(dataset).__name__} must be class indices or names, got {targets[0]!r}.')
    labels = [int(target) for target in targets]
    classes = tuple(map(str, getattr(dataset, 'classes', None) or ()))
    if max(labels) >= len(classes):
        classes = tuple(str(i) for i in range(max(labels) + 1))
    return labels, classes
