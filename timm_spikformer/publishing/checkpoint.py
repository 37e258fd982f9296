"""Reads what is to be published: a checkpoint of timm's train.py, a folder of timm's or transformers', or a model."""
import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import timm
import torch
import yaml
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import get_model_input_config, load_state_dict
from timm.models._helpers import _torch_load
from torch import nn

from ..checkpoints import TRAINING_FILE, convert_state_dict
from ..demo.data import DATA_KEYS
from ..hf.configuration_spikformer import SpikformerConfig
from ..hf.image_processing import read_data_config
from ..masked_autoencoder import SpikformerMAE
from ..spikformer import Spikformer, check_model_name

__all__ = ['Checkpoint', 'Training', 'create_matching', 'from_model', 'read_checkpoint', 'read_tensors']

# of the machine, or of the run's place on it
_PRIVATE_ARGS = re.compile(
    r'(data|dataset)_dir$|^(data|output|output_dir|config|experiment|resume|initial_checkpoint|class_map|device|'
    r'device_modules|local_rank|rank|world_size|distributed|prefetcher|log_interval|workers|pin_mem|log_wandb)$|^wandb_')


@dataclass
class Training:
    """How a model was trained, as far as its checkpoint says: the command, and the arguments by their names."""
    command: str
    args: Dict[str, Any] = field(default_factory=dict)


@dataclass
class Checkpoint:
    """A model on the CPU in eval mode, and what is known of it.

    Args:
        model: A `Spikformer` or a `SpikformerMAE`.
        data_config: How images are presented: timm's `input_size`, `mean`, `std`, `interpolation`, `crop_pct`.
        labels: Names of the classes, in their order; none of a model without a classifier, or where nobody knows them.
        training: How it was trained.
        processor: The preprocessor_config.json that it came with, for transformers; by default one is written that
            does what timm does.
    """
    model: Union[Spikformer, SpikformerMAE]
    data_config: Dict[str, Any]
    labels: Optional[List[str]] = None
    training: Optional[Training] = None
    processor: Optional[Dict[str, Any]] = None

    @property
    def encoder(self) -> Spikformer:
        return self.model.encoder if isinstance(self.model, SpikformerMAE) else self.model


def read_tensors(path: Path) -> Dict[str, Any]:
    """What a file holds, a safetensors file or a pickle of nothing but tensors and plain values.

    Raises:
        ValueError: The file is damaged, or would run code when it is opened.
    """
    try:
        if path.suffix == '.safetensors':
            return load_state_dict(str(path))
        return _torch_load(str(path))
    except SafetensorError as e:
        raise ValueError(f'{path} is not a whole safetensors file: {e}.') from e
    except RuntimeError as e:
        raise ValueError(
            f'{path} cannot be opened without running code from it, or is damaged. Expected a checkpoint of tensors '
            f'and plain values; save the state_dict alone. {str(e).splitlines()[0]}') from e
    except (EOFError, OSError, KeyError, AttributeError) as e:
        raise ValueError(f'{path} is not a checkpoint, or is damaged: {e}.') from e


def create_matching(name: str, state_dict: Dict[str, Any], **kwargs) -> Spikformer:
    """The model `name` with the classes and input channels of `state_dict`, which is loaded: all of it, or an error."""
    check_model_name(name)
    empty = timm.create_model(name, device='meta', **{**kwargs, 'num_classes': 0})
    converted = convert_state_dict(state_dict, empty).state_dict
    head = converted.get('head.fc.weight')
    first = converted.get(f'{empty.pretrained_cfg["first_conv"]}.weight')
    if first is None:
        raise ValueError(
            f'The checkpoint is not one of a Spikformer: it has no first convolution. It holds {len(converted)} '
            f'tensors, {next(iter(converted), "none")!r} first.')
    kwargs = {**kwargs, 'num_classes': 0 if head is None else len(head), 'in_chans': first.shape[1]}
    model = timm.create_model(name, **kwargs)
    try:
        model.load_state_dict(converted)
    except RuntimeError as e:
        raise ValueError(f'The checkpoint is of another model than {name}. {str(e).splitlines()[-1].strip()}') from e
    return model.eval()


def read_checkpoint(
        path: Union[str, Path],
        model: Optional[str] = None,
        ema: bool = False,
) -> Checkpoint:
    """Read a file of train.py's, a bare state dict, or a folder with a config.json.

    Args:
        path: File or folder
        model: Name of the model, for a file that does not say it
        ema: Take the averaged weights of train.py's `--model-ema`

    Raises:
        ValueError: What is wrong with it, and what was expected.
    """
    path = Path(path)
    if path.is_dir():
        if ema:
            raise ValueError(f'{path} is a folder, which holds one set of weights. --ema is for a file of train.py.')
        return _read_folder(path)
    if path.is_file():
        return _read_file(path, model, ema)
    raise ValueError(f'There is no {path}. Expected a checkpoint file, or a folder with a config.json.')


def set_labels(checkpoint: Checkpoint, labels: Sequence[str]) -> None:
    """Name the classes.

    Raises:
        ValueError: There are not as many names as classes, or one is there twice.
    """
    labels, num_classes = list(labels), checkpoint.encoder.num_classes
    if len(labels) != num_classes:
        raise ValueError(f'The model has {num_classes} classes, but {len(labels)} labels were given.')
    twice = next((name for name in labels if labels.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f'The label {twice!r} is there twice; each class needs a name of its own.')
    checkpoint.labels = labels


def _read_file(path: Path, name: Optional[str], ema: bool) -> Checkpoint:
    content = read_tensors(path)
    args = content.get('args')
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    if ema and 'state_dict_ema' not in content:
        raise ValueError(
            f'{path} holds no averaged weights, which train.py stores with --model-ema. Publish without --ema.')
    name = name or args.get('model')
    if name is None:
        raise ValueError(f'{path} does not say what model it is of. Name it with --model.')
    state_dict = content['state_dict_ema'] if ema else content
    model = create_matching(name.split('.')[0], state_dict, **(args.get('model_kwargs') or {}))
    sizes = {k: v for k, v in args.items() if k in (*DATA_KEYS, 'img_size', 'in_chans') and v is not None}
    config = _resolve({**sizes, 'in_chans': model.in_chans}, model)
    if not args:
        return Checkpoint(model, {k: config[k] for k in DATA_KEYS})
    model.set_input_size(config['input_size'][1:])
    shown = {k: v for k, v in args.items() if v not in (None, '', [], {}) and not _is_private(k, v)}
    command = f'python -m timm_spikformer train.py -c {TRAINING_FILE} --data-dir DATA'
    return Checkpoint(model, {k: config[k] for k in DATA_KEYS}, None, Training(command, shown))


def _resolve(args: Dict[str, Any], model: Spikformer) -> Dict[str, Any]:
    """timm's data config; where its mean and deviation are of other channels than the model's, their average."""
    config = resolve_data_config(args, model=model)
    for key in ('mean', 'std'):
        if len(config[key]) != model.in_chans:
            config[key] = (sum(config[key]) / len(config[key]),) * model.in_chans
    return config


def _is_private(key: str, value: Any) -> bool:
    return bool(_PRIVATE_ARGS.search(key)) or bool(re.search(r'(^|[/=:\s])(/|~|[A-Za-z]:\\)', str(value)))


def _read_folder(path: Path) -> Checkpoint:
    if not (path / 'config.json').is_file():
        raise ValueError(f'{path} holds no config.json. Expected a folder that timm or transformers has saved.')
    config = _read_json(path / 'config.json')
    if not (path / 'model.safetensors').is_file() and not (path / 'model.safetensors.index.json').is_file():
        raise ValueError(f'{path} holds no model.safetensors. Save with safe_serialization=True; pickles are not read.')
    architecture = config.get('architecture', '')
    if config.get('model_type') != 'spikformer' and architecture not in timm.list_models(module='spikformer'):
        what = config.get('model_type') or architecture or 'model'
        raise ValueError(f'{path} is of a {what}, expected a Spikformer.')
    model, hf_config = _load_folder(path, config)
    checkpoint = from_model(model, hf_config)
    if (path / 'preprocessor_config.json').is_file():
        checkpoint.processor = _read_json(path / 'preprocessor_config.json')
        checkpoint.data_config.update(read_data_config(checkpoint.processor, checkpoint.encoder.in_chans))
    if (path / TRAINING_FILE).is_file():
        args = yaml.safe_load((path / TRAINING_FILE).read_text())
        checkpoint.training = Training(args.pop('command'), args)
    else:
        checkpoint.training = _trainer_training(path)
    return checkpoint


def _load_folder(path: Path, config: Dict[str, Any]) -> Tuple[Union[Spikformer, SpikformerMAE], SpikformerConfig]:
    """The timm model, or the masked autoencoder, in a folder, and its configuration."""
    from ..hf import modeling_spikformer as m
    hf_config = SpikformerConfig.from_dict(dict(config))
    if 'SpikformerForMaskedImageModeling' in (config.get('architectures') or []):
        cls = m.SpikformerForMaskedImageModeling
    elif config.get('num_classes', hf_config.num_labels) == 0:
        cls = m.SpikformerModel
    else:
        cls = m.SpikformerForImageClassification
    try:
        model, info = cls.from_pretrained(path, config=hf_config, use_safetensors=True, output_loading_info=True)
    except (SafetensorError, RuntimeError, OSError) as e:
        raise ValueError(
            f'The weights in {path} do not load into the model of its config.json: {str(e).splitlines()[0]}') from e
    lacking = sorted({*info['missing_keys'], *info['unexpected_keys']})
    if lacking:
        raise ValueError(
            f'The weights in {path} are not those of the model in its config.json: {len(lacking)} tensors are missing '
            f'or left over, {lacking[0]} for one.')
    return timm_part(model), hf_config


def _trainer_training(path: Path) -> Optional[Training]:
    """What the newest trainer_state.json says, of the folder itself or of one of its checkpoints."""
    states = [_read_json(p) for p in (*path.glob('trainer_state.json'), *path.glob('checkpoint-*/trainer_state.json'))]
    if not states:
        return None
    state = max(states, key=lambda state: state['global_step'])
    log = [entry for entry in state['log_history'] if 'learning_rate' in entry]
    args = dict(
        epochs=state['num_train_epochs'], steps=state['global_step'], batch_size=state.get('train_batch_size'),
        peak_learning_rate_logged=max((entry['learning_rate'] for entry in log), default=None))
    return Training('transformers Trainer', {k: v for k, v in args.items() if v is not None})


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f'{path} is not JSON: {e}.') from e


def timm_part(model: nn.Module) -> Union[Spikformer, SpikformerMAE]:
    """What one of the transformers classes holds; a timm model or a masked autoencoder itself.

    Raises:
        ValueError: It is neither.
    """
    model = getattr(model, 'mae', None) or getattr(model, 'timm_model', model)
    if not isinstance(model, (Spikformer, SpikformerMAE)):
        raise ValueError(f'Expected a Spikformer or a SpikformerMAE, got a {type(model).__name__}.')
    return model


def from_model(model: nn.Module, config: Optional[SpikformerConfig] = None) -> Checkpoint:
    """Of a model in memory: a timm one, a masked autoencoder, or one of the transformers classes."""
    config = getattr(model, 'config', config)
    model = timm_part(model)
    encoder = model.encoder if isinstance(model, SpikformerMAE) else model
    labels = None
    if config is None:
        data_config = _resolve(dict(input_size=get_model_input_config(encoder)['input_size']), encoder)
    else:
        data_config = config.to_dict()['pretrained_cfg']
        names = list(config.id2label.values())
        if len(names) == encoder.num_classes and names != [f'LABEL_{i}' for i in range(len(names))]:
            labels = names
    return Checkpoint(model.eval().to('cpu', torch.float32), {k: data_config[k] for k in DATA_KEYS}, labels)
