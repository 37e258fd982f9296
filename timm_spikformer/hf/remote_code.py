"""Save the code of the models next to the weights, for `trust_remote_code=True` without this package installed."""
import json
import re
from pathlib import Path
from typing import Dict, List, Union

_PACKAGE = Path(__file__).parents[1]
_ENTRY_POINTS = ('hf.configuration_spikformer', 'hf.modeling_spikformer')
_AUTO_MAP = {
    'AutoConfig': 'configuration_spikformer.SpikformerConfig',
    'AutoModel': 'modeling_spikformer.SpikformerModel',
    'AutoModelForImageClassification': 'modeling_spikformer.SpikformerForImageClassification',
    'AutoModelForMaskedImageModeling': 'modeling_spikformer.SpikformerForMaskedImageModeling',
    'AutoModelForPreTraining': 'modeling_spikformer.SpikformerForMaskedImageModeling',
    'AutoBackbone': 'modeling_spikformer.SpikformerBackbone',
}


def save_remote_code(folder: Union[str, Path]) -> None:
    """Copy the full code into a folder written by `save_pretrained`, and refer to it in the config.json.

    transformers loads code from one folder without subpackages, so the copies are renamed: `kernels/lif.py` becomes
    `kernels_lif.py`. If `timm_spikformer` is imported, its own classes are used instead of the copies.

    Raises:
        ValueError: The folder contains no config.json of a Spikformer.
    """
    folder = Path(folder)
    path = folder / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    if config.get('model_type') != 'spikformer':
        raise ValueError(f'{folder} contains no config.json of model_type spikformer. Write it with save_pretrained.')
    for name, source in remote_sources().items():
        (folder / name).write_text(source, encoding='utf-8')
    config['auto_map'] = _AUTO_MAP
    processor = folder / 'preprocessor_config.json'
    if processor.is_file():  # for a local folder in timm's format, transformers reads this only from config.json
        kind = json.loads(processor.read_text(encoding='utf-8')).get('image_processor_type')
        config.update({} if kind is None else {'image_processor_type': kind})  # None for event sequences
    partial = path.with_suffix('.partial')
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + '\n', encoding='utf-8')
    partial.replace(path)


def remote_sources() -> Dict[str, str]:
    """Return the source of the modeling code and of all modules that it imports, by file name in one folder."""
    sources: Dict[str, str] = {}
    waiting = list(_ENTRY_POINTS)
    while waiting:
        name = waiting.pop()
        if _file_name(name) in sources:
            continue
        path = _PACKAGE.joinpath(*name.split('.'))
        is_package = path.is_dir()
        text = (path / '__init__.py' if is_package else path.with_suffix('.py')).read_text(encoding='utf-8')
        package = name.split('.') if is_package else name.split('.')[:-1]

        def flatten(match: re.Match, package: List[str] = package) -> str:
            parents = package[:len(package) - len(match['dots']) + 1]
            imported = '.'.join([*parents, match['name']])
            waiting.append(imported)
            return f'{match["indent"]}from .{_file_name(imported).removesuffix(".py")} import'

        sources[_file_name(name)] = re.sub(
            r'^(?P<indent> *)from (?P<dots>\.+)(?P<name>[\w.]+) import', flatten, text, flags=re.M)
    return sources


def _file_name(module: str) -> str:
    return f'{module.removeprefix("hf.").replace(".", "_")}.py'
