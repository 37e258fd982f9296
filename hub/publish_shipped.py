"""Publish the weights that are included in the package, one Hub repository per model.

    python hub/publish_shipped.py ORG [--data DIR] [--dry-run] [--output DIR]
"""
import argparse
from pathlib import Path

import timm
import yaml

import timm_spikformer
from timm_spikformer.publishing import publish
from timm_spikformer.publishing.card import Dataset
from timm_spikformer.reading import TrainingRecord, checkpoint_from_model, set_labels

ROOT = Path(__file__).parents[1]
# By name of the dataset, which is part of the tag of the weights and the folder under --data: the dataset, and the
# license of the weights
PUBLISHED_DATASETS = {
    'fashion_mnist': (Dataset('zalando-datasets/fashion_mnist', 'Fashion-MNIST', 'test'), 'mit'),
    'cifar10': (Dataset('uoft-cs/cifar10', 'CIFAR-10 (JPEG copies of the images)', 'test'), 'apache-2.0'),
}


def publish_weights(name: str, organization: str, data: Path, output: Path, dry_run: bool) -> str:
    """Publish included weights, `MODEL.TAG`, and return the URL of the repository, or the folder in a dry run."""
    cfg = timm.get_pretrained_cfg(name)
    training = yaml.safe_load(Path(cfg.file).with_suffix('.yaml').read_text(encoding='utf-8'))
    training.pop('test_accuracy', None)  # the card has the accuracy that is measured now
    folder = next((key for key in PUBLISHED_DATASETS if key in cfg.tag), None)
    if folder is None:
        raise ValueError(f'No dataset is known for the tag {cfg.tag!r}. Add it to PUBLISHED_DATASETS.')
    dataset, license = PUBLISHED_DATASETS[folder]
    if cfg.num_classes:
        model, evaluation = timm.create_model(name, pretrained=True), dict(eval_data=data / folder, dataset=dataset)
    else:
        model, evaluation = timm_spikformer.SpikformerMAE.from_pretrained(name), dict(train_datasets=[dataset.id])
    checkpoint = checkpoint_from_model(model)
    if cfg.num_classes:
        set_labels(checkpoint, cfg.label_names)
    checkpoint.training = TrainingRecord(training.pop('command'), training)
    published = publish(
        checkpoint, f'{organization}/{name}', license, output=output / name, dry_run=dry_run, **evaluation)
    return published.url or str(published.folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('organization')
    parser.add_argument(
        '--data', type=Path, default=ROOT / 'reproduction' / 'data', metavar='DIR',
        help='folder with the test images, in the layout of the study (default: reproduction/data)')
    parser.add_argument('--dry-run', action='store_true', help='write the folders only')
    parser.add_argument('--output', type=Path, default='output/hub', metavar='DIR', help='(default: %(default)s)')
    args = parser.parse_args()
    for name in timm.list_pretrained('*spikformer*'):
        if timm.get_pretrained_cfg(name).file:
            print(publish_weights(name, args.organization, args.data, args.output, args.dry_run))


if __name__ == '__main__':
    main()
