"""Checkpoints as other code writes them."""
from typing import Tuple

import torch
from spikingjelly.activation_based.model import spikformer as spikingjelly_spikformer
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn


def authors_checkpoint(model, with_qkv_bias: bool):
    """The state dict of a V1 model under the authors' names; with q/k/v biases and linears as in their CIFAR code."""
    layer = 'linear' if with_qkv_bias else 'conv'
    out = {}

    def weight(x):
        return x if with_qkv_bias else x[..., None, None]

    for key, value in model.state_dict().items():
        parts = key.split('.')
        if parts[0] == 'stem':
            name = 'rpe_' if parts[3] == 'pos_embed' else 'proj_'
            suffix = '' if parts[3] == 'pos_embed' or parts[2] == '0' else parts[2]
            out[f'patch_embed.{name}{parts[4]}{suffix}.{parts[5]}'] = value
        elif parts[0] == 'blocks':
            _, i, branch, unit, kind, what = parts
            kind = layer if kind == 'linear' else 'bn'
            if value.ndim == 2:
                value = weight(value)
            if unit == 'qkv':
                for n, part in zip('qkv', value.chunk(3) if value.ndim else [value] * 3):
                    if with_qkv_bias and what == 'running_mean':
                        bias = torch.randn_like(part)
                        out[f'block.{i}.{branch}.{n}_{layer}.bias'] = bias
                        part = part + bias
                    out[f'block.{i}.{branch}.{n}_{kind}.{what}'] = part
            else:
                out[f'block.{i}.{branch}.{unit}_{kind}.{what}'] = value
            out[f'block.{i}.norm1.weight'] = torch.ones(64)
        else:
            out[key.replace('head.fc', 'head')] = value
    return out


def spikingjelly_model(x: Tensor, embed_dims: int, num_heads: int, depths: int) -> Tuple[nn.Module, Tensor]:
    """spikingjelly's Spikformer for 32x32 images, one time step and 10 classes, calibrated; its logits `[B, 10]`."""
    model = spikingjelly_spikformer.Spikformer(
        T=1, img_size_h=32, img_size_w=32, patch_size=4, num_classes=10, embed_dims=embed_dims, num_heads=num_heads,
        depths=depths)
    update_bn([x], model)
    spikingjelly_spikformer.functional.reset_net(model)
    with torch.no_grad():
        return model, model.eval()(x).reshape(-1, 10)
