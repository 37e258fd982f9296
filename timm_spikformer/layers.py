"""Layers of a spiking transformer: convolution or linear + BN + LIF, spiking self-attention and MLP, encoder block.

Activations are time-major, `[T, B, ...]`. Weights see time as part of the batch; only neurons see it as time.

Source: section numbers of the paper are those of Spikformer V2, https://arxiv.org/abs/2401.02020; what the paper leaves
open follows the authors' V1 code, https://github.com/ZK-Zhou/spikformer.
"""
import torch.fx
from timm.layers import DropPath
from torch import Tensor, nn

from .neurons import LIF

__all__ = ['ConvBNLIF', 'LinearBNLIF', 'SpikingBlock', 'SpikingMLP', 'SpikingSelfAttention', 'spiking_attention']


class ConvBNLIF(nn.Module):
    """Convolution without bias - BN - LIF, `[T or 1, B, C, H, W] -> [T, B, C', H', W']`.

    An input with a single step stands for one that is the same at all T steps. It is convolved and normalised once: the
    result is exact, and so are the batch statistics, but for the factor n / (n - 1) of the running variance, where n
    then counts each value once, not T times.
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

    def forward(self, x: Tensor, time_steps: int) -> Tensor:
        B = x.shape[1]
        x = self.bn(self.conv(x.flatten(0, 1)))
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
