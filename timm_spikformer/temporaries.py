"""Temporary files and folders, and locks, for `folders.py`: what several processes write at once, or leave when killed.

A temporary file or folder is named after its target and locked by the process that writes it, so that what a killed
process has left can be told from what a running one is writing.

This module imports the standard library only.
"""
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator, List, Optional

try:
    import fcntl
except ImportError:  # Windows: runs do not exclude each other there, and what a killed one leaves stays
    fcntl = None

__all__ = [
    'PREFIX', 'create_temporary', 'discard', 'hold', 'lock', 'naming', 'new_folders', 'remove_stale', 'temporary_path']

PREFIX = '.timm-spikformer-'  # of the names of temporary files and folders
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def temporary_path(target: Path, parent: Path) -> Path:
    return parent / f'{_prefix(target)}{secrets.token_hex(8)}{target.suffix}'


def _prefix(target: Path) -> str:
    """Start of the names of all temporary files and folders of a target, the same on this machine only."""
    owner = os.fsencode(f'{platform.node()}/{target.name}')  # a lock may be unknown to other machines
    return f'{PREFIX}{hashlib.sha256(owner).hexdigest()[:8]}-'


@contextmanager
def create_temporary(target: Path, parent: Path, is_folder: bool = False) -> Iterator[Path]:
    """Create a temporary file or folder, locked until the block ends; remove it then if it is still there."""
    path, descriptor = temporary_path(target, parent), None
    try:
        with naming(target, path):
            with lock(parent):  # nobody sees it before it is locked
                # with the permissions of any other new file or folder, which those of tempfile have not
                if is_folder:
                    path.mkdir()
                else:
                    path.touch(exist_ok=False)
                descriptor = _try_lock(path)
            yield path
    finally:
        if descriptor is not None:
            os.close(descriptor)
        discard(path)


def remove_stale(target: Path, parent: Path) -> None:
    """Remove the temporary files and folders of a target that killed processes have left; `parent` is locked."""
    with suppress(OSError), os.scandir(parent) as entries:
        for path in [parent / entry.name for entry in entries if entry.name.startswith(_prefix(target))]:
            descriptor = _try_lock(path)
            if descriptor is not None:  # its process has ended
                os.close(descriptor)
                discard(path)


@contextmanager
def new_folders(path: Path) -> Iterator[None]:
    """Create a folder and its parents; after an error, remove those of them that were not there and are empty."""
    created: List[Path] = []
    try:
        with naming(path):
            for p in reversed([p for p in (path, *path.parents) if not p.exists()]):
                created.insert(0, p)
                p.mkdir(exist_ok=True)
        yield
    except BaseException:
        for p in created:
            with suppress(OSError):
                p.rmdir()
        raise


def discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def naming(path: Path, temporary: Optional[Path] = None) -> Iterator[None]:
    """Let an OSError name what the user asked for and not a temporary file; also one that safetensors only describes.

    Args:
        path: What the user asked for.
        temporary: Path that errors are about; by default, all errors are.
    """
    try:
        yield
    except Exception as e:
        number, filename = getattr(e, 'errno', None), getattr(e, 'filename', None)
        if not isinstance(e, OSError):
            described = re.search(r'\(os error (\d+)\)', str(e))
            number = int(described[1]) if described else None
        if filename is None:  # of a write to an open file
            is_ours = number in _DISK_ERRORS
        else:
            is_ours = temporary is None or str(filename).startswith(str(temporary))
        if not is_ours or number is None:
            raise
        raise OSError(number, f'{os.strerror(number)}; nothing was written', str(path)) from e


def _try_lock(path: Path) -> Optional[int]:
    """Lock a file or folder; return its descriptor, or None if it is locked or the file system has no locks."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return descriptor
    except OSError:
        os.close(descriptor)
        return None


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Exclude other runs that write to the folder; file systems without locks go without."""
    descriptor = None
    if fcntl is not None:
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes from holding the same folder until the block ends.

    Raises:
        ValueError: Another process holds it.
    """
    if fcntl is None:
        yield
        return
    path = folder / f'{PREFIX}lock'
    with naming(folder):
        descriptor = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int:
    """Create and lock a file; return its descriptor. File systems without locks go without."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(descriptor)
            raise ValueError(
                f'Another run of timm-spikformer is writing to {path.parent}. Wait until it ends, or name another '
                f'folder.') from e
        except OSError:
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # the run that held it has removed it in the meantime
