"""Parquet files, decoding, labels, classes and held-out images."""
import io
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from image_files import CONFIG, png, relative, write_tree
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_spikformer.images import (
    FASHION_MNIST,
    data_config,
    decode,
    make_loader,
    match_classes,
    read_splits,
    select_profiling_split,
    select_train_test,
    training_data_config,
)


def test_crop_mode_of_model():
    """The loader preprocesses images like timm's create_transform, also for other crop modes than 'center'."""
    image = Image.effect_noise((60, 20), 80).convert('RGB')
    images = read_splits()['test'].select([0])
    images._decode = lambda i: image
    loaded = {}
    for mode in ('center', 'squash', 'border'):
        model = timm.create_model(
            'test_spikformer_v2', pretrained_cfg_overlay=dict(crop_mode=mode, crop_pct=0.9), device='meta')
        loaded[mode] = next(iter(make_loader(images, data_config(model), 1)))[0][0]
        expected = create_transform(**resolve_model_data_config(model))(image)
        assert torch.equal(loaded[mode], expected)
    assert not torch.equal(loaded['center'], loaded['squash'])


def test_tenth_is_held_out_without_test_split(tmp_path):
    write_tree(tmp_path, *(f'{name}/{i}.png' for name in 'ab' for i in range(20)), 'c/1.png')
    train, test = select_train_test(read_splits(tmp_path), seed=3)
    assert (len(train), len(test)) == (37, 4)
    assert test.split == 'held-out 10%' and test.description == f'4 images of {tmp_path.name}, held-out 10%'
    assert not {*relative(train, tmp_path)} & {*relative(test, tmp_path)}
    assert np.bincount(test.labels).tolist() == [2, 2] and 'c/1.png' in relative(train, tmp_path)
    again = select_train_test(read_splits(tmp_path), seed=3)[1]
    assert relative(again, tmp_path) == relative(test, tmp_path)
    assert relative(select_train_test(read_splits(tmp_path), seed=4)[1], tmp_path) != relative(test, tmp_path)
    assert select_profiling_split(read_splits(tmp_path)).description == f'41 images of {tmp_path.name}'


def test_tenth_of_training_split_is_held_out(tmp_path):
    write_tree(tmp_path, *(f'train/{name}/{i}.png' for name in 'ab' for i in range(3)))
    train, test = select_train_test(read_splits(tmp_path))
    assert test.split == 'held-out 10% of train' and (len(train), len(test)) == (4, 2)


def test_test_split_is_preferred_to_validation_split(tmp_path):
    write_tree(tmp_path, *(f'{split}/{name}/1.png' for split in ('train', 'val', 'test') for name in 'ab'))
    splits = read_splits(tmp_path)
    assert select_train_test(splits)[1].split == select_profiling_split(splits).split == 'test'
    del splits['test']
    assert select_train_test(splits)[1].split == select_profiling_split(splits).split == 'validation'


def test_classes_with_one_image_raise(tmp_path):
    write_tree(tmp_path, 'a/1.png', 'b/1.png')
    with pytest.raises(ValueError, match='no class has 2 images'):
        select_train_test(read_splits(tmp_path))


def test_single_class_raises(tmp_path):
    write_tree(tmp_path, 'train/a/1.png', 'train/a/2.png')
    with pytest.raises(ValueError, match='all training images have the same class; at least 2 classes are required'):
        select_train_test(read_splits(tmp_path))


def test_missing_labels_or_training_split_raise(tmp_path):
    write_tree(tmp_path / 'unlabeled', '1.png', '2.png')
    write_parquet(tmp_path / 'mixed' / 'train.parquet', [png()] * 2, [0, 1])
    pq.write_table(pa.table({'image': [png()]}), tmp_path / 'mixed' / 'test.parquet')
    for folder, message in (
            ('unlabeled', '2 images of unlabeled: there are no labels'),
            ('mixed', '1 image of mixed, test split: there are no labels'),
    ):
        splits = read_splits(tmp_path / folder, labels=False)
        with pytest.raises(ValueError, match=message):
            select_train_test(splits)
    with pytest.raises(ValueError, match='The dataset has no training split; it has: test. Expected one of'):
        select_train_test({'test': splits['test']})


def test_take_is_stratified(tmp_path):
    write_tree(tmp_path, *(f'{c:03}x/{i}.png' for c in range(30) for i in range(2 if c else 20)))
    images = read_splits(tmp_path)['all']
    few = images.sample_stratified(39, seed=0)
    assert np.bincount(few.labels).tolist() == [10] + 29 * [1]
    assert relative(few, tmp_path) == relative(images.sample_stratified(39, seed=0), tmp_path)
    assert len(images.sample_stratified(10, seed=0)) == 10  # fewer images than classes
    assert images.sample_stratified(1000, seed=0) is images


def test_test_split_has_class_indices_of_training_split(tmp_path):
    write_tree(tmp_path, 'train/a/1.png', 'train/b/1.png', 'train/c/1.png', 'test/b/1.png', 'test/c/1.png')
    splits = read_splits(tmp_path)
    assert splits['test'].labels.tolist() == [1, 2] and splits['test'].classes == ['a', 'b', 'c']


def test_match_classes_by_name(tmp_path):
    write_tree(tmp_path, 'b/1.png', 'c/1.png', 'c/2.png')
    images = read_splits(tmp_path)['all']
    assert match_classes(images, ['c', 'a', 'b'], 3).labels.tolist() == [2, 0, 0]
    assert images.labels.tolist() == [0, 1, 1]  # unchanged
    with pytest.raises(ValueError, match="'c' is not a class of the model, whose classes are 'a', 'b'"):
        match_classes(images, ['a', 'b'], 2)
    with pytest.raises(ValueError, match='2 classes, but the model has 3'):
        match_classes(images, None, 3)
    assert match_classes(images, None, 2) is images


def test_match_classes_without_names(tmp_path):
    """A subset need not contain the highest class; a label that the model has no class for raises."""
    write_parquet(tmp_path / 'test.parquet', [png()] * 2, [0, 8])
    images = read_splits(tmp_path)['test']
    for names in (None, [str(i) for i in range(10)]):
        assert match_classes(images, names, 10) is images
        with pytest.raises(ValueError, match='there is a label 8, expected 0 to 7'):
            match_classes(images, names and names[:8], 8)


FEATURES = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=['x', 'y'])})


def write_parquet(path: Path, images, labels, type=None, features=None) -> None:
    label = pa.array(labels, type)
    metadata = None if features is None else {'huggingface': json.dumps({'info': {'features': features.to_dict()}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({'image': images, 'label': label}).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize('form', ['bytes', 'path', 'both', 'datasets'])
def test_parquet(form, tmp_path):
    red, blue = png(), png(Image.new('RGB', (8, 8), 'blue'))
    (tmp_path / '1.jpg').write_bytes(red)
    (tmp_path / '2.jpg').write_bytes(blue)
    if form == 'datasets':
        rows = {'image': [{'bytes': red, 'path': None}, {'bytes': blue, 'path': None}], 'label': [1, 0]}
        datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(tmp_path / 'data' / 'train.parquet')
    else:
        images = {'bytes': [red, blue], 'path': ['../1.jpg', '../2.jpg']}.get(
            form, [{'bytes': red, 'path': 'a'}, {'bytes': None, 'path': '../2.jpg'}])
        write_parquet(tmp_path / 'data' / 'train.parquet', images, [1, 0])
    images = read_splits(tmp_path)['train']
    assert images.labels.tolist() == [1, 0]
    assert images.classes == (['x', 'y'] if form == 'datasets' else None)
    assert [images[i][0].getpixel((0, 0)) for i in range(2)] == [(255, 0, 0), (0, 0, 255)]
    assert images.filename(1) == f'{tmp_path}/data/train.parquet, row 1'


def test_parquet_in_shards(tmp_path):
    for i in range(3):
        write_parquet(tmp_path / f'train-0000{i}-of-00003.parquet', [png()] * 2, [i, 1])
    write_parquet(tmp_path / 'validation-00000-of-00001-ab12.parquet', [png()], [2])
    splits = read_splits(tmp_path)
    assert splits['train'].labels.tolist() == [0, 1, 1, 1, 2, 1] and len(splits['validation']) == 1
    assert splits['train'].filename(5) == f'{tmp_path}/train-00002-of-00003.parquet, row 1'
    assert select_train_test(splits)[1].classes == ['0', '1', '2']
    (tmp_path / 'train-00001-of-00003.parquet').unlink()
    with pytest.raises(ValueError, match='contains 2 parquet files of the split train, .* one of 3'):
        read_splits(tmp_path)


def test_parquet_file_with_any_name(tmp_path):
    write_parquet(tmp_path / 'birds.parquet', [png()] * 20, [0, 1] * 10)
    train, test = select_train_test(read_splits(tmp_path))
    assert (len(train), len(test), test.split) == (18, 2, 'held-out 10%')
    write_parquet(tmp_path / 'train.parquet', [png()], [0])
    with pytest.raises(ValueError, match='contains files named after splits, but also birds.parquet'):
        read_splits(tmp_path)


@pytest.mark.parametrize('labels, type, message', [
    ([0, None, 1], None, 'row 1: the label is null'),
    ([0, 1, -1], None, 'row 2: the label is -1. Expected a class index'),
    ([0., 1., 1.5], None, 'labels of type double, such as 0.0. Expected integers or a ClassLabel'),
    (['a', 'b', 'c'], None, "labels of type string, such as 'a'"),
    ([True, False, True], None, 'labels of type bool'),
    ([0, 1, 900_000_000], None, 'labels are 3 different integers from 0 to 900000000. Expected 0 to K - 1'),
    ([0, 1, 2 ** 64 - 1], pa.uint64(), 'the label is 18446744073709551615'),
    ([0, 2, 2], None, 'labels are 2 different integers from 0 to 2'),
])
def test_bad_labels(labels, type, message, tmp_path):
    write_parquet(tmp_path / 'train.parquet', [png()] * 3, labels, type)
    with pytest.raises(ValueError, match=message):
        select_train_test(read_splits(tmp_path))


def test_label_outside_named_classes_raises(tmp_path):
    write_parquet(tmp_path / 'train.parquet', [png()] * 3, [0, 1, 2], features=FEATURES)
    with pytest.raises(ValueError, match='row 2: the label is 2. Expected 0 to 1'):
        read_splits(tmp_path)


def test_class_names_in_one_split_only(tmp_path):
    """The names are used for both splits, if the numbers of classes are equal."""
    write_parquet(tmp_path / 'train.parquet', [png()] * 2, [1, 0])
    write_parquet(tmp_path / 'test.parquet', [png()] * 2, [0, 1], features=FEATURES)
    train, test = select_train_test(read_splits(tmp_path))
    assert train.classes == test.classes == ['x', 'y'] and train.labels.tolist() == [1, 0]
    write_parquet(tmp_path / 'train.parquet', [png()] * 3, [0, 1, 2])
    with pytest.raises(ValueError, match="there are 3 classes without names, but .* test split has 2 classes: 'x', "):
        select_train_test(read_splits(tmp_path))


def test_duplicate_class_names_raise(tmp_path):
    features = datasets.Features(FEATURES)
    write_parquet(tmp_path / 'train.parquet', [png()] * 3, [0, 1, 2])
    label = {'names': ['a', 'a', 'b'], '_type': 'ClassLabel'}
    metadata = {'huggingface': json.dumps({'info': {'features': {**features.to_dict(), 'label': label}}})}
    table = pq.read_table(tmp_path / 'train.parquet').replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / 'train.parquet')
    with pytest.raises(ValueError, match="train has the same name for class 0 and class 1, 'a'. Class names must"):
        read_splits(tmp_path)
    with pytest.raises(ValueError, match="The model has the same name for class 1 and class 2, 'x'"):
        match_classes(read_splits()['test'], ['y', 'x', 'x'], 3)


@pytest.mark.parametrize('change', ['none', 'additional file', 'other name', 'other size', 'other class'])
def test_fingerprint_changes_with_files(change, tmp_path):
    write_tree(tmp_path, 'a/1.png', 'a/2.png', 'b/1.png', 'c/1.png')
    before = read_splits(tmp_path)['all']
    assert before.fingerprint() != before.select([0, 1]).fingerprint() != before.select([0, 2]).fingerprint()
    digest, path = before.fingerprint(), tmp_path / 'a' / '1.png'
    if change == 'additional file':
        (tmp_path / 'a' / '3.png').write_bytes(path.read_bytes())
    elif change == 'other name':
        path.rename(tmp_path / 'a' / '0.png')
    elif change == 'other size':
        path.write_bytes(path.read_bytes() + b'0')
    elif change == 'other class':
        (tmp_path / 'b' / '1.png').rename(tmp_path / 'a' / '3.png')
        path.rename(tmp_path / 'b' / '1.png')
    assert (read_splits(tmp_path)['all'].fingerprint() == digest) == (change == 'none')
    shipped = read_splits()
    assert read_splits()['test'].fingerprint() == shipped['test'].fingerprint() != shipped['train'].fingerprint()


def test_test_label_missing_in_training_split_raises(tmp_path):
    write_parquet(tmp_path / 'train.parquet', [png()] * 2, [0, 1])
    write_parquet(tmp_path / 'test.parquet', [png()] * 2, [0, 2])
    with pytest.raises(ValueError, match='there is a label 2, expected 0 to 1'):
        select_train_test(read_splits(tmp_path))


@pytest.mark.parametrize('content, message', [
    (b'PAR1 but not really', 'is not a parquet file, or is damaged'),
    (pa.table({'pixels': [1], 'target': [0]}), r'has the columns pixels \(int64\), target \(int64\)'),
    (pa.table({'image': [1], 'label': [0]}), r'has the columns image \(int64\)'),
    (pa.table({'image': [b'']}), 'has no labels'),
    (pa.table({'image': pa.array([], pa.binary()), 'label': pa.array([], pa.int64())}), 'has no rows'),
], ids=['damaged', 'columns', 'image', 'labels', 'rows'])
def test_bad_parquet_files(content, message, tmp_path):
    path = tmp_path / 'train.parquet'
    path.write_bytes(content) if isinstance(content, bytes) else pq.write_table(content, path)
    with pytest.raises(ValueError, match=message):
        read_splits(tmp_path)


@pytest.mark.parametrize('image, message', [
    (None, 'row 0 cannot be read: the image is null'), (b'x', 'row 0 cannot be read: cannot identify image'),
])
def test_unreadable_row_raises(image, message, tmp_path):
    write_parquet(tmp_path / 'train.parquet', pa.array([image, png()], pa.binary()), [0, 1])
    with pytest.raises(ValueError, match=message):
        read_splits(tmp_path)['train'][0]


def gray(value, mode) -> Image.Image:
    type = {'I;16': np.uint16, 'I': np.int32, 'F': np.float32}[mode]
    return Image.fromarray(np.full((4, 4), value, type))


def upside_down() -> bytes:
    image = Image.new('RGB', (4, 2), 'black')
    image.putpixel((0, 0), (255, 255, 255))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    return png(image, exif=exif)


@pytest.mark.parametrize('content, expected', [
    (png(gray(0x8000, 'I;16')), (128,) * 3),
    (png(gray(0x8000, 'I;16'), format='TIFF'), (128,) * 3),
    (b'P5 4 4 65535\n' + b'\x80\x00' * 16, (128,) * 3),
    (png(Image.new('L', (4, 4), 100)), (100,) * 3),
    (png(Image.new('1', (4, 4), 1)), (255,) * 3),
    (png(Image.new('LA', (4, 4), (100, 0))), (100,) * 3),
    (png(Image.new('RGBA', (4, 4), (1, 2, 3, 0))), (1, 2, 3)),
    (png(Image.new('RGB', (4, 4), (10, 200, 30)).quantize()), (10, 200, 30)),
    (png(Image.new('CMYK', (8, 8), (255, 0, 0, 0)), format='TIFF'), (0, 255, 255)),
], ids=['16-bit PNG', '16-bit TIFF', '16-bit PGM', 'gray', 'bilevel', 'gray with alpha', 'alpha', 'palette', 'CMYK'])
def test_images_are_decoded_to_8_bits(content, expected):
    image = decode(io.BytesIO(content), 'RGB')
    assert image.mode == 'RGB' and image.getpixel((0, 0)) == expected


def test_exif_orientation_is_applied():
    image = decode(io.BytesIO(upside_down()), 'RGB')
    assert image.size == (2, 4) and image.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize('content, message', [
    (png(Image.effect_noise((64, 64), 50))[:-600], 'truncated|broken'),
    (png(Image.effect_noise((64, 64), 50), format='JPEG')[:500], 'truncated'),
    (b'', 'cannot identify'),
    (b'<svg/>', 'cannot identify'),
    (png(gray(0.5, 'F'), format='TIFF'), 'its pixels are floating-point numbers, expected 8 or 16 bits'),
    (png(gray(70000, 'I'), format='TIFF'), 'its pixels are 32-bit integers'),
], ids=['truncated PNG', 'truncated JPEG', 'empty', 'text', 'float', 'int32'])
def test_error_names_unreadable_image(content, message, tmp_path):
    write_tree(tmp_path, 'a/1.png', 'b/2.png')
    (tmp_path / 'b' / '2.png').write_bytes(content)
    loader = make_loader(read_splits(tmp_path)['all'], CONFIG, 2)
    with pytest.raises(ValueError, match=f'b/2.png cannot be read: .*({message})'):
        list(loader)


def test_shipped_images():
    train, test = select_train_test(read_splits())
    assert (len(train), len(test)) == (6000, 1000) and test.description == '1,000 images of Fashion-MNIST, test split'
    assert train.classes == test.classes and train.classes[0] == 'T-shirt/top'
    assert set(np.bincount(train.labels)) == {600} and set(np.bincount(test.labels)) == {100}
    theirs = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'test.parquet'))
    assert test.labels.tolist() == theirs['label']
    assert all(np.array_equal(test[i][0], theirs[i]['image'].convert('RGB')) for i in (0, 500, 999))
    x, y = next(iter(make_loader(test, training_data_config(), 100)))
    assert x.shape == (100, 3, 28, 28) and y.tolist() == test.labels[:100].tolist()
    assert abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1


def test_images_with_one_channel(tmp_path):
    write_tree(tmp_path, 'a/1.png', 'b/2.png')
    images = read_splits(tmp_path)['all']
    x, _ = next(iter(make_loader(images, dict(CONFIG, input_size=(1, 32, 32), mean=(0.5,), std=(0.5,)), 2)))
    assert x.shape == (2, 1, 32, 32)
    with pytest.raises(ValueError, match='has 2 input channels'):
        make_loader(images, dict(CONFIG, input_size=(2, 32, 32)), 2)


@pytest.mark.parametrize('sample, message', [
    (lambda images: images.sample_stratified(-1, 0), 'count must be an integer of at least 0, got -1'),
    (lambda images: images.sample_stratified(10, -1), 'seed must be an integer of at least 0, got -1'),
    (lambda images: images.sample_evenly(-1), 'count must be an integer of at least 0, got -1'),
    (lambda images: images.sample_evenly(2.5), 'count must be an integer of at least 0, got 2.5'),
    (lambda images: images.hold_out(0, fraction=1.), 'fraction must be greater than 0 and less than 1, got 1.0'),
])
def test_bad_samples_raise(sample, message):
    with pytest.raises(ValueError, match=message):
        sample(read_splits()['test'])


@pytest.mark.parametrize('fraction, expected', [
    (0.1, [1, 1, 0]), (0.5, [5, 1, 0]), (0.75, [8, 1, 0]), (0.99, [9, 1, 0])])
def test_held_out_images_of_each_class(fraction, expected):
    """Classes of 10, 2 and 1 images: at least one image of each class is used for training."""
    images = read_splits()['test'].select(range(13))
    images.labels = np.array([0] * 10 + [1] * 2 + [2])
    train, test = images.hold_out(0, fraction)
    assert np.bincount(test.labels, minlength=3).tolist() == expected
    assert np.bincount(train.labels, minlength=3).min() >= 1 and len(train) + len(test) == 13


def test_interpolation_can_be_augmented():
    images = read_splits()['test'].sample_evenly(4)
    loader = make_loader(images, CONFIG, 4, augment=True, interpolation='random')
    modes = next(t.interpolation for t in loader.dataset.transform.transforms if hasattr(t, 'interpolation'))
    assert len(modes) > 1 and len(next(iter(loader))[0]) == 4


def test_images_without_labels_cannot_be_sampled_by_class():
    images = read_splits()['test']
    images.labels = None
    for function in (lambda: images.sample_stratified(10, 0), lambda: images.hold_out(0), images.digest):
        with pytest.raises(ValueError, match='1,000 images of Fashion-MNIST, test split: there are no labels'):
            function()


def test_loader_does_not_change_images(tmp_path):
    images = read_splits(write_tree(tmp_path, 'a/1.png', 'b/2.png'))['all']
    list(make_loader(images, CONFIG, 2, augment=True))
    assert images.transform is None and isinstance(images[0][0], Image.Image)
    assert isinstance(images.sample_evenly(1)[0][1], int)
    assert torch.is_tensor(next(iter(make_loader(images, CONFIG, 2)))[0])
