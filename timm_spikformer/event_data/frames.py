"""Events of one recording, and their integration into frames of event counts."""
from typing import NamedTuple, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from ..arguments import check_integer

__all__ = ['Events', 'check_events', 'check_integration', 'check_size', 'integrate', 'resize', 'sort_events']


_MOST_STEPS = 10_000  # more is a mistake, and would need all memory


class Events(NamedTuple):
    """Events of one recording, sorted by time: four integer arrays `[N]`.

    The origin of the coordinates is the upper left pixel.

    Args:
        t: Time stamps in microseconds, ascending; equal time stamps are allowed.
        x: Columns, from 0 to W - 1.
        y: Rows, from 0 to H - 1.
        p: Polarities: 1 (ON) where the pixel became brighter, 0 (OFF) where it became darker.
    """
    t: np.ndarray
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray


def check_events(events: Events, size: Tuple[int, int]) -> None:
    """Check the types, lengths and ranges of the arrays of events, but not whether the events are sorted by time.

    Args:
        events: Events of one recording.
        size: Height and width of the sensor.

    Raises:
        ValueError: There are no events; the arrays are not integer arrays of the same length; or an event is outside of
            the sensor or has a polarity other than 0 or 1.
    """
    arrays = {name: getattr(events, name) for name in Events._fields}
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            got = f'{array.dtype} {list(array.shape)}' if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f'{name} of the events must be an integer NumPy array [N], got {got}.')
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ', '.join(f'{name} {len(array)}' for name, array in arrays.items())
        raise ValueError(f't, x, y and p of the events must have the same length, got {lengths}.')
    if not len(events.t):
        raise ValueError('Expected at least one event, got none.')
    height, width = size
    for name, limit in (('x', width), ('y', height), ('p', 2)):
        low, high = int(arrays[name].min()), int(arrays[name].max())
        if low < 0 or high >= limit:
            hint = ' Convert polarities of -1 and 1 with (p > 0).' if name == 'p' else ''
            raise ValueError(
                f'{name} of the events must be from 0 to {limit - 1} for a sensor of {height}x{width} pixels, got '
                f'{low} to {high}.{hint}')


def check_size(size: Tuple[int, int]) -> Tuple[int, int]:
    """Validate a height and width in pixels and return them as integers.

    Raises:
        ValueError: The size is not a pair of integers of at least 1.
    """
    try:
        height, width = size
    except (TypeError, ValueError):
        raise ValueError(f'size must be (height, width), got {size!r}.') from None
    return check_integer('height', height, 1), check_integer('width', width, 1)


def check_integration(time_steps: int, split_by: str) -> int:
    """Check the arguments of `integrate`, and return the number of time steps as int.

    Raises:
        ValueError: `time_steps` is not an integer from 1 to 10,000, or `split_by` is neither 'number' nor 'time'.
    """
    if check_integer('time_steps', time_steps, 1) > _MOST_STEPS:
        raise ValueError(f'time_steps must be at most {_MOST_STEPS}, got {time_steps}.')
    if split_by not in ('number', 'time'):
        raise ValueError(f"split_by must be 'number' or 'time', got {split_by!r}.")
    return int(time_steps)


def sort_events(events: Events) -> Events:
    """Sort events by time stamp. Events with equal time stamps keep their order."""
    if np.all(events.t[1:] >= events.t[:-1]):
        return events
    order = np.argsort(events.t, kind='stable')
    return Events(*(array[order] for array in events))


def integrate(events: Events, time_steps: int, size: Tuple[int, int], split_by: str = 'number') -> np.ndarray:
    """Count the events of each time step, polarity and pixel. Every event is counted exactly once.

    The time steps are those of spikingjelly's `integrate_events_by_fixed_frames_number`, which V1 uses. For a time step
    without events, that function raises an error if `split_by` is 'time'; this function returns a frame of zeros.

    Args:
        events: Events of one recording, N events sorted by time.
        time_steps: Number of frames T.
        size: Height H and width W of the sensor.
        split_by: 'number' for steps of N // T events each, or 'time' for steps of (t[-1] - t[0]) // T microseconds each
            (at least 1). The last step also contains the remaining events: all of them if N < T with 'number'.

    Returns:
        Counts `[T, 2, H, W]`, OFF events in channel 0 and ON events in channel 1, in the smallest of uint8, uint16,
        uint32 and uint64 that holds the largest count. Convert them to float32 before arithmetic.

    Raises:
        ValueError: The events are invalid (see `check_events`) or not sorted by time, or another argument is invalid.
    """
    time_steps = check_integration(time_steps, split_by)
    height, width = size = check_size(size)
    check_events(events, size)
    if np.any(events.t[1:] < events.t[:-1]):  # not np.diff, which wraps for unsigned integers
        raise ValueError('The events must be sorted by time stamp. Use sort_events.')
    t = events.t.astype(np.int64)
    inner = np.arange(1, time_steps)
    if split_by == 'number':
        starts = inner * (len(t) // time_steps)
    else:
        starts = np.searchsorted(t, t[0] + inner * max((t[-1] - t[0]) // time_steps, 1))
    counts = []
    for start, end in zip([0, *starts], [*starts, len(t)]):
        x, y, p = (array[start:end].astype(np.int64) for array in events[1:])
        counts.append(np.bincount((p * height + y) * width + x, minlength=2 * height * width))  # [2 * H * W]
    dtype = np.min_scalar_type(max(count.max() for count in counts))
    return np.stack([count.astype(dtype) for count in counts]).reshape(time_steps, 2, height, width)


def resize(frames: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Resize frames by bilinear interpolation, with antialiasing.

    Interpolation averages pixels instead of adding them, also for integer factors. Values therefore stay in the range
    of the counts, and the sum of a frame is divided by the ratio of the areas.

    Source: TET and later work resize the 128x128 pixels of CIFAR10-DVS to 48x48 in this way (torchvision's `Resize` on
    PIL images). V1 does not resize them.

    Args:
        frames: Counts `[T, C, H, W]`.
        size: New height and width.

    Returns:
        Frames `[T, C, *size]`, float32. If the size does not change, the values are the counts.

    Raises:
        ValueError: The frames do not have four dimensions, or the size is invalid.
    """
    size = check_size(size)
    if np.ndim(frames) != 4:
        raise ValueError(f'frames must have the shape [T, C, H, W], got {list(np.shape(frames))}.')
    frames = np.asarray(frames, dtype=np.float32)
    if frames.shape[2:] == size:
        return frames
    return F.interpolate(torch.from_numpy(frames), size, mode='bilinear', antialias=True).numpy()
