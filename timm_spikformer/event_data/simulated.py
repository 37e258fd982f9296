"""Events of a simulated event camera that moves in front of a still image.

The motion follows N-MNIST, https://arxiv.org/abs/1507.07629: three straight movements (saccades), the last of which
returns to the start. The sensor follows ESIM, https://proceedings.mlr.press/v87/rebecq18a.html, without noise: a pixel
emits an event whenever its logarithmic intensity has changed by a threshold since its last event. The simulation is
deterministic. It does not model the noise, the refractory period and the limited bandwidth of a real sensor, so
accuracies on simulated events are not those on a real sensor.
"""
import numpy as np

from ..arguments import check_integer, check_positive
from .frames import Events, check_integration, integrate

__all__ = ['simulate_events', 'simulate_frames']

_CORNERS = np.array([[0., 0.], [0.5, 1.], [1., 0.], [0., 0.]])  # (x, y) of the path, in units of the amplitude
_DARK_OFFSET = 0.1  # added before the logarithm; it limits the response of dark pixels, as in real sensors


def _camera_positions(frames_per_saccade: int, amplitude: float) -> np.ndarray:
    """Return the position of the image at each frame, `[3 * frames_per_saccade + 1, 2]`, as (x, y) in pixels."""
    fraction = np.arange(frames_per_saccade)[:, None] / frames_per_saccade
    saccades = [a + fraction * (b - a) for a, b in zip(_CORNERS, _CORNERS[1:])]
    return amplitude * np.concatenate([*saccades, _CORNERS[-1:]])


def _crop(padded: np.ndarray, offset: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a window `[height, width]` of an image at a fractional offset (x, y), by bilinear interpolation."""
    x, y = (int(v) for v in np.floor(offset))
    u, v = offset - (x, y)
    window = padded[y:y + height + 1, x:x + width + 1]
    rows = window[:-1] * (1. - v) + window[1:] * v
    return rows[:, :-1] * (1. - u) + rows[:, 1:] * u


def simulate_events(
        image: np.ndarray,
        threshold: float = 0.3,
        amplitude: float = 3.,
        duration: int = 300_000,
        frames_per_saccade: int = 8,
) -> Events:
    """Simulate the events of an event camera that moves in front of an image in three saccades.

    The logarithmic intensity of each pixel is interpolated linearly between rendered frames, which determines the times
    of the events. Pixels outside of the image have the intensity of the nearest border pixel.

    Args:
        image: Intensities `[H, W]` in the range 0 to 1.
        threshold: Change of the logarithmic intensity that triggers an event.
        amplitude: Length of the saccades in pixels.
        duration: Duration of the three saccades in microseconds; N-MNIST's recordings take 300 ms.
        frames_per_saccade: Number of rendered frames per saccade.

    Returns:
        The events, sorted by time. There are none if the image is constant.

    Raises:
        ValueError: The image is not two-dimensional or has values outside of 0 to 1, or an argument is out of range.

    >>> image = np.zeros((28, 28))
    >>> image[10:18, 10:18] = 1.
    >>> events = simulate_events(image)
    >>> len(events.t) == len(events.p), sorted(set(events.p.tolist()))
    (True, [0, 1])
    """
    for name, value in (('threshold', threshold), ('amplitude', amplitude)):
        check_positive(name, value)
    check_integer('duration', duration, 1)
    check_integer('frames_per_saccade', frames_per_saccade, 1)
    image = np.asarray(image, dtype=np.float64)
    if image.ndim != 2 or image.size == 0 or not (image.min() >= 0. and image.max() <= 1.):
        raise ValueError(
            f'image must be [H, W] with values from 0 to 1, got shape {list(image.shape)}'
            + (f' with values from {image.min():g} to {image.max():g}.' if image.size else '.'))
    height, width = image.shape
    positions = _camera_positions(frames_per_saccade, amplitude)
    padded = np.pad(image, ((0, int(np.ceil(amplitude)) + 1), (0, int(np.ceil(amplitude)) + 1)), mode='edge')
    log = np.stack([np.log(_DARK_OFFSET + _crop(padded, offset, height, width)) for offset in positions])
    # In units of the threshold: logarithmic intensities of each frame (`levels`) and of the last events (`reference`).
    # After each frame, they differ by less than 1.
    levels = (log - log[0]) / threshold
    reference = np.zeros((height, width))
    times, xs, ys, ps = [], [], [], []
    for before, after, i in zip(levels, levels[1:], range(len(levels) - 1)):
        change = after - reference
        counts = np.floor(np.abs(change)).astype(np.int64)
        y, x = np.nonzero(counts)
        if not len(y):
            continue
        n = counts[y, x]
        sign = np.sign(change[y, x])
        index = np.repeat(np.arange(len(y)), n)
        k = np.arange(len(index)) - np.repeat(np.cumsum(n) - n, n) + 1  # 1 to n for each pixel
        y, x, sign = y[index], x[index], sign[index]
        level, start, end = reference[y, x] + sign * k, before[y, x], after[y, x]
        times.append((i + (level - start) / (end - start)) / (len(levels) - 1) * duration)
        xs.append(x)
        ys.append(y)
        ps.append(sign > 0)
        reference += np.sign(change) * counts
    if not times:
        empty = np.zeros(0, dtype=np.int64)
        return Events(empty, empty, empty, empty)
    t, x, y, p = (np.concatenate(parts) for parts in (times, xs, ys, ps))
    t = np.minimum(t.astype(np.int64), duration - 1)
    order = np.lexsort((x, y, t))
    return Events(t[order], x[order].astype(np.int64), y[order].astype(np.int64), p[order].astype(np.int64))


def simulate_frames(image: np.ndarray, time_steps: int, split_by: str = 'time') -> np.ndarray:
    """Simulate events and integrate them into frames of counts, `[T, 2, H, W]`. A constant image gives zeros.

    Args:
        image: Intensities `[H, W]` in the range 0 to 1.
        time_steps: Number of frames T.
        split_by: 'number' or 'time', see `integrate`.

    Raises:
        ValueError: See `simulate_events` and `integrate`.
    """
    check_integration(time_steps, split_by)
    events = simulate_events(image)
    if not len(events.t):
        return np.zeros((time_steps, 2, *image.shape), dtype=np.uint8)
    return integrate(events, time_steps, image.shape, split_by)
