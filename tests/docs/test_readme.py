"""README.md: its code runs, its links lead somewhere, its numbers are those of the models, and it stays short."""
import os
import re
import shutil

import pytest
import timm
import torch
from site_pages import ROOT, read_fences

README = ROOT / 'README.md'


def test_code_prints_the_label(tmp_path, monkeypatch, capsys):
    (tmp_path / 'docs').mkdir()
    shutil.copy(ROOT / 'docs' / 'ankle_boot.png', tmp_path / 'docs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    namespace = {}
    fences = read_fences(README, 'python')
    assert len(fences) == 2
    for fence in fences:
        exec(compile('\n' * (fence.line - 1) + fence.code, str(README), 'exec'), namespace)
        assert capsys.readouterr().out.splitlines()[-1] == 'Ankle boot'


def test_length():
    assert len(README.read_text(encoding='utf-8').split()) <= 900


def test_links_exist():
    text = README.read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', text)
    local = [a or b for a, b in links if not (a or b).startswith('https://')]
    assert len(local) > 10
    for link in local:
        assert (ROOT / link.partition('#')[0]).exists(), link


@pytest.mark.parametrize('name, parameters', [
    (name, float(parameters)) for name, parameters in re.findall(
        r'^\| `(spikformer\w+)` \| ([\d.]+) M \|', README.read_text(encoding='utf-8'), re.M)])
def test_parameter_counts(name, parameters):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters


def test_every_model_is_in_the_table():
    text = README.read_text(encoding='utf-8')
    table = text[text.index('| model |'):text.index('[The study]')]
    assert set(re.findall(r'^\| `(\w+)`', table, re.M)) == set(timm.list_models('spikformer*'))


def test_commands_of_the_readme_are_those_of_ci():
    assert 'python -m pytest -n 2' in README.read_text() and 'python -m pytest -n 2' in (
        ROOT / '.ci' / 'run').read_text()
    assert os.access(ROOT / '.ci' / 'run', os.X_OK)
