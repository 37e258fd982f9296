"""Checks of numbers that the user of a command gives. This module imports the standard library only."""
import math
from typing import Optional

__all__ = ['check_count', 'check_number']

_HIGHEST = 2 ** 31 - 1


def check_count(option: str, value: int) -> None:
    """Raise a ValueError if a number of things is not from 1 to 2147483647."""
    if value < 1:
        raise ValueError(f'{option} must be at least 1, got {value}.')
    if value > _HIGHEST:
        raise ValueError(f'{option} must be at most {_HIGHEST}, got {value}.')


def check_number(option: str, value: float, above: Optional[float] = None, below: float = math.inf) -> None:
    """Raise a ValueError if a number is not finite, or not in its range.

    Args:
        above: Bound that the number must be greater than; by default it must be at least 0.
        below: Bound that the number must be less than.
    """
    lower = 'at least 0' if above is None else f'greater than {above:g}'
    upper = ' and finite' if below == math.inf else f' and less than {below:g}'
    if not (value >= 0 if above is None else value > above) or not value < below:
        raise ValueError(f'{option} must be {lower}{upper}, got {value}.')
