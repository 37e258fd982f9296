"""Export of trained weights from the study to the package."""
import hashlib
import json
import math
import shlex
from pathlib import Path
from typing import Any, Dict, Tuple

import safetensors.torch
import timm
import yaml

from timm_spikformer.masked_autoencoder import AUTOENCODER_KEY
from timm_spikformer.pretrained import MODEL_ARGS_KEY, SHA256_FILE, WEIGHTS_FOLDER, read_digests
from timm_spikformer.temporaries import replace_file

from .data import DATASETS
from .experiment import Study
from .models import AUTOENCODER
from .protocol import Cell, Run

__all__ = ['ship']

_TOLERANCE = 1e-3  # relative difference of test metrics, because CPUs round differently
_LOSSES = dict(
    classify='cross-entropy with label smoothing 0.1',
    classify_steps='TET with label smoothing 0.1',
    reconstruct='mean squared error of masked patches, normalized per patch')


def ship(study: Study, folder: Path = WEIGHTS_FOLDER) -> None:
    """Write `MODEL.TAG.safetensors` and `MODEL.TAG.yaml` for each cell whose `ships` is set, and update SHA256SUMS.

    The weights are from the final run with seed 0. They are evaluated again and compared with its result. The YAML file
    contains the training settings, which model cards include. The package verifies the weights against SHA256SUMS when
    it loads them. An interrupted export is completed by repeating it.

    Raises:
        ValueError: The result or the weights of one of these runs are missing, or do not belong together.
    """
    files: Dict[str, bytes] = {}  # written at the end, so that an error leaves the folder unchanged
    digests = read_digests(folder)
    for cell in study.protocol.cells.values():
        if cell.ships is None:
            continue
        finals = [run for run in study.final_runs(cell) if run.seed == 0]
        if not finals or study.result(finals[0]) is None:
            raise ValueError(f'The result of {cell.name} is missing. Run `python -m reproduction run` first.')
        if not study.is_trained(finals[0]):
            raise ValueError(
                f'The weights of {cell.name} are not in {study.checkpoint_folder(finals[0])}. Weights from another '
                f'training would differ from the result. Remove {study.result_path(finals[0])} and execute the run '
                f'again.')
        weights, name = _serialize_weights(study, finals[0]), f'{cell.ships}.safetensors'
        before = (folder / name).read_bytes() if (folder / name).is_file() else b''
        is_valid = hashlib.sha256(before).hexdigest() == digests.get(name)
        if is_valid and _parse(before) == _parse(weights):  # safetensors writes metadata in random order
            weights = before
        digests[name] = hashlib.sha256(weights).hexdigest()
        files[name] = weights
        files[f'{cell.ships}.yaml'] = _format_training_args(study, finals[0]).encode()
    for name, content in files.items():
        replace_file(folder / name, content)
    replace_file(folder / SHA256_FILE, ''.join(f'{digests[name]}  {name}\n' for name in sorted(digests)).encode())


def _serialize_weights(study: Study, run: Run) -> bytes:
    data = study.read_data(run)
    model = study.train(run, data).model.cpu()
    found, expected = study.evaluate(run, model, data, 'test')['test'], study.result(run)['test']
    for key, value in found.items():
        if not math.isclose(value, expected[key], rel_tol=_TOLERANCE):
            raise ValueError(
                f'{run.name}: the weights in {study.checkpoint_folder(run)} have a test {key} of {value}, but the '
                f'result says {expected[key]}. Weights, images or result have been replaced.')
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    model_args = {**run.cell.model_kwargs, 'time_steps': _time_steps(run.cell)}
    metadata = {
        'format': 'pt', 'training': study.protocol.digest(run), MODEL_ARGS_KEY: json.dumps(model_args, sort_keys=True)}
    if run.cell.objective == 'reconstruct':
        metadata[AUTOENCODER_KEY] = json.dumps(AUTOENCODER)
    return safetensors.torch.save(tensors, metadata)


def _parse(weights: bytes) -> Tuple[Dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    end = 8 + int.from_bytes(weights[:8], 'little')
    return json.loads(weights[8:end]), weights[end:]


def _time_steps(cell: Cell) -> int:
    return timm.create_model(cell.model, **cell.model_kwargs).time_steps


def _format_training_args(study: Study, run: Run) -> str:
    cell, recipe, result = run.cell, run.config()['recipe'], study.result(run)
    # a folder without results, because `run` skips runs that have one
    command = ['python', '-m', 'reproduction', 'run', '--only', cell.name, '--seeds', '0', '--runs', 'repeated_runs']
    values = dict(
        command=shlex.join(command), dataset=DATASETS[cell.dataset], model=cell.model, time_steps=_time_steps(cell),
        loss=_LOSSES[cell.objective])
    if 'accuracy' in result['test']:
        values['test_accuracy'] = round(result['test']['accuracy'], 2)
    if cell.note is not None:
        values['note'] = cell.note
    if cell.init is not None:
        values['initialized_from'] = f'{cell.init} ({study.protocol.cells[cell.init].title})'
    # nested values are stored as text, because the model card shows a table
    for key, value in recipe.items():
        values[key] = json.dumps(value) if isinstance(value, (dict, list)) else value
    return yaml.safe_dump(values, sort_keys=False)
