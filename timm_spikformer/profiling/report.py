"""Reports of profiles: tables in the terminal, JSON, CSV, figures, and a self-contained HTML page."""
import base64
import csv
import io
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..folders import check_output_folder, write_folder
from .activity import Activity
from .conventions import describe_assumptions
from .counting import LayerProfile, Profile, Totals, describe_silent_layers
from .pictures import PICTURES, render, to_dark

__all__ = [
    'check_report_folder', 'create_console', 'print_profile', 'print_steps', 'to_csv', 'to_html', 'write_report']

PathLike = Union[str, 'os.PathLike[str]']


_KIND = 'profile'  # kind of the output folder: see folders.py
_PAGE = 'index.html'
_FILES = {_PAGE, 'profile.json', 'layers.csv', *(f'{name}.png' for name in PICTURES)}
# Units from the largest to the smallest: the value of one unit, and its symbol
_COUNT_UNITS = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'), (1., ''))
_ENERGY_UNITS = ((1e3, 'J'), (1., 'mJ'), (1e-3, 'µJ'), (1e-6, 'nJ'))  # in millijoules


def _format(value: float, units: Sequence[Tuple[float, str]]) -> str:
    """Format a value with three significant digits, in the largest unit in which it is at least 1 after rounding."""
    value = float(f'{value:.3g}')
    factor, symbol = next((unit for unit in units if value >= unit[0]), units[-1])
    number = value / factor
    return f'{number:.0f} {symbol}' if number >= 999.5 else f'{number:.3g} {symbol}'  # .3g would write 1e+03


def _count(n: float) -> str:
    """Format a number of operations, such as 1234567, as 1.23 M."""
    return _format(n, _COUNT_UNITS).rstrip()


def _energy(mj: float) -> str:
    """Format an energy, such as 0.0123 mJ, as 12.3 µJ."""
    return _format(mj, _ENERGY_UNITS)


def _percent(share: Optional[float]) -> str:
    return '' if share is None else f'{100 * share:.1f}%'


def _rate(rate: Optional[float]) -> str:
    return '' if rate is None else f'{rate:.3f}'


def _time(milliseconds: Optional[float]) -> str:
    return '' if milliseconds is None else f'{milliseconds:.2f}'


def create_console() -> Console:
    """Create a rich console for the standard output. If it is not a terminal, the width is 140 so that all columns fit.

    Markup is disabled, so that brackets in paths are printed literally.
    """
    options: Dict[str, Any] = dict(markup=False, highlight=False, emoji=False)
    console = Console(**options)
    return console if console.is_terminal else Console(width=140, **options)


def _to_encodable(console: Console, text: str) -> str:
    """Replace the micro sign with u if the encoding of the console does not have it."""
    try:
        text.encode(console.encoding)
        return text
    except (UnicodeEncodeError, LookupError):
        return text.replace('µ', 'u')


def _columns(profile: Profile, width: int) -> List[str]:
    """Return the columns, besides the layer name, that fit into a terminal of `width` characters."""
    if width < 80:
        return ['firing rate', 'ACs', 'energy'] if width >= 50 else ['energy']
    if width < 120:
        return ['firing rate', 'silent', 'dense MACs', 'MACs', 'ACs', 'energy']
    columns = ['input', 'input rate', 'saturated', 'firing rate', 'silent', 'dense MACs', 'MACs', 'ACs', 'energy']
    has_times = any(x.milliseconds is not None for x in profile.layers)
    return columns + ['ms', 'dense ms'] if has_times else columns


def _operation_cells(x: Union[LayerProfile, Totals], console: Console) -> Dict[str, str]:
    macs, acs = (sum(n) if isinstance(n, list) else n for n in (x.macs, x.acs))
    return {
        'dense MACs': _count(x.dense_macs), 'MACs': _count(macs), 'ACs': _count(acs),
        'energy': _to_encodable(console, _energy(x.energy_mj))}


def _layer_cells(x: LayerProfile, console: Console) -> Dict[str, str]:
    return {
        **_operation_cells(x, console),
        'input': x.input,
        'input rate': _rate(sum(x.input_rate) / len(x.input_rate) if x.input_rate else None),
        'saturated': _percent(x.saturated),
        'firing rate': _rate(x.mean_firing_rate),
        'silent': _percent(x.silent),
        'ms': _time(x.milliseconds),
        'dense ms': _time(x.dense_milliseconds),
    }


def _create_table(profile: Profile, console: Console) -> Table:
    """Create the table of layers, groups and totals."""
    columns = _columns(profile, console.width)
    table = Table(
        title=Text(f'{profile.model}, T = {profile.time_steps}, mean of {profile.images:,} {_sample(profile)}s'),
        title_justify='left', box=box.SIMPLE, pad_edge=False, padding=(0, 1 if console.width >= 120 else 0))
    table.add_column('layer', overflow='fold')
    for name in columns:
        heading = name.replace(' rate', '\nrate')  # the numbers are narrow
        table.add_column(heading, justify='right', no_wrap=True, overflow='crop')

    def add(name: str, cells: Dict[str, str], **style: Any) -> None:
        table.add_row(Text(name), *(Text(cells.get(column, '')) for column in columns), **style)

    for group, totals in profile.groups.items():
        for layer in profile.layers:
            if layer.group == group:
                add(layer.name, _layer_cells(layer, console))
        add(group, _operation_cells(totals, console), style='bold', end_section=True)
    cells = {**_operation_cells(profile.totals, console), 'firing rate': _rate(profile.firing_rate)}
    add('all', cells, style='bold')
    return table


def _sample(profile: Profile) -> str:
    return 'sequence' if profile.is_sequence else 'image'


def print_profile(profile: Profile, console: Optional[Console] = None) -> None:
    """Print a table of layers, groups and totals, with fewer columns on a narrow terminal.

    Args:
        profile: Profile to print.
        console: rich console to print to; by default, one for standard output.
    """
    console = console or create_console()
    console.print(_create_table(profile, console))
    if profile.by_channel:
        console.print('Silent and saturated are fractions of channels, not of neurons.')
    spiking, ann = profile.totals.energy_mj, profile.totals.ann_energy_mj
    if spiking:
        console.print(Text(_to_encodable(
            console,
            f'Energy per {_sample(profile)}: {_energy(spiking)}. '
            f'A dense ANN with the same layers: {_energy(ann)}, {ann / spiking:.1f} times as much.')))
    for line in describe_assumptions(profile.conventions, profile.cost):
        console.print(Text(_to_encodable(console, f'  {line}')))


def print_steps(profile: Profile, console: Optional[Console] = None) -> None:
    """Print accuracy, agreement with the last step, confidence and energy after each time step.

    Args:
        profile: Profile to print.
        console: rich console to print to; by default, one for standard output.
    """
    console = console or create_console()
    table = Table(title=Text('After each time step'), title_justify='left', box=box.SIMPLE, pad_edge=False)
    for name in ('step', 'accuracy', 'agreement', 'confidence', 'energy'):
        table.add_column(name, justify='right', overflow='fold')
    for x in profile.steps:
        table.add_row(
            str(x.step), _percent(x.accuracy), _percent(x.agreement), _percent(x.confidence),
            _to_encodable(console, _energy(x.energy_mj)))
    console.print(table)


def to_csv(profiles: Sequence[Profile]) -> str:
    """Return a CSV table with a row for each layer of each profile.

    Values per time step have a column for each time step of the profile with the most time steps; the rows of profiles
    with fewer time steps leave the remaining columns empty.
    """
    most_steps = max(p.time_steps for p in profiles)
    plain = ('name', 'group', 'input', 'parameters', 'dense_macs', 'silent', 'saturated', 'energy_mj', 'ann_energy_mj',
             'milliseconds', 'dense_milliseconds')
    by_step = ('input_rate', 'q_rate', 'k_rate', 'v_rate', 'firing_rate', 'macs', 'acs', 'memory_bytes')
    columns = ['model', 'time_steps', *plain]
    columns += [f'{key}_{t + 1}' for key in by_step for t in range(most_steps)] + ['values']
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    for p in profiles:
        for x in p.layers:
            row: Dict[str, Any] = {'model': p.model, 'time_steps': p.time_steps}
            row.update({key: getattr(x, key) for key in plain})
            values = {**vars(x), **{f'{name}_rate': rates for name, rates in (x.operand_rates or {}).items()}}
            for key in by_step:
                row.update({f'{key}_{t + 1}': value for t, value in enumerate(values.get(key) or ())})
            row['values'] = ' '.join(f'{value}:{share:.6g}' for value, share in (x.values or {}).items())
            writer.writerow(row)
    return text.getvalue()


def _data_uri(svg: bytes) -> str:
    return f'data:image/svg+xml;base64,{base64.b64encode(svg).decode()}'


def _relative_energies(layers: List[LayerProfile]) -> Dict[str, float]:
    """Return the energy of each layer as a fraction of the highest one."""
    highest = max((x.energy_mj for x in layers), default=0.) or 1.
    return {x.name: x.energy_mj / highest for x in layers}


def to_html(
        profiles: Sequence[Profile],
        activity: Optional[Activity] = None,
        data: str = '',
        notes: Sequence[str] = (),
) -> str:
    """Return a self-contained HTML page, which loads no external scripts, fonts or images.

    Args:
        profiles: Profiles of one model for different numbers of time steps; the page shows the layers and figures of
            the last one.
        activity: Activity to draw.
        data: Description of the images.
        notes: Sentences to show at the top of the page.
    """
    profile = profiles[-1]
    silent = describe_silent_layers(profile)
    pictures = render(profile, activity, 'svg')
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(count=_count, energy=_energy, percent=_percent, rate=_rate, time=_time)
    template = environment.from_string(
        resources.files(__package__).joinpath('page.html.jinja').read_text(encoding='utf-8'))
    return template.render(
        profile=profile, profiles=profiles, data=data, notes=notes if silent is None else [*notes, silent],
        assumptions=describe_assumptions(profile.conventions, profile.cost),
        bars=_relative_energies(profile.layers),
        has_times=any(x.milliseconds is not None for x in profile.layers),
        pictures={name: (_data_uri(svg), _data_uri(to_dark(svg))) for name, svg in pictures.items()})


def check_report_folder(folder: PathLike, inputs: Iterable[PathLike] = (), data: Iterable[PathLike] = ()) -> None:
    """Check that writing a report to a folder does not overwrite other files; the folder may contain other files.

    Args:
        folder: Folder of the report.
        inputs: Files and folders that the command reads.
        data: Folders that images are read from.

    Raises:
        ValueError: The folder is invalid, is an input, or contains files that this report would overwrite: see
            `timm_spikformer.folders.check_output_folder`.
    """
    check_output_folder(folder, _KIND, inputs, data, allow_other_files=True, names=sorted(_FILES))


def write_report(
        folder: PathLike,
        profiles: Sequence[Profile],
        activity: Optional[Activity] = None,
        data: str = '',
        notes: Sequence[str] = (),
) -> Path:
    """Write profile.json, layers.csv, the figures and index.html to a folder. If an error occurs, no file is written.

    Args:
        folder: Output folder. The files of an earlier report are replaced; other files are left alone.
        profiles: Profiles of one model for different numbers of time steps; the page shows the layers and figures of
            the last one.
        activity: Activity to draw.
        data: Description of the images.
        notes: Sentences to show at the top of the page.

    Returns:
        The path of index.html.

    Raises:
        ValueError: The folder contains a file that a report would overwrite, or cannot be used for another reason.
    """
    check_report_folder(folder)
    files = {f'{name}.png': png for name, png in render(profiles[-1], activity).items()}
    files['profile.json'] = (json.dumps([p.to_dict() for p in profiles], indent=2) + '\n').encode()
    files['layers.csv'] = to_csv(profiles).encode()
    files[_PAGE] = to_html(profiles, activity, data, notes).encode()
    with write_folder(folder, _KIND, allow_other_files=True) as temporary:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
    return Path(folder) / _PAGE
