"""Spikformer V2, a spiking vision transformer, for timm and transformers. Importing it registers the models."""
from .anytime import predict_anytime
from .hf.registration import register as _register_with_transformers
from .kernels import explain_kernels, get_kernels, set_kernels, use_kernels
from .lazy import import_on_demand
from .masked_autoencoder import SpikformerMAE
from .neurons import LIF, StatefulInference, lif, membrane_potentials, record_membrane_potentials
from .pretrained import set_hub_namespace
from .pretrained import set_hub_namespace_from_environment as _set_hub_namespace_from_environment
from .spikformer import Spikformer
from .version import __version__ as __version__

# Names whose modules import transformers, which takes seconds; they are imported on first use
_ON_DEMAND = {
    'SpikformerConfig': '.hf.configuration_spikformer',
    'SpikformerBackbone': '.hf.modeling_spikformer',
    'SpikformerForImageClassification': '.hf.modeling_spikformer',
    'SpikformerForMaskedImageModeling': '.hf.modeling_spikformer',
    'SpikformerModel': '.hf.modeling_spikformer',
    'FiringRateCallback': '.hf.trainer',
    'ProfileCallback': '.profiling.callback',
    'SpikformerTrainer': '.hf.trainer',
}

__all__ = [
    'StatefulInference',
    'LIF',
    'Spikformer',
    'SpikformerMAE',
    'explain_kernels',
    'get_kernels',
    'lif',
    'membrane_potentials',
    'predict_anytime',
    'record_membrane_potentials',
    'set_hub_namespace',
    'set_kernels',
    'use_kernels',
    *_ON_DEMAND,
]


__getattr__ = import_on_demand(__name__, _ON_DEMAND)


def __dir__() -> list:
    return sorted({*globals(), *__all__})


_register_with_transformers()
_set_hub_namespace_from_environment()
