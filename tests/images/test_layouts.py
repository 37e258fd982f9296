"""Layouts of image folders, compared with those that timm reads."""
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from image_files import CONFIG, relative, write_tree
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder

from timm_spikformer.images import make_loader, read_splits, select_profiling_split

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
    (['train/a/1.png', 'train/b/1.png', 'test/c/1.png'], "'c' is not a class of the training split"),
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
