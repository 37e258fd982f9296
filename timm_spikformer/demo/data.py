"""Images for the demo: a folder of one's own or the shipped Fashion-MNIST, presented by timm's data pipeline."""
import copy
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

import datasets
import timm
import torch
from timm.data import ImageDataset, create_dataset, create_loader, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..pretrained import cfg_to_train

FASHION_MNIST = Path(__file__).parents[1] / 'assets' / 'fashion_mnist'
DATA_KEYS = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct')  # of timm's data config
_TEST_SPLITS = ('test', 'validation')
_HELD_OUT = 0.1  # share of the training images that is tested on where a dataset has no test split


class Data(NamedTuple):
    """Training and test images, the names of their classes, and how they are presented to the model."""
    train: ImageDataset
    test: ImageDataset
    classes: List[str]
    config: Dict[str, Any]  # timm's data config: input_size, mean, std, interpolation, crop_pct


def _split_names(folder: Path, expected: str) -> List[str]:
    if not folder.is_dir():
        raise ValueError(f'{folder} is not a folder. {expected}')
    try:
        return datasets.get_dataset_split_names(str(folder))
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as e:
        raise ValueError(f'{folder} holds no images. {expected}') from e


def _load_split(folder: Path, split: str, expected: str) -> datasets.Dataset:
    dataset = datasets.load_dataset(str(folder), split=split)
    if not isinstance(dataset.features.get('image'), datasets.Image):
        raise ValueError(f'{folder} has the columns {", ".join(dataset.features) or "none"}. {expected}')
    return dataset


def load_data(folder: Optional[Path], model: str, seed: int = 0) -> Data:
    """Read a folder of images or parquet files, by default the shipped Fashion-MNIST.

    Args:
        folder: `DIR/{train,test}/CLASS/*.png`, `DIR/CLASS/*.png`, or parquet files with columns `image` and `label`.
            Where there is no test split, a tenth of the images of each class is held out.
        model: Name of the model whose input size, mean and standard deviation to take for a folder of one's own.
        seed: Chooses the images that are held out.

    Raises:
        ValueError: The folder does not exist, holds no images, no labels or less than two classes.
    """
    if folder is None:
        folder = FASHION_MNIST
        cfg = timm.get_pretrained_cfg('spikformer_v2_2_64_patch4_32.fashion_mnist')
    else:
        cfg = cfg_to_train(model)
    config = {key: getattr(cfg, key) for key in DATA_KEYS}
    expected = 'Expected DIR/{train,test}/CLASS/*.png, or parquet files with columns image and label.'
    splits = _split_names(folder, expected)
    test_split = next((s for s in _TEST_SPLITS if s in splits), None)
    if 'train' not in splits:
        raise ValueError(f'{folder} has no training split, only {", ".join(splits)}. {expected}')

    dataset = _load_split(folder, 'train', expected)
    columns = dataset.features
    # datasets gives no labels where all images lie in one folder
    labels = set(dataset['label']) if 'label' in columns else set()
    if len(labels) < 2:
        raise ValueError(f'{folder} has images of one class only, or no labels; 2 or more are needed. {expected}')
    has_names = isinstance(columns['label'], datasets.ClassLabel)
    if not has_names and not all(isinstance(label, int) for label in labels):
        raise ValueError(f'{folder} has labels such as {min(labels)!r}, expected integers or a ClassLabel. {expected}')
    classes = columns['label'].names if has_names else [str(i) for i in range(max(labels) + 1)]

    def read(split: str) -> ImageDataset:
        return create_dataset(f'hfds/{folder}', root=None, split=split)

    train = read('train')
    if test_split:
        test = read(test_split)
    else:
        test = read('train')
        stratify_by = 'label' if has_names else None
        parts = train.reader.dataset.train_test_split(_HELD_OUT, seed=seed, stratify_by_column=stratify_by)
        train.reader.dataset, test.reader.dataset = parts['train'], parts['test']
    return Data(train, test, classes, config)


class _Images(Dataset):
    """Images, presented, and their labels where there are some."""

    def __init__(self, source: datasets.Dataset, config: Dict[str, Any]):
        self.source = source
        self.mode = 'L' if config['input_size'][0] == 1 else 'RGB'
        self.transform = create_transform(**config, is_training=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Union[Tensor, Tuple[Tensor, int]]:
        row = self.source[i]
        x = self.transform(row['image'].convert(self.mode))
        return (x, row['label']) if isinstance(row.get('label'), int) else x


class TestImages(NamedTuple):
    """Images to look at what a model does with them; `num_classes` is None where they have no labels."""
    loader: DataLoader
    name: str
    num_classes: Optional[int]


def load_test_images(
        folder: Optional[Path],
        config: Dict[str, Any],
        count: Optional[int] = None,
        batch_size: int = 64,
) -> TestImages:
    """The test images of a folder, else its validation images, else those that it has; they need no labels.

    Args:
        folder: As of `load_data`; by default the shipped Fashion-MNIST.
        config: timm's data config: input_size, mean, std, interpolation, crop_pct.
        count: How many to take, evenly spread over all; by default all.
        batch_size: Images in a batch.

    Raises:
        ValueError: The folder does not exist, or holds no images.
    """
    name = 'Fashion-MNIST' if folder is None else folder.name
    folder = FASHION_MNIST if folder is None else folder
    expected = 'Expected DIR/{train,test}/CLASS/*.png, DIR/*.png, or parquet files with a column image.'
    splits = _split_names(folder, expected)
    split = next((s for s in _TEST_SPLITS if s in splits), splits[0])
    source = _load_split(folder, split, expected)
    label = source.features.get('label')
    num_classes = None
    if isinstance(label, datasets.ClassLabel):
        num_classes = label.num_classes
    elif isinstance(label, datasets.Value) and 'int' in label.dtype:
        num_classes = max(source['label'], default=-1) + 1
    if count is not None and count < len(source):
        source = source.select(torch.linspace(0, len(source) - 1, count).long().tolist())
    loader = DataLoader(_Images(source, config), batch_size)
    return TestImages(loader, f'{len(source):,} images of {name}, {split} split', num_classes)


def take(dataset: ImageDataset, count: int, seed: int) -> ImageDataset:
    """As many images, of each class its share, and the same for the same seed; all, where there are not more."""
    source = dataset.reader.dataset
    if count >= len(source):
        return dataset
    stratify_by = 'label' if isinstance(source.features['label'], datasets.ClassLabel) else None
    part = copy.copy(dataset)
    part.reader = copy.copy(dataset.reader)
    part.reader.dataset = source.train_test_split(train_size=count, seed=seed, stratify_by_column=stratify_by)['train']
    return part


def make_loader(data: Data, batch_size: int, device: torch.device, is_training: bool, augment: bool = False):
    return create_loader(
        data.train if is_training else data.test,
        batch_size=batch_size,
        is_training=augment,
        hflip=0.5,
        scale=(1., 1.),
        ratio=(1., 1.),
        color_jitter=0.,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=device.type == 'cuda',
        device=device,
        **data.config,
    )


def check_batch(x: Tensor) -> None:
    if not torch.isfinite(x).all():
        raise ValueError('An image holds values that are not finite (NaN or infinity), expected pixels of 0 to 255.')
