"""The console script `timm-spikformer`, which parses the command line before importing timm and torch.

This module is outside the package because importing `timm_spikformer` registers its models and therefore imports timm
and torch, which takes seconds. The arguments of a command are defined in `timm_spikformer/PART/command.py`. This module
loads that file under a placeholder package name, without importing `timm_spikformer`. The file must therefore import
only the standard library, and modules in its folder that do the same. The package is imported when a command runs.
"""
import argparse
import codecs
import contextlib
import importlib
import importlib.util
import os
import signal
import sys
import threading
import types
import unicodedata
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple, NoReturn, Optional, Tuple, Union

__all__ = ['main']

_PACKAGE = 'timm_spikformer'


class Command(NamedTuple):
    """A command: the subpackage that contains its command.py, its help, and the names of two functions in command.py.

    Args:
        part: Name of the subpackage.
        help: Help text, one line.
        add_arguments: Function in command.py that takes a parser and adds the arguments to it.
        run: Function in command.py that takes the parsed arguments and runs the command.
        is_light: Whether the command runs without importing the package, and therefore without torch and timm.
    """
    part: str
    help: str
    add_arguments: str = 'add_arguments'
    run: str = 'run'
    is_light: bool = False


COMMANDS = {
    'demo': Command('demo', 'train a small model on real images'),
    'profile': Command('profiling', 'measure firing rates, operations and energy; print tables and write an HTML page'),
    'publish': Command(
        'publishing', 'publish a checkpoint on the Hugging Face Hub for timm and transformers', 'add_publish_arguments',
        'run_publish'),
    'convert': Command(
        'publishing', "convert a checkpoint of the authors' V1 code or of spikingjelly", 'add_convert_arguments',
        'run_convert'),
    'recipe': Command(
        'assets', "list, print or write recipes for timm's train.py", 'add_recipe_arguments', 'run_recipe', True),
    'config': Command(
        'assets', "list, print or write configurations for transformers' scripts", 'add_config_arguments',
        'run_config', True),
    'env': Command('environment', 'print versions, devices, kernels and settings, for bug reports', is_light=True),
}


def load_light(name: str) -> types.ModuleType:
    """Import a module of the package without importing the package itself.

    Args:
        name: Name within the package, such as `version` or `demo.command`.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # does not import the package
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f'No module named {_PACKAGE!r}', name=_PACKAGE)
    stand_in, folder = f'_{_PACKAGE}_light', Path(spec.origin).parent
    *parents, last = name.split('.')
    for parent in ('', *parents):
        if parent:
            stand_in, folder = f'{stand_in}.{parent}', folder / parent
        if stand_in not in sys.modules:
            sys.modules[stand_in] = types.ModuleType(stand_in)
            sys.modules[stand_in].__path__ = [str(folder)]
    return importlib.import_module(f'{stand_in}.{last}')


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises an error if the output cannot be written; argparse ignores such errors."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            (file or sys.stderr).write(message)


def create_parser(command: Optional[str] = None) -> argparse.ArgumentParser:
    """Create the parser, with the arguments of all commands or only of `command`."""
    parser = _Parser(prog='timm-spikformer', description='Spikformer V2 for timm and transformers.')
    parser.add_argument('--version', action='version', version=load_light('version').__version__)
    parsers = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, entry in COMMANDS.items():
        sub = parsers.add_parser(name, help=entry.help, description=entry.help)
        if command in (None, name):
            module = load_light(f'{entry.part}.command')
            sub.description = getattr(module, 'DESCRIPTION', entry.help)
            getattr(module, entry.add_arguments)(sub)
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Parse the command line and run the command; on invalid input, exit with the message `error: ...`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors=_STAND_INS)
    try:
        try:
            _run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as e:  # the output cannot be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        is_closed = isinstance(e, BrokenPipeError)  # the reader of the pipe, such as `head`, has exited
        sys.exit(1 if is_closed else f'error: The output cannot be written: {load_light("errors").explain(e)}')


def _run(argv: List[str]) -> None:
    chosen = next((word for word in argv if not word.startswith('-')), '')
    command, said = None, 'No partial output was written.'
    try:
        args = create_parser(chosen).parse_args(argv)
        command = COMMANDS[args.command]
        del args.command
        path = f'{command.part}.command'
        with _raise_on_termination():
            module = load_light(path) if command.is_light else importlib.import_module(f'{_PACKAGE}.{path}')
            getattr(module, command.run)(args)
    except KeyboardInterrupt:
        light = load_light(f'{command.part}.command') if command else None
        sys.exit(f'\nInterrupted. {light.interrupted(args) if hasattr(light, "interrupted") else said}')
    except BrokenPipeError:
        raise
    except Exception as e:
        message = load_light('errors').explain(e)
        if message is None:
            raise
        sys.exit(f'error: {message}')


@contextlib.contextmanager
def _raise_on_termination() -> Iterator[None]:
    """Make SIGTERM raise SystemExit, so that temporary files are removed."""
    def terminate(*args: Any) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    is_free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


_STAND_INS = 'timm-spikformer'
_SIMILAR = {
    '\u00b5': 'u', '\u03bc': 'u', '\u00d7': 'x', '\u2013': '-', '\u2014': '-', '\u2190': '<-', '\u2192': '->'}


def _stand_in(error: UnicodeError) -> Tuple[Union[str, bytes], int]:
    """Encoding error handler: replace a character with a similar ASCII one, or restore a byte of a file name."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if '\udc80' <= character <= '\udcff':  # a byte of a file name that is not valid UTF-8
        return bytes([ord(character) - 0xdc00]), error.start + 1
    plain = _SIMILAR.get(character) or unicodedata.normalize('NFKD', character).encode('ascii', 'ignore').decode()
    return plain or '?', error.start + 1


codecs.register_error(_STAND_INS, _stand_in)

if __name__ == '__main__':
    main()
