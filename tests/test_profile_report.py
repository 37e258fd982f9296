"""Output of profiles: activity, pictures, tables, HTML page, command and TensorBoard."""
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
import torch
from conftest import assert_neurons_fire, write_images
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models import save_for_hf
from torch.optim.swa_utils import update_bn
from torch.utils.tensorboard import SummaryWriter
from transformers import TrainingArguments

from timm_spikformer import (
    FiringRateCallback,
    ProfileCallback,
    SpikformerForImageClassification,
    SpikformerForMaskedImageModeling,
    SpikformerMAE,
    SpikformerTrainer,
    cli,
)
from timm_spikformer.event_data.names import read_event_splits
from timm_spikformer.folders import MANIFEST, write_file
from timm_spikformer.hf.configuration_spikformer import SpikformerConfig
from timm_spikformer.images import data_config, make_loader
from timm_spikformer.profiling import (
    COST_MODELS,
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
from timm_spikformer.profiling.choices import COST_NAMES
from timm_spikformer.profiling.report import to_csv, to_html
from timm_spikformer.publishing import publish
from timm_spikformer.training import init_bn_bias

SHIPPED = 'spikformer_v2_2_64_patch4_32'
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


def test_unknown_layer(model, images):
    with pytest.raises(ValueError, match=r"no layer 'blocks.9.mlp' with neurons, expected one of stem.stages.0"):
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
    with pytest.raises(ValueError, match="no figure 'rates', expected names of events"):
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
    with pytest.raises(ValueError, match=r'\[time steps, 4\], one for each label, got \[3, 5\]'):
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


# -- the command

@pytest.fixture
def no_pictures(monkeypatch):
    """Skip drawing, which takes most of the time of the command."""
    monkeypatch.setattr(report, 'render', lambda *args: {})


def run(tmp_path, *args):
    cli.main(['profile', *map(str, args), '--output', str(tmp_path / 'out')])
    return json.loads((tmp_path / 'out' / 'profile.json').read_text())


def test_command(tmp_path, capsys):
    profiles = run(
        tmp_path, SHIPPED, '--images', 60, '--time-steps', 3, 1, '--residual', 'nonzero', '--cost', 'int8',
        '--layers', 'blocks.0.attn')
    assert [p['time_steps'] for p in profiles] == [1, 3]
    assert profiles[0]['accuracy'] > 0.7 and profiles[0]['images'] == 60
    assert profiles[0]['conventions']['residual'] == 'nonzero' and profiles[0]['cost']['name'] == 'int8'
    assert profiles[1]['steps'][0]['accuracy'] == profiles[0]['accuracy']
    text = (tmp_path / 'out' / 'index.html').read_text()
    assert '60 images of Fashion-MNIST, test split' in text
    assert 'head.fc' in capsys.readouterr().out


def test_command_with_custom_cost(tmp_path, no_pictures):
    (values,) = run(tmp_path, SHIPPED, '--images', 4, '--cost', '2,0.5')
    assert values['totals']['energy_mj'] == pytest.approx(
        (2 * values['totals']['macs'] + 0.5 * values['totals']['acs']) * 1e-9)
    for text, message in (('fp64', "no cost model 'fp64'"), ('1,x', "got '1,x'"), ('1,2,3', 'two values'),
                          ('-1,2', 'at least 0 and finite, got -1')):
        with pytest.raises(SystemExit, match=f'error: .*{message}'):
            run(tmp_path, SHIPPED, f'--cost={text}')


def test_help_lists_all_cost_models():
    assert COST_NAMES == tuple(COST_MODELS)


def test_command_calibrates(tmp_path, capsys):
    (values,) = run(tmp_path, 'test_spikformer_v2', '--calibrate', '--images', 16, '--time-steps', 4)
    assert min(x['silent'] for x in values['layers'] if x['silent'] is not None) < 1
    assert values['accuracy'] is None  # the model has 1000 classes
    out = capsys.readouterr().out
    assert 'The weights are random' in out and 'there are 10 classes, but the model has 1000' in out


def test_command_on_checkpoint_and_unlabeled_images(tmp_path):
    write_images(tmp_path / 'images', 'test', classes=1, count=6)
    model = timm.create_model(SHIPPED, pretrained=True)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'a.pth')
    (values,) = run(tmp_path, SHIPPED, '--checkpoint', tmp_path / 'a.pth', '--data', tmp_path / 'images' / 'class_0')
    assert values['images'] == 6 and values['accuracy'] is None and values['steps'][0]['agreement'] == 1
    publish(model, 'me/name', 'mit', output=tmp_path / 'folder', dry_run=True)
    (again,) = run(tmp_path, f'local-dir:{tmp_path / "folder"}', '--data', tmp_path / 'images' / 'class_0')
    assert again['totals'] == values['totals']
    assert 'there are no labels' in (tmp_path / 'out' / 'index.html').read_text()


def test_command_on_masked_autoencoder(tmp_path):
    mae = SpikformerForMaskedImageModeling(SpikformerConfig.from_timm(timm.create_model(SHIPPED, pretrained=True)))
    mae.encoder.load_state_dict({
        k: v for k, v in timm.create_model(SHIPPED, pretrained=True).state_dict().items() if k[:4] != 'head'})
    publish(mae.eval(), 'me/name', 'mit', output=tmp_path / 'folder', dry_run=True)
    (values,) = run(tmp_path, SHIPPED, '--checkpoint', tmp_path / 'folder', '--images', 8)
    assert values['by_channel'] and values['layers'][-1]['name'] == 'blocks.1.mlp.fc2'
    assert (tmp_path / 'out' / 'reconstructions.png').is_file()


def test_no_accuracy_for_other_classes(tmp_path, capsys, no_pictures):
    """The data has as many classes as the model, with other names."""
    write_images(tmp_path / 'images', 'test', classes=10, count=2)
    (values,) = run(tmp_path, SHIPPED, '--data', tmp_path / 'images')
    assert values['accuracy'] is None and values['images'] == 20
    assert "'class_0' is not a class of the model, whose classes are 'T-shirt/top'" in ' '.join(
        capsys.readouterr().out.split())


def test_accuracy_for_classes_in_other_order(tmp_path, no_pictures):
    """Folders are named like the model's classes; their natural order differs from the model's order."""
    names = timm.get_pretrained_cfg(SHIPPED).label_names
    write_images(tmp_path / 'all', 'test', classes=10, count=10)
    (tmp_path / 'all' / 'class_0').rename(tmp_path / 'all' / 'Zebra')
    (values,) = run(tmp_path, SHIPPED, '--data', tmp_path / 'all')
    assert values['accuracy'] is None
    for i in range(1, 10):
        (tmp_path / 'all' / f'class_{i}').rename(tmp_path / 'all' / names[i])
    shutil.rmtree(tmp_path / 'all' / 'Zebra')
    (values,) = run(tmp_path, SHIPPED, '--data', tmp_path / 'all')
    assert values['accuracy'] > 0.75 and values['images'] == 90


def test_accuracy_of_model_without_class_names(tmp_path, capsys, no_pictures):
    model = timm.create_model(SHIPPED, pretrained=True)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'a.pth')
    (values,) = run(tmp_path, SHIPPED, '--checkpoint', tmp_path / 'a.pth', '--images', 50)
    assert values['accuracy'] > 0.7
    assert 'The model has no class names' in ' '.join(capsys.readouterr().out.split())


@pytest.mark.parametrize('encoding, width', [
    ('ascii', 30), pytest.param('latin-1', 200, marks=pytest.mark.slow)])
def test_command_in_non_utf8_terminals(encoding, width, tmp_path):
    """The output folder has brackets and characters in its name that the encoding of the terminal lacks."""
    output = tmp_path / '[red]\u00b5 \u4e2d[/red]'
    env = dict(os.environ, PYTHONIOENCODING=encoding, COLUMNS=str(width), NO_COLOR='1', OMP_NUM_THREADS='1')
    done = subprocess.run(
        [sys.executable, '-m', 'timm_spikformer.cli', 'profile', SHIPPED, '--images', '4', '--output', output], env=env,
        capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (output / 'index.html').is_file()
    last = done.stdout.decode(encoding).splitlines()[-1]
    assert last.startswith('Page: ') and '[red]' in last and last.endswith('[/red]/index.html')
    assert b'\x1b' not in done.stdout


@pytest.mark.parametrize('args, message', [
    (['resnet18'], "There is no Spikformer 'resnet18'"),
    (['spikformer_v2_8_512'], 'Specify weights with --checkpoint, or use random weights with --calibrate'),
    ([f'{SHIPPED}.nope'],
     f"There are no weights named '{SHIPPED}.nope', expected {SHIPPED} or one of {SHIPPED}.fashion_mnist, "),
    ([f'{SHIPPED}.nope', '--calibrate'], 'There are no weights named'),
    ([SHIPPED, '--time-steps', '0'], '--time-steps must be at least 1'),
    ([SHIPPED, '--images', '0'], '--images must be at least 1'),
    ([SHIPPED, '--time-steps', '1', f'1{"0" * 25}'], '--time-steps must be at most 2147483647'),
    ([SHIPPED, '--batch-size', f'1{"0" * 25}'], '--batch-size must be at most 2147483647'),
    ([SHIPPED, '--data', 'nowhere'], 'nowhere is not a folder'),
    ([SHIPPED, '--checkpoint', 'nowhere'], 'There is no nowhere'),
    ([SHIPPED, '--device', 'abacus'], '--device abacus cannot be used'),
    ([SHIPPED, '--layers', 'head.fc'], "There is no layer 'head.fc' with neurons"),
])
def test_command_with_bad_input(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        run(tmp_path, *args)
    assert str(e.value).startswith('error: ') and message in str(e.value)
    assert not (tmp_path / 'out').exists()


def test_command_checks_output_before_it_measures(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError('the model is loaded before the output folder is checked')

    monkeypatch.setattr('timm_spikformer.profiling.run._load', fail)
    (tmp_path / 'file').write_text('x')
    for folder in (tmp_path / 'file' / 'out', '/proc/out'):
        with pytest.raises(SystemExit, match=f'error: {folder}.*'):
            cli.main(['profile', SHIPPED, '--output', str(folder)])


def test_command_on_empty_folder(tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(SystemExit, match='contains no images'):
        run(tmp_path, SHIPPED, '--data', tmp_path / 'empty')


# -- a real browser

def check_in_browser(path, width, scheme):
    """Open a page in Chromium, and check messages, requests, width, pictures, text size and contrast."""
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=os.environ.get('CHROMIUM', '/usr/bin/chromium'), args=[
            '--no-sandbox'])
        page = browser.new_context(viewport=dict(width=width, height=800), color_scheme=scheme).new_page()
        messages, requests = [], []
        page.on('console', lambda m: messages.append(m.text))
        page.on('pageerror', lambda e: messages.append(str(e)))
        page.on('request', lambda r: requests.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_load_state('networkidle')
        assert messages == []
        assert [r for r in requests if not r.startswith('data:')] == [path.as_uri()]
        # nothing is wider than the window, all pictures load, and the smallest text is readable
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert page.evaluate('[...document.images].every(i => i.naturalWidth > 0)')
        sizes = page.evaluate(
            '[...document.querySelectorAll("p, td, th, li, figcaption, span")].map(e => parseFloat('
            'getComputedStyle(e).fontSize))')
        assert min(sizes) >= 13
        contrast = page.evaluate("""() => {
            const channel = c => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
            const light = rgb => { const [r, g, b] = rgb.match(/[0-9.]+/g).map(Number).map(channel);
                                   return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            const paper = light(getComputedStyle(document.body).backgroundColor);
            return [...document.querySelectorAll("h1, h2, p, li, figcaption, td")].map(e => {
                const ink = light(getComputedStyle(e).color);
                return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
            });
        }""")
        assert min(contrast) >= 4.5  # required by WCAG 2, level AA
        browser.close()


@pytest.mark.browser
@pytest.mark.parametrize('width', [360, 1280])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('kind', ['images', 'events'])
def test_page_in_browser(kind, width, scheme, tmp_path, request):
    if kind == 'images':
        run(tmp_path, SHIPPED, '--images', 60, '--time-steps', 1, 4)
    else:
        run(tmp_path, request.getfixturevalue('event_model'), '--events', EVENTS, '--images', 20)
    check_in_browser(tmp_path / 'out' / 'index.html', width, scheme)


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


# -- event sequences

EVENTS = 'events/simulated_fashion_mnist?time_steps=3&split_by=time'


@pytest.fixture
def event_model(tmp_path):
    """A folder with a calibrated model of two input channels."""
    torch.manual_seed(0)
    model = timm.create_model(
        'test_spikformer_v2', in_chans=2, num_classes=10, img_size=32,
        pretrained_cfg_overlay=dict(input_size=(2, 32, 32), mean=(0., 0.), std=(1., 1.)))
    init_bn_bias(model)
    loader = make_loader(read_event_splits(EVENTS)['train'].sample_evenly(32), data_config(model), 16)
    update_bn(loader, model)
    model.eval()
    assert_neurons_fire(model, next(iter(loader))[0])
    save_for_hf(model, tmp_path / 'events', safe_serialization=True)
    return f'local-dir:{tmp_path / "events"}'


def test_command_on_event_sequences(event_model, tmp_path):
    (values,) = run(tmp_path, event_model, '--events', EVENTS, '--images', 20)
    assert values['is_sequence'] and values['time_steps'] == 3 and values['images'] == 20
    assert values['layers'][0]['acs'] != values['layers'][0]['macs']  # counts of events are accumulated
    page = (tmp_path / 'out' / 'index.html').read_text()
    assert 'Events of each time step' in page and 'simulated events' in page and 'per sequence' in page
    assert (tmp_path / 'out' / 'events.png').is_file()


def test_pictures_of_event_sequences(event_model):
    model = timm.create_model(event_model, pretrained=True).eval()
    x, _ = next(iter(make_loader(read_event_splits(EVENTS)['test'].sample_evenly(2), data_config(model), 2)))
    activity = record_activity(model, x)
    torch.testing.assert_close(activity.frames, x / x.flatten(1).amax(1).view(2, 1, 1, 1, 1))
    mean = x.mean(1)
    torch.testing.assert_close(activity.images, mean / mean.flatten(1).amax(1).view(2, 1, 1, 1))
    svg = render(profile(model, x), activity, 'svg', names=['events'])['events'].decode()
    assert svg.count('<image') == 6 and 't = 3' in svg
    assert record_activity(model, x[:, 0]).frames is None


@pytest.mark.parametrize('args, message', [
    (['--events', 'simulated_fashion_mnist'], 'must start with events/'),
    (['--events', 'events/n_mnist'], 'requires the folder'),
    (['--events', EVENTS, '--time-steps', 2], '--time-steps is for images'),
])
def test_invalid_events(args, message, event_model, tmp_path):
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, event_model, *args)


def test_events_need_two_input_channels(tmp_path):
    with pytest.raises(SystemExit, match='Event frames have 2 channels'):
        run(tmp_path, SHIPPED, '--events', EVENTS)


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
