"""Runs of the study: training, resuming and measuring."""
import io
import json
import shutil

import datasets
import pytest
import timm
import torch
from conftest import calibrate
from PIL import ImageOps
from small_study import pretend, without_times

from reproduction import experiment, models
from reproduction.data import Data
from reproduction.experiment import Study
from reproduction.protocol import Run, read_protocol
from reproduction.report import FOLDER
from timm_spikformer import training
from timm_spikformer.event_data.names import read_event_splits
from timm_spikformer.folders import lock_folder_for_run
from timm_spikformer.images import make_loader, read_splits, training_data_config
from timm_spikformer.profiling import profile


def test_tries_do_not_use_test_images_and_share_weights_with_final_runs(study, monkeypatch):
    run = study.tries(study.protocol.cells['scratch'])[0]
    read = Study.read_data
    monkeypatch.setattr(Study, 'read_data', lambda self, run: read(self, run)._replace(test=None))
    result = study.execute(run)
    assert 'test' not in result and 0 < result['validation']['accuracy'] < 100 and len(result['history']) == 3
    monkeypatch.undo()
    monkeypatch.setattr(experiment.Study, 'tries', lambda self, cell: [run])
    monkeypatch.setattr(training, 'save_checkpoint', lambda *args, **kwargs: pytest.fail('trained again'))
    final = study.execute(Run(run.cell, 0, 0, True))
    assert final['validation'] == result['validation'] and final['training'] == result['training']
    assert 0 < final['test']['accuracy'] < 100 and min(final['firing_rates'].values()) > 0
    assert final['operations']['parameters'] == sum(
        p.numel() for p in timm.create_model(run.cell.model, num_classes=10, embed_dim=16).parameters())


@pytest.mark.parametrize('name, recipe', [
    ('mae', {}),
    ('tuned', dict(fixed_bn=0.5)),
    ('tuned', dict(num_workers=2, augmentation=dict(auto_augment='rand-m7-n1', scale=[0.5, 1.]))),
], ids=str)
def test_interrupted_run_gives_same_result(name, recipe, study, tmp_path, monkeypatch):
    """Interrupt each epoch except the last one, of the run and of its initial run."""
    cell = study.protocol.cells[name]
    cell.recipe.update(recipe)
    run = Run(cell, 0, 0, len(cell.tries) == 1)
    expected = study.execute(run)
    shutil.rmtree(study.checkpoints)
    study.result_path(run).unlink()
    save = training.save_checkpoint

    def save_and_stop(path, kind, **state):
        save(path, kind, **state)
        if state['epoch'] < 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, 'save_checkpoint', save_and_stop)
    for _ in range(2 if name == 'mae' else 4):
        with pytest.raises(KeyboardInterrupt):
            study.execute(run)
        assert not study.result_path(run).exists()
    assert without_times(study.execute(run)) == without_times(expected)
    assert without_times(json.loads(study.result_path(run).read_text())) == without_times(expected)


def test_finished_weights_are_verified_and_can_be_read_by_several_runs(study):
    """`run --jobs 2` starts several tries at once, which load the same initial weights."""
    run = study.final_runs(study.protocol.cells['mae'])[0]
    data, path = study.read_data(run), study.checkpoint_folder(run) / 'last.pth.tar'
    expected = study.train(run, data).model.state_dict()
    with lock_folder_for_run(path.parent):
        loaded = study.train(run, data).model.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items())
        (path.parent / 'finished').unlink()
        with pytest.raises(ValueError, match='Another run of timm-spikformer is writing'):
            study.train(run, data)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in a tensor
    path.write_bytes(content)
    with pytest.raises(ValueError, match='last.pth.tar has been changed since timm-spikformer wrote it'):
        study.train(run, data)


@pytest.mark.parametrize('change, message', [
    ({'labels': 6000}, 'tuned/try-0: labels is 6000, but there are 5,700 images'),
    ({'model_kwargs': {'x': 1}}, "cannot be created with {'x': 1}: .*unexpected keyword argument 'x'"),
    ({'model': 'vit_tiny_patch16_224', 'model_kwargs': {}, 'attention': 'softmax'}, 'is not a Spikformer, so'),
    ({'model': 'vit_tiny_patch16_224', 'model_kwargs': {}}, 'the weights of mae/seed-0 are those of another model'),
], ids=str)
def test_settings_that_do_not_fit(change, message, study, monkeypatch):
    """These errors are raised before training."""
    run = Run(study.protocol.cells['tuned']._replace(**change), 0, 0, False)
    weights = models.create(Run(study.protocol.cells['scratch'], 0, 0, False).config(), 10, 28).state_dict()
    monkeypatch.setattr(Study, '_weights', lambda self, run, data: weights)
    with pytest.raises(ValueError, match=message):
        study.train(run, study.read_data(run))
    assert not study.checkpoints.exists()


@pytest.mark.parametrize('attention', ['ssa', 'softmax', 'none'])
def test_operations_of_attention(attention):
    """The input of the projection after softmax attention is real-valued, so its products are multiply-accumulates."""
    cell = read_protocol().cells['ssa']._replace(attention=attention)
    model = models.create(Run(cell, 0, 0, True).config(), 10, 28)
    images = read_splits()['test'].sample_evenly(32)
    data = Data(images, images, images, training_data_config())
    calibrate(model, next(iter(make_loader(images, data.config, 32)))[0])
    operations = experiment._operations(model, data)
    C, tokens, depth = 64, 7 * 7, 2
    first_conv = operations['macs'] - (depth * tokens * C ** 2 if attention == 'softmax' else 0)
    head = C * 10
    assert operations['macs'] > 0 and 0 < operations['firing_rate'] < 1 and operations['silent_layers'] == []
    stem = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert first_conv == 28 * 28 * stem.weight.numel() + head


def test_part_of_a_dataset_raises(study):
    """The subset in the package has the file names and classes of the whole dataset."""
    with pytest.raises(ValueError, match='6,000 images of fashion_mnist, train split: the protocol requires 60,000'):
        study._replace(protocol=read_protocol()).read_data(Run(read_protocol().cells['ssa'], 0, 0, True))


def test_operations_of_non_spiking_networks():
    """The multiply-accumulates include the products of attention; each takes 4.6 pJ."""
    cell = read_protocol().cells['vit']
    model = models.create(Run(cell, 0, 0, True).config(), 10, 28).eval()
    images = read_splits()['test'].sample_evenly(2)
    operations = experiment._operations(model, Data(images, images, images, training_data_config()))
    C, depth, N = 104, 4, 7 * 7 + 1
    expected = 49 * C * 3 * 4 ** 2 + depth * (N * 12 * C ** 2 + 2 * N ** 2 * C) + C * 10
    assert operations['macs'] == operations['dense_macs'] == expected and operations['acs'] == 0
    assert operations['energy_uj'] == pytest.approx(4.6e-6 * expected)


def test_operations_of_autoencoder():
    """The encoder processes 12 of the 49 patches, and the decoder all of them."""
    cell = read_protocol().cells['mae-2']
    model = models.create_autoencoder(models.create(Run(cell, 0, 0, True).config(), 10, 28))
    images = read_splits()['test'].sample_evenly(32)
    data = Data(images, images, images, training_data_config())
    calibrate(model, next(iter(make_loader(images, data.config, 32)))[0])
    operations = experiment._operations(model, data)
    C, N, visible, pixels = 64, 49, 12, 3 * 4 ** 2
    decoder = visible * C * C + 2 * (N * 12 * C ** 2 + 2 * N ** 2 * C) + N * C * pixels
    assert operations['total_macs'] == operations['dense_macs'] + decoder
    classifier = profile(calibrate(models.create(Run(cell, 0, 0, True).config(), 10, 28), torch.rand(8, 3, 28, 28)), [
        torch.rand(1, 3, 28, 28)]).totals
    assert operations['dense_macs'] == pytest.approx(classifier.dense_macs * visible / N, rel=0.02)
    committed = json.loads((FOLDER / 'runs' / 'mae-2' / 'seed-0.json').read_text())['operations']
    assert {key: operations[key] for key in ('total_macs', 'dense_macs', 'parameters')} == {
        key: committed[key] for key in ('total_macs', 'dense_macs', 'parameters')}


def test_result_from_other_initial_weights_is_ignored(study):
    """A repeated try of the initial cell may change which of its tries is the best one."""
    cells = study.protocol.cells
    cells['tuned'] = cells['tuned']._replace(init='scratch')
    for run, accuracy in zip(study.tries(cells['scratch']), (70., 71.)):
        pretend(study, run, validation=dict(accuracy=accuracy))
    run = study.tries(cells['tuned'])[0]
    pretend(study, run)
    assert study.result(run) is not None
    pretend(study, study.tries(cells['scratch'])[0], validation=dict(accuracy=72.))
    assert study.result(run) is None
    study.result_path(study.tries(cells['scratch'])[0]).unlink()
    assert study.result(run) is None


@pytest.fixture
def change_images(study):
    """A function that applies a function to all rows of a split of the dataset of the study."""
    folder = study.data / 'fashion_mnist'
    originals = {path.stem: datasets.Dataset.from_parquet(str(path)) for path in folder.glob('*.parquet')}
    folder.unlink()
    folder.mkdir()

    def compress(row):
        stream = io.BytesIO()
        row['image'].save(stream, 'png', compress_level=1)
        return {**row, 'image': {'bytes': stream.getvalue()}}

    for name, rows in originals.items():
        rows.map(compress).to_parquet(folder / f'{name}.parquet')
    return lambda split, change: originals[split].map(change).to_parquet(folder / f'{split}.parquet')


def invert(row):
    return {**row, 'image': ImageOps.invert(row['image'])}


@pytest.mark.parametrize('split, change', [
    ('test', invert), ('train', lambda row: {**row, 'label': 0})], ids=['images', 'labels'])
def test_images_are_those_of_the_protocol(split, change, study, change_images):
    """Only the content of one split differs, not the number of images. Other compression is accepted."""
    run = study.final_runs(study.protocol.cells['mae'])[0]
    study.read_data(run)
    change_images(split, change)
    with pytest.raises(ValueError, match=f'{split} split: the images or labels are not .* sha256 is [0-9a-f]{{64}}'):
        study.read_data(run)


def test_images_with_other_content_are_rejected(study, change_images):
    """The protocol has the digest of the new images. `train` itself compares names, sizes and labels of images."""
    run = study.final_runs(study.protocol.cells['mae'])[0]
    data = study.read_data(run)
    study.train(run, data)
    study.train(run, data)  # the same images
    change_images('train', invert)
    digests = study.protocol.images['fashion_mnist']['sha256']
    digests['train'] = read_splits(study.data / 'fashion_mnist')['train'].digest()
    with pytest.raises(ValueError, match='has used other images. Remove this folder'):
        study.train(run, study.read_data(run))


def test_moved_checkpoint_starts_an_unfinished_training(study, monkeypatch):
    """Otherwise, two processes could train in one folder without a lock."""
    run = study.final_runs(study.protocol.cells['mae'])[0]
    data = study.read_data(run)
    study.train(run, data)
    (study.checkpoint_folder(run) / 'last.pth.tar').unlink()
    save = training.save_checkpoint

    def save_and_stop(path, kind, **state):
        save(path, kind, **state)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, 'save_checkpoint', save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        study.train(run, data)
    assert not study.has_weights(run)


@pytest.mark.parametrize('validation, message', [
    (4, '4 validation images are not the same share of each class; the nearest possible number is 10'),
    (5699, 'the nearest possible number is')])
def test_sizes_that_are_not_possible(validation, message, study):
    sizes = dict(train=6000 - validation, validation=validation, test=1000)
    with pytest.raises(ValueError, match=message):
        study._replace(protocol=study.protocol._replace(images={'fashion_mnist': sizes})).read_data(
            study.final_runs(study.protocol.cells['mae'])[0])


def test_classes_without_names(study):
    data = study.read_data(study.final_runs(study.protocol.cells['mae'])[0])
    data.train.classes = None
    assert data.num_classes == 10


@pytest.mark.slow
@pytest.mark.parametrize('name', read_protocol().cells)
def test_results_of_all_cells_can_be_computed(name):
    """Otherwise an error would appear only after the training."""
    cell = read_protocol().cells[name]
    splits, config = read_splits(), training_data_config()
    if cell.dataset == 'simulated_events':
        splits = read_event_splits('events/simulated_fashion_mnist?time_steps=4&split_by=time')
        config.update(input_size=(2, 28, 28), mean=(0., 0.), std=(1., 1.))
    images = splits['test'].sample_evenly(16)
    data = Data(images, images, images, config)
    run = Run(cell, 0, 0, True)
    model = models.create(run.config(), 10, 28)
    if cell.objective == 'reconstruct':
        model = models.create_autoencoder(model)
    model.train()(next(iter(make_loader(images, data.config, 16)))[0])
    operations = experiment._operations(model.eval(), data)
    assert operations['parameters'] > 0 and operations['dense_macs'] > 0 and operations['energy_uj'] > 0
