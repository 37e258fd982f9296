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
        subpackage: Name of the subpackage.
        help: Help text, one line.
        add_arguments: Function in command.py that takes a parser and adds the arguments to it.
        run: Function in command.py that takes the parsed arguments and runs the command.
        is_standalone: Whether the command runs without importing the package, and therefore without torch and timm.
    """
    subpackage: str
    help: str
    add_arguments: str = 'add_arguments'
    run: str = 'run'
    is_standalone: bool = False


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
        'assets', "list, print or write recipes for timm's train.py and for accelerate", 'add_recipe_arguments',
        'run_recipe', True),
    'config': Command(
        'assets', "list, print or write configurations for transformers' scripts", 'add_config_arguments',
        'run_config', True),
    'env': Command('environment', 'print versions, devices, kernels and settings, for bug reports', is_standalone=True),
}


def load_standalone(name: str) -> types.ModuleType:
    """Import a module of the package without importing the package itself.

    Args:
        name: Name within the package, such as `version` or `demo.command`.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # does not import the package
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f'No module named {_PACKAGE!r}', name=_PACKAGE)
    placeholder, folder = f'_{_PACKAGE}_standalone', Path(spec.origin).parent
    *parents, last = name.split('.')
    for parent in ('', *parents):
        if parent:
            placeholder, folder = f'{placeholder}.{parent}', folder / parent
        if placeholder not in sys.modules:
            sys.modules[placeholder] = types.ModuleType(placeholder)
            sys.modules[placeholder].__path__ = [str(folder)]
    return importlib.import_module(f'{placeholder}.{last}')


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises an error if the output cannot be written; argparse ignores such errors."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if message:
            (file or sys.stderr).write(message)


def create_parser(command: Optional[str] = None) -> argparse.ArgumentParser:
    """Create the parser, with the arguments of all commands or only of `command`."""
    parser = _Parser(prog='timm-spikformer', description='Spikformer V2 for timm and transformers.')
    parser.add_argument('--version', action='version', version=load_standalone('version').__version__)
    parsers = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    for name, entry in COMMANDS.items():
        sub = parsers.add_parser(name, help=entry.help, description=entry.help)
        if command in (None, name):
            module = load_standalone(f'{entry.subpackage}.command')
            sub.description = getattr(module, 'DESCRIPTION', entry.help)
            getattr(module, entry.add_arguments)(sub)
    return parser


def main(argv: Optional[List[str]] = None) -> None:
    """Parse the command line and run the command; on invalid input, exit with the message `error: ...`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors=_ENCODING_ERRORS)
    try:
        try:
            _run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as e:  # the output cannot be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        is_closed = isinstance(e, BrokenPipeError)  # the reader of the pipe, such as `head`, has exited
        sys.exit(1 if is_closed else f'error: The output cannot be written: {_user_message(e)}')


def _user_message(error: BaseException) -> Optional[str]:
    return load_standalone('errors').user_message(error)


def _run(argv: List[str]) -> None:
    chosen = next((word for word in argv if not word.startswith('-')), '')
    command, advice = None, 'No partial output was written.'
    try:
        args = create_parser(chosen).parse_args(argv)
        command = COMMANDS[args.command]
        del args.command
        path = f'{command.subpackage}.command'
        with _raise_on_termination():
            module = load_standalone(path) if command.is_standalone else importlib.import_module(f'{_PACKAGE}.{path}')
            getattr(module, command.run)(args)
    except KeyboardInterrupt:
        command_module = load_standalone(f'{command.subpackage}.command') if command else None
        if hasattr(command_module, 'interruption_message'):
            advice = command_module.interruption_message(args)
        sys.exit(f'\nInterrupted. {advice}')
    except BrokenPipeError:
        raise
    except Exception as e:
        message = _user_message(e)
        if message is None:
            raise
        sys.exit(f'error: {message}')


@contextlib.contextmanager
def _raise_on_termination() -> Iterator[None]:
    """Make SIGTERM raise SystemExit, so that temporary files are removed."""
    def terminate(*args: Any) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    is_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


_ENCODING_ERRORS = 'timm-spikformer'
_ASCII_REPLACEMENTS = {
    '\u00b5': 'u', '\u03bc': 'u', '\u00d7': 'x', '\u2013': '-', '\u2014': '-', '\u2190': '<-', '\u2192': '->'}


def _replace_character(error: UnicodeError) -> Tuple[Union[str, bytes], int]:
    """Encoding error handler: replace a character with a similar ASCII one, or restore a byte of a file name."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if '\udc80' <= character <= '\udcff':  # a byte of a file name that is not valid UTF-8
        return bytes([ord(character) - 0xdc00]), error.start + 1
    replacement = _ASCII_REPLACEMENTS.get(character)
    if replacement is None:
        replacement = unicodedata.normalize('NFKD', character).encode('ascii', 'ignore').decode()
    return replacement or '?', error.start + 1


codecs.register_error(_ENCODING_ERRORS, _replace_character)

if __name__ == '__main__':
    main()
