"""Convolutions and linear layers with spike inputs: event-driven where faster, with the input saved in compact form.

Spikes and sums of spikes are small integers, which int8 represents exactly. The reference is the layer itself.
"""
from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor, nn

from .events import Events, convolve, pack_events, restore_input, try_read_events, unpack_events, weight_gradient
from .rules import back_end, fallback_reason, is_batched, runs_in_kernel

__all__ = ['is_marked_as_spikes', 'mark_spikes', 'product', 'product_fallback_reason', 'to_int8_if_exact']

_CHUNK = 1 << 16  # number of values checked at a time
_CLASSES = ((nn.Conv2d, nn.Linear),)


def mark_spikes(spikes: Tensor) -> Tensor:
    """Mark neuron output as binary, so that `to_int8_if_exact` can convert it on CUDA without checking its values."""
    if not spikes.is_inference():  # inference tensors have no version counter and cannot be saved for backward
        spikes._spikes_version = spikes._version
    return spikes


def is_marked_as_spikes(x: Tensor) -> bool:
    """Return whether `x` is the unchanged output of a neuron, or a view of it."""
    if x.is_inference():
        return False
    return any(getattr(t, '_spikes_version', None) == x._version for t in (x, x._base))


def to_int8_if_exact(x: Tensor) -> Optional[Tensor]:
    """Return `x` as int8 if every value is an integer in [-128, 127], else None.

    On a CPU the values are checked, which takes about 5% of the time of the smallest convolution. On other devices a
    check would synchronize with the host, so only tensors marked by `mark_spikes` are converted.
    """
    if back_end(x) != 'cpu':
        return x.to(torch.int8) if is_marked_as_spikes(x) else None
    x_bytes = torch.empty_like(x, dtype=torch.int8)
    size = max(1, _CHUNK // max(1, x[0].numel()))
    buffer = torch.empty_like(x[:size])
    for chunk, chunk_bytes in zip(x.split(size), x_bytes.split(size)):
        chunk_bytes.copy_(chunk)
        difference = buffer[:len(chunk)].copy_(chunk_bytes).sub_(chunk).abs_()
        if difference.amax().item() != 0.:  # also true for NaN
            return None
    return x_bytes


class _ProductOfBytes(torch.autograd.Function):
    """A convolution or linear layer that saves `x_bytes`, the int8 copy of `x`, instead of `x`."""

    @staticmethod
    def forward(
            ctx: Any,
            x: Tensor,
            x_bytes: Tensor,
            weight: Tensor,
            bias: Optional[Tensor],
            conv_args: Tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(x_bytes, weight)
        ctx.conv_args = conv_args
        if conv_args:
            return nn.functional.conv2d(x, weight, bias, *conv_args)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        _check_no_double_backward()
        x_bytes, weight = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        grads = _dense_backward(
            grad, x_bytes.to(weight.dtype), weight, ctx.conv_args, (needs_x, needs_weight, needs_bias))
        return grads[0], None, grads[1], grads[2], None


def product_fallback_reason(layer: nn.Module, x: Optional[Tensor] = None) -> Optional[str]:
    """Return why a convolution or linear layer must be called as a module, or None if `product` can replace it.

    Args:
        layer: The layer.
        x: Its input. If None, the input is not checked.
    """
    reason = fallback_reason((layer,), _CLASSES, x)
    if reason is None and x is not None and x.ndim != (2 if type(layer) is nn.Linear else 4):
        reason = f'the input shape {list(x.shape)} is not supported'
    return reason


class _EventProduct(torch.autograd.Function):
    """An event-driven product that saves its input as bits or bytes.

    The weight gradient is event-driven, too, unless the output gradient is batched or not finite. The input gradient is
    dense.
    """

    @staticmethod
    def forward(
            ctx: Any,
            x: Tensor,
            weight: Tensor,
            bias: Optional[Tensor],
            layer: nn.Module,
            events: Events,
            outputs: List[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(pack_events(events), weight)
        ctx.events = events._replace(values=None)
        ctx.x_shape, ctx.conv_args = x.shape, _conv_args(layer)
        return outputs.pop()  # in a list, because autograd makes a view of an argument that is returned

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        _check_no_double_backward()
        packed, weight = ctx.saved_tensors
        events = unpack_events(packed, ctx.events)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_weight = None
        if needs_weight and type(grad) is Tensor and not is_batched(grad):
            grad_weight = weight_gradient(events, grad, weight)
        x = grad.new_empty(1).expand(ctx.x_shape)
        needs_dense = needs_weight and grad_weight is None
        if needs_dense:
            x = restore_input(events, not ctx.conv_args)
        grads = _dense_backward(grad, x, weight, ctx.conv_args, (needs_x, needs_dense, needs_bias))
        return grads[0], grads[1] if needs_dense else grad_weight, grads[2], None, None, None


def _conv_args(layer: nn.Module) -> Tuple[Any, ...]:
    return (layer.stride, layer.padding, layer.dilation, layer.groups) if type(layer) is nn.Conv2d else ()


def _check_no_double_backward() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            'Double backward (create_graph=True) is not supported for layers that save their input as int8. '
            "Run forward and backward under timm_spikformer.use_kernels('plain').")


def _dense_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        conv_args: Tuple[Any, ...],
        needs: Tuple[bool, bool, bool],
) -> Tuple[Optional[Tensor], Optional[Tensor], Optional[Tensor]]:
    """Return the gradients of input, weight and bias; `conv_args` is empty for a linear layer."""
    if conv_args:
        stride, padding, dilation, groups = conv_args
        return torch.ops.aten.convolution_backward(
            grad, x, weight, weight.shape[:1], stride, padding, dilation, False, (0, 0), groups, needs)
    needs_x, needs_weight, needs_bias = needs
    return (
        grad @ weight if needs_x else None,
        grad.t() @ x if needs_weight else None,
        grad.sum(0) if needs_bias else None,
    )


def product(layer: nn.Module, x: Tensor, events: Optional[Events] = None) -> Tensor:
    """Return `layer(x)`, event-driven if faster; save `x` for backward in compact form if that is exact.

    The layer is called as a module if the conditions in `rules.py` are not met, for example because it has hooks.

    Args:
        layer: Convolution or linear layer. Any other module is called as is.
        x: Input of the layer, `[n, C, H, W]` or `[n, C]`.
        events: Result of `try_read_events(layer, x)`, if already computed.
    """
    if events is None:
        events = try_read_events(layer, x)
    if events is not None and events.is_sparse:
        with torch.no_grad():
            out = convolve(layer, x, events)
        if out is not None:
            has_grad = x.requires_grad or any(p.requires_grad for p in layer.parameters())
            if torch.is_grad_enabled() and has_grad:
                return _EventProduct.apply(x, layer.weight, layer.bias, layer, events, [out])
            return out
    if not torch.is_grad_enabled() or not runs_in_kernel(lambda: product_fallback_reason(layer, x)):
        return layer(x)
    if not layer.weight.requires_grad:
        return layer(x)
    with torch.no_grad():
        x_bytes = to_int8_if_exact(x)
    if x_bytes is None:
        return layer(x)
    return _ProductOfBytes.apply(x, x_bytes, layer.weight, layer.bias, _conv_args(layer))
