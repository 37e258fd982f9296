"""Event-driven products: outputs of convolutions and linear layers as sums of the weights of nonzero inputs.

Inputs are spikes and sums of spikes; an input of value v counts as v events. Events are counted in every call; if there
are too many, the layer itself is called. The compiled loops are in `event_loops.py`; the reference is the layer.

A product is event-driven only in float32 on a CPU, for the convolutions of this package (3x3 with stride 1, 2x2 with
stride 2, 1x1) and linear layers, if it is large enough (`MIN_MACS`) and sparse enough (`MAX_DENSITY`). Weights must be
finite: a dense product also multiplies them by zero inputs, and zero times NaN or infinity is NaN.

Results equal those of the layer up to the order of float32 additions, and do not depend on the number of threads.
"""
import sys
import threading
from contextvars import ContextVar
from typing import Any, Callable, List, NamedTuple, Optional, Tuple, Type

import numpy as np
import torch
from torch import Tensor, nn

from .compiled import load_loops, unavailable_reason
from .rules import back_end, fallback_reason, module_fallback_reason, runs_in_kernel
from .switch import get_kernels
from .threads import run_in_threads, split_range

__all__ = [
    'EventRecord',
    'Events',
    'convolve',
    'convolve_norm_lif',
    'convolve_norm_lif_fallback_reason',
    'event_fallback_reason',
    'events_from_bytes',
    'is_too_small',
    'pack_events',
    'read_events',
    'restore_input',
    'set_event_observer',
    'try_read_events',
    'unpack_events',
    'weight_gradient',
]

# Maximum density, in events per input value, of an event-driven product. The measured break-even is 0.4 to 0.6,
# depending on the shape: see `python -m benchmarks events`.
MAX_DENSITY = 0.45
# Minimum multiply-accumulates of an event-driven product, counted densely. In smaller ones, the cost of calls and of
# distributing work to threads dominates: with two threads, training of small models would be slower. The limits do not
# depend on the number of threads, so results do not either.
MIN_MACS = 200_000_000
MIN_MACS_IN_TRAINING = 500_000_000
MIN_CHANNELS = 8  # minimum number of input and of output channels, in inference
MIN_CHANNELS_IN_TRAINING = 16
CHANNEL_MULTIPLE = 8  # divides the number of input channels: the loops read 8 bytes at a time
DTYPE = torch.float32

_LAYER_TYPES = (nn.Conv2d, nn.Linear)
_TOO_SMALL = 'too small to be faster than the dense layer'
_MAX_TILE_PAIRS = 600  # maximum number of pairs of a pixel and a time step in a tile
_NO_FLOATS, _NO_BYTES = np.empty(0, np.float32), np.empty(0, np.uint8)
_CPU_FLOAT32 = {'dtype': torch.float32, 'device': 'cpu'}  # so that PyTorch's default dtype and device have no effect
_MAX_MAGNITUDE = 1e30  # upper bound for sums of absolute weights, so that no intermediate result overflows


class Shape(NamedTuple):
    """A product expressed as a stride-1 convolution, `[N, H, W, C] -> [N, H', W', OC]`; see `event_loops`."""
    N: int
    H: int
    W: int
    C: int
    OC: int
    kernel_size: int
    padding: int
    block: int  # 2 for a 2x2 convolution with stride 2, which is a 1x1 convolution of blocks of 2x2 pixels; else 1

    @property
    def out_size(self) -> Tuple[int, int]:
        reduction = 2 * self.padding - self.kernel_size + 1
        return self.H + reduction, self.W + reduction

    @property
    def macs(self) -> int:
        height, width = self.out_size
        return self.N * height * width * self.kernel_size ** 2 * self.C * self.OC


class Events(NamedTuple):
    """The input of a product as bytes, and its shape."""
    values: Tensor  # uint8 [N, H, W, C] as in `shape`
    shape: Shape
    total: int  # sum of the values
    largest: int

    @property
    def density(self) -> float:
        return self.total / self.values.numel()

    @property
    def is_sparse(self) -> bool:
        """Whether the input is sparse enough for an event-driven product."""
        return self.dense_reason is None

    @property
    def dense_reason(self) -> Optional[str]:
        """Reason to compute the product with the dense layer, or None if it should be event-driven."""
        if self.density > MAX_DENSITY:
            return f'{self.density:.2f} events per input, more than {MAX_DENSITY}'
        return None


class EventRecord(NamedTuple):
    """Record of one call of a layer, as passed to the observer set by `set_event_observer`."""
    layer: nn.Module
    density: Optional[float]  # events per input value; None if they were not counted
    reason: Optional[str]  # why the product is not event-driven; None if it is


_observer: ContextVar[Optional[Callable[[EventRecord], None]]] = ContextVar('observer', default=None)


def set_event_observer(observer: Optional[Callable[[EventRecord], None]]) -> Optional[Callable[[EventRecord], None]]:
    """Set or, with None, remove the function that receives a record of every product; return the previous one.

    The setting applies to the current thread or asyncio task.
    """
    old = _observer.get()
    _observer.set(observer)
    return old


def _shape(layer: nn.Module, x: Tensor) -> Optional[Shape]:
    """Return the shape of a layer's product, or None if no loop implements it."""
    if type(layer) is nn.Linear:
        return Shape(1, x.shape[0], 1, x.shape[1], layer.out_features, 1, 0, 1) if x.ndim == 2 else None
    if x.ndim != 4 or layer.groups != 1 or layer.dilation != (1, 1):
        return None
    N, C, H, W = x.shape
    args = layer.kernel_size, layer.stride, layer.padding
    if args == ((2, 2), (2, 2), (0, 0)) and H % 2 == W % 2 == 0:
        return Shape(N, H // 2, W // 2, 4 * C, layer.out_channels, 1, 0, 2)
    if args in (((3, 3), (1, 1), (1, 1)), ((3, 3), (1, 1), (0, 0)), ((1, 1), (1, 1), (0, 0))):
        shape = Shape(N, H, W, C, layer.out_channels, layer.kernel_size[0], layer.padding[0], 1)
        return shape if min(shape.out_size) > 0 else None
    return None


def _parameters_fallback_reason(layer: nn.Module, in_chs: int, shape: Shape) -> Optional[str]:
    """Return why the parameters do not fit the input and the layer, which is then called and raises an error."""
    kernel = () if type(layer) is nn.Linear else layer.kernel_size
    if layer.weight.shape != (shape.OC, in_chs, *kernel):
        return f'the weight {list(layer.weight.shape)} does not fit the layer or {in_chs} input channels'
    bias = layer.bias
    if bias is not None and (bias.shape != (shape.OC,) or bias.dtype != DTYPE or bias.device != layer.weight.device):
        return f'the bias is {bias.dtype} {list(bias.shape)} on {bias.device}'
    return None


def _shape_fallback_reason(shape: Optional[Shape]) -> Optional[str]:
    if shape is None:
        return 'no event-driven kernel for this kernel size, stride, padding, dilation or groups'
    channels = shape.C // shape.block ** 2
    min_channels = MIN_CHANNELS_IN_TRAINING if torch.is_grad_enabled() else MIN_CHANNELS
    if min(channels, shape.OC) < min_channels:
        return f'{channels} input and {shape.OC} output channels: at least {min_channels} of each are required'
    if shape.C % CHANNEL_MULTIPLE != 0:
        return f'{channels} input channels: a multiple of {CHANNEL_MULTIPLE // shape.block ** 2} is required'
    if shape.macs < _min_macs():
        return f'{shape.macs / 1e6:.1f} million multiply-accumulates: {_TOO_SMALL}'
    return None


def _min_macs() -> int:
    return MIN_MACS_IN_TRAINING if torch.is_grad_enabled() else MIN_MACS


def is_too_small(layer: nn.Module, x: Tensor) -> bool:
    """Return whether a product is certainly too small to be faster event-driven; a cheap check that runs first."""
    if type(x) is not Tensor or type(layer) not in _LAYER_TYPES:
        return False
    weight = layer._parameters.get('weight')
    return weight is not None and x.ndim > 1 and x.numel() // max(1, x.shape[1]) * weight.numel() < _min_macs()


def event_fallback_reason(layer: nn.Module, x: Optional[Tensor] = None, is_bytes: bool = False) -> Optional[str]:
    """Return why a product cannot be event-driven, regardless of the input values, or None if it can be.

    Args:
        layer: The layer.
        x: Input of the layer. If None, the input is not checked.
        is_bytes: Whether `x` is spikes that `convolve_norm_lif` returned as bytes.
    """
    reason = fallback_reason((layer,), (_LAYER_TYPES,), None if is_bytes else x)
    if reason is not None:
        return reason
    located = layer.weight if x is None else x
    if layer.weight.dtype != DTYPE or back_end(located) != 'cpu':
        return f'the layer is {layer.weight.dtype} on {located.device}: event-driven products require {DTYPE} on a CPU'
    if x is not None:
        shape = _shape(layer, x)
        reason = _shape_fallback_reason(shape) or _parameters_fallback_reason(layer, x.shape[1], shape)
        if reason is not None:
            return reason
    if get_kernels() == 'dense':
        return 'event-driven products are switched off'
    if torch._C._len_torch_dispatch_stack() > 0:
        return 'a TorchDispatchMode is active'
    if sys.byteorder != 'little':
        return 'event-driven products require a little-endian machine'
    return unavailable_reason()


def try_read_events(layer: nn.Module, x: Tensor) -> Optional[Events]:
    """Convert the input of a layer to events; None if no event-driven kernel supports the layer or its values.

    Args:
        layer: Convolution, linear layer, or a module that replaces one.
        x: Input of the layer, `[n, C, H, W]` or `[n, C]`.
    """
    if torch.compiler.is_compiling():
        return None
    if is_too_small(layer, x):
        _observe(layer, None, _TOO_SMALL)
        return None
    reason = event_fallback_reason(layer, x)
    if not runs_in_kernel(lambda: reason):
        _observe(layer, None, reason or 'the first forward pass of the checkpointed segment was dense')
        return None
    events = read_events(layer, x)
    _observe(layer, events, 'input values are not integers from 0 to 15' if events is None else events.dense_reason)
    return events


def _observe(layer: nn.Module, events: Optional[Events], reason: Optional[str]) -> None:
    observer = _observer.get()
    if observer is not None:
        observer(EventRecord(layer, None if events is None else events.density, reason))


def read_events(layer: nn.Module, x: Tensor) -> Optional[Events]:
    """Convert the input of a layer to bytes; return None if any value is not an integer from 0 to 15.

    Args:
        layer: A layer for which `event_fallback_reason` returns None.
        x: Input of the layer, float32 `[n, C, H, W]` or `[n, C]`.
    """
    shape = _shape(layer, x)
    is_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    x = (x.permute(0, 2, 3, 1) if is_channels_last else x.contiguous()).detach().resolve_neg()
    values = torch.empty(x.shape, dtype=torch.uint8, device='cpu')
    source, target = x.view(-1).numpy(), values.view(-1).numpy()
    results = run_in_threads(
        load_loops().read_events,
        [(source, start, stop, target) for start, stop in split_range(len(source), 1 << 19)])
    total, largest = 0, 0
    for part, part_largest in results:
        if part < 0:
            return None
        total += part
        largest = max(largest, part_largest)
    if x.ndim == 4 and not is_channels_last:
        values = values.permute(0, 2, 3, 1)
    return Events(_as_shape(values, shape), shape, total, largest)


def _as_shape(values: Tensor, shape: Shape) -> Tensor:
    """Rearrange bytes `[n, H, W, C]` or `[n, C]` to `[N, H, W, C]` as given by `shape`."""
    if shape.block == 2:
        values = values.view(shape.N, shape.H, 2, shape.W, 2, -1).permute(0, 1, 3, 2, 4, 5)
    return values.reshape(shape.N, shape.H, shape.W, shape.C).contiguous()


def events_from_bytes(layer: nn.Module, x: Tensor) -> Optional[Events]:
    """Return spikes from `convolve_norm_lif(..., as_bytes=True)` as events of a layer; None if it must run densely.

    Args:
        layer: Convolution or linear layer.
        x: Spikes, uint8 `[n, C, H, W]` or `[n, C]`.
    """
    reason = event_fallback_reason(layer, x, is_bytes=True)
    events = None
    if runs_in_kernel(lambda: reason):
        shape = _shape(layer, x)
        values = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
        total = int(np.count_nonzero(_flat_view(x).view(bool)))
        events = Events(_as_shape(values, shape), shape, total, 1)
        reason = events.dense_reason
    _observe(layer, events, reason)
    return events if reason is None else None


def pack_events(events: Events) -> Tensor:
    """Return the values of events, packed to bits if they are binary, otherwise unchanged."""
    if events.largest > 1:
        return events.values
    return torch.from_numpy(np.packbits(events.values.view(-1).numpy()))


def unpack_events(packed: Tensor, events: Events) -> Events:
    """Return events with their values restored from the result of `pack_events`."""
    shape = events.shape
    if events.largest <= 1:
        size = shape.N * shape.H * shape.W * shape.C
        packed = torch.from_numpy(np.unpackbits(packed.numpy(), count=size)).view(shape.N, shape.H, shape.W, shape.C)
    return events._replace(values=packed)


def restore_input(events: Events, is_linear: bool) -> Tensor:
    """Return the input of the layer, float32 `[n, C]` for a linear layer or `[n, C, H, W]`."""
    shape, values = events.shape, events.values
    if is_linear:
        return values.view(shape.H, shape.C).float()
    if shape.block == 2:
        values = values.view(shape.N, shape.H, shape.W, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
        values = values.reshape(shape.N, 2 * shape.H, 2 * shape.W, -1)
    return values.float().permute(0, 3, 1, 2)


_buffers = threading.local()


def _scratch_buffer(n: int) -> Tensor:
    """Return an uninitialized float32 buffer `[n]`, reused by the next call in this thread to avoid page faults."""
    buffer = getattr(_buffers, 'buffer', None)
    if buffer is None or len(buffer) < n:
        with torch.inference_mode(False):
            buffer = _buffers.buffer = torch.empty(n, **_CPU_FLOAT32)
    return buffer[:n]


def _pack_weights(weight: Tensor, shape: Shape, largest: int) -> Optional[Tensor]:
    """Return the weights in the layout of the loops; None if they are not finite or so large that sums may overflow."""
    loops = load_loops()
    size = shape.kernel_size
    chunk = min(loops.largest_chunk(size), shape.C)
    num_blocks = -(-shape.OC // loops.BLOCK)
    packed = _scratch_buffer(num_blocks * -(-shape.C // chunk) * (size * size * chunk + 1) * loops.BLOCK)
    weight = weight.detach()
    flat = (weight.permute(0, 2, 3, 1) if weight.ndim == 4 else weight).reshape(-1).numpy()  # [OC, k, k, C]
    limit = _MAX_MAGNITUDE / (size * size * shape.C * largest)
    are_valid = run_in_threads(loops.pack_weights, [
        (flat, shape.OC, shape.C, size * size, chunk, start, stop, limit, packed.numpy())
        for start, stop in split_range(num_blocks, 1, None if len(packed) > 1 << 19 else 1)])
    return packed if all(are_valid) else None


def _split_work(num_tiles: int, num_blocks: int) -> List[Tuple[int, int, int, int]]:
    """Divide tiles, and blocks if there are few tiles, into work items `(tile0, tile1, block0, block1)` for threads."""
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        return [(0, num_tiles, 0, num_blocks)]
    tiles = split_range(num_tiles, 1, 4 * num_threads)
    blocks = split_range(num_blocks, 1, max(1, -(-2 * num_threads // len(tiles))))
    return [(*tile, *block) for tile in tiles for block in blocks]


def _flat_view(x: Tensor) -> Any:
    """Return a flat NumPy view of the memory of a tensor, from its first to its last element."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride()))
    return x.resolve_neg().as_strided((span,), (1,)).numpy()


def _run_convolve(
        events: Events,
        packed: Tensor,
        time_steps: int,
        out: Tensor,
        scale: Optional[Tensor],
        shift: Tensor,
        tau: float = 2.,
        v_threshold: float = 1.,
) -> None:
    """Run `event_loops.convolve` and write to `out`, `[N, H', W', OC]` with any strides.

    With a scale, `out` receives the spikes of LIF neurons; if it is None, the product plus `shift`.
    """
    loops = load_loops()
    shape, T = events.shape, time_steps
    if shape.N == 1 and T > 1:  # a linear layer: [1, T * R, 1, C] as T images of R rows
        shape = shape._replace(N=T, H=shape.H // T)
        out = out.view(T, shape.H, 1, shape.OC)
    N, H, W, C, OC, size, padding, _ = shape
    B = N // T
    out_height, out_width = shape.out_size
    tile_rows = min(out_height, max(1, _MAX_TILE_PAIRS // (out_width * T)))
    num_tiles = B * -(-out_height // tile_rows)
    num_blocks = -(-OC // loops.BLOCK)
    missing = (0, num_blocks * loops.BLOCK - OC)
    shift = nn.functional.pad(shift, missing)
    is_fused = scale is not None
    scale = nn.functional.pad(scale, missing) if is_fused else shift
    is_bytes = out.dtype == torch.uint8
    outputs = _NO_FLOATS if is_bytes else _flat_view(out), _flat_view(out) if is_bytes else _NO_BYTES
    run_in_threads(loops.convolve, [
        (events.values.view(-1).numpy(), packed.numpy(), T, B, H, W, C, OC, size, padding,
         min(loops.largest_chunk(size), C), tile_rows, *item, max(1, events.largest), *outputs, *out.stride(), is_fused,
         scale.numpy(), shift.numpy(), np.float32(tau), np.float32(v_threshold), loops.BYTE_INDICES,
         loops.BYTE_COUNTS)
        for item in _split_work(num_tiles, num_blocks)])


def _empty_output(
        layer: nn.Module,
        x: Tensor,
        shape: Shape,
        as_bytes: bool = False,
) -> Tuple[Tensor, Tensor]:
    """Return an uninitialized output in the memory format that the layer would use, and a view `[N, H', W', OC]`."""
    options = {**_CPU_FLOAT32, 'dtype': torch.uint8} if as_bytes else _CPU_FLOAT32
    if type(layer) is nn.Linear:
        out = torch.empty(shape.H, shape.OC, **options)
        return out, out[None, :, None]
    is_channels_last = as_bytes or any(
        t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, layer.weight))
    memory_format = torch.channels_last if is_channels_last else torch.contiguous_format
    out = torch.empty(shape.N, shape.OC, *shape.out_size, memory_format=memory_format, **options)
    return out, out.permute(0, 2, 3, 1)


def convolve(layer: nn.Module, x: Tensor, events: Events) -> Optional[Tensor]:
    """Return `layer(x)`, computed from events and without gradients; None if weights are not finite or very large.

    Args:
        layer: The layer.
        x: Input of the layer, `[n, C, H, W]` or `[n, C]`.
        events: `x` as events, from `read_events`.
    """
    packed = _pack_weights(layer.weight, events.shape, max(1, events.largest))
    if packed is None:
        return None
    out, view = _empty_output(layer, x, events.shape)
    bias = torch.zeros(events.shape.OC, **_CPU_FLOAT32) if layer.bias is None else layer.bias.detach()
    _run_convolve(events, packed, 1, view, None, bias)
    return out


def convolve_norm_lif(
        layer: nn.Module,
        bn: nn.Module,
        neuron: nn.Module,
        x: Tensor,
        events: Events,
        time_steps: int,
        as_bytes: bool = False,
) -> Optional[Tensor]:
    """Return the spikes of `neuron(bn(layer(x)))` in one pass, for inference; None if the modules must be called.

    Args:
        layer: The layer.
        bn: BatchNorm in eval mode, or `nn.Identity`.
        neuron: A neuron that has an attribute `constants`, see `lif.LIFConstants`.
        x: Input of the layer, `[T * n, ...]`.
        events: `x` as events, from `read_events` or `events_from_bytes`.
        time_steps: T.
        as_bytes: Return uint8, in channels-last format, for `events_from_bytes`.

    Returns:
        Spikes, `[T * n, ...]`.
    """
    shape = events.shape
    tau, v_threshold, _ = neuron.constants
    scale, shift = torch.ones(shape.OC, **_CPU_FLOAT32), torch.zeros(shape.OC, **_CPU_FLOAT32)
    if type(bn) is not nn.Identity:
        scale = bn.weight * (bn.running_var.double() + bn.eps).rsqrt().float()
        shift = torch.addcmul(bn.bias, bn.running_mean, scale, value=-1)
    if layer.bias is not None:
        shift = torch.addcmul(shift, layer.bias, scale)
    scale, shift = scale.detach().contiguous(), shift.detach().contiguous()
    if not float(scale.abs().amax()) * _MAX_MAGNITUDE + float(shift.abs().amax()) < 1e38:
        return None
    packed = _pack_weights(layer.weight, shape, max(1, events.largest))
    if packed is None:
        return None
    out, view = _empty_output(layer, x, shape, as_bytes)
    _run_convolve(events, packed, time_steps, view, scale, shift, tau, v_threshold)
    return out


def convolve_norm_lif_fallback_reason(
        layer: nn.Module,
        bn: nn.Module,
        neuron: nn.Module,
        neuron_class: Type[nn.Module],
) -> Optional[str]:
    """Return why BN and neuron cannot be fused with the event-driven product of a layer, or None if they can be."""
    if torch.is_grad_enabled():
        return 'gradients are enabled'
    reason = module_fallback_reason(neuron, (neuron_class,)) or _norm_fallback_reason(bn, layer)
    if reason is not None:
        return reason
    if not neuron.constants.are_numbers:
        return 'the constants of the neuron are not numbers'
    tau, v_threshold, _ = neuron.constants
    if not 1. < tau < _MAX_MAGNITUDE or not abs(v_threshold) < _MAX_MAGNITUDE:
        return f'the neuron has tau={tau}, v_threshold={v_threshold}'
    return None


def _norm_fallback_reason(bn: nn.Module, layer: nn.Module) -> Optional[str]:
    if type(bn) is nn.Identity:
        return module_fallback_reason(bn, (nn.Identity,))
    reason = module_fallback_reason(bn, (nn.BatchNorm1d if type(layer) is nn.Linear else nn.BatchNorm2d,))
    if reason is not None:
        return reason
    if bn.training:
        return 'BatchNorm is in train mode'
    expected = layer.weight.shape[:1], DTYPE, layer.weight.device
    for tensor in (bn.weight, bn.bias, bn.running_mean, bn.running_var):
        if (tensor.shape, tensor.dtype, tensor.device) != expected:
            return f'a tensor of BatchNorm is {tensor.dtype} {list(tensor.shape)} on {tensor.device}'
    return None


def weight_gradient(events: Events, grad: Tensor, weight: Tensor) -> Optional[Tensor]:
    """Return the weight gradient; None if the output gradient is not finite or rows are too wide for the loops.

    Args:
        events: Input of the layer.
        grad: Output gradient, `[n, OC, H', W']` or `[n, OC]`, float32 with any strides.
        weight: Weight of the layer.
    """
    loops = load_loops()
    N, H, W, C, OC, size, padding, block = events.shape
    grad = grad.permute(0, 2, 3, 1) if grad.ndim == 4 else grad[None, :, None]
    border = size - 1
    tile_rows = min(H, max(1, _MAX_TILE_PAIRS // W))
    tile_images = min(N, max(1, _MAX_TILE_PAIRS // (tile_rows * W)))
    num_blocks = -(-OC // loops.BLOCK)
    if (tile_rows + border) * (W + border) * tile_images >= 1 << 16:  # indices of pixels have 16 bits
        return None
    out = torch.zeros(num_blocks, size, size, C, loops.BLOCK, **_CPU_FLOAT32)
    num_threads = torch.get_num_threads()
    are_finite = run_in_threads(loops.weight_gradient, [
        (events.values.view(-1).numpy(), _flat_view(grad), *grad.stride(), N, H, W, C, OC, size, padding, tile_images,
         tile_rows, 8 * start, 8 * stop, max(1, events.largest), out.view(-1).numpy(), loops.BYTE_INDICES,
         loops.BYTE_COUNTS)
        for start, stop in split_range(C // 8, 1, 1 if num_threads == 1 else 2 * num_threads)])
    if not all(are_finite):
        return None
    is_direct = weight.ndim == 2 or weight.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
    result = torch.empty(weight.shape, memory_format=memory_format, **_CPU_FLOAT32)
    run_in_threads(loops.unpack_weights, [
        (out.view(-1).numpy(), OC, C, size * size, start, stop, _flat_view(result))
        for start, stop in split_range(num_blocks, 1)])
    return result if is_direct else result.contiguous()
