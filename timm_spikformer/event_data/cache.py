"""Cache of frames: those of all recordings of a split are computed once and stored in one memory-mapped file."""
import os
import sys
import warnings
import zipfile
from pathlib import Path
from typing import BinaryIO, Optional, Tuple

import numpy as np
from tqdm import tqdm

from ..temporaries import create_folders, create_temporary, lock, remove_stale, reraise_with_path
from .conversion import PathLike, cache_folder
from .frames import check_integration, check_size, integrate, resize
from .recordings import Recordings, sha256_of_lines

__all__ = ['cache_frames']

_VERSION = 1  # part of the cache key; increase it whenever `integrate` or `resize` returns different values
_COUNT_DTYPES = (np.uint8, np.uint16, np.uint32, np.uint64)


def cache_frames(
        recordings: Recordings,
        folder: Optional[PathLike],
        time_steps: int,
        size: Optional[Tuple[int, int]] = None,
        split_by: str = 'number',
) -> np.memmap:
    """Return the frames of all recordings of a split. The first call computes and stores them; later calls read them.

    The file is `<dataset>-<split>-T<T>-<split_by>-<H>x<W>-<key>/frames.npy`. The key is a digest of the arguments and
    of the names, labels, file sizes and modification times of the recordings, so different data use different files. If
    several processes need the same file, one process computes it and the others wait. A file with a damaged header or
    of another length is replaced, with a warning.

    Args:
        recordings: Recordings of one split.
        folder: Cache folder; None selects the default, which is `cache_folder` of the dataset folder.
        time_steps: Number of frames T of each recording.
        size: Height and width of the frames; by default, those of the sensor. For another size, see `resize`.
        split_by: 'number' or 'time', see `integrate`.

    Returns:
        Frames `[N, T, 2, H, W]`, read-only: counts in the smallest unsigned integer type that holds the largest count
        of all recordings, or float32 if the size is not that of the sensor.

    Raises:
        ValueError: An argument is invalid, there are no recordings, or a recording is damaged.
        OSError: Writing failed, for example because the disk is full.
    """
    time_steps = check_integration(time_steps, split_by)
    height, width = size = check_size(recordings.size if size is None else size)
    if not len(recordings):
        raise ValueError(f'Expected at least one recording of {recordings.name}, got none.')
    shape = len(recordings), time_steps, 2, height, width
    key = sha256_of_lines([str(_VERSION), recordings.fingerprint(), str(recordings.size), str(shape), split_by])
    name = f'{recordings.name}-{recordings.split}-T{time_steps}-{split_by}-{height}x{width}-{key[:16]}'
    cache = Path(os.path.abspath(cache_folder(recordings.folder) if folder is None else folder))
    path = cache / name / 'frames.npy'
    with create_folders(path.parent), lock(path.parent):  # a second process waits here, then opens the file
        frames = _open_frames(path, shape)
        if frames is None:
            with lock(cache):
                remove_stale(path.parent, cache)
            with create_temporary(path.parent, cache, is_folder=True) as temporary, reraise_with_path(path, temporary):
                computed = _compute_frames(recordings, temporary, shape, split_by)
                os.replace(computed, path)
            frames = _open_frames(path, shape)
    return frames


def _open_frames(path: Path, shape: Tuple[int, ...]) -> Optional[np.memmap]:
    """Open a file of frames; return None if it is missing or, with a warning, if it is damaged."""
    if not path.exists():
        return None
    problem = None
    try:
        frames = np.load(path, mmap_mode='r', allow_pickle=False)
        num_bytes = path.stat().st_size
        if frames.shape != shape or frames.dtype not in (*_COUNT_DTYPES, np.float32):
            problem = (
                f'its array has type {frames.dtype} and shape {list(frames.shape)}, expected unsigned integers or '
                f'float32 and shape {list(shape)}')
        elif frames.offset + frames.nbytes != num_bytes:
            problem = f'it has {num_bytes} bytes, expected {frames.offset + frames.nbytes}'
    except (ValueError, EOFError, AttributeError, SyntaxError, zipfile.BadZipFile) as e:  # np.load raises one of these
        problem = str(e)
    if problem is None:
        return frames
    warnings.warn(f'The cache file {path} is damaged ({problem}). It is computed again.', stacklevel=3)
    return None


def _compute_frames(recordings: Recordings, folder: Path, shape: Tuple[int, ...], split_by: str) -> Path:
    """Write the frames of all recordings to a file in a folder, and return the path of the file."""
    _, time_steps, _, *size = shape
    is_counts = tuple(size) == tuple(recordings.size)
    path = folder / 'frames.npy'
    dtype = np.dtype(np.uint8 if is_counts else np.float32)
    f = _create_npy(path, shape, dtype)
    try:
        bar = tqdm(
            range(len(recordings)), f'Cache frames of {recordings.name} ({recordings.split})', unit='recording',
            disable=None, file=sys.stderr)
        for i in bar:
            frames = integrate(recordings.read(i), time_steps, recordings.size, split_by)
            if not is_counts:
                frames = resize(frames, tuple(size))
            elif frames.dtype.itemsize > dtype.itemsize:
                f.close()
                dtype = frames.dtype
                f, path = _copy_to_wider(path, shape, dtype, i)
            f.write(frames.astype(dtype).tobytes())
        f.flush()
        os.fsync(f.fileno())
    finally:
        f.close()
    return path


def _create_npy(path: Path, shape: Tuple[int, ...], dtype: np.dtype) -> BinaryIO:
    """Create an .npy file, write its header, and return the open file.

    The file is written sequentially: if the disk is full, writing raises an OSError, whereas writing to a memory map
    would crash the process.
    """
    f = open(path, 'wb')
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(f, {'descr': descr, 'fortran_order': False, 'shape': shape})
    return f


def _copy_to_wider(path: Path, shape: Tuple[int, ...], dtype: np.dtype, count: int) -> Tuple[BinaryIO, Path]:
    """Replace an unfinished file, of `count` recordings, by one of a wider type; return the open file and its path."""
    wider = path.with_name(f'frames-{dtype}.npy')
    f = _create_npy(wider, shape, dtype)
    with open(path, 'rb') as narrow:
        np.lib.format.read_magic(narrow)
        _, _, narrow_dtype = np.lib.format.read_array_header_1_0(narrow)
        num_values = int(np.prod(shape[1:]))
        for _ in range(count):
            f.write(np.fromfile(narrow, narrow_dtype, num_values).astype(dtype).tobytes())
    path.unlink()
    return f, wider
