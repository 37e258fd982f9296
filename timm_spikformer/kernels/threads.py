"""Run compiled functions that release the GIL in as many threads as PyTorch uses.

numba's own thread pools are not used: `workqueue` is not thread-safe, and GNU OpenMP is not safe after a fork.
"""
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch

__all__ = ['run_in_threads', 'split_range']

_lock = threading.Lock()
_pool: Optional[ThreadPoolExecutor] = None


def _get_pool(num_threads: int) -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None or _pool._max_workers < num_threads:
            _pool = ThreadPoolExecutor(num_threads, thread_name_prefix='timm_spikformer')
        return _pool


def _reset_after_fork() -> None:
    """Discard the pool in a child process, because its threads exist in the parent process only."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_reset_after_fork)


def split_range(n: int, multiple: int, parts: Optional[int] = None) -> List[Tuple[int, int]]:
    """Divide `range(n)` into at most `parts` ranges (default: one per thread).

    All bounds except n are multiples of `multiple`.
    """
    parts = parts or torch.get_num_threads()
    size = max(1, -(-n // (parts * multiple))) * multiple
    return [(start, min(n, start + size)) for start in range(0, n, size)]


def run_in_threads(function: Callable[..., Any], items: Sequence[Tuple[Any, ...]]) -> List[Any]:
    """Return `function(*item)` for each item, computed in up to `torch.get_num_threads()` threads (caller included)."""
    num_threads = min(torch.get_num_threads(), len(items))
    if num_threads <= 1:
        return [function(*item) for item in items]
    results: List[Any] = [None] * len(items)
    remaining = iter(range(len(items)))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                i = next(remaining, None)
            if i is None:
                return
            results[i] = function(*items[i])

    futures = []
    try:
        for _ in range(num_threads - 1):
            futures.append(_get_pool(num_threads - 1).submit(work))
    except RuntimeError:  # the interpreter is shutting down, or there can be no more threads
        pass
    try:
        work()
    finally:
        for future in futures:  # cancel queued tasks, to avoid waiting for threads that run other callers' work
            if not future.cancel():
                future.result()
    return results
