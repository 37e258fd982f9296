"""Where the images of each split are in the folder of a dataset, for `images.py`."""
import os
import re
from pathlib import Path
from typing import Dict, List

from timm.data import get_img_extensions

__all__ = ['SPLITS', 'find_class_folders', 'find_parquet_files']

SPLITS = {'train': 'train', 'test': 'test', 'validation': 'validation', 'val': 'validation'}  # by folder name
_PARQUET = re.compile(r'(?P<split>train|test|validation|val)(-\d+-of-(?P<shards>\d+).*)?')


def find_parquet_files(root: Path, expected: str) -> Dict[str, List[Path]]:
    """Return the parquet files by split; the only split is 'all' if no file is named after a split.

    Args:
        root: Folder of the dataset.
        expected: Sentence that states what was expected, appended to errors.

    Raises:
        ValueError: A file is missing, or only some files are named after splits.
    """
    paths = sorted(p for folder in (root, root / 'data') if folder.is_dir() for p in folder.glob('*.parquet'))
    splits: Dict[str, List[Path]] = {}
    shards: Dict[str, int] = {}
    for path in paths:
        match = _PARQUET.fullmatch(path.stem)
        split = SPLITS[match['split']] if match else 'all'
        splits.setdefault(split, []).append(path)
        shards[split] = int(match['shards'] or 1) if match else 0
    if 'all' in splits and len(splits) > 1:
        raise ValueError(
            f'{root} contains files named after splits, but also {splits["all"][0].name}, which is not named train, '
            f'test or validation. {expected}')
    for split, files in splits.items():
        if shards[split] and len(files) != shards[split]:
            raise ValueError(
                f'{root} contains {len(files)} parquet files of the split {split}, but {files[-1].name} is named as '
                f'one of {shards[split]}. Complete the download, or remove files that do not belong to it.')
    return splits


def find_class_folders(root: Path, expected: str) -> Dict[str, Path]:
    """Return the folder of each split, `root` as 'all' if there are no splits; an empty dict if there are no images.

    Args:
        root: Folder of the dataset.
        expected: Sentence that states what was expected, appended to errors.

    Raises:
        ValueError: There are images next to the splits, a split has two folders, or a symbolic link is broken.
    """
    subfolders = _subfolders(root)
    splits: Dict[str, Path] = {}
    for path in subfolders:
        if path.name in SPLITS and not _has_images(path) and any(_has_images(p) for p in _subfolders(path)):
            split = SPLITS[path.name]
            if split in splits:
                raise ValueError(f'{root} contains both {splits[split].name} and {path.name}. Remove or rename one.')
            splits[split] = path
    classes = [path for path in subfolders if path not in splits.values() and _has_images(path)]
    if splits and (classes or _has_images(root)):
        other = f'the folder {classes[0].name}, which contains images directly' if classes else 'images'
        found = ', '.join(path.name for path in splits.values())
        raise ValueError(f'{root} contains {found} with class folders, but also {other}. {expected}')
    return splits or ({'all': root} if classes or _has_images(root) else {})


def _subfolders(folder: Path) -> List[Path]:
    paths = sorted(folder.iterdir())
    for path in paths:
        if path.is_symlink() and not path.exists():
            raise ValueError(f'{path} is a symbolic link to {os.readlink(path)}, which does not exist.')
    return [path for path in paths if path.is_dir()]


def _has_images(folder: Path) -> bool:
    extensions = get_img_extensions(as_set=True)
    with os.scandir(folder) as entries:
        return any(
            os.path.splitext(entry.name)[1].lower() in extensions and not entry.is_dir() for entry in entries)
