"""Publish the Space in hub/space, with the package and its weights.

    python hub/publish_space.py ORG/NAME [--dry-run] [--output DIR]
"""
import argparse
import shutil
from pathlib import Path
from typing import List, Optional

from huggingface_hub import HfApi

from timm_spikformer.folders import MANIFEST, write_folder

ROOT = Path(__file__).resolve().parents[1]


def write_space(folder: Path) -> List[str]:
    """Write the files of the Space to a folder, and return their paths in it.

    The package is a folder beside app.py, because it is not on PyPI.
    """
    ignored = shutil.ignore_patterns('__pycache__', '*.pyc', '*.pyi')
    with write_folder(folder, 'space', [ROOT / 'hub', ROOT / 'timm_spikformer']) as temporary:
        shutil.copytree(ROOT / 'hub' / 'space', temporary, ignore=ignored, dirs_exist_ok=True)
        shutil.copytree(ROOT / 'timm_spikformer', temporary / 'timm_spikformer', ignore=ignored)
    paths = (path for path in folder.rglob('*') if path.is_file() and path.name != MANIFEST)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def main(args: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('repo', metavar='ORG/NAME')
    parser.add_argument('--dry-run', action='store_true', help='write the folder and list its files only')
    parser.add_argument('--output', default='output/space', metavar='DIR', help='(default: %(default)s)')
    args = parser.parse_args(args)
    folder = Path(args.output)
    files = write_space(folder)
    if args.dry_run:
        for name in files:
            print(f'{(folder / name).stat().st_size:>9,}  {name}')
        return
    api = HfApi()
    url = api.create_repo(args.repo, repo_type='space', space_sdk='gradio', exist_ok=True)
    api.upload_folder(
        repo_id=args.repo, repo_type='space', folder_path=folder, ignore_patterns=MANIFEST, delete_patterns='*',
        commit_message='Publish the Space')
    print(url)


if __name__ == '__main__':
    main()
