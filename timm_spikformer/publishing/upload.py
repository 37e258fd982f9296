"""Publishes a checkpoint: writes the folder, verifies it, and uploads it in one commit."""
import datetime
import json
import re
import tempfile
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple, Union

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..demo.data import load_data, make_loader
from ..masked_autoencoder import SpikformerMAE
from ..profiling import Profile, profile
from .card import Dataset, Result, read_results, render_card, results_files
from .checkpoint import Checkpoint, from_model, read_checkpoint, set_labels
from .folder import example_images, save_folder, verify_folder

__all__ = ['Published', 'publish']

# what an earlier commit may have left, and a loader might take for this one's
_STALE = ['*.safetensors', '*.index.json', '*.bin', '*.pth', '*.py', '.eval_results/*']


class Published(NamedTuple):
    """Where it went: the folder, if one was asked for, and the address and commit where it was uploaded."""
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
) -> Published:
    """Publish a checkpoint as a Hub repository that timm and transformers both load.

    Everything that can be wrong is looked at before anything is uploaded, and the upload is one commit: interrupted,
    the repository is as it was, or empty; run again, it finishes.

    Args:
        checkpoint: A file, a folder, a model of any of the classes, or what `read_checkpoint` returns
        repo: `ORG/NAME`
        license: Identifier of the licence of the weights, such as 'apache-2.0' or 'cc-by-nc-4.0'
        model: Name of the model, for a file that does not say it
        ema: Take the averaged weights of train.py's `--model-ema`
        labels: Names of the classes, where the checkpoint does not know them
        results: File of timm's validate.py with this checkpoint's accuracy
        eval_data: Folder of images, or parquet files, to measure accuracy and firing rates on
        dataset: What `results` or `eval_data` were measured on
        train_datasets: Ids of the datasets that it was trained on; by default the one that it was measured on
        base_model: Id of the repository that training started from
        output: Folder to write, by default a temporary one
        dry_run: Write the folder, and do not touch the Hub
        private: Make the repository private where it is created
        revision: Branch to upload to, created if need be
        tag: Tag to give the commit
        token: Of the Hub, by default the one that `hf auth login` or HF_TOKEN has set

    Raises:
        ValueError: What was given does not fit, or the Hub does not let one write there.
        RuntimeError: What was written does not load as it was, or the Hub cannot be reached.
    """
    _check_arguments(repo, license, results, eval_data, dataset, output, dry_run)
    if isinstance(checkpoint, nn.Module):
        checkpoint = from_model(checkpoint)
    elif not isinstance(checkpoint, Checkpoint):
        checkpoint = read_checkpoint(checkpoint, model, ema)
    if labels is not None:
        set_labels(checkpoint, labels)
    api = HfApi(token=token, library_name='timm-spikformer')
    if not dry_run:
        _check_hub(api, repo, checkpoint.encoder.pretrained_cfg['architecture'], revision, tag)

    measured = [] if results is None else read_results(results, dataset)
    if eval_data is None:
        profiled, profiled_on = profile(checkpoint.encoder, example_images(checkpoint)), None
    else:
        profiled, profiled_on = _evaluate(checkpoint, Path(eval_data), dataset)
        by = f'timm-spikformer publish, on {profiled.images:,} images'
        measured.append(Result('Top-1 accuracy', round(100 * profiled.accuracy, 2), dataset, by))
    card = render_card(checkpoint, repo, license, profiled, measured, profiled_on, train_datasets, base_model)
    date = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d')
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / 'model' if output is None else Path(output)
        save_folder(checkpoint, folder, str(card), **results_files(measured, date))
        _check_texts(folder)
        verify_folder(folder, checkpoint)
        if dry_run:
            return Published(folder)
        commit = _upload(api, folder, repo, private, revision, tag)
    return Published(output and folder, f'{api.endpoint}/{repo}', commit)


def _check_arguments(repo, license, results, eval_data, dataset, output, dry_run) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise ValueError(f'{repo!r} is not a name of a repository. Expected ORG/NAME. {e}') from e
    if '/' not in repo:
        raise ValueError(f'{repo!r} does not say whose repository it is. Expected ORG/NAME.')
    if not license or not re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', license):
        raise ValueError(
            f"A licence of the weights is required, as an identifier of the Hub's such as 'apache-2.0' or "
            f"'cc-by-nc-4.0'; got {license!r}.")
    if (results or eval_data) and dataset is None:
        raise ValueError('A result needs the dataset it was measured on: its id, name and split.')
    if dry_run and output is None:
        raise ValueError('A dry run needs an output folder.')


def _evaluate(checkpoint: Checkpoint, folder: Path, dataset: Dataset) -> Tuple[Profile, str]:
    """Accuracy, firing rates and operations on the test images in a folder, and what these are."""
    encoder = checkpoint.encoder
    if isinstance(checkpoint.model, SpikformerMAE) or not encoder.num_classes:
        raise ValueError('The model has no classifier, and so no accuracy. Publish without evaluation data.')
    data = load_data(folder, encoder.pretrained_cfg['architecture'])._replace(config=checkpoint.data_config)
    if len(data.classes) != encoder.num_classes:
        raise ValueError(f'{folder} has {len(data.classes)} classes, but the model has {encoder.num_classes}.')
    if checkpoint.labels is None:
        checkpoint.labels = list(data.classes)
    elif checkpoint.labels != list(data.classes):
        raise ValueError(f'The classes in {folder} are not those of the model, or in another order.')
    loader = make_loader(data, 64, torch.device('cpu'), is_training=False)
    on = f'{len(data.test):,} images of {dataset.name}, {dataset.split} split'
    return profile(encoder, loader, accuracy=True), on


def _check_texts(folder: Path) -> None:
    """Nothing of this machine in what is published."""
    for path in folder.rglob('*'):
        if path.suffix in ('.md', '.json', '.yaml'):
            found = re.search(r'(?<![\w:/.])/(home|root|tmp|Users|mnt|data|work|scratch)/[^\s"\']+', path.read_text())
            if found:
                raise RuntimeError(f'{path.name} names a path of this machine, {found.group()}. Remove it first.')


def _check_hub(api: HfApi, repo: str, architecture: str, revision: Optional[str], tag: Optional[str]) -> None:
    """That there is a token, and that the repository is not another model's, before anything is done."""
    try:
        api.whoami()
    except LocalTokenNotFoundError as e:
        raise ValueError('There is no token of the Hub. Log in with `hf auth login`, or set HF_TOKEN.') from e
    except HfHubHTTPError as e:
        if e.response.status_code == 401:
            raise ValueError('The Hub does not accept the token. Log in with `hf auth login`, or set HF_TOKEN.') from e
        raise RuntimeError(f'The Hub does not answer as it should: {e}. Nothing was uploaded; try again.') from e
    except (HTTPError, OSError) as e:
        raise RuntimeError(f'The Hub cannot be reached: {e}. Nothing was uploaded; try again.') from e
    try:
        if tag is not None and tag in {ref.name for ref in api.list_repo_refs(repo).tags}:
            raise ValueError(f'The repository {repo} has a tag {tag!r} already. Choose another.')
        with tempfile.TemporaryDirectory() as cache:
            path = hf_hub_download(repo, 'config.json', revision=revision, token=api.token, cache_dir=cache)
            existing = json.loads(Path(path).read_text())
        existing = existing.get('architecture') or existing.get('model_type', 'another model')
        if existing != architecture:
            raise ValueError(
                f'The repository {repo} holds a {existing}, and this is a {architecture}. Choose another name.')
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
        pass  # there is nothing yet


def _upload(
        api: HfApi,
        folder: Path,
        repo: str,
        private: Optional[bool],
        revision: Optional[str],
        tag: Optional[str],
) -> str:
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, delete_patterns=_STALE,
            commit_message='Publish with timm-spikformer')
        if tag is not None:
            api.create_tag(repo, tag=tag, revision=info.oid)
    except HfHubHTTPError as e:
        if e.response.status_code in (401, 403):
            raise ValueError(f'The token may not write to {repo}. Use one with write access to it.') from e
        raise RuntimeError(f'The upload to {repo} failed: {e}. Run the same again to finish it.') from e
    except (HTTPError, OSError, RuntimeError) as e:
        raise RuntimeError(f'The upload to {repo} was interrupted: {e}. Run the same again to finish it.') from e
    return info.oid
