"""Records of how a model was trained, in checkpoints of train.py, of this package and of transformers' Trainer."""
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import yaml

from .checkpoints import TRAINING_FILE
from .errors import first_line
from .state_dicts import PARSING_ERRORS, read_json

__all__ = ['TrainingRecord', 'read_training_record', 'record_of_train_script']

# Arguments of train.py that describe the machine or contain local paths; they are not published, see `_is_private`
_PRIVATE_ARGS = frozenset((
    'data', 'output', 'output_dir', 'config', 'experiment', 'resume', 'initial_checkpoint', 'pretrained_path',
    'class_map', 'device', 'device_modules', 'local_rank', 'rank', 'world_size', 'distributed', 'prefetcher',
    'log_interval', 'workers', 'pin_mem', 'log_wandb'))


@dataclass
class TrainingRecord:
    """Record of how a model was trained.

    Args:
        command: Command that repeats the training, or 'transformers Trainer', whose command is not recorded.
        args: Training arguments by name. The names are those of the program that trained the model.

    >>> TrainingRecord('timm-spikformer demo --epochs=5', {'epochs': 5}).args['epochs']
    5
    """
    command: str
    args: Dict[str, Any] = field(default_factory=dict)


def record_of_train_script(args: Mapping[Any, Any]) -> TrainingRecord:
    """Return the record of a training by train.py, without arguments that are empty or private."""
    public_args = {str(k): v for k, v in args.items() if v not in (None, '', [], {}) and not _is_private(str(k), v)}
    return TrainingRecord(f'python -m timm_spikformer train.py -c {TRAINING_FILE} --data-dir DATA', public_args)


def _is_private(key: str, value: Any) -> bool:
    if key in _PRIVATE_ARGS or key.endswith(('data_dir', 'dataset_dir')) or key.startswith('wandb_'):
        return True
    if isinstance(value, Mapping):
        return any(_is_private(str(k), v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return any(_is_private('', v) for v in value)
    return bool(re.search(r'(^|[/=:\s])(/|~|[A-Za-z]:\\)', str(value)))


def read_training_record(path: Path) -> Optional[TrainingRecord]:
    """Return how the model of a folder was trained, or None if no file records it.

    Raises:
        ValueError: A file with the record is damaged.
    """
    file = path / TRAINING_FILE
    if file.is_file():
        try:
            args = yaml.safe_load(file.read_text(encoding='utf-8'))
            return TrainingRecord(str(args.pop('command')), args)
        except (yaml.YAMLError, UnicodeError, *PARSING_ERRORS) as e:
            raise ValueError(
                f'{file} is not a valid training record; expected a mapping with the key command: {type(e).__name__} '
                f'{first_line(e)}. Remove it.') from e
    # in the folder itself or in a checkpoint folder of transformers' Trainer
    files = [*path.glob('trainer_state.json'), *path.glob('checkpoint-*/trainer_state.json')]
    args = max(map(_read_trainer_state, files), key=lambda args: args['steps'], default=None)
    return None if args is None else TrainingRecord('transformers Trainer', args)


def _read_trainer_state(path: Path) -> Dict[str, Any]:
    """Return the training arguments in a trainer_state.json of transformers, without those that it does not record."""
    state = read_json(path)
    try:
        rates = [entry['learning_rate'] for entry in state['log_history'] if 'learning_rate' in entry]
        args = dict(
            epochs=state['num_train_epochs'], steps=int(state['global_step']),
            batch_size=state.get('train_batch_size'), peak_learning_rate_logged=max(rates, default=None))
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(
            f'{path} is not a valid Trainer state: {type(e).__name__} {first_line(e)}. Remove it.') from e
    return {k: v for k, v in args.items() if v is not None}
