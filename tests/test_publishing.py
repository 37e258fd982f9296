"""From a checkpoint of any kind to a folder that every loader reads bit-equal; its card; what is refused."""
import argparse
import json
import pickle
import re
import shutil

import pytest
import timm
import torch
import yaml
from conftest import assert_live, calibrate
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from timm.data import create_transform
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    CLIPImageProcessor,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from timm_spikformer import SpikformerForImageClassification, SpikformerMAE, cli
from timm_spikformer.demo.data import FASHION_MNIST
from timm_spikformer.hf.image_processing import create_image_processor, read_data_config
from timm_spikformer.publishing import publish, read_checkpoint
from timm_spikformer.publishing.card import Dataset, read_results
from timm_spikformer.publishing.checkpoint import from_model
from timm_spikformer.publishing.folder import example_images

SHIPPED = 'spikformer_v2_2_64_patch4_32.fashion_mnist'
DATASET = Dataset('zalando-datasets/fashion_mnist', 'Fashion-MNIST (1,000 images)', 'test')
LABELS = [f'class {i}' for i in range(10)]


@pytest.fixture
def small(images):
    torch.manual_seed(0)
    return calibrate(timm.create_model('test_spikformer_v2', num_classes=10, time_steps=2), images)


def train_py_checkpoint(model, folder, **kwargs):
    """As train.py leaves one: by timm's CheckpointSaver, with the averaged weights of another model."""
    args = argparse.Namespace(**{**dict(
        model='test_spikformer_v2', num_classes=10, img_size=None, input_size=None, in_chans=None, crop_pct=0.9,
        mean=[0.5, 0.4, 0.3], std=None, interpolation='bilinear', model_kwargs=dict(time_steps=2), epochs=3, lr=0.01,
        data_dir='/home/somebody/images', output='/scratch/runs', resume='', dataset='hfds//home/somebody/images',
        opt='adamw', mixup=0.0, model_ema=True), **kwargs})
    ema = ModelEmaV3(model)
    with torch.no_grad():
        ema.module.head.fc.weight.mul_(-1.)
    saver = CheckpointSaver(
        model, torch.optim.AdamW(model.parameters()), args, ema, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(0, 50.)
    return folder / 'last.pth.tar', ema.module.eval()


def dry_run(checkpoint, folder, **kwargs):
    publish(checkpoint, 'me/name.tag', 'mit', output=folder, dry_run=True, **kwargs)
    return folder


@torch.no_grad()
def assert_all_loaders(folder, expected, labels=None):
    """Every loader that needs no other process gives `expected`'s logits to the bit, and its neurons fire."""
    x = example_images(from_model(expected))
    logits = expected(x)
    by_timm = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    by_auto = AutoModelForImageClassification.from_pretrained(folder).eval()
    by_wrapper = TimmWrapperForImageClassification.from_pretrained(folder).eval()
    assert type(by_auto) is SpikformerForImageClassification
    assert torch.equal(by_timm(x), logits)
    assert torch.equal(by_auto(x).logits, logits)
    assert torch.equal(by_wrapper(x).logits, logits)
    mim = AutoModelForMaskedImageModeling.from_pretrained(folder).eval()
    assert torch.equal(mim.encoder.forward_features(x), expected.forward_features(x))
    assert_live(by_timm, x)
    if labels is not None:
        assert list(by_auto.config.id2label.values()) == list(by_wrapper.config.id2label.values()) == labels
        assert list(by_timm.pretrained_cfg['label_names']) == labels


# -- kinds of checkpoints

@pytest.mark.parametrize('ema', [False, True])
def test_a_checkpoint_of_train_py(ema, small, tmp_path):
    path, averaged = train_py_checkpoint(small, tmp_path)
    folder = dry_run(path, tmp_path / 'out', ema=ema, labels=LABELS)
    assert_all_loaders(folder, averaged if ema else small, LABELS)
    cfg = timm.create_model(f'local-dir:{folder}').pretrained_cfg
    assert cfg['crop_pct'] == 0.9 and tuple(cfg['mean']) == (0.5, 0.4, 0.3) and cfg['interpolation'] == 'bilinear'
    args = yaml.safe_load((folder / 'training_args.yaml').read_text())
    assert args['lr'] == 0.01 and args['command'].startswith('python -m timm_spikformer train.py -c')
    text = '\n'.join(p.read_text() for p in folder.iterdir() if p.suffix in ('.md', '.yaml', '.json'))
    assert 'somebody' not in text and 'scratch/runs' not in text


def test_a_bare_state_dict_and_a_safetensors_file(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / 'a.pth')
    save_file(small.state_dict(), tmp_path / 'b.safetensors')
    small.set_time_steps(4)  # what the name says, as the files do not
    for name in ('a.pth', 'b.safetensors'):
        assert_all_loaders(dry_run(tmp_path / name, tmp_path / 'out', model='test_spikformer_v2'), small)


@pytest.mark.parametrize('stem, size, in_chans', [('sps', 64, 3), ('scs', (32, 48), 3), ('scs', 64, 1)])
def test_other_shapes(stem, size, in_chans, images, tmp_path):
    torch.manual_seed(0)
    x = nn.functional.interpolate(images[:, :in_chans], size)
    model = calibrate(timm.create_model(
        'test_spikformer_v2', num_classes=10, stem=stem, img_size=size, in_chans=in_chans, time_steps=2), x)
    assert_all_loaders(dry_run(model, tmp_path / 'out'), model)
    again = read_checkpoint(tmp_path / 'out')
    assert again.data_config['input_size'] == (in_chans, *x.shape[2:])


def test_folders_of_timm_and_of_transformers_and_of_publish_itself(small, tmp_path):
    save_for_hf(small, str(tmp_path / 'timm'), safe_serialization=True, model_config=dict(label_names=LABELS))
    dry_run(tmp_path / 'timm', tmp_path / 'first')
    assert_all_loaders(tmp_path / 'first', small, LABELS)
    AutoModelForImageClassification.from_pretrained(tmp_path / 'first').save_pretrained(tmp_path / 'hf')
    ViTImageProcessor(size=dict(height=64, width=64), image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / 'hf')
    dry_run(tmp_path / 'hf', tmp_path / 'second')
    assert_all_loaders(tmp_path / 'second', small, LABELS)
    assert timm.create_model(f'local-dir:{tmp_path / "second"}').pretrained_cfg['mean'] == [0.1, 0.2, 0.3]
    assert type(AutoImageProcessor.from_pretrained(tmp_path / 'first')) is CLIPImageProcessor
    assert type(AutoImageProcessor.from_pretrained(tmp_path / 'second')) is ViTImageProcessor


def test_a_folder_that_save_pretrained_wrote_loads_in_timm(small, tmp_path):
    """So what `push_to_hub` of a transformers model uploads is for both, too."""
    hf_model = AutoModelForImageClassification.from_pretrained(dry_run(small, tmp_path / 'a', labels=LABELS))
    hf_model.save_pretrained(tmp_path / 'b')
    assert_all_loaders(tmp_path / 'b', small, LABELS)


def test_a_masked_autoencoder(small, images, tmp_path):
    mae = SpikformerMAE(
        small, mask_ratio=0.25, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, mask_unit=32)
    folder = dry_run(calibrate(mae, images), tmp_path / 'out')
    loaded = AutoModelForMaskedImageModeling.from_pretrained(folder).eval()
    noise = torch.rand(16, 4)
    with torch.no_grad():
        assert torch.equal(loaded(images, noise=noise).reconstruction, mae(images, noise=noise).reconstruction)
        encoder = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert encoder.num_classes == 0
        assert torch.equal(encoder.forward_features(images), small.forward_features(images))
    assert timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=3).num_classes == 3
    card = ModelCard.load(folder / 'README.md')
    assert card.data.pipeline_tag == 'image-feature-extraction'
    assert type(read_checkpoint(folder).model) is SpikformerMAE


def test_features_without_a_classifier(small, tmp_path):
    small.reset_classifier(0)
    folder = dry_run(small, tmp_path / 'out')
    x = example_images(from_model(small))
    with torch.no_grad():
        assert torch.equal(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x), small(x))
    assert read_checkpoint(folder).model.num_classes == 0


# -- presentation of images

@pytest.mark.parametrize('size, crop_pct', [(224, 0.9), (32, 1.0), (28, 0.875)])
def test_the_image_processor_does_what_timm_does(size, crop_pct):
    import datasets
    image = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'test.parquet'))[3]['image'].convert('RGB')
    image = image.resize((300, 260))
    config = dict(
        input_size=(3, size, size), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), interpolation='bicubic',
        crop_pct=crop_pct)
    processor = create_image_processor(config)
    ours = processor(image, return_tensors='pt').pixel_values[0]
    expected = create_transform(**config, is_training=False)(image)
    assert ours.shape == expected.shape and (ours - expected).abs().mean() < 0.01  # in units of the deviation
    read = read_data_config(json.loads(processor.to_json_string()), 3)
    assert read.pop('crop_pct') == pytest.approx(crop_pct, rel=0.01)
    assert read == {k: config[k] for k in read}


def test_the_pipeline_classifies_with_the_folder(tmp_path):
    import datasets
    model = timm.create_model(SHIPPED, pretrained=True)
    folder = dry_run(model, tmp_path / 'out', labels=list(model.pretrained_cfg['label_names']))
    test = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'test.parquet'))[:200]
    predicted = pipeline('image-classification', model=str(folder), device='cpu')(test['image'], batch_size=50)
    names = [model.pretrained_cfg['label_names'][i] for i in test['label']]
    assert sum(p[0]['label'] == name for p, name in zip(predicted, names)) > 160


# -- the card

def test_the_card_and_the_results_agree(tmp_path):
    model = timm.create_model(SHIPPED, pretrained=True)
    folder = dry_run(
        model, tmp_path / 'out', labels=list(model.pretrained_cfg['label_names']), eval_data=FASHION_MNIST,
        dataset=DATASET)
    card = ModelCard.load(folder / 'README.md')
    (result,) = card.data.eval_results
    (entry,) = yaml.safe_load((folder / '.eval_results' / 'image-classification.yaml').read_text())
    assert result.metric_value == entry['value'] > 85.
    assert result.dataset_type == entry['dataset']['id'] == DATASET.id
    assert card.data.license == 'mit' and card.data.pipeline_tag == 'image-classification'
    assert card.data.library_name == 'timm' and {'timm', 'transformers', 'snn', 'spikformer'} <= set(card.data.tags)
    assert card.data.datasets == [DATASET.id] and card.data.metrics == ['accuracy']
    text = card.text
    assert 'More Information Needed' not in text and str(tmp_path) not in card.content
    assert f'| {entry["value"]} % |' in text and '80.38' not in text
    assert '516,354' in text and 'mJ' in text and '@article{zhou2024spikformerv2' in text
    assert not re.search(r'{[{%]|\| None', text)


def test_a_card_without_results_claims_none(small, tmp_path):
    card = ModelCard.load(dry_run(small, tmp_path / 'out') / 'README.md')
    assert card.data.eval_results is None and not (tmp_path / 'out' / '.eval_results').exists()
    assert 'No result of this checkpoint has been measured' in card.text
    assert 'The checkpoint does not say how it was trained' in card.text
    assert not re.search(r'\d %', card.text)


@pytest.mark.parametrize('name, text', [
    ('a.json', '{"model": "x", "top1": 81.25, "top5": 95.5}'), ('a.json', '[{"top1": 81.25, "top5": 95.5}]'),
    ('a.csv', 'model,top1,top5\nx,81.25,95.5\n'),
])
def test_results_of_validate_py(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert [(r.name, r.value) for r in read_results(tmp_path / name, DATASET)] == [
        ('Top-1 accuracy', 81.25), ('Top-5 accuracy', 95.5)]


@pytest.mark.parametrize('name, text', [('a.json', '{"model": "x"}'), ('a.json', '{'), ('a.csv', ''), ('b.csv', 'a')])
def test_results_of_something_else(name, text, tmp_path):
    (tmp_path / 'a.json').write_text(text)
    (tmp_path / 'a.csv').write_text(text)
    with pytest.raises(ValueError, match='validate.py --results-file has written'):
        read_results(tmp_path / name, DATASET)


# -- bad input

@pytest.mark.parametrize('kwargs, message', [
    (dict(repo='name'), "'name' does not say whose repository it is. Expected ORG/NAME"),
    (dict(repo='../me/name'), 'is not a name of a repository. Expected ORG/NAME'),
    (dict(repo='me/..'), 'is not a name of a repository. Expected ORG/NAME'),
    (dict(license=''), 'A licence of the weights is required'),
    (dict(eval_data=FASHION_MNIST), 'A result needs the dataset it was measured on'),
    (dict(output=None), 'A dry run needs an output folder'),
    (dict(labels=['a', 'b']), 'The model has 10 classes, but 2 labels were given'),
    (dict(labels=['a'] * 10), "The label 'a' is there twice"),
    (dict(model='resnet18'), "There is no Spikformer 'resnet18'"),
    (dict(model='spikformer_v2_8_384'), 'does not fit the model'),
    (dict(model='spikformer_8_384'), 'does not fit the model|is of another model than spikformer_8_384'),
    (dict(ema=True), 'holds no averaged weights'),
    (dict(results='nothing.json', dataset=DATASET), 'There is no nothing.json'),
])
def test_arguments_that_do_not_fit(kwargs, message, small, tmp_path):
    torch.save({'state_dict': small.state_dict()}, tmp_path / 'a.pth')
    defaults = dict(
        repo='me/name', license='mit', model='test_spikformer_v2', output=tmp_path / 'out', dry_run=True)
    with pytest.raises(ValueError, match=message):
        publish(tmp_path / 'a.pth', **{**defaults, **kwargs})
    assert not (tmp_path / 'out').exists()


class Malicious:
    def __reduce__(self):
        return print, ('this must not run',)


def test_files_that_are_no_checkpoints(small, tmp_path, capsys):
    for name, content in (
        ('code.pth', pickle.dumps(Malicious())), ('cut.safetensors', b'\x10' * 100), ('text.pth', b'hello'),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match='cannot be opened without|is not a'):
            read_checkpoint(tmp_path / name, 'test_spikformer_v2')
    torch.save({'state_dict': small.state_dict(), 'extra': Malicious()}, tmp_path / 'code2.pth')
    with pytest.raises(ValueError, match='cannot be opened without running code from it'):
        read_checkpoint(tmp_path / 'code2.pth', 'test_spikformer_v2')
    assert 'must not run' not in capsys.readouterr().out
    torch.save(small.state_dict(), tmp_path / 'nameless.pth')
    with pytest.raises(ValueError, match='does not say what model it is of. Name it with --model'):
        read_checkpoint(tmp_path / 'nameless.pth')
    torch.save({'a': torch.ones(1)}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='is not one of a Spikformer'):
        read_checkpoint(tmp_path / 'other.pth', 'test_spikformer_v2')
    with pytest.raises(ValueError, match='There is no .*nowhere'):
        read_checkpoint(tmp_path / 'nowhere')


def test_folders_that_do_not_fit(small, tmp_path):
    folder = dry_run(small, tmp_path / 'a')
    with pytest.raises(ValueError, match='--ema is for a file of train.py'):
        read_checkpoint(folder, ema=True)
    weights = load_file(folder / 'model.safetensors')
    shutil.copytree(folder, tmp_path / 'pickle')
    (tmp_path / 'pickle' / 'model.safetensors').unlink()
    torch.save(weights, tmp_path / 'pickle' / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='holds no model.safetensors.*pickles are not read'):
        read_checkpoint(tmp_path / 'pickle')
    (tmp_path / 'a' / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-1000])
    with pytest.raises(ValueError, match='do not load into the model'):
        read_checkpoint(tmp_path / 'a')
    del weights['blocks.1.mlp.fc1.linear.weight']
    save_file(weights, tmp_path / 'a' / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='1 tensors are missing or left over, .*blocks.1.mlp.fc1.linear.weight'):
        read_checkpoint(tmp_path / 'a')
    (tmp_path / 'a' / 'config.json').write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match='is of a vit, expected a Spikformer'):
        read_checkpoint(tmp_path / 'a')
    (tmp_path / 'a' / 'config.json').unlink()
    with pytest.raises(ValueError, match='holds no config.json'):
        read_checkpoint(tmp_path / 'a')


def test_a_silent_model_is_not_published(tmp_path):
    with pytest.raises(RuntimeError, match='No neuron of the encoder fires'):
        dry_run(timm.create_model('test_spikformer_v2'), tmp_path / 'out')


def test_a_folder_that_gives_something_else_is_not_published(small, tmp_path, monkeypatch):
    """What verification is for: here something changes the weights that were written."""
    from timm_spikformer.publishing import upload

    def save_something_else(checkpoint, folder, *args, **kwargs):
        save_folder(checkpoint, folder, *args, **kwargs)
        weights = load_file(folder / 'model.safetensors')
        weights['head.fc.bias'] += 1e-4
        save_file(weights, folder / 'model.safetensors', metadata=dict(format='pt'))

    save_folder = upload.save_folder
    monkeypatch.setattr(upload, 'save_folder', save_something_else)
    with pytest.raises(RuntimeError, match='gives other outputs in timm'):
        dry_run(small, tmp_path / 'out')


def test_another_models_classes_in_the_evaluation_data(small, tmp_path):
    with pytest.raises(ValueError, match='The classes in .* are not those of the model'):
        dry_run(small, tmp_path / 'out', labels=LABELS, eval_data=FASHION_MNIST, dataset=DATASET)
    small.reset_classifier(7)
    with pytest.raises(ValueError, match='has 10 classes, but the model has 7'):
        dry_run(small, tmp_path / 'out', eval_data=FASHION_MNIST, dataset=DATASET)


def test_the_command(small, tmp_path, capsys):
    path, _ = train_py_checkpoint(small, tmp_path)
    (tmp_path / 'labels.txt').write_text('\n'.join(LABELS) + '\n')
    arguments = ['publish', str(path), '--repo', 'me/name', '--license', 'mit', '--output', str(tmp_path / 'out')]
    cli.main([*arguments, '--dry-run', '--labels', str(tmp_path / 'labels.txt')])
    assert 'Written to' in capsys.readouterr().out
    assert_all_loaders(tmp_path / 'out', small, LABELS)
    with pytest.raises(SystemExit, match='error: The labels cannot be read'):
        cli.main([*arguments, '--dry-run', '--labels', str(tmp_path / 'nothing.txt')])
