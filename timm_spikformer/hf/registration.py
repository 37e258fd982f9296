"""Register the classes with transformers' Auto classes when the modules of the Auto classes are imported.

Importing transformers' modeling code takes seconds, and timm users do not need it. Therefore, each of the modules that
define the Auto classes has a registration function. It is called immediately if the module has been imported, and
otherwise after the import, by a finder on `sys.meta_path`.
"""
import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any, Optional

_AUTO = 'transformers.models.auto.'


def _register_config(auto: ModuleType) -> None:
    from .configuration_spikformer import SpikformerConfig
    auto.AutoConfig.register('spikformer', SpikformerConfig, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    from . import modeling_spikformer as m
    from .configuration_spikformer import SpikformerConfig
    for auto_class, model_class in (
        (auto.AutoModel, m.SpikformerModel),
        (auto.AutoModelForImageClassification, m.SpikformerForImageClassification),
        (auto.AutoModelForMaskedImageModeling, m.SpikformerForMaskedImageModeling),
        (auto.AutoModelForPreTraining, m.SpikformerForMaskedImageModeling),
        (auto.AutoBackbone, m.SpikformerBackbone),
    ):
        auto_class.register(SpikformerConfig, model_class, exist_ok=True)


def _register_image_processor(auto: ModuleType) -> None:
    from transformers import ViTImageProcessor, ViTImageProcessorPil

    from .configuration_spikformer import SpikformerConfig
    auto.AutoImageProcessor.register(
        SpikformerConfig,
        image_processor_classes={'torchvision': ViTImageProcessor, 'pil': ViTImageProcessorPil},
        exist_ok=True,
    )


def _register_feature_extractor(auto: ModuleType) -> None:
    from .configuration_spikformer import SpikformerConfig
    from .event_processing import SpikformerEventProcessor
    auto.AutoFeatureExtractor.register(SpikformerConfig, SpikformerEventProcessor, exist_ok=True)


_AFTER_IMPORT = {
    f'{_AUTO}configuration_auto': _register_config,
    f'{_AUTO}modeling_auto': _register_models,
    f'{_AUTO}image_processing_auto': _register_image_processor,
    f'{_AUTO}feature_extraction_auto': _register_feature_extractor,
}


class _CallAfterImport(importlib.abc.MetaPathFinder):
    """Finder that delegates to the other finders, and calls a function after a module has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Optional[ModuleType] = None) -> Any:
        callback = _AFTER_IMPORT.get(name)
        if callback is None:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_and_call(module: ModuleType) -> None:
            exec_module(module)
            callback(module)

        spec.loader.exec_module = exec_and_call
        return spec


def register() -> None:
    """Register with the Auto classes that have been imported, and with the others when they are imported."""
    for name, callback in _AFTER_IMPORT.items():
        if name in sys.modules:
            callback(sys.modules[name])
    if not any(isinstance(finder, _CallAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CallAfterImport())
