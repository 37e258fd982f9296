"""Sources of `pretrained=True`: the weights in the package, and a namespace on the Hub that the user sets.

There is no default namespace: anyone could register one that this project does not own. Only safetensors are
downloaded, and their digest is compared with the one that the Hub stores them under.
"""
import hashlib
import os
import re
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple, Union

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

__all__ = [
    'cfg_to_train', 'check_hub', 'check_shipped', 'download', 'locate_weights', 'set_hub_namespace', 'shipped_weights']

WEIGHTS_FILE = 'model.safetensors'
NAMESPACE_VARIABLE = 'TIMM_SPIKFORMER_HUB'
_SHIPPED = Path(__file__).parent / 'assets' / 'weights'
SHA256_FILE = 'SHA256SUMS'  # in the same folder, in the format of sha256sum
_WITHOUT_WEIGHTS = 'untrained'  # tag of models that are never published

_PATIENCE = 4.  # seconds that the Hub has to answer in

_namespace: Optional[str] = None


def shipped_weights(name: str) -> Optional[str]:
    """Return the path of the shipped weights of `name`, a model.tag; None in copies of the code without them."""
    path = _SHIPPED / f'{name}.safetensors'
    return str(path) if path.is_file() else None


def check_shipped(file: str) -> None:
    """
    Raises:
        RuntimeError: The digest of a file of shipped weights is not the expected one.
    """
    sums = _SHIPPED / SHA256_FILE
    lines = sums.read_text(encoding='utf-8').splitlines() if sums.is_file() else []
    expected = {name: digest for digest, name in (line.split('  ', 1) for line in lines)}.get(os.path.basename(file))
    if _sha256(file) != expected:
        raise RuntimeError(f'{file} is damaged: its sha256 is not {expected}. Install the package anew.')


def cfg_to_train(model: str) -> PretrainedCfg:
    """Return the cfg to train `model` with: that of its first tag without weights."""
    return next(cfg for cfg in get_arch_pretrained_cfgs(model).values() if not cfg.file)


def _sha256(path: Union[str, Path]) -> str:
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def split_revision(repo: str) -> Tuple[str, Optional[str]]:
    """Split `ORG/NAME@REVISION`, as timm writes it."""
    repo_id, _, revision = repo.partition('@')
    return repo_id, revision or None


@contextmanager
def _explained(repo: str, filename: str) -> Iterator[None]:
    """Turn errors of a download into a RuntimeError that says what to do."""
    repo_id, revision = split_revision(repo)
    try:
        yield
    except RepositoryNotFoundError as e:
        raise RuntimeError(
            f'There is no repository {repo_id} on the Hub, or no access to it. If it is private, log in with '
            f'`hf auth login` or set HF_TOKEN.') from e
    except RevisionNotFoundError as e:
        raise RuntimeError(f'The repository {repo_id} has no revision {revision!r}.') from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as e:  # before EntryNotFoundError, whose subclass it is
        why = 'HF_HUB_OFFLINE is set. Unset it' if is_offline_mode() else 'the Hub cannot be reached. Connect'
        raise RuntimeError(f'{filename} of {repo} is not in the cache, and {why}, and try again.') from e
    except EntryNotFoundError as e:
        raise RuntimeError(
            f'The repository {repo} holds no {filename}. Publish it with `timm-spikformer publish`; weights in another '
            f'format than safetensors are not loaded.') from e
    except (HTTPError, OSError) as e:
        raise RuntimeError(f'{filename} of {repo} could not be downloaded: {e}. Nothing was kept; try again.') from e


def check_hub(endpoint: Optional[str] = None) -> None:
    """Fail within seconds if the Hub cannot be reached; the client itself would try again for up to a minute.

    Args:
        endpoint: Address of the Hub, by default the one of huggingface_hub.

    Raises:
        RuntimeError: It cannot be reached, and why.
    """
    endpoint = endpoint or constants.ENDPOINT
    outcome: List[Optional[BaseException]] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=_PATIENCE)
            outcome.append(None)
        except Exception as e:
            outcome.append(e)

    # in a thread, as looking up a name has no time limit, and a host with several addresses has one for each
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    error = outcome[0] if outcome else TimeoutError(f'{endpoint} did not answer within {_PATIENCE:g} seconds')
    if error is not None:
        reason = str(error).strip().splitlines()[0].removesuffix('.') if str(error).strip() else type(error).__name__
        raise RuntimeError(
            f'The Hub cannot be reached: {reason}. Check the network, or unset HF_HUB_OFFLINE where it is set, and try '
            f'again.') from error


def download(repo: str, filename: str, cache_dir: Optional[Union[str, Path]] = None) -> str:
    """Download a file of a Hub repository, `ORG/NAME` or `ORG/NAME@REVISION`; return its path in the cache.

    Raises:
        RuntimeError: There is no such repository, revision or file, or no network, or the file was damaged during the
            download; a damaged file is removed from the cache.
    """
    repo_id, revision = split_revision(repo)
    if not _is_cached(repo, filename, cache_dir) and not is_offline_mode():
        check_hub()
    with _explained(repo, filename):
        path = hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir)
    blob = Path(path).resolve()
    # the cache names files that the Hub stores by digest, such as weights, after it
    if re.fullmatch('[0-9a-f]{64}', blob.name) and _sha256(blob) != blob.name:
        Path(path).unlink()
        blob.unlink(missing_ok=True)
        raise RuntimeError(
            f'{filename} of {repo} was damaged on its way: its sha256 is not {blob.name}. It has been removed from the '
            f'cache; try again.')
    return path


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
        `model_args` and `kwargs` with a local file of weights, and with the arguments that the config.json of the
        repository contains.

    Raises:
        RuntimeError: There are no weights to load, and why.
        ValueError: The repository holds another model, or the file is not a safetensors file.
    """
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    name = f'{variant}.{cfg.tag}' if cfg.tag else variant
    if cfg.state_dict or cfg.file or cfg.url or cfg.source == 'local-dir':
        if cfg.file and cfg.file == shipped_weights(name):
            check_shipped(cfg.file)
        return model_args, kwargs

    repo = cfg.hf_hub_id or _repository(name)
    if repo is None:
        raise RuntimeError(
            f'No weights have been published for {name}. Train it (see recipes/ and `timm-spikformer demo`) or convert '
            f"a checkpoint (`timm-spikformer convert`), and load yours by checkpoint_path=FILE, or as "
            f"'local-dir:FOLDER' or 'hf-hub:ORG/NAME'. If an organization has published some, name it: "
            f'timm_spikformer.set_hub_namespace("ORG") or {NAMESPACE_VARIABLE}=ORG.')
    filename = cfg.hf_hub_filename or WEIGHTS_FILE
    if not re.fullmatch(r'[\w.-]+\.safetensors', filename):  # a config.json from the Hub may ask for anything
        raise ValueError(
            f'{filename!r} of {repo} is not a name of a safetensors file, and nothing else is loaded from the Hub.')
    cache_dir = kwargs.get('cache_dir')
    kwargs = dict(kwargs)
    if not _is_cached(repo, filename, cache_dir) and not is_offline_mode():
        check_hub()
    if cfg.source != 'hf-hub':  # then timm has not read the repository's config.json yet
        with _explained(repo, 'config.json'):
            repo_cfg, architecture, repo_args = load_model_config_from_hf(repo, cache_dir)
        if architecture != variant:
            raise ValueError(f'The repository {repo} holds the model {architecture}, expected {variant}.')
        kwargs['pretrained_cfg'] = repo_cfg
        model_args = {**model_args, **repo_args}
    file = download(repo, filename, cache_dir)
    kwargs['pretrained_cfg_overlay'] = {**overlay, 'file': file, 'hf_hub_id': repo, 'source': None}
    return model_args, kwargs


def _repository(name: str) -> Optional[str]:
    """Return the repository of `name`, a model.tag, in the user's namespace, None if there is none."""
    if _namespace is None or '.' not in name or name.endswith(f'.{_WITHOUT_WEIGHTS}'):
        return None
    organization, revision = split_revision(_namespace)
    return f'{organization}/{name}@{revision}' if revision else f'{organization}/{name}'


def _is_cached(repo: str, filename: str = WEIGHTS_FILE, cache_dir: Optional[Union[str, Path]] = None) -> bool:
    repo_id, revision = split_revision(repo)
    return isinstance(try_to_load_from_cache(repo_id, filename, cache_dir, revision), str)


def _listed(namespace: str) -> Optional[Set[str]]:
    """Return the repositories of a namespace; None, with a warning, if the Hub cannot be asked."""
    try:
        check_hub()
        return {info.id for info in HfApi().list_models(author=split_revision(namespace)[0])}
    except (RuntimeError, HTTPError, OSError) as e:
        warnings.warn(
            f'{e} The models of {namespace} are not listed, other than those downloaded before.', stacklevel=3)
        return None


def set_hub_namespace(namespace: Optional[str], ask_hub: bool = True) -> None:
    """Load weights that are not shipped from `NAMESPACE/MODEL.TAG` on the Hub.

    `timm.list_pretrained` then lists the models there. The environment variable TIMM_SPIKFORMER_HUB does the same
    without the network, so it lists only what has been downloaded before.

    Args:
        namespace: Organization or user, with `@REVISION` to pin a branch or tag; None for none.
        ask_hub: Ask the Hub for its models. If it cannot be reached, there is a warning within seconds, and only
            models in the cache are listed.

    Raises:
        ValueError: The name is not one of an organization or user.
    """
    global _namespace
    if namespace is not None and not re.fullmatch(r'[A-Za-z0-9][\w.-]*(@[\w./-]+)?', namespace):
        raise ValueError(f'Expected the name of an organization or user, or NAME@REVISION, got {namespace!r}.')
    _namespace = namespace
    listed = _listed(namespace) if namespace is not None and ask_hub else None
    for model in list_models(module='spikformer'):
        entry_point = model_entrypoint(model)
        default_cfg = sys.modules[entry_point.__module__].default_cfgs[model]
        for tag, cfg in default_cfg.cfgs.items():
            repo = None if cfg.file else _repository(f'{model}.{tag}')
            if repo and not (_is_cached(repo) if listed is None else split_revision(repo)[0] in listed):
                repo = None
            default_cfg.cfgs[tag] = replace(cfg, hf_hub_id=repo)
        default_cfg.is_pretrained = any(cfg.has_weights for cfg in default_cfg.cfgs.values())
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the name is registered already, by the same function
            register_model(entry_point)


def use_environment() -> None:
    """Set the namespace that TIMM_SPIKFORMER_HUB names, without asking the Hub."""
    namespace = os.environ.get(NAMESPACE_VARIABLE)
    if namespace:
        set_hub_namespace(namespace, ask_hub=False)
