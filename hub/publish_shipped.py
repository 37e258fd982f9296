"""Publish the weights that are included in the package, one Hub repository per model.

    python hub/publish_shipped.py ORG [--dry-run] [--output DIR]
"""
import argparse
from pathlib import Path

import timm
import yaml

import timm_spikformer  # noqa: F401  registers the models
from timm_spikformer.images import FASHION_MNIST
from timm_spikformer.publishing import publish
from timm_spikformer.publishing.card import Dataset
from timm_spikformer.reading import TrainingRecord, checkpoint_from_model, set_labels

# Evaluation data, its description, and the license of the weights (that of Fashion-MNIST)
_SUBSET = Dataset('zalando-datasets/fashion_mnist', 'Fashion-MNIST (1,000 of the 10,000 test images)', 'test')
EVAL_DATA = {
    'spikformer_v2_2_64_patch4_32.fashion_mnist': (FASHION_MNIST, _SUBSET, 'mit'),
    'spikformer_v2_2_64_patch4_32.fashion_mnist_t4': (FASHION_MNIST, _SUBSET, 'mit'),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('organization')
    parser.add_argument('--dry-run', action='store_true', help='write the folders only')
    parser.add_argument('--output', default='output/hub', metavar='DIR', help='(default: %(default)s)')
    args = parser.parse_args()
    for name, (data, dataset, license) in EVAL_DATA.items():
        model = timm.create_model(name, pretrained=True)
        checkpoint = checkpoint_from_model(model)
        set_labels(checkpoint, model.pretrained_cfg['label_names'])
        training = yaml.safe_load(Path(model.pretrained_cfg['file']).with_suffix('.yaml').read_text())
        training.pop('test_accuracy', None)  # the card has the one that is measured now
        checkpoint.training = TrainingRecord(training.pop('command'), training)
        published = publish(
            checkpoint, f'{args.organization}/{name}', license, eval_data=data, dataset=dataset,
            output=Path(args.output) / name, dry_run=args.dry_run)
        print(published.url or published.folder)


if __name__ == '__main__':
    main()
