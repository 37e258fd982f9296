"""Arguments of `timm-spikformer profile`."""
import argparse
from typing import Any

from .choices import CHOICES, COST_NAMES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('model', metavar='MODEL', help='name of a model in timm, hf-hub:ORG/NAME or local-dir:DIR')
    add('--checkpoint', metavar='PATH', help='other weights: a file of train.py, or a folder of timm or transformers')
    add('--calibrate', action='store_true',
        help='compute BN statistics on the images; the weights are random if there are none')
    add('--data', metavar='DIR',
        help='DIR/{train,test}/CLASS/*.png, DIR/CLASS/*.png, DIR/*.png or parquet files (default: the shipped '
             'Fashion-MNIST)')
    add('--images', type=int, default=1000, metavar='N', help='largest number of images (default: %(default)s)')
    add('--batch-size', type=int, default=32, metavar='N', help='(default: %(default)s)')
    add('--time-steps', type=int, nargs='+', metavar='T', help="one or more numbers (default: the model's own)")
    add('--layers', nargs='+', metavar='NAME', help='layers to draw spike rasters of (default: the last of each part)')
    add('--cost', default='fp32', metavar='MODEL',
        help=f'{", ".join(COST_NAMES)}, or picojoules of a multiply-accumulate and an accumulate, such as 4.6,0.9 '
             f'(default: %(default)s)')
    add('--output', metavar='DIR', default='output/profile', help='folder to write (default: %(default)s)')
    add('--device', help='(default: cuda if there is one, else cpu)')
    counting = parser.add_argument_group(
        'what counts as an operation', 'The first value of each option is the default, the convention of the papers.')
    for name, choices in CHOICES.items():
        counting.add_argument(
            f'--{name.replace("_", "-")}', choices=list(choices), default=next(iter(choices)),
            help='; '.join(f'{value}: {meaning}' for value, meaning in choices.items()))


def run(args: argparse.Namespace) -> Any:
    from .run import run_profile
    return run_profile(args)
