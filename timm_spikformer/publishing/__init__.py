"""From a checkpoint to a folder, and a Hub repository, that timm and transformers both load."""
from .checkpoint import Checkpoint, read_checkpoint
from .folder import save_folder, verify_folder
from .upload import publish

__all__ = ['Checkpoint', 'publish', 'read_checkpoint', 'save_folder', 'verify_folder']
