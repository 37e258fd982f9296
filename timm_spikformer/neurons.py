"""Leaky integrate-and-fire (LIF) neuron: function, surrogate gradient, module, and stateful inference.

The neuron is a pure function of a whole sequence. Its membrane potential is a local variable, so modules have no state:
nothing needs to be reset between batches, and deepcopy, EMA, gradient checkpointing, DDP, TorchScript, FX,
`torch.compile` and `torch.export` are supported.

Source: the LIF node of the authors' Spikformer V1 code (spikingjelly's, with `detach_reset=True`). V2 is assumed to use
the same neuron.
"""
import contextlib
import math
from contextvars import ContextVar
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.fx
from torch import Tensor, nn

from .arguments import check_integer, check_number
from .kernels.eager import force_eager
from .kernels.lif import LIFConstants, lif_cpu, lif_cuda, supports_lif_cuda
from .kernels.rules import back_end, context_fallback_reason, record_original_methods, runs_in_kernel

__all__ = [
    'LIF',
    'StatefulInference',
    'get_stateful_inference',
    'lif',
    'lif_plain',
    'membrane_potentials',
    'record_membrane_potentials',
]


def _check_currents(x: Tensor) -> None:
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f'Expected currents [T, ...] of at least one time step, got shape {x.shape}.')


def _check_constants(tau: Any, v_threshold: Any, alpha: Any = 4.) -> None:
    """Check the constants of a neuron. Tensors are not checked, because reading a value from a GPU synchronizes.

    Raises:
        ValueError: A constant is not a number, or is out of its range.
    """
    # an infinite tau or v_threshold is a neuron that never charges or never fires; an infinite alpha would give NaN
    for name, value, above, maximum in (
            ('tau', tau, 1, math.inf), ('v_threshold', v_threshold, 0, math.inf), ('alpha', alpha, 0, None)):
        if not isinstance(value, Tensor):
            check_number(name, value, above=above, maximum=maximum)


def lif_plain(
        x: Tensor,
        tau: float = 2.0,
        v_threshold: float = 1.0,
        alpha: float = 4.0,
        has_grad: bool = True,
) -> Tensor:
    """Reference implementation of `lif` in differentiable PyTorch operations, used by compilers and exporters.

    Args:
        x: See `lif`.
        tau: See `lif`.
        v_threshold: See `lif`.
        alpha: See `lif`.
        has_grad: Whether to include the surrogate. False keeps it out of exported inference graphs.

    Raises:
        ValueError: A constant is out of its range.
    """
    if not torch.jit.is_scripting():
        _check_constants(tau, v_threshold, alpha)
    spikes, v = _lif_steps(x, None, tau, v_threshold, alpha, has_grad)
    return spikes


def _lif_steps(
        x: Tensor,
        v: Optional[Tensor],
        tau: float,
        v_threshold: float,
        alpha: float,
        has_grad: bool,
) -> Tuple[Tensor, Tensor]:
    """Return the spikes and the final membrane potential, given the currents and the initial membrane potential."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    spikes = []
    for current in x.unbind(0):
        current = current.to(dtype)
        if v is None:  # not a tensor of zeros: a tracer would record its size as a constant
            h = current / tau
        else:
            h = v + (current - v) / tau
        fired = h >= v_threshold
        spike = fired.to(dtype)
        if has_grad:  # the value is unchanged, because sig - sig is exactly 0; the gradient is that of sig
            sig = torch.sigmoid(alpha * (h - v_threshold))
            spike = spike + (sig - sig.detach())
        spikes.append(spike)
        v = h * torch.logical_not(fired).to(dtype)
    assert v is not None
    # v - v is 0, or NaN where a current was NaN or infinite
    return (torch.stack(spikes) + (v - v).detach()).to(x.dtype), v


def _run_kernel(
        x: Tensor,
        constants: LIFConstants,
        membrane: Optional[Tensor] = None,
) -> Optional[Tuple[Tensor, Optional[Tensor]]]:
    """Return the spikes and the final membrane potentials from a kernel; None if no kernel supports the input.

    Args:
        x: Currents, `[T, ...]`.
        constants: Constants of the neuron.
        membrane: Initial membrane potentials: see `lif_cpu`.
    """
    is_supported = type(x) is Tensor and x.is_floating_point() and x.numel() > 0
    if not is_supported or not constants.are_numbers:
        return None
    if not runs_in_kernel(context_fallback_reason):
        return None
    if supports_lif_cuda(x, constants):
        return lif_cuda(x, constants, membrane)
    if back_end(x) == 'cpu':
        return lif_cpu(x, constants, lif_plain, membrane)
    return None


@torch.jit.ignore
def _lif_eager(x: Tensor, tau: float, v_threshold: float, alpha: float) -> Tensor:
    result = _run_kernel(x, LIFConstants(tau, v_threshold, alpha))
    return lif_plain(x, tau, v_threshold, alpha) if result is None else result[0]


@torch.fx.wrap  # a leaf for FX, which cannot trace the loop over time
def lif(x: Tensor, tau: float = 2.0, v_threshold: float = 1.0, alpha: float = 4.0) -> Tensor:
    """Leaky integrate-and-fire with decayed input, hard reset to 0 and a sigmoid surrogate gradient.

    With v[-1] = 0, for t = 0 .. T - 1::

        h[t] = v[t-1] + (x[t] - v[t-1]) / tau
        s[t] = 1 if h[t] >= v_threshold else 0          ds/dh := alpha * sig * (1 - sig)
        v[t] = h[t] * (1 - s[t])                        sig = sigmoid(alpha * (h - v_threshold))

    The reset is detached: no gradient flows from v[t] to s[t]. The membrane potential is float32 (float64 for float64
    input), also under autocast and for half-precision input. If any current of a neuron is NaN or infinite, its output
    is NaN at all time steps.

    The back end depends on the device: on CPU, an autograd function with in-place arithmetic; on CUDA, for float32,
    float16 and bfloat16, spikingjelly's fused kernels. `lif_plain` is used otherwise, and under `torch.compile`,
    export, tracing, scripting, `torch.func` transforms and `use_kernels('plain')`. An FX graph contains a call of this
    function, so the back end is selected at run time. All back ends give identical spikes, except that on CUDA
    `lif_plain` rounds differently if `tau` is not a power of 2.

    Source: the LIF node of the authors' V1 code. The handling of NaN and infinity is specific to this project.

    Args:
        x: Input current, `[T, ...]`, floating point. It may be expanded over time; its memory format is preserved.
        tau: Membrane time constant, in time steps, > 1.
        v_threshold: Firing threshold, > 0.
        alpha: Steepness of the surrogate gradient, > 0.

    Returns:
        Spikes, 0 or 1, of the shape and dtype of `x`; NaN for neurons with a non-finite current.

    Raises:
        ValueError: `x` has no time dimension or zero time steps, or a constant is out of its range. Constants that are
            tensors are not checked.

    >>> lif(torch.tensor([[2.0, 1.0], [2.0, 1.5]]))
    tensor([[1., 0.],
            [1., 1.]])
    """
    if not torch.jit.is_scripting():
        _check_constants(tau, v_threshold, alpha)
    if not torch.jit.is_tracing():
        _check_currents(x)
    has_grad = torch.is_grad_enabled() and x.requires_grad
    if torch.jit.is_scripting():
        return lif_plain(x, tau, v_threshold, alpha, has_grad)
    is_tracing = torch.jit.is_tracing()
    if is_tracing or torch.compiler.is_compiling():
        # a graph that is traced under no_grad can be trained, too
        return lif_plain(x, tau, v_threshold, alpha, has_grad or is_tracing)
    return _lif_eager(x, tau, v_threshold, alpha)


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons `[T, ...] -> [T, ...]`, without parameters, buffers or state: see `lif`.

    Args:
        tau: Membrane time constant, in time steps, > 1.
        v_threshold: Firing threshold, > 0.
        alpha: Steepness of the surrogate gradient, > 0.

    Raises:
        ValueError: A constant is out of its range.

    >>> LIF(v_threshold=0.5)(torch.ones(2, 1, 1)).flatten()
    tensor([1., 1.])
    """

    def __init__(self, tau: float = 2.0, v_threshold: float = 1.0, alpha: float = 4.0):
        super().__init__()
        tau, v_threshold, alpha = (c.item() if isinstance(c, Tensor) else c for c in (tau, v_threshold, alpha))
        _check_constants(tau, v_threshold, alpha)
        self.tau = float(tau)
        self.v_threshold = float(v_threshold)
        self.alpha = float(alpha)

    @torch.jit.unused
    @property
    def constants(self) -> LIFConstants:
        return LIFConstants(self.tau, self.v_threshold, self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            stateful = get_stateful_inference()
            if stateful is not None:
                return stateful.run_neuron(self, x)
        return lif(x, self.tau, self.v_threshold, self.alpha)

    def extra_repr(self) -> str:
        return f'tau={self.tau}, v_threshold={self.v_threshold}, alpha={self.alpha}'


record_original_methods(LIF)


@torch.no_grad()
def membrane_potentials(x: Tensor, tau: float = 2.0, v_threshold: float = 1.0) -> Tuple[Tensor, Tensor]:
    """Return the membrane potentials of `lif` before and after the reset, h and v in its equation.

    Args:
        x: Input current, `[T, ...]`.
        tau: Membrane time constant, in time steps, > 1.
        v_threshold: Firing threshold, > 0.

    Returns:
        h and v, `[T, ...]`, float32 (float64 for float64 input). spikingjelly's neurons store v as `v_seq`.

    Raises:
        ValueError: `x` has no time dimension or zero time steps, or a constant is out of its range.

    >>> h, v = membrane_potentials(torch.tensor([[1.5], [1.5]]))
    >>> h.flatten().tolist(), v.flatten().tolist()
    ([0.75, 1.125], [0.75, 0.0])
    """
    _check_constants(tau, v_threshold)
    _check_currents(x)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    v = torch.zeros_like(x[0])
    before_reset, after_reset = [], []
    for current in x:
        h = v + (current - v) / tau
        v = h * (h < v_threshold)
        before_reset.append(h)
        after_reset.append(v)
    return torch.stack(before_reset), torch.stack(after_reset)


@contextlib.contextmanager
def record_membrane_potentials(
        model: nn.Module,
        layers: Optional[Sequence[str]] = None,
        before_reset: bool = False,
) -> Iterator[Dict[str, List[Tensor]]]:
    """Record the membrane potentials of neuron layers in every forward pass within a `with` block.

    Forward hooks recompute them from the currents. The recorded layers are not fused with their BN, and compiled models
    run in eager mode.

    Args:
        model: Any module that contains `LIF` layers.
        layers: Names of `LIF` layers, as in `model.named_modules()`; by default all.
        before_reset: Record h, the potential before the reset, instead of v; see `lif`.

    Yields:
        A dict with a list for each layer, which gets one detached tensor `[T, B, ...]` per call of the layer, float32
        (float64 for float64 input).

    Raises:
        ValueError: The model has no neuron layer with a given name, or a `StatefulInference` runs the model.

    >>> import timm
    >>> model = timm.create_model('test_spikformer_v2')
    >>> with record_membrane_potentials(model, ['blocks.0.attn.attn_lif']) as membranes:
    ...     logits = model(torch.rand(2, 3, 64, 64))
    >>> membranes['blocks.0.attn.attn_lif'][0].shape
    torch.Size([4, 2, 16, 64])
    """
    neurons = {name: m for name, m in model.named_modules() if isinstance(m, LIF)}
    layers = neurons if layers is None else [layers] if isinstance(layers, str) else layers
    layers = list(dict.fromkeys(layers))
    for name in layers:
        if name not in neurons:
            raise ValueError(f'The model has no neuron layer {name!r}. It has {", ".join(neurons) or "none"}.')
    records: Dict[str, List[Tensor]] = {name: [] for name in layers}

    def record(name: str, neuron: LIF, x: Tensor) -> None:
        if get_stateful_inference() is not None:
            raise ValueError('record_membrane_potentials does not support StatefulInference and predict_anytime.')
        h, v = membrane_potentials(x, neuron.tau, neuron.v_threshold)
        records[name].append(h if before_reset else v)

    with contextlib.ExitStack() as stack:
        stack.enter_context(force_eager())
        for name in layers:
            hook = lambda m, args, out, name=name: record(name, m, args[0])  # noqa: E731
            stack.callback(neurons[name].register_forward_hook(hook).remove)
        yield records


_OTHER_LAYERS = (
    'Expected each call to run the same layers in the same order as the first call. Create a new StatefulInference '
    'after changing the model.')
_stateful_inference: ContextVar[Optional['StatefulInference']] = ContextVar('stateful', default=None)


def get_stateful_inference() -> Optional['StatefulInference']:
    """Return the active `StatefulInference`; None if there is none, or if a call is being compiled."""
    return None if torch.compiler.is_compiling() else _stateful_inference.get()


class StatefulInference:
    """Run a model on one part of a sequence per call, carrying membrane potentials across the calls.

    This object, not the model, holds the state, keyed by the order of neuron calls. A layer that is called several
    times has a separate state per call, and other threads can use the model at the same time. Each output equals that
    of the whole sequence so far, because features are averaged over all steps so far. Gradients are not recorded.
    Compiled models run in eager mode, because a compiled graph cannot carry the state.

    Args:
        model: A module in eval mode that contains a Spikformer. Layers around it must not depend on the time step.
        time_steps: Number of time steps per call for images `[B, C, H, W]`; ignored for sequences.

    Raises:
        ValueError: The model contains a module that does not support this, a call has a different batch shape, or
            `time_steps` is not an integer of at least 1.

    >>> import timm
    >>> model = timm.create_model('test_spikformer_v2').eval()
    >>> events = torch.rand(1, 4, 3, 32, 32)
    >>> stateful = StatefulInference(model)
    >>> logits = [stateful(part) for part in events.split(2, dim=1)]
    >>> torch.allclose(logits[-1], model(events))
    True
    """

    def __init__(self, model: nn.Module, time_steps: int = 1):
        self.model = model
        self.time_steps = check_integer('time_steps', time_steps, 1)
        _check_supports_stateful(model)
        # ('membrane', v) or ('mean', total, count), in the order of the calls; new ones replace them after the run
        self._states: List[Tuple[Any, ...]] = []
        self._new_states: List[Tuple[Any, ...]] = []
        self._input_steps: Optional[int] = None  # T of the sequence passed in, None for images

    def __call__(self, x: Tensor, **kwargs: Any) -> Any:
        """Run the model on the next part, and return its output for the whole sequence so far.

        If the run fails, the state remains that of the previous call.

        Args:
            x: Images `[B, C, H, W]`, or the next t time steps of sequences `[B, t, C, H, W]`.
            kwargs: Further arguments of the model.

        Raises:
            ValueError: The batch shape or the layers that run differ from the first call, or the model does not support
                this.
        """
        self._new_states = []
        self._input_steps = x.shape[1] if x.ndim == 5 else None
        token = _stateful_inference.set(self)
        try:
            with torch.no_grad(), force_eager():
                output = self.model(x, **kwargs)
        finally:
            _stateful_inference.reset(token)
        if not self._new_states:
            raise ValueError(
                f'The model ({type(self.model).__name__}) has not called any LIF neurons, so it has no state to carry.')
        if self._states and len(self._new_states) != len(self._states):
            raise ValueError(_OTHER_LAYERS)
        self._states = self._new_states
        return output

    def select_samples(self, samples: Tensor) -> None:
        """Keep only the state of the samples with the given indices `[b]`."""
        self._states = [(kind, *(t[samples] if torch.is_tensor(t) else t for t in state))
                        for kind, *state in self._states]

    @contextlib.contextmanager
    def _next_state(self, kind: str) -> Iterator[List[Any]]:
        """Yield the state of the current neuron or mean as a mutable list, empty at the first call."""
        i = len(self._new_states)
        if self._states and (i >= len(self._states) or self._states[i][0] != kind):
            raise ValueError(_OTHER_LAYERS)
        state = list(self._states[i][1:]) if self._states else []
        yield state
        self._new_states.append((kind, *state))

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError if the number of time steps differs between the inputs of `__call__` and the network."""
        num_steps = x.shape[1] if x.ndim == 5 else None
        if num_steps != self._input_steps:
            raise ValueError(
                f'The model does not support StatefulInference: a module around the network changes the number of time '
                f'steps of its input, from {self._input_steps or "an image"} to {num_steps or "an image"}.')

    def run_neuron(
            self,
            neuron: LIF,
            x: Tensor,
            kernel: Optional[Callable[[Tensor], Tuple[Tensor, Tensor]]] = None,
    ) -> Tensor:
        """Return the spikes of a neuron for the next currents, and update its membrane potentials.

        Args:
            neuron: The neuron.
            x: Currents `[T, B, ...]`; with `kernel`, one time step of the kernel's input, `[B, ...]`.
            kernel: Kernel to use: a function from initial membrane potentials to spikes and final membrane potentials.
        """
        shape = x.shape if kernel is not None else x.shape[1:]
        with self._next_state('membrane') as state:
            if not state:
                dtype = torch.promote_types(x.dtype, torch.float32)
                state.append(torch.zeros_like(x if kernel is not None else x[0], dtype=dtype))
            if state[0].shape != shape:
                raise ValueError(
                    f'Expected inputs of the same shape in all calls, got {list(shape)} after {list(state[0].shape)}. '
                    f'Create a new StatefulInference for another batch.')
            if kernel is not None:
                spikes, state[0] = kernel(state[0])
            else:
                result = _run_kernel(x, neuron.constants, state[0])
                if result is None:
                    result = _lif_steps(x, state[0], *neuron.constants, has_grad=False)
                spikes, state[0] = result
        return spikes

    def mean_over_time(self, x: Tensor) -> Tensor:
        """Add features `[T, B, ...]` and return the running mean over all time steps so far, `[B, ...]`."""
        with self._next_state('mean') as state:
            # half precision would round small additions to a large sum away
            total = x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
            count = len(x)
            if state:
                total, count = state[0] + total, state[1] + count
            state[:] = total, count
        return (total / count).to(x.dtype)


def _check_supports_stateful(model: nn.Module) -> None:
    """Raise a ValueError that names the modules that do not support `StatefulInference`."""
    problems = []
    for name, m in model.named_modules():
        what = f'{name or "the model"} ({type(m).__name__})'
        if isinstance(m, torch.jit.ScriptModule):
            problems.append(f'{what} is scripted: pass the original module')
        elif isinstance(m, nn.DataParallel):
            problems.append(f'{what} calls the model in other threads: pass its module')
        elif isinstance(m, LIF) and (type(m).forward is not LIF.forward or 'forward' in vars(m)):
            problems.append(f'the forward of {what} has been replaced')
        elif hasattr(m, 'step_mode') or isinstance(m, nn.RNNBase):  # spikingjelly neurons and recurrent layers
            problems.append(f'{what} is stateful: it keeps its own state over time')
        elif isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None:
            problems.append(f'{what} normalizes with the statistics of the batch, over all time steps')
        elif type(m).__module__.startswith('torch.ao.nn.quantized.dynamic'):
            problems.append(f'{what} is quantized dynamically, by a scale over all time steps')
        elif m.training:
            problems.append(f'{what} is in train mode: call eval() first')
    if problems:
        more = f', and {len(problems) - 3} more' if len(problems) > 3 else ''
        raise ValueError(f'The model does not support StatefulInference: {"; ".join(problems[:3])}{more}.')
