"""From a checkpoint to a folder, and a Hub repository, that timm and transformers both load."""
from ..lazy import import_on_demand

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


__getattr__ = import_on_demand(__name__, _MODULES)
