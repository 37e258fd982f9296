"""Reading of datasets in their original formats, splits and digests."""
import os
import shutil
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


@pytest.fixture(scope='session')
def originals(tmp_path_factory):
    """Small datasets in their original formats, by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}
    for name, folder in folders.items():
        getattr(event_files, f'write_{name}')(folder)
    return folders


@pytest.fixture
def original(originals, tmp_path):
    """A function that copies a small dataset and returns its folder."""
    def copy(name):
        return shutil.copytree(originals[name], tmp_path / name)
    return copy


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
    """Gestures start and end at the times in the label file, and labels are class numbers."""
    splits = read_recordings('dvs128_gesture', original('dvs128_gesture'))
    for split, user in (('train', 1), ('test', 24)):
        recordings = splits[split]
        assert recordings.labels == [*range(11)] and len(recordings.classes) == 11
        for i in range(11):
            assert same(recordings.read(i), random_events((128, 128), seed=100 * user + i, start=1_000_000 * i))


def test_overflow_of_time_in_aedat3(original):
    """The header of a packet contains bits 31 and above of the time stamps."""
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


@pytest.mark.parametrize('name, seeds', [('n_mnist', (2, 1102)), ('n_caltech101', (100, 209))])
def test_atis(original, name, seeds):
    splits = read_recordings(name, original(name))
    size = DATASETS[name].size
    for recordings, seed in zip(splits.values(), seeds):
        everything = [recordings.read(i) for i in range(len(recordings))]
        expected = random_events(size, seed=seed if name == 'n_caltech101' else seed - 2)
        assert sum(same(events, expected) for events in everything) == 1
    assert len(splits['train']), len(splits['test']) == {'n_mnist': (20, 20), 'n_caltech101': (27, 3)}[name]


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
    """Create empty files with the names of all converted recordings of CIFAR10-DVS."""
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
    """The split does not change when spikingjelly adds links for it to the folder."""
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
    """The digests of CIFAR10-DVS are those in the guide."""
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


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="Unknown dataset 'cifar10'.* 'cifar10_dvs', 'dvs128_gesture'"):
        read_recordings('cifar10', tmp_path)
    with pytest.raises(ValueError, match="split of N-MNIST must be one of 'official', got 'tebn'"):
        read_recordings('n_mnist', tmp_path, split='tebn')
    with pytest.raises(ValueError, match='none is not a folder. Expected the folder of the unpacked'):
        read_recordings('n_mnist', tmp_path / 'none')


def test_split_without_recordings(tmp_path):
    event_files.write_n_caltech101(tmp_path, per_class=3)
    with pytest.raises(ValueError, match="too few recordings of N-Caltech101: the split 'test' would be empty"):
        read_recordings('n_caltech101', tmp_path)


@pytest.mark.parametrize('name', NAMES)
def test_another_dataset(originals, original, name):
    """The message names the dataset in the folder, before and after its conversion."""
    other = NAMES[NAMES.index(name) - 1]
    folder = original(other)
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            read_recordings(name, folder)
        for part in (str(folder), DATASETS[other].title, DATASETS[name].homepage, DATASETS[name].layout):
            assert part in str(error.value)
        read_recordings(other, folder)


def test_archives_that_are_not_unpacked(tmp_path):
    (tmp_path / 'download').mkdir()
    (tmp_path / 'download' / 'Train.zip').touch()
    with pytest.raises(ValueError, match='no files of N-MNIST, but the archive .*Train.zip, which is not unpacked'):
        read_recordings('n_mnist', tmp_path)


def test_missing_classes_and_splits(original):
    folder = original('cifar10_dvs')
    shutil.rmtree(folder / 'cat')
    shutil.rmtree(folder / 'dog')
    with pytest.raises(ValueError, match='no recordings of the classes cat, dog of CIFAR10-DVS.*figshare'):
        read_recordings('cifar10_dvs', folder)
    folder = original('n_mnist')
    shutil.rmtree(folder / 'Test')
    with pytest.raises(ValueError, match='no test recordings of N-MNIST.*Test.zip.*garrickorchard'):
        read_recordings('n_mnist', folder)


def _truncate(num_bytes):
    return lambda data: data[:num_bytes]


@pytest.mark.parametrize('name, file, change, message', [
    ('n_mnist', 'Train/3/00007.bin', _truncate(-2), 'its last event has 3 of 5 bytes'),
    ('n_mnist', 'Test/3/00007.bin', _truncate(0), 'is empty'),
    ('n_caltech101', 'Caltech101/accordion/image_0001.bin', _truncate(7), 'its last event has 2 of 5 bytes'),
    ('cifar10_dvs', 'cat/cifar10_cat_1.aedat', _truncate(-3), 'its last event has 5 of 8 bytes'),
    ('cifar10_dvs', 'cat/cifar10_cat_1.aedat', _truncate(0), 'is empty'),
    ('cifar10_dvs', 'cat/cifar10_cat_1.aedat', lambda data: b'#!AER-DAT2.0\r\n', 'has no events'),
    ('cifar10_dvs', 'cat/cifar10_cat_1.aedat', lambda data: b'<!DOCTYPE html>', 'not with #!AER-DAT2'),
    ('cifar10_dvs', 'cat/cifar10_cat_1.aedat', lambda data: b'#!AER-DAT3.1\r\n' + data, 'not with #!AER-DAT2'),
    ('dvs128_gesture', 'DvsGesture/user01_lab.aedat', _truncate(-3), 'its last packet has 101 of 104 bytes'),
    ('dvs128_gesture', 'DvsGesture/user01_lab.aedat', _truncate(-125), 'last packet has 7 of 28 bytes'),
    ('dvs128_gesture', 'DvsGesture/user01_lab.aedat', _truncate(40), 'no line #!END-HEADER'),
    ('dvs128_gesture', 'DvsGesture/user01_lab.aedat', lambda data: b'#!AER-DAT2.0' + data[12:], 'not with #!AER-DAT3'),
    ('dvs128_gesture', 'DvsGesture/user01_lab.aedat', _truncate(0), 'is empty'),
    ('dvs128_gesture', 'DvsGesture/user01_lab_labels.csv', _truncate(-5), 'a start time and a later end time'),
    ('dvs128_gesture', 'DvsGesture/user01_lab_labels.csv', lambda data: data + b'12,1,2\n', "'12,1,2' is not a class"),
    ('dvs128_gesture', 'DvsGesture/user01_lab_labels.csv', _truncate(45), 'expected at least 2 gestures, got 1'),
    ('dvs128_gesture', 'DvsGesture/user01_lab_labels.csv', lambda data: b'\xff\xfe', 'cannot be read'),
    ('dvs128_gesture', 'DvsGesture/trials_to_test.txt', _truncate(0), 'is empty, expected names of files'),
])
def test_damaged_original(original, name, file, change, message):
    """The message names the file, and nothing is written."""
    folder = original(name)
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        read_recordings(name, folder)
    assert str(folder / file) in str(error.value)
    assert not (folder / 'events_np').exists()


@pytest.mark.parametrize('missing, message', [
    ('user24_lab.aedat', 'but trials_to_test.txt lists user24_lab.aedat'),
    ('user24_lab_labels.csv', 'but trials_to_test.txt lists user24_lab.aedat'),
    ('trials_to_train.txt', 'is missing'),
])
def test_missing_file_of_dvs128_gesture(original, missing, message):
    folder = original('dvs128_gesture')
    (folder / 'DvsGesture' / missing).unlink()
    with pytest.raises(ValueError, match=rf'DvsGesture/{missing} is missing.*') as error:
        read_recordings('dvs128_gesture', folder)
    assert message in str(error.value)


def test_gesture_without_events(original):
    """A recording that was cut off between two packets, before its last gesture."""
    folder = original('dvs128_gesture')
    path = folder / 'DvsGesture' / 'user24_lab.aedat'
    write_aedat3(path, random_events((128, 128)))
    with pytest.raises(ValueError, match='user24_lab.aedat and .*_labels.csv: the recording user24_lab_0 .* no events'):
        read_recordings('dvs128_gesture', folder)
    assert not (folder / 'events_np').exists()


def _save(**arrays):
    return lambda path: np.savez(path, **arrays)


ONE = np.zeros(1, int)


@pytest.mark.parametrize('write, message', [
    (lambda path: path.write_bytes(path.read_bytes()[:-30]), 'n_mnist: .+Expected arrays'),
    (lambda path: path.write_bytes(b''), 'n_mnist: .+Expected arrays'),
    (lambda path: path.write_bytes(b'junk'), 'n_mnist: .+Expected arrays'),
    (lambda path: path.write_bytes(path.read_bytes()[:90] + b'junk' + path.read_bytes()[94:]), 'Expected arrays'),
    (_save(t=ONE, x=ONE, y=ONE), "'p is not a file"),
    (_save(t=ONE, x=ONE, y=ONE, p=ONE + 2), 'p of the events must be from 0 to 1'),
    (_save(t=ONE, x=ONE + 34, y=ONE, p=ONE), 'x of the events must be from 0 to 33 for a sensor of 34x34 pixels'),
    (_save(t=np.zeros(2, int), x=ONE, y=ONE, p=ONE), 'the same length'),
    (_save(t=ONE / 2, x=ONE, y=ONE, p=ONE), 'must be an integer NumPy array'),
    (_save(t=np.array([None]), x=ONE, y=ONE, p=ONE), 'allow_pickle'),
    (_save(t=ONE[:0], x=ONE[:0], y=ONE[:0], p=ONE[:0]), 'Expected at least one event, got none'),
])
def test_damaged_recording(original, write, message):
    train = read_recordings('n_mnist', original('n_mnist'))['train']
    write(train.paths[4])
    with pytest.raises(ValueError, match=message) as error:
        train.read(4)
    assert str(error.value).startswith(f'{train.paths[4]} cannot be read as a recording of n_mnist')
    assert DATASETS['n_mnist'].homepage in str(error.value)


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


def test_conversion_that_spikingjelly_did_not_finish(original):
    folder = original('n_mnist')
    (folder / 'events_np.building').touch()
    with pytest.raises(ValueError, match='conversion by spikingjelly into .*events_np was interrupted'):
        read_recordings('n_mnist', folder)
