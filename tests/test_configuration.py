"""Conversion between the arguments of the timm model and the transformers configuration; no argument is lost."""
import inspect
import json

import numpy as np
import pytest
import timm
import torch
from conftest import calibrate
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from timm_spikformer import (
    Spikformer,
    SpikformerConfig,
    SpikformerForImageClassification,
    SpikformerForMaskedImageModeling,
    SpikformerModel,
)

# Values of each argument that differ from its default. ALSO: further arguments that a value requires.
VALUES = {
    'img_size': [(48, 32), 48],
    'patch_size': [8],
    'in_chans': [2],
    'num_classes': [7, 0],
    'global_pool': ['max', 'avgmax', 'catavgmax', ''],
    'stem': ['sps'],
    'stem_strides': [(1, 2, 1, 1)],
    'embed_dim': [48],
    'depth': [3, 0],
    'num_heads': [4],
    'mlp_ratio': [1.1, 3.3, 1],  # int(56 * 1.1) is 61, but int(56 * (61 / 56)) is 60
    'attn_scale': [0.25, 1],
    'time_steps': [1, np.int64(3)],
    'drop_rate': [0.1],
    'proj_drop_rate': [0.2],
    'drop_path_rate': [0.3],
}
ALSO = {'stem_strides': dict(patch_size=2), 'mlp_ratio': dict(embed_dim=56)}
CASES = [(arg, value) for arg, values in VALUES.items() for value in values]


def arguments():
    return {k: p for k, p in inspect.signature(Spikformer.__init__).parameters.items() if k not in (
        'self', 'device', 'dtype')}


def is_equal(a, b):
    """Return whether two arguments are equal; a number n equals (n, n), and a list equals a tuple."""
    a, b = np.broadcast_arrays(a, b)
    return bool((a == b).all())


def test_every_argument_has_a_case():
    assert VALUES.keys() == arguments().keys()
    for arg, value in CASES:
        assert arguments()[arg].default is None or not is_equal(value, arguments()[arg].default), arg
    config = SpikformerConfig()
    assert config.to_timm_args().keys() == arguments().keys()
    for arg, value in config.to_timm_args(num_classes=1000).items():
        assert value == (224 if arg == 'img_size' else arguments()[arg].default), f'the default of {arg} differs'


def make(arg, value, images):
    """Return a calibrated timm model with one non-default argument, and an input for it."""
    torch.manual_seed(0)
    kwargs = {**dict(num_classes=5, time_steps=2, patch_size=4), **ALSO.get(arg, {}), arg: value}
    if value == '':
        kwargs['num_classes'] = 0
    model = timm.create_model('test_spikformer_v2', **kwargs)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(m.bias, 1.)  # so that attention with few tokens fires
    x = images[:4, :kwargs.get('in_chans', 3), ::4, ::4]
    return calibrate(model, x), x


def assert_same(model, other, x, arg, value):
    """Check that two models have the same weights, outputs and arguments."""
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
    args, others = model.get_init_args(), other.get_init_args()
    assert is_equal(others[arg], value)
    for key in args.keys() - {'img_size'}:
        assert is_equal(args[key], others[key]), key
    for (name, m), n in zip(model.named_modules(), other.modules()):  # drop rates are arguments of modules
        assert type(m) is type(n) and m.extra_repr() == n.extra_repr(), name


def hf_class(model):
    return SpikformerForImageClassification if model.num_classes else SpikformerModel


@pytest.mark.parametrize('arg, value', CASES, ids=lambda v: repr(v) if not isinstance(v, str) else v)
def test_round_trip_with_from_timm(arg, value, images, tmp_path):
    """Convert a timm model with `from_timm`, save it with `save_pretrained`, and load it in both libraries."""
    model, x = make(arg, value, images)
    cls = hf_class(model)
    hf = cls(SpikformerConfig.from_timm(model)).eval()
    hf.timm_model.load_state_dict(model.state_dict())
    assert_same(model, hf.timm_model, x, arg, value)
    hf.save_pretrained(tmp_path)
    assert_same(model, cls.from_pretrained(tmp_path).timm_model, x, arg, value)
    assert_same(model, timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval(), x, arg, value)


@pytest.mark.parametrize('arg, value', CASES, ids=lambda v: repr(v) if not isinstance(v, str) else v)
def test_round_trip_with_folder_of_timm(arg, value, images, tmp_path):
    """Save with `save_for_hf`, load with `from_pretrained`, save with `save_for_hf` again, and load in timm."""
    if isinstance(value, np.int64):
        pytest.skip('timm cannot serialize numpy integers')
    model, x = make(arg, value, images)
    model_args = {arg: value} if arg.endswith('_rate') else None
    save_for_hf(model, str(tmp_path / 'a'), safe_serialization=True, model_args=model_args)
    hf = hf_class(model).from_pretrained(tmp_path / 'a')
    assert_same(model, hf.timm_model, x, arg, value)
    save_for_hf(hf.timm_model, str(tmp_path / 'b'), safe_serialization=True, model_args=model_args)
    assert_same(model, timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True).eval(), x, arg, value)


def test_class_names_of_a_replaced_classifier():
    """They are unknown, even if the number of classes is the same."""
    model = timm.create_model('spikformer_v2_2_64_patch4_32')
    assert SpikformerConfig.from_timm(model).id2label[0] == 'T-shirt/top'
    model.reset_classifier(10)
    assert SpikformerConfig.from_timm(model).id2label[0] == 'LABEL_0'


def test_model_not_created_by_create_model(images, tmp_path):
    model = calibrate(Spikformer(img_size=32, embed_dim=64, depth=1, num_heads=2, num_classes=3), images)
    hf = SpikformerForImageClassification(SpikformerConfig.from_timm(model)).eval()
    hf.timm_model.load_state_dict(model.state_dict())
    assert hf.config.image_size == 32 and hf.config.architecture is None
    hf.save_pretrained(tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize('change, field, expected', [
    (lambda m: m.set_time_steps(1), 'time_steps', 1),
    (lambda m: m.set_time_steps(np.int64(3)), 'time_steps', 3),
    (lambda m: m.set_input_size((64, 32)), 'image_size', [64, 32]),
    (lambda m: m.reset_classifier(7), 'num_labels', 7),
    (lambda m: m.reset_classifier(7, 'catavgmax'), 'global_pool', 'catavgmax'),
])
def test_changes_by_methods_of_timm_model_are_saved(change, field, expected, images, tmp_path):
    model, x = make('num_classes', 5, images)
    hf = SpikformerForImageClassification(SpikformerConfig.from_timm(model)).eval()
    hf.timm_model.load_state_dict(model.state_dict())
    change(hf.timm_model)
    hf.save_pretrained(tmp_path)
    loaded = SpikformerForImageClassification.from_pretrained(tmp_path)
    assert getattr(loaded.config, field) == expected
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, hf(x).logits)


@pytest.mark.parametrize('cls', [SpikformerModel, SpikformerForMaskedImageModeling])
def test_model_without_classifier_keeps_labels_of_config(cls, tmp_path):
    config = SpikformerConfig.from_timm(
        'test_spikformer_v2', num_labels=5, global_pool='max', decoder_hidden_size=32, decoder_num_hidden_layers=1)
    model = cls(config)
    model.set_time_steps(1)
    model.save_pretrained(tmp_path)
    loaded = SpikformerForImageClassification.from_pretrained(tmp_path)
    assert (loaded.config.num_labels, loaded.config.global_pool, loaded.config.time_steps) == (5, 'max', 1)
    assert json.loads((tmp_path / 'config.json').read_text())['num_classes'] == 0


@pytest.mark.parametrize('save_by', ['timm', 'from_timm'])
def test_class_names(save_by, tmp_path):
    model = timm.create_model('spikformer_v2_2_64_patch4_32', pretrained=True)
    if save_by == 'timm':
        save_for_hf(model, str(tmp_path), safe_serialization=True)
        config = SpikformerConfig.from_pretrained(tmp_path)
    else:
        config = SpikformerConfig.from_timm(model)
    assert list(config.id2label.values()) == list(model.pretrained_cfg['label_names'])
    assert config.label2id['Bag'] == 8
    model.reset_classifier(4)
    assert SpikformerConfig.from_timm(model).num_labels == 4
    assert SpikformerConfig.from_timm('spikformer_v2_2_64_patch4_32', num_labels=3).num_labels == 3


@pytest.mark.parametrize('global_pool, features', [('avg', 64), ('max', 64), ('catavgmax', 128), ('', None)])
def test_pooler_output_matches_timm(global_pool, features, images):
    model, x = make('num_classes', 0, images)
    model.reset_classifier(0, global_pool)
    hf = SpikformerModel(SpikformerConfig.from_timm(model)).eval()
    hf.timm_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        pooled = hf(x).pooler_output
        if features is None:
            assert pooled is None
        else:
            assert pooled.shape == (4, features) and pooled.any() and torch.equal(pooled, model(x))


def test_classifier_requires_global_pool():
    config = SpikformerConfig.from_timm(timm.create_model('test_spikformer_v2', num_classes=0, global_pool=''))
    assert config.num_labels == 0 and SpikformerModel(config).timm_model.head.global_pool.pool_type == ''
    config.num_labels = 3
    with pytest.raises(ValueError, match="A classifier of 3 labels requires a pooling type, got global_pool=''"):
        SpikformerForImageClassification(config)


def test_pretrained_encoder_keeps_global_pool(images, tmp_path):
    """timm saves the encoder of a masked autoencoder, and loads it into a classifier."""
    from timm_spikformer import SpikformerMAE
    encoder = timm.create_model('test_spikformer_v2', global_pool='max')
    SpikformerMAE(encoder, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    save_for_hf(encoder, str(tmp_path), safe_serialization=True)
    assert len(load_file(tmp_path / 'model.safetensors')) == len(encoder.state_dict())
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=4)
    assert model(images[:1]).shape == (1, 4) and model.head.global_pool.pool_type == 'max'
