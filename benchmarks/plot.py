"""Plot results that `python -m benchmarks --json FILE` wrote: `python -m benchmarks.plot FILE PICTURE.png`.

Results of the group `scaling` are plotted against each axis, and those of `events` against the events per input.
"""
import json
import sys
from pathlib import Path
from typing import Any, Dict

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

ROWS = (('s', 'time, s'), ('MiB', 'peak memory, MiB'))


def draw(results: Dict[str, Any], path: str) -> None:
    """Plot time and memory against each axis, on logarithmic scales, with a line of slope 1 from each first point."""
    kinds, axes = (list(dict.fromkeys(names)) for names in zip(*(key.split(', ') for key in results['lines'])))
    figure = Figure(figsize=(13, 6.5), layout='constrained')
    figure.suptitle(f'{results["base"]}, {results["threads"]} threads; dashed: linear')
    grid = figure.subplots(len(ROWS), len(axes), sharex='col', sharey='row')
    for row, (unit, title) in zip(grid, ROWS):
        row[0].set_ylabel(title)
        for ax, axis in zip(row, axes):
            for kind in kinds:
                line = results['lines'][f'{kind}, {axis}']
                x, y = line['x'], line[unit]['y']
                mark, = ax.loglog(x, y, 'o-', label=f'{kind}: slope {line[unit]["slope"]:.2f}')
                ax.loglog(x, [y[0] * value / x[0] for value in x], '--', linewidth=1, color=mark.get_color(), alpha=0.6)
            ax.xaxis.set_major_locator(FixedLocator(x))
            ax.xaxis.set_major_formatter(StrMethodFormatter('{x:.0f}'))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
            ax.yaxis.set_minor_formatter(NullFormatter())
            ax.grid(alpha=0.3)
            ax.legend(loc='upper left', fontsize='small')
    for ax, axis in zip(grid[-1], axes):
        ax.set_xlabel(axis)
    figure.savefig(path, dpi=100)


def draw_events(results: Dict[str, Any], path: str) -> None:
    """Plot the inference time, in units of the dense floor, against the number of events per input."""
    curve = results['curve']
    figure = Figure(figsize=(6.5, 4), layout='constrained')
    ax = figure.subplots()
    rates = [entry['rate'] for entry in curve]
    for key, label in (('spikingjelly', 'spikingjelly'), ('dense', 'this package, dense'),
                       ('events', 'this package, event-driven')):
        ax.plot(rates, [entry[key] for entry in curve], 'o-', label=label)
    ax.axhline(1., linestyle='--', linewidth=1, color='gray', label='dense floor')
    ax.set_xlabel('events per input, weighted by operations')
    ax.set_ylabel('inference time / dense floor')
    ax.set_ylim(bottom=0)
    ax.set_title(f'V2-8-512, T = 4, batch 1, {results["threads"]} thread{"s" if results["threads"] > 1 else ""}')
    ax.grid(alpha=0.3)
    ax.legend(fontsize='small')
    figure.savefig(path, dpi=150)


if __name__ == '__main__':
    source, path = sys.argv[1:]
    found = json.loads(Path(source).read_text())
    if 'events' in found:
        draw_events(found['events'], path)
    else:
        draw(found['scaling'], path)
