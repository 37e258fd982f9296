"""Augmentation of event sequences: all time steps of a sequence are transformed in the same way.

Flips, shifts and erasing follow the paper Neuromorphic Data Augmentation, https://arxiv.org/abs/2203.06145, and the
code of TET, https://github.com/Gus-Lab/temporal_efficient_training. Mixup mixes whole sequences, and CutMix replaces
the same region at all time steps.
"""
from typing import Tuple

import timm.data
import torch
from torch import Tensor

from ..arguments import check_integer

__all__ = ['SequenceMixup', 'SequenceTransform']


def _random_integer(low: int, high: int) -> int:
    """Return a random integer from `low` to `high`, both included."""
    return int(torch.randint(low, high + 1, ()))


class SequenceTransform:
    """Random augmentation of a sequence of event frames, `[T, C, H, W]`.

    Args:
        hflip: Probability of a horizontal flip. Use 0 for classes that differ by direction, such as the left-hand and
            right-hand gestures of DVS128 Gesture.
        vflip: Probability of a vertical flip.
        roll: Largest shift in pixels, in each direction. Pixels shifted out of the frame reappear on the opposite side.
        erase_prob: Probability that a square of random position and size is set to 0.
        erase_size: Largest side of the square as a fraction of the shorter side of the frame.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
            self,
            hflip: float = 0.,
            vflip: float = 0.,
            roll: int = 0,
            erase_prob: float = 0.,
            erase_size: float = 0.25,
    ):
        for name, value in (('hflip', hflip), ('vflip', vflip), ('erase_prob', erase_prob), ('erase_size', erase_size)):
            if not 0. <= value <= 1.:
                raise ValueError(f'{name} must be from 0 to 1, got {value}.')
        self.hflip = hflip
        self.vflip = vflip
        self.roll = check_integer('roll', roll, 0)
        self.erase_prob = erase_prob
        self.erase_size = erase_size

    def __call__(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        for prob, dim in ((self.hflip, -1), (self.vflip, -2)):
            if torch.rand(()) < prob:
                x = x.flip(dim)
        if self.roll:
            x = x.roll((_random_integer(-self.roll, self.roll), _random_integer(-self.roll, self.roll)), (-2, -1))
        if torch.rand(()) < self.erase_prob:
            side = _random_integer(1, max(1, int(self.erase_size * min(height, width))))
            top, left = _random_integer(0, height - side), _random_integer(0, width - side)
            x = x.clone()
            x[..., top:top + side, left:left + side] = 0.
        return x


class SequenceMixup(timm.data.Mixup):
    """timm's Mixup and CutMix for batches of images `[B, C, H, W]` or of sequences `[B, T, C, H, W]`."""

    def __call__(self, x: Tensor, target: Tensor) -> Tuple[Tensor, Tensor]:
        mixed, target = super().__call__(x.flatten(1, -3), target)  # time steps as channels: [B, T * C, H, W]
        return mixed.view(x.shape), target
