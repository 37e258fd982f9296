"""Find the recordings of a dataset. If necessary, convert its original files to spikingjelly's .npz files first.

spikingjelly's dataset classes do the conversion. This module checks the original files before the conversion, and moves
the result into place only when it is complete.
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

from ..folders import resolve
from ..temporaries import create_folders, create_temporary, lock, remove_stale, reraise_with_path
from .catalog import DATASETS
from .formats import check_file, read_labels

__all__ = ['cache_folder', 'find_recordings']

PathLike = Union[str, 'os.PathLike[str]']

EVENTS = 'events_np'  # spikingjelly's name of the folder of converted recordings
CACHE = 'timm_spikformer_cache'
_ORIGINALS = '.timm-spikformer-originals'  # file in `EVENTS` with the names and sizes of the original files


class _FileSpec(NamedTuple):
    """Original and converted files of a dataset.

    Args:
        converter: Module of `spikingjelly.datasets`, and the class in it, that convert the dataset.
        format: Format of the original files, see `check_file`.
        suffix: Suffix of the original files.
        inner_folder: Folder in the archive that contains all files, or ''.
        original: Regular expression for the paths of original files in `inner_folder`, without suffix.
        converted: Regular expression for the paths of converted files in `EVENTS`, without suffix.
    """
    converter: Tuple[str, str]
    format: str
    suffix: str
    inner_folder: str
    original: str
    converted: str


_CIFAR10_PATTERN = rf'({"|".join(DATASETS["cifar10_dvs"].classes)})/cifar10_\1_\d+'
_FILE_SPECS = {
    'cifar10_dvs': _FileSpec(
        ('cifar10_dvs', 'CIFAR10DVS'), 'AEDAT 2.0', '.aedat', '', _CIFAR10_PATTERN, _CIFAR10_PATTERN),
    'dvs128_gesture': _FileSpec(
        ('dvs128_gesture', 'DVS128Gesture'), 'AEDAT 3.1', '.aedat', 'DvsGesture', r'user\w+',
        r'(train|test)/(\d|10)/user\w+'),
    'n_mnist': _FileSpec(
        ('n_mnist', 'NMNIST'), 'ATIS', '.bin', '', r'(Train|Test)/\d/\d+', r'(train|test)/\d/\d+'),
    'n_caltech101': _FileSpec(
        ('n_caltech101', 'NCaltech101'), 'ATIS', '.bin', 'Caltech101', r'[\w-]+/image_\d+', r'[\w-]+/image_\d+'),
}


def cache_folder(folder: PathLike) -> Path:
    """Return the folder for files that are computed from a dataset. The folder is not created.

    It is inside the dataset folder if that is writable, otherwise in `$XDG_CACHE_HOME/timm_spikformer`, by
    default `~/.cache/timm_spikformer`.
    """
    folder = resolve(folder)
    if os.access(folder, os.W_OK):
        return folder / CACHE
    base = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    return base / 'timm_spikformer' / f'{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}'


def find_recordings(name: str, folder: PathLike) -> List[Path]:
    """Return the converted recordings of a dataset, sorted. If necessary, convert the original files first.

    Raises:
        ValueError: The folder does not contain the dataset or contains another one, or files are missing or damaged.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise ValueError(f'{folder} is not a folder. {_hint(name)}')
    if (folder / f'{EVENTS}.building').exists():
        raise ValueError(
            f'A conversion by spikingjelly into {folder / EVENTS} was interrupted. Delete this folder and '
            f'{folder / EVENTS}.building, then run the same command again.')
    places = [folder / EVENTS, cache_folder(folder) / EVENTS]
    events = next((place for place in places if place.is_dir()), None)
    if events is None:
        events = _convert(name, folder)
    else:
        _check_unchanged(name, folder, events)
    files = _find_matching(events, '.npz', _FILE_SPECS[name].converted)
    if not files:
        raise ValueError(
            f'{events} contains no recordings of {DATASETS[name].title}{_found_instead(name, folder)}. {_hint(name)}')
    _check_classes(name, events, [path for _, path in files])
    return [path for _, path in files]


def _hint(name: str) -> str:
    """Return sentences for error messages: the expected folder, and where to download the dataset."""
    info = DATASETS[name]
    return (
        f'Expected the folder of the unpacked archives (with {info.layout}) or a root folder of spikingjelly (with '
        f'extract/ or {EVENTS}/). {info.source}')


def _find_matching(folder: Path, suffix: str, pattern: str) -> List[Tuple[str, Path]]:
    """Return pairs (path relative to `folder`, without suffix; file) of the files whose relative path matches.

    The order is that of torchvision's `DatasetFolder`, which spikingjelly uses: by folder, then by name, as text.

    Args:
        folder: Folder to search in.
        suffix: Suffix of the files.
        pattern: Regular expression for the relative path without suffix.
    """
    # not Path.glob: it also reads hidden folders, such as a temporary one that another process is removing
    paths = glob.iglob('*/' * pattern.count('/') + f'*{suffix}', root_dir=folder)
    keys = [Path(path).as_posix()[:-len(suffix)] for path in paths]
    found = [(key, folder / f'{key}{suffix}') for key in keys if re.fullmatch(pattern, key)]
    return sorted(found, key=lambda item: (item[1].parent, item[1].name))


def _find_originals(name: str, folder: Path) -> Dict[str, Path]:
    """Return the original files of a dataset, by their path in `inner_folder` without suffix."""
    spec = _FILE_SPECS[name]
    for base in (folder / 'extract' / spec.inner_folder, folder / spec.inner_folder, folder):
        files = _find_matching(base, spec.suffix, spec.original)
        if files:
            return dict(files)
    return {}


def _found_instead(name: str, folder: Path) -> str:
    """Return a clause for error messages if a folder contains another dataset or archives that are not unpacked."""
    for other in DATASETS:
        converted = _find_matching(folder / EVENTS, '.npz', _FILE_SPECS[other].converted)
        if other != name and (converted or _find_originals(other, folder)):
            return f', but those of {DATASETS[other].title}, whose name is {other!r}'
    for archive in DATASETS[name].archives:
        for path in (folder / archive, folder / 'download' / archive):
            if path.exists():
                return f', but the archive {path}, which is not unpacked'
    return ''


def _check_classes(name: str, folder: Path, paths: Iterable[Path]) -> None:
    """Raise a ValueError if a class has no files or, for datasets with an official split, train or test has none."""
    is_split = 'official' in DATASETS[name].splits
    classes = {'train': set(), 'test': set()} if is_split else {'': set()}
    for path in paths:
        classes[path.parents[1].name.lower() if is_split else ''].add(path.parent.name)
    for split, found in classes.items():
        what = f'{split} recordings'.strip()
        if not found:
            raise ValueError(f'{folder} contains no {what} of {DATASETS[name].title}. {_hint(name)}')
        missing = {*(DATASETS[name].classes or ())} - found
        if missing and name != 'dvs128_gesture':  # its class folders are numbers, and some may be missing
            raise ValueError(
                f'{folder} contains no {what} of the classes {", ".join(sorted(missing))} of {DATASETS[name].title}. '
                f'{_hint(name)}')


def _list_originals(files: Dict[str, Path]) -> str:
    """Return the names and sizes of original files as text."""
    return ''.join(f'{key} {path.stat().st_size}\n' for key, path in sorted(files.items()))


def _check_unchanged(name: str, folder: Path, events: Path) -> None:
    """Raise a ValueError if the original files are not those from which the recordings were converted."""
    files, listed = _find_originals(name, folder), events / _ORIGINALS
    if files and listed.is_file() and listed.read_text(encoding='utf-8') != _list_originals(files):
        raise ValueError(
            f'The original files of {DATASETS[name].title} in {folder} have changed since their conversion into '
            f'{events}. Delete {events}, so that they are converted again.')


def _convert(name: str, folder: Path) -> Path:
    """Convert the original files, and return the folder of the converted recordings."""
    files = _find_originals(name, folder)
    if not files:
        raise ValueError(
            f'{folder} contains no files of {DATASETS[name].title}{_found_instead(name, folder)}. {_hint(name)}')
    parts = _gesture_parts(files) if name == 'dvs128_gesture' else _class_parts(name, folder, files)
    cache = cache_folder(folder)
    target = (folder if cache.parent == resolve(folder) else cache) / EVENTS
    lock_folder = cache / 'conversion'  # not `target.parent`, which is locked while a temporary folder is created
    with create_folders(lock_folder), lock(lock_folder):  # a second process waits here, then finds the result
        if target.is_dir():
            return target
        with lock(target.parent):
            remove_stale(target, target.parent)
        with create_temporary(target, target.parent, is_folder=True) as temporary, reraise_with_path(target, temporary):
            result = temporary / EVENTS
            bar = tqdm(parts, f'Convert {DATASETS[name].title}', unit='part', disable=None, file=sys.stderr)
            for i, part in enumerate(bar):
                _convert_part(name, part, temporary / f'{i}', result)
            (result / _ORIGINALS).write_text(_list_originals(files), encoding='utf-8')
            os.rename(result, target)
    return target


class _Part(NamedTuple):
    """Original files that are converted in one call of spikingjelly.

    A dataset is converted in several parts for two reasons: a progress bar shows the finished ones, and Ctrl-C takes
    effect within seconds.

    Args:
        files: Original files, by their path in `inner_folder`.
        texts: Contents of further files that spikingjelly requires, by their path in `inner_folder`.
        num_recordings: Expected number of converted recordings.
    """
    files: Dict[str, Path]
    texts: Dict[str, str]
    num_recordings: int


def _class_parts(name: str, folder: Path, files: Dict[str, Path]) -> List[_Part]:
    """Check all files, and return one part for each class."""
    _check_classes(name, folder, files.values())
    by_class = defaultdict(dict)
    for key, path in files.items():
        check_file(path, _FILE_SPECS[name].format)
        by_class[path.parent.name][f'{key}{path.suffix}'] = path
    return [_Part(part, {}, len(part)) for part in by_class.values()]


def _gesture_parts(files: Dict[str, Path]) -> List[_Part]:
    """Check the files of DVS128 Gesture, and return one part for each original recording of several gestures."""
    folder, parts = min(files.values()).parent, []
    lists = {split: folder / f'trials_to_{split}.txt' for split in ('train', 'test')}
    for path in lists.values():
        if not path.is_file():
            raise ValueError(f'{path} is missing. {_hint("dvs128_gesture")}')
        trials = path.read_text(encoding='utf-8', errors='replace').split()
        if not trials:
            raise ValueError(f'{path} is empty, expected names of files. {_hint("dvs128_gesture")}')
        for trial in trials:
            labels = f'{Path(trial).stem}_labels.csv'
            for file in (trial, labels):
                if not (folder / file).is_file():
                    raise ValueError(
                        f'{folder / file} is missing, but {path.name} lists {trial}. {_hint("dvs128_gesture")}')
            check_file(folder / trial, _FILE_SPECS['dvs128_gesture'].format)
            texts = {other.name: trial if other == path else '' for other in lists.values()}
            parts.append(_Part(
                {file: folder / file for file in (trial, labels)}, texts, len(read_labels(folder / labels))))
    return parts


def _convert_part(name: str, part: _Part, work: Path, result: Path) -> None:
    """Convert the files of one part with spikingjelly, and move the recordings to the folder `result`.

    `work` is a folder for intermediate files. It is removed afterwards.
    """
    spec = _FILE_SPECS[name]
    # spikingjelly converts every file in a folder, so it gets a folder of links without other files, such as .DS_Store
    archive, raw = work / 'extract' / spec.inner_folder, work / 'raw'
    raw.mkdir(parents=True)
    for key, path in part.files.items():
        (archive / key).parent.mkdir(parents=True, exist_ok=True)
        (archive / key).symlink_to(resolve(path))
    for key, text in part.texts.items():
        (archive / key).write_text(text, encoding='utf-8')
    module, class_name = spec.converter
    converter = getattr(importlib.import_module(f'spikingjelly.datasets.{module}'), class_name)  # slow to import
    converter.create_raw_from_extracted(work / 'extract', raw)
    converted = sorted(raw.rglob('*.npz'))
    for path in converted:
        with np.load(path) as arrays:
            num_events = len(arrays['t'])
        if not num_events:
            files = ' and '.join(map(str, part.files.values()))
            raise ValueError(
                f'{files}: the recording {path.stem} of class {path.parent.name} has no events. {_hint(name)}')
        target = result / path.relative_to(raw)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, target)
    if len(converted) != part.num_recordings:
        raise RuntimeError(
            f'spikingjelly wrote {len(converted)} recordings of {DATASETS[name].title}, expected '
            f'{part.num_recordings}. Install a version of spikingjelly that timm-spikformer supports.')
    shutil.rmtree(work)
