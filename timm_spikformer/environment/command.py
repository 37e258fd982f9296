"""`timm-spikformer env`: versions, devices, kernels and settings, for bug reports.

Imports the standard library only; the packages that it reports are imported one by one when the command runs. A package
that is missing or broken is described in its row, and the other rows are still printed.
"""
import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, NamedTuple, Tuple

from ..errors import pip_requirement
from ..version import __version__

__all__ = ['Row', 'add_arguments', 'cpu_name', 'read_rows', 'run']

DESCRIPTION = 'Print versions, devices, kernels and settings, for bug reports. It contains no tokens.'

PACKAGES = (
    'torch', 'torchvision', 'timm', 'transformers', 'huggingface_hub', 'safetensors', 'spikingjelly', 'numba',
    'accelerate', 'numpy')
# a list, not a prefix, so that no other variable is printed, such as one that contains a token
VARIABLES = ('TIMM_SPIKFORMER_HUB', 'TIMM_SPIKFORMER_KERNELS', 'TIMM_SPIKFORMER_SCRIPT', 'HF_HUB_OFFLINE')
_PACKAGE = Path(__file__).parents[1]
_WIDTH = 24  # of the column of names
_failures: Dict[str, BaseException] = {}  # by the module that could not be imported


class Row(NamedTuple):
    """A fact about the installation."""
    section: str
    name: str
    value: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-spikformer env`."""
    parser.add_argument('--json', action='store_true', help='print JSON: an object for each section')


def run(args: argparse.Namespace) -> None:
    """Print the rows, each as soon as it is known: if a package ends the process, the last row is before that package.
    """
    if args.json:
        sections: Dict[str, Dict[str, str]] = {}
        for row in read_rows():
            sections.setdefault(row.section, {})[row.name] = row.value
        print(json.dumps(sections, indent=2))
        return
    section = None
    for row in read_rows():
        if row.section != section:
            print(row.section if section is None else f'\n{row.section}')
            section = row.section
        print(f'  {row.name:<{_WIDTH}}{row.value}', flush=True)


def read_rows() -> Iterator[Row]:
    """Yield the facts. A fact that cannot be read has the reason as its value."""
    for section, name, fact in _facts():
        yield Row(section, name, _hide_home(_read(fact)))


def _facts() -> Iterator[Tuple[str, str, Callable[[], Any]]]:
    yield 'System', 'Python', lambda: f'{platform.python_version()} ({platform.python_implementation()})'
    yield 'System', 'OS', platform.platform
    yield 'System', 'CPU', cpu_name
    yield 'System', 'CPUs', _count_cpus
    for name in PACKAGES:
        yield 'Packages', name, lambda name=name: _describe_package(name)
    yield 'Packages', 'timm-spikformer', _describe_this_package
    for name, fact in _TORCH_FACTS.items():
        yield 'PyTorch', name, lambda fact=fact: fact(_import('torch'))
    yield 'Kernels', 'mode', lambda: _import('timm_spikformer').get_kernels()
    yield 'Kernels', 'event-driven products', _describe_event_loops
    yield 'Kernels', 'neuron on CUDA', _describe_cuda_neuron
    yield 'Weights', 'in the package', _shipped_weights
    yield 'Weights', 'Hub namespace', lambda: os.environ.get(VARIABLES[0]) or f'none ({VARIABLES[0]} is not set)'
    for name in VARIABLES:
        yield 'Variables', name, lambda name=name: os.environ.get(name, 'not set')


def _import(name: str) -> Any:
    """Import a module. One that failed is not executed again, because its second error may be a different one."""
    if name in _failures:
        raise _failures[name]
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as e:
        _failures[name] = e
        raise


def _read(fact: Callable[[], Any]) -> str:
    """Return a fact, or why it cannot be read. What packages print when they are imported goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return str(fact())
    except (Exception, SystemExit) as e:  # a package may raise anything when it is imported
        return f'unknown: {_describe_error(e)}'


def _describe_error(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f'{error.name} is not installed'
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ': '.join([type(error).__name__, *lines[:1]])


def _hide_home(text: str) -> str:
    """Replace the home folder by `~`, because its path often contains the name of the user."""
    home = os.path.expanduser('~')
    return text if len(home) < 2 else re.sub(rf'{re.escape(home)}(?![\w.-])', '~', text)


# -- system

def cpu_name() -> str:
    """Return the model of the CPU as far as the system states it."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return model


def _count_cpus() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return f'{os.cpu_count()}, usable by this process: {usable}'


# -- packages

def _describe_package(name: str) -> str:
    """Return the version of an installed package, and the error if it cannot be imported."""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    try:
        module = _import(name)
    except (Exception, SystemExit) as e:
        if version is None and isinstance(e, ModuleNotFoundError) and e.name == name:
            return f'not installed. Run: pip install "{pip_requirement(name)}"'
        return f'{version or "without metadata"}, cannot be imported: {_describe_error(e)}'
    return version or str(getattr(module, '__version__', 'unknown version'))


def _describe_this_package() -> str:
    text = f'{__version__}, in {_PACKAGE}'
    try:
        _import('timm_spikformer')
    except (Exception, SystemExit) as e:
        return f'{text}, cannot be imported: {_describe_error(e)}'
    return text


# -- PyTorch

def _describe_gpus(torch: Any) -> str:
    if not torch.cuda.is_available():
        is_built = torch.version.cuda or torch.version.hip
        return 'none' if is_built else 'none (this build of PyTorch does not support CUDA)'
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ', '.join(f'{name} x {names.count(name)}' for name in dict.fromkeys(names))


_TORCH_FACTS = {
    'CUDA': lambda torch: torch.version.cuda or 'not in this build',
    'ROCm': lambda torch: torch.version.hip or 'not in this build',
    'cuDNN': lambda torch: torch.backends.cudnn.version() or 'none',
    'GPUs': _describe_gpus,
    'accelerator': lambda torch: (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else 'none'),
    'CPU capability': lambda torch: torch.backends.cpu.get_cpu_capability(),
    'threads': lambda torch: torch.get_num_threads(),
}


# -- this package

def _describe_event_loops() -> str:
    compiled = _import('timm_spikformer.kernels.compiled')
    reason = compiled.unavailable_reason()
    if reason is not None:
        return f'not available: {reason}'
    folder = compiled.cache_folder()
    if folder is None:
        return 'available; compiled in each process, because the cache folder is not writable'
    names = compiled.cached_loops()
    kept = f'cached in {folder}'
    return f'available; {", ".join(names)} {kept}' if names else f'available; not compiled yet, to be {kept}'


def _describe_cuda_neuron() -> str:
    torch = _import('torch')
    if not torch.cuda.is_available():
        return 'not available: there is no CUDA device'
    if 'cuda' not in _import('timm_spikformer.kernels.rules').BACK_ENDS:
        return 'not available: ROCm is not supported'
    _import('spikingjelly.activation_based.functional')
    return "available: spikingjelly's kernels"


def _shipped_weights() -> str:
    return ', '.join(sorted(path.stem for path in (_PACKAGE / 'assets' / 'weights').glob('*.safetensors'))) or 'none'
