"""Draw the architecture of Spikformer V2 from a model's modules: `python docs/architecture.py [FOLDER]`.

It writes architecture-light.svg and architecture-dark.svg, by default to the folder of this script. Widths, strides,
kernel sizes, heads, thresholds and the number of blocks are read from the modules of the model.
"""
import sys
from pathlib import Path
from typing import Any, Dict, List, Tuple

import matplotlib

matplotlib.use('svg')

import matplotlib.pyplot as plt
import timm
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon

import timm_spikformer

MODEL = 'spikformer_v2_8_512'
THEMES = {
    'light': dict(
        text='#1f2328', muted='#59636e', line='#59636e', edge='#8c959f', plain='#f3f5f8', panel='#fafbfc',
        conv='#dbe9fb', linear='#dff1e3', product='#ece2fb', neuron='#e8590c', bolt='#ffffff'),
    'dark': dict(
        text='#e6edf3', muted='#9aa5b1', line='#9aa5b1', edge='#56606b', plain='#262c36', panel='#1a1f27',
        conv='#1f3a5f', linear='#1f4429', product='#3f2d63', neuron='#ff8c42', bolt='#1a1f27'),
}
SIZE = (11.6, 6.95)  # inches, and the unit of all coordinates


class Drawing:
    """Boxes, neurons and arrows in the colors of a theme."""

    def __init__(self, theme: Dict[str, str]):
        self.theme = theme
        self.figure = plt.figure(figsize=SIZE)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, SIZE[0]), ylim=(0, SIZE[1]), aspect='equal')
        self.axes.axis('off')

    def text(self, x: float, y: float, text: str, size: float = 10., color: str = 'text', **kwargs: Any) -> None:
        kwargs = {'ha': 'center', 'va': 'center', 'linespacing': 1.35, **kwargs}
        self.axes.text(x, y, text, fontsize=1.12 * size, color=self.theme[color], **kwargs)

    def box(
            self, x: float, y: float, w: float, h: float, text: str = '', fill: str = 'plain', neuron: bool = False,
            size: float = 9.5, label: str = '') -> None:
        """Draw a box with its center at (x, y), and a neuron at its right end with an optional label."""
        self.axes.add_patch(FancyBboxPatch(
            (x - w / 2, y - h / 2), w, h, boxstyle='round,pad=0,rounding_size=0.07', lw=0.9,
            facecolor=self.theme[fill], edgecolor=self.theme['edge']))
        self.text(x - (0.17 if neuron else 0), y, text, size)
        if neuron:
            self.neuron(x + w / 2 - 0.22, y, label)

    def neuron(self, x: float, y: float, label: str = '', radius: float = 0.135) -> None:
        """Draw a LIF neuron, a disk with a spike."""
        self.axes.add_patch(Circle((x, y), radius, facecolor=self.theme['neuron'], edgecolor='none', zorder=3))
        r = radius / 0.135
        bolt = [(0.025, 0.1), (-0.06, -0.015), (-0.008, -0.015), (-0.025, -0.1), (0.06, 0.015), (0.008, 0.015)]
        self.axes.add_patch(Polygon(
            [(x + r * dx, y + r * dy) for dx, dy in bolt], facecolor=self.theme['bolt'], edgecolor='none', zorder=4))
        if label:
            self.text(x, y - radius - 0.11, label, 7.5, 'muted')

    def arrow(self, *points: Tuple[float, float], head: bool = True) -> None:
        """Draw a line through points, which ends in an arrow."""
        *start, last = points
        if len(start) > 1:
            xs, ys = zip(*start)
            self.axes.plot(xs, ys, color=self.theme['line'], lw=1.1, solid_joinstyle='round', zorder=1)
        self.axes.add_patch(FancyArrowPatch(
            start[-1], last, arrowstyle='-|>' if head else '-', mutation_scale=9, lw=1.1, color=self.theme['line'],
            shrinkA=0, shrinkB=0, zorder=2))

    def plus(self, x: float, y: float) -> None:
        self.axes.add_patch(Circle(
            (x, y), 0.13, facecolor=self.theme['panel'], edgecolor=self.theme['line'], lw=1.1, zorder=3))
        self.text(x, y, '+', 11, zorder=4)

    def add_residual(self, x: float, branch: float, skip: float, y: float) -> None:
        """Draw a sum at (x, y) and the residual connection to it, which leaves x at the height `branch`."""
        self.plus(x, y)
        self.arrow((x, branch), (x + skip, branch), (x + skip, y), (x + 0.13, y))

    def panel(self, x: float, y: float, w: float, h: float, title: str, subtitle: str) -> None:
        """Draw a panel with its lower left corner at (x, y)."""
        self.axes.add_patch(FancyBboxPatch(
            (x, y), w, h, boxstyle='round,pad=0,rounding_size=0.12', lw=0.9, ls=(0, (4, 3)),
            facecolor=self.theme['panel'], edgecolor=self.theme['edge'], zorder=0))
        self.text(x + 0.2, y + h - 0.26, title, 11, ha='left', weight='bold')
        self.text(x + 0.2, y + h - 0.53, subtitle, 8.5, 'muted', ha='left')

    def column(self, x: float, bottom: float, w: float, rows: List[Dict[str, Any]], skip: float) -> None:
        """Draw boxes from bottom to top, connected by arrows, and a residual connection at distance `skip`.

        Args:
            x: Center.
            bottom: Lower end of the incoming arrow.
            w: Width of the boxes.
            rows: Arguments of each box, and of the residual connection `{'plus': True}`; `start` marks its first box.
            skip: Distance of the residual connection from the center.
        """
        y, branch, step, h = bottom, bottom, 0.48, 0.42
        for row in rows:
            row = dict(row)
            top = y + step - h / 2
            if row.pop('plus', False):
                self.arrow((x, y), (x, y + 0.25))
                self.add_residual(x, branch, skip, y + 0.38)
                y += 0.51
                continue
            if row.pop('start', False):
                branch = y + 0.08
            self.arrow((x, y), (x, top))
            self.box(x, top + h / 2, w, h, **row)
            y = top + h
        self.arrow((x, y), (x, y + 0.26))


def _conv(unit: Any, extra: str = '') -> str:
    """Return the label of a convolution."""
    k, s = unit.conv.kernel_size[0], unit.conv.stride[0]
    return f'conv {k}x{k}{f", stride {s}" if s > 1 else ""}{extra} · BN'


def _overview(d: Drawing, model: timm_spikformer.Spikformer, size: int, y: float) -> None:
    """Draw the whole network from left to right."""
    side = size
    d.box(0.72, y, 1.04, 1.95, f'image\n{model.in_chans} × {size} × {size}\n\npresented\nT times', size=7.8)
    x, gap, w = 1.51, 0.27, 1.06
    stages = list(model.stem.stages)
    left = x
    for i, stage in enumerate(stages):
        side //= stage.down.conv.stride[0]
        height = 1.95 - 0.2 * i
        d.arrow((x - gap, y), (x, y))
        center = x + w / 2
        d.box(center, y, w, height, fill='conv')
        d.text(center, y + 0.1, f'stage {i + 1}', 9.5, weight='bold')
        d.text(center, y - 0.26, f'{stage.down.conv.out_channels} ch\n{side} × {side}', 8.5)
        d.neuron(center, y + height / 2 - 0.24)
        x += w + gap
    right = x - gap
    strides = ', '.join(str(level['reduction']) for level in model.feature_info)
    d.text((left + right) / 2, y - 1.2, f'Spiking Convolutional Stem (SCS): strides {strides}', 8.5, 'muted')
    d.arrow((x - gap, y), (x, y))
    w = 2.1
    d.axes.add_patch(FancyBboxPatch(
        (x + 0.1, y - 0.55), w, 1.3, boxstyle='round,pad=0,rounding_size=0.07', lw=0.9,
        facecolor=d.theme['plain'], edgecolor=d.theme['edge'], zorder=0))
    d.axes.add_patch(FancyBboxPatch(
        (x + 0.05, y - 0.6), w, 1.3, boxstyle='round,pad=0,rounding_size=0.07', lw=0.9,
        facecolor=d.theme['plain'], edgecolor=d.theme['edge'], zorder=0))
    center = x + w / 2
    d.box(center, y, w, 1.3)
    d.text(center, y + 0.42, f'encoder block × {len(model.blocks)}', 9.5, weight='bold')
    d.box(center - 0.48, y - 0.12, 0.86, 0.5, 'SSA', fill='product', neuron=True, size=9)
    d.box(center + 0.48, y - 0.12, 0.86, 0.5, 'MLP', fill='linear', neuron=True, size=9)
    d.text(center, y - 1.2, f'{side ** 2} tokens of width {model.embed_dim}', 8.5, 'muted')
    x += w + 0.1
    d.arrow((x, y), (x + gap, y))
    x += gap
    d.box(x + 0.5, y, 1.0, 1.3, 'mean\nover tokens\nand time', size=8.5)
    d.arrow((x + 1.0, y), (x + 1.0 + gap, y))
    d.box(x + 1.0 + gap + 0.42, y, 0.84, 1.3, f'linear\n{model.num_classes}\nclasses', size=8.5)


def _stage_panel(d: Drawing, model: timm_spikformer.Spikformer, x: float, y: float, w: float, h: float) -> None:
    stage = model.stem.stages[0]
    ratio = stage.expand.conv.out_channels // stage.expand.conv.in_channels
    d.panel(x, y, w, h, 'Stage of the stem', 'one residual block; the sum is of spikes')
    d.column(x + w / 2 - 0.18, y + 0.24, w - 1.0, [
        dict(text=_conv(stage.down), fill='conv', neuron=True),
        dict(text=f'{_conv(stage.expand)}\nC to {ratio}C', fill='conv', neuron=True, size=8.3, start=True),
        dict(text=f'{_conv(stage.contract)}\n{ratio}C to C', fill='conv', neuron=True, size=8.3),
        dict(plus=True),
    ], skip=w / 2 - 0.15)


def _attention_panel(d: Drawing, model: timm_spikformer.Spikformer, x: float, y: float, w: float, h: float) -> None:
    attn = model.blocks[0].attn
    d.panel(x, y, w, h, 'Spiking self-attention (SSA)', f'{attn.num_heads} heads, binary q, k and v, no softmax')
    center, width = x + w / 2 - 0.18, w - 1.0
    part = (width - 0.2) / 3
    y += 0.14
    d.arrow((center, y), (center, y + 0.46))
    d.arrow((center - part - 0.1, y + 0.3), (center + part + 0.1, y + 0.3), head=False)
    for i, name in enumerate('qkv'):
        left = center + (i - 1) * (part + 0.1)
        d.arrow((left, y + 0.3), (left, y + 0.46))
        d.box(left, y + 0.79, part, 0.66, fill='linear')
        d.text(left, y + 0.96, f'{name}: linear · BN', 7.6)
        d.neuron(left, y + 0.65)
        d.arrow((left, y + 1.12), (left, y + 1.32))
    product = r'q k$^{\mathsf{T}}$ v × '
    d.box(center, y + 1.57, width, 0.5, f'{product}{attn.scale}\nthreshold {attn.attn_lif.v_threshold}', fill='product',
          neuron=True, size=8.3)
    d.arrow((center, y + 1.82), (center, y + 2.02))
    d.box(center, y + 2.2, width, 0.36, 'linear · BN', fill='linear', neuron=True, size=8.3)
    d.arrow((center, y + 2.38), (center, y + 2.58))
    d.add_residual(center, y + 0.1, w / 2 - 0.15, y + 2.71)
    d.arrow((center, y + 2.84), (center, y + 3.0))


def _mlp_panel(d: Drawing, model: timm_spikformer.Spikformer, x: float, y: float, w: float, h: float) -> None:
    mlp = model.blocks[0].mlp
    dim, hidden = mlp.fc1.linear.in_features, mlp.fc1.linear.out_features
    d.panel(x, y, w, h, 'Spiking MLP', 'the sums are small integers')
    d.column(x + w / 2 - 0.18, y + 0.45, w - 1.0, [
        dict(text=f'linear · BN\n{dim} to {hidden}', fill='linear', neuron=True, size=8.3, start=True),
        dict(text=f'linear · BN\n{hidden} to {dim}', fill='linear', neuron=True, size=8.3),
        dict(plus=True),
    ], skip=w / 2 - 0.15)


def draw(model: timm_spikformer.Spikformer, theme: str, size: int = 224) -> plt.Figure:
    """Draw a Spikformer V2.

    Args:
        model: The model, for instance on the meta device.
        theme: Key of `THEMES`.
        size: Side of the image in pixels.
    """
    d = Drawing(THEMES[theme])
    _overview(d, model, size, 5.85)
    y, h = 0.5, 3.85
    _stage_panel(d, model, 0.2, y, 3.75, h)
    _attention_panel(d, model, 4.1, y, 3.95, h)
    _mlp_panel(d, model, 8.2, y, 3.2, h)
    lif = model.blocks[0].mlp.fc1.lif
    d.neuron(0.36, 0.24)
    d.text(0.6, 0.24, f'LIF neurons: integrate the current over T time steps (tau = {lif.tau:g}), emit 1 and reset if '
                      f'the potential reaches the threshold ({lif.v_threshold:g}), else 0', 9, 'muted', ha='left')
    return d.figure


def main(folder: Path) -> None:
    model = timm.create_model(MODEL, device='meta')
    for theme in THEMES:
        with plt.rc_context({'svg.hashsalt': MODEL, 'svg.fonttype': 'path', 'font.family': 'DejaVu Sans'}):
            figure = draw(model, theme)
            metadata = {'Date': None, 'Creator': 'docs/architecture.py', 'Title': 'Architecture of Spikformer V2'}
            figure.savefig(folder / f'architecture-{theme}.svg', transparent=True, metadata=metadata)
            plt.close(figure)


if __name__ == '__main__':
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
