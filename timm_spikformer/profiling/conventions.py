"""How operations are counted and what they cost: every assumption is an option, and its default is the papers'."""
from dataclasses import dataclass, fields
from typing import Any, Dict, Tuple, Union

from spikingjelly.activation_based.op_counter import LemaireEnergyCostConfig, SimpleEnergyCostConfig

from .choices import CHOICES

__all__ = ['COST_MODELS', 'Conventions', 'CostModel', 'cost_model']

@dataclass(frozen=True)
class Conventions:
    """What counts as an operation.

    The default is the formula of Spikformer, https://arxiv.org/abs/2209.15425: a layer with spiking input does its
    mean input times T times its dense multiply-accumulates as accumulates, and the first convolution and the
    classifier, whose input is real-valued, do multiply-accumulates. Where its text leaves a choice open, as for sums of
    spikes and the order of attention's products, the default is this project's reading.

    Never counted, whatever the options: biases, which are added once for each output, the additions of the residual
    stream, pooling, and attention's scale, which a threshold can hold.

    Args:
        residual: Inputs that the residual has summed, 0, 1, 2, ...: 'sum', 'nonzero', or 'mac', which is how
            spikingjelly's counters and syops-counter see them.
        fan_out: 'dense' as in the formula, or 'exact', which is what spikingjelly's counters count.
        first_conv: Of images: 'once', as the formula of the papers has no T here, 'each_step', or 'ac'. Sequences are
            new at each step: their first convolution does accumulates where they hold non-negative integers, as counts
            of events are, and multiply-accumulates where they do not, whatever is chosen here.
        attention: 'rate', where the spiking operands are q and v of (q k^T) v, and k and q of q (k^T v);
            'coincidence', spikingjelly's, for the first product; or 'none'.
        attention_order: 'qk', or 'cheaper'. There being no softmax, the results are the same.
        bn: 'folded', or 'mac'.
        neuron: 'free', or 'mac'.
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
        """Each option with the meaning of its value."""
        return {field.name: CHOICES[field.name][getattr(self, field.name)] for field in fields(self)}


@dataclass(frozen=True)
class CostModel:
    """Energy of an operation in picojoules, of a byte of memory that is read or written, and where these are from.

    The papers count arithmetic alone, and so does a model whose `memory_pj_per_byte` is 0.
    """
    name: str
    mac_pj: float
    ac_pj: float
    memory_pj_per_byte: float = 0.
    source: str = 'given by the user'

    def __post_init__(self) -> None:
        values = self.mac_pj, self.ac_pj, self.memory_pj_per_byte
        if not all(0. <= value < float('inf') for value in values):
            raise ValueError(
                f'Energies must be finite and not negative, got {values} pJ for a multiply-accumulate, an accumulate '
                f'and a byte of memory.')

    def energy_mj(self, macs: Any, acs: Any, memory_bytes: Any) -> Any:
        """Energy in millijoules of numbers or tensors of operations."""
        return (self.mac_pj * macs + self.ac_pj * acs + self.memory_pj_per_byte * memory_bytes) * 1e-9


_HOROWITZ = '45 nm, Horowitz 2014, https://doi.org/10.1109/ISSCC.2014.6757323, as in spikingjelly'


def _of_spikingjelly() -> Dict[str, CostModel]:
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
        source='45 nm, Lemaire 2022, https://arxiv.org/abs/2210.13107, as in spikingjelly; its arithmetic alone')
    return models


COST_MODELS: Dict[str, CostModel] = _of_spikingjelly()


def cost_model(cost: Union[str, CostModel, Tuple[float, float]]) -> CostModel:
    """A cost model by its name, a pair of picojoules (multiply-accumulate, accumulate), or itself.

    Raises:
        ValueError: There is no such name, or a value is negative or not finite.
    """
    if isinstance(cost, CostModel):
        return cost
    if isinstance(cost, str):
        if cost not in COST_MODELS:
            raise ValueError(
                f'There is no cost model {cost!r}, expected one of {", ".join(map(repr, COST_MODELS))}, or a pair of '
                f'picojoules for a multiply-accumulate and an accumulate.')
        return COST_MODELS[cost]
    if len(cost) != 2:
        raise ValueError(f'Expected two values, picojoules of a multiply-accumulate and of an accumulate, got {cost}.')
    mac_pj, ac_pj = cost
    return CostModel('custom', float(mac_pj), float(ac_pj))
