"""The command `timm-spikformer profile`: load a model, profile it, print tables and write an HTML page."""
import argparse
import dataclasses
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import timm
import torch
from rich.console import Console
from rich.text import Text
from timm.utils import random_seed
from torch import nn
from torch.optim.swa_utils import update_bn

from ..arguments import check_count
from ..devices import choose_device
from ..event_data.names import parse_name, read_event_splits
from ..folders import check_writable
from ..images import Images, data_config, make_loader, match_classes, read_splits, select_profiling_split
from ..kernels import time_layers, use_kernels
from ..reading import Checkpoint, read_checkpoint, read_checkpoint_source
from ..spikformer import Spikformer, check_model_tag, find_spikformer
from .activity import check_layers, record_activity
from .batches import check_images
from .conventions import Conventions, CostModel, to_cost_model
from .counting import Profile, find_autoencoder, profile
from .report import check_report_folder, create_console, print_profile, print_steps, write_report

_NUM_PICTURES = 8


class _LoadedModel(NamedTuple):
    """A model in eval mode, timm's data config, the class names, if known, and a note for the report, if any."""
    model: nn.Module
    config: Dict[str, Any]
    labels: Optional[Sequence[str]]
    note: Optional[str] = None


def run_profile(args: argparse.Namespace) -> Path:
    """Profile a model on images, print tables and write an HTML page; return the path of the page.

    Raises:
        ValueError: An argument, the model, the data or the output folder is invalid.
        OSError: The output folder cannot be written.
    """
    console = create_console()
    _check_arguments(args)
    device = choose_device(args.device)
    cost = _parse_cost(args.cost)
    conventions = Conventions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Conventions)})
    _check_output(args)  # before the measurement, which takes minutes
    splits = read_splits(args.data, labels=False) if args.events is None else read_event_splits(args.events, args.data)
    images = select_profiling_split(splits).sample_evenly(args.images)
    loaded = _load(args)
    encoder = find_spikformer(loaded.model.to(device))
    check_layers(encoder, args.layers)
    images, has_accuracy, accuracy_note = _match_labels(images, loaded, encoder)
    notes = [note for note in (loaded.note, accuracy_note) if note is not None]
    if args.calibrate:
        notes.append("BN's running statistics were computed on these images, for each number of time steps.")
    for note in notes:
        console.print(note)

    loader = make_loader(images, loaded.config, args.batch_size, device)
    profiles = []
    for time_steps in _time_steps(args, encoder):
        encoder.set_time_steps(time_steps)
        with console.status(Text(f'T = {time_steps}: {images.description}'), spinner='line'):
            if args.calibrate:
                update_bn(loader, loaded.model, device)  # a masked autoencoder encodes visible patches, as profiled
            profiles.append(profile(
                loaded.model, loader, conventions=conventions, cost=cost, accuracy=None if has_accuracy else False))
    return _report(args, console, loaded, profiles, loader, images.description, notes)


def _report(
        args: argparse.Namespace,
        console: Console,
        loaded: _LoadedModel,
        profiles: List[Profile],
        loader: Iterable[Any],
        description: str,
        notes: List[str],
) -> Path:
    """Record activity and, on a CPU, times; print the last profile, and write the report of all profiles."""
    first = next(iter(loader))
    x = (first if isinstance(first, torch.Tensor) else first[0])[:_NUM_PICTURES]
    activity = record_activity(
        loaded.model, x, args.layers, mean=loaded.config['mean'], std=loaded.config['std'])
    last = profiles[-1]
    if next(loaded.model.parameters()).device.type == 'cpu':
        last = measure_times(last, loaded.model, x)
        note = f'Milliseconds per image, measured on a batch of {len(x)} with {torch.get_num_threads()} CPU threads.'
        console.print(note)
        notes = [*notes, note]
    print_profile(last, console)
    if last.steps[-1].agreement is not None:
        print_steps(last, console)
    page = write_report(args.output, [*profiles[:-1], last], activity, description, notes)
    console.print(f'HTML report: {page}', soft_wrap=True)
    return page


def measure_times(result: Profile, model: nn.Module, x: torch.Tensor) -> Profile:
    """Return a profile with the measured time of each layer, with and without event-driven products.

    The products of attention and the classifier are not measured. A compiled model is measured without compilation,
    because compiled code contains no event-driven products.

    Args:
        result: Profile of the model.
        model: The model, on the CPU.
        x: Images `[B, C, H, W]`, or sequences `[B, T, C, H, W]`. Measured times are divided by B.

    Raises:
        ValueError: `x` is not a batch of images or sequences, or the profile is that of a model with other layers.
    """
    encoder, x = find_spikformer(model), check_images(x)
    prefix = next(name for name, m in model.named_modules() if m is encoder)
    times = {}
    for mode in ('auto', 'dense'):
        with use_kernels(mode):
            times[mode] = {
                name.removeprefix(f'{prefix}.'): value / len(x) for name, value in time_layers(model, x).items()}
    unknown = set(times['auto']) - {layer.name for layer in result.layers}
    if unknown:
        raise ValueError(f'The profile has no layer {sorted(unknown)[0]!r}. Pass the model that was profiled.')
    return dataclasses.replace(result, times=times)


def _check_arguments(args: argparse.Namespace) -> None:
    for name in ('images', 'batch_size'):
        check_count(f'--{name.replace("_", "-")}', getattr(args, name))
    if args.events is not None and args.time_steps:
        raise ValueError(
            f'--time-steps is for images. The number of time steps of event sequences is in their name: '
            f'{args.events.partition("?")[0]}?time_steps={args.time_steps[0]}.')
    for steps in args.time_steps or ():
        check_count('--time-steps', steps)


def _check_output(args: argparse.Namespace) -> None:
    check_report_folder(
        args.output,
        inputs=[] if args.checkpoint is None else [args.checkpoint],
        data=[] if args.data is None else [args.data],
    )
    check_writable(args.output)


def _time_steps(args: argparse.Namespace, encoder: Spikformer) -> List[int]:
    """Return the numbers of time steps to profile with, in increasing order."""
    if args.events is not None:
        return [parse_name(args.events).time_steps]
    return sorted(set(args.time_steps or [encoder.time_steps]))


def _parse_cost(text: str) -> CostModel:
    if ',' not in text:
        return to_cost_model(text)
    try:
        values = tuple(float(value) for value in text.split(','))
    except ValueError as e:
        raise ValueError(f'--cost must be a name or two numbers such as 4.6,0.9, got {text!r}.') from e
    return to_cost_model(values)


def _load(args: argparse.Namespace) -> _LoadedModel:
    name = args.model
    is_registered = not name.startswith(('hf-hub:', 'local-dir:'))
    if is_registered:
        check_model_tag(name)
    if args.checkpoint is not None:
        return _from_checkpoint(_read_checkpoint_of_model(args.checkpoint, name, args.time_steps))
    try:
        if not is_registered:
            return _from_checkpoint(read_checkpoint_source(name))
        if args.calibrate and not timm.get_pretrained_cfg(name).has_weights:
            random_seed(0)
            model = timm.create_model(name)
            note = 'The weights are random: the results are those of an untrained network.'
            return _LoadedModel(model.eval(), data_config(model), None, note)
        model = timm.create_model(name, pretrained=True)
    except RuntimeError as e:
        raise ValueError(f'{e} Specify weights with --checkpoint, or use random weights with --calibrate.') from e
    return _LoadedModel(model.eval(), data_config(model), model.pretrained_cfg.get('label_names'))


def _read_checkpoint_of_model(path: str, name: str, time_steps: Optional[List[int]]) -> Checkpoint:
    """Read a checkpoint, and check that its architecture is that of the model name.

    If `time_steps` are given, a file need not contain how many time steps it was trained with.
    """
    kwargs = dict(time_steps=time_steps[0]) if time_steps and not Path(path).is_dir() else None
    checkpoint = read_checkpoint(path, name, model_kwargs=kwargs)
    found = checkpoint.encoder.pretrained_cfg['architecture']
    if found != name.split('.')[0]:
        raise ValueError(f'{path} contains a {found}, but the given model is {name}.')
    return checkpoint


def _from_checkpoint(checkpoint: Checkpoint) -> _LoadedModel:
    return _LoadedModel(checkpoint.model, checkpoint.data_config, checkpoint.labels)


def _match_labels(images: Images, loaded: _LoadedModel, encoder: Spikformer) -> Tuple[Images, bool, Optional[str]]:
    """Map the labels of the images to the class indices of the model.

    Returns:
        The images, whether accuracy can be computed, and a note for the report: why it cannot, or what it assumes.
    """
    if encoder.num_classes == 0 or find_autoencoder(loaded.model) is not None:
        return images, False, None
    try:
        images = match_classes(images, loaded.labels, encoder.num_classes)
    except ValueError as e:
        return images, False, f'Accuracy is not computed. {e}'
    if loaded.labels is not None and images.classes is not None:
        return images, True, None
    unnamed = 'The model' if loaded.labels is None else 'The dataset'
    note = f'{unnamed} has no class names: accuracy assumes the same class order in the model and the dataset.'
    return images, True, note
