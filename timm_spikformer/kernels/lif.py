"""LIF kernels. CPU: one pass over memory, optionally fused with the preceding BatchNorm. CUDA: spikingjelly's kernels.

On a CPU the input is processed in chunks that fit the cache. The backward recomputes currents and membrane potentials,
so only the input, the BN parameters and the per-channel statistics are saved. Comparisons write 0 and 1 to
floating-point buffers, because boolean masks are several times slower on a CPU.

The plain counterparts are `neurons.lif_plain`, `nn.BatchNorm1d` and `nn.BatchNorm2d`.
"""
import math
from typing import Any, Callable, Iterator, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from .products import mark_spikes
from .rules import back_end, fallback_reason, is_batched

__all__ = [
    'LIFConstants',
    'compute_spikes',
    'lif_cpu',
    'lif_cuda',
    'norm_lif',
    'norm_lif_fallback_reason',
    'supports_lif_cuda',
]

_CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CHUNK = 1 << 19  # values per time step and chunk; a few such buffers fit the last-level cache
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class LIFConstants(NamedTuple):
    """Constants of a neuron, see `neurons.lif`."""
    tau: float
    v_threshold: float
    alpha: float

    @property
    def are_numbers(self) -> bool:
        """Whether all are Python numbers in the range of float32, as kernels require; tensors may need gradients."""
        return all(type(value) in (float, int) and (math.isinf(value) or abs(value) < 3e38) for value in self)


class BNStatistics(NamedTuple):
    """Normalization by BatchNorm, `(x - mean) * invstd * weight + bias`; mean and invstd are `[C]`.

    `from_batch`: whether mean and invstd are computed from the input (train mode), so gradients flow through them.
    """
    mean: Tensor
    invstd: Tensor
    eps: float
    from_batch: bool


def _mean_and_var(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Return mean and biased variance over the rows of `[n, C]`, float64 `[C]`.

    Chunks are merged with the formula of Chan et al., https://doi.org/10.2307/2683386. PyTorch sums the statistics of
    channels-last feature maps in float32, which is too imprecise for nearly constant images: spikes would change.
    """
    n, mean, squares = 0, x.new_zeros(x.shape[1], dtype=torch.float64), 0.
    chunks = x.split(max(1, _CHUNK // x.shape[1]))
    buffer = torch.empty_like(chunks[0])
    for chunk in chunks:
        m = len(chunk)
        chunk_mean = chunk.mean(0)
        chunk_squares = torch.sub(chunk, chunk_mean, out=buffer[:m]).square_().sum(0)
        distance = chunk_mean.double() - mean
        mean = mean + distance * (m / (n + m))
        squares = squares + chunk_squares + distance.square() * (n * m / (n + m))
        n += m
    return mean, squares / n


@torch.no_grad()
def _bn_statistics(bn: nn.Module, rows: Tensor, has_grad: bool = True) -> BNStatistics:
    """Return the normalization that BatchNorm applies to `[n, C]`. In train mode, update its running statistics."""
    n, dtype = len(rows), rows.dtype
    mean, var = bn.running_mean, bn.running_var
    if bn.training:
        mean, var = _mean_and_var(rows)
        bn.num_batches_tracked += 1
        momentum = 1. / bn.num_batches_tracked.item() if bn.momentum is None else bn.momentum
        # .data: like F.batch_norm, do not increment the versions of tensors that another call may have saved
        bn.running_mean.data.lerp_(mean.to(dtype), momentum)
        bn.running_var.data.lerp_((var * (n / (n - 1))).to(dtype), momentum)
    invstd = (var.double() + bn.eps).rsqrt()
    # a copy for backward, because a later forward in train mode updates the running statistics in place
    return BNStatistics(mean.to(dtype, copy=has_grad), invstd.to(dtype), bn.eps, bn.training)


def _affine(
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        norm: Optional[BNStatistics],
) -> Optional[Tuple[Tensor, Tensor]]:
    """Return the normalization as scale and shift, `[C]` each; None without normalization."""
    if norm is None:
        return None
    scale = weight * norm.invstd
    return scale, torch.addcmul(bias, norm.mean, scale, value=-1)


def _chunks(x: Tensor, time_steps: int) -> Iterator[Tuple[slice, Tensor]]:
    """Yield row ranges of `[_, R, C]`, each with buffers `[T + 2, rows, C]` of at least float32 precision."""
    _, R, C = x.shape
    size = min(R, max(1, _CHUNK // C))
    buffers = x.new_empty(time_steps + 2, size, C, dtype=torch.promote_types(x.dtype, torch.float32))
    for start in range(0, R, size):
        stop = min(R, start + size)
        yield slice(start, stop), buffers[:, :stop - start]


def _compute_membranes(
        x: Tensor,
        affine: Optional[Tuple[Tensor, Tensor]],
        constants: LIFConstants,
        buffers: Tensor,
        membrane: Optional[Tensor] = None,
) -> None:
    """Write the negated membrane potentials before the reset to the first T of `T + 2` buffers `[rows, C]`.

    They are negated so that `torch.threshold`, which sets values at or below a threshold to 0, computes the reset.

    Args:
        x: Input currents, `[T or 1, rows, C]`.
        affine: Scale and shift of the currents, `[C]` each.
        constants: Constants of the neuron.
        buffers: Output, and two temporary buffers, `[T + 2, rows, C]`.
        membrane: Initial membrane potentials, `[rows, C]`; 0 by default.
    """
    *membranes, v, current = buffers
    tau = constants.tau
    is_power_of_2 = math.frexp(tau)[0] == 0.5  # then multiplying by 1 / tau is exact, and faster
    last = None
    for t, h in enumerate(membranes):
        if t < len(x):
            if affine is not None:
                torch.addcmul(affine[1], x[t], affine[0], out=current)
            else:
                current = x[t].to(v.dtype)
        if last is not None:
            torch.threshold(last, -constants.v_threshold, 0., out=v)
        elif membrane is not None:
            torch.neg(membrane, out=v)
        if last is None and membrane is None:
            torch.div(current, -tau, out=h)
        elif is_power_of_2:
            torch.add(v, torch.add(current, v, out=h), alpha=-1. / tau, out=h)
        else:
            torch.addcdiv(v, torch.add(current, v, out=h), v.new_tensor(tau), value=-1, out=h)
        last = h


def compute_spikes(
        x: Tensor,
        constants: LIFConstants,
        time_steps: int,
        affine: Optional[Tuple[Tensor, Tensor]] = None,
        membrane: Optional[Tensor] = None,
        new_membrane: Optional[Tensor] = None,
        is_finite: bool = False,
) -> Tensor:
    """Return the spikes `[T, R, C]` of currents `[T or 1, R, C]`.

    Args:
        x: Input currents. A single time step is repeated T times.
        constants: Constants of the neuron.
        time_steps: T.
        affine: Scale and shift of the currents, `[C]` each.
        membrane: Initial membrane potentials, `[R, C]`; 0 by default.
        new_membrane: Output buffer, `[R, C]`, for the membrane potentials after the last time step.
        is_finite: Whether the currents are known to be finite. If not, they are checked, and the output of a neuron
            with a non-finite current is NaN at all time steps.
    """
    spikes = x.new_empty(time_steps, *x.shape[1:])
    threshold = -constants.v_threshold
    for rows, buffers in _chunks(x, time_steps):
        _compute_membranes(x[:, rows], affine, constants, buffers, None if membrane is None else membrane[rows])
        charged = buffers[:time_steps]
        for t in range(time_steps):
            torch.le(charged[t], threshold, out=spikes[t, rows])
        if new_membrane is not None:
            torch.threshold(charged[-1], threshold, 0., out=new_membrane[rows]).neg_()
        if not is_finite and not math.isfinite(charged.sum().item()):  # detects every NaN and infinity
            is_bad = ~charged.isfinite().all(0)
            spikes[:, rows].masked_fill_(is_bad, torch.nan)
            if new_membrane is not None:
                new_membrane[rows].masked_fill_(is_bad, torch.nan)
    return spikes


def _compute_normed_spikes(
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        norm: Optional[BNStatistics],
        time_steps: int,
        constants: LIFConstants,
        *membranes: Tensor,
) -> Tensor:
    """Normalize the currents, then return their spikes: see `compute_spikes`."""
    affine = _affine(weight, bias, norm)
    # batch statistics are finite only if all values of the batch are finite
    is_finite = norm is not None and norm.from_batch and math.isfinite(torch.dot(*affine).item())
    return compute_spikes(x, constants, time_steps, affine, *membranes, is_finite=is_finite)


class _LIFFunction(torch.autograd.Function):
    """Optional BatchNorm, then LIF, `[T or 1, R, C] -> [T, R, C]`; saves no intermediate activations."""

    @staticmethod
    def forward(
            ctx: Any,
            x: Tensor,
            weight: Optional[Tensor],
            bias: Optional[Tensor],
            norm: Optional[BNStatistics],
            time_steps: int,
            constants: LIFConstants,
            plain: Callable[..., Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.norm, ctx.time_steps, ctx.constants, ctx.plain = norm, time_steps, constants, plain
        return _compute_normed_spikes(x, weight, bias, norm, time_steps, constants)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        if torch.is_grad_enabled() or is_batched(grad):  # double backward or batched gradients
            grads = _recompute_grads(ctx, grad)
        else:
            grads = _backward(*ctx.saved_tensors, ctx.norm, ctx.time_steps, ctx.constants, grad)
        return *grads, None, None, None, None


def _backward(
        x: Tensor,
        weight: Optional[Tensor],
        bias: Optional[Tensor],
        norm: Optional[BNStatistics],
        time_steps: int,
        constants: LIFConstants,
        grad: Tensor,
) -> Tuple[Tensor, Optional[Tensor], Optional[Tensor]]:
    """Return the gradients of input, weight and bias, given the gradient of the spikes, `[T, R, C]`."""
    tau, v_threshold, alpha = constants
    affine = _affine(weight, bias, norm)
    num_steps = len(x)
    grad_x = torch.empty_like(x)
    grad_weight = grad_bias = None
    if affine is not None:
        offset = -norm.mean * norm.invstd
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
    for rows, buffers in _chunks(x, time_steps):
        _compute_membranes(x[:, rows], affine, constants, buffers)
        sig, not_reset = buffers[-2:]
        for t in range(time_steps - 1, -1, -1):  # the gradients of currents overwrite membrane potentials
            h = buffers[t]
            torch.add(h, v_threshold, out=sig).mul_(-alpha).sigmoid_()
            is_last = t == time_steps - 1
            if not is_last:
                torch.gt(h, -v_threshold, out=not_reset)
            torch.addcmul(sig, sig, sig, value=-1, out=h).mul_(grad[t, rows]).mul_(alpha / tau)
            if not is_last:  # gradient through the membrane, unless reset by a spike: dv[t+1]/dv[t] = 1 - 1/tau
                h.addcmul_(not_reset, buffers[t + 1], value=1. - 1. / tau)
        for t in range(num_steps, time_steps):
            buffers[0].add_(buffers[t])
        for t in range(num_steps):
            if affine is not None:
                grad_bias += buffers[t].sum(0)
                normed = torch.addcmul(offset, x[t, rows], norm.invstd, out=sig)
                grad_weight += normed.mul_(buffers[t]).sum(0)
            grad_x[t, rows] = buffers[t]
    if affine is not None:
        scale, _ = affine
        flat_grad, flat_x = grad_x.flatten(0, 1), x.flatten(0, 1)
        along_x = constant = torch.zeros_like(scale)
        if norm.from_batch:  # per channel, the gradient of x sums to 0 and is uncorrelated with x
            along_x = -scale * norm.invstd * grad_weight / len(flat_x)
            constant = -scale * grad_bias / len(flat_x) - along_x * norm.mean
        size = max(1, _CHUNK // len(scale))
        for g, chunk in zip(flat_grad.split(size), flat_x.split(size)):
            torch.addcmul(constant, g, scale, out=g)
            if norm.from_batch:
                g.addcmul_(chunk, along_x)
    return grad_x, grad_weight, grad_bias


def _recompute_grads(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
    """Return the gradients of `_backward` by differentiating `plain`, for double backward and batched gradients."""
    x, weight, bias = ctx.saved_tensors
    norm, needed = ctx.norm, ctx.needs_input_grad[:3]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [
            None if t is None else t.view_as(t) if create_graph else t.detach().requires_grad_()
            for t in (x, weight, bias)]
        current, weight, bias = inputs
        if norm is not None:
            rows = current.flatten(0, 1)
            if norm.from_batch:
                rows = nn.functional.batch_norm(rows, None, None, weight, bias, True, 0., norm.eps)
            else:
                rows = (rows - norm.mean) * norm.invstd * weight + bias
            current = rows.view_as(current)
        spikes = ctx.plain(current.expand(ctx.time_steps, -1, -1), *ctx.constants)
    wanted = [t for t, is_needed in zip(inputs, needed) if is_needed]
    grads = iter(torch.autograd.grad(spikes, wanted, grad, create_graph=create_graph))
    return tuple(next(grads) if is_needed else None for is_needed in needed)


def lif_cpu(
        x: Tensor,
        constants: LIFConstants,
        plain: Callable[..., Tensor],
        membrane: Optional[Tensor] = None,
) -> Tuple[Tensor, Optional[Tensor]]:
    """Return the spikes of currents `[T, ...]`, in the same memory format, and the final membrane potentials.

    Args:
        x: Currents, on a CPU. They may be expanded over time.
        constants: Constants of the neuron.
        plain: Differentiable counterpart, `(x, tau, v_threshold, alpha) -> spikes`.
        membrane: Initial membrane potentials, of shape `x.shape[1:]`. If given, the call is not differentiable; if
            None, the returned membrane potentials are None.
    """
    order = [0] + sorted(range(1, x.ndim), key=lambda d: -x.stride(d))  # in the order of memory
    inverse = [order.index(d) for d in range(x.ndim)]
    rows = x.permute(order)
    flat = rows.reshape(len(x), -1, 1)
    if membrane is None:
        if torch.is_grad_enabled():
            spikes = _LIFFunction.apply(flat, None, None, None, len(x), constants, plain)
        else:
            spikes = compute_spikes(flat, constants, len(x))
        return spikes.view(rows.shape).permute(inverse), None
    membrane = membrane.permute([d - 1 for d in order[1:]])
    new_membrane = torch.empty_like(membrane, memory_format=torch.contiguous_format)
    spikes = compute_spikes(
        flat, constants, len(x), membrane=membrane.reshape(-1, 1), new_membrane=new_membrane.view(-1, 1))
    return spikes.view(rows.shape).permute(inverse), new_membrane.permute([d - 1 for d in inverse[1:]])


def supports_lif_cuda(x: Tensor, constants: LIFConstants) -> bool:
    """Return whether spikingjelly's kernels support the currents `[T, ...]` and the constants of the neuron."""
    tau, v_threshold, alpha = constants
    are_valid = 1. < tau < math.inf and math.isfinite(v_threshold) and 0. < alpha < math.inf
    return back_end(x) == 'cuda' and x.dtype in _CUDA_DTYPES and x.ndim > 1 and are_valid


def lif_cuda(x: Tensor, constants: LIFConstants, membrane: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """Compute the spikes of currents `[T, ...]` and the final membrane potentials with spikingjelly's fused kernels.

    The kernels output 0 where the membrane potential is NaN, and the reset turns an infinite membrane potential into
    NaN. Adding `v - v`, which is 0 or NaN, makes the output NaN in both cases. The spikes are marked as binary: see
    `mark_spikes`.

    Args:
        x: Input currents, `[T, ...]`, for which `supports_lif_cuda` returns True.
        constants: Constants of the neuron.
        membrane: Initial membrane potentials, float32, of shape `x.shape[1:]`; 0 by default.
    """
    from spikingjelly.activation_based import functional, surrogate
    if membrane is None:  # same memory format as the currents, so the kernels read contiguous memory
        membrane = torch.zeros_like(x[0], dtype=torch.float32)
    spikes, membrane, _ = functional.lif_multi_step(
        x,
        membrane,
        tau=constants.tau,
        decay_input=True,
        v_threshold=constants.v_threshold,
        v_reset=0.,
        surrogate_function=surrogate.Sigmoid(alpha=constants.alpha),
        detach_reset=True,
    )
    return mark_spikes(spikes.add_((membrane - membrane).detach())), membrane


def norm_lif_fallback_reason(
        bn: nn.Module,
        neuron: nn.Module,
        neuron_class: type,
        x: Optional[Tensor] = None,
) -> Optional[str]:
    """Return a message saying why BatchNorm and neuron cannot be fused, or None if `norm_lif` can replace them.

    Args:
        bn: BatchNorm.
        neuron: The module called next.
        neuron_class: The class of neuron that the kernel implements.
        x: Input of `bn`, `[n, C]` or `[n, C, H, W]`. If None, the input is not checked.
    """
    reason = fallback_reason((bn, neuron), (_NORMS, (neuron_class,)), x)
    if reason is not None:
        return reason
    if not neuron.constants.are_numbers:
        return f'a constant of the {type(neuron).__name__} is a tensor'
    weight = bn._parameters['weight']
    if back_end(weight) != 'cpu':
        return f'the kernel is for CPUs, but the parameters are on {weight.device}'
    dtype = weight.dtype
    if dtype not in (torch.float32, torch.float64) or bn._buffers['running_mean'].dtype != dtype:
        return ('the kernel requires BatchNorm weights and statistics in float32 or in float64, got '
                f"{dtype} and {bn._buffers['running_mean'].dtype}")
    if x is None:
        return None
    if x.ndim != (2 if type(bn) is nn.BatchNorm1d else 4) or x.shape[1] != bn.num_features:
        return f'the input shape {list(x.shape)} is not supported'
    if x.numel() // x.shape[1] < 2:
        return 'the input has one value per channel'
    if x.ndim == 4 and not x.is_contiguous(memory_format=torch.channels_last) or x.ndim == 2 and not x.is_contiguous():
        return 'the channels are not last in memory'
    return None


def norm_lif(
        bn: nn.Module,
        constants: LIFConstants,
        x: Tensor,
        time_steps: int,
        batch_size: int,
        plain: Callable[..., Tensor],
        membrane: Optional[Tensor] = None,
) -> Tuple[Tensor, Optional[Tensor]]:
    """Return the spikes of `neuron(bn(x))` in one pass over memory.

    Call this only if `norm_lif_fallback_reason` returns None.

    Args:
        bn: BatchNorm, whose running statistics are updated in train mode.
        constants: Constants of the neuron.
        x: `[S * batch_size, C]` or, channels last in memory, `[S * batch_size, C, H, W]`, where S is T or 1. A single
            time step is repeated T times.
        time_steps: T.
        batch_size: Number of rows per time step: samples, or samples times tokens.
        plain: Differentiable counterpart of the neuron.
        membrane: Initial membrane potentials, `[batch_size, C]` or `[batch_size, C, H, W]`. If given, the call is not
            differentiable; if None, the returned membrane potentials are None.

    Returns:
        Spikes `[T, batch_size, ...]`, in the memory format of `x`, and the membrane potentials after the last step.
    """
    rows = x if x.ndim == 2 else x.permute(0, 2, 3, 1)
    flat = rows.reshape(-1, rows.shape[-1])
    norm = _bn_statistics(bn, flat, torch.is_grad_enabled())
    shape = (time_steps, batch_size, *rows.shape[1:])
    currents = flat.view(-1, flat.shape[0] // (len(x) // batch_size), flat.shape[1])
    new_membrane = None
    args = currents, bn.weight, bn.bias, norm, time_steps, constants
    if membrane is None:
        spikes = _LIFFunction.apply(*args, plain) if torch.is_grad_enabled() else _compute_normed_spikes(*args)
    else:
        membrane = membrane if x.ndim == 2 else membrane.permute(0, 2, 3, 1)
        new_membrane = torch.empty_like(membrane, memory_format=torch.contiguous_format)
        row_shape = currents.shape[1:]
        spikes = _compute_normed_spikes(*args, membrane.reshape(row_shape), new_membrane.view(row_shape))
        new_membrane = new_membrane if x.ndim == 2 else new_membrane.permute(0, 3, 1, 2)
    spikes = spikes.view(shape)
    return (spikes if x.ndim == 2 else spikes.permute(0, 1, 4, 2, 3)), new_membrane
