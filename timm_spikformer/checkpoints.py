"""Conversion of state dicts: of the authors' V1 code, of spikingjelly's Spikformer, of a masked autoencoder."""
import re
from typing import Any, Dict, List, NamedTuple

import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

__all__ = ['TRAINING_FILE', 'Conversion', 'checkpoint_filter_fn', 'convert_state_dict']

TRAINING_FILE = 'training_args.yaml'  # beside weights: how they were trained

# (pattern, replacement) for the keys of the authors' V1 code and of spikingjelly's Spikformer
_KEY_RULES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r'^patch_embed\.proj_(conv|bn)(\d)\.', r'stem.stages.\2.proj.\1.'),
    (r'^patch_embed\.proj_(conv|bn)\.', r'stem.stages.0.proj.\1.'),
    (r'^patch_embed\.rpe_(conv|bn)\.', r'stem.stages.3.pos_embed.\1.'),
    (r'^block\.(\d+)\.(attn|mlp)\.(q|k|v|proj|fc1|fc2)_(?:conv|linear)\.', r'blocks.\1.\2.\3.linear.'),
    (r'^block\.(\d+)\.(attn|mlp)\.(q|k|v|proj|fc1|fc2)_bn\.', r'blocks.\1.\2.\3.bn.'),
    (r'^patch_embed\.stages\.(\d)\.conv_bn\.block\.0\.', r'stem.stages.\1.proj.conv.'),
    (r'^patch_embed\.stages\.(\d)\.conv_bn\.block\.1\.', r'stem.stages.\1.proj.bn.'),
    (r'^patch_embed\.positional_encoding\.conv_bn\.block\.0\.', r'stem.stages.3.pos_embed.conv.'),
    (r'^patch_embed\.positional_encoding\.conv_bn\.block\.1\.', r'stem.stages.3.pos_embed.bn.'),
    (r'^blocks\.(\d+)\.attn\.(qkv|proj)_conv_bn\.0\.', r'blocks.\1.attn.\2.linear.'),
    (r'^blocks\.(\d+)\.attn\.(qkv|proj)_conv_bn\.1\.', r'blocks.\1.attn.\2.bn.'),
    (r'^blocks\.(\d+)\.mlp\.(fc1|fc2)\.0\.', r'blocks.\1.mlp.\2.linear.'),
    (r'^blocks\.(\d+)\.mlp\.(fc1|fc2)\.1\.', r'blocks.\1.mlp.\2.bn.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
)]
_UNUSED_KEY = re.compile(r'^block\.\d+\.norm[12]\.')  # LayerNorms that V1 declares and never calls


class Conversion(NamedTuple):
    """A converted state dict, and where each of its tensors comes from.

    Args:
        state_dict: By this package's names
        sources: Names in the checkpoint by this package's; none where a tensor was filled with zeros
        unused: Names of tensors that V1's code declares and never uses
    """
    state_dict: Dict[str, Tensor]
    sources: Dict[str, List[str]]
    unused: List[str]


def _fuse_qkv(state_dict: Dict[str, Tensor], sources: Dict[str, List[str]]) -> Dict[str, Tensor]:
    """Join separate q, k, v. A bias, as in V1's CIFAR model, goes into the running mean of the BN that follows it."""
    out = {}
    for key, value in state_dict.items():
        match = re.match(r'(blocks\.\d+\.attn\.)([qkv])\.(linear\.weight|linear\.bias|bn\..+)$', key)
        if match is None:
            out[key] = value
            continue
        prefix, name, rest = match.groups()
        joined = f'{prefix}qkv.{"bn.running_mean" if rest == "linear.bias" else rest}'
        sources.setdefault(joined, []).extend(sources.pop(key))
        if name != 'q' or rest == 'linear.bias':
            continue
        parts = [state_dict[f'{prefix}{n}.{rest}'] for n in 'qkv']
        if rest == 'bn.running_mean' and f'{prefix}q.linear.bias' in state_dict:
            parts = [mean - state_dict[f'{prefix}{n}.linear.bias'] for n, mean in zip('qkv', parts)]
        out[joined] = torch.cat(parts) if parts[0].ndim else parts[0]
    return out


def convert_state_dict(state_dict: Dict[str, Any], model: nn.Module) -> Conversion:
    """What `checkpoint_filter_fn` does, and an account of it."""
    for key in ('state_dict', 'model'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    state_dict = clean_state_dict(state_dict)
    model_state = model.state_dict()
    if any(k.startswith('decoder.') for k in state_dict):  # a masked autoencoder's, which has no classifier
        state_dict = {k.removeprefix('encoder.'): v for k, v in state_dict.items() if not k.startswith('decoder.')}
        state_dict.update({k: v for k, v in model_state.items() if k.startswith('head.')})

    out, sources, unused = {}, {}, []
    is_foreign = False
    for source, value in state_dict.items():
        key = source
        if _UNUSED_KEY.match(key):
            unused.append(key)
            continue
        for pattern, replacement in _KEY_RULES:
            key, found = pattern.subn(replacement, key)
            if found:
                is_foreign = True
                break
        if key.endswith('linear.weight'):
            value = value.flatten(1)  # from a 1x1 convolution
        out[key] = value
        sources[key] = [source]
    out = _fuse_qkv(out, sources)

    for key, expected in model_state.items():
        if is_foreign and key.endswith('linear.bias') and key not in out:
            out[key] = torch.zeros(expected.shape, dtype=expected.dtype)  # spikingjelly's layers have none
            sources[key] = []
        if key in out and out[key].shape != expected.shape and not key.startswith(('head.', 'stem.stages.0.')):
            raise ValueError(
                f'The checkpoint does not fit the model: {key} is {tuple(out[key].shape)} in the checkpoint and '
                f'{tuple(expected.shape)} in the model (embed_dim={model.embed_dim}). Create the model with the '
                f'embed_dim, stem and patch_size that the checkpoint was trained with.')
    return Conversion(out, sources, unused)


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Tensor]:
    """Convert checkpoints of the authors' V1 code and spikingjelly's Spikformer; those of this package pass through.

    Takes a state dict, bare or under `state_dict` or `model`, with or without a `module.` prefix. Joining q, k, v and
    moving their biases is exact. spikingjelly pools before the neuron and V1 after it, so a model trained there gives
    equal outputs here at one time step only. Of a masked autoencoder the encoder is taken, and the classifier of
    `model` left as it is.

    Raises:
        ValueError: A tensor has another shape than in `model`, classifier and first convolution excepted.
    """
    return convert_state_dict(state_dict, model).state_dict
