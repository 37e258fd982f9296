"""Fused BatchNorm + LIF kernel compared with the two modules."""
import copy

import pytest
import torch
from hypothesis import given, settings
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


def run(layer: nn.Module, x: Tensor, time_steps: int, grad: Tensor):
    """Spikes, all gradients and BN's buffers after a step."""
    x = x.detach().requires_grad_()
    spikes = layer(x, time_steps) if isinstance(layer, ConvBNLIF) else layer(x)
    spikes.backward(grad)
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return spikes.detach(), dict(grads, x=x.grad), dict(layer.bn.named_buffers())


def run_plain(*args):
    with use_kernels('plain'):
        return run(*args)


def assert_same(ours, expected):
    (spikes, grads, buffers), (expected_spikes, expected_grads, expected_buffers) = ours, expected
    assert torch.equal(spikes, expected_spikes)
    assert grads.keys() == expected_grads.keys()
    for name, expected_grad in expected_grads.items():
        # the gradient of what comes before BN is a small difference of large sums; that of a bias is 0
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}[expected_grad.dtype]
        atol = tolerance * (1. + expected_grad.abs().max().item())
        torch.testing.assert_close(grads[name], expected_grad, rtol=tolerance, atol=atol, msg=name)
    for name, value in expected_buffers.items():
        torch.testing.assert_close(buffers[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture
def calls(monkeypatch):
    """Record the BatchNorm layers that the kernel replaces."""
    calls = []

    def norm_lif_and_record(bn, *args):
        calls.append(bn)
        return norm_lif(bn, *args)

    monkeypatch.setattr(layers, 'norm_lif', norm_lif_and_record)
    return calls


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    is_conv=st.booleans(),
    time_steps=st.integers(1, 6),
    is_static=st.booleans(),
    batch_size=st.integers(1, 4),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    chs=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
    is_channels_last=st.booleans(),
    is_training=st.booleans(),
    momentum=st.sampled_from([0.1, 0., None]),
    mean=st.sampled_from([0., 10.]),
    chunk=st.sampled_from([1, 7, 100, 1 << 19]),
    seed=st.integers(0, 2 ** 31),
)
def test_equals_the_modules(
        is_conv, time_steps, is_static, batch_size, size, chs, dtype, is_channels_last, is_training, momentum, mean,
        chunk, seed,
):
    torch.manual_seed(seed)
    layer = make_layer(is_conv, chs, mean).to(dtype).train(is_training)
    layer.bn.momentum = momentum
    num_steps = 1 if is_conv and is_static else time_steps
    if is_conv:
        x = torch.randn(num_steps, batch_size, 3, *size).add(mean).to(dtype)
        if is_channels_last:
            x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (num_steps, batch_size))
        grad = torch.randn(time_steps, batch_size, chs, *size).to(dtype)
    else:
        x = torch.randn(time_steps, batch_size, size[0], 3).add(mean).to(dtype)
        grad = torch.randn(time_steps, batch_size, size[0], chs).to(dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr('timm_spikformer.kernels.lif._CHUNK', chunk)
        ours = run(copy.deepcopy(layer), x, time_steps, grad)
    assert_same(ours, run_plain(layer, x, time_steps, grad))


def image_like(time_steps: int = 3) -> Tensor:
    return torch.randn(time_steps, 4, 8, 8, 3).add(1.).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize('is_conv', [True, False], ids=['conv', 'linear'])
def test_is_one_pass(is_conv, calls):
    """The output of BN is not saved: only the layer's input and its output before BN are saved."""
    torch.manual_seed(0)
    layer, x = make_layer(is_conv), image_like()
    if not is_conv:
        x = torch.randn(3, 4, 64, 3)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        spikes = layer(x, 3) if is_conv else layer(x)
    assert len(calls) == 1 and spikes.mean() > 0.05
    assert sorted(n for n in sizes if n > 100) == ([135] if is_conv else []) + [x.numel(), spikes.numel()]


def test_bn_in_eval_mode_has_affine_gradients(calls):
    torch.manual_seed(0)
    layer = make_layer(True).eval()
    x, grad = image_like(), torch.randn(3, 4, 5, 8, 8)
    ours = run(copy.deepcopy(layer), x, 3, grad)
    assert len(calls) == 1 and ours[1]['bn.weight'].abs().min() > 0
    assert_same(ours, run_plain(layer, x, 3, grad))


def test_replaces_every_bn_of_a_model(model, images, calls):
    model.train()(images)
    assert calls == [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_statistics_are_exact_where_the_input_is_nearly_flat():
    """Values near 100 with a deviation of 0.001, as in a flat image: a sum of squares would cancel."""
    torch.manual_seed(0)
    x = torch.randn(40000, 8) * 1e-3 + 100.
    bn = nn.BatchNorm1d(8, momentum=1.)
    norm = _bn_statistics(bn, x)
    torch.testing.assert_close(norm.mean, x.double().mean(0).float(), rtol=1e-7, atol=0.)
    torch.testing.assert_close(bn.running_var, x.double().var(0).float(), rtol=1e-4, atol=0.)
    expected = (x.double().var(0, correction=0) + bn.eps).rsqrt().float()
    torch.testing.assert_close(norm.invstd, expected, rtol=1e-5, atol=0.)


def test_a_single_value_is_an_error():
    with pytest.raises(ValueError, match='more than 1 value'):
        make_layer(False)(torch.randn(1, 1, 1, 3))


def test_parameters_changed_before_the_backward_are_noticed():
    layer = make_layer(False)
    spikes = layer(torch.randn(2, 3, 4, 3))
    with torch.no_grad():
        layer.bn.weight.mul_(2.)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        spikes.sum().backward()


def test_train_forward_does_not_affect_earlier_backward():
    """The running statistics change in place; the kernel has copied what it needs."""
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
def test_double_backward(is_conv, training):
    """A gradient penalty on the input, with frozen layers, as int8-saved inputs do not support double backward."""
    torch.manual_seed(0)
    layer = make_layer(is_conv).double().train(training)
    next(layer.children()).weight.requires_grad_(False)
    x = (image_like() if is_conv else torch.randn(3, 4, 6, 3)).double()
    args = (3,) if is_conv else ()

    def penalty():
        x_ = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(layer(x_, *args).cos().sum(), x_, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), (x_, layer.bn.weight))

    given = penalty()
    with use_kernels('plain'):
        expected = penalty()
    for a, b in zip(given, expected):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_reasons():
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
