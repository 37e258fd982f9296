"""Shows profiles: a table in the terminal, JSON, CSV, pictures, and a page that needs nothing else."""
import base64
import csv
import io
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import jinja2
from rich import box
from rich.console import Console
from rich.table import Table

from .counting import LayerProfile, Profile, Totals
from .pictures import render
from .samples import Samples

__all__ = ['create_console', 'print_profile', 'print_steps', 'to_csv', 'to_html', 'write_report']

_PREFIXES = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


def _count(n: float) -> str:
    """1234567 as 1.23 M."""
    for factor, prefix in _PREFIXES:
        if n >= factor:
            digits = '.3g' if n < 999.5 * factor else '.0f'  # and not 1e+03
            return f'{n / factor:{digits}} {prefix}'
    return f'{n:.3g}'


def _energy(mj: float) -> str:
    """0.0123 as 12.3 µJ."""
    for unit, factor in (('mJ', 1.), ('µJ', 1e3)):
        if mj * factor >= 1.:
            return f'{mj * factor:.3g} {unit}'
    return f'{mj * 1e6:.3g} nJ'


def _percent(share: Optional[float]) -> str:
    return '' if share is None else f'{100 * share:.1f} %'


def _rate(rate: Optional[float]) -> str:
    return '' if rate is None else f'{rate:.3f}'


def create_console() -> Console:
    """Of the terminal; wide enough for every column where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def print_profile(profile: Profile, console: Optional[Console] = None) -> None:
    """Print the layers, the parts and the totals; a narrow terminal gets fewer columns."""
    console = console or create_console()
    is_wide = console.width >= 120
    title = (f'{profile.model}, T = {profile.time_steps}, mean of {profile.images:,} '
             f'{"sequences" if profile.is_sequence else "images"}')
    table = Table(title=title, title_justify='left', box=box.SIMPLE, pad_edge=False, padding=(0, 1 if is_wide else 0))
    table.add_column('layer', no_wrap=True)
    extra = ['input', 'rate', 'saturated'] if is_wide else []
    for name in (*extra, 'firing', 'silent', 'dense MACs', 'MACs', 'ACs', 'energy'):
        table.add_column(name, justify='right', no_wrap=True)

    def add(name: str, x: Union[LayerProfile, Totals], values: Sequence[str], **style: Any) -> None:
        macs, acs = (sum(n) if isinstance(n, list) else n for n in (x.macs, x.acs))
        table.add_row(name, *values, _count(x.dense_macs), _count(macs), _count(acs), _energy(x.energy_mj), **style)

    for group, totals in profile.groups.items():
        for x in (x for x in profile.layers if x.group == group):
            rate_in = sum(x.input_rate) / len(x.input_rate) if x.input_rate else None
            values = [x.input, _rate(rate_in), _percent(x.saturated)] if is_wide else []
            add(x.name, x, [*values, _rate(x.mean_firing_rate), _percent(x.silent)])
        add(group, totals, [''] * (len(extra) + 2), style='bold', end_section=True)
    t = profile.totals
    add('all', t, [*[''] * len(extra), _rate(profile.firing_rate), ''], style='bold')
    console.print(table)
    if profile.by_channel:
        console.print('Silent and saturated are shares of channels.')
    if t.energy_mj:
        console.print(
            f'Energy per image {_energy(t.energy_mj)}; the same network, dense and artificial: '
            f'{_energy(t.ann_energy_mj)}, {t.ann_energy_mj / t.energy_mj:.1f} times as much.', highlight=False)
    for line in _how(profile):
        console.print(f'  {line}', highlight=False)


def print_steps(profile: Profile, console: Optional[Console] = None) -> None:
    """Print what the model says after each time step, and what it has cost by then."""
    table = Table(title='After each time step', title_justify='left', box=box.SIMPLE, pad_edge=False)
    for name in ('step', 'accuracy', 'agreement', 'confidence', 'energy'):
        table.add_column(name, justify='right')
    for x in profile.steps:
        table.add_row(
            str(x.step), _percent(x.accuracy), _percent(x.agreement), _percent(x.confidence), _energy(x.energy_mj))
    (console or create_console()).print(table)


def _how(profile: Profile) -> List[str]:
    """In words, how it was counted."""
    cost = profile.cost
    lines = [
        f'Energy: {cost.mac_pj:g} pJ for a multiply-accumulate, {cost.ac_pj:g} pJ for an accumulate '
        f'({cost.name}; {cost.source}). '
        + (f'{cost.memory_pj_per_byte:g} pJ for each byte of weights that is read and of membranes that is read or '
           f'written.' if cost.memory_pj_per_byte else 'Arithmetic alone, without memory.'),
    ]
    lines += [f'{name.replace("_", " ")} = {getattr(profile.conventions, name)}: {meaning}.'
              for name, meaning in profile.conventions.describe().items()]
    return lines


def to_csv(profiles: Sequence[Profile]) -> str:
    """A row for each layer of each profile; rates by time step are in columns that shorter ones leave empty."""
    longest = max(p.time_steps for p in profiles)
    plain = ('name', 'group', 'input', 'parameters', 'dense_macs', 'silent', 'saturated', 'energy_mj', 'ann_energy_mj')
    by_step = ('input_rate', 'firing_rate', 'macs', 'acs')
    columns = ['model', 'time_steps', *plain, *(f'{key}_{t + 1}' for key in by_step for t in range(longest)), 'values']
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator='\n')
    writer.writeheader()
    for p in profiles:
        for x in p.layers:
            row: Dict[str, Any] = {'model': p.model, 'time_steps': p.time_steps}
            row.update({key: getattr(x, key) for key in plain})
            for key in by_step:
                row.update({f'{key}_{t + 1}': value for t, value in enumerate(getattr(x, key) or ())})
            row['values'] = ' '.join(f'{value}:{share:.6g}' for value, share in (x.values or {}).items())
            writer.writerow(row)
    return text.getvalue()


def _data_uri(svg: bytes) -> str:
    return f'data:image/svg+xml;base64,{base64.b64encode(svg).decode()}'


def _bars(layers: List[LayerProfile]) -> Dict[str, float]:
    """Energy of each layer as a share of the highest."""
    highest = max((x.energy_mj for x in layers), default=0.) or 1.
    return {x.name: x.energy_mj / highest for x in layers}


def to_html(
        profiles: Sequence[Profile],
        samples: Optional[Samples] = None,
        data: str = '',
        notes: Sequence[str] = (),
) -> str:
    """One page with everything in it: no script, no font and no image is loaded from elsewhere.

    Args:
        profiles: Of one model for different numbers of time steps; the layers and pictures are of the last one.
        samples: Images to draw.
        data: What the images are, in words.
        notes: What the reader has to know first.
    """
    profile = profiles[-1]
    light, dark = (render(profile, samples, 'svg', is_dark) for is_dark in (False, True))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(count=_count, energy=_energy, percent=_percent, rate=_rate)
    template = environment.from_string(
        resources.files(__package__).joinpath('page.html.jinja').read_text(encoding='utf-8'))
    return template.render(
        profile=profile, profiles=profiles, data=data, notes=notes, how=_how(profile), bars=_bars(profile.layers),
        pictures={name: (_data_uri(light[name]), _data_uri(dark[name])) for name in light})


def write_report(
        folder: Union[str, Path],
        profiles: Sequence[Profile],
        samples: Optional[Samples] = None,
        data: str = '',
        notes: Sequence[str] = (),
) -> Path:
    """Write profile.json, layers.csv, the pictures and index.html; each file beside, then renamed.

    Args:
        folder: Where to; other files in it stay.
        profiles: As of `to_html`, and so are the others.

    Returns:
        The page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {f'{name}.png': png for name, png in render(profiles[-1], samples).items()}
    files['profile.json'] = (json.dumps([p.to_dict() for p in profiles], indent=2) + '\n').encode()
    files['layers.csv'] = to_csv(profiles).encode()
    files['index.html'] = to_html(profiles, samples, data, notes).encode()
    for name, content in files.items():
        partial = folder / f'{name}.partial'
        partial.write_bytes(content)
        os.replace(partial, folder / name)
    return folder / 'index.html'
