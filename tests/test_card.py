"""Model cards: only accuracies of the published checkpoint are accepted, and the examples run."""
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import calibrate
from PIL import Image

from timm_spikformer import SpikformerMAE
from timm_spikformer.profiling import profile
from timm_spikformer.publishing import Dataset, TrainingRecord, publish
from timm_spikformer.publishing.card import read_results, render_card
from timm_spikformer.reading import checkpoint_from_model, read_checkpoint
from timm_spikformer.training import init_bn_bias

ROOT = Path(__file__).parents[1]
DATASET = Dataset('zalando-datasets/fashion_mnist', 'Fashion-MNIST', 'test')


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return timm.create_model('test_spikformer_v2', num_classes=10, time_steps=2)


@pytest.mark.parametrize('name, text', [
    ('a.json', '{"model": "test_spikformer_v2", "top1": 81.25, "top5": 95.5}'),
    ('a.json', '[{"model": "other", "top1": 1, "top5": 2}, {"model": "test_spikformer_v2", "top1": 81.25, '
               '"top5": 95.5}]'),
    ('a.json', '[{"model": "test_spikformer_v2.untrained", "top1": 81.25, "top5": 95.5}]'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": 81.25, "top5": 95.5}, '
               '{"model": "hf-hub:me/test_spikformer_v2", "top1": 1}]'),
    ('a.json', '[{"model": "local-dir:\\u0000", "top1": 1}, {"model": "local-dir:LONG", "top1": 1}, '
               '{"model": "test_spikformer_v2", "top1": 81.25, "top5": 95.5}]'),
    ('a.csv', 'model,top1,top5,error\ntest_spikformer_v2,81.25,95.5,\nresnet18,,,out of memory\n'),
    ('a.json', '[{"model": "local-dir:SOURCE", "top1": 81.25, "top5": 95.5}, '
               '{"model": "local-dir:/other", "top1": 1}]'),
    ('a.json', '[{"model": "test_spikformer_v2", "checkpoint": "SOURCE", "top1": 81.25, "top5": 95.5}, '
               '{"model": "test_spikformer_v2", "checkpoint": "other.pth.tar", "top1": 1}]'),
    ('a.csv', 'model,top1,top5\nvit_base_patch16_224,84.5,97\ntest_spikformer_v2,81.25,95.5\n'),
])
def test_results_of_validate_py(name, text, small, tmp_path):
    """The row of the checkpoint is found by its file or by its model."""
    checkpoint = checkpoint_from_model(small)
    checkpoint.source = tmp_path / 'model_best.pth.tar'
    (tmp_path / name).write_text(text.replace('SOURCE', str(checkpoint.source)).replace('LONG', 'a' * 5000))
    assert [(r.name, r.value) for r in read_results(tmp_path / name, DATASET, checkpoint)] == [
        ('Top-1 accuracy', 81.25), ('Top-5 accuracy', 95.5)]


@pytest.mark.parametrize('name, text, message', [
    ('a.json', '{"model": "test_spikformer_v2"}', 'has no top1'),
    ('a.json', '{', 'cannot be read'),
    ('a.json', '[]', 'has no rows, or a row without a model name'),
    ('a.json', '3', 'has no rows, or a row without a model name'),
    ('a.json', '[{"top1": 81.25}]', 'a row without a model name'),
    ('a.csv', '', 'has no rows'),
    ('a.csv', 'a', 'has no rows'),
    ('a.json', '[{"model": "vit_base_patch16_224", "top1": 84.5}]', 'has no row for this checkpoint of test_spik'),
    ('a.json', '[{"model": "test_spikformer_v2_large", "top1": 84.5}]', 'has no row for this checkpoint'),
    ('a.json', '[{"model": "test_spikformer_v2", "checkpoint": "other.pth.tar", "top1": 8}]', 'has no row for this'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": 8}, {"model": "test_spikformer_v2", "top1": 9}]',
     'has more than one row for this checkpoint'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": NaN}]', 'has top1=nan. Expected an accuracy from 0 to 100'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": Infinity}]', 'Expected an accuracy from 0 to 100'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": -1}]', 'Expected an accuracy from 0 to 100'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": 100.1}]', 'Expected an accuracy from 0 to 100'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": 50, "top5": 101}]', 'has top5=101. Expected an accuracy'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": 50, "top5": 40}]', 'has top5=40.0 below top1=50.0'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": "high"}]', 'has top1=high. Expected an accuracy from 0 to'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": "81"}]', 'has top1=81. Expected an accuracy from 0 to 100'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": true}]', 'has top1=True. Expected an accuracy'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": [81]}]', r'has top1=\[81\]. Expected an accuracy'),
    ('a.json', '[{"model": "test_spikformer_v2", "top1": 1' + 400 * '0' + '}]', 'has top1=1000.*0. Expected an acc'),
    ('a.json', '[{"model": "test_spikformer_v2", "error": "no memory", "top1": 0}]', 'reports an error .*: no memory'),
    ('a.json', '[{"model": "hf-hub:me/test_spikformer_v2", "top1": 81}]', 'has no row for this checkpoint'),
    ('a.json', '[{"model": "me/test_spikformer_v2", "top1": 81}]', 'has no row for this checkpoint'),
    ('a.json', '[{"model": "test_spikformer_v2.other", "top1": 81}]', 'no row .* of test_spikformer_v2.untrained. Its'),
    ('a.json', '[{"model": "local-dir:\\u0000", "top1": 81}]', 'has no row for this checkpoint'),
    ('a.csv', 'model,top1\ntest_spikformer_v2,\n', 'has no top1'),
    ('a.csv', 'model,top1\ntest_spikformer_v2,nan\n', 'Expected an accuracy from 0 to 100'),
])
def test_bad_results(name, text, message, small, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / name, DATASET, checkpoint_from_model(small))


def test_results_with_tag_require_same_tag(small, tmp_path):
    """Weights from a file do not have the tag of the model's default configuration, unless it is given."""
    torch.save(small.state_dict(), tmp_path / 'a.pth')
    (tmp_path / 'r.json').write_text('{"model": "test_spikformer_v2.untrained", "top1": 81}')
    with pytest.raises(ValueError, match='has no row for this checkpoint'):
        read_results(tmp_path / 'r.json', DATASET, read_checkpoint(tmp_path / 'a.pth', 'test_spikformer_v2'))
    named = read_checkpoint(tmp_path / 'a.pth', 'test_spikformer_v2.untrained')
    assert [r.value for r in read_results(tmp_path / 'r.json', DATASET, named)] == [81.]


def card_of(model, profiled_on=None, training=None):
    checkpoint = checkpoint_from_model(model)
    checkpoint.training = training
    encoder = checkpoint.encoder
    return render_card(checkpoint, 'me/name', 'mit', profile(encoder, torch.rand(1, 3, 64, 64)), [], profiled_on).text


@pytest.mark.parametrize('stem, is_v2', [('scs', True), ('sps', False)])
def test_only_cards_of_v2_say_that_authors_released_no_weights(stem, is_v2):
    """The authors of V1 have released weights."""
    text = card_of(timm.create_model('test_spikformer_v2', stem=stem))
    assert 'No results have been measured with this checkpoint.' in text
    assert ("The authors' weights, to which the paper's results refer, have not been released." in text) == is_v2
    assert 'other weights' not in text and ('released neither code nor weights' in text) == is_v2


def test_card_of_autoencoder_counts_decoder(small):
    mae = SpikformerMAE(small, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    encoder, total = (sum(p.numel() for p in m.parameters()) for m in (mae.encoder, mae))
    text = card_of(mae)
    assert encoder < total and f'| Parameters | encoder: {encoder:,}; with the decoder: {total:,} |\n' in text
    assert '| Dense multiply-accumulates of the encoder, with all patches, per image and time step |' in text
    assert f'| Parameters | {sum(p.numel() for p in small.parameters()):,} |\n' in card_of(small)


def test_card_states_source_and_conventions_of_profile(small):
    text = card_of(small, 'some images')
    result = profile(small, torch.rand(1, 3, 64, 64))
    assert result.cost.source in text and 'measured on some images' in text
    for meaning in result.conventions.describe().values():
        assert meaning in text
    assert 'depend on the data and were not measured' in card_of(small)


@pytest.mark.parametrize('command, is_command', [
    ('python -m timm_spikformer train.py', True), ('timm-spikformer demo', True), ("timm's train.py", False),
    ('pythonic methods', False), ('transformers Trainer', False)])
def test_commands_are_code_and_descriptions_are_text(command, is_command, small):
    text = card_of(small, training=TrainingRecord(command, {'epochs': 5}))
    assert (f'Command:\n\n    {command}\n' in text) == is_command
    assert (f'Trained with {command}.' in text) != is_command
    assert '| epochs | 5 |' in text


@pytest.mark.parametrize('kind', ['classifier', 'autoencoder', 'events'])
def test_examples_run(kind, images, tmp_path):
    """With the published folder in place of the repository, the examples for timm and transformers run."""
    torch.manual_seed(0)
    x = torch.rand(16, 2, 2, 32, 32) if kind == 'events' else images
    overlay = dict(mean=(0., 0.), std=(1., 1.)) if kind == 'events' else {}
    model = timm.create_model(
        'test_spikformer_v2', in_chans=x.shape[-3], num_classes=10, img_size=x.shape[-1], time_steps=2,
        pretrained_cfg_overlay=overlay)
    init_bn_bias(model)
    calibrate(model, x)
    if kind == 'autoencoder':
        model = calibrate(SpikformerMAE(model, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2), x)
    publish(model, 'me/name', 'mit', output=tmp_path / 'out', dry_run=True)
    card = (tmp_path / 'out' / 'README.md').read_text()
    card = card.replace('hf-hub:me/name', f'local-dir:{tmp_path / "out"}').replace('me/name', str(tmp_path / 'out'))
    for code in re.findall('```python\n(.*?)```', card, re.S):
        image = Image.open(ROOT / 'docs' / 'ankle_boot.png').convert('RGB')
        events = {name: np.arange(40) % size for name, size in dict(t=40, x=32, y=32, p=2).items()}
        variables = dict(image=image, events=events, frames=x)
        exec(code, variables)
        output = variables['output']
        if kind == 'autoencoder':
            assert output.reconstruction.isfinite().all() if 'processor' in variables else output.shape == (1, 64)
        else:
            logits = output.logits if 'processor' in variables else output
            assert logits.shape == (16 if logits is output and kind == 'events' else 1, 10) and logits.std() > 0
