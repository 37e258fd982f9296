"""Read event-camera datasets: CIFAR10-DVS, DVS128 Gesture, N-MNIST and N-Caltech101."""
import math
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Optional

from .catalog import DATASETS, DatasetInfo
from .conversion import PathLike, find_recordings
from .recordings import Recordings, split_digest, warn_about_overlap

__all__ = ['DATASETS', 'DatasetInfo', 'Recordings', 'read_recordings', 'split_digest', 'warn_about_overlap']


def read_recordings(name: str, folder: PathLike, split: Optional[str] = None) -> Dict[str, Recordings]:
    """Read the recordings of a dataset. Nothing is downloaded.

    The first call converts the original files with spikingjelly into `events_np` in the folder, or in `cache_folder` if
    the folder is not writable. This takes minutes to an hour. An interrupted conversion leaves no partial result.
    spikingjelly can read the result, too.

    x, y and p have the same values as in spikingjelly; the origin is the upper left pixel. In the files of CIFAR10-DVS,
    each event has an address: x is 127 minus its bits 8 to 14, y is 127 minus bits 1 to 7, and p is 1 minus bit 0, as
    in the authors' `dat2mat.m`. The files of the other datasets contain x, y and p in this orientation.

    Labels are indices into `classes`. spikingjelly's `DVS128Gesture` has different labels: it sorts the class folders 0
    to 10 as text, so its label 2 is class 10.

    Ways to split a dataset:

    - 'official': The split of the dataset's authors, given by folders or lists. Default of DVS128 Gesture and N-MNIST.
    - 'first-90': The first 90% of the files of each class are train, the others test. Files are sorted by name as
      text, so cifar10_cat_10 is before cifar10_cat_2, and the test split of CIFAR10-DVS contains the files 91 to 99 and
      909 to 999 of the 1000 files of each class. This is spikingjelly's `split_to_train_test_set(0.9, dataset, 10)`,
      which V1's code uses (cifar10dvs/train.py). Default of CIFAR10-DVS and N-Caltech101.
    - 'tebn': CIFAR10-DVS only. Files 0 to 99 of each class are test, 100 to 999 are train, as in TEBN (Duan et al.,
      2022) and spikingjelly's `CIFAR10DVSTEBNSplit`. According to spikingjelly, accuracies are typically much higher
      than with a random split, so compare accuracies only if the split is the same.

    Args:
        name: Name of the dataset, a key of `DATASETS`.
        folder: Folder of the unpacked archives, or spikingjelly's root folder, with `extract/` or `events_np/`.
        split: How to split the dataset; by default, the first of its `DatasetInfo.splits`.

    Returns:
        The splits 'train' and 'test'. Recordings are sorted by class, then by file name as text.

    Raises:
        ValueError: The name or the split is unknown; the folder does not contain the dataset, or files are missing or
            damaged; or a split would have no recordings.
    """
    if name not in DATASETS:
        raise ValueError(f'Unknown dataset {name!r}, expected one of {", ".join(map(repr, DATASETS))}.')
    info = DATASETS[name]
    split = info.splits[0] if split is None else split
    if split not in info.splits:
        raise ValueError(f'split of {info.title} must be one of {", ".join(map(repr, info.splits))}, got {split!r}.')
    paths = find_recordings(name, folder)
    if len(paths) != info.num_recordings:
        warnings.warn(
            f'{folder} has {len(paths)} recordings of {info.title}, but the complete dataset has '
            f'{info.num_recordings}. Accuracies are not comparable with published ones.', stacklevel=2)
    classes = info.classes or tuple(sorted({path.parent.name for path in paths}))
    class_folders = [str(i) for i in range(len(classes))] if name == 'dvs128_gesture' else classes
    label = {class_folder: i for i, class_folder in enumerate(class_folders)}
    parts: Dict[str, List[Path]] = _SPLITS[split](paths)
    for part, members in parts.items():
        if not members:
            raise ValueError(
                f'{folder} has too few recordings of {info.title}: the split {part!r} would be empty. Unpack the '
                f'complete dataset.')
        members.sort(key=lambda path: (label[path.parent.name], path.name))
    return {part: Recordings(
        name=name,
        split=part,
        folder=Path(folder),
        paths=members,
        labels=[label[path.parent.name] for path in members],
        classes=classes,
        size=info.size,
    ) for part, members in parts.items()}


def _split_official(paths: List[Path]) -> Dict[str, List[Path]]:
    return {part: [path for path in paths if path.parents[1].name == part] for part in ('train', 'test')}


def _split_first_90(paths: List[Path]) -> Dict[str, List[Path]]:
    by_class: Dict[str, List[Path]] = {}
    for path in paths:
        by_class.setdefault(path.parent.name, []).append(path)
    parts: Dict[str, List[Path]] = {'train': [], 'test': []}
    for members in by_class.values():
        members = sorted(members, key=lambda path: path.name)
        num_train = math.ceil(len(members) * 0.9)  # in floating point, as spikingjelly does
        parts['train'] += members[:num_train]
        parts['test'] += members[num_train:]
    return parts


def _split_tebn(paths: List[Path]) -> Dict[str, List[Path]]:
    is_test = {path: int(path.stem.rpartition('_')[2]) < 100 for path in paths}
    return {'train': [path for path in paths if not is_test[path]], 'test': [path for path in paths if is_test[path]]}


_SPLITS: Dict[str, Callable[[List[Path]], Dict[str, List[Path]]]] = {
    'official': _split_official, 'first-90': _split_first_90, 'tebn': _split_tebn}
