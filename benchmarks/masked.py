"""Masked pre-training: stem on visible patches, compared with a stem on full feature maps, masked after each layer.

    python -m benchmarks masked
"""
import copy
import statistics
import types
from typing import Any, Dict, List, Optional

import timm
import torch
from torch import Tensor, nn

import timm_spikformer  # noqa: F401  registers the models
from timm_spikformer import SpikformerMAE
from timm_spikformer.layers import ConvBNLIF
from timm_spikformer.masking import VisibleTokens

from .images import crop_photographs
from .measure import interleave, ratio

RATIOS = (0.25, 0.5, 0.75, 0.9)


def _visible_pixel_indices(visible: VisibleTokens, n: int, H: int, W: int) -> Tensor:
    """Return the indices of the visible pixels among the `n * B * H * W` pixels of a map, in increasing order."""
    ids, _, width = visible
    B, p = ids.shape[0], W // width
    tokens = torch.zeros(B, (H // p) * width, dtype=torch.bool).scatter(1, ids, True)
    mask = tokens.view(B, H // p, 1, width, 1).expand(-1, -1, p, -1, p).reshape(B, H, W)
    return mask.repeat(n, 1, 1).flatten().nonzero().flatten()


def _dense_layer(layer: ConvBNLIF, x: Tensor, time_steps: int, visible: VisibleTokens) -> Tensor:
    """Apply a layer as SparK does: convolve full feature maps, normalize visible pixels, and set masked pixels to 0."""
    B = x.shape[1]
    x = layer.conv(x.flatten(0, 1))
    n, C, H, W = x.shape
    rows = _visible_pixel_indices(visible, n // B, H, W)
    pixels = x.permute(0, 2, 3, 1).reshape(-1, C)
    normed = layer.bn(pixels.index_select(0, rows).unflatten(1, (C, 1, 1))).flatten(1)
    x = torch.zeros_like(pixels).index_copy(0, rows, normed).unflatten(0, (n, H, W)).permute(0, 3, 1, 2)
    return layer.lif(x.unflatten(0, (-1, B)).expand(time_steps, -1, -1, -1, -1))


def _dense_stage(stage: nn.Module, x: Tensor, time_steps: int, visible: Optional[VisibleTokens] = None) -> Tensor:
    if x.shape[2] == 3:  # the image
        _, B, _, H, W = x.shape
        mask = torch.zeros(B * H * W).index_fill(0, _visible_pixel_indices(visible, 1, H, W), 1.)
        x = x * mask.view(1, B, 1, H, W)
    x = _dense_layer(stage.down, x, time_steps, visible)
    return x + _dense_layer(stage.contract, _dense_layer(stage.expand, x, time_steps, visible), time_steps, visible)


def with_dense_stem(mae: SpikformerMAE) -> SpikformerMAE:
    """Return a copy that computes V2's stem on full feature maps."""
    mae = copy.deepcopy(mae)
    for stage in mae.encoder.stem.stages:
        stage.forward = types.MethodType(_dense_stage, stage)
    return mae


def _step(mae: SpikformerMAE, x: Tensor, noise: Tensor) -> Tensor:
    mae.zero_grad()
    loss = mae(x, noise=noise).loss
    loss.backward()
    return loss


def run(quick: bool) -> List[Dict[str, Any]]:
    torch.manual_seed(0)
    name, size = ('test_spikformer_v2', 64) if quick else ('spikformer_v2_8_512', 224)
    x = crop_photographs(4, size)
    rows = []
    for mask_ratio in RATIOS:
        encoder = timm.create_model(name, time_steps=1, num_classes=0)
        ours = SpikformerMAE(encoder, mask_ratio=mask_ratio).train().to(memory_format=torch.channels_last)
        dense = with_dense_stem(ours)
        noise = torch.rand(len(x), (size // 16) ** 2)
        # compare in float64: in float32, rounding changes a few spikes, which random weights amplify
        in_float64 = [copy.deepcopy(mae).double() for mae in (ours, dense)]
        losses = [_step(mae, x[:2].double(), noise[:2]) for mae in in_float64]
        grads = [torch.cat([p.grad.flatten() for p in mae.parameters()]) for mae in in_float64]
        times = interleave(
            dict(ours=lambda: _step(ours, x, noise), dense=lambda: _step(dense, x, noise)), 1 if quick else 5)  # noqa: B023
        speedup = ratio(times['dense'], times['ours'])
        error = (grads[0] - grads[1]).norm() / grads[1].norm()
        seconds = statistics.median(times['ours'])
        print(
            f'  masked {mask_ratio:.2f}: {speedup} times as fast as with the dense masked stem, {seconds:.2f} s per '
            f'step; loss differs by {abs(losses[0] - losses[1]).item():.1e}, gradients by {error:.1e} of their norm')
        rows.append(dict(
            mask_ratio=mask_ratio, speedup=speedup._asdict(), seconds=seconds, gradient_error=error.item()))
    return rows
