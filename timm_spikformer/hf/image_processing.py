"""Between timm's description of how images are presented and transformers' image processors."""
import math
from typing import Any, Dict

from PIL import Image
from timm.data import str_to_pil_interp
from transformers import CLIPImageProcessor, ViTImageProcessor

__all__ = ['create_image_processor', 'read_data_config']


def create_image_processor(pretrained_cfg: Dict[str, Any]):
    """A stock image processor with the size, crop, interpolation, mean and standard deviation of a timm cfg.

    CLIP's resizes the shorter side and crops the centre, as timm does. It knows one size for both sides, so where the
    input is not square it is ViT's, which resizes both sides.
    """
    channels, height, width = pretrained_cfg['input_size']
    common = dict(
        resample=int(str_to_pil_interp(pretrained_cfg['interpolation'])),
        image_mean=list(pretrained_cfg['mean']), image_std=list(pretrained_cfg['std']),
    )
    if height != width:
        return ViTImageProcessor(size=dict(height=height, width=width), **common)
    return CLIPImageProcessor(
        size=dict(shortest_edge=math.floor(height / pretrained_cfg['crop_pct'])),
        crop_size=dict(height=height, width=width),
        do_convert_rgb=channels == 3,
        **common,
    )


def read_data_config(processor: Dict[str, Any], channels: int) -> Dict[str, Any]:
    """timm's `input_size`, `mean`, `std`, `interpolation` and `crop_pct` of a preprocessor_config.json."""
    size = processor['size']
    crop = processor.get('crop_size') if processor.get('do_center_crop', True) else None
    edge = size.get('shortest_edge')
    target = crop or (dict(height=edge, width=edge) if edge else size)
    return dict(
        input_size=(channels, target['height'], target['width']),
        mean=tuple(processor['image_mean']), std=tuple(processor['image_std']),
        interpolation=Image.Resampling(processor['resample']).name.lower(),
        crop_pct=target['height'] / edge if edge else 1.0,
    )
