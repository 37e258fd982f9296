"""Conversion between timm's data config and the processors of transformers."""
import math
from typing import Any, Dict, Optional

from PIL import Image
from timm.data import str_to_pil_interp
from transformers import CLIPImageProcessor, ViTImageProcessor

from ..event_data.names import is_event_name, parse_name
from .event_processing import SpikformerEventProcessor

__all__ = ['create_processor', 'read_data_config']


def create_processor(pretrained_cfg: Dict[str, Any], time_steps: int, dataset: Optional[str] = None):
    """Create a processor with the size, crop, interpolation, mean and std of a timm cfg.

    For 2 input channels, one per polarity of events, the processor is a `SpikformerEventProcessor`, which splits a
    recording into `time_steps` frames, or as the name of the event dataset states on which the model was trained.
    Otherwise it is an image processor of transformers: for square inputs CLIPImageProcessor, which resizes the shorter
    side and crops the center, like timm; for other inputs ViTImageProcessor, which resizes each side, because
    CLIPImageProcessor has only one size for both sides.

    Args:
        pretrained_cfg: timm's cfg.
        time_steps: Number of time steps of the model.
        dataset: Name of the dataset, such as `events/n_mnist?time_steps=10`, if it is known.
    """
    channels, height, width = pretrained_cfg['input_size']
    if channels == 2:
        settings = dict(time_steps=time_steps)
        if is_event_name(dataset):
            name = parse_name(dataset)
            settings = dict(time_steps=name.time_steps, split_by=name.split_by, sensor_size=name.sensor_size)
        return SpikformerEventProcessor(
            size=(height, width), image_mean=pretrained_cfg['mean'], image_std=pretrained_cfg['std'], **settings)
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
    """Return timm's data config for the contents of a preprocessor_config.json: see `images.DATA_KEYS`."""
    size = processor['size']
    if processor.get('feature_extractor_type') == SpikformerEventProcessor.__name__:
        return dict(
            input_size=(channels, *size), mean=tuple(processor['image_mean']), std=tuple(processor['image_std']),
            interpolation='bilinear', crop_pct=1.0)
    crop = processor.get('crop_size') if processor.get('do_center_crop', True) else None
    edge = size.get('shortest_edge')
    target = crop or (dict(height=edge, width=edge) if edge else size)
    return dict(
        input_size=(channels, target['height'], target['width']),
        mean=tuple(processor['image_mean']), std=tuple(processor['image_std']),
        interpolation=Image.Resampling(processor['resample']).name.lower(),
        crop_pct=target['height'] / edge if edge else 1.0,
    )
