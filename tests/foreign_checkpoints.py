"""Checkpoints in the formats of other code, and reference implementations of that code."""
from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from spikingjelly.activation_based.model import spikformer as spikingjelly_spikformer
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn


def authors_checkpoint(model, with_qkv_bias: bool):
    """Return the state dict of a V1 model in the format of the authors' code for ImageNet.

    `with_qkv_bias` selects the format of their code for CIFAR-10: linear layers, and biases of q, k and v.
    """
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
    """Return spikingjelly's Spikformer for 32x32 images, T = 1 and 10 classes, calibrated on `x`, and its logits."""
    model = spikingjelly_spikformer.Spikformer(
        T=1, img_size_h=32, img_size_w=32, patch_size=4, num_classes=10, embed_dims=embed_dims, num_heads=num_heads,
        depths=depths)
    update_bn([x], model)
    spikingjelly_spikformer.functional.reset_net(model)
    with torch.no_grad():
        return model, model.eval()(x).reshape(-1, 10)


class AuthorsSpikformer(nn.Module):
    """Reimplementation of the authors' Spikformer (V1), as a reference for outputs.

    The authors' code has three variants, in separate folders. They differ in the names and shapes of the tensors, some
    of which are unused, in the stages that pool, and in the attention scale.

    Args:
        folder: Variant: 'imagenet', 'cifar10' or 'cifar10dvs'.
    """

    def __init__(self, folder: str, width: int, depth: int, num_heads: int, in_chans: int, num_classes: int):
        super().__init__()
        self.num_heads = num_heads
        self.pooled_stages = {'imagenet': (0, 1, 2, 3), 'cifar10': (2, 3), 'cifar10dvs': (0, 1, 2, 3)}[folder]
        self.attn_scale = {'imagenet': 0.125, 'cifar10': 0.125, 'cifar10dvs': 0.25}[folder]
        is_linear = folder == 'cifar10'
        kind = 'linear' if is_linear else 'conv'

        def linear(in_features: int, out_features: int, bias: bool = True, is_2d: bool = False) -> nn.Module:
            if is_linear:
                return nn.Linear(in_features, out_features)  # in this variant, q, k and v have a bias, too
            return (nn.Conv2d if is_2d else nn.Conv1d)(in_features, out_features, 1, bias=bias)

        self.patch_embed = nn.ModuleDict()
        widths = [in_chans, width // 8, width // 4, width // 2, width]
        for i, suffix in enumerate(('', '1', '2', '3')):
            self.patch_embed[f'proj_conv{suffix}'] = nn.Conv2d(widths[i], widths[i + 1], 3, padding=1, bias=False)
            self.patch_embed[f'proj_bn{suffix}'] = nn.BatchNorm2d(widths[i + 1])
        self.patch_embed['rpe_conv'] = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.patch_embed['rpe_bn'] = nn.BatchNorm2d(width)
        self.block = nn.ModuleList()
        for _ in range(depth):
            attn, mlp = nn.ModuleDict(), nn.ModuleDict()
            for name in ('q', 'k', 'v', 'proj'):
                attn[f'{name}_{kind}'] = linear(width, width, bias=name == 'proj')
                attn[f'{name}_bn'] = nn.BatchNorm1d(width)
            for name, sizes in (('fc1', (width, 4 * width)), ('fc2', (4 * width, width))):
                mlp[f'{name}_{kind}'] = linear(*sizes, is_2d=folder == 'imagenet')
                mlp[f'{name}_bn'] = nn.BatchNorm1d(sizes[1])
            self.block.append(nn.ModuleDict(dict(
                attn=attn, mlp=mlp, norm1=nn.LayerNorm(width), norm2=nn.LayerNorm(width))))
        if folder == 'cifar10dvs':
            self.pos_embed = nn.Parameter(torch.randn(1, 64, width))
            self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        for m in self.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(m.weight, 1., 0.2)
                nn.init.normal_(m.bias, 0.3, 0.2)

    @staticmethod
    def neuron(x: Tensor, threshold: float = 1.) -> Tensor:
        """LIF neuron with tau = 2 and a hard reset to 0, over `[T, ...]`."""
        v, spikes = torch.zeros_like(x[0]), []
        for current in x:
            v = v + (current - v) / 2.
            spikes.append((v >= threshold).to(x))
            v = torch.where(v >= threshold, torch.zeros_like(v), v)
        return torch.stack(spikes)

    def unit(self, layers: nn.ModuleDict, name: str, x: Tensor) -> Tensor:
        """Apply a linear layer, BN and the neuron to tokens `[T, B, N, C]`."""
        layer = layers[f'{name}_linear'] if f'{name}_linear' in layers else layers[f'{name}_conv']
        y = F.linear(x, layer.weight.flatten(1), layer.bias)
        return self.neuron(layers[f'{name}_bn'](y.flatten(0, 2)).view_as(y))

    def attention(self, layers: nn.ModuleDict, x: Tensor) -> Tensor:
        q, k, v = (
            self.unit(layers, name, x).unflatten(3, (self.num_heads, -1)).transpose(2, 3) for name in ('q', 'k', 'v'))
        weights = torch.einsum('tbhnd,tbhmd->tbhnm', q, k)
        x = torch.einsum('tbhnm,tbhmd->tbnhd', weights, v).flatten(3) * self.attn_scale
        return self.unit(layers, 'proj', self.neuron(x, threshold=0.5))

    def forward(self, x: Tensor, time_steps: int = 4) -> Tensor:
        """Return the logits `[B, num_classes]` of images `[B, C, H, W]` or event frames `[B, T, C, H, W]`."""
        x = x.transpose(0, 1) if x.ndim == 5 else x.expand(time_steps, *x.shape)
        T = len(x)
        stem: Dict[str, nn.Module] = self.patch_embed
        x = x.flatten(0, 1)
        for i, suffix in enumerate(('', '1', '2', '3')):
            x = stem[f'proj_bn{suffix}'](stem[f'proj_conv{suffix}'](x))
            x = self.neuron(x.unflatten(0, (T, -1))).flatten(0, 1)
            if i in self.pooled_stages:
                x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = x + self.neuron(stem['rpe_bn'](stem['rpe_conv'](x)).unflatten(0, (T, -1))).flatten(0, 1)
        x = x.flatten(2).transpose(1, 2).unflatten(0, (T, -1))
        for block in self.block:
            x = x + self.attention(block['attn'], x)
            x = x + self.unit(block['mlp'], 'fc2', self.unit(block['mlp'], 'fc1', x))
        return self.head(x.mean((0, 2)))
