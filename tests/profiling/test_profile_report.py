"""Output of profiles: activity, pictures, tables, HTML page and TensorBoard."""
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainingArguments

from timm_spikformer import (
    FiringRateCallback,
    ProfileCallback,
    SpikformerForImageClassification,
    SpikformerMAE,
    SpikformerTrainer,
)
from timm_spikformer.folders import MANIFEST, write_file
from timm_spikformer.hf.configuration_spikformer import SpikformerConfig
from timm_spikformer.kernels import explain_kernels
from timm_spikformer.profiling import (
    log_profile,
    measure_times,
    print_profile,
    print_steps,
    profile,
    record_activity,
    render,
    render_events,
    render_probabilities,
    report,
    to_dark,
    write_report,
)
from timm_spikformer.profiling.activity import default_layers
from timm_spikformer.profiling.report import to_csv, to_html

v2_alone = pytest.mark.parametrize('model', ['test_spikformer_v2'], indirect=True)  # drawing is slow


@pytest.fixture(scope='module')
def labels():
    return torch.arange(16) % 10


# -- activity

def test_rasters_match_spikes_of_layer(model, images):
    spikes = []
    neuron = model.blocks[0].mlp.fc1.lif
    handle = neuron.register_forward_hook(lambda m, args, out: spikes.append(out))
    activity = record_activity(model, images[:3], ['blocks.0.mlp.fc1', 'stem.stages.0.' + (
        'down' if hasattr(model.stem.stages[0], 'down') else 'proj')])
    handle.remove()
    raster = activity.rasters['blocks.0.mlp.fc1']
    assert raster.shape == (3, 4, 64)
    flat = spikes[0].flatten(2)
    assert torch.equal(raster[:, :, 0], flat[:, :, 0].T) and torch.equal(raster[:, :, -1], flat[:, :, -1].T)
    assert all(set(r.unique().tolist()) == {0., 1.} for r in activity.rasters.values())


def test_attention_maps_are_means_of_q_k_products(model, images):
    qkv = []
    handle = model.blocks[1].attn.qkv.register_forward_hook(lambda m, args, out: qkv.append(out))
    activity = record_activity(model, images[:3])
    handle.remove()
    q, k, _ = qkv[0].unflatten(-1, (3, 2, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)  # [T, B, heads, N, d]
    expected = (q @ k.transpose(-2, -1)).mean((0, 2, 3)).view(3, 4, 4)
    torch.testing.assert_close(activity.attention['blocks.1'], expected)
    assert expected.std() > 0
    assert list(activity.rasters) == default_layers(model)


def test_recording_does_not_change_model(model, images):
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    with torch.no_grad():
        before = model(images)
    activity = record_activity(model, images[:2], time_steps=2, mean=(0.5,) * 3, std=(0.2,) * 3)
    torch.testing.assert_close(activity.images, (images[:2] * 0.2 + 0.5).clamp(0, 1))
    assert activity.rasters[default_layers(model)[0]].shape[1] == 2
    mean, std = (torch.tensor(model.pretrained_cfg[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    torch.testing.assert_close(record_activity(model, images[:2]).images, (images[:2] * std + mean).clamp(0, 1))
    with torch.no_grad():
        assert torch.equal(model(images), before)
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks and model.time_steps == 4


def test_reconstructions(model, images):
    mae = SpikformerMAE(model, decoder_embed_dim=32, decoder_depth=1)
    activity = record_activity(mae, images[:2])
    assert activity.masked.shape == activity.reconstructed.shape == (2, 3, 64, 64)
    assert not activity.attention and activity.rasters
    assert 'reconstructions' in render(profile(mae, images[:4]), activity)


@pytest.mark.parametrize('make, message', [
    (lambda m, x: record_activity(m, [x]), 'got a list'),
    (lambda m, x: record_activity(m, x[:0]), r'at least one, got shape \[0, 3, 64, 64\]'),
    (lambda m, x: record_activity(m, x[0]), r'got shape \[3, 64, 64\]'),
    (lambda m, x: record_activity(m, x, mean=(1., 2.), std=(1.,)), r'mean must contain one value, .*got \(1.0, 2.0\)'),
    (lambda m, x: record_activity(m, x, std=0.5), 'std must contain one value, or one for each of 3 channels, got 0.5'),
    (lambda m, x: measure_times(profile(m, x), m, x[:0]), 'at least one'),
    (lambda m, x: measure_times(profile(m, x), m, None), 'got a NoneType'),
    (lambda m, x: measure_times(profile(timm.create_model('test_spikformer_v2', depth=1).train(), x), m, x),
     "has no layer 'blocks.1.*Pass the model that was profiled"),
    (lambda m, x: ProfileCallback(foo=1), "Unknown option 'foo'. Expected one of time_steps"),
    (lambda m, x: ProfileCallback(conventions={'bn': 'mac'}), 'Expected Conventions'),
    (lambda m, x: ProfileCallback(cost='fp64'), 'Unknown cost model'),
])
def test_bad_input(model, images, make, message):
    with pytest.raises(ValueError, match=message):
        make(model, images)


def test_unknown_layer(model, images):
    with pytest.raises(ValueError, match=r"Unknown spiking layer 'blocks.9.mlp'. Expected one of stem.stages.0"):
        record_activity(model, images, ['blocks.9.mlp'])


# -- tables, pictures and the page

def without_ids(svg):
    """An SVG file without the names of its markers, which matplotlib derives from their colors, among others."""
    return re.sub(rb'(?<=["#])[a-zA-Z]+[0-9a-f]{10}(?=["\)])', b'', svg)


@v2_alone
def test_pictures(model, images, labels):
    result, activity = profile(model, [(images, labels)]), record_activity(model, images[:2])
    pictures = render(result, activity)
    assert list(pictures) == ['firing_rates', 'energy', 'anytime', 'rasters', 'attention']
    for png in pictures.values():
        image = Image.open(io.BytesIO(png)).convert('L')
        assert len(image.getcolors(256)) > 10
    light, dark = (render(result, activity, 'svg', dark=dark) for dark in (False, True))
    assert light.keys() == pictures.keys() and light['energy'] != dark['energy']
    assert render(result, activity, 'svg') == light  # deterministic
    assert {name: without_ids(to_dark(svg)) for name, svg in light.items()} == {
        name: without_ids(svg) for name, svg in dark.items()}
    assert 'anytime' not in render(profile(model, images, time_steps=1))
    assert list(render(result, activity, names=['attention', 'energy'])) == ['energy', 'attention']
    with pytest.raises(ValueError, match="Unknown figure 'rates'. Expected names from events"):
        render(result, names=['rates'])


@v2_alone
def test_pictures_of_one_image_lie_side_by_side(model, images):
    def size(png):
        return Image.open(io.BytesIO(png)).size
    result = profile(model, images[:1])
    one, two = (render(result, record_activity(model, images[:n]), names=['attention'])['attention'] for n in (1, 2))
    assert size(one)[0] > size(one)[1] and size(two)[0] < size(two)[1]
    svg = render(result, record_activity(model, images[:1]), 'svg', names=['rasters'])['rasters'].decode()
    assert '>time steps<' in svg and 'image by image' not in svg


def test_picture_of_probabilities():
    probabilities = torch.tensor([[0.2, 0.1, 0.6, 0.1, 0.], [0.2, 0.6, 0.05, 0.15, 0.], [0.5, 0.3, 0.02, 0.1, 0.08]])
    labels = ['first', 'second', 'third', 'fourth', 'fifth']
    svg = render_probabilities(probabilities, labels, 'svg').decode()
    # those that lead at a step, the last step first, and the most probable one of the others
    assert re.findall('>(first|second|third|fourth|fifth)<', svg) == ['first', 'second', 'third', 'fourth']
    assert without_ids(render_probabilities(probabilities, labels, 'svg', True)) == without_ids(to_dark(svg.encode()))
    other = probabilities.clone()
    other[1, 1] = 0.7
    assert render_probabilities(other, labels, 'svg').decode() != svg
    assert Image.open(io.BytesIO(render_probabilities(probabilities[:1], labels))).format == 'PNG'
    with pytest.raises(ValueError, match=r'\[time steps, 4\], one for each label. Got \[3, 5\]'):
        render_probabilities(probabilities, labels[:4])


class Page(HTMLParser):
    """Parser that collects the references, tags and text of a page."""

    def __init__(self, html):
        super().__init__()
        self.references, self.tags, self.text, self.open = [], [], '', []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ('meta', 'link', 'img', 'source', 'br'):
            self.open.append(tag)
        self.references += [v for k, v in attrs if k in ('src', 'srcset', 'href', 'action', 'data')]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@v2_alone
def test_page_is_self_contained(model, images, labels):
    profiles = [profile(model, [(images, labels)], t) for t in (1, 4)]
    html = to_html(profiles, record_activity(model, images[:2]), '<b>data</b>', ['a <note>'])
    page = Page(html)
    assert page.open == [] and 'script' not in page.tags
    assert len(page.references) == 2 * 5 + 1 and all(r.startswith('data:') for r in page.references)
    assert not re.search(r'url\(|@import', html)
    assert 'a <note>' in page.text and '<b>data</b>' in page.text  # escaped
    for layer in profiles[-1].layers:
        assert layer.name in page.text
    assert f'{100 * profiles[-1].accuracy:.1f}%' in page.text
    assert 'None' not in page.text and 'nan' not in page.text


@v2_alone
def test_report(model, images, tmp_path):
    result = profile(model, images)
    (tmp_path / 'mine.txt').write_text('stays')
    page = write_report(tmp_path, [result], record_activity(model, images[:2]))
    assert page == tmp_path / 'index.html'
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        'mine.txt', 'index.html', 'profile.json', 'layers.csv', 'firing_rates.png', 'energy.png', 'anytime.png',
        'rasters.png', 'attention.png', MANIFEST}
    (values,) = json.loads((tmp_path / 'profile.json').read_text())
    assert values['totals']['acs'] == result.totals.acs


@pytest.mark.parametrize('mj, text', [
    (0.99963, '1 mJ'), (0.9994, '999 µJ'), (1234., '1.23 J'), (0.00099971, '1 µJ'), (0.0123, '12.3 µJ'),
    (5e-7, '0.5 nJ'), (999.7, '1 J'), (3.21e6, '3210 J'), (0., '0 nJ')])
def test_energies_are_rounded_before_unit_is_chosen(mj, text):
    assert report._energy(mj) == text


@pytest.mark.parametrize('n, text', [
    (999.7, '1 k'), (999_999, '1 M'), (999_400, '999 k'), (1_234_567, '1.23 M'), (12, '12'), (0.5, '0.5'), (0, '0'),
    (9.9996e14, '1000 T'), (2.5e15, '2500 T')])
def test_numbers_are_rounded_before_prefix_is_chosen(n, text):
    assert report._count(n) == text


@pytest.mark.parametrize('width', [30, 50, 80, 140])
def test_tables(model, images, labels, width):
    console = Console(width=width, record=True, file=io.StringIO())
    result = profile(model, [(images, labels)])
    print_profile(result, console)
    print_steps(result, console)
    text = console.export_text()
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert '…' not in text and max(map(len, text.splitlines())) <= width
    for layer in result.layers:
        assert layer.name[:9] in text if width == 30 else 'J' in rows[layer.name]  # at width 30, names are wrapped
    assert ('saturated' in text) == (width == 140)
    headings = re.findall('(input|firing) (?=.*\n.*rate)', text)  # above the word rate
    assert headings == (['input', 'firing'] if width == 140 else ['firing'] if width >= 50 else [])
    assert 'residual = sum' in text and 'energy' in text


@v2_alone
def test_terminal_without_micro_sign(model, images, labels):
    buffer = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    console = Console(file=buffer, width=100)
    result = profile(model, [(images, labels)])
    print_profile(result, console)
    print_steps(result, console)
    buffer.flush()
    text = buffer.buffer.getvalue().decode('ascii')
    assert ' uJ' in text and '?' not in text


@v2_alone
def test_report_does_not_replace_foreign_files(model, images, tmp_path):
    result = profile(model, images[:2])
    (tmp_path / 'index.html').write_text('precious')
    with pytest.raises(ValueError, match='index.html was not written by timm-spikformer'):
        write_report(tmp_path, [result])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('index.html', 'precious')]
    (tmp_path / 'index.html').unlink()
    with write_file(tmp_path / 'results.json', 'demo') as partial:
        partial.write_text('{}')
    with pytest.raises(ValueError, match='contains results.json, which `timm-spikformer demo` wrote. Choose an'):
        write_report(tmp_path, [result])


@v2_alone
def test_second_report_replaces_first(model, images, tmp_path, monkeypatch):
    result = profile(model, images[:2])
    for pictures in ({'energy': b'1', 'anytime': b'2'}, {'energy': b'3'}):
        monkeypatch.setattr(report, 'render', lambda *args, pictures=pictures: pictures)
        write_report(tmp_path / 'out', [result])
    assert (tmp_path / 'out' / 'energy.png').read_bytes() == b'3' and not (tmp_path / 'out' / 'anytime.png').exists()


# -- TensorBoard

def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={'images': 0}).Reload()
    return events.Tags(), events


@v2_alone
def test_log_profile(model, images, labels, tmp_path):
    writer = SummaryWriter(tmp_path)
    for epoch in (1, 2):
        log_profile(writer, profile(model, [(images, labels)]), epoch, record_activity(model, images[:2]))
    writer.close()
    tags, events = read_events(tmp_path)
    assert {'profile/firing_rate', 'profile/energy_mj', 'profile/accuracy', 'profile/energy_mj/stem',
            'profile/firing_rate/blocks.1.mlp.fc2', 'profile/silent/blocks.0.attn'} <= set(tags['scalars'])
    assert set(tags['images']) == {
        f'profile/{name}' for name in ('firing_rates', 'energy', 'anytime', 'rasters', 'attention')}
    assert [e.step for e in events.Scalars('profile/firing_rate')] == [1, 2]


@v2_alone
def test_callback(model, images, labels, tmp_path):
    hf = SpikformerForImageClassification(SpikformerConfig.from_timm(model))
    hf.timm_model.load_state_dict(model.state_dict())
    data = [dict(pixel_values=x, labels=y) for x, y in zip(images, labels)]
    args = TrainingArguments(
        tmp_path, num_train_epochs=1, per_device_train_batch_size=8, per_device_eval_batch_size=4, report_to='none',
        eval_strategy='epoch', use_cpu=True, save_strategy='no', logging_steps=1, disable_tqdm=True)
    trainer = SpikformerTrainer(
        hf, args, train_dataset=data, eval_dataset=data, callbacks=[ProfileCallback(max_batches=2)])
    trainer.train()
    (entry,) = [x for x in trainer.state.log_history if 'eval_loss' in x]
    assert 0 < entry['profile/firing_rate'] < 1 and entry['profile/energy_mj'] > 0
    metrics = trainer.evaluate()
    expected = profile(hf.eval(), [{'pixel_values': images[:8]}])
    assert metrics['profile/energy_mj'] == pytest.approx(expected.totals.energy_mj)
    tags, _ = read_events(tmp_path / 'runs' / 'profile')
    assert 'profile/rasters' in tags['images'] and 'profile/energy_mj/mlp' in tags['scalars']
    with pytest.raises(ValueError, match='max_batches must be an integer of at least 1'):
        ProfileCallback(max_batches=0)


@v2_alone
def test_callback_after_diverged_training_warns(model, images, labels, tmp_path, caplog):
    hf = SpikformerForImageClassification(SpikformerConfig.from_timm(model))
    torch.nn.init.constant_(hf.timm_model.blocks[1].mlp.fc1.linear.weight, torch.nan)
    data = [dict(pixel_values=x, labels=y) for x, y in zip(images, labels)]
    args = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=8, report_to='none', eval_strategy='steps', eval_steps=1,
        use_cpu=True, save_strategy='no', logging_steps=1, disable_tqdm=True)
    trainer = SpikformerTrainer(
        hf, args, train_dataset=data, eval_dataset=data, callbacks=[ProfileCallback(), FiringRateCallback()])
    trainer.train()
    assert trainer.state.global_step == 2
    assert 'Step 1: there is no profile. The output of stem.stages.0.down contains NaN' in caplog.text
    assert 'layers are NaN, first in timm_model.blocks.1.mlp.fc1.lif, because' in caplog.text
    assert not any('profile/energy_mj' in entry for entry in trainer.state.log_history)


@v2_alone
def test_layer_times(model, images):
    """All layers except attention products and the classifier have times, with and without event-driven products."""
    result = measure_times(profile(model, images), model, images)
    for layer in result.layers:
        is_measured = layer.name not in ('head.fc', *(f'blocks.{i}.attn' for i in range(len(model.blocks))))
        assert (layer.milliseconds is not None) == (layer.dense_milliseconds is not None) == is_measured, layer.name
        assert not is_measured or min(layer.milliseconds, layer.dense_milliseconds) > 0
    row = to_csv([result]).splitlines()
    assert 'milliseconds' in row[0] and f'{result.layers[0].milliseconds}' in row[1]
    assert result.to_dict()['layers'][0]['milliseconds'] == result.layers[0].milliseconds
    assert 'ms, dense' in to_html([result]) and 'ms, dense' not in to_html([profile(model, images)])


@v2_alone
def test_layer_times_of_compiled_model(model, images, monkeypatch):
    """A compiled model is measured without compilation, because no kernel runs in compiled code."""
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(graph)
            return graph(*args)
        return run

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(images[:2])
    assert calls
    calls.clear()
    layer = measure_times(profile(model, images), compiled, images[:2]).layer('blocks.0.mlp.fc1')
    assert layer.milliseconds > 0 and layer.dense_milliseconds > 0
    report = explain_kernels(compiled, images[:2])
    assert not any('not called' in group.reason for group in report) and not calls


def test_render_events():
    frames = torch.zeros(1, 3, 2, 8, 8)
    frames[0, 1, 1, 2, 3] = 5.  # an ON event
    frames[0, 2, 0, 4, 4] = 5.  # an OFF event
    image = np.asarray(Image.open(io.BytesIO(render_events(frames))).convert('RGB')).reshape(-1, 3)
    for color in ('#3b82c4', '#d9822b'):
        assert (image == [int(color[i:i + 2], 16) for i in (1, 3, 5)]).all(1).any()
    assert len(render_events(torch.zeros(2, 20, 2, 8, 8))) > 0
    with pytest.raises(ValueError, match=r'\[n, T, 2, H, W\]'):
        render_events(frames[0])
