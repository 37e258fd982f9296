"""From a checkpoint to a folder, and a Hub repository, that timm and transformers both load."""
from importlib import import_module
from typing import Any

# Imported on demand: converting needs nothing of what a model card needs
_MODULES = {
    'Checkpoint': '..reading',
    'convert': '.convert',
    'publish': '.upload',
    'read_checkpoint': '..reading',
    'save_folder': '.folder',
    'verify_folder': '.folder',
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_MODULES[name], __name__), name)
