"""Checks of model arguments and command-line options. Errors state the argument, its value and what is expected."""
import math
import numbers
from typing import Any, Optional

__all__ = [
    'check_count', 'check_finite', 'check_integer', 'check_number', 'check_pooling', 'check_positive', 'check_rate']

_HIGHEST = 2 ** 31 - 1
_POOLINGS = ('', 'avg', 'max', 'avgmax', 'catavgmax')  # pooling types of timm's SelectAdaptivePool2d


def check_integer(name: str, value: Any, minimum: int) -> int:
    """Validate an integer and return it as int. NumPy integers are accepted, bool is not.

    Raises:
        ValueError: The value is not an integer of at least `minimum`.
    """
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or value < minimum:
        raise ValueError(f'{name} must be an integer of at least {minimum}, got {value!r}.')
    return int(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return _is_number(value) and math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def check_finite(name: str, value: Any) -> None:
    """Check that a value is a finite number.

    Raises:
        ValueError: The value is not such a number.
    """
    if not _is_finite(value):
        raise ValueError(f'{name} must be a finite number, got {value!r}.')


def check_positive(name: str, value: Any) -> None:
    """Check that a value is a finite number greater than 0.

    Raises:
        ValueError: The value is not such a number.
    """
    if not _is_finite(value) or value <= 0:
        raise ValueError(f'{name} must be a finite number greater than 0, got {value!r}.')


def check_rate(name: str, value: Any) -> None:
    """Check that a value is a number of at least 0 and less than 1.

    Raises:
        ValueError: The value is not such a number.
    """
    if not _is_finite(value) or not 0 <= value < 1:
        raise ValueError(f'{name} must be a number of at least 0 and less than 1, got {value!r}.')


def check_pooling(global_pool: Any, num_classes: int) -> None:
    """Check the name of a pooling type.

    Raises:
        ValueError: timm has no such pooling type, or it is '' (no pooling) and there is a classifier.
    """
    is_fast = isinstance(global_pool, str) and global_pool.startswith('fast')
    if not isinstance(global_pool, str) or (global_pool[4:] if is_fast else global_pool) not in _POOLINGS:
        raise ValueError(f'global_pool must be one of {", ".join(map(repr, _POOLINGS))}, got {global_pool!r}.')
    if num_classes and not global_pool:
        raise ValueError(f"A classifier of {num_classes} classes requires a pooling type, got global_pool=''.")


def check_count(option: str, value: int) -> None:
    """Raise a ValueError if the value of an option is not from 1 to 2147483647."""
    if value < 1:
        raise ValueError(f'{option} must be at least 1, got {value}.')
    if value > _HIGHEST:
        raise ValueError(f'{option} must be at most {_HIGHEST}, got {value}.')


def check_number(
        name: str,
        value: Any,
        above: Optional[float] = None,
        below: float = math.inf,
        maximum: Optional[float] = None,
) -> None:
    """Raise a ValueError if the value of an argument or option is not a number in its range.

    Args:
        name: Name of the argument or option.
        value: Its value.
        above: Exclusive lower bound; by default the number must be at least 0.
        below: Exclusive upper bound; by default the number must be finite.
        maximum: Inclusive upper bound, used instead of `below`; infinity allows an infinite number.
    """
    is_allowed = _is_finite(value) or maximum == math.inf and _is_number(value) and value == math.inf
    if is_allowed and (value >= 0 if above is None else value > above) and (
            value < below if maximum is None else value <= maximum):
        return
    lower = 'at least 0' if above is None else f'greater than {above:g}'
    if maximum is not None:
        upper = f' and at most {maximum:g}'
    else:
        upper = ' and finite' if below == math.inf else f' and less than {below:g}'
    raise ValueError(f'{name} must be {lower}{upper}, got {value!r}.')
