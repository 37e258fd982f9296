"""Recordings of one split of a dataset, digests of splits, and a check for recordings that are in two splits."""
import hashlib
import warnings
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterable, List, Sequence, Tuple

import numpy as np

from .catalog import DATASETS
from .frames import Events, check_events, sort_events

__all__ = ['Recordings', 'sha256_of_lines', 'split_digest', 'warn_about_overlap']


@dataclass(frozen=True)
class Recordings:
    """Recordings of one split. Each is an `.npz` file with arrays t, x, y and p, as spikingjelly writes it.

    Args:
        name: Name of the dataset, a key of `DATASETS`.
        split: Name of the split, such as 'train'.
        folder: Folder of the dataset that the user specified.
        paths: Files, one per recording.
        labels: Class index of each recording.
        classes: Names of the classes.
        size: Height and width of the sensor.
    """
    name: str
    split: str
    folder: Path
    paths: Sequence[Path]
    labels: Sequence[int]
    classes: Tuple[str, ...]
    size: Tuple[int, int]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, i: int) -> Events:
        """Read the events of a recording, sorted by time; events with equal time stamps keep their order.

        Raises:
            ValueError: The file is damaged or has no events, or an event is outside of the sensor.
        """
        path = self.paths[i]
        try:
            with np.load(path, allow_pickle=False) as arrays:
                events = Events(*(arrays[name] for name in Events._fields))
            events = Events(*(a.astype(np.int64) if a.dtype.kind in 'iub' else a for a in events))
            check_events(events, self.size)
            return sort_events(events)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise ValueError(
                f'{path} cannot be read as a recording of {self.name}: {str(e).rstrip(".")}. Expected arrays t, x, y '
                f'and p, as spikingjelly writes them. If the original of this recording is damaged, replace it. Then '
                f'delete the folder events_np that contains this file, so that it is converted again. For the '
                f'originals: {DATASETS[self.name].source}') from e

    def names(self) -> List[str]:
        """Return the name of each recording: class folder and file name without suffix, as in 'cat/cifar10_cat_0'."""
        return [f'{path.parent.name}/{path.stem}' for path in self.paths]

    def fingerprint(self) -> str:
        """Return a SHA-256 digest of names, labels, file sizes and modification times, in order.

        It is part of the key of a cache, so a file that was replaced is read again.
        """
        stats = [path.stat() for path in self.paths]
        return sha256_of_lines(
            f'{name} {label} {stat.st_size} {stat.st_mtime_ns}'
            for name, label, stat in zip(self.names(), self.labels, stats))


def split_digest(recordings: Recordings) -> str:
    """Return a SHA-256 digest of the names and labels of a split.

    Equal digests mean the same split of the same dataset. The digest does not depend on the contents, the location or
    the order of the files.
    """
    return sha256_of_lines(sorted(f'{n} {label}' for n, label in zip(recordings.names(), recordings.labels)))


def warn_about_overlap(splits: Dict[str, Recordings]) -> None:
    """Warn about each recording that is in two splits.

    These are files of equal content, compared by SHA-256. Only files whose size occurs in two splits are read.
    """
    by_size = defaultdict(list)
    for split, recordings in splits.items():
        for path in recordings.paths:
            by_size[path.stat().st_size].append((split, path))
    for files in by_size.values():
        if len({split for split, _ in files}) < 2:
            continue
        first: Dict[bytes, Tuple[str, Path]] = {}
        for split, path in files:
            other, other_path = first.setdefault(hashlib.sha256(path.read_bytes()).digest(), (split, path))
            if split != other:
                warnings.warn(
                    f'{other_path} of the split {other!r} and {path} of the split {split!r} are the same '
                    f'recording, so the test accuracy may be too high.',
                    stacklevel=2)


def sha256_of_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()
