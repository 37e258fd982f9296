"""Arguments of `timm-spikformer demo`."""
import argparse
import os
import shlex
from typing import Any, Dict

DESCRIPTION = """Run a small Spikformer V2 on real images, in three stages; select stages with --stages.

classify: classify test images of Fashion-MNIST with the weights that are shipped with the package.
train: train the same model from scratch, with all labels.
pretrain: pre-train it without labels as a masked autoencoder, fine-tune it with a few labels, and compare it with a
model trained from scratch on the same labeled images for the same number of epochs."""

STAGES = ('classify', 'train', 'pretrain')
SETTINGS = 'args.json'  # name of the file in the output folder that stores the arguments of the run
KIND = 'demo'  # kind of the output folder, see folders.py


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add('--stages', nargs='+', choices=STAGES, metavar='STAGE',
        help=f'{", ".join(STAGES)} (default: all; with --data, all but classify)')
    add('--data', metavar='DIR',
        help='DIR/{train,test}/CLASS/*.png, DIR/CLASS/*.png or parquet files (default: the shipped Fashion-MNIST)')
    add('--output', metavar='DIR', default='output/demo', help='folder to write (default: %(default)s)')
    add('--resume', action='store_true', help='continue from the last checkpoint in the output folder')
    add('--quick', action='store_true', help='train one epoch on few images per stage, to check that everything runs')
    add('--model', default='spikformer_v2_2_64_patch4_32', metavar='NAME', help='model to train (default: %(default)s)')
    add('--time-steps', type=int, default=1, metavar='T', help='number of time steps (default: %(default)s)')
    add('--epochs', type=int, default=10, metavar='N', help='epochs of training with all labels (default: %(default)s)')
    add('--pretrain-epochs', type=int, default=2, metavar='N', help='epochs of pre-training (default: %(default)s)')
    add('--finetune-epochs', type=int, default=15, metavar='N', help='epochs of fine-tuning (default: %(default)s)')
    add('--labeled', type=int, default=600, metavar='N', help='labeled images for fine-tuning (default: %(default)s)')
    add('--mask-ratio', type=float, default=0.75, metavar='R', help='fraction of masked patches (default: %(default)s)')
    add('--batch-size', type=int, default=32, metavar='N', help='images per batch (default: %(default)s)')
    add('--lr', type=float, default=1e-2, help='peak learning rate (default: %(default)s)')
    add('--pretrain-lr', type=float, default=4e-3, metavar='LR',
        help='peak learning rate of pre-training (default: %(default)s)')
    add('--weight-decay', type=float, default=0.05, metavar='W', help='weight decay (default: %(default)s)')
    add('--seed', type=int, default=0, metavar='N', help='random seed (default: %(default)s)')
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
