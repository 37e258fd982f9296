"""Record the operations and spikes of a forward pass by layer and time step, without changes to the model.

A dispatch mode intercepts each matrix product and convolution, and counts how many weights each input is multiplied by,
as spikingjelly's `SynOpCounter` does. `SynOpCounter` supports binary inputs and sums over time; this module also
supports sums of spikes from residual connections, and counts each time step separately. Forward hooks on the layers
record the spikes.
"""
import contextlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from ..layers import ConvBNLIF, LinearBNLIF, SpikingSelfAttention
from ..network import Spikformer
from ..stems import SpikingConvStem

__all__ = ['AttentionCounts', 'LayerCounts', 'NonFiniteError', 'Recorder', 'check_finite']

_aten = torch.ops.aten
_PART = 1 << 16  # number of values that are checked at a time


class NonFiniteError(ValueError):
    """Activations that are NaN or infinite, so that spikes and operations cannot be counted."""


def _sum_per_step(x: Tensor) -> Tensor:
    """Sum `[T, ...]` over all dimensions but time, in float64 on the CPU; only channels are summed in float32."""
    x = x.sum(2 if x.ndim == 5 else -1, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.flatten(1).to('cpu').double().sum(1)


def _nonzero_as_ones(x: Tensor) -> Tensor:
    """Return 1 where x is not 0, in x's dtype."""
    return torch.ne(x, 0, out=torch.empty_like(x))


def check_finite(values: Tensor, what: str) -> Tensor:
    """Check values on the CPU that are finite only if the activations are, such as sums of them; return the values.

    Args:
        values: Values to check.
        what: Name of the activations for the message, such as 'input of head.fc'.

    Raises:
        NonFiniteError: The values are not finite.
    """
    if not values.isfinite().all():
        raise NonFiniteError(
            f'The {what} contains NaN or infinity, so the model cannot be profiled. Check the input and the weights of '
            f'the model; a training that has diverged gives such weights.')
    return values


def _is_count(x: Tensor) -> bool:
    """Return whether all values are integers of at least 0."""
    if x.is_contiguous():
        x = x.view(-1)
    elif x.ndim == 5:
        x = x.flatten(0, 1)
    # parts that fit into the cache of a CPU take a third of the time; the fraction of infinity is NaN
    parts = x.split(max(1, _PART // max(1, x[0].numel()))) if x.device.type == 'cpu' else [x]
    return bool(x.amin() >= 0) and all(torch.stack(part.frac().aminmax()).eq(0).all() for part in parts)


def _raise_not_spikes(name: str, x: Tensor) -> None:
    raise ValueError(
        f'The input of a product in {name} must consist of spikes or sums of spikes, which are integers of at least 0. '
        f'Got values from {x.min().item():.3g} to {x.max().item():.3g}. Merge adapters into the weights, and remove '
        f'parametrizations, hooks and neurons that change spikes.')


def _add_to(total: Optional[Tensor], x: Tensor) -> Tensor:
    return x if total is None else total + x


class SpikeCounts:
    """Number of spikes of each neuron (or channel), and the largest number that is possible."""

    def __init__(self) -> None:
        self.counts: Optional[Tensor] = None
        self.max_count = 0

    def add(self, counts: Tensor, max_count: int) -> None:
        counts = counts.to('cpu', torch.int32)
        self.counts = counts if self.counts is None else self.counts.add_(counts)
        self.max_count += max_count

    @property
    def silent(self) -> float:
        """Fraction of the neurons that never fired."""
        return (self.counts == 0).double().mean().item()

    @property
    def saturated(self) -> float:
        """Fraction of the neurons that fired at every time step of every image."""
        return (self.counts == self.max_count).double().mean().item()


@dataclass
class InputCounts:
    """Sums over the inputs of one layer that have the same size. Tensors are `[steps]`, as in `LayerCounts`."""
    dense_macs: float = 0.  # dense multiply-accumulates of one time step
    numel: float = 0.  # number of input values of one time step
    total: Optional[Tensor] = None  # sum of the inputs
    num_nonzero: Optional[Tensor] = None  # number of inputs that are not 0


@dataclass
class LayerCounts:
    """Sums over all images for one layer (a product and its neurons). Tensors are `[steps]`, float64.

    `steps` is 1 for the input of the classifier, and for an input that is the same at all time steps; else it is T.
    Counts that are multiplied with each other are kept for each size of the input, because the mean input and the dense
    operations of different sizes must not be mixed.
    """
    name: str
    group: str  # stem, attention, mlp or head
    input: str  # image, spikes, sums, real or features
    parameters: int
    has_bn: bool
    has_bias: bool  # whether the product has a bias
    is_scaled: bool  # whether dropout or stochastic depth scales spikes, in train mode
    weight_bytes: int  # bytes per weight
    inputs: Dict[Tuple[int, ...], InputCounts] = field(default_factory=dict)  # by the shape of one time step and image
    synops: Optional[Tensor] = None  # sum of the inputs, each times the number of weights that it is multiplied by
    nonzero_synops: Optional[Tensor] = None  # number of products of a weight and a nonzero input
    value_counts: Counter = field(default_factory=Counter)  # counts of input values, for sums of spikes
    is_integer: bool = True  # whether all image inputs were non-negative integers
    output_numel: float = 0.  # number of output values of one time step
    spikes: Optional[Tensor] = None
    neuron_spikes: Optional[SpikeCounts] = field(default_factory=SpikeCounts)  # None if image sizes differ
    channel_spikes: SpikeCounts = field(default_factory=SpikeCounts)
    attention: Optional[Dict[int, 'AttentionCounts']] = None  # by number of tokens; None for layers with weights
    _current: Optional[InputCounts] = field(default=None, repr=False)  # counts of the size of the last input

    @property
    def dense_macs(self) -> float:
        """Dense multiply-accumulates of one time step of a product with weights."""
        return sum(x.dense_macs for x in self.inputs.values())

    def add_input(self, x: Tensor) -> None:
        """Add the input of the layer, `[steps, B, ...]`; raise a `NonFiniteError` if it contains NaN or infinity."""
        self._current = counts = self.inputs.setdefault(tuple(x.shape[2:]), InputCounts())
        counts.numel += x[0].numel()
        total, values = check_finite(_sum_per_step(x), f'input of {self.name}'), x
        x = self._count_spikes(values)
        counts.total = _add_to(counts.total, total if x is values else _sum_per_step(x))
        if self.input == 'spikes':
            counts.num_nonzero = counts.total
        else:
            counts.num_nonzero = _add_to(counts.num_nonzero, _sum_per_step(_nonzero_as_ones(x)))
        if self.input == 'sums':
            numbers = torch.bincount(x.flatten().long())
            self.value_counts.update({value: number for value, number in enumerate(numbers.tolist()) if number})

    def _count_spikes(self, x: Tensor) -> Tensor:
        """Return the number of spikes in each input value. Other inputs than spikes are returned unchanged.

        Raises:
            ValueError: The values are not spikes or sums of spikes.
        """
        if self.input == 'image':
            self.is_integer = self.is_integer and _is_count(x)
        if self.input not in ('spikes', 'sums') or _is_count(x):
            return x
        if not self.is_scaled or not (x >= 0).all():
            _raise_not_spikes(self.name, x)
        return _nonzero_as_ones(x) if self.input == 'spikes' else x.round()  # a scaled spike is one spike

    def add_product(self, func: Any, args: Any, out: Tensor, steps: int) -> None:
        """Add a product of the layer, whose input contains `steps` time steps along the batch dimension."""
        self._current.dense_macs += flop_registry[func._overloadpacket](*args, out_val=out) / 2 / steps
        x, count_synops = args[1] if func is _aten.addmm.default else args[0], _SYNOPS[func]
        x = self._count_spikes(x)
        self.synops = _add_to(self.synops, check_finite(count_synops(x, args, steps), f'input of {self.name}'))
        if self.input == 'spikes':
            self.nonzero_synops = self.synops
        else:
            self.nonzero_synops = _add_to(self.nonzero_synops, count_synops(_nonzero_as_ones(x), args, steps))

    def add_attention(self, qkv: Tensor, num_heads: int) -> None:
        """Add the spikes q, k, v of a batch, `[T, B, N, 3 * C]`; raise a ValueError if they are not spikes."""
        if not _is_count(qkv):
            _raise_not_spikes(self.name, check_finite(qkv, f'output of {self.name.removesuffix("attn")}attn.qkv'))
        self.attention.setdefault(qkv.shape[2], AttentionCounts()).add(qkv, num_heads)

    def add_spikes(self, spikes: Tensor, channel_dim: int) -> None:
        """Add the output of the neurons, `[T, B, ...]`; raise a `NonFiniteError` if it contains NaN."""
        T, B = spikes.shape[:2]
        self.output_numel += spikes[0].numel()
        fired = spikes.sum(1, dtype=torch.promote_types(spikes.dtype, torch.float32))
        self.spikes = _add_to(self.spikes, check_finite(_sum_per_step(fired), f'output of {self.name}'))
        fired = fired.sum(0).movedim(channel_dim - 2, 0)  # [C, positions]
        earlier = None if self.neuron_spikes is None else self.neuron_spikes.counts
        if earlier is not None and earlier.shape != fired.shape:
            self.neuron_spikes = None
        if self.neuron_spikes is not None:
            self.neuron_spikes.add(fired, T * B)
        self.channel_spikes.add(fired.flatten(1).sum(1), T * B * fired[0].numel())


@dataclass
class AttentionCounts:
    """Sums for the two products of spiking attention on spikes q, k, v, in both orders, for inputs of equal size.

    Tensors are `[T]`, float64.
    """
    dense_qk: float = 0.  # multiply-accumulates per time step of each of the two products in (q k^T) v
    dense_kv: float = 0.  # the same for q (k^T v)
    q: Optional[Tensor] = None  # sums of spikes
    k: Optional[Tensor] = None
    v: Optional[Tensor] = None
    qk: Optional[Tensor] = None  # number of multiplied pairs in which both q and k fire
    kv: Optional[Tensor] = None
    numel: float = 0.  # number of values of q in one time step

    def add(self, qkv: Tensor, num_heads: int) -> None:
        """Add the spikes q, k, v of a batch, `[T, B, N, 3 * C]`."""
        T, B, N, C = qkv.shape
        C = C // 3
        d = C // num_heads
        q, k, v = qkv.float().view(T, B, N, 3, num_heads, d).unbind(3)  # [T, B, N, heads, d]
        self.dense_qk += B * N * N * C
        self.dense_kv += B * N * C * d
        self.numel += B * N * C
        self.q, self.k, self.v = (
            _add_to(total, _sum_per_step(x)) for total, x in ((self.q, q), (self.k, k), (self.v, v)))
        self.qk = _add_to(self.qk, _sum_per_step(q.sum(2) * k.sum(2)))
        self.kv = _add_to(self.kv, _sum_per_step(k.sum(4) * v.sum(4)))


def _conv_synops(x: Tensor, args: Any, steps: int) -> Tensor:
    _, weight, _, stride, padding, dilation = args[:6]
    at = x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32))  # [steps * n, H, W]
    at = at.to('cpu').double().view(steps, -1, 1, *at.shape[1:]).sum(1)
    kernel = torch.ones(1, 1, *weight.shape[2:], dtype=torch.float64)
    synops = _aten.convolution(at, kernel, None, stride, padding, dilation, False, [0, 0], 1)
    return synops.flatten(1).sum(1) * weight.shape[0]


def _mm_synops(x: Tensor, args: Any, steps: int) -> Tensor:
    return _sum_per_step(x.reshape(steps, -1, x.shape[-1])) * args[-1].shape[-1]


# For each operator, a function of (input, arguments, steps) that returns the sums for `LayerCounts.synops`, [steps]
_SYNOPS: Dict[Any, Callable[[Tensor, Any, int], Tensor]] = {
    _aten.convolution.default: _conv_synops,
    _aten.mm.default: _mm_synops,
    _aten.addmm.default: _mm_synops,
}


class _ProductCounter(TorchDispatchMode):
    """Dispatch mode that adds the products of the running layer to its counts; active between `resume` and `pause`."""
    allows_kernels = True  # kernels call the same product operators

    def __init__(self) -> None:
        super().__init__()
        self.counts: Optional[LayerCounts] = None
        self.steps = 1  # number of time steps in the layer's input
        self._is_active = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _SYNOPS:
            self.counts.add_product(func, args, out, self.steps)
        return out

    def resume(self, counts: LayerCounts, steps: int) -> None:
        self.counts, self.steps = counts, steps
        if not self._is_active:
            self._is_active = True
            self.__enter__()

    def pause(self, *args: Any) -> None:
        if self._is_active:
            self._is_active = False
            self.__exit__(None, None, None)


def _layers(encoder: Spikformer) -> Dict[str, nn.Module]:
    """Return the layers with weights and the attention layers by name, in execution order."""
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


def _find_product(name: str, layer: nn.Module) -> nn.Module:
    """Return the convolution or linear layer of a layer.

    Raises:
        ValueError: The layer is quantized or has an adapter, so that its operations cannot be counted.
    """
    is_unit = isinstance(layer, (ConvBNLIF, LinearBNLIF))  # a classifier may consist of several layers
    products = [getattr(layer, layer.layer_name)] if is_unit else list(layer.modules())
    product = next((m for m in products if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    for m in layer.modules():
        if hasattr(m, 'base_layer') or hasattr(m, 'original_module'):  # adapters and copies of modules of PEFT
            product, products = None, [m]
    if product is None:
        raise ValueError(
            f'The operations of {name} cannot be counted: expected an nn.Conv2d or nn.Linear, got '
            f'{type(products[0]).__module__}.{type(products[0]).__name__}. If it is an adapter of PEFT, profile '
            f'model.merge_and_unload(); if the model is quantized, profile it before quantization; if it has no '
            f'classifier, call reset_classifier(0).')
    return product


def _layer_kind(encoder: Spikformer, name: str, layer: nn.Module, is_first: bool) -> Dict[str, str]:
    if is_first:
        return dict(group='stem', input='image')
    if name == 'head.fc':
        return dict(group='head', input='features')
    if name.startswith('stem.'):  # V2 stages return sums of spikes, V1 stages return spikes
        is_sum = isinstance(encoder.stem, SpikingConvStem) and name.endswith('.down')
        return dict(group='stem', input='sums' if is_sum else 'spikes')
    group = 'attention' if '.attn' in name else 'mlp'
    if getattr(layer, 'has_real_input', False):
        return dict(group=group, input='real')
    return dict(group=group, input='sums' if name.endswith(('.qkv', '.fc1')) else 'spikes')


class Recorder:
    """Counts of all layers of a Spikformer; run each batch as `with recorder.record(): model(x)`."""

    def __init__(self, encoder: Spikformer, by_channel: bool = False):
        """
        Args:
            encoder: The model to record.
            by_channel: Count silent and saturated channels instead of neurons, for a masked autoencoder, whose token
                positions differ between images.
        """
        self.encoder = encoder
        self.layer_counts: Dict[str, LayerCounts] = {}
        self.outputs: List[Tensor] = []  # outputs of the last block since they were last cleared, [T, B, N, C]
        self._input_steps = 0  # number of time steps in the last input of the encoder
        self._layers = _layers(encoder)
        self._counter = _ProductCounter()
        is_scaled = any(isinstance(m, (_DropoutNd, DropPath)) and m.training for m in encoder.modules())
        for i, (name, m) in enumerate(self._layers.items()):
            is_attention = isinstance(m, SpikingSelfAttention)
            self.layer_counts[name] = LayerCounts(
                name,
                parameters=0 if is_attention else sum(p.numel() for p in m.parameters()),
                has_bn=not isinstance(getattr(m, 'bn', nn.Identity()), nn.Identity),
                has_bias=not is_attention and _find_product(name, m).bias is not None,
                is_scaled=is_scaled,
                weight_bytes=next(m.parameters()).element_size(),
                neuron_spikes=None if by_channel else SpikeCounts(),
                attention={} if is_attention else None,
                **_layer_kind(encoder, name, m, i == 0),
            )

    def _hooks(self) -> Iterator[RemovableHandle]:
        for name, m in self._layers.items():
            counts = self.layer_counts[name]
            if counts.attention is not None:
                yield m.qkv.register_forward_hook(
                    lambda qkv, args, out, counts=counts, heads=m.num_heads: counts.add_attention(out, heads))
                neuron, channel_dim = m.attn_lif, 3
            else:
                yield m.register_forward_pre_hook(lambda m, args, counts=counts: self._before(args[0], counts))
                yield m.register_forward_hook(self._counter.pause)
                neuron, channel_dim = (m if hasattr(m, 'lif') else None), 2 if isinstance(m, ConvBNLIF) else 3
            if neuron is not None:  # a hook on a module inside a layer would disable its kernel
                yield neuron.register_forward_hook(
                    lambda m, args, out, counts=counts, dim=channel_dim: counts.add_spikes(out, dim))
        last = self.encoder.blocks[-1] if len(self.encoder.blocks) else self.encoder.stem.stages[-1]
        yield last.register_forward_hook(self._after_last)

    def _before(self, x: Tensor, counts: LayerCounts) -> None:
        if counts.input == 'features':
            x = x.unsqueeze(0)
        if counts.input == 'image':
            self._input_steps = len(x)
        counts.add_input(x)
        self._counter.resume(counts, len(x))

    def _after_last(self, layer: nn.Module, args: Any, out: Tensor) -> None:
        self.outputs.append(out if out.ndim == 4 else out.flatten(3).transpose(2, 3))

    def check_time_steps(self, time_steps: int, is_sequence: bool) -> None:
        """Raise a ValueError if a wrapper has not run the encoder, or has changed the time steps of its input."""
        if not self.outputs:
            raise ValueError('The model did not run its Spikformer, so it cannot be profiled.')
        found = {(self._input_steps, len(x)) for x in self.outputs}
        if found != {(time_steps if is_sequence else 1, time_steps)}:
            raise ValueError(
                f'The model ran its Spikformer with {" and ".join(str(T) for _, T in sorted(found))} time steps of '
                f'{"sequences" if self._input_steps > 1 else "images"}, but the data are '
                f'{"sequences" if is_sequence else "images"} with {time_steps}. Profile the Spikformer itself with the '
                f'input that it gets from the model.')

    def _check_all_layers_ran(self) -> None:
        for name, counts in self.layer_counts.items():
            if name == 'head.fc' and not counts.inputs:  # a wrapper may use the features only
                continue
            if counts.attention is None and counts.synops is None or counts.attention == {}:
                raise ValueError(
                    f'The model did not run {name}, or its product is not an operation of PyTorch that can be counted, '
                    f'so the model cannot be profiled. Profile the Spikformer itself, before quantization.')

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the forward passes in the block; all hooks are removed afterwards."""
        handles: List[RemovableHandle] = []
        try:
            handles.extend(self._hooks())
            yield
            self._check_all_layers_ran()
        finally:
            self._counter.pause()
            for handle in handles:
                handle.remove()
