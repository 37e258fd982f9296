"""The switch between kernels and plain modules."""
import contextlib
import os
from contextvars import ContextVar
from typing import Iterator, Optional

__all__ = ['VARIABLE', 'get_kernels', 'set_kernels', 'use_kernels']

VARIABLE = 'TIMM_SPIKFORMER_KERNELS'
_MODES = ('auto', 'dense', 'plain')


def _check(mode: str, source: str) -> str:
    if mode not in _MODES:
        raise ValueError(f"{source} must be 'auto', 'dense' or 'plain', got {mode!r}.")
    return mode


_default = _check(os.environ.get(VARIABLE) or 'auto', VARIABLE)
_override: ContextVar[Optional[str]] = ContextVar('kernels', default=None)


def get_kernels() -> str:
    """Return the mode in force here: `'auto'`, `'dense'` or `'plain'`.

    >>> get_kernels()
    'auto'
    """
    return _override.get() or _default


def set_kernels(mode: str) -> None:
    """Set the mode of the process, for all threads.

    The environment variable `TIMM_SPIKFORMER_KERNELS` sets it before the first import.

    Args:
        mode: `'auto'` runs a kernel wherever it can replace modules. `'dense'` does so except for event-driven
            products, whose float32 sums round differently from PyTorch's. `'plain'` runs the modules alone, and is the
            reference that every kernel is tested against.

    Raises:
        ValueError: The mode is none of these.

    >>> set_kernels('auto')
    """
    global _default
    _default = _check(mode, 'mode')


@contextlib.contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Use a mode within a `with` block, in the current thread or asyncio task only.

    A layer that gradient checkpointing recomputes after the block runs as it did within it.

    Args:
        mode: As in `set_kernels`.

    Raises:
        ValueError: The mode is not `'auto'`, `'dense'` or `'plain'`.

    >>> with use_kernels('plain'):
    ...     get_kernels()
    'plain'
    """
    token = _override.set(_check(mode, 'mode'))
    try:
        yield
    finally:
        _override.reset(token)
