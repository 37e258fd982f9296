"""Publish a checkpoint: write a folder, verify it, upload it in one commit, and then move it to the output path."""
import contextlib
import datetime
import random
import re
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import nn

from ..checkpoints import DIGEST_ARG
from ..folders import write_folder, write_manifest
from ..images import Images, make_loader, match_classes, read_splits, select_train_test
from ..masked_autoencoder import SpikformerMAE
from ..profiling import Profile, profile
from ..reading import Checkpoint, check_data_config, copy_checkpoint, read_checkpoint, set_labels
from . import hub
from .card import AccuracyResult, Dataset, read_results, render_card, results_files
from .folder import check_processor, example_images, verify_folder, write_checkpoint

__all__ = ['PublishResult', 'publish']


class PublishResult(NamedTuple):
    """Result of `publish`: the output folder, if any, and the URL and commit hash of the upload, if any.

    >>> import tempfile, timm
    >>> model = timm.create_model('spikformer_v2_2_64_patch4_32.fashion_mnist', pretrained=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = publish(model, 'org/name', 'mit', output=Path(folder, 'model'), dry_run=True)
    >>> result.folder.name, result.url
    ('model', None)
    """
    folder: Optional[Path]
    url: Optional[str] = None
    commit: Optional[str] = None


def publish(
        checkpoint: Union[str, Path, nn.Module, Checkpoint],
        repo: str,
        license: str,
        model: Optional[str] = None,
        ema: bool = False,
        labels: Optional[List[str]] = None,
        results: Optional[Union[str, Path]] = None,
        eval_data: Optional[Union[str, Path]] = None,
        dataset: Optional[Dataset] = None,
        train_datasets: Optional[List[str]] = None,
        base_model: Optional[str] = None,
        output: Optional[Union[str, Path]] = None,
        dry_run: bool = False,
        private: Optional[bool] = None,
        revision: Optional[str] = None,
        tag: Optional[str] = None,
        token: Optional[str] = None,
        model_kwargs: Optional[Dict[str, Any]] = None,
) -> PublishResult:
    """Publish a checkpoint as a Hub repository that timm and transformers both load.

    All checks run before the upload, and the upload is a single commit: after an interruption, the repository is
    unchanged, or newly created and empty. `output` is replaced last. A model in memory is copied and not modified, and
    the random state is restored.

    Args:
        checkpoint: A file, a folder, a timm or transformers model of this package, or a `Checkpoint`.
        repo: `ORG/NAME`.
        license: Identifier of the license of the weights, such as 'apache-2.0' or 'cc-by-nc-4.0'.
        model: Name of the model, required for a file that does not contain it.
        ema: Publish the averaged weights of train.py's `--model-ema`.
        labels: Class names in order; by default, those of the checkpoint.
        results: File of timm's validate.py with the accuracy of this checkpoint.
        eval_data: Image folder or parquet dataset to measure accuracy and firing rates on, with a test or validation
            split. Without such a split, it must be the data that `timm-spikformer demo` trained the checkpoint on; the
            images that the demo held out are used.
        dataset: Dataset that `results` or `eval_data` belong to.
        train_datasets: Hub ids of the training datasets; by default, that of `dataset` if there are results.
        base_model: Hub id of the model that training started from.
        output: Folder to write, by default a temporary one; see `folders.write_folder`.
        dry_run: Write the folder without accessing the Hub.
        private: Whether to create a private repository.
        revision: Branch to upload to; created if it does not exist.
        tag: Git tag for the uploaded commit.
        token: Token of the Hub; by default, the one set by `hf auth login` or HF_TOKEN.
        model_kwargs: Model arguments for a checkpoint file of a variant without a registered name.

    Raises:
        ValueError: An argument is invalid, or the token may not write to the repository.
        RuntimeError: The written folder gives outputs that differ from those of the checkpoint, or the Hub cannot be
            reached.
    """
    _check_arguments(repo, license, results, eval_data, dataset, train_datasets, base_model, output, dry_run)
    inputs = [path for path in (checkpoint, results) if isinstance(path, (str, Path))]
    data = [] if eval_data is None else [eval_data]
    api = HfApi(token=token, library_name='timm-spikformer')
    with _preserve_random_state(), contextlib.ExitStack() as stack:
        checkpoint = _read_or_copy(checkpoint, model, ema, labels, model_kwargs)
        architecture = checkpoint.encoder.pretrained_cfg['architecture']
        kind = f'publish {architecture}'
        folder = Path(stack.enter_context(
            tempfile.TemporaryDirectory() if output is None else write_folder(output, kind, inputs, data)))
        if not dry_run:
            hub.check_token(api)
            hub.check_upload_target(api, repo, architecture, private, revision, tag)
        measured = []
        if results is not None:
            measured = read_results(results, dataset._replace(split=dataset.split or 'test'), checkpoint)
        if eval_data is None:
            profiled, profiled_on = profile(checkpoint.encoder, example_images(checkpoint)), None
        else:
            profiled, profiled_on, result = _evaluate(checkpoint, Path(eval_data), dataset)
            measured.append(result)
        card = render_card(checkpoint, repo, license, profiled, measured, profiled_on, train_datasets, base_model)
        date = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d')
        write_checkpoint(checkpoint, folder, str(card), results_files(measured, date))
        _check_no_local_paths(folder)
        verify_folder(folder, checkpoint)
        write_manifest(folder, kind)
        if dry_run:
            return PublishResult(Path(output))
        commit = hub.upload(api, folder, repo, architecture, private, revision, tag)
    return PublishResult(Path(output) if output is not None else None, f'{api.endpoint}/{repo}', commit)


def _check_arguments(
        repo: str,
        license: str,
        results: Optional[Union[str, Path]],
        eval_data: Optional[Union[str, Path]],
        dataset: Optional[Dataset],
        train_datasets: Optional[Sequence[str]],
        base_model: Optional[str],
        output: Optional[Union[str, Path]],
        dry_run: bool,
) -> None:
    hub.check_repo_id(repo)
    hub.check_license(license)
    if base_model is not None:
        hub.check_repo_id(base_model, 'the base model')
    for id in (*(train_datasets or ()), *((dataset.id,) if dataset else ())):
        hub.check_dataset_id(id)
    if (results is not None or eval_data is not None) and dataset is None:
        raise ValueError('A result requires the dataset that it was measured on; specify it with --dataset.')
    if dataset is not None and results is None and eval_data is None:
        raise ValueError(
            'The dataset of a result is given, but no result; specify it with --results or --eval-data. If the model '
            'was trained on this dataset, use --train-dataset.')
    if dry_run and output is None:
        raise ValueError('A dry run requires an output folder; specify it with --output.')


@contextlib.contextmanager
def _preserve_random_state() -> Iterator[None]:
    """Restore the random states of PyTorch, Python and NumPy on exit, because creating a model changes them."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _read_or_copy(
        checkpoint: Union[str, Path, nn.Module, Checkpoint],
        model: Optional[str],
        ema: bool,
        labels: Optional[List[str]],
        model_kwargs: Optional[Dict[str, Any]],
) -> Checkpoint:
    """Read or copy a checkpoint, so that the caller may modify it."""
    if isinstance(checkpoint, (nn.Module, Checkpoint)):
        checkpoint = copy_checkpoint(checkpoint, labels)
    else:
        checkpoint = read_checkpoint(checkpoint, model, ema, model_kwargs)
        if labels is not None:
            set_labels(checkpoint, labels)
    check_data_config('The checkpoint', checkpoint)
    check_processor(checkpoint)
    return checkpoint


def _evaluate(checkpoint: Checkpoint, folder: Path, dataset: Dataset) -> Tuple[Profile, str, AccuracyResult]:
    """Return the profile of a checkpoint on the test images in a folder, their description, and the accuracy."""
    encoder = checkpoint.encoder
    if isinstance(checkpoint.model, SpikformerMAE) or not encoder.num_classes:
        raise ValueError('The model has no classifier, so accuracy cannot be measured. Publish without --eval-data.')
    images = match_classes(_test_images(checkpoint, folder), checkpoint.labels, encoder.num_classes)
    if dataset.split not in (None, images.split):
        raise ValueError(
            f'The test images in {folder} are the split {images.split!r}, but --split is {dataset.split!r}. '
            f'Omit --split, or use a folder with that split.')
    dataset = dataset._replace(split=images.split)
    if checkpoint.labels is None and images.classes is not None:
        set_labels(checkpoint, images.classes)
    loader = make_loader(images, checkpoint.data_config, checkpoint.limit_batch_size(64))
    profiled = profile(encoder, loader, accuracy=True)
    by = f'timm-spikformer publish, on {profiled.images:,} images'
    result = AccuracyResult('Top-1 accuracy', round(100 * profiled.accuracy, 2), dataset, by)
    return profiled, f'{profiled.images:,} images of {dataset.name}, {dataset.split}', result


def _test_images(checkpoint: Checkpoint, folder: Path) -> Images:
    """Return the test split in a folder, else the validation split, else the images that the demo held out.

    Raises:
        ValueError: There is no such split, and the checkpoint does not record that the demo trained it on exactly the
            other images.
    """
    splits = read_splits(folder)
    for split in ('test', 'validation'):
        if split in splits:
            return splits[split]
    args = checkpoint.training.args if checkpoint.training is not None else {}
    seed, digest = args.get('seed'), args.get(DIGEST_ARG)
    if type(seed) is int and seed >= 0 and digest is not None:
        train, test = select_train_test(splits, seed)
        if train.digest() == digest:
            return test
    raise ValueError(
        f'{folder} has no test split, and the checkpoint may have been trained on its images. Use data with a test '
        f'split: DIR/test/CLASS/*.png or DIR/test.parquet. Without a test split, held-out images are used only for a '
        f'checkpoint of `timm-spikformer demo` and the data that it was trained on.')


def _check_no_local_paths(folder: Path) -> None:
    """Raise a RuntimeError if a text file to be published contains a local path."""
    for path in folder.rglob('*'):
        if path.suffix in ('.md', '.json', '.yaml'):
            text = path.read_text(encoding='utf-8')
            found = re.search(r'(?<![\w:/.])/(home|root|tmp|Users|mnt|data|work|scratch)/[^\s"\']+', text)
            if found:
                raise RuntimeError(f'{path.name} contains a local path, {found.group()}. Remove it first.')
