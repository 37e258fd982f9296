"""timm's tests/test_models.py imports the module that $TORCH_BACKEND names, before it collects.

Three of its tests select models by the name of an in-tree module: there, this project's models stand beside Hiera's.
"""
from timm.models import _registry

import timm_spikformer  # noqa: F401  registers the models

_registry._module_to_models['hiera'] |= _registry._module_to_models['spikformer']
