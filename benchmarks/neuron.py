"""LIF compared with spikingjelly's LIFNode: time, eager and compiled, and memory saved for backward.

    python -m benchmarks neuron
"""
import statistics
from typing import Any, Callable, Dict

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor

from timm_spikformer import lif

from .measure import interleave, ratio


def _peer() -> Callable[[Tensor], Tensor]:
    node = neuron.LIFNode(
        tau=2., detach_reset=True, step_mode='m', surrogate_function=surrogate.Sigmoid(alpha=4.))

    def forward(x: Tensor) -> Tensor:
        functional.reset_net(node)
        return node(x)

    return forward


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Return the number of bytes saved for backward, without the input, which the layer before saves in any case."""
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(x)
    storages.pop(x.untyped_storage().data_ptr(), None)
    storages.pop(out.untyped_storage().data_ptr(), None)  # the next layer saves the spikes in both cases
    return sum(storages.values())


def run(quick: bool) -> Dict[str, Any]:
    torch.manual_seed(0)
    shape = (4, 2, 16, 8, 8) if quick else (4, 2, 512, 56, 56)
    rounds = 2 if quick else 15
    x = torch.randn(shape) + 0.3
    x_grad, grad = x.clone().requires_grad_(), torch.randn(shape)
    peer, compiled = _peer(), torch.compile(lif, dynamic=False)

    def inference(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return function(x)
        return call

    def training(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            x_grad.grad = None
            function(x_grad).backward(grad)
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
    ours, theirs = (saved_bytes(function, x_grad) / x.numel() for function in (lif, peer))
    print(f'  saved for backward: {ours:.1f} bytes per neuron and time step, spikingjelly {theirs:.1f}')
    return dict(
        shape=list(shape), firing_rate=spikes.mean().item(), speedups=rows, relative_to_copy=relative_to_copy,
        saved_bytes_per_neuron_and_step=dict(ours=ours, spikingjelly=theirs))
