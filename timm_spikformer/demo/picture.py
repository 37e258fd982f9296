"""What a masked autoencoder makes of test images: a figure and a picture, with the same masks at the same seed."""
from pathlib import Path
from typing import Tuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import save_image

from ..masked_autoencoder import SpikformerMAE
from .data import Data


def _noise(mae: SpikformerMAE, x: Tensor, seed: int) -> Tensor:
    num_units = (x.shape[-2] // mae.mask_unit) * (x.shape[-1] // mae.mask_unit)
    return torch.rand(len(x), num_units, generator=torch.Generator().manual_seed(seed)).to(x.device)


@torch.no_grad()
def reconstruction_loss(mae: SpikformerMAE, loader, seed: int) -> Tuple[float, float]:
    """Loss over the masked patches of all images, and that of predicting each patch's mean.

    The latter is 1 where no patch is flat; a flat patch is predicted without error by its mean.
    """
    mae.eval()
    ours, means, count = 0., 0., 0
    for x, _ in loader:
        out = mae(x, noise=_noise(mae, x, seed))
        target = mae.target(x)
        error = (target - target.mean(-1, keepdim=True)).square().mean(-1)
        ours += out.loss.item() * len(x)
        means += error[out.mask].mean().item() * len(x)
        count += len(x)
    return ours / count, means / count


def save_picture(mae: SpikformerMAE, loader, data: Data, path: Path, seed: int, count: int = 10) -> None:
    """Write a PNG of `count` columns: the image, what is left of it, and with its masked patches reconstructed."""
    x, _ = next(iter(loader))
    x = x[:: max(1, len(x) // count)][:count]
    rows = mae.eval().reconstruct(x, noise=_noise(mae, x, seed))
    mean, std = (torch.tensor(data.config[k], device=x.device).view(-1, 1, 1) for k in ('mean', 'std'))
    images = torch.cat(rows) * std + mean
    images = F.interpolate(images.clamp(0, 1), scale_factor=max(1, 84 // x.shape[-1]), mode='nearest')
    partial = path.with_suffix('.partial.png')
    save_image(images, partial, nrow=len(x), padding=4, pad_value=1.)
    partial.replace(path)
