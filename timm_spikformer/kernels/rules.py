"""Conditions under which a kernel may replace a group of modules.

A kernel bypasses `Module.__call__` and reads parameters directly. It is used only if every module is of a class that
the kernel implements (not a subclass), with supported arguments and without hooks, parametrizations or replaced
methods, and if no tracer, compiler, transform or dispatch mode is active.
"""
import contextlib
from contextvars import ContextVar
from typing import Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

from .switch import get_kernels

__all__ = [
    'BACK_ENDS',
    'KernelDecisions',
    'back_end',
    'context_fallback_reason',
    'fallback_reason',
    'in_transform',
    'is_batched',
    'module_fallback_reason',
    'record_original_methods',
    'runs_in_kernel',
]

# Device type -> kernel back end. On other device types the modules are called. spikingjelly's kernels support CUDA but
# not ROCm, whose device type in PyTorch is also 'cuda'.
BACK_ENDS = {'cpu': 'cpu'} if torch.version.hip else {'cpu': 'cpu', 'cuda': 'cuda'}

_METHODS = ('forward', '_conv_forward', '_check_input_dim')
# names that are in an instance's __dict__ only if user code has set them
_INSTANCE_OVERRIDES = frozenset((
    *_METHODS, '_call_impl', '_wrapped_call_impl', '_compiled_call_impl',
    'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'))
_ORIGINAL_CALL = nn.Module.__call__
_GLOBAL_HOOKS = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)
_original_methods: Dict[type, Tuple[Tuple[str, Callable], ...]] = {}


def record_original_methods(cls: type) -> type:
    """Record the methods of a class that a kernel implements, so that later replacements are detected."""
    _original_methods[cls] = tuple((name, getattr(cls, name)) for name in _METHODS if hasattr(cls, name))
    return cls


for _cls in (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d, nn.Identity):
    record_original_methods(_cls)


def back_end(x: Tensor) -> str:
    """Return the kernel back end for a tensor: `'cpu'`, `'cuda'`, or `''` for none."""
    return BACK_ENDS.get(x.device.type, '')


class KernelDecisions:
    """The kernel decisions of one forward pass, which gradient checkpointing repeats when it recomputes the pass."""

    def __init__(self) -> None:
        self._decisions: List[bool] = []
        self._position: Optional[int] = None  # index of the next decision to repeat; None while recording

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the decisions within a `with` block."""
        token = _decisions.set(self)
        try:
            yield
        finally:
            _decisions.reset(token)

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Repeat the recorded decisions within a `with` block."""
        self._position = 0
        with self.record():
            yield

    def decide(self, reason: Callable[[], Optional[str]]) -> bool:
        """See `runs_in_kernel`."""
        if self._position is None or self._position >= len(self._decisions):
            decision = reason() is None
            if self._position is None:
                self._decisions.append(decision)
            return decision
        self._position += 1
        return self._decisions[self._position - 1]


_decisions: ContextVar[Optional[KernelDecisions]] = ContextVar('decisions', default=None)


def runs_in_kernel(reason: Callable[[], Optional[str]]) -> bool:
    """Return whether a kernel runs. A recomputation by gradient checkpointing repeats the recorded decision.

    Args:
        reason: Function that returns why the kernel may not run, or None if it may.
    """
    decisions = _decisions.get()
    return reason() is None if decisions is None else decisions.decide(reason)


def in_transform() -> bool:
    """Return whether a `torch.func` transform, such as `vmap` or `grad`, is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(x: Tensor) -> bool:
    """Return whether `x` is a batched tensor of `vmap` or of a vectorized backward."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def context_fallback_reason() -> Optional[str]:
    """Return why no kernel may run in this call, regardless of the modules, or None if kernels may run.

    A TorchDispatchMode whose result does not depend on which operators run can allow kernels by setting the attribute
    `allows_kernels = True`.
    """
    if get_kernels() == 'plain':
        return 'kernels are switched off'
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return 'the call is traced or compiled'
    if in_transform() or forward_ad._current_level >= 0:
        return 'a torch.func transform or forward-mode AD is active'
    for i in range(torch._C._len_torch_dispatch_stack()):
        if not getattr(torch._C._get_dispatch_stack_at(i), 'allows_kernels', False):
            return 'a TorchDispatchMode is active'
    for i in range(torch._C._len_torch_function_stack()):
        if not isinstance(torch._C._get_function_stack_at(i), DeviceContext):
            return 'a TorchFunctionMode is active'
    if any(_GLOBAL_HOOKS):
        return 'global module hooks are registered'
    if nn.Module.__call__ is not _ORIGINAL_CALL:
        return 'nn.Module.__call__ has been replaced'
    return None


def _arguments_fallback_reason(m: nn.Module) -> Optional[str]:
    if isinstance(m, nn.Conv2d):
        if m.padding_mode != 'zeros' or isinstance(m.padding, str):
            return f'padding={m.padding!r} and padding_mode={m.padding_mode!r} are not supported'
    elif isinstance(m, nn.modules.batchnorm._BatchNorm):
        parameters, buffers = m._parameters, m._buffers
        if parameters['weight'] is None or parameters['bias'] is None:
            return 'its weight or bias is None'
        if not m.track_running_stats or buffers['running_mean'] is None or buffers['running_var'] is None:
            return 'it has no running statistics'
        if buffers['num_batches_tracked'] is None:
            return 'its num_batches_tracked is None'
    return None


def module_fallback_reason(m: nn.Module, classes: Tuple[type, ...]) -> Optional[str]:
    """Return why a module must be called rather than its parameters read directly, or None if reading them is safe.

    Args:
        m: The module.
        classes: Supported classes. Subclasses are not supported.
    """
    cls, attributes = type(m), m.__dict__
    if cls not in classes:
        return f'the module is a {cls.__name__}, expected exactly {" or ".join(c.__name__ for c in classes)}'
    if (attributes['_forward_hooks'] or attributes['_forward_pre_hooks']
            or attributes['_backward_hooks'] or attributes['_backward_pre_hooks']):
        return f'{cls.__name__} has hooks'
    if not _INSTANCE_OVERRIDES.isdisjoint(attributes):
        return f'a method, parameter or buffer of the {cls.__name__} has been replaced'
    for name, original in _original_methods.get(cls, ()):
        if getattr(cls, name) is not original:
            return f'{cls.__name__}.{name} has been replaced'
    for tensors in (attributes['_parameters'], attributes['_buffers']):
        for tensor in tensors.values():
            if tensor is not None and type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
                return f'a parameter or buffer of the {cls.__name__} is a {type(tensor).__name__}'
    reason = _arguments_fallback_reason(m)
    return reason and f'{cls.__name__}: {reason}'


def _input_fallback_reason(members: Sequence[nn.Module], x: Tensor) -> Optional[str]:
    if type(x) is not Tensor:
        return f'the input is a {type(x).__name__}'
    device = x.device.type
    if torch._C._is_autocast_available(device) and torch.is_autocast_enabled(device):
        return 'autocast is enabled'
    if x.numel() == 0:
        return 'the input is empty'
    for m in members:
        weight = m._parameters.get('weight')
        if weight is not None and (weight.dtype != x.dtype or weight.device != x.device):
            return (f'the input is {x.dtype} on {x.device}, but {type(m).__name__}.weight is {weight.dtype} on '
                    f'{weight.device}')
    return None


def fallback_reason(
        members: Sequence[nn.Module],
        classes: Sequence[Tuple[type, ...]],
        x: Optional[Tensor] = None,
) -> Optional[str]:
    """Return a message saying why a kernel cannot replace a group of modules, or None if it can.

    Args:
        members: The modules of the group, in the order in which they are called; no other module is called in between.
        classes: For each module, the classes that the kernel implements.
        x: Input of the first module. If None, the input and its device are not checked.
    """
    reason = context_fallback_reason()
    if reason is not None:
        return reason
    for m, expected in zip(members, classes):
        reason = module_fallback_reason(m, expected)
        if reason is not None:
            return reason
    return None if x is None else _input_fallback_reason(members, x)
