"""Save and publish checkpoints as folders and Hub repositories that timm and transformers both load."""
from ..lazy import import_on_demand

# Imported on demand, because conversion does not need the dependencies of the model card
_MODULES = {
    'Checkpoint': '..reading',
    'ConversionResult': '.conversion',
    'Dataset': '.card',
    'PublishResult': '.upload',
    'TrainingRecord': '..training_records',
    'convert': '.conversion',
    'publish': '.upload',
    'read_checkpoint': '..reading',
    'save_folder': '.folder',
    'verify_folder': '.folder',
}

__all__ = list(_MODULES)

__getattr__ = import_on_demand(__name__, _MODULES)
