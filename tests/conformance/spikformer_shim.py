"""Register the models for timm's tests/test_models.py, which imports the module named by $TORCH_BACKEND.

Three of its tests select models by the name of a timm module, so the models are also listed under `hiera`.
"""
from timm.models import _registry

import timm_spikformer  # noqa: F401  registers the models

_registry._module_to_models['hiera'] |= _registry._module_to_models['spikformer']
