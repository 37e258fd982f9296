import pytest
import torch
from torch import nn

from timm_spikformer import use_kernels
from timm_spikformer.masking import (
    VisibleTokens,
    add_halo,
    apply_to_patches,
    conv3x3_of_patches,
    patches_to_maps,
    visible_patches,
)


@pytest.mark.parametrize('p', [1, 2, 4, 8])
@pytest.mark.parametrize('n', [1, 3])
def test_convolution_of_patches_matches_masked_maps(p, n):
    """Compare outputs and gradients, with a non-square grid and a different mask for each image."""
    torch.manual_seed(0)
    B, C, h, w = 2, 5, 3, 4
    visible = VisibleTokens(torch.stack([torch.randperm(h * w)[:5].sort().values for _ in range(B)]), h, w)
    is_visible = torch.zeros(B, h * w).scatter(1, visible.ids, 1.).view(B, 1, h, w)
    is_visible = is_visible.repeat_interleave(p, 2).repeat_interleave(p, 3).double()
    maps = torch.randn(n, B, C, h * p, w * p, dtype=torch.double, requires_grad=True)
    weight = torch.randn(7, C, 3, 3, dtype=torch.double, requires_grad=True)

    masked = (maps * is_visible).flatten(0, 1)
    dense = torch.nn.functional.conv2d(masked, weight, padding=1).unflatten(0, (n, B)) * is_visible
    patches = visible_patches(maps, visible)
    assert patches.shape == (n, B * 5, C, p, p)
    out = conv3x3_of_patches(patches, weight, visible).unflatten(0, (n, -1))
    torch.testing.assert_close(patches_to_maps(out, visible), dense)
    assert torch.equal(patches_to_maps(patches, visible), maps * is_visible)
    assert add_halo(patches, visible).shape == (n * B * 5, C, p + 2, p + 2)

    grad = torch.randn_like(dense)
    expected = torch.autograd.grad(dense, (maps, weight), grad)
    actual = torch.autograd.grad(patches_to_maps(out, visible), (maps, weight), grad)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)


def test_masked_pixels_are_not_read():
    """NaN outside the visible patches does not reach the output."""
    visible = VisibleTokens(torch.tensor([[1, 2, 7]]), 4, 4)
    maps = torch.full((1, 1, 2, 8, 8), float('nan'))
    maps[..., 0:2, 2:6] = 1.
    maps[..., 2:4, 6:8] = 1.
    patches = visible_patches(maps, visible)
    assert torch.equal(patches, torch.ones(1, 3, 2, 2, 2))
    assert add_halo(patches, visible).isfinite().all()


@pytest.mark.parametrize('p', [2, 4])
def test_pooling_of_spike_patches_matches_masked_maps(p):
    """Compare outputs and gradients. In windows without spikes, the first pixel gets the gradient, never padding."""
    torch.manual_seed(0)
    visible = VisibleTokens(torch.stack([torch.randperm(12)[:7].sort().values for _ in range(2)]), 3, 4)
    spikes = (torch.rand(3, 2 * 7, 5, p, p) > 0.8).double()
    grad = torch.randn(3, 2 * 7, 5, p // 2, p // 2).double()

    def run():
        x = spikes.clone().requires_grad_()
        out = apply_to_patches(nn.MaxPool2d(3, 2, 1), x, visible)
        return out, *torch.autograd.grad(out, x, grad)

    actual = run()
    with use_kernels('plain'):
        expected = run()
    assert 0. < expected[0].mean() < 1. and torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1])
