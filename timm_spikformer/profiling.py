"""What a forward costs: multiplications, additions, and the energy they stand for."""
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ['Operations', 'count_operations']

MAC_PJ, AC_PJ = 4.6, 0.9  # 45 nm, 32-bit float: Horowitz 2014, as in the papers


class Operations(NamedTuple):
    """Operations of the matrix products and convolutions of one image, over all of its time steps.

    Args:
        dense_macs: Multiply-accumulates that an artificial network of the same shape would do
        macs: Those of them whose input is real-valued: the first convolution and the classifier
        acs: Accumulates that spikes cause in all others
    """
    dense_macs: float
    macs: float
    acs: float

    @property
    def energy_mj(self) -> float:
        """Energy in millijoules, BN folded into the weights."""
        return (MAC_PJ * self.macs + AC_PJ * self.acs) * 1e-9


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.dense_macs = self.macs = self.acs = 0.

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            macs = count(*args, **(kwargs or {}), out_val=out) / 2
            x = args[1] if func._overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.baddbmm) else args[0]
            self.dense_macs += macs
            if (x < 0).any() or (x != x.round()).any():
                self.macs += macs
            else:
                self.acs += macs * x.double().mean().item()
        return out


@torch.no_grad()
def count_operations(model: nn.Module, x: Tensor) -> Operations:
    """Count one forward of the images `x`, `[B, C, H, W]`; the figures are the mean over them.

    An input of non-negative integers is one of spikes or of sums of spikes. As in the papers it causes its mean times
    the dense number of accumulates: a sum of n spikes counts as n, and of the two spiking operands of attention's first
    product the left one counts.
    """
    counter = _Count()
    with counter:
        model(x)
    return Operations(*(n / len(x) for n in (counter.dense_macs, counter.macs, counter.acs)))
