import json
from pathlib import Path

import pytest
import timm
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainingArguments,
)

from hf_configs import make_configs
from timm_spikformer.hf.processing import read_data_config
from timm_spikformer.pretrained import get_training_cfg

ROOT = Path(__file__).parents[1] / 'hf_configs'
ARGS = sorted((ROOT / 'args').glob('*.json'))


def test_committed_files_match_generated_files(tmp_path, monkeypatch):
    monkeypatch.setattr('sys.argv', ['make_configs.py', str(tmp_path)])
    make_configs.main()
    generated = {p.relative_to(tmp_path): p.read_text() for p in tmp_path.rglob('*.json')}
    committed = {p.relative_to(ROOT): p.read_text() for p in ROOT.rglob('*.json') if p.parent.name != 'args'}
    assert generated.keys() == committed.keys()
    for path, text in generated.items():
        ours, theirs = json.loads(text), json.loads(committed[path])
        assert ours.pop('transformers_version', None) is None or theirs.pop('transformers_version')
        assert ours == theirs, path


@pytest.mark.parametrize('name', timm.list_models(module='spikformer'))
def test_config_creates_registered_model(name):
    config = AutoConfig.from_pretrained(ROOT / name, num_labels=1000)
    expected = timm.create_model(name, num_classes=1000, device='meta').state_dict()
    if sum(v.numel() for v in expected.values()) > 2e7:  # compare large models at depth 1
        config.num_hidden_layers = 1
        expected = timm.create_model(name, num_classes=1000, depth=1, device='meta').state_dict()
    model = AutoModelForImageClassification.from_config(config).timm_model
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert model.time_steps == timm.create_model(name, device='meta').time_steps
    cfg = get_training_cfg(name)
    processor = json.loads((ROOT / name / 'preprocessor_config.json').read_text())
    if config.num_channels == 2:
        assert AutoFeatureExtractor.from_pretrained(ROOT / name).time_steps == model.time_steps
    else:
        assert list(AutoImageProcessor.from_pretrained(ROOT / name).image_mean) == processor['image_mean']
    assert read_data_config(processor, config.num_channels)['input_size'] == cfg.input_size
    assert tuple(processor['image_mean']) == cfg.mean and tuple(processor['image_std']) == cfg.std


@pytest.mark.parametrize('path', ARGS, ids=lambda path: path.stem)
def test_argument_files(path, tmp_path):
    """TrainingArguments accepts its part of each file; paths exist or are outputs of another argument file."""
    args = json.loads(path.read_text())
    known = TrainingArguments.__dataclass_fields__.keys()
    training_args = TrainingArguments(**{
        k: v for k, v in args.items() if k in known and k not in ('bf16', 'output_dir')}, output_dir=str(tmp_path))
    assert not training_args.remove_unused_columns  # pixel values and masks come from a transform
    outputs = {json.loads(p.read_text())['output_dir'] for p in ARGS}
    for key in ('config_name', 'config_name_or_path', 'image_processor_name', 'model_name_or_path'):
        assert args.get(key) is None or args[key] in outputs or (ROOT.parent / args[key]).is_dir(), key
