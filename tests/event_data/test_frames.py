"""Integration of events into frames, and resizing."""
import numpy as np
import pytest
from event_files import random_events
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from spikingjelly.datasets.utils import integrate_events_by_fixed_frames_number
from torchvision.transforms import functional as TF

from timm_spikformer.event_data.frames import Events, integrate, resize, sort_events

SIZE = (5, 7)


@st.composite
def recordings(draw, min_events=1):
    """Events sorted by time, often with equal time stamps, and often fewer events than steps."""
    count = draw(st.integers(min_events, 40))
    span = draw(st.sampled_from([0, 1, 20, 2 ** 22, 2 ** 40]))
    t = np.sort(draw(hnp.arrays(np.int64, count, elements=st.integers(0, span))))
    if span < 2 ** 32:
        t = t.astype(draw(st.sampled_from([np.int64, np.uint32, np.uint64])))
    x, y, p = (draw(hnp.arrays(dtype, count, elements=st.integers(0, high))) for dtype, high in (
        (np.int16, SIZE[1] - 1), (np.uint8, SIZE[0] - 1), (np.int8, 1)))
    return Events(t, x, y, p)


def histogram(events):
    counts = np.zeros((2, *SIZE), int)
    for x, y, p in zip(events.x, events.y, events.p):
        counts[p, y, x] += 1
    return counts


@given(recordings(), st.integers(1, 12), st.sampled_from(['number', 'time']))
def test_every_event_is_counted_once(events, time_steps, split_by):
    frames = integrate(events, time_steps, SIZE, split_by)
    assert frames.shape == (time_steps, 2, *SIZE)
    np.testing.assert_array_equal(frames.sum(0), histogram(events))


@given(recordings(), st.integers(1, 12), st.sampled_from(['number', 'time']))
def test_steps_follow_the_order_of_time(events, time_steps, split_by):
    """The first steps contain the first events."""
    frames = integrate(events, time_steps, SIZE, split_by)
    numbers = frames.sum((1, 2, 3)).cumsum()
    for step, number in enumerate(numbers[:-1]):
        first = Events(*(array[:number] for array in events))
        np.testing.assert_array_equal(frames[:step + 1].sum(0), histogram(first))


@given(recordings(), st.integers(1, 12), st.sampled_from(['number', 'time']))
@example(Events(*np.zeros((4, 3), np.int64)), 8, 'number')
def test_same_frames_as_spikingjelly(events, time_steps, split_by):
    try:
        expected = integrate_events_by_fixed_frames_number(events._asdict(), split_by, time_steps, *SIZE)
    except IndexError:  # spikingjelly cannot integrate a step without events by time
        assert split_by == 'time'
        return
    np.testing.assert_array_equal(integrate(events, time_steps, SIZE, split_by), expected)


def test_equal_numbers_and_equal_durations():
    t = np.array([0, 1, 2, 3, 50, 99, 100])
    events = Events(t, t * 0, t * 0, t * 0)
    assert integrate(events, 2, SIZE, 'number').sum((1, 2, 3)).tolist() == [3, 4]
    assert integrate(events, 2, SIZE, 'time').sum((1, 2, 3)).tolist() == [4, 3]
    assert integrate(events, 4, SIZE, 'time').sum((1, 2, 3)).tolist() == [4, 0, 1, 2]
    assert integrate(events, 10, SIZE, 'number').sum((1, 2, 3)).tolist() == [0] * 9 + [7]


def test_channels_and_pixels():
    events = Events(*np.array([[0, 1], [6, 2], [4, 1], [1, 0]]))
    frames = integrate(events, 1, SIZE)
    assert frames[0, 1, 4, 6] == frames[0, 0, 1, 2] == 1  # [T, ON, y, x], [T, OFF, y, x]


@pytest.mark.parametrize('count, dtype', [(255, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.uint32)])
def test_counts_are_not_clipped(count, dtype):
    events = Events(*np.zeros((4, count), np.int64))
    frames = integrate(events, 1, SIZE)
    assert frames.dtype == dtype and frames[0, 0, 0, 0] == count


@pytest.mark.parametrize('changes, message', [
    (dict(x=np.array([0, 7])), 'x of the events must be from 0 to 6 .* got 0 to 7'),
    (dict(y=np.array([5, 1])), 'y of the events must be from 0 to 4'),
    (dict(x=np.array([-1, 0])), 'got -1 to 0'),
    (dict(p=np.array([-1, 1])), r'Convert polarities of -1 and 1 with \(p > 0\)'),
    (dict(p=np.array([0, 2])), 'p of the events must be from 0 to 1'),
    (dict(t=np.array([1, 0])), 'must be sorted by time stamp. Use sort_events'),
    (dict(t=np.array([1, 0], np.uint32)), 'must be sorted by time stamp'),
    (dict(t=np.array([1])), 'the same length, got t 1, x 2, y 2, p 2'),
    (dict(t=np.array([0., 1.])), r't of the events must be an integer NumPy array \[N\], got float64 \[2\]'),
    (dict(x=[0, 1]), 'got list'),
    (dict(x=np.zeros((2, 1), int)), r'got int64 \[2, 1\]'),
    (dict(zip('txyp', np.zeros((4, 0), int))), 'Expected at least one event, got none'),
])
def test_bad_events(changes, message):
    events = Events(*np.zeros((4, 2), int))._replace(**changes)
    with pytest.raises(ValueError, match=message):
        integrate(events, 2, SIZE)


@pytest.mark.parametrize('arguments, message', [
    ((0, SIZE), 'time_steps must be an integer of at least 1, got 0'),
    ((2, 5), r'size must be \(height, width\), got 5'),
    ((2, (5, 0)), 'width must be an integer of at least 1'),
    ((2, SIZE, 'duration'), "split_by must be 'number' or 'time', got 'duration'"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        integrate(random_events(SIZE), *arguments)


def test_sort_events_is_stable():
    events = sort_events(Events(*np.array([[3, 1, 3, 1], [0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 1, 1]])))
    assert events.t.tolist() == [1, 1, 3, 3] and events.x.tolist() == [1, 3, 0, 2] and events.p.tolist() == [0, 1, 0, 1]


def test_resize_equals_torchvision_on_pil_images():
    frames = integrate(random_events((128, 128), 30000), 2, (128, 128))
    resized = resize(frames, (48, 48))
    assert resized.shape == (2, 2, 48, 48) and resized.dtype == np.float32
    for image, picture in zip(resized.reshape(-1, 48, 48), frames.astype(np.float32).reshape(-1, 128, 128)):
        expected = np.asarray(TF.resize(TF.to_pil_image(picture, mode='F'), [48, 48]))
        np.testing.assert_allclose(image, expected, atol=1e-4)


def test_resize_keeps_the_counts_of_the_same_size_and_the_mean():
    frames = integrate(random_events((32, 32), 3000), 2, (32, 32))
    np.testing.assert_array_equal(resize(frames, (32, 32)), frames)
    assert resize(frames * 0 + 3, (16, 16)) == pytest.approx(3)
    with pytest.raises(ValueError, match=r'must have the shape \[T, C, H, W\], got \[2, 32, 32\]'):
        resize(frames[0], (16, 16))
