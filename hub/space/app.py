"""A Hugging Face Space: classify an image with a Spikformer, and show its spikes, attention and energy.

    python app.py

It uses the weights in the package and makes no requests to other servers. `build` and `predict` accept the folder of a
masked autoencoder, to show reconstructions by one that is not in the package.
"""
import base64
import html
import io
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import gradio as gr
import timm
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor, nn
from weights import classifiers, default_classifier, describe, find_autoencoder, load_autoencoder, load_classifier

from timm_spikformer.event_data.simulated import simulate_frames
from timm_spikformer.images import data_config, decode, read_splits, to_pixels
from timm_spikformer.profiling import (
    Activity,
    Profile,
    profile,
    record_activity,
    render,
    render_events,
    render_probabilities,
    to_dark,
)

MAX_TIME_STEPS = 16
_FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF')
_MIN_SIDE, _MAX_SIDE, _MAX_MEGAPIXELS = 8, 10_000, 40
_FONTS = dict(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])  # none is downloaded
LAUNCH = dict(
    theme=gr.themes.Default(**_FONTS), css_paths=Path(__file__).with_name('style.css'), footer_links=[],
    ssr_mode=False, max_file_size='20mb')
_CAPTIONS = dict(
    probabilities='Probabilities of the labels after each time step.',
    rasters='Spikes of up to 64 neurons of some layers, over the time steps.',
    firing_rates='Firing rate of each layer at each time step.',
    energy='Energy of each layer. The marks show the energy of a dense artificial network with the same layers.',
    attention='Attention that each token receives: q k^T, averaged over queries, heads and time steps. There is no '
              'softmax, so each map has its own scale.',
    events='Events of a simulated event camera that moves in front of the image in three saccades, one frame per '
           'time step. ON (brighter) is blue, OFF (darker) is orange. They are not the input of the model.',
    reconstructions='The image, the patches that the masked autoencoder receives, its reconstruction of the other '
                    'patches. The true mean and standard deviation of each patch are used to display it.',
)


# -- one image

class Prediction(NamedTuple):
    """What a model computes for one image."""
    probabilities: Tensor  # [T, num_classes], after each time step
    labels: Sequence[str]
    profile: Profile
    activity: Activity
    events: Tensor  # [1, T, 2, H, W], simulated events of the image
    reconstruction: Optional[Activity]  # of the masked autoencoder; None without one
    note: Optional[str]  # how the image was converted; None if it was not


def read_image(path: Optional[str], mode: str = 'RGB') -> Tuple[Image.Image, Optional[str]]:
    """Return an image in a Pillow mode, and a note if its colors or bits per pixel were converted.

    Raises:
        ValueError: There is no image, or one that is damaged, animated, too small or too large.
    """
    if path is None:
        raise ValueError('There is no image. Upload one, or pick an example.')
    data = Path(path).read_bytes()
    limits = f'Expected sides of {_MIN_SIDE} to {_MAX_SIDE:,} pixels, and at most {_MAX_MEGAPIXELS} megapixels.'
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            (width, height), original, frames = image.size, image.mode, getattr(image, 'n_frames', 1)
            frames = 1 if image.format == 'MPO' else frames  # a photograph, with a preview as its second frame
    except Image.DecompressionBombError as e:
        raise ValueError(f'The image is too large. {limits}') from e
    except Exception as e:  # Pillow raises errors of many types for damaged files
        raise ValueError(f'The file is not an image that can be read. Expected {", ".join(_FORMATS)}.') from e
    if frames > 1:
        raise ValueError(f'The image is an animation of {frames} frames. Expected one frame: save it as PNG.')
    if min(width, height) < _MIN_SIDE or max(width, height) > _MAX_SIDE or width * height > _MAX_MEGAPIXELS * 1e6:
        raise ValueError(f'The image has {width:,} x {height:,} pixels. {limits}')
    try:
        image = decode(io.BytesIO(data), mode)
    except ValueError as e:
        raise ValueError(f'The image cannot be read: {e}') from e
    notes = {
        'CMYK': 'The image was converted from CMYK.',
        'I;16': 'The image has 16 bits per pixel. Only the upper 8 bits were used.',
    }
    return image, notes.get(original[:4])


def predict(
        path: Optional[str],
        name: str,
        time_steps: float,
        invert: bool = False,
        autoencoder: Optional[str] = None,
) -> Prediction:
    """Classify an image, and record what the model does.

    Args:
        path: Image file.
        name: One of `classifiers()`.
        time_steps: Number of time steps T, from 1 to `MAX_TIME_STEPS`.
        invert: Invert the brightness.
        autoencoder: See `load_autoencoder`; by default, `find_autoencoder()`.

    Raises:
        ValueError: An argument is invalid; the message is shown on the page.
    """
    if name not in classifiers():
        raise ValueError(f'There is no model {name!r}. Expected one of {", ".join(classifiers())}.')
    if time_steps not in range(1, MAX_TIME_STEPS + 1):
        raise ValueError(f'T must be a whole number from 1 to {MAX_TIME_STEPS}, got {time_steps!r}.')
    model = load_classifier(name, int(time_steps))
    image, note = read_image(path, 'L' if model.in_chans == 1 else 'RGB')
    image = ImageOps.invert(image) if invert else image

    def to_batch(m: nn.Module) -> Tensor:
        return create_transform(**data_config(m))(image).unsqueeze(0)

    x = to_batch(model)
    with torch.no_grad():
        probabilities = model.forward_steps(x).softmax(-1)[:, 0]
    labels = timm.get_pretrained_cfg(name).label_names or [str(i) for i in range(model.num_classes)]
    reconstruction = None
    autoencoder = autoencoder or find_autoencoder()
    if autoencoder is not None:
        mae = load_autoencoder(autoencoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same mask for every image
            reconstruction = record_activity(mae, to_batch(mae.encoder))
    gray = to_pixels(x, data_config(model))[0].mean(0).clamp(0, 1)
    events = torch.from_numpy(simulate_frames(gray.numpy(), int(time_steps)).astype('float32')).unsqueeze(0)
    return Prediction(
        probabilities, labels, profile(model, x), record_activity(model, x), events, reconstruction, note)


# -- the page

def _figures(figures: Dict[str, bytes], *names: str) -> str:
    """Return HTML with SVG figures that follow the light or dark mode of the page."""
    def image(svg: bytes, mode: str, caption: str) -> str:
        data = base64.b64encode(svg).decode()
        return f'<img class="on-{mode}" src="data:image/svg+xml;base64,{data}" alt="{html.escape(caption)}">'

    parts = []
    for name in names:
        caption = _CAPTIONS[name]
        images = image(figures[name], 'light', caption) + image(to_dark(figures[name]), 'dark', caption)
        parts.append(f'<figure id="{name}">{images}<figcaption>{html.escape(caption)}</figcaption></figure>')
    return f'<div class="figures">{"".join(parts)}</div>'


def _steps_table(p: Prediction) -> str:
    rows = ['| step | label | probability | energy so far |', '|--:|---|--:|--:|']
    for step, probabilities in zip(p.profile.steps, p.probabilities):
        best = probabilities.argmax().item()
        rows.append(
            f'| {step.step} | {p.labels[best]} | {100 * probabilities[best]:.1f}% | {1e3 * step.energy_mj:.2f} µJ |')
    return '\n'.join(rows)


def _energy_text(p: Profile) -> str:
    return (
        f'{1e3 * p.totals.energy_mj:.2f} µJ for this image, and {p.firing_rate:.3f} spikes per neuron and time step '
        f'on average over the layers. A dense artificial network with the same layers needs '
        f'{1e3 * p.totals.ann_energy_mj:.2f} µJ. These are estimates of arithmetic only: {p.cost.mac_pj:g} pJ for a '
        f'multiply-accumulate, {p.cost.ac_pj:g} pJ for an accumulate ({p.cost.source}).')


def _message(text: str, is_error: bool = False) -> Dict[str, Any]:
    kind, role = ('message error', 'alert') if is_error else ('message', 'status')
    return gr.update(visible=bool(text), value=f'<div class="{kind}" role="{role}">{html.escape(text)}</div>')


def build(autoencoder: Optional[str] = None) -> gr.Blocks:
    """Create the page.

    Args:
        autoencoder: See `load_autoencoder`; by default, `find_autoencoder()`. Without one, the tab of reconstructions
            is hidden.

    Raises:
        ValueError: `autoencoder` is not a masked autoencoder.
    """
    name = default_classifier()
    autoencoder = autoencoder or find_autoencoder()
    mae = load_autoencoder(autoencoder) if autoencoder is not None else None
    test = read_splits()['test']
    examples = [[test.select([int((test.labels == label).argmax())])[0][0]] for label in range(len(test.classes))]

    with gr.Blocks(title='Spikformer V2', analytics_enabled=False) as page:
        gr.Markdown(
            '# Spikformer V2\nA vision transformer whose neurons emit binary spikes over T time steps. Select an '
            'image and T to see the prediction after each time step, the spikes, the energy and the attention.')
        about = gr.Markdown(describe(name))
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(
                    label='Image', sources=['upload', 'clipboard'], type='filepath', format='png', height=240,
                    elem_classes='pixels', buttons=[])
                gr.Examples(
                    examples, [image], label='Fashion-MNIST test images, one of each class', elem_id='examples')
                model = gr.Dropdown(classifiers(), value=name, label='Model')
                time_steps = gr.Slider(1, MAX_TIME_STEPS, value=4, step=1, label='Time steps T')
                invert = gr.Checkbox(
                    label='Invert brightness', info='The weights expect a light object on a black background.')
                button = gr.Button('Classify', variant='primary')
            with gr.Column(scale=3):
                message = gr.HTML(
                    _message('Pick an example or upload an image, and press Classify.')['value'], elem_id='message')
                with gr.Column(visible=False) as results:
                    label = gr.Label(num_top_classes=3, label='Prediction after all time steps', elem_id='label')
                    curve = gr.HTML()
                    steps = gr.Markdown(elem_id='steps')
        with gr.Tabs(visible=False) as tabs:
            with gr.Tab('Spikes'):
                spikes = gr.HTML()
            with gr.Tab('Energy'):
                energy_text = gr.Markdown()
                energy = gr.HTML()
            with gr.Tab('Attention'):
                attention = gr.HTML()
            with gr.Tab('Event camera'):
                events = gr.HTML()
            with gr.Tab('Reconstruction', visible=autoencoder is not None):
                gr.Markdown(mae and f'**Weights:** `{Path(autoencoder).name}`, a masked autoencoder with T = '
                                    f'{mae.encoder.time_steps} that receives {1 - mae.mask_ratio:.0%} of the patches.')
                reconstruction = gr.HTML()

        def classify(file: Optional[Dict], name: str, T: float, is_inverted: bool) -> Dict[Any, Any]:
            try:
                p = predict(file and file['path'], name, T, is_inverted, autoencoder)
            except ValueError as e:
                hidden = gr.update(visible=False)
                return {message: _message(str(e), is_error=True), results: hidden, tabs: hidden}
            figures = render(p.profile, p.activity, 'svg', names=['rasters', 'firing_rates', 'energy', 'attention'])
            figures['probabilities'] = render_probabilities(p.probabilities, p.labels, 'svg')
            figures['events'] = render_events(p.events, 'svg')
            shown = {
                message: _message(p.note or ''),
                results: gr.update(visible=True),
                tabs: gr.update(visible=True),
                label: dict(zip(p.labels, p.probabilities[-1].tolist())),
                curve: _figures(figures, 'probabilities'),
                steps: _steps_table(p),
                spikes: _figures(figures, 'rasters', 'firing_rates'),
                energy_text: _energy_text(p.profile),
                energy: _figures(figures, 'energy'),
                attention: _figures(figures, 'attention'),
                events: _figures(figures, 'events'),
            }
            if p.reconstruction is not None:
                figures = render(p.profile, p.reconstruction, 'svg', names=['reconstructions'])
                shown[reconstruction] = _figures(figures, 'reconstructions')
            return shown

        outputs = [
            message, results, tabs, label, curve, steps, spikes, energy_text, energy, attention, events, reconstruction]
        # Gradio's preprocessing is off, because its errors show no message to the visitor; `predict` checks the values
        button.click(
            classify, [image, model, time_steps, invert], outputs, scroll_to_output=True, preprocess=False)
        model.change(describe, model, about)
    return page


if __name__ == '__main__':
    build().launch(**LAUNCH)
