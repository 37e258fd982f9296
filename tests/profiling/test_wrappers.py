"""Profiles of models that contain a Spikformer, and of models with other or changed layers."""
import copy

import pytest
import timm
import torch
from conftest import calibrate
from torch import nn

from timm_spikformer import SpikformerForImageClassification
from timm_spikformer.hf.configuration_spikformer import SpikformerConfig
from timm_spikformer.profiling import Conventions, profile


def test_transformers_and_wrappers(model, images):
    result = profile(model, images)
    config = SpikformerConfig.from_timm(model)
    hf = SpikformerForImageClassification(config).eval()
    hf.timm_model.load_state_dict(model.state_dict())
    labels = torch.arange(16) % 10
    wrapped = profile(hf, [{'pixel_values': images, 'labels': labels}])
    assert wrapped.totals == result.totals and wrapped.accuracy is not None
    assert profile(nn.Sequential(model), images).totals == result.totals
    assert profile(torch.compile(model), images).totals == result.totals
    features = timm.create_model('test_spikformer_v2', features_only=True, time_steps=1).train()
    assert profile(features, images).layers[-1].name == 'blocks.1.mlp.fc2'


class Wrapper(nn.Module):
    """A model that calls `function` with a Spikformer and the input."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        return self.function(self.model, x)


@pytest.mark.parametrize('function', [
    lambda m, x: torch.cat([m(part) for part in x.split(5)]),  # also the chunks of a batch
    lambda m, x: {'loss': 0., 'logits': m(x).double()},
    lambda m, x: m.forward_steps(x)[-1],
])
def test_predictions_of_wrappers(model, images, function):
    y = model(images).argmax(1).roll(1)
    expected, result = (profile(m, [(images, y)]) for m in (model, Wrapper(model, function)))
    assert result.accuracy == expected.accuracy and result.totals.acs == pytest.approx(expected.totals.acs)
    for step, other in zip(result.steps, expected.steps):
        assert step.agreement == other.agreement and step.accuracy == other.accuracy
        assert step.confidence == pytest.approx(other.confidence, rel=1e-5)


@pytest.mark.parametrize('function', [
    lambda m, x: m(x).flip(1),  # other classes
    lambda m, x: m(x).flip(0),  # other images
    lambda m, x: m(x).softmax(1),
    lambda m, x: (m(x) + m(x.flip(3))) / 2,
    lambda m, x: m.forward_features(x),
])
def test_other_outputs_have_no_predictions(model, images, function, caplog):
    wrapper, y = Wrapper(model, function), torch.arange(16) % 10
    with pytest.raises(ValueError, match='The output of the Wrapper differs from the logits of its Spikformer'):
        profile(wrapper, [(images, y)])
    assert not caplog.text
    for data in (images, [(images, y)]):
        step = profile(wrapper, data, accuracy=False).steps[-1]
        assert (step.agreement, step.confidence, step.accuracy) == (None, None, None) and step.energy_mj > 0
    assert 'no agreement, confidence and accuracy' in caplog.text


@pytest.mark.parametrize('function, message', [
    (lambda m, x: x, 'did not run stem.stages.0'),
    (lambda m, x: m.stem.stages[0](x[None], 4), 'did not run stem.stages.1'),
    (lambda m, x: m(x[:, None].expand(-1, 8, -1, -1, -1)), '8 time steps of sequences, but the data are images with 4'),
    (lambda m, x: m(x[:, None].expand(-1, 4, -1, -1, -1)), '4 time steps of sequences, but the data are images with 4'),
])
def test_wrappers_that_cannot_be_profiled(model, images, function, message):
    with pytest.raises(ValueError, match=message):
        profile(Wrapper(model, function), images)


@pytest.mark.parametrize('config', [
    dict(target_modules=['linear'], modules_to_save=['fc']),
    dict(target_modules=['conv']),
    dict(target_modules=['fc'], modules_to_save=['bn']),
])
def test_adapters_must_be_merged(images, config):
    """The second product of an adapter has real-valued inputs, and frozen copies of modules are no parameters."""
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=10), images)
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, **config)).eval()
    with pytest.raises(ValueError, match=r'cannot be counted: .*got peft\..*profile model.merge_and_unload\(\)'):
        profile(tuned, images)
    merged = profile(tuned.merge_and_unload(), images)
    assert merged.totals == profile(model, images).totals  # the initial adapter is zero
    assert merged.totals.parameters == sum(p.numel() for p in model.parameters())


def test_inputs_of_spiking_layers_must_be_spikes(model, images):
    """Negative or fractional operations are impossible, wherever the real values come from."""
    def add_adapter(m):
        a, b = torch.randn(m.in_features, 2), torch.randn(2, m.out_features)
        return m.register_forward_hook(lambda m, args, out: out + args[0] @ a @ b)

    block = model.blocks[0]
    for add, message in (
            (lambda: add_adapter(block.mlp.fc1.linear), 'blocks.0.mlp.fc1 must consist of spikes'),
            (lambda: block.mlp.fc2.linear.register_forward_pre_hook(lambda m, args: args[0] * 0.9), '0 to 0.9'),
            (lambda: block.mlp.fc1.lif.register_forward_hook(lambda m, args, out: -out), 'from -1 to -0'),
            (lambda: block.attn.qkv.lif.register_forward_hook(lambda m, args, out: out * 0.7), 'blocks.0.attn must'),
    ):
        handle = add()
        with pytest.raises(ValueError, match=message):
            profile(model, images, conventions=Conventions(fan_out='exact'))
        handle.remove()
    assert profile(model, images).totals.acs > 0


def test_scaled_spikes_count_as_spikes(images):
    """In train mode, dropout and stochastic depth scale spikes, which are not more spikes."""
    torch.manual_seed(0)
    model = timm.create_model('test_spikformer_v2', proj_drop_rate=0.3, drop_path_rate=0.3).train()
    result = profile(model, images, conventions=Conventions(fan_out='exact'))
    for layer in result.layers:
        total = 16 * sum(layer.acs)
        assert total == pytest.approx(round(total), abs=1e-6), layer.name
    assert set(result.layer('blocks.1.attn.qkv').values) <= set(range(10))


def test_quantized_and_missing_layers(model, images):
    with pytest.warns(DeprecationWarning):
        quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    with pytest.raises(ValueError, match='blocks.0.attn.qkv cannot be counted: .*profile it before quantization'):
        profile(quantized, images)
    model.head.fc = nn.Identity()
    with pytest.raises(ValueError, match=r'head.fc cannot be counted: .*call reset_classifier\(0\)'):
        profile(model, images)
