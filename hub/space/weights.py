"""List, describe and load the weights that the Space uses."""
import functools
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import yaml
from torch import nn

import timm_spikformer  # noqa: F401  registers the models
from timm_spikformer.masked_autoencoder import SpikformerMAE

__all__ = ['classifiers', 'default_classifier', 'describe', 'find_autoencoder', 'load_autoencoder', 'load_classifier']


def metadata(name: str) -> Dict[str, Any]:
    """Return what the package records about the weights `name`, a MODEL.TAG: their training and their accuracy."""
    file = Path(timm.get_pretrained_cfg(name).file).with_suffix('.yaml')
    return yaml.safe_load(file.read_text()) if file.is_file() else {}


def _local_models() -> List[str]:
    """Return the names, MODEL.TAG, of the models for images whose weights are on this machine."""
    cfgs = {name: timm.get_pretrained_cfg(name) for name in timm.list_pretrained('*spikformer*')}
    return [name for name, cfg in cfgs.items() if cfg.file and Path(cfg.file).is_file() and cfg.input_size[0] in (1, 3)]


def _is_autoencoder(name: str) -> bool:
    return name.partition('.')[2].startswith('mae_')


def classifiers() -> List[str]:
    """Return the names of the classifiers whose weights are on this machine."""
    return [name for name in _local_models() if not _is_autoencoder(name)]


def default_classifier() -> str:
    """Return the classifier of the example images, Fashion-MNIST, that was trained with the most time steps."""
    names = [name for name in classifiers() if metadata(name).get('dataset') == 'Fashion-MNIST']
    return max(names, key=lambda name: metadata(name).get('time_steps', 1))


def find_autoencoder() -> Optional[str]:
    """Return the name of the first masked autoencoder, with a tag `mae_...`; None if there are no such weights."""
    return next(filter(_is_autoencoder, _local_models()), None)


@functools.cache
def load_classifier(name: str, time_steps: int) -> nn.Module:
    """Load a classifier in eval mode."""
    return timm.create_model(name, pretrained=True, time_steps=time_steps).eval()


@functools.cache
def load_autoencoder(source: str) -> SpikformerMAE:
    """Load a masked autoencoder in eval mode.

    Args:
        source: A folder that `timm_spikformer.publishing.save_folder` or transformers wrote, or a MODEL.TAG.

    Raises:
        ValueError: It is not a masked autoencoder.
    """
    if Path(source).is_dir():
        from timm_spikformer.reading import read_checkpoint
        mae = read_checkpoint(source).model
        if not isinstance(mae, SpikformerMAE):
            raise ValueError(f'{source} holds a {type(mae).__name__}, expected a masked autoencoder.')
        return mae
    return SpikformerMAE.from_pretrained(source)


def describe(name: str) -> str:
    """Return Markdown that says what the weights are for, and how accurate they are."""
    info, cfg = metadata(name), timm.get_pretrained_cfg(name)
    dataset = info.get('dataset', cfg.tag)
    accuracy = 'Their test accuracy is not recorded.'
    if 'test_accuracy' in info:
        accuracy = (
            f'Test accuracy: **{info["test_accuracy"]}%** with T = {info["time_steps"]}, as in training; '
            f'the accuracy differs for other T.')
    return (
        f'**Weights:** `{name}`. {accuracy} They classify only {dataset}: every image gets one of its '
        f'{cfg.num_classes} labels. There are no ImageNet weights.')
