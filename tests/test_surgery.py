"""Kernels give the same results as the plain modules for arbitrarily modified models.

The tests use float64, so that rounding does not change spikes. Event-driven products support float32 only. Here,
PyTorch's operators replace their compiled loops, and the tests cover the conditions under which they are used.
"""
import contextlib
import random

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from surgeries import SURGERIES
from torch import nn

from timm_spikformer import Spikformer, SpikformerMAE, layers, use_kernels
from timm_spikformer.kernels import events, products
from timm_spikformer.kernels.lif import norm_lif
from timm_spikformer.neurons import lif_plain


@pytest.fixture(autouse=True, scope='module')
def double():
    """Use float64 for all new modules."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True, scope='module')
def event_driven_in_double():
    """Make products of any size event-driven, computed by PyTorch in float64."""

    def read_events(layer, x):
        shape, values = events._shape(layer, x), x.detach()
        if not ((values >= 0) & (values <= 15) & (values == values.round())).all():
            return None
        values = values.to(torch.uint8)
        values = values.permute(0, 2, 3, 1) if x.ndim == 4 else values
        return events.Events(events._as_shape(values, shape), shape, int(values.sum()), max(1, int(values.max())))

    def dense(layer, counted):
        x = events.restore_input(counted, type(layer) is nn.Linear).double()
        if type(layer) is nn.Linear:
            return nn.functional.linear(x, layer.weight, layer.bias)
        return nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)

    def fire(layer, bn, neuron, x, counted, time_steps, as_bytes=False):
        out = dense(layer, counted)
        if type(bn) is not nn.Identity:
            out = nn.functional.batch_norm(out, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        spikes = lif_plain(out.unflatten(0, (time_steps, -1)), *neuron.constants).flatten(0, 1)
        return spikes.to(torch.uint8) if as_bytes else spikes

    def weight_gradient(counted, grad, weight):
        x = events.restore_input(counted, weight.ndim == 2).double()
        if weight.ndim == 2:
            return grad.t() @ x
        block, padding = counted.shape.block, counted.shape.padding
        return torch.nn.grad.conv2d_weight(x, weight.shape, grad, block, padding)

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in dict(
                MIN_MACS=0, MIN_MACS_IN_TRAINING=0, MIN_CHANNELS=1, MIN_CHANNELS_IN_TRAINING=1, CHANNEL_MULTIPLE=1,
                DTYPE=torch.float64, read_events=read_events,
        ).items():
            monkeypatch.setattr(events, name, value)
        monkeypatch.setattr(products, 'convolve', lambda layer, x, counted: dense(layer, counted))
        monkeypatch.setattr(products, 'weight_gradient', weight_gradient)
        monkeypatch.setattr(layers, 'convolve_norm_lif', fire)
        yield


MODES = ('eval', 'train', 'masked', 'masked eval', 'checkpointed', 'fx', 'traced')


def make_model(stem: str, is_masked: bool) -> nn.Module:
    """Return a small model whose BN values make every neuron layer fire."""
    torch.manual_seed(0)
    model = Spikformer(
        stem=stem, patch_size=4, stem_strides=(1, 2, 2, 1), in_chans=2, embed_dim=16, depth=1, num_heads=2,
        num_classes=3, time_steps=2, mlp_ratio=2.)
    if is_masked:
        model = SpikformerMAE(model, mask_ratio=0.5, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.weight, 0.8, 1.5)
            nn.init.uniform_(m.bias, 0.5, 1.2)
            nn.init.uniform_(m.running_mean, -0.3, 0.3)
            nn.init.uniform_(m.running_var, 0.2, 0.6)
    return model


def run(stem, mode, surgeries, seed, sequence):
    """Build, modify and run a model; return all results by name, and the number of `norm_lif` calls."""
    is_masked = mode.startswith('masked')
    model = make_model(stem, is_masked).double()
    rng = random.Random(seed)
    contexts = [c for c in (SURGERIES[name](rng, model) for name in surgeries) if c is not None]
    model.double().train(mode in ('train', 'masked', 'checkpointed'))
    torch.manual_seed(seed)
    x = torch.randn((3, 2, 2, 16, 16) if sequence else (3, 2, 16, 16), dtype=torch.float64)
    if mode == 'checkpointed':
        model.set_grad_checkpointing()
    calls = []
    with contextlib.ExitStack() as stack:
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.setattr(layers, 'norm_lif', lambda *args: calls.append(0) or norm_lif(*args))
        for context in contexts:
            stack.enter_context(context)
        function = model
        if mode == 'fx':
            function = torch.fx.symbolic_trace(model)
        elif mode == 'traced':
            function = torch.jit.trace(model, (x.flip(0),), check_trace=False)
        x.requires_grad_()
        if is_masked:
            noise = torch.rand(3, 16)
            torch.manual_seed(seed)
            loss, out, _, _ = function(x, noise=noise)
        else:
            torch.manual_seed(seed)
            out = function(x)
            loss = (out * torch.linspace(-1., 1., out.numel(), dtype=out.dtype).view(out.shape)).sum()
        loss.backward()
    result = {'output': out.detach(), 'grad of the input': x.grad}
    result.update({f'grad of {name}': p.grad for name, p in model.named_parameters() if p.requires_grad})
    result.update({f'buffer {name}': b for name, b in model.named_buffers()})
    return result, len(calls)


def compare(*args):
    """Assert equal results with and without kernels; return the results and the kernel count."""
    with use_kernels('plain'):
        expected, plain_calls = run(*args)
    return compare_with(expected, plain_calls, *args)


def compare_with(expected, plain_calls, *args):
    result, calls = run(*args)
    assert plain_calls == 0
    assert result.keys() == expected.keys()
    # gradients that BN cancels, such as that of a bias before it, are rounding errors relative to the largest
    largest = max(t.abs().max().item() for name, t in expected.items() if 'grad' in name and t is not None)
    for name, value in expected.items():
        if value is None or result[name] is None:
            assert value is result[name], name
        else:
            scale = largest if 'grad' in name else value.abs().max().item()
            assert (result[name] - value).abs().max() <= 1e-9 * scale, name
    return expected, calls


@pytest.mark.parametrize('stem', ['scs', 'sps'])
@pytest.mark.parametrize('mode', MODES)
def test_unmodified_model_uses_kernels_and_fires(stem, mode):
    """Kernels are used and neurons fire; otherwise, the comparisons below would be vacuous."""
    result, calls = compare(stem, mode, [], 0, False)
    assert result['output'].std() > 0 and result['grad of the input'].abs().max() > 0
    layers_of_stem = 12 if stem == 'scs' else 5
    assert calls == (0 if mode in ('fx', 'traced') else (layers_of_stem + 4) * (2 if mode == 'checkpointed' else 1))


@pytest.mark.parametrize('name', SURGERIES)
def test_each_surgery(name):
    for stem in ('scs', 'sps'):
        for mode in ('train', 'eval', 'masked'):
            compare(stem, mode, [name], 1, True)


@pytest.mark.parametrize('mode', ['train', 'masked'])
def test_bn_shared_by_kernel_and_module(mode):
    """The kernel must not modify tensors that the module has saved for backward."""
    for seed in range(4):
        compare('sps', mode, ['spikingjelly_neuron', 'shared_norm', 'scale_after_a_layer'], seed, False)
    compare('sps', mode, ['spikingjelly_neuron', 'shared_norm', 'scale_after_a_layer'], 498890668, False)


cases = dict(
    stem=st.sampled_from(('scs', 'sps')),
    mode=st.sampled_from(MODES),
    surgeries=st.lists(st.sampled_from(sorted(SURGERIES)), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 2 ** 31),
    sequence=st.booleans(),
)


def check(*args):
    try:
        with use_kernels('plain'):
            expected = run(*args)
    except Exception:  # PyTorch cannot run or trace the model
        event('fails without kernels too')
        return
    compare_with(*expected, *args)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(**cases)
def test_any_surgeries(stem, mode, surgeries, seed, sequence):
    check(stem, mode, surgeries, seed, sequence)


@pytest.mark.fuzz
@settings(max_examples=10_000, deadline=None)
@given(**cases)
def test_many_surgeries(stem, mode, surgeries, seed, sequence):
    check(stem, mode, surgeries, seed, sequence)
