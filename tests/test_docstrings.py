"""Examples in docstrings."""
import doctest
import importlib

import pytest
import torch

MODULES = ('neurons', 'kernels.switch', 'kernels.explain', 'masked_autoencoder', 'anytime', 'monitor')


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    module = importlib.import_module(f'timm_spikformer.{name}')
    result = doctest.testmod(module, extraglobs={'torch': torch})
    assert result.attempted > 0 and result.failed == 0
