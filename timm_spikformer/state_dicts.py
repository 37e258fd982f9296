"""Safe loading of state dicts and JSON files, and checks of tensors before a model is created."""
import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, Mapping

import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor

from ._timm import torch_load
from .errors import first_line

__all__ = [
    'PARSING_ERRORS', 'check_size', 'check_tensors', 'find_state_dict', 'read_json', 'read_tensors']

# Exceptions that parsing code may raise on malformed external data
PARSING_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, SafetensorError, TypeError,
    ValueError)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_tensors(path: Path) -> Dict[str, Any]:
    """Read a safetensors file, or a pickle of tensors and plain values.

    Raises:
        ValueError: The file is damaged, would run code when it is opened, or does not contain a dictionary.
    """
    try:
        if path.suffix == '.safetensors':
            content = load_state_dict(str(path))
        else:
            _check_crc(path)
            content = torch_load(str(path))
    except SafetensorError as e:
        raise ValueError(f'{path} is not a complete safetensors file: {e}.') from e
    except (zipfile.BadZipFile, struct.error, zlib.error) as e:
        raise ValueError(f'{path} is damaged: {first_line(e)}. Copy or download it again.') from e
    except (RuntimeError, ValueError) as e:
        raise ValueError(
            f'{path} cannot be opened without running code from it, or is damaged. Expected a checkpoint of tensors '
            f'and plain values; save only the state_dict. {first_line(e)}') from e
    except (EOFError, OSError, LookupError, AttributeError, TypeError) as e:
        raise ValueError(f'{path} is not a checkpoint, or is damaged: {first_line(e)}.') from e
    if not isinstance(content, dict):
        raise ValueError(
            f'{path} contains a {type(content).__name__}, expected a state dict or a checkpoint of train.py.')
    return content


def read_json(path: Path) -> Dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file cannot be read, is not JSON, or does not contain an object.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except OSError as e:
        raise ValueError(f'{path} cannot be read: {e.strerror}.') from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path} is not JSON: {e}.') from e
    if not isinstance(content, dict):
        raise ValueError(f'{path} contains a {type(content).__name__}, expected a JSON object.')
    return content


def _check_crc(path: Path) -> None:
    """Raise a BadZipFile if a checksum of a zip file does not match; torch.load does not verify them."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.CRC:  # 0 if saved with `torch.serialization.set_crc32_options(False)`
                with archive.open(info) as stream:
                    while stream.read(1 << 20):
                        pass


def find_state_dict(path: Path, content: Dict[str, Any], ema: bool = False) -> Dict[str, Tensor]:
    """Return the state dict of a checkpoint: `state_dict`, or else `model`, or else `content` itself.

    Args:
        path: Path of the checkpoint, for messages.
        content: Content of the checkpoint.
        ema: Return `state_dict_ema` instead.

    Raises:
        ValueError: There is no state dict, or a value in it is not a tensor.
    """
    keys = ('state_dict_ema',) if ema else ('state_dict', 'model')
    found = next((content[key] for key in keys if key in content), None if ema else content)
    if ema and found is None:
        raise ValueError(
            f'{path} contains no averaged weights, which train.py stores with --model-ema. Omit --ema.')
    if not isinstance(found, dict) or not found:
        raise ValueError(f'{path} contains no state dict: expected tensors by name, got {type(found).__name__}.')
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f'{path} is not a state dict: {name!r} is a {type(value).__name__}, expected tensors by name.')
    return found


def check_tensors(path: object, tensors: Mapping[str, Tensor]) -> None:
    """Check that weights are dense, finite floating-point tensors; `num_batches_tracked` of BN may be an integer.

    Args:
        path: Origin of the weights, for error messages.
        tensors: Weights by name.

    Raises:
        ValueError: A tensor is invalid; the message names the first one.
    """
    for name, value in tensors.items():
        if value.is_meta:
            raise ValueError(f'{path} contains no weights: {name} is on the meta device. Load them before saving.')
        if value.layout is not torch.strided or value.is_quantized:
            what = 'quantized' if value.is_quantized else str(value.layout)
            raise ValueError(f'{path} contains {name} as a {what} tensor, expected a dense floating-point tensor.')
        if value.dtype not in _DTYPES and not (name.endswith('num_batches_tracked') and not value.is_complex()):
            raise ValueError(
                f'{path} contains {name} in {value.dtype}, expected a floating-point dtype: '
                f'{", ".join(map(str, _DTYPES))}.')
        is_finite = torch.isfinite(value.float())
        if not is_finite.all():
            raise ValueError(
                f'{path} contains weights that are not finite: {int((~is_finite).sum())} of {value.numel()} values of '
                f'{name} are NaN or infinite in float32. Use an earlier checkpoint.')


def check_size(path: object, tensors: Mapping[str, Tensor], args: Mapping[str, Any], decoder: bool = False) -> None:
    """Check that model arguments do not imply more weights than the checkpoint contains, before creating the model.

    Args:
        path: Origin of the arguments, for error messages.
        tensors: Weights by name.
        args: Arguments of the network by name; arguments that are missing or not numbers are ignored.
        decoder: Whether the arguments describe the decoder of a masked autoencoder, which has no stem.

    Raises:
        ValueError: The arguments imply more weights.
    """
    def get_number(name: str, minimum: float) -> float:
        value = args.get(name)
        return float(min(value, 1e18)) if isinstance(value, (int, float)) and value > minimum else minimum

    width, in_chans = get_number('embed_dim', 8.), get_number('in_chans', 1.)
    hidden = max(width * get_number('mlp_ratio', 0.) - 1., 0.)
    # per block: q, k, v and proj, and the two layers of the MLP
    min_values = get_number('depth', 0.) * width * (4. * width + 2. * hidden) + get_number('num_classes', 0.) * width
    if decoder:
        min_values += 8. * width  # the layer after the encoder, whose width is at least 8
    else:
        min_values += 9. * width * width + in_chans * width / 2.  # the last and the first convolution
    num_values = sum(value.numel() for value in tensors.values())
    given = {key: value for key, value in args.items() if value is not None}
    if given and min_values > num_values:
        raise ValueError(
            f'{path} describes a model of at least {min_values:,.0f} weights by {given}, but there are {num_values:,} '
            f'values.')
