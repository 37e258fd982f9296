"""Kernels: faster counterparts of groups of modules, used only where they give the same results.

- `switch.py`: the public switch, `set_kernels` and `use_kernels`.
- `rules.py`: the conditions under which a kernel may replace a group of modules.
- `lif.py`: the LIF neuron, optionally fused with the preceding BatchNorm.
- `products.py`: convolutions and linear layers that are event-driven or save their input for backward as int8.
- `events.py`: forward and backward of event-driven products, and the conditions for using them.
- `event_loops.py`, `simd.py`, `compiled.py`, `threads.py`: the loops of event-driven products, their vector
  operations, compilation with numba, and multithreading, respectively.
- `eager.py`: eager mode for code that compiled graphs would skip.
- `explain.py`: a table of which groups of a model's modules run in a kernel, and why the others do not.

This package imports nothing else from timm_spikformer. The reference for each kernel is the modules that it replaces.
"""
from .explain import explain_kernels, time_layers
from .switch import get_kernels, set_kernels, use_kernels

__all__ = ['explain_kernels', 'get_kernels', 'set_kernels', 'time_layers', 'use_kernels']
