"""Conventions for counting operations, and cost models. Every assumption is an option; defaults follow the papers."""
from dataclasses import dataclass, fields
from typing import Dict, List, Optional, Tuple, TypeVar, Union

from spikingjelly.activation_based.op_counter import LemaireEnergyCostConfig, SimpleEnergyCostConfig
from torch import Tensor

from ..arguments import check_number
from .choices import CHOICES

__all__ = [
    'COST_MODELS', 'Conventions', 'CostModel', 'check_conventions', 'describe_assumptions', 'to_cost_model']

_Number = TypeVar('_Number', float, Tensor)


@dataclass(frozen=True)
class Conventions:
    """Conventions for counting operations.

    The defaults follow the formula of Spikformer, https://arxiv.org/abs/2209.15425. The number of accumulates of a
    layer with spiking input is (mean input) x T x (dense multiply-accumulates). The first convolution and the
    classifier have real-valued input and perform multiply-accumulates. Where the paper is ambiguous, as for sums of
    spikes and the order of the products in attention, the default is this project's choice.

    The following operations are not counted: biases (one addition per output), the additions of residual connections,
    pooling, and the scale of attention, which can be folded into the threshold.

    Args:
        residual: How to count inputs that are sums of spikes (0, 1, 2, ...) of residual connections.
            'sum': a sum of n spikes costs n accumulates per weight.
            'nonzero': any nonzero sum costs one accumulate per weight.
            'mac': layers with such inputs perform all dense multiply-accumulates, as in spikingjelly's counters and
            syops-counter.
        fan_out: Number of weights that an input is multiplied by.
            'dense': as in the formula, including zero padding.
            'exact': fewer at image borders, as in spikingjelly's counters.
        first_conv: How to count the first convolution of images, whose input is the same at all time steps.
            'once': multiply-accumulates of one time step, as in the formula of the papers, which has no factor T for
            this layer.
            'each_step': multiply-accumulates of all time steps.
            'ac': accumulates of all time steps.
            The option does not apply to sequences, which have a new input at each time step. Their first convolution
            performs accumulates if the input consists of non-negative integers, such as event counts, and
            multiply-accumulates otherwise.
        attention: How to count the two products of attention.
            'rate': each product costs the firing rate of one operand times its dense operations. The operands are q and
            v in (q k^T) v, and k and q in q (k^T v).
            'coincidence': the first product costs one accumulate for each pair of spikes that coincide, as in
            spikingjelly; the second is counted as for 'rate'.
            'none': the products are not counted.
        attention_order: Order of the two products. Without a softmax, both orders give the same result.
            'qk': (q k^T) v, quadratic in the number of tokens.
            'cheaper': the cheaper of (q k^T) v and q (k^T v), as computed by this package.
        bn: 'folded': BN is folded into the weights and costs nothing. 'mac': one multiply-accumulate per value.
        neuron: 'free': membrane updates cost nothing. 'mac': one multiply-accumulate per update.

    Raises:
        ValueError: The value of an option is not one of those listed.

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
            if not isinstance(value, str) or value not in CHOICES[field.name]:
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
        name: Name of the cost model.
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

    def energy_mj(self, macs: _Number, acs: _Number, memory_bytes: _Number) -> _Number:
        """Return the energy in millijoules of the given numbers of operations and bytes, which may be tensors."""
        return (self.mac_pj * macs + self.ac_pj * acs + self.memory_pj_per_byte * memory_bytes) * 1e-9

    def describe(self) -> str:
        """Return sentences that state the energies and their source."""
        memory = 'Arithmetic only, without memory access.'
        if self.memory_pj_per_byte:
            memory = (
                f'{self.memory_pj_per_byte:g} pJ for each byte of weights read and of membrane potentials read or '
                f'written.')
        return (
            f'Energy: {self.mac_pj:g} pJ for a multiply-accumulate, {self.ac_pj:g} pJ for an accumulate ({self.name}; '
            f'{self.source}). {memory}')


def check_conventions(conventions: Optional[Conventions]) -> Conventions:
    """Return conventions, or the default ones if they are None.

    Raises:
        ValueError: The argument is of another type.
    """
    if conventions is None:
        return Conventions()
    if not isinstance(conventions, Conventions):
        raise ValueError(f"Expected Conventions, such as Conventions(residual='mac'), got {conventions!r}.")
    return conventions


def describe_assumptions(conventions: Conventions, cost: CostModel) -> List[str]:
    """Return sentences that describe the cost model and the counting conventions."""
    lines = [cost.describe()]
    for name, meaning in conventions.describe().items():
        lines.append(f'{name.replace("_", " ")} = {getattr(conventions, name)}: {meaning}.')
    return [*lines, 'Not counted: biases, additions of residual connections, pooling, and the scale of attention.']


_HOROWITZ = '45 nm, Horowitz 2014, https://doi.org/10.1109/ISSCC.2014.6757323, as in spikingjelly'


def _create_cost_models() -> Dict[str, CostModel]:
    fp32, fp16, int8 = SimpleEnergyCostConfig.fp32(), SimpleEnergyCostConfig.fp16(), SimpleEnergyCostConfig.int8()
    lemaire = LemaireEnergyCostConfig()
    models = [
        CostModel('fp32', fp32.e_mac_pj, fp32.e_ac_pj, source=_HOROWITZ),
        CostModel(
            'fp32-memory', fp32.e_mac_pj, fp32.e_ac_pj, fp32.e_memory_pj_per_byte,
            source=f'{_HOROWITZ}, including its memory access'),
        CostModel('fp16', fp16.e_mac_pj, fp16.e_ac_pj, source=_HOROWITZ),
        CostModel('int8', int8.e_mac_pj, int8.e_ac_pj, source=_HOROWITZ),
        CostModel(
            'int32', lemaire.e_add_pj + lemaire.e_mul_pj, lemaire.e_add_pj,
            source='45 nm, Lemaire 2022, https://arxiv.org/abs/2210.13107, as in spikingjelly; arithmetic only'),
    ]
    return {model.name: model for model in models}


COST_MODELS: Dict[str, CostModel] = _create_cost_models()


def to_cost_model(cost: Union[str, CostModel, Tuple[float, float]]) -> CostModel:
    """Return a `CostModel` from its name or from a pair of energies; a `CostModel` is returned unchanged.

    Args:
        cost: Key of `COST_MODELS`, picojoules (multiply-accumulate, accumulate), or a `CostModel`.

    Raises:
        ValueError: The name is unknown, or the pair is not two finite numbers of at least 0.
    """
    if isinstance(cost, CostModel):
        return cost
    pair = 'a pair (pJ per multiply-accumulate, pJ per accumulate)'
    if isinstance(cost, str):
        if cost not in COST_MODELS:
            raise ValueError(
                f'Unknown cost model {cost!r}. Expected one of {", ".join(map(repr, COST_MODELS))}, or {pair}.')
        return COST_MODELS[cost]
    try:
        mac_pj, ac_pj = (float(value) for value in cost)
    except (TypeError, ValueError) as e:
        raise ValueError(f'Expected a cost model, its name, or {pair}. Got {cost!r}.') from e
    return CostModel('custom', mac_pj, ac_pj)
