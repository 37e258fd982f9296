"""Eager mode for measurements and stateful inference, which a compiled graph would bypass."""
import contextlib
import threading
from typing import Iterator, Optional

import torch

__all__ = ['force_eager']

_lock = threading.Lock()
_num_users = 0
_stance: Optional[contextlib.AbstractContextManager] = None


@contextlib.contextmanager
def force_eager() -> Iterator[None]:
    """Run compiled functions and models in eager mode within the block, in all threads.

    Blocks may overlap, also in different threads: the last one that ends restores PyTorch's setting.
    """
    global _num_users, _stance
    with _lock:
        if _num_users == 0:
            _stance = torch.compiler.set_stance('force_eager')
        _num_users += 1
    try:
        yield
    finally:
        with _lock:
            _num_users -= 1
            if _num_users == 0:
                _stance.__exit__(None, None, None)
