"""Reading of images: folders, parquet files, decoding, labels and classes."""
import io
import json
import os
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.data.readers.reader_image_folder import ReaderImageFolder

from timm_spikformer.images import (
    FASHION_MNIST,
    Images,
    data_config,
    decode,
    make_loader,
    match_classes,
    read_splits,
    select_profiling_split,
    select_train_test,
    training_data_config,
)

CONFIG = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bicubic', crop_pct=1.)


def png(image=None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new('RGB', (8, 8), 'red')).save(buffer, options.pop('format', 'PNG'), **options)
    return buffer.getvalue()


def write_tree(root: Path, *paths: str) -> Path:
    """Write an image to each path."""
    content = png()
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def relative(images: Images, root: Path):
    return [os.path.relpath(images.filename(i), root) for i in range(len(images))]


# -- folders, compared with timm's reader

CLASSES = [
    'a', 'A', 'b', '1', '01', '2', '10', 'class_2', 'class_10', 'train', 'test', 'val', '²', 'é', '.x', 'train_3',
    'd.png']
FILES = ['1.png', '2.PNG', '10.jpg', 'train_3.png', 'test.jpeg', 'notes.txt', '.png', 'x²1²', 'a.tif']
SPLITS = {'train': 'train', 'test': 'test', 'validation': 'validation', 'val': 'validation'}
names = st.sampled_from(CLASSES)
files = st.sampled_from(FILES)
paths = st.one_of(
    st.tuples(files), st.tuples(names, files), st.tuples(st.sampled_from(list(SPLITS)), names, files),
    st.tuples(names, names, files), st.tuples(names, names, names, files))
regular_class = st.sampled_from(
    ['a', 'b', '1', '2', '10', 'class_2', 'class_10', 'train', 'val', 'é', 'train_3', 'C', 'd.png'])
regular_file = st.sampled_from(['1.png', '2.PNG', '10.jpg', 'train_3.png', 'test.jpeg', 'notes.txt'])


def check_against_timm(root: Path, splits) -> None:
    """Check that splits have the samples of timm's reader, and the class indices that it gives the training split."""
    first = next(s for s in ('train', 'all', 'test', 'validation') if s in splits)
    numbering = None
    for split, images in sorted(splits.items(), key=lambda item: item[0] != first):
        folder = root if split == 'all' else root / relative(images, root)[0].split(os.sep)[0]
        assert split == 'all' or SPLITS[folder.name] == split
        theirs = ReaderImageFolder(str(folder))
        assert [images.filename(i) for i in range(len(images))] == [path for path, _ in theirs.samples]
        if images.labels is None:
            assert set(theirs.class_to_idx) <= {'', folder.name}
            continue
        by_name = {i: name for name, i in theirs.class_to_idx.items()}
        assert [images.classes[label] for label in images.labels] == [by_name[label] for _, label in theirs.samples]
        numbering = numbering or theirs.class_to_idx
        assert {name: i for i, name in enumerate(images.classes)} == numbering or split != first


def check_any_tree(tree) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / 'data'
        root.mkdir()
        for parts in tree:
            path = root.joinpath(*parts)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            except OSError:
                assume(False)
        try:
            splits = read_splits(root, labels=False)
        except ValueError as e:
            assert str(root) in str(e)
            return
        check_against_timm(root, splits)


def check_regular_tree(layout, classes, linked) -> None:
    """Check that a documented folder layout, with folders or symbolic links, is read without an error."""
    with tempfile.TemporaryDirectory() as folder:
        root, elsewhere = Path(folder) / 'data', Path(folder) / 'elsewhere'
        root.mkdir()
        has_images = False
        for split in layout:
            for name, contents in classes.items():
                target = root / split / name if split else root / name
                target.parent.mkdir(exist_ok=True)
                if linked:
                    (elsewhere / split / name).mkdir(parents=True)
                    target.symlink_to(elsewhere / split / name)
                else:
                    target.mkdir()
                for file in contents:
                    (target / file).touch()
                    has_images |= file != 'notes.txt'
        assume(has_images)
        splits = read_splits(root)
        assert set(splits) == {SPLITS.get(split, 'all') for split in layout}
        check_against_timm(root, splits)


any_tree = st.lists(paths, min_size=1, max_size=8, unique=True)
regular_tree = dict(
    layout=st.sampled_from([('',), ('train',), ('train', 'test'), ('train', 'val'), ('test',), ('validation',)]),
    classes=st.dictionaries(regular_class, st.lists(regular_file, min_size=1, unique=True), min_size=1, max_size=4),
    linked=st.booleans())
quick = settings(max_examples=300, deadline=None)
long = settings(max_examples=10_000, deadline=None)


@quick
@given(tree=any_tree)
@example(tree=[('a', '1.png'), ('A', '1.png')])
@example(tree=[('a', '²', '1.png')])
@example(tree=[('train', 'a', '1.png'), ('train', 'b', '1.png'), ('test', 'b', '2.PNG')])
@example(tree=[('train', '1.png'), ('test', '1.png'), ('b', '1.png')])
def test_any_tree_raises_or_is_read_as_by_timm(tree):
    check_any_tree(tree)


@quick
@given(**regular_tree)
def test_documented_tree_is_read_as_by_timm(layout, classes, linked):
    check_regular_tree(layout, classes, linked)


@pytest.mark.fuzz
@long
@given(tree=any_tree)
def test_fuzz_any_tree(tree):
    check_any_tree(tree)


@pytest.mark.fuzz
@long
@given(**regular_tree)
def test_fuzz_documented_tree(layout, classes, linked):
    check_regular_tree(layout, classes, linked)


def test_classes_are_in_natural_order(tmp_path):
    write_tree(tmp_path, *(f'train/class_{i}/1.png' for i in range(12)))
    assert read_splits(tmp_path)['train'].classes == [f'class_{i}' for i in range(12)]
    assert list(create_dataset('', str(tmp_path), split='train').reader.class_to_idx) == [
        f'class_{i}' for i in range(12)]


def test_class_named_like_split(tmp_path):
    """Classes and files that are named like a split are not taken for one."""
    write_tree(tmp_path, 'train/1.png', 'train/test_2.png', 'bus/1.png', 'bus/train_3.png')
    (splits,) = [read_splits(tmp_path)]
    assert list(splits) == ['all'] and splits['all'].classes == ['bus', 'train']
    assert relative(splits['all'], tmp_path) == ['bus/1.png', 'bus/train_3.png', 'train/1.png', 'train/test_2.png']


def test_file_named_like_other_split(tmp_path):
    write_tree(tmp_path, 'train/a/1.png', 'train/a/test_1.png', 'train/b/validation.png', 'test/a/1.png',
               'test/b/train_1.png')
    splits = read_splits(tmp_path)
    assert {split: len(images) for split, images in splits.items()} == {'train': 3, 'test': 2}


def test_symbolic_links_are_followed(tmp_path):
    write_tree(tmp_path / 'elsewhere', 'a/1.png', 'b/1.png')
    data = tmp_path / 'data'
    data.mkdir()
    (data / 'test').symlink_to(tmp_path / 'elsewhere')
    (data / 'train').mkdir()
    for name in 'ab':
        (data / 'train' / name).symlink_to(tmp_path / 'elsewhere' / name)
    assert {split: len(images) for split, images in read_splits(data).items()} == {'train': 2, 'test': 2}
    (data / 'train' / 'c').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='train/c is a symbolic link to .*nowhere, which does not exist'):
        read_splits(data)


def test_link_to_parent_folder_raises(tmp_path):
    write_tree(tmp_path, 'train/a/1.png', 'train/b/1.png')
    (tmp_path / 'train' / 'a' / 'loop').symlink_to(tmp_path / 'train')
    with pytest.raises(ValueError, match='is in a subfolder of a class folder'):
        read_splits(tmp_path)


@pytest.mark.parametrize('files, message', [
    ([], 'contains no images'),
    (['notes.txt'], 'contains no images'),
    (['Train/a/1.png', 'Test/a/1.png'], 'contains no images .* in the expected places'),
    (['1.png', '2.png'], 'has no labels'),
    (['a/1.png', '1.png'], '1.png is not in a class folder'),
    (['train/a/1.png', 'train/1.png'], 'train/a/1.png is in a subfolder of a class folder'),
    (['train/a/1.png', 'bus/1.png'], 'contains train with class folders, but also the folder bus, which contains imag'),
    (['train/a/1.png', 'test/1.png'], 'contains train with class folders, but also the folder test'),
    (['train/a/x/1.png', 'train/b/1.png'], 'in a subfolder of a class folder'),
    (['val/a/1.png', 'validation/a/1.png'], 'contains both val and validation'),
    (['train/1/1.png', 'train/01/1.png'], "'01' and '1' .* have no defined order"),
    (['train/²/1.png', 'train/²5²/1.png'], 'name with digits that timm cannot convert to a number, .* Rename'),
    (['train/a/1.png', 'train/b/1.png', 'test/c/1.png'], "different classes.* 'c' is not a class of the model"),
], ids=lambda value: value[0] if isinstance(value, list) and value else None)
def test_bad_folders(files, message, tmp_path):
    write_tree(tmp_path, *files)
    with pytest.raises(ValueError, match=message) as e:
        read_splits(tmp_path)
    assert str(tmp_path) in str(e.value)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match='nowhere is not a folder. Expected one of: DIR'):
        read_splits(tmp_path / 'nowhere')


def test_images_without_labels(tmp_path):
    write_tree(tmp_path, '1.png', '2.png')
    images = select_profiling_split(read_splits(tmp_path, labels=False))
    assert images.labels is None and len(images) == 2
    (x,) = list(make_loader(images, CONFIG, 4))
    assert x.shape == (2, 3, 32, 32)


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


# -- splits

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


# -- classes of datasets and models

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


# -- parquet

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


# -- decoding

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


# -- loaders

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
