"""Simulated events: definition of the sensor, determinism, and invalid arguments."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from timm_spikformer.event_data.simulated import simulate_events
from timm_spikformer.images import read_splits


def simulate_by_loop(image, threshold, amplitude, duration, frames_per_saccade):
    """Return the events `(t, x, y, p)` of a sensor that is simulated pixel by pixel in plain Python."""
    def value(x, y):
        """Bilinear interpolation, with the border repeated."""
        height, width = image.shape
        x0, y0 = int(np.floor(x)), int(np.floor(y))
        u, v = x - x0, y - y0

        def pixel(i, j):
            return image[min(i, height - 1), min(j, width - 1)]
        upper = (1 - u) * pixel(y0, x0) + u * pixel(y0, x0 + 1)
        lower = (1 - u) * pixel(y0 + 1, x0) + u * pixel(y0 + 1, x0 + 1)
        return (1 - v) * upper + v * lower

    corners = [(0, 0), (0.5, 1), (1, 0), (0, 0)]
    path = []
    for (ax, ay), (bx, by) in zip(corners, corners[1:]):
        for i in range(frames_per_saccade):
            f = i / frames_per_saccade
            path.append((amplitude * (ax + f * (bx - ax)), amplitude * (ay + f * (by - ay))))
    path.append((0., 0.))
    events = []
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            log = [np.log(0.1 + value(x + dx, y + dy)) for dx, dy in path]
            reference = log[0]
            for i, (a, b) in enumerate(zip(log, log[1:])):
                while abs(b - reference) >= threshold * (1 - 1e-9):
                    reference += threshold * np.sign(b - reference)
                    events.append(((i + (reference - a) / (b - a)) * duration / (len(path) - 1), x, y, b > a))
    return events


def test_events_equal_those_of_a_loop_over_pixels():
    image = np.asarray(read_splits()['test'][0][0].convert('L'), dtype=np.float64)[4:16, 6:18] / 255
    events = simulate_events(image, threshold=0.31, amplitude=2.5, duration=90_000, frames_per_saccade=5)
    expected = sorted(simulate_by_loop(image, 0.31, 2.5, 90_000, 5))
    assert len(events.t) == len(expected) > 200
    assert sorted(zip(events.x, events.y, events.p)) == sorted((x, y, p) for _, x, y, p in expected)
    np.testing.assert_allclose(np.sort(events.t), np.sort([t for t, *_ in expected]), atol=1.)


@settings(max_examples=50, deadline=None)
@given(image=arrays(np.float64, (6, 7), elements=st.floats(0, 1)), threshold=st.floats(0.05, 1.))
def test_intensity_returns_to_its_start(image, threshold):
    """The camera returns to its start, so the numbers of ON and OFF events of each pixel differ by at most one."""
    events = simulate_events(image, threshold=threshold)
    balance = np.zeros((6, 7), dtype=int)
    np.add.at(balance, (events.y, events.x), 2 * events.p - 1)
    assert np.abs(balance).max() <= 1
    assert (np.diff(events.t) >= 0).all() and (events.t >= 0).all() and (events.t < 300_000).all()


def test_brighter_is_on():
    image = np.zeros((8, 8))
    image[:, 4:] = 1.
    events = simulate_events(image, amplitude=2., frames_per_saccade=4)
    first = events.t < 100_000  # in the first saccade, the bright half moves to the left
    assert first.any() and (events.p[first] == 1).all() and set(events.x[first]) <= {2, 3}


def test_deterministic():
    image = np.random.default_rng(0).random((28, 28))
    for a, b in zip(simulate_events(image), simulate_events(image.copy())):
        assert np.array_equal(a, b)


def test_constant_image_has_no_events():
    assert all(len(a) == 0 for a in simulate_events(np.full((5, 5), 0.5)))


@pytest.mark.parametrize('image, kwargs, message', [
    (np.zeros((3, 5, 5)), {}, 'must be .H, W. with values from 0 to 1, got shape .3, 5, 5.'),
    (np.full((5, 5), 255.), {}, 'with values from 255 to 255'),
    (np.full((5, 5), np.nan), {}, 'with values from nan'),
    (np.zeros((0, 5)), {}, 'got shape .0, 5.'),
    (np.zeros((5, 5)), dict(threshold=0.), 'threshold'),
    (np.zeros((5, 5)), dict(amplitude=-1.), 'amplitude'),
    (np.zeros((5, 5)), dict(duration=0), 'duration'),
    (np.zeros((5, 5)), dict(frames_per_saccade=1.5), 'frames_per_saccade'),
])
def test_invalid_arguments(image, kwargs, message):
    with pytest.raises(ValueError, match=message):
        simulate_events(image, **kwargs)
