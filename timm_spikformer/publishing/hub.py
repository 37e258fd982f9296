"""Access to the Hugging Face Hub for publishing: checks of the repository, and the upload in one commit."""
import glob
import json
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import first_line
from ..folders import MANIFEST, manifest_files
from ..pretrained import check_hub_connection

__all__ = [
    'UploadTarget',
    'check_dataset_id',
    'check_license',
    'check_repo_id',
    'check_token',
    'check_upload_target',
    'upload',
]

# License identifiers that the Hub accepts, https://huggingface.co/docs/hub/repositories-licenses
LICENSES = frozenset("""
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
""".split())


class UploadTarget(NamedTuple):
    """State of the repository before the upload.

    Args:
        head: Commit that the upload is based on: the head of the branch, or of the main branch if the branch does not
            exist yet. None if the repository does not exist.
        files: Files in that commit that this package wrote, according to the manifest in it.
    """
    head: Optional[str]
    files: List[str]


def check_repo_id(repo: str, what: str = 'a repository') -> None:
    """Raise a ValueError if `repo` is not `ORG/NAME`."""
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise ValueError(f'{repo!r} is not a valid name of {what}. Expected ORG/NAME. {e}') from e
    if '/' not in repo:
        raise ValueError(f'{repo!r} contains no organization or user. Expected ORG/NAME.')


def check_dataset_id(dataset: str) -> None:
    """Raise a ValueError if a dataset id is not `ORG/NAME`, or `NAME` as for some old datasets on the Hub."""
    try:
        validate_repo_id(dataset)
    except HFValidationError as e:
        raise ValueError(f'{dataset!r} is not a valid id of a Hub dataset. Expected ORG/NAME. {e}') from e


def check_license(license: str) -> None:
    """Raise a ValueError if the Hub does not accept a license identifier."""
    if license not in LICENSES:
        raise ValueError(
            f"The license of the weights must be an identifier of the Hub such as 'apache-2.0' or 'cc-by-nc-4.0', or "
            f"'other' if it has none, got {license!r}.")


def check_token(api: HfApi) -> None:
    """Check that the Hub can be reached and accepts the token.

    Raises:
        ValueError: There is no token, or the Hub does not accept it.
        RuntimeError: The Hub cannot be reached.
    """
    check_hub_connection(api.endpoint)
    with _convert_errors():
        try:
            api.whoami()
        except LocalTokenNotFoundError as e:
            raise ValueError('There is no Hub token. Log in with `hf auth login`, or set HF_TOKEN.') from e
        except HfHubHTTPError as e:
            if e.response.status_code == 401:
                raise ValueError(
                    'The Hub does not accept the token. Log in with `hf auth login`, or set HF_TOKEN.') from e
            raise


def check_upload_target(
        api: HfApi,
        repo: str,
        architecture: str,
        private: Optional[bool] = None,
        revision: Optional[str] = None,
        tag: Optional[str] = None,
) -> UploadTarget:
    """Check that uploading to a repository does not overwrite another model. If this cannot be checked, raise an error.

    Args:
        api: Client of the Hub.
        repo: `ORG/NAME`.
        architecture: Name of the architecture to upload.
        private: Whether the repository must be private.
        revision: Branch to upload to; by default, the main branch.
        tag: Tag to create, which must not exist yet.

    Raises:
        ValueError: The repository contains another model, is public although `private` is True, or already has the tag.
        RuntimeError: The Hub cannot be reached or returns an error.
    """
    with _convert_errors():
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError as e:
            if isinstance(e, GatedRepoError):
                raise ValueError(f'The repository {repo} is gated, and the token has no access. Ask its owner.') from e
            return UploadTarget(None, [])
        if private and not info.private:
            raise ValueError(
                f'The repository {repo} is public. Make it private in its settings, or publish without --private.')
        if tag is not None and tag in {ref.name for ref in api.list_repo_refs(repo).tags}:
            raise ValueError(f'The repository {repo} already has a tag {tag!r}. Choose another.')
        try:
            head = info.sha if revision is None else api.model_info(repo, revision=revision).sha
        except RevisionNotFoundError:  # the branch will be created from the main branch
            revision, head = None, info.sha
        at = head if revision is None else revision
        config = _read_json(api, repo, 'config.json', at)
        found = None if config is None else config.get('architecture') or config.get('model_type') or 'another model'
        if found not in (None, architecture):
            raise ValueError(
                f'The repository {repo} contains {found}, but this is a {architecture}. Choose another name.')
        return UploadTarget(head, _read_manifest(api, repo, at))


def upload(
        api: HfApi,
        folder: Path,
        repo: str,
        architecture: str,
        private: Optional[bool] = None,
        revision: Optional[str] = None,
        tag: Optional[str] = None,
) -> str:
    """Upload the files that the manifest of a folder lists in one commit, and return the commit hash.

    The commit also deletes files that the manifest in the repository lists and the new manifest does not.

    Raises:
        ValueError: The token may not write to the repository; or see `check_upload_target`.
        RuntimeError: The upload failed; the repository is unchanged, or newly created and empty.
    """
    new = [*manifest_files(folder), MANIFEST]
    with _convert_errors(repo):
        api.create_repo(repo, private=private, exist_ok=True)
        # the commit names its parent, so it fails if the branch changes after this check
        target = check_upload_target(api, repo, architecture, private, revision, tag)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        try:
            info = api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, parent_commit=target.head,
                allow_patterns=[glob.escape(name) for name in new],
                delete_patterns=[glob.escape(name) for name in target.files if name not in new] or None,
                commit_message='Publish with timm-spikformer')
        except HfHubHTTPError as e:
            if e.response.status_code == 412:
                raise RuntimeError('The repository was changed during the upload. Nothing was overwritten.') from e
            raise
        if tag is not None:
            api.create_tag(repo, tag=tag, revision=info.oid)
    return info.oid


def _read_json(api: HfApi, repo: str, name: str, revision: Optional[str]) -> Optional[dict]:
    """Return the content of a JSON file of a repository, or None if there is no such file."""
    try:
        with tempfile.TemporaryDirectory() as cache:
            path = hf_hub_download(
                repo, name, revision=revision, token=api.token, cache_dir=cache, endpoint=api.endpoint)
            content = json.loads(Path(path).read_text(encoding='utf-8'))
    except RemoteEntryNotFoundError:
        return None
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{name} of the repository {repo} is not JSON, so its model cannot be identified. Choose '
                         f'another name.') from e
    if not isinstance(content, dict):
        raise ValueError(f'{name} of the repository {repo} is not a JSON object. Choose another name.')
    return content


def _read_manifest(api: HfApi, repo: str, revision: Optional[str]) -> List[str]:
    content = _read_json(api, repo, MANIFEST, revision)
    if content is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_text(json.dumps(content))
        return manifest_files(folder)


@contextmanager
def _convert_errors(repo: Optional[str] = None) -> Iterator[None]:
    """Convert errors of the Hub and of the network to a ValueError or a RuntimeError that states what to do.

    Args:
        repo: Repository of the upload; by default, nothing is uploaded.
    """
    advice = 'Nothing was uploaded; try again.' if repo is None else 'Run the same command again to finish it.'
    start = '' if repo is None else f'The upload to {repo} failed: '
    try:
        yield
    except HfHubHTTPError as e:
        if repo is not None and e.response.status_code in (401, 403):
            raise ValueError(f'The token may not write to {repo}. Use one with write access to it.') from e
        raise RuntimeError(f'{start or "The Hub returned an error: "}{first_line(e)}. {advice}') from e
    except (HTTPError, OSError, RuntimeError) as e:  # uploads of huggingface_hub raise RuntimeError
        raise RuntimeError(f'{start or "The Hub cannot be reached: "}{first_line(e)}. {advice}') from e
    except ValueError as e:
        if re.match('Invalid metadata in README.md', str(e)):  # huggingface_hub includes the reason that the Hub gives
            raise RuntimeError(f'The Hub rejects the model card: {e}') from e
        raise
