"""The code of the models beside their weights, for users who load with `trust_remote_code` and have no plugin."""
import json
import re
from pathlib import Path
from typing import Union

_PACKAGE = Path(__file__).parents[1]
_FILES = (
    'kernels/switch.py',
    'kernels/rules.py',
    'kernels/lif.py',
    'kernels/products.py',
    '_timm.py',
    'neurons.py',
    'recompute.py',
    'masking.py',
    'layers.py',
    'stems.py',
    'checkpoints.py',
    'pretrained.py',
    'sequences.py',
    'network.py',
    'spikformer.py',
    'masked_autoencoder.py',
    'hf/configuration_spikformer.py',
    'hf/modeling_spikformer.py',
)
_AUTO_MAP = {
    'AutoConfig': 'configuration_spikformer.SpikformerConfig',
    'AutoModel': 'modeling_spikformer.SpikformerModel',
    'AutoModelForImageClassification': 'modeling_spikformer.SpikformerForImageClassification',
    'AutoModelForMaskedImageModeling': 'modeling_spikformer.SpikformerForMaskedImageModeling',
    'AutoModelForPreTraining': 'modeling_spikformer.SpikformerForMaskedImageModeling',
    'AutoBackbone': 'modeling_spikformer.SpikformerBackbone',
}


def _flat(name: str) -> str:
    return name.removeprefix('hf/').replace('/', '_')


def _with_flat_imports(name: str, source: str) -> str:
    """Return the source of a file with its imports of other files by their flat names."""
    folder = name.rpartition('/')[0]
    if folder == 'kernels':
        return re.sub(r'^from \.(\w+) import', r'from .kernels_\1 import', source, flags=re.M)
    if folder == 'hf':
        source = re.sub(r'^from \.\.(\w+) import', r'from .\1 import', source, flags=re.M)
    return re.sub(r'^from \.kernels\.(\w+) import', r'from .kernels_\1 import', source, flags=re.M)


def save_remote_code(folder: Union[str, Path]) -> None:
    """Copy the full code into a folder that `save_pretrained` has written, and name it in its config.json.

    transformers takes code from one folder, without packages, so `kernels/lif.py` becomes `kernels_lif.py`. If the
    plugin is imported, its own classes are used instead of the copies.

    Raises:
        ValueError: The folder holds no config.json of a Spikformer.
    """
    folder = Path(folder)
    path = folder / 'config.json'
    config = json.loads(path.read_text()) if path.is_file() else {}
    if config.get('model_type') != 'spikformer':
        raise ValueError(f'{folder} holds no config.json of model_type spikformer. Write it with save_pretrained.')
    for name in _FILES:
        (folder / _flat(name)).write_text(_with_flat_imports(name, (_PACKAGE / name).read_text()))
    config['auto_map'] = _AUTO_MAP
    processor = folder / 'preprocessor_config.json'
    if processor.is_file():  # of a local folder of timm's, transformers looks for this in config.json only
        config['image_processor_type'] = json.loads(processor.read_text())['image_processor_type']
    partial = path.with_suffix('.partial')
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
    partial.replace(path)
