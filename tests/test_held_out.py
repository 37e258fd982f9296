"""Evaluation on data without a test split, which requires images that were provably not used for training."""
import argparse
import json
import shutil

import pytest
import timm
import torch
import yaml
from conftest import write_images
from huggingface_hub import ModelCard

from timm_spikformer import cli
from timm_spikformer.publishing import publish
from timm_spikformer.publishing.card import Dataset


def evaluate(checkpoint, folder, data):
    publish(checkpoint, 'me/name', 'mit', eval_data=data, dataset=Dataset('me/x', 'X'), output=folder, dry_run=True)
    return folder


@pytest.fixture(scope='module')
def trained_by_the_demo(tmp_path_factory):
    """Folder with the output of the demo, trained on images without a test split, with seed 7."""
    folder = tmp_path_factory.mktemp('demo')
    write_images(folder / 'images', 'train', classes=3, count=20)
    cli.main(['demo', '--stages', 'train', '--quick', '--data', str(folder / 'images'), '--seed', '7', '--batch-size',
              '8', '--output', str(folder / 'out')])
    return folder


def test_evaluation_on_images_held_out_by_demo(trained_by_the_demo, tmp_path):
    folder = trained_by_the_demo
    shutil.copytree(folder / 'images', tmp_path / 'elsewhere')
    card = ModelCard.load(evaluate(folder / 'out' / 'model', tmp_path / 'out', tmp_path / 'elsewhere') / 'README.md')
    (result,) = card.data.eval_results
    assert result.dataset_split == 'held-out 10%'
    accuracy = json.loads((folder / 'out' / 'results.json').read_text())['accuracy']
    assert result.metric_value == round(accuracy, 2)  # measured on the same 6 images
    again = evaluate(tmp_path / 'out', tmp_path / 'again', folder / 'images')
    assert ModelCard.load(again / 'README.md').data.eval_results[0].metric_value == result.metric_value


@pytest.mark.parametrize('change', ['seed', 'digest', 'note', 'image', 'more'])
def test_images_possibly_used_for_training_are_rejected(change, trained_by_the_demo, tmp_path):
    shutil.copytree(trained_by_the_demo / 'images', tmp_path / 'images')
    shutil.copytree(trained_by_the_demo / 'out' / 'model', tmp_path / 'model')
    note = tmp_path / 'model' / 'training_args.yaml'
    args = yaml.safe_load(note.read_text())
    first, second = sorted((tmp_path / 'images' / 'class_0').iterdir())[:2]
    if change == 'seed':
        note.write_text(yaml.safe_dump({**args, 'seed': 0}))
    elif change == 'digest':
        note.write_text(yaml.safe_dump({k: v for k, v in args.items() if 'sha256' not in k}))
    elif change == 'note':
        note.unlink()
    elif change == 'image':
        (tmp_path / 'images' / 'class_1' / second.name).write_bytes(first.read_bytes())
    else:
        for i in range(5):
            shutil.copy(first, first.with_name(f'9{i}.png'))
    with pytest.raises(ValueError, match='has no test split, and the checkpoint .* Use data with a test split: DI'):
        evaluate(tmp_path / 'model', tmp_path / 'out', tmp_path / 'images')
    assert not (tmp_path / 'out').exists()


def test_train_py_checkpoint_requires_test_split(tmp_path):
    write_images(tmp_path / 'images', 'train', classes=10, count=2)
    model = timm.create_model('test_spikformer_v2', num_classes=10)
    args = argparse.Namespace(model='test_spikformer_v2', seed=0)
    torch.save({'state_dict': model.state_dict(), 'args': args}, path := tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='has no test split, and the checkpoint may have been trained'):
        evaluate(path, tmp_path / 'out', tmp_path / 'images')
