"""Folding of BN into the preceding layer with timm's `reparameterize_model`.

Most tests use float64, in which rounding changes no spike, so the folded and the original model give equal spikes.
"""
import io

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import calibrate, firing_rates
from spikingjelly.activation_based.monitor import OutputMonitor
from surgeries import LoRA
from timm.layers import freeze_batch_norm_2d
from timm.models import create_feature_extractor
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import FrozenBatchNorm2d

from timm_spikformer import LIF, SpikformerConfig, SpikformerForImageClassification, SpikformerMAE
from timm_spikformer.images import make_loader, read_splits, training_data_config
from timm_spikformer.layers import ConvBNLIF, LinearBNLIF

NORMS = ('BatchNorm1d', 'BatchNorm2d', 'SyncBatchNorm', 'FrozenBatchNorm2d')


def norms(model):
    return [name for name, m in model.named_modules() if type(m).__name__ in NORMS]


@torch.no_grad()
def spikes_of(model, x):
    """Return the output of the model and the spikes of each neuron layer."""
    monitor = OutputMonitor(model, LIF, lambda spikes: spikes.bool())
    out = model(x)
    monitor.remove_hooks()
    assert min(spikes.sum() for spikes in monitor.records) > 0
    return out, monitor.records


def assert_equal_spikes(model, folded, x):
    (out, spikes), (folded_out, folded_spikes) = (spikes_of(m, x) for m in (model, folded))
    assert all(torch.equal(a, b) for a, b in zip(spikes, folded_spikes, strict=True))
    torch.testing.assert_close(folded_out, out)


@pytest.fixture
def double(model, images):
    """A calibrated model in float64, with random weights and biases of BN, and images."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(m.weight, 0.8, 1.2)
            nn.init.uniform_(m.bias, 0., 0.5)
    calibrate(model, images)
    return model.double(), images.double()


@pytest.fixture
def small(images):
    """A V2 model that compiles quickly, in float64."""
    torch.manual_seed(0)
    return calibrate(timm.create_model('test_spikformer_v2', depth=1, num_classes=10, time_steps=2), images).double()


def test_folded_model_has_equal_spikes_and_no_bn(double):
    model, x = double
    folded = reparameterize_model(model)
    assert len(norms(model)) > 10 and not norms(folded) and not any(m.training for m in folded.modules())
    assert firing_rates(folded, x).keys() == firing_rates(model, x).keys()
    assert_equal_spikes(model, folded, x)
    folded.set_time_steps(5)
    model.set_time_steps(5)
    assert_equal_spikes(model, folded, x)


def test_original_model_is_unchanged(double):
    """The original can be trained further and folded again."""
    model, x = double
    before, weights = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    for m in list(model.modules()):  # timm folds a copy of the model; each unit also returns a copy
        if hasattr(m, 'fuse'):
            assert m.fuse() is not m
    reparameterize_model(model)
    assert torch.equal(model(x), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    calibrate(model, x.flip(3) * 2)
    assert not torch.equal(model(x), before)
    assert_equal_spikes(model, reparameterize_model(model), x)


def test_folding_twice_changes_nothing(double):
    model, x = double
    folded = reparameterize_model(model, inplace=True)
    assert folded is model
    before = folded(x)
    again = reparameterize_model(folded)
    assert again.state_dict().keys() == folded.state_dict().keys()
    assert torch.equal(again(x), before)


def test_folding_in_train_mode_uses_running_statistics(double):
    """timm's scripts fold before they call eval()."""
    model, x = double
    expected = reparameterize_model(model).state_dict()
    folded = reparameterize_model(model.train())
    assert all(torch.equal(v, expected[k]) for k, v in folded.state_dict().items())
    assert_equal_spikes(model.eval(), folded.eval(), x)


def test_folded_and_unfolded_checkpoints_are_incompatible(model):
    folded = reparameterize_model(model)
    folded.load_state_dict(folded.state_dict())
    with pytest.raises(RuntimeError, match='One of them has its BN folded'):
        folded.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match='One of them has its BN folded'):
        model.load_state_dict(folded.state_dict())


def freeze_as_in_torchvision(model):
    """Replace BatchNorm2d layers; timm also sets their `num_features`."""
    model = freeze_batch_norm_2d(model)
    for m in model.modules():
        if isinstance(m, FrozenBatchNorm2d):
            del m.num_features
    return model


@pytest.mark.parametrize(
    'convert', [nn.SyncBatchNorm.convert_sync_batchnorm, freeze_batch_norm_2d, freeze_as_in_torchvision])
def test_other_kinds_of_bn_fold(double, convert):
    model, x = double
    model = convert(model)
    assert any(type(m).__name__ in NORMS[2:] for m in model.modules())
    folded = reparameterize_model(model)
    assert not norms(folded)
    assert_equal_spikes(model, folded, x)


@pytest.mark.parametrize('stem', ['scs', 'sps'])
def test_masked_encoder(images, stem):
    """Patches are 8 to 1 pixels wide. The folded bias is added to visible pixels only; masked pixels stay 0."""
    torch.manual_seed(0)
    encoder = timm.create_model('test_spikformer_v2', stem=stem, time_steps=2)
    mae = SpikformerMAE(encoder, mask_ratio=0.5, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    mae, x = calibrate(mae, images).double(), images.double()
    folded = reparameterize_model(mae)
    assert norms(mae) and not norms(folded)
    _, ids = mae.make_mask(x)
    features, _ = mae.encoder.forward_tokens(x, ids)
    assert features.mean() > 0 and torch.equal(folded.encoder.forward_tokens(x, ids)[0], features)


def test_transformers(images):
    torch.manual_seed(0)
    model = SpikformerForImageClassification(SpikformerConfig.from_timm('test_spikformer_v2', time_steps=2))
    model, x = calibrate(model, images).double(), images.double()
    folded = reparameterize_model(model)
    assert norms(model) and not norms(folded)
    torch.testing.assert_close(folded(x).logits, model(x).logits)


# -- compiled and exported

@pytest.mark.slow
def test_compile_is_one_graph(small, images):
    folded = reparameterize_model(small)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(folded, fullgraph=True)(images.double()), small(images.double()))


def test_torchscript(double, tmp_path):
    model, x = double
    folded = reparameterize_model(model)
    torch.jit.script(folded).save(tmp_path / 'model.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(x), model(x))
    torch.testing.assert_close(torch.jit.trace(folded, (x,))(x), model(x))


def test_fx(double):
    model, x = double
    folded = reparameterize_model(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(folded)(x), model(x))
    features = create_feature_extractor(folded, {'blocks.0': 'tokens'})(x)['tokens']
    assert features.mean() > 0


def test_export(double):
    model, x = double
    batch = torch.export.Dim('batch', min=2, max=64)
    program = torch.export.export(reparameterize_model(model), (x[:4],), dynamic_shapes=({0: batch},))
    assert not [node for node in program.graph.nodes if 'batch_norm' in str(node.target)]
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.slow
def test_onnx(small, images):
    """The exporter's optimizations are disabled, because they fold BN as well."""
    small.float()
    batch = torch.export.Dim('batch', min=2, max=64)
    counts = []
    for exported in (small, reparameterize_model(small)):
        buffer = io.BytesIO()
        torch.onnx.export(
            exported, (images[:4],), dynamo=True, optimize=False, dynamic_shapes=({0: batch},), verbose=False,
        ).save(buffer)
        graph = onnx.load_from_string(buffer.getvalue()).graph
        counts.append(sum(node.op_type == 'BatchNormalization' for node in graph.node))
    assert counts == [len(norms(small)), 0]
    session = onnxruntime.InferenceSession(buffer.getvalue())
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(logits, small(images).detach().numpy(), rtol=1e-4, atol=1e-4)


# -- effects of rounding in float32

def test_folding_changes_few_spikes_of_trained_model():
    """Compare spikes on 250 images. A changed spike changes currents in later layers, and possibly further spikes."""
    name = 'spikformer_v2_2_64_patch4_32'
    model = timm.create_model(name, pretrained=True).eval()
    x, _ = next(iter(make_loader(read_splits()['test'], training_data_config(), 250)))
    (logits, spikes), (folded_logits, folded_spikes) = (spikes_of(m, x) for m in (model, reparameterize_model(model)))
    flipped = sum((a != b).sum().item() for a, b in zip(spikes, folded_spikes))
    assert flipped <= 1e-5 * sum(s.numel() for s in spikes)
    assert torch.equal(folded_logits.argmax(1), logits.argmax(1))


@pytest.mark.parametrize('layer, shape', [
    (ConvBNLIF(8, 16), (1, 32, 8, 16, 16)), (LinearBNLIF(64, 128), (1, 32, 16, 64)),
], ids=['convolution', 'linear'])
def test_folding_changes_spikes_only_near_threshold(layer, shape):
    """bfloat16 rounds coarsely enough to change spikes. With T = 1, a neuron fires if the current is at least 2."""
    torch.manual_seed(0)
    x = (torch.rand(shape) < 0.3).bfloat16()
    args = (1,) if isinstance(layer, ConvBNLIF) else ()
    nn.init.constant_(layer.bn.bias, 1.)
    layer.bn.momentum = None
    layer.train()(x.float(), *args)
    layer.eval().bfloat16()
    exact = []
    with torch.no_grad():
        flipped = layer(x, *args) != layer.fuse()(x, *args)
        layer.double().bn.register_forward_hook(lambda m, args, out: exact.append(out))
        layer(x.double(), *args)
    distance = (exact[0].view(flipped.shape) - 2.).abs()
    assert 0 < flipped.sum() < 0.02 * flipped.numel()
    assert distance[flipped].max() < 0.05 < 0.5 < distance.mean()


# -- layers that cannot be folded are unchanged

def _weight_norm(layer):
    parametrizations.weight_norm(layer.linear)


def _prune(layer):
    prune.random_unstructured(layer.linear, 'weight', 0.3)


def _other_norm(make):
    def change(layer):
        layer.bn = make(layer.bn.num_features)
    return change


class OwnBN(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) + 0.2


def _no_statistics(layer):
    layer.bn.running_mean = layer.bn.running_var = None


def _lora(layer):
    layer.linear = LoRA(layer.linear)


@pytest.mark.parametrize('change', [
    lambda layer: layer.bn.register_forward_hook(lambda m, args, out: out + 0.2),
    lambda layer: layer.bn.register_forward_pre_hook(lambda m, args: (args[0] * 1.1,)),
    lambda layer: layer.linear.register_forward_hook(lambda m, args, out: out * 1.1),
    _weight_norm,
    _prune,
    _lora,
    _no_statistics,
    _other_norm(OwnBN),
    _other_norm(lambda n: nn.GroupNorm(4, n)),
    _other_norm(lambda n: nn.LayerNorm(n)),
    _other_norm(lambda n: nn.BatchNorm1d(n, track_running_stats=False)),
    _other_norm(lambda n: nn.Sequential(nn.BatchNorm1d(n), nn.Identity())),
    lambda layer: setattr(layer, 'bn', nn.Identity()),
], ids=[
    'hook of BN', 'pre-hook of BN', 'hook of the layer', 'weight norm', 'pruned', 'LoRA', 'no statistics',
    'subclass of BN', 'group norm', 'layer norm', 'batch statistics', 'sequential', 'folded'])
def test_modified_unit_is_not_folded(double, change):
    model, x = double
    unit = model.blocks[0].mlp.fc1
    change(unit)
    model.double().eval()
    with torch.no_grad():
        expected = model(x)  # no_grad makes pruned weights leaf tensors, which deepcopy requires
    folded = reparameterize_model(model)
    left = folded.blocks[0].mlp.fc1
    assert type(left.bn) is type(unit.bn) and type(left.linear) is type(unit.linear)
    assert isinstance(folded.blocks[0].mlp.fc2.bn, nn.Identity) and isinstance(folded.blocks[1].mlp.fc1.bn, nn.Identity)
    torch.testing.assert_close(folded(x), expected)
