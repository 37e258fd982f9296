"""Draw the architecture of Spikformer V2 from a model's modules: `python docs/architecture.py [FOLDER]`.

It writes architecture-light.svg and architecture-dark.svg, by default to the folder of this script. Widths, strides,
kernel sizes, heads, thresholds and the number of blocks are read from the modules of the model.
"""
import argparse
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import timm
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon

import timm_spikformer
from timm_spikformer.layers import ConvBNLIF
from timm_spikformer.stems import SpikingConvStem

MODEL = 'spikformer_v2_8_512'
THEMES = {
    'light': dict(
        text='#1f2328', muted='#59636e', line='#59636e', edge='#8c959f', plain='#f3f5f8', panel='#fafbfc',
        conv='#dbe9fb', linear='#dff1e3', product='#ece2fb', neuron='#e8590c', bolt='#ffffff'),
    'dark': dict(
        text='#e6edf3', muted='#9aa5b1', line='#9aa5b1', edge='#56606b', plain='#262c36', panel='#1a1f27',
        conv='#1f3a5f', linear='#1f4429', product='#3f2d63', neuron='#ff8c42', bolt='#1a1f27'),
}
FIGURE_SIZE = (11.6, 6.95)  # figure size in inches; all coordinates are in inches
FONT_SCALE = 1.12
NEURON_RADIUS = 0.135
PLUS_RADIUS = 0.13
BOLT = ((0.025, 0.1), (-0.06, -0.015), (-0.008, -0.015), (-0.025, -0.1), (0.06, 0.015), (0.008, 0.015))
OVERVIEW_Y = 5.85  # center of the overview
PANEL_Y, PANEL_HEIGHT = 0.5, 3.85  # lower edge and height of the panels
LEGEND_Y = 0.24


class Unit(NamedTuple):
    """A layer with a neuron, drawn as one box of a column."""
    text: str
    fill: str
    fontsize: float = 8.3


class Panel(NamedTuple):
    """A panel: its lower left corner, width and height."""
    x: float
    y: float
    width: float
    height: float

    @property
    def center(self) -> float:
        """Horizontal center of the boxes; the residual connection is drawn to their right."""
        return self.x + self.width / 2 - 0.18

    @property
    def box_width(self) -> float:
        return self.width - 1.0

    @property
    def skip(self) -> float:
        """Horizontal distance of the residual connection from the center of the boxes."""
        return self.width / 2 - 0.15


class Drawing:
    """Draws boxes, neurons and arrows in the colors of a theme."""

    def __init__(self, theme: Dict[str, str]):
        self.theme = theme
        self.figure = Figure(figsize=FIGURE_SIZE)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, FIGURE_SIZE[0]), ylim=(0, FIGURE_SIZE[1]), aspect='equal')
        self.axes.axis('off')

    def text(self, x: float, y: float, text: str, fontsize: float = 10., color: str = 'text', **kwargs: Any) -> None:
        kwargs = {'ha': 'center', 'va': 'center', 'linespacing': 1.35, **kwargs}
        self.axes.text(x, y, text, fontsize=FONT_SCALE * fontsize, color=self.theme[color], **kwargs)

    def rectangle(self, x: float, y: float, width: float, height: float, fill: str, **kwargs: Any) -> None:
        """Draw a rounded rectangle with its center at (x, y)."""
        kwargs = {'boxstyle': 'round,pad=0,rounding_size=0.07', 'zorder': 1, **kwargs}
        self.axes.add_patch(FancyBboxPatch(
            (x - width / 2, y - height / 2), width, height, lw=0.9, facecolor=self.theme[fill],
            edgecolor=self.theme['edge'], **kwargs))

    def box(
            self,
            x: float,
            y: float,
            width: float,
            height: float,
            text: str = '',
            fill: str = 'plain',
            fontsize: float = 9.5,
            has_neuron: bool = False,
    ) -> None:
        """Draw a box with its center at (x, y) and, if `has_neuron`, a neuron inside at its right end."""
        self.rectangle(x, y, width, height, fill)
        self.text(x - (0.17 if has_neuron else 0), y, text, fontsize)
        if has_neuron:
            self.neuron(x + width / 2 - 0.22, y)

    def neuron(self, x: float, y: float) -> None:
        """Draw a LIF neuron: a disk with a lightning bolt, the symbol of a spike."""
        self.axes.add_patch(Circle((x, y), NEURON_RADIUS, facecolor=self.theme['neuron'], edgecolor='none', zorder=3))
        self.axes.add_patch(Polygon(
            [(x + dx, y + dy) for dx, dy in BOLT], facecolor=self.theme['bolt'], edgecolor='none', zorder=4))

    def arrow(self, *points: Tuple[float, float], has_head: bool = True) -> None:
        """Draw a line through the points, with an arrowhead at the last one if `has_head`."""
        *start, last = points
        if len(start) > 1:
            xs, ys = zip(*start)
            self.axes.plot(xs, ys, color=self.theme['line'], lw=1.1, solid_joinstyle='round', zorder=1)
        self.axes.add_patch(FancyArrowPatch(
            start[-1], last, arrowstyle='-|>' if has_head else '-', mutation_scale=9, lw=1.1, color=self.theme['line'],
            shrinkA=0, shrinkB=0, zorder=2))

    def residual_sum(self, x: float, y: float, branch_y: float, skip: float) -> None:
        """Draw a plus sign at (x, y) and the residual connection from (x, branch_y) to it.

        Args:
            x: Horizontal position of the branch and of the sum.
            y: Vertical position of the sum.
            branch_y: Vertical position of the branch.
            skip: Horizontal distance of the connection from x.
        """
        self.axes.add_patch(Circle(
            (x, y), PLUS_RADIUS, facecolor=self.theme['panel'], edgecolor=self.theme['line'], lw=1.1, zorder=3))
        self.text(x, y, '+', 11, zorder=4)
        self.arrow((x, branch_y), (x + skip, branch_y), (x + skip, y), (x + PLUS_RADIUS, y))

    def panel(self, panel: Panel, title: str, subtitle: str) -> None:
        """Draw the frame and the titles of a panel."""
        x, y, width, height = panel
        self.rectangle(
            x + width / 2, y + height / 2, width, height, 'panel', ls=(0, (4, 3)), zorder=0,
            boxstyle='round,pad=0,rounding_size=0.12')
        self.text(x + 0.2, y + height - 0.26, title, 11, ha='left', weight='bold')
        self.text(x + 0.2, y + height - 0.53, subtitle, 8.5, 'muted', ha='left')

    def column(self, panel: Panel, bottom: float, units: Sequence[Unit], residual_from: int) -> None:
        """Draw units from bottom to top, connected by arrows, and a residual sum above them.

        Args:
            panel: The panel around the column.
            bottom: Vertical position of the lower end of the incoming arrow.
            units: The units.
            residual_from: Index of the first unit that the residual connection skips.
        """
        x, y, branch_y = panel.center, bottom, bottom
        gap, height = 0.27, 0.42
        for i, unit in enumerate(units):
            if i == residual_from:
                branch_y = y + 0.08
            self.arrow((x, y), (x, y + gap))
            self.box(x, y + gap + height / 2, panel.box_width, height, *unit, has_neuron=True)
            y += gap + height
        sum_y = y + 0.38
        self.arrow((x, y), (x, sum_y - PLUS_RADIUS))
        self.residual_sum(x, sum_y, branch_y, panel.skip)
        self.arrow((x, sum_y + PLUS_RADIUS), (x, sum_y + PLUS_RADIUS + 0.26))


def _conv_label(unit: ConvBNLIF) -> str:
    """Return the label of a convolution and its BN."""
    kernel_size, stride = unit.conv.kernel_size[0], unit.conv.stride[0]
    return f'conv {kernel_size}x{kernel_size}{f", stride {stride}" if stride > 1 else ""} · BN'


def _overview(drawing: Drawing, model: timm_spikformer.Spikformer, image_size: int) -> None:
    """Draw the whole network from left to right: image, stages of the stem, encoder blocks, mean and classifier."""
    y, gap = OVERVIEW_Y, 0.27  # gap: length of the arrows
    drawing.box(
        0.72, y, 1.04, 1.95, f'image\n{model.in_chans} × {image_size} × {image_size}\n\nrepeated\nT times',
        fontsize=7.8)
    x = stem_left = 1.51  # x: left edge of the next box
    feature_size, width = image_size, 1.06
    for i, stage in enumerate(model.stem.stages):
        feature_size //= stage.down.conv.stride[0]
        center, height = x + width / 2, 1.95 - 0.2 * i
        drawing.arrow((x - gap, y), (x, y))
        drawing.box(center, y, width, height, fill='conv')
        drawing.text(center, y + 0.1, f'stage {i + 1}', 9.5, weight='bold')
        drawing.text(
            center, y - 0.26, f'{stage.down.conv.out_channels} ch\n{feature_size} × {feature_size}', 8.5)
        drawing.neuron(center, y + height / 2 - 0.24)
        x += width + gap
    reductions = ', '.join(str(level['reduction']) for level in model.feature_info)
    drawing.text(
        (stem_left + x - gap) / 2, y - 1.2, f'Spiking Convolutional Stem (SCS): strides {reductions}', 8.5, 'muted')
    drawing.arrow((x - gap, y), (x, y))

    width, height = 2.1, 1.3
    center = x + width / 2
    for offset in (0.1, 0.05):  # a stack of boxes
        drawing.rectangle(center + offset, y + offset, width, height, 'plain', zorder=0)
    drawing.box(center, y, width, height)
    drawing.text(center, y + 0.42, f'encoder block × {len(model.blocks)}', 9.5, weight='bold')
    drawing.box(center - 0.48, y - 0.12, 0.86, 0.5, 'SSA', fill='product', fontsize=9, has_neuron=True)
    drawing.box(center + 0.48, y - 0.12, 0.86, 0.5, 'MLP', fill='linear', fontsize=9, has_neuron=True)
    drawing.text(center, y - 1.2, f'{feature_size ** 2} tokens of width {model.embed_dim}', 8.5, 'muted')
    x += width + 0.1  # right edge of the stack
    for width, text in ((1.0, 'mean\nover tokens\nand time'), (0.84, f'linear\n{model.num_classes}\nclasses')):
        drawing.arrow((x, y), (x + gap, y))
        drawing.box(x + gap + width / 2, y, width, 1.3, text, fontsize=8.5)
        x += gap + width


def _stage_panel(drawing: Drawing, model: timm_spikformer.Spikformer, panel: Panel) -> None:
    stage = model.stem.stages[0]
    ratio = stage.expand.conv.out_channels // stage.expand.conv.in_channels
    drawing.panel(panel, 'Stage of the stem', 'residual block; its output is a sum of spikes')
    drawing.column(panel, panel.y + 0.24, [
        Unit(_conv_label(stage.down), 'conv', 9.5),
        Unit(f'{_conv_label(stage.expand)}\nC to {ratio}C', 'conv'),
        Unit(f'{_conv_label(stage.contract)}\n{ratio}C to C', 'conv'),
    ], residual_from=1)


def _attention_panel(drawing: Drawing, model: timm_spikformer.Spikformer, panel: Panel) -> None:
    attn = model.blocks[0].attn
    drawing.panel(panel, 'Spiking self-attention (SSA)', f'{attn.num_heads} heads, binary q, k and v, no softmax')
    x, y = panel.center, panel.y + 0.14
    gap = 0.1
    width = (panel.box_width - 2 * gap) / 3  # of the boxes of q, k and v
    drawing.arrow((x, y), (x, y + 0.46))
    drawing.arrow((x - width - gap, y + 0.3), (x + width + gap, y + 0.3), has_head=False)
    for i, name in enumerate('qkv'):
        center = x + (i - 1) * (width + gap)
        drawing.arrow((center, y + 0.3), (center, y + 0.46))
        drawing.box(center, y + 0.79, width, 0.66, fill='linear')
        drawing.text(center, y + 0.96, f'{name}: linear · BN', 7.6)
        drawing.neuron(center, y + 0.65)
        drawing.arrow((center, y + 1.12), (center, y + 1.32))
    product = r'q k$^{\mathsf{T}}$ v × '
    drawing.box(
        x, y + 1.57, panel.box_width, 0.5, f'{product}{attn.scale}\nthreshold {attn.attn_lif.v_threshold}',
        fill='product', fontsize=8.3, has_neuron=True)
    drawing.arrow((x, y + 1.82), (x, y + 2.02))
    drawing.box(x, y + 2.2, panel.box_width, 0.36, 'linear · BN', fill='linear', fontsize=8.3, has_neuron=True)
    drawing.arrow((x, y + 2.38), (x, y + 2.58))
    drawing.residual_sum(x, y + 2.71, y + 0.1, panel.skip)
    drawing.arrow((x, y + 2.84), (x, y + 3.0))


def _mlp_panel(drawing: Drawing, model: timm_spikformer.Spikformer, panel: Panel) -> None:
    mlp = model.blocks[0].mlp
    dim, hidden_dim = mlp.fc1.linear.in_features, mlp.fc1.linear.out_features
    drawing.panel(panel, 'Spiking MLP', 'residual sums are small integers')
    drawing.column(panel, panel.y + 0.45, [
        Unit(f'linear · BN\n{dim} to {hidden_dim}', 'linear'),
        Unit(f'linear · BN\n{hidden_dim} to {dim}', 'linear'),
    ], residual_from=0)


def draw(model: timm_spikformer.Spikformer, theme: str, image_size: int = 224) -> Figure:
    """Draw a Spikformer V2.

    Args:
        model: The model, for instance on the meta device.
        theme: Key of `THEMES`.
        image_size: Height and width of the image in pixels.

    Raises:
        ValueError: The model is not a Spikformer V2, or there is no such theme.
    """
    if not isinstance(model, timm_spikformer.Spikformer) or not isinstance(model.stem, SpikingConvStem):
        raise ValueError(
            f'The picture is of Spikformer V2, got {type(getattr(model, "stem", model)).__name__}. Pass a model such '
            f'as {MODEL}.')
    if theme not in THEMES:
        raise ValueError(f'unknown theme {theme!r}, expected one of {", ".join(THEMES)}')
    drawing = Drawing(THEMES[theme])
    _overview(drawing, model, image_size)
    _stage_panel(drawing, model, Panel(0.2, PANEL_Y, 3.75, PANEL_HEIGHT))
    _attention_panel(drawing, model, Panel(4.1, PANEL_Y, 3.95, PANEL_HEIGHT))
    _mlp_panel(drawing, model, Panel(8.2, PANEL_Y, 3.2, PANEL_HEIGHT))
    lif = model.blocks[0].mlp.fc1.lif
    drawing.neuron(0.36, LEGEND_Y)
    drawing.text(
        0.6, LEGEND_Y,
        f'LIF neuron: integrates its input over T time steps (tau = {lif.tau:g}); if the potential reaches the '
        f'threshold ({lif.v_threshold:g}), it emits 1 and resets, else it emits 0', 9, 'muted', ha='left')
    return drawing.figure


def main(folder: Path) -> None:
    model = timm.create_model(MODEL, device='meta')
    for theme in THEMES:
        with matplotlib.rc_context({'svg.hashsalt': MODEL, 'svg.fonttype': 'path', 'font.family': 'DejaVu Sans'}):
            metadata = {'Date': None, 'Creator': 'docs/architecture.py', 'Title': 'Architecture of Spikformer V2'}
            draw(model, theme).savefig(folder / f'architecture-{theme}.svg', transparent=True, metadata=metadata)


def _parse_folder(argv: Optional[Sequence[str]] = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'folder', nargs='?', type=Path, default=Path(__file__).parent, metavar='FOLDER',
        help='existing folder for the pictures (default: the folder of this script)')
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        parser.error(f'{folder} is not a folder')
    return folder


if __name__ == '__main__':
    main(_parse_folder())
