"""Sources of weights for `pretrained=True`: the package, and a namespace on the Hub that the user sets.

There is no default namespace, because this project owns none and anyone could register it. Only safetensors files are
downloaded, and their digest is compared with the one on the Hub.
"""
import json
import os
import re
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple, Union

import safetensors
from huggingface_hub import HfApi, constants, get_session, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import (
    PretrainedCfg,
    get_arch_pretrained_cfgs,
    list_models,
    load_model_config_from_hf,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)

from .digests import sha256_of_file
from .errors import first_line

__all__ = [
    'check_hub_connection', 'check_shipped_weights', 'download', 'download_if_exists', 'get_training_cfg',
    'locate_weights', 'read_digests', 'read_metadata', 'read_model_args', 'set_hub_namespace', 'shipped_weights',
    'split_revision',
]

WEIGHTS_FILE = 'model.safetensors'
NAMESPACE_VARIABLE = 'TIMM_SPIKFORMER_HUB'
WEIGHTS_FOLDER = Path(__file__).parent / 'assets' / 'weights'
SHA256_FILE = 'SHA256SUMS'  # digests of the files in that folder, in the format of sha256sum
MODEL_ARGS_KEY = 'model_args'  # key of the `create_model` arguments, such as time_steps, in the metadata of the files
_UNPUBLISHED_TAG = 'untrained'  # tag of models that are never published

_HUB_TIMEOUT = 4.  # timeout for an answer from the Hub, in seconds

_namespace: Optional[str] = None


def shipped_weights(name: str) -> Optional[str]:
    """Return the path of the shipped weights of `name`, `MODEL.TAG`; None if this copy of the code has none."""
    path = WEIGHTS_FOLDER / f'{name}.safetensors'
    return str(path) if path.is_file() else None


def read_digests(folder: Path) -> Dict[str, str]:
    """Return the digests in the SHA256SUMS file of a folder by file name; empty if there is no such file.

    Raises:
        RuntimeError: The file is damaged.
    """
    path = folder / SHA256_FILE
    lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    if not all(re.fullmatch('[0-9a-f]{64}  .+', line) for line in lines):
        raise RuntimeError(f'{path} is damaged: expected lines with a sha256 and a file name. Reinstall the package.')
    return {name: digest for digest, name in (line.split('  ', 1) for line in lines)}


def check_shipped_weights(file: str) -> None:
    """Check the digest of a file of shipped weights; SHA256SUMS is in its folder.

    Raises:
        RuntimeError: The digest is not the expected one.
    """
    expected = read_digests(Path(file).parent).get(os.path.basename(file))
    if sha256_of_file(file) != expected:
        raise RuntimeError(f'{file} is damaged: its sha256 is not {expected}. Reinstall the package.')


def read_metadata(file: Union[str, Path]) -> Dict[str, str]:
    """Return the metadata of a safetensors file; empty if it has none, or for other files."""
    if not str(file).endswith('.safetensors'):
        return {}
    with safetensors.safe_open(file, 'pt') as f:
        return f.metadata() or {}


def read_model_args(file: Union[str, Path]) -> Dict[str, Any]:
    """Return the arguments of `create_model`, such as time_steps, in the metadata of a weights file; often empty.

    Raises:
        ValueError: The metadata is invalid.
    """
    text = read_metadata(file).get(MODEL_ARGS_KEY, '{}')
    try:
        args = json.loads(text)
    except (ValueError, RecursionError):
        args = None
    if not isinstance(args, dict):
        raise ValueError(f'{file} contains {MODEL_ARGS_KEY}={text!r} in its metadata, expected a JSON object.')
    return args


def get_training_cfg(model: str) -> PretrainedCfg:
    """Return the pretrained cfg to train `model` with: the first one without shipped weights, or else the first one."""
    cfgs = list(get_arch_pretrained_cfgs(model).values())
    return next((cfg for cfg in cfgs if not cfg.file), cfgs[0])


def split_revision(repo: str) -> Tuple[str, Optional[str]]:
    """Split `ORG/NAME@REVISION`, which is timm's notation."""
    repo_id, _, revision = repo.partition('@')
    return repo_id, revision or None


@contextmanager
def _convert_errors(repo: str, filename: str) -> Iterator[None]:
    """Convert download errors to a RuntimeError that states what to do."""
    repo_id, revision = split_revision(repo)
    try:
        yield
    except RepositoryNotFoundError as e:
        raise RuntimeError(
            f'There is no repository {repo_id} on the Hub, or no access to it. If it is private, log in with '
            f'`hf auth login` or set HF_TOKEN.') from e
    except RevisionNotFoundError as e:
        raise RuntimeError(f'The repository {repo_id} has no revision {revision!r}.') from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:  # before its base class EntryNotFoundError
        why = 'HF_HUB_OFFLINE is set. Unset it' if is_offline_mode() else 'the Hub cannot be reached. Connect'
        raise RuntimeError(f'{filename} of {repo} is not in the cache, and {why}, and try again.') from e
    except EntryNotFoundError as e:
        raise RuntimeError(
            f'The repository {repo} contains no {filename}. Publish it with `timm-spikformer publish`; only weights in '
            f'safetensors format are loaded.') from e
    except (HTTPError, OSError) as e:
        raise RuntimeError(f'{filename} of {repo} could not be downloaded: {e}. Nothing was kept; try again.') from e


def check_hub_connection(endpoint: Optional[str] = None) -> None:
    """Fail within seconds if the Hub cannot be reached; huggingface_hub itself would retry for up to a minute.

    Args:
        endpoint: URL of the Hub; by default, that of huggingface_hub.

    Raises:
        RuntimeError: The Hub cannot be reached; the message states why.
    """
    endpoint = endpoint or constants.ENDPOINT
    results: List[Optional[BaseException]] = []

    def send_request() -> None:
        try:
            get_session().head(endpoint, timeout=_HUB_TIMEOUT)
            results.append(None)
        except Exception as e:
            results.append(e)

    # in a thread, because a DNS lookup has no timeout, and the timeout applies to each address of a host separately
    thread = threading.Thread(target=send_request, daemon=True)
    thread.start()
    thread.join(_HUB_TIMEOUT)
    error = results[0] if results else TimeoutError(f'{endpoint} did not answer within {_HUB_TIMEOUT:g} seconds')
    if error is not None:
        reason = first_line(error)
        raise RuntimeError(
            f'The Hub cannot be reached: {reason}. Check the network, or unset HF_HUB_OFFLINE if it is set, and try '
            f'again.') from error


def download(repo: str, filename: str, cache_dir: Optional[Union[str, Path]] = None) -> str:
    """Download a file of a Hub repository, `ORG/NAME` or `ORG/NAME@REVISION`; return its path in the cache.

    Raises:
        RuntimeError: The repository, revision or file does not exist, there is no network, or the file was damaged
            during the download; a damaged file is removed from the cache.
    """
    repo_id, revision = split_revision(repo)
    if not _is_cached(repo, filename, cache_dir) and not is_offline_mode():
        check_hub_connection()
    with _convert_errors(repo, filename):
        path = hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir)
    blob = Path(path).resolve()
    # files that the Hub stores by digest, such as weights, have the digest as their name in the cache
    if re.fullmatch('[0-9a-f]{64}', blob.name) and sha256_of_file(blob) != blob.name:
        Path(path).unlink()
        blob.unlink(missing_ok=True)
        raise RuntimeError(
            f'{filename} of {repo} was damaged during the download: its sha256 is not {blob.name}. It has been removed '
            f'from the cache; try again.')
    return path


def download_if_exists(repo: str, filename: str) -> Optional[str]:
    """Download a file of a Hub repository like `download`; return None if the repository does not contain it.

    Raises:
        RuntimeError: The repository or revision does not exist, there is no network to find out whether the file
            exists, or the file was damaged during the download.
    """
    repo_id, revision = split_revision(repo)
    cached = try_to_load_from_cache(repo_id, filename, revision=revision)
    if cached is not None and not isinstance(cached, str):  # an earlier request has found that it does not exist
        return None
    try:
        return download(repo, filename)
    except RuntimeError as e:
        if isinstance(e.__cause__, EntryNotFoundError) and not isinstance(e.__cause__, LocalEntryNotFoundError):
            return None
        raise


def locate_weights(
        variant: str,
        model_args: Dict[str, Any],
        kwargs: Dict[str, Any],
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Prepare the arguments of a model for `pretrained=True`, and download its weights.

    Args:
        variant: Registered name of the model, without a tag.
        model_args: Dimensions of the registered name.
        kwargs: Arguments of the user, including timm's own.

    Returns:
        `model_args` and `kwargs` with a local file of weights, and with the arguments that the weights were trained
        with: those in the config.json of the repository, or in the metadata of a shipped file.

    Raises:
        RuntimeError: There are no weights to load; the message states why.
        ValueError: The repository contains another model, or the file is not a safetensors file.
    """
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    if cfg.state_dict or cfg.file or cfg.url or cfg.source == 'local-dir':
        if cfg.file:
            if cfg.file == shipped_weights(name):
                check_shipped_weights(cfg.file)
            model_args = {**model_args, **read_model_args(cfg.file)}
        return model_args, kwargs

    repo = cfg.hf_hub_id or _repository(name)
    if repo is None:
        raise RuntimeError(
            f'No weights have been published for {name}. Train it (see recipes/ and `timm-spikformer demo`) or convert '
            f"a checkpoint (`timm-spikformer convert`), and load it with checkpoint_path=FILE, or as "
            f"'local-dir:FOLDER' or 'hf-hub:ORG/NAME'. If an organization has published weights, select it with "
            f'timm_spikformer.set_hub_namespace("ORG") or {NAMESPACE_VARIABLE}=ORG.')
    filename = cfg.hf_hub_filename or WEIGHTS_FILE
    if not re.fullmatch(r'[\w.-]+\.safetensors', filename):  # the name may be from an untrusted config.json on the Hub
        raise ValueError(
            f'{filename!r} of {repo} is not the name of a safetensors file. Other files are not loaded from the Hub.')
    cache_dir = kwargs.get('cache_dir')
    kwargs = dict(kwargs)
    if not _is_cached(repo, filename, cache_dir) and not is_offline_mode():
        check_hub_connection()
    if cfg.source != 'hf-hub':  # otherwise timm has already read the config.json of the repository
        with _convert_errors(repo, 'config.json'):
            repo_cfg, architecture, repo_args = load_model_config_from_hf(repo, cache_dir)
        if architecture != variant:
            raise ValueError(f'The repository {repo} contains the model {architecture}, expected {variant}.')
        kwargs['pretrained_cfg'] = repo_cfg
        model_args = {**model_args, **repo_args}
    file = download(repo, filename, cache_dir)
    kwargs['pretrained_cfg_overlay'] = {**overlay, 'file': file, 'hf_hub_id': repo, 'source': None}
    return model_args, kwargs


def _repository(name: str) -> Optional[str]:
    """Return the repository of `name`, `MODEL.TAG`, in the namespace that the user has set, or None."""
    if _namespace is None or '.' not in name or name.endswith(f'.{_UNPUBLISHED_TAG}'):
        return None
    organization, revision = split_revision(_namespace)
    return f'{organization}/{name}@{revision}' if revision else f'{organization}/{name}'


def _is_cached(repo: str, filename: str = WEIGHTS_FILE, cache_dir: Optional[Union[str, Path]] = None) -> bool:
    repo_id, revision = split_revision(repo)
    return isinstance(try_to_load_from_cache(repo_id, filename, cache_dir, revision), str)


def _list_repos(namespace: str) -> Optional[Set[str]]:
    """Return the repositories of a namespace; None, with a warning, if the Hub cannot be reached."""
    try:
        check_hub_connection()
        return {info.id for info in HfApi().list_models(author=split_revision(namespace)[0])}
    except (RuntimeError, HTTPError, OSError) as e:
        warnings.warn(
            f'{e} Only models of {namespace} that have been downloaded before are listed.', stacklevel=3)
        return None


def set_hub_namespace(namespace: Optional[str], query_hub: bool = True) -> None:
    """Set the Hub namespace of weights that are not in the package: they are loaded from `NAMESPACE/MODEL.TAG`.

    `timm.list_pretrained` then lists the models there. The environment variable TIMM_SPIKFORMER_HUB has the same effect
    but does not use the network, so only models that have been downloaded before are listed.

    Args:
        namespace: Organization or user, with `@REVISION` to pin a branch or tag; None for no namespace.
        query_hub: Query the Hub for the models of the namespace. If it cannot be reached within seconds, there is a
            warning, and only models in the cache are listed.

    Raises:
        ValueError: `namespace` is not a valid name of an organization or user.
    """
    global _namespace
    if namespace is not None and not re.fullmatch(r'[A-Za-z0-9][\w.-]*(@[\w./-]+)?', namespace):
        raise ValueError(f'Expected the name of an organization or user, or NAME@REVISION, got {namespace!r}.')
    _namespace = namespace
    hub_repos = _list_repos(namespace) if namespace is not None and query_hub else None
    for model in list_models(module='spikformer'):
        entry_point = model_entrypoint(model)
        default_cfg = sys.modules[entry_point.__module__].default_cfgs[model]
        for tag, cfg in default_cfg.cfgs.items():
            repo = None if cfg.file else _repository(f'{model}.{tag}')
            if repo and not (_is_cached(repo) if hub_repos is None else split_revision(repo)[0] in hub_repos):
                repo = None
            default_cfg.cfgs[tag] = replace(cfg, hf_hub_id=repo)
        default_cfg.is_pretrained = any(cfg.has_weights for cfg in default_cfg.cfgs.values())
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # timm warns that the name is already registered
            register_model(entry_point)


def set_hub_namespace_from_environment() -> None:
    """Set the namespace from the environment variable TIMM_SPIKFORMER_HUB, without querying the Hub."""
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    if namespace:
        set_hub_namespace(namespace, query_hub=False)
