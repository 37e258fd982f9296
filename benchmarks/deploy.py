"""Inference with and without folded BN, compiled, and in onnxruntime; number of spikes that folding changes.

    python -m benchmarks deploy
"""
import io
import os
import statistics
import tempfile
import time
from typing import Any, Callable, Dict, List, Tuple
from unittest import mock

import onnxruntime
import torch
from spikingjelly.activation_based.monitor import OutputMonitor
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

import timm_spikformer  # noqa: F401  registers the models
from timm_spikformer import LIF
from timm_spikformer.layers import ConvBNLIF, LinearBNLIF

from .images import crop_photographs
from .measure import interleave, ratio
from .model import create, inference


@torch.inference_mode()
def _spikes(model: nn.Module, x: Tensor) -> Tuple[Tensor, List[Tensor]]:
    monitor = OutputMonitor(model, LIF, lambda spikes: spikes.bool())
    logits = model(x)
    monitor.remove_hooks()
    return logits, monitor.records


def _changed_fraction(counts: List[Tuple[int, int]]) -> float:
    return sum(n for n, _ in counts) / sum(total for _, total in counts)


def changed_by_each_layer(model: nn.Module, x: Tensor) -> float:
    """Return the share of spikes that change if each layer is folded alone, on its input in the unfolded model."""
    counts = []

    def compare(m: nn.Module, args: Tuple, out: Tensor) -> None:
        counts.append(((m.fuse().forward(*args) != out).sum().item(), out.numel()))

    hooks = [m.register_forward_hook(compare) for m in model.modules() if isinstance(m, (ConvBNLIF, LinearBNLIF))]
    with torch.inference_mode():
        model(x)
    for hook in hooks:
        hook.remove()
    return _changed_fraction(counts)


def compare_folded(model: nn.Module, folded: nn.Module, x: Tensor) -> Dict[str, float]:
    """Return how folding changes spikes and logits.

    With random weights, one changed spike changes many later spikes; in a trained network, it changes few.
    """
    (logits, spikes), (folded_logits, folded_spikes) = _spikes(model, x), _spikes(folded, x)
    result = dict(
        of_equal_inputs=changed_by_each_layer(model, x),
        in_all=_changed_fraction(
            [((a != b).sum().item(), a.numel()) for a, b in zip(spikes, folded_spikes, strict=True)]),
        logits=(logits - folded_logits).abs().max().item(),
        logits_std=logits.std().item(),
    )
    print('  folding changes {of_equal_inputs:.1e} of the spikes if layer inputs are equal, and {in_all:.1e} in the '
          'whole network; logits differ by up to {logits:.1e} (standard deviation {logits_std:.1e})'.format(**result))
    return result


def compiled(model: nn.Module, x: Tensor) -> Tuple[Callable[[], Tensor], Dict[str, float]]:
    """Compile a model and call it once; return its inference step, the compile time and the number of graphs."""
    torch._dynamo.reset()
    counters.clear()
    step = inference(torch.compile(model, fullgraph=True, dynamic=False), x)
    start = time.perf_counter()
    step()
    info = dict(compile_seconds=time.perf_counter() - start, graphs=counters['stats']['unique_graphs'])
    print('  compiled in {compile_seconds:.0f} s, graphs: {graphs}'.format(**info))
    return step, info


def onnx_session(model: nn.Module, x: Tensor) -> Tuple[onnxruntime.InferenceSession, Dict[str, float]]:
    """Export a model with a dynamic batch size; return an onnxruntime session with as many threads as PyTorch uses."""
    buffer = io.BytesIO()
    start = time.perf_counter()
    with torch.no_grad():
        torch.onnx.export(
            model, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim('batch')},), verbose=False).save(buffer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(buffer.getvalue(), options)
    info = dict(export_seconds=time.perf_counter() - start, mib=buffer.tell() / 2**20)
    print('  exported to ONNX in {export_seconds:.0f} s, {mib:.0f} MiB'.format(**info))
    return session, info


def _compare(
        model: nn.Module,
        folded: nn.Module,
        session: onnxruntime.InferenceSession,
        x: Tensor,
        rounds: int,
) -> Dict[str, Any]:
    """Return the median time of each side, and of each but the first the speedup over it and the logit difference."""
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    steps = dict(
        plain=inference(model, x), folded=inference(folded, x),
        onnxruntime=lambda: torch.from_numpy(session.run(None, feed)[0]))
    result: Dict[str, Any] = dict(batch_size=len(x))
    if len(x) == 1:  # compiled for one batch size only, as compiling takes minutes
        steps['compiled'], result['compilation'] = compiled(folded, x)
    expected = steps['folded']()
    times = interleave(steps, rounds)
    result['seconds'] = {side: statistics.median(t) for side, t in times.items()}
    print(f'  batch {len(x)}: {result["seconds"]["plain"]:.3f} s as trained')
    result['sides'] = []
    for side in list(steps)[1:]:
        speedup, difference = ratio(times['plain'], times[side]), (steps[side]() - expected).abs().max().item()
        print(f'    {side}: {speedup} times as fast; logits differ from those of the folded model by {difference:.1e}')
        result['sides'].append(dict(side=side, speedup=speedup._asdict(), logit_difference=difference))
    return result


def run(quick: bool) -> List[Dict[str, Any]]:
    rows = []
    name, size, rounds = ('test_spikformer_v2', 64, 1) if quick else ('spikformer_v2_8_512', 224, 3)
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache):
        for time_steps in (1,) if quick else (4, 1):
            x = crop_photographs(8, size)
            model = create(name, time_steps, x[:4])
            folded = reparameterize_model(model)
            print(f' {name}, T = {time_steps}')
            folding = compare_folded(model, folded, x[:2])
            session, export = onnx_session(folded, x[:2])
            batches = [
                _compare(model, folded, session, x[:batch_size], rounds) for batch_size in ((1,) if quick else (1, 8))]
            rows.append(dict(model=name, time_steps=time_steps, folding=folding, onnx=export, batches=batches))
    return rows
