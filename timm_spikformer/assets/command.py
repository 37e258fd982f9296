"""Print or write shipped YAML and JSON files: `timm-spikformer recipe` and `timm-spikformer config`.

Imports the standard library only.
"""
import argparse
from pathlib import Path
from typing import Dict

from ..folders import write_folder, write_new_file

_ASSETS = Path(__file__).parent
_DATA = 'timm_spikformer/assets/'  # path of the shipped images in these files, relative to a checkout
_CONFIGS = 'hf_configs/'  # path of the configurations of models in argument files, relative to a checkout


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-spikformer recipe`."""
    parser.add_argument('name', nargs='?', metavar='NAME', help='recipe to print (default: list their names)')
    parser.add_argument('--output', metavar='FILE', help='file to write the recipe to (default: print it)')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-spikformer config`."""
    parser.add_argument(
        'name', nargs='?', metavar='NAME',
        help='a model, for its config.json and preprocessor_config.json, or an argument file (default: list their '
             'names)')
    parser.add_argument('--output', metavar='PATH', help='folder to write for a model, or argument file to write')


def run_recipe(args: argparse.Namespace) -> None:
    """List, print or write a recipe."""
    recipes = {path.stem: path for path in sorted(_find('recipes').glob('*.yaml'))}
    if args.name is None:
        _list(recipes, args)
    else:
        _print_or_write(_look_up(args.name, recipes, 'recipe'), args)


def run_config(args: argparse.Namespace) -> None:
    """List, print or write a configuration or an argument file."""
    root = _find('hf_configs')
    models = {path.parent.name: path.parent for path in sorted(root.glob('*/config.json'))}
    known = {**models, **{path.stem: path for path in sorted(root.glob('args/*.json'))}}
    if args.name is None:
        _list(known, args)
        return
    path = _look_up(args.name, known, 'config')
    if path.is_file():
        _print_or_write(path, args)
    elif args.output is None:
        print((path / 'config.json').read_text(encoding='utf-8'), end='')
    else:
        with write_folder(args.output, f'config {args.name}', [path]) as folder:
            for file in path.glob('*.json'):
                (folder / file.name).write_text(file.read_text(encoding='utf-8'), encoding='utf-8')
        print(f'Written to {args.output}')


def _find(name: str) -> Path:
    """Return the folder `name` in an installed package or in a checkout."""
    folder = next((path for path in (_ASSETS / name, _ASSETS.parents[1] / name) if path.is_dir()), None)
    if folder is None:
        raise RuntimeError(f'The package contains no {name}. Reinstall it.')
    return folder


def _list(known: Dict[str, Path], args: argparse.Namespace) -> None:
    if args.output is not None:
        raise ValueError('--output requires the NAME of the recipe, model or argument file to write.')
    print('\n'.join(known))


def _look_up(name: str, known: Dict[str, Path], kind: str) -> Path:
    if name not in known:
        raise ValueError(f'There is no {kind} {name!r}. Expected one of {", ".join(known)}.')
    return known[name]


def _print_or_write(path: Path, args: argparse.Namespace) -> None:
    """Print or write a file, with the paths of shipped images and configurations adapted to this installation."""
    text = path.read_text(encoding='utf-8').replace(_DATA, f'{_ASSETS.as_posix()}/')
    text = text.replace(f'"{_CONFIGS}', f'"{_find("hf_configs").as_posix()}/')
    if args.output is None:
        print(text, end='')
        return
    with write_new_file(args.output) as partial:
        partial.write_text(text, encoding='utf-8')
    print(f'Written to {args.output}')
