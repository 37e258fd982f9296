"""`timm-spikformer env`: what it reports, of packages that are missing or broken too."""
import json
import os
import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import SHIPPED_WEIGHTS

from timm_spikformer import cli, set_kernels
from timm_spikformer.environment import command
from timm_spikformer.kernels import compiled

ROOT = Path(__file__).parents[1]


def write_packages(folder, **sources):
    """Write packages that are found before the installed ones."""
    for name, source in sources.items():
        (folder / name).mkdir()
        (folder / name / '__init__.py').write_text(textwrap.dedent(source))


def run(folder, *args, **variables):
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join((str(folder), str(ROOT))), **variables)
    return subprocess.run(
        [sys.executable, '-m', 'timm_spikformer_cli', 'env', *args], capture_output=True, text=True, env=env,
        timeout=240)


def read(section):
    return {row.name: row.value for row in command.read_rows() if row.section == section}


def test_versions_are_those_that_are_installed(capsys):
    cli.main(['env', '--json'])
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ['System', 'Packages', 'PyTorch', 'Kernels', 'Weights', 'Variables']
    packages = report['Packages']
    for name in ('torch', 'timm', 'transformers', 'huggingface_hub', 'safetensors', 'spikingjelly', 'numba',
                 'accelerate'):
        assert packages[name] == metadata.version(name)
    assert packages['timm-spikformer'].startswith(metadata.version('timm-spikformer') + ', in ')
    assert report['PyTorch']['threads'] == str(torch.get_num_threads())
    assert report['Weights']['in the package'] == ', '.join(sorted(SHIPPED_WEIGHTS))


def test_text_and_json_say_the_same(capsys):
    cli.main(['env', '--json'])
    report = json.loads(capsys.readouterr().out)
    cli.main(['env'])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line and not line.startswith(' ')] == list(report)
    rows = [line.split() for line in lines if line.startswith(' ')]
    assert rows == [f'{name} {value}'.split() for section in report.values() for name, value in section.items()]


def test_kernels(monkeypatch, tmp_path):
    set_kernels('dense')
    try:
        assert read('Kernels')['mode'] == 'dense'
    finally:
        set_kernels('auto')
    monkeypatch.setattr(compiled, 'cache_folder', lambda: tmp_path)
    assert read('Kernels')['event-driven products'] == f'available; not compiled yet, to be cached in {tmp_path}'
    (tmp_path / 'event_loops.read_events-1.py311.nbi').touch()
    (tmp_path / 'event_loops.convolve-2.py311.nbi').touch()
    assert read('Kernels')['event-driven products'] == f'available; read_events, convolve cached in {tmp_path}'
    monkeypatch.setattr(compiled, 'cache_folder', lambda: None)
    assert 'compiled in each process' in read('Kernels')['event-driven products']
    monkeypatch.setattr(compiled, 'unavailable_reason', lambda: 'numba is disabled by NUMBA_DISABLE_JIT')
    assert read('Kernels')['event-driven products'] == 'not available: numba is disabled by NUMBA_DISABLE_JIT'


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 3)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda i: ('Small GPU', 'Large GPU', 'Small GPU')[i])
    monkeypatch.setattr('timm_spikformer.kernels.rules.BACK_ENDS', {'cpu': 'cpu', 'cuda': 'cuda'})
    assert read('PyTorch')['GPUs'] == 'Small GPU x 2, Large GPU x 1'
    assert read('Kernels')['neuron on CUDA'].startswith('available')
    monkeypatch.setattr('timm_spikformer.kernels.rules.BACK_ENDS', {'cpu': 'cpu'})
    assert read('Kernels')['neuron on CUDA'] == 'not available: ROCm is not supported'
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda i: 1 / 0)
    assert read('PyTorch')['GPUs'] == 'unknown: ZeroDivisionError: division by zero'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert read('PyTorch')['GPUs'].startswith('none') and 'no CUDA device' in read('Kernels')['neuron on CUDA']


def test_variables_are_those_of_the_project_and_no_others(monkeypatch):
    sources = '\n'.join(path.read_text() for path in (ROOT / 'timm_spikformer').rglob('*.py'))
    assert set(command.VARIABLES) == {*re.findall(r'TIMM_SPIKFORMER_[A-Z]+', sources), 'HF_HUB_OFFLINE'}
    for name in ('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN', 'TIMM_SPIKFORMER_TOKEN'):
        monkeypatch.setenv(name, 'hf_secret')
    monkeypatch.setenv('TIMM_SPIKFORMER_HUB', 'some-organization')
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    rows = list(command.read_rows())
    assert not any('hf_secret' in part for row in rows for part in row)
    variables = {row.name: row.value for row in rows if row.section == 'Variables'}
    assert variables['TIMM_SPIKFORMER_HUB'] == 'some-organization' and variables['HF_HUB_OFFLINE'] == 'not set'
    assert read('Weights')['Hub namespace'] == 'some-organization'


def test_the_home_folder_is_not_printed(monkeypatch):
    monkeypatch.setenv('HOME', str(ROOT.parent))
    assert read('Packages')['timm-spikformer'].endswith(f', in ~{os.sep}{ROOT.name}{os.sep}timm_spikformer')
    monkeypatch.setenv('HOME', str(ROOT)[:-1])  # a folder whose name starts with that of the home folder
    assert str(ROOT) in read('Packages')['timm-spikformer']


def test_without_torch(tmp_path):
    """The packages that need it say so; all rows are there."""
    (tmp_path / 'sitecustomize.py').write_text(textwrap.dedent("""
        from importlib.machinery import PathFinder
        find_spec = PathFinder.find_spec
        PathFinder.find_spec = classmethod(
            lambda cls, name, *args: None if name.partition('.')[0] == 'torch' else find_spec(name, *args))"""))
    done = run(tmp_path, '--json')
    assert done.returncode == 0 and 'Traceback' not in done.stderr
    report = json.loads(done.stdout)
    packages = report['Packages']
    assert packages['torch'] == f'{metadata.version("torch")}, cannot be imported: torch is not installed'
    assert packages['timm'].endswith('cannot be imported: torch is not installed')
    assert packages['timm-spikformer'].endswith('cannot be imported: torch is not installed')
    assert packages['numba'] == metadata.version('numba')
    assert set(report['PyTorch'].values()) == {'unknown: torch is not installed'}
    assert report['Kernels']['mode'] == 'unknown: torch is not installed'
    assert report['Weights']['in the package'] == ', '.join(sorted(SHIPPED_WEIGHTS))


def test_broken_packages(tmp_path):
    """Errors of any kind, and output that would break the JSON."""
    write_packages(
        tmp_path, numba='raise ImportError("Numba needs NumPy 2.3 or less.\\nGot 9.")', transformers='1 / 0',
        accelerate='raise SystemExit(3)', spikingjelly='print("Thank you for using this package!")')
    done = run(tmp_path, '--json', TIMM_SPIKFORMER_KERNELS='fast')
    assert done.returncode == 0 and 'Traceback' not in done.stderr and 'Thank you' in done.stderr
    report = json.loads(done.stdout)
    packages = report['Packages']
    assert re.fullmatch(r'[\d.]+, cannot be imported: ImportError: Numba needs NumPy 2.3 or less\.', packages['numba'])
    assert packages['accelerate'].endswith(', cannot be imported: SystemExit: 3')
    assert packages['transformers'].endswith(', cannot be imported: ZeroDivisionError: division by zero')
    assert packages['spikingjelly'] == metadata.version('spikingjelly')
    assert "TIMM_SPIKFORMER_KERNELS must be 'auto', 'dense' or 'plain', got 'fast'." in packages['timm-spikformer']
    assert report['Variables']['TIMM_SPIKFORMER_KERNELS'] == 'fast'


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(command, 'PACKAGES', ('a_package_of_nobody', 'json'))
    assert read('Packages')['a_package_of_nobody'] == 'not installed. Run: pip install "a_package_of_nobody"'
    assert read('Packages')['json'] == json.__version__  # of no distribution


def test_rows_before_a_crash_are_printed(tmp_path):
    write_packages(tmp_path, torch='', torchvision='', timm='import os; os._exit(3)')
    done = run(tmp_path, PYTHONUNBUFFERED='')
    assert done.returncode == 3
    assert done.stdout.splitlines()[-1].split() == ['torchvision', metadata.version('torchvision')]


@pytest.mark.parametrize('error', [KeyboardInterrupt, MemoryError])
def test_interruptions_end_it(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(command.platform, 'platform', fail)
    if error is KeyboardInterrupt:
        with pytest.raises(SystemExit, match='Interrupted'):
            cli.main(['env'])
    else:
        assert read('System')['OS'] == 'unknown: MemoryError'
