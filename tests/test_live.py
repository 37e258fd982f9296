"""General tests of an image model, on models whose neuron layers all fire; a silent model would pass trivially.

The `model` fixture calibrates BN on real images and checks the firing rates. Tests run with and without kernels, except
slow compilation and export tests, and tests in which no kernel runs.
"""
import copy
import io

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import assert_neurons_fire, calibrate
from timm.models import create_feature_extractor
from timm.utils import ModelEmaV3
from torch import nn

auto_alone = pytest.mark.parametrize('kernels', ['auto'], indirect=True)

pytestmark = pytest.mark.usefixtures('kernels')


def train_step(model, x):
    torch.manual_seed(1)
    model.train()
    model.zero_grad()
    target = torch.arange(len(x)) % 10
    nn.functional.cross_entropy(model(x).float(), target).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def statistics(model):
    return {k: v.clone() for k, v in model.state_dict().items() if 'running' in k or 'tracked' in k}


def test_deterministic(model, images):
    first = model(images)
    assert first.std() > 0 and torch.equal(model(images), first)


def test_batch_equals_single_images(model, images):
    batch = model(images)
    single = torch.cat([model(image[None]) for image in images])
    assert (batch - single).abs().max() <= 1e-5 * batch.std()


def test_all_parameters_have_gradients(model, images):
    for name, grad in train_step(model, images).items():
        if not name.endswith('linear.bias'):  # BN cancels this bias
            assert grad.abs().max() > 0, name
        assert grad.isfinite().all(), name


def test_grad_checkpointing_is_exact_and_updates_bn_once(model, images):
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    grads, other_grads = train_step(model, images), train_step(other, images)
    for name, grad in grads.items():
        assert torch.equal(other_grads[name], grad), name
    for (key, expected), value in zip(statistics(model).items(), statistics(other).values()):
        assert torch.equal(value, expected), key


def test_grad_checkpointing_saves_memory(model, images):
    def saved_bytes():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            model.train()(images)
        return sum(saved)

    plain = saved_bytes()
    model.set_grad_checkpointing()
    assert saved_bytes() < plain / 5


def test_deepcopy_and_ema_after_a_training_step(model, images):
    train_step(model, images)
    ema = ModelEmaV3(model, decay=0.5)
    clone = copy.deepcopy(model).eval()
    assert torch.equal(clone(images), model.eval()(images))
    ema.update(model)
    assert torch.equal(ema.module.eval()(images), model(images))


def test_training_steps_are_independent(model, images):
    """A training step on a smaller batch does not affect the next one."""
    other = copy.deepcopy(model)
    for m in other.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.momentum = 0.  # batch statistics only
    grads = train_step(other, images)
    train_step(other, images[:3])
    for name, grad in train_step(other, images).items():
        assert torch.equal(grad, grads[name]), name


@pytest.mark.parametrize('kwargs', [
    pytest.param({}, id='v2'), pytest.param(dict(stem='sps'), id='v1', marks=pytest.mark.slow)])
def test_compile_gives_one_graph_and_equal_spikes(images, kwargs):
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', depth=1, time_steps=2, **kwargs), images)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_features, fullgraph=True)
    with torch.no_grad():
        features = compiled(images)
        assert features.mean() > 0 and torch.equal(features, model.forward_features(images))


@auto_alone  # PyTorch's BN statistics in channels-last format are imprecise where these images are constant
@pytest.mark.parametrize('grad_checkpointing', [False, True])
def test_compile_trains(images, grad_checkpointing):
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', depth=1, num_classes=10, time_steps=2), images)
    other = copy.deepcopy(model)
    grads = train_step(model, images)
    other.set_grad_checkpointing(grad_checkpointing)
    torch._dynamo.reset()
    compiled_grads = train_step(torch.compile(other, fullgraph=True), images)
    compiled_grads = {name.removeprefix('_orig_mod.'): grad for name, grad in compiled_grads.items()}
    # rounding differs, which can change spikes, so directions are compared
    for name in ('head.fc.weight', 'blocks.0.mlp.fc2.bn.weight', 'stem.stages.3.contract.conv.weight'):
        assert torch.cosine_similarity(grads[name].flatten(), compiled_grads[name].flatten(), 0) > 0.99, name
    for key, value in statistics(other).items():
        torch.testing.assert_close(value, statistics(model)[key], rtol=1e-2, atol=1e-2, msg=key)


@auto_alone
def test_export(model, images):
    batch = torch.export.Dim('batch', min=2, max=64)
    program = torch.export.export(model, (images[:4],), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(images), model(images))


def test_torchscript(model, images, tmp_path):
    scripted = torch.jit.script(model)
    assert torch.equal(scripted(images), model(images))
    scripted.save(tmp_path / 'model.pt')
    assert torch.equal(torch.jit.load(tmp_path / 'model.pt')(images), model(images))


def test_torchscript_trace(model, images):
    traced = torch.jit.trace(model, (images,))
    assert torch.equal(traced(images), model(images))


def test_fx(model, images):
    graph = torch.fx.symbolic_trace(model)
    assert torch.equal(graph(images), model(images))
    assert torch.equal(torch.jit.script(graph)(images), model(images))
    features = create_feature_extractor(model, {'blocks.0': 'tokens'})(images)['tokens']
    assert features.shape == (4, 16, 16, 64) and features.mean() > 0


@auto_alone
def test_onnx(model, images):
    buffer = io.BytesIO()
    batch = torch.export.Dim('batch', min=2, max=64)
    torch.onnx.export(model, (images[:4],), dynamo=True, dynamic_shapes=({0: batch},), verbose=False).save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue())
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = model(images).detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits.argmax(1) == expected.argmax(1)).all()


@auto_alone
@pytest.mark.filterwarnings('ignore')
def test_older_onnx_exporter_supports_dynamic_batch_size(model, images, tmp_path):
    path = tmp_path / 'model.onnx'
    with torch.no_grad():
        torch.onnx.export(
            model, (images[:4],), path, dynamo=False, input_names=['x'], output_names=['y'],
            dynamic_axes={'x': {0: 'batch'}, 'y': {0: 'batch'}})
        session = onnxruntime.InferenceSession(path)
        for batch in (images[:1], images[:7]):
            (logits,) = session.run(None, {'x': batch.numpy()})
            np.testing.assert_allclose(logits, model(batch), rtol=1e-4, atol=1e-4)


@auto_alone
def test_trace_supports_dynamic_batch_size(model, images):
    traced = torch.jit.trace(model, (images[:4],))
    assert torch.allclose(traced(images[:7]), model(images[:7]), atol=1e-5)


def test_channels_last(model, images):
    expected = model(images)
    model = model.to(memory_format=torch.channels_last)
    logits = model(images.to(memory_format=torch.channels_last))
    assert (logits - expected).abs().max() <= 1e-5 * expected.std()


def test_channels_last_is_kept_through_the_stem(model, images):
    model = model.to(memory_format=torch.channels_last)
    strides = []
    model.stem.stages[1].register_forward_hook(lambda m, args, out: strides.append(out[0].stride()))
    model(images.to(memory_format=torch.channels_last))
    assert strides[0][1] == 1


@auto_alone
def test_bf16_autocast_trains(model, images):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    target = torch.arange(len(images)) % 10
    losses = []
    model.train()
    for _ in range(60):
        with torch.autocast('cpu', torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert_neurons_fire(model, images)


@auto_alone
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(model, images, dtype):
    model = model.to(dtype)
    assert_neurons_fire(model, images.to(dtype))
    assert model(images.to(dtype)).dtype == dtype
