import pytest
import torch
from conftest import firing_rates
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.model.spikformer import SpikformerBlock

from timm_spikformer.layers import (
    ConvBNLIF,
    LinearBNLIF,
    SpikingBlock,
    SpikingSelfAttention,
    TimeSharedDropPath,
    spiking_attention,
)


def convert(state_dict):
    """Convert spikingjelly's names and shapes to this package's, independently of the package's own conversion."""
    out = {}
    for ours, theirs in (
            ('attn.qkv', 'attn.qkv_conv_bn'), ('attn.proj', 'attn.proj_conv_bn'), ('mlp.fc1', 'mlp.fc1'),
            ('mlp.fc2', 'mlp.fc2')):
        out[f'{ours}.linear.weight'] = state_dict[f'{theirs}.0.weight'].squeeze(-1)
        for name in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'):
            if f'{theirs}.1.{name}' in state_dict:
                out[f'{ours}.bn.{name}'] = state_dict[f'{theirs}.1.{name}']
    return out


def assert_close_to_scale(actual, expected, tolerance=1e-5):
    """Compare the largest difference with the largest value; rounding errors of sums are relative to the latter."""
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize('num_tokens', [(2, 2), (6, 6)], ids=['fewer tokens than channels', 'more tokens'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_block_equals_spikingjelly(training, num_tokens):
    torch.manual_seed(0)
    T, B, C, heads = 4, 4, 64, 2
    theirs = SpikformerBlock(C, heads)
    torch.nn.init.constant_(theirs.attn.qkv_conv_bn[1].bias, 1.)  # so that attention with few tokens fires
    ours = SpikingBlock(C, heads)
    missing, unexpected = ours.load_state_dict(convert(theirs.state_dict()), strict=False)
    assert not unexpected and all(k.endswith('linear.bias') for k in missing)
    for k in missing:  # spikingjelly's layers have no bias
        torch.nn.init.zeros_(ours.get_parameter(k))

    x = (torch.rand(T, B, C, *num_tokens) < 0.3).float()
    for block, inputs in ((theirs, x), (ours, x.flatten(3).transpose(2, 3))):
        for m in block.modules():
            if isinstance(m, torch.nn.BatchNorm1d):
                m.momentum = None  # the next forward pass sets the running statistics
        block.train()(inputs)
        functional.reset_net(theirs)
        block.train(training)

    x_theirs, x_ours = x.clone().requires_grad_(), x.flatten(3).transpose(2, 3).clone().requires_grad_()
    y_theirs, y_ours = theirs(x_theirs), ours(x_ours)
    y_theirs = y_theirs.flatten(3).transpose(2, 3)
    rates = firing_rates(ours, x_ours)
    assert len(rates) == 5 and min(rates.values()) > 0.01
    assert torch.equal(y_ours, y_theirs)

    grad = torch.randn_like(y_ours)
    y_ours.backward(grad)
    y_theirs.backward(grad)
    assert_close_to_scale(x_ours.grad, x_theirs.grad.flatten(3).transpose(2, 3))
    expected = convert({k: p.grad for k, p in theirs.named_parameters()})
    for name, param in ours.named_parameters():
        if name in expected:
            assert_close_to_scale(param.grad, expected[name])
    if training:
        torch.testing.assert_close(ours.attn.qkv.bn.running_var, theirs.attn.qkv_conv_bn[1].running_var)


@pytest.mark.parametrize('num_tokens', [3, 50])
def test_attention_is_exact_for_both_product_orders(num_tokens):
    q, k, v = (torch.rand(3, 2, 2, 4, num_tokens, 16) < 0.4).float().unbind(0)
    expected = torch.einsum('tbhnd,tbhmd,tbhme->tbhne', q.double(), k.double(), v.double())
    assert expected.mean() > 0
    assert torch.equal(spiking_attention(q, k, v).double(), expected)


def test_attention_threshold_scale_and_biases():
    for dim in (16, 64):
        attn = SpikingSelfAttention(dim, num_heads=2)
        assert attn.attn_lif.v_threshold == 0.5 and attn.scale == 0.125
        assert attn.qkv.linear.bias is None and attn.proj.linear.bias is not None


def test_embed_dim_must_be_divisible_by_num_heads():
    with pytest.raises(ValueError, match='embed_dim=30 and num_heads=4'):
        SpikingSelfAttention(30, num_heads=4)


@pytest.mark.parametrize('training', [True, False])
def test_constant_input_is_computed_once(training):
    torch.manual_seed(0)
    layer = ConvBNLIF(3, 8).train()
    x = torch.randn(1, 5, 3, 8, 8)
    for _ in range(20):
        layer(x, 4)
    layer.train(training)
    calls = []
    layer.conv.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    once, each = layer(x, 4), layer(x.expand(4, -1, -1, -1, -1), 4)
    assert calls == [5, 20]
    assert once.shape == (4, 5, 8, 8, 8) and once.mean() > 0.01
    assert torch.equal(once, each)


def test_bn_statistics_are_over_time_batch_and_tokens():
    layer = LinearBNLIF(4, 6)
    x = torch.randn(3, 2, 5, 4)
    layer(x)
    y = layer.linear(x).flatten(0, 2)
    torch.testing.assert_close(layer.bn.running_mean, 0.1 * y.mean(0))
    torch.testing.assert_close(layer.bn.running_var, 0.9 + 0.1 * y.var(0))


def test_drop_path_drops_samples_at_all_time_steps():
    torch.manual_seed(0)
    y = TimeSharedDropPath(0.5).train()(torch.ones(4, 64, 3, 2))
    assert set(y.unique().tolist()) == {0., 2.}
    per_sample = y.transpose(0, 1).flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
