"""Writer of README.md and the figures of the study, from the protocol and the results in runs/."""
import io
import math
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional

import jinja2
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from timm_spikformer.temporaries import replace_file

from .experiment import PROFILED_IMAGES, Study
from .protocol import Cell, Protocol
from .statistics import Difference, Summary, paired_difference, summarize

__all__ = ['write_report']

FOLDER = Path(__file__).parent
TEMPLATE = 'report.md.jinja'
_MARK = b'<!-- Written by `python -m reproduction report`'  # in README.md
# Fixed ids, so that the same results give the same bytes; text is not converted to outlines of the installed fonts
_STYLE = {'svg.hashsalt': 'reproduction', 'svg.fonttype': 'none', 'font.size': 9}


class Row(NamedTuple):
    """A cell, and the results of its final runs in the order of the seeds."""
    cell: Cell
    results: List[Dict[str, Any]]

    @property
    def is_complete(self) -> bool:
        return len(self.results) == len(self.cell.seeds)

    def values(self, *keys: str) -> List[float]:
        """Return one value per run, such as `values('test', 'accuracy')`."""
        values = []
        for result in self.results:
            for key in keys:
                result = result[key]
            values.append(result)
        return values

    def summary(self, *keys: str) -> Optional[Summary]:
        return summarize(self.values(*keys)) if self.results else None

    @property
    def selected_try(self) -> str:
        """Main settings of the best try; empty if the cell has only one try."""
        if len(self.cell.tries) == 1:
            return ''
        recipe = self.results[0]['config']['recipe']
        text = f'lr {recipe["lr"]:g}, {recipe["epochs"]} epoch{"s" if recipe["epochs"] > 1 else ""}'
        return text + (f', layer decay {recipe["layer_decay"]:g}' if recipe.get('layer_decay') else '')


class Claim(NamedTuple):
    """A claim, and the difference of test accuracies that it is about; None if runs are missing."""
    text: str
    difference: Optional[Difference]

    @property
    def verdict(self) -> str:
        if self.difference is None:
            return 'runs are missing'
        if not self.difference.excludes_zero:
            return 'not shown'
        return 'shown' if self.difference.mean > 0 else 'contradicted'


def _rows(study: Study) -> Dict[str, Row]:
    rows = {}
    for name, cell in study.protocol.cells.items():
        results = [study.result(run) for run in study.final_runs(cell)]
        rows[name] = Row(cell, [result for result in results if result is not None])
    return rows


def _examine(text: str, rows: List[Row]) -> Claim:
    """Compare two cells, or the difference of two cells with that of two others."""
    if not all(row.is_complete for row in rows):
        return Claim(text, None)
    first, second, *others = [row.values('test', 'accuracy') for row in rows]
    if others:
        first, second = ([a - b for a, b in zip(*pair)] for pair in ((first, second), others))
    return Claim(text, paired_difference(first, second))


def _trainings(study: Study) -> List[Dict[str, Any]]:
    """Return one result per training; a try and a final run with the same weights count once."""
    results: Dict[str, Dict[str, Any]] = {}
    for cell in study.protocol.cells.values():
        for run in [*study.tries(cell), *study.final_runs(cell)]:
            result = study.result(run)
            if result is not None:
                results[result['training']] = result
    return list(results.values())


def _cpu_hours(trainings: List[Dict[str, Any]]) -> float:
    return math.fsum(result['cpu_seconds'] for result in trainings) / 3600


def _gpu_minutes(trainings: List[Dict[str, Any]]) -> Dict[str, float]:
    """Return the minutes of training on each kind of GPU."""
    seconds: Dict[str, float] = defaultdict(float)
    for result in trainings:
        for record in result['history']:
            if 'gpu' in record:
                seconds[record['gpu']] += record['seconds']
    return {name: seconds[name] / 60 for name in sorted(seconds)}


def _machines(rows: Dict[str, Row]) -> List[str]:
    found = defaultdict(int)
    for row in rows.values():
        for result in row.results:
            m = result['machine']
            found[f'{m["cpu"]}, Python {m["python"]}, PyTorch {m["torch"]}, timm {m["timm"]}'] += 1
    return [f'{name} ({count} runs)' for name, count in sorted(found.items())]


def _render(study: Study, rows: Dict[str, Row]) -> str:
    """Return the text of README.md."""
    questions = []
    for name, question in study.protocol.questions.items():
        questions.append(dict(
            name=name, title=question['title'], text=question['text'].strip(),
            rows=[rows[cell] for cell in question['rows']],
            claims=[_examine(text, [rows[cell] for cell in cells]) for text, cells in question['claims'].items()],
            conclusion=question.get('conclusion', '').strip()))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined)
    missing = [
        f'{row.cell.name} {len(row.results)}/{len(row.cell.seeds)}' for row in rows.values() if not row.is_complete]
    trainings = _trainings(study)
    return environment.get_template(TEMPLATE).render(
        questions=questions, rows=rows, missing=missing, cpu_hours=_cpu_hours(trainings),
        gpu_minutes=_gpu_minutes(trainings), machines=_machines(rows), seeds=len(study.protocol.seeds),
        has_label_curves=bool(study.protocol.label_curves), images=study.protocol.images['fashion_mnist'],
        profiled_images=PROFILED_IMAGES)


def _label_figure(rows: Dict[str, Row], panels: Dict[str, Dict[str, Dict[int, str]]]) -> Figure:
    """Plot the test accuracy against the number of labels, with the panels that have results side by side."""
    panels = {
        title: curves for title, curves in panels.items()
        if any(rows[name].is_complete for cells in curves.values() for name in cells.values())}
    figure = Figure(figsize=(7.5, 3.4), layout='constrained')
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for ax, (title, curves) in zip(axes, panels.items()):
        for label, cells in curves.items():
            counts = [count for count, name in cells.items() if rows[name].is_complete]
            accuracies = [rows[cells[count]].summary('test', 'accuracy') for count in counts]
            ax.errorbar(
                counts, [a.mean for a in accuracies], yerr=[a.deviation for a in accuracies], marker='o', capsize=3,
                label=label)
            ax.set_xscale('log')
            ax.xaxis.set_major_locator(FixedLocator(list(cells)))
        ax.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel('labeled training images')
        ax.set_title(title)
        ax.grid(alpha=0.3)
        ax.legend(loc='lower right')
    axes[0].set_ylabel('test accuracy, %')
    return figure


def _energy_figure(rows: Dict[str, Row]) -> Figure:
    """Plot the test accuracy against the energy per image for the cells with several seeds and all labels."""
    figure = Figure(figsize=(9, 4), layout='constrained')
    ax = figure.subplots()
    styles = (dict(marker=marker, color=f'C{i}') for marker in 'os^D' for i in range(10))
    for row in rows.values():
        cell = row.cell
        is_classifier = cell.objective == 'classify' and cell.dataset == 'fashion_mnist'
        if is_classifier and cell.labels is None and len(cell.seeds) > 1 and row.is_complete:
            accuracy, energy = row.summary('test', 'accuracy'), row.summary('operations', 'energy_uj')
            ax.errorbar(
                energy.mean, accuracy.mean, yerr=accuracy.deviation, capsize=3, linestyle='none', label=cell.title,
                **next(styles))
    ax.set_xscale('log')
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel('energy of arithmetic per image, µJ')
    ax.set_ylabel('test accuracy, %')
    ax.grid(alpha=0.3)
    if ax.has_data():
        figure.legend(loc='outside right')
    return figure


def _check_output(output: Path, names: Iterable[str]) -> None:
    """Raise a ValueError if files would be overwritten, unless README.md shows that they are an earlier report."""
    readme, figures = output / 'README.md', output / 'figures'
    if os.path.lexists(figures) and not figures.is_dir():
        raise ValueError(f'{figures} is not a folder. Choose another output folder, or move it.')
    if readme.is_file() and not readme.is_symlink() and _MARK in readme.read_bytes():
        return
    for name in names:
        if os.path.lexists(output / name):
            raise ValueError(
                f'{output / name} was not written by `python -m reproduction report`. Choose another output folder, or '
                f'move the file.')


def write_report(protocol: Protocol, runs: Path, output: Path) -> None:
    """Write README.md and figures/ to a folder.

    Raises:
        ValueError: There is no folder `runs`, a result in it is damaged, or a file would be overwritten that is not
            part of an earlier report. Nothing is written.
    """
    if not runs.is_dir():
        raise ValueError(f'{runs} is not a folder with results.')
    study = Study(protocol, runs, checkpoints=runs, data=runs)  # only the results are read
    rows = _rows(study)
    files = {'README.md': _render(study, rows).encode()}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):  # without the user's matplotlibrc
        figures = {'energy': _energy_figure(rows)}
        if protocol.label_curves:
            figures['labels'] = _label_figure(rows, protocol.label_curves)
        for name, figure in figures.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format='svg', metadata={'Date': None})
            files[f'figures/{name}.svg'] = buffer.getvalue()
    _check_output(output, files)
    for name, content in files.items():
        replace_file(output / name, content)
