"""Leaky integrate-and-fire neuron: the function, its gradient, the module.

The only file that knows about recurrence in time and about back ends. The neuron is a pure function of a whole
sequence: its membrane is a local variable, so nothing has to be reset between batches, and deepcopy, EMA, gradient
checkpointing, DDP, TorchScript, FX, `torch.compile` and `torch.export` need no special case.

Source: the LIF node of the authors' Spikformer V1 code (spikingjelly's, with `detach_reset=True`), which V2 is
taken to share.
"""
import contextlib
import functools
from typing import Any, Dict, Iterator, NamedTuple, Optional, Tuple

import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ['LIF', 'Membranes', 'Norm', 'carry_membranes', 'is_plain', 'lif', 'norm_lif', 'norm_of']


class Norm(NamedTuple):
    """BN that a neuron applies on its way: `(x - mean) * invstd * weight + bias`, each `[C]`. See `norm_of`.

    Args:
        from_batch: Mean and deviation are those of the input, so the gradient passes through them.
        time_steps: Number of steps that an input with a single one stands for.
    """
    weight: Tensor
    bias: Tensor
    mean: Tensor
    invstd: Tensor
    from_batch: bool
    time_steps: int


_CHUNK = 1 << 19  # values of one step that are worked on at a time: a few such buffers fit a CPU's last cache


def _mean_and_var(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Over the rows of `x`, float64 `[C]`: chunk by chunk, merged after Chan et al., https://doi.org/10.2307/2683386.

    PyTorch's own statistics of channels-last maps are float32 sums, too coarse where an image is flat: spikes flip.
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


def is_plain(layer: nn.Module, *classes: type) -> bool:
    """Whether a layer is of one of the classes itself, and nobody has hooked it or replaced its forward."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return type(layer) in classes and not any(hooks) and 'forward' not in vars(layer)


@torch.no_grad()
def norm_of(bn: nn.Module, x: Tensor, time_steps: int) -> Optional[Norm]:
    """What BN would do to its input, for a neuron that does it in the same pass; None where the two stay apart.

    Updates the running statistics, as BN does. The two stay apart unless the BN is a plain one, with hooks of nobody
    (SyncBN's statistics are not of `x` alone), and `x` in float32 on a CPU with its channels last in memory; and under
    tracing and compilers, which fuse by themselves.

    Args:
        bn: The layer before the neuron.
        x: Its input, `[n, C]` or `[n, C, H, W]`.
        time_steps: See `Norm`.
    """
    if type(x) is not Tensor or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return None
    if not is_plain(bn, nn.BatchNorm1d, nn.BatchNorm2d) or not bn.affine or not bn.track_running_stats:
        return None
    if any(t.dtype != torch.float32 or t.device.type != 'cpu' for t in (x, bn.weight, bn.running_mean)):
        return None
    rows = x if x.ndim == 2 else x.permute(0, 2, 3, 1)
    n = x.numel() // x.shape[1]
    if n < 2 or not rows.is_contiguous():  # of a single value BN says what is wrong
        return None
    mean, var = bn.running_mean, bn.running_var
    if bn.training:
        mean, var = _mean_and_var(rows.reshape(n, -1))
        bn.num_batches_tracked += 1
        momentum = 1. / bn.num_batches_tracked.item() if bn.momentum is None else bn.momentum
        bn.running_mean.lerp_(mean.float(), momentum)
        bn.running_var.lerp_((var * (n / (n - 1))).float(), momentum)
    invstd = (var.double() + bn.eps).rsqrt()
    return Norm(bn.weight, bn.bias, mean.float(), invstd.float(), bn.training, time_steps)


def _affine(weight: Optional[Tensor], bias: Tensor, mean: Tensor, invstd: Tensor) -> Optional[Tuple[Tensor, Tensor]]:
    """BN as `x * scale + shift`."""
    if weight is None:
        return None
    scale = weight * invstd
    return scale, torch.addcmul(bias, mean, scale, value=-1)


def _chunks(x: Tensor, time_steps: int) -> Iterator[Tuple[slice, Tensor]]:
    """Ranges of the rows of `[_, R, C]`, each with buffers `[T + 2, rows, C]`, in at least single precision."""
    _, R, C = x.shape
    size = min(R, max(1, _CHUNK // C))
    buffers = x.new_empty(time_steps + 2, size, C, dtype=torch.promote_types(x.dtype, torch.float32))
    for start in range(0, R, size):
        stop = min(R, start + size)
        yield slice(start, stop), buffers[:, :stop - start]


def _charge(
        x: Tensor,
        affine: Optional[Tuple[Tensor, Tensor]],
        tau: float,
        v_threshold: float,
        buffers: Tensor,
        last: Optional[Tensor] = None,
) -> None:
    """The charged membranes of currents `[T or 1, rows, C]` into the first T of `T + 2` buffers.

    Negated, as `threshold` can then reset them: it keeps what is above a value, and sets the rest to 0. `last` are
    those of the step before, `[rows, C]`, where there is one.
    """
    *membranes, v, current = buffers
    tau_tensor = torch.tensor(tau, dtype=v.dtype)
    for t, h in enumerate(membranes):
        if t < len(x):
            if affine is not None:
                torch.addcmul(affine[1], x[t], affine[0], out=current)
            else:
                current = x[t].to(v.dtype)
        if last is None:
            torch.div(current, -tau, out=h)
        else:
            torch.threshold(last, -v_threshold, 0., out=v)
            torch.addcdiv(v, torch.add(current, v, out=h), tau_tensor, value=-1, out=h)
        last = h


def _fire(
        x: Tensor,
        affine: Optional[Tuple[Tensor, Tensor]],
        time_steps: int,
        tau: float,
        v_threshold: float,
        last: Optional[Tensor] = None,
        charged: Optional[Tensor] = None,
) -> Tensor:
    """Spikes `[T, R, C]` of currents `[T or 1, R, C]`; the last charged membranes go into `charged`. See `_charge`."""
    spikes = x.new_empty(time_steps, *x.shape[1:])
    for rows, buffers in _chunks(x, time_steps):
        _charge(x[:, rows], affine, tau, v_threshold, buffers, None if last is None else last[rows])
        for t in range(time_steps):
            torch.le(buffers[t], -v_threshold, out=spikes[t, rows])
        if charged is not None:
            charged[rows] = buffers[time_steps - 1]
    return spikes


class _LIFFunction(torch.autograd.Function):
    """The neuron, and BN where there is one, `[T or 1, R, C] -> [T, R, C]`, with a hand-written gradient.

    It keeps its input and nothing else: the backward computes currents and membranes again. All is done in chunks of
    rows, which stay in the caches from the first operation on them to the last. Comparisons write 0 and 1 straight into
    floating point buffers: on a CPU, boolean masks are several times slower.
    """

    @staticmethod
    def forward(
            ctx: Any,
            x: Tensor,
            weight: Optional[Tensor],  # down to `time_steps` these are a Norm's, or None
            bias: Optional[Tensor],
            mean: Optional[Tensor],
            invstd: Optional[Tensor],
            from_batch: bool,
            time_steps: int,
            tau: float,
            v_threshold: float,
            alpha: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        ctx.args = from_batch, time_steps, tau, v_threshold, alpha
        return _fire(x, _affine(weight, bias, mean, invstd), time_steps, tau, v_threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight, bias, mean, invstd = ctx.saved_tensors
        from_batch, time_steps, tau, v_threshold, alpha = ctx.args
        affine = _affine(weight, bias, mean, invstd)
        num_steps = len(x)
        grad_x = torch.empty_like(x)
        grad_weight = grad_bias = None
        if affine is not None:
            offset = -mean * invstd
            grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for rows, buffers in _chunks(x, time_steps):
            _charge(x[:, rows], affine, tau, v_threshold, buffers)
            sig, not_reset = buffers[-2:]
            for t in range(time_steps - 1, -1, -1):  # the gradient of each current takes the place of its membrane
                h = buffers[t]
                torch.add(h, v_threshold, out=sig).mul_(-alpha).sigmoid_()
                is_last = t == time_steps - 1
                if not is_last:
                    torch.gt(h, -v_threshold, out=not_reset)
                torch.addcmul(sig, sig, sig, value=-1, out=h).mul_(grad[t, rows]).mul_(alpha / tau)
                if not is_last:  # through the membrane, unless a spike has reset it: dv[t+1]/dv[t] = 1 - 1/tau
                    h.addcmul_(not_reset, buffers[t + 1], value=1. - 1. / tau)
            for t in range(num_steps, time_steps):
                buffers[0].add_(buffers[t])
            for t in range(num_steps):
                if affine is not None:
                    grad_bias += buffers[t].sum(0)
                    normed = torch.addcmul(offset, x[t, rows], invstd, out=sig)
                    grad_weight += normed.mul_(buffers[t]).sum(0)
                grad_x[t, rows] = buffers[t]
        if affine is not None:
            scale, _ = affine
            flat_grad, flat_x = grad_x.flatten(0, 1), x.flatten(0, 1)
            along_x = constant = torch.zeros_like(scale)
            if from_batch:  # the gradient of x sums to 0 and does not correlate with x
                along_x = -scale * invstd * grad_weight / len(flat_x)
                constant = -scale * grad_bias / len(flat_x) - along_x * mean
            size = max(1, _CHUNK // len(scale))
            for g, chunk in zip(flat_grad.split(size), flat_x.split(size)):
                torch.addcmul(constant, g, scale, out=g)
                if from_batch:
                    g.addcmul_(chunk, along_x)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None, None


def norm_lif(x: Tensor, norm: Norm, tau: float = 2.0, v_threshold: float = 1.0, alpha: float = 4.0) -> Tensor:
    """`lif(bn(x))` in one pass: see `norm_of` and `lif`.

    Args:
        x: What BN is to normalise, `[T or 1, ..., C]` or, channels-last in memory, `[T or 1, B, C, H, W]`.
        norm: The BN.
        tau: Membrane time constant, in time steps, > 1.
        v_threshold: Firing threshold.
        alpha: Steepness of the surrogate gradient.

    Returns:
        Spikes, 0 or 1, `[T, ...]`, laid out as `x`.
    """
    rows = x.permute(0, 1, 3, 4, 2) if x.ndim == 5 else x  # [T or 1, ..., C]
    spikes = _LIFFunction.apply(rows.flatten(1, -2), *norm, tau, v_threshold, alpha)
    spikes = spikes.unflatten(1, rows.shape[1:-1])
    return spikes.permute(0, 1, 4, 2, 3) if x.ndim == 5 else spikes


def _lif_traceable(x: Tensor, tau: float, v_threshold: float, alpha: float, has_grad: bool = True) -> Tensor:
    """The same neuron as one differentiable expression, for compilers, exporters and scripting.

    Where nobody wants a gradient the surrogate is left out: in an exported graph it would be computed.
    """
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    v = torch.zeros_like(x[0], dtype=dtype)
    spikes = []
    for current in x.unbind(0):
        h = v + (current.to(dtype) - v) / tau
        fired = h >= v_threshold
        spike = fired.to(dtype)
        if has_grad:  # the value is the step, exactly (sig - sig is 0); the gradient is that of sig
            sig = torch.sigmoid(alpha * (h - v_threshold))
            spike = spike + (sig - sig.detach())
        spikes.append(spike)
        v = h * torch.logical_not(fired).to(dtype)
    return torch.stack(spikes).to(x.dtype)


@torch.jit.ignore
def _lif_cuda(
        x: Tensor,
        tau: float,
        v_threshold: float,
        alpha: float,
        v: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """The same neuron through spikingjelly, which picks its fused CUDA or Triton kernel, and its last membrane."""
    from spikingjelly.activation_based import functional, surrogate
    if v is None:
        v = torch.zeros(x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    spikes, v, _ = functional.lif_multi_step(
        x,
        v,
        tau=tau,
        decay_input=True,
        v_threshold=v_threshold,
        v_reset=0.,
        surrogate_function=surrogate.Sigmoid(alpha=alpha),
        detach_reset=True,
    )
    return spikes.to(x.dtype), v


@torch.jit.ignore
def _lif_eager(x: Tensor, tau: float, v_threshold: float, alpha: float) -> Tensor:
    if x.is_cuda:
        return _lif_cuda(x, tau, v_threshold, alpha)[0]
    order = [0] + sorted(range(1, x.ndim), key=lambda d: -x.stride(d))  # as it lies in memory
    rows = x.permute(order)
    spikes = _LIFFunction.apply(
        rows.reshape(len(x), -1, 1), None, None, None, None, False, len(x), tau, v_threshold, alpha)
    return spikes.view(rows.shape).permute([order.index(d) for d in range(x.ndim)])


@torch.fx.wrap  # a loop over time has no symbolic form, so every FX tracer keeps the call whole
def lif(x: Tensor, tau: float = 2.0, v_threshold: float = 1.0, alpha: float = 4.0) -> Tensor:
    """Leaky integrate-and-fire with decayed input, hard reset to 0 and a sigmoid surrogate gradient.

    With v[-1] = 0, for t = 0 .. T - 1::

        h[t] = v[t-1] + (x[t] - v[t-1]) / tau
        s[t] = 1 if h[t] >= v_threshold else 0          ds/dh := alpha * sig * (1 - sig)
        v[t] = h[t] * (1 - s[t])                        sig = sigmoid(alpha * (h - v_threshold))

    The reset is detached: no gradient flows from v[t] to s[t]. The membrane is float32 (float64 for float64 input)
    also under autocast and for half-precision input.

    The back end follows from where the tensor is: spikingjelly's fused kernels on CUDA; an autograd function with
    in-place arithmetic elsewhere; one plain expression under `torch.compile`, export, tracing and scripting. A graph
    made by FX calls this function, and so chooses when it runs. All back ends give identical spikes.

    Args:
        x: Input current, `[T, ...]`, floating point. It may be expanded over time; its memory format is kept.
        tau: Membrane time constant, in time steps, > 1.
        v_threshold: Firing threshold.
        alpha: Steepness of the surrogate gradient.

    Returns:
        Spikes, 0 or 1, of the shape and dtype of `x`.
    """
    if torch.jit.is_scripting():
        return _lif_traceable(x, tau, v_threshold, alpha, torch.is_grad_enabled() and x.requires_grad)
    if torch.jit.is_tracing():  # without gradients too, for use with them
        return _lif_traceable(x, tau, v_threshold, alpha)
    if torch.compiler.is_compiling():
        return _lif_traceable(x, tau, v_threshold, alpha, torch.is_grad_enabled() and x.requires_grad)
    return _lif_eager(x, tau, v_threshold, alpha)


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons `[T, ...] -> [T, ...]`, without parameters, buffers or state: see `lif`."""

    def __init__(self, tau: float = 2.0, v_threshold: float = 1.0, alpha: float = 4.0):
        super().__init__()
        if not tau > 1.:
            raise ValueError(f'tau must be greater than 1 time step, got {tau}.')
        self.tau = float(tau)
        self.v_threshold = float(v_threshold)
        self.alpha = float(alpha)

    def forward(self, x: Tensor, norm: Optional[Norm] = None) -> Tensor:
        if not torch.jit.is_scripting():
            if isinstance(norm, Norm):  # and not the placeholder of a symbolic trace
                return norm_lif(x, norm, self.tau, self.v_threshold, self.alpha)
        return lif(x, self.tau, self.v_threshold, self.alpha)

    def extra_repr(self) -> str:
        return f'tau={self.tau}, v_threshold={self.v_threshold}, alpha={self.alpha}'


class Membranes:
    """Membranes that neurons carry from one call to the next: see `carry_membranes`."""

    def __init__(self) -> None:
        # [B, rows of a sample, C]: charged and negated, but on CUDA after the reset
        self._membranes: Dict[LIF, Tensor] = {}

    def keep(self, samples: Tensor) -> None:
        """Drop all samples of the batch but some, given as indices."""
        self._membranes = {neuron: v[samples] for neuron, v in self._membranes.items()}

    def _forward(self, neuron: LIF, x: Tensor, norm: Optional[Norm] = None) -> Tensor:
        rows = x.permute(0, 1, 3, 4, 2) if x.ndim == 5 else x  # [T or 1, B, ..., C]
        shape = rows.shape[1:]
        rows = rows.flatten(2, -2)
        last = self._membranes.get(neuron)
        if last is not None and last.shape != rows.shape[1:]:
            raise ValueError(f'Expected inputs of one shape, got {list(rows.shape[1:])} after {list(last.shape)}.')
        if x.is_cuda:
            spikes, membrane = _lif_cuda(rows, neuron.tau, neuron.v_threshold, neuron.alpha, last)
        else:
            affine = None if norm is None else _affine(*norm[:4])
            time_steps = len(x) if norm is None else norm.time_steps
            membrane = rows.new_empty(rows.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
            spikes = _fire(
                rows.flatten(1, 2), affine, time_steps, neuron.tau, neuron.v_threshold,
                None if last is None else last.flatten(0, 1), membrane.flatten(0, 1))
        self._membranes[neuron] = membrane
        spikes = spikes.reshape(-1, *shape)
        return spikes.permute(0, 1, 4, 2, 3) if x.ndim == 5 else spikes


@contextlib.contextmanager
def carry_membranes(model: nn.Module) -> Iterator[Membranes]:
    """Within it the neurons of a model go on where the call before has left them: a sequence, part by part.

    The spikes are those of the whole sequence, to the bit. Without gradients. What is carried is in the `Membranes`
    that it gives, and nothing in the modules: it ends with the `with` block.
    """
    membranes = Membranes()
    neurons = [m for m in model.modules() if isinstance(m, LIF)]
    with torch.no_grad():
        try:
            for neuron in neurons:
                neuron.forward = functools.partial(membranes._forward, neuron)
            yield membranes
        finally:
            for neuron in neurons:
                vars(neuron).pop('forward', None)
