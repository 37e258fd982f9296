"""Find the files of a dataset, and convert the original files once to those that spikingjelly writes.

spikingjelly's classes convert; this module checks the files first, and writes the result completely or not at all.
"""
import glob
import hashlib
import importlib
import os
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Tuple, Union

import numpy as np
from tqdm import tqdm

from ..temporaries import create_folders, create_temporary, lock, remove_stale, reraise_with_path
from .catalog import DATASETS
from .formats import check_file, read_labels

__all__ = ['cache_folder', 'find_recordings']

PathLike = Union[str, 'os.PathLike[str]']

EVENTS = 'events_np'  # spikingjelly's name of the folder of converted recordings
CACHE = 'timm_spikformer_cache'


class _Format(NamedTuple):
    """Original files of a dataset.

    Args:
        spikingjelly: Module and class that convert it.
        format: See `check_file`.
        suffix: Suffix of the files.
        inner: Folder of the archive that contains all files, or ''.
        original: Pattern of the paths of original files in `inner`, without suffix.
        converted: Pattern of the paths of converted files, without suffix.
    """
    spikingjelly: Tuple[str, str]
    format: str
    suffix: str
    inner: str
    original: str
    converted: str


_CIFAR10 = rf'({"|".join(DATASETS["cifar10_dvs"].classes)})/cifar10_\1_\d+'
_FORMATS = {
    'cifar10_dvs': _Format(('cifar10_dvs', 'CIFAR10DVS'), 'AEDAT 2.0', '.aedat', '', _CIFAR10, _CIFAR10),
    'dvs128_gesture': _Format(
        ('dvs128_gesture', 'DVS128Gesture'), 'AEDAT 3.1', '.aedat', 'DvsGesture', r'user\w+',
        r'(train|test)/(\d|10)/user\w+'),
    'n_mnist': _Format(('n_mnist', 'NMNIST'), 'ATIS', '.bin', '', r'(Train|Test)/\d/\d+', r'(train|test)/\d/\d+'),
    'n_caltech101': _Format(
        ('n_caltech101', 'NCaltech101'), 'ATIS', '.bin', 'Caltech101', r'[\w-]+/image_\d+', r'[\w-]+/image_\d+'),
}


def cache_folder(folder: PathLike) -> Path:
    """Return the folder for files that are computed from a dataset. It is not created.

    It is inside the folder of the dataset if that is writable, otherwise in `$XDG_CACHE_HOME/timm_spikformer`, by
    default `~/.cache/timm_spikformer`.
    """
    folder = Path(folder).resolve()
    if os.access(folder, os.W_OK):
        return folder / CACHE
    base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return base / 'timm_spikformer' / f'{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}'


def find_recordings(name: str, folder: PathLike) -> List[Path]:
    """Return the converted recordings of a dataset, sorted; convert the original files if that was not done before.

    Raises:
        ValueError: There are no such files, some are missing or damaged, or they are those of another dataset.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise ValueError(f'{folder} is not a folder. {_expected(name)}')
    if (folder / f'{EVENTS}.building').exists():
        raise ValueError(
            f'spikingjelly did not finish {folder / EVENTS}. Remove it and {folder / EVENTS}.building, then run the '
            f'same again.')
    places = [folder / EVENTS, cache_folder(folder) / EVENTS]
    events = next((place for place in places if place.is_dir()), None)
    if events is None:
        events = _convert(name, folder)
    files = _matching(events, '.npz', _FORMATS[name].converted)
    if not files:
        raise ValueError(
            f'{events} has no recordings of {DATASETS[name].title}{_other(name, folder)}. {_expected(name)}')
    _check_classes(name, events, [path for _, path in files])
    return [path for _, path in files]


def _expected(name: str) -> str:
    info = DATASETS[name]
    return (
        f'Expected the folder of the unpacked archives, with {info.layout}, or the root folder of spikingjelly, with '
        f'extract/ or {EVENTS}/. {info.source}')


def _matching(folder: Path, suffix: str, pattern: str) -> List[Tuple[str, Path]]:
    """Return the files whose path without suffix matches, as pairs of that path and the file.

    Files are in the order of torchvision's `DatasetFolder`, which spikingjelly uses: by folder, then by name as text.
    """
    # not Path.glob, which reads hidden folders, also one that another process just removes
    paths = glob.iglob('*/' * pattern.count('/') + f'*{suffix}', root_dir=folder)
    keys = [Path(path).as_posix()[:-len(suffix)] for path in paths]
    found = [(key, folder / f'{key}{suffix}') for key in keys if re.fullmatch(pattern, key)]
    return sorted(found, key=lambda item: (item[1].parent, item[1].name))


def _original(name: str, folder: Path) -> Dict[str, Path]:
    """Return the original files of a dataset by their path in the archive, without suffix; empty if there are none."""
    spec = _FORMATS[name]
    for base in (folder / 'extract' / spec.inner, folder / spec.inner, folder):
        files = _matching(base, spec.suffix, spec.original)
        if files:
            return dict(files)
    return {}


def _other(name: str, folder: Path) -> str:
    """Return a note that a folder is that of another dataset, or that archives were not unpacked; or ''."""
    for other in DATASETS:
        converted = _matching(folder / EVENTS, '.npz', _FORMATS[other].converted)
        if other != name and (converted or _original(other, folder)):
            return f', but those of {DATASETS[other].title} ({other!r})'
    for archive in DATASETS[name].archives:
        for path in (folder / archive, folder / 'download' / archive):
            if path.exists():
                return f', but {path}, which is not unpacked'
    return ''


def _check_classes(name: str, folder: Path, paths: Iterable[Path]) -> None:
    """Raise a ValueError if a class, or one of two folders train and test, has no files."""
    is_split = 'official' in DATASETS[name].splits
    classes = {'train': set(), 'test': set()} if is_split else {'': set()}
    for path in paths:
        classes[path.parents[1].name.lower() if is_split else ''].add(path.parent.name)
    for split, there in classes.items():
        what = f'{split} recordings'.strip()
        if not there:
            raise ValueError(f'{folder} has no {what} of {DATASETS[name].title}. {_expected(name)}')
        missing = {*(DATASETS[name].classes or ())} - there
        if missing and name != 'dvs128_gesture':  # its folders have numbers, and not every recording has all gestures
            raise ValueError(
                f'{folder} has no {what} of the classes {", ".join(sorted(missing))} of {DATASETS[name].title}. '
                f'{_expected(name)}')


def _convert(name: str, folder: Path) -> Path:
    """Convert the original files and return the folder of the result."""
    files = _original(name, folder)
    if not files:
        raise ValueError(f'{folder} has no files of {DATASETS[name].title}{_other(name, folder)}. {_expected(name)}')
    parts = _trials(files) if name == 'dvs128_gesture' else _class_folders(name, folder, files)
    cache = cache_folder(folder)
    target = (folder if cache.parent == folder.resolve() else cache) / EVENTS
    waiting = cache / 'conversion'  # not `target.parent`, which is locked while a temporary folder is created
    with create_folders(waiting), lock(waiting):  # a second process waits here, and then finds the result
        if target.is_dir():
            return target
        with lock(target.parent):
            remove_stale(target, target.parent)
        with create_temporary(target, target.parent, is_folder=True) as temporary, reraise_with_path(target, temporary):
            result = temporary / EVENTS
            bar = tqdm(parts, f'Convert {DATASETS[name].title} once', unit='part', disable=None, file=sys.stderr)
            for i, part in enumerate(bar):
                _convert_part(name, part, temporary / f'{i}', result)
            os.rename(result, target)
    return target


class _Part(NamedTuple):
    """Files that are converted together, so that there is a progress bar, and Ctrl-C stops soon.

    Args:
        files: Original files by their path in the archive.
        texts: Contents of further files.
        num_recordings: Number of recordings that they hold.
    """
    files: Dict[str, Path]
    texts: Dict[str, str]
    num_recordings: int


def _class_folders(name: str, folder: Path, files: Dict[str, Path]) -> List[_Part]:
    """Check all files, and return those of each class."""
    _check_classes(name, folder, files.values())
    by_class = defaultdict(dict)
    for key, path in files.items():
        check_file(path, _FORMATS[name].format)
        by_class[path.parent.name][f'{key}{path.suffix}'] = path
    return [_Part(part, {}, len(part)) for part in by_class.values()]


def _trials(files: Dict[str, Path]) -> List[_Part]:
    """Check the files of DVS128 Gesture, and return those of each recording, which holds several gestures."""
    folder, parts = min(files.values()).parent, []
    lists = {split: folder / f'trials_to_{split}.txt' for split in ('train', 'test')}
    for path in lists.values():
        if not path.is_file():
            raise ValueError(f'{path} is missing. {_expected("dvs128_gesture")}')
        trials = path.read_text(encoding='utf-8', errors='replace').split()
        if not trials:
            raise ValueError(f'{path} is empty, expected names of files. {_expected("dvs128_gesture")}')
        for trial in trials:
            labels = f'{Path(trial).stem}_labels.csv'
            for file in (trial, labels):
                if not (folder / file).is_file():
                    raise ValueError(
                        f'{folder / file} is missing, which {path.name} requires. {_expected("dvs128_gesture")}')
            check_file(folder / trial, _FORMATS['dvs128_gesture'].format)
            texts = {other.name: trial if other == path else '' for other in lists.values()}
            parts.append(_Part(
                {file: folder / file for file in (trial, labels)}, texts, len(read_labels(folder / labels))))
    return parts


def _convert_part(name: str, part: _Part, work: Path, result: Path) -> None:
    """Convert some original files with spikingjelly, and move the recordings to the folder `result`."""
    spec = _FORMATS[name]
    # spikingjelly converts all files of a folder: a folder of links leaves out all others, such as .DS_Store
    archive, raw = work / 'extract' / spec.inner, work / 'raw'
    raw.mkdir(parents=True)
    for key, path in part.files.items():
        (archive / key).parent.mkdir(parents=True, exist_ok=True)
        (archive / key).symlink_to(path.resolve())
    for key, text in part.texts.items():
        (archive / key).write_text(text, encoding='utf-8')
    module, class_name = spec.spikingjelly
    converter = getattr(importlib.import_module(f'spikingjelly.datasets.{module}'), class_name)  # slow to import
    converter.create_raw_from_extracted(work / 'extract', raw)
    converted = sorted(raw.rglob('*.npz'))
    for path in converted:
        with np.load(path) as arrays:
            num_events = len(arrays['t'])
        if not num_events:
            files = ' and '.join(map(str, part.files.values()))
            raise ValueError(
                f'{files}: {path.stem} of class {path.parent.name} has no events. {_expected(name)}')
        target = result / path.relative_to(raw)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)
    if len(converted) != part.num_recordings:
        raise RuntimeError(f'spikingjelly wrote {len(converted)} recordings, expected {part.num_recordings}.')
    shutil.rmtree(work)
