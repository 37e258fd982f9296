"""Measure firing rates, operations and energy of a Spikformer on data, see `profile`."""
import contextlib
import dataclasses
import itertools
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from ..arguments import check_integer
from ..masked_autoencoder import SpikformerMAE
from ..network import Spikformer, find_spikformer
from ..recompute import preserve_bn_statistics
from ..sequences import check_time_steps
from .conventions import Conventions, CostModel, cost_model
from .recording import LayerCounts, Recorder, check_finite_sums

__all__ = ['GROUPS', 'LayerProfile', 'Profile', 'StepProfile', 'Totals', 'profile']

GROUPS = ('stem', 'attention', 'mlp', 'head')
_MEMBRANE_BYTES = 4  # bytes per membrane potential, which is float32 for all dtypes of the weights

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Totals:
    """Operations per image, summed over all time steps, and their energy.

    Args:
        parameters: Number of parameters.
        dense_macs: Multiply-accumulates of an ANN (non-spiking network) with the same layers, run once per image.
        macs: Multiply-accumulates of the spiking network.
        acs: Accumulates of the spiking network, also called SynOps.
        memory_bytes: Bytes of weights and biases read, and of membrane potentials read and written, without a cache, as
            in spikingjelly's simple energy model. The default cost model and most others ignore it.
        energy_mj: Energy of the spiking network in millijoules.
        ann_energy_mj: Energy of the ANN in millijoules.

    >>> import timm
    >>> totals = profile(timm.create_model('test_spikformer_v2'), torch.rand(2, 3, 64, 64)).totals
    >>> totals.dense_macs > totals.macs > 0, totals.energy_mj > 0
    (True, True)
    """
    parameters: int
    dense_macs: float
    macs: float
    acs: float
    memory_bytes: float
    energy_mj: float
    ann_energy_mj: float


@dataclass(frozen=True)
class LayerProfile:
    """Profile of one layer: a convolution or linear layer with its neurons, or the attention products with theirs.

    All lists have one entry per time step.

    Args:
        name: Module name in the timm model.
        group: 'stem', 'attention', 'mlp' or 'head'.
        input: Type of the input: 'image', 'spikes', 'sums' (of spikes), or 'features' (averaged over time steps).
        parameters: Number of parameters, including those of BN.
        dense_macs: Multiply-accumulates per image and time step without sparsity.
        input_rate: Mean of the input; None unless it consists of spikes or sums of spikes.
        operand_rates: Firing rates of q, k and v; None except for attention.
        values: Fraction of inputs with each value, if the input is sums of spikes.
        firing_rate: Spikes per neuron; None for the classifier.
        silent: Fraction of the neurons that never fired.
        saturated: Fraction of the neurons that fired at every time step of every image.
        macs: Multiply-accumulates per image, according to the conventions.
        acs: Accumulates per image, according to the conventions.
        memory_bytes: Bytes of weights, biases and membranes read and written per image; see `Totals`.
        energy_mj: Energy per image in millijoules.
        ann_energy_mj: Energy of the dense multiply-accumulates of one time step in millijoules.
        milliseconds: Measured time per image in milliseconds, see `measure_times`; None if it was not measured.
        dense_milliseconds: The same, without event-driven products.

    >>> import timm
    >>> result = profile(timm.create_model('test_spikformer_v2', time_steps=2), torch.rand(2, 3, 64, 64))
    >>> layer = result.layer('blocks.0.mlp.fc2')
    >>> layer.group, layer.input, len(layer.firing_rate)
    ('mlp', 'spikes', 2)
    """
    name: str
    group: str
    input: str
    parameters: int
    dense_macs: float
    input_rate: Optional[List[float]]
    operand_rates: Optional[Dict[str, List[float]]]
    values: Optional[Dict[int, float]]
    firing_rate: Optional[List[float]]
    silent: Optional[float]
    saturated: Optional[float]
    macs: List[float]
    acs: List[float]
    memory_bytes: List[float]
    energy_mj: float
    ann_energy_mj: float
    milliseconds: Optional[float] = None
    dense_milliseconds: Optional[float] = None

    @property
    def mean_firing_rate(self) -> Optional[float]:
        return None if self.firing_rate is None else sum(self.firing_rate) / len(self.firing_rate)


@dataclass(frozen=True)
class StepProfile:
    """Predictions after a time step, and the energy used up to then.

    Args:
        step: Number of the time step, starting at 1.
        energy_mj: Energy per image in millijoules if inference stops after this step, including the classifier.
        agreement: Fraction of the images with the same prediction as after the last step.
        confidence: Mean of the highest class probability.
        accuracy: Fraction of the images that are classified correctly; None without labels.

    >>> import timm
    >>> steps = profile(timm.create_model('test_spikformer_v2', time_steps=2), torch.rand(2, 3, 64, 64)).steps
    >>> [step.step for step in steps], steps[-1].agreement
    ([1, 2], 1.0)
    """
    step: int
    energy_mj: float
    agreement: Optional[float] = None
    confidence: Optional[float] = None
    accuracy: Optional[float] = None


class _Predictions:
    """Sums over all images of agreement, confidence and correct predictions, each `[T]`."""

    def __init__(self) -> None:
        self.agreement = self.confidence = torch.zeros((), dtype=torch.float64)
        self.correct: Optional[Tensor] = torch.zeros((), dtype=torch.float64)  # None without labels

    def add(self, logits: Tensor, y: Optional[Tensor]) -> None:
        """Add a batch: logits after each time step `[T, B, K]`, and labels `[B]`."""
        confidence, predicted = logits.float().softmax(-1).cpu().max(-1)
        check_finite_sums(confidence, 'output of head.fc')
        self.agreement = self.agreement + (predicted == predicted[-1]).sum(1)
        self.confidence = self.confidence + confidence.double().sum(1)
        self.correct = None if y is None or self.correct is None else self.correct + (predicted == y.cpu()).sum(1)


@dataclass(frozen=True)
class Profile:
    """Result of `profile`. `with_conventions` applies other conventions or energies without running the model again.

    Args:
        model: Name of the architecture.
        time_steps: Number of time steps T per image or sequence.
        images: Number of images or sequences.
        is_sequence: Whether the data are sequences, with a separate input for each time step.
        by_channel: Whether `silent` and `saturated` are fractions of channels instead of neurons, as for a masked
            autoencoder or images of different sizes.
        conventions: Conventions for counting operations.
        cost: Energy per operation.
        times: Measured milliseconds per image by kernel mode, 'auto' or 'dense' (no event-driven products), and layer.

    >>> import timm
    >>> result = profile(timm.create_model('test_spikformer_v2'), torch.rand(2, 3, 64, 64))
    >>> result.time_steps, list(result.groups)
    (4, ['stem', 'attention', 'mlp', 'head'])
    >>> result.with_conventions('int8').totals.energy_mj < result.totals.energy_mj
    True
    """
    model: str
    time_steps: int
    images: int
    is_sequence: bool
    by_channel: bool
    conventions: Conventions
    cost: CostModel
    _layer_counts: List[LayerCounts] = dataclasses.field(repr=False)
    _predictions: Optional[_Predictions] = dataclasses.field(repr=False)
    times: Dict[str, Dict[str, float]] = dataclasses.field(default_factory=dict, repr=False)

    def with_conventions(
            self,
            cost: Union[str, CostModel, Tuple[float, float], None] = None,
            **conventions: str,
    ) -> 'Profile':
        """Return this profile with other conventions or another cost model.

        Args:
            cost: See `profile`; by default, the cost model of this profile.
            conventions: Options of `Conventions` to change, such as `residual='mac'`.
        """
        return dataclasses.replace(
            self,
            conventions=dataclasses.replace(self.conventions, **conventions),
            cost=self.cost if cost is None else cost_model(cost),
        )

    @cached_property
    def layers(self) -> List[LayerProfile]:
        """Profiles of the layers in execution order."""
        auto, dense = (self.times.get(mode, {}) for mode in ('auto', 'dense'))
        return [
            dataclasses.replace(
                self._layer(counts), milliseconds=auto.get(counts.name), dense_milliseconds=dense.get(counts.name))
            for counts in self._layer_counts]

    def layer(self, name: str) -> LayerProfile:
        """Return the profile of a layer by its name.

        Raises:
            ValueError: There is no such layer.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise ValueError(f'There is no layer {name!r}, expected one of {", ".join(x.name for x in self.layers)}.')

    def _layer(self, counts: LayerCounts) -> LayerProfile:
        n = self.images
        dense, macs, acs, memory = self._operations(counts)
        spikes_in = counts.input in ('spikes', 'sums') and counts.attention is None
        spike_counts = counts.channel_spikes if counts.neuron_spikes is None else counts.neuron_spikes
        num_inputs, attention = sum(counts.value_counts.values()), counts.attention
        operands = None if attention is None else {
            name: (getattr(attention, name) / attention.numel).tolist() for name in ('q', 'k', 'v')}
        return LayerProfile(
            counts.name, counts.group, counts.input, counts.parameters, dense / n,
            input_rate=(counts.input_sum / counts.input_numel).tolist() if spikes_in else None,
            operand_rates=operands,
            values={x: m / num_inputs for x, m in sorted(counts.value_counts.items())} if num_inputs else None,
            firing_rate=None if counts.spikes is None else (counts.spikes / counts.output_numel).tolist(),
            silent=None if counts.spikes is None else spike_counts.silent,
            saturated=None if counts.spikes is None else spike_counts.saturated,
            macs=(macs / n).tolist(),
            acs=(acs / n).tolist(),
            memory_bytes=(memory / n).tolist(),
            energy_mj=self.cost.energy_mj(*(x.sum().item() for x in (macs, acs, memory))) / n,
            ann_energy_mj=self.cost.energy_mj(
                dense, 0., 0. if counts.attention is not None else counts.weight_bytes * dense) / n,
        )

    def _operations(self, counts: LayerCounts) -> Tuple[float, Tensor, Tensor, Tensor]:
        """Return sums over all images: dense MACs of one time step, and MACs, accumulates and bytes, each `[T]`."""
        conventions = self.conventions
        zeros = torch.zeros(self.time_steps, dtype=torch.float64)
        ones = torch.ones_like(zeros)
        macs = acs = zeros
        is_step_run = ones  # 1 at the time steps at which the product is computed
        weights = None  # weight reads per time step; None for one read per dense operation
        if counts.attention is not None:
            dense, acs = self._attention(counts)
            weights = zeros
        else:
            dense = counts.dense_macs
            input = counts.input
            if input == 'image' and self.is_sequence and counts.is_integer:
                input = 'sums'
            if input == 'features':
                is_step_run = torch.eye(self.time_steps, dtype=torch.float64)[-1]
                macs = is_step_run * dense
            elif input == 'image' and not self.is_sequence and conventions.first_conv == 'ac':
                acs = ones * dense
            elif input == 'image':
                if not self.is_sequence and conventions.first_conv == 'once':
                    is_step_run = torch.eye(self.time_steps, dtype=torch.float64)[0]
                macs = is_step_run * dense
            elif input == 'sums' and conventions.residual == 'mac':
                macs = ones * dense
            else:
                is_nonzero = conventions.residual == 'nonzero'
                weights = counts.nonzero_synops
                if conventions.fan_out == 'exact':
                    acs = counts.nonzero_synops if is_nonzero else counts.synops
                else:
                    acs = (counts.num_nonzero if is_nonzero else counts.input_sum) * (dense / counts.input_numel)
        if conventions.bn == 'mac' and counts.has_bn:
            macs = macs + is_step_run * counts.output_numel
        if conventions.neuron == 'mac' and counts.spikes is not None:
            macs = macs + ones * counts.output_numel
        memory = counts.weight_bytes * (is_step_run * dense if weights is None else weights)
        if counts.has_bias:
            memory = memory + is_step_run * counts.output_numel * counts.weight_bytes
        if counts.spikes is not None:
            memory = memory + ones * (2 * _MEMBRANE_BYTES * counts.output_numel)
        return dense, macs, acs, memory

    def _attention(self, counts: LayerCounts) -> Tuple[float, Tensor]:
        conventions, a = self.conventions, counts.attention
        if conventions.attention_order == 'cheaper' and a.kv_is_cheaper:
            dense, first, pairs, second = a.dense_kv, a.k, a.kv, a.q
        else:
            dense, first, pairs, second = a.dense_qk, a.q, a.qk, a.v
        if conventions.attention == 'none':
            return 2 * dense, torch.zeros_like(first)
        first = pairs if conventions.attention == 'coincidence' else first * (dense / a.numel)
        return 2 * dense, first + second * (dense / a.numel)

    def _sum(self, layers: Iterable[LayerProfile]) -> Totals:
        layers = list(layers)
        return Totals(
            sum(x.parameters for x in layers),
            sum(x.dense_macs for x in layers),
            sum(sum(x.macs) for x in layers),
            sum(sum(x.acs) for x in layers),
            sum(sum(x.memory_bytes) for x in layers),
            sum(x.energy_mj for x in layers),
            sum(x.ann_energy_mj for x in layers),
        )

    @cached_property
    def totals(self) -> Totals:
        """Totals of the model, or of the encoder of a masked autoencoder."""
        return self._sum(self.layers)

    @cached_property
    def groups(self) -> Dict[str, Totals]:
        """Totals of those of the groups stem, attention, mlp and head that the model has."""
        groups = {name: [x for x in self.layers if x.group == name] for name in GROUPS}
        return {name: self._sum(layers) for name, layers in groups.items() if layers}

    @property
    def firing_rate(self) -> float:
        """Mean of the firing rates (spikes per neuron and time step) of the layers."""
        rates = [x.mean_firing_rate for x in self.layers if x.firing_rate is not None]
        return sum(rates) / len(rates)

    @property
    def acs_per_dense_mac(self) -> float:
        """Ratio of accumulates to T times dense multiply-accumulates, over the layers that do accumulates.

        This is the mean input rate weighted by the operations of each layer, as implied by published energy estimates.
        """
        layers = [x for x in self.layers if any(x.acs)]
        return sum(sum(x.acs) for x in layers) / (self.time_steps * sum(x.dense_macs for x in layers) or 1.)

    @property
    def accuracy(self) -> Optional[float]:
        """Fraction of the images that are classified correctly after all time steps; None without labels."""
        return self.steps[-1].accuracy

    @property
    def silent_layers(self) -> List[str]:
        """Names of the layers in which no neuron fired."""
        return [x.name for x in self.layers if x.silent == 1.]

    @cached_property
    def steps(self) -> List[StepProfile]:
        """Energy, agreement with the last step, confidence and accuracy after each time step.

        In eval mode, the values after step t are those of a model with t time steps. In train mode they are not,
        because BN computes its statistics over all time steps.
        """
        head = sum(x.energy_mj for x in self.layers if x.group == 'head')
        body = [x for x in self.layers if x.group != 'head']
        energies = [
            sum(self.cost.energy_mj(x.macs[t], x.acs[t], x.memory_bytes[t]) for x in body)
            for t in range(self.time_steps)
        ]
        steps = []
        for t, energy in enumerate(itertools.accumulate(energies)):
            p = self._predictions
            metrics = {} if p is None else dict(
                agreement=p.agreement[t].item() / self.images,
                confidence=p.confidence[t].item() / self.images,
                accuracy=None if p.correct is None else p.correct[t].item() / self.images,
            )
            steps.append(StepProfile(t + 1, energy + head, **metrics))
        return steps

    def to_dict(self) -> Dict[str, Any]:
        """Return the profile as a dictionary that can be saved as JSON."""
        values = {name: getattr(self, name) for name in (
            'model', 'time_steps', 'images', 'is_sequence', 'by_channel', 'accuracy', 'firing_rate',
            'acs_per_dense_mac')}
        values.update({
            name: dataclasses.asdict(getattr(self, name)) for name in ('conventions', 'cost', 'totals')})
        values['groups'] = {name: dataclasses.asdict(totals) for name, totals in self.groups.items()}
        values['steps'] = [dataclasses.asdict(x) for x in self.steps]
        values['layers'] = [dataclasses.asdict(x) for x in self.layers]
        return values


def _split_batch(batch: Any) -> Tuple[Tensor, Optional[Tensor]]:
    """Return images and labels of a batch from a data loader."""
    x, y = batch, None
    if isinstance(batch, Mapping):
        x = batch.get('pixel_values')
        y = next((batch[key] for key in ('labels', 'label') if batch.get(key) is not None), None)
    elif isinstance(batch, (tuple, list)):
        x, y = batch[0] if batch else None, batch[1] if len(batch) > 1 else None
    if not isinstance(x, Tensor):
        raise ValueError(
            f'Expected batches of images: a tensor, a pair (images, labels), or a dict with pixel_values. Got '
            f'{sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}.')
    return x, y if isinstance(y, Tensor) else None


def _check_labels(y: Optional[Tensor], num_classes: int, accuracy: Optional[bool]) -> Optional[Tensor]:
    """Return class indices `[B]`, or None if accuracy is not computed."""
    if accuracy is False:
        return None
    if y is None or y.ndim != 1 or y.is_floating_point():
        if accuracy:
            what = 'no labels' if y is None else f'labels {list(y.shape)} of {y.dtype}'
            raise ValueError(f'Accuracy was requested, but the data has {what}. Expected a class index for each image.')
        return None
    if len(y) and (y.min() < 0 or y.max() >= num_classes):
        raise ValueError(
            f'Labels must be indices of the {num_classes} classes of the model, got {y.min()} to {y.max()}. Use '
            f'accuracy=False to ignore them.')
    return y


@contextlib.contextmanager
def preserve_state(encoder: Spikformer, time_steps: Optional[int] = None) -> Iterator[None]:
    """Disable gradients in the block, and restore time steps, BN statistics and the random state afterwards.

    Args:
        encoder: The model.
        time_steps: Number of time steps within the block; by default, that of the model.
    """
    before = encoder.time_steps
    if time_steps is not None:
        time_steps = check_time_steps(time_steps)
    device = next(encoder.parameters()).device
    fork_rng = torch.random.fork_rng([device] if device.type == 'cuda' else [])
    eager = torch.compiler.set_stance('force_eager')  # a compiled model would trace the hooks as part of the graph
    with torch.inference_mode(False), torch.no_grad(), eager, fork_rng, preserve_bn_statistics(encoder):
        try:
            encoder.time_steps = before if time_steps is None else time_steps
            yield
        finally:
            encoder.time_steps = before


def profile(
        model: nn.Module,
        data: Iterable[Any],
        time_steps: Optional[int] = None,
        conventions: Optional[Conventions] = None,
        cost: Union[str, CostModel, Tuple[float, float]] = 'fp32',
        accuracy: Optional[bool] = None,
        max_batches: Optional[int] = None,
) -> Profile:
    """Measure firing rates, operations and energy of a Spikformer in one pass over data.

    Memory use does not depend on the number of batches. The model runs in its current mode (eval or train, with or
    without autocast) and is not changed, including the running statistics of BN.

    Args:
        model: A Spikformer (V1 or V2) of timm, one wrapped by transformers or DDP, or a masked autoencoder, whose
            encoder is profiled with random masks.
        data: Batches, for example from a data loader: tensors, pairs (images, labels), or dicts with `pixel_values`
            and `labels`. Images are `[B, C, H, W]`, sequences `[B, T, C, H, W]`.
        time_steps: Number of time steps for images; by default, that of the model.
        conventions: Conventions for counting operations; by default, those of the papers.
        cost: Energy per operation: a key of `COST_MODELS` such as 'fp32' or 'int8', a pair of picojoules
            (multiply-accumulate, accumulate), or a `CostModel`.
        accuracy: Whether to compute accuracy; by default, if the data has labels.
        max_batches: Maximum number of batches, at least 1; by default all.

    Raises:
        ValueError: The model is not a Spikformer; there is no data; accuracy is requested but there are no labels or no
            classifier; the number of time steps of a sequence differs from `time_steps` or between batches; or an
            activation is NaN or infinite, in which case the message names the first such layer.
    """
    encoder = find_spikformer(model)
    if max_batches is not None:
        check_integer('max_batches', max_batches, 1)
    is_mae = any(isinstance(m, SpikformerMAE) for m in model.modules())
    predictions = _Predictions() if encoder.num_classes > 0 else None
    if accuracy and predictions is None:
        raise ValueError('Accuracy was requested, but the model has no classifier.')
    conventions, cost = conventions or Conventions(), cost_model(cost)
    recorder = Recorder(encoder, by_channel=is_mae)
    device = next(encoder.parameters()).device
    images, kind = 0, None
    with preserve_state(encoder, time_steps):
        for batch in itertools.islice([data] if isinstance(data, Tensor) else data, max_batches):
            x, y = _split_batch(batch)
            if len(x) == 0:
                continue
            is_sequence = x.ndim == 5
            steps = x.shape[1] if is_sequence else encoder.time_steps
            if is_sequence and time_steps is not None and steps != time_steps:
                raise ValueError(f'time_steps is {time_steps}, but the sequences have {steps} time steps. Omit it.')
            if kind not in (None, (is_sequence, steps)):
                raise ValueError(
                    f'Expected only images, or only sequences with the same number of time steps; got '
                    f'{"a sequence" if is_sequence else "images"} of {steps} after '
                    f'{"a sequence" if kind[0] else "images"} of {kind[1]} time steps.')
            kind = is_sequence, steps
            if predictions is not None:
                y = _check_labels(y, encoder.num_classes, accuracy)
            with recorder.record():
                model(x.to(device))
            if predictions is not None:
                tokens = recorder.output.transpose(2, 3).unsqueeze(-1)  # [T, B, D, N, 1]
                predictions.add(encoder.classify_steps(tokens), y)
            recorder.output = None
            images += len(x)
    if images == 0:
        raise ValueError('There is no data: the loader returned no images.')
    layer_counts = list(recorder.layer_counts.values())
    name = getattr(encoder, 'pretrained_cfg', {}).get('architecture', type(encoder).__name__)
    result = Profile(
        name, steps, images, is_sequence, any(t.neuron_spikes is None for t in layer_counts if t.spikes is not None),
        conventions, cost, layer_counts, predictions)
    if result.silent_layers:
        _logger.warning(
            'No neuron fires in %d of %d layers, such as %s, so the results are not meaningful. In eval mode, BN needs '
            'running statistics of the data: train for some steps, or load weights.', len(result.silent_layers),
            len(result.layers), result.silent_layers[0])
    return result
