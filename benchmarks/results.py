"""Results as JSON: the environment of a run, the rows of the group `events`, reading and writing."""
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from timm_spikformer.temporaries import replace_file

PACKAGES = ('torch', 'numba', 'timm', 'spikingjelly')


class LayerSpeedup(NamedTuple):
    """Speedups of event-driven operations of one layer.

    Args:
        layer: Key of `benchmarks.events.LAYERS`.
        rate: Events per input value.
        product: Speedup of the product over the dense product.
        fused: Speedup of product, BN and LIF over the dense product alone.
        fused_bytes: As `fused`, with input and output spikes as bytes.
        weight_gradient: Speedup of the gradient of the weight over its dense counterpart.
    """
    layer: str
    rate: float
    product: float
    fused: float
    fused_bytes: float
    weight_gradient: float


class ModelTime(NamedTuple):
    """Time of one step of a model, as a multiple of the dense floor measured in the same rounds.

    Args:
        model: Name of the model.
        time_steps: T.
        batch_size: Batch size.
        step: 'inference' or 'training step'.
        target_rate: Intended number of events per input value, weighted by operations.
        rate: Number reached.
        seconds: Time of the step with event-driven products.
        floor_seconds: Dense floor.
        events: Time with event-driven products, relative to the dense floor.
        dense: Time with dense kernels, relative to the dense floor.
        spikingjelly: Time with spikingjelly's layers, relative to the dense floor; None if not measured.
    """
    model: str
    time_steps: int
    batch_size: int
    step: str
    target_rate: float
    rate: float
    seconds: float
    floor_seconds: float
    events: float
    dense: float
    spikingjelly: Optional[float]


class StepMemory(NamedTuple):
    """Peak memory of one step of a model in MiB, with event-driven products and with dense kernels."""
    model: str
    time_steps: int
    batch_size: int
    step: str
    events_mib: float
    dense_mib: float


class DemoSpeedup(NamedTuple):
    """Speedup of a step of the demo's model by event-driven products: median and quartiles of the rounds."""
    step: str
    batch_size: int
    median: float
    low: float
    high: float


class FirstCall(NamedTuple):
    """Seconds that the first call takes longer than a dense call, without and with compiled code on disk."""
    model: str
    batch_size: int
    without_cache: float
    with_cache: float


class EventResults(NamedTuple):
    """Results of the group `events`."""
    layers: List[LayerSpeedup]
    models: List[ModelTime]
    memory: List[StepMemory]
    demo: List[DemoSpeedup]
    first_calls: List[FirstCall]

    def to_json(self) -> Dict[str, List[Dict[str, Any]]]:
        return {name: [row._asdict() for row in rows] for name, rows in self._asdict().items()}

    @classmethod
    def from_json(cls, results: Dict[str, Any]) -> 'EventResults':
        """Return the rows of `to_json`.

        Raises:
            ValueError: A list of rows is missing or unknown, or the keys of a row are not the expected ones.
        """
        rows = dict(layers=LayerSpeedup, models=ModelTime, memory=StepMemory, demo=DemoSpeedup, first_calls=FirstCall)
        _check_keys('the results of the group events', results, cls._fields)
        for name, row_cls in rows.items():
            for row in results[name]:
                _check_keys(f'a row of {name}', row, row_cls._fields)
        return cls(**{name: [row_cls(**row) for row in results[name]] for name, row_cls in rows.items()})


def _check_keys(title: str, found: Dict[str, Any], expected: Any) -> None:
    if set(found) != set(expected):
        raise ValueError(f'{title} must have the keys {", ".join(expected)}, got {", ".join(found)}')


def _read_cpu_model() -> str:
    """Return the model of the CPU, or the architecture if the system does not tell the model."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return models[0] if models else platform.processor() or platform.machine()


def describe_environment(threads: int) -> Dict[str, Any]:
    """Return CPU model, number of CPUs, number of threads of PyTorch, and versions of Python and packages."""
    return dict(
        CPU=_read_cpu_model(), CPUs=os.cpu_count(), threads=threads, Python=platform.python_version(),
        **{name: version(name) for name in PACKAGES})


def format_environment(environment: Dict[str, Any]) -> str:
    return ', '.join(f'{name} {value}' for name, value in environment.items())


def read_results(path: Path) -> Dict[str, Any]:
    """Read a file that `python -m benchmarks --json FILE` wrote.

    Raises:
        ValueError: There is no such file, or it contains no results.
    """
    try:
        results = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f'{path} is not a file with results of `python -m benchmarks --json`: {e}') from e
    if not isinstance(results, dict) or 'environment' not in results:
        raise ValueError(f'{path} contains no results of `python -m benchmarks --json`: there is no "environment".')
    return results


def write_results(path: Path, results: Dict[str, Any]) -> None:
    replace_file(path, (json.dumps(results, indent=1) + '\n').encode())
