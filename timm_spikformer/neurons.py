"""Leaky integrate-and-fire neuron: the function, its gradient, the module.

The only file that knows about recurrence in time and about back ends. The neuron is a pure function of a whole
sequence: its membrane is a local variable, so nothing has to be reset between batches, and deepcopy, EMA, gradient
checkpointing, DDP, TorchScript, FX, `torch.compile` and `torch.export` need no special case.

Source: the LIF node of the authors' Spikformer V1 code (spikingjelly's, with `detach_reset=True`), which V2 is
taken to share.
"""
from typing import Any, Tuple

import torch
import torch.fx
from torch import Tensor, nn

__all__ = ['LIF', 'lif']


class _LIFFunction(torch.autograd.Function):
    """The neuron with a hand-written gradient, in place where it can be; saves one tensor, the charged membrane.

    Comparisons write 0 and 1 straight into floating point buffers: on a CPU, boolean masks are several times slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tau: float, v_threshold: float, alpha: float) -> Tensor:
        ctx.dtype, ctx.tau, ctx.v_threshold, ctx.alpha = x.dtype, tau, v_threshold, alpha
        dtype = torch.promote_types(x.dtype, torch.float32)
        # empty_like keeps the layout of a dense input, and the layout of one step for an input expanded over time
        spikes = torch.empty_like(x)
        h = torch.empty_like(x[0], dtype=dtype)
        v = torch.zeros_like(h)
        charged = torch.empty_like(x, dtype=dtype) if ctx.needs_input_grad[0] else None
        for t, current in enumerate(x.unbind(0)):
            if charged is not None:
                h = charged[t]
            torch.sub(current, v, out=h).div_(tau).add_(v)
            torch.ge(h, v_threshold, out=spikes[t])
            torch.lt(h, v_threshold, out=v).mul_(h)
        if charged is not None:
            ctx.save_for_backward(charged)
        return spikes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None, None]:
        (charged,) = ctx.saved_tensors
        grad_x = torch.empty_like(charged)
        sig = torch.empty_like(charged[0])
        last = charged.shape[0] - 1
        for t in range(last, -1, -1):
            h, grad_t = charged[t], grad_x[t]
            torch.sub(h, ctx.v_threshold, out=sig).mul_(ctx.alpha).sigmoid_()
            torch.addcmul(sig, sig, sig, value=-1, out=grad_t).mul_(grad[t]).mul_(ctx.alpha / ctx.tau)
            if t < last:  # through the membrane, unless a spike has reset it: dv[t+1]/dv[t] = 1 - 1/tau
                not_reset = torch.lt(h, ctx.v_threshold, out=sig)
                grad_t.addcmul_(not_reset, grad_x[t + 1], value=1. - 1. / ctx.tau)
        return grad_x.to(ctx.dtype), None, None, None


def _lif_traceable(x: Tensor, tau: float, v_threshold: float, alpha: float) -> Tensor:
    """The same neuron as one differentiable expression, for compilers, exporters and scripting."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    v = torch.zeros_like(x[0], dtype=dtype)
    spikes = []
    for current in x.unbind(0):
        h = v + (current.to(dtype) - v) / tau
        fired = h >= v_threshold
        sig = torch.sigmoid(alpha * (h - v_threshold))
        # the value is the step, exactly (sig - sig is 0); the gradient is that of sig
        spikes.append(fired.to(dtype) + (sig - sig.detach()))
        v = h * torch.logical_not(fired).to(dtype)
    return torch.stack(spikes).to(x.dtype)


@torch.jit.ignore
def _lif_cuda(x: Tensor, tau: float, v_threshold: float, alpha: float) -> Tensor:
    """The same neuron through spikingjelly, which picks its fused CUDA or Triton kernel."""
    from spikingjelly.activation_based import functional, surrogate
    spikes, _, _ = functional.lif_multi_step(
        x,
        torch.zeros(x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device),
        tau=tau,
        decay_input=True,
        v_threshold=v_threshold,
        v_reset=0.,
        surrogate_function=surrogate.Sigmoid(alpha=alpha),
        detach_reset=True,
    )
    return spikes.to(x.dtype)


@torch.jit.ignore
def _lif_eager(x: Tensor, tau: float, v_threshold: float, alpha: float) -> Tensor:
    if x.is_cuda:
        return _lif_cuda(x, tau, v_threshold, alpha)
    return _LIFFunction.apply(x, tau, v_threshold, alpha)


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
        return _lif_traceable(x, tau, v_threshold, alpha)
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return _lif_traceable(x, tau, v_threshold, alpha)
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

    def forward(self, x: Tensor) -> Tensor:
        return lif(x, self.tau, self.v_threshold, self.alpha)

    def extra_repr(self) -> str:
        return f'tau={self.tau}, v_threshold={self.v_threshold}, alpha={self.alpha}'
