"""Small datasets in their original formats."""
import shutil

import event_files
import pytest

from timm_spikformer.event_data.catalog import DATASETS


@pytest.fixture(scope='session')
def originals(tmp_path_factory):
    """Small datasets in their original formats, by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in DATASETS}
    for name, folder in folders.items():
        getattr(event_files, f'write_{name}')(folder)
    return folders


@pytest.fixture
def original(originals, tmp_path):
    """Copy a small dataset."""
    def copy(name):
        return shutil.copytree(originals[name], tmp_path / name)
    return copy
