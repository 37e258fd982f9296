"""FiringRateMonitor."""
import math

import pytest
import torch

from timm_spikformer import LIF
from timm_spikformer.monitor import FiringRateMonitor


def test_rates_are_spikes_per_neuron_and_time_step(model, images):
    spikes = {}
    handles = [
        m.register_forward_hook(lambda m, args, out, name=name: spikes.setdefault(name, []).append(out.clone()))
        for name, m in model.named_modules() if isinstance(m, LIF)]
    with FiringRateMonitor(model) as monitor, torch.no_grad():
        model(images[:3])
        model(images[3:4])
    for handle in handles:
        handle.remove()
    assert monitor.layers == list(spikes)
    for name, outputs in spikes.items():
        count, numel = sum(x.sum().item() for x in outputs), sum(x.numel() for x in outputs)
        assert monitor.rates[name] == pytest.approx(count / numel) and count > 0
    assert monitor.mean == pytest.approx(sum(monitor.rates.values()) / len(spikes))


def test_disabled_monitor_records_nothing_and_hooks_are_removed(model, images):
    def hooks():
        return sum(len(m._forward_hooks) for m in model.modules())

    before = hooks()
    with FiringRateMonitor(model) as monitor, torch.no_grad():
        monitor.enabled = False
        model(images[:1])
        assert monitor.rates == {} and math.isnan(monitor.mean)
        monitor.enabled = True
        model(images[:1])
        assert monitor.mean > 0
        monitor.reset()
        assert monitor.rates == {}
    assert hooks() == before


def test_model_that_was_compiled_before(model, images):
    """All layers are recorded, although a compiled model does not call hooks that are added later."""
    with FiringRateMonitor(model) as monitor, torch.no_grad():
        model(images[:2])
    for compiled in (torch.compile(model, backend='eager'), model):
        if compiled is model:
            compiled.forward = torch.compile(model.forward, backend='eager')
        with torch.no_grad():
            compiled(images[:2])
            with FiringRateMonitor(model) as again:
                compiled(images[:2])
        assert again.rates == monitor.rates and len(again.rates) > 10
    assert torch._dynamo.eval_frame._stance.stance == 'default'
