"""Converts checkpoints of the authors' V1 code and of spikingjelly, and accounts for every tensor."""
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

import timm

from ..checkpoints import Conversion, convert_state_dict
from .checkpoint import create_matching, from_model, read_tensors, set_labels
from .folder import save_folder

__all__ = ['Converted', 'convert']


class Converted(NamedTuple):
    """The model's name, and one line for every tensor of the checkpoint and every tensor of the model."""
    model: str
    report: List[str]


def _report(conversion: Conversion) -> List[str]:
    lines = []
    for target, sources in conversion.sources.items():
        lines.append(f'{target} <- {", ".join(sources) or "zeros: the checkpoint has none"}')
    lines += [f'(unused) <- {name}: declared by V1 and never called' for name in conversion.unused]
    return lines


def _fitting(state_dict: Dict[str, Any]) -> List[str]:
    """Names of the registered models that have all tensors of a checkpoint and no other."""
    names = []
    for name in timm.list_models(module='spikformer'):
        model = timm.create_model(name, device='meta')
        try:
            conversion = convert_state_dict(state_dict, model)
        except (ValueError, KeyError):
            continue
        if conversion.state_dict.keys() == model.state_dict().keys():
            names.append(name)
    return names


def convert(
        path: Union[str, Path],
        output: Union[str, Path],
        model: Optional[str] = None,
        labels: Optional[List[str]] = None,
) -> Converted:
    """Convert a file to a folder that timm and transformers load.

    Args:
        path: The authors' `.pth.tar`, or a state dict of spikingjelly's or of this package
        output: The folder to write
        model: Name of the model; by default the one whose tensors these are
        labels: Names of the classes

    Raises:
        ValueError: The file would run code when opened, or a tensor of it or of the model is left over.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'There is no file {path}.')
    state_dict = read_tensors(path)
    if model is None:
        fitting = _fitting(state_dict)
        if len(fitting) != 1:
            what = f'could be of {" or ".join(fitting)}' if fitting else 'is of none of the registered models'
            raise ValueError(f'{path} {what}. Name the model with --model.')
        model = fitting[0]
    if model in timm.list_models(module='spikformer'):
        empty = timm.create_model(model, device='meta')
        conversion = convert_state_dict(state_dict, empty)
        _check_complete(path, model, conversion, set(empty.state_dict()))
    checkpoint = from_model(create_matching(model, state_dict))
    if labels is not None:
        set_labels(checkpoint, labels)
    save_folder(checkpoint, output)
    return Converted(model, _report(conversion))


def _check_complete(path: Path, model: str, conversion: Conversion, expected: set) -> None:
    left_over = [conversion.sources[key] for key in conversion.state_dict if key not in expected]
    missing = expected - conversion.state_dict.keys()
    if left_over or missing:
        names = [name for sources in left_over for name in sources]
        some = ', '.join((names or sorted(missing))[:5])
        raise ValueError(
            f'{path} is not a whole checkpoint of {model}: {len(names)} of its tensors are left over, {len(missing)} '
            f'of the model are missing ({some}). Nothing was written.')
