"""Time of a profile compared with forward passes, and time that anytime inference saves.

    python -m benchmarks profiling
"""
import statistics
from typing import Any, Dict, List

import timm
import torch
from torch import Tensor, nn

from timm_spikformer import predict_anytime
from timm_spikformer.images import data_config, make_loader, read_splits
from timm_spikformer.profiling import profile

from .images import crop_photographs
from .measure import interleave, ratio
from .model import create

DEMO = 'spikformer_v2_2_64_patch4_32'


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _cost(name: str, time_steps: int, batch_size: int, batches: int, rounds: int) -> Dict[str, Any]:
    x = crop_photographs(batch_size, timm.get_pretrained_cfg(name).input_size[-1])
    model = create(name, time_steps, x[:4])

    def forwards() -> None:
        for _ in range(batches):
            _forward(model, x)

    times = interleave(dict(forward=forwards, profile=lambda: profile(model, [x] * batches)), rounds)
    cost = ratio(times['profile'], times['forward'])
    print(f'  {name}, T = {time_steps}, batch {batch_size}: a profile takes {cost} times as long as the forward passes')
    return dict(
        model=name, time_steps=time_steps, batch_size=batch_size, batches=batches,
        forward_seconds=statistics.median(times['forward']), relative_time=cost._asdict())


def _anytime(count: int, rounds: int) -> List[Dict[str, Any]]:
    """Measure anytime inference of the included model for T = 4."""
    model = timm.create_model(f'{DEMO}.fashion_mnist_t4', pretrained=True).eval()
    x, y = next(iter(make_loader(read_splits()['test'].sample_evenly(count), data_config(model), count)))
    rows = []
    accuracy = (_forward(model, x).argmax(1) == y).float().mean().item()
    print(f'  {DEMO}.fashion_mnist_t4, {len(x)} images: accuracy {accuracy:.1%} with all steps')
    for confidence in (0.5, 0.7, 0.9):
        out = predict_anytime(model, x, confidence)
        times = interleave(
            dict(forward=lambda: _forward(model, x), anytime=lambda c=confidence: predict_anytime(model, x, c)), rounds)
        relative_time = ratio(times['anytime'], times['forward'])
        accuracy = (out.logits.argmax(1) == y).float().mean().item()
        print(f'    stopping at {confidence:.0%}: {accuracy:.1%}, {out.skipped_fraction:.0%} of the steps '
              f'skipped, {relative_time} of the time')
        rows.append(dict(
            confidence=confidence, accuracy=accuracy, skipped_fraction=out.skipped_fraction,
            relative_time=relative_time._asdict()))
    return rows


def run(quick: bool) -> Dict[str, Any]:
    # the demo's model is fast: with a single batch, the fixed costs of a profile would dominate
    cases = [('test_spikformer_v2', (2,), 2)] if quick else [
        ('spikformer_v2_8_512', (1, 8), 1), ('spikformer_8_512', (1, 8), 1), (DEMO, (1, 8, 32), 10)]
    rounds = 1 if quick else 5
    profiles = [
        _cost(name, 4, batch_size, batches, rounds)
        for name, batch_sizes, batches in cases for batch_size in batch_sizes]
    return dict(profiles=profiles, anytime=_anytime(50 if quick else 500, rounds))
