"""Layers of a spiking transformer: spiking self-attention, spiking MLP, encoder block, and their units.

Activations are time-major, `[T, B, ...]`. Convolutions, linear layers and BatchNorm fold time into the batch; only
neurons operate along the time dimension.

Source: the authors' V1 code, https://github.com/ZK-Zhou/spikformer, except where a docstring says otherwise. The paper
on Spikformer V2, https://arxiv.org/abs/2401.02020, does not change these layers.
"""
import copy
import math
from typing import Callable, List, Optional, Tuple

import torch
import torch.fx
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torchvision.ops import FrozenBatchNorm2d

from .kernels.events import (
    Events,
    convolve_norm_lif,
    convolve_norm_lif_fallback_reason,
    event_fallback_reason,
    events_from_bytes,
    is_too_small,
    try_read_events,
)
from .kernels.lif import norm_lif, norm_lif_fallback_reason
from .kernels.products import product, product_fallback_reason
from .kernels.rules import (
    back_end,
    context_fallback_reason,
    module_fallback_reason,
    record_original_methods,
    runs_in_kernel,
)
from .masking import VisibleTokens, apply_to_patches
from .neurons import LIF, get_stateful_inference, lif_plain
from .recompute import checkpoint_with_bn

__all__ = [
    'ConvBNLIF',
    'LinearBNLIF',
    'SpikingBlock',
    'SpikingBlocks',
    'SpikingMLP',
    'SpikingSelfAttention',
    'TimeSharedDropPath',
    'spiking_attention',
]


@torch.fx.wrap  # the order of the products depends on the shape
def spiking_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention without softmax, `q k^T v`, `[..., N, d]`; for binary spikes the values are integers.

    Without softmax the product is associative, exactly so for integers that the dtype represents (up to 2^24 in
    float32, 256 in bfloat16), so the cheaper order is computed. Its cost per head is `2 N d min(N, d)`
    multiply-accumulates.

    Args:
        q: Spikes, `[..., N, d]`.
        k: Spikes, `[..., N, d]`.
        v: Spikes, `[..., N, d]`.
    """
    if q.shape[-2] > q.shape[-1]:
        return q @ (k.transpose(-2, -1) @ v)
    return (q @ k.transpose(-2, -1)) @ v


class SpikingSelfAttention(nn.Module):
    """Spiking self-attention (SSA), `[T, B, N, C] -> [T, B, N, C]`.

    `LIF(BN(proj(LIF_0.5(q k^T v * attn_scale))))`, where q, k and v are the spikes of each head, and LIF_0.5
    has a threshold of 0.5. One fused qkv layer is equivalent to three layers with separate BN. As in V1, the scale does
    not depend on the head dimension.

    Args:
        dim: C.
        num_heads: Number of heads.
        attn_scale: Scale of `q k^T v`.
        proj_drop: Dropout rate of the output.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or the scale is not positive.

    >>> attn = SpikingSelfAttention(dim=16, num_heads=2)
    >>> attn(torch.rand(4, 2, 9, 16)).shape
    torch.Size([4, 2, 9, 16])
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
        self.proj = LinearBNLIF(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0. else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, x.shape[3] // self.num_heads))  # [T, B, N, 3, heads, d]
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # [T, B, heads, N, d]
        x = spiking_attention(q, k, v) * self.scale
        x = x.transpose(2, 3).flatten(3)  # [T, B, N, C]
        x = self.proj(self.attn_lif(x))
        return self.proj_drop(x)

    @torch.jit.ignore
    def kernel_groups(self) -> List[Tuple[str, Optional[str]]]:
        """Return `attn_lif` with the reason why it does not run in a kernel, None if it does: see `explain_kernels`."""
        reason = None
        if type(self.attn_lif) is not LIF:
            reason = f'attn_lif is a {type(self.attn_lif).__name__}'
        elif not self.attn_lif.constants.are_numbers:
            reason = 'the constants of attn_lif are not numbers'
        elif not back_end(self.qkv.linear.weight):
            reason = f'there is no kernel for {self.qkv.linear.weight.device}'
        return [('attn_lif', reason or context_fallback_reason())]


class SpikingMLP(nn.Module):
    """Two layers of linear - BN - LIF, `[T, B, N, C] -> [T, B, N, C]`.

    Args:
        dim: C.
        hidden_dim: Width of the hidden layer.
        drop: Dropout rate of the spikes of both layers.

    >>> spikes = SpikingMLP(dim=16, hidden_dim=64)(torch.rand(4, 2, 9, 16))
    >>> spikes.shape, bool(((spikes == 0) | (spikes == 1)).all())
    (torch.Size([4, 2, 9, 16]), True)
    """

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
        if not torch.jit.is_scripting():
            out = run_pair_event_driven(self.fc1, self.drop1, self.fc2, x, x.shape[0])
            if out is not None:
                return self.drop2(out)
        x = self.drop1(self.fc1(x))
        return self.drop2(self.fc2(x))


class TimeSharedDropPath(nn.Module):
    """Stochastic depth on `[T, B, ...]` that keeps or drops the branch of a sample at all time steps together.

    >>> branch = TimeSharedDropPath(0.5)(torch.ones(4, 8, 1))
    >>> torch.equal(branch, branch[:1].expand(4, -1, -1))  # equal at all time steps
    True
    """

    def __init__(self, drop_prob: float = 0.):
        super().__init__()
        self.drop_path = DropPath(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(x.transpose(0, 1)).transpose(0, 1)


class SpikingBlock(nn.Module):
    """Encoder block, `[T, B, N, C] -> [T, B, N, C]`: `x + SSA(x)`, then `x + MLP(x)`.

    Each branch ends with neurons, so x is a sum of spikes: its values are small integers, except in train mode with
    dropout or stochastic depth, which rescale spikes.

    Args:
        dim: C.
        num_heads: Number of attention heads.
        mlp_ratio: Ratio of the MLP's hidden width to C.
        attn_scale: Scale of `q k^T v`.
        proj_drop: Dropout rate of the spikes of attention and MLP.
        drop_path: Stochastic depth rate.

    >>> block = SpikingBlock(dim=16, num_heads=2)
    >>> block(torch.zeros(4, 2, 9, 16)).unique().tolist()  # no spikes in, no spikes out
    [0.0]
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


def _norm_and_fire(
        bn: nn.Module,
        neuron: nn.Module,
        x: Tensor,
        time_steps: int,
        batch: Tuple[int, ...],
) -> Optional[Tensor]:
    """Return the spikes of `neuron(bn(x))` from one kernel, or None if the modules have to be called.

    Args:
        bn: Normalization.
        neuron: Neuron after it.
        x: `[S * prod(batch), C, ...]`, where S is T or, if all time steps are the same, 1.
        time_steps: T.
        batch: Shape of the dimensions between time and channels: (B,) or (B, N).

    Returns:
        Spikes `[T, *batch, C, ...]`.
    """
    if not runs_in_kernel(lambda: norm_lif_fallback_reason(bn, neuron, LIF, x)):
        return None
    rows = math.prod(batch)
    args = bn, neuron.constants, x, time_steps, rows, lif_plain
    stateful = get_stateful_inference()
    if stateful is None:
        spikes, _ = norm_lif(*args)
        return spikes.unflatten(1, batch)

    def run(membrane: Tensor) -> Tuple[Tensor, Tensor]:
        spikes, membrane = norm_lif(*args, membrane.flatten(0, len(batch) - 1))
        return spikes.unflatten(1, batch), membrane.unflatten(0, batch)

    return stateful.run_neuron(neuron, x[:rows].unflatten(0, batch), run)


class SpikingBlocks(nn.Sequential):
    """Sequence of encoder blocks, `[T, B, N, C] -> [T, B, N, C]`.

    >>> blocks = SpikingBlocks(SpikingBlock(16, num_heads=2), SpikingBlock(16, num_heads=2))
    >>> len(blocks), blocks(torch.rand(4, 2, 9, 16)).shape
    (2, torch.Size([4, 2, 9, 16]))
    """

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_with_bn(block, x)
            else:
                x = block(x)
        return x


_FOLDABLE_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


class _Unit(nn.Module):
    """A convolution or linear layer, its BatchNorm `bn` and its neuron `lif`.

    The modules are called one by one unless a kernel can replace them: see `kernels.rules`.
    """
    layer_name: str

    def _fold(self, fold: Callable[[nn.Module, nn.Module], nn.Module]) -> '_Unit':
        layer = getattr(self, self.layer_name)
        is_foldable = (
            module_fallback_reason(layer, (nn.Conv2d, nn.Linear)) is None
            and module_fallback_reason(self.bn, _FOLDABLE_NORMS) is None
            and self.bn.running_mean is not None
            and layer.weight.shape[0] == len(self.bn.running_mean)
        )
        if not is_foldable:
            return self
        folded = copy.deepcopy(self).eval()  # the functions of PyTorch require eval mode
        setattr(folded, self.layer_name, fold(getattr(folded, self.layer_name), folded.bn))
        folded.bn = nn.Identity().eval()
        return folded

    @torch.jit.ignore
    def _fire_event_driven(
            self,
            x: Tensor,
            events: Optional[Events],
            input_steps: int,
            time_steps: int,
            as_bytes: bool = False,
    ) -> Optional[Tensor]:
        """Return the spikes of the unit, `[T * n, C', ...]`, or None if no event-driven kernel can compute them.

        Args:
            x: Input of the layer, `[S * n, ...]`.
            events: The input as events; None if no event-driven kernel supports the layer or its input.
            input_steps: S: T, or 1 if all time steps are the same.
            time_steps: T.
            as_bytes: Return spikes as bytes: see `convolve_norm_lif`.
        """
        if events is None or not events.is_sparse or input_steps != time_steps or get_stateful_inference() is not None:
            return None
        layer = getattr(self, self.layer_name)
        if not runs_in_kernel(lambda: convolve_norm_lif_fallback_reason(layer, self.bn, self.lif, LIF)):
            return None
        return convolve_norm_lif(layer, self.bn, self.lif, x, events, time_steps, as_bytes)

    @torch.jit.ignore
    def kernel_groups(self) -> List[Tuple[str, Optional[str]]]:
        """Return each group that a kernel can replace, with the reason if it does not: see `explain_kernels`."""
        layer = getattr(self, self.layer_name)
        return [
            (f'{self.layer_name}: event-driven', event_fallback_reason(layer)),
            (f'{self.layer_name}: input saved as int8', product_fallback_reason(layer)),
            ('bn + lif: one pass', norm_lif_fallback_reason(self.bn, self.lif, LIF)),
        ]


class ConvBNLIF(_Unit):
    """Convolution - BN - LIF, `[T or 1, B, C, H, W] -> [T, B, C', H', W']`.

    An input with a single step is repeated T times, but convolved and normalized only once. Outputs and batch
    statistics equal those of T steps, except in the unbiased running variance: its factor n / (n - 1) has n =
    B * H' * W' instead of T * B * H' * W'.

    With `visible`, the input consists of visible patches, `[T or 1, B * N', C, p, p]`. Masked neighbors are 0 in the
    convolution, and BN statistics cover only visible positions, as in SparK, https://arxiv.org/abs/2301.03580, so
    masked pixels do not influence visible ones.

    Args:
        in_chs: Number of input channels.
        out_chs: Number of output channels.
        kernel_size: Kernel size. With an odd size, the padding keeps the resolution at stride 1.
        stride: Stride.

    >>> unit = ConvBNLIF(3, 8, kernel_size=2, stride=2)
    >>> unit(torch.rand(1, 2, 3, 32, 32), time_steps=4).shape
    torch.Size([4, 2, 8, 16, 16])
    """
    layer_name = 'conv'

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

    def forward(self, x: Tensor, time_steps: int, visible: Optional[VisibleTokens] = None) -> Tensor:
        S, B = x.shape[:2]
        if torch.jit.is_scripting():
            x = self.conv(x.flatten(0, 1))
        elif visible is not None:
            x = apply_to_patches(self.conv, x, visible).flatten(0, 1)
        else:
            x = x.flatten(0, 1)
            events = try_read_events(self.conv, x)
            spikes = self._fire_event_driven(x, events, S, time_steps)
            if spikes is not None:
                return spikes.unflatten(0, (time_steps, B))
            x = product(self.conv, x, events)
        if not torch.jit.is_scripting():
            spikes = _norm_and_fire(self.bn, self.lif, x, time_steps, (B,))
            if spikes is not None:
                return spikes
        x = self.bn(x)
        x = x.unflatten(0, (S, -1)).expand(time_steps, -1, -1, -1, -1)
        return self.lif(x)

    def fuse(self) -> 'ConvBNLIF':
        """Return a copy for inference with BN folded into the convolution, for `timm.utils.reparameterize_model`.

        Running statistics are used even in train mode, because timm's scripts fold a model before calling eval().
        The unit is returned unchanged if its layer or BN has hooks, parametrizations, pruning or no running statistics,
        or is not a plain PyTorch layer.
        """
        return self._fold(fuse_conv_bn_eval)


class LinearBNLIF(_Unit):
    """Linear - BN - LIF, `[T, B, N, C] -> [T, B, N, C']`; BN statistics are computed over T, B and N.

    Args:
        in_features: C.
        out_features: C'.
        bias: Whether the linear layer has a bias.

    >>> LinearBNLIF(16, 32)(torch.rand(4, 2, 9, 16)).shape
    torch.Size([4, 2, 9, 32])
    """
    layer_name = 'linear'

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
        x = x.flatten(0, 2)
        if torch.jit.is_scripting():
            x = self.linear(x)
        else:
            events = try_read_events(self.linear, x)
            spikes = self._fire_event_driven(x, events, T, T)
            if spikes is not None:
                return spikes.unflatten(0, (T, B, N))
            x = product(self.linear, x, events)  # [T * B * N, C']
            spikes = _norm_and_fire(self.bn, self.lif, x, T, (B, N))
            if spikes is not None:
                return spikes
        x = self.bn(x)
        return self.lif(x.unflatten(0, (T, -1, N)))

    def fuse(self) -> 'LinearBNLIF':
        """Return a copy for inference with BN folded into the linear layer: see `ConvBNLIF.fuse`."""
        return self._fold(fuse_linear_bn_eval)


record_original_methods(ConvBNLIF)
record_original_methods(LinearBNLIF)


def run_pair_event_driven(
        first: nn.Module,
        between: Optional[nn.Module],
        second: nn.Module,
        x: Tensor,
        time_steps: int,
) -> Optional[Tensor]:
    """Return the spikes of `second(first(x))`, passing bytes between the units, or None if this is impossible.

    Used for inference, if `first` is event-driven and nothing observes the spikes between the units. If `second` is not
    event-driven, it is called with the spikes as floats.

    Args:
        first: A unit of this module, or a module that replaces one.
        between: A module between the two; bytes are passed only if it is None or an identity.
        second: A unit of this module, or a module that replaces one.
        x: `[T, B, ...]`.
        time_steps: T.
    """
    if context_fallback_reason() is not None or torch.is_grad_enabled() or type(x) is not Tensor:
        return None
    if x.shape[0] != time_steps:
        return None
    if any(module_fallback_reason(unit, (ConvBNLIF, LinearBNLIF)) is not None for unit in (first, second)):
        return None
    if between is not None and module_fallback_reason(between, (nn.Identity,)) is not None:
        return None
    num_dims = 2 if type(first) is ConvBNLIF else 3  # time, batch and, for linear layers, tokens
    rows = x.flatten(0, num_dims - 1)
    if is_too_small(getattr(first, first.layer_name), rows):
        return None
    events = try_read_events(getattr(first, first.layer_name), rows)
    spikes = first._fire_event_driven(rows, events, time_steps, time_steps, as_bytes=True)
    if spikes is None:
        return None
    events = events_from_bytes(getattr(second, second.layer_name), spikes)
    out = second._fire_event_driven(spikes, events, time_steps, time_steps)
    if out is not None:
        return out.unflatten(0, x.shape[:num_dims])
    spikes = spikes.float().unflatten(0, x.shape[:num_dims])
    return second(spikes, time_steps) if type(second) is ConvBNLIF else second(spikes)
