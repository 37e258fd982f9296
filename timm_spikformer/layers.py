"""Layers of a spiking transformer: convolution or linear + BN + LIF, spiking self-attention and MLP, encoder block.

Activations are time-major, `[T, B, ...]`. Weights see time as part of the batch; only neurons see it as time.

Source: section numbers of the paper are those of Spikformer V2, https://arxiv.org/abs/2401.02020; what the paper leaves
open follows the authors' V1 code, https://github.com/ZK-Zhou/spikformer.
"""
from typing import Optional, Tuple

import torch
import torch.fx
from timm.layers import DropPath
from torch import Tensor, nn

from .neurons import LIF

__all__ = [
    'ConvBNLIF',
    'LinearBNLIF',
    'SpikingBlock',
    'SpikingMLP',
    'SpikingSelfAttention',
    'Visible',
    'keep_visible',
    'spiking_attention',
    'visible_rows',
]

# What is left of masked images: the tokens, [B, N'] in increasing order, and the width of the grid that they are of.
Visible = Tuple[Tensor, int]


def visible_rows(visible: Visible, x: Tensor) -> Tensor:
    """Indices of the visible pixels of `x`, `[n * B, C, H, W]`, among its `n * B * H * W`: `[n * B * N' * p * p]`.

    A token covers p x p pixels, where W is p times the width of the grid.
    """
    ids, width = visible
    H, W = x.shape[-2:]
    p = W // width
    inside = torch.arange(p, device=x.device)
    rows = (ids // width).unsqueeze(2) * p + inside  # [B, N', p]
    cols = (ids % width).unsqueeze(2) * p + inside
    pixels = (rows.unsqueeze(3) * W + cols.unsqueeze(2)).flatten(1)  # [B, N' * p * p]
    pixels = pixels.repeat(x.shape[0] // ids.shape[0], 1)
    return (pixels + torch.arange(x.shape[0], device=x.device).unsqueeze(1) * (H * W)).flatten()


def keep_visible(x: Tensor, visible: Visible) -> Tensor:
    """`x`, `[n * B, C, H, W]`, with 0 at masked pixels, whatever they hold."""
    n, _, H, W = x.shape
    is_masked = torch.ones(n * H * W, dtype=torch.bool, device=x.device)
    is_masked = is_masked.index_fill(0, visible_rows(visible, x), False)
    return x.masked_fill(is_masked.view(n, 1, H, W), 0.)


class ConvBNLIF(nn.Module):
    """Convolution without bias - BN - LIF, `[T or 1, B, C, H, W] -> [T, B, C', H', W']`.

    An input with a single step stands for one that is the same at all T steps. It is convolved and normalised once: the
    result is exact, and so are the batch statistics, but for the factor n / (n - 1) of the running variance, where n
    then counts each value once, not T times.

    Of masked images, only the visible pixels are normalised, by statistics of their own, and fire; the others are 0.
    What comes in has to be 0 at masked pixels: then nothing of them reaches a visible one. As in SparK,
    https://arxiv.org/abs/2301.03580.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 3,
            stride: int = 1,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv = nn.Conv2d(
            in_chs,
            out_chs,
            kernel_size,
            stride=stride,
            padding=(kernel_size - stride + 1) // 2,
            bias=False,
            **dd,
        )
        self.bn = nn.BatchNorm2d(out_chs, **dd)
        self.lif = LIF()

    def forward(self, x: Tensor, time_steps: int, visible: Optional[Visible] = None) -> Tensor:
        B = x.shape[1]
        x = self.conv(x.flatten(0, 1))
        if visible is None:
            x = self.bn(x)
        else:
            n, C, H, W = x.shape
            rows = visible_rows(visible, x)
            pixels = x.permute(0, 2, 3, 1).reshape(-1, C)
            normed = self.bn(pixels.index_select(0, rows).unflatten(1, (C, 1, 1))).flatten(1)
            x = torch.zeros_like(pixels, dtype=normed.dtype).index_copy(0, rows, normed)
            x = x.unflatten(0, (n, H, W)).permute(0, 3, 1, 2)
        x = x.unflatten(0, (-1, B)).expand(time_steps, -1, -1, -1, -1)
        return self.lif(x)


class LinearBNLIF(nn.Module):
    """Linear - BN - LIF, `[T, B, N, C] -> [T, B, N, C']`, where BN takes its statistics over T, B and N."""

    def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias, **dd)
        self.bn = nn.BatchNorm1d(out_features, **dd)
        self.lif = LIF()

    def forward(self, x: Tensor) -> Tensor:
        T, B, N, _ = x.shape
        x = self.bn(self.linear(x.flatten(0, 2)))  # [T * B * N, C']
        return self.lif(x.unflatten(0, (T, B, N)))


@torch.fx.wrap  # the order of the products depends on the shape
def spiking_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a softmax, `q k^T v`, over spikes `[..., N, d]`; the result holds integers.

    There being no softmax, the product is associative, exactly for integers: the cheaper order is taken, so that the
    cost per head is `2 N d min(N, d)`.
    """
    if q.shape[-2] > q.shape[-1]:
        return q @ (k.transpose(-2, -1) @ v)
    return (q @ k.transpose(-2, -1)) @ v


class SpikingSelfAttention(nn.Module):
    """Spiking self-attention (SSA), `[T, B, N, C] -> [T, B, N, C]`.

    `lif(proj(LIF_0.5(q k^T v * 0.125)))` per head, with spikes q, k, v. They come from one product, which equals three
    with a BN each. The scale does not depend on the width of a head, as in V1.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(
                f'embed_dim must be divisible by num_heads, got embed_dim={dim} and num_heads={num_heads}.')
        self.num_heads = num_heads
        self.scale = 0.125
        self.qkv = LinearBNLIF(dim, 3 * dim, bias=False, **dd)
        self.attn_lif = LIF(v_threshold=0.5)
        self.proj = LinearBNLIF(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0. else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        T, B, N, C = x.shape
        qkv = self.qkv(x).reshape(T, B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # [T, B, heads, N, d]
        x = spiking_attention(q, k, v) * self.scale
        x = x.transpose(2, 3).reshape(T, B, N, C)
        x = self.proj(self.attn_lif(x))
        return self.proj_drop(x)


class SpikingMLP(nn.Module):
    """Two layers of linear - BN - LIF, `[T, B, N, C] -> [T, B, N, C]`."""

    def __init__(
            self,
            dim: int,
            hidden_dim: int,
            drop: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc1 = LinearBNLIF(dim, hidden_dim, **dd)
        self.drop1 = nn.Dropout(drop) if drop > 0. else nn.Identity()
        self.fc2 = LinearBNLIF(hidden_dim, dim, **dd)
        self.drop2 = nn.Dropout(drop) if drop > 0. else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.fc1(x))
        return self.drop2(self.fc2(x))


class TimeSharedDropPath(nn.Module):
    """Stochastic depth on `[T, B, ...]`: a sample keeps or loses the branch at all time steps together."""

    def __init__(self, drop_prob: float = 0.):
        super().__init__()
        self.drop_path = DropPath(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(x.transpose(0, 1)).transpose(0, 1)


class SpikingBlock(nn.Module):
    """Encoder block, `[T, B, N, C] -> [T, B, N, C]`: `x + SSA(x)`, then `x + MLP(x)`.

    Each branch ends in a neuron and the sums are of spikes, so x holds small integers.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            mlp_ratio: float = 4.,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.attn = SpikingSelfAttention(dim, num_heads, proj_drop=proj_drop, **dd)
        self.drop_path1 = TimeSharedDropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.mlp = SpikingMLP(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = TimeSharedDropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(x))
        x = x + self.drop_path2(self.mlp(x))
        return x
