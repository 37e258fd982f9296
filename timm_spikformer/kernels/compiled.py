"""Compile the loops of event-driven products with numba, at first use, and keep them on disk."""
import functools
import hashlib
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Tuple

__all__ = ['loops', 'unavailable_reason']

_lock = threading.RLock()
_HELPERS = ('_append_row', '_all_within', '_fire', '_copy', '_clear', '_transpose', '_add', '_copy_and_check')
_FUNCTIONS = ('read_events', 'pack_weights', 'unpack_weights', 'convolve', 'weight_gradient')


def _cache_dir() -> str:
    """Return a folder for compiled code that depends on the source, as numba does not notice all changes of it."""
    digest = hashlib.sha256()
    for name in ('compiled.py', 'event_loops.py', 'simd.py'):
        digest.update(Path(__file__).with_name(name).read_bytes())
    base = os.environ.get('NUMBA_CACHE_DIR') or Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'timm_spikformer')
    return str(Path(base, f'event_loops-{digest.hexdigest()[:16]}').expanduser())


def _compile(function: Any) -> Any:
    import numba
    from numba.core import config
    before = config.CACHE_DIR
    config.CACHE_DIR = _cache_dir()
    try:
        return numba.njit(nogil=True, error_model='numpy', cache=True)(function)
    except RuntimeError:  # no folder can be written: compile in every process
        return numba.njit(nogil=True, error_model='numpy')(function)
    finally:
        config.CACHE_DIR = before


@functools.cache
def _load() -> Tuple[Optional[SimpleNamespace], Optional[str]]:
    """Return the compiled loops, or why there are none."""
    try:
        from . import event_loops, simd
    except ImportError as e:  # numba is absent, or does not support this NumPy
        return None, f'event-driven products need numba (pip install numba): {e}'
    for name in _HELPERS:
        setattr(event_loops, name, _compile(getattr(event_loops, name)))
    return SimpleNamespace(
        BLOCK=simd.BLOCK, BYTE_INDICES=simd.BYTE_INDICES, BYTE_COUNTS=simd.BYTE_COUNTS,
        largest_chunk=event_loops.largest_chunk, float32=event_loops.np.float32,
        **{name: _compile(getattr(event_loops, name)) for name in _FUNCTIONS}), None


def unavailable_reason() -> Optional[str]:
    """Return why the loops cannot be compiled; None if they can."""
    with _lock:
        return _load()[1]


def loops() -> SimpleNamespace:
    """Return the compiled functions and the constants of `event_loops`."""
    with _lock:
        return _load()[0]
