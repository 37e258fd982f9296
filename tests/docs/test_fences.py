"""The code on the pages of the documentation runs, and the commands on them exist."""
import os
import re
import shlex
import warnings
from pathlib import Path

import pytest
from site_pages import PAGES, ROOT, page_id, read_fences

from timm_spikformer_cli import create_parser

# Fences that are not run, by page; each has a comment with the reason
NOT_RUN = {'deployment.md': 1, 'guides/convert.md': 1, 'guides/demo.md': 1, 'guides/event_datasets.md': 1}
WITH_CODE = [  # the translation has the code of the original, see test_translation.py
    page for page in PAGES
    if page.parent.name != 'zh' and any(fence.reason is None for fence in read_fences(page, 'python'))]


@pytest.mark.parametrize('page', WITH_CODE, ids=page_id)
def test_python_runs(page, tmp_path, monkeypatch):
    """The fences of a page run in their order, in one namespace."""
    for module in ('peft', 'segmentation_models_pytorch'):
        if re.search(rf'^(import|from) {module}\b', page.read_text(encoding='utf-8'), re.M):
            pytest.importorskip(module, reason='needs the extra docs')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    namespace = {'__name__': '__main__'}
    for fence in read_fences(page, 'python'):
        if fence.reason is None:
            code = compile('\n' * (fence.line - 1) + fence.code, str(page), 'exec')
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                exec(code, namespace)


def test_fences_that_are_not_run_are_few():
    counts = {page_id(p): sum(f.reason is not None for f in read_fences(p, 'python')) for p in PAGES}
    assert {page: count for page, count in counts.items() if count} == NOT_RUN


def test_no_fence_is_missed():
    """Every fence in the text is one that the other tests see."""
    for page in PAGES:
        text = page.read_text(encoding='utf-8')
        seen = [fence for language in ('python', 'bash', 'text') for fence in read_fences(page, language)]
        assert sum(text.count(f'```{language}\n') for language in ('python', 'bash', 'text')) == len(seen), page
        assert text.count('<!-- not run') == sum(fence.reason is not None for fence in seen), page


COMMANDS = [
    pytest.param(line, id=f'{page_id(page)}:{fence.line + i}')
    for page in PAGES for fence in read_fences(page, 'bash') for i, line in enumerate(fence.code.splitlines())]


@pytest.mark.parametrize('line', COMMANDS)
def test_command_exists(line):
    """Commands of this package accept their arguments; recipes and configurations exist."""
    words = shlex.split(line)
    for word in words:
        if word.startswith(('recipes/', 'hf_configs/')):
            assert (ROOT / word).is_file()
    if words[0] == 'timm-spikformer':
        assert create_parser(words[1]).parse_args(words[1:]).command == words[1]
    elif 'torchrun' in words or words[0] == 'accelerate' or words[0] == 'python':
        modules = ('pytest', 'benchmarks', 'reproduction', 'timm_spikformer.hf.run_event_classification')
        assert any(w.endswith('.py') or w in modules for w in words)
    else:
        assert words[:2] == ['pip', 'install']


def test_pages_name_no_paths_of_a_machine():
    for page in PAGES:
        text = page.read_text(encoding='utf-8')
        assert str(Path.home()) not in text and str(ROOT) not in text and os.sep + 'tmp' + os.sep not in text
