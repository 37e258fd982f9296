"""Arguments of `timm-spikformer demo`."""
import argparse
import os
import shlex
from typing import Any, Dict

DESCRIPTION = """Show a small Spikformer V2 at work on real images, in three stages of which each can be left out.

classify: classify test images of Fashion-MNIST with the weights that the package ships.
train: train the same model from scratch, with all labels.
pretrain: pre-train it without labels as a masked autoencoder, fine-tune it with a few labels, and compare with as many
epochs of training from scratch on these."""

STAGES = ('classify', 'train', 'pretrain')
SETTINGS = 'args.json'  # file in the output folder with the arguments of a run
KIND = 'demo'  # of the output folder, see folders.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add('--stages', nargs='+', choices=STAGES, metavar='STAGE',
        help=f'{", ".join(STAGES)} (default: all; with --data, all but classify)')
    add('--data', metavar='DIR',
        help='DIR/{train,test}/CLASS/*.png, DIR/CLASS/*.png or parquet files (default: the shipped Fashion-MNIST)')
    add('--output', metavar='DIR', default='output/demo', help='folder to write (default: %(default)s)')
    add('--resume', action='store_true', help='continue from the last checkpoint in the output folder')
    add('--quick', action='store_true', help='one epoch of few images in each stage, to check that everything runs')
    add('--model', default='spikformer_v2_2_64_patch4_32', metavar='NAME', help='(default: %(default)s)')
    add('--time-steps', type=int, default=1, metavar='T', help='(default: %(default)s)')
    add('--epochs', type=int, default=10, metavar='N', help='epochs with all labels (default: %(default)s)')
    add('--pretrain-epochs', type=int, default=2, metavar='N', help='(default: %(default)s)')
    add('--finetune-epochs', type=int, default=15, metavar='N', help='(default: %(default)s)')
    add('--labeled', type=int, default=600, metavar='N', help='labeled images to fine-tune with (default: %(default)s)')
    add('--mask-ratio', type=float, default=0.75, metavar='R', help='share of masked patches (default: %(default)s)')
    add('--batch-size', type=int, default=32, metavar='N', help='(default: %(default)s)')
    add('--lr', type=float, default=1e-2, help='peak learning rate (default: %(default)s)')
    add('--pretrain-lr', type=float, default=4e-3, metavar='LR', help='that of pre-training (default: %(default)s)')
    add('--weight-decay', type=float, default=0.05, metavar='W', help='(default: %(default)s)')
    add('--seed', type=int, default=0, metavar='N', help='(default: %(default)s)')
    add('--device', help='(default: cuda if there is one, else cpu)')


def run(args: argparse.Namespace) -> Dict[str, Any]:
    from .demo import run_demo
    return run_demo(args)


def interrupted(args: argparse.Namespace) -> str:
    """Return what to tell a user who has interrupted the command."""
    if not os.path.isfile(os.path.join(args.output, SETTINGS)):
        return 'Nothing was written. Run the same command again.'
    command = shlex.join(['timm-spikformer', 'demo', '--resume', '--output', args.output])
    return f'To continue, run: {command}'
