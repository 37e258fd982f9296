"""Compile the loops of event-driven products with numba, each at its first call, and cache them on disk.

Whether a product uses the loops depends only on that product, not on earlier calls; otherwise the same input could give
different bits before and after compilation. Small products do not use the loops, so small models do not wait for
compilation.
"""
import contextlib
import functools
import hashlib
import inspect
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, List, Optional, Tuple

__all__ = ['cache_folder', 'cached_loops', 'load_loops', 'unavailable_reason']

_lock = threading.RLock()
_HELPERS = ('_append_row', '_all_within', '_fire', '_copy', '_clear', '_transpose', '_add', '_copy_and_check')


@functools.cache
def cache_folder() -> Optional[Path]:
    """Return the cache folder for compiled code, or None if it is not writable.

    The folder name contains a hash of the source code, because numba does not detect all source changes.
    """
    digest = hashlib.sha256()
    for function in (cache_folder, *_functions()):
        digest.update(Path(inspect.getfile(inspect.unwrap(function))).read_bytes())
    base = os.environ.get('NUMBA_CACHE_DIR') or os.path.join(
        os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'timm_spikformer')
    folder = Path(base, f'event_loops-{digest.hexdigest()[:16]}').absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _is_cached(name: str) -> bool:
    folder = cache_folder()
    return folder is not None and any(folder.rglob(f'*.{name}-*.nbi'))


def cached_loops() -> List[str]:
    """Return the names of the loops whose compiled code is on disk."""
    *functions, _ = _functions()
    return [function.__name__ for function in functions if _is_cached(function.__name__)]


def _jit(function: Callable[..., Any], has_cache: bool) -> Any:
    import numba
    from numba.core import config
    folder = cache_folder() if has_cache else None
    if folder is None:
        return numba.njit(nogil=True, error_model='numpy')(function)
    before, config.CACHE_DIR = config.CACHE_DIR, str(folder)
    try:
        return numba.njit(nogil=True, error_model='numpy', cache=True)(function)
    finally:
        config.CACHE_DIR = before


@functools.cache
def _print_compile_notice() -> None:
    folder = cache_folder()
    kept = f'cached in {folder}' if folder else 'not cached: set NUMBA_CACHE_DIR to a writable folder'
    print(
        f'timm_spikformer: compiling event-driven kernels for this machine, which takes several seconds ({kept}). '
        'Set TIMM_SPIKFORMER_KERNELS=dense to disable event-driven kernels.', file=sys.stderr)


class _Loop:
    """A function that is compiled, or loaded from disk, at its first call."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.compiled: Optional[Callable[..., Any]] = None

    def __call__(self, *args: Any) -> Any:
        return (self.compiled or self._compile(args))(*args)

    def _compile(self, args: Tuple[Any, ...]) -> Callable[..., Any]:
        import numba
        with _lock:
            if self.compiled is None:
                if not _is_cached(self.function.__name__):
                    _print_compile_notice()
                types = tuple(numba.typeof(arg) for arg in args)
                compiled = _jit(self.function, has_cache=True)
                try:
                    compiled.compile(types)
                except Exception:  # the cache cannot be read or written, e.g. a full disk or a damaged file
                    _remove_cached(self.function.__name__)
                    compiled = _jit(self.function, has_cache=False)
                    compiled.compile(types)
                compiled.disable_compile()  # other types would be a bug: the loops read memory as float32 and uint8
                self.compiled = compiled
            return self.compiled


def _remove_cached(name: str) -> None:
    """Remove the cached code of a loop, so that the next process compiles and caches it again."""
    folder = cache_folder()
    with contextlib.suppress(OSError):
        for path in folder.rglob(f'*.{name}-*') if folder else ():
            path.unlink()


def _functions() -> Tuple[Callable[..., Any], ...]:
    from .event_loops import convolve, pack_weights, read_events, unpack_weights, weight_gradient
    from .simd import add_rows_plain  # included so that simd.py is hashed
    return read_events, pack_weights, unpack_weights, convolve, weight_gradient, add_rows_plain


def _load() -> Tuple[Optional[SimpleNamespace], Optional[str]]:
    """Return (loops, None), or (None, reason) if numba cannot be imported."""
    try:
        *functions, _ = _functions()
        from numba.core import config
        if config.DISABLE_JIT:
            return None, 'numba is disabled by NUMBA_DISABLE_JIT'
        from .event_loops import largest_chunk
        from .simd import BLOCK, BYTE_COUNTS, BYTE_INDICES
    except ImportError as e:  # numba is not installed, or does not support the installed NumPy
        return None, f'event-driven products need numba (pip install numba): {e}'
    names = vars(sys.modules[largest_chunk.__module__])
    for name in _HELPERS:  # compile the helpers in place, because the loops look them up by name
        names[name] = _jit(names[name], has_cache=False)  # a loop on disk contains them
    return SimpleNamespace(
        BLOCK=BLOCK, BYTE_INDICES=BYTE_INDICES, BYTE_COUNTS=BYTE_COUNTS, largest_chunk=largest_chunk,
        **{f.__name__: _Loop(f) for f in functions}), None


_loaded: Optional[Tuple[Optional[SimpleNamespace], Optional[str]]] = None


def _load_once() -> Tuple[Optional[SimpleNamespace], Optional[str]]:
    global _loaded
    if _loaded is None:
        with _lock:
            _loaded = _loaded or _load()
    return _loaded


def unavailable_reason() -> Optional[str]:
    """Return why the loops cannot be compiled, or None if they can."""
    return _load_once()[1]


def load_loops() -> SimpleNamespace:
    """Return the functions of `event_loops`, compiled at their first call, and the constants of `simd`."""
    return _load_once()[0]


if hasattr(os, 'register_at_fork'):  # no fork while a loop is being compiled: the child could never finish it
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
