"""Tests that the fused BatchNorm + LIF kernel matches the separate modules."""
import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from timm_spikformer import LIF, layers, use_kernels
from timm_spikformer.kernels.lif import _bn_statistics, norm_lif, norm_lif_fallback_reason
from timm_spikformer.layers import ConvBNLIF, LinearBNLIF


def make_layer(is_conv: bool, chs: int = 5, mean: float = 0.) -> nn.Module:
    layer = ConvBNLIF(3, chs, kernel_size=3) if is_conv else LinearBNLIF(3, chs)
    nn.init.uniform_(layer.bn.weight, -2., 2.)
    nn.init.uniform_(layer.bn.bias, 0.5, 2.)
    nn.init.uniform_(layer.bn.running_var, 0.5, 2.)
    nn.init.normal_(layer.bn.running_mean, mean)
    return layer


def forward_backward(layer: nn.Module, x: Tensor, time_steps: int, grad: Tensor):
    """Return spikes, gradients and BN buffers after one forward and backward pass."""
    x = x.detach().requires_grad_()
    spikes = layer(x, time_steps) if isinstance(layer, ConvBNLIF) else layer(x)
    spikes.backward(grad)
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return spikes.detach(), dict(grads, x=x.grad), dict(layer.bn.named_buffers())


def forward_backward_plain(*args):
    with use_kernels('plain'):
        return forward_backward(*args)


def assert_close_outputs(ours, expected):
    (spikes, grads, buffers), (expected_spikes, expected_grads, expected_buffers) = ours, expected
    assert torch.equal(spikes, expected_spikes)
    assert grads.keys() == expected_grads.keys()
    for name, expected_grad in expected_grads.items():
        # gradients before BN suffer from cancellation, and the gradient of a bias before BN is 0 up to rounding, so the
        # tolerance is absolute
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}[expected_grad.dtype]
        atol = tolerance * (1. + expected_grad.abs().max().item())
        torch.testing.assert_close(grads[name], expected_grad, rtol=tolerance, atol=atol, msg=name)
    for name, value in expected_buffers.items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture
def fused_bns(monkeypatch):
    """Record the BatchNorm layers that the kernel replaces."""
    fused_bns = []

    def norm_lif_and_record(bn, *args):
        fused_bns.append(bn)
        return norm_lif(bn, *args)

    monkeypatch.setattr(layers, 'norm_lif', norm_lif_and_record)
    return fused_bns


# fused_bns records the calls of all examples
@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    is_conv=st.booleans(),
    time_steps=st.integers(1, 6),
    is_single_step=st.booleans(),
    batch_size=st.integers(1, 4),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    chs=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    is_training=st.booleans(),
    momentum=st.sampled_from([0.1, 0., None]),
    mean=st.sampled_from([0., 10.]),
    chunk=st.sampled_from([1, 7, 100, 1 << 19]),
    seed=st.integers(0, 2 ** 31),
)
def test_fused_kernel_matches_modules(
        fused_bns, is_conv, time_steps, is_single_step, batch_size, size, chs, dtype, is_training, momentum, mean,
        chunk, seed,
):
    torch.manual_seed(seed)
    layer = make_layer(is_conv, chs, mean).to(dtype, memory_format=torch.channels_last).train(is_training)
    layer.bn.momentum = momentum
    if is_conv:
        num_steps = 1 if is_single_step else time_steps
        x = torch.randn(num_steps, batch_size, *size, 3).add(mean).to(dtype).permute(0, 1, 4, 2, 3)
        grad = torch.randn(time_steps, batch_size, chs, *size).to(dtype)
    else:
        x = torch.randn(time_steps, batch_size, size[0], 3).add(mean).to(dtype)
        grad = torch.randn(time_steps, batch_size, size[0], chs).to(dtype)
    fused_bns.clear()
    fused = copy.deepcopy(layer)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr('timm_spikformer.kernels.lif._CHUNK', chunk)
        ours = forward_backward(fused, x, time_steps, grad)
    expected = forward_backward_plain(layer, x, time_steps, grad)
    assert fused_bns == [fused.bn]
    assert_close_outputs(ours, expected)


def image_like(time_steps: int = 3) -> Tensor:
    return torch.randn(time_steps, 4, 8, 8, 3).add(1.).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize('is_conv', [True, False], ids=['conv', 'linear'])
def test_does_not_save_bn_output(is_conv, fused_bns):
    """Of the feature maps, only the layer's input and its output before BN are saved."""
    torch.manual_seed(0)
    layer, x = make_layer(is_conv), image_like()
    if not is_conv:
        x = torch.randn(3, 4, 64, 3)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        spikes = layer(x, 3) if is_conv else layer(x)
    assert fused_bns == [layer.bn] and spikes.mean() > 0.05
    weight = [layer.conv.weight.numel()] if is_conv else []
    assert sorted(n for n in sizes if n > 100) == weight + [x.numel(), spikes.numel()]  # ignore per-channel tensors


def test_bn_in_eval_mode_has_affine_gradients(fused_bns):
    torch.manual_seed(0)
    layer = make_layer(True).eval()
    x, grad = image_like(), torch.randn(3, 4, 5, 8, 8)
    ours = forward_backward(copy.deepcopy(layer), x, 3, grad)
    assert len(fused_bns) == 1 and ours[1]['bn.weight'].abs().min() > 0
    assert_close_outputs(ours, forward_backward_plain(layer, x, 3, grad))


def test_replaces_every_bn_of_a_model(model, images, fused_bns):
    model.train()(images)
    assert fused_bns == [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_bn_statistics_are_accurate_for_nearly_constant_input():
    """Inputs near 100 with standard deviation 0.001: computing E[x^2] - E[x]^2 would cancel."""
    torch.manual_seed(0)
    x = torch.randn(40000, 8) * 1e-3 + 100.
    bn = nn.BatchNorm1d(8, momentum=1.)
    norm = _bn_statistics(bn, x)
    torch.testing.assert_close(norm.mean, x.double().mean(0).float(), rtol=1e-7, atol=0.)
    torch.testing.assert_close(bn.running_var, x.double().var(0).float(), rtol=1e-4, atol=0.)
    expected = (x.double().var(0, correction=0) + bn.eps).rsqrt().float()
    torch.testing.assert_close(norm.invstd, expected, rtol=1e-5, atol=0.)


def test_single_value_per_channel_raises():
    with pytest.raises(ValueError, match='more than 1 value'):
        make_layer(False)(torch.randn(1, 1, 1, 3))


def test_in_place_parameter_change_before_backward_raises():
    layer = make_layer(False)
    spikes = layer(torch.randn(2, 3, 4, 3))
    with torch.no_grad():
        layer.bn.weight.mul_(2.)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        spikes.sum().backward()


def test_train_forward_does_not_affect_earlier_backward():
    """The running statistics change in place; the kernel saves a copy of the statistics for backward."""
    torch.manual_seed(0)
    layer, x = make_layer(True).eval(), image_like()
    layer.bn.momentum = 1.
    spikes = layer(x, 3)
    spikes.sum().backward(retain_graph=True)
    expected = layer.bn.weight.grad.clone()
    layer.train()(x * 2, 3)
    layer.bn.weight.grad = None
    spikes.sum().backward()
    assert expected.abs().max() > 0 and torch.equal(layer.bn.weight.grad, expected)


@pytest.mark.parametrize('is_conv', [True, False], ids=['conv', 'linear'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_double_backward(is_conv, training, fused_bns):
    """Gradient penalty.

    The layer weight is frozen, because layers that save their input as int8 do not support double backward.
    """
    torch.manual_seed(0)
    layer = make_layer(is_conv).double().train(training)
    next(layer.children()).weight.requires_grad_(False)
    x = (image_like() if is_conv else torch.randn(3, 4, 6, 3)).double()
    args = (3,) if is_conv else ()

    def penalty():
        x_ = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(x_, *args).cos().sum(), x_, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x_, layer.bn.weight))

    ours = penalty()
    with use_kernels('plain'):
        expected = penalty()
    assert fused_bns == [layer.bn]
    for a, b in zip(ours, expected):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_fallback_reasons():
    layer = make_layer(True)
    x = layer.conv(image_like().flatten(0, 1))
    assert norm_lif_fallback_reason(layer.bn, layer.lif, LIF, x) is None
    for change, reason in (
            (lambda: x.contiguous(), 'the channels are not last in memory'),
            (lambda: x.bfloat16(),
             'the input is torch.bfloat16 on cpu, but BatchNorm2d.weight is torch.float32 on cpu'),
            (lambda: x[:1, :, :1, :1], 'the input has one value per channel'),
            (lambda: x[:0], 'the input is empty'),
    ):
        assert norm_lif_fallback_reason(layer.bn, layer.lif, LIF, change()) == reason
