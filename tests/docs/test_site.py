"""What the build of the site adds to Sphinx: files of the repository as pages, and the check of links."""
import importlib.util

import pytest
from site_pages import DOCS, ROOT


def _load(name):
    spec = importlib.util.spec_from_file_location(f'docs_{name}', DOCS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def conf():
    return _load('conf')


def test_file_is_included(conf):
    text = conf.include('# Changelog\n\nSee [CHANGELOG.md](../CHANGELOG.md). <!-- include -->\n', DOCS)
    assert text.count('# Changelog') == 1 and '## Unreleased' in text and 'See [' not in text


def test_included_files_exist(conf):
    pages = {path: conf._INCLUDE.findall(path.read_text(encoding='utf-8')) for path in DOCS.rglob('*.md')}
    targets = {(path.parent / target).resolve() for path, found in pages.items() for target in found}
    assert targets == {ROOT / name for name in conf._PAGES if name != 'README.md'}


def test_tables_are_those_of_the_results(conf):
    text = conf.include('See [it](../../benchmarks/README.md). <!-- include -->', DOCS / 'results')
    from benchmarks.results import read_results
    from benchmarks.tables import RESULTS, events_tables
    assert events_tables(read_results(RESULTS)) in text and '](../../benchmarks/scaling.png)' in text


@pytest.mark.parametrize('link, adapted', [
    ('[a](https://example.org/x)', '[a](https://example.org/x)'),
    ('[a](#below)', '[a](#below)'),
    ('[the changes](CHANGELOG.md)', '[the changes](/changelog.md)'),
    ('[a](docs/faq.md#training)', '[a](/faq.md#training)'),
    ('[x](hub/x.py)', '[x](https://github.com/timm-spikformer/timm-spikformer/blob/main/hub/x.py)'),
    ('![p](docs/profile.png)', '![p](../profile.png)'),
])
def test_links_are_adapted(conf, link, adapted):
    assert conf.adapt_links(f'x {link} y', ROOT / 'README.md', DOCS / 'guides') == f'x {adapted} y'


def test_faults_of_links_are_found(tmp_path):
    checker = _load('check_links')
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'index.html').write_text(
        '<h1 id="top">a</h1><a href="sub/b.html#part">1</a><a href="#top">2</a><a href="https://example.org/">3</a>'
        '<img src="p.png"><script src="data:,1"></script>', encoding='utf-8')
    (tmp_path / 'p.png').touch()
    (tmp_path / 'sub/b.html').write_text('<p id="part"></p><a href="../">up</a>', encoding='utf-8')
    assert checker.check(tmp_path) == ([], 6)
    (tmp_path / 'sub/b.html').write_text(
        '<a href="missing.html">1</a><a href="../index.html#none">2</a><a href="http:/x">3</a>'
        '<script src="https://cdn.example.org/a.js"></script>', encoding='utf-8')
    (tmp_path / 'a.css').write_text('@font-face { src: url("https://fonts.example.org/a.woff") }', encoding='utf-8')
    faults, count = checker.check(tmp_path)
    assert count == 9 and [fault.partition(' ')[0] for fault in faults] == [
        'index.html', 'sub/b.html', 'sub/b.html', 'sub/b.html', 'sub/b.html', 'a.css']
    assert 'no such anchor' in faults[0] and 'does not exist' in faults[1] and 'loads https://cdn' in faults[4]
