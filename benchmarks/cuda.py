"""Inference and a training step of the ImageNet models on a GPU, compared with spikingjelly's layers.

    python -m benchmarks cuda
"""
import statistics
from typing import Any, Callable, Dict, List

import timm
import torch
from torch import Tensor, nn

from .floor import dense_floor
from .images import crop_photographs
from .measure import clock, interleave, ratio
from .model import create, inference, training_step
from .peer import PeerSpikformer

MODELS = {'spikformer_v2_8_512': (4, 1), 'spikformer_8_512': (4,)}
COMPILED = ('spikformer_v2_8_512', 4)


def _autocast(step: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        with torch.autocast('cuda', torch.bfloat16):
            step()

    return call


def _peak_memory(step: Callable[[], object]) -> float:
    """Return the peak memory of a step in MiB, without weights and gradients."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def _compare(make: Callable, model: nn.Module, peer: nn.Module, x: Tensor, rounds: int) -> Dict[str, Any]:
    """Return speed and memory of a step in bfloat16, relative to that of the peer and to the dense floor."""
    is_training = make is training_step
    steps = {}
    for side, net in (('ours', model), ('peer', peer)):
        net.train(is_training)
        steps[side] = _autocast(make(net, x))
    times = interleave(steps, rounds, warmup=3)
    memory = {side: _peak_memory(step) for side, step in steps.items()}
    with torch.set_grad_enabled(is_training):
        floor, _ = dense_floor(steps['ours'] if is_training else _autocast(lambda: model(x)))
    relative_time, speedup = ratio(times['ours'], [floor] * rounds), ratio(times['peer'], times['ours'])
    return dict(
        images_per_second=len(x) / statistics.median(times['ours']), relative_to_floor=relative_time._asdict(),
        speedup_over_spikingjelly=speedup._asdict(), memory_mib=memory)


def _compile(model: nn.Module, x: Tensor, rounds: int) -> Dict[str, Any]:
    """Return the speedup of a compiled training step, and the time in seconds that compiling takes."""
    eager = _autocast(training_step(model.train(), x))
    compiled = _autocast(training_step(torch.compile(model), x))
    start = clock()
    compiled()
    seconds = clock() - start
    times = interleave(dict(eager=eager, compiled=compiled), rounds, warmup=2)
    speedup = ratio(times['eager'], times['compiled'])
    print(f'  training step, compiled: {speedup} times as fast; compiling takes {seconds:.0f} s', flush=True)
    return dict(speedup=speedup._asdict(), compile_seconds=seconds)


def run(quick: bool) -> Dict[str, Any]:
    """Print and return images per second, speedups over spikingjelly, peak memory, and the gain of compiling.

    Args:
        quick: Use a small model and few rounds, to check that the benchmark runs.
    """
    rounds, batch_size = (2, 4) if quick else (10, 32)
    gpu = torch.cuda.get_device_name()
    print(f'  {gpu}, batch size {batch_size}, bfloat16')
    rows: List[Dict[str, Any]] = []
    compiled: Dict[str, Any] = {}
    for name, time_steps in {'test_spikformer_v2': (4,)}.items() if quick else MODELS.items():
        images = crop_photographs(batch_size, timm.get_pretrained_cfg(name).input_size[-1])
        x = images.cuda()
        for T in time_steps:
            model = create(name, T, images[:4])
            peer, model = PeerSpikformer(model).cuda(), model.cuda()
            for make, step in ((inference, 'inference'), (training_step, 'training step')):
                row = _compare(make, model, peer, x, rounds)
                memory = row['memory_mib']
                print(
                    f'  {name}, T = {T}, {step}: {row["images_per_second"]:.0f} images/s, '
                    f'{row["relative_to_floor"]["median"]:.2f} times the dense floor, '
                    f'{row["speedup_over_spikingjelly"]["median"]:.2f} times as fast as spikingjelly; peak memory '
                    f'{memory["ours"]:.0f} MiB, {memory["ours"] / memory["peer"]:.0%} of that with spikingjelly',
                    flush=True)
                rows.append(dict(model=name, time_steps=T, step=step, **row))
            del peer
            if quick or (name, T) == COMPILED:
                compiled = dict(model=name, time_steps=T, **_compile(model, x, rounds))
    return dict(gpu=gpu, batch_size=batch_size, dtype='bfloat16', rows=rows, compiled=compiled)
