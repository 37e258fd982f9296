import copy

import pytest
import timm
import torch
from conftest import assert_neurons_fire, calibrate, firing_rates
from torch import nn
from torch.nn import functional as F

from timm_spikformer import LIF, lif
from timm_spikformer.masked_autoencoder import MAEDecoder, SpikformerMAE, patchify, unpatchify

SIZE = 64  # 4 x 4 patches of 16 pixels


def make_mae(stem='scs', calibrate_on=None, **kwargs):
    """Return a small masked autoencoder in eval mode, with BN calibrated on masked images if some are given.

    By default, half of the patches are visible, so that all neuron layers fire.
    """
    torch.manual_seed(0)
    kwargs = dict(dict(mask_ratio=0.5), **kwargs)
    encoder = timm.create_model('test_spikformer_v2', stem=stem, time_steps=2)
    mae = SpikformerMAE(encoder, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, **kwargs)
    if calibrate_on is not None:
        calibrate(mae, calibrate_on)
    return mae.eval()


@pytest.fixture(params=['scs', 'sps'])
def mae(request, images):
    return make_mae(request.param, images)


@pytest.fixture
def noise(images):
    return torch.rand(len(images), 16, generator=torch.Generator().manual_seed(1))


def pixel_mask(mae, mask):
    """Return the mask of patches `[B, N]` as a mask of pixels `[B, 1, H, W]`."""
    p = mae.patch_size
    return unpatchify(mask.unsqueeze(2).expand(-1, -1, p * p).float(), p, (SIZE // p, SIZE // p)).bool()


# -- masked pixels do not affect the encoder

def visible_outputs(mae, x, noise):
    """Return the outputs of each stage of the stem at visible positions, and the features of the encoder."""
    mask, ids = mae.make_mask(x, noise=noise)
    outputs = []
    hooks = [stage.register_forward_hook(lambda *args: outputs.append(args[2])) for stage in mae.encoder.stem.stages]
    features, _ = mae.encoder.forward_tokens(x, ids)
    for hook in hooks:
        hook.remove()
    keep = []
    for out in outputs:
        visible = F.interpolate((~pixel_mask(mae, mask)).float(), size=out.shape[-2:], mode='nearest')
        assert (out * (1 - visible) == 0).all(), 'a masked position is not 0'
        keep.append(out * visible)
    return keep, features


@pytest.mark.parametrize('train', [False, True])
def test_masked_pixels_do_not_affect_features(mae, images, noise, train):
    mask, _ = mae.make_mask(images, noise=noise)
    changed = torch.where(pixel_mask(mae, mask), torch.full_like(images, float('nan')), images)
    other = torch.where(pixel_mask(mae, mask), images.flip(0) * 3 + 1, images)
    mae.train(train)
    with torch.no_grad():
        before, features = visible_outputs(copy.deepcopy(mae), images, noise)
        assert len(before) == 4 and all(out.sum() > 0 for out in before)
        for x in (changed, other):
            after, features_after = visible_outputs(copy.deepcopy(mae), x, noise)
            for a, b in zip(before, after):
                assert torch.equal(a, b)
            assert torch.equal(features, features_after)


def test_bn_statistics_are_of_visible_positions(mae, images, noise):
    mask, _ = mae.make_mask(images, noise=noise)
    other = torch.where(pixel_mask(mae, mask), images.flip(0) * 3 + 1, images)
    a, b = copy.deepcopy(mae).train(), copy.deepcopy(mae).train()
    a(images, noise=noise)
    b(other, noise=noise)
    changed = 0
    for (name, x), y, old in zip(a.encoder.named_buffers(), b.encoder.buffers(), mae.encoder.buffers()):
        assert torch.equal(x, y), name
        changed += not torch.equal(x, old)
    assert changed > 0


# -- comparison with an independent implementation

def dense_masked_encoder(mae, x, mask):
    """Compute the encoder in train mode on whole maps: weighted batch statistics, and a mask after each layer."""
    encoder, T = mae.encoder, mae.encoder.time_steps
    visible = (~pixel_mask(mae, mask)).to(x.dtype)

    def norm(bn, x, weight):
        total = weight.sum() * (x.numel() / (weight.numel() * x.shape[-3]))
        mean = (x * weight).sum((0, 1, 3, 4), keepdim=True) / total
        var = ((x - mean).square() * weight).sum((0, 1, 3, 4), keepdim=True) / total
        scale, shift = bn.weight.view(-1, 1, 1), bn.bias.view(-1, 1, 1)
        return ((x - mean) / (var + bn.eps).sqrt() * scale + shift) * weight

    def layer(module, x):  # [T, B, C, H, W]
        x = torch.stack([module.conv(step) for step in x])
        weight = F.interpolate(visible, size=x.shape[-2:]).unsqueeze(0)
        return lif(norm(module.bn, x, weight))

    x = (x * visible).expand(T, -1, -1, -1, -1)
    for stage in encoder.stem.stages:
        if hasattr(stage, 'down'):  # V2
            x = layer(stage.down, x)
            x = x + layer(stage.contract, layer(stage.expand, x))
        else:
            x = torch.stack([stage.pool(step) for step in layer(stage.proj, x)])
            x = x * F.interpolate(visible, size=x.shape[-2:])
            x = x if stage.pos_embed is None else x + layer(stage.pos_embed, x)
    x = x.flatten(3).transpose(2, 3)
    tokens = torch.stack([step[~mask].view(len(mask), -1, step.shape[-1]) for step in x])  # in order of position
    return encoder.blocks(tokens).mean(0)


@pytest.mark.parametrize('stem', ['scs', 'sps'])
def test_features_match_dense_masked_encoder(stem, images, noise):
    mae, x = make_mae(stem, images).double().train(), images.double()  # so that rounding changes no spike
    mask, ids = mae.make_mask(x, noise=noise)
    with torch.no_grad():
        features, _ = copy.deepcopy(mae).encoder.forward_tokens(x, ids)
        expected = dense_masked_encoder(copy.deepcopy(mae), x, mask)
    assert features.sum() > 0
    assert torch.equal(features, expected)


def test_all_neuron_layers_fire(mae, images):
    assert_neurons_fire(mae, images)
    names = [n for n, m in mae.named_modules() if isinstance(m, LIF)]
    assert firing_rates(mae, images).keys() == set(names)


# -- masks

def test_random_masks(mae, images):
    mask, ids = mae.make_mask(images)
    assert mask.shape == (16, 16) and mask.dtype == torch.bool
    assert (mask.sum(1) == 8).all() and ids.shape == (16, 8)
    assert not mask.gather(1, ids).any() and (ids.diff(dim=1) > 0).all()
    assert len({tuple(m.tolist()) for m in mask}) > 8


def test_masks_from_noise_are_reproducible(mae, images, noise):
    a, b = mae(images, noise=noise), mae(images, noise=noise)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.reconstruction, b.reconstruction) and a.loss == b.loss
    assert not a.mask.gather(1, noise.argmin(1, keepdim=True)).any()


@pytest.mark.parametrize('dtype', [torch.bool, torch.int64])
def test_given_masks(mae, images, noise, dtype):
    expected = mae(images, noise=noise)
    given = mae(images, bool_masked_pos=expected.mask.to(dtype))
    assert torch.equal(given.mask, expected.mask) and torch.equal(given.reconstruction, expected.reconstruction)


@pytest.mark.parametrize('ratio, visible', [(0.75, 25), (0.9, 10), (0.7, 30), (0.99, 1)])
def test_number_of_visible_patches(ratio, visible):
    mask, _ = make_mae(mask_ratio=ratio).make_mask(torch.rand(1, 3, 160, 160))
    assert (~mask).sum() == visible


def test_masks_of_larger_units(images):
    mae = make_mae('scs', images, mask_unit=32, mask_ratio=0.5)
    mask, ids = mae.make_mask(images)
    assert (mask.sum(1) == 8).all()
    units = mask.view(-1, 2, 2, 2, 2).transpose(2, 3).flatten(3)  # [B, 2, 2, 4]
    assert (units.all(-1) | ~units.any(-1)).all()
    given, _ = mae.make_mask(images, bool_masked_pos=torch.tensor([[1, 0, 0, 1]] * 16))
    assert given[0].view(4, 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize('kwargs, message', [
    (dict(bool_masked_pos=torch.ones(16, 15)), 'has 15 values for each image, expected 16'),
    (dict(bool_masked_pos=torch.ones(3, 16)), r'must be \[16, number of units\], got \[3, 16\]'),
    (dict(bool_masked_pos=torch.ones(16, 16)), 'got 16 of 16 masked'),
    (dict(bool_masked_pos=torch.zeros(16, 16)), 'got 0 of 16 masked'),
    (dict(bool_masked_pos=torch.ones(16, 16).tril()), 'the same number of units in every image, got 1 to 16'),
    (dict(noise=torch.rand(16, 4)), r'noise must be \[16, 16\].*got \[16, 4\]'),
    (dict(noise=torch.rand(16, 16), bool_masked_pos=torch.ones(16, 16)), 'got both'),
])
def test_bad_masks(images, kwargs, message):
    if 'has 15 values' in message:
        kwargs['bool_masked_pos'][:, 0] = 0
    with pytest.raises(ValueError, match=message):
        make_mae()(images, **kwargs)


def test_empty_batch_raises(images):
    for kwargs in ({}, dict(bool_masked_pos=torch.ones(0, 16))):
        with pytest.raises(ValueError, match='requires at least one image, got an empty batch'):
            make_mae()(images[:0], **kwargs)


@pytest.mark.parametrize('kwargs, message', [
    (dict(mask_ratio=0.), 'mask_ratio must be greater than 0 and less than 1, got 0'),
    (dict(mask_ratio=1.), 'got 1'),
    (dict(mask_ratio='a'), "mask_ratio must be greater than 0 and less than 1, got 'a'"),
    (dict(mask_unit='a'), "mask_unit must be an integer of at least 1, got 'a'"),
    (dict(decoder_embed_dim=0), 'decoder_embed_dim must be an integer of at least 1, got 0'),
    (dict(decoder_depth=-1), 'decoder_depth must be an integer of at least 0, got -1'),
    (dict(decoder_num_heads=0), 'decoder_num_heads must be an integer of at least 1, got 0'),
    (dict(decoder_mlp_ratio=0), 'decoder_mlp_ratio must be a finite number greater than 0, got 0'),
    (dict(mask_unit=24), 'mask_unit must be a multiple of the patch size 16, got 24'),
    (dict(decoder_embed_dim=30, decoder_num_heads=2), 'divisible by 4.*got 30'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SpikformerMAE(timm.create_model('test_spikformer_v2'), **kwargs)


def test_bad_inputs(images):
    mae = make_mae(mask_ratio=0.99)
    with pytest.raises(ValueError, match='mask_ratio=0.99 leaves 0 of 16 units of 16x16 pixels visible'):
        mae(images)
    with pytest.raises(ValueError, match='multiples of mask_unit=16, got 40x64'):
        mae(images[:, :, :40])
    with pytest.raises(ValueError, match='multiples of the patch size 16'):
        mae(images[:, :, :40], bool_masked_pos=torch.arange(8).repeat(16, 1) > 3)
    with pytest.raises(ValueError, match='must be a Spikformer, got ResNet'):
        SpikformerMAE(timm.create_model('test_resnet'))


# -- decoder, target, loss

def test_patches():
    x = torch.randn(2, 3, 32, 48)
    patches = patchify(x, 16)
    assert patches.shape == (2, 6, 3 * 16 * 16)
    assert torch.equal(patches[1, 4], x[1, :, 16:32, 16:32].flatten())  # second row, second of three columns
    assert torch.equal(unpatchify(patches, 16, (2, 3)), x)


def test_decoder_places_patches_at_their_positions(images, noise):
    """With identity layers and the true patches, the decoder returns the image, with mask tokens at masked patches."""
    p, grid = 16, (4, 4)
    patches = patchify(images, p)
    mask, ids = make_mae().make_mask(images, noise=noise)
    decoder = MAEDecoder(patches.shape[2], patches.shape[2], embed_dim=patches.shape[2], depth=0, num_heads=1)
    decoder.norm_in = decoder.norm = decoder.embed = decoder.pred = nn.Identity()
    nn.init.constant_(decoder.mask_token, 7.)
    visible = patches.gather(1, ids.unsqueeze(2).expand(-1, -1, patches.shape[2]))
    with torch.no_grad():
        positions = decoder(torch.zeros_like(visible), ids, grid) - 7. * mask.unsqueeze(2)
        out = decoder(visible, ids, grid) - positions
    expected = torch.where(mask.unsqueeze(2), torch.full_like(patches, 7.), patches)
    torch.testing.assert_close(unpatchify(out, p, grid), unpatchify(expected, p, grid), atol=1e-5, rtol=0)
    assert len(positions[0].unique(dim=0)) == 16  # each patch has a different position embedding


def fix_prediction(mae, pred):
    mae.decoder.forward = lambda features, ids, grid: pred


@pytest.mark.parametrize('norm_pix_loss', [True, False])
def test_loss_of_perfect_and_mean_predictions(images, norm_pix_loss):
    x = images + 0.1 * torch.randn(images.shape)  # so that no patch is constant
    mae = make_mae(norm_pix_loss=norm_pix_loss)
    patches = patchify(x, 16)
    mean, std = patches.mean(-1, keepdim=True), patches.std(-1, keepdim=True, correction=0)
    fix_prediction(mae, (patches - mean) / std if norm_pix_loss else patches)
    out = mae(x)
    assert out.loss < 1e-6
    fix_prediction(mae, torch.zeros_like(patches) if norm_pix_loss else mean.expand_as(patches))
    out = mae(x)
    expected = 1. if norm_pix_loss else (std.squeeze(-1) ** 2)[out.mask].mean()
    torch.testing.assert_close(out.loss, torch.as_tensor(expected), rtol=2e-2 if norm_pix_loss else 1e-4, atol=0)


def test_loss_is_over_masked_patches_only(images, noise):
    mae = make_mae(norm_pix_loss=False)
    patches = patchify(images, 16)
    mask, _ = mae.make_mask(images, noise=noise)
    fix_prediction(mae, torch.where(mask.unsqueeze(2), patches, patches + 100.))
    assert mae(images, noise=noise).loss == 0


@pytest.mark.parametrize('norm_pix_loss', [True, False])
def test_reconstruct(images, noise, norm_pix_loss):
    mae = make_mae('scs', images, norm_pix_loss=norm_pix_loss)
    original, masked, reconstructed = mae.reconstruct(images, noise=noise)
    mask = pixel_mask(mae, mae.make_mask(images, noise=noise)[0])
    torch.testing.assert_close(original, images)
    assert torch.equal(masked, images.masked_fill(mask, 0.))
    assert torch.equal(torch.where(mask, 0., reconstructed), masked)
    patches = patchify(images, 16)
    std = patches.std(-1, keepdim=True, correction=0)
    normalised = (patches - patches.mean(-1, keepdim=True)) / (std ** 2 + 1e-6).sqrt()
    fix_prediction(mae, normalised if norm_pix_loss else patches)
    torch.testing.assert_close(mae.reconstruct(images)[2], images, atol=1e-4, rtol=0)


# -- sizes, sequences, training

@pytest.mark.parametrize('size', [(32, 64), (96, 48)])
def test_other_sizes(mae, size):
    out = mae(torch.randn(2, 3, *size))
    assert out.reconstruction.shape == (2, 3, *size) and out.loss.isfinite()


def test_sequences(mae, images, noise):
    """A sequence that repeats an image gives the loss of the image; the target of a sequence is its mean over time."""
    T = mae.encoder.time_steps
    still = images.unsqueeze(1).expand(-1, T, -1, -1, -1)
    a, b = mae(images, noise=noise), mae(still, noise=noise)
    torch.testing.assert_close(a.loss, b.loss)
    assert mae(torch.randn(2, 5, 3, 64, 64)).reconstruction.shape == (2, 3, 64, 64)


def test_gradient_checkpointing(mae, images, noise):
    """Checkpointing gives equal gradients and updates BN statistics once per step."""
    grads, stats = [], []
    for enable in (False, True):
        model = copy.deepcopy(mae).train()
        model.set_grad_checkpointing(enable)
        model(images, noise=noise).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        grads.append([p.grad for p in model.parameters()])
        stats.append([b for n, b in model.named_buffers() if 'running' in n])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert all(torch.equal(a, b) for a, b in zip(*stats))
    assert sum(g.abs().sum() for g in grads[0]) > 0


def test_compiles_in_one_graph(images, noise):
    mae = make_mae('scs', images)
    compiled = torch.compile(mae, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        torch.testing.assert_close(compiled(images, noise=noise).loss, mae(images, noise=noise).loss)


def test_autocast_trains(mae, images):
    mae.train()
    optimizer = torch.optim.AdamW(mae.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        with torch.autocast('cpu', torch.bfloat16):
            loss = mae(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


# -- loading the encoder into a model

def test_encoder_loads_into_model(mae, tmp_path):
    """All tensors of the encoder, and no others, load from a state dict of the autoencoder or of the encoder."""
    stem = 'sps' if hasattr(mae.encoder.stem.stages[0], 'pool') else 'scs'
    encoder, path = mae.encoder.state_dict(), str(tmp_path / 'mae.pth')
    head = {'head.fc.weight', 'head.fc.bias'}
    for state_dict in (mae.state_dict(), encoder, {'state_dict': mae.state_dict()}):
        torch.save(state_dict, path)
        for kwargs in (
            dict(num_classes=0, checkpoint_path=path),
            dict(num_classes=10, pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=-1)),
        ):
            model = timm.create_model('test_spikformer_v2', stem=stem, **kwargs).state_dict()
            assert model.keys() - head == encoder.keys()
            for key, value in encoder.items():
                assert torch.equal(value, model[key]), key


def test_classifier_keeps_initial_values_if_autoencoder_is_loaded(mae):
    stem = 'sps' if hasattr(mae.encoder.stem.stages[0], 'pool') else 'scs'
    model = timm.create_model('test_spikformer_v2', num_classes=10, stem=stem)
    head = copy.deepcopy(model.head.state_dict())
    model.load_state_dict(mae.state_dict())
    for key, value in head.items():
        assert torch.equal(model.head.state_dict()[key], value)
    with pytest.raises(RuntimeError, match='Missing key.*head.fc'):
        model.load_state_dict(mae.encoder.state_dict())


def test_no_weight_decay_names_parameters(mae):
    assert mae.no_weight_decay() <= dict(mae.named_parameters()).keys()
