import pytest
import torch

from timm_spikformer.layers import ConvBNLIF
from timm_spikformer.stems import STEMS, resolve_strides


@pytest.mark.parametrize('stem', STEMS)
@pytest.mark.parametrize('patch_size, stem_strides', [
    (16, None), (8, None), (4, None), (4, (2, 2, 1, 1)), (2, (1, 2, 1, 1)), (1, None)])
def test_resolution_and_width(stem, patch_size, stem_strides):
    stem = STEMS[stem](in_chans=2, embed_dim=32, patch_size=patch_size, stem_strides=stem_strides)
    y = stem(torch.randn(1, 3, 2, 32, 48), 2)
    assert y.shape == (2, 3, 32, 32 // patch_size, 48 // patch_size)
    assert y.mean() > 0 and set(y.unique().tolist()) <= {0., 1., 2.}


def test_default_strides_downsample_in_last_stages():
    assert resolve_strides(4) == [1, 1, 2, 2]
    assert resolve_strides(16) == [2, 2, 2, 2]


@pytest.mark.parametrize('patch_size', [0, 3, 32, -4])
def test_bad_patch_size(patch_size):
    with pytest.raises(ValueError, match=f'patch_size must be 1, 2, 4, 8 or 16, got {patch_size}'):
        resolve_strides(patch_size)


@pytest.mark.parametrize('stem_strides', [(2, 2, 2, 2), (2, 2), (4, 1, 1, 1)])
def test_bad_strides(stem_strides):
    with pytest.raises(ValueError, match='product is patch_size=4, got'):
        resolve_strides(4, stem_strides)


@pytest.mark.parametrize('stem', STEMS)
def test_bad_width(stem):
    with pytest.raises(ValueError, match='embed_dim must be divisible by 8.*got 20'):
        STEMS[stem](embed_dim=20)


def test_sps_pools_spikes_and_adds_position_embedding():
    """Order of the authors' code: max pooling after LIF; x + LIF(BN(conv(x))) at the end."""
    torch.manual_seed(0)
    stem = STEMS['sps'](in_chans=3, embed_dim=32, patch_size=4)
    x = torch.randn(2, 3, 3, 16, 16)
    expected = x
    for i, stage in enumerate(stem.stages):
        expected = stage.proj(expected, 2)
        if i >= 2:
            expected = torch.stack([torch.nn.functional.max_pool2d(step, 3, 2, 1) for step in expected])
    expected = expected + stem.stages[3].pos_embed(expected, 2)
    assert torch.equal(stem(x, 2), expected)


def test_scs_stage_structure():
    stem = STEMS['scs'](in_chans=3, embed_dim=64)
    convs = [m.conv for m in stem.stages[1].modules() if isinstance(m, ConvBNLIF)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convs] == [
        (8, 16, (2, 2), (2, 2)), (16, 64, (3, 3), (1, 1)), (64, 16, (3, 3), (1, 1))]
    assert all(c.bias is None for c in convs)
