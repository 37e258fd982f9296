"""Names that are imported on demand."""
import importlib
import pkgutil
import types

import pytest


@pytest.mark.parametrize('name', ['timm_spikformer', 'timm_spikformer.profiling', 'timm_spikformer.publishing'])
def test_no_module_hides_a_name(name):
    """A public name stands for its object after all modules of its package have been imported."""
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(package.__path__, f'{name}.'):
        if not module.name.endswith('__main__'):
            importlib.import_module(module.name)
    assert not [public for public in package.__all__ if isinstance(getattr(package, public), types.ModuleType)]
