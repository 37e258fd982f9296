"""Temporary files and folders, and locks, for `folders.py`, safe against concurrent and killed processes.

A temporary file or folder is named after its target and locked by the process that writes it. A temporary file without
a lock was therefore left behind by a killed process and can be removed.

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
except ImportError:  # Windows: no locks; files left by killed processes are not removed
    fcntl = None

__all__ = [
    'PREFIX', 'create_folders', 'create_temporary', 'discard', 'lock', 'lock_for_run', 'remove_stale', 'replace_file',
    'reraise_with_path', 'temporary_path',
]

PREFIX = '.timm-spikformer-'  # prefix of the names of temporary files and folders
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def temporary_path(target: Path, parent: Path) -> Path:
    return parent / f'{_prefix(target)}{secrets.token_hex(8)}{target.suffix}'


def _prefix(target: Path) -> str:
    """Return the name prefix of the temporary files and folders of a target; it differs between machines."""
    owner = os.fsencode(f'{platform.node()}/{target.name}')  # locks of this machine may not apply on other machines
    return f'{PREFIX}{hashlib.sha256(owner).hexdigest()[:8]}-'


@contextmanager
def create_temporary(target: Path, parent: Path, is_folder: bool = False) -> Iterator[Path]:
    """Create a temporary file or folder, locked until the block ends, and remove it then if it still exists."""
    path, descriptor = temporary_path(target, parent), None
    try:
        with reraise_with_path(target, path):
            with lock(parent):  # so that no other process finds it before it is locked
                # not with tempfile, which sets more restrictive permissions than those of other new files
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


def replace_file(path: Path, content: bytes) -> None:
    """Write or replace a file completely or not at all, and create its folder; see `folders.py` for owned files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with create_temporary(path, path.parent) as partial, reraise_with_path(path, partial):
        partial.write_bytes(content)
        os.replace(partial, path)
    with lock(path.parent):
        remove_stale(path, path.parent)


def remove_stale(target: Path, parent: Path) -> None:
    """Remove temporary files and folders of a target left by killed processes; the caller has locked `parent`."""
    with suppress(OSError), os.scandir(parent) as entries:
        for path in [parent / entry.name for entry in entries if entry.name.startswith(_prefix(target))]:
            descriptor = _try_lock(path)
            if descriptor is not None:  # the process that wrote it has ended
                os.close(descriptor)
                discard(path)


@contextmanager
def create_folders(path: Path) -> Iterator[None]:
    """Create a folder and its parents; after an error, remove those that were created here and are empty."""
    created: List[Path] = []
    try:
        with reraise_with_path(path):
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
def reraise_with_path(path: Path, temporary: Optional[Path] = None) -> Iterator[None]:
    """Re-raise an OSError with `path` as its file name, instead of that of a temporary file.

    An error of safetensors that contains the text "(os error N)" is converted to an OSError as well.

    Args:
        path: File or folder that the user specified.
        temporary: Convert only errors about this path or a path that starts with it; by default, all errors.
    """
    try:
        yield
    except Exception as e:
        number, filename = getattr(e, 'errno', None), getattr(e, 'filename', None)
        if not isinstance(e, OSError):
            described = re.search(r'\(os error (\d+)\)', str(e))
            number = int(described[1]) if described else None
        if filename is None:  # writing to an open file failed
            is_ours = number in _DISK_ERRORS
        else:
            is_ours = temporary is None or str(filename).startswith(str(temporary))
        if not is_ours or number is None:
            raise
        raise OSError(number, f'{os.strerror(number)}; nothing was written', str(path)) from e


def _try_lock(path: Path) -> Optional[int]:
    """Lock a file or folder; return its descriptor, or None if it is locked or cannot be locked."""
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
    """Lock a folder against other runs that write to it; without effect if the file system does not support locks."""
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
def lock_for_run(folder: Path) -> Iterator[None]:
    """Lock a folder for the whole run; unlike `lock`, it raises an error instead of waiting.

    Raises:
        ValueError: Another process has locked the folder in this way.
    """
    if fcntl is None:
        yield
        return
    path = folder / f'{PREFIX}lock'
    with reraise_with_path(folder):
        descriptor = _create_lock_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _create_lock_file(path: Path) -> int:
    """Create and lock a file; return its descriptor. It is not locked if the file system does not support locks."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(descriptor)
            raise ValueError(
                f'Another run of timm-spikformer is writing to {path.parent}. Wait until it ends, or choose another '
                f'folder.') from e
        except OSError:
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # the run that had locked the file has removed it in the meantime
