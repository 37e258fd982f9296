"""Image datasets: image folders, parquet files, and the subset of Fashion-MNIST that is shipped with the package.

timm's folder reader finds and numbers the classes of an image folder, so that class indices match timm's train.py.
Pillow decodes the images; an image that cannot be decoded raises an error that names the file.
"""
import copy
import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterable, Optional, Protocol, Sequence, Tuple, Union

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_loader, get_img_extensions, resolve_data_config
from timm.utils import natural_key
from torch import Tensor, nn
from torch.utils.data import Dataset

from ._timm import find_images_and_targets
from .arguments import check_integer, check_number
from .class_names import check_class_names
from .layouts import SPLITS, find_class_folders, find_parquet_files
from .pretrained import get_training_cfg

__all__ = [
    'DATA_KEYS', 'FASHION_MNIST', 'SHIPPED_MODEL', 'ImageSource', 'Images', 'data_config', 'make_loader',
    'match_classes', 'read_splits', 'select_profiling_split', 'select_train_test', 'to_pixels', 'training_data_config',
]

PathLike = Union[str, 'os.PathLike[str]']

DATA_KEYS = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')  # keys of timm's data config
# Its data config fits the shipped images too, because it was trained on the dataset of which they are a part
SHIPPED_MODEL = 'spikformer_v2_2_64_patch4_32.fashion_mnist'
FASHION_MNIST = Path(__file__).parent / 'assets' / 'fashion_mnist'

_LABELED_LAYOUTS = 'DIR/{train,test}/CLASS/*.png, DIR/CLASS/*.png, parquet files with columns image and label'
_EXPECTED = f'Expected one of: {_LABELED_LAYOUTS}.'
_EXPECTED_ANY = f'Expected one of: {_LABELED_LAYOUTS}, DIR/*.png without labels.'


def data_config(model: nn.Module, **overrides: Any) -> Dict[str, Any]:
    """Return timm's data config of a model: the values of `DATA_KEYS`.

    If `mean` or `std` does not have one value per input channel, its average is used for all channels. Models with 2
    input channels (event polarities) get mean 0 and std 1.

    Args:
        model: A timm model.
        overrides: Replacements of the model's values, named like the arguments of timm's train.py.
    """
    config = resolve_data_config(overrides, model=model)
    channels = config['input_size'][0] if overrides.get('input_size') else getattr(model, 'in_chans', None)
    channels = channels or config['input_size'][0]
    config['input_size'] = (channels, *config['input_size'][1:])
    for key, value_for_events in (('mean', 0.), ('std', 1.)):
        if len(config[key]) != channels:
            value = value_for_events if channels == 2 else sum(config[key]) / len(config[key])
            config[key] = (value,) * channels
    return {key: config[key] for key in DATA_KEYS}


def training_data_config(model: Optional[str] = None) -> Dict[str, Any]:
    """Return timm's data config for training a registered model, or that of the shipped images if there is no name."""
    cfg = timm.get_pretrained_cfg(SHIPPED_MODEL) if model is None else get_training_cfg(model)
    return {key: getattr(cfg, key) for key in DATA_KEYS}


class ImageSource(Protocol):
    """Source of encoded images, such as the files of a folder.

    >>> source = read_splits()['test'].source
    >>> len(source), decode(source.open(0), 'L').size
    (1000, (28, 28))
    """

    @property
    def files(self) -> Iterable[PathLike]:
        """Paths of all files."""

    def __len__(self) -> int:
        """Return the number of images."""

    def name(self, i: int) -> str:
        """Return the location of an image as text."""

    def open(self, i: int) -> BinaryIO:
        """Return a binary file with an encoded image."""


class _FileSource:
    """Encoded images, one per file."""

    def __init__(self, files: Sequence[str]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return self.files[i]

    def open(self, i: int) -> BinaryIO:
        return open(self.files[i], 'rb')


class Images(Dataset):
    """Images of one split, and their labels.

    An item is a pair (image, label), or only the image if there are no labels. The image is a PIL image unless
    `transform` is set; `make_loader` sets it on a copy.

    Args:
        source: Source of the encoded images.
        labels: Class indices `[N]`, or None if there are no labels.
        classes: Class names in the order of the class indices, or None if the dataset does not name its classes.
        name: Display name of the dataset.
        split: 'train', 'test', 'validation', 'all' if the dataset has no splits, or the name that `hold_out` gives to
            held-out images, such as 'held-out 10% of train'.
        indices: Indices `[N]` into `source` of the images of this dataset; by default, all of them.

    >>> images = read_splits()['test']
    >>> images.description, len(images.sample_evenly(10))
    ('1,000 images of Fashion-MNIST, test split', 10)
    >>> image, label = images[0]
    >>> image.size, images.classes[label]
    ((28, 28), 'Ankle boot')
    """

    def __init__(
            self,
            source: ImageSource,
            labels: Optional[np.ndarray],
            classes: Optional[Sequence[str]],
            name: str,
            split: str,
            indices: Optional[np.ndarray] = None,
    ):
        self.source = source
        self.classes = None if classes is None else list(classes)
        self.name = name
        self.split = split
        self.mode = 'RGB'
        self.transform = None  # set by timm's create_loader
        self._indices = np.arange(len(source)) if indices is None else indices
        self.labels = labels

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Union[Any, Tuple[Any, int]]:
        image = self._decode(i)
        image = image if self.transform is None else self.transform(image)
        return image if self.labels is None else (image, int(self.labels[i]))

    def _decode(self, i: int) -> Image.Image:
        index = int(self._indices[i])
        try:
            with self.source.open(index) as stream:
                return decode(stream, self.mode)
        except (OSError, ValueError) as e:
            raise ValueError(f'{self.source.name(index)} cannot be read: {e}') from e

    @property
    def description(self) -> str:
        """Display text with the number of images, the dataset and the split."""
        count = f'{len(self):,} image{"" if len(self) == 1 else "s"} of {self.name}'
        if self.split == 'all':
            return count
        return f'{count}, {self.split}' + (' split' if self.split in SPLITS.values() else '')

    def filename(self, i: int) -> str:
        """Return the path of an image, or the file and the row of an image in a parquet file."""
        return self.source.name(int(self._indices[i]))

    def fingerprint(self) -> str:
        """Return the SHA-256 of the names and sizes of the source files, and of the labels and indices of images.

        No image is read, so a changed file of the same size is not detected; see `digest`.
        """
        digest = hashlib.sha256()
        self._identify_source(digest)
        for values in (self._indices, self.labels):
            digest.update(b'' if values is None else values.astype('<i8').tobytes())
        return digest.hexdigest()

    def _identify_source(self, digest: Any) -> None:
        """Update a hash with what identifies the source."""
        for path in self.source.files:
            digest.update(os.fsencode(f'{os.path.basename(path)} {os.path.getsize(path)}\n'))

    def select(self, indices: Any, split: Optional[str] = None) -> 'Images':
        """Return the subset of the images at `indices`, with its split renamed to `split` if given."""
        indices = np.asarray(indices, dtype=np.int64)
        selected = copy.copy(self)
        selected.labels = None if self.labels is None else self.labels[indices]
        selected.split = self.split if split is None else split
        selected._indices = self._indices[indices]
        return selected

    def sample_evenly(self, count: int) -> 'Images':
        """Return at most `count` images, evenly spaced.

        Raises:
            ValueError: `count` is negative or not an integer.
        """
        check_integer('count', count, 0)
        return self if count >= len(self) else self.select(np.linspace(0, len(self) - 1, count).round())

    def sample_stratified(self, count: int, seed: int) -> 'Images':
        """Return at most `count` images, sampled randomly (`seed`) from each class in proportion to its size.

        Raises:
            ValueError: `count` or `seed` is negative or not an integer, or there are no labels.
        """
        check_integer('count', count, 0)
        if count >= len(self):
            return self
        order, rank, sizes = self._rank_within_class(seed)
        share = (rank + 0.5) / sizes[self.labels[order]]  # fraction of the class up to this image
        return self.select(np.sort(order[np.argsort(share, kind='stable')[:count]]))

    def hold_out(self, seed: int, fraction: float = 0.1) -> Tuple['Images', 'Images']:
        """Split into training images and a held-out fraction of each class for testing.

        A class with a single image is used for training only.

        Args:
            seed: Random seed for choosing the images.
            fraction: Fraction of each class to hold out, greater than 0 and less than 1; rounded, so that at least one
                image of each class is held out and one is not.

        Raises:
            ValueError: Every class has only one image, there are no labels, or an argument is out of its range.
        """
        check_number('fraction', fraction, above=0, below=1)
        order, rank, sizes = self._rank_within_class(seed)
        held_out = np.where(sizes < 2, 0, np.clip(np.floor(fraction * sizes + 0.5), 1, np.maximum(1, sizes - 1)))
        is_test = rank < held_out[self.labels[order]]
        if not is_test.any():
            raise ValueError(f'{self.description}: no class has 2 images, so no test images can be held out.')
        split = f'held-out {100 * fraction:.3g}%'
        split = split if self.split == 'all' else f'{split} of {self.split}'
        return self.select(np.sort(order[~is_test])), self.select(np.sort(order[is_test]), split)

    def digest(self) -> str:
        """Return the SHA-256 of the pixels and labels of the images, in order. All images are decoded.

        Raises:
            ValueError: There are no labels, or an image is damaged.
        """
        self._check_labels()
        total = hashlib.sha256()
        for i, label in zip(self._indices, self.labels):
            with self.source.open(int(i)) as stream:
                pixels = np.asarray(decode(stream, 'RGB'))
            total.update(f'{pixels.shape} {label} '.encode() + pixels.tobytes())
        return total.hexdigest()

    def _create_loader(
            self,
            config: Dict[str, Any],
            batch_size: int,
            use_prefetcher: bool,
            **options: Any,
    ) -> Iterable[Any]:
        """Create a timm data loader, see `make_loader`. This sets `mode` and `transform`, so it is called on a copy."""
        channels = config['input_size'][0]
        modes = {1: 'L', 3: 'RGB'}
        if channels not in modes:
            raise ValueError(f'The model has {channels} input channels, but images have 1 or 3.')
        self.mode = modes[channels]
        return create_loader(self, batch_size=batch_size, use_prefetcher=use_prefetcher, **{**config, **options})

    def _check_labels(self) -> None:
        if self.labels is None:
            raise ValueError(f'{self.description}: there are no labels.')

    def _rank_within_class(self, seed: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return shuffled indices `[N]`, the rank of each one within its class `[N]`, and the class sizes `[K]`.

        The rank of an image is the number of images of its class before it in the shuffled order.
        """
        self._check_labels()
        check_integer('seed', seed, 0)
        order = np.random.default_rng(seed).permutation(len(self))
        sizes = np.bincount(self.labels)
        by_class = np.argsort(self.labels[order], kind='stable')
        rank = np.empty(len(self), dtype=np.int64)
        first = np.cumsum(sizes) - sizes  # position in `by_class` of the first image of each class
        rank[by_class] = np.arange(len(self)) - np.repeat(first, sizes)
        return order, rank, sizes


def decode(stream: BinaryIO, mode: str) -> Image.Image:
    """Decode an image to 8 bits per channel, and apply its EXIF orientation.

    Args:
        stream: Binary file.
        mode: Pillow mode of the returned image, 'RGB' or 'L'. An alpha channel is dropped, as in timm.

    Raises:
        ValueError: The file is not an image, is damaged, or has 32-bit pixels, whose range of values is unknown.
    """
    try:
        with Image.open(stream) as image:
            image.load()
            file_format = image.format  # Pillow reads 16-bit PGM files as 32-bit integers from 0 to 65535
            image = ImageOps.exif_transpose(image)
            is_16_bit = image.mode.startswith('I;16') or (image.mode == 'I' and file_format == 'PPM')
            if is_16_bit:
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ('I', 'F'):
                kind = '32-bit integers' if image.mode == 'I' else 'floating-point numbers'
                raise ValueError(f'its pixels are {kind}, expected 8 or 16 bits per channel. Convert it first.')
            return image.convert(mode)
    except Exception as e:  # Pillow raises errors of many types for damaged files
        raise ValueError(str(e) or type(e).__name__) from e


def read_splits(folder: Optional[PathLike] = None, labels: bool = True) -> Dict[str, Images]:
    """Read a dataset from an image folder or parquet files.

    The supported layouts are:

    - `DIR/SPLIT/CLASS/*`, where SPLIT is train, test, validation or val. A folder with one of these names is a split
      only if it contains class folders and no images itself; otherwise it is a class folder.
    - `DIR/CLASS/*`.
    - `DIR/*`, without labels, if `labels` is False.
    - `DIR/SPLIT.parquet`, `DIR/SPLIT-00000-of-00002.parquet`, the same in `DIR/data`, or parquet files with other
      names, which together form one dataset without splits. The columns are `image` (encoded bytes, a path, or both in
      the format of the `datasets` library) and `label` (integers, or a ClassLabel of `datasets`). If there are parquet
      files, image folders next to them are ignored, because they may contain the images that the paths refer to.

    Symbolic links are followed. Image files are recognized by the extensions that timm reads. timm's reader numbers
    class folders in natural sort order; all splits use the class indices of the training split.

    Args:
        folder: Folder to read; by default the shipped Fashion-MNIST.
        labels: Whether labels are required.

    Returns:
        The images by split: 'train', 'test' and 'validation', or only 'all' for a dataset without splits.

    Raises:
        ValueError: The folder has none of these layouts; the message states what was found and what was expected.
    """
    expected = _EXPECTED if labels else _EXPECTED_ANY
    name = 'Fashion-MNIST' if folder is None else os.path.basename(os.path.abspath(folder)) or os.fspath(folder)
    root = FASHION_MNIST if folder is None else Path(folder)
    if not root.is_dir():
        raise ValueError(f'{root} is not a folder. {expected}')
    files = find_parquet_files(root, expected)
    folders = {} if files else find_class_folders(root, expected)
    if not files and not folders:
        extensions = ', '.join(get_img_extensions())
        raise ValueError(f'{root} contains no images ({extensions}) in the expected places. {expected}')
    if files:
        from .parquet import read_parquet
        splits = {split: Images(*read_parquet(paths, expected), name, split) for split, paths in files.items()}
    else:
        splits = {split: _read_folder(path, name, split, expected) for split, path in folders.items()}
    for split, images in splits.items():
        if labels and images.labels is None:
            raise ValueError(f'{root} has no labels. {expected}')
        check_class_names(images.classes, f'{root}: the split {split}')
    train = splits.get('train')
    if train is not None and train.labels is not None and train.classes is not None:
        for split, images in splits.items():
            if images.labels is not None:
                try:
                    splits[split] = match_classes(images, train.classes, len(train.classes), 'the training split')
                except ValueError as e:
                    raise ValueError(f'{root}: the splits train and {split} have different classes. {e}') from e
    return splits


def _read_folder(folder: Path, name: str, split: str, expected: str) -> Images:
    """Read `folder/CLASS/*`, or `folder/*` without labels."""
    try:
        samples, class_to_idx = find_images_and_targets(str(folder))
    except ValueError as e:
        raise ValueError(
            f'{folder} contains a folder or file name with digits that timm cannot convert to a number, which it does '
            f'to sort the names: {e}. Rename it.') from e
    paths = [path for path, _ in samples]
    depths = [path.removeprefix(str(folder)).strip(os.sep).count(os.sep) for path in paths]
    if max(depths) == 0:
        return Images(_FileSource(paths), None, None, name, split)
    for path, depth in zip(paths, depths):
        if depth != 1:
            place = 'not in a class folder' if depth < 1 else 'in a subfolder of a class folder'
            raise ValueError(f'{path} is {place}. {expected}')
    classes = list(class_to_idx)
    for a, b in zip(classes, classes[1:]):
        if natural_key(a) == natural_key(b):  # timm's sort key does not define their order
            a, b = sorted((a, b))
            raise ValueError(
                f'The class folders {a!r} and {b!r} in {folder} have no defined order, because timm ignores case and '
                f'leading zeros. Rename one of them.')
    return Images(_FileSource(paths), np.array([label for _, label in samples]), classes, name, split)


def select_train_test(splits: Dict[str, Images], seed: int = 0) -> Tuple[Images, Images]:
    """Return training images and test images.

    The test images come from the test split if there is one, else from the validation split; else 10% of each class are
    held out.

    Args:
        splits: Return value of `read_splits`.
        seed: Random seed for choosing the held-out images.

    Raises:
        ValueError: There is no training split, there are no labels or fewer than two classes, labels without class
            names are not consecutive, or the test images have different classes.
    """
    train = splits.get('train', splits.get('all'))
    if train is None:
        raise ValueError(f'The dataset has no training split; it has: {", ".join(splits)}. {_EXPECTED}')
    test = splits.get('test', splits.get('validation'))
    train._check_labels()
    if test is not None:
        test._check_labels()
    present = np.unique(train.labels)
    if len(present) < 2:
        raise ValueError(
            f'{train.description}: all training images have the same class; at least 2 classes are required. '
            f'{_EXPECTED}')
    if train.classes is None:
        train = _name_classes(train, present, test)
    if test is None:
        return train.hold_out(seed)
    if test.classes is None:
        _check_range(test, len(train.classes))
        test = copy.copy(test)
        test.classes = train.classes
    return train, test


def _name_classes(train: Images, present: np.ndarray, test: Optional[Images]) -> Images:
    """Return a copy of training images with class names: those of the test images, or else the class indices.

    Args:
        train: Training images without class names.
        present: Sorted class indices that occur in them.
        test: Test images, if there are any.

    Raises:
        ValueError: The class indices are not consecutive, or the test images have another number of classes.
    """
    if len(present) != present[-1] + 1:
        raise ValueError(
            f'{train.description}: the labels are {len(present)} different integers from {present[0]} to '
            f'{present[-1]}. Expected 0 to K - 1 for K classes, each at least once.')
    train = copy.copy(train)
    train.classes = [str(i) for i in present] if test is None or test.classes is None else test.classes
    if len(train.classes) != len(present):
        raise ValueError(
            f'{train.description}: there are {len(present)} classes without names, but {test.description} has '
            f'{len(train.classes)} classes: {_shorten(train.classes)}. Both must have the same classes.')
    return train


def select_profiling_split(splits: Dict[str, Images]) -> Images:
    """Return images to profile a model on, from the first available split of: test, validation, train, all."""
    return next(splits[split] for split in ('test', 'validation', 'train', 'all') if split in splits)


def _check_range(images: Images, num_classes: int) -> None:
    if images.labels.max() >= num_classes:
        raise ValueError(
            f'{images.description}: there is a label {images.labels.max()}, expected 0 to {num_classes - 1}.')


def match_classes(
        images: Images,
        names: Optional[Sequence[str]],
        num_classes: int,
        owner: str = 'the model',
) -> Images:
    """Map the labels of images to the class indices of a model, by class name.

    If the model or the dataset has no class names, the classes are assumed to be in the same order. Then only the
    number of classes is checked, or, if the dataset has no class names, that the model has a class for each label.

    Args:
        images: Images with labels.
        names: Class names of the model in order, or None if it has none.
        num_classes: Number of classes of the model.
        owner: What has these classes, for messages.

    Raises:
        ValueError: The images have no labels, or have classes that the model does not have.
    """
    images._check_labels()
    check_class_names(names, 'The model')
    if images.classes is None:
        _check_range(images, num_classes)
        return images
    if names is None:
        if len(images.classes) != num_classes:
            raise ValueError(
                f'{images.description}: there are {len(images.classes)} classes, but the model has {num_classes}.')
        return images
    index = {name: i for i, name in enumerate(names)}
    unknown = [name for name in images.classes if name not in index]
    if unknown:
        raise ValueError(
            f'{images.description}: {unknown[0]!r} is not a class of {owner}, whose classes are {_shorten(names)}.')
    matched = copy.copy(images)
    matched.labels = np.array([index[name] for name in images.classes])[images.labels]
    matched.classes = list(names)
    return matched


def _shorten(names: Sequence[str]) -> str:
    shown = ', '.join(repr(name) for name in names[:5])
    return f'{shown} and {len(names) - 5} more' if len(names) > 5 else shown


_NO_AUGMENTATION = dict(scale=(1., 1.), ratio=(1., 1.), color_jitter=0.)  # arguments of timm's create_loader


def make_loader(
        images: Images,
        config: Dict[str, Any],
        batch_size: int,
        device: Union[str, torch.device] = 'cpu',
        augment: bool = False,
        hflip: float = 0.5,
        num_workers: int = 0,
        **augmentation: Any,
) -> Iterable[Any]:
    """Create a timm data loader for images or event sequences.

    Args:
        images: Images or event sequences to load.
        config: timm's data config, see `data_config`.
        batch_size: Number of images per batch.
        device: Device of the model. Batches with labels are moved to it.
        augment: Load for training: shuffle, flip at random, and drop the last batch if it is incomplete.
        hflip: Probability of a horizontal flip if `augment` is True.
        num_workers: Number of processes that load images; with 0, the calling process loads them.
        augmentation: Further arguments of timm's `create_loader`; by default images are not
            jittered, and are cropped to the central square if they are not square.

    Returns:
        A loader of pairs (images `[B, C, H, W]` or sequences `[B, T, 2, H, W]`, labels `[B]`), or of images only if
        there are no labels.

    Raises:
        ValueError: The number of input channels in `config` is not 1 or 3, or not 2 for event sequences.
    """
    device = torch.device(device)
    return copy.copy(images)._create_loader(
        config,
        batch_size,
        use_prefetcher=device.type != 'cpu' and images.labels is not None,
        device=device,
        is_training=augment,
        hflip=hflip,
        num_workers=num_workers,
        persistent_workers=False,
        **{**_NO_AUGMENTATION, **augmentation},
    )


def to_pixels(x: Tensor, config: Dict[str, Any]) -> Tensor:
    """Undo the normalization of images `[..., C, H, W]`, and return pixels in the range 0 to 1."""
    mean, std = (torch.tensor(config[key], device=x.device).view(-1, 1, 1) for key in ('mean', 'std'))
    return x * std + mean
