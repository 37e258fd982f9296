"""Compatibility with spikingjelly's utilities: reset_net, set_step_mode and monitors."""
import pytest
import timm
import torch
from conftest import calibrate
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.monitor import GradOutputMonitor, InputMonitor, OutputMonitor
from torch import nn
from torch.nn.modules import module as torch_module

from timm_spikformer import LIF, SpikformerConfig, SpikformerForImageClassification, record_membrane_potentials


@pytest.mark.parametrize('wrap', [
    lambda m: m, nn.DataParallel, lambda m: nn.Sequential(nn.Identity(), m)], ids=['bare', 'parallel', 'sequential'])
def test_reset_net_changes_nothing(model, images, wrap):
    wrapped = wrap(model)
    expected = wrapped(images)
    functional.reset_net(wrapped)
    functional.set_step_mode(wrapped, 'm')
    functional.detach_net(wrapped)
    assert model.head.fc.out_features == 10 and torch.equal(wrapped(images), expected)


def test_reset_net_on_transformers_model(images):
    model = SpikformerForImageClassification(SpikformerConfig.from_timm('test_spikformer_v2'))
    functional.reset_net(model)
    assert model(images).logits.shape == (16, 1000)


def test_monitors(model, images):
    neurons = [name for name, m in model.named_modules() if isinstance(m, LIF)]
    with torch.no_grad():
        expected = model(images)
    inputs, outputs, grads = (cls(model, LIF) for cls in (InputMonitor, OutputMonitor, GradOutputMonitor))
    out = model(images)
    out.sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    for monitor in (inputs, outputs, grads):
        assert monitor.monitored_layers == neurons and len(monitor.records) == len(neurons)
        monitor.remove_hooks()
    for current, spikes in zip(inputs.records, outputs.records):
        assert current.shape == spikes.shape and spikes.any()


def test_global_hooks_see_every_layer(model, images):
    seen = []
    handle = torch_module.register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        model(images)
    finally:
        handle.remove()
    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    used = [m for m in leaves if m in seen]
    missing = {type(m).__name__ for m in leaves} - {type(m).__name__ for m in used}
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, LIF)) for m in seen) == sum(
        isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, LIF)) for m in leaves), missing


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_membranes_match_spikingjelly(model, images, training):
    """Compare with `v_seq` of spikingjelly's node on the same currents."""
    model.train(training)
    layers = ['blocks.0.mlp.fc1.lif', 'stem.stages.3.contract.lif']
    if not hasattr(model.stem.stages[3], 'contract'):
        layers = ['stem.stages.2.proj.lif', 'blocks.1.mlp.fc2.lif']
    currents = InputMonitor(model, LIF)
    with record_membrane_potentials(model, layers) as membranes:
        model(images)
        model(images[:3])
    currents.remove_hooks()
    assert list(membranes) == layers
    assert all(len(v) == 2 for v in membranes.values())
    for name in layers:
        for v, x in zip(membranes[name], currents[name]):
            node = neuron.LIFNode(
                tau=2., decay_input=True, v_reset=0., detach_reset=True, step_mode='m', store_v_seq=True,
                v_threshold=model.get_submodule(name).v_threshold, surrogate_function=surrogate.Sigmoid(4.))
            spikes = node(x.contiguous())
            assert v.shape == x.shape and (v != 0).any() and spikes.any()
            torch.testing.assert_close(v, node.v_seq, rtol=1e-6, atol=1e-6)


def test_membranes_of_all_layers_before_the_reset(model, images):
    with record_membrane_potentials(model, before_reset=True) as membranes:
        with torch.no_grad():
            model(images)
    assert list(membranes) == [name for name, m in model.named_modules() if isinstance(m, LIF)]
    for name, (h,) in membranes.items():
        assert (h >= model.get_submodule(name).v_threshold).any(), name
    assert all(not m._forward_hooks for m in model.modules())


def test_unknown_layer_raises(model):
    with pytest.raises(ValueError, match=r"no neuron layer 'blocks.7.lif'.*stem.stages.0"):
        with record_membrane_potentials(model, ['blocks.7.lif']):
            pass


def test_reset_methods_of_timm_still_work(images):
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=10), images)
    model.reset_classifier(5)
    assert model(images).shape == (16, 5)
    model.head.reset(7)
    assert model(images).shape == (16, 7)
