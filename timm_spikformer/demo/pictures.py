"""Pictures of the demo: images with their predicted labels, and reconstructions of masked images."""
from pathlib import Path
from typing import Any, Dict, Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ..folders import write_file
from ..images import to_pixels
from ..masked_autoencoder import SpikformerMAE
from ..training import masking_noise
from .command import KIND

_TILE = 84  # maximum width in pixels to which small images are enlarged, by an integer factor
_BESIDE, _ABOVE, _BELOW = 18, 4, 20  # pixels around an image, with its caption below
_COLUMNS = 5  # images per row


def _enlarge(images: Tensor) -> Tensor:
    return F.interpolate(images.clamp(0, 1), scale_factor=max(1, _TILE // images.shape[-1]), mode='nearest')


def save_predictions(x: Tensor, captions: Sequence[str], config: Dict[str, Any], path: Path) -> None:
    """Write a PNG of images `[B, C, H, W]` in rows, each above its caption."""
    tiles = [to_pil_image(image) for image in _enlarge(to_pixels(x, config))]
    width, height = tiles[0].width + 2 * _BESIDE, tiles[0].height + _ABOVE + _BELOW
    picture = Image.new('RGB', (width * min(_COLUMNS, len(tiles)), height * -(-len(tiles) // _COLUMNS)), 'white')
    draw = ImageDraw.Draw(picture)
    for i, (tile, caption) in enumerate(zip(tiles, captions)):
        left, top = i % _COLUMNS * width, i // _COLUMNS * height
        picture.paste(tile, (left + _BESIDE, top + _ABOVE))
        draw.text((left + width // 2, top + height - _BELOW // 2), caption, fill='black', anchor='mm')
    with write_file(path, KIND) as partial:
        picture.save(partial)


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
    rows = mae.eval().reconstruct(x, noise=masking_noise(mae, x, seed))
    images = _enlarge(to_pixels(torch.cat(rows), config))
    with write_file(path, KIND) as partial:
        to_pil_image(make_grid(images, nrow=len(x), padding=4, pad_value=1.)).save(partial)
