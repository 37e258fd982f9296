"""Measurement of firing rates while a model runs."""
from typing import Any, Dict, List

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .neurons import LIF

__all__ = ['FiringRateMonitor']


class FiringRateMonitor:
    """Record the firing rate, spikes per neuron and time step, of every neuron layer of a model.

    It works by forward hooks and does not change the model. Example:

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
        self._totals: Dict[str, Tensor] = {}
        self._counts: Dict[str, int] = {}
        self._handles: List[RemovableHandle] = []
        for name, module in model.named_modules():
            if isinstance(module, LIF):
                self._counts[name] = 0
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str):
        @torch.no_grad()
        def record(module: nn.Module, args: Any, spikes: Tensor) -> None:
            if self.enabled:
                rate = spikes.float().mean()
                self._totals[name] = self._totals[name] + rate if self._counts[name] else rate
                self._counts[name] += 1
        return record

    @property
    def layers(self) -> List[str]:
        """Names of the neuron layers, in the order of the model's modules."""
        return list(self._counts)

    @property
    def rates(self) -> Dict[str, float]:
        """Firing rate of each layer that has run, averaged over the forwards that were recorded."""
        return {name: self._totals[name].item() / count for name, count in self._counts.items() if count}

    @property
    def mean(self) -> float:
        """Mean of the layers' firing rates; NaN if nothing was recorded."""
        rates = self.rates
        return sum(rates.values()) / len(rates) if rates else float('nan')

    def reset(self) -> None:
        """Forget what was recorded."""
        self._counts = dict.fromkeys(self._counts, 0)
        self._totals = {}

    def close(self) -> None:
        """Remove the hooks; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> 'FiringRateMonitor':
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()
