"""Arguments of `timm-spikformer profile`."""
import argparse
from typing import Any

from .choices import CHOICES, COST_NAMES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('model', metavar='MODEL', help='model name in timm, hf-hub:ORG/NAME or local-dir:DIR')
    add('--checkpoint', metavar='PATH', help='file of train.py, or folder saved by timm or transformers, to load')
    add('--calibrate', action='store_true',
        help='recompute BN statistics on the images; a model without pretrained weights is initialized randomly')
    add('--data', metavar='DIR',
        help='DIR/{train,test}/CLASS/*.png, DIR/CLASS/*.png, DIR/*.png or parquet files (default: the shipped '
             'Fashion-MNIST); or with --events, the folder of the event dataset')
    add('--events', metavar='NAME',
        help='profile on event sequences, such as events/cifar10_dvs?time_steps=16; the name determines T')
    add('--images', type=int, default=1000, metavar='N', help='maximum number of images (default: %(default)s)')
    add('--batch-size', type=int, default=32, metavar='N', help='images per batch (default: %(default)s)')
    add('--time-steps', type=int, nargs='+', metavar='T', help='numbers of time steps (default: that of the model)')
    add('--layers', nargs='+', metavar='NAME',
        help='layers in the spike rasters (default: the last one of each stem stage, and of attention and MLP in the '
             'first and last block)')
    add('--cost', default='fp32', metavar='MODEL',
        help=f'cost model: {", ".join(COST_NAMES)}, or pJ per multiply-accumulate and per accumulate, such as '
             f'4.6,0.9 (default: %(default)s)')
    add('--output', metavar='DIR', default='output/profile', help='folder to write (default: %(default)s)')
    add('--device', help='PyTorch device (default: cuda if available, else cpu)')
    counting = parser.add_argument_group(
        'operation counting', 'The first value of each option is the default and follows the convention of the papers.')
    for name, choices in CHOICES.items():
        counting.add_argument(
            f'--{name.replace("_", "-")}', choices=list(choices), default=next(iter(choices)),
            help='; '.join(f'{value}: {meaning}' for value, meaning in choices.items()))


def run(args: argparse.Namespace) -> Any:
    from .run import run_profile
    return run_profile(args)
