"""Conversion between timm's data config and the processors of transformers: both preprocess images equally."""
import json

import numpy as np
import pytest
import timm
from huggingface_hub import ModelCard
from PIL import Image
from timm.data import create_transform
from timm.models import save_for_hf
from transformers import AutoImageProcessor, CLIPImageProcessor, ViTImageProcessor, pipeline

from timm_spikformer.hf.processing import create_processor, read_data_config
from timm_spikformer.images import DATA_KEYS, SHIPPED_MODEL, read_splits
from timm_spikformer.publishing import publish
from timm_spikformer.publishing.card import Dataset


@pytest.fixture(scope='module')
def photo() -> Image.Image:
    """A smooth image of which different crops differ."""
    x, y = np.meshgrid(np.linspace(0., 1., 300), np.linspace(0., 1., 200))
    return Image.fromarray((255 * np.stack([x, y, x * y], axis=-1)).astype(np.uint8))


def is_like_timm(processor, config, image):
    """Return whether a processor and timm's transform for a data config give equal pixels, except for rounding."""
    ours = processor(image, return_tensors='pt').pixel_values[0]
    expected = create_transform(**config, is_training=False)(image)
    return ours.shape == expected.shape and (ours - expected).abs().max() * min(config['std']) < 0.02


@pytest.mark.parametrize('size, crop_pct, crop_mode', [
    ((224, 224), 0.9, 'center'), ((32, 32), 1.0, 'center'), ((28, 28), 0.875, 'center'), ((32, 32), 1.14, 'center'),
    ((28, 28), 1.0, 'squash'), ((32, 48), 1.0, 'squash'), ((32, 48), 0.8, 'squash')])
def test_image_processor_matches_timm_transform(size, crop_pct, crop_mode, photo):
    config = dict(
        input_size=(3, *size), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), interpolation='bicubic', crop_pct=crop_pct,
        crop_mode=crop_mode)
    processor = create_processor(config, time_steps=4)
    assert is_like_timm(processor, config, photo)
    read = read_data_config(json.loads(processor.to_json_string()), 3)
    assert is_like_timm(processor, read, photo)
    assert read.pop('crop_pct') == pytest.approx(crop_pct, rel=0.03)
    assert read == {k: config[k] for k in read} and set(read) == set(DATA_KEYS) - {'crop_pct'}


@pytest.mark.parametrize('cfg, message', [
    (dict(crop_mode='border'), "32x32 pixels and crop_mode='border'"),
    (dict(input_size=(3, 32, 48)), "32x48 pixels and crop_mode='center'"),
    (dict(interpolation='hamming'), "interpolation='hamming' is not supported"),
])
def test_no_image_processor_for_cfg(cfg, message):
    default = dict(input_size=(3, 32, 32), mean=(0.,) * 3, std=(1.,) * 3, interpolation='bicubic', crop_pct=1.0)
    with pytest.raises(ValueError, match=message):
        create_processor({**default, **cfg}, time_steps=4)


def make_processor(cls, **settings):
    return json.loads(cls(**settings).to_json_string())


@pytest.mark.parametrize('processor, crop_mode', [
    (make_processor(ViTImageProcessor, size=dict(height=28, width=28)), 'squash'),
    (make_processor(ViTImageProcessor, size=dict(height=32, width=48), resample=3), 'squash'),
    (make_processor(ViTImageProcessor, size=40, do_center_crop=True, crop_size=36), 'squash'),
    (make_processor(ViTImageProcessor, size=[40, 50], do_center_crop=True, crop_size=[36, 45]), 'squash'),
    (make_processor(CLIPImageProcessor, size=33, crop_size=28), 'center'),
    (make_processor(CLIPImageProcessor, size=28, crop_size=28, rescale_factor=0.00392157), 'center'),
    (dict(image_processor_type='ViTImageProcessorFast', do_center_crop=None, device='cpu'), 'squash'),
    (dict(image_processor_type='CLIPImageProcessorPil'), 'center'),
])
def test_read_data_config(processor, crop_mode, photo, tmp_path):
    """timm preprocesses like the processor that transformers loads from the same file, with its defaults."""
    (tmp_path / 'preprocessor_config.json').write_text(json.dumps(processor))
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    config = read_data_config(processor, 3)
    assert config['crop_mode'] == crop_mode and is_like_timm(loaded, config, photo)


VIT = make_processor(ViTImageProcessor, size=dict(height=28, width=28))
CLIP = make_processor(CLIPImageProcessor, size=28, crop_size=28)


@pytest.mark.parametrize('processor, change, message', [
    (CLIP, dict(do_normalize=False), 'processor with do_normalize=False, expected True'),
    (CLIP, dict(do_rescale=False), 'processor with do_rescale=False, expected True'),
    (CLIP, dict(do_resize=False), 'processor with do_resize=False, expected True'),
    (CLIP, dict(rescale_factor=1 / 127.5), 'processor with rescale_factor=0.0078.*, expected 1/255'),
    (CLIP, dict(do_pad=True), 'processor with do_pad=True, expected False'),
    (CLIP, dict(do_resize='false'), "do_resize='false', expected True"),
    (CLIP, dict(do_center_crop=False), 'without a center crop'),
    (CLIP, dict(crop_size=dict(height=28, width=14)), 'crop_size'),
    (CLIP, dict(size=dict(shortest_edge=28, longest_edge=56)), 'longest_edge'),
    (VIT, dict(do_center_crop=True, crop_size=dict(height=28, width=14)), 'the same fraction'),
    (VIT, dict(resample=5), r'resample=5 \(hamming\) is not available'),
    (VIT, dict(image_mean=None), 'image_mean is None'),
    (VIT, dict(image_std=0.5), 'image_std is 0.5'),
    (VIT, dict(image_mean=[0.5]), r'image_mean is .*, expected a list of 3 numbers'),
    (VIT, dict(image_mean=['a', 'b', 'c']), "image_mean must be a finite number, got 'a'"),
    (VIT, dict(size=dict(height=0, width=28)), 'height must be an integer of at least 1, got 0'),
    (CLIP, dict(size=dict(shortest_edge='28')), "shortest_edge must be an integer of at least 1, got '28'"),
    (CLIP, dict(rescale_factor='x'), "rescale_factor must be at least 0 and finite, got 'x'"),
    (VIT, dict(crop_pct=0.9), 'the setting crop_pct is unknown'),
    (VIT, dict(auto_map={}), 'the setting auto_map is unknown'),
    (VIT, dict(image_processor_type='ConvNextImageProcessor'), "is 'ConvNextImageProcessor', expected CLIP"),
    (VIT, dict(image_processor_type=None), 'is None, expected CLIP'),
    (dict(feature_extractor_type='SpikformerEventProcessor'), dict(do_normalize=False), 'do_normalize is unknown'),
    (dict(feature_extractor_type='SpikformerEventProcessor'), dict(time_steps=0), 'time_steps'),
])
def test_processor_that_timm_cannot_represent(processor, change, message):
    with pytest.raises(ValueError, match=message):
        read_data_config({**processor, **change}, 3)


def test_rgb_conversion_of_model_with_one_channel():
    one = dict(image_mean=[0.5], image_std=[0.5])
    assert read_data_config({**CLIP, **one, 'do_convert_rgb': False}, 1)['input_size'] == (1, 28, 28)
    with pytest.raises(ValueError, match='do_convert_rgb=True, expected False'):
        read_data_config({**CLIP, **one}, 1)


def test_accuracy_on_card_is_that_of_pipeline(tmp_path):
    """The processor squashes images that are three times as wide as high, so timm has to do the same."""
    images = read_splits()['test'].sample_stratified(60, seed=0)
    for i, (image, label) in enumerate(images):
        folder = tmp_path / 'data' / 'test' / images.classes[label].replace('/', '-')
        folder.mkdir(parents=True, exist_ok=True)
        image.resize((84, 28)).save(folder / f'{i}.png')
    model = timm.create_model(SHIPPED_MODEL, pretrained=True)
    labels = [name.replace('/', '-') for name in images.classes]
    save_for_hf(model, str(tmp_path / 'in'), safe_serialization=True, model_config=dict(label_names=labels))
    cfg = model.pretrained_cfg
    ViTImageProcessor(
        size=dict(height=28, width=28), image_mean=cfg['mean'], image_std=cfg['std']).save_pretrained(tmp_path / 'in')
    out = tmp_path / 'out'
    publish(
        tmp_path / 'in', 'me/model', 'mit', output=out, dry_run=True, eval_data=tmp_path / 'data',
        dataset=Dataset('a/b', 'Wide images'))
    assert timm.create_model(f'local-dir:{out}').pretrained_cfg['crop_mode'] == 'squash'
    classify = pipeline('image-classification', model=str(out))
    files = list((tmp_path / 'data').rglob('*.png'))
    accuracy = 100 * np.mean([classify(str(f))[0]['label'] == f.parent.name for f in files])
    card = ModelCard.load(out / 'README.md')
    assert accuracy > 70 and card.data.eval_results[0].metric_value == pytest.approx(accuracy, abs=2)
