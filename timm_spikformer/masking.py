"""Operations on masked images: extract visible patches, add halos, and apply layers to patches.

The input of each stem layer is 0 at masked pixels, and only the output at visible pixels is used, as in SparK,
https://arxiv.org/abs/2301.03580. Feature maps are therefore stored as visible patches, `[n, M, C, p, p]`: n is the
number of time steps, or 1 if all are the same; M = B * N' is the number of visible patches of all images, where N' is
that of each image; and p is the side of a patch at the resolution of the map.

`apply_to_patches` calls any module on the masked maps, `[n * B, C, H, W]`. For the layers of the stems, it computes the
same output from the visible patches only, which is cheaper: 3x3 convolutions with stride 1 and padding 1, convolutions
without padding whose stride equals the kernel size, and 3x3 max pooling with stride 2 and padding 1.
"""
import copy
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .kernels.products import product
from .kernels.rules import fallback_reason, runs_in_kernel

__all__ = [
    'VisibleTokens',
    'add_halo',
    'apply_to_patches',
    'conv3x3_of_patches',
    'patches_to_maps',
    'visible_patches',
]


class VisibleTokens(NamedTuple):
    """The tokens that a mask leaves.

    Args:
        ids: Indices of the visible tokens of each image, `[B, N']`, in increasing order.
        height: Height of the grid of all tokens.
        width: Width of the grid of all tokens.
    """
    ids: Tensor
    height: int
    width: int


def _gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Return `x[indices]` for a matrix; on CPU, the backward of gather is many times faster than that of indexing."""
    return x.gather(0, indices.unsqueeze(1).expand(-1, x.shape[1]))


def _visible_pixel_indices(visible: VisibleTokens, n: int, p: int) -> Tensor:
    """Return the indices of the visible pixels in n * B flattened maps, token by token: `[n * B * N' * p * p]`."""
    ids, height, width = visible
    H, W = height * p, width * p
    inside = torch.arange(p, device=ids.device)
    rows = (ids // width).unsqueeze(2) * p + inside  # [B, N', p]
    cols = (ids % width).unsqueeze(2) * p + inside
    indices = (rows.unsqueeze(3) * W + cols.unsqueeze(2)).flatten(1).repeat(n, 1)  # [n * B, N' * p * p]
    return (indices + torch.arange(indices.shape[0], device=ids.device).unsqueeze(1) * (H * W)).flatten()


def visible_patches(x: Tensor, visible: VisibleTokens) -> Tensor:
    """Return the visible patches of maps: `[n, B, C, H, W] -> [n, B * N', C, p, p]`, where p = W / grid width."""
    n, B, C, H, W = x.shape
    p = W // visible.width
    pixels = x.permute(0, 1, 3, 4, 2).reshape(-1, C)
    patches = _gather_rows(pixels, _visible_pixel_indices(visible, n, p))
    return patches.view(n, -1, p, p, C).permute(0, 1, 4, 2, 3)


def patches_to_maps(x: Tensor, visible: VisibleTokens) -> Tensor:
    """Return the maps `[n, B, C, H, W]` of patches `[n, B * N', C, p, p]`, with 0 at masked positions."""
    n, _, C, p, _ = x.shape
    ids, height, width = visible
    B, H, W = ids.shape[0], height * p, width * p
    indices = _visible_pixel_indices(visible, n, p)
    pixels = x.permute(0, 1, 3, 4, 2).reshape(-1, C)
    maps = pixels.new_zeros(n * B * H * W, C).scatter(0, indices.unsqueeze(1).expand(-1, C), pixels)
    return maps.view(n, B, H, W, C).permute(0, 1, 4, 2, 3)


def _halo_indices(visible: VisibleTokens, p: int) -> Tensor:
    """Return the indices, among the `M * p * p` visible pixels, of the pixels in and around each visible patch.

    Returns:
        Indices `[M, p + 2, p + 2]`; `M * p * p` denotes a masked pixel, `M * p * p + 1` a pixel outside the image.
    """
    ids, height, width = visible
    B, num_visible = ids.shape
    M = B * num_visible
    # index of the patch at each position of the grid with a border: M if masked, M + 1 if outside the image
    patch_index = torch.full((B, height, width), M, dtype=torch.long, device=ids.device)
    patch_index = F.pad(patch_index, (1, 1, 1, 1), value=M + 1).flatten(1)
    positions = (ids // width + 1) * (width + 2) + ids % width + 1  # [B, N']
    patch_index = patch_index.scatter(1, positions, torch.arange(M, device=ids.device).view(B, num_visible))
    step = torch.arange(-1, 2, device=ids.device)
    neighbor_offsets = (step.unsqueeze(1) * (width + 2) + step).flatten()  # [9]
    neighbors = patch_index.gather(1, (positions.unsqueeze(2) + neighbor_offsets).flatten(1)).view(M, 3, 3)
    inside = torch.arange(-1, p + 1, device=ids.device)
    relative_position = (inside >= p).long() - (inside < 0).long() + 1  # 0, 1, 2: before, in, after the patch
    source = neighbors[:, relative_position][:, :, relative_position]  # [M, p + 2, p + 2]
    offset = inside.remainder(p)
    indices = source * (p * p) + offset.unsqueeze(1) * p + offset
    return torch.where(source < M, indices, source + (M * p * p - M))


def _gather_with_halo(x: Tensor, indices: Tensor, outside: float = 0.) -> Tensor:
    """Return the pixels of patches `[n, M, C, p, p]` at the indices of `_halo_indices`: `[n * indices.numel(), C]`."""
    n, C = x.shape[0], x.shape[2]
    pixels = x.permute(0, 1, 3, 4, 2).reshape(n, -1, C)
    pixels = torch.cat([pixels, pixels.new_zeros(n, 1, C), pixels.new_full((n, 1, C), outside)], dim=1)
    indices = indices.flatten() + torch.arange(n, device=indices.device).unsqueeze(1) * pixels.shape[1]
    return _gather_rows(pixels.flatten(0, 1), indices.flatten())


def add_halo(x: Tensor, visible: VisibleTokens, outside: float = 0.) -> Tensor:
    """Return patches with the surrounding pixels, `[n, M, C, p, p] -> [n * M, C, p + 2, p + 2]`.

    Args:
        x: Patches.
        visible: The visible tokens.
        outside: Value of pixels outside the image. Masked pixels are 0.
    """
    C, p = x.shape[2], x.shape[-1]
    pixels = _gather_with_halo(x, _halo_indices(visible, p), outside)
    return pixels.view(-1, p + 2, p + 2, C).permute(0, 3, 1, 2)


def conv3x3_of_patches(
        x: Tensor,
        weight: Tensor,
        visible: VisibleTokens,
        bias: Optional[Tensor] = None,
        groups: int = 1,
) -> Tensor:
    """Return the 3x3 convolution, with padding 1, of masked maps at the visible patches.

    For p <= 2 and one group, it is computed as a matrix product, which is up to ten times faster on a CPU.

    Args:
        x: Patches, `[n, M, C, p, p]`.
        weight: `[C', C / groups, 3, 3]`.
        visible: The visible tokens.
        bias: `[C']`.
        groups: Groups of the convolution.

    Returns:
        Patches, `[n * M, C', p, p]`.
    """
    n, M, C, p, _ = x.shape
    if p > 2 or groups > 1:
        return F.conv2d(add_halo(x, visible), weight, bias, groups=groups)
    indices = _halo_indices(visible, p).unfold(1, 3, 1).unfold(2, 3, 1)  # [M, p, p, 3, 3]
    windows = _gather_with_halo(x, indices).view(n * M * p * p, 9 * C)
    out = F.linear(windows, weight.permute(0, 2, 3, 1).flatten(1), bias)
    return out.view(n * M, p, p, weight.shape[0]).permute(0, 3, 1, 2)


def _without_padding(layer: nn.Conv2d) -> nn.Conv2d:
    """Return a layer with the same parameters that does not pad its input."""
    layer = copy.copy(layer)
    layer.padding = (0, 0)
    return layer


def _apply_to_visible(layer: nn.Module, x: Tensor, visible: VisibleTokens) -> Optional[Tensor]:
    """Compute `apply_to_patches` from the visible patches only; return None if `layer` needs the full maps."""
    classes = nn.Conv2d, nn.MaxPool2d, nn.Identity
    if not runs_in_kernel(lambda: fallback_reason((layer,), (classes,), x)):
        return None
    if type(layer) is nn.Identity:
        return x
    n, _, _, p, _ = x.shape
    if type(layer) is nn.MaxPool2d:
        args = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.ceil_mode, layer.return_indices
        if args != (3, 2, 1, 1, False, False) or p % 2 != 0:
            return None
        return F.max_pool2d(add_halo(x, visible, -torch.inf), 3, 2).unflatten(0, (n, -1))
    kernel, stride, padding, dilation = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    if (kernel, stride, padding, dilation) == ((3, 3), (1, 1), (1, 1), (1, 1)):
        if p > 2:
            out = product(_without_padding(layer), add_halo(x, visible))
        else:
            out = conv3x3_of_patches(x, layer.weight, visible, layer.bias, layer.groups)
    elif kernel == stride and padding == (0, 0) and dilation == (1, 1) and p % kernel[0] == 0 and p % kernel[1] == 0:
        out = product(layer, x.flatten(0, 1))
    else:
        return None
    return out.unflatten(0, (n, -1))


def apply_to_patches(layer: nn.Module, x: Tensor, visible: VisibleTokens) -> Tensor:
    """Return the visible patches of `layer(maps)`, where maps are 0 at masked positions.

    Args:
        layer: Any module `[n * B, C, H, W] -> [n * B, C', H', W']`.
        x: Visible patches of the input, `[n, M, C, p, p]`.
        visible: The visible tokens.

    Returns:
        Patches, `[n, M, C', p', p']`.
    """
    out = _apply_to_visible(layer, x, visible)
    if out is None:
        maps = layer(patches_to_maps(x, visible).flatten(0, 1))
        out = visible_patches(maps.unflatten(0, (x.shape[0], -1)), visible)
    return out
