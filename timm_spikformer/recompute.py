"""Gradient checkpointing of layers with BatchNorm."""
import contextlib
from typing import Any, Iterator

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from .kernels.products import is_marked_as_spikes, mark_spikes
from .kernels.rules import KernelDecisions
from .kernels.switch import get_kernels, use_kernels

__all__ = ['checkpoint_with_bn', 'preserve_bn_statistics']


@contextlib.contextmanager
def preserve_bn_statistics(module: nn.Module) -> Iterator[None]:
    """Restore the running statistics of BN layers in train mode at the end of the `with` block."""
    buffers = [
        (m, name, value)
        for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
        for name, value in m.named_buffers(recurse=False)
    ]
    for m, name, value in buffers:
        setattr(m, name, value.clone())
    try:
        yield
    finally:
        for m, name, value in buffers:
            setattr(m, name, value)


class _Recomputation(contextlib.AbstractContextManager):
    """Context for recomputation: use the kernels of the forward pass, and do not update BN statistics.

    It is entered again for each backward pass through the same graph.
    """

    def __init__(self, module: nn.Module, decisions: KernelDecisions):
        self.module = module
        self.decisions = decisions
        self.kernels = get_kernels()
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        self.stack.enter_context(use_kernels(self.kernels))
        self.stack.enter_context(self.decisions.replay())
        self.stack.enter_context(preserve_bn_statistics(self.module))

    def __exit__(self, *args: Any) -> None:
        self.stack.close()


def checkpoint_with_bn(module: nn.Module, *args: Any) -> Tensor:
    """Call a module with gradient checkpointing; the recomputation does not update running statistics again.

    Args:
        module: Module to call.
        args: Its arguments.
    """
    if torch.compiler.is_compiling():  # torch.compile does not repeat buffer updates when it recomputes
        return checkpoint(module, *args, use_reentrant=False)
    are_spikes = [isinstance(arg, Tensor) and is_marked_as_spikes(arg) for arg in args]

    def call(*args: Any) -> Tensor:
        for arg, is_spikes in zip(args, are_spikes):
            if is_spikes:  # saved-tensor hooks may pass unmarked copies of the arguments
                mark_spikes(arg)
        return module(*args)

    decisions = KernelDecisions()
    context_fn = lambda: (decisions.record(), _Recomputation(module, decisions))  # noqa: E731
    return checkpoint(call, *args, use_reentrant=False, context_fn=context_fn)
