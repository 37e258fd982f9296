"""The models of the study: timm's, with other attention where a cell asks for it."""
import math
from typing import Any, Dict

import timm
import torch
from timm.utils import random_seed
from torch import Tensor, nn

from timm_spikformer import SpikformerMAE
from timm_spikformer.layers import SpikingSelfAttention
from timm_spikformer.spikformer import Spikformer
from timm_spikformer.training import raise_bn_bias

__all__ = ['AUTOENCODER', 'NoAttention', 'SoftmaxAttention', 'create', 'create_autoencoder']


AUTOENCODER = dict(mask_ratio=0.75, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)


class SoftmaxAttention(SpikingSelfAttention):
    """Attention with a softmax on spikes q, k and v, `[T, B, N, C] -> [T, B, N, C]`.

    `LIF(BN(proj(softmax(q k^T / sqrt(d)) v)))`: the weights are real numbers that sum to 1, as in the softmax variant
    that the paper on Spikformer, https://arxiv.org/abs/2209.15425, compares with. Its authors have released no code
    for it, so one choice is this project's: the real-valued result goes to `proj` without a neuron. A mean of spikes
    is at most 1, and a neuron with tau = 2 and threshold 0.5 would need exactly 1 to fire in the first time step.
    The comparison is therefore in favor of softmax: its values are not rounded to spikes.
    """

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, x.shape[3] // self.num_heads))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # [T, B, heads, N, d]
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        x = (weights @ v).transpose(2, 3).flatten(3)  # [T, B, N, C]
        return self.proj_drop(self.proj(x))


class NoAttention(nn.Module):
    """Takes the place of attention in a block, whose residual connection then leaves the input as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def create(config: Dict[str, Any], num_classes: int, size: int) -> nn.Module:
    """Create the model of a run, initialized with its seed.

    Args:
        config: See `Run.config`.
        num_classes: Number of classes.
        size: Side of the images in pixels.
    """
    random_seed(config['recipe']['seed'])
    name, kwargs = config['model'], dict(config['model_kwargs'])
    if not name.startswith('convnext'):  # a convolutional network of timm takes no image size
        kwargs['img_size'] = size
    model = timm.create_model(name, num_classes=num_classes, **kwargs)
    if isinstance(model, Spikformer):
        for block in model.blocks:
            attn = block.attn
            if config['attention'] == 'none':
                block.attn = NoAttention()
            elif config['attention'] == 'softmax':
                block.attn = SoftmaxAttention(model.embed_dim, attn.num_heads, attn_scale=attn.scale)
        raise_bn_bias(model)
    return model.to(memory_format=torch.channels_last)


def create_autoencoder(encoder: Spikformer) -> SpikformerMAE:
    """Put an encoder into a masked autoencoder with a small decoder; three quarters of the patches are masked."""
    mae = SpikformerMAE(encoder, **AUTOENCODER)
    return mae.to(memory_format=torch.channels_last)
