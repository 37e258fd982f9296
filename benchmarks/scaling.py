"""Scaling of time and peak memory of V2-8-512 with time steps, batch size, resolution and depth.

    python -m benchmarks scaling --plot benchmarks/scaling.png
"""
import statistics
from functools import lru_cache
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

import numpy as np

from .images import crop_photographs
from .measure import interleave, peak_memory
from .model import create, inference, training_step

STEPS = {'training step': training_step, 'inference': inference}
AXES = dict(
    time_steps=(1, 2, 4, 8), batch_size=(1, 2, 4, 8, 16), size=(160, 192, 224, 256, 288), depth=(8, 10, 12, 14, 16))
QUICK_AXES = dict(time_steps=(1, 2, 4), batch_size=(1, 2, 4), size=(64, 96, 128), depth=(2, 3, 4))


class Point(NamedTuple):
    """Configuration of a measurement. Along an axis, one field varies and the others have their default values."""
    name: str = 'spikformer_v2_8_512'
    time_steps: int = 1
    batch_size: int = 1
    size: int = 224
    depth: int = 8


class Fit(NamedTuple):
    """Growth of y with x.

    Args:
        slope: Slope of log y against log x. It is less than 1 if a part of y is constant, as the stem is for depth.
        fixed: Intercept of the fitted line y = fixed + each * x.
        each: Slope of the same line.
        bend: Slope of the upper half of the points divided by that of the lower half: 1 for any line, 2 for y = x^2 at
            x = 1, 2, 4. It is also greater than 1 if y is the maximum of two lines, as peak memory can be.
    """
    slope: float
    fixed: float
    each: float
    bend: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    slope, _ = np.polyfit(np.log(x), np.log(y), 1)
    each, fixed = np.polyfit(x, y, 1)
    middle = len(x) // 2
    lower, upper = (np.polyfit(x[half], y[half], 1)[0] for half in (slice(middle + 1), slice(middle, None)))
    return Fit(*map(float, (slope, fixed, each, upper / lower)))


def _make_step(kind: str, point: Point) -> Callable[[], object]:
    x = crop_photographs(point.batch_size, point.size)
    model = create(point.name, point.time_steps, x, depth=point.depth)
    return STEPS[kind](model.train(kind == 'training step'), x)


_memory = lru_cache(maxsize=None)(lambda kind, point: peak_memory(_make_step, kind, point))  # the axes share points


def run(quick: bool) -> Dict[str, Any]:
    """Return the configuration `base`, and a curve for each kind of step and each axis.

    A curve has the values of the axis, `x`, and for each metric, `seconds` and `mib`, the values `y` and their `Fit`.
    """
    base = Point('test_spikformer_v2', size=64, depth=2) if quick else Point()
    print(
        f'  {base.name}, T = {base.time_steps}, batch {base.batch_size}, {base.size}x{base.size}, depth {base.depth}, '
        'except for the varying axis')
    curves: List[Dict[str, Any]] = []
    for step in STEPS:
        for axis, values in (QUICK_AXES if quick else AXES).items():
            points = [base._replace(**{axis: value}) for value in values]
            times = interleave({point: _make_step(step, point) for point in points}, 2 if quick else 5)
            x = [(value // 16) ** 2 for value in values] if axis == 'size' else list(values)
            name = 'tokens' if axis == 'size' else axis.replace('_', ' ')
            print(f'  {step}, {name} {", ".join(map(str, x))}')
            curve: Dict[str, Any] = dict(step=step, axis=name, x=x)
            for metric, unit, digits, y in (
                    ('seconds', 's', 3, [statistics.median(times[point]) for point in points]),
                    ('mib', 'MiB', 0, [_memory(step, point) for point in points]),
            ):
                line = fit(x, y)
                bend = f'upper half {line.bend:.2f} times as steep' if abs(line.slope) > 0.02 else 'flat'
                print(
                    f'    {", ".join(f"{v:.{digits}f}" for v in y)} {unit}: slope {line.slope:.2f}; '
                    f'{line.fixed:.2g} {unit} + {line.each:.2g} each, {bend}')
                curve[metric] = dict(y=y, **line._asdict())
            curves.append(curve)
    return dict(base=base._asdict(), curves=curves)
