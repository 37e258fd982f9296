"""Conversion between timm's data config and the processors of transformers."""
import math
from typing import Any, Dict, Optional, Tuple

from PIL import Image
from timm.data import str_to_pil_interp
from transformers import CLIPImageProcessor, ViTImageProcessor

from ..arguments import check_finite, check_integer, check_number
from ..event_data.names import is_event_name, parse_name
from .event_processing import SpikformerEventProcessor

__all__ = ['create_processor', 'read_data_config', 'read_event_processor']

# Image processors that only resize, crop, rescale and normalize; the name of a class may end with one of the suffixes
_IMAGE_PROCESSORS = (CLIPImageProcessor, ViTImageProcessor)
_SUFFIXES = ('', 'Fast', 'Pil')
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'lanczos')  # of both libraries
# Settings of an image processor that determine the preprocessing, and those that cannot change its result
_SETTINGS = (
    'crop_size', 'default_to_square', 'do_center_crop', 'do_convert_rgb', 'do_normalize', 'do_pad', 'do_rescale',
    'do_resize', 'image_mean', 'image_std', 'resample', 'rescale_factor', 'size')
_WITHOUT_EFFECT = (
    '_valid_processor_keys', 'data_format', 'device', 'disable_grouping', 'image_processor_type', 'image_seq_length',
    'input_data_format', 'pad_size', 'processor_class', 'return_tensors')
_EVENT_SETTINGS = ('image_mean', 'image_std', 'sensor_size', 'size', 'split_by', 'time_steps')


def create_processor(pretrained_cfg: Dict[str, Any], time_steps: int, dataset: Optional[str] = None):
    """Create a processor with the size, crop, interpolation, mean and std of a timm cfg.

    For 2 input channels, one per polarity of events, the processor is a `SpikformerEventProcessor`, which splits a
    recording into `time_steps` frames. If `dataset` is the name of an event dataset, its options are used instead.
    Otherwise it is a CLIPImageProcessor of transformers, which resizes the shorter side (`crop_mode='center'`) or each
    side (`crop_mode='squash'`), and crops the center, like timm. The crops differ by one pixel if the number of pixels
    to remove is odd, as the libraries round it differently.

    Args:
        pretrained_cfg: timm's cfg.
        time_steps: Number of time steps of the model.
        dataset: Name of the dataset, such as `events/n_mnist?time_steps=10`, if it is known.

    Raises:
        ValueError: No image processor preprocesses images like timm: `crop_mode` is 'border', or it is 'center' and the
            input is not square, or the interpolation is not available in both libraries. Or `dataset` is an invalid
            name of an event dataset.
    """
    channels, height, width = pretrained_cfg['input_size']
    if channels == 2:
        settings = dict(time_steps=time_steps)
        if is_event_name(dataset):
            name = parse_name(dataset)
            settings = dict(time_steps=name.time_steps, split_by=name.split_by, sensor_size=name.sensor_size)
        return SpikformerEventProcessor(
            size=(height, width), image_mean=pretrained_cfg['mean'], image_std=pretrained_cfg['std'], **settings)
    crop_mode, interpolation = pretrained_cfg.get('crop_mode') or 'center', pretrained_cfg['interpolation']
    resized = [math.floor(side / pretrained_cfg['crop_pct']) for side in (height, width)]  # as timm computes it
    if crop_mode == 'squash':
        size = dict(height=resized[0], width=resized[1])
    elif crop_mode == 'center' and height == width:
        size = dict(shortest_edge=resized[0])
    else:
        raise ValueError(
            f'There is no image processor of transformers that preprocesses images like timm for an input of '
            f"{height}x{width} pixels and crop_mode={crop_mode!r}. Use a model with crop_mode='squash' in its "
            f'pretrained_cfg, or save a processor with the model first.')
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f'interpolation={interpolation!r} is not supported by the image processors of transformers, expected one '
            f'of {", ".join(_INTERPOLATIONS)}. Change it in the pretrained_cfg of the model.')
    return CLIPImageProcessor(
        size=size,
        crop_size=dict(height=height, width=width),
        resample=int(str_to_pil_interp(interpolation)),
        image_mean=list(pretrained_cfg['mean']),
        image_std=list(pretrained_cfg['std']),
        do_convert_rgb=channels == 3,
    )


def read_data_config(processor: Dict[str, Any], channels: int) -> Dict[str, Any]:
    """Convert the contents of a preprocessor_config.json to timm's data config, with the keys in `images.DATA_KEYS`.

    Args:
        processor: Contents of the file.
        channels: Number of input channels of the model.

    Raises:
        ValueError: A setting is unknown or invalid, or timm cannot preprocess images in this way.
    """
    if processor.get('feature_extractor_type') == SpikformerEventProcessor.__name__:
        events = read_event_processor(processor)
        return dict(
            input_size=(channels, *events.size), mean=tuple(events.image_mean), std=tuple(events.image_std),
            interpolation='bilinear', crop_pct=1.0, crop_mode='squash')
    image_processor = _create_image_processor(processor)
    _check_settings(image_processor, channels)
    (height, width), crop_pct, crop_mode = _read_crop(image_processor)
    return dict(
        input_size=(channels, height, width), mean=image_processor.image_mean, std=image_processor.image_std,
        interpolation=_read_interpolation(image_processor), crop_pct=crop_pct, crop_mode=crop_mode)


def read_event_processor(processor: Dict[str, Any]) -> SpikformerEventProcessor:
    """Create the processor of events that the contents of a preprocessor_config.json describe.

    Raises:
        ValueError: The file describes another processor, or a setting is unknown or invalid.
    """
    name = processor.get('feature_extractor_type')
    if name != SpikformerEventProcessor.__name__:
        name = name or processor.get('image_processor_type')
        raise ValueError(f'the processor is {name!r}, expected {SpikformerEventProcessor.__name__!r}.')
    _check_keys(processor, (*_EVENT_SETTINGS, 'feature_extractor_type', 'processor_class'))
    return SpikformerEventProcessor(**{key: processor[key] for key in _EVENT_SETTINGS if key in processor})


def _check_keys(processor: Dict[str, Any], known: Tuple[str, ...]) -> None:
    unknown = sorted(processor.keys() - set(known))
    if unknown:
        raise ValueError(f'the setting {unknown[0]} is unknown. Remove it, or use another processor.')


def _create_image_processor(processor: Dict[str, Any]) -> Any:
    """Create the image processor that transformers creates from a preprocessor_config.json, with its defaults."""
    name = processor.get('image_processor_type')
    classes = {cls.__name__ + suffix: cls for cls in _IMAGE_PROCESSORS for suffix in _SUFFIXES}
    if name not in classes:
        raise ValueError(
            f'image_processor_type is {name!r}, expected CLIPImageProcessor or ViTImageProcessor, whose preprocessing '
            f'timm can reproduce.')
    _check_keys(processor, (*_SETTINGS, *_WITHOUT_EFFECT))
    return classes[name](**processor)


def _check_settings(image_processor: Any, channels: int) -> None:
    """Raise a ValueError if timm's transforms cannot do what the settings of an image processor state."""
    required = dict(do_resize=True, do_rescale=True, do_normalize=True, do_pad=False)
    if channels != 3:
        required['do_convert_rgb'] = False
    for name, value in required.items():
        given = getattr(image_processor, name)
        if given not in ((True,) if value else (False, None)):
            raise ValueError(f'timm cannot preprocess images like a processor with {name}={given!r}, expected {value}.')
    factor = image_processor.rescale_factor
    check_number('rescale_factor', factor)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-6):  # some files contain a rounded number
        raise ValueError(
            f'timm cannot preprocess images like a processor with rescale_factor={factor!r}, expected 1/255. Change '
            f'image_mean and image_std instead.')
    for name in ('image_mean', 'image_std'):
        values = getattr(image_processor, name)
        if not isinstance(values, (list, tuple)) or len(values) != channels:
            raise ValueError(f'{name} is {values!r}, expected a list of {channels} numbers, one per channel.')
        for value in values:
            check_finite(name, value)


def _read_interpolation(image_processor: Any) -> str:
    """Return timm's name of the interpolation; raise a ValueError if it is not available in both libraries."""
    interpolation = Image.Resampling(image_processor.resample).name.lower()
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(
            f'resample={image_processor.resample} ({interpolation}) is not available in both libraries, expected one '
            f'of {", ".join(_INTERPOLATIONS)}.')
    return interpolation


def _read_crop(image_processor: Any) -> Tuple[Tuple[int, int], float, str]:
    """Return the height and width after the crop, and timm's `crop_pct` and `crop_mode`.

    Raises:
        ValueError: timm cannot resize and crop like this image processor.
    """
    size = {key: value for key, value in dict(image_processor.size or {}).items() if value is not None}
    crop = dict(image_processor.crop_size or {}) if image_processor.do_center_crop else None
    for name, value in (*size.items(), *(crop or {}).items()):
        check_integer(name, value, 1)
    given = f'size={size} and ' + (f'crop_size={crop}' if crop else 'without a center crop')
    if size.keys() == {'height', 'width'}:
        crop_mode, resized = 'squash', (size['height'], size['width'])
        cropped = (crop['height'], crop['width']) if crop else resized
    elif size.keys() == {'shortest_edge'} and crop and crop.get('height') == crop.get('width'):
        crop_mode, resized, cropped = 'center', (size['shortest_edge'],) * 2, (crop['height'], crop['width'])
    else:
        raise ValueError(
            f'timm cannot preprocess images like a processor with {given}. Use a height and a width as size, or a '
            f'shortest_edge with a square crop_size.')
    largest = min(inner / outer for inner, outer in zip(cropped, resized))
    for crop_pct in (largest, math.nextafter(largest, 0)):  # timm divides by it and rounds down
        if tuple(math.floor(side / crop_pct) for side in cropped) == resized:
            return cropped, crop_pct, crop_mode
    raise ValueError(
        f'timm cannot preprocess images like a processor with {given}: it crops the same fraction of the height and of '
        f'the width.')
