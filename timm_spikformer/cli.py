"""The command line as `python -m timm_spikformer.cli`; the console script starts in `timm_spikformer_cli` itself."""
from timm_spikformer_cli import main

__all__ = ['main']

if __name__ == '__main__':
    main()
