"""Names of a package that are imported when they are first used, so that only what is used has to be installed."""
from importlib import import_module
from typing import Any, Callable, Dict

from .errors import explain

__all__ = ['import_on_demand']


def import_on_demand(package: str, modules: Dict[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package.

    Args:
        package: Name of the package.
        modules: Relative name of the module that holds each name, such as `.upload`.
    """
    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        try:
            return getattr(import_module(modules[name], package), name)
        except ModuleNotFoundError as e:
            message = explain(e)
            if message is None:
                raise
            raise ModuleNotFoundError(f'{package}.{name}: {message}', name=e.name) from e

    return get
