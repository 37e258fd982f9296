"""torch.func transforms, repeated and vectorized backward passes, empty batches, NaN and infinity."""
import contextlib
import copy

import pytest
import torch
from test_surgery import make_model
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from timm_spikformer import LIF, lif, record_membrane_potentials, use_kernels
from timm_spikformer.neurons import lif_plain

pytestmark = pytest.mark.usefixtures('kernels')


@pytest.fixture
def double(model, images):
    model = model.double()
    model.set_time_steps(2)
    return model, images[:3].double()


def loss_of(model, x):
    return model(x).square().sum()


def test_vmap_over_images(double):
    model, x = double
    assert torch.allclose(vmap(lambda image: model(image[None])[0])(x), model(x))


def test_per_sample_gradients(double):
    model, x = double
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, image):
        return functional_call(model, params, image[None]).square().sum()

    per_image = vmap(grad(loss), (None, 0))(params, x)
    loss_of(model, x).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(per_image[name].sum(0), p.grad, rtol=1e-6, atol=1e-9 * p.grad.abs().max().item())
    assert per_image['head.fc.weight'].abs().max() > 0


def test_ensemble(double):
    model, x = double
    models = [model, copy.deepcopy(model)]
    with torch.no_grad():
        models[1].head.fc.weight.mul_(2)
    params, buffers = stack_module_state(models)

    def call(params, buffers, x):
        return functional_call(model, (params, buffers), x)

    out = vmap(call, (0, 0, None))(params, buffers, x)
    assert torch.allclose(out, torch.stack([m(x) for m in models]))


def test_jvp_is_transpose_of_backward():
    torch.manual_seed(0)
    x, tangent, cotangent = torch.randn(3, 3, 40, dtype=torch.float64).mul(2).unbind(0)
    spikes, out_tangent = jvp(lif, (x,), (tangent,))
    x.requires_grad_()
    (x_grad,) = torch.autograd.grad(lif(x), x, cotangent)
    assert torch.equal(spikes, lif(x)) and spikes.any()
    torch.testing.assert_close((out_tangent * cotangent).sum(), (x_grad * tangent).sum())


@pytest.mark.parametrize('vectorize', [False, True])
def test_jacobian(double, vectorize):
    model, x = double
    x = x[:1]
    rows = []
    for i in range(10):
        x_ = x.clone().requires_grad_()
        rows.append(torch.autograd.grad(model(x_)[0, i], x_)[0])
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x)[0], x, vectorize=vectorize)
    assert jacobian.abs().max() > 0
    torch.testing.assert_close(jacobian, torch.stack(rows), rtol=1e-6, atol=1e-12)


def test_checkpointed_graph_supports_repeated_backward(double):
    model, x = double
    model.train().set_grad_checkpointing()
    loss = loss_of(model, x)
    params = list(model.parameters())
    first = torch.autograd.grad(loss, params, retain_graph=True)
    statistics = copy.deepcopy(dict(model.named_buffers()))
    second = torch.autograd.grad(loss, params)
    for a, b in zip(first, second):
        assert torch.equal(a, b)
    assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())


def test_recomputation_uses_kernel_mode_of_forward(double):
    model, x = double
    model.train().set_grad_checkpointing()
    with use_kernels('plain'):
        loss = loss_of(model, x)
    loss.backward()
    assert model.head.fc.weight.grad.abs().max() > 0


@pytest.mark.parametrize('when', ['forward', 'backward'])
@pytest.mark.parametrize('observe', ['membranes', 'global hook', 'hook', 'flops'])
def test_recomputation_uses_same_kernels_as_forward(double, observe, when):
    model, x = double
    model.train().set_grad_checkpointing()
    expected = torch.autograd.grad(loss_of(model, x), model.stem.stages[0].parameters())

    @contextlib.contextmanager
    def observed():
        if observe == 'membranes':
            with record_membrane_potentials(model):
                yield
        elif observe == 'flops':
            with FlopCounterMode(display=False):
                yield
        else:
            bn = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
            register = register_module_forward_hook if observe == 'global hook' else bn.register_forward_hook
            handle = register(lambda m, args, out: None)
            yield
            handle.remove()

    if when == 'forward':
        with observed():
            loss = loss_of(model, x)
        grads = torch.autograd.grad(loss, model.stem.stages[0].parameters())
    else:
        loss = loss_of(model, x)
        with observed():
            grads = torch.autograd.grad(loss, model.stem.stages[0].parameters())
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b)
    assert expected[0].abs().max() > 0


def test_empty_batch(model, images):
    assert model(images[:0]).shape == (0, 10)
    assert model.forward_steps(images[:0]).shape == (4, 0, 10)
    assert model.forward_features(images[:0]).shape == (0, 64, 4, 4)
    model(images[:0].clone().requires_grad_()).sum().backward()
    model.train()(images[:0]).sum().backward()
    assert model.head.fc.weight.grad.abs().max() == 0


def test_zero_time_steps_raise(model, images):
    with pytest.raises(ValueError, match='at least one time step'):
        model(images[:, None][:, :0])
    for empty in (torch.empty(0, 3), torch.tensor(1.)):
        with pytest.raises(ValueError, match=r'currents \[T, ...\] of at least one time step'):
            lif(empty)


# -- NaN and infinity

@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('time_steps', [1, 3])
def test_nonfinite_current_gives_nan(value, time_steps):
    x = torch.ones(time_steps, 4)
    x[0, 1] = value
    spikes = lif(x)
    assert spikes[:, 1].isnan().all() and spikes[:, [0, 2, 3]].isfinite().all()
    assert torch.equal(spikes.nan_to_num(7.), lif_plain(x).nan_to_num(7.))
    assert torch.equal(torch.jit.script(LIF())(x).nan_to_num(7.), spikes.nan_to_num(7.))


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_nonfinite_pixel_affects_only_its_image(model, images, value):
    bad = images[:4].clone()
    bad[1, 0, 40, 9] = value
    with torch.no_grad():
        logits, expected = model(bad), model(images[:4])
    assert logits[1].isnan().all()
    keep = torch.tensor([0, 2, 3])
    torch.testing.assert_close(logits[keep], expected[keep])
    assert model.train()(bad).isnan().any(1).sum() >= 1


@pytest.mark.parametrize('name', ['down.conv.weight', 'proj.conv.weight', 'bn.bias', 'fc2.linear.weight', 'fc.weight'])
def test_nan_weight_gives_nan_logits(model, images, name):
    found = [p for n, p in model.named_parameters() if n.endswith(name)]
    if not found:
        pytest.skip('the model has no such weight')
    with torch.no_grad():
        found[0].view(-1)[0] = torch.nan
        assert model(images[:2]).isnan().any(1).all()


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('is_masked', [False, True])
def test_nan_pixel_gives_nan_pretraining_loss(training, is_masked):
    mae = make_model('scs', is_masked=True).train(training)
    images = torch.randn(4, 2, 16, 16)
    noise = torch.arange(16.).expand(4, -1)  # the last patches are masked
    bad = images.clone()
    bad[0, 0, 14 if is_masked else 1, 14 if is_masked else 1] = torch.nan
    assert mae(images, noise=noise).loss.isfinite() and mae(bad, noise=noise).loss.isnan()
