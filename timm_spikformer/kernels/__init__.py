"""Kernels: faster counterparts of groups of modules, used only where they give the same results.

- `switch.py`: the public switch, `set_kernels` and `use_kernels`.
- `rules.py`: the conditions under which a kernel may replace a group of modules.
- `lif.py`: the neuron, and BatchNorm and neuron in one pass.
- `products.py`: convolutions and linear layers that are event-driven or save their input for backward as int8.
- `events.py`: event-driven products: when they are used, and their forward and backward.
- `event_loops.py`, `simd.py`, `compiled.py`, `threads.py`: their loops, the vector operations in them, compilation by
  numba, and threads.
- `explain.py`: a table of which groups of a model run how.

This package imports nothing else of timm_spikformer. Each kernel has a plain counterpart, the modules themselves.
"""
from .explain import explain_kernels, time_layers
from .switch import get_kernels, set_kernels, use_kernels

__all__ = ['explain_kernels', 'get_kernels', 'set_kernels', 'time_layers', 'use_kernels']
