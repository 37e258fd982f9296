import copy
import math

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from timm_spikformer import LIF, lif
from timm_spikformer.neurons import lif_plain, membrane_potentials

DTYPES = (torch.float32, torch.bfloat16)
BACK_ENDS = dict(eager=lif, plain=lif_plain)


def reference(x: Tensor, tau: float = 2.0, v_threshold: float = 1.0, alpha: float = 4.0) -> Tensor:
    """Return the spikes of spikingjelly's LIFNode, run step by step in PyTorch with a float32 membrane."""
    node = neuron.LIFNode(
        tau=tau, decay_input=True, v_threshold=v_threshold, v_reset=0., detach_reset=True, step_mode='s',
        surrogate_function=surrogate.Sigmoid(alpha=alpha))
    return torch.stack([node(current.float()) for current in x]).to(x.dtype)


def run(fn, x: Tensor, grad: Tensor, **kwargs):
    x = x.clone().requires_grad_()
    spikes = fn(x, **kwargs)
    spikes.backward(grad)
    return spikes.detach(), x.grad


@pytest.mark.parametrize('time_steps', [1, 2, 4, 7])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('kwargs', [{}, dict(v_threshold=0.5), dict(tau=3., alpha=2.)], ids=str)
@pytest.mark.parametrize('back_end', BACK_ENDS)
def test_matches_spikingjelly(time_steps, dtype, kwargs, back_end):
    torch.manual_seed(0)
    x = torch.randn(time_steps, 3, 5, 7).mul(2).to(dtype)
    grad = torch.randn_like(x)
    kwargs = dict(dict(tau=2., v_threshold=1., alpha=4.), **kwargs)
    expected, expected_grad = run(reference, x, grad, **kwargs)
    spikes, x_grad = run(BACK_ENDS[back_end], x, grad, **kwargs)
    assert 0.05 < expected.float().mean() < 0.5
    assert spikes.dtype == dtype and torch.equal(spikes, expected)
    # bfloat16 gradients are rounded from float32, so the last bit may differ
    rtol = 1e-6 if dtype == torch.float32 else 2 ** -7
    torch.testing.assert_close(x_grad, expected_grad, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize('time_steps', [1, 3])
def test_gradient_matches_smooth_surrogate(time_steps):
    """In the smooth form, the sigmoid replaces each spike, and the reset after a spike is constant."""
    torch.manual_seed(0)
    x = torch.randn(time_steps, 11, dtype=torch.float64).mul(2).requires_grad_()
    with torch.no_grad():
        not_reset = 1 - lif(x)

    def smooth(x: Tensor) -> Tensor:
        v, out = torch.zeros_like(x[0]), []
        for t, current in enumerate(x):
            h = v + (current - v) / 2
            out.append(torch.sigmoid(4 * (h - 1)))
            v = h * not_reset[t]
        return torch.stack(out)

    class Neuron(torch.autograd.Function):
        """Output of the smooth form, with the gradient of the neuron."""
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return smooth(x)

        @staticmethod
        def backward(ctx, grad):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                return torch.autograd.grad(lif(x), x, grad)

    assert 0 < not_reset.mean() < 1
    assert torch.autograd.gradcheck(smooth, (x,))
    assert torch.autograd.gradcheck(Neuron.apply, (x,))


def test_membrane_is_float32_for_half_input_and_under_autocast():
    # h = 0.5039, 0.7598, 0.9971, 0.9985: bfloat16, in steps of 0.0039, would round the last one up to the threshold
    x = torch.tensor([1.0078125, 1.015625, 1.234375, 1.0], dtype=torch.bfloat16)[:, None]
    assert not lif(x).any() and not lif_plain(x, 2., 1., 4.).any()
    with torch.autocast('cpu', torch.bfloat16):
        assert not lif(x).any() and lif(x).dtype == torch.bfloat16
        assert lif(x.float()).dtype == torch.float32


@pytest.mark.parametrize('back_end', BACK_ENDS)
def test_spikes_at_the_threshold(back_end):
    assert BACK_ENDS[back_end](torch.tensor([[2.0, 1.9999]]), 2., 1., 4.).tolist() == [[1., 0.]]


def test_keeps_memory_format():
    x = torch.randn(2, 3, 4, 5, 6).mul(2)
    channels_last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    spikes = lif(channels_last)
    assert spikes.stride() == channels_last.stride()
    assert spikes.any() and torch.equal(spikes, lif(x))


def test_expanded_input():
    x = torch.randn(1, 3, 5).mul(2)
    grad = torch.randn(4, 3, 5)
    spikes, x_grad = run(lambda x: lif(x.expand(4, -1, -1)), x, grad)
    expected, expected_grad = run(lambda x: lif(x.repeat(4, 1, 1)), x, grad)
    assert spikes.any() and torch.equal(spikes, expected)
    torch.testing.assert_close(x_grad, expected_grad)


def test_saves_only_its_input():
    saved = []
    x = torch.randn(4, 8).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lif(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_no_state():
    node = LIF()
    assert not node.state_dict()
    x = torch.randn(2, 9).mul(2)
    first = node(x)
    assert first.any() and torch.equal(node(x), first)
    assert torch.equal(copy.deepcopy(node)(x), first)


def test_compilers_and_exporters_give_equal_spikes():
    node = LIF()
    x = torch.randn(4, 3, 8).mul(2)
    spikes = node(x)
    assert spikes.any()
    assert torch.equal(torch.jit.script(node)(x), spikes)
    assert torch.equal(torch.jit.trace(node, (x,))(x), spikes)
    assert torch.equal(torch.export.export(node, (x,)).module()(x), spikes)
    assert torch.equal(torch.compile(node, fullgraph=True)(x), spikes)
    graph = torch.fx.symbolic_trace(node)
    assert torch.equal(graph(x), spikes) and torch.equal(torch.jit.script(graph)(x), spikes)


@pytest.mark.parametrize('has_grad', [True, False])
def test_export_without_gradients_has_no_surrogate(has_grad):
    """A graph exported with gradients can be trained; a graph exported under no_grad is for inference only."""
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), LIF())
    with torch.set_grad_enabled(has_grad):
        program = torch.export.export(layer, (torch.randn(4, 3, 8),))
    assert any('sigmoid' in str(node.target) for node in program.graph.nodes) == has_grad


def test_scripted_neuron_has_gradients():
    x = torch.randn(4, 3, 8).mul(2)
    scripted = torch.jit.script(LIF())
    with torch.no_grad():
        spikes = scripted(x)
    x.requires_grad_()
    for _ in range(3):  # TorchScript profiles the first runs and specializes later ones
        out = scripted(x)
    out.sum().backward()
    assert spikes.any() and torch.equal(out.detach(), spikes) and x.grad.abs().min() > 0


@pytest.mark.parametrize('name, value, expected', [
    *[('tau', value, 'greater than 1 and at most inf') for value in (1, 0.5, 0., -1., math.nan, None)],
    *[('v_threshold', value, 'greater than 0 and at most inf') for value in (0., -1., math.nan, '1')],
    *[('alpha', value, 'greater than 0 and finite') for value in (0, -4., math.inf, math.nan)],
])
def test_constants_out_of_range(name, value, expected):
    functions = [LIF, *(lambda f=f, **kwargs: f(torch.rand(2, 3), **kwargs) for f in (lif, lif_plain))]
    if name != 'alpha':
        functions.append(lambda **kwargs: membrane_potentials(torch.rand(2, 3), **kwargs))
    for function in functions:
        with pytest.raises(ValueError, match=f'{name} must be {expected}, got {value!r}'):
            function(**{name: value})


def test_infinite_constants_and_tensors_are_accepted():
    x = torch.full((3, 2), 5.)
    assert not lif(x, tau=math.inf).any() and not LIF(v_threshold=math.inf)(x).any()
    tau = torch.tensor(2., requires_grad=True)
    spikes = lif(x, tau=tau)
    spikes.sum().backward()
    assert torch.equal(spikes.detach(), lif(x)) and tau.grad != 0
    assert LIF(tau=torch.tensor(3.)).tau == 3.
    with pytest.raises(ValueError, match='tau must be greater than 1 and at most inf, got 0.5'):
        LIF(tau=torch.tensor(0.5))


@pytest.mark.parametrize('shape', [(), (0, 3)])
def test_currents_without_time_steps(shape):
    for function in (lif, membrane_potentials):
        with pytest.raises(ValueError, match='at least one time step'):
            function(torch.rand(shape))
