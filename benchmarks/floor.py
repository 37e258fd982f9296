"""Dense floor of a step: the time of its convolutions and matrix products alone, on tensors of the same layout."""
import statistics
from collections import Counter
from typing import Any, Callable, Tuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .measure import clock

_aten = torch.ops.aten
_PRODUCTS = (_aten.convolution, _aten.convolution_backward, _aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)


def _signature(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return ('tensor', tuple(arg.shape), tuple(arg.stride()), arg.dtype, arg.device)
    return tuple(arg) if isinstance(arg, list) else arg


def _make_argument(signature: Any) -> Any:
    if isinstance(signature, tuple) and signature and signature[0] == 'tensor':
        _, shape, stride, dtype, device = signature
        x = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        return x.copy_(torch.rand(shape) < 0.15)  # about as sparse as spikes; does not affect dense kernels
    return list(signature) if isinstance(signature, tuple) else signature


class _ProductRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in _PRODUCTS:
            self.calls[(func, tuple(_signature(a) for a in args))] += 1
        return func(*args, **(kwargs or {}))


def dense_floor(step: Callable[[], object], repeats: int = 3) -> Tuple[float, int]:
    """Return the time in seconds of the convolutions and matrix products of a step, and their number.

    The step must not run in inference mode, in which PyTorch does not dispatch these operators separately.
    """
    with _ProductRecorder() as recorder:
        step()
    seconds = 0.
    for (func, signatures), count in recorder.calls.items():
        args = [_make_argument(s) for s in signatures]
        times = []
        with torch.no_grad():
            for _ in range(repeats + 1):
                start = clock()
                func(*args)
                times.append(clock() - start)
        seconds += count * statistics.median(times[1:])
    return seconds, sum(recorder.calls.values())
