"""Arguments of `timm-spikformer demo`."""
import argparse
import os
import shlex
from typing import Any, Callable, Dict, Union

DESCRIPTION = """Run a small Spikformer V2 on real images, in three stages; select stages with --stages.

classify: classify test images of Fashion-MNIST with the weights that are shipped with the package.
train: train the same model from scratch, with all labels.
pretrain: pre-train it without labels as a masked autoencoder, fine-tune it with a few labels, and compare it with a
model trained from scratch on the same labeled images for the same number of epochs."""

STAGES = ('classify', 'train', 'pretrain')
SETTINGS = 'args.json'  # name of the file in the output folder that stores the arguments of the run
KIND = 'demo'  # kind of the output folder, see folders.py


DEFAULTS = dict(
    quick=False, model='spikformer_v2_2_64_patch4_32', time_steps=1, epochs=10, pretrain_epochs=2, finetune_epochs=15,
    labeled=600, mask_ratio=0.75, batch_size=32, lr=1e-2, pretrain_lr=4e-3, weight_decay=0.05, seed=0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-spikformer demo`.

    The parser leaves omitted arguments at None, so that --resume can restore them; a new run uses `DEFAULTS`.
    """
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument

    def add_number(name: str, kind: Callable[[str], Union[int, float]], metavar: str, help: str) -> None:
        default = DEFAULTS[name.removeprefix('--').replace('-', '_')]
        add(name, type=kind, metavar=metavar, help=f'{help} (default: {default})')

    add('--stages', nargs='+', choices=STAGES, metavar='STAGE',
        help=f'{", ".join(STAGES)} (default: all; with --data, all but classify)')
    add('--data', metavar='DIR',
        help='DIR/{train,test}/CLASS/*.png, DIR/CLASS/*.png or parquet files (default: the shipped Fashion-MNIST)')
    add('--output', metavar='DIR', default='output/demo', help='folder to write (default: %(default)s)')
    add('--resume', action='store_true', help='continue from the last checkpoint in the output folder')
    add('--quick', action='store_true', default=None,
        help='train one epoch on few images per stage, to check that everything runs')
    add('--model', metavar='NAME', help=f'model to train (default: {DEFAULTS["model"]})')
    add_number('--time-steps', int, 'T', 'number of time steps')
    add_number('--epochs', int, 'N', 'epochs of training with all labels')
    add_number('--pretrain-epochs', int, 'N', 'epochs of pre-training')
    add_number('--finetune-epochs', int, 'N', 'epochs of fine-tuning')
    add_number('--labeled', int, 'N', 'labeled images for fine-tuning')
    add_number('--mask-ratio', float, 'R', 'fraction of masked patches')
    add_number('--batch-size', int, 'N', 'images per batch')
    add_number('--lr', float, 'LR', 'peak learning rate')
    add_number('--pretrain-lr', float, 'LR', 'peak learning rate of pre-training')
    add_number('--weight-decay', float, 'W', 'weight decay')
    add_number('--seed', int, 'N', 'random seed')
    add('--device', help='PyTorch device (default: cuda if available, else cpu)')


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from .demo import run_demo
    return run_demo(args)


def interruption_message(args: argparse.Namespace) -> str:
    """Return the message for a user who has interrupted the command."""
    if not os.path.isfile(os.path.join(args.output, SETTINGS)):
        return 'Nothing was written. Run the same command again.'
    command = shlex.join(['timm-spikformer', 'demo', '--resume', '--output', args.output])
    return f'To continue, run: {command}'
