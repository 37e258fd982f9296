"""Datasets of event sequences: items, loaders, names, and the functions that timm's scripts import."""
import pickle

import event_files
import numpy as np
import pytest
import timm.data
import torch

from timm_spikformer.event_data import names
from timm_spikformer.event_data.dataset import EventSequences, collate, create_loader
from timm_spikformer.event_data.frames import integrate
from timm_spikformer.event_data.names import EventName, parse_name, read_event_splits
from timm_spikformer.event_data.readers import read_recordings
from timm_spikformer.event_data.simulated import simulate_events
from timm_spikformer.images import make_loader, read_splits

CONFIG = dict(input_size=(2, 28, 28), mean=(0., 0.), std=(1., 1.), interpolation='bilinear', crop_pct=1.)
pytestmark = pytest.mark.filterwarnings('ignore:.*recordings of .*:UserWarning')


@pytest.fixture
def simulated() -> EventSequences:
    splits = read_event_splits('events/simulated_fashion_mnist?time_steps=3&split_by=time')
    return splits['test'].sample_stratified(40, 0)


@pytest.fixture
def n_mnist(tmp_path):
    event_files.write_n_mnist(tmp_path / 'data')
    return tmp_path / 'data'


def test_simulated_items(simulated):
    images = read_splits()['test']
    every = read_event_splits('events/simulated_fashion_mnist?time_steps=3&split_by=time')['test']
    for i in (0, 7):
        frames, label = every[i]
        image, expected_label = images[i]
        events = simulate_events(np.asarray(image.convert('L'), dtype=np.float32) / 255)
        assert np.array_equal(frames, integrate(events, 3, (28, 28), 'time')) and label == expected_label
        assert frames.dtype == torch.float32 and frames.sum() == len(events.t) > 100
        assert torch.equal(frames, every[i][0])
    assert 'simulated' in every.description and every.filename(7) == images.filename(7)


def test_recorded_items(n_mnist):
    splits = read_event_splits('events/n_mnist?time_steps=4', n_mnist)
    recordings = read_recordings('n_mnist', n_mnist)
    for split, sequences in splits.items():
        assert len(sequences) == len(recordings[split])
        for i, (frames, label) in enumerate(sequences):
            assert np.array_equal(frames, integrate(recordings[split].read(i), 4, (34, 34)))
            assert label == recordings[split].labels[i] and frames.sum() == 50
    assert splits['train'].classes == [str(i) for i in range(10)]


def test_a_copy_for_another_process_does_not_hold_the_frames(n_mnist):
    sequences = read_event_splits('events/n_mnist?time_steps=4', n_mnist)['train']
    data = pickle.dumps(sequences)
    assert len(data) < sequences.source.frames(0).nbytes
    assert torch.equal(pickle.loads(data)[3][0], sequences[3][0])


def test_fingerprint_depends_on_what_determines_the_frames(n_mnist):
    def fingerprint(name, folder=None):
        return read_event_splits(name, folder)['train'].fingerprint()
    names_and_folders = [
        ('events/simulated_fashion_mnist', None), ('events/simulated_fashion_mnist?time_steps=4', None),
        ('events/simulated_fashion_mnist?split_by=time', None), ('events/n_mnist', n_mnist),
        ('events/n_mnist?time_steps=4', n_mnist)]
    values = [fingerprint(*args) for args in names_and_folders]
    assert len(set(values)) == len(values) and values == [fingerprint(*args) for args in names_and_folders]
    sequences = read_event_splits('events/n_mnist', n_mnist)['train']
    assert sequences.select([0, 1]).fingerprint() != sequences.select([1, 0]).fingerprint()


def test_make_loader(simulated):
    batches = list(make_loader(simulated, CONFIG, 16))
    assert [len(x) for x, _ in batches] == [16, 16, 8]
    x = torch.cat([x for x, _ in batches])
    assert torch.equal(x, torch.stack([frames for frames, _ in simulated]))
    assert torch.cat([y for _, y in batches]).tolist() == simulated.labels.tolist()
    config = dict(CONFIG, input_size=(2, 32, 32), mean=(0.5, 0.25), std=(2., 4.))
    x, _ = next(iter(make_loader(simulated, config, 16)))
    assert x.shape == (16, 3, 2, 32, 32)
    empty = simulated[0][0].new_zeros(()) - torch.tensor([0.5, 0.25])
    assert x[..., 0, 0].amin((0, 1)).tolist() == pytest.approx((empty / torch.tensor([2., 4.])).tolist(), abs=0.2)


def test_training_loader_augments(simulated):
    torch.manual_seed(0)
    loader = make_loader(simulated, CONFIG, 16, augment=True, hflip=1.)
    x, y = next(iter(loader))
    flipped = {frames.flip(-1).numpy().tobytes(): label for frames, label in simulated}
    assert [flipped[frames.numpy().tobytes()] for frames in x] == y.tolist()
    simulated.roll = 3
    x, _ = next(iter(make_loader(simulated, CONFIG, 40, augment=True, hflip=0.)))
    originals = {frames.numpy().tobytes() for frames, _ in simulated}
    assert sum(frames.numpy().tobytes() in originals for frames in x) < 10
    assert simulated.select([0]).roll == 3


@pytest.mark.parametrize('kwargs, message', [
    (dict(use_prefetcher=True, is_training=True), 'no-prefetcher'),
    (dict(std=(1., 0.)), 'std must be greater than 0'),
    (dict(auto_augment='rand-m9'), "auto_augment='rand-m9' applies only to images"),
    (dict(num_aug_splits=3), 'num_aug_splits=3 applies only to images'),
    (dict(input_size=(3, 28, 28)), 'Event frames have 2 channels'),
    (dict(mean=(0.5, 0.5, 0.5)), 'mean must have one value per polarity'),
])
def test_loader_refuses_what_sequences_do_not_support(simulated, kwargs, message):
    arguments = {**CONFIG, 'batch_size': 4, 'use_prefetcher': False, **kwargs}
    with pytest.raises(ValueError, match=message):
        create_loader(simulated, **arguments)


def test_collate_refuses_different_numbers_of_steps():
    with pytest.raises(ValueError, match='same shape'):
        collate([(torch.zeros(4, 2, 8, 8), 0), (torch.zeros(5, 2, 8, 8), 0)])


@pytest.mark.parametrize('name, message', [
    ('events/nmnist', "There is no event dataset 'nmnist', expected one of cifar10_dvs"),
    ('events/', "There is no event dataset ''"),
    ('events/n_mnist?T=4', "unknown option 'T'. Expected time_steps"),
    ('events/n_mnist?time_steps=', 'time_steps must be an integer'),
    ('events/n_mnist?time_steps=0', 'time_steps must be an integer'),
    ('events/n_mnist?time_steps=-1', 'time_steps must be an integer'),
    ('events/n_mnist?split_by=frames', "split_by must be 'number' or 'time'"),
    ('events/n_mnist?roll=a', 'roll must be an integer'),
    ('events/n_mnist?16', "unknown option '16'"),
    ('events/n_mnist?time_steps=4&time_steps=8', 'given twice'),
    ('events/n_mnist?time_steps=99999999999', 'at most 10000'),
])
def test_invalid_names(name, message):
    with pytest.raises(ValueError, match=message):
        parse_name(name)


def test_parse_name():
    assert parse_name('events/n_mnist') == EventName('n_mnist')
    name = 'events/cifar10_dvs?time_steps=10&split_by=time&split=tebn&roll=5'
    assert parse_name(name) == EventName('cifar10_dvs', 10, 'time', 'tebn', 5)


def test_simulated_events_have_no_other_split():
    with pytest.raises(ValueError, match='without an official split'):
        read_event_splits('events/simulated_fashion_mnist?split=tebn')


def test_a_folder_is_required():
    with pytest.raises(ValueError, match='requires the folder of the dataset'):
        read_event_splits('events/n_mnist')


@pytest.fixture
def installed(monkeypatch):
    for name in ('create_dataset', 'create_loader', 'Mixup'):
        monkeypatch.setattr(timm.data, name, getattr(timm.data, name))
    names.install()


def test_functions_of_timm(installed, n_mnist, tmp_path):
    """The functions that train.py imports create event datasets by name, and other datasets as before."""
    dataset = timm.data.create_dataset(
        'events/n_mnist?time_steps=4&roll=2', root=n_mnist, split='train', is_training=True, class_map='', seed=1)
    assert isinstance(dataset, EventSequences) and dataset.roll == 2 and dataset.split == 'train'
    loader = timm.data.create_loader(
        dataset, input_size=(2, 34, 34), batch_size=4, is_training=True, use_prefetcher=False, mean=(0., 0.),
        std=(1., 1.), num_workers=0, scale=(0.08, 1.), ratio=(0.75, 1.33), color_jitter=0.4)
    x, y = next(iter(loader))
    assert x.shape == (4, 4, 2, 34, 34) and y.shape == (4,)
    assert timm.data.create_dataset('events/n_mnist', n_mnist, 'validation').split == 'test'
    with pytest.raises(ValueError, match='class_map is for image folders'):
        timm.data.create_dataset('events/n_mnist', n_mnist, 'test', class_map='classes.txt')
    loader = timm.data.create_loader(dataset, (2, 34, 34), 4, mean=(0., 0.), std=(1., 1.), device='cpu', num_workers=0)
    assert len(loader) == 5 and next(iter(loader))[0].shape == (4, 4, 2, 34, 34)  # as inference.py
    assert len(loader.dataset.filenames(basename=True)) == 20
    with pytest.raises(ValueError, match="has no split 'dev'"):
        timm.data.create_dataset('events/n_mnist', n_mnist, 'dev')
    for split in ('train', 'validation'):
        (tmp_path / 'splits' / split / 'a').mkdir(parents=True)
        read_splits()['test'][0][0].save(tmp_path / 'splits' / split / 'a' / '1.png')
    simulated = timm.data.create_dataset('events/simulated_fashion_mnist', str(tmp_path / 'splits'), 'validation')
    assert simulated.split == 'validation' and len(simulated) == 1

    for i in range(2):
        (tmp_path / 'images' / f'class{i}').mkdir(parents=True)
        image, _ = read_splits()['test'][i]
        image.save(tmp_path / 'images' / f'class{i}' / 'image.png')
    images = timm.data.create_dataset('', root=str(tmp_path / 'images'), split='train')
    x, _ = next(iter(timm.data.create_loader(images, (3, 28, 28), 2, use_prefetcher=False, num_workers=0)))
    assert type(images) is timm.data.ImageDataset and x.shape == (2, 3, 28, 28)


def test_replaced_files_are_read_again(n_mnist):
    """The cache does not outlive a recording that was replaced, also by one of the same size."""
    first = read_event_splits('events/n_mnist?time_steps=4', n_mnist)['train']
    path = first.source.recordings.paths[0]
    with np.load(path) as arrays:
        events = {name: arrays[name] for name in arrays.files}
    np.savez(path, **{**events, 'x': 33 - events['x']})
    again = read_event_splits('events/n_mnist?time_steps=4', n_mnist)['train']
    assert torch.equal(again[0][0], first[0][0].flip(-1)) and not torch.equal(again[0][0], first[0][0])


def test_originals_that_changed_after_their_conversion(n_mnist):
    read_event_splits('events/n_mnist', n_mnist)
    original = next((n_mnist / 'Train' / '3').glob('*.bin'))
    original.write_bytes(original.read_bytes()[:-5])
    with pytest.raises(ValueError, match='have changed since their conversion.*Delete'):
        read_event_splits('events/n_mnist', n_mnist)
