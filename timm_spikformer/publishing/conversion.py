"""Convert checkpoints of the authors' V1 code and of spikingjelly, with a report of how each tensor is mapped."""
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

import timm
from timm.models import get_model_input_config

from ..checkpoints import ConvertedStateDict, convert_state_dict
from ..errors import first_line
from ..images import data_config
from ..reading import (
    Checkpoint,
    check_data_config,
    create_from_state_dict,
    create_registered_model,
    set_labels,
    trained_model_kwargs,
)
from ..spikformer import check_model_name
from ..state_dicts import check_size, check_tensors, find_state_dict, read_tensors
from .folder import save_folder

__all__ = ['ConversionResult', 'convert']


class ConversionResult(NamedTuple):
    """Result of `convert`.

    Args:
        model: Name of the model.
        report: How each tensor is mapped, one line per tensor.
        unmapped: Names of the tensors of the file that are not converted: those that V1 declares but does not use, and
            those of the decoder of a masked autoencoder.

    >>> import tempfile, torch
    >>> model = timm.create_model('test_spikformer_v2')
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(model.state_dict(), Path(folder, 'weights.pth'))
    ...     result = convert(Path(folder, 'weights.pth'), Path(folder, 'converted'), model='test_spikformer_v2')
    >>> result.model, result.report[0]
    ('test_spikformer_v2', 'stem.stages.0.down.conv.weight <- stem.stages.0.down.conv.weight')
    """
    model: str
    report: List[str]
    unmapped: List[str]


def _report(conversion: ConvertedStateDict) -> List[str]:
    lines = []
    for target, sources in conversion.sources.items():
        lines.append(f'{target} <- {", ".join(sources) or "zeros (not in the checkpoint)"}')
    lines += [f'(unused) <- {name}: declared by V1 but never used' for name in conversion.unused]
    lines += [f'(dropped) <- {name}: the decoder of a masked autoencoder is not converted'
              for name in conversion.decoder]
    return lines


def _convert(path: Path, state_dict: Dict[str, Any], name: str, model_kwargs: Dict[str, Any]) -> ConvertedStateDict:
    """Convert a state dict to the tensors of a model; raise a ValueError if their names do not match exactly."""
    check_model_name(name)
    check_size(path, state_dict, model_kwargs)
    empty = create_registered_model(name, model_kwargs, device='meta', num_classes=0)
    try:
        conversion = convert_state_dict(state_dict, empty)
        if any(key.startswith('head.') for key in conversion.state_dict):
            empty.reset_classifier(1)  # only the names of its tensors matter
    except (LookupError, TypeError, AttributeError, RuntimeError) as e:
        raise ValueError(f'{path} is not a checkpoint of {name}: {first_line(e)}.') from e
    expected = set(empty.state_dict())
    left_over = [conversion.sources[key] for key in conversion.state_dict if key not in expected]
    missing = expected - conversion.state_dict.keys()
    if left_over or missing:
        unexpected = [name for sources in left_over for name in sources]
        problems = [
            f'{len(names)} tensors are {what} ({", ".join(sorted(names)[:5])})'
            for names, what in ((unexpected, 'unexpected'), (missing, 'missing')) if names]
        raise ValueError(
            f'{path} is not a complete checkpoint of {name}: {" and ".join(problems)}. Nothing was written.')
    return conversion


def _find_model(path: Path, state_dict: Dict[str, Any], model_kwargs: Dict[str, Any]) -> str:
    """Return the only registered model whose tensors match those of a checkpoint exactly."""
    fitting = []
    for name in timm.list_models(module='spikformer'):
        try:
            _convert(path, state_dict, name, model_kwargs)
        except ValueError:
            continue
        fitting.append(name)
    if len(fitting) != 1:
        what = f'could be {" or ".join(fitting)}' if fitting else 'matches none of the registered models'
        raise ValueError(
            f'{path} {what}. Specify the model with --model, and arguments that differ with --model-kwargs.')
    return fitting[0]


def convert(
        path: Union[str, Path],
        output: Union[str, Path],
        model: Optional[str] = None,
        labels: Optional[List[str]] = None,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> ConversionResult:
    """Convert a checkpoint file to a folder that timm and transformers load.

    For a masked autoencoder, only the encoder is converted; the resulting model has no classifier.

    Args:
        path: `.pth.tar` file of the authors' V1 code, or a state dict of spikingjelly or of this package.
        output: Folder to write; see `folders.write_folder`.
        model: Name of the model; by default, the only registered model with the same tensors.
        labels: Class names in order.
        model_kwargs: Arguments of the model for a variant without a registered name; `model` is required then.

    Raises:
        ValueError: The file is missing or would run code when opened, its tensors do not match those of exactly one
            model, an argument is invalid, or `output` contains files that must not be overwritten.
        RuntimeError: The model in the written folder returns other outputs than the checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f'{path} is a folder, expected a checkpoint file.')
    if not path.is_file():
        raise ValueError(f'{path} does not exist, expected a checkpoint file.')
    if model_kwargs and model is None:
        raise ValueError('model_kwargs (--model-kwargs) requires model (--model), the name of the model to modify.')
    content = read_tensors(path)
    state_dict = find_state_dict(path, content)
    check_tensors(path, state_dict)
    model_kwargs = trained_model_kwargs(path, content, model_kwargs)
    model = model or _find_model(path, state_dict, model_kwargs)
    conversion = _convert(path, state_dict, model, model_kwargs)
    converted = create_from_state_dict(model, state_dict, model_kwargs=model_kwargs)
    input_size = get_model_input_config(converted)['input_size']
    checkpoint = Checkpoint(converted, data_config(converted, input_size=input_size), source=path)
    check_data_config(path, checkpoint)
    if labels is not None:
        set_labels(checkpoint, labels)
    save_folder(checkpoint, output, inputs=[path], require_spikes=False, command='convert')
    return ConversionResult(model, _report(conversion), [*conversion.unused, *conversion.decoder])
