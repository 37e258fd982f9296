"""Plot results of the group `scaling` or `events`: `python -m benchmarks.plot RESULTS.json PICTURE.png`.

`python -m benchmarks --json RESULTS.json` writes the results.
"""
import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from .results import EventResults, ModelTime, read_results

_METRICS = {'seconds': 'time, s', 'mib': 'peak memory, MiB'}
_CURVES = {
    'spikingjelly': 'spikingjelly', 'dense': 'this package, dense', 'events': 'this package, event-driven'}


def _describe_threads(environment: Dict[str, Any]) -> str:
    threads = environment['threads']
    return f'{threads} thread{"s" if threads > 1 else ""}'


def draw_scaling(results: Dict[str, Any], path: Path) -> None:
    """Plot time and memory against each axis of the group `scaling`.

    The scales are logarithmic, with a reference line of slope 1 through the first point of each curve.

    Args:
        results: Results with the entries 'environment' and 'scaling': see `benchmarks.scaling.run`.
        path: Picture to write.
    """
    base, curves = results['scaling']['base'], results['scaling']['curves']
    steps, axes = (list(dict.fromkeys(curve[key] for curve in curves)) for key in ('step', 'axis'))
    by_step_and_axis = {(curve['step'], curve['axis']): curve for curve in curves}
    figure = Figure(figsize=(13, 6.5), layout='constrained')
    figure.suptitle(
        f'{base["name"]}, T = {base["time_steps"]}, batch size {base["batch_size"]}, {base["size"]}x{base["size"]}, '
        f'depth {base["depth"]}, {_describe_threads(results["environment"])}; dashed: slope 1')
    grid = figure.subplots(len(_METRICS), len(axes), sharex='col', sharey='row')
    for row, (metric, label) in zip(grid, _METRICS.items()):
        row[0].set_ylabel(label)
        for ax, axis in zip(row, axes):
            for step in steps:
                curve = by_step_and_axis[step, axis]
                x, y = curve['x'], curve[metric]['y']
                line, = ax.loglog(x, y, 'o-', label=f'{step}: slope {curve[metric]["slope"]:.2f}')
                ax.loglog(x, [y[0] * value / x[0] for value in x], '--', linewidth=1, color=line.get_color(), alpha=0.6)
            ax.xaxis.set_major_locator(FixedLocator(by_step_and_axis[steps[0], axis]['x']))
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


def draw_events(results: Dict[str, Any], path: Path) -> None:
    """Plot the inference time, in units of the dense floor, against the mean number of events per input value.

    Args:
        results: Results with the entries 'environment' and 'events': see `benchmarks.results.EventResults`.
        path: Picture to write.

    Raises:
        ValueError: No model was compared with spikingjelly.
    """
    rows: List[ModelTime] = [
        row for row in EventResults.from_json(results['events']).models if row.spikingjelly is not None]
    if not rows:
        raise ValueError('The results of the group events contain no model that was compared with spikingjelly.')
    rates = [row.rate for row in rows]
    figure = Figure(figsize=(6.5, 4), layout='constrained')
    ax = figure.subplots()
    for name, label in _CURVES.items():
        ax.plot(rates, [getattr(row, name) for row in rows], 'o-', label=label)
    ax.axhline(1., linestyle='--', linewidth=1, color='gray', label='dense floor')
    ax.set_xlabel('events per input value, weighted by operations')
    ax.set_ylabel(f'{rows[0].step} time / dense floor')
    ax.set_ylim(bottom=0)
    ax.set_title(
        f'{rows[0].model}, T = {rows[0].time_steps}, batch size {rows[0].batch_size}, '
        f'{_describe_threads(results["environment"])}')
    ax.grid(alpha=0.3)
    ax.legend(fontsize='small')
    figure.savefig(path, dpi=150)


PLOTS = {'scaling': draw_scaling, 'events': draw_events}


def main(argv: Optional[Sequence[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks.plot', description=__doc__.splitlines()[0])
    parser.add_argument('results', type=Path, metavar='RESULTS', help='file written by python -m benchmarks --json')
    parser.add_argument('picture', type=Path, metavar='PICTURE', help='picture to write, for example .png or .svg')
    parser.add_argument('--group', choices=PLOTS, help='required if the file contains the results of both groups')
    args = parser.parse_args(argv)
    try:
        results = read_results(args.results)
    except ValueError as e:
        parser.error(str(e))
    found = [group for group in ([args.group] if args.group else PLOTS) if group in results]
    if not found:
        missing = f'does not contain {args.group!r}' if args.group else "contains neither 'scaling' nor 'events'"
        parser.error(f'{args.results} {missing}')
    if len(found) > 1:
        parser.error(f"{args.results} contains both 'scaling' and 'events': choose one with --group")
    try:
        PLOTS[found[0]](results, args.picture)
    except ValueError as e:  # also for a suffix that matplotlib does not support
        parser.error(str(e))


if __name__ == '__main__':
    main()
