"""Write the tables of `benchmarks/README.md` from `benchmarks/events.json`: `python -m benchmarks.tables`."""
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Sequence

FOLDER = Path(__file__).parent
_BEGIN, _END = '<!-- events: written by python -m benchmarks.tables -->\n', '<!-- end of events -->\n'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ['---'] * len(head), *rows]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def events_tables(results: Dict[str, Any]) -> str:
    """Return the tables of the group `events` as Markdown."""
    found = results['events']
    layers: Dict[str, Dict[str, Dict[str, float]]] = {}
    models: Dict[str, List[Dict[str, float]]] = {}
    demo: Dict[str, List[str]] = {}
    for key, entry in found.items():
        title, _, rate = key.rpartition(', rate ')
        if not isinstance(entry, dict):
            continue
        if 'gradient of the weight' in entry:
            layers.setdefault(title, {})[rate] = entry
        elif 'floor' in entry:
            models.setdefault(title, []).append(entry)
        elif key.startswith('demo, '):
            _, step, batch = key.split(', ')
            demo.setdefault(step, []).append(f'{batch}: {entry["median"]:.2f}')
    text = f'{results["events"]["threads"]} thread, {results["machine"]}, torch {results["torch"]}.\n\n'
    text += 'Speedup over the dense product (for gradients: over the dense gradient), by events per input:\n\n'
    rates = list(next(iter(layers.values())))
    for what in ('product', 'with BN and LIF', 'with BN and LIF, bytes in, bytes out', 'gradient of the weight'):
        text += _table(
            [what, *rates],
            [[name, *(f'{by_rate[rate][what]:.1f}' for rate in rates)] for name, by_rate in layers.items()]) + '\n'
    text += 'Time of whole models in units of the dense floor, with the events per input in parentheses:\n\n'
    text += _table(
        ['', 'event-driven', 'dense kernels'],
        [[title, *(', '.join(f'{e[key]:.2f} ({e["rate"]:.2f})' for e in entries) for key in ('events', 'dense'))]
         for title, entries in models.items()]) + '\n'
    text += "Speedup of the demo's model by event-driven products:\n\n"
    text += _table(['step', 'by batch size'], [[step, ', '.join(gains)] for step, gains in demo.items()]) + '\n'
    memory = found['memory_mib']
    text += (f'Peak memory of a training step of V2-8-512, T = 4, batch 1: {memory["events"]:.0f} MiB, '
             f'{memory["dense"]:.0f} MiB without event-driven products.\n\n')
    for key, entry in found.items():
        if key.startswith('first use, '):
            text += (f'First call of {key.removeprefix("first use, ")}: {entry["cold"]:.1f} s longer than a dense '
                     f'call, {entry["warm"]:.1f} s longer with compiled code on disk.\n')
    return text


def update(readme: str, results: Dict[str, Any]) -> str:
    """Return the text of the README with its tables replaced by those of the results."""
    pattern = re.escape(_BEGIN) + '.*?' + re.escape(_END)
    return re.sub(pattern, lambda _: f'{_BEGIN}\n{events_tables(results)}\n{_END}', readme, flags=re.S)


if __name__ == '__main__':
    path = FOLDER / 'README.md'
    path.write_text(update(path.read_text(), json.loads((FOLDER / 'events.json').read_text())))
