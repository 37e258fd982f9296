"""timm's model tests, unmodified, from timm's source archive, on the models of this package."""
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import timm
from timm.models import get_arch_pretrained_cfgs

import timm_spikformer  # noqa: F401  registers the models

TESTS_PER_MODEL = 10  # and one for each tag, and two for each tag with weights
SMALL = ['test_spikformer_v2', 'spikformer_4_384_patch4_32', 'spikformer_v2_8_384', 'spikformer_v2_2_64_patch4_32']


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    """Folder with the extracted source archive of the installed version of timm."""
    folder = tmp_path_factory.mktemp('timm')
    # pip builds the metadata of the archive, which requires timm's build back end, pdm-backend
    subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', ':all:', '--no-build-isolation',
         '-d', str(folder), f'timm=={timm.__version__}'],
        check=True)
    (archive,) = folder.glob('timm-*.tar.gz')
    shutil.unpack_archive(archive, folder)
    return folder / f'timm-{timm.__version__}'


def run_timm_tests(source: Path, models: list, report: Path) -> ET.Element:
    env = dict(
        os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), '.']), TORCH_BACKEND='spikformer_shim',
        TIMEOUT='900', HF_HUB_OFFLINE='1')
    subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', 'tests/test_models.py', '-k', ' or '.join(models),
         f'--junitxml={report}'],
        cwd=source, env=env)
    return ET.parse(report).getroot().find('testsuite')


def check(suite: ET.Element, models: list) -> None:
    expected = {}
    for name in models:
        cfgs = get_arch_pretrained_cfgs(name).values()
        expected[name] = TESTS_PER_MODEL + len(cfgs) + 2 * sum(cfg.file is not None for cfg in cfgs)
    for name in models:
        count = sum(name in re.split(r'[\[\].-]', case.get('name')) for case in suite)
        assert count == expected[name], f'{count} tests ran for {name}'
    assert int(suite.get('tests')) == sum(expected.values())
    assert [suite.get(k) for k in ('failures', 'errors', 'skipped')] == ['0', '0', '0']


@pytest.mark.conformance
def test_small_models(source, tmp_path):
    check(run_timm_tests(source, SMALL, tmp_path / 'report.xml'), SMALL)


@pytest.mark.conformance
@pytest.mark.slow
def test_other_models(source, tmp_path):
    others = sorted(set(timm.list_models(module='spikformer')) - set(SMALL))
    check(run_timm_tests(source, others, tmp_path / 'report.xml'), others)
