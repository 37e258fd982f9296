"""`timm-spikformer profile`: its output, its errors, and profiles of event sequences."""
import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import assert_neurons_fire, write_images
from timm.models import save_for_hf
from torch.optim.swa_utils import update_bn

from timm_spikformer import SpikformerForMaskedImageModeling, SpikformerMAE, cli
from timm_spikformer.event_data.names import read_event_splits
from timm_spikformer.hf.configuration_spikformer import SpikformerConfig
from timm_spikformer.images import data_config, make_loader, read_splits, select_profiling_split
from timm_spikformer.profiling import COST_MODELS, profile, record_activity, render, report
from timm_spikformer.profiling.choices import COST_NAMES
from timm_spikformer.profiling.run import _LoadedModel
from timm_spikformer.publishing import publish
from timm_spikformer.training import init_bn_bias

SHIPPED = 'spikformer_v2_2_64_patch4_32'
EVENTS = 'events/simulated_fashion_mnist?time_steps=3&split_by=time'


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
    for text, message in (('fp64', "Unknown cost model 'fp64'"), ('1,x', "got '1,x'"), ('1,2,3', 'a pair'),
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


def test_calibration_of_masked_autoencoder_uses_visible_patches(tmp_path, monkeypatch, no_pictures):
    mae = SpikformerMAE(timm.create_model(SHIPPED, pretrained=True, num_classes=0)).eval()
    config = data_config(mae.encoder)
    expected = copy.deepcopy(mae)
    loader = make_loader(select_profiling_split(read_splits(labels=False)).sample_evenly(8), config, 8)
    torch.manual_seed(0)
    update_bn(loader, expected)
    monkeypatch.setattr('timm_spikformer.profiling.run._load', lambda *args: _LoadedModel(mae, config, None))
    torch.manual_seed(0)
    run(tmp_path, SHIPPED, '--calibrate', '--images', 8)
    assert not mae.training
    state, expected_state = mae.encoder.state_dict(), expected.encoder.state_dict()
    for name in expected_state:
        assert torch.equal(state[name], expected_state[name]), name


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
    assert last.startswith('HTML report: ') and '[red]' in last and last.endswith('[/red]/index.html')
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
    ([SHIPPED, '--checkpoint', 'nowhere'], 'nowhere does not exist'),
    ([SHIPPED, '--device', 'abacus'], '--device abacus cannot be used'),
    ([SHIPPED, '--layers', 'head.fc'], "Unknown spiking layer 'head.fc'"),
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
