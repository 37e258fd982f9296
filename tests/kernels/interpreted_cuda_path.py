"""Tests of the CUDA path on a CPU: spikingjelly's Triton kernels run in Triton's interpreter.

`test_cuda_path.py` runs these tests in a process of their own, with TRITON_INTERPRET=1, which Triton reads when it is
imported. CPU tensors stand for those on CUDA: see `on_cuda`.
"""
import contextlib
import functools
import os
from typing import Any, Dict, List, Tuple

import pytest
import spikingjelly._ops.lif as sj_lif
import timm
import torch
from conftest import assert_neurons_fire
from spikingjelly._ops.lif import cpu as sj_cpu
from spikingjelly._ops.lif import triton as sj_triton
from spikingjelly._ops.lif.autograd import _register_ops
from torch import Tensor, nn

from timm_spikformer import LIF, SpikformerMAE, explain_kernels, lif, predict_anytime, use_kernels
from timm_spikformer.kernels import rules
from timm_spikformer.kernels.lif import LIFConstants, lif_cuda
from timm_spikformer.kernels.products import product, to_int8_if_exact
from timm_spikformer.neurons import StatefulInference, lif_plain, membrane_potentials

assert os.environ.get('TRITON_INTERPRET') == '1', 'Run tests/kernels/test_cuda_path.py instead.'

LAUNCHES: List[str] = []  # 'forward' or 'backward' for each kernel that was run


class _TorchWithoutCUDA:
    """torch, as spikingjelly's module of kernels sees it: without the check for CUDA and without a current device."""

    class cuda:
        device = staticmethod(contextlib.nullcontext)

    @staticmethod
    def _check(condition: bool, message: Any = None) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _register_kernels() -> None:
    """Register the kernels as operators for CPU tensors, with spikingjelly's own autograd formula."""
    for name in ('forward', 'backward'):
        kernel = getattr(sj_triton, f'_{name}_impl')

        @functools.wraps(getattr(sj_cpu, f'_{name}_impl'))  # for its schema
        def launch(*args, _name=name, _kernel=kernel):
            LAUNCHES.append(_name)
            return _kernel(*args)

        torch.library.custom_op(f'interpreted_lif::{name}', launch, mutates_args=())
    _register_ops('interpreted_lif::forward', 'interpreted_lif::backward')


_register_kernels()


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the CUDA back end for CPU tensors, with the interpreted kernels as its operators."""
    monkeypatch.setattr(sj_triton, 'torch', _TorchWithoutCUDA())
    monkeypatch.setattr(sj_lif, '_forward', torch.ops.interpreted_lif.forward.default)
    monkeypatch.setitem(rules.BACK_ENDS, 'cpu', 'cuda')
    LAUNCHES.clear()


LAYOUTS = {
    'contiguous': lambda: torch.randn(4, 2, 5, 8),
    'channels last': lambda: torch.randn(8, 6, 5, 5).to(memory_format=torch.channels_last).unflatten(0, (4, 2)),
    'expanded over time': lambda: torch.randn(1, 2, 6, 5).expand(4, -1, -1, -1),
    'channels last, expanded': lambda: torch.randn(
        2, 6, 5, 5).to(memory_format=torch.channels_last).unsqueeze(0).expand(4, -1, -1, -1, -1),
    'transposed': lambda: torch.randn(4, 2, 8, 5).transpose(2, 3),
    'batch first': lambda: torch.randn(2, 4, 5, 8).transpose(0, 1),
    'part of a larger tensor': lambda: torch.randn(5, 2, 5, 9)[1:, :, :, ::2],
}
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('layout, constants', [
    *((layout, (2., 1., 4.)) for layout in LAYOUTS),
    ('contiguous', (3., 0.5, 2.)),
    ('expanded over time', (3., 1., 4.)),
], ids=str)
def test_kernels_equal_the_equation(layout, dtype, constants):
    torch.manual_seed(0)
    data = LAYOUTS[layout]().mul(2).to(dtype)
    grad = torch.randn(data.shape).to(dtype)
    x, y = (data.detach().requires_grad_() for _ in range(2))
    spikes, expected = lif(x, *constants), lif_plain(y, *constants)
    spikes.backward(grad)
    expected.backward(grad)
    assert LAUNCHES == ['forward', 'backward']
    assert 0.05 < expected.float().mean() < 0.5
    assert spikes.dtype == x.grad.dtype == dtype and torch.equal(spikes, expected)
    torch.testing.assert_close(x.grad, y.grad, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    order = sorted(range(1, x.ndim), key=lambda d: -x.stride(d))
    assert spikes.permute(0, *order).is_contiguous() or spikes.stride() == x.stride()

    assert torch.equal(to_int8_if_exact(spikes[1:]).to(dtype), expected[1:])

    spikes, membrane = lif_cuda(data, LIFConstants(*constants), torch.zeros(data.shape[1:]))
    assert torch.equal(spikes, expected)
    assert membrane.dtype == torch.float32
    assert torch.equal(membrane, membrane_potentials(data, *constants[:2])[1][-1])


RAMP = torch.linspace(0., 3., 12).view(3, 4)


@pytest.mark.parametrize('x, kwargs', [
    (RAMP.double(), {}),
    (RAMP.flatten(), {}),
    (RAMP[:, :0], {}),
    (RAMP, dict(tau=torch.inf)),
    (RAMP, dict(v_threshold=torch.inf)),
    (RAMP, dict(alpha=1e39)),
], ids=['float64', 'one dimension', 'empty', 'tau', 'v_threshold', 'alpha'])
def test_unsupported_inputs_use_lif_plain(x, kwargs):
    x = x.clone().requires_grad_()
    spikes = lif(x, **kwargs)
    spikes.sum().backward()
    assert not LAUNCHES
    assert spikes.dtype == x.dtype and torch.equal(spikes, lif_plain(x, **kwargs)) and x.grad is not None


@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
def test_a_current_that_is_not_finite_gives_nan(bad, dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 40).mul(2).to(dtype)
    for t in range(3):
        x[t, 7 * t] = bad
    expected = lif_plain(x)
    spikes = lif(x)
    assert expected.isnan().all(0).sum() == expected.isnan().any(0).sum() == 3 and expected.nansum() > 0
    torch.testing.assert_close(spikes, expected, rtol=0., atol=0., equal_nan=True)
    assert LAUNCHES == ['forward']

    constants = LIFConstants(2., 1., 4.)
    _, membrane = lif_cuda(x[:1], constants)
    second, _ = lif_cuda(x[1:], constants, membrane)
    assert torch.equal(second.isnan().all(0), expected.isnan().all(0))


def test_a_pixel_that_is_nan_shows_in_the_logits_of_its_image():
    model, x = make('V2').eval(), images()
    with torch.no_grad():
        logits = model(x)
        x[1, 0, 0, 0] = torch.nan
        given = model(x)
    assert torch.equal(given[0], logits[0]) and given[1].isnan().all()


def test_double_backward():
    torch.manual_seed(0)
    x = torch.randn(3, 20).mul(2)

    def penalty(neuron):
        x_ = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(neuron(x_).cos().sum(), x_, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x_)[0]

    expected = penalty(lif_plain)
    assert expected.abs().max() > 0
    torch.testing.assert_close(penalty(lif), expected)


def test_a_batch_of_gradients():
    torch.manual_seed(0)
    x = torch.randn(3, 4).mul(2)
    given, expected = (
        torch.autograd.functional.jacobian(neuron, x, vectorize=True) for neuron in (lif, lif_plain))
    assert expected.abs().max() > 0
    torch.testing.assert_close(given, expected)


MODELS = {
    'V2': dict(stem='scs', stem_strides=(2, 2, 1, 1), time_steps=2),
    'V1': dict(stem='sps', stem_strides=(2, 1, 1, 2), time_steps=2),
}


def make(name: str) -> nn.Module:
    """Return a model of 16 tokens for `images()`, small as the interpreter is slow; all neuron layers fire."""
    torch.manual_seed(0)
    model = timm.create_model(
        'test_spikformer_v2', num_classes=5, patch_size=4, embed_dim=16, depth=1, mlp_ratio=2., **MODELS[name])
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(m.bias, 1.)
            nn.init.constant_(m.weight, 1.5)
    return model


def num_neurons(model: nn.Module) -> int:
    return sum(type(m) is LIF for m in model.modules())


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def step(model: nn.Module, *args: Any, **kwargs: Any) -> Tuple[Any, Dict[str, Tensor]]:
    """Return output and gradients of a training step."""
    model.zero_grad()
    LAUNCHES.clear()
    out = model(*args, **kwargs)
    (out if isinstance(out, Tensor) else out.loss).square().sum().backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_grads_close(grads: Dict[str, Tensor], expected: Dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        if not name.endswith('linear.bias'):  # it is 0, as BN follows
            assert grad.norm() > 0, name
            assert (grads[name] - grad).norm() <= tolerance * grad.norm(), name


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('name', MODELS)
def test_training_step(name, memory_format):
    model, x = make(name).to(memory_format=memory_format), images().contiguous(memory_format=memory_format)
    with use_kernels('plain'):
        assert_neurons_fire(model, x)
        expected, expected_grads = step(model, x)
        assert not LAUNCHES
    logits, grads = step(model, x)
    assert LAUNCHES == ['forward'] * num_neurons(model) + ['backward'] * num_neurons(model)
    assert torch.equal(logits, expected)
    assert_grads_close(grads, expected_grads)


@pytest.mark.parametrize('name', MODELS)
def test_inference_mode(name):
    model, x = make(name).eval(), images()
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        assert torch.equal(predict_anytime(model, x, 1.).steps, torch.tensor([2, 2]))
        model.set_grad_checkpointing()
        assert torch.equal(model(x), expected)
        spikes = lif(torch.randn(2, 3, 8).mul(2)).flatten(0, 1)
    with pytest.raises(RuntimeError, match='Inference tensors cannot be saved for backward'):
        product(nn.Linear(8, 4), spikes)  # the same error as nn.Linear's


def test_training_step_under_autocast():
    model, x = make('V2'), images()
    with torch.autocast('cpu', torch.bfloat16):
        with use_kernels('plain'):
            expected, expected_grads = step(model, x)
        logits, grads = step(model, x)
    assert LAUNCHES and logits.dtype == expected.dtype and torch.equal(logits, expected)
    assert_grads_close(grads, expected_grads, tolerance=0.1)


# layers whose input is the direct output of a neuron; other inputs are images, sums or pooled spikes
NUM_SAVED_AS_BYTES = {'V2': 4 * 2 + 2, 'V1': 2 + 2}


@pytest.mark.parametrize('name', MODELS)
def test_spikes_are_saved_as_bytes(name):
    model, saved = make(name), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(images())
    saved_bytes = [t for t in saved if t.dtype == torch.int8]
    assert len(saved_bytes) == NUM_SAVED_AS_BYTES[name]
    assert all(t.any() for t in saved_bytes)


@pytest.mark.parametrize('name, context', [
    ('V2', contextlib.nullcontext), ('V1', torch.autograd.graph.save_on_cpu),
])
def test_gradient_checkpointing(name, context):
    model, x = make(name), images()
    _, expected = step(model, x)
    model.set_grad_checkpointing()
    with context():
        _, grads = step(model, x)
    assert_grads_close(grads, expected, tolerance=1e-6)


@pytest.mark.parametrize('name', MODELS)
def test_masked_autoencoder_step(name):
    torch.manual_seed(0)
    model = SpikformerMAE(
        make(name), mask_ratio=0.5, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    x, noise = images(), torch.rand(2, 16)
    with use_kernels('plain'):
        expected, expected_grads = step(model, x, noise=noise)
    out, grads = step(model, x, noise=noise)
    assert LAUNCHES
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.reconstruction, expected.reconstruction)
    assert_grads_close(grads, expected_grads)


@torch.no_grad()
def test_predict_anytime():
    x = images()
    model = make('V2')
    for bn in model.modules():
        if isinstance(bn, nn.modules.batchnorm._BatchNorm):
            bn.momentum = None
    with use_kernels('plain'):
        model(x)
        assert_neurons_fire(model.eval(), x)
        steps = model.forward_steps(x)
    LAUNCHES.clear()
    everything = predict_anytime(model, x, 1.)
    assert LAUNCHES == ['forward'] * 2 * num_neurons(model)
    torch.testing.assert_close(everything.logits, steps[-1])
    confidence = steps.softmax(-1).amax(-1)[0]
    out = predict_anytime(model, x, confidence.mean().item())
    assert out.steps.tolist()[confidence.argmax()] == 1 and out.steps.max() > 1
    torch.testing.assert_close(out.logits, steps[out.steps - 1, torch.arange(2)])
    with use_kernels('plain'):
        assert torch.equal(predict_anytime(model, x, 1.).logits, everything.logits)

    events = torch.stack([x, x * 0.5, x * 1.5], 1)
    stateful = StatefulInference(model)
    logits = [stateful(part) for part in events.split((2, 1), dim=1)]
    torch.testing.assert_close(logits[-1], model(events))


def test_explain_kernels():
    groups = {(group.module, group.group): (group.runs_as, group.reason) for group in explain_kernels(make('V2'))}
    assert groups['blocks.0.attn', 'attn_lif'] == ('kernel', '')
    assert groups['blocks.0.mlp.fc2', 'linear: input saved as int8'] == ('kernel', '')
    runs_as, reason = groups['blocks.0.mlp.fc2', 'bn + lif: one pass']
    assert runs_as == 'modules' and 'the kernel is for CPUs' in reason
