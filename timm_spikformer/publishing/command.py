"""`timm-spikformer publish` and `timm-spikformer convert`. Imports the standard library only, until a command runs."""
import argparse
import ast
from pathlib import Path
from typing import Any, Dict, List, Optional

_LABELS = 'file with the class names, one on each line, in the order of the classifier'
_MODEL_KWARGS = 'arguments of the model that differ from its registered name, such as depth=6 stem_strides=(1,1,2,2)'


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-spikformer publish`."""
    add = parser.add_argument
    add('checkpoint', help='file of train.py, a state dict, or a folder that timm or transformers has saved')
    add('--repo', required=True, metavar='ORG/NAME', help='repository; models of this package are named MODEL.TAG')
    add('--license', required=True, metavar='ID', help='of the weights, as the Hub names it: apache-2.0, cc-by-nc-4.0')
    add('--model', metavar='NAME', help='name of the model, for a file that does not contain it')
    add('--model-kwargs', nargs='+', metavar='KEY=VALUE', help=_MODEL_KWARGS)
    add('--ema', action='store_true', help='publish the averaged weights of --model-ema')
    add('--labels', metavar='FILE', help=_LABELS)
    add('--results', metavar='FILE', help='accuracy of this checkpoint: a file that validate.py --results-file wrote')
    add('--eval-data', metavar='DIR', help='measure accuracy and firing rates on these images: a folder, or parquet')
    add('--dataset', metavar='ID', help='id on the Hub of the dataset of --results or --eval-data')
    add('--dataset-name', metavar='NAME', help='name of the dataset (default: the id)')
    add('--split', help='split of the dataset (default: the one of --eval-data, or test for --results)')
    add('--train-dataset', action='append', metavar='ID', help='dataset of the training (default: --dataset)')
    add('--base-model', metavar='ORG/NAME', help='repository of the model that training started from')
    add('--output', metavar='DIR', help='write the folder here')
    add('--dry-run', action='store_true', help='write the folder only')
    add('--private', action='store_true', default=None, help='create the repository as a private one')
    add('--revision', metavar='BRANCH', help='branch to upload to')
    add('--tag', help='tag for the commit')


def run_publish(args: argparse.Namespace) -> None:
    """Publish, and print where to."""
    from .card import Dataset
    from .upload import publish
    dataset = args.dataset and Dataset(args.dataset, args.dataset_name or args.dataset, args.split)
    published = publish(
        args.checkpoint, args.repo, args.license, model=args.model, ema=args.ema, labels=read_labels(args.labels),
        results=args.results, eval_data=args.eval_data, dataset=dataset, train_datasets=args.train_dataset,
        base_model=args.base_model, output=args.output, dry_run=args.dry_run, private=args.private,
        revision=args.revision, tag=args.tag, model_kwargs=parse_kwargs(args.model_kwargs))
    print(f'{published.url}  ({published.commit[:7]})' if published.url else f'Written to {published.folder}')


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-spikformer convert`."""
    add = parser.add_argument
    add('checkpoint', help="the authors' .pth.tar, or a state dict of spikingjelly's Spikformer")
    add('--output', required=True, metavar='DIR', help='folder to write')
    add('--model', metavar='NAME', help='name of the model (default: the one that has these tensors)')
    add('--model-kwargs', nargs='+', metavar='KEY=VALUE', help=_MODEL_KWARGS)
    add('--labels', metavar='FILE', help=_LABELS)


def run_convert(args: argparse.Namespace) -> None:
    """Convert, and print an account of every tensor."""
    from .convert import convert
    converted = convert(
        args.checkpoint, args.output, args.model, read_labels(args.labels), parse_kwargs(args.model_kwargs))
    print('\n'.join(converted.report))
    print(f'{converted.model}, every tensor accounted for, written to {args.output}')


def read_labels(path: Optional[str]) -> Optional[List[str]]:
    """Read class names, one on each line.

    Raises:
        ValueError: The file is missing, is not text in UTF-8, or has an empty line.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except (OSError, ValueError) as e:
        raise ValueError(f'The labels cannot be read: {e}. Expected UTF-8 text, one name on each line.') from e
    labels = text.rstrip('\n').split('\n')  # and not at the other characters that splitlines() takes for line breaks
    empty = next((i for i, label in enumerate(labels) if not label.strip()), None)
    if empty is not None:
        raise ValueError(f'Line {empty + 1} of {path} is empty. Expected one name on each line.')
    return labels


def parse_kwargs(items: Optional[List[str]]) -> Optional[Dict[str, Any]]:
    """Parse KEY=VALUE as train.py's --model-kwargs does: values are Python literals, or else text.

    Raises:
        ValueError: An item has no name or no value, or a name is there twice.
    """
    if items is None:
        return None
    kwargs: Dict[str, Any] = {}
    for item in items:
        key, separator, text = item.partition('=')
        if not separator or not key.isidentifier():
            raise ValueError(f'--model-kwargs: {item!r} is not KEY=VALUE.')
        if key in kwargs:
            raise ValueError(f'--model-kwargs: {key} is there twice.')
        try:
            kwargs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            kwargs[key] = text
    return kwargs
