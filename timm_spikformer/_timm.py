"""Private names of timm that this package uses, as of timm 1.0.31.

timm may move or change them in any release, so they are imported only in this file.
"""
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.models._features import FeatureGetterNet, feature_take_indices
from timm.models._helpers import _torch_load as torch_load
from timm.models._input import update_model_args, update_model_input_size

__all__ = [
    'FeatureGetterNet', 'feature_take_indices', 'find_images_and_targets', 'torch_load', 'update_model_args',
    'update_model_input_size',
]
