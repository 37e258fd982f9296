"""Firing rates, accuracies and outputs of profiles; models, data and arguments that cannot be profiled."""
import copy
import csv
import dataclasses
import gc
import io
import json
import resource

import numpy as np
import pytest
import timm
import torch
from conftest import calibrate, firing_rates
from timm.utils import reparameterize_model
from torch import nn

from timm_spikformer import SpikformerMAE
from timm_spikformer.profiling import Conventions, CostModel, profile
from timm_spikformer.profiling.report import to_csv, to_html


def test_firing_rates_match_neurons(model, images):
    result = profile(model, images.split(5))
    rates = firing_rates(model, images)
    assert result.images == 16
    for name, rate in rates.items():
        assert result.layer(name.rpartition('.')[0]).mean_firing_rate == pytest.approx(rate, rel=1e-5)
    assert result.firing_rate == pytest.approx(sum(rates.values()) / len(rates), rel=1e-5)
    for t in range(4):
        spikes = []
        neuron = model.blocks[1].mlp.fc1.lif
        handle = neuron.register_forward_hook(lambda m, args, out, spikes=spikes: spikes.append(out))
        with torch.no_grad():
            model(images)
        handle.remove()
        assert result.layer('blocks.1.mlp.fc1').firing_rate[t] == pytest.approx(spikes[0][t].mean().item(), rel=1e-5)


def test_silent_and_saturated_neurons(model, images):
    for bn in (model.blocks[0].mlp.fc1.bn, model.stem.stages[1].expand.bn if hasattr(model.stem.stages[1], 'expand')
               else model.stem.stages[1].proj.bn):
        with torch.no_grad():
            bn.bias[0], bn.weight[0] = -100., 0.  # never fires
            bn.bias[1], bn.weight[1] = 100., 0.  # always fires
            bn.bias[2], bn.weight[2] = 1.5, 0.  # fires at every second time step
    result = profile(model, images.split(4))
    layers = [result.layer('blocks.0.mlp.fc1'), next(x for x in result.layers if x.name.startswith('stem.stages.1.') and
                                                   x.name.endswith(('expand', 'proj')))]
    for layer in layers:
        channels = 256 if layer.group == 'mlp' else 64 if layer.name.endswith('expand') else 16
        assert 1 / channels <= layer.silent < 1 and 1 / channels <= layer.saturated < 1
    spikes = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda m, args, out: spikes.append(out))
    with torch.no_grad():
        model(images)
    count = spikes[0].sum((0, 1))  # [N, C]
    assert layers[0].silent == pytest.approx((count == 0).float().mean().item())
    assert layers[0].saturated == pytest.approx((count == 4 * 16).float().mean().item())


def test_values_of_spike_sums(model, images):
    inputs = []
    model.blocks[1].mlp.fc1.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    result = profile(model, images.split(8)).layer('blocks.1.mlp.fc1')
    x = torch.cat(inputs, 1)
    assert result.values == pytest.approx({v: (x == v).float().mean().item() for v in range(int(x.max()) + 1)})
    assert max(result.values) > 1
    assert sum(v * share for v, share in result.values.items()) == pytest.approx(sum(result.input_rate) / 4, rel=1e-5)


@pytest.mark.parametrize('how', ['eval', 'train', 'autocast', 'half', 'folded', 'channels_last', 'checkpointing'])
def test_profile_does_not_change_model(model, images, how):
    x = images[:4]
    if how == 'train':
        model = timm.create_model('test_spikformer_v2', num_classes=10, drop_path_rate=0.2, proj_drop_rate=0.1)
        model.train()
    elif how == 'half':
        model, x = model.bfloat16(), x.bfloat16()
    elif how == 'folded':
        model = reparameterize_model(model)
    elif how == 'channels_last':
        model = model.to(memory_format=torch.channels_last)
    elif how == 'checkpointing':
        model.set_grad_checkpointing()

    def forward():
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
            return model(x)

    outputs = []
    model.register_forward_hook(lambda m, args, out: outputs.append(out))
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    hooks = {name: [len(h) for h in (m._forward_hooks, m._forward_pre_hooks)] for name, m in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
        result = profile(model, x, time_steps=5)
    with torch.random.fork_rng():
        before, model.time_steps = model.time_steps, 5
        torch.manual_seed(1)
        forward()
        model.time_steps = before
    assert torch.equal(outputs[0], outputs[1]) and outputs[0].float().std() > 0
    if how == 'train':
        model.load_state_dict(state)
    torch.manual_seed(1)
    noise = torch.rand(4)
    torch.manual_seed(1)
    profile(model, x, time_steps=2)
    assert torch.equal(torch.rand(4), noise)  # the state of the random number generator is unchanged
    assert model.time_steps == 4 and model.training == (how == 'train')
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
    assert {name: [len(h) for h in (m._forward_hooks, m._forward_pre_hooks)]
            for name, m in model.named_modules()} == hooks
    assert not torch.nn.modules.module._global_forward_hooks and not torch.nn.modules.module._global_forward_pre_hooks
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert result.time_steps == 5 and len(result.silent_layers) <= 2 and 0 < result.firing_rate < 1
    assert all(p.grad is None for p in model.parameters())


def test_interruption_leaves_no_hooks(model, images):
    def data():
        yield images[:2]
        raise KeyboardInterrupt
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    with pytest.raises(KeyboardInterrupt):
        profile(model, data(), time_steps=1)
    with pytest.raises(ValueError, match='channels'):
        profile(model, images[:, :1], time_steps=1)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert not torch.nn.modules.module._global_forward_hooks
    assert model.time_steps == 4
    assert torch.equal(model(images[:2]), model(images[:2]))


def test_batches_are_accumulated(model, images):
    whole, parts = profile(model, images), profile(model, images.split(3))
    for a, b in zip(whole.layers, parts.layers):
        assert a.acs == pytest.approx(b.acs) and a.macs == pytest.approx(b.macs)
        assert (a.silent, a.saturated, a.dense_macs) == (b.silent, b.saturated, b.dense_macs)


def test_memory_is_constant(images):
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2'), images)
    bytes_after = {}

    def data():
        for i in range(100):
            if i in (50, 99):
                gc.collect()
                bytes_after[i] = sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)
            yield images[:4] * (0.5 + i / 100)

    profile(model, images)  # warm-up: one-time allocations
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert profile(model, data()).images == 400
    assert bytes_after[50] == bytes_after[99]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB


def test_events(model, images):
    steps = [(images > level).float() for level in (0., 0.3, 0.6)]
    events = torch.stack(steps, 1)  # [B, 3, C, H, W], 0 and 1
    calibrate(model, events)
    result = profile(model, events)
    first = result.layers[0]
    assert result.time_steps == 3 and result.is_sequence
    assert sum(first.macs) == 0 and min(first.acs) > 0  # events are spikes
    assert sum(first.acs) == pytest.approx(events.mean().item() * 3 * first.dense_macs)
    real = profile(model, torch.stack([images, images * 0.5, images * 2], 1))
    assert real.layers[0].macs == [first.dense_macs] * 3 and sum(real.layers[0].acs) == 0
    with pytest.raises(ValueError, match='time_steps is 2, but the sequences have 3 time steps. Omit time_steps'):
        profile(model, events, time_steps=2)
    with pytest.raises(ValueError, match='Got sequences of 2 time steps after sequences of 3 time steps'):
        profile(model, [events, events[:, :2]])
    model.set_time_steps(3)
    with pytest.raises(ValueError, match='Got images after sequences of 3 time steps'):
        profile(model, [events, images])
    assert profile(model, events, time_steps=3).totals == result.totals


def test_masked_autoencoder(model, images):
    for block in model.blocks:
        nn.init.constant_(block.attn.qkv.bn.bias, 1.)  # sums over eight tokens are small
    mae = SpikformerMAE(model, mask_ratio=0.5, decoder_embed_dim=32, decoder_depth=1)
    with torch.no_grad():
        for _ in range(3):
            mae.train()(images)
    mae.eval()
    torch.manual_seed(0)
    result = profile(mae, images.split(8), conventions=Conventions(fan_out='exact'))
    assert result.by_channel and not result.silent_layers
    assert result.steps[-1].agreement is None and result.accuracy is None
    full = profile(model, images)
    for a, b in zip(result.layers, full.layers):
        assert a.name == b.name
        if a.name.endswith('.attn'):
            assert a.dense_macs == b.dense_macs / 4
        else:
            assert a.dense_macs == b.dense_macs / 2  # half of the tokens are visible
    # counts do not depend on whether patches are convolved directly or as matrix products
    assert 0 < result.totals.acs < full.totals.acs


def test_accuracy_and_steps(model, images):
    y = torch.arange(16) % 10
    result = profile(model, zip(images.split(8), y.split(8)))
    with torch.no_grad():
        logits = model.forward_steps(images)
    for t, step in enumerate(result.steps):
        assert step.step == t + 1
        assert step.accuracy == pytest.approx((logits[t].argmax(1) == y).float().mean().item())
        assert step.agreement == pytest.approx((logits[t].argmax(1) == logits[-1].argmax(1)).float().mean().item())
        assert step.confidence == pytest.approx(logits[t].softmax(1).amax(1).mean().item(), rel=1e-5)
        shorter = profile(model, images, time_steps=t + 1)
        assert step.energy_mj == pytest.approx(shorter.totals.energy_mj)  # a time step does not depend on later ones
    assert result.accuracy == result.steps[-1].accuracy
    assert result.steps[-1].energy_mj == pytest.approx(result.totals.energy_mj)
    assert profile(model, images).accuracy is None


def test_to_dict_is_json(model, images):
    result = profile(model, images)
    values = json.loads(json.dumps(result.to_dict()))
    assert values['totals'] == dataclasses.asdict(result.totals)
    assert [x['name'] for x in values['layers']] == [x.name for x in result.layers]
    assert values['conventions']['residual'] == 'sum'


def test_csv(model, images):
    profiles = [profile(model, images, t) for t in (1, 3)]
    rows = list(csv.DictReader(io.StringIO(to_csv(profiles))))
    assert len(rows) == sum(len(p.layers) for p in profiles)
    last = rows[-2]
    layer = profiles[1].layers[-2]
    assert last['name'] == layer.name and float(last['acs_3']) == layer.acs[2]
    assert float(last['memory_bytes_3']) == layer.memory_bytes[2]
    attention = next(x for x in profiles[1].layers if x.operand_rates)
    row = next(row for row in rows if row['time_steps'] == '3' and row['name'] == attention.name)
    assert [float(row[f'{name}_rate_2']) for name in 'qkv'] == [attention.operand_rates[name][1] for name in 'qkv']
    assert last['q_rate_1'] == ''
    assert rows[0]['firing_rate_2'] == '' and float(rows[0]['firing_rate_1']) == profiles[0].layers[0].firing_rate[0]


def broken():
    """Data that must not be read, because the error in another argument is found first."""
    raise AssertionError
    yield


@pytest.mark.parametrize('make, message', [
    (lambda m, x: profile(m, []), 'contains no images'),
    (lambda m, x: profile(m, x[:0]), 'contains no images'),
    (lambda m, x: profile(m, x, accuracy=True), 'no labels'),
    (lambda m, x: profile(m, [(x, torch.rand(16, 10))], accuracy=True),
     r'labels of shape \[16, 10\] and dtype torch.float32. Expected a class index'),
    (lambda m, x: profile(m, [(x, [3] * 16)]), 'Labels must be a tensor of class indices, not list. Convert them'),
    (lambda m, x: profile(m, [{'pixel_values': x, 'labels': np.zeros(16, int)}], accuracy=True), 'not ndarray'),
    (lambda m, x: profile(m, [(x, torch.tensor([3]))]), 'A batch has 16 images, but 1 labels'),
    (lambda m, x: profile(m, [(x[:1], torch.full((5,), 3))]), 'A batch has 1 images, but 5 labels'),
    (lambda m, x: profile(m, [(x, torch.rand(7, 10))]), 'A batch has 16 images, but 7 labels'),
    (lambda m, x: profile(m, [(x.tolist(), torch.arange(16))]), 'Got a tuple whose first item is of type list'),
    (lambda m, x: profile(m, [{'pixel_values': x.numpy()}]), 'Got pixel_values of type ndarray'),
    (lambda m, x: profile(m, [[]]), 'Got an empty list'),
    (lambda m, x: profile(m, [(x, torch.full((16,), 10))]), 'indices of the 10 classes'),
    (lambda m, x: profile(m, ['cat']), 'batches of images'),
    (lambda m, x: profile(m, [{'image': x}]), 'pixel_values'),
    (lambda m, x: profile(m, x, time_steps=0), 'at least 1'),
    (lambda m, x: profile(m, x, cost='fp64'), "Unknown cost model 'fp64'. Expected one of 'fp32', "),
    (lambda m, x: profile(m, x, cost=(-1., 0.)), 'mac_pj must be at least 0 and finite, got -1.0'),
    (lambda m, x: profile(m, x, cost=5), r'a pair \(pJ per multiply-accumulate, pJ per accumulate\). Got 5'),
    (lambda m, x: profile(m, x, cost=['a', 1]), r"Expected a cost model, its name, or a pair .*Got \['a', 1\]"),
    (lambda m, x: CostModel('mine', '4.6', 0.9), "mac_pj must be at least 0 and finite, got '4.6'"),
    (lambda m, x: profile(m, [x], max_batches=-1), 'max_batches must be an integer of at least 1, got -1'),
    (lambda m, x: profile(m, x).layer('blocks.7'), "Unknown layer 'blocks.7'. Expected one of stem.stages.0"),
    (lambda m, x: profile(m, None), 'an iterable of batches, got NoneType'),
    (lambda m, x: profile(m, 3), 'an iterable of batches, got int'),
    (lambda m, x: profile(m, broken(), conventions={'bn': 'mac'}), r"Conventions\(residual='mac'\), got {'bn': 'mac'}"),
    (lambda m, x: profile(m, x).with_conventions(foo=1), "Unknown option 'foo'. Expected cost or one of residual"),
    (lambda m, x: profile(m, x).with_conventions(bn=['mac']), r"bn must be one of 'folded', 'mac', got \['mac'\]"),
    (lambda m, x: profile(m, x).with_conventions(residual='max'), "residual must be one of 'sum'"),
    (lambda m, x: profile(nn.Linear(3, 3), x), 'Expected a Spikformer'),
    (lambda m, x: profile(timm.create_model('test_vit'), x), 'Got a VisionTransformer'),
])
def test_bad_input(model, images, make, message):
    with pytest.raises(ValueError, match=message):
        make(model, images)


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
@pytest.mark.parametrize('name, message', [
    ('images', 'The input of stem.stages.0.{first}conv contains NaN or infinity'),
    ('stem.stages.2.{first}conv', 'The output of stem.stages.2'),
    ('blocks.0.attn.qkv.linear', 'The output of blocks.0.attn.qkv contains NaN or infinity'),
    ('blocks.1.mlp.fc1.linear', 'The output of blocks.1.mlp.fc1 contains NaN or infinity'),
    ('head.fc', 'The output of head.fc contains NaN or infinity'),
])
def test_first_layer_with_nonfinite_activations_is_named(model, images, name, message, value):
    first = next(n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)).split('.')[3]
    x = images.clone()
    if name == 'images':
        x[3, 0, 5, 5] = value
        message = f'The input of stem.stages.0.{first} contains NaN or infinity'
    else:
        nn.init.constant_(model.get_submodule(name.format(first=f'{first}.')).weight, value)
    with pytest.raises(ValueError, match=message):
        profile(model, [images[:2], x] if name == 'images' else [x])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_labels_can_be_ignored(model, images):
    for labels in (torch.full((16,), 10), [3] * 16):
        assert profile(model, [(images, labels)], accuracy=False).accuracy is None
    headless = timm.create_model('test_spikformer_v2', num_classes=0).train()
    assert profile(headless, images).steps[-1].agreement is None
    with pytest.raises(ValueError, match='no classifier'):
        profile(headless, images, accuracy=True)


def test_silent_layers_warn(model, images, caplog):
    """The message counts the layers with neurons; the classifier has none."""
    nn.init.constant_(model.blocks[1].mlp.fc2.bn.weight, 0.)
    nn.init.constant_(model.blocks[1].mlp.fc2.bn.bias, 0.)
    result = profile(model, images)
    neurons = sum(type(m).__name__ == 'LIF' for m in model.modules())
    assert result.silent_layers == ['blocks.1.mlp.fc2'] and neurons < len(result.layers)
    expected = f'1 of the {neurons} spiking layers emits no spikes (for example blocks.1.mlp.fc2)'
    assert f'{expected}, so firing rates and energy may not be meaningful. In eval mode, BN needs' in caplog.text
    assert expected in to_html([result])


def test_with_conventions_takes_keywords(model, images):
    """A positional argument could be a cost model or a convention."""
    with pytest.raises(TypeError, match='positional'):
        profile(model, images).with_conventions('int8')
