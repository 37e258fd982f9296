"""Benchmarks of time and memory, compared with spikingjelly and with convolutions and matrix products alone.

    python -m benchmarks [GROUP ...] [--quick] [--json FILE] [--plot FILE]
"""
import argparse
import importlib
import time
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch

from .plot import draw_scaling
from .results import describe_environment, format_environment, write_results

GROUPS = ('neuron', 'model', 'masked', 'scaling', 'data', 'compile', 'deploy', 'profiling', 'energy', 'events', 'cuda')


def _parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__.splitlines()[0])
    parser.add_argument(
        'groups', nargs='*', metavar='GROUP',
        help=f'one of {", ".join(GROUPS)} (default: all; cuda only if there is a CUDA device)')
    parser.add_argument('--quick', action='store_true', help='few rounds of small shapes, to check that all groups run')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the results to a JSON file after each group')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='plot the results of the group scaling')
    args = parser.parse_args(argv)
    has_cuda = torch.cuda.is_available()
    args.groups = args.groups or [group for group in GROUPS if group != 'cuda' or has_cuda]
    unknown = [group for group in args.groups if group not in GROUPS]
    if unknown:
        parser.error(f'unknown group {unknown[0]!r}, expected one of {", ".join(GROUPS)}')
    if 'cuda' in args.groups and not has_cuda:
        parser.error('the group cuda requires a CUDA device')
    if args.plot and 'scaling' not in args.groups:
        parser.error('--plot requires the group scaling')
    for option, path in (('--json', args.json), ('--plot', args.plot)):
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            parser.error(f'{option} {path}: expected a file in an existing folder')
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = _parse_args(argv)
    environment = describe_environment(torch.get_num_threads())
    results: Dict[str, Any] = {'environment': environment, 'quick': args.quick}
    print(format_environment(environment))
    for name in args.groups:
        print(name)
        start = time.perf_counter()
        results[name] = importlib.import_module(f'benchmarks.{name}').run(args.quick)
        print(f'  took {time.perf_counter() - start:.0f} s')
        if args.json:
            write_results(args.json, results)
    if args.plot:
        draw_scaling(results, args.plot)


if __name__ == '__main__':
    main()
