"""Batches of data loaders: images, labels, and checks of both."""
from typing import Any, Mapping, NamedTuple, Optional, Tuple

from torch import Tensor

__all__ = ['Layout', 'check_images', 'check_labels', 'check_layout', 'split_batch']


class Layout(NamedTuple):
    """What all batches must have in common."""
    is_sequence: bool
    time_steps: int

    def __str__(self) -> str:
        return f'sequences of {self.time_steps} time steps' if self.is_sequence else 'images'


def check_layout(
        x: Tensor,
        model_time_steps: int,
        time_steps: Optional[int],
        earlier: Optional[Layout],
) -> Layout:
    """Return the layout of a batch.

    Args:
        x: Images or sequences.
        model_time_steps: Number of time steps of the model, which applies to images.
        time_steps: Number of time steps that the user requested, if any.
        earlier: Layout of the batches before.

    Raises:
        ValueError: The layout differs from that of the batches before, or from `time_steps`.
    """
    is_sequence = x.ndim == 5
    layout = Layout(is_sequence, x.shape[1] if is_sequence else model_time_steps)
    if time_steps not in (None, layout.time_steps):
        raise ValueError(
            f'time_steps is {time_steps}, but the sequences have {layout.time_steps} time steps. Omit time_steps.')
    if earlier not in (None, layout):
        raise ValueError(
            f'All batches must be images, or sequences of equal length. Got {layout} after {earlier}.')
    return layout


def check_images(x: Any) -> Tensor:
    """Return a batch of images or sequences.

    Raises:
        ValueError: The batch is not a tensor of at least one image, with four or five dimensions.
    """
    if not isinstance(x, Tensor):
        raise ValueError(
            f'Expected a tensor of images [B, C, H, W] or sequences [B, T, C, H, W], got a {type(x).__name__}.')
    if x.ndim not in (4, 5) or 0 in x.shape:
        raise ValueError(
            f'Expected images [B, C, H, W] or sequences [B, T, C, H, W], at least one, got shape {list(x.shape)}.')
    return x


def split_batch(batch: Any) -> Tuple[Tensor, Any]:
    """Return images and labels of a batch from a data loader; the labels are None if there are none.

    Raises:
        ValueError: The batch contains no tensor of images.
    """
    x, y, found = batch, None, type(batch).__name__
    if isinstance(batch, Mapping):
        x = batch.get('pixel_values')
        y = next((batch[key] for key in ('labels', 'label') if batch.get(key) is not None), None)
        found = f'a dict with keys {sorted(map(str, batch))}'
        if x is not None:
            found = f'pixel_values of type {type(x).__name__}'
    elif isinstance(batch, (tuple, list)):
        x, y = batch[0] if batch else None, batch[1] if len(batch) > 1 else None
        found = f'a {found} whose first item is of type {type(x).__name__}' if batch else f'an empty {found}'
    if not isinstance(x, Tensor):
        raise ValueError(
            f'Expected batches of images: a tensor, a pair (images, labels), or a dict with pixel_values, where images '
            f'and pixel_values are tensors. Got {found}.')
    return x, y


def check_labels(y: Any, batch_size: int, num_classes: int, accuracy: Optional[bool]) -> Optional[Tensor]:
    """Return class indices `[B]`, or None if accuracy is not computed.

    Args:
        y: Labels of the batch, if any.
        batch_size: Number of images.
        num_classes: Number of classes of the model.
        accuracy: Whether to compute accuracy; None if only class indices are used, False if labels are ignored.

    Raises:
        ValueError: The labels are not class indices of the images, or accuracy is requested without labels.
    """
    if accuracy is False:
        return None
    if y is None:
        if accuracy:
            raise ValueError(
                'Accuracy was requested, but the data has no labels. Expected a class index for each image.')
        return None
    if not isinstance(y, Tensor):
        raise ValueError(
            f'Labels must be a tensor of class indices, not {type(y).__name__}. Convert them with torch.as_tensor, or '
            f'use accuracy=False to ignore them.')
    if y.ndim > 0 and len(y) != batch_size:
        raise ValueError(f'A batch has {batch_size} images, but {len(y)} labels. Expected a label for each image.')
    if y.ndim != 1 or y.is_floating_point():
        if accuracy:
            raise ValueError(
                f'Accuracy was requested, but the data has labels of shape {list(y.shape)} and dtype {y.dtype}. '
                f'Expected a class index for each image.')
        return None
    if len(y) and (y.min() < 0 or y.max() >= num_classes):
        raise ValueError(
            f'Labels must be indices of the {num_classes} classes of the model. Got {y.min()} to {y.max()}. Use '
            f'accuracy=False to ignore them.')
    return y
