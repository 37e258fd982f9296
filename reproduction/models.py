"""Models of the study: timm models, some with the attention replaced."""
import math
from typing import Any, Dict

import timm
import torch
from timm.utils import random_seed
from torch import Tensor, nn

from timm_spikformer import SpikformerMAE
from timm_spikformer.layers import SpikingSelfAttention
from timm_spikformer.spikformer import Spikformer
from timm_spikformer.state_dicts import PARSING_ERRORS
from timm_spikformer.training import init_bn_bias

__all__ = ['AUTOENCODER', 'NoAttention', 'SoftmaxAttention', 'create', 'create_autoencoder']


AUTOENCODER = dict(mask_ratio=0.75, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)


class SoftmaxAttention(SpikingSelfAttention):
    """Softmax attention over spiking q, k and v, `[T, B, N, C] -> [T, B, N, C]`.

    `LIF(BN(proj(softmax(q k^T / sqrt(d)) v)))`: the weights are real numbers that sum to 1, as in the softmax variant
    that the Spikformer paper, https://arxiv.org/abs/2209.15425, compares with. The authors have released no code for
    this variant, so one detail is this project's choice: the real-valued result goes to `proj` without a neuron. The
    result is a mean of spikes, so it is at most 1, and a neuron with tau = 2 and threshold 0.5 would fire in the first
    time step only if it were exactly 1. This choice favors softmax, because its output is not quantized to spikes.
    A profile counts the operations of `proj` as dense multiply-accumulates.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.proj.has_real_input = True

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, x.shape[3] // self.num_heads))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # [T, B, heads, N, d]
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        x = (weights @ v).transpose(2, 3).flatten(3)  # [T, B, N, C]
        return self.proj_drop(self.proj(x))


class NoAttention(nn.Module):
    """Replacement for attention that returns zeros, so that the residual connection returns its input unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def create(config: Dict[str, Any], num_classes: int, size: int) -> nn.Module:
    """Create the model of a run, with random weights from the seed of the run.

    Args:
        config: See `Run.config`.
        num_classes: Number of classes.
        size: Height and width of the images in pixels.

    Raises:
        ValueError: timm does not accept the arguments, or the attention or objective requires a Spikformer.
    """
    random_seed(config['recipe']['seed'])
    name, kwargs = config['model'], dict(config['model_kwargs'])
    if not name.startswith('convnext'):  # timm's ConvNeXt does not accept img_size
        kwargs['img_size'] = size
    try:
        model = timm.create_model(name, num_classes=num_classes, **kwargs)
    except PARSING_ERRORS as e:
        raise ValueError(f'The model {name} cannot be created with {config["model_kwargs"]}: {e!r}') from e
    if not isinstance(model, Spikformer) and (config['attention'], config['objective']) != ('ssa', 'classify'):
        raise ValueError(
            f'{name} is not a Spikformer, so attention {config["attention"]!r} and objective {config["objective"]!r} '
            f'are not possible.')
    if isinstance(model, Spikformer):
        for block in model.blocks:
            attn = block.attn
            if config['attention'] == 'none':
                block.attn = NoAttention()
            elif config['attention'] == 'softmax':
                block.attn = SoftmaxAttention(model.embed_dim, attn.num_heads, attn_scale=attn.scale)
        init_bn_bias(model)
    return model.to(memory_format=torch.channels_last)


def create_autoencoder(encoder: Spikformer) -> SpikformerMAE:
    """Create a masked autoencoder with the given encoder, a small decoder and a mask ratio of 0.75."""
    mae = SpikformerMAE(encoder, **AUTOENCODER)
    return mae.to(memory_format=torch.channels_last)
