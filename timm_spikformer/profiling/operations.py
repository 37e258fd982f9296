"""Operation counts of a layer, computed from its recorded counts and the conventions."""
from typing import NamedTuple

import torch
from torch import Tensor

from .conventions import Conventions
from .recording import LayerCounts

__all__ = ['Operations', 'count_operations']

_MEMBRANE_BYTES = 4  # bytes per membrane potential, which is float32 for all dtypes of the weights


class Operations(NamedTuple):
    """Operations of one layer, summed over all images: dense MACs of one time step; the others `[T]`."""
    dense_macs: float
    macs: Tensor
    acs: Tensor
    memory_bytes: Tensor


class _Product(NamedTuple):
    """Operations of the product of one layer, without BN, neurons and bias; all tensors are `[T]`.

    `active_steps` is 1 at the time steps at which the product is computed, else 0.
    """
    dense_macs: float
    macs: Tensor
    acs: Tensor
    weight_reads: Tensor
    active_steps: Tensor


def count_operations(
        counts: LayerCounts,
        conventions: Conventions,
        time_steps: int,
        is_sequence: bool,
) -> Operations:
    """Count the operations of a layer.

    Args:
        counts: Recorded counts of the layer.
        conventions: Conventions for counting operations.
        time_steps: Number of time steps T.
        is_sequence: Whether each time step has a separate input.
    """
    dense_macs, macs, acs, weight_reads, active_steps = _count_product(counts, conventions, time_steps, is_sequence)
    memory_bytes = counts.weight_bytes * weight_reads
    if counts.has_bias:
        memory_bytes = memory_bytes + active_steps * counts.output_numel * counts.weight_bytes
    if conventions.bn == 'mac' and counts.has_bn:
        macs = macs + active_steps * counts.output_numel
    if counts.spikes is not None:  # neurons update their membrane potentials at all time steps
        all_steps = torch.ones_like(active_steps)
        if conventions.neuron == 'mac':
            macs = macs + all_steps * counts.output_numel
        memory_bytes = memory_bytes + all_steps * (2 * _MEMBRANE_BYTES * counts.output_numel)
    return Operations(dense_macs, macs, acs, memory_bytes)


def _count_product(counts: LayerCounts, conventions: Conventions, time_steps: int, is_sequence: bool) -> _Product:
    all_steps = torch.ones(time_steps, dtype=torch.float64)
    if counts.attention is not None:
        return _count_attention(counts, conventions, all_steps)
    if counts.input == 'features':
        return _count_dense_macs(counts, _only(-1, time_steps))  # once, for the mean over time
    if counts.input == 'image' and not is_sequence:
        return _count_first_conv(counts, conventions, all_steps)
    if counts.input == 'real' or counts.input == 'image' and not counts.is_integer:
        return _count_dense_macs(counts, all_steps)
    # spikes, sums of spikes, or event counts, which are counted as sums
    if counts.input != 'spikes' and conventions.residual == 'mac':
        return _count_dense_macs(counts, all_steps)
    return _count_sparse(counts, conventions, all_steps)


def _only(step: int, time_steps: int) -> Tensor:
    return torch.eye(time_steps, dtype=torch.float64)[step]


def _count_dense_macs(counts: LayerCounts, active_steps: Tensor) -> _Product:
    """Count a dense product of real-valued inputs."""
    macs = active_steps * counts.dense_macs
    return _Product(
        counts.dense_macs, macs, acs=torch.zeros_like(macs), weight_reads=macs, active_steps=active_steps)


def _count_first_conv(counts: LayerCounts, conventions: Conventions, all_steps: Tensor) -> _Product:
    """Count the first convolution of images, whose input is the same at all time steps."""
    if conventions.first_conv == 'ac':
        acs = all_steps * counts.dense_macs
        return _Product(
            counts.dense_macs, macs=torch.zeros_like(acs), acs=acs, weight_reads=acs, active_steps=all_steps)
    return _count_dense_macs(
        counts, _only(0, len(all_steps)) if conventions.first_conv == 'once' else all_steps)


def _count_sparse(counts: LayerCounts, conventions: Conventions, all_steps: Tensor) -> _Product:
    """Count a product of spikes, sums of spikes or event counts."""
    counts_nonzero = conventions.residual == 'nonzero'
    if conventions.fan_out == 'exact':
        acs = counts.nonzero_synops if counts_nonzero else counts.synops
    else:
        acs = sum(
            (x.num_nonzero if counts_nonzero else x.total) * (x.dense_macs / x.numel) for x in counts.inputs.values())
    return _Product(
        counts.dense_macs, macs=torch.zeros_like(all_steps), acs=acs, weight_reads=counts.nonzero_synops,
        active_steps=all_steps)


def _count_attention(counts: LayerCounts, conventions: Conventions, all_steps: Tensor) -> _Product:
    """Count the two products of spiking attention; their order may differ between input sizes."""
    zeros = torch.zeros_like(all_steps)
    dense_macs, acs = 0., zeros
    for a in counts.attention.values():
        if conventions.attention_order == 'cheaper' and a.dense_kv < a.dense_qk:
            dense, first, pairs, second = a.dense_kv, a.k, a.kv, a.q
        else:
            dense, first, pairs, second = a.dense_qk, a.q, a.qk, a.v
        dense_macs += 2 * dense
        if conventions.attention != 'none':
            first_acs = pairs if conventions.attention == 'coincidence' else first * (dense / a.numel)
            acs = acs + first_acs + second * (dense / a.numel)
    return _Product(dense_macs, macs=zeros, acs=acs, weight_reads=zeros, active_steps=all_steps)
