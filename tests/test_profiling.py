"""Firing rates, operations and energy compared with explicit loops, spikingjelly and published values."""
import copy
import csv
import dataclasses
import gc
import io
import itertools
import json
import resource

import numpy as np
import pytest
import timm
import torch
from conftest import calibrate, firing_rates
from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SimpleEnergyProfiler, SynOpCounter
from timm.utils import reparameterize_model
from torch import nn

from benchmarks.peer import PeerSpikformer
from timm_spikformer import Spikformer, SpikformerForImageClassification, SpikformerMAE
from timm_spikformer.hf.configuration_spikformer import SpikformerConfig
from timm_spikformer.masking import patches_to_maps
from timm_spikformer.profiling import Conventions, CostModel, profile
from timm_spikformer.profiling.conventions import CHOICES, COST_MODELS
from timm_spikformer.profiling.report import to_csv, to_html

EXACT = dict(fan_out='exact')


@pytest.fixture(params=['scs', 'sps'])
def tiny(request, images):
    """A model so small that its multiplications can be counted in Python loops; all neuron layers fire."""
    torch.manual_seed(0)
    model = Spikformer(
        patch_size=4, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2., time_steps=3, num_classes=3,
        stem=request.param, stem_strides=(1, 2, 1, 2))
    for name, m in model.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(m.bias, 2. if 'qkv' in name else 0.6)  # sums over four tokens are small
    return calibrate(model, images[:, :, 24:32, 24:32])


def by_hand(layer, x):
    """Return for inputs `[n, ...]`: MACs with padding, MACs without padding, sum of inputs, and nonzero MACs."""
    dense = real = total = nonzero = 0
    if isinstance(layer, nn.Linear):
        for value in x.flatten(0, -2).flatten().tolist():
            for _ in range(layer.out_features):
                dense += 1
                real += 1
                total += value
                nonzero += value != 0
        return dense, real, total, nonzero
    n, C, H, W = x.shape
    out, _, kh, kw = layer.weight.shape
    stride, padding = layer.stride[0], layer.padding[0]
    values = x.tolist()
    for i, y, z in itertools.product(
            range(n), range((H + 2 * padding - kh) // stride + 1), range((W + 2 * padding - kw) // stride + 1)):
        for c, dy, dx in itertools.product(range(C), range(kh), range(kw)):
            row, column = y * stride + dy - padding, z * stride + dx - padding
            is_real = 0 <= row < H and 0 <= column < W
            value = values[i][c][row][column] if is_real else 0
            for _ in range(out):
                dense += 1
                real += is_real
                total += value
                nonzero += value != 0
    return dense, real, total, nonzero


def attention_by_hand(q, k, v):
    """Return for spikes `[..., N, d]` the coincident spike pairs in q k^T and in k^T v."""
    qk = kv = 0
    for a, b, c in zip(q.flatten(0, -3).tolist(), k.flatten(0, -3).tolist(), v.flatten(0, -3).tolist()):
        N, d = len(a), len(a[0])
        for n, m, i in itertools.product(range(N), range(N), range(d)):
            qk += a[n][i] * b[m][i]
        for n, i, j in itertools.product(range(N), range(d), range(d)):
            kv += b[n][i] * c[n][j]
    return qk, kv


def test_counts_match_explicit_loops(tiny, images):
    x = images[:2, :, 24:32, 24:32]
    inputs, spikes = {}, {}
    for name, m in tiny.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(lambda m, args, out, name=name: inputs.update({name: (m, args[0])}))
        if name.endswith('qkv'):
            m.register_forward_hook(lambda m, args, out: spikes.update(qkv=out))
    with torch.no_grad():
        tiny(x)
    result = profile(tiny, x, conventions=Conventions(**EXACT))
    by_nonzero = result.with_conventions(residual='nonzero')
    mean = result.with_conventions(fan_out='dense')

    for name, (m, layer_input) in inputs.items():
        layer = result.layer(name if name == 'head.fc' else name.rpartition('.')[0])
        dense, real, total, nonzero = by_hand(m, layer_input)
        steps = 1 if layer.input in ('image', 'features') else 3
        assert layer.dense_macs * len(x) * steps == dense
        if steps == 1:
            assert sum(layer.macs) * len(x) == dense and sum(layer.acs) == 0
        else:
            assert 0 < total < dense
            assert sum(layer.acs) * len(x) == pytest.approx(total, abs=1e-6)
            assert sum(by_nonzero.layer(layer.name).acs) * len(x) == pytest.approx(nonzero, abs=1e-6)
            rate = layer_input.mean().item()
            assert sum(mean.layer(layer.name).acs) * len(x) == pytest.approx(rate * dense, rel=1e-6)
            if isinstance(m, nn.Linear):
                assert real == dense

    q, k, v = spikes['qkv'].unflatten(-1, (3, 2, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)  # [T, B, heads, N, d]
    qk, kv = attention_by_hand(q, k, v)
    N, d = q.shape[-2:]
    assert N < d  # so that (q k^T) v is the cheaper order
    coincident = result.with_conventions(attention='coincidence').layer('blocks.0.attn')
    assert coincident.dense_macs == 2 * N * N * 16
    assert sum(coincident.acs) * len(x) == qk + v.sum().item() * N
    assert sum(result.layer('blocks.0.attn').acs) * len(x) == pytest.approx((q.sum() + v.sum()).item() * N)


def test_both_orders_of_attention(images):
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', num_heads=16), images)  # N = 16 tokens, d = 4
    spikes = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda m, args, out: spikes.append(out))
    result = profile(model, images[:2])
    handle.remove()
    q, k, v = spikes[0].unflatten(-1, (3, 16, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
    qk, kv = attention_by_hand(q, k, v)
    for name, x in (('q', q), ('k', k), ('v', v)):
        rates = result.layer('blocks.0.attn').operand_rates[name]
        assert rates == pytest.approx(x.flatten(1).mean(1).tolist(), rel=1e-5)
    for order, pairs, first, second, fan_out in (('qk', qk, q, v, 16), ('cheaper', kv, k, q, 4)):
        layer = result.with_conventions(attention_order=order, attention='coincidence').layer('blocks.0.attn')
        assert layer.dense_macs == 2 * 16 * 64 * fan_out
        assert sum(layer.acs) * 2 == pytest.approx(pairs + second.sum().item() * fan_out)
        layer = result.with_conventions(attention_order=order).layer('blocks.0.attn')
        assert sum(layer.acs) * 2 == pytest.approx((first.sum() + second.sum()).item() * fan_out)
    assert sum(result.with_conventions(attention='none').layer('blocks.0.attn').acs) == 0


@pytest.mark.parametrize('name, total, stem, linears, attention', [
    ('spikformer_v2_8_384', 11.51e9, 8.50e9, 2.77e9, 0.24e9),
    ('spikformer_v2_8_512', 20.36e9, 15.12e9, 4.93e9, 0.31e9),
])
def test_dense_macs_of_the_published_models(name, total, stem, linears, attention):
    model = timm.create_model(name, time_steps=1).train()  # in train mode, neurons fire without calibration
    result = profile(model, torch.randn(1, 3, 224, 224))
    assert result.totals.dense_macs == pytest.approx(total, rel=5e-3)
    assert result.groups['stem'].dense_macs == pytest.approx(stem, rel=5e-3)
    products = sum(x.dense_macs for x in result.layers if x.name.endswith('.attn'))
    assert products == pytest.approx(attention, rel=3e-2)  # the expected value has two digits
    assert result.totals.dense_macs - result.groups['stem'].dense_macs - products == pytest.approx(linears, rel=5e-3)
    stages = [sum(x.dense_macs for x in result.layers if x.name.startswith(f'stem.stages.{i}.')) for i in range(4)]
    assert stages[1:] == pytest.approx([stages[1]] * 3, rel=0.03)
    assert result.totals.parameters == sum(p.numel() for p in model.parameters())
    assert not result.silent_layers


@pytest.mark.parametrize('stem', ['scs', 'sps'])
def test_counts_match_spikingjelly_on_its_layers(images, stem):
    """Conventions of spikingjelly: sums of spikes cost MACs, and the first convolution runs at each time step."""
    torch.manual_seed(0)
    model = timm.create_model('test_spikformer_v2', num_classes=10, num_heads=16, stem=stem)  # N > d: q (k^T v)
    for block in model.blocks:
        nn.init.constant_(block.attn.qkv.bn.bias, 1.)
    model = calibrate(model, images)
    peer = PeerSpikformer(model).eval()
    synops, macs = SynOpCounter(), MACCounter()
    del macs.rules[torch.ops.aten.native_batch_norm.default]
    with torch.no_grad(), DispatchCounterMode([synops, macs]):
        peer(images[:2])
    result = profile(model, images[:2], conventions=Conventions(
        residual='mac', fan_out='exact', first_conv='each_step', attention='coincidence', attention_order='cheaper'))

    def theirs(counter, name):
        return sum(counter.records[f'PeerSpikformer.{name}'].values())

    for layer in result.layers:
        name = layer.name.removeprefix('stem.').replace('head.fc', 'head')
        name = name.replace('attn.qkv', 'attn.qkv_conv_bn').replace('attn.proj', 'attn.proj_conv_bn')
        acs = theirs(synops, name)
        if name.endswith('.attn'):
            acs -= theirs(synops, f'{name}.proj_conv_bn')
        else:
            assert theirs(macs, name) == pytest.approx(2 * sum(layer.macs))
        assert acs == pytest.approx(2 * sum(layer.acs)), layer.name
    assert result.totals.acs > 0
    assert synops.get_total() == pytest.approx(2 * result.totals.acs)
    assert macs.get_total() == pytest.approx(2 * result.totals.macs)


def test_memory_matches_simple_model_of_spikingjelly(images):
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=10), images)
    peer = PeerSpikformer(model).eval()
    with torch.no_grad():
        peer(images[:2])  # initializes the state of its neurons
    profiler = SimpleEnergyProfiler()
    profiler.bind_model(peer)
    with torch.no_grad(), profiler:
        peer(images[:2])
    counts = profiler.get_counts()
    result = profile(model, images[:2], cost='fp32-memory', conventions=Conventions(
        residual='mac', fan_out='exact', first_conv='each_step'))
    # spikingjelly's layers have no biases
    biases = sum(4 * 4 * x.output_numel for x in result._layer_counts if x.has_bias and x.group != 'head')
    assert 2 * result.totals.memory_bytes - biases == pytest.approx(counts['memory_access_bytes'])
    t = result.totals
    assert t.energy_mj == pytest.approx((4.6 * t.macs + 0.9 * t.acs + 24.96 * t.memory_bytes) * 1e-9)
    assert result.steps[-1].energy_mj == pytest.approx(t.energy_mj)


def test_counts_match_spikingjelly_on_our_layers(model, images):
    synops = SynOpCounter()
    with torch.no_grad(), DispatchCounterMode([synops]):
        model(images[:2])
    result = profile(model, images[:2], conventions=Conventions(residual='mac', **EXACT))
    for layer in result.layers:
        if layer.input == 'spikes' and not layer.name.endswith('.attn'):
            acs = sum(synops.records[f'Spikformer.{layer.name}'].values())
            assert acs == pytest.approx(2 * sum(layer.acs)) and acs > 0


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


@pytest.mark.parametrize('conventions', [
    dict(), dict(residual='nonzero'), dict(attention_order='cheaper'),
    dict(attention_order='cheaper', attention='coincidence'),
])
def test_operations_of_different_image_sizes_are_added(images, conventions):
    """They equal those of separate profiles, in any order, although the cheaper order of attention differs."""
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=10, num_heads=8), images)  # d = 8
    large, small = images[:2], nn.functional.interpolate(images[2:4], 32)  # 16 and 4 tokens

    def totals(data):
        return profile(model, data).with_conventions(**conventions).totals

    expected = {
        name: (getattr(totals(large), name) + getattr(totals(small), name)) / 2
        for name in ('dense_macs', 'macs', 'acs', 'memory_bytes', 'energy_mj')}
    for data in ([large, small], [small, large], [large[:1], small, large[1:]]):
        result = dataclasses.asdict(totals(data))
        assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-12)


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
    result = profile(mae, images.split(8), conventions=Conventions(**EXACT))
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


def test_masked_counts_match_masked_maps(images):
    """Exact counts for patches equal those of a convolution of the whole map, whose masked pixels are 0."""
    torch.manual_seed(0)
    encoder = timm.create_model('test_spikformer_v2', time_steps=2)
    mae = SpikformerMAE(encoder, decoder_embed_dim=32, decoder_depth=1)
    with torch.no_grad():
        for _ in range(3):
            mae.train()(images)
    mae.eval()
    maps = {}
    unit = encoder.stem.stages[0].expand
    unit.register_forward_hook(
        lambda m, args, out: maps.update(x=patches_to_maps(args[0], args[2]), visible=args[2]))
    torch.manual_seed(5)
    result = profile(mae, images[:4], conventions=Conventions(**EXACT))
    x, (ids, height, width) = maps['x'], maps['visible']
    ones = torch.nn.functional.conv2d(
        x.flatten(0, 1).double(), torch.ones(1, x.shape[2], 3, 3, dtype=torch.float64), padding=1)
    uses = ones.unflatten(0, (2, 4)).squeeze(2)  # [T, B, H, W]
    p = x.shape[-1] // width
    seen_here = torch.zeros(4, height * width).scatter(1, ids, 1.).view(4, height, width)
    seen_here = seen_here.repeat_interleave(p, 1).repeat_interleave(p, 2)
    expected = (uses * seen_here).sum().item() * unit.conv.out_channels
    assert sum(result.layer('stem.stages.0.expand').acs) * 4 == pytest.approx(expected) and expected > 0


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
            profile(model, images, conventions=Conventions(**EXACT))
        handle.remove()
    assert profile(model, images).totals.acs > 0


def test_scaled_spikes_count_as_spikes(images):
    """In train mode, dropout and stochastic depth scale spikes, which are not more spikes."""
    torch.manual_seed(0)
    model = timm.create_model('test_spikformer_v2', proj_drop_rate=0.3, drop_path_rate=0.3).train()
    result = profile(model, images, conventions=Conventions(**EXACT))
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


def test_energy_and_conventions(model, images):
    result = profile(model, images)
    t = result.totals
    assert t.energy_mj == pytest.approx((4.6 * t.macs + 0.9 * t.acs) * 1e-9)
    assert t.ann_energy_mj == pytest.approx(4.6e-9 * t.dense_macs)
    assert sum(x.energy_mj for x in result.groups.values()) == pytest.approx(t.energy_mj)
    assert result.with_conventions(cost='int8').totals.energy_mj == pytest.approx((0.23 * t.macs + 0.03 * t.acs) * 1e-9)
    assert result.with_conventions(cost=(2., 1.)).totals.energy_mj == pytest.approx((2 * t.macs + t.acs) * 1e-9)
    assert result.with_conventions(cost=CostModel('mine', 1., 0.)).totals.energy_mj == pytest.approx(t.macs * 1e-9)
    assert profile(model, images, cost='fp16').totals.energy_mj == pytest.approx((1.5 * t.macs + 0.4 * t.acs) * 1e-9)
    assert set(COST_MODELS) == {'fp32', 'fp32-memory', 'fp16', 'int8', 'int32'}
    changed = {name: result.with_conventions(**{name: value}).totals
               for name, choices in CHOICES.items() for value in list(choices)[1:]}
    for name, totals in changed.items():
        if name != 'attention_order' or model.blocks[0].attn.num_heads > 2:  # N < d: 'qk' is the cheaper order
            assert totals != t, name
    outputs = sum(x.numel() for x in _outputs(model, images[:1]))
    assert result.with_conventions(neuron='mac').totals.macs - t.macs == outputs
    per_step = result.with_conventions(first_conv='each_step').totals.macs - t.macs
    assert per_step == 3 * result.layers[0].dense_macs
    assert result.with_conventions(first_conv='ac').layers[0].acs == [result.layers[0].dense_macs] * 4
    with_bn = result.with_conventions(bn='mac').totals.macs - t.macs
    assert with_bn == outputs - sum(x.numel() for x in _outputs(model, images[:1], 'attn_lif')) - 3 / 4 * next(
        iter(_outputs(model, images[:1]))).numel()


def _outputs(model, x, ending='lif'):
    outputs = []
    handles = [m.register_forward_hook(lambda m, args, out: outputs.append(out))
               for name, m in model.named_modules() if name.endswith(ending)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return outputs


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
