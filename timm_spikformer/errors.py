"""Messages for errors that a user of the command line can fix. All other errors are bugs and keep their traceback.

An error is reported to the user if its class is from a library that reads files, external data or the network, or if it
is a `ValueError` or a `RuntimeError` from a `raise` statement in this package.

This module imports the standard library only.
"""
import dis
import errno
import re
from importlib import metadata
from pathlib import Path
from typing import Optional

__all__ = ['first_line', 'pip_requirement', 'user_message']

_PACKAGE = Path(__file__).parent
# libraries whose exceptions are about files, external data or the network
_LIBRARIES = ('huggingface_hub', 'httpx', 'httpx2', 'httpcore', 'httpcore2', 'safetensors', 'json', 'yaml', 'pyarrow',
              'datasets', 'PIL', 'pickle', '_pickle', 'zipfile', 'zlib', 'csv', '_csv')
# messages of PyTorch's plain RuntimeError when memory runs out on the CPU or on MPS
_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|backend out of memory")
_HINTS = {
    errno.ENOSPC: 'Free some space, or write to another disk.',
    errno.EDQUOT: 'Free some of your quota, or write to another disk.',
    errno.EROFS: 'Write to another folder.',
    errno.EACCES: 'Change its permissions, or choose another path.',
    errno.EPERM: 'Change its permissions, or choose another path.',
    errno.ENOENT: 'Check the path.',
    errno.ENOTDIR: 'Check the path.',
    errno.EISDIR: 'Expected a file.',
    errno.ENAMETOOLONG: 'Choose a shorter name.',
}


def user_message(error: BaseException) -> Optional[str]:
    """Return the message about an exception to show to the user, or None if the exception is a bug."""
    if isinstance(error, ImportError):
        return _explain_import(error)
    if _is_out_of_memory(error):
        return (f'There is not enough memory: {first_line(error)}. Use a smaller batch size, fewer time steps, a '
                f'smaller model or image, or another device.')
    if _is_network_error(error):
        return (f'The Hub cannot be reached: {first_line(error)}. Check the network, or set HF_HUB_OFFLINE=1 to use '
                f'what has been downloaded before.')
    if isinstance(error, OSError):
        return _explain_os_error(error)
    if _is_library_error(error) or isinstance(error, (UnicodeError, EOFError)):
        return f'Data cannot be read: {first_line(error)} ({type(error).__name__})'
    if isinstance(error, (ValueError, RuntimeError)) and _is_raised_by_package(error):
        return str(error)
    return None


def pip_requirement(module: str) -> str:
    """Return the pip requirement for a module, with the version range that this package declares."""
    name = {'PIL': 'pillow', 'yaml': 'pyyaml'}.get(module, module)
    try:
        declared = metadata.requires('timm-spikformer') or []
    except metadata.PackageNotFoundError:
        declared = []
    wanted = name.replace('_', '-').lower()
    for text in declared:
        requirement = text.partition(';')[0].strip()
        has_prefix = requirement[:len(wanted)].replace('_', '-').lower() == wanted
        if has_prefix and not requirement[len(wanted):len(wanted) + 1].isalnum():
            return requirement
    return name


def _explain_import(error: ImportError) -> Optional[str]:
    module = (error.name or '').partition('.')[0]
    if not module or module.startswith(('timm_spikformer', '_timm_spikformer')):
        return None
    if isinstance(error, ModuleNotFoundError) and module == error.name:
        return f'{module} is required here but is not installed. Run: pip install "{pip_requirement(module)}"'
    return f'{first_line(error)}. The installed version is not supported. Run: pip install "{pip_requirement(module)}"'


def _explain_os_error(error: OSError) -> str:
    if error.strerror is None:  # raised by a library, with its own message
        return str(error)
    names = ' -> '.join(str(name) for name in (error.filename, error.filename2) if name is not None)
    hint = _HINTS.get(error.errno, '')
    return f'{names}: {error.strerror}. {hint}'.removeprefix(': ').rstrip()


def _is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error, or one of its causes, means that a device ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == 'OutOfMemoryError':
        return True
    if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)):
        return True
    return error.__cause__ is not None and _is_out_of_memory(error.__cause__)


def _is_network_error(error: BaseException) -> bool:
    names = {f'{c.__module__.partition(".")[0]}.{c.__name__}' for c in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError)) and not isinstance(error, BrokenPipeError) or bool(
        names & {'httpx.TransportError', 'httpx2.TransportError', 'huggingface_hub.OfflineModeIsEnabled'})


def _is_library_error(error: BaseException) -> bool:
    return any(c.__module__.partition('.')[0] in _LIBRARIES for c in type(error).__mro__)


def first_line(error: BaseException) -> str:
    """Return the first line of an error message without its period, or the first two if the first ends in a colon.

    If the message is empty, return the type of the error.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(':'):
        lines[0] += f' {lines[1]}'
    return lines[0].removesuffix('.') if lines else type(error).__name__


def _is_raised_by_package(error: BaseException) -> bool:
    """Return whether a `raise` statement in this package raised the error, rather than a library that it called."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    is_raise = code.co_code[trace.tb_lasti] == dis.opmap['RAISE_VARARGS']
    return is_raise and _PACKAGE in Path(code.co_filename).resolve().parents
