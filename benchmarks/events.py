"""Event-driven products compared with dense ones: single layers, inference, training, small models, compilation time.

    python -m benchmarks events
"""
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import timm
import torch
from torch import Tensor, nn

from timm_spikformer import SpikformerMAE, use_kernels
from timm_spikformer.images import read_splits
from timm_spikformer.kernels import events

from . import energy
from .floor import dense_floor
from .images import crop_photographs
from .measure import interleave, peak_memory, ratio
from .model import inference, training_step
from .peer import PeerSpikformer
from .results import DemoSpeedup, EventResults, FirstCall, LayerSpeedup, ModelTime, StepMemory


class Layer(NamedTuple):
    """A layer on `[T, in_chs, size, size]`: a linear layer if the kernel size is 1, else a convolution."""
    in_chs: int
    out_chs: int
    size: int
    kernel_size: int


class Case(NamedTuple):
    """A model at a number of events per input value, weighted by operations; `with_peer`: measure spikingjelly too."""
    model: str
    time_steps: int
    batch_size: int
    rate: float
    steps: Tuple[str, ...]
    with_peer: bool = False


_DEMO = 'spikformer_v2_2_64_patch4_32'
_V2 = 'spikformer_v2_8_512'
_RATES = (0.13, 0.2, 0.3)  # V2-8-512's published energy implies 0.13
_INFERENCE, _TRAINING = 'inference', 'training step'
LAYER_RATES = (0.05, 0.08, 0.12, 0.2, 0.3, 0.45)
LAYERS = {
    **{name: layer for C, size in ((64, 112), (128, 56), (256, 28), (512, 14)) for name, layer in (
        (f'expand {C}@{size}', Layer(C, 4 * C, size, 3)), (f'contract {C}@{size}', Layer(4 * C, C, size, 3)))},
    'down 64@112': Layer(64, 128, 112, 2),
    'down 256@28': Layer(256, 512, 28, 2),
    'proj': Layer(512, 512, 14, 1),
    'fc1': Layer(512, 2048, 14, 1),
    'fc2': Layer(2048, 512, 14, 1),
}
CASES = (
    *(Case(_V2, 4, 1, rate, (_INFERENCE,), with_peer=True) for rate in (0.08, 0.13, 0.2, 0.3, 0.4)),
    *(Case(_V2, 4, 1, rate, (_TRAINING,)) for rate in _RATES),
    *(Case(name, 4, 1, rate, (_INFERENCE, _TRAINING)) for name in ('spikformer_8_512', 'spikformer_v2_8_384')
      for rate in _RATES),
    Case(_V2, 4, 4, 0.13, (_INFERENCE, _TRAINING)),
    *(Case(_V2, 1, 1, rate, (_INFERENCE, _TRAINING)) for rate in _RATES),
)


class _Neuron(nn.Module):
    constants = (2., 1., 4.)


def _create_layer(layer: Layer, rate: float, T: int = 4) -> Tuple[nn.Module, Tensor]:
    in_chs, out_chs, size, kernel_size = layer
    if kernel_size == 1:
        return nn.Linear(in_chs, out_chs), (torch.rand(T * size * size, in_chs) < rate).float()
    stride = 2 if kernel_size == 2 else 1
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=(kernel_size - 1) // 2, bias=False)
    x = (torch.rand(T, in_chs, size, size) < rate).float()
    return conv.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)


def measure_layer(name: str, rate: float, rounds: int) -> LayerSpeedup:
    """Return the speedups of the event-driven operations of a layer at a number of events per input value."""
    kernel_size, out_chs = LAYERS[name].kernel_size, LAYERS[name].out_chs
    layer, x = _create_layer(LAYERS[name], rate)
    bn = (nn.BatchNorm1d if kernel_size == 1 else nn.BatchNorm2d)(out_chs).eval()
    nn.init.constant_(bn.bias, 0.7)
    grad = torch.randn_like(layer(x))

    def dense_gradient() -> None:
        if kernel_size == 1:
            grad.t() @ x
        else:
            torch.ops.aten.convolution_backward(
                grad, x, layer.weight, None, layer.stride, layer.padding, (1, 1), False, (0, 0), 1,
                (False, True, False))

    counted = events.read_events(layer, x)
    with torch.no_grad():
        times = interleave(dict(
            dense=lambda: layer(x),
            product=lambda: events.convolve(layer, x, events.read_events(layer, x)),
            fused=lambda: events.convolve_norm_lif(layer, bn, _Neuron(), x, events.read_events(layer, x), 4),
            fused_bytes=lambda: events.convolve_norm_lif(layer, bn, _Neuron(), x, counted, 4, True),
            dense_gradient=dense_gradient,
            gradient=lambda: events.weight_gradient(counted, grad, layer.weight),
        ), rounds)
    return LayerSpeedup(
        name, rate, *(ratio(times['dense'], times[key]).median for key in ('product', 'fused', 'fused_bytes')),
        ratio(times['dense_gradient'], times['gradient']).median)


def create_model_at_rate(case: Case, x: Tensor) -> Tuple[nn.Module, float]:
    """Return a model with random weights and BN biases tuned to the rate of the case, and the rate reached."""
    torch.manual_seed(0)
    model = timm.create_model(case.model, time_steps=case.time_steps)
    result = energy.profile_at_rate(model, x, lambda found: found.acs_per_dense_mac, case.rate)
    return model.to(memory_format=torch.channels_last), result.acs_per_dense_mac


def _by_kernel_mode(step: Callable[[], object]) -> Dict[str, Callable[[], object]]:
    def run(mode: str) -> None:
        with use_kernels(mode):
            step()

    return {'events': lambda: run('auto'), 'dense': lambda: run('dense')}


def measure_model(case: Case, rounds: int) -> Iterator[ModelTime]:
    """Yield the time of each step of a case, relative to the dense floor measured in the same rounds."""
    x = _case_images(case)
    model, rate = create_model_at_rate(case, x[:2])
    x = x[:case.batch_size]
    for step_name in case.steps:
        is_training = step_name == _TRAINING
        make = training_step if is_training else inference
        step = make(model.train(is_training), x)
        functions = _by_kernel_mode(step)
        if case.with_peer:
            functions['spikingjelly'] = make(PeerSpikformer(model).train(is_training), x)
        times: Dict[str, List[float]] = {name: [] for name in functions}
        floors = []
        for _ in range(rounds):
            for name, values in interleave(functions, 1, warmup=0 if floors else 1).items():
                times[name].extend(values)
            with torch.set_grad_enabled(is_training):
                floors.append(dense_floor(step if is_training else lambda: model(x), 1)[0])  # noqa: B023
        relative: Dict[str, Optional[float]] = {name: ratio(values, floors).median for name, values in times.items()}
        yield ModelTime(
            case.model, case.time_steps, case.batch_size, step_name, case.rate, rate,
            statistics.median(times['events']), statistics.median(floors), relative['events'], relative['dense'],
            relative.get('spikingjelly'))


def _case_images(case: Case) -> Tensor:
    """Return at least two photographs, which rates are measured with, and at least the batch size of the case."""
    return crop_photographs(max(2, case.batch_size), timm.get_pretrained_cfg(case.model).input_size[-1])


def _make_training_step(mode: str, case: Case) -> Callable[[], None]:
    x = _case_images(case)
    model, _ = create_model_at_rate(case, x[:2])
    return _by_kernel_mode(training_step(model.train(), x[:case.batch_size]))[mode]


def measure_memory(case: Case) -> StepMemory:
    """Return the peak memory of a training step, measured in separate processes."""
    events_mib, dense_mib = (peak_memory(_make_training_step, mode, case) for mode in ('events', 'dense'))
    return StepMemory(case.model, case.time_steps, case.batch_size, _TRAINING, events_mib, dense_mib)


def _demo_model_steps(batch_size: int) -> Iterator[Tuple[str, Callable[[], object]]]:
    """Yield inference, a training step and a masked pre-training step of the demo's model on the packaged images."""
    images = read_splits()['test']
    model = timm.create_model(_DEMO, pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    x = torch.stack([transform(images[i % len(images)][0]) for i in range(batch_size)])
    yield _INFERENCE, inference(model.eval(), x)
    model = timm.create_model(_DEMO, pretrained=True).train()
    yield _TRAINING, training_step(model, x)
    mae = SpikformerMAE(timm.create_model(_DEMO, pretrained=True)).train()

    def step() -> None:
        mae.zero_grad(set_to_none=True)
        mae(x).loss.backward()

    yield 'masked pre-training', step


_FIRST_CALL = """
import time
import timm, torch, timm_spikformer
model = timm.create_model({name!r}).eval()
for m in model.modules():
    if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
        torch.nn.init.constant_(m.bias, 0.7)
x = torch.rand({batch_size}, *model.default_cfg['input_size'])
with torch.inference_mode():
    with timm_spikformer.use_kernels('dense'):
        model(x)
        begin = time.perf_counter()
        model(x)
        dense = time.perf_counter() - begin
    begin = time.perf_counter()
    model(x)
print(time.perf_counter() - begin - dense)
"""


def _first_call_overhead(name: str, batch_size: int, cache: str) -> float:
    """Return how many seconds longer the first call takes than a dense call, in a new process with a cache folder."""
    code = _FIRST_CALL.format(name=name, batch_size=batch_size)
    out = subprocess.run(
        [sys.executable, '-c', code], env=dict(os.environ, NUMBA_CACHE_DIR=cache), stdout=subprocess.PIPE, text=True,
        check=True)
    return float(out.stdout)


def measure_first_call(name: str, batch_size: int) -> FirstCall:
    """Return the overhead of the first call, with an empty cache folder of numba and with the one filled by it."""
    with tempfile.TemporaryDirectory() as cache:
        return FirstCall(name, batch_size, *(_first_call_overhead(name, batch_size, cache) for _ in range(2)))


def _measure_layers(quick: bool) -> List[LayerSpeedup]:
    print('  speedup over dense: product; product with BN and LIF; the same with bytes in and out; weight gradient')
    rows = []
    for name in list(LAYERS)[-3:] if quick else LAYERS:
        for rate in (0.12,) if quick else LAYER_RATES:
            row = measure_layer(name, rate, 1 if quick else 5)
            print(f'    {name:16s} {rate:.2f}  ' + '  '.join(f'{value:5.2f}' for value in row[2:]))
            rows.append(row)
    return rows


def _measure_models(quick: bool) -> List[ModelTime]:
    rows = []
    quick_case = Case('test_spikformer_v2', 2, 1, 0.2, (_INFERENCE, _TRAINING), with_peer=True)
    for case in (quick_case,) if quick else CASES:
        for row in measure_model(case, 1 if quick else 3):
            peer = '' if row.spikingjelly is None else f', spikingjelly {row.spikingjelly:.2f}'
            print(
                f'  {row.model}, T = {row.time_steps}, batch {row.batch_size}, {row.step}, rate {row.rate:.3f}: '
                f'{row.events:.2f} times the dense floor, {row.dense:.2f} times with dense kernels{peer}')
            rows.append(row)
    return rows


def _measure_demo(quick: bool) -> List[DemoSpeedup]:
    rows = []
    for batch_size in (2,) if quick else (1, 32, 128):
        for step_name, step in _demo_model_steps(batch_size):
            times = interleave(_by_kernel_mode(step), 1 if quick else 9)
            speedup = ratio(times['dense'], times['events'])
            print(f"  demo's model, {step_name}, batch {batch_size}: {speedup} times as fast as with dense kernels")
            rows.append(DemoSpeedup(step_name, batch_size, *speedup))
    return rows


def run(quick: bool) -> Dict[str, Any]:
    layers, models = _measure_layers(quick), _measure_models(quick)
    memory = [] if quick else [measure_memory(Case(_V2, 4, 1, 0.13, (_TRAINING,)))]
    for row in memory:
        print(f'  peak memory of a training step: {row.events_mib:.0f} MiB, {row.dense_mib:.0f} MiB with dense kernels')
    demo = _measure_demo(quick)
    first_calls = [measure_first_call(*case) for case in (() if quick else ((_V2, 1), (_DEMO, 32)))]
    for row in first_calls:
        print(
            f'  first call, {row.model}, batch {row.batch_size}: {row.without_cache:.1f} s more than a dense call, '
            f'{row.with_cache:.1f} s with compiled code on disk')
    return EventResults(layers, models, memory, demo, first_calls).to_json()
