"""Spikformer V2, a spiking vision transformer, for timm. Importing this package registers its models."""
from .neurons import LIF, lif
from .spikformer import Spikformer

__version__ = '0.1.0.dev0'

__all__ = ['LIF', 'Spikformer', 'lif']
