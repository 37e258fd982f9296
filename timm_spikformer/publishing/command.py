"""Arguments of `timm-spikformer publish` and `convert`. Imports only the standard library until a command runs."""
import argparse
import ast
from pathlib import Path
from typing import Any, Dict, List, Optional

_LABELS = 'text file with the class names, one per line, in the order of the class indices'
_MODEL_KWARGS = 'model arguments that differ from the registered model, such as depth=6 stem_strides=(1,1,2,2)'


def add_publish_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `timm-spikformer publish`."""
    add = parser.add_argument
    add('checkpoint', help='checkpoint file of train.py, a state dict, or a folder saved by timm or transformers')
    add('--repo', required=True, metavar='ORG/NAME', help='Hub repository; by convention, NAME is MODEL.TAG')
    add('--license', required=True, metavar='ID', help='license of the weights as a Hub identifier, such as mit')
    add('--model', metavar='NAME', help='model name, required if the file does not contain it')
    add('--model-kwargs', nargs='+', metavar='KEY=VALUE', help=_MODEL_KWARGS)
    add('--ema', action='store_true', help='publish the averaged (EMA) weights of train.py --model-ema')
    add('--labels', metavar='FILE', help=_LABELS)
    add('--results', metavar='FILE', help='accuracy of this checkpoint, as written by validate.py --results-file')
    add('--eval-data', metavar='DIR', help='measure accuracy and firing rates on this image folder or parquet dataset')
    add('--dataset', metavar='ID', help='Hub id of the dataset of --results or --eval-data')
    add('--dataset-name', metavar='NAME', help='display name of the dataset (default: its id)')
    add('--split', help='split of the dataset (default: the one of --eval-data, or test for --results)')
    add('--train-dataset', action='append', metavar='ID',
        help='Hub id of a training dataset; repeatable (default: --dataset)')
    add('--base-model', metavar='ORG/NAME', help='Hub id of the model that training started from')
    add('--output', metavar='DIR', help='save the published folder here; required by --dry-run')
    add('--dry-run', action='store_true', help='write the folder to --output without uploading it')
    add('--private', action='store_true', default=None, help='create a private repository')
    add('--revision', metavar='BRANCH', help='branch to upload to')
    add('--tag', help='git tag for the uploaded commit')


def run_publish(args: argparse.Namespace) -> None:
    """Publish, and print the URL or the output folder."""
    from .card import Dataset
    from .upload import publish
    if args.dataset is None and (args.dataset_name is not None or args.split is not None):
        raise ValueError('--dataset-name and --split require --dataset, the id of the dataset on the Hub.')
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
    add('checkpoint', help="checkpoint of the authors' V1 code (.pth.tar), or state dict of spikingjelly's Spikformer")
    add('--output', required=True, metavar='DIR', help='folder to write')
    add('--model', metavar='NAME', help='model name (default: the registered model with the same tensors)')
    add('--model-kwargs', nargs='+', metavar='KEY=VALUE', help=_MODEL_KWARGS)
    add('--labels', metavar='FILE', help=_LABELS)


def run_convert(args: argparse.Namespace) -> None:
    """Convert, and print how each tensor was mapped."""
    from .conversion import convert
    converted = convert(
        args.checkpoint, args.output, args.model, read_labels(args.labels), parse_kwargs(args.model_kwargs))
    print('\n'.join(converted.report))
    summary = 'all tensors were mapped'
    if converted.unmapped:
        summary = f'{len(converted.unmapped)} tensors were not mapped (unused or dropped), all others were'
    print(f'{converted.model}: {summary}; written to {args.output}')


def read_labels(path: Optional[str]) -> Optional[List[str]]:
    """Read class names from a text file, one per line.

    Raises:
        ValueError: The file is missing, is not UTF-8 text, or has an empty line.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding='utf-8-sig')
    except (OSError, ValueError) as e:
        raise ValueError(f'The labels cannot be read: {e}. Expected UTF-8 text, one name per line.') from e
    labels = text.rstrip('\n').split('\n')  # not splitlines(), which also splits at other characters
    empty = next((i for i, label in enumerate(labels) if not label.strip()), None)
    if empty is not None:
        raise ValueError(f'Line {empty + 1} of {path} is empty. Expected one name per line.')
    return labels


def parse_kwargs(items: Optional[List[str]]) -> Optional[Dict[str, Any]]:
    """Parse KEY=VALUE like train.py's --model-kwargs: a value that is not a Python literal is a string.

    Raises:
        ValueError: An item is not KEY=VALUE, or a key occurs twice.
    """
    if items is None:
        return None
    kwargs: Dict[str, Any] = {}
    for item in items:
        key, separator, text = item.partition('=')
        if not separator or not key.isidentifier():
            raise ValueError(f'--model-kwargs: {item!r} is not KEY=VALUE.')
        if key in kwargs:
            raise ValueError(f'--model-kwargs: {key} occurs twice.')
        try:
            kwargs[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            kwargs[key] = text
    return kwargs
