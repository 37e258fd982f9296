"""Load checkpoints: files of timm's train.py, folders saved by timm or transformers, and models in memory.

A folder is loaded by the library that wrote it, so a `Checkpoint` contains the same model that timm or transformers
returns. Pickles are opened only with `weights_only=True`.
"""
import argparse
import copy
import inspect
import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import timm
import torch
from huggingface_hub import is_offline_mode
from timm.data import str_to_pil_interp
from timm.models import get_arch_pretrained_cfgs, get_model_input_config
from timm.utils import unwrap_model
from torch import Tensor, nn

from .checkpoints import TRAINING_FILE, convert_state_dict, strip_prefix
from .class_names import check_class_names
from .errors import first_line
from .images import DATA_KEYS, data_config
from .masked_autoencoder import AUTOENCODER_KEY, SpikformerMAE
from .pretrained import (
    WEIGHTS_FILE,
    download,
    download_if_exists,
    read_metadata,
    read_model_args,
    shipped_weights,
    split_revision,
)
from .spikformer import Spikformer, check_model_name, check_model_tag
from .state_dicts import (
    PARSING_ERRORS,
    check_size,
    check_tensors,
    find_state_dict,
    read_json,
    read_tensors,
)
from .stems import SpikingConvStage
from .training_records import TrainingRecord, read_training_record, record_of_train_script

__all__ = [
    'Checkpoint', 'TrainingRecord', 'check_data_config', 'checkpoint_from_model', 'copy_checkpoint',
    'create_from_state_dict', 'create_registered_model', 'read_checkpoint', 'read_checkpoint_source', 'set_labels',
    'trained_model_kwargs', 'unwrap_timm_model',
]

# Arguments of the network that are read from the weights, and arguments that the user may set
_ARGS_FROM_WEIGHTS = ('num_classes', 'in_chans')
_MODEL_KWARGS = [
    name for name in inspect.signature(Spikformer).parameters if name not in (*_ARGS_FROM_WEIGHTS, 'device', 'dtype')]
_CROP_MODES = ('center', 'squash', 'border')  # of timm's create_transform
_LARGEST_ACTIVATION = 2 ** 28  # limit on the output values of a layer of the stem: 1 GiB in float32
_WEIGHTS_INDEX = f'{WEIGHTS_FILE}.index.json'  # lists the files of sharded weights
_LOAD_ERROR = 'The weights in {} cannot be loaded into the model of its config.json: {}.'


@dataclass
class Checkpoint:
    """A model on the CPU in eval mode and float32, with its metadata.

    Args:
        model: A `Spikformer` or a `SpikformerMAE`.
        data_config: timm's data config, see `images.data_config`.
        labels: Class names in order; None if they are unknown or the model has no classifier.
        training: How the model was trained; None if unknown.
        processor: Content of the preprocessor_config.json of the checkpoint. If None, one that matches `data_config` is
            written on saving.
        source: File or folder that the checkpoint was read from.
        name: Name passed to `timm.create_model`, with the tag of the weights if there is one.

    >>> model = timm.create_model('spikformer_v2_2_64_patch4_32.fashion_mnist', pretrained=True)
    >>> checkpoint = checkpoint_from_model(model)
    >>> checkpoint.name, checkpoint.data_config['input_size']
    ('spikformer_v2_2_64_patch4_32.fashion_mnist', (3, 28, 28))
    """
    model: Union[Spikformer, SpikformerMAE]
    data_config: Dict[str, Any]
    labels: Optional[List[str]] = None
    training: Optional[TrainingRecord] = None
    processor: Optional[Dict[str, Any]] = None
    source: Optional[Path] = None
    name: Optional[str] = None

    @property
    def encoder(self) -> Spikformer:
        return self.model.encoder if isinstance(self.model, SpikformerMAE) else self.model

    @property
    def activation_size(self) -> int:
        """Number of values in the largest output of a layer of the stem for one image, over all time steps."""
        encoder = self.encoder
        size, largest = math.prod(self.data_config['input_size'][1:]), 0
        for stage, stride in zip(encoder.stem.stages, encoder.stem.strides):
            if isinstance(stage, SpikingConvStage):  # its widest layer follows the stride
                size //= stride ** 2
                largest = max(largest, stage.expand.conv.out_channels * size)
            else:  # its convolution precedes the pooling
                largest = max(largest, stage.proj.conv.out_channels * size)
                size //= stride ** 2
        return encoder.time_steps * largest

    def limit_batch_size(self, batch_size: int) -> int:
        """Return `batch_size`, reduced if necessary so that no layer of the stem outputs more than 1 GiB.

        The result is at least 1.
        """
        return max(1, min(batch_size, _LARGEST_ACTIVATION // max(1, self.activation_size)))


def read_checkpoint(
        path: Union[str, Path],
        model: Optional[str] = None,
        ema: bool = False,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> Checkpoint:
    """Read a checkpoint file of train.py, a state dict, or a folder with a config.json.

    Args:
        path: File or folder.
        model: Name of the model, required for a file that does not contain it.
        ema: Read the averaged weights of train.py's `--model-ema`.
        model_kwargs: Model arguments for a file; they override those that train.py stored in it.

    Raises:
        ValueError: The file or folder is missing, damaged, or does not contain a Spikformer.
    """
    path = Path(path)
    if path.is_dir():
        if ema or model_kwargs:
            raise ValueError(
                f'{path} is a folder, whose config.json describes its weights. ema and model_kwargs apply only to '
                f'checkpoint files.')
        checkpoint = _read_folder(path)
    elif path.is_file():
        checkpoint = _read_file(path, model, ema, model_kwargs)
    else:
        raise ValueError(f'{path} does not exist. Expected a checkpoint file, or a folder with a config.json.')
    check_data_config(path, checkpoint)
    return checkpoint


def read_checkpoint_source(name: str) -> Checkpoint:
    """Read a folder `local-dir:DIR` or a Hub repository `hf-hub:ORG/NAME`, in timm's or transformers' format.

    All files of a repository are from the same commit.

    Raises:
        ValueError: The folder or repository is missing, damaged, or does not contain a Spikformer.
        RuntimeError: The repository, or one of its files, cannot be downloaded.
    """
    if name.startswith('local-dir:'):
        return read_checkpoint(name.removeprefix('local-dir:'))
    repo = name.removeprefix('hf-hub:')
    folder = Path(download(repo, 'config.json')).parent
    pinned = f'{split_revision(repo)[0]}@{folder.name}'  # the cache names the folder after the commit
    index = None if download_if_exists(pinned, WEIGHTS_FILE) else download_if_exists(pinned, _WEIGHTS_INDEX)
    if index is not None:
        for shard in _read_shard_names(Path(index)):
            download(pinned, shard)
    elif not (folder / WEIGHTS_FILE).is_file():
        download(repo, WEIGHTS_FILE)  # raises an error that states what to do
    download_if_exists(pinned, 'preprocessor_config.json')
    if not is_offline_mode():  # the model can be used without it
        download_if_exists(pinned, TRAINING_FILE)
    return read_checkpoint(folder)


def check_data_config(path: object, checkpoint: Checkpoint) -> None:
    """Check that the data config of a checkpoint is valid, and that its images are not too large for the stem.

    Args:
        path: Origin of the checkpoint, for error messages.
        checkpoint: The checkpoint.

    Raises:
        ValueError: The data config is invalid, or the activations for one image would be too large.
    """
    config = checkpoint.data_config

    def are_numbers(values: Any, count: int) -> bool:
        return len(values) == count and all(isinstance(v, (int, float)) and math.isfinite(v) for v in values)

    try:
        channels, height, width = config['input_size']
        fits = all(type(v) is int and v > 0 for v in (channels, height, width))
        fits &= all(are_numbers(config[key], channels) for key in ('mean', 'std')) and min(config['std']) > 0
        fits &= are_numbers([config['crop_pct']], 1) and config['crop_pct'] > 0
        fits &= config['crop_mode'] in _CROP_MODES
        str_to_pil_interp(config['interpolation'])
    except PARSING_ERRORS as e:
        raise ValueError(f'{path} has an invalid data config {config}: {type(e).__name__} {first_line(e)}.') from e
    if not fits:
        raise ValueError(
            f'{path} has an invalid data config {config}; expected input_size (channels, height, width), one mean and '
            f'one positive std per channel, a positive crop_pct, and a crop_mode of {", ".join(_CROP_MODES)}.')
    if checkpoint.activation_size > _LARGEST_ACTIVATION:
        raise ValueError(
            f'{path} expects images of {height} x {width} pixels and {checkpoint.encoder.time_steps} time steps, for '
            f'which a layer of the stem outputs {checkpoint.activation_size:,} values per image, more than '
            f'{_LARGEST_ACTIVATION:,}. Choose a smaller img_size or fewer time_steps.')


def create_from_state_dict(
        name: str,
        state_dict: Dict[str, Any],
        model_kwargs: Optional[Dict[str, Any]] = None,
        source: object = 'The checkpoint',
) -> Spikformer:
    """Create the model `name` with the number of classes and input channels of `state_dict`, and load the weights.

    Args:
        name: Registered name, with or without a tag.
        state_dict: Weights of this package, of the V1 authors' code or of spikingjelly.
        model_kwargs: See `create_registered_model`.
        source: Origin of the weights, for error messages.

    Raises:
        ValueError: The tensors do not match those of the model, or the model does not accept the arguments.
    """
    check_model_tag(name)  # the tag selects the data config
    model_kwargs = model_kwargs or {}
    check_size(source, state_dict, model_kwargs)
    empty = create_registered_model(name, model_kwargs, device='meta', num_classes=0)
    try:
        converted = convert_state_dict(state_dict, empty).state_dict
    except (LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f'{source} does not match {name}: {first_line(e)}.') from e
    head = converted.get('head.fc.weight')
    first = converted.get(f'{empty.pretrained_cfg["first_conv"]}.weight')
    if first is None or first.ndim != 4 or (head is not None and head.ndim != 2):
        raise ValueError(
            f'{source} does not contain a Spikformer: the first convolution is missing, or its shape or that of the '
            f'classifier is wrong. It contains {len(converted)} tensors, first {next(iter(converted), "none")!r}.')
    num_classes = 0 if head is None else len(head)
    model = create_registered_model(name, model_kwargs, num_classes=num_classes, in_chans=first.shape[1])
    try:
        model.load_state_dict(converted)
    except RuntimeError as e:
        raise ValueError(f'{source} does not match {name}. {str(e).splitlines()[-1].strip()}') from e
    return model.eval()


def create_registered_model(name: str, model_kwargs: Mapping[str, Any], **create_kwargs: Any) -> Spikformer:
    """Create a registered model with arguments from the user or from a file.

    Args:
        name: Registered name, with or without a tag.
        model_kwargs: Arguments of the network, without `num_classes` and `in_chans`, which are read from the weights.
        create_kwargs: Other arguments of `timm.create_model`.

    Raises:
        ValueError: The network does not have such an argument, or does not accept its value.
    """
    for key, value in model_kwargs.items():
        if key in _ARGS_FROM_WEIGHTS:
            raise ValueError(f'{key}={value!r} cannot be set: it is read from the weights.')
        if key not in _MODEL_KWARGS:
            raise ValueError(
                f'{name} cannot be created with {key}={value!r}. The arguments are {", ".join(_MODEL_KWARGS)}.')
        if value is None:  # timm would ignore it
            raise ValueError(f'{name} cannot be created with {key}=None. Omit {key} to use its default.')
    try:
        return timm.create_model(name, **model_kwargs, **create_kwargs)
    except (TypeError, AttributeError, KeyError, RuntimeError, ZeroDivisionError) as e:
        raise ValueError(f'{name} cannot be created with {dict(model_kwargs)}: {first_line(e)}.') from e


def set_labels(checkpoint: Checkpoint, labels: Sequence[str]) -> None:
    """Set the class names of a checkpoint.

    If the names are transformers' defaults (`LABEL_0`, `LABEL_1`, ...), the class names are removed.

    Raises:
        ValueError: The number of names differs from the number of classes, or a name is empty or occurs twice.
    """
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        raise ValueError(f'The labels are {labels!r}, expected a list with a name for each class.')
    labels, num_classes = list(labels), checkpoint.encoder.num_classes
    if len(labels) != num_classes:
        raise ValueError(f'The model has {num_classes} classes, but {len(labels)} labels were given.')
    check_class_names(labels, 'The list of labels')
    checkpoint.labels = None if labels == [f'LABEL_{i}' for i in range(num_classes)] else labels


def unwrap_timm_model(model: nn.Module) -> Union[Spikformer, SpikformerMAE]:
    """Return the `Spikformer` or `SpikformerMAE` inside a module (or the module itself).

    Args:
        model: One of these, or one of the transformers classes, optionally wrapped in DDP, torch.compile or timm's EMA.

    Raises:
        ValueError: The module contains neither class.
    """
    found = unwrap_model(model)
    found = unwrap_model(getattr(found, 'mae', getattr(found, 'timm_model', found)))  # of the transformers classes
    if not isinstance(found, (Spikformer, SpikformerMAE)):
        raise ValueError(f'Expected a Spikformer or a SpikformerMAE, got a {type(model).__name__}.')
    return found


def checkpoint_from_model(model: nn.Module) -> Checkpoint:
    """Create a checkpoint from a copy of a model in memory; the model itself is not changed.

    Args:
        model: A `Spikformer`, a `SpikformerMAE`, one of the transformers classes, or a wrapper of one.

    Raises:
        ValueError: The model is not a Spikformer, or its weights are on the meta device or invalid.
    """
    unwrap_timm_model(model)
    model = unwrap_model(model)
    check_tensors('The model', model.state_dict())
    checkpoint = _make_checkpoint(_copy_without_hooks(model))
    cfg = getattr(checkpoint.encoder, 'pretrained_cfg', {})
    checkpoint.name = '.'.join(filter(None, (cfg.get('architecture'), cfg.get('tag')))) or None
    return checkpoint


def copy_checkpoint(source: Union[nn.Module, Checkpoint], labels: Optional[Sequence[str]] = None) -> Checkpoint:
    """Copy a model or a checkpoint in memory, so that the caller may modify the copy.

    Args:
        source: See `checkpoint_from_model`, or a checkpoint.
        labels: Class names, instead of those of the source.

    Raises:
        ValueError: See `checkpoint_from_model` and `set_labels`.
    """
    if isinstance(source, Checkpoint):
        copied = checkpoint_from_model(source.model)
        copied = replace(
            source, model=copied.model, data_config=dict(source.data_config or copied.data_config),
            name=source.name or copied.name)
    else:
        copied = checkpoint_from_model(source)
    if labels is not None:
        set_labels(copied, labels)
    return copied


def _copy_without_hooks(model: nn.Module) -> nn.Module:
    """Copy a model without its forward and backward hooks, which may have side effects."""
    memo: Dict[int, Any] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if name.startswith(('_forward', '_backward')) and isinstance(value, dict):
                memo[id(value)] = type(value)()  # an empty dict takes the place of the copy of these hooks
    return copy.deepcopy(model, memo)


def _make_checkpoint(model: nn.Module) -> Checkpoint:
    """Create a checkpoint from a timm or transformers model, moved to the CPU and set to eval mode and float32."""
    config, model = getattr(model, 'config', None), unwrap_timm_model(model)
    encoder = model.encoder if isinstance(model, SpikformerMAE) else model
    if config is None:
        cfg = data_config(encoder, input_size=get_model_input_config(encoder)['input_size'])
    else:
        cfg = config.to_dict()['pretrained_cfg']
    checkpoint = Checkpoint(model.eval().to('cpu', torch.float32), {k: cfg[k] for k in DATA_KEYS})
    if config is not None and encoder.num_classes == len(config.id2label):
        from .hf.configuration_spikformer import ordered_labels
        set_labels(checkpoint, ordered_labels(config.id2label))
    return checkpoint


def _read_file(path: Path, name: Optional[str], ema: bool, model_kwargs: Optional[Dict[str, Any]]) -> Checkpoint:
    content = read_tensors(path)
    args = _script_args(content)
    state_dict = find_state_dict(path, content, ema)
    check_tensors(path, state_dict)
    name = name or args.get('model')
    if not isinstance(name, str):
        raise ValueError(f'{path} does not contain the name of its model. Specify it with --model.')
    check_model_tag(name)
    model = create_from_state_dict(name, state_dict, trained_model_kwargs(path, content, model_kwargs), path)
    checkpoint = Checkpoint(_with_decoder(path, model, state_dict), {}, source=path, name=name)
    try:
        overrides = {k: v for k, v in args.items() if k in (*DATA_KEYS, 'img_size') and v is not None}
        # train.py takes the size of the images from its own arguments, not from its model_kwargs
        if not args or 'img_size' in (model_kwargs or {}):
            overrides['input_size'] = get_model_input_config(model)['input_size']
        checkpoint.data_config = data_config(model, **{'in_chans': model.in_chans, **overrides})
        if args:
            model.set_input_size(checkpoint.data_config['input_size'][1:])
    except PARSING_ERRORS as e:
        raise ValueError(f'{path} has an invalid data config {overrides} for {name}: {first_line(e)}.') from e
    if args:
        checkpoint.training = record_of_train_script(args)
    return checkpoint


def _script_args(content: Dict[str, Any]) -> Dict[str, Any]:
    """Return the arguments of train.py in a checkpoint; empty if there are none."""
    args = content.get('args')
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


def trained_model_kwargs(
        path: Path,
        content: Dict[str, Any],
        given: Optional[Dict[str, Any]] = None,
) -> Dict[str, Any]:
    """Return the arguments of the model in a file, as far as the file states them.

    Args:
        path: The file, which may contain arguments in its metadata.
        content: Content of the file, which may contain the arguments of train.py.
        given: Arguments of the user, which take precedence.

    Raises:
        ValueError: The arguments in the file are invalid, or train.py has used an unknown number of time steps.
    """
    args = _script_args(content)
    saved = args.get('model_kwargs') or {}
    if not isinstance(saved, dict):
        raise ValueError(f'{path} contains model_kwargs={saved!r}, expected a dictionary.')
    saved = {**read_model_args(path), 'global_pool': args.get('gp'), **saved}
    kwargs = {k: v for k, v in saved.items() if k not in _ARGS_FROM_WEIGHTS and v is not None}
    kwargs.update(given or {})
    name = args.get('model')
    model = name.partition('.')[0] if isinstance(name, str) else ''
    # otherwise the file is from other code, such as the authors', and the default of the given model is used
    is_of_package = model in timm.list_models(module='spikformer') or model.startswith(('hf-hub:', 'local-dir:'))
    if is_of_package and 'time_steps' not in kwargs:
        kwargs['time_steps'] = _trained_time_steps(path, args)
    return kwargs


def _trained_time_steps(path: Path, args: Dict[str, Any]) -> int:
    """Return the number of time steps that train.py has used if its model_kwargs do not contain it.

    If it has loaded pretrained weights, it has used their number.

    Raises:
        ValueError: The number is unknown, because the weights are not in the package.
    """
    name = args['model']
    model, _, tag = name.partition('.')
    cfgs = get_arch_pretrained_cfgs(model)  # empty for a folder or a repository on the Hub
    source = None if cfgs and (not tag or name in cfgs) else name  # weights that are not in the package
    if source is None and args.get('pretrained'):
        name = name if tag else f'{model}.{timm.get_pretrained_cfg(model).tag}'
        source = args.get('pretrained_path') or (None if shipped_weights(name) else name)
    if source is None:
        return create_registered_model(name, {}, device='meta').time_steps
    raise ValueError(
        f'{path} does not contain the number of time steps, which train.py has taken from {source}. Specify it: '
        f'--model-kwargs time_steps=T, or --time-steps T for `timm-spikformer profile`.')


def _with_decoder(path: Path, encoder: Spikformer, state_dict: Dict[str, Any]) -> Union[Spikformer, SpikformerMAE]:
    """Return the autoencoder if the tensors of a file include a decoder, or else the encoder.

    Raises:
        ValueError: The file does not contain the arguments of the decoder, or they are invalid.
    """
    state_dict = strip_prefix(state_dict)
    if not any(key.startswith('decoder.') for key in state_dict):
        return encoder
    args = read_metadata(path).get(AUTOENCODER_KEY)
    if args is None:
        raise ValueError(
            f'{path} contains a masked autoencoder, but not the arguments of its decoder. If the file is in a folder '
            f'with a config.json, use the folder. Otherwise save the autoencoder with '
            f'timm_spikformer.publishing.save_folder, or extract its encoder with `timm-spikformer convert`.')
    try:
        bound = inspect.signature(SpikformerMAE).bind(encoder, **json.loads(args))
        bound.apply_defaults()
        sizes = {name.removeprefix('decoder_'): value for name, value in bound.arguments.items() if 'decoder' in name}
        check_size(path, state_dict, sizes, decoder=True)
        mae = SpikformerMAE(*bound.args, **bound.kwargs)
        mae.load_state_dict(state_dict)
    except PARSING_ERRORS as e:
        raise ValueError(f'{path} does not fit {AUTOENCODER_KEY}={args} in its metadata: {first_line(e)}.') from e
    return mae.eval()


def _read_folder(path: Path) -> Checkpoint:
    if not (path / 'config.json').is_file():
        raise ValueError(f'{path} contains no config.json. Expected a folder saved by timm or transformers.')
    config = read_json(path / 'config.json')
    architecture = config.get('architecture', '')
    if config.get('model_type') != 'spikformer' and architecture not in timm.list_models(module='spikformer'):
        what = config.get('model_type') or architecture or 'model'
        raise ValueError(f'{path} contains a {what}, expected a Spikformer.')
    tensors = _read_weights(path)
    check_tensors(path, tensors)
    if 'hidden_size' in config:
        checkpoint = _read_hf_folder(path, config, tensors)
    else:
        checkpoint = _read_timm_folder(path, config, tensors)
    checkpoint.source, checkpoint.name = path, checkpoint.encoder.pretrained_cfg['architecture']
    check_model_name(checkpoint.name)
    if (path / 'preprocessor_config.json').is_file():
        from .hf.processing import read_data_config
        checkpoint.processor = read_json(path / 'preprocessor_config.json')
        crop_mode = checkpoint.data_config['crop_mode']
        try:
            checkpoint.data_config.update(read_data_config(checkpoint.processor, checkpoint.encoder.in_chans))
        except PARSING_ERRORS as e:
            detail = first_line(e) if isinstance(e, ValueError) else f'{type(e).__name__} {first_line(e)}'
            raise ValueError(
                f'{path / "preprocessor_config.json"} is not a valid processor config: {detail}.') from e
        is_for_images = checkpoint.encoder.in_chans != 2  # a processor of events only resizes frames
        if is_for_images and crop_mode not in ('center', checkpoint.data_config['crop_mode']):  # 'center': the default
            raise ValueError(
                f'{path / "config.json"} contains crop_mode={crop_mode!r}, but {path / "preprocessor_config.json"} '
                f'does not preprocess images in this way. Change one of them.')
    checkpoint.training = read_training_record(path)
    return checkpoint


def _read_weights(path: Path) -> Dict[str, Tensor]:
    """Read the tensors of a folder, from one file or from the shards that an index file lists."""
    if (path / WEIGHTS_FILE).is_file():
        return read_tensors(path / WEIGHTS_FILE)
    index = path / _WEIGHTS_INDEX
    if not index.is_file():
        raise ValueError(f'{path} contains no {WEIGHTS_FILE}. Save with safe_serialization=True; pickles are not read.')
    return {key: value for name in _read_shard_names(index) for key, value in read_tensors(path / name).items()}


def _read_shard_names(index: Path) -> List[str]:
    """Return the names of the files that the index of sharded weights lists; they are in the same folder."""
    parts = read_json(index).get('weight_map')
    names = list(parts.values()) if isinstance(parts, dict) else [None]
    if not all(isinstance(name, str) and re.fullmatch(r'[\w.-]+\.safetensors', name) for name in names):
        raise ValueError(f'{index} has no weight_map that lists safetensors files.')
    return sorted({*names})


def _read_timm_folder(path: Path, config: Dict[str, Any], tensors: Dict[str, Tensor]) -> Checkpoint:
    """Load a timm folder with timm."""
    model_args = config.get('model_args') or {}
    if not isinstance(model_args, dict) or not isinstance(config.get('pretrained_cfg', {}), dict):
        raise ValueError(f'model_args and pretrained_cfg in {path / "config.json"} must be JSON objects.')
    unknown = sorted(model_args.keys() - {*_MODEL_KWARGS, *_ARGS_FROM_WEIGHTS})
    if unknown:  # some of these would make timm load another file
        raise ValueError(f'model_args in {path / "config.json"} contains an unknown model argument, {unknown[0]}.')
    check_size(path, tensors, {**model_args, **{key: config[key] for key in _ARGS_FROM_WEIGHTS if key in config}})
    try:
        model = timm.create_model(f'local-dir:{path}', pretrained=True)
        checkpoint = _make_checkpoint(model)
    except PARSING_ERRORS as e:
        raise ValueError(_LOAD_ERROR.format(path, first_line(e))) from e
    labels = config.get('label_names')
    if labels:
        from .hf.configuration_spikformer import ordered_labels
        set_labels(checkpoint, ordered_labels(labels) if isinstance(labels, dict) else labels)
    return checkpoint


def _read_hf_folder(path: Path, config: Dict[str, Any], tensors: Dict[str, Tensor]) -> Checkpoint:
    """Load a transformers folder with transformers."""
    from .hf import modeling_spikformer as m
    check_size(path, tensors, dict(
        embed_dim=config['hidden_size'], depth=config.get('num_hidden_layers'), mlp_ratio=config.get('mlp_ratio'),
        in_chans=config.get('num_channels')))
    architectures = config.get('architectures')
    if isinstance(architectures, list) and 'SpikformerForMaskedImageModeling' in architectures:
        check_size(path, tensors, dict(
            embed_dim=config.get('decoder_hidden_size'), depth=config.get('decoder_num_hidden_layers'),
            mlp_ratio=config.get('decoder_mlp_ratio')), decoder=True)
        cls = m.SpikformerForMaskedImageModeling
    elif config.get('num_classes') == 0:
        cls = m.SpikformerModel
    else:
        cls = m.SpikformerForImageClassification
    try:
        model, info = cls.from_pretrained(path, use_safetensors=True, output_loading_info=True)
    except Exception as e:  # transformers raises errors of many types for a malformed config.json or weights
        raise ValueError(_LOAD_ERROR.format(path, first_line(e))) from e
    mismatched = sorted({*info['missing_keys'], *info['unexpected_keys']})
    if mismatched:
        raise ValueError(
            f'The weights in {path} do not match the model in its config.json: {len(mismatched)} tensors are missing '
            f'or unexpected, such as {mismatched[0]}.')
    return _make_checkpoint(model)
