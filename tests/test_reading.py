"""Reading of checkpoints: damaged files, invalid tensors and invalid descriptions of models raise."""
import argparse
import json
import shutil
import zipfile

import pytest
import timm
import torch
from conftest import calibrate
from safetensors.torch import load_file, save_file
from timm.models import get_model_input_config, save_for_hf
from timm.utils import ModelEmaV3

from timm_spikformer import (
    Spikformer,
    SpikformerConfig,
    SpikformerForImageClassification,
    SpikformerMAE,
    cli,
    publishing,
    use_kernels,
)
from timm_spikformer.hf.processing import create_processor
from timm_spikformer.publishing import convert, publish
from timm_spikformer.reading import checkpoint_from_model, read_checkpoint

NAME = 'test_spikformer_v2'
WEIGHT, COUNTER = 'blocks.0.mlp.fc1.linear.weight', 'blocks.0.mlp.fc1.bn.num_batches_tracked'


@pytest.fixture(scope='module')
def small(images):
    torch.manual_seed(0)
    return calibrate(timm.create_model(NAME, num_classes=10, time_steps=2), images)


@pytest.fixture
def state_dict(small):
    return {k: v.clone() for k, v in small.state_dict().items()}


def refuse(path, tmp_path, message, model_kwargs=None):
    """Check that reading, publishing and converting a file raise."""
    for function in (
            lambda: read_checkpoint(path, NAME, model_kwargs=model_kwargs),
            lambda: publish(path, 'a/b', 'mit', NAME, output=tmp_path / 'out', dry_run=True, model_kwargs=model_kwargs),
            lambda: convert(path, tmp_path / 'out', NAME, model_kwargs=model_kwargs)):
        with pytest.raises(ValueError, match=message):
            function()
    assert not (tmp_path / 'out').exists()


def run(*args):
    cli.main([str(arg) for arg in args])


# -- files

@pytest.mark.parametrize('place', ['data/7', 'data.pkl'])
def test_damaged_file(place, state_dict, tmp_path):
    """torch.load does not check the CRC of files in the zip archive."""
    path = tmp_path / 'a.pth'
    torch.save(state_dict, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f'a/{place}')
        with archive.open(info) as stream:
            start = content.index(stream.read())
    content[start + info.file_size // 2] ^= 1
    path.write_bytes(content)
    refuse(path, tmp_path, 'a.pth is damaged: Bad CRC-32')


def test_file_without_crc(state_dict, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state_dict, tmp_path / 'a.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    read_checkpoint(tmp_path / 'a.pth', NAME)


@pytest.mark.parametrize('name, change, message', [
    (WEIGHT, lambda v: v.to('meta'), 'contains no weights: .* is on the meta device'),
    (WEIGHT, lambda v: v.to_sparse(), 'as a torch.sparse_coo tensor, expected a dense'),
    (WEIGHT, lambda v: v.to_sparse_csr(), 'as a torch.sparse_csr tensor, expected a dense'),
    (WEIGHT, lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), 'as a quantized tensor'),
    (WEIGHT, lambda v: v + 1j, 'in torch.complex64, expected a floating-point dtype'),
    (WEIGHT, lambda v: v.to(torch.int8), 'in torch.int8, expected a floating-point dtype'),
    (WEIGHT, lambda v: v > 0, 'in torch.bool, expected a floating-point dtype'),
    (WEIGHT, lambda v: v.to(torch.float8_e4m3fn), 'in torch.float8_e4m3fn, expected a floating-point dtype'),
    (WEIGHT, lambda v: v.double() + 1e300, 'are not finite: 16384 of 16384 values .* infinite in float32'),
    (COUNTER, lambda v: v + 1j, 'in torch.complex64'),
], ids=['meta', 'sparse', 'csr', 'quantized', 'complex', 'int8', 'bool', 'float8', 'float64', 'counter'])
def test_invalid_tensors(name, change, message, state_dict, tmp_path):
    state_dict[name] = change(state_dict[name])
    torch.save({'state_dict': state_dict}, tmp_path / 'a.pth')
    refuse(tmp_path / 'a.pth', tmp_path, message)


@pytest.mark.parametrize('change', [lambda v: v + 1j, lambda v: v.to(torch.int8)], ids=['complex', 'int8'])
@pytest.mark.parametrize('kind', ['timm', 'transformers'])
def test_folders_with_invalid_tensors(kind, change, small, state_dict, tmp_path):
    folder = save_folder(kind, small, tmp_path)
    state_dict[WEIGHT] = change(state_dict[WEIGHT])
    save_file(state_dict, folder / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match=f'contains {WEIGHT} in torch..*, expected a floating-point dtype'):
        read_checkpoint(folder)


def test_model_with_complex_weights(small):
    model = timm.create_model(NAME, num_classes=10)
    model.head.fc.weight.data = model.head.fc.weight.data + 1j
    with pytest.raises(ValueError, match='The model contains head.fc.weight in torch.complex64'):
        checkpoint_from_model(model)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, state_dict, tmp_path):
    torch.save({k: v.to(dtype) for k, v in state_dict.items()}, tmp_path / 'a.pth')  # even BN's counters
    model = read_checkpoint(tmp_path / 'a.pth', NAME).model
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32, torch.int64}


# -- arguments of the model

@pytest.mark.parametrize('kwargs, message', [
    (dict(global_pool='foo'), "global_pool must be one of '', 'avg', .*, got 'foo'"),
    (dict(drop_rate=5), 'drop_rate must be a number of at least 0 and less than 1, got 5'),
    (dict(mlp_ratio=float('nan')), 'mlp_ratio must be a finite number'),
    (dict(time_steps='four'), "time_steps must be an integer of at least 1, got 'four'"),
    (dict(num_classes=3), 'num_classes=3 cannot be set: it is read from the weights'),
    (dict(in_chans=5), 'in_chans=5 cannot be set: it is read from the weights'),
    (dict(depth=None), 'cannot be created with depth=None. Omit depth to use its default'),
    *((dict([(key, 'x')]), f"{NAME} cannot be created with {key}='x'. The arguments are img_size") for key in (
        'checkpoint_path', 'device', 'dtype', 'name', 'model_name', 'path', 'ema', 'state_dict', 'pretrained',
        'pretrained_cfg', 'features_only', 'scriptable', 'cache_dir', 'self', 'tau')),
])
def test_bad_model_kwargs(kwargs, message, state_dict, tmp_path):
    torch.save(state_dict, tmp_path / 'a.pth')
    refuse(tmp_path / 'a.pth', tmp_path, message, kwargs)
    args = ['--model', NAME, '--output', tmp_path / 'out', '--model-kwargs', *(f'{k}={v}' for k, v in kwargs.items())]
    for command in (['publish', '--repo', 'a/b', '--license', 'mit', '--dry-run'], ['convert']):
        with pytest.raises(SystemExit, match='^error: '):
            run(*command, tmp_path / 'a.pth', *args)


def test_duplicate_model_kwargs(state_dict, tmp_path):
    torch.save(state_dict, tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match='error: --model-kwargs: depth occurs twice'):
        run('convert', tmp_path / 'a.pth', '--model', NAME, '--output', tmp_path / 'out', '--model-kwargs', 'depth=2',
            'depth=3')


@pytest.mark.parametrize('args, message', [
    (dict(gp='foo'), "global_pool must be one of .*, got 'foo'"),
    (dict(model_kwargs=dict(drop_rate=5)), 'drop_rate must be a number'),
    (dict(model_kwargs=dict(checkpoint_path='/etc/passwd')), 'cannot be created with checkpoint_path='),
    (dict(model_kwargs={1: 2}), 'cannot be created with 1=2'),
    (dict(img_size=10 ** 7), 'expects images of 10000000 x 10000000 pixels and 4 time steps, for which a layer'),
    (dict(model_kwargs=dict(time_steps=10 ** 9)), 'and 1000000000 time steps, for .* Choose a smaller img_size'),
    (dict(model_kwargs=dict(img_size=[16, 16 * 10 ** 7]), img_size=[3, 16, 16 * 10 ** 7]), 'data config|for which'),
    (dict(model_kwargs=dict(depth=10 ** 8)), 'describes a model of at least .* weights by .*depth.*, but there are'),
    (dict(model_kwargs=dict(embed_dim=8 * 10 ** 6)), 'describes a model of at least .* weights'),
    (dict(model_kwargs=dict(mlp_ratio=1e300, depth=1)), 'describes a model of at least .* weights'),
    (dict(model_kwargs=dict(depth=10 ** 400)), 'describes a model of at least .* weights'),
])
def test_bad_arguments_in_checkpoint(args, message, state_dict, tmp_path):
    torch.save(
        {'state_dict': state_dict, 'args': argparse.Namespace(**{'model': NAME, **args})}, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / 'a.pth')


def test_num_classes_and_in_chans_in_training_arguments(state_dict, tmp_path):
    args = argparse.Namespace(model=NAME, model_kwargs=dict(num_classes=10, in_chans=3, depth=2, drop_rate=None))
    torch.save({'state_dict': state_dict, 'args': args}, tmp_path / 'a.pth')
    assert read_checkpoint(tmp_path / 'a.pth').model.num_classes == 10


def test_batch_size_is_reduced_for_large_images(small):
    checkpoint = checkpoint_from_model(small)
    assert checkpoint.limit_batch_size(8) == 8 and checkpoint.limit_batch_size(64) == 64
    checkpoint.data_config['input_size'] = (3, 6400, 6400)
    assert checkpoint.limit_batch_size(8) == 1


@pytest.mark.parametrize('stem', ['scs', 'sps'])
def test_largest_activation_of_the_stem(stem):
    model = timm.create_model(NAME, stem=stem, stem_strides=[2, 1, 1, 2], patch_size=4, time_steps=3).eval()
    sizes = []
    for layer in model.stem.modules():
        layer.register_forward_hook(lambda m, args, out: sizes.append(out.numel()))
    with use_kernels('plain'), torch.no_grad():
        model.stem(torch.rand(1, 1, 3, 64, 64), 3)
    assert checkpoint_from_model(model).activation_size == max(sizes)


# -- folders

def save_folder(kind, model, tmp_path, **config):
    folder = tmp_path / kind
    if kind == 'timm':
        save_for_hf(model, str(folder), safe_serialization=True)
    else:
        publish(model, 'a/b', 'mit', output=folder, dry_run=True)
    path = folder / 'config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def assert_an_error(folder, message=''):
    """Check that `profile` and `publish` exit with an error of one line."""
    for args in (['profile', f'local-dir:{folder}', '--images', 1, '--output', folder.parent / 'out'],
                 ['publish', folder, '--repo', 'a/b', '--license', 'mit', '--dry-run', '--output',
                  folder.parent / 'out']):
        with pytest.raises(SystemExit, match=f'^error: .*{message}'):
            run(*args)
    assert not (folder.parent / 'out').exists()


@pytest.mark.parametrize('text, message', [
    ('[]', 'contains a list, expected a JSON object'), ('null', 'contains a NoneType, expected a JSON object'),
    ('{}', 'contains a model, expected a Spikformer'), ('{"architecture": ["x"]}', 'expected a Spikformer'),
    ('{"model_type": "spikformer"}', ''), (f'{{"architecture": "{NAME}"}}', ''), ('{', 'is not JSON'),
])
def test_invalid_config_json(text, message, small, tmp_path):
    folder = save_folder('timm', small, tmp_path)
    (folder / 'config.json').write_text(text)
    assert_an_error(folder, message)


@pytest.mark.parametrize('kind', ['timm', 'transformers'])
@pytest.mark.parametrize('change', [
    dict(label_names=5), dict(label_names='abcdefghij'), dict(label_names=['a']), dict(model_args=5),
    dict(pretrained_cfg='x'), dict(pretrained_cfg=5), dict(architecture='resnet18'), dict(architecture=5),
    dict(architectures=5, hidden_size='x'), dict(num_classes='x'), dict(id2label=5), dict(id2label={'a': 3}),
    dict(model_args=dict(depth=10 ** 8), num_hidden_layers=10 ** 8),
    dict(model_args=dict(embed_dim=8 * 10 ** 6), hidden_size=8 * 10 ** 6),
    dict(model_args=dict(time_steps=10 ** 9), time_steps=10 ** 9),
    dict(time_steps='four', model_args=dict(time_steps='four')),
], ids=str)
def test_config_with_invalid_values(kind, change, small, tmp_path):
    """Keys of the other library are ignored."""
    folder = save_folder(kind, small, tmp_path, **change)
    ignored = {'timm': {'id2label'}, 'transformers': {'label_names', 'model_args', 'num_classes'}}[kind]
    if set(change) <= ignored:
        assert read_checkpoint(folder).labels is None
    else:
        assert_an_error(folder)


@pytest.mark.parametrize('change, message', [
    (dict(num_attention_heads=0), 'hidden_size must be divisible by num_attention_heads, .* num_attention_heads=0'),
    (dict(hidden_size='x'), "Validation error for field 'hidden_size': .*x"),
])
def test_error_names_invalid_field_of_transformers_config(change, message, small, tmp_path):
    assert_an_error(save_folder('transformers', small, tmp_path, **change), message)


def test_config_with_checkpoint_path_raises(small, state_dict, tmp_path):
    torch.save(state_dict, tmp_path / 'a.pth')
    folder = save_folder('timm', small, tmp_path, model_args=dict(checkpoint_path=str(tmp_path / 'a.pth')))
    assert_an_error(folder, 'contains an unknown model argument, checkpoint_path')


@pytest.mark.parametrize('kind', ['timm', 'transformers'])
@pytest.mark.parametrize('change', [
    dict(mean='x'), dict(mean=5), dict(std=[0, 0, 0]), dict(input_size=[3, 'a', 1]), dict(input_size=5),
    dict(input_size=[3, 64.5, 64]), dict(interpolation='foo'), dict(interpolation=5), dict(crop_pct='x'),
    dict(crop_mode='middle'), dict(crop_mode=5),
], ids=str)
def test_data_config_with_invalid_values(kind, change, small, tmp_path):
    folder = save_folder(kind, small, tmp_path)
    cfg = json.loads((folder / 'config.json').read_text())['pretrained_cfg']
    save_folder(kind, small, tmp_path / 'b', pretrained_cfg={**cfg, **change})
    (tmp_path / 'b' / kind / 'preprocessor_config.json').unlink(missing_ok=True)
    if kind == 'transformers' and 'input_size' in change:  # transformers uses image_size
        assert read_checkpoint(tmp_path / 'b' / kind).data_config['input_size'] == [3, 64, 64]
    else:
        assert_an_error(tmp_path / 'b' / kind)


@pytest.mark.parametrize('index', ['{}', '[]', '{"weight_map": 5}', '{"weight_map": {"a": 5}}',
                                   '{"weight_map": {"a": "x.bin"}}', '{"weight_map": {"a": "no.safetensors"}}'])
def test_invalid_index_of_shards(index, small, tmp_path):
    folder = save_folder('transformers', small, tmp_path)
    (folder / 'model.safetensors').unlink()
    (folder / 'model.safetensors.index.json').write_text(index)
    assert_an_error(folder)


def test_sharded_weights(small, tmp_path):
    folder = save_folder('transformers', small, tmp_path)
    tensors = load_file(folder / 'model.safetensors')
    names = sorted(tensors)
    parts = {'a.safetensors': names[:50], 'b.safetensors': names[50:]}
    (folder / 'model.safetensors').unlink()
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata=dict(format='pt'))
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(
        metadata={}, weight_map={name: file for file, part in parts.items() for name in part})))
    state_dict = read_checkpoint(folder).model.state_dict()
    assert all(torch.equal(state_dict[name], value) for name, value in tensors.items())


def test_invalid_trainer_state_is_named(small, tmp_path):
    folder = save_folder('timm', small, tmp_path)
    state = dict(global_step=5, num_train_epochs=1, log_history=[])
    for name, content in (('checkpoint-1', state), ('checkpoint-2', {**state, 'global_step': 'x'})):
        (folder / name).mkdir()
        (folder / name / 'trainer_state.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match='checkpoint-2/trainer_state.json is not a valid Trainer state: .* Remove it'):
        read_checkpoint(folder)
    (folder / 'checkpoint-2' / 'trainer_state.json').unlink()
    assert read_checkpoint(folder).training.args == dict(epochs=1, steps=5)
    (folder / 'trainer_state.json').mkdir()
    with pytest.raises(ValueError, match='trainer_state.json cannot be read: Is a directory'):
        read_checkpoint(folder)


def test_crop_mode_of_folder(small, tmp_path):
    folder = save_folder('timm', small, tmp_path)
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg']['crop_mode'] = 'border'
    (folder / 'config.json').write_text(json.dumps(config))
    checkpoint = read_checkpoint(folder)
    with pytest.raises(ValueError, match="no image processor .* crop_mode='border'"):
        publish(checkpoint, 'a/b', 'mit', output=tmp_path / 'out', dry_run=True)
    with pytest.raises(ValueError, match="no image processor .* crop_mode='border'"):
        publishing.save_folder(checkpoint, tmp_path / 'out')
    config['pretrained_cfg']['crop_mode'] = 'squash'
    (folder / 'config.json').write_text(json.dumps(config))
    checkpoint = read_checkpoint(folder)
    assert checkpoint.data_config['crop_mode'] == 'squash'
    publish(checkpoint, 'a/b', 'mit', output=tmp_path / 'out', dry_run=True)
    assert read_checkpoint(tmp_path / 'out').data_config['crop_mode'] == 'squash'
    create_processor({**checkpoint.data_config, 'crop_mode': 'center'}, 4).save_pretrained(folder)
    with pytest.raises(ValueError, match="contains crop_mode='squash', but .*preprocessor_config.json does not"):
        read_checkpoint(folder)


# -- models in memory

def test_name_of_model_without_architecture(small):
    model = Spikformer(img_size=32, embed_dim=16, depth=1, num_heads=2)
    assert checkpoint_from_model(model).name is None and checkpoint_from_model(small).name == f'{NAME}.untrained'


def test_labels_of_wrapped_model():
    config = SpikformerConfig.from_timm(NAME, num_labels=2, id2label={0: 'x', 1: 'y'})
    model = SpikformerForImageClassification(config)
    for wrapped in (model, ModelEmaV3(model), torch.compile(model), ModelEmaV3(torch.compile(model))):
        assert checkpoint_from_model(wrapped).labels == ['x', 'y']
    model.config.id2label = {0: 'x', 1: 'x'}
    with pytest.raises(ValueError, match="The list of labels has the same name for class 0 and class 1, 'x'"):
        checkpoint_from_model(model)


# -- labels

def test_labels_as_dictionary(small, tmp_path):
    """label_names in timm's config.json may be a dictionary; `profile` and `publish` read it in the same way."""
    labels = {str(i): f'class {i}' for i in reversed(range(10))}
    folder = save_folder('timm', small, tmp_path, label_names=labels)
    assert read_checkpoint(folder).labels == [f'class {i}' for i in range(10)]
    run('profile', f'local-dir:{folder}', '--images', 2, '--output', tmp_path / 'out')


def test_default_labels_of_transformers(state_dict, tmp_path):
    """transformers names unnamed classes LABEL_0, LABEL_1, ...; in another order, these are read as names."""
    torch.save(state_dict, tmp_path / 'a.pth')
    labels = [f'LABEL_{i}' for i in range(10)]
    for given, expected in ((labels, None), (labels[::-1], labels[::-1])):
        publish(tmp_path / 'a.pth', 'a/b', 'mit', NAME, labels=given, output=tmp_path / 'out', dry_run=True)
        assert read_checkpoint(tmp_path / 'out').labels == expected


SHIPPED = 'spikformer_v2_2_64_patch4_32'


@pytest.mark.parametrize('has_args', [True, False])
def test_data_config_is_that_of_the_tag(has_args, tmp_path):
    """train.py does not store the data config of the model in its checkpoints."""
    name = f'{SHIPPED}.cifar10'
    content = dict(arch=name, state_dict=timm.create_model(name).state_dict())
    torch.save({**content, 'args': argparse.Namespace(model=name)} if has_args else content, tmp_path / 'x.pth.tar')
    checkpoint = read_checkpoint(tmp_path / 'x.pth.tar', None if has_args else name)
    assert checkpoint.data_config['input_size'] == (3, 32, 32) and checkpoint.data_config['mean'][0] == 0.4914
    assert checkpoint.name == name
    with pytest.raises(ValueError, match=f"There are no weights named '{SHIPPED}.x', expected {SHIPPED} or one of"):
        read_checkpoint(tmp_path / 'x.pth.tar', f'{SHIPPED}.x')


@pytest.mark.parametrize('args, expected', [
    (dict(model=f'{SHIPPED}.fashion_mnist_t4', pretrained=True), 4),
    (dict(model=f'{SHIPPED}.fashion_mnist_t4'), 4),
    (dict(model=SHIPPED, pretrained=True), 1),
    (dict(model='spikformer_v2_2_128_patch4_32', pretrained=True), 6),
    (dict(model='spikformer_v2_2_128_patch4_32'), 4),
    (dict(model=f'{SHIPPED}.fashion_mnist_t4', pretrained=True, model_kwargs=dict(time_steps=2)), 2),
    (dict(model=f'{SHIPPED}.cifar10', pretrained=True), None),
    (dict(model=SHIPPED, pretrained=True, pretrained_path='weights.pth'), None),
    (dict(model='hf-hub:a/b'), None),
    (dict(model=f'{SHIPPED}.unknown'), None),
    (dict(model='authors_spikformer', time_step=8), 1),
], ids=str)
def test_time_steps_of_fine_tuned_weights(args, expected, tmp_path):
    """train.py stores only its arguments; the number of time steps is that of the weights that it started from."""
    name = 'spikformer_v2_2_128_patch4_32' if '128' in args['model'] else SHIPPED
    content = dict(state_dict=timm.create_model(name).state_dict(), args=argparse.Namespace(**args))
    torch.save(content, tmp_path / 'x.pth.tar')
    for override in (name, f'{name}.{timm.get_pretrained_cfg(name).tag}'):
        if expected is None:
            with pytest.raises(ValueError, match='does not contain the number of time steps, .* Specify it'):
                read_checkpoint(tmp_path / 'x.pth.tar', override)
        else:
            assert read_checkpoint(tmp_path / 'x.pth.tar', override).encoder.time_steps == expected
    kwargs = dict(time_steps=3)
    assert read_checkpoint(tmp_path / 'x.pth.tar', name, model_kwargs=kwargs).encoder.time_steps == 3


def test_profile_with_unknown_time_steps_of_training(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(model='hf-hub:a/b', pretrained=True)
    state_dict = timm.create_model(SHIPPED, pretrained=True).state_dict()
    torch.save(dict(state_dict=state_dict, args=args), 'x.pth.tar')
    command = ['profile', SHIPPED, '--checkpoint', 'x.pth.tar', '--images', '2']
    with pytest.raises(SystemExit, match='or --time-steps T for `timm-spikformer profile`'):
        cli.main(command)
    cli.main([*command, '--time-steps', '3'])
    assert 'T = 3' in capsys.readouterr().out


@pytest.mark.parametrize('has_args', [True, False])
def test_size_of_images_in_model_kwargs(has_args, tmp_path):
    content = dict(state_dict=timm.create_model(SHIPPED).state_dict())
    if has_args:
        content['args'] = argparse.Namespace(model=SHIPPED, img_size=28)
    torch.save(content, tmp_path / 'x.pth.tar')
    for kwargs, size in (None, 28), (dict(img_size=32), 32):
        checkpoint = read_checkpoint(tmp_path / 'x.pth.tar', SHIPPED, model_kwargs=kwargs)
        assert checkpoint.data_config['input_size'] == (3, size, size)
        assert get_model_input_config(checkpoint.model)['input_size'] == (3, size, size)


def test_masked_autoencoder_in_a_file(tmp_path):
    """It is read with its decoder, whose arguments are in the metadata of the file."""
    name = f'{SHIPPED}.mae_fashion_mnist'
    file = timm.get_pretrained_cfg(name).file
    expected = SpikformerMAE.from_pretrained(name)
    mae = read_checkpoint(file, SHIPPED).model
    assert mae.state_dict().keys() == expected.state_dict().keys() and mae.mask_ratio == expected.mask_ratio
    assert all(torch.equal(value, mae.state_dict()[key]) for key, value in expected.state_dict().items())
    save_file(load_file(file), tmp_path / 'x.safetensors')
    with pytest.raises(ValueError, match='contains a masked autoencoder, but not the arguments of its decoder. If'):
        read_checkpoint(tmp_path / 'x.safetensors', SHIPPED)
    for args in ('{"decoder_depth": 1}', '[1]', '{'):
        save_file(load_file(file), tmp_path / 'x.safetensors', {'autoencoder': args})
        with pytest.raises(ValueError, match='x.safetensors does not fit autoencoder='):
            read_checkpoint(tmp_path / 'x.safetensors', SHIPPED)
    save_file(load_file(file), tmp_path / 'x.safetensors', {'autoencoder': '{"decoder_embed_dim": 1048576}'})
    with pytest.raises(ValueError, match='describes a model of at least .*embed_dim'):  # before allocating memory
        read_checkpoint(tmp_path / 'x.safetensors', SHIPPED)


def test_time_steps_of_weights_in_the_package(tmp_path):
    """The metadata of the file contains the number of time steps of the training."""
    file = timm.get_pretrained_cfg(f'{SHIPPED}.fashion_mnist_t4').file
    assert read_checkpoint(file, SHIPPED).encoder.time_steps == 4
    assert read_checkpoint(file, SHIPPED, model_kwargs=dict(time_steps=2)).encoder.time_steps == 2
    overlay = dict(file=str(shutil.copy(file, tmp_path / 'x.safetensors')))
    assert timm.create_model(SHIPPED, pretrained=True, pretrained_cfg_overlay=overlay).time_steps == 4
    save_file(load_file(file), tmp_path / 'y.safetensors', {'model_args': '[1]'})
    with pytest.raises(ValueError, match=r"y.safetensors contains model_args='\[1\]' in its metadata, expected a JSON"):
        read_checkpoint(tmp_path / 'y.safetensors', SHIPPED)
