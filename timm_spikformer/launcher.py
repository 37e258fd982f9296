"""Run a script as the main module, in this process and in child processes that multiprocessing starts from it.

With the start methods `spawn` and `forkserver`, a child process executes the main module of its parent again, under the
name `__mp_main__`. The `__spec__` of the script's module names this module, so the child executes this file instead of
the script. Because this file is part of the package, the models are registered before it executes the script.
"""
import importlib.machinery
import io
import os
import sys
import types
from typing import Any, Dict

from .event_data.names import install

__all__ = ['run_script']

_VARIABLE = 'TIMM_SPIKFORMER_SCRIPT'  # path of the script, for child processes
_MODULE = 'timm_spikformer.launcher'


def run_script(path: str, name: str) -> Dict[str, Any]:
    """Execute a script as the module `name`, which remains the main module; return its globals.

    The script can use event datasets by name: see `event_data/names.py`.

    Args:
        path: Path of the script.
        name: `__main__`, or `__mp_main__` in a child process.
    """
    with io.open_code(os.path.abspath(path)) as f:
        code = compile(f.read(), path, 'exec')
    module = types.ModuleType(name)
    module.__dict__.update(
        __file__=path, __builtins__=__builtins__, __spec__=importlib.machinery.ModuleSpec(_MODULE, None))
    os.environ[_VARIABLE] = os.path.abspath(path)
    install()
    if name == '__main__':
        sys.modules['__main__'] = sys.modules['__mp_main__'] = module  # children pickle objects of `__mp_main__`
    exec(code, module.__dict__)
    return module.__dict__


if __name__ == '__mp_main__':
    _found_as = __spec__  # noqa: F821  restored below for child processes of this one
    globals().update(run_script(os.environ[_VARIABLE], '__mp_main__'))
    __spec__ = _found_as
