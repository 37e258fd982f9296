"""The cache of frames, and interruptions of the cache and of the conversion."""
import dataclasses
import multiprocessing
import os
import shutil
import signal

import event_files
import numpy as np
import pytest

from timm_spikformer.event_data import cache, conversion
from timm_spikformer.event_data.cache import cache_frames
from timm_spikformer.event_data.conversion import cache_folder
from timm_spikformer.event_data.frames import integrate, resize
from timm_spikformer.event_data.readers import read_recordings

pytestmark = pytest.mark.filterwarnings('ignore:.* but the complete dataset has')


@pytest.fixture(scope='session')
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp('n_mnist')
    event_files.write_n_mnist(folder, per_class=1)
    return folder


@pytest.fixture(scope='session')
def converted(original, tmp_path_factory):
    folder = shutil.copytree(original, tmp_path_factory.mktemp('converted') / 'n_mnist')
    read_recordings('n_mnist', folder)
    return folder


@pytest.fixture
def train(converted, tmp_path):
    return read_recordings('n_mnist', shutil.copytree(converted, tmp_path / 'n_mnist'))['train']


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())


def test_frames(train, monkeypatch):
    """Frames are in the order of the recordings. The second call reads them from the dataset folder."""
    frames = cache_frames(train, None, 4)
    assert isinstance(frames, np.memmap) and not frames.flags.writeable
    assert frames.shape == (10, 4, 2, 34, 34) and frames.dtype == np.uint8
    for i in range(10):
        np.testing.assert_array_equal(frames[i], integrate(train.read(i), 4, (34, 34)))
    assert frames.filename.is_relative_to(cache_folder(train.folder))
    monkeypatch.setattr(cache, 'integrate', None)
    again = cache_frames(train, None, 4)
    assert again.filename == frames.filename and np.array_equal(again, frames)


@pytest.mark.parametrize('count, dtype', [(300, np.uint16), (70000, np.uint32)])
def test_wider_counts(train, count, dtype):
    """The type holds the largest count of all recordings, even if the first recordings have smaller counts."""
    for i, n in ((3, 256), (5, count), (7, 2)):
        np.savez(train.paths[i], **dict(zip('txyp', np.zeros((4, n), int))))
    frames = cache_frames(train, None, 1)
    assert frames.dtype == dtype
    for i in range(10):
        np.testing.assert_array_equal(frames[i], integrate(train.read(i), 1, (34, 34)))


def test_resized_frames(train):
    frames = cache_frames(train, None, 2, (17, 17), 'time')
    assert frames.dtype == np.float32
    for i in range(10):
        np.testing.assert_array_equal(frames[i], resize(integrate(train.read(i), 2, (34, 34), 'time'), (17, 17)))


def test_key(train, tmp_path):
    """Different data or arguments use different files. The location of the dataset has no effect."""
    folder = tmp_path / 'cache'
    first = cache_frames(train, folder, 2).filename
    others = [
        cache_frames(train, folder, 3), cache_frames(train, folder, 2, (32, 32)),
        cache_frames(train, folder, 2, split_by='time'),
        cache_frames(dataclasses.replace(train, labels=train.labels[::-1]), folder, 2),
        cache_frames(dataclasses.replace(train, paths=train.paths[::-1]), folder, 2),
        cache_frames(dataclasses.replace(train, paths=train.paths[1:], labels=train.labels[1:]), folder, 2)]
    np.savez(train.paths[2], **event_files.random_events((34, 34), 60)._asdict())
    others.append(cache_frames(train, folder, 2))
    assert len({first, *(frames.filename for frames in others)}) == 8
    moved = train.folder.rename(tmp_path / 'moved')
    train = read_recordings('n_mnist', moved)['train']
    assert cache_frames(train, folder, 2).filename == others[-1].filename


@pytest.mark.parametrize('damage', [
    lambda path: os.truncate(path, path.stat().st_size - 1),
    lambda path: os.truncate(path, 40),
    lambda path: os.truncate(path, 0),
    lambda path: path.write_bytes(path.read_bytes() + b'\0'),
    lambda path: path.write_bytes(b'junk' + path.read_bytes()[4:]),
    lambda path: np.save(path, np.zeros((2, 3), np.uint8)),
    lambda path: np.save(path, np.zeros((10, 4, 2, 34, 34), np.int8)),
])
def test_damaged_cache(train, damage):
    frames = cache_frames(train, None, 4)
    expected, path = frames.copy(), frames.filename
    damage(path)
    with pytest.warns(UserWarning, match='frames.npy is damaged .* It is computed again'):
        np.testing.assert_array_equal(cache_frames(train, None, 4), expected)
    assert cache_frames(train, None, 4).filename == path


def test_damaged_recording(train):
    """The error names the recording, and no cache is left."""
    train.paths[6].write_bytes(b'')
    with pytest.raises(ValueError, match=train.paths[6].name):
        cache_frames(train, None, 4)
    assert not files(cache_folder(train.folder))


@pytest.mark.parametrize('arguments, message', [
    ((0,), 'time_steps must be an integer of at least 1'),
    ((4, (0, 1)), 'height must be an integer of at least 1'),
    ((4, None, 'duration'), "split_by must be 'number' or 'time'"),
])
def test_bad_arguments(train, arguments, message):
    with pytest.raises(ValueError, match=message):
        cache_frames(train, None, *arguments)
    with pytest.raises(ValueError, match='Expected at least one recording of n_mnist, got none'):
        cache_frames(dataclasses.replace(train, paths=[], labels=[]), None, 4)


def run(*functions):
    """Run functions in processes at the same time, and return their exit codes."""
    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def stop_at(monkeypatch, module, name, number, stop):
    """Replace a function by one that calls `stop` at the start of its call with the given number."""
    function, calls = getattr(module, name), []

    def wrapped(*args):
        calls.append(args)
        if len(calls) == number:
            stop()
        return function(*args)

    monkeypatch.setattr(module, name, wrapped)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


def test_killed_while_caching(train, monkeypatch):
    """Only temporary files are left. The next run removes them and computes all frames."""
    folder = cache_folder(train.folder)
    with monkeypatch.context() as patch:
        stop_at(patch, cache, 'integrate', 7, kill)
        assert run(lambda: cache_frames(train, None, 4)) == [-signal.SIGKILL]
    left = files(folder)
    assert left and not any(path.endswith(f'{i}/frames.npy') for path in left for i in '0123456789abcdef'
                            if not path.startswith('.'))
    frames = cache_frames(train, None, 4)
    assert files(folder) == [frames.filename.relative_to(folder).as_posix()]
    assert frames[9].sum() == 50


def test_interrupted_while_caching(train, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, cache, 'integrate', 7, interrupt)
        with pytest.raises(KeyboardInterrupt):
            cache_frames(train, None, 4)
    assert not files(cache_folder(train.folder))


def test_three_processes_cache_at_once(train, monkeypatch, tmp_path):
    """One computes the frames; the others wait and read them."""
    calls = tmp_path / 'calls'

    def count(*args):
        with open(calls, 'a') as f:
            f.write('.')
        return integrate(*args)

    monkeypatch.setattr(cache, 'integrate', count)
    assert run(*[lambda: cache_frames(train, None, 4)] * 3) == [0, 0, 0]
    assert calls.read_text() == '.' * 10


def test_killed_while_converting(original, tmp_path, monkeypatch):
    """No folder of converted recordings is left, and the next run converts all of them."""
    folder = shutil.copytree(original, tmp_path / 'n_mnist')
    before = files(folder)
    with monkeypatch.context() as patch:
        stop_at(patch, conversion, '_convert_part', 7, kill)
        assert run(lambda: read_recordings('n_mnist', folder)) == [-signal.SIGKILL]
    assert not (folder / 'events_np').exists() and len(files(folder)) > len(before)
    assert {split: len(part) for split, part in read_recordings('n_mnist', folder).items()} == {'train': 10, 'test': 10}
    assert len(files(folder)) == len(before) + 21 and not [*folder.glob('.*')]


def test_interrupted_while_converting(original, tmp_path, monkeypatch):
    folder = shutil.copytree(original, tmp_path / 'n_mnist')
    before = files(folder)
    stop_at(monkeypatch, conversion, '_convert_part', 7, interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_recordings('n_mnist', folder)
    assert files(folder) == before and {path.name for path in folder.iterdir()} == {'Train', 'Test'}


def test_two_processes_convert_at_once(original, tmp_path, monkeypatch):
    folder = shutil.copytree(original, tmp_path / 'n_mnist')
    calls, convert_part = tmp_path / 'calls', conversion._convert_part

    def count(*args):
        with open(calls, 'a') as f:
            f.write('.')
        return convert_part(*args)

    monkeypatch.setattr(conversion, '_convert_part', count)
    assert run(*[lambda: read_recordings('n_mnist', folder)] * 2) == [0, 0]
    assert calls.read_text() == '.' * 10


def test_default_folder(tmp_path, monkeypatch):
    """The cache is in the dataset folder if that is writable, otherwise in a separate folder of the user's cache."""
    assert cache_folder(tmp_path) == tmp_path / 'timm_spikformer_cache'
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    folders = {cache_folder(tmp_path / name / 'n_mnist') for name in 'ab'}
    assert len(folders) == 2 and {folder.parent for folder in folders} == {tmp_path / 'xdg' / 'timm_spikformer'}
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert cache_folder(tmp_path).parent == tmp_path / '.cache' / 'timm_spikformer'


def test_full_disk(train, monkeypatch):
    """A full disk is an error that names the file, not a crash, and no cache is left."""
    class Full:
        def __init__(self, f):
            self.f = f

        def write(self, data):
            raise OSError(28, 'No space left on device')

        def __getattr__(self, name):
            return getattr(self.f, name)

    create = cache._create_npy
    monkeypatch.setattr(cache, '_create_npy', lambda *args: Full(create(*args)))
    with pytest.raises(OSError, match='nothing was written') as error:
        cache_frames(train, None, 4)
    assert error.value.filename.endswith('frames.npy') and not files(cache_folder(train.folder))
