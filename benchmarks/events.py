"""Event-driven products compared with dense ones: single layers, inference, training, small models, compilation time.

    python -m benchmarks events
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Callable, Dict, Iterator, List, Tuple

import timm
import torch
from torch import Tensor, nn

from timm_spikformer import SpikformerMAE, use_kernels
from timm_spikformer.images import read_splits
from timm_spikformer.kernels import events

from . import energy
from .floor import dense_floor
from .images import photographs
from .measure import interleave, peak_memory, ratio
from .model import inference, training_step
from .peer import PeerSpikformer

MODELS = ('spikformer_v2_8_512', 'spikformer_8_512', 'spikformer_v2_8_384')
RATES = (0.13, 0.2, 0.3)  # events per input, weighted by operations; V2-8-512's published energy implies 0.13
LAYER_RATES = (0.05, 0.08, 0.12, 0.2, 0.3, 0.45)
LAYERS: Tuple[Tuple[str, int, int, int, int], ...] = tuple(  # name, input and output channels, resolution, kernel size
    layer for C, size in ((64, 112), (128, 56), (256, 28), (512, 14))
    for layer in ((f'expand {C}@{size}', C, 4 * C, size, 3), (f'contract {C}@{size}', 4 * C, C, size, 3))
) + (('down 64@112', 64, 128, 112, 2), ('down 256@28', 256, 512, 28, 2), ('proj', 512, 512, 14, 1),
     ('fc1', 512, 2048, 14, 1), ('fc2', 2048, 512, 14, 1))


class _Neuron(nn.Module):
    constants = (2., 1., 4.)


def _layer(in_chs: int, out_chs: int, size: int, kernel_size: int, rate: float, T: int = 4) -> Tuple[nn.Module, Tensor]:
    if kernel_size == 1:
        return nn.Linear(in_chs, out_chs), (torch.rand(T * size * size, in_chs) < rate).float()
    stride = 2 if kernel_size == 2 else 1
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=(kernel_size - 1) // 2, bias=False)
    x = (torch.rand(T, in_chs, size, size) < rate).float()
    return conv.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)


def measure_layer(in_chs: int, out_chs: int, size: int, kernel_size: int, rate: float, rounds: int) -> Dict[str, float]:
    """Return speedups over dense operations, for product, product with BN and LIF, and weight gradient."""
    layer, x = _layer(in_chs, out_chs, size, kernel_size, rate)
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
    return {
        'product': ratio(times['dense'], times['product']).median,
        'with BN and LIF': ratio(times['dense'], times['fused']).median,
        'with BN and LIF, bytes in, bytes out': ratio(times['dense'], times['fused_bytes']).median,
        'gradient of the weight': ratio(times['dense_gradient'], times['gradient']).median,
        'dense gmac/s': counted.shape.macs / statistics.median(times['dense']) * 1e-9,
        'dense gradient gmac/s': counted.shape.macs / statistics.median(times['dense_gradient']) * 1e-9,
    }


def create_model_at_rate(
        name: str,
        time_steps: int,
        rate: float,
        x: Tensor,
        rounds: int = 8,
) -> Tuple[nn.Module, float]:
    """Return a model with random weights and BN biases tuned to `rate` events per input, and the rate reached."""
    torch.manual_seed(0)
    model = timm.create_model(name, time_steps=time_steps)
    result = energy.profile_at_rate(model, x, lambda found: found.acs_per_dense_mac, rate, rounds)
    return model.to(memory_format=torch.channels_last), result.acs_per_dense_mac


def _by_kernel_mode(step: Callable[[], object]) -> Dict[str, Callable[[], object]]:
    def run(mode: str) -> None:
        with use_kernels(mode):
            step()

    return {'events': lambda: run('auto'), 'dense': lambda: run('dense')}


def measure_model(model: nn.Module, x: Tensor, is_training: bool, rounds: int) -> Dict[str, float]:
    """Return the time of inference or a training step, as a multiple of the dense floor measured in the same round."""
    model.train(is_training)
    step = training_step(model, x) if is_training else inference(model, x)
    modes = _by_kernel_mode(step)
    times: Dict[str, List[float]] = {}
    floors = []
    for _ in range(rounds):
        for mode, values in interleave(modes, 1, warmup=0 if times else 1).items():
            times.setdefault(mode, []).extend(values)
        with torch.set_grad_enabled(is_training):
            floors.append(dense_floor(step if is_training else lambda: model(x), 1)[0])
    return {'seconds': statistics.median(times['events']), 'floor': statistics.median(floors),
            'events': ratio(times['events'], floors).median, 'dense': ratio(times['dense'], floors).median}


def measure_curve(name: str, rates: Tuple[float, ...], rounds: int) -> List[Dict[str, float]]:
    """Return the inference time at each rate, as a multiple of the dense floor, for this package and spikingjelly.

    Models run with T = 4 and batch size 1.
    """
    curve = []
    x = photographs(2, timm.get_pretrained_cfg(name).input_size[-1])
    for rate in rates:
        model, found = create_model_at_rate(name, 4, rate, x)
        entry = measure_model(model, x[:1], False, rounds)
        peer = PeerSpikformer(model).eval()
        times = interleave(dict(ours=inference(model, x[:1]), peer=inference(peer, x[:1])), rounds)
        entry['spikingjelly'] = entry['events'] * ratio(times['peer'], times['ours']).median
        curve.append({'rate': found, **entry})
        print(f'  {name}, rate {found:.3f}: {entry["events"]:.2f} times the dense floor, spikingjelly '
              f'{entry["spikingjelly"]:.2f}')
    return curve


def _make_training_step(mode: str, name: str, time_steps: int, batch_size: int, rate: float) -> Callable[[], None]:
    x = photographs(max(2, batch_size), 224)
    model, _ = create_model_at_rate(name, time_steps, rate, x[:2])
    return _by_kernel_mode(training_step(model.train(), x[:batch_size]))[mode]


def _demo_model_steps(batch_size: int) -> Iterator[Tuple[str, Callable[[], object]]]:
    """Yield inference, a training step and a masked pre-training step of the demo model on the packaged images."""
    name = 'spikformer_v2_2_64_patch4_32'
    images = read_splits()['test']
    model = timm.create_model(name, pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    x = torch.stack([transform(images[i % len(images)][0]) for i in range(batch_size)])
    yield 'inference', inference(model.eval(), x)
    model = timm.create_model(name, pretrained=True).train()
    yield 'training step', training_step(model, x)
    mae = SpikformerMAE(timm.create_model(name, pretrained=True)).train()

    def step() -> None:
        mae.zero_grad(set_to_none=True)
        mae(x).loss.backward()

    yield 'masked pre-training', step


_FIRST_USE = """
import time
start = time.perf_counter()
import timm, torch, timm_spikformer
imported = time.perf_counter()
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


def first_use(name: str, batch_size: int, cache: str) -> float:
    """Return how many seconds longer the first call takes than a dense call, in a new process with a cache folder."""
    code = _FIRST_USE.format(name=name, batch_size=batch_size)
    out = subprocess.run(
        [sys.executable, '-c', code], env=dict(os.environ, NUMBA_CACHE_DIR=cache), capture_output=True, text=True,
        check=True)
    return float(out.stdout)


def run(quick: bool) -> Dict[str, object]:
    results: Dict[str, object] = {}
    rounds = 1 if quick else 5
    start = time.perf_counter()
    print('  speedup over dense: product; product with BN and LIF; the same with bytes in and out; weight gradient')
    for name, *shape in LAYERS[-3:] if quick else LAYERS:
        for rate in (0.12,) if quick else LAYER_RATES:
            found = results[f'{name}, rate {rate}'] = measure_layer(*shape, rate, rounds)
            print(f'    {name:16s} {rate:.2f}  ' + '  '.join(f'{value:5.2f}' for value in list(found.values())[:4]))
    cases = [(name, 4, 1, rate) for name in MODELS for rate in RATES]
    cases += [(MODELS[0], *case, rate) for case in ((4, 4), (1, 1)) for rate in RATES]
    for name, time_steps, batch_size, rate in [('test_spikformer_v2', 2, 1, 0.13)] if quick else cases:
        x = photographs(max(2, batch_size), timm.get_pretrained_cfg(name).input_size[-1])
        model, found = create_model_at_rate(name, time_steps, rate, x[:2], 2 if quick else 8)
        for is_training in (False, True):
            step = 'training step' if is_training else 'inference'
            title = f'{name}, T = {time_steps}, batch {batch_size}, {step}'
            entry = measure_model(model, x[:batch_size], is_training, 1 if quick else 3)
            results[f'{title}, rate {rate}'] = {'rate': found, **entry}
            print(
                f'  {title}, rate {found:.3f}: {entry["events"]:.2f} times the dense floor, '
                f'{entry["dense"]:.2f} times without event-driven products')
    curve = [0.13] if quick else [0.08, 0.13, 0.2, 0.3, 0.4]
    results['curve'] = measure_curve('test_spikformer_v2' if quick else MODELS[0], tuple(curve), 1 if quick else 3)
    if not quick:
        memory = {mode: peak_memory(_make_training_step, mode, MODELS[0], 4, 1, 0.13) for mode in ('events', 'dense')}
        results['memory_mib'] = memory
        print(
            f'  peak memory of a training step: {memory["events"]:.0f} MiB, {memory["dense"]:.0f} MiB without '
            'event-driven products')
    for batch_size in (2,) if quick else (1, 32, 128):
        for title, step in _demo_model_steps(batch_size):
            times = interleave(_by_kernel_mode(step), 1 if quick else 9)
            gain = ratio(times['dense'], times['events'])
            results[f'demo, {title}, batch {batch_size}'] = gain._asdict()
            print(f'  demo model, {title}, batch {batch_size}: {gain} times as fast with event-driven products')
    for name, batch_size in () if quick else ((MODELS[0], 1), ('spikformer_v2_2_64_patch4_32', 32)):
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (first_use(name, batch_size, cache) for _ in range(2))
        results[f'first use, {name}'] = dict(cold=cold, warm=warm)
        print(f'  first call, {name}: {cold:.1f} s more than a dense call, {warm:.1f} s with compiled code on disk')
    results['threads'], results['seconds'] = torch.get_num_threads(), time.perf_counter() - start
    return results
