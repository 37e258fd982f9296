"""The decision whether a kernel may stand in for a group of modules.

A kernel bypasses `Module.__call__` and reads parameters itself. It may do so only where nobody can tell the difference:
every module of the group is exactly of a class that the kernel implements, with arguments that it implements, without
hooks, parametrizations or replaced methods, and no tracer, compiler, transform or dispatch mode observes the call.
"""
from typing import Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext

from .switch import get_kernels

__all__ = [
    'BACK_ENDS',
    'back_end',
    'in_transform',
    'is_batched',
    'register_class',
    'why_not',
    'why_not_here',
    'why_not_module',
]

# The kernels that tensors of a type of device take; those of another type take the modules. spikingjelly's are for
# CUDA alone, not for ROCm, which PyTorch calls 'cuda' too.
BACK_ENDS = {'cpu': 'cpu'} if torch.version.hip else {'cpu': 'cpu', 'cuda': 'cuda'}

_METHODS = ('forward', '_conv_forward', '_check_input_dim')
# what stands in the __dict__ of an instance only if somebody has put it there
_REPLACED = frozenset((
    *_METHODS, '_call_impl', '_wrapped_call_impl', '_compiled_call_impl',
    'weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'))
_CALL = nn.Module.__call__
_GLOBAL_HOOKS = (
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
)
_originals: Dict[type, Tuple[Tuple[str, Callable], ...]] = {}


def register_class(cls: type) -> type:
    """Record the methods of a class that a kernel implements, to notice later if they have been replaced."""
    _originals[cls] = tuple((name, getattr(cls, name)) for name in _METHODS if hasattr(cls, name))
    return cls


for _cls in (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool2d, nn.Identity):
    register_class(_cls)


def back_end(x: Tensor) -> str:
    """Return whose kernels a tensor takes: `'cpu'`, `'cuda'`, or `''` for none."""
    return BACK_ENDS.get(x.device.type, '')


def in_transform() -> bool:
    """Return whether a `torch.func` transform, such as `vmap` or `grad`, is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_batched(x: Tensor) -> bool:
    """Return whether `x` stands for a batch of tensors under `vmap`, or under a vectorized backward."""
    return torch._C._functorch.is_batchedtensor(x) or torch._C._functorch.is_legacy_batchedtensor(x)


def why_not_here() -> Optional[str]:
    """Return why no kernel may run in this call, whatever the modules; None if one may.

    A TorchDispatchMode that does not depend on the operators by which a result is computed may allow kernels by an
    attribute `allows_kernels = True`.
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
        return 'hooks are registered for all modules of the process'
    if nn.Module.__call__ is not _CALL:
        return 'nn.Module.__call__ has been replaced'
    return None


def _why_not_arguments(m: nn.Module) -> Optional[str]:
    if isinstance(m, nn.Conv2d):
        if m.padding_mode != 'zeros' or isinstance(m.padding, str):
            return f'padding={m.padding!r}, padding_mode={m.padding_mode!r}'
    elif isinstance(m, nn.modules.batchnorm._BatchNorm):
        parameters, buffers = m._parameters, m._buffers
        if parameters['weight'] is None or parameters['bias'] is None:
            return 'it has no weight or no bias'
        if not m.track_running_stats or buffers['running_mean'] is None or buffers['running_var'] is None:
            return 'it has no running statistics'
        if buffers['num_batches_tracked'] is None:
            return 'it does not count its batches'
    return None


def why_not_module(m: nn.Module, classes: Tuple[type, ...]) -> Optional[str]:
    """Return why code may not read the parameters of a module instead of calling it; None if it may.

    Args:
        m: The module.
        classes: The classes that the code implements, exactly.
    """
    cls, attributes = type(m), m.__dict__
    if cls not in classes:
        return f'{cls.__name__} is not exactly {" or ".join(c.__name__ for c in classes)}'
    if (attributes['_forward_hooks'] or attributes['_forward_pre_hooks']
            or attributes['_backward_hooks'] or attributes['_backward_pre_hooks']):
        return f'{cls.__name__} has hooks'
    if not _REPLACED.isdisjoint(attributes):
        return f'a method, parameter or buffer of the {cls.__name__} has been replaced'
    for name, original in _originals.get(cls, ()):
        if getattr(cls, name) is not original:
            return f'{cls.__name__}.{name} has been replaced'
    for tensors in (attributes['_parameters'], attributes['_buffers']):
        for tensor in tensors.values():
            if tensor is not None and type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
                return f'a parameter or buffer of the {cls.__name__} is a {type(tensor).__name__}'
    reason = _why_not_arguments(m)
    return reason and f'{cls.__name__}: {reason}'


def _why_not_input(members: Sequence[nn.Module], x: Tensor) -> Optional[str]:
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
            return (f'the input is {x.dtype} on {x.device}, {type(m).__name__}.weight {weight.dtype} on '
                    f'{weight.device}')
    return None


def why_not(
        members: Sequence[nn.Module],
        classes: Sequence[Tuple[type, ...]],
        x: Optional[Tensor] = None,
) -> Optional[str]:
    """Return why a kernel may not stand in for a group of modules, in words; None if it may.

    Args:
        members: The modules of the group, in the order in which they are called, with no module in between.
        classes: For each of them the classes that the kernel implements.
        x: Input of the first one. None leaves the conditions on the input and its device out.
    """
    reason = why_not_here()
    if reason is not None:
        return reason
    for m, expected in zip(members, classes):
        reason = why_not_module(m, expected)
        if reason is not None:
            return reason
    return None if x is None else _why_not_input(members, x)
