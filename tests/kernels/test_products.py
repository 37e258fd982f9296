"""Layers that save their input as int8 give the same outputs and gradients as the modules, for any input."""
import copy

import pytest
import torch
from torch import nn

from timm_spikformer import use_kernels
from timm_spikformer.kernels.products import mark_spikes, product, to_int8_if_exact

LAYERS = {
    'convolution': lambda: nn.Conv2d(6, 8, 3, padding=1, bias=False),
    'stride': lambda: nn.Conv2d(6, 8, 2, stride=2),
    'groups': lambda: nn.Conv2d(6, 8, 3, padding=(1, 0), groups=2),
    'dilation': lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2),
    'reflect': lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode='reflect'),
    'same': lambda: nn.Conv2d(6, 8, 3, padding='same'),
    'linear': lambda: nn.Linear(6, 8),
    'linear without bias': lambda: nn.Linear(6, 8, bias=False),
}
INPUTS = {
    'spikes': lambda x: (x > 1).float(),
    'sums': lambda x: (x * 2).round().clamp(-128, 127),
    'halves': lambda x: (x > 1) * 0.5,
    'one value is 0.5': lambda x: torch.where(torch.arange(x.numel()).view(x.shape) == x.numel() - 1, 0.5, (x > 1.)),
    'real': lambda x: x,
    'large': lambda x: (x > 1) * 300.,
    'nan': lambda x: torch.where(x > 2, torch.nan, (x > 1).float()),
}


def run(layer, x):
    """Output, gradients, and the dtypes of what was saved for backward."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    dtypes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: dtypes.append(t.dtype) or t, lambda t: t):
        out = product(layer, x)
    out.cos().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in layer.parameters())], dtypes


@pytest.mark.parametrize('values', INPUTS)
@pytest.mark.parametrize('make', LAYERS)
def test_equals_the_layer(make, values):
    torch.manual_seed(0)
    layer = LAYERS[make]()
    x = INPUTS[values](torch.randn((5, 6, 8, 8) if isinstance(layer, nn.Conv2d) else (40, 6)))
    given, dtypes = run(layer, x)
    with use_kernels('plain'):
        expected, _ = run(layer, x)
    assert (torch.int8 in dtypes) == (values in ('spikes', 'sums') and make not in ('reflect', 'same'))
    for a, b in zip(given, expected):
        assert torch.equal(a.nan_to_num(7.), b.nan_to_num(7.))


def test_frozen_weights_save_nothing():
    layer = nn.Linear(6, 8).requires_grad_(False)
    _, dtypes = run(layer, torch.ones(3, 6))
    assert torch.int8 not in dtypes


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_int8_conversion_is_exact(dtype, memory_format):
    x = torch.arange(-128, 128).to(dtype).view(4, 4, 4, 4).contiguous(memory_format=memory_format)
    assert torch.equal(to_int8_if_exact(x).to(dtype), x)
    for bad in (128., -129., 0.5, torch.nan, torch.inf):
        y = x.clone()
        y[3, 3, 3, 3] = bad
        assert to_int8_if_exact(y) is None


def test_only_unmodified_marked_spikes_are_converted_off_cpu():
    """On devices other than the CPU values are not read; the meta device has none."""
    with torch.device('meta'):
        spikes = mark_spikes(torch.ones(4, 3, 5))
        assert to_int8_if_exact(spikes) is not None and to_int8_if_exact(spikes.flatten(0, 1).t()) is not None
        assert to_int8_if_exact(torch.ones(3)) is None and to_int8_if_exact(spikes + 1) is None
        assert to_int8_if_exact(spikes.clone()) is None
        view = spikes.flatten(0, 1)
        spikes.mul_(2)
        assert to_int8_if_exact(spikes) is None and to_int8_if_exact(view) is None


def test_double_backward_error_names_use_kernels():
    layer = nn.Linear(6, 8)
    x = torch.ones(3, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"use_kernels\('plain'\)"):
        torch.autograd.grad(product(layer, x).cos().sum(), x, create_graph=True)
    with use_kernels('plain'):
        (grad,) = torch.autograd.grad(product(layer, x).cos().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert layer.weight.grad.abs().max() > 0
