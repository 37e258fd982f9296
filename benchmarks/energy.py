"""Energy of the two published models under each counting convention, at the rates that the published energies imply.

    python -m benchmarks energy

No weights are published, so the models have random weights. The bias of BN is chosen so that, on photographs, the rate
is the one that the published energy implies. Two definitions of the rate are compared: the mean input of the layers,
weighted by their operations, which determines the energy; and the mean firing rate of the layers.
"""
from typing import Any, Callable, Dict, List

import timm
import torch
from torch import Tensor, nn

from timm_spikformer.profiling import Profile, profile
from timm_spikformer.profiling.conventions import CHOICES

from .images import crop_photographs, make_neurons_fire

# published energy in millijoules, and the rate implied by it: energy / (0.9 pJ * T * dense MACs)
PUBLISHED = {'spikformer_v2_8_384': (4.69, 0.11), 'spikformer_v2_8_512': (9.36, 0.13)}
RATES: Dict[str, Callable[[Profile], float]] = {
    'of inputs, weighted by MACs': lambda result: result.acs_per_dense_mac,
    'of neurons, mean of the layers': lambda result: result.firing_rate,
}
RATE_TOLERANCE = 0.01
LOWEST_BIAS = -1.  # V1 has 0.23 events per input value at a bias of 0
SPIKINGJELLY = dict(
    residual='mac', fan_out='exact', first_conv='each_step', attention='coincidence', attention_order='cheaper')


def profile_at_rate(
        model: nn.Module,
        x: Tensor,
        get_rate: Callable[[Profile], float],
        rate: float,
        rounds: int = 10,
) -> Profile:
    """Find the bias of BN that gives the rate, by bisection; return the profile at this bias.

    Raises:
        ValueError: The rate that is reached after all rounds differs from `rate` by more than `RATE_TOLERANCE`.
    """
    low, high = LOWEST_BIAS, 1.5
    for _ in range(rounds):
        bias = (low + high) / 2
        result = profile(make_neurons_fire(model, x, bias), x)
        if abs(get_rate(result) - rate) < 5e-4:
            break
        low, high = (bias, high) if get_rate(result) < rate else (low, bias)
    if abs(get_rate(result) - rate) > RATE_TOLERANCE:
        raise ValueError(
            f'No bias of BN gives the rate {rate}; the closest bias, {bias:.3f}, gives {get_rate(result):.3f}. '
            'Choose another rate.')
    return result


def energies(result: Profile) -> Dict[str, float]:
    """Return the energy in millijoules under the papers' conventions, and with each convention changed."""
    energies_mj = {'as in the papers': result.totals.energy_mj}
    for option, choices in CHOICES.items():
        for value in list(choices)[1:]:
            energies_mj[f'{option} = {value}'] = result.with_conventions(**{option: value}).totals.energy_mj
    energies_mj["as in spikingjelly's counters"] = result.with_conventions(**SPIKINGJELLY).totals.energy_mj
    for cost in ('fp16', 'int8', 'int32'):
        energies_mj[f'cost = {cost}'] = result.with_conventions(cost=cost).totals.energy_mj
    energies_mj['dense ANN'] = result.totals.ann_energy_mj
    return energies_mj


def run(quick: bool) -> List[Dict[str, Any]]:
    rows = []
    for name, (published, rate) in PUBLISHED.items():
        architecture = 'test_spikformer_v2' if quick else name
        torch.manual_seed(0)
        model = timm.create_model(architecture, time_steps=4)
        x = crop_photographs(4, timm.get_pretrained_cfg(architecture).input_size[-1])
        columns = []
        print(f'  {architecture}, published {published} mJ')
        for title, get_rate in RATES.items():
            result = profile_at_rate(model, x, get_rate, rate)
            columns.append(energies(result))
            print(f'    rate {title}: {get_rate(result):.3f}')
            rows.append(dict(
                model=architecture, published_mj=published, rate=rate, rate_definition=title,
                firing_rate=result.firing_rate, acs_per_dense_mac=result.acs_per_dense_mac, energies_mj=columns[-1]))
        for convention in columns[0]:
            print(f'    {convention:32s}' + ''.join(f'{column[convention]:10.3f} mJ' for column in columns))
    return rows
