import numpy as np
import pytest
import timm
import torch
from conftest import SHIPPED_WEIGHTS, assert_neurons_fire, calibrate, firing_rates
from foreign_checkpoints import authors_checkpoint, spikingjelly_model
from timm.models import get_pretrained_cfg, load_checkpoint, load_state_dict, save_for_hf
from timm.models._manipulate import group_parameters
from torch.utils.flop_counter import FlopCounterMode

from timm_spikformer import LIF, SpikformerMAE
from timm_spikformer.checkpoints import checkpoint_filter_fn

MODELS = timm.list_models('*spikformer*')

# published parameter counts: exact for V2, in millions with two decimals for V1
PARAMS = dict(
    spikformer_v2_8_384=29_111_272,
    spikformer_v2_8_512=51_545_064,
    spikformer_v2_16_768=172_278_760,
)
PARAMS_V1 = dict(spikformer_8_384=16.81, spikformer_8_512=29.68, spikformer_8_768=66.34)


def num_params(name: str) -> int:
    return sum(p.numel() for p in timm.create_model(name, device='meta').parameters())


def test_registered_models():
    assert len(MODELS) == 14
    assert MODELS == timm.list_models(module='spikformer')
    assert timm.list_pretrained('*spikformer*') == SHIPPED_WEIGHTS
    for name in MODELS:
        cfg = get_pretrained_cfg(name)
        assert cfg.license == 'apache-2.0' and cfg.paper_ids.startswith('arXiv:') and cfg.origin_url
        assert cfg.hf_hub_id is None


@pytest.mark.parametrize('name', PARAMS)
def test_published_parameter_counts(name):
    assert num_params(name) == PARAMS[name]


@pytest.mark.parametrize('name', PARAMS_V1)
def test_published_parameter_counts_v1(name):
    assert abs(num_params(name) / 1e6 - PARAMS_V1[name]) < 0.01


def test_parameter_counts_of_v1_for_cifar():
    assert num_params('spikformer_4_384_patch4_32') / 1e6 == pytest.approx(9.3, abs=0.05)
    assert num_params('spikformer_2_256_patch16_128') / 1e6 == pytest.approx(2.57, abs=0.02)


@pytest.mark.parametrize('name, total, stem, linears, attention', [
    ('spikformer_v2_8_384', 11.51, 8.50, 2.77, 0.24),
    ('spikformer_v2_8_512', 20.36, 15.12, 4.93, 0.31),
])
def test_dense_macs_per_time_step(name, total, stem, linears, attention):
    """Expected values count attention as (q k^T) v; the model computes q (k^T v), which is several times cheaper."""
    model = timm.create_model(name, device='meta', time_steps=1).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    macs = {k: sum(v.values()) / 2e9 for k, v in counter.get_flop_counts().items()}
    N, C = 14 * 14, model.embed_dim
    qkv_orders = [2 * N * N * C * 8 / 1e9, 2 * N * (C // 8) * C * 8 / 1e9]
    run_linears = sum(v for k, v in macs.items() if k.startswith('Spikformer.blocks.') and k.endswith('.linear'))
    run_stem = sum(v for k, v in macs.items() if k.startswith('Spikformer.stem.') and k.endswith('.conv'))
    assert run_stem == pytest.approx(stem, rel=0.005)
    assert run_linears == pytest.approx(linears, rel=0.005)
    assert qkv_orders[0] == pytest.approx(attention, abs=0.005)
    assert run_stem + run_linears + qkv_orders[0] == pytest.approx(total, rel=0.005)
    assert macs['Global'] == pytest.approx(run_stem + run_linears + qkv_orders[1] + C * 1000 / 1e9, rel=1e-6)


@pytest.mark.parametrize('kwargs', [{}, dict(stem='sps')], ids=['v2', 'v1'])
@pytest.mark.parametrize('time_steps', [1, 4])
def test_neurons_fire_after_initialization(kwargs, time_steps, images):
    torch.manual_seed(0)
    model = timm.create_model('test_spikformer_v2', embed_dim=128, depth=8, time_steps=time_steps, **kwargs).train()
    rates = firing_rates(model, images)
    assert len(rates) == (12 if not kwargs else 5) + 8 * 5
    assert min(r for n, r in rates.items() if not n.endswith('attn_lif')) > 0.01
    assert min(rates.values()) > 0  # attn_lif follows no BN, and sums over 16 tokens are small
    assert max(rates.values()) < 0.3


def test_init_weights_after_to_empty(images):
    model = timm.create_model('test_spikformer_v2', device='meta').to_empty(device='cpu')
    model.init_weights()
    assert torch.equal(model.blocks[0].attn.qkv.bn.running_var, torch.ones(192))
    assert_neurons_fire(model.train(), images)
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)


# --- input


@pytest.mark.parametrize('size', [(64, 64), (32, 80), 16])
def test_input_sizes_are_multiples_of_patch_size(model, size):
    H, W = (size, size) if isinstance(size, int) else size
    assert model.forward_features(torch.randn(2, 3, H, W)).shape == (2, 64, H // 16, W // 16)


def test_image_equals_constant_sequence(model, images):
    sequence = images.unsqueeze(1).expand(-1, 4, -1, -1, -1)
    assert_neurons_fire(model, images)
    assert torch.equal(model(images), model(sequence))


def test_sequence_overrides_time_steps(model, images):
    model.set_time_steps(2)
    rates = firing_rates(model, images[:1])
    sequence = torch.stack([images, images.flip(0), images.roll(1, 0)], 1)
    assert rates and not torch.equal(model(sequence), model(images))
    seen = []
    hook = model.stem.stages[0].register_forward_hook(lambda m, args, out: seen.append(out.shape[0]))
    model(sequence), model(images)
    hook.remove()
    assert seen == [3, 2]


def test_set_time_steps(model, images):
    before = model(images)
    model.set_time_steps(1)
    assert not torch.equal(model(images), before)
    model.set_time_steps(4)
    assert torch.equal(model(images), before)
    model.set_time_steps(3)
    assert timm.models.get_model_args(model)['time_steps'] == 3


def test_time_steps_may_be_numpy_integer(model, images, tmp_path):
    model.set_time_steps(np.int64(2))
    assert type(model.time_steps) is int and model.forward_steps(images[:1]).shape == (2, 1, 10)
    save_for_hf(model, str(tmp_path), safe_serialization=True)  # which writes JSON


def test_attn_scale_argument(images):
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=10, attn_scale=0.25), images)
    other = timm.create_model('test_spikformer_v2', num_classes=10).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.equal(model(images), other(images))
    for block in other.blocks:
        block.attn.scale = 0.25
    assert torch.equal(model(images), other(images))


@pytest.mark.parametrize('kwargs, message', [
    (dict(time_steps=0), 'time_steps must be an integer of at least 1, got 0'),
    (dict(time_steps=2.5), 'time_steps must be an integer of at least 1, got 2.5'),
    (dict(time_steps=True), 'time_steps must be an integer of at least 1, got True'),
    (dict(time_steps=np.True_), 'time_steps must be an integer of at least 1, got'),
    (dict(time_steps='4'), "time_steps must be an integer of at least 1, got '4'"),
    (dict(attn_scale=0.), 'attn_scale must be a finite number greater than 0, got 0.0'),
    (dict(attn_scale=float('inf')), 'attn_scale must be a finite number greater than 0, got inf'),
    (dict(mlp_ratio=float('nan')), 'mlp_ratio must be a finite number greater than 0, got nan'),
    (dict(mlp_ratio=-4), 'mlp_ratio must be a finite number greater than 0, got -4'),
    (dict(mlp_ratio='4'), "mlp_ratio must be a finite number greater than 0, got '4'"),
    (dict(mlp_ratio=0.001), r'embed_dim \* mlp_ratio must be at least 1, got 64 \* 0.001'),
    (dict(drop_rate=5), 'drop_rate must be a number of at least 0 and less than 1, got 5'),
    (dict(proj_drop_rate=-0.1), 'proj_drop_rate must be a number of at least 0 and less than 1, got -0.1'),
    (dict(drop_path_rate=1.), 'drop_path_rate must be a number of at least 0 and less than 1, got 1.0'),
    (dict(drop_path_rate=True), 'drop_path_rate must be a number of at least 0 and less than 1, got True'),
    (dict(global_pool='foo'), "global_pool must be one of '', 'avg', 'max', 'avgmax', 'catavgmax', got 'foo'"),
    (dict(global_pool=3), 'global_pool must be one of .*, got 3'),
    (dict(global_pool=''), "A classifier of 1000 classes requires a pooling type, got global_pool=''"),
    (dict(in_chans=0), 'in_chans must be an integer of at least 1, got 0'),
    (dict(num_classes=-1), 'num_classes must be an integer of at least 0, got -1'),
    (dict(num_heads=0), 'num_heads must be an integer of at least 1, got 0'),
    (dict(embed_dim=64.), 'embed_dim must be an integer of at least 8, got 64.0'),
    (dict(stem=['scs']), r"Unknown stem \['scs'\], expected one of"),
    (dict(stem_strides=5), 'stem_strides must be 4 values of 1 or 2 .*, got 5'),
    (dict(img_size='64'), "img_size must be an integer of at least 1, got '64'"),
    (dict(img_size=(64, 64, 64)), r'img_size must be one integer or two, got \(64, 64, 64\)'),
    (dict(stem='conv'), "Unknown stem 'conv', expected one of 'scs', 'sps'"),
    (dict(num_heads=5), 'embed_dim=64 and num_heads=5'),
    (dict(img_size=70), 'img_size must be a positive multiple of the patch size 16, got 70'),
    (dict(patch_size=7), 'patch_size must be 1, 2, 4, 8 or 16, got 7'),
    (dict(depth=-1), 'depth must be an integer of at least 0, got -1'),
    (dict(depth=1.5), 'depth must be an integer of at least 0, got 1.5'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_spikformer_v2', **kwargs)


def test_bad_arguments_of_reset_classifier():
    model = timm.create_model('test_spikformer_v2')
    for args, message in (
            ((10, 'foo'), "global_pool must be one of .*, got 'foo'"), ((-1,), 'num_classes must be an integer'),
            ((10, ''), 'A classifier of 10 classes requires a pooling type')):
        with pytest.raises(ValueError, match=message):
            model.reset_classifier(*args)
    assert model.num_classes == 1000 and model.head.global_pool.pool_type == 'avg'


@pytest.mark.parametrize('shape, message', [
    ((3, 64, 64), r'Expected images \[B, C, H, W\] or sequences \[B, T, C, H, W\], got 3 dimensions'),
    ((1, 1, 64, 64), r'Expected 3 channels \(in_chans\), got 1'),
    ((1, 4, 2, 64, 64), r'Expected 3 channels \(in_chans\), got 2'),
    ((1, 3, 64, 60), 'multiples of the patch size 16, got shape'),
])
def test_bad_input(shape, message):
    model = timm.create_model('test_spikformer_v2')
    with pytest.raises(ValueError, match=message):
        model(torch.randn(shape))


# --- timm's methods


@pytest.mark.parametrize('name, channels, reductions', [
    ('spikformer_v2_8_384', [48, 96, 192, 384], [2, 4, 8, 16]),
    ('spikformer_8_384', [48, 96, 192, 384], [2, 4, 8, 16]),
    ('spikformer_v2_4_384_patch4_32', [48, 96, 192, 384], [1, 1, 2, 4]),
])
def test_features_only_returns_pyramid(name, channels, reductions):
    model = timm.create_model(name, features_only=True, device='meta')
    assert model.feature_info.channels() == channels and model.feature_info.reduction() == reductions
    features = model(torch.empty(2, 3, 64, 64, device='meta'))
    assert [f.shape for f in features] == [(2, c, 64 // r, 64 // r) for c, r in zip(channels, reductions)]


@pytest.mark.parametrize('feature_cls', ['fx', 'hook', 'list', 'dict', 'other'])
def test_features_only_requires_getter(feature_cls):
    """The hook and FX extractors would return features with time as the first dimension."""
    with pytest.raises(ValueError, match=f"feature_cls must be 'getter', got '{feature_cls}'"):
        timm.create_model('test_spikformer_v2', features_only=True, feature_cls=feature_cls)
    getter = timm.create_model('test_spikformer_v2', features_only=True, feature_cls='getter', device='meta')
    assert [f.shape[1] for f in getter(torch.empty(1, 3, 64, 64, device='meta'))] == [8, 16, 32, 64]


def test_arguments_of_segmentation_models_pytorch():
    """Arguments that its encoder passes to timm models."""
    kwargs = dict(in_chans=3, features_only=True, pretrained=False, device='meta')
    for name, stride in (('test_spikformer_v2', 16), ('spikformer_v2_2_64_patch4_32', 4)):
        model = timm.create_model(name, output_stride=stride, out_indices=(0, 1, 2, 3), **kwargs)
        assert model.feature_info.reduction()[-1] == stride
        with pytest.raises(ValueError, match=f'output_stride must be the patch size, {stride}, got 8'):
            timm.create_model(name, output_stride=8, out_indices=(0, 1, 2, 3), **kwargs)
    with pytest.raises(ValueError, match='output_stride must be the patch size, 8, got 16'):
        timm.create_model('test_spikformer_v2', output_stride=16, patch_size=8, **kwargs)
    with pytest.raises(AssertionError, match='feature index 4 is out of range'):
        timm.create_model('test_spikformer_v2', out_indices=(0, 1, 2, 3, 4), **kwargs)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dilation'"):
        timm.create_model('test_spikformer_v2', dilation=2, **kwargs)


def test_intermediates_are_averages_over_time(model, images):
    taps = {}
    for i, stage in enumerate(model.stem.stages[:3]):
        stage.register_forward_hook(lambda m, args, out, i=i: taps.__setitem__(i, out.mean(0)))
    final, intermediates = model.forward_intermediates(images)
    assert len(intermediates) == 4 and torch.equal(intermediates[3], final)
    assert torch.equal(final, model.forward_features(images))
    for i in range(3):
        assert intermediates[i].mean() > 0 and torch.equal(intermediates[i], taps[i])


def test_group_matcher_assigns_stem_to_layer_0():
    model = timm.create_model('test_spikformer_v2', device='meta')
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert {layer for name, layer in layers.items() if name.startswith('stem')} == {0}
    assert {layer for name, layer in layers.items() if name.startswith('blocks.1')} == {2}
    assert layers['head.fc.weight'] == 3


def test_reset_classifier(model, images):
    model.reset_classifier(7)
    assert model(images).shape == (16, 7)
    model.reset_classifier(0, '')
    assert model(images).shape == (16, 64, 4, 4)


def test_dropout_is_active_in_train_mode_only(images):
    torch.manual_seed(0)
    kwargs = dict(drop_rate=0.2, proj_drop_rate=0.2, drop_path_rate=0.2, num_classes=10)
    model = calibrate(timm.create_model('test_spikformer_v2', **kwargs), images)
    assert torch.equal(model(images), model(images))
    model.train()
    assert not torch.equal(model(images), model(images))


# --- checkpoints


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model'])
@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('with_qkv_bias', [False, True], ids=['imagenet', 'cifar'])
def test_authors_v1_checkpoint(tmp_path, images, wrapper, prefix, with_qkv_bias):
    torch.manual_seed(0)
    kwargs = dict(stem='sps', num_classes=10, patch_size=4 if with_qkv_bias else 16)
    images = images[:, :, ::2, ::2] if with_qkv_bias else images
    model = calibrate(timm.create_model('test_spikformer_v2', **kwargs), images)
    checkpoint = {prefix + k: v for k, v in authors_checkpoint(model, with_qkv_bias).items()}
    assert f'{prefix}block.1.attn.q_bn.running_var' in checkpoint
    assert (f'{prefix}block.0.attn.v_linear.bias' in checkpoint) == with_qkv_bias
    torch.save({wrapper: checkpoint, 'epoch': 3} if wrapper else checkpoint, tmp_path / 'checkpoint.pth.tar')
    other = timm.create_model(
        'test_spikformer_v2', pretrained=True, pretrained_cfg_overlay=dict(
            file=str(tmp_path / 'checkpoint.pth.tar'), num_classes=10, first_conv='stem.stages.0.proj.conv'), **kwargs)
    for (key, expected), value in zip(model.state_dict().items(), other.state_dict().values()):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=key)
    again = timm.create_model('test_spikformer_v2', checkpoint_path=tmp_path / 'checkpoint.pth.tar', **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), other.state_dict().values()))
    if not with_qkv_bias:
        assert torch.equal(other.eval()(images), model(images))


def test_spikingjelly_checkpoint(images):
    torch.manual_seed(0)
    x = images[:, :, ::2, ::2]
    theirs, expected = spikingjelly_model(x, embed_dims=64, num_heads=2, depths=2)
    ours = timm.create_model(
        'test_spikformer_v2', stem='sps', patch_size=4, time_steps=1, num_classes=10).eval()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    assert_neurons_fire(ours, x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)


def test_own_checkpoint_passes_through(model):
    state_dict = model.state_dict()
    filtered = checkpoint_filter_fn(state_dict, model)
    assert filtered.keys() == state_dict.keys()
    assert all(torch.equal(filtered[k], v) for k, v in state_dict.items())


def test_checkpoint_of_other_width_raises():
    state_dict = timm.create_model('test_spikformer_v2', embed_dim=128).state_dict()
    model = timm.create_model('test_spikformer_v2')
    with pytest.raises(ValueError, match=r'does not fit.*down.bn.weight is \(16,\).*\(8,\).*embed_dim=64'):
        checkpoint_filter_fn(state_dict, model)


def test_timm_checkpoint_round_trip(tmp_path, model, images):
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'model.pth')
    other = timm.create_model(
        'test_spikformer_v2', num_classes=10, stem='sps' if model.stem.stages[0]._get_name() == 'SpikingPatchStage'
        else 'scs')
    load_checkpoint(other, tmp_path / 'model.pth')
    assert load_state_dict(tmp_path / 'model.pth').keys() == model.state_dict().keys()
    assert sum(isinstance(m, LIF) for m in other.modules()) > 10
    assert torch.equal(other.eval()(images), model(images))


def test_checkpoint_is_adapted_to_in_chans_and_num_classes(tmp_path, images):
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=10), images)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    overlay = dict(file=str(tmp_path / 'model.pth'), num_classes=10)
    other = timm.create_model(
        'test_spikformer_v2', pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=5)
    torch.testing.assert_close(
        other.stem.stages[0].down.conv.weight, model.stem.stages[0].down.conv.weight.sum(1, keepdim=True))
    assert torch.equal(other.blocks[1].mlp.fc1.linear.weight, model.blocks[1].mlp.fc1.linear.weight)
    assert other(images[:, :1]).shape == (16, 5)


@pytest.mark.parametrize('stem', ['scs', 'sps'])
@pytest.mark.parametrize('is_masked', [False, True], ids=['classifier', 'autoencoder'])
def test_training_step_requires_no_host_synchronization(stem, is_masked):
    """Reading a value of a meta tensor raises, as does a synchronization during CUDA graph capture."""
    with torch.device('meta'):
        model = timm.create_model('test_spikformer_v2', stem=stem)
        x = torch.empty(2, 3, 64, 64)
        if is_masked:
            model = SpikformerMAE(model, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
        out = model.train()(x)
    (out.loss if is_masked else out.sum()).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64, torch.bool])
def test_integer_input_is_refused(dtype):
    model = timm.create_model('test_spikformer_v2', in_chans=2)
    for shape in ((1, 2, 32, 32), (1, 3, 2, 32, 32)):
        with pytest.raises(ValueError, match=r'Expected floating-point input, got torch.*x.float\(\)'):
            model(torch.zeros(shape, dtype=dtype))
