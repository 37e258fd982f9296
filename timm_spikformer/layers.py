"""Layers of a spiking transformer: convolution or linear + BN + LIF, spiking self-attention and MLP, encoder block.

Activations are time-major, `[T, B, ...]`. Weights see time as part of the batch; only neurons see it as time.

Source: section numbers of the paper are those of Spikformer V2, https://arxiv.org/abs/2401.02020; what the paper leaves
open follows the authors' V1 code, https://github.com/ZK-Zhou/spikformer.
"""
import copy
from typing import Any, Optional, Tuple

import torch
import torch.fx
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .neurons import LIF, is_plain, norm_of

__all__ = [
    'ConvBNLIF',
    'LinearBNLIF',
    'SpikingBlock',
    'SpikingMLP',
    'SpikingSelfAttention',
    'Visible',
    'conv3x3_of_patches',
    'maps_of_patches',
    'spiking_attention',
    'visible_patches',
    'with_halo',
]

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


class _ProductOfSpikes(torch.autograd.Function):
    """A convolution or linear layer that keeps its input, spikes, as a byte each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor], *conv_args: Tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x.to(torch.int8), weight)  # to uint8 takes a CPU many times as long
        ctx.conv_args = conv_args
        return nn.functional.conv2d(x, weight, bias, *conv_args) if conv_args else nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x = x.to(weight.dtype)
        if ctx.conv_args:
            stride, padding = ctx.conv_args
            grads = torch.ops.aten.convolution_backward(
                grad, x, weight, weight.shape[:1], stride, padding, (1, 1), False, (0, 0), 1,
                (needs_x, needs_weight, needs_bias))
        else:
            grads = (
                grad @ weight if needs_x else None,
                grad.t() @ x if needs_weight else None,
                grad.sum(0) if needs_bias else None,
            )
        return *grads, *(None for _ in ctx.conv_args)


def _apply_to_spikes(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)` of a convolution or linear layer; keeps bytes, unless something else is made of the layer."""
    is_eager = type(x) is Tensor and not (torch.jit.is_tracing() or torch.compiler.is_compiling())
    if not is_eager or not torch.is_grad_enabled() or not is_plain(layer, nn.Conv2d, nn.Linear):
        return layer(x)
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return layer(x)
    args = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else ()
    return _ProductOfSpikes.apply(x, layer.weight, layer.bias, *args)


class ConvBNLIF(nn.Module):
    """Convolution without bias - BN - LIF, `[T or 1, B, C, H, W] -> [T, B, C', H', W']`.

    An input with a single step stands for one that is the same at all T steps. It is convolved and normalised once: the
    result is exact, and so are the batch statistics, but for the factor n / (n - 1) of the running variance, where n
    then counts each value once, not T times.

    Of masked images, the visible patches take the place of images, `[T or 1, B * N', C, p, p]`: they are normalised by
    statistics of their own, and a 3x3 convolution sees 0 where its neighbours are masked. So nothing of a masked pixel
    reaches a visible one, as in SparK, https://arxiv.org/abs/2301.03580, and nothing is computed where nothing is seen.

    Args:
        of_spikes: That the input is 0 and 1 alone, so that a byte of each value will do for the backward.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 3,
            stride: int = 1,
            of_spikes: bool = False,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.of_spikes = of_spikes
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
        if visible is not None and self.conv.kernel_size[0] == 3:
            x = conv3x3_of_patches(x, self.conv.weight, visible, self.conv.bias)
        elif not torch.jit.is_scripting() and self.of_spikes:
            x = _apply_to_spikes(self.conv, x.flatten(0, 1))
        else:
            x = self.conv(x.flatten(0, 1))
        if not torch.jit.is_scripting():
            norm = norm_of(self.bn, x, time_steps)
            if norm is not None:
                return self.lif(x.unflatten(0, (-1, B)), norm)
        x = self.bn(x)
        x = x.unflatten(0, (-1, B)).expand(time_steps, -1, -1, -1, -1)
        return self.lif(x)

    def fuse(self) -> 'ConvBNLIF':
        """A copy for inference, BN folded into the convolution: what `timm.utils.reparameterize_model` puts in place.

        The running statistics are folded in train mode too, as timm's scripts fold a model before they call eval().
        """
        if isinstance(self.bn, nn.Identity):
            return self
        fused = copy.deepcopy(self).eval()
        fused.conv, fused.bn = fuse_conv_bn_eval(fused.conv, fused.bn), nn.Identity()
        return fused


class LinearBNLIF(nn.Module):
    """Linear - BN - LIF, `[T, B, N, C] -> [T, B, N, C']`, where BN takes its statistics over T, B and N.

    Args:
        of_spikes: That the input is 0 and 1 alone, so that a byte of each value will do for the backward.
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            of_spikes: bool = False,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.of_spikes = of_spikes
        self.linear = nn.Linear(in_features, out_features, bias=bias, **dd)
        self.bn = nn.BatchNorm1d(out_features, **dd)
        self.lif = LIF()

    def forward(self, x: Tensor) -> Tensor:
        T, B, N, _ = x.shape
        x = x.flatten(0, 2)
        if not torch.jit.is_scripting() and self.of_spikes:
            x = _apply_to_spikes(self.linear, x)
        else:
            x = self.linear(x)  # [T * B * N, C']
        if not torch.jit.is_scripting():
            norm = norm_of(self.bn, x, T)
            if norm is not None:
                return self.lif(x.unflatten(0, (T, B, N)), norm)
        x = self.bn(x)
        return self.lif(x.unflatten(0, (T, B, N)))

    def fuse(self) -> 'LinearBNLIF':
        """A copy for inference, BN folded into the linear layer: see `ConvBNLIF.fuse`."""
        if isinstance(self.bn, nn.Identity):
            return self
        fused = copy.deepcopy(self).eval()
        fused.linear, fused.bn = fuse_linear_bn_eval(fused.linear, fused.bn), nn.Identity()
        return fused


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

    `lif(proj(LIF_0.5(q k^T v * attn_scale)))` per head, with spikes q, k, v. They come from one product, which equals
    three with a BN each. As in V1, the scale is a constant: it does not follow from the width of a head.
    """

    def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            attn_scale: float = 0.125,
            proj_drop: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(
                f'embed_dim must be divisible by num_heads, got embed_dim={dim} and num_heads={num_heads}.')
        if not attn_scale > 0.:
            raise ValueError(f'attn_scale must be greater than 0, got {attn_scale}.')
        self.num_heads = num_heads
        self.scale = attn_scale
        self.qkv = LinearBNLIF(dim, 3 * dim, bias=False, **dd)
        self.attn_lif = LIF(v_threshold=0.5)
        self.proj = LinearBNLIF(dim, dim, of_spikes=True, **dd)
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
        self.fc2 = LinearBNLIF(hidden_dim, dim, of_spikes=not drop > 0., **dd)
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
            attn_scale: float = 0.125,
            proj_drop: float = 0.,
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.attn = SpikingSelfAttention(dim, num_heads, attn_scale=attn_scale, proj_drop=proj_drop, **dd)
        self.drop_path1 = TimeSharedDropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.mlp = SpikingMLP(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path2 = TimeSharedDropPath(drop_path) if drop_path > 0. else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(x))
        x = x + self.drop_path2(self.mlp(x))
        return x
