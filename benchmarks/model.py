"""Inference and a training step of the ImageNet models, compared with spikingjelly's layers and with the dense floor.

    python -m benchmarks model
"""
import copy
import statistics
from typing import Any, Callable, Dict, List

import timm
import torch
from torch import Tensor, nn

import timm_spikformer  # noqa: F401  registers the models
from timm_spikformer.monitor import FiringRateMonitor

from .floor import dense_floor
from .images import crop_photographs, make_neurons_fire
from .measure import interleave, peak_memory, ratio
from .peer import PeerSpikformer

MODELS = ('spikformer_v2_8_512', 'spikformer_8_512')


def create(name: str, time_steps: int, x: Tensor, **kwargs) -> nn.Module:
    """Return a model with random weights in eval mode, whose neurons fire.

    Biases before BN, which spikingjelly's layers do not have, are initialized to 0.
    """
    torch.manual_seed(0)
    model = make_neurons_fire(timm.create_model(name, time_steps=time_steps, **kwargs), x)
    return model.to(memory_format=torch.channels_last)


def training_step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    y = torch.arange(len(x), device=x.device) % 10

    def step() -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()

    return step


def inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return step


def _compare(
        title: str,
        make: Callable[[nn.Module, Tensor], Callable],
        model: nn.Module,
        peer: nn.Module,
        x: Tensor,
        rounds: int,
) -> Dict[str, Any]:
    """Return the time of a step, relative to the dense floor and to that of the peer, all measured in each round."""
    ours, theirs = make(model, x), make(peer, x)
    times: Dict[str, List[float]] = dict(ours=[], peer=[])
    floors = []
    for _ in range(rounds):
        for side, values in interleave(dict(ours=ours, peer=theirs), 1, warmup=0 if floors else 1).items():
            times[side].extend(values)
        with torch.set_grad_enabled(make is training_step):
            floors.append(dense_floor(ours if make is training_step else lambda: model(x), 1)[0])
    seconds = statistics.median(times['ours'])
    relative_time, speedup = ratio(times['ours'], floors), ratio(times['peer'], times['ours'])
    print(
        f'  {title}: {seconds:.2f} s, {relative_time} times the dense floor; {speedup} times as fast as spikingjelly')
    return dict(
        seconds=seconds, floor_seconds=statistics.median(floors), relative_to_floor=relative_time._asdict(),
        speedup_over_spikingjelly=speedup._asdict())


def _make_step(side: str, name: str, time_steps: int, batch_size: int) -> Callable[[], None]:
    x = crop_photographs(batch_size, timm.get_pretrained_cfg(name).input_size[-1])
    model = create(name, time_steps, x)
    if side == 'peer':
        model = PeerSpikformer(model)
    return training_step(model.train(), x)


def run(quick: bool) -> List[Dict[str, Any]]:
    rows: List[Dict[str, Any]] = []
    rounds = 1 if quick else 3
    for name in ('test_spikformer_v2',) if quick else MODELS:
        size = timm.get_pretrained_cfg(name).input_size[-1]
        for time_steps in (4, 1):
            x = crop_photographs(8, size)
            model = create(name, time_steps, x[:4])
            peer = PeerSpikformer(model).eval()
            with torch.no_grad():
                with FiringRateMonitor(model) as monitor:
                    model(x[:2])
                rate = monitor.mean
                # in float64: in float32, rounding changes a few spikes, which random weights amplify
                sides = [copy.deepcopy(side).double()(x[:2].double()) for side in (model, peer)]
                difference = (sides[0] - sides[1]).abs().max().item()
            print(f' {name}, T = {time_steps}, firing rate {rate:.3f}; logits differ by {difference:.1e}')
            for make, step, batch_sizes in (
                    (inference, 'inference', (1, 8)), (training_step, 'training step', (1, 4))):
                is_training = make is training_step
                model.train(is_training), peer.train(is_training)
                for batch_size in batch_sizes:
                    entry = _compare(f'{step}, batch {batch_size}', make, model, peer, x[:batch_size], rounds)
                    if is_training:
                        entry['memory_mib'] = memory = {
                            side: peak_memory(_make_step, side, name, time_steps, batch_size)
                            for side in ('ours', 'peer')}
                        print(
                            f'    peak memory {memory["ours"]:.0f} MiB, {memory["ours"] / memory["peer"]:.0%} of that '
                            'with spikingjelly')
                    rows.append(dict(
                        model=name, time_steps=time_steps, batch_size=batch_size, step=step, firing_rate=rate, **entry))
    return rows
