"""Operations, energy and memory compared with explicit loops, spikingjelly and published values."""
import dataclasses
import itertools

import pytest
import timm
import torch
from conftest import calibrate
from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SimpleEnergyProfiler, SynOpCounter
from torch import nn

from benchmarks.peer import PeerSpikformer
from timm_spikformer import Spikformer, SpikformerMAE
from timm_spikformer.masking import patches_to_maps
from timm_spikformer.profiling import Conventions, CostModel, profile
from timm_spikformer.profiling.conventions import CHOICES, COST_MODELS


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
    result = profile(tiny, x, conventions=Conventions(fan_out='exact'))
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
    result = profile(model, images[:2], conventions=Conventions(residual='mac', fan_out='exact'))
    for layer in result.layers:
        if layer.input == 'spikes' and not layer.name.endswith('.attn'):
            acs = sum(synops.records[f'Spikformer.{layer.name}'].values())
            assert acs == pytest.approx(2 * sum(layer.acs)) and acs > 0


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
    result = profile(mae, images[:4], conventions=Conventions(fan_out='exact'))
    x, (ids, height, width) = maps['x'], maps['visible']
    ones = torch.nn.functional.conv2d(
        x.flatten(0, 1).double(), torch.ones(1, x.shape[2], 3, 3, dtype=torch.float64), padding=1)
    uses = ones.unflatten(0, (2, 4)).squeeze(2)  # [T, B, H, W]
    p = x.shape[-1] // width
    seen_here = torch.zeros(4, height * width).scatter(1, ids, 1.).view(4, height, width)
    seen_here = seen_here.repeat_interleave(p, 1).repeat_interleave(p, 2)
    expected = (uses * seen_here).sum().item() * unit.conv.out_channels
    assert sum(result.layer('stem.stages.0.expand').acs) * 4 == pytest.approx(expected) and expected > 0


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
