"""Writing of output folders and files without losing anything that is already there.

A folder is written to a temporary sibling, verified there by the caller, and then moved into place. A manifest in the
folder lists the files that this package wrote and their digests. Only files of the manifest whose content is still
the same are ever replaced or removed; every other file belongs to somebody else and is left alone.

This module imports the standard library only.
"""
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Tuple, Union

try:
    import fcntl
except ImportError:  # Windows: two runs that end in the same instant are not told apart there
    fcntl = None

__all__ = [
    'MANIFEST', 'check_output', 'manifest_files', 'remove_files', 'write_file', 'write_folder',
    'write_manifest', 'write_new_file']

PathLike = Union[str, 'os.PathLike[str]']
# Path in the folder, with '/', to the sha256 digests that its content may have: two while a file is being replaced
Manifest = Dict[str, List[str]]

MANIFEST = '.timm-spikformer.json'
_TEMPORARY = '.timm-spikformer-'  # prefix of temporary files and folders
_ADVICE = 'Name another folder, or move the file away.'


def check_output(folder: PathLike, inputs: Iterable[PathLike] = (), add: bool = False) -> Path:
    """Check that writing to a folder loses nothing, without touching the disk.

    Args:
        folder: Folder to be written. It may not exist yet.
        inputs: Files and folders that are read to make it; the folder may not be or contain one of them.
        add: Accept a folder with files of others. By default it must be empty, or have been written by this package.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: The folder is a file, a symbolic link, the current folder or one above it, contains one of the
            inputs, or holds files of others.
    """
    if not os.fspath(folder) or '\0' in os.fspath(folder):
        raise ValueError(f'{os.fspath(folder)!r} is not the name of a folder.')
    path = Path(os.path.abspath(folder))
    if path.is_symlink():
        raise ValueError(f'{folder} is a symbolic link. Name the folder that it points to, {path.resolve()}.')
    path = path.parent.resolve() / path.name
    current = Path.cwd()
    if path == current or path in current.parents:
        raise ValueError(f'{folder} is the current folder or one that contains it. Name a folder of its own.')
    if path.exists() and not path.is_dir():
        raise ValueError(f'{folder} is a file. Name a folder.')
    parent = next(parent for parent in path.parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise ValueError(f'{folder} cannot be created: {parent} is not a folder.')
    for source in inputs:
        source = Path(source).resolve()
        if source == path or path in source.parents:
            raise ValueError(f'{folder} is or contains {source}, which is read. Name another folder.')
    if path.is_dir():
        _check_foreign(path, add)
    return path


def manifest_files(folder: PathLike) -> List[str]:
    """Return the paths, with '/', of the files in a folder that this package wrote, none without a manifest."""
    return sorted(_read_manifest(Path(folder)))


def write_manifest(folder: PathLike) -> None:
    """List all files of a folder in its manifest, for a folder that is uploaded before `write_folder` is done."""
    folder = Path(folder)
    _write_manifest(folder, {name: [_digest(folder / name)] for name in _files(folder)})


@contextmanager
def write_folder(folder: PathLike, inputs: Iterable[PathLike] = (), add: bool = False) -> Iterator[Path]:
    """Write a folder completely or not at all.

    Yields an empty temporary folder beside `folder`. When the block ends without an error, its files are moved into
    `folder`, in place of the files that an earlier run wrote there. After an error, `folder` is as it was.

    Args:
        folder: Folder to write. It may not exist yet.
        inputs: Files and folders that are read to make it; the folder may not be or contain one of them.
        add: Write into a folder that holds files of others too. No file of theirs is replaced.

    Raises:
        ValueError: See `check_output`; or a file of the folder was not written by this package, or has been changed
            since, and would be replaced or removed.
        OSError: The disk is full, the folder may not be written, and the like.
    """
    path = check_output(folder, inputs, add)
    created = _create_parents(path.parent)
    temporary = None
    try:
        with _about(path):
            # beside the folder, so that moving is renaming; in a mounted folder beside is another disk
            temporary = _new_folder(path if os.path.ismount(path) else path.parent)
        with _about(path, temporary):
            yield temporary
            _commit(temporary, path, add)
    except BaseException:
        _discard(temporary)
        for parent in created:
            with suppress(OSError):
                parent.rmdir()
        raise
    _discard(temporary)


@contextmanager
def write_file(path: PathLike) -> Iterator[Path]:
    """Write a file completely or not at all, and list it in the manifest of its folder.

    Yields the path of a temporary sibling with the same suffix, which is renamed to `path` when the block ends without
    an error. The folder must exist.

    Raises:
        ValueError: The file is there already and was not written by this package, or has been changed since.
        OSError: The disk is full, the folder may not be written, and the like.
    """
    path = _check_file(path)
    _check_own(path.parent, path.name, _read_manifest(path.parent))
    with _partial_file(path) as partial:
        yield partial
        digest = _digest(partial)
        with _lock(path.parent):
            manifest = _read_manifest(path.parent)
            _check_own(path.parent, path.name, manifest)
            # in this order, an interruption leaves a file of which the manifest knows the content
            before = [_digest(path)] if path.exists() else []
            _write_manifest(path.parent, {**manifest, path.name: [*before, digest]})
            os.replace(partial, path)


@contextmanager
def write_new_file(path: PathLike) -> Iterator[Path]:
    """Write a file that does not exist yet, completely or not at all. No manifest is kept.

    Yields the path of a temporary sibling, as `write_file` does.

    Raises:
        ValueError: The file is there already, or its folder is not.
        OSError: The disk is full, the folder may not be written, and the like.
    """
    path = _check_file(path)
    _check_own(path.parent, path.name, {}, f'{path} is there already. Name a new file, or remove it first.')
    with _partial_file(path) as partial:
        yield partial
        with _lock(path.parent):
            _check_own(path.parent, path.name, {}, f'{path} has appeared in the meantime and is not replaced.')
            os.replace(partial, path)


def _check_file(path: PathLike) -> Path:
    if not os.fspath(path) or '\0' in os.fspath(path):
        raise ValueError(f'{os.fspath(path)!r} is not the name of a file.')
    absolute = Path(os.path.abspath(path))
    if absolute.is_dir():
        raise ValueError(f'{path} is a folder. Name a file.')
    if not absolute.parent.is_dir():
        raise ValueError(f'{path} cannot be written: {absolute.parent} is not a folder.')
    return absolute


@contextmanager
def _partial_file(path: Path) -> Iterator[Path]:
    partial = path.with_name(f'{_TEMPORARY}{secrets.token_hex(8)}{path.suffix}')
    try:
        with _about(path, partial):
            yield partial
    finally:
        with suppress(OSError):
            partial.unlink()


def remove_files(folder: PathLike, names: Iterable[str]) -> None:
    """Remove those of the files that this package wrote to a folder, and leave all others alone.

    Raises:
        ValueError: A file has been changed since it was written.
    """
    folder = Path(folder)
    with _lock(folder):
        manifest = _read_manifest(folder)
        names = [name for name in names if name in manifest]
        for name in names:
            _check_own(folder, name, manifest)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        if names:
            _write_manifest(folder, {name: digests for name, digests in manifest.items() if name not in names})


def _commit(temporary: Path, folder: Path, add: bool) -> None:
    """Move the files of the temporary folder into place, or leave the folder as it was."""
    new = {name: [_digest(temporary / name)] for name in _files(temporary)}
    with _lock(folder.parent):
        if not os.path.lexists(folder):
            _write_manifest(temporary, new)
            os.rename(temporary, folder)
            return
        with _lock(folder):
            if folder.is_symlink() or not folder.is_dir():
                raise ValueError(f'{folder} has become a file or a symbolic link in the meantime. {_ADVICE}')
            _check_foreign(folder, add)
            old = _read_manifest(folder)
            for name in {*old, *new}:
                _check_own(folder, name, old)
            _replace(temporary, folder, old, new)


def _replace(temporary: Path, folder: Path, old: Manifest, new: Manifest) -> None:
    """Replace the files of the manifest `old` by those of `new`; undo it where it fails."""
    moves: List[Tuple[Path, Path]] = []
    folders: List[Path] = []  # new ones
    backup = _new_folder(temporary.parent)
    has_manifest = (folder / MANIFEST).exists()
    try:
        if has_manifest:
            shutil.copyfile(folder / MANIFEST, backup / MANIFEST)
        # from here on, whatever happens, the manifest knows the content of every file, old or new
        _write_manifest(folder, {name: [*old.get(name, []), *new.get(name, [])] for name in {*old, *new}})
        for name in old:
            if os.path.lexists(folder / name):
                _move(folder / name, backup / name, moves, folders)
        for name in new:
            _move(temporary / name, folder / name, moves, folders)
        _write_manifest(folder, new)
    except BaseException:
        for source, target in reversed(moves):
            if os.path.lexists(target) and not os.path.lexists(source):
                with suppress(OSError):  # what cannot be moved back stays in the backup
                    os.rename(target, source)
        with suppress(OSError):
            if not has_manifest:
                (folder / MANIFEST).unlink()
            elif (backup / MANIFEST).exists():
                os.replace(backup / MANIFEST, folder / MANIFEST)
        for made in (*reversed(folders), backup):
            with suppress(OSError):
                made.rmdir()
        raise
    _discard(backup)
    for parent in sorted({folder / p for name in old for p in Path(name).parents if p.name}, reverse=True):
        with suppress(OSError):
            parent.rmdir()  # where it is empty


def _move(source: Path, target: Path, moves: List[Tuple[Path, Path]], folders: List[Path]) -> None:
    """Rename a file; the move and the folders that it takes are noted before they are made."""
    for parent in reversed([p for p in target.parents if not p.exists()]):
        folders.append(parent)
        parent.mkdir()
    moves.append((source, target))
    os.rename(source, target)


def _read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder; a folder without one holds no file of this package."""
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding='utf-8'))['files']
        if all(_is_inside(name) and all(isinstance(d, str) for d in digests) for name, digests in files.items()):
            return files
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f'{path} is not a manifest of timm-spikformer, or is damaged. {_ADVICE}')


def _is_inside(name: str) -> bool:
    return name != MANIFEST and not name.startswith('/') and not re.search(r'[\\\0:]|(^|/)\.{0,2}(/|$)', name)


def _write_manifest(folder: Path, files: Manifest) -> None:
    text = json.dumps({'written_by': 'timm-spikformer', 'files': dict(sorted(files.items()))}, indent=2) + '\n'
    partial = folder / f'{_TEMPORARY}{secrets.token_hex(8)}'
    try:
        partial.write_text(text, encoding='utf-8')
        os.replace(partial, folder / MANIFEST)
    finally:
        with suppress(OSError):
            partial.unlink()


def _check_foreign(folder: Path, add: bool) -> None:
    """Raise a ValueError if the folder was not written by this package and holds something."""
    _read_manifest(folder)
    if add or (folder / MANIFEST).exists():
        return
    there = sorted(name for name in os.listdir(folder) if not name.startswith(_TEMPORARY))
    if there:
        raise ValueError(
            f'{folder} holds files that timm-spikformer did not write, such as {there[0]!r}. Name a new or an empty '
            f'folder.')


def _check_own(folder: Path, name: str, manifest: Manifest, message: Optional[str] = None) -> None:
    """Raise a ValueError if `name` stands in the folder with another content than this package has given it."""
    path = folder
    for part in Path(name).parts[:-1]:
        path = path / part
        if path.is_symlink() or (os.path.lexists(path) and not path.is_dir()):
            raise ValueError(f'{path} is not a folder, and {name} is to be written into it. {_ADVICE}')
    path = folder / name
    if not os.path.lexists(path):
        return
    if name not in manifest:
        raise ValueError(message or f'{path} was not written by timm-spikformer, and is not replaced. {_ADVICE}')
    if not stat.S_ISREG(path.lstat().st_mode) or _digest(path) not in manifest[name]:
        raise ValueError(
            f'{path} has been changed since timm-spikformer wrote it, and is not replaced or removed. {_ADVICE}')


def _files(folder: Path) -> List[str]:
    """Return the paths, with '/', of all files in a temporary folder."""
    files = [p for p in sorted(folder.rglob('*')) if p.is_symlink() or not p.is_dir()]
    return [p.relative_to(folder).as_posix() for p in files if p != folder / MANIFEST]


def _digest(path: Path) -> str:
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def _new_folder(parent: Path) -> Path:
    """Create a temporary folder with the permissions of any other new folder, which tempfile's have not."""
    path = parent / f'{_TEMPORARY}{secrets.token_hex(8)}'
    path.mkdir()
    return path


def _create_parents(path: Path) -> List[Path]:
    """Create a folder and its parents; return those that were not there, the innermost first."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    created: List[Path] = []
    try:
        for p in reversed(missing):
            p.mkdir(exist_ok=True)
            created.insert(0, p)
    except BaseException:
        for p in created:
            with suppress(OSError):
                p.rmdir()
        raise
    return created


def _discard(temporary: Optional[Path]) -> None:
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _about(path: Path, temporary: Optional[Path] = None) -> Iterator[None]:
    """Let an OSError name what the user asked for and not a temporary file."""
    try:
        yield
    except OSError as e:
        if e.filename is None:  # of a write to an open file
            is_ours = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        else:
            is_ours = temporary is None or str(e.filename).startswith(str(temporary))
        if not is_ours or e.errno is None:
            raise
        raise OSError(e.errno, f'{e.strerror}; nothing was written', str(path)) from e


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
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
