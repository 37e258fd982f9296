"""Checks of the arguments of the network; errors name the argument, its value and what was expected."""
import math
import numbers
from typing import Any

__all__ = ['check_integer', 'check_pooling', 'check_positive', 'check_rate']

_POOLINGS = ('', 'avg', 'max', 'avgmax', 'catavgmax')  # of timm's SelectAdaptivePool2d


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Validate an integer and return it as int.

    Raises:
        ValueError: It is not an integer of at least `minimum`. NumPy integers are accepted, bool is not.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < minimum:
        raise ValueError(f'{name} must be an integer of at least {minimum}, got {value!r}.')
    return int(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_positive(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: It is not a finite number greater than 0.
    """
    if not _is_finite(value) or value <= 0:
        raise ValueError(f'{name} must be a finite number greater than 0, got {value!r}.')


def check_rate(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: It is not a number of at least 0 and less than 1.
    """
    if not _is_finite(value) or not 0 <= value < 1:
        raise ValueError(f'{name} must be a number of at least 0 and less than 1, got {value!r}.')


def check_pooling(global_pool: Any, num_classes: int) -> None:
    """
    Raises:
        ValueError: timm has no such pooling, or it is none and there is a classifier.
    """
    is_fast = isinstance(global_pool, str) and global_pool.startswith('fast')
    if not isinstance(global_pool, str) or (global_pool[4:] if is_fast else global_pool) not in _POOLINGS:
        raise ValueError(f'global_pool must be one of {", ".join(map(repr, _POOLINGS))}, got {global_pool!r}.')
    if num_classes and not global_pool:
        raise ValueError(f"global_pool must name a pooling for a classifier of {num_classes} classes, got ''.")
