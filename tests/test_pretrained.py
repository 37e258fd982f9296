"""`pretrained=True`: included weights, namespaces on the Hub, and errors."""
import hashlib
import json
import os
import runpy
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import timm
import torch
from conftest import SHIPPED_WEIGHTS, calibrate
from safetensors.torch import save_file
from timm.models import save_for_hf
from transformers import AutoModelForImageClassification, AutoModelForMaskedImageModeling

import timm_spikformer
from timm_spikformer import SpikformerMAE, pretrained
from timm_spikformer.hf.configuration_spikformer import SpikformerConfig
from timm_spikformer.images import FASHION_MNIST, data_config, make_loader, read_splits
from timm_spikformer.publishing import save_folder
from timm_spikformer.training import evaluate, init_bn_bias, reconstruction_loss

ROOT = Path(__file__).parents[1]
SHIPPED = 'spikformer_v2_2_64_patch4_32.fashion_mnist'
SHIPPED_T4 = 'spikformer_v2_2_64_patch4_32.fashion_mnist_t4'
SHIPPED_CIFAR10 = 'spikformer_v2_2_128_patch4_32.cifar10'
SHIPPED_MAE = 'spikformer_v2_2_64_patch4_32.mae_fashion_mnist'


@pytest.fixture
def namespace(monkeypatch):
    """Return `set_hub_namespace`, without network access; the namespace is reset after the test."""
    monkeypatch.setattr(pretrained, '_list_repos', lambda namespace: None)
    yield timm_spikformer.set_hub_namespace
    timm_spikformer.set_hub_namespace(None)


def test_accuracy_of_shipped_weights(monkeypatch):
    assert timm.list_pretrained('*spikformer*') == SHIPPED_WEIGHTS
    model = timm.create_model(SHIPPED.split('.')[0], pretrained=True)
    test = read_splits()['test']
    top1, rates = evaluate(model, make_loader(test, data_config(model), 250))
    assert 92. < top1 < 95.
    assert min(rates.values()) > 0.005
    assert tuple(test.classes) == tuple(model.pretrained_cfg['label_names'])


def test_shipped_weights_for_four_time_steps():
    """The default number of time steps is that of training, and the accuracy does not fall with more steps."""
    model = timm.create_model(SHIPPED_T4, pretrained=True).eval()
    assert model.time_steps == 4 and timm.create_model(SHIPPED_T4, pretrained=True, time_steps=2).time_steps == 2
    test, correct = read_splits()['test'], torch.zeros(4)
    with torch.no_grad():
        for x, y in make_loader(test, data_config(model), 250):
            correct += (model.forward_steps(x).argmax(-1) == y).sum(1)
    accuracies = 100 * correct / len(test)
    assert accuracies.min() > 90 and (accuracies.diff() > -0.5).all()


@pytest.mark.parametrize('name, expected', [(SHIPPED_T4, 4), (SHIPPED_CIFAR10, 6)])
def test_tag_selects_the_time_steps(name, expected, tmp_path):
    """Even without `pretrained=True`, so that the checkpoint of a fine-tuned model gets the T of its training."""
    assert timm.create_model(name).time_steps == expected and timm.create_model(name, time_steps=2).time_steps == 2
    assert SpikformerConfig.from_timm(name).time_steps == expected
    torch.save(timm.create_model(name).state_dict(), tmp_path / 'x.pth')
    assert timm.create_model(name, checkpoint_path=str(tmp_path / 'x.pth')).time_steps == expected
    for load in (False, True):
        overlay = dict(file=str(tmp_path / 'x.pth'))  # as train.py --pretrained-path
        assert timm.create_model(name, load, pretrained_cfg_overlay=overlay).time_steps == expected
        cfg = timm.get_pretrained_cfg(name)
        assert timm.create_model(name.split('.')[0], load, pretrained_cfg=cfg).time_steps == expected


def test_shipped_weights_for_cifar10(tmp_path):
    """CIFAR-10's images are not in the package, so those of Fashion-MNIST are classified."""
    model = timm.create_model(SHIPPED_CIFAR10.split('.')[0], pretrained=True)
    assert model.time_steps == 6 and model.pretrained_cfg['label_names'][5] == 'dog'
    x, y = next(iter(make_loader(read_splits()['test'], data_config(model), 16)))
    _, rates = evaluate(model, [(x, y)])
    assert min(rates.values()) > 0.005
    with torch.no_grad():
        expected = model(x)
    assert len(expected.argmax(1).unique()) > 2
    save_folder(model, tmp_path / 'model')
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / 'model').eval()
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, expected) and loaded.config.time_steps == 6


def test_damaged_weights_raise(monkeypatch, tmp_path):
    for path in pretrained.WEIGHTS_FOLDER.iterdir():
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(pretrained, 'WEIGHTS_FOLDER', tmp_path)
    digest = hashlib.sha256((tmp_path / f'{SHIPPED}.safetensors').read_bytes()).hexdigest()
    cfg = dict(file=pretrained.shipped_weights(SHIPPED))
    timm.create_model(SHIPPED, pretrained=True, pretrained_cfg_overlay=cfg)
    with (tmp_path / f'{SHIPPED}.safetensors').open('r+b') as f:
        f.seek(-1, os.SEEK_END)
        f.write(b'x')
    with pytest.raises(RuntimeError, match=f'is damaged: its sha256 is not {digest}'):
        timm.create_model(SHIPPED, pretrained=True, pretrained_cfg_overlay=cfg)


def test_autoencoder_from_shipped_weights(monkeypatch, tmp_path):
    """Unknown names, and weights that are not those of an autoencoder, raise."""
    name, args = 'test_spikformer_v2.mae_test', dict(
        mask_ratio=0.25, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    mae = SpikformerMAE(timm.create_model('test_spikformer_v2', time_steps=2), **args)
    init_bn_bias(mae.encoder)
    x = torch.rand(8, 3, 64, 64)
    calibrate(mae, x)
    file = tmp_path / f'{name}.safetensors'
    save_file(
        mae.state_dict(), file,
        dict(format='pt', autoencoder=json.dumps(args), model_args=json.dumps(dict(time_steps=2))))
    (tmp_path / 'SHA256SUMS').write_text(f'{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n')
    monkeypatch.setattr(pretrained, 'WEIGHTS_FOLDER', tmp_path)
    registry = timm.models._registry
    monkeypatch.setitem(
        registry._model_pretrained_cfgs, name,
        replace(timm.get_pretrained_cfg('test_spikformer_v2'), file=str(file), tag='mae_test', num_classes=0))
    monkeypatch.setitem(registry._model_with_tags, 'test_spikformer_v2', [name])
    encoder = timm.create_model(name, pretrained=True, num_classes=5)
    assert torch.equal(encoder.stem.stages[0].down.conv.weight, mae.encoder.stem.stages[0].down.conv.weight)
    loaded = SpikformerMAE.from_pretrained(name)
    assert loaded.encoder.time_steps == 2 and SpikformerMAE.from_pretrained(name, time_steps=3).encoder.time_steps == 3
    noise = torch.rand(8, 16)
    assert loaded(x, noise=noise).loss == mae(x, noise=noise).loss
    with pytest.raises(ValueError, match="The package has no weights named 'test_spikformer_v2.other'"):
        SpikformerMAE.from_pretrained('test_spikformer_v2.other')
    save_file(mae.encoder.state_dict(), file)
    (tmp_path / 'SHA256SUMS').write_text(f'{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n')
    with pytest.raises(ValueError, match='is not a masked autoencoder'):
        SpikformerMAE.from_pretrained(name)
    (tmp_path / 'SHA256SUMS').unlink()
    with pytest.raises(RuntimeError, match='is damaged'):
        SpikformerMAE.from_pretrained(name)


@pytest.mark.parametrize('name, tag', [
    ('spikformer_v2_8_512', 'in1k'), ('spikformer_v2_2_64_patch4_32.cifar10', 'cifar10'),
    ('test_spikformer_v2', 'untrained'),
])
def test_error_if_no_weights_are_published(name, tag):
    with pytest.raises(RuntimeError) as error:
        timm.create_model(name, pretrained=True)
    text = str(error.value)
    assert text.startswith(f'No weights have been published for {name.split(".")[0]}.{tag}.')
    for word in ('recipes/', 'timm-spikformer convert', 'checkpoint_path', 'hf-hub:ORG/NAME', 'TIMM_SPIKFORMER_HUB'):
        assert word in text


def test_shipped_autoencoder():
    """It reconstructs masked patches much better than their mean, and timm loads its encoder."""
    mae = SpikformerMAE.from_pretrained(SHIPPED_MAE)
    loader = make_loader(read_splits()['test'].sample_stratified(200, 0), data_config(mae.encoder), 100)
    loss, loss_of_mean = reconstruction_loss(mae, loader, seed=0)
    assert loss < 0.5 < 0.65 < loss_of_mean
    encoder = timm.create_model(SHIPPED_MAE, pretrained=True)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, mae.encoder.state_dict()[name]), name
    classifier = timm.create_model(SHIPPED_MAE, pretrained=True, num_classes=7)
    assert torch.equal(classifier.blocks[1].mlp.fc2.linear.weight, mae.encoder.blocks[1].mlp.fc2.linear.weight)
    assert classifier.head.fc.out_features == 7


def test_publish_shipped_weights(tmp_path):
    """One folder for each of the weights, which both libraries load, with the accuracy on the given images."""
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'fashion_mnist').symlink_to(FASHION_MNIST)
    publish_shipped = runpy.run_path(str(ROOT / 'hub' / 'publish_shipped.py'))
    for name in (SHIPPED, SHIPPED_MAE):
        publish_shipped['publish_weights'](name, 'me', tmp_path / 'data', tmp_path / 'output', dry_run=True)
    model = timm.create_model(f'local-dir:{tmp_path / "output" / SHIPPED}', pretrained=True)
    test = make_loader(read_splits()['test'], data_config(model), 250)
    accuracy = evaluate(model, test)[0]
    assert f'| test | Top-1 accuracy | {accuracy:g}% |' in (tmp_path / 'output' / SHIPPED / 'README.md').read_text()
    mae = AutoModelForMaskedImageModeling.from_pretrained(tmp_path / 'output' / SHIPPED_MAE)
    shipped = SpikformerMAE.from_pretrained(SHIPPED_MAE).state_dict()
    assert all(torch.equal(value, shipped[name]) for name, value in mae.mae.state_dict().items())


def test_default_namespace_is_unset():
    assert pretrained._namespace is None
    for name in timm.list_models(module='spikformer'):
        assert timm.get_pretrained_cfg(name).hf_hub_id is None


def test_list_pretrained_with_namespace(namespace, monkeypatch):
    namespace('org')
    assert timm.list_pretrained('*spikformer*') == SHIPPED_WEIGHTS  # nothing in the cache
    monkeypatch.setattr(pretrained, '_list_repos', lambda namespace: {
        'org/spikformer_v2_8_512.in1k', 'org/another_model', 'org/test_spikformer_v2.untrained', f'org/{SHIPPED}'})
    namespace('org@v1')
    assert timm.list_pretrained('*spikformer*') == [*SHIPPED_WEIGHTS, 'spikformer_v2_8_512.in1k']
    assert timm.get_pretrained_cfg('spikformer_v2_8_512').hf_hub_id == 'org/spikformer_v2_8_512.in1k@v1'
    assert timm.get_pretrained_cfg(SHIPPED).file
    namespace(None)
    assert timm.list_pretrained('*spikformer*') == SHIPPED_WEIGHTS
    assert len(timm.list_models(module='spikformer')) == 14


@pytest.mark.parametrize('name', ['', 'org/name', '../org', 'org@', 'a b'])
def test_bad_namespaces(name, namespace):
    with pytest.raises(ValueError, match='Expected the name of an organization or user'):
        namespace(name)


@pytest.mark.parametrize('filename', ['pytorch_model.bin', '../../other/model.safetensors', '/etc/model.safetensors'])
def test_bad_weight_file_names(filename):
    overlay = dict(hf_hub_id='org/name', hf_hub_filename=filename)
    with pytest.raises(ValueError, match='is not the name of a safetensors file'):
        timm.create_model('test_spikformer_v2', pretrained=True, pretrained_cfg_overlay=overlay)


def test_config_of_other_architecture_than_weights_raises(images, tmp_path):
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=10), images)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    config['architecture'] = 'spikformer_v2_8_384'
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(ValueError, match='does not fit the model.*Create the model with the embed_dim'):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    config.update(architecture='test_spikformer_v2', model_args=dict(config.get('model_args', {}), depth=3))
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="The weights do not match the model: 27 tensors are .*'blocks.2"):
        timm.create_model(f'local-dir:{tmp_path}', pretrained=True)


def test_config_written_by_timm_loads_in_transformers(images, tmp_path):
    """The transformers classes read its arguments and labels."""
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=10, time_steps=2), images)
    labels = [f'class {i}' for i in range(10)]
    save_for_hf(model, str(tmp_path), safe_serialization=True, model_config=dict(label_names=labels))
    loaded = timm_spikformer.SpikformerForImageClassification.from_pretrained(tmp_path).eval()
    assert loaded.config.time_steps == 2 and list(loaded.config.id2label.values()) == labels
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images))


@pytest.mark.parametrize('name', timm.list_models(module='spikformer'))
def test_config_has_fields_for_timm(name):
    """timm builds the registered model from the fields that the configuration writes for timm."""
    expected = timm.create_model(name, device='meta', img_size=64 if '_patch4' in name else 128, time_steps=3)
    config = SpikformerConfig.from_timm(expected, num_labels=7)
    config.architectures = ['SpikformerForImageClassification']
    values = config.to_dict()
    assert SpikformerConfig.from_dict(values).to_dict() == values
    model = timm.create_model(values['architecture'], device='meta', num_classes=7, **values['model_args'])
    assert {k: v.shape for k, v in model.state_dict().items() if k[:4] != 'head'} == \
        {k: v.shape for k, v in expected.state_dict().items() if k[:4] != 'head'}
    assert model.time_steps == 3 and model.blocks[0].attn.num_heads == expected.blocks[0].attn.num_heads
    assert values['pretrained_cfg']['first_conv'] == expected.pretrained_cfg['first_conv']
    assert values['model_args']['img_size'] == values['pretrained_cfg']['input_size'][1:]
    assert values['num_classes'] == 7 and 'num_classes' not in values['model_args']


def test_labels_of_shipped_data():
    names = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'test.parquet')).features['label'].names
    assert list(timm.get_pretrained_cfg(SHIPPED).label_names) == names


# -- without a network

@pytest.fixture
def silent_hub(monkeypatch):
    """Address of a server that accepts connections but does not respond."""
    with socket.create_server(('127.0.0.1', 0)) as server:
        endpoint = f'http://127.0.0.1:{server.getsockname()[1]}'
        monkeypatch.setattr(pretrained.constants, 'ENDPOINT', endpoint)
        yield endpoint


def test_unresponsive_hub_warns_within_five_seconds(silent_hub):
    start = time.monotonic()
    try:
        with pytest.warns(UserWarning, match='The Hub cannot be reached: .* Only models of org that have been'):
            timm_spikformer.set_hub_namespace('org')
        assert time.monotonic() - start < 5.
    finally:
        timm_spikformer.set_hub_namespace(None)


def test_unreachable_hub_raises_within_five_seconds(monkeypatch):
    monkeypatch.setattr(pretrained.constants, 'ENDPOINT', 'http://127.0.0.1:9')
    start = time.monotonic()
    try:
        with pytest.warns(UserWarning, match='The Hub cannot be reached'):
            timm_spikformer.set_hub_namespace('org')
        overlay = dict(hf_hub_id='org/nothing')
        with pytest.raises(RuntimeError, match='The Hub cannot be reached: .*Check the network|is not in the cache'):
            timm.create_model('spikformer_v2_8_512.in1k', pretrained=True, pretrained_cfg_overlay=overlay)
    finally:
        timm_spikformer.set_hub_namespace(None)
    assert time.monotonic() - start < 5.
