"""The console script `timm-spikformer`."""
import argparse
import sys
from typing import List, Optional

from . import __version__, demo
from .profiling import command as profiling


def _add_publish(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('checkpoint', help="file of train.py's, a state dict, or a folder that timm or transformers has saved")
    add('--repo', required=True, metavar='ORG/NAME', help='where to: models of this package are named MODEL.TAG')
    add('--license', required=True, metavar='ID', help='of the weights, as the Hub names it: apache-2.0, cc-by-nc-4.0')
    add('--model', metavar='NAME', help='for a file that does not say it')
    add('--ema', action='store_true', help='take the averaged weights of --model-ema')
    add('--labels', metavar='FILE', help='names of the classes, one on each line, in the order of the classifier')
    add('--results', metavar='FILE', help='accuracy of this checkpoint: what validate.py --results-file has written')
    add('--eval-data', metavar='DIR', help='measure accuracy and firing rates on these images: a folder, or parquet')
    add('--dataset', metavar='ID', help='id on the Hub of what --results or --eval-data are of')
    add('--dataset-name', metavar='NAME', help='its name (default: the id)')
    add('--split', default='test', help='its split (default: %(default)s)')
    add('--train-dataset', action='append', metavar='ID', help='what it was trained on (default: --dataset)')
    add('--base-model', metavar='ORG/NAME', help='what training started from')
    add('--output', metavar='DIR', help='write the folder here')
    add('--dry-run', action='store_true', help='write the folder only')
    add('--private', action='store_true', default=None, help='where the repository is created')
    add('--revision', metavar='BRANCH', help='branch to upload to')
    add('--tag', help='tag for the commit')


def _read_labels(path: Optional[str]) -> Optional[List[str]]:
    if path is None:
        return None
    try:
        with open(path, encoding='utf-8') as f:
            return f.read().splitlines()
    except OSError as e:
        raise ValueError(f'The labels cannot be read: {e}.') from e


def _publish(args: argparse.Namespace) -> None:
    from .publishing import publish
    from .publishing.card import Dataset
    dataset = args.dataset and Dataset(args.dataset, args.dataset_name or args.dataset, args.split)
    published = publish(
        args.checkpoint, args.repo, args.license, model=args.model, ema=args.ema, labels=_read_labels(args.labels),
        results=args.results, eval_data=args.eval_data, dataset=dataset, train_datasets=args.train_dataset,
        base_model=args.base_model, output=args.output, dry_run=args.dry_run, private=args.private,
        revision=args.revision, tag=args.tag)
    print(f'{published.url}  ({published.commit[:7]})' if published.url else f'Written to {published.folder}')


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('checkpoint', help="the authors' .pth.tar, or a state dict of spikingjelly's Spikformer")
    add('--output', required=True, metavar='DIR', help='folder to write')
    add('--model', metavar='NAME', help='(default: the one whose tensors these are)')
    add('--labels', metavar='FILE', help='names of the classes, one on each line, in the order of the classifier')


def _convert(args: argparse.Namespace) -> None:
    from .publishing.convert import convert
    converted = convert(args.checkpoint, args.output, args.model, _read_labels(args.labels))
    print('\n'.join(converted.report))
    print(f'{converted.model}, every tensor accounted for, written to {args.output}')


def _demo(args: argparse.Namespace) -> None:
    try:
        demo.run(args)
    except KeyboardInterrupt:
        sys.exit(f'\nInterrupted. Go on with: timm-spikformer demo --resume --output {args.output}')


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='timm-spikformer', description='Spikformer V2 for timm and transformers.')
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, add_arguments, run, text in (
        ('demo', demo.add_arguments, _demo, 'train a small model on real images'),
        ('profile', profiling.add_arguments, profiling.run, 'firing rates, operations and energy: a table and a page'),
        ('publish', _add_publish, _publish, 'publish a checkpoint on the Hub, for timm and transformers'),
        ('convert', _add_convert, _convert, "convert a checkpoint of V1's authors or spikingjelly's"),
    ):
        command = commands.add_parser(name, help=text, description=demo.__doc__ if name == 'demo' else text)
        add_arguments(command)
        command.set_defaults(run=run)
    args = parser.parse_args(argv)
    run = args.run
    del args.command, args.run
    try:
        run(args)
    except (ValueError, RuntimeError) as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit('\nInterrupted. Nothing was left by half; run the same again.')


if __name__ == '__main__':
    main()
