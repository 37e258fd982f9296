"""Every public class, function and constant is in the reference."""
import importlib
from pathlib import Path
from typing import Any, Dict

import pytest
from site_pages import DOCS

PUBLIC = [
    '', 'spikformer', 'layers', 'stems', 'neurons', 'masked_autoencoder', 'anytime', 'monitor', 'kernels',
    'kernels.explain', 'profiling', 'publishing', 'images', 'training', 'hf.configuration_spikformer',
    'hf.modeling_spikformer', 'hf.trainer', 'hf.processing', 'profiling.callback', 'event_data.readers',
    'event_data.frames', 'event_data.cache', 'event_data.tonic', 'event_data.dataset', 'event_data.names',
    'event_data.simulated', 'event_data.transforms', 'hf.event_processing', 'losses', 'linear']


def _build_inventory(folder: Path) -> Dict[str, str]:
    """Build the pages of the reference; return the kinds of the objects that they describe, by name."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils
    with patch_docutils(DOCS), docutils_namespace():
        app = Sphinx(
            DOCS / 'reference', DOCS, folder / 'out', folder / 'doctrees', 'dummy', status=None, freshenv=True,
            confoverrides={'html_static_path': []})
        app.build()
        return {name: entry.objtype for name, entry in app.env.domains['py'].objects.items()}


def _resolve(name: str) -> Any:
    """Return the object that a name stands for, None if there is none."""
    parts = name.split('.')
    for i in range(len(parts), 0, -1):
        try:
            found = importlib.import_module('.'.join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for part in parts[i:]:
            found = getattr(found, part, None)
        return found
    raise AssertionError(name)


@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::PendingDeprecationWarning')
def test_reference_is_complete(tmp_path):
    """All public names are described, and no page describes what does not exist."""
    pytest.importorskip('sphinx', reason='needs the extra docs')
    inventory = _build_inventory(tmp_path)
    documented = {id(_resolve(name)) for name in inventory}
    missing = []
    for name in PUBLIC:
        module = importlib.import_module(f'timm_spikformer{"." if name else ""}{name}')
        for public in module.__all__:
            if id(getattr(module, public)) not in documented and f'{module.__name__}.{public}' not in inventory:
                missing.append(f'{module.__name__}.{public}')
    assert not missing
    gone = [n for n, kind in inventory.items() if kind in ('class', 'function', 'method') and not callable(_resolve(n))]
    assert not gone and len(inventory) > 100
    assert inventory['timm_spikformer.Spikformer.forward_steps'] == 'method'
