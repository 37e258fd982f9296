"""Conversion of state dicts from the authors' V1 code, spikingjelly's Spikformer and masked autoencoders."""
import math
import re
import warnings
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

__all__ = [
    'DIGEST_ARG', 'TRAINING_FILE', 'ConvertedStateDict', 'check_keys', 'checkpoint_filter_fn', 'convert_state_dict',
    'strip_prefix',
]

TRAINING_FILE = 'training_args.yaml'  # stored next to the weights; contains the training arguments
DIGEST_ARG = 'training_images_sha256'  # training argument: digest of the images, if test images were held out

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
# LayerNorms and a position embedding that V1's code declares but never uses, the last two only for CIFAR10-DVS
_UNUSED_KEY = re.compile(r'^(block\.\d+\.norm[12]\.(weight|bias)|norm\.(weight|bias)|pos_embed)$')
_FIRST_KEY = re.compile(r'^((?:[^.]+\.)*?)(?:stem\.stages|patch_embed)\.')


class ConvertedStateDict(NamedTuple):
    """A converted state dict, and the source of each tensor.

    Attributes:
        state_dict: Tensors keyed by this package's names
        sources: For each name in this package, the names in the checkpoint without a shared prefix; empty if filled
            with zeros. A classifier that is kept from the model is listed under its own name
        unused: Names of tensors that V1's code declares but never uses
        decoder: Names of the tensors of the decoder of a masked autoencoder, which are not converted
    """
    state_dict: Dict[str, Tensor]
    sources: Dict[str, List[str]]
    unused: List[str]
    decoder: List[str]


class _Origin(NamedTuple):
    """Code that wrote a checkpoint, and constants of its models that are not stored in a checkpoint."""
    name: str
    attn_scale: float
    strides: Optional[Tuple[int, ...]]  # of the stem's stages; None if they are an argument


_IMAGENET = _Origin("the authors' V1 code for ImageNet", 0.125, (2, 2, 2, 2))
_CIFAR10 = _Origin("the authors' V1 code for CIFAR-10", 0.125, (1, 1, 2, 2))
_CIFAR10_DVS = _Origin("the authors' V1 code for CIFAR10-DVS", 0.25, (2, 2, 2, 2))
_SPIKINGJELLY = _Origin("spikingjelly's Spikformer", 0.125, None)


def _find_origin(state_dict: Dict[str, Any]) -> Optional[_Origin]:
    """Return the third-party code that wrote a checkpoint; None if it is unknown or there are no encoder blocks.

    The encoder of the authors' code has linear layers for CIFAR-10, 1-d convolutions for CIFAR10-DVS, and 2-d
    convolutions in the MLP for ImageNet.
    """
    if 'blocks.0.attn.qkv_conv_bn.0.weight' in state_dict:
        return _SPIKINGJELLY
    if 'block.0.attn.q_linear.weight' in state_dict:
        return _CIFAR10
    if 'block.0.attn.q_conv.weight' not in state_dict:
        return None
    mlp = state_dict.get('block.0.mlp.fc1_conv.weight')
    is_1d = mlp is not None and mlp.ndim == 3
    return _CIFAR10_DVS if is_1d or 'pos_embed' in state_dict else _IMAGENET


def _check_scale(origin: _Origin, model: nn.Module) -> None:
    """Raise a ValueError if the attention scale, which checkpoints do not store, differs from the model's."""
    scale = next((block.attn.scale for block in model.blocks if block.attn.scale != origin.attn_scale), None)
    if scale is not None:
        raise ValueError(
            f'The checkpoint is from {origin.name} with attn_scale={origin.attn_scale}; the model has '
            f'attn_scale={scale}. Create the model with attn_scale={origin.attn_scale}. If the checkpoint was trained '
            f'with another scale, load it into that model, then load the state_dict() of that model into a model with '
            f'the actual scale.')


def _check_strides(origin: _Origin, model: nn.Module) -> None:
    """Warn if the stem strides differ. This is not an error, because code with modified strides is common."""
    strides = tuple(model.stem.strides)
    if origin.strides is not None and strides != origin.strides:
        warnings.warn(
            f'The checkpoint is from {origin.name} with stem strides {origin.strides}; the model has '
            f'{strides}. Unless the code was changed, the outputs differ: create the model with '
            f'patch_size={math.prod(origin.strides)} and stem_strides={origin.strides}.', stacklevel=2)


def strip_prefix(state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """Remove a prefix shared by all keys, such as `module.` of DDP or `net.` of a Lightning module."""
    found = next((match[1] for match in map(_FIRST_KEY.match, state_dict) if match), '')
    for prefix in (found, found.removesuffix('encoder.')):  # keys of an autoencoder's decoder lack `encoder.`
        if prefix and all(key.startswith(prefix) for key in state_dict):
            return {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def _fuse_qkv(state_dict: Dict[str, Tensor], sources: Dict[str, List[str]]) -> Dict[str, Tensor]:
    """Concatenate q, k and v. A linear bias (V1's CIFAR-10 model) is folded into the running mean of the next BN."""
    out = {}
    for key, value in state_dict.items():
        match = re.match(r'(blocks\.\d+\.attn\.)([qkv])\.(linear\.weight|linear\.bias|bn\..+)$', key)
        needed = []
        if match is not None:
            prefix, name, rest = match.groups()
            needed = [f'{prefix}{n}.{r}' for n in 'qkv' for r in (rest, 'bn.running_mean')]
        if not needed or any(k not in state_dict for k in needed):  # incomplete q, k, v remain unexpected keys
            out[key] = value
            continue
        joined = f'{prefix}qkv.{"bn.running_mean" if rest == "linear.bias" else rest}'
        sources.setdefault(joined, []).extend(sources.pop(key))
        if name != 'q' or rest == 'linear.bias':
            continue
        parts = [state_dict[f'{prefix}{n}.{rest}'] for n in 'qkv']
        if rest == 'bn.running_mean' and all(f'{prefix}{n}.linear.bias' in state_dict for n in 'qkv'):
            parts = [mean - state_dict[f'{prefix}{n}.linear.bias'] for n, mean in zip('qkv', parts)]
        out[joined] = torch.cat(parts) if parts[0].ndim else parts[0]
    return out


def convert_state_dict(state_dict: Dict[str, Any], model: nn.Module) -> ConvertedStateDict:
    """Convert a state dict like `checkpoint_filter_fn`, and also return the source of each tensor."""
    for key in ('state_dict', 'model'):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
    state_dict = strip_prefix(state_dict)
    model_state = model.state_dict()
    decoder = [key for key in state_dict if key.startswith('decoder.')]
    if decoder:  # a masked autoencoder, which has no classifier
        state_dict = {k.removeprefix('encoder.'): v for k, v in state_dict.items() if not k.startswith('decoder.')}
        state_dict.update({k: v for k, v in model_state.items() if k.startswith('head.')})

    origin = _find_origin(state_dict)
    out, sources, unused = {}, {}, []
    for source, value in state_dict.items():
        key = source
        if origin is not None and _UNUSED_KEY.match(key):
            unused.append(key)
            continue
        for pattern, replacement in _KEY_RULES:
            key, found = pattern.subn(replacement, key)
            if found:
                break
        if key.endswith('linear.weight'):
            value = value.flatten(1)  # from a 1x1 convolution
        out[key] = value
        sources[key] = [source]
    out = _fuse_qkv(out, sources)

    for key, expected in model_state.items():
        if origin is _SPIKINGJELLY and key.endswith('linear.bias') and key not in out:
            out[key] = torch.zeros(expected.shape, dtype=expected.dtype)  # spikingjelly's layers have no bias
            sources[key] = []
        if key in out and out[key].shape != expected.shape and not key.startswith(
                ('head.', 'stem.stages.0.down.conv.', 'stem.stages.0.proj.conv.')):
            raise ValueError(
                f'The checkpoint does not fit the model: the shape of {key} is {tuple(out[key].shape)} in the '
                f'checkpoint and {tuple(expected.shape)} in the model (embed_dim={model.embed_dim}). Create the model '
                f'with the embed_dim, mlp_ratio, stem and patch_size that the checkpoint was trained with.')
    if origin is not None and 'stem.stages.0.proj.conv.weight' in model_state:  # SPS stem, i.e. V1
        _check_scale(origin, model)
        if _of_encoder(out) == _of_encoder(model_state):
            _check_strides(origin, model)
    return ConvertedStateDict(out, sources, unused, decoder)


def _of_encoder(keys: Iterable[str]) -> set:
    """Return the keys other than those of the classifier."""
    return {key for key in keys if not key.startswith('head.')}


def _describe(keys: Iterable[str]) -> str:
    """Describe the stem and depth that the keys imply."""
    keys = list(keys)
    stems = [name for name, part in (('scs', '.down.'), ('sps', '.proj.'))
             if any(key.startswith('stem.') and part in key for key in keys)]
    blocks = {match[1] for match in map(re.compile(r'blocks?\.(\d+)\.').match, keys) if match}
    return f'stem={stems[0]!r} and depth={len(blocks)}' if stems else f'no Spikformer stem ({len(keys)} tensors)'


def check_keys(state_dict: Dict[str, Any], model: nn.Module) -> None:
    """Fail early, with a short message, on an architecture mismatch; differences in the classifier are allowed.

    Args:
        state_dict: Converted by `checkpoint_filter_fn`
        model: Spikformer to load it into

    Raises:
        RuntimeError: Keys are missing or unexpected.
    """
    expected = model.state_dict().keys()
    missing, left_over = (sorted(_of_encoder(a) - _of_encoder(b)) for a, b in (
        (expected, state_dict), (state_dict, expected)))
    if not missing and not left_over:
        return
    some = ', '.join(map(repr, [*missing[:2], *left_over[:2]]))
    theirs, ours = _describe(state_dict), _describe(expected)
    if theirs != ours:
        advice = (
            f'The checkpoint has {theirs}, the model has {ours}. The config.json, or the given model name, is for '
            f'another architecture.')
    elif any('.bn.' in key for key in state_dict) != any('.bn.' in key for key in expected):
        advice = 'One of them has its BN folded: load the checkpoint first, then fold.'
    else:
        advice = 'The checkpoint is incomplete, or was written by other code.'
    raise RuntimeError(
        f'The weights do not match the model: {len(missing)} tensors are missing and {len(left_over)} are unexpected, '
        f'such as {some}. {advice}')


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: nn.Module) -> Dict[str, Tensor]:
    """Convert a checkpoint of the authors' V1 code, spikingjelly or this package to a state dict of `model`.

    The checkpoint is a state dict, or contains one under `state_dict` or `model`. Its keys may share a prefix, such as
    `module.` or `net.`. Concatenating q, k and v and folding their biases into BN is exact. Of a masked autoencoder,
    only the encoder is converted, and the classifier of `model` is kept.

    A checkpoint does not store the attention scale or the stem strides; they are inferred from the code that wrote it
    and compared with `model`. The number of heads cannot be inferred: pass the one used in training. spikingjelly pools
    before the neuron and V1 after it, so the outputs of a spikingjelly checkpoint match only at T = 1.

    Raises:
        ValueError: A shape differs from `model` (except classifier and first convolution), or the attention
            scales differ.
    """
    return convert_state_dict(state_dict, model).state_dict
