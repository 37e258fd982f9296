"""Conversion of checkpoints of the authors' V1 code and of spikingjelly to folders; every tensor is accounted for."""
import argparse
import json

import pytest
import timm
import torch
from conftest import assert_neurons_fire, calibrate
from foreign_checkpoints import AuthorsSpikformer, authors_checkpoint, spikingjelly_model
from timm.models import save_for_hf
from torch.optim.swa_utils import update_bn
from transformers import AutoModelForImageClassification

from timm_spikformer import SpikformerMAE, cli
from timm_spikformer.publishing import convert

MODEL = 'spikformer_4_384_patch4_32'


@pytest.fixture(scope='module')
def x(images):
    return images[:, :, ::2, ::2]


@pytest.fixture(scope='module')
def v1(x):
    torch.manual_seed(0)
    return calibrate(timm.create_model(MODEL, num_classes=10), x)


@pytest.mark.parametrize('with_qkv_bias', [False, True], ids=['imagenet', 'cifar'])
def test_authors_checkpoints(with_qkv_bias, v1, x, tmp_path):
    prefix = 'net.' if with_qkv_bias else 'module.'
    state_dict = {f'{prefix}{k}': v for k, v in authors_checkpoint(v1, with_qkv_bias).items()}
    torch.save(
        {'state_dict': state_dict, 'epoch': 300, 'arch': 'spikformer', 'args': argparse.Namespace(lr=5e-4)},
        tmp_path / 'checkpoint.pth.tar')
    converted = convert(tmp_path / 'checkpoint.pth.tar', tmp_path / 'out', labels=[f'class {i}' for i in range(10)])
    assert converted.model == MODEL
    with torch.no_grad():
        loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
        if with_qkv_bias:  # the biases are folded into the running mean, which rounds in float32
            torch.testing.assert_close(loaded(x), v1(x), rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(loaded(x), v1(x))
        by_auto = AutoModelForImageClassification.from_pretrained(tmp_path / 'out').eval()
        assert torch.equal(by_auto(x).logits, loaded(x))
    assert_neurons_fire(loaded, x)
    report = '\n'.join(converted.report)
    for name in state_dict:  # each tensor is named exactly once
        assert sum(name.removeprefix(prefix) in line.replace(':', ',').replace(' ', ',').split(',')
                   for line in converted.report) == 1, name
    assert {line.split(' <- ')[0] for line in converted.report} >= v1.state_dict().keys()
    assert 'norm1.weight: declared by V1 but never used' in report


def test_spikingjelly_checkpoint(x, tmp_path):
    torch.manual_seed(0)
    theirs, expected = spikingjelly_model(x, embed_dims=384, num_heads=12, depths=4)
    torch.save(theirs.state_dict(), tmp_path / 'theirs.pth')
    converted = convert(tmp_path / 'theirs.pth', tmp_path / 'out')
    assert converted.model == MODEL and sum('zeros (not in the checkpoint)' in line for line in converted.report) == 12
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, time_steps=1).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), expected, rtol=1e-4, atol=1e-4)
    assert_neurons_fire(loaded, x)


def test_authors_cifar10_dvs_checkpoint(tmp_path):
    """The variant is recognized by its tensors, and the selected model has its attention scale."""
    torch.manual_seed(0)
    x = torch.rand(4, 3, 2, 64, 64).round() * 4
    theirs = AuthorsSpikformer('cifar10dvs', 256, 2, 16, 2, 10)
    update_bn([x], theirs)
    torch.save({'model': theirs.state_dict()}, tmp_path / 'theirs.pth')
    converted = convert(tmp_path / 'theirs.pth', tmp_path / 'out')
    assert converted.model == 'spikformer_2_256_patch16_128'
    for name in ('pos_embed', 'norm.weight', 'norm.bias', 'block.1.norm2.bias'):
        assert f'(unused) <- {name}: declared by V1 but never used' in converted.report
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    by_auto = AutoModelForImageClassification.from_pretrained(tmp_path / 'out').eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)
        assert torch.equal(by_auto(x).logits, loaded(x))
    assert_neurons_fire(loaded, x)


@pytest.mark.parametrize('change, message', [
    (lambda s: s.update({'block.0.attn.mystery': torch.ones(3)}), r'1 tensors are unexp.* \(block.0.attn.mystery\)\.'),
    (lambda s: s.pop('block.3.mlp.fc2_bn.bias'), r': 1 tensors are missing \(blocks.3.mlp.fc2.bn.bias\)\. Nothing'),
])
def test_unmatched_tensors_raise(change, message, v1, tmp_path):
    state_dict = authors_checkpoint(v1, False)
    change(state_dict)
    torch.save(state_dict, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / 'a.pth', tmp_path / 'out', MODEL)
    with pytest.raises(ValueError, match='matches none of the registered models. Specify the model with --mo'):
        convert(tmp_path / 'a.pth', tmp_path / 'out')
    assert not (tmp_path / 'out').exists() and not (tmp_path / 'out.partial').exists()


def test_bad_input(v1, tmp_path):
    torch.save(authors_checkpoint(v1, False), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='nothing.pth does not exist'):
        convert(tmp_path / 'nothing.pth', tmp_path / 'out')
    with pytest.raises(ValueError, match='is a folder, expected a checkpoint file'):
        convert(tmp_path, tmp_path / 'out')
    with pytest.raises(ValueError, match="There is no Spikformer 'resnet18'"):
        convert(tmp_path / 'a.pth', tmp_path / 'out', 'resnet18')
    with pytest.raises(ValueError, match='does not fit the model'):
        convert(tmp_path / 'a.pth', tmp_path / 'out', 'spikformer_8_512')
    with pytest.raises(ValueError, match='The model has 10 classes, but 1 labels were given'):
        convert(tmp_path / 'a.pth', tmp_path / 'out', labels=['a'])
    torch.save({'a': print}, tmp_path / 'code.pth')
    with pytest.raises(ValueError, match='cannot be opened without running code from it'):
        convert(tmp_path / 'code.pth', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_command(v1, tmp_path, capsys):
    save_for_hf(v1, str(tmp_path / 'ours'), safe_serialization=True)
    weights = tmp_path / 'ours' / 'model.safetensors'
    cli.main(['convert', str(weights), '--output', str(tmp_path / 'out'), '--model', MODEL])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(v1.state_dict()) + 1
    assert lines[-1] == f'{MODEL}: all tensors were mapped; written to {tmp_path / "out"}'
    with pytest.raises(SystemExit, match='error: .* does not exist, expected a checkpoint file'):
        cli.main(['convert', str(tmp_path / 'nothing'), '--output', str(tmp_path / 'out')])


def test_masked_autoencoder(tmp_path, capsys):
    """The report states that the decoder is dropped, and lists no classifier, as the file contains none."""
    torch.manual_seed(0)
    encoder = timm.create_model('test_spikformer_v2', num_classes=0)
    mae = SpikformerMAE(encoder, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    torch.save(mae.state_dict(), tmp_path / 'mae.pth')
    cli.main(['convert', str(tmp_path / 'mae.pth'), '--output', str(tmp_path / 'out'), '--model', 'test_spikformer_v2'])
    *report, last = capsys.readouterr().out.splitlines()
    dropped = [f'(dropped) <- decoder.{k}: the decoder of a masked autoencoder is not converted'
               for k in mae.decoder.state_dict()]
    assert report == [f'{k} <- {k}' for k in encoder.state_dict()] + dropped
    assert f': {len(dropped)} tensors were not mapped (unused or dropped), all others were; written' in last
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert loaded.num_classes == 0 and loaded.state_dict().keys() == encoder.state_dict().keys()


def test_checkpoint_of_train_py(tmp_path):
    """The model has the arguments of the training, which the checkpoint contains."""
    name = 'spikformer_v2_2_64_patch4_32'
    state_dict = timm.create_model(f'{name}.fashion_mnist_t4', pretrained=True).state_dict()
    for args, expected in (dict(model_kwargs=dict(time_steps=3)), 3), (dict(pretrained=True), 4):
        args = argparse.Namespace(model=f'{name}.fashion_mnist_t4', **args)
        torch.save(dict(state_dict=state_dict, args=args), tmp_path / 'x.pth.tar')
        convert(tmp_path / 'x.pth.tar', tmp_path / str(expected), model=name)
        assert timm.create_model(f'local-dir:{tmp_path / str(expected)}').time_steps == expected


def test_size_of_images_in_model_kwargs(tmp_path):
    name = 'spikformer_v2_2_64_patch4_32'
    file = timm.get_pretrained_cfg(f'{name}.fashion_mnist').file
    for kwargs, size in (None, 28), (dict(img_size=32), 32):
        folder = tmp_path / str(size)
        convert(file, folder, model=name, model_kwargs=kwargs)
        assert timm.create_model(f'local-dir:{folder}').pretrained_cfg['input_size'] == (3, size, size)
        assert json.loads((folder / 'config.json').read_text())['image_size'] == size


def test_time_steps_in_the_metadata_of_a_file(tmp_path):
    name = 'spikformer_v2_2_64_patch4_32'
    convert(timm.get_pretrained_cfg(f'{name}.fashion_mnist_t4').file, tmp_path / 'x', model=name)
    assert timm.create_model(f'local-dir:{tmp_path / "x"}').time_steps == 4
