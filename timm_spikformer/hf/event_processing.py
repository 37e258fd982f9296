"""Preprocessing of event recordings and event frames for the transformers classes."""
import math
import numbers
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
import torch
from transformers import BatchFeature
from transformers.feature_extraction_utils import FeatureExtractionMixin

from ..event_data.frames import Events, check_integration, check_size, integrate, resize

__all__ = ['SpikformerEventProcessor']

Sample = Union[Events, Dict[str, np.ndarray], np.ndarray]


class SpikformerEventProcessor(FeatureExtractionMixin):
    """Convert event recordings to `pixel_values` `[B, T, 2, H, W]`: integrate, resize and normalize.

    Like an image processor, it is saved with the model, and loaded by `AutoFeatureExtractor.from_pretrained`.

    Args:
        size: Height and width of the input of the model in pixels.
        sensor_size: Height and width of the sensor; by default `size`. Used only for events, not for frames.
        time_steps: Number of frames per recording.
        split_by: 'number' or 'time', see `timm_spikformer.event_data.frames.integrate`.
        image_mean: Mean of each channel, subtracted from the counts.
        image_std: Standard deviation of each channel.

    Raises:
        ValueError: An argument is invalid.

    >>> processor = SpikformerEventProcessor(size=(32, 32), time_steps=4)
    >>> t = np.arange(100)
    >>> events = Events(t=t, x=t % 32, y=t % 32, p=t % 2)
    >>> processor([events, events], return_tensors='pt')['pixel_values'].shape
    torch.Size([2, 4, 2, 32, 32])
    """
    model_input_names = ['pixel_values']

    def __init__(
            self,
            size: Sequence[int] = (128, 128),
            sensor_size: Optional[Sequence[int]] = None,
            time_steps: int = 16,
            split_by: str = 'number',
            image_mean: Sequence[float] = (0., 0.),
            image_std: Sequence[float] = (1., 1.),
            **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = list(check_size(size))
        self.sensor_size = list(check_size(size if sensor_size is None else sensor_size))
        self.time_steps = check_integration(time_steps, split_by)
        self.split_by = split_by
        self.image_mean = np.atleast_1d(image_mean).tolist()
        self.image_std = np.atleast_1d(image_std).tolist()
        values = [*self.image_mean, *self.image_std]
        is_valid = len(self.image_mean) == len(self.image_std) == 2 and all(
            isinstance(v, numbers.Real) and math.isfinite(v) for v in values) and min(self.image_std) > 0.
        if not is_valid:
            raise ValueError(
                f'image_mean and image_std must each be two numbers, one per polarity, and image_std must be positive, '
                f'got {self.image_mean} and {self.image_std}.')

    def __call__(
            self,
            events: Union[Sample, List[Sample]],
            return_tensors: Optional[str] = None,
    ) -> BatchFeature:
        """Return the preprocessed frames of all samples as `pixel_values`, `[B, T, 2, H, W]`.

        Args:
            events: One sample or a list of samples. A sample is a recording (an `Events`, or a mapping or structured
                array with t, x, y and p), or frames of counts `[T, 2, H, W]`.
            return_tensors: 'pt' for a PyTorch tensor, 'np' or None for a NumPy array.

        Raises:
            ValueError: There are no samples, a sample is invalid, or the numbers of time steps differ.
        """
        samples = events if isinstance(events, list) else [events]
        frames = [self._frames(sample) for sample in samples]
        steps = {len(f) for f in frames}
        if len(steps) != 1:
            raise ValueError(
                f'Expected samples with the same number of time steps, got {sorted(steps) or "no samples"}.')
        return BatchFeature({'pixel_values': np.stack(frames)}, tensor_type=return_tensors)

    def _frames(self, sample: Sample) -> np.ndarray:
        """Return the preprocessed frames of a sample, `[T, 2, H, W]`."""
        if isinstance(sample, torch.Tensor):
            sample = sample.detach().float().cpu().numpy()
        names = getattr(getattr(sample, 'dtype', None), 'names', None)
        if names:  # a structured array, such as those of tonic
            sample = {name: sample[name] for name in names}
        if isinstance(sample, Events):
            frames = integrate(sample, self.time_steps, tuple(self.sensor_size), self.split_by)
        elif hasattr(sample, 'keys'):
            missing = [key for key in Events._fields if key not in sample]
            if missing:
                raise ValueError(f'A recording must contain the arrays t, x, y and p, but {missing[0]} is missing.')
            arrays = {key: np.asarray(sample[key]) for key in Events._fields}
            if arrays['p'].dtype == bool:
                arrays['p'] = arrays['p'].astype(np.int64)
            events = Events(**arrays)
            frames = integrate(events, self.time_steps, tuple(self.sensor_size), self.split_by)
        else:
            frames = np.asarray(sample)
            if frames.ndim != 4 or frames.shape[1] != 2 or not frames.size:
                raise ValueError(
                    f'Frames must be [T, 2, H, W], with one channel per polarity, got {list(frames.shape)}.')
            if not np.isfinite(frames).all() or frames.min() < 0:
                raise ValueError('Frames must be finite counts of at least 0.')
        mean, std = (np.array(v, dtype=np.float32).reshape(-1, 1, 1) for v in (self.image_mean, self.image_std))
        return (resize(frames, tuple(self.size)) - mean) / std
