"""A table of which groups of a model's modules run in a kernel, and why the others do not."""
import contextlib
import statistics
import time
from typing import Dict, Iterator, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from .eager import force_eager
from .events import EventRecord, set_event_observer

__all__ = ['KernelGroup', 'KernelReport', 'explain_kernels', 'time_layers']

_REPEATS = 3  # number of timed calls


class KernelGroup(NamedTuple):
    """A group of modules that a kernel can replace.

    >>> import timm
    >>> group = explain_kernels(timm.create_model('test_spikformer_v2'))[2]
    >>> group.module, group.group, group.runs_as
    ('stem.stages.0.down', 'bn + lif: one pass', 'kernel')
    """
    module: str  # name of the module that contains the group
    group: str  # what the kernel computes
    runs_as: str  # 'kernel' or 'modules'
    reason: str  # why no kernel runs; '' if a kernel runs
    density: Optional[float] = None  # events per input value of a product; None if they were not counted
    milliseconds: Optional[float] = None  # median time of a call of `module`


class KernelReport(List[KernelGroup]):
    """A list of the groups of a model, printed as a table.

    >>> import timm
    >>> report = explain_kernels(timm.create_model('test_spikformer_v2'))
    >>> str(report).split()[:5]
    ['module', 'group', 'runs', 'as', 'reason']
    """

    def __str__(self) -> str:
        head = ['module', 'group', 'runs as', 'reason']
        rows = [[g.module, g.group, g.runs_as, g.reason] for g in self]
        for i, (name, digits) in enumerate((('density', 3), ('milliseconds', 2)), 4):
            values = [g[i] for g in self]
            if any(value is not None for value in values):
                head.insert(-1, name)
                for row, value in zip(rows, values):
                    row.insert(-1, '' if value is None else f'{value:.{digits}f}')
        rows.insert(0, head)
        widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
        return '\n'.join(
            '  '.join((*(cell.ljust(width) for cell, width in zip(row, widths)), row[-1])).rstrip() for row in rows)


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode, without gradients and without compilation: compiled code contains no kernels."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), force_eager():
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def time_layers(model: nn.Module, x: Tensor) -> Dict[str, float]:
    """Return the time of each layer in milliseconds, by layer name, as the median over three calls of the model.

    Layers are timed separately, so spikes between two layers are passed as floats. In an ordinary call, consecutive
    event-driven layers pass them as bytes, and take less time than the sum of the two.

    Args:
        model: Any module that holds layers of this package. It is called in eval mode, without gradients and
            compilation.
        x: Input of the model.

    >>> import timm
    >>> times = time_layers(timm.create_model('test_spikformer_v2'), torch.rand(1, 3, 64, 64))
    >>> times['stem.stages.0.down'] > 0
    True
    """
    started: Dict[nn.Module, float] = {}
    times: Dict[nn.Module, List[float]] = {}

    def start(m: nn.Module, *args: object) -> None:
        started[m] = time.perf_counter()

    def stop(m: nn.Module, *args: object) -> None:
        times.setdefault(m, []).append(1e3 * (time.perf_counter() - started[m]))

    with contextlib.ExitStack() as stack:
        stack.enter_context(_in_eval_mode(model))
        for m in model.modules():
            is_unit = hasattr(m, 'kernel_groups')
            if is_unit and not any(hasattr(child, 'kernel_groups') for child in m.children()):
                stack.callback(m.register_forward_pre_hook(start).remove)
                stack.callback(m.register_forward_hook(stop).remove)
        for _ in range(_REPEATS):
            model(x)
    return {name: statistics.median(times[m]) for name, m in model.named_modules() if m in times}


def explain_kernels(model: nn.Module, x: Optional[Tensor] = None) -> KernelReport:
    """Return which groups of modules run in a kernel under the current mode, and why the others do not.

    Without an input, the report assumes an eager call outside autocast, with an input of the model's dtype and device.
    With an input, the model is called in eval mode without compilation, and the report also contains the input density
    of each product (events per input value), whether the product was event-driven, and the time of each layer in
    milliseconds. Kernels that only reduce the memory saved for backward run in training only.

    Args:
        model: Any module that contains layers of this package.
        x: Input of the model. If None, the model is not called.

    >>> import timm
    >>> model = timm.create_model('test_spikformer_v2')
    >>> report = explain_kernels(model)
    >>> report[0].module, report[0].group
    ('stem.stages.0.down', 'conv: event-driven')
    >>> report = explain_kernels(model, torch.rand(1, 3, 64, 64))
    >>> report[0].runs_as, report[0].reason
    ('modules', 'too small to be faster than the dense layer')
    """
    records: Dict[Tensor, EventRecord] = {}  # by weight, as masked patches run through copies of their layer
    times: Dict[str, float] = {}
    if x is not None:
        with _in_eval_mode(model):
            before = set_event_observer(lambda record: records.__setitem__(record.layer.weight, record))
            try:
                model(x)
            finally:
                set_event_observer(before)
        times = time_layers(model, x)
    report = KernelReport()
    for name, module in model.named_modules():
        for group, reason in getattr(module, 'kernel_groups', list)():
            density = None
            layer_name, _, what = group.partition(': ')
            weight = getattr(getattr(module, layer_name, None), 'weight', None) if what == 'event-driven' else None
            record = None if weight is None else records.get(weight)
            if x is not None and what == 'event-driven' and record is None:
                reason = reason or 'not called, or computed as a matrix product of masked patches'
            if record is not None:
                density, reason = record.density, record.reason
            report.append(KernelGroup(
                name, group, 'modules' if reason else 'kernel', reason or '', density, times.get(name)))
    return report
