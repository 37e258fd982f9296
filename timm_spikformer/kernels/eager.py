"""Eager mode for code that depends on hooks, kernels or Python state, which compiled graphs would skip."""
import contextlib
import threading
from typing import Iterator

import torch

__all__ = ['force_eager']

_lock = threading.Lock()
_num_users = 0
_stance = contextlib.ExitStack()


@contextlib.contextmanager
def force_eager() -> Iterator[None]:
    """Run compiled functions and models in eager mode within the block, in all threads.

    Blocks may overlap, also in different threads: the last one to end restores the previous stance of the compiler.
    """
    global _num_users
    with _lock:
        if _num_users == 0:
            _stance.enter_context(torch.compiler.set_stance('force_eager'))
        _num_users += 1
    try:
        yield
    finally:
        with _lock:
            _num_users -= 1
            if _num_users == 0:
                _stance.close()
