"""Convert Fashion-MNIST from its original IDX files to parquet: the slice that the package ships, or all images.

    python make_slice.py DIR [--output .]
    python make_slice.py DIR --full --output OUTPUT

DIR contains `{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz`. The slice consists of the first 600 training images and
the first 100 test images of each class, in their original order. Every run writes the same bytes.
"""
import argparse
import gzip
from pathlib import Path
from typing import Optional

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

CLASSES = [
    'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
]
FILES = [f'{split}-{kind}-ubyte.gz' for split in ('train', 't10k') for kind in ('images-idx3', 'labels-idx1')]


def read_split(folder: Path, name: str, num_per_class: Optional[int]) -> Dataset:
    with gzip.open(folder / f'{name}-images-idx3-ubyte.gz') as f:
        images = np.frombuffer(f.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f'{name}-labels-idx1-ubyte.gz') as f:
        labels = np.frombuffer(f.read(), np.uint8, offset=8)
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:num_per_class] for c in range(len(CLASSES))]))
    return Dataset.from_dict(
        {'image': [PILImage.fromarray(images[i]) for i in chosen], 'label': labels[chosen].tolist()},
        features=Features({'image': Image(), 'label': ClassLabel(names=CLASSES)}),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='folder of the IDX files')
    parser.add_argument('--full', action='store_true', help='all 70,000 images instead of the slice')
    parser.add_argument('--output', type=Path, help='folder to write (default without --full: that of this file)')
    args = parser.parse_args()
    if args.full and args.output is None:
        parser.error('--full requires --output, so that the slice in the package is not replaced.')
    args.output = args.output or Path(__file__).parent
    missing = [name for name in FILES if not (args.folder / name).is_file()]
    if missing:
        parser.error(f'{args.folder} lacks {", ".join(missing)}.')
    for name, source, num_per_class in (('train', 'train', 600), ('test', 't10k', 100)):
        split = read_split(args.folder, source, None if args.full else num_per_class)
        args.output.mkdir(parents=True, exist_ok=True)
        path = args.output / f'{name}.parquet'
        split.to_parquet(path.with_suffix('.partial'))
        path.with_suffix('.partial').replace(path)
        print(f'{name}: {len(split)} images')


if __name__ == '__main__':
    main()
