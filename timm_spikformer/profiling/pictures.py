"""Matplotlib figures of a profile and of recorded activity, for light and dark backgrounds."""
import io
import math
import textwrap
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import matplotlib
import matplotlib.colors
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from torch.nn import functional as F

from .activity import Activity, divide_by_largest
from .counting import Profile

__all__ = ['PICTURES', 'draw', 'render', 'render_events', 'render_probabilities', 'to_dark']

# names of the figures, in the order in which they are shown
PICTURES = ('events', 'firing_rates', 'energy', 'anytime', 'rasters', 'attention', 'reconstructions')

_COLORS = dict(stem='#3b82c4', attention='#d9822b', mlp='#4f9d69', head='#9b6bb3')
_INK = {False: '#24292f', True: '#d8dee4'}
_EVENT_COLORS = '#d9822b', '#3b82c4'  # OFF, ON
_MAX_STEPS = 8  # frames of an event sequence
_MAX_IMAGES = 4  # per row, so that figures fit on the screen of a phone


def _style(dark: bool) -> Dict[str, object]:
    ink = _INK[dark]
    return {
        'font.size': 10, 'axes.titlesize': 10, 'axes.labelsize': 10, 'text.color': ink, 'axes.labelcolor': ink,
        'axes.edgecolor': ink, 'xtick.color': ink, 'ytick.color': ink, 'figure.facecolor': 'none',
        'axes.facecolor': 'none', 'savefig.facecolor': 'none', 'legend.frameon': False, 'axes.spines.top': False,
        'axes.spines.right': False, 'svg.fonttype': 'none', 'svg.hashsalt': 'timm-spikformer',
        'font.family': ['DejaVu Sans', 'sans-serif'],
    }


def _figure(height: float, width: float = 4.4) -> Figure:
    return Figure(figsize=(width, height), layout='constrained')


def _whole_steps(axes: Axes, time_steps: int) -> None:
    axes.set_xticks(range(1, time_steps + 1, 1 + (time_steps - 1) // 10))
    axes.set_xlabel('time step')


_JOULES = EngFormatter('J')  # for axes in joules: writes 5 µJ instead of 0.000005


def _firing_rates(profile: Profile) -> Figure:
    layers = [x for x in profile.layers if x.firing_rate is not None]
    rates = np.array([x.firing_rate for x in layers])
    fig = _figure(0.6 + 0.22 * len(layers))
    axes = fig.subplots()
    extent = (0.5, profile.time_steps + 0.5, len(layers), 0)
    image = axes.imshow(rates, aspect='auto', cmap='viridis', vmin=0., extent=extent)
    axes.set_yticks(np.arange(len(layers)) + 0.5, [x.name.replace('stages.', '') for x in layers], fontsize=9)
    axes.tick_params(left=False)
    _whole_steps(axes, profile.time_steps)
    fig.colorbar(image, label='spikes per neuron', fraction=0.05)
    return fig


def _energy(profile: Profile) -> Figure:
    layers = profile.layers
    fig = _figure(0.9 + 0.22 * len(layers))
    axes = fig.subplots()
    at = np.arange(len(layers))
    for group in profile.groups:
        members = [i for i, x in enumerate(layers) if x.group == group]
        axes.barh(at[members], [layers[i].energy_mj / 1e3 for i in members], color=_COLORS[group], label=group)
    axes.plot(
        [x.ann_energy_mj / 1e3 for x in layers], at, linestyle='', marker='|', markersize=7,
        color=matplotlib.rcParams['text.color'], label='dense ANN')
    axes.set_yticks(at, [x.name.replace('stages.', '') for x in layers], fontsize=9)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlabel('energy per sample')
    axes.xaxis.set_major_formatter(_JOULES)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    fig.legend(loc='outside upper center', ncols=3, fontsize=9)
    return fig


def _anytime(profile: Profile) -> Figure:
    steps = profile.steps
    at = [x.step for x in steps]
    fig = _figure(5.0)
    top, bottom = fig.subplots(2, 1)
    curves = {'accuracy': 'accuracy', 'agreement': 'agreement with the last step', 'confidence': 'mean confidence'}
    for key, label in curves.items():
        values = [getattr(x, key) for x in steps]
        if None not in values:
            top.plot(at, [100 * v for v in values], marker='o', markersize=4, label=label)
    top.set_ylabel('%')
    top.legend(fontsize=9)
    _whole_steps(top, profile.time_steps)
    key = 'accuracy' if profile.accuracy is not None else 'agreement'
    bottom.plot([x.energy_mj / 1e3 for x in steps], [100 * getattr(x, key) for x in steps], marker='o', markersize=4)
    for x in steps:
        bottom.annotate(
            f'{x.step}', (x.energy_mj / 1e3, 100 * getattr(x, key)), xytext=(4, 4), textcoords='offset points',
            fontsize=9)
    bottom.set_xlabel('energy per sample up to each step')
    bottom.xaxis.set_major_formatter(_JOULES)
    bottom.xaxis.set_major_locator(MaxNLocator(5))
    bottom.set_ylabel(f'{key}, %')
    return fig


def _rasters(activity: Activity) -> Figure:
    rasters = {name: spikes[:8] for name, spikes in activity.rasters.items()}
    columns = 2
    rows = math.ceil(len(rasters) / columns)
    fig = _figure(0.3 + 1.7 * rows)
    grid = fig.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(rasters):]:
        axes.set_axis_off()
    for axes, (name, spikes) in zip(grid.flat, rasters.items()):
        n, T, _ = spikes.shape
        step, neuron = np.nonzero(spikes.flatten(0, 1).numpy())
        axes.scatter(step + 0.5, neuron, marker='|', s=9, linewidths=1.2, color=matplotlib.rcParams['text.color'])
        for i in range(1, n):
            axes.axvline(i * T, linewidth=0.5, alpha=0.5, color=matplotlib.rcParams['text.color'])
        axes.set_xlim(0, n * T)
        axes.set_ylim(-1, spikes.shape[2])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(name.replace('stages.', ''), fontsize=9)
    is_single = len(activity.images) == 1
    fig.supxlabel('time steps' if is_single else 'time steps, sample by sample', fontsize=9)
    fig.supylabel('neurons', fontsize=9)
    return fig


def _to_numpy(image: torch.Tensor) -> np.ndarray:
    """Return a picture for matplotlib: RGB `[H, W, 3]`, or RGBA for event counts, transparent where there are none."""
    if len(image) == 2:
        off, on = image.numpy()
        total = off + on
        share = (on / np.maximum(total, 1e-6))[..., None]
        colors = [np.array(matplotlib.colors.to_rgb(color)) for color in _EVENT_COLORS]
        return np.concatenate([colors[0] * (1. - share) + colors[1] * share, total.clip(0, 1)[..., None] ** 0.5], 2)
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return image.permute(1, 2, 0).numpy()


def _to_gray(picture: np.ndarray) -> np.ndarray:
    """Return a picture without colors, as background of a heat map."""
    if picture.shape[2] == 4:
        return np.concatenate([np.full_like(picture[..., :3], 0.5), picture[..., 3:]], 2)
    return picture.mean(2, keepdims=True).repeat(3, 2)


def _events(sequences: torch.Tensor) -> Figure:
    """Draw frames of event sequences `[n, T, 2, H, W]` in the range 0 to 1, one sequence per row."""
    sequences = sequences[:_MAX_IMAGES]
    steps = np.linspace(0, sequences.shape[1] - 1, min(_MAX_STEPS, sequences.shape[1])).round().astype(int)
    fig = _figure(4.4 * len(sequences) / len(steps) + 0.3)
    grid = fig.subplots(len(sequences), len(steps), squeeze=False)
    for line, frames in zip(grid, sequences):
        for axes, step in zip(line, steps):
            axes.imshow(_to_numpy(frames[step]))
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[['top', 'right']].set_visible(True)
    for axes, step in zip(grid[0], steps):
        axes.set_title(f't = {step + 1}', fontsize=9)
    return fig


def _grid(rows: List[Sequence[np.ndarray]], titles: List[str], overlays: List[Sequence[np.ndarray]]) -> Figure:
    """Draw rows of images with a title per row, and optional heat maps overlaid on the images of a row.

    If there is only one image per row, the rows are drawn side by side.
    """
    columns = len(rows[0])
    if columns == 1:
        fig = _figure(4.4 / len(rows) + 0.4)
        grid = fig.subplots(1, len(rows), squeeze=False).T
        titles = [textwrap.fill(title, 18) for title in titles]
    else:
        fig = _figure(4.4 * len(rows) / columns)
        grid = fig.subplots(len(rows), columns, squeeze=False)
    for line, images, title, maps in zip(grid, rows, titles, overlays):
        for axes, image, over in zip(line, images, maps or [None] * columns):
            axes.set_axis_off()
            axes.imshow(image)
            if over is not None:
                axes.imshow(over, cmap='inferno', alpha=0.75)
        line[0].set_title(title, loc='left', fontsize=9)
    return fig


def _attention(activity: Activity) -> Figure:
    images = activity.images[:_MAX_IMAGES]
    size = images.shape[-2:]
    shown = [_to_numpy(image) for image in images]
    rows, titles, overlays = [shown], ['input'], [[]]
    names = list(activity.attention)
    for name in names if len(names) <= 4 else [names[0], names[len(names) // 2], names[-1]]:
        maps = activity.attention[name][:_MAX_IMAGES].unsqueeze(1)
        maps = F.interpolate(maps, size=size, mode='nearest').squeeze(1)
        rows.append([_to_gray(image) for image in shown])
        titles.append(f'attention received, {name}')
        overlays.append(list(maps.numpy()))
    return _grid(rows, titles, overlays)


def _reconstructions(activity: Activity) -> Figure:
    rows = [[_to_numpy(image) for image in images[:_MAX_IMAGES]]
            for images in (activity.images, activity.masked, activity.reconstructed)]
    return _grid(rows, ['input', 'visible patches', 'masked patches reconstructed'], [[], [], []])


def _draw(
        profile: Profile,
        activity: Optional[Activity],
        names: Optional[Sequence[str]],
) -> Iterator[Tuple[str, Figure]]:
    has_steps = profile.steps[-1].agreement is not None and profile.time_steps > 1
    figures = {
        'events': activity is not None and activity.frames is not None and (lambda: _events(activity.frames)),
        'firing_rates': lambda: _firing_rates(profile),
        'energy': lambda: _energy(profile),
        'anytime': has_steps and (lambda: _anytime(profile)),
        'rasters': activity is not None and activity.rasters and (lambda: _rasters(activity)),
        'attention': activity is not None and activity.attention and (lambda: _attention(activity)),
        'reconstructions': activity is not None and activity.reconstructed is not None and (
            lambda: _reconstructions(activity)),
    }
    for name, create in figures.items():
        if create and (names is None or name in names):
            yield name, create()


def _encode(figure: Figure, format: str) -> bytes:
    buffer = io.BytesIO()
    if format == 'png':
        figure.savefig(buffer, format='png', dpi=160, facecolor='white')
    else:
        figure.savefig(buffer, format='svg', metadata={'Date': None, 'Creator': None})
    return buffer.getvalue()


def draw(profile: Profile, activity: Optional[Activity] = None) -> Dict[str, Figure]:
    """Return the figures of `render` by name, on a white background."""
    with matplotlib.rc_context(_style(dark=False)):
        figures = dict(_draw(profile, activity, None))
    for figure in figures.values():
        figure.set_facecolor('white')
    return figures


def render(
        profile: Profile,
        activity: Optional[Activity] = None,
        format: str = 'png',
        dark: bool = False,
        names: Optional[Sequence[str]] = None,
) -> Dict[str, bytes]:
    """Draw figures, and return the encoded image files by name.

    Args:
        profile: Profile to draw.
        activity: Source of spike rasters, attention maps and reconstructions.
        format: 'png' on a white background, or 'svg' without a background.
        dark: Use colors for a dark background.
        names: Names of the figures to draw, from `PICTURES`; all by default.

    Returns:
        The encoded files, for each of the names for which there is data.

    Raises:
        ValueError: A name is not one of `PICTURES`.
    """
    for name in names or ():
        if name not in PICTURES:
            raise ValueError(f'Unknown figure {name!r}. Expected names from {", ".join(PICTURES)}.')
    with matplotlib.rc_context(_style(dark)):
        return {name: _encode(figure, format) for name, figure in _draw(profile, activity, names)}


def render_events(frames: torch.Tensor, format: str = 'png', dark: bool = False) -> bytes:
    """Draw frames of event counts, and return the encoded image file: ON is blue, OFF is orange.

    Args:
        frames: Event counts `[n, T, 2, H, W]`. At most 4 sequences and 8 evenly spaced frames of each are drawn.
        format: As in `render`.
        dark: As in `render`.

    Raises:
        ValueError: The shape is invalid.
    """
    if frames.ndim != 5 or frames.shape[2] != 2 or not frames.numel():
        raise ValueError(f'Expected event counts [n, T, 2, H, W]. Got {list(frames.shape)}.')
    with matplotlib.rc_context(_style(dark)):
        return _encode(_events(divide_by_largest(frames.float(), frames.float())), format)


def render_probabilities(
        probabilities: torch.Tensor,
        labels: Sequence[str],
        format: str = 'png',
        dark: bool = False,
) -> bytes:
    """Draw the probabilities of the classes of one image after each time step, and return the encoded image file.

    Up to four classes are drawn: those with the highest probability after any time step, then those with the next
    highest after the last one.

    Args:
        probabilities: Probabilities after each time step, `[T, num_classes]`, such as the softmax of `forward_steps`.
        labels: Class names.
        format: As in `render`.
        dark: As in `render`.

    Raises:
        ValueError: There is not one label for each class.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] != len(labels):
        raise ValueError(
            f'Expected probabilities [time steps, {len(labels)}], one for each label. Got '
            f'{list(probabilities.shape)}.')
    time_steps = len(probabilities)
    leading = probabilities.argmax(1).flip(0).tolist()  # of the last time step first
    shown = list(dict.fromkeys([*leading, *probabilities[-1].argsort(descending=True).tolist()]))[:4]
    with matplotlib.rc_context(_style(dark)):
        fig = _figure(3.0)
        axes = fig.subplots()
        for i in shown:
            axes.plot(
                range(1, time_steps + 1), (100 * probabilities[:, i]).tolist(), marker='o', markersize=4,
                label=labels[i])
        axes.set_ylim(-3, 103)
        axes.set_ylabel('probability, %')
        _whole_steps(axes, time_steps)
        fig.legend(loc='outside upper center', ncols=2, fontsize=9)
        return _encode(fig, format)


def to_dark(svg: bytes) -> bytes:
    """Return an SVG file for a light background with the colors for a dark background, as `dark=True` draws it."""
    return svg.replace(_INK[False].encode(), _INK[True].encode())
