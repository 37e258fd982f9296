"""The console script `timm-spikformer`."""
import argparse
import sys
from typing import List, Optional

from . import __version__, demo


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(prog='timm-spikformer', description='Spikformer V2 for timm and transformers.')
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(dest='command', required=True)
    demo_parser = commands.add_parser('demo', help='train a small model on real images', description=demo.__doc__)
    demo.add_arguments(demo_parser)
    args = parser.parse_args(argv)
    del args.command
    try:
        demo.run(args)
    except ValueError as e:
        sys.exit(f'error: {e}')
    except KeyboardInterrupt:
        sys.exit(f'\nInterrupted. Go on with: timm-spikformer demo --resume --output {args.output}')


if __name__ == '__main__':
    main()
