"""The two stems: the Spiking Convolutional Stem of Spikformer V2 and Spiking Patch Splitting of Spikformer (V1).

Both turn images `[T or 1, B, in_chans, H, W]` into feature maps `[T, B, embed_dim, H / patch_size, W / patch_size]` in
four stages of widths D/8, D/4, D/2 and D = embed_dim. `stem_strides` sets which stages halve the resolution.
"""
import math
from typing import Iterable, List, Optional, Sequence

import torch
from torch import Tensor, nn

from .layers import ConvBNLIF, run_pair_event_driven
from .masking import VisibleTokens, apply_to_patches, patches_to_maps, visible_patches
from .recompute import checkpoint_with_bn

__all__ = ['SpikingConvStem', 'SpikingPatchSplitting', 'STEMS']

_NUM_STAGES = 4


def resolve_strides(patch_size: int, stem_strides: Optional[Sequence[int]] = None) -> List[int]:
    """Return the strides of the four stages; by default the last stages have stride 2, as in V1's CIFAR model.

    Downsampling in early stages is several times cheaper, as most operations are at high resolution.

    Raises:
        ValueError: The strides are not four values of 1 or 2 whose product is the patch size, or the patch size is
            not 1, 2, 4, 8 or 16.
    """
    if stem_strides is None:
        num_reductions = int(math.log2(patch_size)) if patch_size > 0 else 0
        if 2 ** num_reductions != patch_size or num_reductions > _NUM_STAGES:
            raise ValueError(f'patch_size must be 1, 2, 4, 8 or 16, got {patch_size}.')
        return [1] * (_NUM_STAGES - num_reductions) + [2] * num_reductions
    strides = list(stem_strides) if isinstance(stem_strides, Iterable) else []
    if len(strides) != _NUM_STAGES or any(s not in (1, 2) for s in strides) or math.prod(strides) != patch_size:
        raise ValueError(
            f'stem_strides must be {_NUM_STAGES} values of 1 or 2 whose product is patch_size={patch_size}, '
            f'got {stem_strides}.')
    return strides


class _Stage(nn.Module):
    """Base class of a stage, `[T or 1, B, C, H, W] -> [T, B, C', H', W']`, which is computed by `forward_patches`.

    For masked images, the input of `forward_patches` consists of the visible patches, `[T or 1, B * N', C, p, p]`.
    """

    def forward(self, x: Tensor, time_steps: int, visible: Optional[VisibleTokens] = None) -> Tensor:
        if visible is None:
            return self.forward_patches(x, time_steps)
        return patches_to_maps(self.forward_patches(visible_patches(x, visible), time_steps, visible), visible)


class SpikingConvStage(_Stage):
    """2x2 stride-2 (or 3x3 stride-1) convolution - BN - LIF, then `x + contract(expand(x))` with 3x3 convolutions."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 2,
            expand_ratio: float = 4.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        hidden_chs = int(out_chs * expand_ratio)
        self.down = ConvBNLIF(in_chs, out_chs, kernel_size=2 if stride == 2 else 3, stride=stride, **dd)
        self.expand = ConvBNLIF(out_chs, hidden_chs, **dd)
        self.contract = ConvBNLIF(hidden_chs, out_chs, **dd)

    def forward_patches(self, x: Tensor, time_steps: int, visible: Optional[VisibleTokens] = None) -> Tensor:
        x = self.down(x, time_steps, visible)
        if not torch.jit.is_scripting():
            out = run_pair_event_driven(self.expand, None, self.contract, x, time_steps) if visible is None else None
            if out is not None:
                return x + out
        return x + self.contract(self.expand(x, time_steps, visible), time_steps, visible)


class SpikingPatchStage(_Stage):
    """3x3 convolution - BN - LIF, then 3x3 stride-2 max-pooling of the spikes if the stride is 2.

    The last stage has `pos_embed` and adds `LIF(BN(conv3x3(x)))` to its output.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 2,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.proj = ConvBNLIF(in_chs, out_chs, **dd)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if stride == 2 else nn.Identity()
        self.pos_embed = None

    def forward_patches(self, x: Tensor, time_steps: int, visible: Optional[VisibleTokens] = None) -> Tensor:
        x = self.proj(x, time_steps, visible)
        T = x.shape[0]
        if torch.jit.is_scripting() or visible is None:
            x = self.pool(x.flatten(0, 1)).unflatten(0, (T, -1))
        else:
            x = apply_to_patches(self.pool, x, visible)
        if self.pos_embed is not None:
            x = x + self.pos_embed(x, time_steps, visible)
        return x


class _Stem(nn.Module):
    """Base class of the stems: four `stages`, `(x, time_steps, visible) -> x`, with their `strides` and `widths`."""
    stage_cls = SpikingConvStage

    def __init__(
            self,
            in_chans: int = 3,
            embed_dim: int = 512,
            patch_size: int = 16,
            stem_strides: Optional[Sequence[int]] = None,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.grad_checkpointing = False
        if embed_dim % 8 != 0:
            raise ValueError(f'embed_dim must be divisible by 8, as the narrowest stage has embed_dim / 8 channels, '
                             f'got {embed_dim}.')
        self.strides = resolve_strides(patch_size, stem_strides)
        self.widths = [embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim]
        in_chs = [in_chans] + self.widths[:-1]
        self.stages = nn.ModuleList([
            self.stage_cls(in_chs[i], self.widths[i], self.strides[i], **dd)
            for i in range(_NUM_STAGES)
        ])

    def forward(self, x: Tensor, time_steps: int, visible: Optional[VisibleTokens] = None) -> Tensor:
        for stage in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_with_bn(stage, x, time_steps, visible)
            else:
                x = stage(x, time_steps, visible)
        return x


class SpikingConvStem(_Stem):
    """Spiking Convolutional Stem (SCS) of V2, `[T or 1, B, in_chans, H, W] -> [T, B, embed_dim, H / p, W / p]`.

    Each stage has one residual block, whose hidden width is 4 times that of the stage; there is no pooling and no
    position embedding. This is inferred from the published parameter counts. Adding spikes in the residual and the
    order conv - BN - LIF follow V1.

    >>> stem = SpikingConvStem(in_chans=3, embed_dim=64, patch_size=4)
    >>> stem.strides, stem(torch.rand(1, 2, 3, 32, 32), time_steps=4).shape
    ([1, 1, 2, 2], torch.Size([4, 2, 64, 8, 8]))
    """
    stage_cls = SpikingConvStage


class SpikingPatchSplitting(_Stem):
    """Spiking Patch Splitting (SPS) of V1, `[T or 1, B, in_chans, H, W] -> [T, B, embed_dim, H / p, W / p]`.

    Pooling follows the neuron, as in the authors' code. The last stage ends with V1's conditional position embedding.

    >>> stem = SpikingPatchSplitting(in_chans=3, embed_dim=64, patch_size=4)
    >>> stem.widths, stem(torch.rand(1, 2, 3, 32, 32), time_steps=4).shape
    ([8, 16, 32, 64], torch.Size([4, 2, 64, 8, 8]))
    """
    stage_cls = SpikingPatchStage

    def __init__(
            self,
            in_chans: int = 3,
            embed_dim: int = 512,
            patch_size: int = 16,
            stem_strides: Optional[Sequence[int]] = None,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_chans, embed_dim, patch_size, stem_strides, **dd)
        self.stages[-1].pos_embed = ConvBNLIF(embed_dim, embed_dim, **dd)


#: Stem classes by name, `'scs'` and `'sps'`: the values of the model argument `stem`.
STEMS = {'scs': SpikingConvStem, 'sps': SpikingPatchSplitting}
