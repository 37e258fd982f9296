"""Entry point of `python -m timm_spikformer.cli`. The console script starts in `timm_spikformer_cli`."""
from timm_spikformer_cli import main

__all__ = ['main']

if __name__ == '__main__':
    main()
