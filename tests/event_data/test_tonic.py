"""Datasets of tonic as recordings, with the real tonic if it is installed."""
import event_files
import numpy as np
import pytest
from event_files import random_events

from timm_spikformer.event_data.cache import cache_frames
from timm_spikformer.event_data.frames import integrate
from timm_spikformer.event_data.readers import split_digest
from timm_spikformer.event_data.tonic import from_tonic


class Items:
    """A dataset of structured arrays with the given fields, in this order, and types."""
    sensor_size = (34, 30, 2)  # width, height

    def __init__(self, fields='xytp', types='iiii', targets=(0, 1, 2), change=None, **attributes):
        self.items = []
        for i, target in enumerate(targets):
            events = random_events((30, 34), seed=i)
            array = np.empty(len(events.t), [(name, kind) for name, kind in zip(fields, types)])
            for name in fields:
                array[name] = getattr(events, name)
            if change is not None:
                change(array)
            self.items.append((array, target))
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def same(events, expected):
    return all(np.array_equal(a, b) for a, b in zip(events, expected))


@pytest.mark.parametrize('fields, types', [
    ('xytp', ('i4', 'i4', 'i8', 'i1')), ('txyp', ('i8', 'i2', 'i2', '?')), ('ptxy', ('u1', 'u4', 'u2', 'u2'))])
def test_order_and_types_of_fields(fields, types):
    recordings = from_tonic(Items(fields, types))
    assert recordings.size == (30, 34) and len(recordings) == 3 and recordings.labels == [0, 1, 2]
    assert all(same(recordings.read(i), random_events((30, 34), seed=i)) for i in range(3))


def test_units_polarities_and_order_of_time():
    def change(array):
        array['p'] = 2 * array['p'] - 1
        array['t'] /= 1000
        array[:] = array[::-1]
    events = from_tonic(Items('txyp', ('f8', 'i2', 'i2', 'i1'), change=change), time_unit=1000).read(1)
    expected = random_events((30, 34), seed=1)
    assert np.array_equal(events.t, expected.t) and sorted(zip(*events)) == sorted(zip(*expected))


def test_labels():
    assert from_tonic(Items(targets=['b', 'a', 'b'])).labels == [1, 0, 1]
    assert from_tonic(Items(targets=['b', 'a', 'b'])).classes == ('a', 'b')
    assert from_tonic(Items(classes=['x', 'y', 'z'])).classes == ('x', 'y', 'z')
    assert from_tonic(Items(classes={'x': 0, 'y': 1, 'z': 2})).classes == ('x', 'y', 'z')
    assert from_tonic(Items(targets=np.array([3, 0, 3]))).classes == ('0', '1', '2', '3')
    with pytest.raises(ValueError, match='Targets of Items must be class indices or names, got 0.5'):
        from_tonic(Items(targets=(.5, .5)))


@pytest.mark.parametrize('attributes, arguments, message', [
    (dict(sensor_size=(700, 1, 1)), {}, r'\(width, height, 2 polarities\), got \(700, 1, 1\)'),
    (dict(sensor_size=None), {}, r'Items has no sensor_size. Set size=\(height, width\)'),
    ({}, dict(time_unit=0), 'time_unit must be a finite number greater than 0'),
    ({}, dict(size=(30, 0)), 'width must be an integer of at least 1'),
])
def test_bad_arguments(attributes, arguments, message):
    with pytest.raises(ValueError, match=message):
        from_tonic(Items(**attributes), **arguments)
    with pytest.raises(ValueError, match='Items has no recordings'):
        from_tonic(Items(targets=()))


def test_bad_recordings():
    with pytest.raises(ValueError, match=r"Recording 0 of Items .* got the fields \('t', 'x', 'p'\)"):
        from_tonic(Items('txp', 'iii')).read(0)
    frames = Items()
    frames.items = [(np.zeros((2, 2, 30, 34)), 0)]
    with pytest.raises(ValueError, match='got ndarray. Remove transforms from the dataset'):
        from_tonic(frames).read(0)
    with pytest.raises(ValueError, match='Recording 2 of Items: x of the events must be from 0 to 9'):
        from_tonic(Items(), size=(30, 10)).read(2)


def test_cache(tmp_path):
    """The key of the cache depends on the events, because these items are not files."""
    recordings = from_tonic(Items(), split='test')
    frames = cache_frames(recordings, tmp_path, 4)
    for i in range(3):
        np.testing.assert_array_equal(frames[i], integrate(random_events((30, 34), seed=i), 4, (30, 34)))
    assert cache_frames(from_tonic(Items(), split='test'), tmp_path, 4).filename == frames.filename
    changed = Items()
    changed.items[1][0]['p'][0] ^= 1
    assert cache_frames(from_tonic(changed, split='test'), tmp_path, 4).filename != frames.filename


@pytest.fixture
def n_mnist(tmp_path, monkeypatch):
    """A function that creates tonic's NMNIST from a few small files."""
    datasets = pytest.importorskip('tonic.datasets')
    event_files.write_n_mnist(tmp_path / 'NMNIST')
    monkeypatch.setattr(datasets.NMNIST, '_check_exists', lambda self: True)  # it requires at least 10,000 files
    return lambda **arguments: datasets.NMNIST(tmp_path, **arguments)


def test_n_mnist(n_mnist):
    for train, seed in ((True, 0), (False, 1000)):
        recordings = from_tonic(n_mnist(train=train))
        assert recordings.size == (34, 34) and recordings.labels == sorted([*range(10)] * 2)
        assert recordings.name == 'NMNIST' and recordings.classes[3] == '3 - three'
        for i in range(20):
            assert same(recordings.read(i), random_events((34, 34), seed=seed + i // 2 * 100 + i % 2))


def test_cache_of_n_mnist(n_mnist):
    recordings = from_tonic(n_mnist())
    frames = cache_frames(recordings, None, 4)
    assert frames.filename.is_relative_to(recordings.folder)
    assert split_digest(recordings) == split_digest(from_tonic(n_mnist()))
    np.testing.assert_array_equal(frames[7], integrate(recordings.read(7), 4, (34, 34)))
    others = [n_mnist(first_saccade_only=True), n_mnist(train=False), n_mnist(transform=np.flip)]
    assert len({cache_frames(from_tonic(other), None, 4).filename for other in others} - {frames.filename}) == 3


def test_transforms_of_n_mnist(n_mnist):
    transforms = pytest.importorskip('tonic.transforms')
    flipped = from_tonic(n_mnist(transform=transforms.RandomFlipLR(sensor_size=(34, 34, 2), p=1)))
    assert np.array_equal(flipped.read(0).x, 33 - random_events((34, 34), seed=0).x)
    with pytest.raises(ValueError, match='Remove transforms from the dataset that convert events to frames'):
        from_tonic(n_mnist(transform=transforms.ToFrame(sensor_size=(34, 34, 2), n_time_bins=4))).read(0)
