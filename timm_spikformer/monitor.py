"""Measurement of firing rates while a model runs."""
import contextlib
from typing import Any, Dict, List

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .kernels.eager import force_eager
from .layers import ConvBNLIF, LinearBNLIF
from .neurons import LIF

__all__ = ['FiringRateMonitor']


class FiringRateMonitor:
    """Record the firing rate (spikes per neuron and time step) of every LIF layer of a model.

    It adds forward hooks, which leave the outputs unchanged, but prevent consecutive event-driven layers from passing
    spikes as bytes. Outside of a `with` block, call `close` to remove them. Within a `with` block, compiled models run
    in eager mode, because PyTorch does not call hooks that are added to a model after it was compiled.

    Example:

        >>> import timm, torch, timm_spikformer
        >>> from timm_spikformer.monitor import FiringRateMonitor
        >>> model = timm.create_model('test_spikformer_v2')
        >>> with FiringRateMonitor(model) as monitor:
        ...     _ = model(torch.randn(2, 3, 32, 32))
        >>> 0 < monitor.mean < 1
        True
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: A model with LIF neurons. The hooks stay until `close` is called or the `with` block ends.
        """
        self.enabled = True
        self._eager = contextlib.ExitStack()
        self._totals: Dict[str, Tensor] = {}
        self._numels: Dict[str, int] = {}
        self._handles: List[RemovableHandle] = []
        # hook the ConvBNLIF or LinearBNLIF, which returns the spikes; a hook on the LIF disables the BN + LIF kernel
        units: Dict[int, List[nn.Module]] = {}
        for m in model.modules():
            if isinstance(m, (ConvBNLIF, LinearBNLIF)):
                units.setdefault(id(m.lif), []).append(m)
        for name, module in model.named_modules():
            if isinstance(module, LIF):
                self._numels[name] = 0
                for m in units.get(id(module), [module]):
                    self._handles.append(m.register_forward_hook(self._hook(name)))

    def _hook(self, name: str):
        @torch.no_grad()
        def record(module: nn.Module, args: Any, spikes: Tensor) -> None:
            if self.enabled:
                count = spikes.float().sum()
                count = count if count.device.type == 'mps' else count.double()  # MPS has no float64
                self._totals[name] = self._totals[name] + count if self._numels[name] else count
                self._numels[name] += spikes.numel()
        return record

    @property
    def layers(self) -> List[str]:
        """Names of the LIF layers, in the order of `model.named_modules()`."""
        return list(self._numels)

    @property
    def rates(self) -> Dict[str, float]:
        """Firing rate of each layer that has run, averaged over all recorded forward passes."""
        return {name: self._totals[name].item() / numel for name, numel in self._numels.items() if numel}

    @property
    def mean(self) -> float:
        """Mean of the layers' firing rates, not weighted by their numbers of neurons; NaN if nothing was recorded."""
        rates = self.rates
        return sum(rates.values()) / len(rates) if rates else float('nan')

    def reset(self) -> None:
        """Clear the recorded rates."""
        self._numels = dict.fromkeys(self._numels, 0)
        self._totals = {}

    def close(self) -> None:
        """Remove the hooks; recorded rates are kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> 'FiringRateMonitor':
        self._eager.enter_context(force_eager())
        return self

    def __exit__(self, *args: Any) -> None:
        self._eager.close()
        self.close()
