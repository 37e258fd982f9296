"""Write output folders and files without overwriting files that this package did not write.

A folder is written to a temporary sibling, verified there by the caller, and then moved into place. A manifest in the
folder lists the files that this package wrote, their digests, and their kind: the command that wrote them and, if it
writes models, the architecture. A file is replaced or removed only if the manifest lists it with the same kind and its
content is unchanged; all other files are left alone.

This module imports the standard library only.
"""
import json
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Dict, Iterable, Iterator, List, NamedTuple, Tuple, Union

from .digests import sha256_of_file
from .temporaries import (
    PREFIX,
    create_folders,
    create_temporary,
    discard,
    lock,
    lock_for_run,
    remove_stale,
    temporary_path,
)

__all__ = [
    'MANIFEST', 'check_output_file', 'check_output_folder', 'check_writable', 'lock_folder_for_run', 'manifest_files',
    'remove_files', 'resolve', 'write_file', 'write_folder', 'write_manifest', 'write_new_file',
]

PathLike = Union[str, 'os.PathLike[str]']
# Allowed SHA-256 digests by path in the folder, with '/'. A file has two digests while it is being replaced.
Digests = Dict[str, List[str]]

MANIFEST = '.timm-spikformer.json'
_ADVICE = 'Choose another folder, or move the file.'


class _Manifest(NamedTuple):
    """Files that this package wrote to a folder, and the command that wrote them: see `check_output_folder`."""
    kind: str
    files: Digests


def resolve(path: PathLike) -> Path:
    """Return the absolute path without symbolic links; a loop of links remains, where `Path.resolve` may raise."""
    return Path(os.path.realpath(path))


def check_output_folder(
        folder: PathLike,
        kind: str,
        inputs: Iterable[PathLike] = (),
        data: Iterable[PathLike] = (),
        allow_other_files: bool = False,
        names: Iterable[str] = (),
) -> Path:
    """Check that writing to a folder would overwrite only files that this package wrote. Nothing is written.

    Args:
        folder: Folder to be written. It may not exist yet.
        kind: Command that writes the folder, followed by the architecture if it writes a model, such as 'profile' or
            'convert spikformer_8_384'. Files of another kind are not replaced.
        inputs: Files and folders that the command reads; the folder must not be or contain one of them.
        data: Folders that images are read from; the folder must not be inside one of them either, because its files
            would be read as images later.
        allow_other_files: Accept a folder that contains other files. By default it must be empty or written by this
            package.
        names: Names of the files that will be written, if known; an existing file of such a name must be listed in the
            manifest.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: The folder is a file, a symbolic link, the current folder or a parent of it; it contains one of the
            inputs or is inside the data; or it contains files that this package did not write, files of another kind,
            or files that were changed.
    """
    if not os.fspath(folder) or '\0' in os.fspath(folder):
        raise ValueError(f'{os.fspath(folder)!r} is not a valid folder name.')
    path = Path(os.path.abspath(folder))
    if path.is_symlink():
        raise ValueError(f'{folder} is a symbolic link. Use the folder that it points to, {resolve(path)}.')
    path = resolve(path.parent) / path.name
    current = Path.cwd()
    if path == current or path in current.parents:
        raise ValueError(f'{folder} is the current folder or one of its parents. Choose another folder.')
    if path.exists() and not path.is_dir():
        raise ValueError(f'{folder} is a file, expected a folder.')
    parent = next(parent for parent in path.parents if os.path.lexists(parent))
    if not parent.is_dir():
        raise ValueError(f'{folder} cannot be created: {parent} is not a folder.')
    data = [resolve(source) for source in data]
    for source in (*data, *map(resolve, inputs)):
        if source == path or path in source.parents:
            raise ValueError(f'{folder} is or contains {source}, which is an input. Choose another folder.')
    for source in data:
        if source in path.parents:
            raise ValueError(
                f'{folder} is inside {source}, so its files would be read as images of this dataset later. Choose a '
                f'folder outside it.')
    if path.is_dir():
        with lock(path):
            _check_no_other_files(path, allow_other_files)
            old = _read_manifest(path)
            _check_kind(path, old, kind)
            for name in sorted({*old.files, *names}):
                _check_replaceable(path, name, old.files)
    return path


def check_writable(folder: PathLike) -> None:
    """Check that a folder can be written, before a long computation. Nothing remains on the disk.

    Raises:
        OSError: The folder cannot be created, or no file can be created in it.
    """
    path = Path(os.path.abspath(folder))
    parent = next(parent for parent in (path, *path.parents) if parent.is_dir())
    with create_temporary(path, parent, is_folder=True):
        pass


def manifest_files(folder: PathLike) -> List[str]:
    """Return the paths, with '/', of the files that the manifest of a folder lists; empty without a manifest."""
    return sorted(_read_manifest(Path(folder)).files)


def write_manifest(folder: PathLike, kind: str) -> None:
    """Write a manifest of all files of a folder.

    `write_folder` writes it when its block ends. `publish` uploads the folder and its manifest within the block, so the
    output folder is replaced only after the upload has succeeded.
    """
    folder = Path(folder)
    _write_manifest(folder, _Manifest(kind, {name: [sha256_of_file(folder / name)] for name in _list_files(folder)}))


@contextmanager
def write_folder(
        folder: PathLike,
        kind: str,
        inputs: Iterable[PathLike] = (),
        data: Iterable[PathLike] = (),
        allow_other_files: bool = False,
) -> Iterator[Path]:
    """Write a folder completely or not at all.

    Yields an empty temporary folder next to `folder`. When the block ends without an error, the files in it replace the
    files that an earlier run wrote to `folder`. After an error, `folder` is unchanged.

    Args:
        folder: Folder to write. It may not exist yet.
        kind: See `check_output_folder`.
        inputs: See `check_output_folder`.
        data: See `check_output_folder`.
        allow_other_files: Accept a folder that contains other files. None of them is replaced.

    Raises:
        ValueError: See `check_output_folder`; or a file that would be replaced or removed was not written by this
            package or has been changed since.
        OSError: Writing failed, for example because the disk is full or the folder is read-only.
    """
    path = check_output_folder(folder, kind, inputs, data, allow_other_files)
    with create_folders(path.parent):
        # next to the folder, so that it can be renamed; inside it for a mount point, whose parent is on another disk
        with create_temporary(path, path if os.path.ismount(path) else path.parent, is_folder=True) as temporary:
            yield temporary
            _commit(temporary, path, kind, allow_other_files)


@contextmanager
def lock_folder_for_run(folder: PathLike) -> Iterator[None]:
    """Create a folder for a run that writes individual files to it, and lock out other such runs until the block ends.

    After an error, the folder is removed if this call created it and it is empty.

    Raises:
        ValueError: Another run has locked the folder.
        OSError: Creating the folder failed, for example because its parent is read-only.
    """
    path = Path(os.path.abspath(folder))
    with create_folders(path), lock_for_run(path):
        yield


@contextmanager
def write_file(path: PathLike, kind: str) -> Iterator[Path]:
    """Write a file completely or not at all, and list it in the manifest of its folder.

    Yields the path of an empty temporary sibling with the same suffix, which the caller overwrites in place. It is
    renamed to `path` when the block ends without an error. The parent folder must exist.

    Args:
        path: File to write.
        kind: See `check_output_folder`; all files that this package writes to a folder have the same kind.

    Raises:
        ValueError: The file exists and was not written by this package, or has been changed since; or the folder
            contains files of another kind.
        OSError: Writing failed, for example because the disk is full or the folder is read-only.
    """
    path = _resolve_file(path)
    check_output_file(path, kind)
    with create_temporary(path, path.parent) as partial:
        yield partial
        digest = sha256_of_file(partial)
        with lock(path.parent):
            files = _files_if_replaceable(path, kind)
            # manifest first: after an interruption, the manifest lists both the old and the new digest
            before = [sha256_of_file(path)] if path.exists() else []
            _write_manifest(path.parent, _Manifest(kind, {**files, path.name: [*before, digest]}))
            os.replace(partial, path)
            remove_stale(path, path.parent)


def check_output_file(path: Path, kind: str) -> None:
    """Check that a file does not exist, or is unchanged since this package wrote it.

    Raises:
        ValueError: The file was not written by this package, has been changed since, or is of another kind.
    """
    with lock(path.parent):
        _files_if_replaceable(path, kind)


def _files_if_replaceable(path: Path, kind: str) -> Digests:
    """Check a file as `check_output_file` does; return the files in the manifest of its folder, which is locked."""
    manifest = _read_manifest(path.parent)
    _check_kind(path.parent, manifest, kind)
    _check_replaceable(path.parent, path.name, manifest.files)
    return manifest.files


@contextmanager
def write_new_file(path: PathLike) -> Iterator[Path]:
    """Write a file that does not exist yet, completely or not at all, without a manifest.

    Yields the path of a temporary sibling, as `write_file` does.

    Raises:
        ValueError: The file exists already, or its folder does not exist.
        OSError: Writing failed, for example because the disk is full or the folder is read-only.
    """
    path = _resolve_file(path)
    if os.path.lexists(path):
        raise ValueError(f'{path} already exists. Choose another name, or remove it first.')
    with create_temporary(path, path.parent) as partial:
        yield partial
        with lock(path.parent):
            try:
                _rename_to_new(partial, path)
            except FileExistsError as e:
                raise ValueError(f'{path} was created while this command was running and is not replaced.') from e
            remove_stale(path, path.parent)


def _rename_to_new(source: Path, target: Path) -> None:
    """Rename a file; raise a FileExistsError if the target exists, also if another program creates it meanwhile."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # the file system does not support hard links
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        os.replace(source, target)
    else:
        source.unlink()


def _resolve_file(path: PathLike) -> Path:
    """Return the absolute path of a file to be written; raise a ValueError if it is not valid."""
    if not os.fspath(path) or '\0' in os.fspath(path):
        raise ValueError(f'{os.fspath(path)!r} is not a valid file name.')
    absolute = Path(os.path.abspath(path))
    if absolute.is_dir():
        raise ValueError(f'{path} is a folder, expected a file.')
    if not absolute.parent.is_dir():
        raise ValueError(f'{path} cannot be written: {absolute.parent} is not a folder.')
    return absolute


def remove_files(folder: PathLike, names: Iterable[str], kind: str) -> None:
    """Remove the given files from a folder if this package wrote them, and leave all other files alone.

    The manifest is removed together with the last file that it lists.

    Args:
        folder: Folder.
        names: Names of all files that the command may have written to it.
        kind: See `check_output_folder`.

    Raises:
        ValueError: A file has been changed since it was written, or the folder contains files of another kind.
    """
    folder = Path(folder)
    with lock(folder):
        manifest, names = _read_manifest(folder), {*names}
        _check_kind(folder, manifest, kind)
        for name in names & manifest.files.keys():
            _check_replaceable(folder, name, manifest.files)
        for name in names & manifest.files.keys():
            (folder / name).unlink(missing_ok=True)
        rest = {name: digests for name, digests in manifest.files.items() if name not in names}
        if rest:
            _write_manifest(folder, _Manifest(kind, rest))
        else:
            (folder / MANIFEST).unlink(missing_ok=True)


def _commit(temporary: Path, folder: Path, kind: str, allow_other_files: bool) -> None:
    """Move the files of the temporary folder into place, or leave the folder as it was."""
    new = _Manifest(kind, {name: [sha256_of_file(temporary / name)] for name in _list_files(temporary)})
    with lock(folder.parent):
        if not os.path.lexists(folder):
            _write_manifest(temporary, new)
            os.rename(temporary, folder)
            remove_stale(folder, temporary.parent)
            return
        with lock(folder):
            if folder.is_symlink() or not folder.is_dir():
                raise ValueError(
                    f'{folder} was replaced by a file or a symbolic link while this command was running. {_ADVICE}')
            _check_no_other_files(folder, allow_other_files)
            old = _read_manifest(folder)
            _check_kind(folder, old, kind)
            for name in {*old.files, *new.files}:
                _check_replaceable(folder, name, old.files)
            _replace(temporary, folder, old, new)
            remove_stale(folder, temporary.parent)


def _replace(temporary: Path, folder: Path, old: _Manifest, new: _Manifest) -> None:
    """Replace the files of the manifest `old` with those of `new`; undo all moves on failure."""
    moves: List[Tuple[Path, Path]] = []
    folders: List[Path] = []  # folders created here
    backup = temporary_path(folder, temporary.parent)
    backup.mkdir()
    has_manifest = (folder / MANIFEST).exists()
    try:
        if has_manifest:
            shutil.copyfile(folder / MANIFEST, backup / MANIFEST)
        # from here on, even after an interruption, the manifest lists the digests of all files, old and new
        _write_manifest(folder, _Manifest(new.kind, {
            name: [*old.files.get(name, []), *new.files.get(name, [])] for name in {*old.files, *new.files}}))
        for name in old.files:
            if os.path.lexists(folder / name):
                _move(folder / name, backup / name, moves, folders)
        for name in new.files:
            _move(temporary / name, folder / name, moves, folders)
        _write_manifest(folder, new)
    except BaseException:
        for source, target in reversed(moves):
            if os.path.lexists(target) and not os.path.lexists(source):
                with suppress(OSError):  # files that cannot be moved back stay in the backup
                    os.rename(target, source)
        with suppress(OSError):
            if not has_manifest:
                (folder / MANIFEST).unlink()
            elif (backup / MANIFEST).exists():
                os.replace(backup / MANIFEST, folder / MANIFEST)
        for new_folder in (*reversed(folders), backup):
            with suppress(OSError):
                new_folder.rmdir()
        raise
    discard(backup)
    for parent in sorted({folder / p for name in old.files for p in Path(name).parents if p.name}, reverse=True):
        with suppress(OSError):
            parent.rmdir()  # succeeds only if it is empty


def _move(source: Path, target: Path, moves: List[Tuple[Path, Path]], folders: List[Path]) -> None:
    """Rename a file; record the move in `moves` and new folders in `folders` before they are made."""
    for parent in reversed([p for p in target.parents if not p.exists()]):
        folders.append(parent)
        parent.mkdir()
    moves.append((source, target))
    os.rename(source, target)


def _read_manifest(folder: Path) -> _Manifest:
    """Read the manifest of a folder; return an empty one if the folder has none."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return _Manifest('', {})
    try:
        if stat.S_ISREG(path.lstat().st_mode):  # not a symbolic link, which would be replaced
            content = json.loads(path.read_text(encoding='utf-8'))
            kind, files = content['kind'], content['files']
            if isinstance(kind, str) and all(
                    _is_path_inside_folder(name) and all(isinstance(d, str) for d in digests)
                    for name, digests in files.items()):
                return _Manifest(kind, files)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError(f'{path} is not a manifest of timm-spikformer, or is damaged. {_ADVICE}')


def _is_path_inside_folder(name: str) -> bool:
    """Return whether a name in a manifest is a normalized relative path to another file, on all operating systems."""
    path = PurePosixPath(name)
    is_normalized = str(path) == name and name != '.' and '..' not in path.parts
    return is_normalized and not path.is_absolute() and name != MANIFEST and not {*name} & {*'\\\0:'}


def _write_manifest(folder: Path, manifest: _Manifest) -> None:
    """Write the manifest of a folder, which must be locked or not in use by other processes."""
    content = {'written_by': 'timm-spikformer', 'kind': manifest.kind, 'files': dict(sorted(manifest.files.items()))}
    partial = temporary_path(folder / MANIFEST, folder)
    try:
        partial.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
        os.replace(partial, folder / MANIFEST)
        remove_stale(folder / MANIFEST, folder)
    finally:
        with suppress(OSError):
            partial.unlink()


def _check_no_other_files(folder: Path, allow_other_files: bool) -> None:
    """Raise a ValueError if a folder contains files and no manifest, unless `allow_other_files` is True."""
    _read_manifest(folder)
    if allow_other_files or (folder / MANIFEST).exists():
        return
    other_files = sorted(name for name in os.listdir(folder) if not name.startswith(PREFIX))
    if other_files:
        raise ValueError(
            f'{folder} contains files that timm-spikformer did not write, such as {other_files[0]!r}. Choose a new or '
            f'empty folder.')


def _check_kind(folder: Path, manifest: _Manifest, kind: str) -> None:
    """Raise a ValueError if the files of a folder were written by another command or for another architecture."""
    if not manifest.files or manifest.kind == kind:
        return
    has_model = any(name.endswith('.safetensors') for name in manifest.files)
    what = 'a model that' if has_model else f'{min(manifest.files)}, which'
    raise ValueError(f'{folder} contains {what} `timm-spikformer {manifest.kind}` wrote. Choose another folder.')


def _check_replaceable(folder: Path, name: str, files: Digests) -> None:
    """Raise a ValueError if `name` exists in the folder and is not a file with one of the digests in `files`."""
    path = folder
    for part in Path(name).parts[:-1]:
        path = path / part
        if path.is_symlink() or (os.path.lexists(path) and not path.is_dir()):
            raise ValueError(f'{path} is not a folder, but {name} must be written into it. {_ADVICE}')
    path = folder / name
    if not os.path.lexists(path):
        return
    if name not in files:
        raise ValueError(f'{path} was not written by timm-spikformer and is not replaced. {_ADVICE}')
    if not stat.S_ISREG(path.lstat().st_mode) or sha256_of_file(path) not in files[name]:
        raise ValueError(
            f'{path} has been changed since timm-spikformer wrote it and is not replaced or removed. {_ADVICE}')


def _list_files(folder: Path) -> List[str]:
    """Return the paths, with '/', of all files in a temporary folder."""
    files = [p for p in sorted(folder.rglob('*')) if p.is_symlink() or not p.is_dir()]
    return [p.relative_to(folder).as_posix() for p in files if p != folder / MANIFEST]
