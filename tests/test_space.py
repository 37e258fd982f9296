"""The Space: what it predicts and shows, what it says of bad input, and the page in a browser."""
import importlib
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import RepoCard
from PIL import Image
from safetensors.torch import save_file

from timm_spikformer import SpikformerMAE
from timm_spikformer.folders import MANIFEST
from timm_spikformer.images import SHIPPED_MODEL, data_config, make_loader, read_splits
from timm_spikformer.masked_autoencoder import AUTOENCODER_KEY
from timm_spikformer.profiling import profile, record_activity
from timm_spikformer.publishing import save_folder
from timm_spikformer.reading import checkpoint_from_model

gr = pytest.importorskip('gradio')
ROOT = Path(__file__).parents[1]
SPACE = ROOT / 'hub' / 'space'
sys.path.insert(0, str(SPACE))
app = importlib.import_module('app')
weights = importlib.import_module('weights')
MODEL, TAG = SHIPPED_MODEL.split('.')
DEFAULT_MODEL = f'{SHIPPED_MODEL}_t4'
MAE_ARGS = dict(mask_ratio=0.5, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=4)


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('image') / 'image.png'
    read_splits()['test'][1][0].save(path)
    return str(path)


@pytest.fixture(scope='module')
def batch():
    """The fixture `image` as a batch for the model."""
    model = timm.create_model(SHIPPED_MODEL)
    return next(iter(make_loader(read_splits()['test'].select([1]), data_config(model), 1)))[0]


@pytest.fixture(scope='module')
def mae():
    """A masked autoencoder with the classifier's encoder, trained for some steps."""
    torch.manual_seed(0)
    encoder = timm.create_model(SHIPPED_MODEL, pretrained=True, num_classes=0)
    mae = SpikformerMAE(encoder, **MAE_ARGS)
    optimizer = torch.optim.AdamW(mae.parameters(), 1e-3)
    for x, _ in make_loader(read_splits()['test'].select(range(160)), data_config(encoder), 32):
        loss = mae(x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return mae.eval()


@pytest.fixture(scope='module')
def mae_folder(mae, tmp_path_factory):
    folder = tmp_path_factory.mktemp('mae') / 'mae'
    save_folder(checkpoint_from_model(mae), folder)
    return str(folder)


@pytest.fixture
def mae_tag(mae, tmp_path, monkeypatch):
    """The name of registered weights of a masked autoencoder, which replace those in the package."""
    name = f'{MODEL}.mae_fashion_mnist'
    metadata = {'format': 'pt', AUTOENCODER_KEY: json.dumps(MAE_ARGS)}
    save_file(mae.state_dict(), tmp_path / f'{name}.safetensors', metadata)
    cfg = replace(
        timm.get_pretrained_cfg(SHIPPED_MODEL), file=str(tmp_path / f'{name}.safetensors'), tag='mae_fashion_mnist')
    registry = timm.models._registry
    monkeypatch.setitem(registry._model_pretrained_cfgs, name, cfg)
    monkeypatch.setattr(registry, '_model_has_pretrained', registry._model_has_pretrained | {name})
    monkeypatch.setitem(registry._model_with_tags, MODEL, [*registry._model_with_tags[MODEL], name])
    weights.load_autoencoder.cache_clear()  # of the weights in the package, which have the same name
    yield name
    weights.load_autoencoder.cache_clear()


# -- prediction

@pytest.mark.parametrize('time_steps', [1, 4])
def test_prediction_is_the_models(time_steps, image, batch):
    model = timm.create_model(SHIPPED_MODEL, pretrained=True, time_steps=time_steps).eval()
    with torch.no_grad():
        expected = model.forward_steps(batch)[:, 0].softmax(-1)
    p = app.predict(image, SHIPPED_MODEL, time_steps)
    assert torch.equal(p.probabilities, expected) and p.probabilities.shape == (time_steps, 10)
    with torch.no_grad():
        assert torch.equal(p.probabilities[-1], model(batch)[0].softmax(-1))
    assert list(p.labels) == read_splits()['test'].classes
    assert p.profile.to_dict() == profile(model, batch).to_dict()
    activity = record_activity(model, batch)
    for name in activity.rasters:
        assert torch.equal(p.activity.rasters[name], activity.rasters[name])
    for name in activity.attention:
        assert torch.equal(p.activity.attention[name], activity.attention[name])
    assert p.reconstruction.reconstructed.shape == batch.shape and p.note is None
    assert p.events.shape == (1, time_steps, 2, 28, 28) and p.events.sum() > 100


def test_inverted_image(image, batch):
    p = app.predict(image, SHIPPED_MODEL, 1, invert=True)
    torch.testing.assert_close(p.activity.images, 1 - app.predict(image, SHIPPED_MODEL, 1).activity.images)


def test_reconstruction(image, batch, mae, mae_folder):
    p = app.predict(image, SHIPPED_MODEL, 1, autoencoder=mae_folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = record_activity(mae, batch)
    assert torch.equal(p.reconstruction.reconstructed, expected.reconstructed)
    assert (p.reconstruction.masked != p.reconstruction.reconstructed).any()
    again = app.predict(image, SHIPPED_MODEL, 1, autoencoder=mae_folder)
    assert torch.equal(again.reconstruction.reconstructed, expected.reconstructed)
    assert torch.equal(p.probabilities, app.predict(image, SHIPPED_MODEL, 1).probabilities)


def test_a_registered_tag_is_enough(image, mae, mae_tag, mae_folder):
    assert weights.find_autoencoder() == mae_tag and weights.classifiers() == [SHIPPED_MODEL, DEFAULT_MODEL]
    loaded = weights.load_autoencoder(mae_tag)
    assert loaded.state_dict().keys() == mae.state_dict().keys()
    for name, value in mae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    by_tag = app.predict(image, SHIPPED_MODEL, 1).reconstruction
    by_folder = app.predict(image, SHIPPED_MODEL, 1, autoencoder=mae_folder).reconstruction
    torch.testing.assert_close(by_tag.reconstructed, by_folder.reconstructed)


def test_weights_that_are_no_autoencoder(mae_tag, tmp_path):
    model = timm.create_model(SHIPPED_MODEL, pretrained=True)
    save_folder(checkpoint_from_model(model), tmp_path / 'classifier')
    with pytest.raises(ValueError, match='holds a Spikformer, expected a masked autoencoder'):
        app.build(str(tmp_path / 'classifier'))
    save_file(model.state_dict(), tmp_path / f'{mae_tag}.safetensors')
    with pytest.raises(ValueError, match='is not a masked autoencoder'):
        app.build()


def test_what_is_said_of_the_weights():
    """The accuracy in the package's file, on 10,000 images, fits the one on the 1,000 shipped test images."""
    model = timm.create_model(SHIPPED_MODEL, pretrained=True).eval()
    about = weights.metadata(SHIPPED_MODEL)
    measured = profile(model, make_loader(read_splits()['test'], data_config(model), 250)).accuracy
    assert abs(about['test_accuracy'] - 100 * measured) < 2 and about['time_steps'] == model.time_steps
    text = weights.describe(SHIPPED_MODEL)
    for part in (SHIPPED_MODEL, f'{about["test_accuracy"]}%', 'T = 1', 'only Fashion-MNIST', 'no ImageNet weights'):
        assert part in text


# -- bad input

def save(path, image, **kwargs):
    image.save(path, **kwargs)
    return str(path)


def test_images_that_are_refused(tmp_path):
    def message(path):
        with pytest.raises(ValueError) as e:
            app.predict(path, SHIPPED_MODEL, 1)
        assert str(tmp_path) not in str(e.value)
        return str(e.value)

    assert message(None) == 'There is no image. Upload one, or pick an example.'
    (tmp_path / 'text.png').write_text('This is text.')
    assert 'not an image that can be read. Expected PNG, JPEG' in message(str(tmp_path / 'text.png'))
    (tmp_path / 'image.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    assert 'not an image that can be read' in message(str(tmp_path / 'image.svg'))
    whole = Path(save(tmp_path / 'whole.png', Image.effect_noise((64, 64), 50))).read_bytes()
    (tmp_path / 'half.png').write_bytes(whole[:len(whole) // 2])
    assert message(str(tmp_path / 'half.png')).startswith('The image cannot be read: ')
    frames = [Image.new('L', (28, 28), v) for v in (0, 100, 200)]
    gif = save(tmp_path / 'a.gif', frames[0], save_all=True, append_images=frames[1:])
    assert 'an animation of 3 frames' in message(gif)
    assert 'has 1 x 1 pixels. Expected sides of 8 to' in message(save(tmp_path / 'one.png', Image.new('L', (1, 1))))
    assert 'has 7,000 x 7,000 pixels' in message(save(tmp_path / 'huge.png', Image.new('1', (7000, 7000))))
    assert 'has 20,000 x 8 pixels' in message(save(tmp_path / 'long.png', Image.new('1', (20000, 8))))
    assert 'too large' in message(save(tmp_path / 'bomb.png', Image.new('1', (14000, 14000))))
    assert 'floating-point' in message(save(tmp_path / 'float.tiff', Image.new('F', (28, 28))))


def test_images_that_are_converted(tmp_path, image):
    gray = Image.open(image).convert('L')
    expected = app.predict(image, SHIPPED_MODEL, 1).probabilities
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    p = app.predict(save(tmp_path / 'deep.png', deep), SHIPPED_MODEL, 1)
    assert torch.equal(p.probabilities, expected) and '16 bits' in p.note
    p = app.predict(save(tmp_path / 'print.jpg', gray.convert('CMYK'), quality=100), SHIPPED_MODEL, 1)
    assert torch.allclose(p.probabilities, expected, atol=0.1) and 'CMYK' in p.note
    # a photograph of two frames, the second of which is a preview
    photo = save(tmp_path / 'photo.jpg', gray, format='MPO', save_all=True, append_images=[gray], quality=100)
    assert app.predict(photo, SHIPPED_MODEL, 1).note is None


@pytest.mark.parametrize('time_steps', [0, 17, 2.5, -1, None, float('nan')])
def test_time_steps_that_are_refused(time_steps, image):
    with pytest.raises(ValueError, match='T must be a whole number from 1 to 16, got'):
        app.predict(image, SHIPPED_MODEL, time_steps)


def test_a_model_that_is_not_there(image):
    with pytest.raises(ValueError, match=f"no model 'spikformer_v2_8_512.in1k'. Expected one of {SHIPPED_MODEL}"):
        app.predict(image, 'spikformer_v2_8_512.in1k', 1)


# -- the page

def tabs(page):
    return {c['props']['label']: c['props']['visible'] for c in page.get_config_file()['components']
            if c['type'] == 'tabitem'}


def test_the_page(mae_folder):
    page = app.build()
    assert tabs(page) == dict.fromkeys(['Spikes', 'Energy', 'Attention', 'Event camera', 'Reconstruction'], True)
    assert tabs(app.build(mae_folder))['Reconstruction'] is True
    shown = [c['props'].get('value') for c in page.get_config_file()['components']]
    assert weights.describe(DEFAULT_MODEL) in shown and not page.analytics_enabled


def test_the_page_without_an_autoencoder(monkeypatch):
    monkeypatch.setattr(app, 'find_autoencoder', lambda: None)
    assert tabs(app.build())['Reconstruction'] is False


def test_dry_run_of_publishing(tmp_path, monkeypatch, capsys):
    """What would be uploaded runs by itself, with the packages of requirements.txt only."""
    publish_space = runpy.run_path(str(ROOT / 'hub' / 'publish_space.py'))
    publish_space['main'](['me/space', '--dry-run', '--output', str(tmp_path / 'space')])
    listed = {line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert {'README.md', 'app.py', 'weights.py', 'style.css', 'requirements.txt', 'timm_spikformer/__init__.py',
            f'timm_spikformer/assets/weights/{SHIPPED_MODEL}.safetensors'} <= listed
    assert not [name for name in listed if '__pycache__' in name or Path(name).name == MANIFEST]
    script = """
import sys
from importlib.machinery import PathFinder
blocked = ('datasets', 'accelerate', 'transformers')
find_spec = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *args: None if name.partition('.')[0] in blocked else find_spec(name, *args))
import app, timm_spikformer
app.build()
print(timm_spikformer.__file__)
"""
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'PYTHONPATH': os.curdir}
    done = subprocess.run(
        [sys.executable, '-c', script], cwd=tmp_path / 'space', env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / 'space' / 'timm_spikformer' / '__init__.py'


def test_the_files_of_the_space():
    card = RepoCard.load(SPACE / 'README.md').data.to_dict()
    assert card['sdk'] == 'gradio' and (SPACE / card['app_file']).is_file()
    assert card['sdk_version'].split('.')[0] == gr.__version__.split('.')[0]
    assert len(card['short_description']) <= 60
    dependencies = re.search(r'^dependencies = \[(.*?)\]', (ROOT / 'pyproject.toml').read_text(), re.M | re.S)[1]
    known = re.findall(r"'(.*?)'", dependencies)
    for line in (SPACE / 'requirements.txt').read_text().splitlines():
        assert line in known, line


# -- a real browser

@pytest.fixture
def server(mae_folder, monkeypatch):
    """The address of the running Space; it fails if the server connects to another machine."""
    strangers, connect = [], socket.socket.connect

    def watch(self, address):
        if isinstance(address, tuple) and not address[0].startswith('127.'):
            strangers.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, 'connect', watch)
    page = app.build(mae_folder)
    _, url, _ = page.launch(
        **app.LAUNCH, server_name='127.0.0.1', prevent_thread_lock=True, quiet=True, inbrowser=False)
    yield url
    page.close()
    assert strangers == []


@pytest.mark.browser
@pytest.mark.parametrize('width, scheme', [(375, 'dark'), (1280, 'light')])
def test_in_a_browser(width, scheme, server, tmp_path):
    from playwright.sync_api import sync_playwright
    broken = tmp_path / 'broken.png'
    broken.write_bytes(b'no image')
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-background-networking',
             '--disable-component-update', '--disable-sync', '--no-first-run']
    with sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            tmp_path / 'profile', executable_path=os.environ.get('CHROMIUM', '/usr/bin/chromium'), args=flags,
            viewport=dict(width=width, height=800), color_scheme=scheme)
        context.set_default_timeout(120_000)
        page = context.new_page()
        messages, requests = [], []
        page.on('console', lambda m: m.type == 'error' and messages.append(m.text))
        page.on('pageerror', lambda e: messages.append(str(e)))
        page.on('request', lambda r: requests.append(r.url))

        def classify():
            page.get_by_role('button', name='Classify').click()

        def assert_fits():
            assert page.evaluate('document.documentElement.scrollWidth') <= width

        page.goto(server)
        page.get_by_text('They classify only Fashion-MNIST').wait_for()
        classify()
        page.get_by_role('alert').get_by_text('There is no image. Upload one, or pick an example.').wait_for()
        assert page.locator('#probabilities').count() == 0
        assert_fits()

        page.locator('#examples button').nth(1).click()  # a pair of trousers
        page.locator('.pixels img').wait_for()
        page.get_by_role('spinbutton').fill('3')
        page.get_by_role('spinbutton').press('Enter')
        classify()
        page.locator(f'#probabilities .on-{scheme}').wait_for()
        assert page.locator('#message').get_by_role('alert').count() == 0
        assert page.locator('#label h2').inner_text() == 'Trouser'
        assert page.locator('#steps tbody tr').count() == 3
        assert 'Trouser' in page.locator('#steps tbody tr').last.inner_text()
        tabs = {
            'Spikes': ('rasters', 'firing_rates'), 'Energy': ('energy',), 'Attention': ('attention',),
            'Event camera': ('events',), 'Reconstruction': ('reconstructions',)}
        for name, figures in tabs.items():
            if not page.get_by_role('tab', name=name).is_visible():  # in the menu of the tabs without room
                page.locator('.overflow-menu button').first.click()
            page.get_by_role('tab', name=name).or_(
                page.locator('.overflow-dropdown').get_by_text(name)).first.click()
            for figure in figures:
                image = page.locator(f'#{figure} .on-{scheme}')
                image.wait_for()
                assert image.evaluate('e => e.complete && e.naturalWidth > 0')
                other = page.locator(f'#{figure} .on-{"dark" if scheme == "light" else "light"}')
                assert not other.is_visible()
            assert_fits()

        page.get_by_label('Remove Image').or_(page.get_by_label('Clear')).first.click()
        page.locator('input[type=file]').set_input_files(broken)
        page.wait_for_timeout(1000)  # for the upload
        classify()
        page.get_by_role('alert').get_by_text('The file is not an image that can be read.').wait_for()
        assert not page.locator('#probabilities').is_visible()
        assert_fits()

        page.get_by_role('spinbutton').fill('99')
        classify()  # the page itself limits T
        page.wait_for_function('document.querySelector("input[type=number]").value === "16"')

        assert messages == []
        strangers = [r for r in requests if not r.startswith((server, 'data:', f'blob:{server}'))]
        assert strangers == []
        context.close()
