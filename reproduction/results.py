"""Results of runs: JSON files, checked when they are read, because the report uses nothing else."""
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from timm_spikformer.arguments import check_finite, check_number
from timm_spikformer.state_dicts import PARSING_ERRORS
from timm_spikformer.temporaries import replace_file

from .protocol import SPIKFORMERS, Run

__all__ = ['read_result', 'write_json']


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file completely or not at all."""
    replace_file(path, (json.dumps(values, indent=1) + '\n').encode())


def read_result(path: Path, run: Run, expected: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """Read and check the result of a run. Return None if there is no file, or if its values differ from `expected`.

    Args:
        path: The JSON file.
        run: The run.
        expected: Values by key that change with the settings, the images and the initial weights, such as digests.

    Raises:
        ValueError: The file is damaged, or it is the result of another run.
    """
    if path.is_dir():
        raise ValueError(f'{path} is a folder. Remove it; the result of {run.name} is written to a file of that name.')
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding='utf-8'), object_pairs_hook=_unique_keys)
        if any(result[key] != value for key, value in expected.items()):
            return None
        _check(result, run)
    except PARSING_ERRORS as e:
        raise ValueError(
            f'{path} is damaged or is not the result of this run: {e!r}. Restore it, or remove it to execute the '
            f'run again.') from e
    return result


def _unique_keys(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    result: Dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f'the key {key!r} appears twice')
        result[key] = value
    return result


def _check(result: Dict[str, Any], run: Run) -> None:
    """Raise one of `PARSING_ERRORS` if a value that the report uses is missing or impossible."""
    # not `attempt`: the order of tries may change
    for key, value in dict(cell=run.cell.name, seed=run.seed, config=run.config()).items():
        if result[key] != value:
            raise ValueError(f'{key} is {result[key]!r}, expected {value!r}')
    check_number('cpu_seconds', result['cpu_seconds'])
    is_reconstruction = run.cell.objective == 'reconstruct'
    for split in run.splits:
        if is_reconstruction:
            check_number(f'{split}: loss', result[split]['loss'])
        else:
            check_number(f'{split}: accuracy', result[split]['accuracy'], maximum=100)
    for record in result['history']:
        check_finite('loss', record['loss'])
        check_number('seconds', record['seconds'])
        if not isinstance(record.get('gpu', ''), str):
            raise ValueError(f'gpu must be a string, got {record["gpu"]!r}')
    for key in ('cpu', 'python', 'torch', 'timm'):
        if not isinstance(result['machine'][key], str):
            raise ValueError(f'machine: {key} must be a string, got {result["machine"][key]!r}')
    if run.is_final:
        operations = result['operations']
        for key in ('parameters', 'total_macs') if is_reconstruction else ('parameters', 'dense_macs', 'energy_uj'):
            check_number(key, operations[key])
        if run.cell.model in SPIKFORMERS:
            check_number('firing_rate', operations['firing_rate'], maximum=1)
        elif 'firing_rate' in operations:
            raise ValueError(f'{run.cell.model} has no spiking neurons, but the result has a firing_rate')
