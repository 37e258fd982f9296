"""Import names of a package on first use, so that a dependency is required only if a name that needs it is used."""
from importlib import import_module
from typing import Any, Callable, Dict

from .errors import user_message

__all__ = ['import_on_demand']


def import_on_demand(package: str, modules: Dict[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` function for a package.

    Args:
        package: Name of the package.
        modules: For each name, the relative name of the module that defines it, such as `.upload`.
    """
    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        try:
            return getattr(import_module(modules[name], package), name)
        except ModuleNotFoundError as e:
            message = user_message(e)
            if message is None:
                raise
            raise ModuleNotFoundError(f'{package}.{name}: {message}', name=e.name) from e

    return get
