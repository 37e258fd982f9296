"""Write the tables of `benchmarks/README.md` from `benchmarks/events.json`: `python -m benchmarks.tables`."""
import re
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

from timm_spikformer.temporaries import replace_file

from .results import (
    DemoSpeedup,
    EventResults,
    FirstCall,
    LayerSpeedup,
    ModelTime,
    StepMemory,
    format_environment,
    read_results,
)

FOLDER = Path(__file__).parent
RESULTS = FOLDER / 'events.json'
_BEGIN, _END = '<!-- events: written by python -m benchmarks.tables -->\n', '<!-- end of events -->\n'
_LAYER_METRICS = {
    'product': 'Product alone',
    'fused': 'Product, BN and LIF in one kernel, compared with the dense product alone',
    'fused_bytes': 'The same kernel; its input and output spikes are stored as bytes instead of float32',
    'weight_gradient': 'Gradient of the weight, compared with the dense gradient',
}
_IMPLEMENTATIONS = {'events': 'event-driven', 'dense': 'dense kernels', 'spikingjelly': 'spikingjelly'}


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines)


def _unique(values: Sequence[Any]) -> List[Any]:
    return list(dict.fromkeys(values))


def _layer_table(rows: Sequence[LayerSpeedup], metric: str) -> str:
    """Return a table of a speedup, with a row per layer and a column per number of events per input value."""
    rates = sorted({row.rate for row in rows})
    speedups = {(row.layer, row.rate): f'{getattr(row, metric):.1f}' for row in rows}
    return _table(
        ['layer', *rates],
        [[layer, *(speedups.get((layer, rate), '') for rate in rates)] for layer in _unique([r.layer for r in rows])])


def _model_table(rows: Sequence[ModelTime]) -> str:
    """Return a table of relative times, with a row per step and implementation, and a column per rate."""
    rates = sorted({row.target_rate for row in rows})
    times: Dict[Tuple, Dict[float, float]] = {}
    for row in rows:
        for name, title in _IMPLEMENTATIONS.items():
            time = getattr(row, name)
            if time is not None:
                key = row.model, row.time_steps, row.batch_size, row.step, title
                times.setdefault(key, {})[row.target_rate] = time
    steps = _unique([key[:-1] for key in times])
    ordered = sorted(times, key=lambda key: steps.index(key[:-1]))
    return _table(
        ['model', 'T', 'batch size', 'step', 'implementation', *(f'{rate:.2f}' for rate in rates)],
        [[*key, *(f'{times[key][rate]:.2f}' if rate in times[key] else '' for rate in rates)] for key in ordered])


def _memory_table(rows: Sequence[StepMemory]) -> str:
    return _table(
        ['model', 'T', 'batch size', 'step', 'event-driven, MiB', 'dense, MiB'],
        [[row.model, row.time_steps, row.batch_size, row.step, f'{row.events_mib:.0f}', f'{row.dense_mib:.0f}']
         for row in rows])


def _demo_table(rows: Sequence[DemoSpeedup]) -> str:
    batch_sizes = sorted({row.batch_size for row in rows})
    speedups = {(row.step, row.batch_size): f'{row.median:.2f}' for row in rows}
    return _table(
        ['step', *(f'batch size {n}' for n in batch_sizes)],
        [[step, *(speedups.get((step, n), '') for n in batch_sizes)] for step in _unique([row.step for row in rows])])


def _first_call_table(rows: Sequence[FirstCall]) -> str:
    def describe(seconds: float) -> str:
        return f'dense time + {seconds:.1f} s' if seconds >= 0.05 else 'no measurable overhead'

    return _table(
        ['first call of', 'batch size', 'without cached code', 'with cached code'],
        [[row.model, row.batch_size, describe(row.without_cache), describe(row.with_cache)] for row in rows])


def events_tables(results: Dict[str, Any]) -> str:
    """Return the result tables of `benchmarks.events` as Markdown.

    Raises:
        ValueError: The results do not contain the group `events`, are those of `--quick`, or have another structure.
    """
    if 'events' not in results:
        raise ValueError('The results do not contain the group events. Run `python -m benchmarks events --json FILE`.')
    if results.get('quick'):
        raise ValueError('These are results of --quick, which measures small shapes only. Run without --quick.')
    events = EventResults.from_json(results['events'])
    parts = [f'Measured with: {format_environment(results["environment"])}.\n']
    parts.append('Speedup of a layer at T = 4 and batch size 1, by the number of events per input value.\n')
    for metric, title in _LAYER_METRICS.items():
        parts += [f'{title}:\n', _layer_table(events.layers, metric)]
    parts += [
        'Time of a step in units of its dense floor, by the number of events per input value, weighted by operations\n'
        '(empty: not measured):\n',
        _model_table(events.models),
        'Peak memory of a step:\n',
        _memory_table(events.memory),
        "Speedup of a step of the demo's model by event-driven products:\n",
        _demo_table(events.demo),
        'Time of the first call, in which numba compiles kernels or reads them from its cache on disk:\n',
        _first_call_table(events.first_calls),
    ]
    return '\n'.join(parts)


def update(readme: str, results: Dict[str, Any]) -> str:
    """Return the text of the README with its tables replaced by those of the results.

    Raises:
        ValueError: The text does not contain the two markers of the tables exactly once; see also `events_tables`.
    """
    pattern = re.escape(_BEGIN) + '.*?' + re.escape(_END)
    text, count = re.subn(pattern, lambda _: f'{_BEGIN}\n{events_tables(results)}\n{_END}', readme, flags=re.S)
    if count != 1 or readme.count(_BEGIN) != 1 or readme.count(_END) != 1:
        raise ValueError(
            f'The README must contain the lines {_BEGIN.strip()!r} and {_END.strip()!r} once each, in this order.')
    return text


if __name__ == '__main__':
    path = FOLDER / 'README.md'
    replace_file(path, update(path.read_text(encoding='utf-8'), read_results(RESULTS)).encode())
