"""Benchmarks of time and memory, compared with spikingjelly and with convolutions and matrix products alone.

    python -m benchmarks [GROUP ...] [--quick] [--json FILE] [--plot FILE]
"""
import argparse
import importlib
import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from . import plot

GROUPS = ('neuron', 'model', 'masked', 'scaling', 'data', 'compile', 'deploy', 'profiling', 'energy', 'events')


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m benchmarks', description=__doc__.splitlines()[0])
    parser.add_argument('groups', nargs='*', metavar='GROUP', help=f'one of {", ".join(GROUPS)} (default: all)')
    parser.add_argument('--quick', action='store_true', help='few rounds of small shapes, to check that all groups run')
    parser.add_argument('--json', metavar='FILE', help='write the results to a JSON file')
    parser.add_argument('--plot', metavar='FILE', help='plot the results of the group scaling')
    args = parser.parse_args()
    unknown = set(args.groups) - set(GROUPS)
    if unknown:
        parser.error(f'unknown group {min(unknown)!r}, expected one of {", ".join(GROUPS)}')
    if args.plot and 'scaling' not in (args.groups or GROUPS):
        parser.error('--plot requires the group scaling')
    results = {'torch': torch.__version__, 'threads': torch.get_num_threads(), 'machine': platform.machine()}
    print(f'torch {torch.__version__}, spikingjelly {version("spikingjelly")}, {torch.get_num_threads()} threads')
    for name in args.groups or GROUPS:
        print(name)
        results[name] = importlib.import_module(f'benchmarks.{name}').run(args.quick)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + '\n')
    if args.plot:
        plot.draw(results['scaling'], args.plot)


if __name__ == '__main__':
    main()
