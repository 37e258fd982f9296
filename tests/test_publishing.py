"""Publishing of checkpoints to folders that all loaders read with bit-equal outputs; model cards; errors."""
import argparse
import json
import os
import pickle
import random
import re
import shutil

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import assert_neurons_fire, calibrate
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    CLIPImageProcessor,
    TimmWrapperForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from timm_spikformer import SpikformerForImageClassification, SpikformerMAE, cli
from timm_spikformer.event_data.frames import Events
from timm_spikformer.hf.remote_code import remote_sources
from timm_spikformer.images import FASHION_MNIST
from timm_spikformer.publishing import convert, publish, read_checkpoint, save_folder
from timm_spikformer.publishing.card import Dataset
from timm_spikformer.publishing.folder import example_images
from timm_spikformer.reading import checkpoint_from_model, unwrap_timm_model

SHIPPED = 'spikformer_v2_2_64_patch4_32.fashion_mnist'
DATASET = Dataset('zalando-datasets/fashion_mnist', 'Fashion-MNIST (1,000 images)', 'test')
LABELS = [f'class {i}' for i in range(10)]


@pytest.fixture
def small(images):
    torch.manual_seed(0)
    return calibrate(timm.create_model('test_spikformer_v2', num_classes=10, time_steps=2), images)


def train_py_checkpoint(small, folder, **kwargs):
    """Write a checkpoint as train.py does, with timm's CheckpointSaver; the EMA weights differ from the weights."""
    args = argparse.Namespace(**{**dict(
        model='test_spikformer_v2', num_classes=10, img_size=None, input_size=None, in_chans=None, crop_pct=0.9,
        mean=[0.5, 0.4, 0.3], std=None, interpolation='bilinear', model_kwargs=dict(time_steps=2), epochs=3, lr=0.01,
        data_dir='/home/somebody/images', output='/scratch/runs', resume='', dataset='hfds//home/somebody/images',
        opt='adamw', mixup=0.0, model_ema=True), **kwargs})
    ema = ModelEmaV3(small)
    with torch.no_grad():
        ema.module.head.fc.weight.mul_(-1.)
    saver = CheckpointSaver(
        small, torch.optim.AdamW(small.parameters()), args, ema, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(0, 50.)
    return folder / 'last.pth.tar', ema.module.eval()


def dry_run(checkpoint, folder, **kwargs):
    publish(checkpoint, 'me/name.tag', 'mit', output=folder, dry_run=True, **kwargs)
    return folder


@torch.no_grad()
def assert_all_loaders(folder, expected, labels=None):
    """Check that all loaders give logits that are bit-equal to those of `expected`, and that its neurons fire."""
    x = example_images(checkpoint_from_model(expected))
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
    assert_neurons_fire(by_timm, x)
    if labels is not None:
        assert list(by_auto.config.id2label.values()) == list(by_wrapper.config.id2label.values()) == labels
        assert list(by_timm.pretrained_cfg['label_names']) == labels


# -- kinds of checkpoints

@pytest.mark.parametrize('ema', [False, True])
def test_train_py_checkpoint(ema, small, tmp_path):
    path, averaged = train_py_checkpoint(small, tmp_path)
    folder = dry_run(path, tmp_path / 'out', ema=ema, labels=LABELS)
    assert_all_loaders(folder, averaged if ema else small, LABELS)
    cfg = timm.create_model(f'local-dir:{folder}').pretrained_cfg
    assert cfg['crop_pct'] == 0.9 and tuple(cfg['mean']) == (0.5, 0.4, 0.3) and cfg['interpolation'] == 'bilinear'
    args = yaml.safe_load((folder / 'training_args.yaml').read_text())
    assert args['lr'] == 0.01 and args['command'].startswith('python -m timm_spikformer train.py -c')
    text = '\n'.join(p.read_text() for p in folder.iterdir() if p.suffix in ('.md', '.yaml', '.json'))
    assert 'somebody' not in text and 'scratch/runs' not in text


def test_bare_state_dict_and_safetensors_file(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / 'a.pth')
    save_file(small.state_dict(), tmp_path / 'b.safetensors')
    small.set_time_steps(4)  # the default of the model, as the files do not contain it
    for name in ('a.pth', 'b.safetensors'):
        assert_all_loaders(dry_run(tmp_path / name, tmp_path / 'out', model='test_spikformer_v2'), small)


@pytest.mark.parametrize('stem, size, in_chans', [('sps', 64, 3), ('scs', (32, 48), 3), ('scs', 64, 1)])
def test_other_stems_and_input_shapes(stem, size, in_chans, images, tmp_path):
    torch.manual_seed(0)
    x = nn.functional.interpolate(images[:, :in_chans], size)
    cfg = dict(crop_mode='squash' if isinstance(size, tuple) else 'center')
    model = calibrate(timm.create_model(
        'test_spikformer_v2', num_classes=10, stem=stem, img_size=size, in_chans=in_chans, time_steps=2,
        pretrained_cfg_overlay=cfg), x)
    assert_all_loaders(dry_run(model, tmp_path / 'out'), model)
    again = read_checkpoint(tmp_path / 'out')
    assert again.data_config['input_size'] == (in_chans, *x.shape[2:])
    if isinstance(size, tuple):
        model.pretrained_cfg['crop_mode'] = 'center'
        with pytest.raises(ValueError, match="no image processor .* 32x48 pixels and crop_mode='center'. Use a model"):
            dry_run(model, tmp_path / 'center')


def test_folders_of_timm_transformers_and_publish(small, tmp_path):
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


def test_save_folder_does_not_modify_the_model(small, tmp_path):
    before = {key: value.clone() for key, value in small.state_dict().items()}
    save_folder(small.train(), tmp_path / 'x', labels=LABELS)
    assert small.training and all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert_all_loaders(tmp_path / 'x', small.eval(), LABELS)
    with pytest.raises(ValueError, match='The model has 10 classes, but 1 labels were given'):
        save_folder(small, tmp_path / 'x', labels=['a'])


def test_folder_of_save_pretrained_loads_in_timm(small, tmp_path):
    """Repositories written by `push_to_hub` of a transformers model therefore load in both libraries."""
    hf_model = AutoModelForImageClassification.from_pretrained(dry_run(small, tmp_path / 'a', labels=LABELS))
    hf_model.save_pretrained(tmp_path / 'b')
    assert_all_loaders(tmp_path / 'b', small, LABELS)


def test_masked_autoencoder(small, images, tmp_path):
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


def test_model_without_classifier(small, tmp_path):
    small.reset_classifier(0)
    folder = dry_run(small, tmp_path / 'out')
    x = example_images(checkpoint_from_model(small))
    with torch.no_grad():
        assert torch.equal(timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(x), small(x))
    assert read_checkpoint(folder).model.num_classes == 0


# -- image preprocessing

def test_pipeline_classifies(tmp_path):
    import datasets
    model = timm.create_model(SHIPPED, pretrained=True)
    folder = dry_run(model, tmp_path / 'out', labels=list(model.pretrained_cfg['label_names']))
    test = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'test.parquet'))[:200]
    predicted = pipeline('image-classification', model=str(folder), device='cpu')(test['image'], batch_size=50)
    names = [model.pretrained_cfg['label_names'][i] for i in test['label']]
    assert sum(p[0]['label'] == name for p, name in zip(predicted, names)) > 160


# -- model card

def test_card_matches_results(tmp_path):
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
    assert f'| {entry["value"]}% |' in text and '80.38' not in text
    assert '516,354' in text and 'mJ' in text and '@article{zhou2024spikformerv2' in text
    assert not re.search(r'{[{%]|\| None', text)


def test_card_without_results(small, tmp_path):
    card = ModelCard.load(dry_run(small, tmp_path / 'out') / 'README.md')
    assert card.data.eval_results is None and not (tmp_path / 'out' / '.eval_results').exists()
    assert 'No results have been measured with this checkpoint' in card.text
    assert 'The checkpoint does not record how it was trained' in card.text
    assert not re.search(r'\d %', card.text)


# -- the caller's model, and malformed sources

def state_of(model):
    return {k: (v.clone(), v.dtype, v.data_ptr()) for k, v in model.state_dict().items()}


@pytest.mark.parametrize('wrap', [lambda m: m, torch.compile, ModelEmaV3], ids=['timm', 'compiled', 'ema'])
def test_model_and_random_state_of_caller_are_unchanged(wrap, small, tmp_path):
    """Mode, tensors, hooks and random state are unchanged, and hooks are not called."""
    model = wrap(small)
    inner = unwrap_timm_model(model).train()
    calls = []
    inner.blocks[0].register_forward_hook(lambda *args: calls.append(1))
    inner.register_forward_pre_hook(lambda *args: calls.append(1))
    before = state_of(inner)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    dry_run(model, tmp_path / 'out', labels=LABELS)
    assert not calls and len(inner._forward_pre_hooks) == len(inner.blocks[0]._forward_hooks) == 1
    assert all(m.training for m in inner.modules())
    for name, (value, dtype, pointer) in before.items():
        now = inner.state_dict()[name]
        assert torch.equal(now, value) and now.dtype == dtype and now.data_ptr() == pointer, name
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_bfloat16_model_is_unchanged(small, tmp_path):
    small.to(torch.bfloat16).train()
    folder = dry_run(small, tmp_path / 'out')
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16} and small.training
    assert {v.dtype for k, v in load_file(folder / 'model.safetensors').items() if 'num_batches' not in k} == {
        torch.float32}


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_nonfinite_weights_raise(value, small, tmp_path):
    save_for_hf(small, str(tmp_path / 'folder'), safe_serialization=True)
    with torch.no_grad():
        small.blocks[0].mlp.fc1.bn.running_var[3] = value
    torch.save(small.state_dict(), tmp_path / 'a.pth')
    weights = {**load_file(tmp_path / 'folder' / 'model.safetensors'), **small.state_dict()}
    save_file(weights, tmp_path / 'folder' / 'model.safetensors', metadata=dict(format='pt'))
    for checkpoint, kwargs in ((small, {}), (tmp_path / 'a.pth', dict(model='test_spikformer_v2')),
                               (tmp_path / 'folder', {})):
        with pytest.raises(ValueError, match='not finite: 1 of .* values of blocks.0.mlp.fc1.bn.running_var'):
            dry_run(checkpoint, tmp_path / 'out', **kwargs)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('content', [
    [1, 2], torch.ones(3), None, 'text', 3, {}, {'state_dict': None}, {'state_dict': []}, {'state_dict': {'a': 3}},
    {'model': {}}, {1: torch.ones(1)}, {'state_dict': {'stem.stages.0.down.conv.weight': torch.ones(3)}},
    {'args': 3, 'state_dict': torch.ones(1)}, {'head.fc.weight': torch.tensor(1.)},
])
def test_malformed_checkpoints(content, small, tmp_path):
    torch.save(content, tmp_path / 'odd.pth')
    for function in (lambda: read_checkpoint(tmp_path / 'odd.pth', 'test_spikformer_v2'),
                     lambda: convert(tmp_path / 'odd.pth', tmp_path / 'out'),
                     lambda: convert(tmp_path / 'odd.pth', tmp_path / 'out', 'test_spikformer_v2')):
        with pytest.raises(ValueError):
            function()
    with pytest.raises(SystemExit, match='error: '):
        cli.main(['publish', str(tmp_path / 'odd.pth'), '--model', 'test_spikformer_v2', '--repo', 'a/b', '--license',
                  'mit', '--dry-run', '--output', str(tmp_path / 'out')])


@pytest.mark.parametrize('changes, message', [
    (dict(model=3), 'does not contain the name of its model'),
    (dict(model_kwargs=[1]), 'expected a dictionary'),
    (dict(model_kwargs=dict(nonsense=1)), 'cannot be created with'),
    (dict(mean='black'), 'has an invalid data config'),
    (dict(std=[0, 0, 0]), 'has an invalid data config'),
    (dict(mean=['a', 'b', 'c']), 'has an invalid data config'),
    (dict(interpolation='sharp'), 'has an invalid data config'),
    (dict(crop_pct=float('nan')), 'has an invalid data config'),
    (dict(input_size=[3, 37, 37]), 'has an invalid data config|multiple of the patch'),
])
def test_malformed_arguments_in_checkpoint(changes, message, small, tmp_path):
    path, _ = train_py_checkpoint(small, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize('name, text, message', [
    ('config.json', '[]', 'contains a list, expected a JSON object'),
    ('config.json', '{"model_type": "spikformer"', 'is not JSON'),
    ('config.json', None, 'cannot be loaded into the model of its config.json'),
    ('preprocessor_config.json', '{}', 'is not a valid processor config'),
    ('preprocessor_config.json', '{"size": 3, "image_mean": 1}', 'is not a valid processor config'),
    ('training_args.yaml', '- 1', 'is not a valid training record; expected a mapping'),
    ('training_args.yaml', 'lr: 3', 'is not a valid training record; expected a mapping'),
    ('trainer_state.json', '{"global_step": 3}', 'is not a valid Trainer state'),
])
def test_malformed_files_in_folder(name, text, message, small, tmp_path):
    folder = dry_run(small, tmp_path / 'a')
    if text is None:
        text = json.dumps({**json.loads((folder / name).read_text()), 'time_steps': 'four'})
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(folder)


def test_global_pool_of_train_py_is_used(small, tmp_path):
    """`--gp` changes the outputs but no tensor, so it is read from the training arguments."""
    path, _ = train_py_checkpoint(small, tmp_path, gp='max')
    expected = timm.create_model('test_spikformer_v2', num_classes=10, global_pool='max', time_steps=2)
    expected.load_state_dict(small.state_dict())
    expected.eval()
    x = example_images(checkpoint_from_model(small))
    with torch.no_grad():
        assert torch.equal(read_checkpoint(path).model(x), expected(x)) and not torch.equal(expected(x), small(x))
    assert_all_loaders(dry_run(path, tmp_path / 'out'), expected)


def test_remote_code_is_complete():
    """All relative imports refer to included files; the file of the registered models is included."""
    sources = remote_sources()
    assert {'modeling_spikformer.py', 'configuration_spikformer.py', 'spikformer.py', 'kernels_lif.py'} <= set(sources)
    for name, source in sources.items():
        for line in re.findall(r'^ *from \..*', source, re.M):
            assert re.match(r' *from \.(\w+) import', line)[1] + '.py' in sources, (name, line)
        compile(source, name, 'exec')


def test_unregistered_variant(images, tmp_path):
    torch.manual_seed(0)
    kwargs = dict(depth=3, embed_dim=96, num_heads=4, time_steps=2)
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=10, **kwargs), images)
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    for name, command in (('published', ['publish', '--repo', 'a/b', '--license', 'mit', '--dry-run']),
                          ('converted', ['convert'])):
        cli.main([*command, str(tmp_path / 'a.pth'), '--model', 'test_spikformer_v2', '--output', str(tmp_path / name),
                  '--model-kwargs', *(f'{k}={v}' for k, v in kwargs.items())])
        assert_all_loaders(tmp_path / name, model)
    with pytest.raises(SystemExit, match="error: --model-kwargs: 'depth' is not KEY=VALUE"):
        cli.main(['convert', str(tmp_path / 'a.pth'), '--output', str(tmp_path / 'out'), '--model-kwargs', 'depth'])


def test_more_than_ten_named_classes(images, tmp_path):
    """The keys of config.json are strings, so '10' is sorted before '2'."""
    torch.manual_seed(0)
    names = [f'{chr(97 + i % 26)}{i}' for i in range(1000)]
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=1000, time_steps=1), images)
    folder = dry_run(model, tmp_path / 'out', labels=names)
    assert_all_loaders(folder, model, names)
    assert read_checkpoint(folder).labels == names
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / 'again')
    assert_all_loaders(tmp_path / 'again', model, names)
    assert read_checkpoint(tmp_path / 'again').labels == names
    config = json.loads((tmp_path / 'again' / 'config.json').read_text())
    assert config['label_names'] == names
    card = ModelCard.load(folder / 'README.md')
    assert f'| Classes | 1000: {", ".join(names[:10])}, ... |' in card.text


def test_markup_in_cards_is_escaped(small, tmp_path):
    labels = ['a|b', '<script>alert(1)</script>', '[x](http://evil)', '`code`', '*bold* _it_', 'line\nbreak', '# h',
              '{{ 7 * 7 }}', '---', 'ünïcödé']
    dataset = Dataset('me/data', 'Data | "quoted": {x} \n---\nlicense: wtfpl', 'test')
    (tmp_path / 'r.json').write_text('{"model": "test_spikformer_v2", "top1": 50}')
    folder = dry_run(small, tmp_path / 'out', labels=labels, dataset=dataset, results=tmp_path / 'r.json')
    assert_all_loaders(folder, small, labels)
    card = ModelCard.load(folder / 'README.md')
    assert card.data.license == 'mit' and card.data.eval_results[0].dataset_name == dataset.name
    line = next(line for line in card.text.splitlines() if line.startswith('| Classes'))
    cells = re.split(r'(?<!\\)\|', line)
    assert len(cells) == 4 and '49' not in line and 'line break' in line and 'ünïcödé' in line
    assert not re.search(r'(?<!\\)[<`*_\[]', line) and '\nlicense: wtfpl' not in card.text
    assert yaml.safe_load((folder / '.eval_results' / 'image-classification.yaml').read_text())[0]['value'] == 50.0


# -- output folders

def test_failed_publish_keeps_existing_folder(small, tmp_path, monkeypatch):
    out = dry_run(small, tmp_path / 'out', labels=LABELS)
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(*args):
        raise RuntimeError('verification failed')

    monkeypatch.setattr('timm_spikformer.publishing.upload.verify_folder', fail)
    with pytest.raises(RuntimeError, match='verification failed'):
        dry_run(small, out)
    with pytest.raises(ValueError, match='nothing does not exist'):
        dry_run(tmp_path / 'nothing', out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and os.listdir(tmp_path) == ['out']


def test_rejected_output_folders(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = dry_run(small, tmp_path / 'checkpoint')
    (tmp_path / 'thesis').mkdir()
    (tmp_path / 'thesis' / 'chapter.tex').write_text('years of work')
    (tmp_path / 'link').symlink_to('thesis')
    torch.save(small.state_dict(), tmp_path / 'thesis' / 'a.pth')
    for output, message in (
            (folder, 'which is an input'), ('.', 'current folder'), ('..', 'current folder'),
            ('thesis', 'did not write'), ('link', 'symbolic link'), (folder / 'config.json', 'is a file')):
        with pytest.raises(ValueError, match=message):
            dry_run(folder, output)
        if output == folder:
            continue  # a conversion of another file may replace this folder
        with pytest.raises(ValueError, match=f'{message}|which is an input'):
            convert(tmp_path / 'thesis' / 'a.pth', output, 'test_spikformer_v2')
    assert sorted(os.listdir(tmp_path)) == ['checkpoint', 'link', 'thesis']
    assert sorted(os.listdir('thesis')) == ['a.pth', 'chapter.tex']
    assert_all_loaders(folder, small)


# -- bad input

@pytest.mark.parametrize('option', ['--dataset-name', '--split'])
def test_description_of_no_dataset_is_an_error(option, tmp_path):
    with pytest.raises(SystemExit, match='error: --dataset-name and --split require --dataset'):
        cli.main(['publish', 'x', '--repo', 'a/b', '--license', 'mit', '--dry-run', '--output', str(tmp_path / 'y'),
                  option, 'test'])


@pytest.mark.parametrize('kwargs, message', [
    (dict(repo='name'), "'name' contains no organization or user. Expected ORG/NAME"),
    (dict(repo='../me/name'), 'is not a valid name of a repository. Expected ORG/NAME'),
    (dict(repo='me/..'), 'is not a valid name of a repository. Expected ORG/NAME'),
    (dict(license=''), 'The license of the weights must be an identifier'),
    (dict(license='apache-2'), 'The license of the weights must be an identifier.*got .apache-2.'),
    (dict(license='mit\ntags: x'), 'The license of the weights must be an identifier'),
    (dict(base_model='resnet'), 'contains no organization or user'),
    (dict(base_model='a/b/c'), 'is not a valid name of the base model'),
    (dict(train_datasets=['a b']), "'a b' is not a valid id of a Hub dataset"),
    (dict(dataset=Dataset('me/..', 'x')), "'me/..' is not a valid id of a Hub dataset"),
    (dict(eval_data=FASHION_MNIST), 'A result requires the dataset that it was measured on'),
    (dict(dataset=DATASET), 'The dataset of a result is given, but no result'),
    (dict(output=None), 'A dry run requires an output folder'),
    (dict(labels=['a', 'b']), 'The model has 10 classes, but 2 labels were given'),
    (dict(labels=['a'] * 10), "The list of labels has the same name for class 0 and class 1, 'a'"),
    (dict(labels=[*'abcdefghi', ' ']), "The list of labels has ' ' as the name of class 9. Each class needs a name"),
    (dict(model_kwargs=dict(depths=3)), 'test_spikformer_v2 cannot be created with .*depths'),
    (dict(model_kwargs=dict(depth=3)), 'does not match test_spikformer_v2|do not match the model'),
    (dict(model='resnet18'), "There is no Spikformer 'resnet18'"),
    (dict(model='spikformer_v2_8_384'), 'does not fit the model'),
    (dict(model='spikformer_8_384'), 'does not fit the model|does not match spikformer_8_384'),
    (dict(ema=True), 'contains no averaged weights'),
    (dict(results='nothing.json', dataset=DATASET), 'There is no nothing.json'),
])
def test_bad_arguments(kwargs, message, small, tmp_path):
    torch.save({'state_dict': small.state_dict()}, tmp_path / 'a.pth')
    defaults = dict(
        repo='me/name', license='mit', model='test_spikformer_v2', output=tmp_path / 'out', dry_run=True)
    with pytest.raises(ValueError, match=message):
        publish(tmp_path / 'a.pth', **{**defaults, **kwargs})
    assert not (tmp_path / 'out').exists()


class Malicious:
    def __reduce__(self):
        return print, ('this must not run',)


def test_files_that_are_not_checkpoints(small, tmp_path, capsys):
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
    with pytest.raises(ValueError, match='does not contain the name of its model. Specify it with --model'):
        read_checkpoint(tmp_path / 'nameless.pth')
    torch.save({'a': torch.ones(1)}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='does not contain a Spikformer'):
        read_checkpoint(tmp_path / 'other.pth', 'test_spikformer_v2')
    with pytest.raises(ValueError, match='nowhere does not exist'):
        read_checkpoint(tmp_path / 'nowhere')


def test_bad_folders(small, tmp_path):
    folder = dry_run(small, tmp_path / 'a')
    with pytest.raises(ValueError, match='ema and model_kwargs apply only to checkpoint files'):
        read_checkpoint(folder, ema=True)
    weights = load_file(folder / 'model.safetensors')
    shutil.copytree(folder, tmp_path / 'pickle')
    (tmp_path / 'pickle' / 'model.safetensors').unlink()
    torch.save(weights, tmp_path / 'pickle' / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='contains no model.safetensors.*pickles are not read'):
        read_checkpoint(tmp_path / 'pickle')
    (tmp_path / 'a' / 'model.safetensors').write_bytes((folder / 'model.safetensors').read_bytes()[:-1000])
    with pytest.raises(ValueError, match='model.safetensors is not a complete safetensors file'):
        read_checkpoint(tmp_path / 'a')
    del weights['blocks.1.mlp.fc1.linear.weight']
    save_file(weights, tmp_path / 'a' / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match='1 tensors are missing or unexpected, .*blocks.1.mlp.fc1.linear.weight'):
        read_checkpoint(tmp_path / 'a')
    (tmp_path / 'a' / 'config.json').write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match='contains a vit, expected a Spikformer'):
        read_checkpoint(tmp_path / 'a')
    (tmp_path / 'a' / 'config.json').unlink()
    with pytest.raises(ValueError, match='contains no config.json'):
        read_checkpoint(tmp_path / 'a')


def test_silent_model_raises(tmp_path):
    with pytest.raises(RuntimeError, match='No neuron of the encoder fires'):
        dry_run(timm.create_model('test_spikformer_v2'), tmp_path / 'out')


@pytest.mark.parametrize('name', ['head.fc.bias', 'blocks.1.mlp.fc2.bn.num_batches_tracked'])
def test_verification_detects_changed_weights(name, small, tmp_path, monkeypatch):
    """The weights are changed after they were written."""
    from timm_spikformer.publishing import upload

    def write_something_else(checkpoint, folder, *args):
        write_checkpoint(checkpoint, folder, *args)
        weights = load_file(folder / 'model.safetensors')
        weights[name] = weights[name] + (1e-4 if weights[name].is_floating_point() else 1)
        save_file(weights, folder / 'model.safetensors', metadata=dict(format='pt'))

    write_checkpoint = upload.write_checkpoint
    monkeypatch.setattr(upload, 'write_checkpoint', write_something_else)
    with pytest.raises(RuntimeError, match='different (outputs|weights) in timm'):
        dry_run(small, tmp_path / 'out')
    assert not os.listdir(tmp_path)


def test_evaluation_data_with_other_classes_raises(small, tmp_path):
    with pytest.raises(ValueError, match="'T-shirt/top' is not a class of the model"):
        dry_run(small, tmp_path / 'out', labels=LABELS, eval_data=FASHION_MNIST, dataset=DATASET)
    small.reset_classifier(7)
    with pytest.raises(ValueError, match='there are 10 classes, but the model has 7'):
        dry_run(small, tmp_path / 'out', eval_data=FASHION_MNIST, dataset=DATASET)


def test_command(small, tmp_path, capsys):
    path, _ = train_py_checkpoint(small, tmp_path)
    (tmp_path / 'labels.txt').write_text('\n'.join(LABELS) + '\n')
    arguments = ['publish', str(path), '--repo', 'me/name', '--license', 'mit', '--output', str(tmp_path / 'out')]
    cli.main([*arguments, '--dry-run', '--labels', str(tmp_path / 'labels.txt')])
    assert 'Written to' in capsys.readouterr().out
    assert_all_loaders(tmp_path / 'out', small, LABELS)
    with pytest.raises(SystemExit, match='error: The labels cannot be read'):
        cli.main([*arguments, '--dry-run', '--labels', str(tmp_path / 'nothing.txt')])


def test_processor_of_an_event_model(tmp_path):
    """A model with 2 input channels is published with a processor of events, and a card that shows its input."""
    torch.manual_seed(0)
    model = calibrate(timm.create_model(
        'test_spikformer_v2', in_chans=2, num_classes=3, time_steps=5, img_size=32,
        pretrained_cfg_overlay=dict(mean=(0., 0.), std=(1., 1.))), torch.rand(16, 2, 32, 32))
    publish(model, 'me/events', 'mit', output=tmp_path / 'published', dry_run=True)
    processor = AutoFeatureExtractor.from_pretrained(tmp_path / 'published')
    assert (processor.size, processor.time_steps, processor.image_mean) == ([32, 32], 5, [0., 0.])
    events = Events(*(np.arange(40) % n for n in (10 ** 6, 32, 32, 2)))
    assert processor(events)['pixel_values'].shape == (1, 5, 2, 32, 32)
    card = (tmp_path / 'published' / 'README.md').read_text()
    assert 'AutoFeatureExtractor' in card and 'AutoImageProcessor' not in card and 'create_transform' not in card
    read = read_checkpoint(tmp_path / 'published')
    assert read.data_config['input_size'] == (2, 32, 32) and read.processor['time_steps'] == 5


def test_processor_is_that_of_the_training(tmp_path):
    """The name of the event dataset in a checkpoint of train.py determines the published processor."""
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', in_chans=2, num_classes=10), torch.rand(16, 2, 64, 64))
    args = argparse.Namespace(
        model='test_spikformer_v2', num_classes=10, in_chans=2, mean=[0., 0.], std=[1., 1.], model_kwargs={},
        dataset='events/n_mnist?time_steps=2&split_by=time')
    torch.save(dict(arch='test_spikformer_v2', state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    publish(tmp_path / 'last.pth.tar', 'me/events', 'mit', output=tmp_path / 'published', dry_run=True)
    processor = AutoFeatureExtractor.from_pretrained(tmp_path / 'published')
    assert (processor.time_steps, processor.split_by, processor.sensor_size) == (2, 'time', [34, 34])


@pytest.mark.parametrize('from_file', [False, True])
def test_event_counts_are_not_normalized_by_default(from_file, tmp_path):
    """A model of images that was created with 2 input channels does not get the mean and std of images."""
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', in_chans=2, num_classes=10), torch.rand(16, 2, 64, 64))
    if from_file:
        torch.save(model.state_dict(), tmp_path / 'model.pth')
        checkpoint = read_checkpoint(tmp_path / 'model.pth', 'test_spikformer_v2')
    else:
        checkpoint = checkpoint_from_model(model)
    config = checkpoint.data_config
    assert (config['input_size'], config['mean'], config['std']) == ((2, 64, 64), (0., 0.), (1., 1.))
