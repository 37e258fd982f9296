"""Spikformer V2, a spiking vision transformer, for timm and transformers. Importing this registers its models."""
from typing import Any

from .anytime import predict_anytime
from .hf.registration import register as _register_with_transformers
from .kernels import explain_kernels, get_kernels, set_kernels, use_kernels
from .masked_autoencoder import SpikformerMAE
from .neurons import LIF, CarriedMembranes, lif, membrane_potentials, record_membranes
from .pretrained import set_hub_namespace
from .pretrained import use_environment as _use_environment
from .spikformer import Spikformer

__version__ = '0.1.0.dev0'

# where what needs transformers is found, which takes seconds to import: it waits until it is asked for
_OF_TRANSFORMERS = {
    'SpikformerConfig': 'configuration_spikformer',
    'SpikformerBackbone': 'modeling_spikformer',
    'SpikformerForImageClassification': 'modeling_spikformer',
    'SpikformerForMaskedImageModeling': 'modeling_spikformer',
    'SpikformerModel': 'modeling_spikformer',
    'FiringRateCallback': 'trainer',
    'ProfileCallback': 'trainer',
    'SpikformerTrainer': 'trainer',
}

__all__ = [
    'CarriedMembranes',
    'LIF',
    'Spikformer',
    'SpikformerMAE',
    'explain_kernels',
    'get_kernels',
    'lif',
    'membrane_potentials',
    'predict_anytime',
    'record_membranes',
    'set_hub_namespace',
    'set_kernels',
    'use_kernels',
    *_OF_TRANSFORMERS,
]


def __getattr__(name: str) -> Any:
    if name not in _OF_TRANSFORMERS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from importlib import import_module
    return getattr(import_module(f'.hf.{_OF_TRANSFORMERS[name]}', __name__), name)


def __dir__() -> list:
    return sorted({*globals(), *__all__})


_register_with_transformers()
_use_environment()
