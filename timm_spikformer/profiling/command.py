"""`timm-spikformer profile`: from the name of a model to a table and a page."""
import argparse
import dataclasses
from pathlib import Path
from typing import Any, Dict, List, Tuple

import datasets
import timm
import torch
from timm.data import resolve_model_data_config
from timm.utils import random_seed
from torch import nn
from torch.optim.swa_utils import update_bn

from ..demo.data import DATA_KEYS, load_test_images
from ..spikformer import check_model_name, find_spikformer
from .conventions import CHOICES, COST_MODELS, Conventions, CostModel, cost_model
from .counting import profile
from .report import create_console, print_profile, print_steps, write_report
from .samples import look

_NUM_SAMPLES = 8


def _cost(text: str) -> CostModel:
    try:
        return cost_model(text if ',' not in text else tuple(float(value) for value in text.split(',')))
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('model', metavar='MODEL', help="of timm's: a name, hf-hub:ORG/NAME or local-dir:DIR")
    add('--checkpoint', metavar='PATH', help="other weights: a file of train.py's, a folder of timm's or transformers'")
    add('--calibrate', action='store_true',
        help='compute BN statistics on the images; random weights if there are none')
    add('--data', metavar='DIR', help='image folder or parquet files (default: the shipped slice of Fashion-MNIST)')
    add('--images', type=int, default=1000, metavar='N', help='use at most so many images (default: %(default)s)')
    add('--batch-size', type=int, default=32, metavar='N', help='(default: %(default)s)')
    add('--time-steps', type=int, nargs='+', metavar='T', help="one or more (default: the model's own)")
    add('--layers', nargs='+', metavar='NAME', help='layers to draw spike rasters of (default: the last of each part)')
    add('--cost', default='fp32', metavar='MODEL', type=_cost,
        help=f'{", ".join(COST_MODELS)}, or picojoules of a multiply-accumulate and an accumulate, such as 4.6,0.9')
    add('--output', metavar='DIR', default='output/profile', help='where the page goes (default: %(default)s)')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='(default: %(default)s)')
    counting = parser.add_argument_group('what counts as an operation', "the first of each is the papers', and default")
    for name, choices in CHOICES.items():
        counting.add_argument(
            f'--{name.replace("_", "-")}', choices=list(choices), default=next(iter(choices)),
            help='; '.join(f'{value}: {meaning}' for value, meaning in choices.items()))


def _load(args: argparse.Namespace, notes: List[str]) -> Tuple[nn.Module, Dict[str, Any]]:
    """The model in eval mode, and how images are presented to it; adds what there is to note."""
    name = args.model
    if args.checkpoint is not None:
        from ..reading import read_checkpoint
        checkpoint = read_checkpoint(args.checkpoint, name)
        found = checkpoint.encoder.pretrained_cfg['architecture']
        if found != name.split('.')[0]:
            raise ValueError(f'{args.checkpoint} holds a {found}, and {name} was named.')
        return checkpoint.model.eval(), checkpoint.data_config
    is_registered = not name.startswith(('hf-hub:', 'local-dir:'))
    if is_registered:
        check_model_name(name.split('.')[0])
    if args.calibrate and is_registered and not timm.get_pretrained_cfg(name).has_weights:
        random_seed(0)
        model = timm.create_model(name)
        notes.append('The weights are random: these are the operations of a network that has not learnt.')
    else:
        try:
            model = timm.create_model(name, pretrained=True)
        except RuntimeError as e:
            raise ValueError(f'{e} Give weights with --checkpoint, or take random ones with --calibrate.') from e
    config = resolve_model_data_config(model)
    return model.eval(), {key: config[key] for key in DATA_KEYS}


def run(args: argparse.Namespace) -> Path:
    """Profile, print and write; returns the page."""
    console = create_console()
    for name in ('images', 'batch_size'):
        if getattr(args, name) < 1:
            raise ValueError(f'--{name.replace("_", "-")} must be at least 1, got {getattr(args, name)}.')
    for steps in args.time_steps or ():
        if steps < 1:
            raise ValueError(f'--time-steps must be at least 1, got {steps}.')
    datasets.disable_progress_bars()
    device = torch.device(args.device)
    notes: List[str] = []
    model, config = _load(args, notes)
    encoder = find_spikformer(model.to(device))
    images = load_test_images(args.data and Path(args.data), config, args.images, args.batch_size)
    data = images.name
    if args.calibrate:
        notes.append("BN's running statistics were computed on these images, for each number of time steps.")
    has_labels = images.num_classes is not None and images.num_classes == encoder.num_classes
    if not has_labels and encoder.num_classes:
        there = 'no labels' if images.num_classes is None else f'{images.num_classes} classes'
        notes.append(f'No accuracy: the images have {there}, and the model has {encoder.num_classes} classes.')
    for note in notes:
        console.print(note, highlight=False)

    conventions = Conventions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Conventions)})
    steps: List[int] = sorted(set(args.time_steps or [encoder.time_steps]))
    first = next(iter(images.loader))
    x = (first if isinstance(first, torch.Tensor) else first[0])[:_NUM_SAMPLES]
    look(model, x[:1], args.layers, steps[0])  # a name that is wrong is told before all the work
    profiles = []
    for time_steps in steps:
        encoder.set_time_steps(time_steps)
        with console.status(f'T = {time_steps}: {data}'):
            if args.calibrate:
                update_bn(images.loader, encoder, device)
                model.eval()
            profiles.append(profile(
                model, images.loader, None, conventions, args.cost, accuracy=None if has_labels else False))
    samples = look(model, x, args.layers, None, config['mean'], config['std'])
    print_profile(profiles[-1], console)
    if profiles[-1].steps[-1].agreement is not None:
        print_steps(profiles[-1], console)
    page = write_report(args.output, profiles, samples, data, notes)
    console.print(f'The page is {page}', highlight=False)
    return page
