"""Conventions for counting operations, and energy models. Every assumption is an option; defaults follow the papers."""
from dataclasses import dataclass, fields
from typing import Any, Dict, Tuple, Union

from spikingjelly.activation_based.op_counter import LemaireEnergyCostConfig, SimpleEnergyCostConfig

from ..arguments import check_number
from .choices import CHOICES

__all__ = ['COST_MODELS', 'Conventions', 'CostModel', 'cost_model']


@dataclass(frozen=True)
class Conventions:
    """Conventions for counting operations.

    The defaults follow the formula of Spikformer, https://arxiv.org/abs/2209.15425. A layer with spiking input does
    (mean input) * T * (dense multiply-accumulates) accumulates. The first convolution and the classifier have
    real-valued input and do multiply-accumulates. Where the paper is ambiguous, as for sums of spikes and the order of
    the products in attention, the default is this project's choice.

    Never counted: biases (one addition per output), the additions of residual connections, pooling, and the scale of
    attention, which can be folded into the threshold.

    `CHOICES` in choices.py describes each value.

    Args:
        residual: How to count inputs that are sums of spikes (0, 1, 2, ...) of residual connections: 'sum', 'nonzero',
            or 'mac', as in spikingjelly's counters and syops-counter.
        fan_out: 'dense', as in the formula, or 'exact', as in spikingjelly's counters.
        first_conv: How to count the first convolution of images: 'once', because the formula of the papers has no T
            here, 'each_step', or 'ac'. It does not apply to sequences, which have a new input at each time step: their
            first convolution does accumulates if the input consists of non-negative integers, such as event counts, and
            multiply-accumulates otherwise.
        attention: 'rate', for which the spiking operands are q and v in (q k^T) v, and k and q in q (k^T v);
            'coincidence', as in spikingjelly, for the first product; or 'none'.
        attention_order: 'qk', or 'cheaper'. Without a softmax, both orders give the same result.
        bn: 'folded', or 'mac'.
        neuron: 'free', or 'mac'.

    Raises:
        ValueError: The value of an option is not in `CHOICES`.

    >>> Conventions(residual='mac').describe()['bn']
    'BN is folded into the weights and costs nothing'
    """
    residual: str = 'sum'
    fan_out: str = 'dense'
    first_conv: str = 'once'
    attention: str = 'rate'
    attention_order: str = 'qk'
    bn: str = 'folded'
    neuron: str = 'free'

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in CHOICES[field.name]:
                expected = ', '.join(map(repr, CHOICES[field.name]))
                raise ValueError(f'{field.name} must be one of {expected}, got {value!r}.')

    def describe(self) -> Dict[str, str]:
        """Return the meaning of the chosen value of each option."""
        return {field.name: CHOICES[field.name][getattr(self, field.name)] for field in fields(self)}


@dataclass(frozen=True)
class CostModel:
    """Energy per operation, and per byte of memory that is read or written.

    The papers count only arithmetic, which corresponds to `memory_pj_per_byte` = 0.

    Args:
        name: Name of the energy model.
        mac_pj: Energy of a multiply-accumulate in picojoules.
        ac_pj: Energy of an accumulate in picojoules.
        memory_pj_per_byte: Energy of reading or writing a byte of memory in picojoules.
        source: Source of the values.

    Raises:
        ValueError: An energy is negative or not finite.

    >>> cost = CostModel('mine', mac_pj=4.6, ac_pj=0.9)
    >>> cost.energy_mj(macs=0, acs=1e9, memory_bytes=0)
    0.9
    """
    name: str
    mac_pj: float
    ac_pj: float
    memory_pj_per_byte: float = 0.
    source: str = 'given by the user'

    def __post_init__(self) -> None:
        for name in ('mac_pj', 'ac_pj', 'memory_pj_per_byte'):
            check_number(name, getattr(self, name))

    def energy_mj(self, macs: Any, acs: Any, memory_bytes: Any) -> Any:
        """Return the energy in millijoules of given numbers (or tensors) of operations and bytes."""
        return (self.mac_pj * macs + self.ac_pj * acs + self.memory_pj_per_byte * memory_bytes) * 1e-9


_HOROWITZ = '45 nm, Horowitz 2014, https://doi.org/10.1109/ISSCC.2014.6757323, as in spikingjelly'


def _spikingjelly_cost_models() -> Dict[str, CostModel]:
    models = {}
    for name in ('fp32', 'fp16', 'int8'):
        costs = getattr(SimpleEnergyCostConfig, name)()
        models[name] = CostModel(name, costs.e_mac_pj, costs.e_ac_pj, source=_HOROWITZ)
        if name == 'fp32':
            models['fp32-memory'] = CostModel(
                'fp32-memory', costs.e_mac_pj, costs.e_ac_pj, costs.e_memory_pj_per_byte,
                f"{_HOROWITZ}'s simple energy model")
    costs = LemaireEnergyCostConfig()
    models['int32'] = CostModel(
        'int32', costs.e_add_pj + costs.e_mul_pj, costs.e_add_pj,
        source='45 nm, Lemaire 2022, https://arxiv.org/abs/2210.13107, as in spikingjelly; arithmetic only')
    return models


COST_MODELS: Dict[str, CostModel] = _spikingjelly_cost_models()


def cost_model(cost: Union[str, CostModel, Tuple[float, float]]) -> CostModel:
    """Return a `CostModel` from its name or from a pair of energies; a `CostModel` is returned unchanged.

    Args:
        cost: Key of `COST_MODELS`, picojoules (multiply-accumulate, accumulate), or a `CostModel`.

    Raises:
        ValueError: The name is unknown, the number of values is not two, or a value is negative or not finite.
    """
    if isinstance(cost, CostModel):
        return cost
    if isinstance(cost, str):
        if cost not in COST_MODELS:
            raise ValueError(
                f'There is no cost model {cost!r}, expected one of {", ".join(map(repr, COST_MODELS))}, or a pair of '
                f'picojoules for a multiply-accumulate and an accumulate.')
        return COST_MODELS[cost]
    if not hasattr(cost, '__len__') or len(cost) != 2:
        raise ValueError(f'Expected two values, picojoules of a multiply-accumulate and of an accumulate, got {cost}.')
    mac_pj, ac_pj = cost
    return CostModel('custom', float(mac_pj), float(ac_pj))
