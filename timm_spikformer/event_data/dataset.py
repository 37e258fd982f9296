"""Datasets of event sequences, and their loaders."""
import copy
import functools
import inspect
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import timm.data
import torch
from torch import Tensor
from torch.utils.data import default_collate

from ..images import Images
from .cache import cache_frames
from .frames import resize
from .simulated import simulate_frames
from .transforms import SequenceTransform

__all__ = ['EventSequences', 'RecordedSource', 'SimulatedSource', 'collate', 'create_loader']

# Arguments of timm's `create_loader` that augment images and have no counterpart for event sequences. Setting one is an
# error. The crop scale, crop ratio and color jitter, which train.py sets by default, are ignored instead.
_IMAGE_ONLY_ARGUMENTS = ('auto_augment', 'num_aug_splits', 'grayscale_prob', 'gaussian_blur_prob', 'input_size_choices')


class SimulatedSource:
    """Source of event frames that are simulated from grayscale versions of images: see `simulate_events`.

    Frames are computed each time they are read.

    Args:
        images: Images, one per sequence.
        time_steps: Number of frames per sequence.
        split_by: 'number' or 'time', see `integrate`.
        size: Height and width of all images, in pixels.

    >>> from timm_spikformer.images import read_splits
    >>> SimulatedSource(read_splits()['test'], time_steps=4, split_by='time', size=(28, 28)).frames(0).shape
    (4, 2, 28, 28)
    """

    def __init__(self, images: Images, time_steps: int, split_by: str, size: Tuple[int, int]):
        self.images = copy.copy(images)
        self.images.mode, self.images.transform, self.images.labels = 'L', None, None
        self.time_steps = time_steps
        self.split_by = split_by
        self.size = size

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return self.images.filename(i)

    def fingerprint(self) -> str:
        """Return a text that identifies the images and the settings."""
        return f'simulated {self.images.fingerprint()} {self.time_steps} {self.split_by} {self.size}'

    def frames(self, i: int) -> np.ndarray:
        """Return the event counts of one image, `[T, 2, H, W]`, see `simulate_frames`."""
        image = np.asarray(self.images[i], dtype=np.float32) / 255.
        if image.shape != self.size:
            raise ValueError(
                f'{self.name(i)} has {image.shape[0]}x{image.shape[1]} pixels, expected {self.size[0]}x{self.size[1]}. '
                f'Resize the image file.')
        return simulate_frames(image, self.time_steps, self.split_by)


class RecordedSource:
    """Source of frames of recordings. The frames are cached in one memory-mapped file: see `cache_frames`.

    Args:
        recordings: Recordings of one split, from `read_recordings` or `from_tonic`.
        time_steps: Number of frames per sequence.
        split_by: 'number' or 'time', see `integrate`.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from timm_spikformer.event_data.recordings import Recordings
    >>> folder = Path(tempfile.mkdtemp())
    >>> t = np.arange(90)
    >>> np.savez(folder / 'events.npz', t=t, x=t % 34, y=t % 34, p=t % 2)
    >>> recordings = Recordings('n_mnist', 'train', folder, [folder / 'events.npz'], [0], ('zero',), (34, 34))
    >>> RecordedSource(recordings, time_steps=3, split_by='number').frames(0).sum((1, 2, 3)).tolist()
    [30, 30, 30]
    """

    def __init__(self, recordings: Any, time_steps: int, split_by: str):
        self.recordings = recordings
        self.time_steps = time_steps
        self.split_by = split_by
        self.size = recordings.size
        self._frames: Optional[np.ndarray] = None
        self._open_frames()

    def _open_frames(self) -> np.ndarray:
        if self._frames is None:
            self._frames = cache_frames(self.recordings, None, self.time_steps, split_by=self.split_by)
        return self._frames

    def __getstate__(self) -> Dict[str, Any]:
        return {**vars(self), '_frames': None}  # pickling a memory map for another process would copy its contents

    def __len__(self) -> int:
        return len(self.recordings)

    def name(self, i: int) -> str:
        return self._names[i]

    @functools.cached_property
    def _names(self) -> List[str]:
        return self.recordings.names()

    def fingerprint(self) -> str:
        """Return a text that identifies the recordings and the settings."""
        return f'{self.recordings.fingerprint()} {self.time_steps} {self.split_by}'

    def frames(self, i: int) -> np.ndarray:
        """Return the event counts of one recording, `[T, 2, H, W]`."""
        return self._open_frames()[i]


def collate(batch: List[Tuple[Tensor, int]]) -> List[Tensor]:
    """Collate pairs (frames, label) to a batch `[frames [B, T, C, H, W], labels [B]]`.

    Raises:
        ValueError: The sequences have different numbers of time steps or frame sizes. Sequences are not padded, because
            frames without events would change the mean over time.
    """
    shapes = {tuple(frames.shape) for frames, _ in batch}
    if len(shapes) > 1:
        raise ValueError(
            f'All sequences of a batch must have the same shape [T, C, H, W], got {sorted(shapes)}. Split the events '
            f'into a fixed number of time steps, or use a batch size of 1.')
    return default_collate(batch)


class _Preprocessing(NamedTuple):
    """Resize, augment and normalize a sequence of event counts, `[T, C, H, W]`."""
    size: Tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    augmentation: Optional[SequenceTransform]

    def __call__(self, x: Tensor) -> Tensor:
        x = torch.from_numpy(resize(x.numpy(), self.size))
        if self.augmentation is not None:
            x = self.augmentation(x)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


class EventSequences(Images):
    """Sequences of event frames of one split, and their labels.

    An item is a pair (frames, label). The frames are a float32 tensor `[T, 2, H, W]` of event counts per time step,
    polarity and pixel; polarity 1 is ON (brighter). The methods of `Images` select and split sequences.

    Args:
        source: Source of the frames, a `RecordedSource` or a `SimulatedSource`: `frames(i)` returns counts
            `[T, 2, H, W]`, `name(i)` the location of a sequence, and `fingerprint()` a text that identifies the source.
        labels: Class indices `[N]`.
        classes: Class names in the order of the class indices.
        name: Display name of the dataset.
        split: Name of the split, see `Images`.

    >>> from timm_spikformer.images import read_splits
    >>> images = read_splits()['test']
    >>> source = SimulatedSource(images, time_steps=4, split_by='number', size=(28, 28))
    >>> sequences = EventSequences(source, images.labels, images.classes, 'Fashion-MNIST (simulated events)', 'test')
    >>> frames, label = sequences[0]
    >>> frames.shape, sequences.classes[label]
    (torch.Size([4, 2, 28, 28]), 'Ankle boot')
    """
    roll = 0  # largest random shift in pixels for training, see `SequenceTransform`

    def _identify_source(self, digest: Any) -> None:
        digest.update(self.source.fingerprint().encode())

    def filenames(self, basename: bool = False, absolute: bool = False) -> List[str]:
        """Return the names of all sequences, as timm's inference.py requires."""
        return [self.filename(i) for i in range(len(self))]

    def _decode(self, i: int) -> Tensor:
        return torch.from_numpy(self.source.frames(int(self._indices[i])).astype(np.float32))

    def _create_loader(self, config: Dict[str, Any], batch_size: int, use_prefetcher: bool, **options: Any):
        """Create a loader of batches (frames `[B, T, 2, H, W]`, labels `[B]`) with the function `create_loader`."""
        # without timm's prefetcher, which supports only 8-bit images
        loader = create_loader(self, batch_size=batch_size, use_prefetcher=False, **{**config, **options})
        return _DeviceLoader(loader, options['device'])


class _DeviceLoader:
    """A loader whose batches are moved to a device."""

    def __init__(self, loader: Any, device: Union[str, torch.device]):
        self.loader = loader
        self.device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[List[Tensor]]:
        for batch in self.loader:
            yield [x.to(self.device, non_blocking=True) for x in batch]


def create_loader(dataset: EventSequences, *args: Any, **kwargs: Any):
    """Create a loader of event sequences with the arguments of `timm.data.create_loader`.

    Frames are resized to `input_size` and normalized by `mean` and `std`. Augmentation is that of `SequenceTransform`:
    `hflip` and `vflip` are the probabilities of flips, `re_prob` is the probability of erasing a square, and
    `dataset.roll` is the largest shift. Crops and color jitter, which train.py requests by default, are not applied.

    Args:
        dataset: Event sequences.
        args: Positional arguments of `timm.data.create_loader` after the dataset.
        kwargs: Keyword arguments of `timm.data.create_loader`.

    Without training, `use_prefetcher` only moves batches to `device`, because timm's prefetcher supports only 8-bit
    images. Scripts without the option `--no-prefetcher`, such as inference.py, therefore work.

    Raises:
        ValueError: `use_prefetcher` is set for training; an augmentation without a counterpart for event sequences is
            requested; or `input_size`, `mean` or `std` does not have 2 channels, or a std is not positive.
    """
    bound = inspect.signature(timm.data.loader.create_loader).bind(dataset, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given['use_prefetcher'] and given['is_training']:
        raise ValueError(
            "timm's prefetcher supports only 8-bit images, not event sequences. Add --no-prefetcher (in a YAML file: "
            'no_prefetcher: true).')
    for name in _IMAGE_ONLY_ARGUMENTS:
        if given[name]:
            raise ValueError(
                f'{name}={given[name]!r} applies only to images. Remove it. The augmentations of event sequences are '
                f'hflip, vflip, reprob, mixup, cutmix, and the option roll in the name of the dataset.')
    channels, *size = given['input_size']
    if channels != 2:
        raise ValueError(
            f'Event frames have 2 channels, one per polarity, but the model has {channels} input channels. Create it '
            f'with in_chans=2 (timm scripts: --in-chans 2).')
    for name in ('mean', 'std'):
        if len(given[name]) != channels:
            raise ValueError(
                f'{name} must have one value per polarity, got {given[name]}. To keep the event counts unchanged, use '
                f'mean 0 and std 1 (timm scripts: --mean 0 0 --std 1 1).')
    if not min(given['std']) > 0.:
        raise ValueError(f'std must be greater than 0, got {given["std"]}.')
    given['collate_fn'] = given['collate_fn'] or collate
    device = given['device'] if given['use_prefetcher'] else None
    given['use_prefetcher'] = False
    loader = timm.data.loader.create_loader(*bound.args, **bound.kwargs)
    augmentation = None
    if given['is_training'] and not given['no_aug']:
        augmentation = SequenceTransform(given['hflip'], given['vflip'], dataset.roll, given['re_prob'])
    dataset.transform = _Preprocessing(tuple(size), given['mean'], given['std'], augmentation)
    return loader if device is None else _DeviceLoader(loader, device)
