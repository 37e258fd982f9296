"""Conversion of images and sequences to time-major layout, and averaging over time."""
from typing import Tuple

import torch
from torch import Tensor

from .arguments import check_integer
from .kernels.rules import back_end, in_transform
from .neurons import get_stateful_inference

__all__ = ['check_time_steps', 'mean_over_time', 'to_time_major']


def to_time_major(x: Tensor, time_steps: int, in_chans: int, patch_size: int) -> Tuple[Tensor, int]:
    """Check the input, and return it in time-major layout with the number of time steps.

    In eager mode on a CPU, the input is converted to channels-last, which the kernels require. Compilers choose layouts
    themselves.

    Args:
        x: Images `[B, C, H, W]` or sequences `[B, T, C, H, W]`.
        time_steps: Number of time steps for images.
        in_chans: Expected number of channels.
        patch_size: Patch size, of which height and width must be multiples.

    Returns:
        `[1, B, C, H, W]` and `time_steps` for images, or `[T, B, C, H, W]` and T for sequences.

    Raises:
        ValueError: The dtype, the number of dimensions, channels or time steps, or the image size is invalid.
    """
    if x.ndim != 4 and x.ndim != 5:
        raise ValueError(
            f'Expected images [B, C, H, W] or sequences [B, T, C, H, W], got {x.ndim} dimensions: {x.shape}.')
    if not x.is_floating_point():
        raise ValueError(f'Expected floating-point input, got {x.dtype}. Convert it, for example with x.float().')
    if x.shape[-3] != in_chans:
        raise ValueError(f'Expected {in_chans} channels (in_chans), got {x.shape[-3]} in shape {x.shape}.')
    if x.shape[-2] % patch_size != 0 or x.shape[-1] % patch_size != 0:
        raise ValueError(
            f'Height and width must be multiples of the patch size {patch_size}, got shape {x.shape}.')
    if x.ndim == 5:
        if x.shape[1] == 0:
            raise ValueError(f'Expected sequences of at least one time step, got shape {x.shape}.')
        x, time_steps = x.transpose(0, 1), x.shape[1]
    else:
        x = x.unsqueeze(0)
    if torch.jit.is_scripting():
        to_channels_last = x.device.type == 'cpu'
    else:  # vmap has no rule for memory formats
        to_channels_last = not torch.compiler.is_compiling() and not in_transform() and back_end(x) == 'cpu'
    if to_channels_last:
        S = x.shape[0]
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (S, -1))
    return x, time_steps


def mean_over_time(x: Tensor) -> Tensor:
    """Return the mean over time, `[T, ...] -> [...]`; within `StatefulInference`, the mean over all steps so far."""
    if not torch.jit.is_scripting():
        stateful = get_stateful_inference()
        if stateful is not None:
            return stateful.mean_over_time(x)
    return x.mean(0)


def check_time_steps(time_steps: int) -> int:
    """Validate a number of time steps and return it as int.

    Raises:
        ValueError: `time_steps` is not an integer of at least 1. NumPy integers are accepted, bool is not.
    """
    return check_integer('time_steps', time_steps, 1)
