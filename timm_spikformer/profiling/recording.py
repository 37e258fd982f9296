"""Record what a forward computes, by layer and time step, from outside of the model.

A dispatch mode sees each matrix product and convolution and adds up the inputs that meet a weight, as spikingjelly's
`SynOpCounter` does. That one takes binary inputs and sums over time; this one also takes the sums of spikes that a
residual makes, and splits by time step. Spikes are recorded by forward hooks on the layers.
"""
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from ..layers import ConvBNLIF, LinearBNLIF, SpikingSelfAttention
from ..network import Spikformer
from ..stems import SpikingConvStem

__all__ = ['AttentionTally', 'Recorder', 'Tally']

_aten = torch.ops.aten


def _per_step(x: Tensor) -> Tensor:
    """Sums of `[T, ...]` over all but time, float64 on the CPU: exact, as channels alone are added up in float32."""
    x = x.sum(2 if x.ndim == 5 else -1, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.flatten(1).to('cpu').double().sum(1)


def _is_nonzero(x: Tensor) -> Tensor:
    return torch.ne(x, 0, out=torch.empty_like(x))


def _add(total: Optional[Tensor], x: Tensor) -> Tensor:
    return x if total is None else total + x


class Fired:
    """How often each neuron has fired, and how often it could have."""

    def __init__(self) -> None:
        self.counts: Optional[Tensor] = None
        self.possible = 0

    def add(self, counts: Tensor, possible: int) -> None:
        counts = counts.to('cpu', torch.int32)
        self.counts = counts if self.counts is None else self.counts.add_(counts)
        self.possible += possible

    @property
    def silent(self) -> float:
        """Share of those that have never fired."""
        return (self.counts == 0).double().mean().item()

    @property
    def saturated(self) -> float:
        """Share of those that have fired at every time step of every image."""
        return (self.counts == self.possible).double().mean().item()


@dataclass
class Tally:
    """Sums over all images of what one layer, product and neurons, has seen. Tensors are `[steps]`, float64.

    `steps` is 1 for the classifier, and where the input is the same at all time steps.
    """
    name: str
    group: str  # stem, attention, mlp or head
    input: str  # image, spikes, sums or features
    parameters: int
    has_bn: bool
    has_bias: bool  # in its product
    weight_bytes: int  # of one weight
    dense: float = 0.  # multiply-accumulates of one time step
    numel: float = 0.  # inputs of one time step
    total: Optional[Tensor] = None  # sum of the inputs
    nonzero: Optional[Tensor] = None  # number of inputs that are not 0
    uses: Optional[Tensor] = None  # sum of the inputs, each times the number of weights that it meets
    nonzero_uses: Optional[Tensor] = None  # number of weights that inputs other than 0 meet
    values: Counter = field(default_factory=Counter)  # of inputs that are sums
    is_integer: bool = True  # whether an image held non-negative integers alone
    outputs: float = 0.  # of one time step
    spikes: Optional[Tensor] = None
    neurons: Optional[Fired] = field(default_factory=Fired)  # None where their positions differ between images
    channels: Fired = field(default_factory=Fired)
    attention: Optional['AttentionTally'] = None

    def add_input(self, x: Tensor) -> None:
        """Inputs `[steps, ...]`."""
        self.numel += x[0].numel()
        self.total = _add(self.total, _per_step(x))
        self.nonzero = self.total if self.input == 'spikes' else _add(self.nonzero, _per_step(_is_nonzero(x)))
        if self.input == 'sums':
            counts = torch.bincount(x.flatten().round().long())  # rounded: stochastic depth scales spikes
            self.values.update({value: count for value, count in enumerate(counts.tolist()) if count})
        elif self.input == 'image':
            self.is_integer = self.is_integer and bool((x >= 0).all() and (x == x.round()).all())

    def add_product(self, func: Any, args: Any, out: Tensor, steps: int) -> None:
        """A product of this layer's, whose input holds `steps` time steps, one after the other."""
        self.dense += flop_registry[func._overloadpacket](*args, out_val=out) / 2 / steps
        x, uses = args[1] if func is _aten.addmm.default else args[0], _USES[func]
        self.uses = _add(self.uses, uses(x, args, steps))
        if self.input == 'spikes':
            self.nonzero_uses = self.uses
        else:
            self.nonzero_uses = _add(self.nonzero_uses, uses(_is_nonzero(x), args, steps))

    def add_spikes(self, spikes: Tensor, channel_dim: int) -> None:
        """Output of the neurons, `[T, B, ...]`."""
        T, B = spikes.shape[:2]
        self.outputs += spikes[0].numel()
        fired = spikes.sum(1, dtype=torch.promote_types(spikes.dtype, torch.float32))
        self.spikes = _add(self.spikes, _per_step(fired))
        fired = fired.sum(0).movedim(channel_dim - 2, 0)  # [C, positions]
        if self.neurons is not None and self.neurons.counts is not None and self.neurons.counts.shape != fired.shape:
            self.neurons = None
        if self.neurons is not None:
            self.neurons.add(fired, T * B)
        self.channels.add(fired.flatten(1).sum(1), T * B * fired[0].numel())


@dataclass
class AttentionTally:
    """The two products of spiking attention, in both orders, from the spikes q, k, v. Tensors are `[T]`, float64."""
    dense_qk: float = 0.  # multiply-accumulates of one time step and of one of the two products of (q k^T) v
    dense_kv: float = 0.  # the same for q (k^T v)
    kv_is_cheaper: bool = False
    q: Optional[Tensor] = None  # sums of spikes
    k: Optional[Tensor] = None
    v: Optional[Tensor] = None
    qk: Optional[Tensor] = None  # number of pairs of both firing, over all pairs that are multiplied
    kv: Optional[Tensor] = None
    numel: float = 0.  # of q, of one time step

    def add(self, qkv: Tensor, num_heads: int) -> None:
        """Spikes `[T, B, N, 3 * C]`."""
        T, B, N, C = qkv.shape
        C = C // 3
        d = C // num_heads
        q, k, v = qkv.float().view(T, B, N, 3, num_heads, d).unbind(3)  # [T, B, N, heads, d]
        self.dense_qk += B * N * N * C
        self.dense_kv += B * N * C * d
        self.kv_is_cheaper = N > d
        self.numel += B * N * C
        self.q, self.k, self.v = (
            _add(total, _per_step(x)) for total, x in ((self.q, q), (self.k, k), (self.v, v)))
        self.qk = _add(self.qk, _per_step(q.sum(2) * k.sum(2)))
        self.kv = _add(self.kv, _per_step(k.sum(4) * v.sum(4)))


def _conv_uses(x: Tensor, args: Any, steps: int) -> Tensor:
    _, weight, _, stride, padding, dilation = args[:6]
    at = x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))  # [steps * n, H, W]
    at = at.to('cpu').double().view(steps, -1, 1, *at.shape[1:]).sum(1)
    kernel = torch.ones(1, 1, *weight.shape[2:], dtype=torch.float64)
    uses = _aten.convolution(at, kernel, None, stride, padding, dilation, False, [0, 0], 1)
    return uses.flatten(1).sum(1) * weight.shape[0]


def _mm_uses(x: Tensor, args: Any, steps: int) -> Tensor:
    return _per_step(x.reshape(steps, -1, x.shape[-1])) * args[-1].shape[-1]


# by the product: its input, its arguments and its time steps to the sums of `Tally.uses`
_USES: Dict[Any, Callable[[Tensor, Any, int], Tensor]] = {
    _aten.convolution.default: _conv_uses,
    _aten.mm.default: _mm_uses,
    _aten.addmm.default: _mm_uses,
}


class _ProductCounter(TorchDispatchMode):
    """Hands the products of the running layer to its tally; active between `resume` and `pause`."""
    allows_kernels = True  # a kernel runs the same products

    def __init__(self) -> None:
        super().__init__()
        self.tally: Optional[Tally] = None
        self.steps = 1  # number of time steps in the layer's input
        self._is_active = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _USES:
            self.tally.add_product(func, args, out, self.steps)
        return out

    def resume(self, tally: Tally, steps: int) -> None:
        self.tally, self.steps = tally, steps
        if not self._is_active:
            self._is_active = True
            self.__enter__()

    def pause(self, *args: Any) -> None:
        if self._is_active:
            self._is_active = False
            self.__exit__(None, None, None)


def _layers(encoder: Spikformer) -> Dict[str, nn.Module]:
    """The layers that have weights, and each attention, in the order in which they run."""
    kinds = (ConvBNLIF, LinearBNLIF, SpikingSelfAttention)
    layers: Dict[str, nn.Module] = {}
    for name, m in encoder.named_modules():
        if not isinstance(m, kinds):
            continue
        if isinstance(m, SpikingSelfAttention):
            layers[f'{name}.qkv'] = m.qkv
        layers.setdefault(name, m)
    if encoder.num_classes:
        layers['head.fc'] = encoder.get_classifier()
    return layers


def _describe(encoder: Spikformer, name: str, is_first: bool) -> Dict[str, str]:
    if is_first:
        return dict(group='stem', input='image')
    if name == 'head.fc':
        return dict(group='head', input='features')
    if name.startswith('stem.'):  # stages of V2 hand on sums; those of V1 hand on spikes
        is_sum = isinstance(encoder.stem, SpikingConvStem) and name.endswith('.down')
        return dict(group='stem', input='sums' if is_sum else 'spikes')
    group = 'attention' if '.attn' in name else 'mlp'
    return dict(group=group, input='sums' if name.endswith(('.qkv', '.fc1')) else 'spikes')


class Recorder:
    """Tallies of every layer of a Spikformer: `with recorder.watch(): model(x)`, as often as there are batches."""

    def __init__(self, encoder: Spikformer, by_channel: bool = False):
        """
        Args:
            encoder: The model to watch.
            by_channel: Let a channel stand for its neurons at all positions, as each image has positions of its own.
        """
        self.encoder = encoder
        self.tallies: Dict[str, Tally] = {}
        self.output: Optional[Tensor] = None  # of the last batch: of the last block at each time step, [T, B, N, C]
        self._layers = _layers(encoder)
        self._counter = _ProductCounter()
        for i, (name, m) in enumerate(self._layers.items()):
            is_attention = isinstance(m, SpikingSelfAttention)
            product = next((p for p in m.modules() if isinstance(p, (nn.Conv2d, nn.Linear))), m)
            self.tallies[name] = Tally(
                name,
                parameters=0 if is_attention else sum(p.numel() for p in m.parameters()),
                has_bn=not isinstance(getattr(m, 'bn', nn.Identity()), nn.Identity),
                has_bias=not is_attention and product.bias is not None,
                weight_bytes=next(m.parameters()).element_size(),
                neurons=None if by_channel else Fired(),
                attention=AttentionTally() if is_attention else None,
                **_describe(encoder, name, i == 0),
            )

    def _hooks(self) -> Iterator[RemovableHandle]:
        for name, m in self._layers.items():
            tally = self.tallies[name]
            if tally.attention is not None:
                yield m.qkv.register_forward_hook(
                    lambda qkv, args, out, tally=tally.attention, heads=m.num_heads: tally.add(out, heads))
                neuron, channel_dim = m.attn_lif, 3
            else:
                yield m.register_forward_pre_hook(lambda m, args, tally=tally: self._before(args[0], tally))
                yield m.register_forward_hook(self._counter.pause)
                neuron, channel_dim = (m if hasattr(m, 'lif') else None), 2 if isinstance(m, ConvBNLIF) else 3
            if neuron is not None:  # hooks within a layer would keep its kernels from running
                yield neuron.register_forward_hook(
                    lambda m, args, out, tally=tally, dim=channel_dim: tally.add_spikes(out, dim))
        last = self.encoder.blocks[-1] if len(self.encoder.blocks) else self.encoder.stem.stages[-1]
        yield last.register_forward_hook(self._after_last)

    def _before(self, x: Tensor, tally: Tally) -> None:
        if tally.input == 'features':
            x = x.unsqueeze(0)
        tally.add_input(x)
        self._counter.resume(tally, len(x))

    def _after_last(self, layer: nn.Module, args: Any, out: Tensor) -> None:
        self.output = out if out.ndim == 4 else out.flatten(3).transpose(2, 3)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watch the forwards within; no hook is left behind."""
        handles: List[RemovableHandle] = []
        try:
            handles.extend(self._hooks())
            yield
        finally:
            self._counter.pause()
            for handle in handles:
                handle.remove()
