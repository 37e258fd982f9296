"""Pictures of the demo: images with their predicted labels, and reconstructions of masked images."""
from pathlib import Path
from typing import Any, Dict, Sequence, Tuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..folders import write_file
from ..images import to_pixels
from ..masked_autoencoder import SpikformerMAE
from .command import KIND

_TILE = 84  # maximum width in pixels to which small images are enlarged, by an integer factor


def _enlarge(images: Tensor) -> Tensor:
    return F.interpolate(images.clamp(0, 1), scale_factor=max(1, _TILE // images.shape[-1]), mode='nearest')


def save_predictions(x: Tensor, captions: Sequence[str], config: Dict[str, Any], path: Path) -> None:
    """Write a PNG of images `[B, C, H, W]` in rows of five, each above its caption."""
    tiles = [to_pil_image(image) for image in _enlarge(to_pixels(x, config))]
    width, height, columns = tiles[0].width + 36, tiles[0].height + 24, 5
    picture = Image.new('RGB', (width * min(columns, len(tiles)), height * -(-len(tiles) // columns)), 'white')
    draw = ImageDraw.Draw(picture)
    for i, (tile, caption) in enumerate(zip(tiles, captions)):
        left, top = i % columns * width, i // columns * height
        picture.paste(tile, (left + 18, top + 4))
        draw.text((left + width // 2, top + height - 10), caption, fill='black', anchor='mm')
    with write_file(path, KIND) as partial:
        picture.save(partial)


def _noise(mae: SpikformerMAE, x: Tensor, seed: int) -> Tensor:
    num_units = (x.shape[-2] // mae.mask_unit) * (x.shape[-1] // mae.mask_unit)
    return torch.rand(len(x), num_units, generator=torch.Generator().manual_seed(seed)).to(x.device)


@torch.no_grad()
def reconstruction_loss(mae: SpikformerMAE, loader: Any, seed: int) -> Tuple[float, float]:
    """Return the loss over the masked patches of all images, and the loss of predicting the mean of each patch.

    With targets normalized per patch, the second loss is 1 if no patch is constant; constant patches contribute 0.
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


def save_reconstructions(
        mae: SpikformerMAE,
        loader: Any,
        config: Dict[str, Any],
        path: Path,
        seed: int,
        count: int = 10,
) -> None:
    """Write a PNG with `count` columns of image, visible patches, and image with reconstructed masked patches."""
    x, _ = next(iter(loader))
    x = x[:: max(1, len(x) // count)][:count]
    rows = mae.eval().reconstruct(x, noise=_noise(mae, x, seed))
    images = _enlarge(to_pixels(torch.cat(rows), config))
    with write_file(path, KIND) as partial:
        to_pil_image(make_grid(images, nrow=len(x), padding=4, pad_value=1.)).save(partial)
