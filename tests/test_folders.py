"""Writing of folders: foreign files are never lost, and a folder is written completely or not at all."""
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_spikformer import folders
from timm_spikformer.folders import (
    MANIFEST,
    check_output_folder,
    check_writable,
    lock_folder_for_run,
    manifest_files,
    remove_files,
    write_file,
    write_folder,
    write_new_file,
)
from timm_spikformer.temporaries import PREFIX


def write(folder, files, kind='test', **kwargs):
    with write_folder(folder, kind, **kwargs) as temporary:
        for name, text in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(text)


def read(folder):
    """Return the content of each file by path, without the manifest; for links, the target."""
    return {
        p.relative_to(folder).as_posix(): f'-> {os.readlink(p)}' if p.is_symlink() else p.read_text()
        for p in Path(folder).rglob('*') if (p.is_symlink() or p.is_file()) and p.name != MANIFEST}


def test_folder_is_replaced_and_foreign_files_are_kept(tmp_path):
    out = tmp_path / 'new' / 'out'
    write(out, {'a': '1', 'deep/er/b': '2'})
    assert read(out) == {'a': '1', 'deep/er/b': '2'} and manifest_files(out) == ['a', 'deep/er/b']
    (out / 'notes.txt').write_text('mine')
    (out / 'deep' / 'notes.txt').write_text('mine too')
    write(out, {'a': '3', 'c': '4'})
    assert read(out) == {'a': '3', 'c': '4', 'notes.txt': 'mine', 'deep/notes.txt': 'mine too'}
    assert not (out / 'deep' / 'er').exists() and os.listdir(out.parent) == ['out']


def test_folder_has_default_permissions(tmp_path):
    (tmp_path / 'other').mkdir()
    write(tmp_path / 'out', {'a': '1'})
    assert (tmp_path / 'out').stat().st_mode == (tmp_path / 'other').stat().st_mode


@pytest.mark.parametrize('name, message', [
    ('', "'' is not a valid folder name"),
    ('a\0b', 'is not a valid folder name'),
    ('.', 'is the current folder or one of its parents'),
    ('..', 'is the current folder or one of its parents'),
    ('/', 'is the current folder or one of its parents'),
    ('file', 'file is a file, expected a folder'),
    ('file/out', 'cannot be created: .*file is not a folder'),
    ('link', 'link is a symbolic link. Use the folder that it points to, .*foreign'),
    ('link/', 'is a symbolic link'),
    ('dangling', 'dangling is a symbolic link'),
    ('loop', 'loop is a symbolic link'),
    ('loop/out', 'cannot be created: .*loop is not a folder'),
    ('foreign', "contains files that timm-spikformer did not write, such as 'thesis.tex'"),
    ('checkpoint', 'is or contains .*model.safetensors, which is an input'),
    ('above', 'is or contains .*model.safetensors, which is an input'),
])
def test_rejected_folders(name, message, tmp_path, monkeypatch):
    work = tmp_path / 'work'
    work.mkdir()
    monkeypatch.chdir(work)
    Path('file').write_text('a file')
    Path('foreign').mkdir()
    Path('foreign', 'thesis.tex').write_text('years of work')
    Path('link').symlink_to('foreign')
    Path('dangling').symlink_to('nowhere')
    Path('loop').symlink_to('loop')
    source = Path('above' if name == 'above' else '.', 'checkpoint', 'model.safetensors')
    source.parent.mkdir(parents=True)
    source.write_text('weights')
    before = read(tmp_path)
    for function in (check_output_folder, lambda *args, **kwargs: write(args[0], {'model.safetensors': 'x'}, **kwargs)):
        with pytest.raises(ValueError, match=message):
            function(name, 'test', inputs=[source])
    assert read(tmp_path) == before


def test_add_to_foreign_folder(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    (tmp_path / 'dir').mkdir()
    write(tmp_path, {'a': '1'}, allow_other_files=True)
    assert read(tmp_path) == {'a': '1', 'notes.txt': 'mine'}
    for name in ('notes.txt', 'notes.txt/a', 'dir'):
        with pytest.raises(ValueError, match='(notes.txt|dir) was not written by|is not a folder, but'):
            write(tmp_path, {name: 'x'}, allow_other_files=True)
    (tmp_path / 'a').unlink()
    (tmp_path / 'a').symlink_to('notes.txt')
    with pytest.raises(ValueError, match='a has been changed since'):
        write(tmp_path, {'a': 'x'})
    assert read(tmp_path) == {'a': '-> notes.txt', 'notes.txt': 'mine'}


def test_edited_file_is_not_replaced_or_removed(tmp_path):
    write(tmp_path / 'out', {'README.md': 'generated', 'a': '1'})
    (tmp_path / 'out' / 'README.md').write_text('edited by hand')
    for files in ({'README.md': 'generated', 'a': '2'}, {'a': '2'}):
        with pytest.raises(ValueError, match='README.md has been changed since timm-spikformer wrote it'):
            write(tmp_path / 'out', files)
    assert read(tmp_path) == {'out/README.md': 'edited by hand', 'out/a': '1'}


@pytest.mark.parametrize('text', [
    '', '[]', '{"files": 3}', '{"files": {"../../victim": ["x"]}}', '{"files": {"/etc/passwd": ["x"]}}',
    '{"files": {"a/../../victim": ["x"]}}', '{"files": {"": ["x"]}}', '{"files": {}}',
    *(json.dumps(dict(kind='test', files={name: ['x']})) for name in (
        '../victim', '/victim', '//victim', 'a/../victim', '', '.', './a', 'a/', 'a//b', 'a\\b', 'c:a', 'a\0',
        MANIFEST)),
])
def test_bad_manifests(text, tmp_path):
    (tmp_path / 'victim').write_text('x')
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match='is not a manifest of timm-spikformer'):
        write(tmp_path / 'out', {'a': '1'}, allow_other_files=True)
    assert read(tmp_path) == {'victim': 'x'} and (tmp_path / 'out' / MANIFEST).read_text() == text


def test_manifest_that_is_a_link_is_rejected(tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'theirs.json').write_text('{"files": {}}')
    for target in (tmp_path / 'theirs.json', 'nowhere'):
        (tmp_path / 'out' / MANIFEST).symlink_to(target)
        for context in (
                write_folder(tmp_path / 'out', 'test', allow_other_files=True),
                write_file(tmp_path / 'out' / 'a', 'test'),
        ):
            with pytest.raises(ValueError, match='is not a manifest of timm-spikformer'), context:
                pass
        assert os.listdir(tmp_path / 'out') == [MANIFEST]
        (tmp_path / 'out' / MANIFEST).unlink()


# -- which command wrote a folder

def test_files_of_another_kind_are_not_replaced(tmp_path):
    out = tmp_path / 'out'
    write(out, {'config.json': '1', 'model.safetensors': '1'}, kind='convert a')
    for refused in (
            lambda: write(out, {'config.json': '2'}, kind='config a'),
            lambda: write(out, {'config.json': '2', 'model.safetensors': '2'}, kind='convert b'),
            lambda: write(out, {'other': '2'}, kind='profile', allow_other_files=True),
            lambda: write_file(out / 'other', 'demo').__enter__(),
            lambda: remove_files(out, ['config.json', 'model.safetensors'], 'demo')):
        with pytest.raises(ValueError, match='out contains a model that `timm-spikformer convert a` wrote. Choose an'):
            refused()
    assert read(out) == {'config.json': '1', 'model.safetensors': '1'}
    write(out, {'config.json': '2'}, kind='convert a')
    with pytest.raises(ValueError, match='out contains config.json, which `timm-spikformer convert a` wrote'):
        check_output_folder(out, 'demo')
    assert read(out) == {'config.json': '2'}


def test_check_output_with_names_of_files(tmp_path):
    (tmp_path / 'results.json').write_text('mine')
    check_output_folder(tmp_path, 'test', allow_other_files=True, names=['other'])
    with pytest.raises(ValueError, match='results.json was not written by timm-spikformer'):
        check_output_folder(tmp_path, 'test', allow_other_files=True, names=['other', 'results.json'])


def test_output_inside_or_around_data_is_rejected(tmp_path, monkeypatch):
    (tmp_path / 'data' / 'cat').mkdir(parents=True)
    (tmp_path / 'link').symlink_to('data')
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    for out in ('data/out', 'data/cat/out', 'link/out', '../' + tmp_path.name + '/data/out'):
        with pytest.raises(ValueError, match='is inside .*data, so its files would be read as images'):
            check_output_folder(tmp_path / out, 'test', data=[tmp_path / 'data'])
    for out in ('data', 'data/cat'):
        with pytest.raises(ValueError, match='is or contains .*cat, which is an input'):
            check_output_folder(tmp_path / out, 'test', data=[tmp_path / 'data' / 'cat'])
    check_output_folder(tmp_path / 'data2', 'test', data=[tmp_path / 'data'])
    check_output_folder(tmp_path / 'data' / 'out', 'test', inputs=[tmp_path / 'data'])  # for a checkpoint in a folder


def test_error_or_interruption_leaves_no_files(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), write_folder(tmp_path / 'a' / 'b' / 'out', 'test') as temporary:
            (temporary / 'half').write_text('half')
            raise error
        with pytest.raises(error), write_file(tmp_path / 'file', 'test') as partial:
            partial.write_text('half')
            raise error
    assert not os.listdir(tmp_path)


def test_full_disk(tmp_path):
    """A limit on the file size simulates a full disk."""
    write(tmp_path / 'out', {'a': 'good'})
    code = """
        import resource, signal, sys
        from pathlib import Path
        from timm_spikformer_cli import load_standalone
        folders = load_standalone('folders')
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        out = Path(sys.argv[1])
        for context in (folders.write_folder(out, 'test'), folders.write_file(out / 'file', 'test')):
            try:
                with context as temporary:
                    (temporary / 'a' if temporary.is_dir() else temporary).write_bytes(bytes(10_000))
            except OSError as e:
                print(e.filename, e.strerror)"""
    result = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code), str(tmp_path / 'out')],
        capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        f'{path} File too large; nothing was written' for path in (tmp_path / 'out', tmp_path / 'out' / 'file')]
    assert read(tmp_path) == {'out/a': 'good'}


def test_read_only_file_system(tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, 'mkdir', mkdir)  # file permissions do not restrict root
    with pytest.raises(OSError, match='Read-only file system; nothing was written') as info:
        write(tmp_path / 'out', {'a': '1'})
    assert info.value.filename == str(tmp_path / 'out') and not os.listdir(tmp_path)
    for folder in (tmp_path, tmp_path / 'new' / 'out'):
        with pytest.raises(OSError, match='Read-only file system; nothing was written') as info:
            check_writable(folder)
        assert info.value.filename == str(folder)


def test_check_of_writable_folder_leaves_no_files(tmp_path):
    (tmp_path / 'out').mkdir()
    for folder in (tmp_path / 'out', tmp_path / 'new' / 'out'):
        check_writable(folder)
    assert read(tmp_path) == {} and [*tmp_path.iterdir()] == [tmp_path / 'out']


def test_write_file_and_remove_files(tmp_path):
    with pytest.raises(ValueError, match='is not a folder'), write_file(tmp_path / 'nowhere' / 'a', 'test'):
        pass
    (tmp_path / 'notes.txt').write_text('mine')
    for text in ('1', '2', '3'):
        with write_file(tmp_path / 'results.json', 'test') as partial:
            assert partial.suffix == '.json' and partial.parent == tmp_path
            partial.write_text(text)
    with pytest.raises(ValueError, match='notes.txt was not written by'), write_file(tmp_path / 'notes.txt', 'test'):
        pass
    assert read(tmp_path) == {'results.json': '3', 'notes.txt': 'mine'}
    remove_files(tmp_path, ['results.json', 'notes.txt', 'nothing'], 'test')
    assert os.listdir(tmp_path) == ['notes.txt']
    write(tmp_path, {'a': '1'}, allow_other_files=True)
    (tmp_path / 'a').write_text('edited')
    with pytest.raises(ValueError, match='a has been changed since'):
        remove_files(tmp_path, ['a'], 'test')


@pytest.mark.parametrize('has_hard_links', [True, False])
def test_write_new_file(has_hard_links, tmp_path, monkeypatch):
    def link(*args, **kwargs):
        raise PermissionError(errno.EPERM, 'Operation not permitted')

    if not has_hard_links:
        monkeypatch.setattr(os, 'link', link)
    path = tmp_path / 'a.txt'
    with write_new_file(path) as partial:
        partial.write_text('1')
    assert read(tmp_path) == {'a.txt': '1'} and os.listdir(tmp_path) == ['a.txt']
    with pytest.raises(ValueError, match='a.txt already exists. Choose another name'), write_new_file(path):
        pass
    path.unlink()
    with pytest.raises(ValueError, match='a.txt was created while this command was running'), write_new_file(path):
        path.write_text('mine')
    assert read(tmp_path) == {'a.txt': 'mine'} and os.listdir(tmp_path) == ['a.txt']


def test_file_created_at_the_last_moment_is_not_replaced(tmp_path, monkeypatch):
    """Another program, which ignores the lock, creates the file just before the new file is moved into place."""
    path = tmp_path / 'a.txt'

    def after(function):
        def call(*args, **kwargs):
            if not path.exists():
                path.write_text('mine')
            return function(*args, **kwargs)
        return call

    for name in ('link', 'replace', 'rename'):
        monkeypatch.setattr(os, name, after(getattr(os, name)))
    with pytest.raises(ValueError, match='a.txt was created while this command was running'):
        with write_new_file(path) as partial:
            partial.write_text('1')
    assert read(tmp_path) == {'a.txt': 'mine'}


def test_concurrent_runs(tmp_path):
    """All runs succeed, and the folder is the complete output of one of them."""
    versions = [{f'file{i}': str(v) for i in range(5 + v)} for v in range(4)]
    for _ in range(20):
        threads = [threading.Thread(target=write, args=(tmp_path / 'out', files)) for files in versions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert read(tmp_path / 'out') in versions
    assert os.listdir(tmp_path) == ['out']


def test_killed_run_can_be_repeated(tmp_path):
    """A partly replaced folder is still recognized as written by this package."""
    out = tmp_path / 'out'
    write(out, {'a': '1', 'b': '1'})
    (out / 'notes.txt').write_text('mine')
    code = """
        import os, sys
        from timm_spikformer_cli import load_standalone
        folders = load_standalone('folders')
        with folders.write_folder(sys.argv[1], 'test') as temporary:
            for name in 'abc':
                (temporary / name).write_text('2')
            count, rename = int(sys.argv[2]), os.rename
            def rename_or_die(*args):
                global count
                count -= 1
                if count < 0:
                    os.kill(os.getpid(), 9)
                rename(*args)
            os.rename = rename_or_die"""
    for count in range(5):
        result = subprocess.run(
            [sys.executable, '-c', textwrap.dedent(code), str(out), str(count)])
        assert result.returncode == -signal.SIGKILL
        assert read(out).pop('notes.txt') == 'mine'
        write(out, {'a': '3', 'd': '3'})
        assert read(out) == {'a': '3', 'd': '3', 'notes.txt': 'mine'}


def test_only_temporaries_of_killed_runs_are_removed(tmp_path):
    out = tmp_path / 'out'
    code = """
        import os, sys, time
        from pathlib import Path
        from timm_spikformer_cli import load_standalone
        folders = load_standalone('folders')
        out = Path(sys.argv[1])
        with folders.write_folder(out, 'test') as temporary, folders.write_file(out.parent / 'a.json', 'test') as file:
            for path in (temporary / 'x', file):
                path.write_text('1')
            print('ready', flush=True)
            time.sleep(60)"""

    def start(path):
        process = subprocess.Popen(
            [sys.executable, '-c', textwrap.dedent(code), str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == 'ready\n'
        return process

    killed, running, other = start(out), start(out), start(tmp_path / 'other')
    for process in (killed, other):
        process.kill()
        process.wait()
    left = set(os.listdir(tmp_path))
    assert len(left) == 6
    write(out, {'a': '1'})
    with write_file(tmp_path / 'a.json', 'test') as partial:
        partial.write_text('2')
    now = set(os.listdir(tmp_path)) - {'out', 'a.json', MANIFEST}
    assert now < left and len(now) == 3  # two of the running process, and the folder of the other output
    assert sum((tmp_path / name).is_file() for name in now) == 1
    running.kill()
    running.wait()
    write(out, {'a': '3'})  # replacing a folder removes them, too
    assert len(set(os.listdir(tmp_path)) - {'out', 'a.json', MANIFEST}) == 2


def test_hold_folder(tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / f'{PREFIX}lock').write_text('')  # left by a killed process
    with lock_folder_for_run(tmp_path / 'out'):
        with pytest.raises(ValueError, match='Another run of timm-spikformer is writing to .*out. Wait until it ends'):
            lock_folder_for_run(tmp_path / 'out').__enter__()
        with write_file(tmp_path / 'out' / 'a', 'test') as partial:  # by the run that holds the folder
            partial.write_text('1')
    assert read(tmp_path) == {'out/a': '1'}
    with pytest.raises(KeyError), lock_folder_for_run(tmp_path / 'x' / 'y'):
        raise KeyError
    assert os.listdir(tmp_path) == ['out']


def test_disk_errors_of_safetensors(tmp_path):
    for context in (write_folder(tmp_path / 'out', 'test'), write_file(tmp_path / 'out', 'test')):
        with pytest.raises(OSError, match='No space left on device; nothing was written') as info, context:
            raise Exception('Error while serializing: I/O error: No space left on device (os error 28)')
        assert info.value.filename == str(tmp_path / 'out') and not os.listdir(tmp_path)
    with pytest.raises(KeyError, match='not found'), write_folder(tmp_path / 'out', 'test'):
        raise KeyError('not found (os error 2)')  # an error of reading is not changed


# -- random folders, random failures

NAMES = st.sampled_from(['a', 'b', 'c', 'README.md', 'd/a', 'd/b', 'd/e/a', 'a/b', '.eval_results/x'])
FILES = st.dictionaries(NAMES, st.sampled_from(['one', 'two', 'three']), max_size=5)
PATCHED = [(os, 'rename'), (os, 'replace'), (Path, 'mkdir'), (Path, 'write_text'), (Path, 'rmdir'),
           (folders, 'sha256_of_file'), (folders.shutil, 'copyfile'), (os, 'listdir')]


def put_files(folder, files):
    """Write files, except those whose path conflicts with an existing file or folder."""
    for name, text in files.items():
        path = Path(folder, name)
        if not any(p.is_file() for p in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


class Failure(Exception):
    pass


def check_writer(foreign, first, later, second, allow_other_files, fail_at, kind, tmp_path_factory):
    root = tmp_path_factory.mktemp('writer')
    out = root / 'out'
    put_files(out, foreign)
    first, second = ({n: t for n, t in files.items() if not any(m.startswith(f'{n}/') for m in files)}
                     for files in (first, second))
    owned = {}
    try:
        write(out, first, allow_other_files=allow_other_files)
        owned = first
    except ValueError:
        assert read(root) == {f'out/{name}': text for name, text in read(out).items()}
    put_files(out, later)
    before = read(out) if out.exists() else {}
    others = {name: text for name, text in before.items() if owned.get(name) != text}
    manifest = (out / MANIFEST).read_bytes() if (out / MANIFEST).exists() else None
    with pytest.MonkeyPatch.context() as patch:
        calls = [0]

        def failing(function):
            def call(*args, **kwargs):
                calls[0] += 1
                if calls[0] == fail_at:
                    raise kind
                return function(*args, **kwargs)
            return call

        for owner, name in PATCHED:
            patch.setattr(owner, name, failing(getattr(owner, name)))
        try:
            write(out, second, allow_other_files=allow_other_files)
            written = True
        except (ValueError, kind):
            written = False
    after = read(out) if out.exists() else {}
    assert {name: after.get(name) for name in others} == others  # no foreign file is lost
    if written or after != before:  # an interruption can also happen during cleanup
        assert after == {**others, **second}
    else:
        assert manifest == ((out / MANIFEST).read_bytes() if (out / MANIFEST).exists() else None)
    if fail_at != calls[0]:  # the failure was not in the last step, the cleanup
        assert [name for name in os.listdir(root) if name != 'out'] == []


ARGUMENTS = dict(
    foreign=FILES, first=FILES, later=FILES, second=FILES, allow_other_files=st.booleans(),
    fail_at=st.integers(min_value=0, max_value=40), kind=st.sampled_from([OSError, KeyboardInterrupt, Failure]))
COMMON = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(max_examples=300, **COMMON)
@given(**ARGUMENTS)
def test_random_folders_and_failures(tmp_path_factory, **arguments):
    check_writer(**arguments, tmp_path_factory=tmp_path_factory)


@pytest.mark.fuzz
@settings(max_examples=10_000, **COMMON)
@given(**ARGUMENTS)
def test_many_random_folders_and_failures(tmp_path_factory, **arguments):
    check_writer(**arguments, tmp_path_factory=tmp_path_factory)
