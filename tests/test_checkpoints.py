"""Checkpoints of other code: equal outputs, or an error of one line."""
import pytest
import timm
import torch
from conftest import assert_neurons_fire
from foreign_checkpoints import AuthorsSpikformer, spikingjelly_model
from torch.optim.swa_utils import update_bn

from timm_spikformer import SpikformerMAE
from timm_spikformer.checkpoints import checkpoint_filter_fn

FOLDERS = {  # arguments of the package's model, and the shape of an input
    'imagenet': (dict(), (3, 64, 64)),
    'cifar10': (dict(patch_size=4), (3, 16, 16)),
    'cifar10dvs': (dict(attn_scale=0.25, in_chans=2), (4, 2, 64, 64)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def authors_model(folder, x, **kwargs):
    """Return the authors' model with BN statistics of `x`, in eval mode and float64."""
    kwargs = {**dict(width=64, depth=2, num_heads=4, in_chans=x.shape[-3], num_classes=10), **kwargs}
    model = AuthorsSpikformer(folder, **kwargs).double()
    update_bn([x], model)
    return model.eval()


def inputs(folder, images):
    """Return images, or event frames: positive and negative differences of consecutive images in two channels."""
    shape = FOLDERS[folder][1]
    x = torch.nn.functional.interpolate(images.double(), shape[-2:])
    if len(shape) == 3:
        return x[:4]
    change = (x - x.roll(1, 0))[:, :1]
    return torch.cat([change.clamp(min=0), -change.clamp(max=0)], 1).view(4, *shape)


def create(folder='imagenet', **kwargs):
    return timm.create_model(
        'test_spikformer_v2', **{**dict(stem='sps', num_classes=10, num_heads=4), **FOLDERS[folder][0], **kwargs})


@pytest.mark.parametrize('folder', FOLDERS)
def test_outputs_match_authors_code(folder, images, tmp_path):
    x = inputs(folder, images)
    theirs = authors_model(folder, x)
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
    ours = create(folder, checkpoint_path=tmp_path / 'theirs.pth', dtype=torch.float64).eval()
    with torch.no_grad():
        expected = theirs(x)
        assert_neurons_fire(ours, x)
        assert expected.std() > 0.05
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-12)


def test_registered_cifar10_dvs_model(images, tmp_path):
    x = torch.nn.functional.interpolate(inputs('cifar10dvs', images).flatten(0, 1), (128, 128)).unflatten(0, (4, 4))
    theirs = authors_model('cifar10dvs', x, width=256, num_heads=16)
    torch.save({'model': theirs.state_dict(), 'epoch': 95}, tmp_path / 'theirs.pth')
    ours = timm.create_model(
        'spikformer_2_256_patch16_128', checkpoint_path=tmp_path / 'theirs.pth', dtype=torch.float64).eval()
    assert ours.time_steps == 16 and ours.default_cfg['num_classes'] == 10
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-12)
    assert_neurons_fire(ours, x)
    counterpart = timm.create_model('spikformer_v2_2_256_patch16_128', device='meta')
    assert counterpart(torch.empty(1, 16, 2, 128, 128, device='meta')).shape == (1, 10)


@pytest.mark.parametrize('folder, scale', [('cifar10dvs', 0.125), ('imagenet', 0.25), ('cifar10', 0.25)])
@pytest.mark.parametrize('is_stripped', [False, True])
def test_mismatched_attention_scale_raises(folder, scale, is_stripped, images):
    """The origin is also recognized if the unused tensors have been removed."""
    x = inputs(folder, images)
    state_dict = authors_model(folder, x).state_dict()
    if is_stripped:
        state_dict = {k: v for k, v in state_dict.items() if 'norm' not in k and k != 'pos_embed'}
    right = 0.125 if scale == 0.25 else 0.25
    assert len(state_dict) > 60
    with pytest.raises(ValueError, match=f'Create the model with attn_scale={right}') as error:
        create(folder, attn_scale=scale).load_state_dict(state_dict)
    assert '\n' not in str(error.value)
    other = create(folder, attn_scale=right)
    other.load_state_dict(state_dict)
    create(folder, attn_scale=scale).load_state_dict(other.state_dict())  # as the message suggests


@pytest.mark.parametrize('folder, kwargs', [('cifar10', dict(patch_size=16)), ('imagenet', dict(patch_size=4))])
def test_mismatched_strides_warn(folder, kwargs, images):
    state_dict = authors_model(folder, inputs(folder, images)).state_dict()
    with pytest.warns(UserWarning, match='stem_strides='):
        create(folder, **kwargs).load_state_dict(state_dict)


def test_mismatched_attention_scale_of_spikingjelly_raises(images):
    theirs, _ = spikingjelly_model(images[:, :, ::2, ::2], embed_dims=64, num_heads=2, depths=2)
    with pytest.raises(ValueError, match="spikingjelly's Spikformer with attn_scale=0.125; the model has .*0.25"):
        create(patch_size=4, attn_scale=0.25).load_state_dict(theirs.state_dict())


# --- prefixes


@pytest.mark.parametrize('prefix', [
    'net.', 'model.', 'module.', 'module._orig_mod.', 'backbone.0.', 'head.', 'encoder.'])
@pytest.mark.parametrize('kind', ['ours', 'no blocks', 'imagenet', 'cifar10', 'autoencoder'])
def test_any_prefix(prefix, kind, images, tmp_path):
    kwargs = dict(stem='scs') if kind in ('ours', 'autoencoder') else {}
    if kind == 'no blocks':
        kwargs.update(depth=0, num_classes=0)
    folder = kind if kind in FOLDERS else 'imagenet'
    if kind in FOLDERS:
        source = authors_model(kind, inputs(kind, images))
    else:
        source = create(**kwargs)
    if kind == 'autoencoder':
        source = SpikformerMAE(source, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    state_dict = {prefix + k: v for k, v in source.state_dict().items()}
    torch.save({'state_dict': state_dict, 'epoch': 3}, tmp_path / 'last.ckpt')
    expected = checkpoint_filter_fn(source.state_dict(), create(folder, **kwargs))
    loaded = create(folder, **kwargs, checkpoint_path=tmp_path / 'last.ckpt').state_dict()
    assert len(loaded) >= 30
    for key, value in loaded.items():
        if kind != 'autoencoder' or not key.startswith('head.'):  # an autoencoder has no classifier
            torch.testing.assert_close(value, expected[key].to(value.dtype), msg=key)


# --- errors


def drop(state_dict, *names):
    return {k: v for k, v in state_dict.items() if k not in names}


OTHERS = {
    'QKFormer-like': (
        dict(), lambda: {
            f'{p}{n}.{w}': torch.ones(8) for p in ('patch_embed1.proj_', 'stage1.0.tssa.q_', 'stage1.0.mlp.mlp1_')
            for n in ('conv', 'bn') for w in ('weight', 'bias')} | {'head.weight': torch.ones(10, 64)},
        'The checkpoint has no Spikformer stem'),
    'V1 into V2': (
        dict(stem='scs'), lambda: AuthorsSpikformer('imagenet', 64, 2, 2, 3, 10).state_dict(),
        "The checkpoint has stem='sps' and depth=2, the model has stem='scs' and depth=2"),
    'DVS into V2': (
        dict(stem='scs', in_chans=2), lambda: AuthorsSpikformer('cifar10dvs', 64, 2, 2, 2, 10).state_dict(),
        "The checkpoint has stem='sps' and depth=2, the model has stem='scs' and depth=2"),
    'V2 into V1': (
        dict(), lambda: create(stem='scs').state_dict(), "The checkpoint has stem='scs' and depth=2, .*stem='sps'"),
    'deeper': (
        dict(), lambda: create(depth=3).state_dict(), "27 are unexpected.*stem='sps' and depth=3, .* depth=2"),
    'shallower': (
        dict(), lambda: AuthorsSpikformer('imagenet', 64, 1, 2, 3, 10).state_dict(),
        "27 tensors are missing.*stem='sps' and depth=1, .* depth=2"),
    'wider': (
        dict(), lambda: AuthorsSpikformer('imagenet', 128, 2, 2, 3, 10).state_dict(),
        r'is \(16,\) in the checkpoint and \(8,\) in the model \(embed_dim=64\)'),
    'other mlp_ratio': (dict(), lambda: create(mlp_ratio=2).state_dict(), 'blocks.0.mlp.fc1.*mlp_ratio'),
    'one tensor missing': (
        dict(), lambda: drop(create().state_dict(), 'blocks.1.mlp.fc2.bn.bias'),
        "1 tensors are missing and 0 are unexpected, such as 'blocks.1.mlp.fc2.bn.bias'. .*incomplete"),
    'k missing': (
        dict(), lambda: drop(AuthorsSpikformer('imagenet', 64, 2, 2, 3, 10).state_dict(), 'block.0.attn.k_conv.weight'),
        "1 tensors are missing and 2 are unexpected, such as 'blocks.0.attn.qkv.linear.weight'"),
    'ViT': (
        dict(), lambda: timm.create_model('test_vit').state_dict(),
        'The checkpoint has no Spikformer stem'),
    'empty': (dict(), dict, 'no Spikformer stem \\(0 tensors\\)'),
}


@pytest.mark.parametrize('name', OTHERS)
def test_architecture_mismatch_raises_error_of_one_line(name, tmp_path):
    kwargs, make, message = OTHERS[name]
    torch.save(make(), tmp_path / 'a.pth')
    overlay = dict(file=str(tmp_path / 'a.pth'), num_classes=10, first_conv=None)
    for load in (
        lambda: create(**kwargs, checkpoint_path=tmp_path / 'a.pth'),
        lambda: create(**kwargs).load_state_dict(make()),
        lambda: create(**kwargs, pretrained=True, pretrained_cfg_overlay=overlay),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message) as error:
            load()
        assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_rejected_checkpoint_does_not_change_model():
    model = create()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError):
        model.load_state_dict(create(depth=3).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_non_strict_loading():
    deeper, model = create(depth=3), create()
    result = model.load_state_dict(deeper.state_dict(), strict=False)
    assert len(result.unexpected_keys) == 27 and not result.missing_keys
    assert torch.equal(model.blocks[1].mlp.fc1.linear.weight, deeper.blocks[1].mlp.fc1.linear.weight)
