"""Frames of all recordings of a split, computed once and read from one memory-mapped file."""
import os
import sys
import warnings
from pathlib import Path
from typing import BinaryIO, Optional, Tuple

import numpy as np
from tqdm import tqdm

from ..arguments import check_integer
from ..temporaries import create_folders, create_temporary, lock, remove_stale, reraise_with_path
from .conversion import PathLike, cache_folder
from .frames import SPLIT_BY, check_size, integrate, resize
from .recordings import Recordings, sha256_of_lines

__all__ = ['cache_frames']

_VERSION = 1  # of the contents: to be increased whenever `integrate` or `resize` returns other values
_COUNTS = (np.uint8, np.uint16, np.uint32, np.uint64)


def cache_frames(
        recordings: Recordings,
        folder: Optional[PathLike],
        time_steps: int,
        size: Optional[Tuple[int, int]] = None,
        split_by: str = 'number',
) -> np.memmap:
    """Return the frames of all recordings of a split. They are computed by the first call, and read by later calls.

    The file is `<dataset>-<split>-T<T>-<split_by>-<H>x<W>-<key>/frames.npy`. The key is a digest of the arguments and
    of the names, labels and sizes of the files of the recordings, so that other data have another file. If several
    processes need the same file, one computes it and the others wait. A damaged file is replaced, with a warning.

    Args:
        recordings: Recordings of one split.
        folder: Folder for the cache; by default (None), `cache_folder` of the folder of the dataset.
        time_steps: Number of frames T of each recording.
        size: Height and width of the frames; by default, those of the sensor. Another size is float32, see `resize`.
        split_by: 'number' or 'time', see `integrate`.

    Returns:
        Frames `[N, T, 2, H, W]`, read-only: counts in the smallest unsigned integers that hold the largest count of all
        recordings, or float32 if the size is not that of the sensor.

    Raises:
        ValueError: An argument is invalid, there are no recordings, or a recording is damaged.
        OSError: Writing failed, for example because the disk is full.
    """
    time_steps = check_integer('time_steps', time_steps, 1)
    height, width = size = check_size(recordings.size if size is None else size)
    if split_by not in SPLIT_BY:
        raise ValueError(f"split_by must be 'number' or 'time', got {split_by!r}.")
    if not len(recordings):
        raise ValueError(f'There are no recordings of {recordings.name}.')
    shape = len(recordings), time_steps, 2, height, width
    key = sha256_of_lines([str(_VERSION), recordings.fingerprint(), str(recordings.size), str(shape), split_by])
    name = f'{recordings.name}-{recordings.split}-T{time_steps}-{split_by}-{height}x{width}-{key[:16]}'
    cache = Path(os.path.abspath(cache_folder(recordings.folder) if folder is None else folder))
    path = cache / name / 'frames.npy'
    with create_folders(path.parent), lock(path.parent):  # a second process waits here, and then finds the file
        frames = _open(path, shape)
        if frames is None:
            with lock(cache):
                remove_stale(path.parent, cache)
            with create_temporary(path.parent, cache, is_folder=True) as temporary, reraise_with_path(path, temporary):
                computed = _compute(recordings, temporary, shape, split_by)
                os.replace(computed, path)
            frames = _open(path, shape)
    return frames


def _open(path: Path, shape: Tuple[int, ...]) -> Optional[np.memmap]:
    """Open a file of frames; return None if there is none, or if it is damaged."""
    if not path.exists():
        return None
    problem = None
    try:
        frames = np.load(path, mmap_mode='r', allow_pickle=False)
        num_bytes = path.stat().st_size
        if frames.shape != shape or frames.dtype not in (*_COUNTS, np.float32):
            problem = f'it has {frames.dtype} {list(frames.shape)}, expected {list(shape)}'
        elif frames.offset + frames.nbytes != num_bytes:
            problem = f'it has {num_bytes} bytes, expected {frames.offset + frames.nbytes}'
    except (ValueError, EOFError, AttributeError, SyntaxError) as e:  # errors of np.load, by what is damaged
        problem = str(e)
    if problem is None:
        return frames
    warnings.warn(f'The cache {path} is damaged ({problem}) and is computed again.', stacklevel=3)
    return None


def _compute(recordings: Recordings, folder: Path, shape: Tuple[int, ...], split_by: str) -> Path:
    """Write the frames of all recordings to a file in a folder, and return its path."""
    _, time_steps, _, *size = shape
    is_counts = tuple(size) == tuple(recordings.size)
    path = folder / 'frames.npy'
    dtype = np.dtype(np.uint8 if is_counts else np.float32)
    f = _create(path, shape, dtype)
    try:
        bar = tqdm(
            range(len(recordings)), f'Integrate {recordings.name} {recordings.split} once', unit='recording',
            disable=None, file=sys.stderr)
        for i in bar:
            frames = integrate(recordings.read(i), time_steps, recordings.size, split_by)
            if not is_counts:
                frames = resize(frames, tuple(size))
            elif frames.dtype.itemsize > dtype.itemsize:
                f.close()
                dtype = frames.dtype
                f, path = _widen(path, shape, dtype, i)
            f.write(frames.astype(dtype).tobytes())
        f.flush()
        os.fsync(f.fileno())
    finally:
        f.close()
    return path


def _create(path: Path, shape: Tuple[int, ...], dtype: np.dtype) -> BinaryIO:
    """Create an .npy file and return it, opened after its header.

    It is written in sequence, not as a memory map, for which a full disk is a crash and not an OSError.
    """
    f = open(path, 'wb')
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(f, {'descr': descr, 'fortran_order': False, 'shape': shape})
    return f


def _widen(path: Path, shape: Tuple[int, ...], dtype: np.dtype, count: int) -> Tuple[BinaryIO, Path]:
    """Copy the first recordings of an unfinished file to a file of another type; return it, opened, and its path."""
    wider = path.with_name(f'frames-{dtype}.npy')
    f = _create(wider, shape, dtype)
    with open(path, 'rb') as narrow:
        np.lib.format.read_magic(narrow)
        _, _, narrow_dtype = np.lib.format.read_array_header_1_0(narrow)
        num_values = int(np.prod(shape[1:]))
        for _ in range(count):
            f.write(np.fromfile(narrow, narrow_dtype, num_values).astype(dtype).tobytes())
    path.unlink()
    return f, wider
