"""Training step with `torch.compile`: speedup, number of graphs and compile time.

    python -m benchmarks compile
"""
import statistics
import time
from typing import Any, Dict, List

import timm
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from .images import crop_photographs
from .measure import interleave, ratio
from .model import MODELS, create, training_step


def run(quick: bool) -> List[Dict[str, Any]]:
    backend = 'aot_eager' if quick else 'inductor'  # aot_eager skips the C++ compilation, which takes minutes
    rows = []
    for name in ('test_spikformer_v2',) if quick else MODELS:
        x = crop_photographs(1, timm.get_pretrained_cfg(name).input_size[-1])
        for time_steps in (1,) if quick else (4, 1):
            torch._dynamo.reset()
            counters.clear()
            model = create(name, time_steps, x).train()
            eager = training_step(model, x)
            compiled = training_step(torch.compile(model, fullgraph=True, backend=backend), x)
            with fresh_cache():
                start = time.perf_counter()
                compiled()
                first = time.perf_counter() - start
            times = interleave(dict(eager=eager, compiled=compiled), 2 if quick else 5)
            seconds = statistics.median(times['compiled'])
            speedup = ratio(times['eager'], times['compiled'])
            graphs = counters['stats']['unique_graphs']
            print(
                f'  {name}, T = {time_steps}, training step, batch 1: {speedup} times as fast, {seconds:.2f} s; '
                f'{graphs} graph{"s" * (graphs != 1)}, compiled in {first - seconds:.0f} s')
            rows.append(dict(
                model=name, time_steps=time_steps, batch_size=1, step='training step', speedup=speedup._asdict(),
                seconds=seconds, graphs=graphs, compile_seconds=first - seconds))
    return rows
