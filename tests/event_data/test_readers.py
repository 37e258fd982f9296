"""Reading of datasets in their original formats, splits and digests."""
import os
import shutil
import subprocess
import sys
import warnings

import event_files
import numpy as np
import pytest
from event_files import random_events, write_aedat2, write_aedat3
from spikingjelly.datasets import CIFAR10DVS, CIFAR10DVS_CLASS_NAMES, NMNIST, DVS128Gesture, NCaltech101
from spikingjelly.datasets.cifar10_dvs import CIFAR10DVSTEBNSplit
from spikingjelly.datasets.utils import split_to_train_test_set
from torchvision.datasets import DatasetFolder

from timm_spikformer.event_data.frames import Events
from timm_spikformer.event_data.readers import DATASETS, read_recordings, split_digest, warn_about_overlap

pytestmark = pytest.mark.filterwarnings('ignore:.* but the complete dataset has')
NAMES = [*DATASETS]


def same(events, expected):
    return all(np.array_equal(a, b) for a, b in zip(events, expected))


def test_cifar10_dvs(original):
    splits = read_recordings('cifar10_dvs', original('cifar10_dvs'))
    assert {split: len(part) for split, part in splits.items()} == {'train': 90, 'test': 10}
    train = splits['train']
    assert train.labels == sorted([*range(10)] * 9) and train.size == (128, 128) and train.classes[3] == 'cat'
    i = train.names().index('cat/cifar10_cat_10')
    assert same(train.read(i), random_events((128, 128), seed=3010))


def test_orientation_of_cifar10_dvs(original):
    """x is 127 minus bits 8 to 14 of the address, y is 127 minus bits 1 to 7, p is 1 minus bit 0."""
    folder = original('cifar10_dvs')
    pairs = np.array([[0, 5], [3 << 8 | 100 << 1 | 1, 6], [127 << 8, 7]], '>u4')
    (folder / 'cat' / 'cifar10_cat_0.aedat').write_bytes(b'#!AER-DAT2.0\r\n' + pairs.tobytes())
    train = read_recordings('cifar10_dvs', folder)['train']
    events = train.read(train.names().index('cat/cifar10_cat_0'))
    assert [a.tolist() for a in events] == [[5, 6, 7], [127, 124, 0], [127, 27, 127], [1, 0, 1]]


def test_dvs128_gesture(original):
    """Gestures are cut at the times of the labels file, and labels are the numbers of the classes."""
    splits = read_recordings('dvs128_gesture', original('dvs128_gesture'))
    for split, user in (('train', 1), ('test', 24)):
        recordings = splits[split]
        assert recordings.labels == [*range(11)] and len(recordings.classes) == 11
        for i in range(11):
            assert same(recordings.read(i), random_events((128, 128), seed=100 * user + i, start=1_000_000 * i))


def test_overflow_of_time_in_aedat3(original):
    """Bits 31 and above of the time are in the header of the packet."""
    folder = original('dvs128_gesture')
    path = folder / 'DvsGesture' / 'user01_lab.aedat'
    data = bytearray(path.read_bytes())
    labels = folder / 'DvsGesture' / 'user01_lab_labels.csv'
    labels.write_text(f'class,startTime_usec,endTime_usec\n1,0,500000\n2,{2 ** 31},{2 ** 31 + 500000}\n')
    first = random_events((128, 128), 3)
    write_aedat3(path, first)
    data = path.read_bytes()
    packet = bytearray(data[-28 - 3 * 8:])
    packet[12] = 1
    path.write_bytes(data + packet)
    train = read_recordings('dvs128_gesture', folder)['train']
    assert same(train.read(1), first._replace(t=first.t + 2 ** 31))


@pytest.mark.parametrize('name, counts, seeds', [
    ('n_mnist', (20, 20), (0, 1100)), ('n_caltech101', (27, 3), (100, 209))])
def test_atis(original, name, counts, seeds):
    splits = read_recordings(name, original(name))
    assert (len(splits['train']), len(splits['test'])) == counts
    for recordings, seed in zip(splits.values(), seeds):
        expected = random_events(DATASETS[name].size, seed=seed)
        assert sum(same(recordings.read(i), expected) for i in range(len(recordings))) == 1


def test_time_of_atis_has_23_bits(original):
    folder = original('n_mnist')
    events = Events(*np.array([[1, 2 ** 16 + 2, 2 ** 23 - 1], [33, 0, 5], [0, 33, 6], [1, 0, 1]]))
    path = next((folder / 'Train' / '0').iterdir())
    event_files.write_atis(path, events)
    train = read_recordings('n_mnist', folder)['train']
    assert same(train.read(train.names().index(f'0/{path.stem}')), events)


def test_classes():
    assert DATASETS['cifar10_dvs'].classes == CIFAR10DVS_CLASS_NAMES
    readers = dict(zip(NAMES, (CIFAR10DVS, DVS128Gesture, NMNIST, NCaltech101)))
    for name, reader in readers.items():
        assert DATASETS[name].size == reader.get_H_W()
        assert {*DATASETS[name].archives} <= {archive for archive, _, _ in reader.resource_url_md5()}


def test_import_is_fast():
    """spikingjelly's datasets are imported only for a conversion."""
    code = 'import sys; import timm_spikformer.event_data.readers; assert "spikingjelly.datasets" not in sys.modules'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_classes_of_n_caltech101_are_folders(original):
    recordings = read_recordings('n_caltech101', original('n_caltech101'))['test']
    assert recordings.classes == ('BACKGROUND_Google', 'accordion', 'yin_yang') and recordings.labels == [0, 1, 2]


@pytest.mark.parametrize('name, inner', [
    ('cifar10_dvs', ''), ('dvs128_gesture', 'DvsGesture'), ('n_mnist', ''), ('n_caltech101', 'Caltech101')])
def test_layouts(originals, tmp_path, name, inner):
    """The unpacked archives, the folder in the archive, and the root folder of spikingjelly are the same dataset."""
    for base in (tmp_path / 'a' / inner, tmp_path / 'b', tmp_path / 'c' / 'extract'):
        shutil.copytree(originals[name] / inner if base.name == inner else originals[name], base)
    folders = [tmp_path / 'a' / inner, tmp_path / 'b', tmp_path / 'c']
    digests = {tuple(map(split_digest, read_recordings(name, folder).values())) for folder in folders}
    assert len(digests) == 1
    shutil.rmtree(tmp_path / 'c' / 'extract')
    assert split_digest(read_recordings(name, tmp_path / 'c')['test']) in next(iter(digests))


@pytest.mark.parametrize('name', NAMES)
def test_spikingjelly_reads_the_result(original, name):
    folder = original(name)
    recordings = read_recordings(name, folder)['test']
    reader = {'dvs128_gesture': DVS128Gesture, 'n_mnist': NMNIST}.get(name)
    dataset = reader(folder, train=False) if reader else {'cifar10_dvs': CIFAR10DVS}.get(name, NCaltech101)(folder)
    files = [path for path, _ in dataset.samples]
    for i, path in enumerate(recordings.paths):
        assert same(recordings.read(i), [dataset[files.index(str(path))][0][key] for key in 'txyp'])


def test_other_files_are_ignored(original):
    folder = original('n_mnist')
    (folder / '__MACOSX' / 'Train').mkdir(parents=True)
    for junk in ('.DS_Store', 'Train/.DS_Store', 'Train/0/.DS_Store', 'Train/0/._00001.bin', '__MACOSX/Train/0.bin'):
        (folder / junk).write_bytes(b'junk')
    assert len(read_recordings('n_mnist', folder)['train']) == 20


def touch_cifar10_dvs(folder):
    """Write the names of all recordings of CIFAR10-DVS as spikingjelly converts them, without contents."""
    for name in CIFAR10DVS_CLASS_NAMES:
        (folder / 'events_np' / name).mkdir(parents=True)
        for i in range(1000):
            (folder / 'events_np' / name / f'cifar10_{name}_{i}.npz').touch()
    return folder


@pytest.fixture(scope='module')
def cifar10_dvs(tmp_path_factory):
    return touch_cifar10_dvs(tmp_path_factory.mktemp('all_of_cifar10_dvs'))


def test_first_90_is_the_split_of_v1(cifar10_dvs):
    """The split of V1's code is `split_to_train_test_set(0.9, dataset, 10)` of spikingjelly."""
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        splits = read_recordings('cifar10_dvs', cifar10_dvs)
    dataset = DatasetFolder(cifar10_dvs / 'events_np', lambda path: 0, ('.npz',))
    for recordings, subset in zip(splits.values(), split_to_train_test_set(0.9, dataset, 10)):
        expected = [dataset.samples[i] for i in subset.indices]
        assert [*zip(map(str, recordings.paths), recordings.labels)] == expected
    numbers = {int(name.rpartition('_')[2]) for name in splits['test'].names()}
    assert numbers == {*range(91, 100), *range(909, 1000)}


def test_tebn(cifar10_dvs):
    """Also after spikingjelly has added links to the folder for this split."""
    splits = read_recordings('cifar10_dvs', cifar10_dvs, split='tebn')
    for _ in range(2):
        for split, numbers in (('train', range(100, 1000)), ('test', range(100))):
            assert {*splits[split].names()} == {f'{c}/cifar10_{c}_{i}' for c in CIFAR10DVS_CLASS_NAMES for i in numbers}
        theirs = CIFAR10DVSTEBNSplit(cifar10_dvs, train=False)
        assert [(os.path.basename(path), label) for path, label in theirs.samples] == [
            (path.name, label) for path, label in zip(splits['test'].paths, splits['test'].labels)]
        splits = read_recordings('cifar10_dvs', cifar10_dvs, split='tebn')


DIGESTS = {
    ('first-90', 'train'): '09ed964eccc8c872a58f10d7407a4c2e849a91331757b137899c28014e7640d6',
    ('first-90', 'test'): '489ee4d43175477cd83795da4dde0905174979f2e4a682b1c3c412af662756f1',
    ('tebn', 'train'): 'a7da8693b5021069d0468c52ca16319c64dd4c16bbcdb0fb9b1b7785c791258f',
    ('tebn', 'test'): 'f7cf1a776a47110757b9b4f1c9ddca3db7867389e4a9b6ea2b4a37922ecf8c19',
}


@pytest.mark.parametrize('name', ['first-90', 'tebn'])
def test_digest(cifar10_dvs, name):
    """The digests of CIFAR10-DVS that the guide shows."""
    for split, recordings in read_recordings('cifar10_dvs', cifar10_dvs, split=name).items():
        assert split_digest(recordings) == DIGESTS[name, split]


def test_digest_depends_on_names_and_labels(original):
    folder = original('n_caltech101')
    first = split_digest(read_recordings('n_caltech101', folder)['train'])
    (folder / 'events_np' / 'accordion').rename(folder / 'events_np' / 'zebra')
    second = split_digest(read_recordings('n_caltech101', folder)['train'])
    (folder / 'events_np' / 'zebra').rename(folder / 'events_np' / 'accordion')
    assert first == split_digest(read_recordings('n_caltech101', folder)['train']) != second


def test_overlap(original):
    folder = original('n_mnist')
    splits = read_recordings('n_mnist', folder)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warn_about_overlap(splits)
    shutil.copy(splits['train'].paths[3], splits['test'].paths[5])
    with pytest.warns(UserWarning) as caught:
        warn_about_overlap(splits)
    assert len(caught) == 1
    assert all(str(splits[split].paths[i]) in str(caught[0].message) for split, i in (('train', 3), ('test', 5)))


def test_unsorted_recordings_are_sorted(original):
    folder = original('cifar10_dvs')
    events = random_events((128, 128))
    write_aedat2(folder / 'cat' / 'cifar10_cat_0.aedat', Events(*(array[::-1] for array in events)))
    train = read_recordings('cifar10_dvs', folder)['train']
    read = train.read(train.names().index('cat/cifar10_cat_0'))
    assert np.array_equal(read.t, events.t) and sorted(zip(*read)) == sorted(zip(*events))


@pytest.mark.filterwarnings('default:.* but the complete dataset has')
def test_incomplete_dataset(original):
    with pytest.warns(UserWarning, match='has 30 recordings of N-Caltech101, but the complete dataset has 8709'):
        read_recordings('n_caltech101', original('n_caltech101'))


def test_read_only_folder(original, monkeypatch, tmp_path):
    folder = original('n_caltech101')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    is_writable = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: path != folder and is_writable(path, mode))
    first = read_recordings('n_caltech101', folder)['train']
    assert first.paths[0].is_relative_to(tmp_path / 'cache' / 'timm_spikformer')
    assert {path.name for path in folder.iterdir()} == {'Caltech101'}
    shutil.rmtree(folder / 'Caltech101')
    assert read_recordings('n_caltech101', folder)['train'].paths == first.paths
