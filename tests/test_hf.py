"""transformers classes: loading, saving, training, and exchange of weights with timm."""
import copy
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import assert_neurons_fire, calibrate
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForPreTraining,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
    pipeline,
)

import timm_spikformer
from timm_spikformer import (
    FiringRateCallback,
    SpikformerBackbone,
    SpikformerConfig,
    SpikformerForImageClassification,
    SpikformerForMaskedImageModeling,
    SpikformerModel,
    SpikformerTrainer,
)
from timm_spikformer.hf.remote_code import save_remote_code
from timm_spikformer.hf.trainer import parameter_groups
from timm_spikformer.losses import TETLoss

CLASSES = [SpikformerModel, SpikformerForImageClassification, SpikformerForMaskedImageModeling, SpikformerBackbone]


def make_config(stem='scs', **kwargs):
    return SpikformerConfig.from_timm('test_spikformer_v2', **{**dict(
        stem=stem, num_labels=10, time_steps=2, mask_ratio=0.25, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2), **kwargs})


def make_model(cls, images, **kwargs):
    """Return a calibrated model in eval mode, whose neuron layers all fire with any mask."""
    torch.manual_seed(0)
    model = cls(make_config(**kwargs))
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(m.bias, 0.3)
    return calibrate(model, images)


def logits_or_loss(model, x):
    """Return one output of the model, to compare models of any class."""
    kwargs = {}
    if isinstance(model, SpikformerForMaskedImageModeling):
        kwargs = dict(bool_masked_pos=(torch.arange(16) % 2 > 0).expand(len(x), -1))
    with torch.no_grad():
        out = model(pixel_values=x, **kwargs)
    return out.feature_maps[0] if 'feature_maps' in out else out.to_tuple()[0]


# -- loading and saving

@pytest.mark.parametrize('cls', CLASSES)
@pytest.mark.parametrize('stem', ['scs', 'sps'])
def test_save_load_save(cls, stem, images, tmp_path):
    model = make_model(cls, images, stem=stem)
    model.save_pretrained(tmp_path / 'a')
    loaded, info = cls.from_pretrained(tmp_path / 'a', output_loading_info=True)
    assert not any(info.values())
    assert_neurons_fire(loaded, images)
    assert torch.equal(logits_or_loss(loaded, images), logits_or_loss(model, images))
    loaded.save_pretrained(tmp_path / 'b')
    for name in ('model.safetensors', 'config.json'):
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()


@pytest.mark.parametrize('source', CLASSES)
@pytest.mark.parametrize('target', CLASSES)
def test_model_of_another_class_is_saved_under_timm_names(source, target, images, tmp_path):
    """A model that was loaded from the folder of any class is saved so that timm and all classes load it."""
    make_model(source, images).save_pretrained(tmp_path / 'source')
    model = target.from_pretrained(tmp_path / 'source').eval()
    model.save_pretrained(tmp_path / 'target')
    encoder = {k: v for k, v in model.encoder.state_dict().items() if not k.startswith('head.')}
    decoder = {'decoder.mask_token'} if target is SpikformerForMaskedImageModeling else set()
    assert load_file(tmp_path / 'target' / 'model.safetensors').keys() >= encoder.keys() | decoder
    folder, file = f'local-dir:{tmp_path / "target"}', str(tmp_path / 'target' / 'model.safetensors')
    has_head = target is SpikformerForImageClassification
    for loaded in (
            timm.create_model(folder, pretrained=True),
            timm.create_model('test_spikformer_v2', num_classes=10 if has_head else 0, checkpoint_path=file),
            *(cls.from_pretrained(tmp_path / 'target').encoder for cls in CLASSES)):
        state_dict = loaded.state_dict()
        assert all(torch.equal(state_dict[k], v) for k, v in encoder.items())
    again = target.from_pretrained(tmp_path / 'target').eval()
    assert torch.equal(logits_or_loss(again, images), logits_or_loss(model, images))


def test_sharded(images, tmp_path):
    model = make_model(SpikformerForImageClassification, images)
    model.save_pretrained(tmp_path, max_shard_size='500KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    loaded = SpikformerForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_or_loss(loaded, images), logits_or_loss(model, images))


@pytest.mark.parametrize('cls', CLASSES)
def test_load_state_dict_accepts_both_key_formats(cls, images, tmp_path):
    model = make_model(cls, images)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / 'model.safetensors')
    assert not stored.keys() & model.state_dict().keys()
    for state_dict in (stored, model.state_dict()):
        other = cls(make_config())
        result = other.load_state_dict(state_dict)
        assert not result.missing_keys and not result.unexpected_keys
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize('stem', ['scs', 'sps'])
def test_pretrained_encoder_loads_in_both_libraries(stem, images, tmp_path):
    """All tensors of the encoder, and no others, load into the classifier, the base model and the timm model."""
    mim = make_model(SpikformerForMaskedImageModeling, images, stem=stem)
    mim.save_pretrained(tmp_path)
    encoder = mim.mae.encoder.state_dict()
    path = str(tmp_path / 'model.safetensors')
    classifier, info = SpikformerForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info['missing_keys'] == {'timm_model.head.fc.weight', 'timm_model.head.fc.bias'}
    assert not info['unexpected_keys']
    assert 0.01 < classifier.timm_model.head.fc.weight.std() < 0.03 and not classifier.timm_model.head.fc.bias.any()
    timm_model = timm.create_model(
        'test_spikformer_v2', stem=stem, num_classes=10, pretrained=True,
        pretrained_cfg_overlay=dict(file=path, num_classes=-1))
    strict = timm.create_model('test_spikformer_v2', stem=stem, num_classes=10, checkpoint_path=path)
    for model in (classifier.timm_model, SpikformerModel.from_pretrained(tmp_path).timm_model, timm_model, strict):
        state_dict = model.state_dict()
        assert {k for k in state_dict if not k.startswith('head.')} == encoder.keys()
        assert all(torch.equal(state_dict[k], v) for k, v in encoder.items())


def test_classifier_loads_into_timm(images, tmp_path):
    model = make_model(SpikformerForImageClassification, images)
    model.save_pretrained(tmp_path)
    path = str(tmp_path / 'model.safetensors')
    timm_model = timm.create_model('test_spikformer_v2', num_classes=10, time_steps=2, checkpoint_path=path).eval()
    with torch.no_grad():
        assert torch.equal(timm_model(images), model(images).logits)


def test_dtype_and_device_map(images, tmp_path):
    make_model(SpikformerForImageClassification, images).save_pretrained(tmp_path)
    created = AutoModel.from_config(make_config(), dtype=torch.bfloat16)
    assert created.dtype == torch.bfloat16
    assert {b.dtype for n, b in created.named_buffers() if 'running' in n} == {torch.float32}
    model = SpikformerForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map='cpu')
    assert model.dtype == torch.bfloat16 and model.timm_model.blocks[0].mlp.fc1.linear.weight.dtype == torch.bfloat16
    assert {b.dtype for n, b in model.named_buffers() if 'running' in n} == {torch.float32}
    for m in (created, model):
        assert {b.dtype for n, b in m.named_buffers() if 'num_batches' in n} == {torch.int64}
    assert_neurons_fire(model, images)
    assert model(images).logits.isfinite().all()


@pytest.mark.parametrize('cls', CLASSES)
def test_double_precision(cls, images, tmp_path):
    """Create, load or cast a model, run forward and backward, and save it again."""
    make_model(cls, images).save_pretrained(tmp_path / 'a')
    created = cls._from_config(make_config(), dtype=torch.float64)
    loaded = cls.from_pretrained(tmp_path / 'a', dtype=torch.float64)
    cast = cls.from_pretrained(tmp_path / 'a').double()
    for model in (created, loaded, cast):
        assert {t.dtype for t in model.state_dict().values()} == {torch.float64, torch.int64}
        out = model.train()(images[:2]).to_tuple()[0]
        (out[0] if isinstance(out, tuple) else out).sum().backward()
    assert_neurons_fire(loaded.eval(), images)
    cast.load_state_dict(loaded.state_dict())
    assert torch.equal(logits_or_loss(loaded, images), logits_or_loss(cast.eval(), images))
    loaded.save_pretrained(tmp_path / 'b')
    again = cls.from_pretrained(tmp_path / 'b')  # in the dtype in which it was saved
    assert again.dtype == torch.float64
    assert torch.equal(logits_or_loss(loaded, images), logits_or_loss(again, images))


def test_mismatched_checkpoint_raises(images, tmp_path):
    make_model(SpikformerForImageClassification, images, hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match='size mismatch|ignore_mismatched_sizes'):
        SpikformerForImageClassification.from_pretrained(tmp_path, config=make_config())


# -- outputs

def test_features(images):
    model = make_model(SpikformerModel, images)
    with torch.no_grad():
        out = model(images, output_hidden_states=True)
        expected = model.timm_model.forward_features(images)  # [B, D, H, W]
    assert torch.equal(out.last_hidden_state.transpose(1, 2).unflatten(2, (4, 4)), expected)
    assert out.pooler_output.shape == (16, 64)
    assert len(out.hidden_states) == 3 and torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert [h.shape for h in out.hidden_states] == [(16, 16, 64)] * 3
    assert isinstance(model(images, return_dict=False), tuple)


def test_hidden_states_do_not_change_the_logits(images):
    model = make_model(SpikformerForImageClassification, images)
    with torch.no_grad():
        assert torch.equal(model(images, output_hidden_states=True).logits, model(images).logits)


def test_backbone(images):
    model = make_model(SpikformerBackbone, images, out_features=['stage1', 'stage3', 'stage4'])
    maps = model(images).feature_maps
    assert [m.shape[1:] for m in maps] == [(8, 32, 32), (32, 8, 8), (64, 4, 4)]
    assert model.channels == [8, 32, 64]


@pytest.mark.parametrize('problem_type, labels', [
    ('single_label_classification', torch.arange(16) % 10),
    ('multi_label_classification', (torch.arange(160).view(16, 10) % 3 == 0).float()),
    ('regression', torch.randn(16)),
])
def test_losses(problem_type, labels, images):
    num_labels = 1 if problem_type == 'regression' else 10
    model = make_model(SpikformerForImageClassification, images, num_labels=num_labels, problem_type=problem_type)
    logits = model(images).logits
    expected = dict(
        single_label_classification=nn.functional.cross_entropy,
        multi_label_classification=nn.functional.binary_cross_entropy_with_logits,
        regression=lambda logits, labels: nn.functional.mse_loss(logits.squeeze(), labels),
    )[problem_type](logits, labels)
    torch.testing.assert_close(model(images, labels=labels).loss, expected)


def test_sequences_and_time_steps(images):
    model = make_model(SpikformerForImageClassification, images)
    still = images.unsqueeze(1).expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(model(still).logits, model(images).logits)
    model.set_time_steps(4)
    assert model.config.time_steps == 4 and model.timm_model.time_steps == 4


@pytest.mark.parametrize('cls', [SpikformerForImageClassification, SpikformerForMaskedImageModeling])
def test_gradient_checkpointing(cls, images):
    """Checkpointing gives equal gradients and updates BN statistics once per step."""
    model = make_model(cls, images).train()
    kwargs = dict(labels=torch.arange(16) % 10) if cls is SpikformerForImageClassification else dict(
        noise=torch.rand(16, 16))
    other = copy.deepcopy(model)
    other.activation_checkpointing_enable()
    assert other.is_activation_checkpointing and not model.is_activation_checkpointing
    for m in (model, other):
        m(images, **kwargs).loss.backward()
    for (name, p), q in zip(model.named_parameters(), other.named_parameters()):
        assert torch.equal(p.grad, q[1].grad), name
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers()))
    with pytest.raises(ValueError, match='every_n_layers must be 1, got 2'):
        other.activation_checkpointing_enable(every_n_layers=2)


# -- bad input

@pytest.mark.parametrize('kwargs, message', [
    (dict(hidden_size='32'), 'hidden_size'),
    (dict(num_attention_heads=5), 'num_attention_heads=5'),
    (dict(time_steps=0), 'time_steps must be at least 1, got 0'),
    (dict(mask_ratio=1.0), 'mask_ratio must be greater than 0 and less than 1, got 1.0'),
    (dict(patch_size=0), 'patch_size must be at least 1, got 0'),
    (dict(image_size=[224]), 'image_size must be one integer, or a height and a width'),
])
def test_bad_configurations(kwargs, message):
    is_type = 'hidden_size' in kwargs
    with pytest.raises(
            StrictDataclassFieldValidationError if is_type else StrictDataclassClassValidationError, match=message):
        SpikformerConfig(**kwargs)


def test_configuration_of_other_model():
    for model in ('resnet18', timm.create_model('resnet18')):
        with pytest.raises(ValueError, match='Expected a timm_spikformer.Spikformer, .* got a ResNet'):
            SpikformerConfig.from_timm(model)


def test_bad_values(images):
    with pytest.raises(ValueError, match="Unknown stem 'conv', expected one of 'scs', 'sps'"):
        SpikformerModel(make_config(stem='conv'))
    with pytest.raises(ValueError, match='mask_unit must be a multiple of the patch size 16, got 24'):
        SpikformerForMaskedImageModeling(make_config(mask_unit_size=24))
    model = SpikformerForImageClassification(make_config())
    for label in (12, -5):
        with pytest.raises(ValueError, match=f'labels must be from 0 to 9, or -100 for images .*, got {label}'):
            model(images[:2], labels=torch.tensor([3, label]))
    assert model(images[:2], labels=torch.tensor([3, -100])).loss.isfinite()
    with pytest.raises(ValueError, match='output_attentions is not supported'):
        model(images, output_attentions=True)
    with pytest.raises(ValueError, match='has 15 values for each image, expected 16'):
        SpikformerForMaskedImageModeling(make_config())(images, bool_masked_pos=torch.arange(15).expand(16, -1) > 3)


@pytest.mark.parametrize('cls', [SpikformerModel, SpikformerForImageClassification, SpikformerBackbone])
def test_mask_raises_in_models_without_masking(cls, images):
    model = cls(make_config())
    for name in ('bool_masked_pos', 'noise'):
        with pytest.raises(ValueError, match=f'{cls.__name__} does not support {name}: it has no mask token'):
            model(images, **{name: torch.arange(16).expand(16, -1) > 3})
    model(images[:1], bool_masked_pos=None)


# -- Auto classes

@pytest.mark.parametrize('order', [
    pytest.param('import timm_spikformer, transformers', marks=pytest.mark.slow),
    pytest.param('import transformers, timm_spikformer', marks=pytest.mark.slow),
    'from transformers import AutoConfig, AutoModel, AutoImageProcessor; import timm_spikformer',
])
def test_auto_classes_with_any_import_order(order, tmp_path):
    make_config().save_pretrained(tmp_path)
    ViTImageProcessor().save_pretrained(tmp_path)
    code = f"""{order}
from transformers import *
import transformers
config = transformers.AutoConfig.from_pretrained({str(tmp_path)!r})
models = [getattr(transformers, name).from_config(config) for name in (
    'AutoModel', 'AutoModelForImageClassification', 'AutoModelForMaskedImageModeling', 'AutoModelForPreTraining',
    'AutoBackbone')]
processors = [
    transformers.AutoImageProcessor.from_pretrained({str(tmp_path)!r}, backend=b) for b in ('torchvision', 'pil')]
print([type(m).__name__ for m in [config, *models, *processors]])"""
    env = dict(os.environ, HF_HUB_OFFLINE='1')
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    expected = [
        'SpikformerConfig', 'SpikformerModel', 'SpikformerForImageClassification', 'SpikformerForMaskedImageModeling',
        'SpikformerForMaskedImageModeling', 'SpikformerBackbone', 'ViTImageProcessor', 'ViTImageProcessorPil']
    assert out.stdout.strip().splitlines()[-1:] == [str(expected)], out.stderr


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, timm_spikformer; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'False'


def test_public_names():
    assert set(timm_spikformer.__all__) <= set(dir(timm_spikformer))
    assert all(getattr(timm_spikformer, name) for name in timm_spikformer.__all__)
    with pytest.raises(AttributeError, match='Spikformre'):
        getattr(timm_spikformer, 'Spikformre')  # noqa: B009


def test_auto_classes(images, tmp_path):
    make_model(SpikformerForMaskedImageModeling, images).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SpikformerConfig
    for auto, cls in (
        (AutoModel, SpikformerModel),
        (AutoModelForImageClassification, SpikformerForImageClassification),
        (AutoModelForMaskedImageModeling, SpikformerForMaskedImageModeling),
        (AutoModelForPreTraining, SpikformerForMaskedImageModeling),
    ):
        assert type(auto.from_pretrained(tmp_path)) is cls


def test_remote_code_without_the_plugin(images, tmp_path):
    """A process without this package loads the folder and gives bit-equal outputs."""
    model = make_model(SpikformerForImageClassification, images)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='no config.json'):
        save_remote_code(tmp_path / 'nowhere')
    save_remote_code(tmp_path)
    torch.save(images, tmp_path / 'images.pt')
    code = f"""
import sys, torch
sys.modules['timm_spikformer'] = None  # importing it raises
from transformers import AutoModelForImageClassification
folder = {str(tmp_path)!r}
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
torch.save(model(torch.load(folder + '/images.pt')).logits, folder + '/logits.pt')"""
    env = dict(os.environ, HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'home'))
    subprocess.run([sys.executable, '-c', code], check=True, env=env)
    assert torch.equal(torch.load(tmp_path / 'logits.pt'), model(images).logits)


# -- Trainer

class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return dict(pixel_values=self.images[i], labels=i % 10)


def training_args(output, **kwargs):
    return TrainingArguments(**{**dict(
        output_dir=str(output), per_device_train_batch_size=8, max_steps=4, logging_steps=1, save_steps=2,
        report_to='none', use_cpu=True, learning_rate=1e-3, seed=0), **kwargs})


def losses(trainer):
    return [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]


def test_resuming_gives_the_same_losses(images, tmp_path):
    model = make_model(SpikformerForImageClassification, images)
    full = Trainer(model, training_args(tmp_path), train_dataset=Images(images))
    full.train()
    resumed = Trainer(
        SpikformerForImageClassification(make_config()), training_args(tmp_path), train_dataset=Images(images))
    resumed.train(resume_from_checkpoint=str(tmp_path / 'checkpoint-2'))
    assert losses(resumed) == losses(full) and len(losses(full)) == 4
    assert all(torch.equal(a, b) for a, b in zip(full.model.state_dict().values(), resumed.model.state_dict().values()))


def test_pretraining_evaluates_without_label_names(images, tmp_path):
    trainer = Trainer(
        make_model(SpikformerForMaskedImageModeling, images), training_args(tmp_path, max_steps=1),
        train_dataset=Images(images), eval_dataset=Images(images),
        data_collator=lambda batch: dict(pixel_values=torch.stack([b['pixel_values'] for b in batch])))
    trainer.train()
    assert trainer.evaluate()['eval_loss'] > 0


@pytest.mark.slow
def test_trainer_compiles(images, tmp_path):
    args = training_args(tmp_path, max_steps=2, torch_compile=True, torch_compile_backend='aot_eager')
    compiled = Trainer(make_model(SpikformerForImageClassification, images), args, train_dataset=Images(images))
    compiled.train()
    eager = Trainer(
        make_model(SpikformerForImageClassification, images), training_args(tmp_path, max_steps=2),
        train_dataset=Images(images))
    eager.train()
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)


def test_parameter_groups(images):
    mim = SpikformerForMaskedImageModeling(make_config())
    no_decay, decay = parameter_groups(mim, 0.05)
    assert no_decay['weight_decay'] == 0. and decay['weight_decay'] == 0.05
    names = {id(p): n for n, p in mim.named_parameters()}
    undecayed = {names[id(p)] for p in no_decay['params']}
    assert undecayed == {n for n, p in mim.named_parameters() if p.ndim == 1} | {'mae.decoder.mask_token'}
    model = SpikformerForImageClassification(make_config())
    groups = parameter_groups(model, 0.05, learning_rate=1., layer_decay=0.5)
    lrs = {id(p): group['lr'] for group in groups for p in group['params']}
    assert lrs.keys() == {id(p) for p in model.parameters()}
    lr = {n: lrs[id(p)] for n, p in model.named_parameters()}
    assert lr['timm_model.head.fc.weight'] == 1.
    stem = {v for n, v in lr.items() if '.stem.' in n}
    assert len(stem) == 1 and stem.pop() < lr['timm_model.blocks.0.mlp.fc1.bn.weight'] < 1.
    with pytest.raises(ValueError, match='layer_decay is for fine-tuning a classifier'):
        parameter_groups(mim, 0.05, learning_rate=1., layer_decay=0.5)


@pytest.mark.parametrize('value', [-1, 0, 2, float('nan'), 'x', True])
def test_layer_decay_out_of_range(value, tmp_path):
    model = SpikformerForImageClassification(make_config())
    with pytest.raises(ValueError, match='layer_decay must be greater than 0 and at most 1'):
        SpikformerTrainer(model, training_args(tmp_path), layer_decay=value)
    with pytest.raises(ValueError, match='layer_decay must be greater than 0 and at most 1'):
        parameter_groups(model, 0.05, learning_rate=1., layer_decay=value)


def test_step_loss_requires_a_classifier_and_labels(images, tmp_path):
    with pytest.raises(ValueError, match='requires a SpikformerForImageClassification, .* got a SpikformerForMasked'):
        SpikformerTrainer(
            SpikformerForMaskedImageModeling(make_config()), training_args(tmp_path), step_loss=TETLoss())
    trainer = SpikformerTrainer(
        SpikformerForImageClassification(make_config()), training_args(tmp_path), step_loss=TETLoss(),
        train_dataset=[dict(pixel_values=image) for image in images])
    with pytest.raises(ValueError, match='step_loss requires labels, but the samples contain only pixel_values'):
        trainer.train()


def test_trainer_with_layer_decay_and_firing_rates(images, tmp_path, caplog):
    trainer = SpikformerTrainer(
        make_model(SpikformerForImageClassification, images), training_args(tmp_path, weight_decay=0.05),
        train_dataset=Images(images), layer_decay=0.75, callbacks=[FiringRateCallback()])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert len({group['initial_lr'] for group in trainer.optimizer.param_groups}) == 4
    logs = [entry for entry in trainer.state.log_history if 'loss' in entry]
    assert all(0 < entry['firing_rate'] < 1 for entry in logs)
    assert 'firing_rate/timm_model.blocks.0.attn.attn_lif' in logs[0]
    assert not any(m._forward_hooks for m in trainer.model.modules())
    assert 'silent' not in caplog.text


def test_silent_and_saturated_layers_are_reported(images, tmp_path, caplog):
    model = make_model(SpikformerForImageClassification, images)
    nn.init.constant_(model.timm_model.blocks[0].mlp.fc1.bn.bias, -100.)
    nn.init.constant_(model.timm_model.blocks[1].mlp.fc1.bn.bias, 100.)
    trainer = Trainer(
        model, training_args(tmp_path, max_steps=1), train_dataset=Images(images), callbacks=[FiringRateCallback()])
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert 'blocks.0.mlp.fc1.lif is silent' in caplog.text and 'blocks.1.mlp.fc1.lif is saturated' in caplog.text
    with pytest.raises(ValueError, match='0 <= silent < saturated <= 1'):
        FiringRateCallback(silent=0.5, saturated=0.1)
    with pytest.raises(ValueError, match="silent must be at least 0 and at most 1, got 'a'"):
        FiringRateCallback(silent='a')


@pytest.mark.slow
def test_pipeline_classifies_better_than_chance(tmp_path):
    """After training on 1,000 images for seconds, the accuracy on other images is at least four times chance."""
    import datasets

    from timm_spikformer.images import FASHION_MNIST
    train = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'train.parquet')).shuffle(seed=0).select(range(1000))
    test = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'test.parquet')).shuffle(seed=0).select(range(100))
    names = train.features['label'].names
    processor = ViTImageProcessor(size=dict(height=32, width=32), image_mean=[0.286] * 3, image_std=[0.353] * 3)
    x = processor([image.convert('RGB') for image in train['image']], return_tensors='pt').pixel_values
    y = torch.tensor(train['label'])
    torch.manual_seed(0)
    config = SpikformerConfig.from_timm(
        'spikformer_v2_2_64_patch4_32', id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
        num_labels=10)
    model = SpikformerForImageClassification(config).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=8 * 34)
    for _ in range(8):
        for i in torch.randperm(1000).split(30):
            loss = model(x[i], labels=y[i]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    calibrate(model, x[:200])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classify = pipeline('image-classification', model=str(tmp_path), device='cpu')
    predicted = [p[0]['label'] for p in classify([image.convert('RGB') for image in test['image']], batch_size=50)]
    correct = np.mean([p == names[label] for p, label in zip(predicted, test['label'])])
    assert correct >= 0.4, f'accuracy {correct:.2f}, chance is 0.1'
    assert json.loads((tmp_path / 'config.json').read_text())['id2label']['0'] == 'T-shirt/top'
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ViTImageProcessor
