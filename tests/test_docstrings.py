"""Examples in docstrings."""
import doctest
import importlib
import inspect

import pytest
import torch

MODULES = (
    'neurons', 'layers', 'stems', 'network', 'masked_autoencoder', 'anytime', 'monitor', 'kernels.switch',
    'kernels.explain', 'images', 'training', 'reading', 'profiling.activity', 'profiling.conventions',
    'profiling.counting', 'profiling.callback', 'publishing.card', 'publishing.upload', 'publishing.conversion',
    'hf.configuration_spikformer', 'hf.modeling_spikformer', 'hf.trainer', 'hf.event_processing', 'losses',
    'event_data.dataset', 'event_data.names', 'event_data.simulated')


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    module = importlib.import_module(f'timm_spikformer.{name}')
    result = doctest.testmod(module, extraglobs={'torch': torch})
    assert result.attempted > 0 and result.failed == 0


@pytest.mark.parametrize('name', MODULES)
def test_every_class_has_an_example(name):
    module = importlib.import_module(f'timm_spikformer.{name}')
    classes = [c for c in (getattr(module, public) for public in module.__all__) if inspect.isclass(c)]
    assert not [c.__name__ for c in classes if '>>>' not in (c.__doc__ or '')]
