"""Compare `lif` with spikingjelly's LIFNode: the time (eager and compiled) and the memory saved for the backward pass.

    python -m benchmarks neuron
"""
import statistics
from typing import Any, Callable, Dict

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from timm_spikformer import lif

from .measure import interleave, ratio


def _create_spikingjelly_lif() -> Callable[[Tensor], Tensor]:
    node = neuron.LIFNode(
        tau=2., detach_reset=True, step_mode='m', surrogate_function=surrogate.Sigmoid(alpha=4.))

    def forward(x: Tensor) -> Tensor:
        functional.reset_net(node)
        return node(x)

    return forward


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Return the number of bytes saved for the backward pass.

    The input and the output spikes are excluded, because the neighboring layers save them anyway.
    """
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(x)
    storages.pop(x.untyped_storage().data_ptr(), None)
    storages.pop(out.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def run(quick: bool) -> Dict[str, Any]:
    """Print and return the speedups over spikingjelly, times relative to a copy, and bytes saved for backward.

    Args:
        quick: Use a small shape and few rounds, to check that the benchmark runs.
    """
    torch.manual_seed(0)
    shape = (4, 2, 16, 8, 8) if quick else (4, 2, 512, 56, 56)
    rounds = 2 if quick else 15
    x = torch.randn(shape) + 0.3
    x_requires_grad, grad_output = x.clone().requires_grad_(), torch.randn(shape)
    peer, compiled = _create_spikingjelly_lif(), torch.compile(lif, dynamic=False)

    def inference(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return function(x)
        return call

    def training(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            x_requires_grad.grad = None
            function(x_requires_grad).backward(grad_output)
        return call

    with torch.no_grad():
        spikes = peer(x)
        assert torch.equal(spikes, lif(x)) and torch.equal(spikes, compiled(x)), 'the spikes differ'
    print(f'  {list(shape)}, firing rate {spikes.mean():.3f}')
    rows, relative_to_copy = [], []
    for title, wrap in (('forward', inference), ('forward and backward', training)):
        times = interleave(
            {'spikingjelly': wrap(peer), 'eager': wrap(lif), 'compiled': wrap(compiled),
             'copy': inference(torch.clone)},
            rounds, warmup=2)
        for name in ('eager', 'compiled'):
            speedup = ratio(times['spikingjelly'], times[name])
            rows.append(dict(step=title, mode=name, speedup=speedup._asdict()))
            print(f'  {title}, {name}: {speedup} times as fast as spikingjelly')
        relative = {name: statistics.median(t) / statistics.median(times['copy']) for name, t in times.items()}
        relative_to_copy.append(dict(step=title, **relative))
        print('    time / time of a copy: ' + ', '.join(f'{name} {value:.2f}' for name, value in relative.items()))
    ours, theirs = (saved_bytes(function, x_requires_grad) / x.numel() for function in (lif, peer))
    print(f'  saved for backward: {ours:.1f} bytes per neuron and time step, spikingjelly {theirs:.1f}')
    return dict(
        shape=list(shape), firing_rate=spikes.mean().item(), speedups=rows, relative_to_copy=relative_to_copy,
        saved_bytes_per_neuron_and_step=dict(ours=ours, spikingjelly=theirs))
