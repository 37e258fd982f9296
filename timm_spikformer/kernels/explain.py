"""A table of which groups of a model's modules run in a kernel, and why the others do not."""
from typing import List, NamedTuple

from torch import nn

__all__ = ['KernelGroup', 'KernelReport', 'explain_kernels']


class KernelGroup(NamedTuple):
    """A group of modules that a kernel may stand in for."""
    module: str  # name of the module that the group is in
    group: str  # what the kernel computes
    runs_as: str  # 'kernel' or 'modules'
    reason: str  # why the modules are called, or ''


class KernelReport(List[KernelGroup]):
    """The groups of a model; printed as a table."""

    def __str__(self) -> str:
        rows = [('module', 'group', 'runs as', 'reason'), *self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return '\n'.join(
            '  '.join((*(cell.ljust(width) for cell, width in zip(row, widths)), row[3])).rstrip() for row in rows)


def explain_kernels(model: nn.Module) -> KernelReport:
    """Return which groups of modules run in a kernel under the present switch, and why the others do not.

    It describes an eager call with an input of the model's dtype and device, outside of autocast. A kernel that saves
    memory for backward runs in training only.

    Args:
        model: Any module that holds layers of this package.

    >>> import timm
    >>> report = explain_kernels(timm.create_model('test_spikformer_v2'))
    >>> report[0].module, report[0].runs_as
    ('stem.stages.0.down', 'kernel')
    """
    report = KernelReport()
    for name, module in model.named_modules():
        for group, reason in getattr(module, 'kernel_groups', list)():
            report.append(KernelGroup(name, group, 'modules' if reason else 'kernel', reason or ''))
    return report
