"""Tests that the committed pictures of the architecture are the ones that docs/architecture.py draws."""
import importlib.util
import re
from pathlib import Path

import pytest
import timm
from site_pages import DOCS

_NUMBER = re.compile(r'-?\d+(?:\.\d+)?(?:e-?\d+)?')


@pytest.fixture(scope='module')
def script():
    spec = importlib.util.spec_from_file_location('architecture', DOCS / 'architecture.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _labels(svg: Path) -> list:
    """Return the texts of a picture; matplotlib writes each as a comment beside its outlines."""
    return re.findall(r'<!-- (.+?) -->', svg.read_text(encoding='utf-8'), re.S)


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_pictures_are_in_step(script, tmp_path, theme):
    script.main(tmp_path)
    name = f'architecture-{theme}.svg'
    drawn, committed = ((folder / name).read_text(encoding='utf-8') for folder in (tmp_path, DOCS))
    message = 'Run python docs/architecture.py.'
    assert _labels(tmp_path / name) == _labels(DOCS / name), message
    # shapes, with the rounding of other versions of matplotlib allowed
    drawn, committed = (re.findall(r'<(?:path|use) [^>]*>', text) for text in (drawn, committed))
    assert len(drawn) == len(committed) > 100, message
    for a, b in zip(drawn, committed):
        numbers = [list(map(float, _NUMBER.findall(re.sub(r'"#\w+"|#\w+', '', text)))) for text in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.01), message


def test_labels_are_read_from_the_model(script, tmp_path, monkeypatch):
    labels = _labels(DOCS / 'architecture-light.svg')
    text = '\n'.join(labels)
    model = timm.create_model(script.MODEL, device='meta')
    for stage in model.stem.stages:
        assert f'{stage.down.conv.out_channels} ch' in text
    assert f'encoder block × {len(model.blocks)}' in text and '2048 to 512' in text and '14 × 14' in text
    monkeypatch.setattr(script, 'MODEL', 'spikformer_v2_16_768')
    script.main(tmp_path)
    text = '\n'.join(_labels(tmp_path / 'architecture-light.svg'))
    assert 'encoder block × 16' in text and '96 ch' in text and '3072 to 768' in text and '12 heads' in text


def test_unsupported_model_or_theme_raises(script):
    with pytest.raises(ValueError, match='Spikformer V2, got SpikingPatchSplitting'):
        script.draw(timm.create_model('spikformer_8_384', device='meta'), 'light')
    with pytest.raises(ValueError, match="unknown theme 'blue', expected one of light, dark"):
        script.draw(timm.create_model(script.MODEL, device='meta'), 'blue')


def test_background_is_transparent():
    for theme in ('light', 'dark'):
        svg = (DOCS / f'architecture-{theme}.svg').read_text(encoding='utf-8')
        patch = re.search(r'<g id="patch_1">\s*<path [^>]*style="([^"]*)"', svg)
        assert patch is None or 'opacity: 0' in patch[1] or 'fill: none' in patch[1]
