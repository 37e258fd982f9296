"""Errors of the readers: arguments, missing files, damaged files, other datasets."""
import shutil

import event_files
import numpy as np
import pytest
from event_files import random_events, write_aedat3

from timm_spikformer.event_data.readers import DATASETS, read_recordings

pytestmark = pytest.mark.filterwarnings('ignore:.* but the complete dataset has')
NAMES = [*DATASETS]


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


def test_conversion_that_spikingjelly_did_not_finish(original):
    folder = original('n_mnist')
    (folder / 'events_np.building').touch()
    with pytest.raises(ValueError, match='conversion by spikingjelly into .*events_np was interrupted'):
        read_recordings('n_mnist', folder)
