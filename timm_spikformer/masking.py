"""Arithmetic of masked images: visible patches, their halos, and 3x3 convolutions of them.

Activations are time-major, `[T, B, ...]`; n stands for T, or 1 where all time steps are the same.
"""
from typing import Optional, Tuple

import torch
from torch import Tensor, nn

__all__ = ['Visible', 'conv3x3_of_patches', 'maps_of_patches', 'visible_patches', 'with_halo']

# What is left of masked images: the tokens, [B, N'] in increasing order, and height and width of the grid of them all.
Visible = Tuple[Tensor, int, int]


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]` of a matrix. As a gather, whose gradient is a scatter, many times faster on a CPU than index_add."""
    return x.gather(0, rows.unsqueeze(1).expand(-1, x.shape[1]))


def _visible_rows(visible: Visible, n: int, p: int) -> Tensor:
    """Indices of the visible pixels among all of n * B maps, token by token of p x p: `[n * B * N' * p * p]`."""
    ids, height, width = visible
    H, W = height * p, width * p
    inside = torch.arange(p, device=ids.device)
    rows = (ids // width).unsqueeze(2) * p + inside  # [B, N', p]
    cols = (ids % width).unsqueeze(2) * p + inside
    pixels = (rows.unsqueeze(3) * W + cols.unsqueeze(2)).flatten(1)  # [B, N' * p * p]
    pixels = pixels.repeat(n, 1)
    return (pixels + torch.arange(pixels.shape[0], device=ids.device).unsqueeze(1) * (H * W)).flatten()


def visible_patches(x: Tensor, visible: Visible) -> Tensor:
    """The visible patches of maps: `[n, B, C, H, W] -> [n, B * N', C, p, p]`, where W is p times the grid's width."""
    n, B, C, H, W = x.shape
    p = W // visible[2]
    pixels = x.permute(0, 1, 3, 4, 2).reshape(-1, C)
    patches = _take_rows(pixels, _visible_rows(visible, n, p))
    return patches.view(n, -1, p, p, C).permute(0, 1, 4, 2, 3)


def maps_of_patches(x: Tensor, visible: Visible) -> Tensor:
    """The inverse of `visible_patches`, 0 where nothing is visible."""
    n, _, C, p, _ = x.shape
    ids, height, width = visible
    B, H, W = ids.shape[0], height * p, width * p
    rows = _visible_rows(visible, n, p)
    pixels = x.permute(0, 1, 3, 4, 2).reshape(-1, C)
    maps = pixels.new_zeros(n * B * H * W, C).scatter(0, rows.unsqueeze(1).expand(-1, C), pixels)
    return maps.view(n, B, H, W, C).permute(0, 1, 4, 2, 3)


def _halo_rows(visible: Visible, p: int) -> Tensor:
    """Where the pixels of each visible patch and around it are among the `M * p * p` of all: `[M, p + 2, p + 2]`.

    What is around a patch is of its neighbours in the grid. `M * p * p` stands for what is masked or outside.
    """
    ids, height, width = visible
    B, N = ids.shape
    M = B * N
    # which patch is at each place of a grid with a border: M stands for none
    place = torch.full((B, (height + 2) * (width + 2)), M, dtype=torch.long, device=ids.device)
    at = (ids // width + 1) * (width + 2) + ids % width + 1  # [B, N']
    place = place.scatter(1, at, torch.arange(M, device=ids.device).view(B, N))
    step = torch.arange(-1, 2, device=ids.device)
    around = (step.unsqueeze(1) * (width + 2) + step).flatten()  # [9]
    neighbours = place.gather(1, (at.unsqueeze(2) + around).flatten(1)).view(M, 3, 3)
    inside = torch.arange(-1, p + 1, device=ids.device)
    which = (inside >= p).long() - (inside < 0).long() + 1  # 0, 1, 2: before, in, after the patch
    source = neighbours[:, which][:, :, which]  # [M, p + 2, p + 2]
    offset = inside.remainder(p)
    rows = source * (p * p) + offset.unsqueeze(1) * p + offset
    return rows.clamp(max=M * p * p)


def _take_with_zero(x: Tensor, rows: Tensor) -> Tensor:
    """Pixels of patches `[n, M, C, p, p]` by their indices, `[..., 9 or so]`, among each n's `M * p * p`, or 0."""
    n, C = x.shape[0], x.shape[2]
    pixels = x.permute(0, 1, 3, 4, 2).reshape(n, -1, C)
    pixels = torch.cat([pixels, pixels.new_zeros(n, 1, C)], dim=1)
    rows = rows.flatten() + torch.arange(n, device=rows.device).unsqueeze(1) * pixels.shape[1]
    return _take_rows(pixels.flatten(0, 1), rows.flatten())


def with_halo(x: Tensor, visible: Visible) -> Tensor:
    """Patches and the pixels around them, 0 where masked: `[n, M, C, p, p] -> [n * M, C, p + 2, p + 2]`."""
    C, p = x.shape[2], x.shape[-1]
    pixels = _take_with_zero(x, _halo_rows(visible, p))
    return pixels.view(-1, p + 2, p + 2, C).permute(0, 3, 1, 2)


def conv3x3_of_patches(x: Tensor, weight: Tensor, visible: Visible, bias: Optional[Tensor] = None) -> Tensor:
    """What a 3x3 convolution, padded by 1, gives at the visible patches of masked maps: `[n * M, C', p, p]`.

    Of patches of 1 and 2 pixels it is a matrix product: as convolutions these are up to ten times slower on a CPU.
    """
    n, M, C, p, _ = x.shape
    if p > 2:
        return nn.functional.conv2d(with_halo(x, visible), weight, bias)
    rows = _halo_rows(visible, p).unfold(1, 3, 1).unfold(2, 3, 1)  # [M, p, p, 3, 3]
    windows = _take_with_zero(x, rows).view(n * M * p * p, 9 * C)
    out = nn.functional.linear(windows, weight.permute(0, 2, 3, 1).flatten(1), bias)
    return out.view(n * M, p, p, weight.shape[0]).permute(0, 3, 1, 2)
