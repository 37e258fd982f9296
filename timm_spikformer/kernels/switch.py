"""Global and local settings that select kernels or plain modules."""
import contextlib
import os
from contextvars import ContextVar
from typing import Iterator, Optional

__all__ = ['VARIABLE', 'get_kernels', 'set_kernels', 'use_kernels']

VARIABLE = 'TIMM_SPIKFORMER_KERNELS'
_MODES = ('auto', 'dense', 'plain')


def _check_mode(mode: str, source: str) -> str:
    if mode not in _MODES:
        raise ValueError(f"{source} must be 'auto', 'dense' or 'plain', got {mode!r}.")
    return mode


_default = _check_mode(os.environ.get(VARIABLE) or 'auto', VARIABLE)
_override: ContextVar[Optional[str]] = ContextVar('kernels', default=None)


def get_kernels() -> str:
    """Return the current kernel mode: `'auto'`, `'dense'` or `'plain'`.

    >>> get_kernels()
    'auto'
    """
    return _override.get() or _default


def set_kernels(mode: str) -> None:
    """Set the default kernel mode of the process, for all threads.

    If the environment variable `TIMM_SPIKFORMER_KERNELS` is set at import, it determines the initial mode.

    Args:
        mode: `'auto'` runs a kernel wherever it can replace modules. `'dense'` does so except for event-driven
            products, whose float32 sums round differently from PyTorch's. `'plain'` disables all kernels; it is the
            reference that every kernel is tested against.

    Raises:
        ValueError: The mode is unknown.

    >>> set_kernels('auto')
    """
    global _default
    _default = _check_mode(mode, 'mode')


@contextlib.contextmanager
def use_kernels(mode: str) -> Iterator[None]:
    """Use a kernel mode within a `with` block, in the current thread or asyncio task only.

    If gradient checkpointing recomputes a layer after the block, the layer runs in the same way as within the block.

    Args:
        mode: As in `set_kernels`.

    Raises:
        ValueError: The mode is not `'auto'`, `'dense'` or `'plain'`.

    >>> with use_kernels('plain'):
    ...     get_kernels()
    'plain'
    """
    token = _override.set(_check_mode(mode, 'mode'))
    try:
        yield
    finally:
        _override.reset(token)
