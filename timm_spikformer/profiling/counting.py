"""Measure firing rates, operations and energy of a Spikformer on data: `profile` and its result."""
import contextlib
import dataclasses
import itertools
import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from ..arguments import check_integer
from ..kernels.eager import force_eager
from ..masked_autoencoder import SpikformerMAE
from ..network import Spikformer, find_spikformer
from ..recompute import preserve_bn_statistics
from ..sequences import check_time_steps
from .batches import check_labels, check_layout, split_batch
from .conventions import Conventions, CostModel, check_conventions, to_cost_model
from .operations import count_operations
from .predictions import Predictions, classify_outputs, contains_logits
from .recording import LayerCounts, Recorder

__all__ = [
    'GROUPS', 'LayerProfile', 'Profile', 'StepProfile', 'Totals', 'describe_silent_layers', 'find_autoencoder',
    'measurement_context', 'profile']

GROUPS = ('stem', 'attention', 'mlp', 'head')

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
            in spikingjelly's SimpleEnergyProfiler. The default cost model and most others ignore it.
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

    All lists have one entry per time step. `silent` and `saturated` are fractions of channels instead of neurons if
    `Profile.by_channel` is true.

    Args:
        name: Module name in the timm model.
        group: 'stem', 'attention', 'mlp' or 'head'.
        input: Type of the input: 'image', 'spikes', 'sums' (of spikes), 'features' (mean over time steps), or 'real'
            for a layer whose attribute `has_real_input` is true.
        parameters: Number of parameters, including those of BN.
        dense_macs: Multiply-accumulates per image and time step without sparsity.
        input_rate: Mean of the input; None unless it consists of spikes or sums of spikes.
        operand_rates: Firing rates of q, k and v; None except for attention.
        values: Fraction of the inputs that have each value (0, 1, 2, ...), over all time steps; None unless the input
            consists of sums of spikes.
        firing_rate: Spikes per neuron; None for layers without neurons, such as the classifier.
        silent: Fraction of the neurons that never fired; None for layers without neurons.
        saturated: Fraction of the neurons that fired at every time step of every image; None for layers without
            neurons.
        macs: Multiply-accumulates per image, according to the conventions.
        acs: Accumulates per image, according to the conventions.
        memory_bytes: Bytes of weights, biases and membranes read and written per image; see `Totals`.
        energy_mj: Energy per image in millijoules.
        ann_energy_mj: Energy per image in millijoules of the dense multiply-accumulates of one time step.
        milliseconds: Time per image in milliseconds, measured by `measure_times`; None if it was not measured.
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
        """Mean of `firing_rate` over the time steps; None for layers without neurons."""
        return None if self.firing_rate is None else sum(self.firing_rate) / len(self.firing_rate)


@dataclass(frozen=True)
class StepProfile:
    """Predictions after a time step, and the energy used up to then.

    Args:
        step: Number of the time step, starting at 1.
        energy_mj: Energy per image in millijoules if inference stops after this step, including the classifier.
        agreement: Fraction of the images with the same prediction as after the last step.
        confidence: Mean of the highest class probability.
        accuracy: Fraction (0 to 1, not percent) of the images that are classified correctly; None without labels.

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


def _rate(counts: Iterable[Tuple[Tensor, float]]) -> List[float]:
    """Return the mean at each time step of values given as pairs (sums `[T]`, number of values per time step)."""
    totals, numbers = zip(*counts)
    return (sum(totals) / sum(numbers)).tolist()


@dataclass(frozen=True)
class Profile:
    """Result of `profile`. `with_conventions` applies other conventions or energies without running the model again.

    `profile` creates the objects of this class; `_layer_counts` and `_predictions` are sums that it records, from which
    all properties are computed.

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
    >>> result.with_conventions(cost='int8').totals.energy_mj < result.totals.energy_mj
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
    _predictions: Optional[Predictions] = dataclasses.field(repr=False)
    times: Dict[str, Dict[str, float]] = dataclasses.field(default_factory=dict, repr=False)

    def with_conventions(
            self,
            *,
            cost: Union[str, CostModel, Tuple[float, float], None] = None,
            **conventions: str,
    ) -> 'Profile':
        """Return this profile with other conventions or another cost model. All arguments are keywords.

        Args:
            cost: Cost model, as in `profile`; by default, that of this profile.
            conventions: Options of `Conventions` to change, such as `residual='mac'`.

        Raises:
            ValueError: The cost model, or the name or value of an option is invalid.
        """
        names = [field.name for field in dataclasses.fields(Conventions)]
        for name in conventions:
            if name not in names:
                raise ValueError(f'Unknown option {name!r}. Expected cost or one of {", ".join(names)}.')
        return dataclasses.replace(
            self,
            conventions=dataclasses.replace(self.conventions, **conventions),
            cost=self.cost if cost is None else to_cost_model(cost),
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
        raise ValueError(f'Unknown layer {name!r}. Expected one of {", ".join(x.name for x in self.layers)}.')

    def _layer(self, counts: LayerCounts) -> LayerProfile:
        n, attention = self.images, counts.attention
        dense_macs, macs, acs, memory = count_operations(counts, self.conventions, self.time_steps, self.is_sequence)
        has_neurons = counts.spikes is not None
        has_input_rate = counts.input in ('spikes', 'sums') and attention is None
        spike_counts = counts.channel_spikes if counts.neuron_spikes is None else counts.neuron_spikes
        num_inputs = sum(counts.value_counts.values())
        return LayerProfile(
            name=counts.name,
            group=counts.group,
            input=counts.input,
            parameters=counts.parameters,
            dense_macs=dense_macs / n,
            input_rate=_rate((x.total, x.numel) for x in counts.inputs.values()) if has_input_rate else None,
            operand_rates=None if attention is None else {
                name: _rate((getattr(x, name), x.numel) for x in attention.values()) for name in ('q', 'k', 'v')},
            values={x: m / num_inputs for x, m in sorted(counts.value_counts.items())} if num_inputs else None,
            firing_rate=(counts.spikes / counts.output_numel).tolist() if has_neurons else None,
            silent=spike_counts.silent if has_neurons else None,
            saturated=spike_counts.saturated if has_neurons else None,
            macs=(macs / n).tolist(),
            acs=(acs / n).tolist(),
            memory_bytes=(memory / n).tolist(),
            energy_mj=self.cost.energy_mj(*(x.sum().item() for x in (macs, acs, memory))) / n,
            ann_energy_mj=self.cost.energy_mj(
                dense_macs, 0., 0. if attention is not None else counts.weight_bytes * dense_macs) / n,
        )

    def _sum(self, layers: Iterable[LayerProfile]) -> Totals:
        layers = list(layers)
        return Totals(
            parameters=sum(x.parameters for x in layers),
            dense_macs=sum(x.dense_macs for x in layers),
            macs=sum(sum(x.macs) for x in layers),
            acs=sum(sum(x.acs) for x in layers),
            memory_bytes=sum(sum(x.memory_bytes) for x in layers),
            energy_mj=sum(x.energy_mj for x in layers),
            ann_energy_mj=sum(x.ann_energy_mj for x in layers),
        )

    @cached_property
    def totals(self) -> Totals:
        """Totals of the model, or of the encoder of a masked autoencoder."""
        return self._sum(self.layers)

    @cached_property
    def groups(self) -> Dict[str, Totals]:
        """Totals of the layers of each group (stem, attention, mlp, head). Groups without layers are omitted."""
        groups = {name: [x for x in self.layers if x.group == name] for name in GROUPS}
        return {name: self._sum(layers) for name, layers in groups.items() if layers}

    @property
    def firing_rate(self) -> float:
        """Mean of the firing rates (spikes per neuron and time step) of the layers."""
        rates = [x.mean_firing_rate for x in self.layers if x.firing_rate is not None]
        return sum(rates) / len(rates)

    @property
    def acs_per_dense_mac(self) -> float:
        """Ratio of accumulates to T times dense multiply-accumulates, over the layers that perform accumulates.

        With the default conventions, this is the mean input rate of these layers, weighted by their dense operations. A
        published energy, divided by the energy of T times the dense operations, gives the same quantity. It is 0 if no
        layer performs accumulates.
        """
        layers = [x for x in self.layers if any(x.acs)]
        if not layers:
            return 0.
        return sum(sum(x.acs) for x in layers) / (self.time_steps * sum(x.dense_macs for x in layers))

    @property
    def accuracy(self) -> Optional[float]:
        """Fraction (0 to 1, not percent) of the images classified correctly after all steps; None without labels."""
        return self.steps[-1].accuracy

    @property
    def silent_layers(self) -> List[str]:
        """Names of the spiking layers that emitted no spikes."""
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


def describe_silent_layers(profile: Profile) -> Optional[str]:
    """Return a sentence that warns of layers without spikes; None if all spiking layers emit spikes."""
    silent = profile.silent_layers
    if not silent:
        return None
    count = sum(x.firing_rate is not None for x in profile.layers)
    verb = 'emits' if len(silent) == 1 else 'emit'
    return (
        f'{len(silent)} of the {count} spiking layers {verb} no spikes (for example {silent[0]}), so firing rates and '
        f'energy may not be meaningful.')


def find_autoencoder(model: nn.Module) -> Optional[SpikformerMAE]:
    """Return the masked autoencoder in a module; None if there is none."""
    return next((m for m in model.modules() if isinstance(m, SpikformerMAE)), None)


@contextlib.contextmanager
def measurement_context(encoder: Spikformer, time_steps: Optional[int] = None) -> Iterator[None]:
    """Run a model without gradients and compilation in the block, so that recording leaves the model unchanged.

    The number of time steps, BN's running statistics and the random state are restored afterwards.

    Args:
        encoder: The model.
        time_steps: Number of time steps within the block; by default, that of the model.
    """
    before = encoder.time_steps
    time_steps = before if time_steps is None else check_time_steps(time_steps)
    device = next(encoder.parameters()).device
    fork_rng = torch.random.fork_rng([device] if device.type == 'cuda' else [])
    # in inference mode, a dispatch mode receives linear and conv2d instead of the products that they consist of
    no_inference_mode = torch.inference_mode(False)
    with no_inference_mode, torch.no_grad(), force_eager(), fork_rng, preserve_bn_statistics(encoder):
        try:
            encoder.time_steps = time_steps
            yield
        finally:
            encoder.time_steps = before


def _without_predictions(model: nn.Module, y: Optional[Tensor]) -> None:
    """Warn that predictions cannot be evaluated, or raise a ValueError if there are labels."""
    message = (
        f"The output of the {type(model).__name__} differs from the logits of its Spikformer, so the Spikformer's "
        f'predictions are not those of the model.')
    if y is not None:
        raise ValueError(f'{message} Profile the Spikformer itself, or use accuracy=False to ignore the labels.')
    _logger.warning('%s The profile has no agreement, confidence and accuracy.', message)


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
    without autocast) and is not changed, including the running statistics of BN. In train mode, a spike that dropout or
    stochastic depth has scaled counts as one spike.

    Agreement, confidence and accuracy require a model whose output is the logits of its Spikformer. If a wrapper
    changes the logits, there is a warning and no such values, or an error if there are labels.

    Args:
        model: A Spikformer (V1 or V2) of timm, one wrapped by transformers or DDP, or a masked autoencoder, whose
            encoder is profiled with random masks.
        data: Batches, for example from a data loader: tensors, pairs (images, labels), or dicts with `pixel_values`
            and `labels`. Images are `[B, C, H, W]`, sequences `[B, T, C, H, W]`, and labels are tensors of class
            indices `[B]`. A single tensor counts as one batch.
        time_steps: Number of time steps for images; by default, that of the model.
        conventions: Conventions for counting operations; by default, those of the papers.
        cost: Energy per operation: a key of `COST_MODELS` such as 'fp32' or 'int8', a pair of picojoules
            (multiply-accumulate, accumulate), or a `CostModel`.
        accuracy: Whether to compute accuracy; by default, if the data has class indices as labels. False ignores the
            labels.
        max_batches: Maximum number of batches, at least 1; by default all.

    Raises:
        ValueError: The model is not a Spikformer, or has layers whose operations cannot be counted: quantized layers,
            adapters that are not merged, or inputs that are not spikes; an option is invalid; there is no data; a batch
            or its labels are invalid; accuracy is requested but there are no labels or no classifier; a wrapper changes
            the logits of labeled images, or time steps; the number of time steps of a sequence differs from
            `time_steps` or between batches; or an activation is NaN or infinite, in which case the message names the
            first such layer.
    """
    encoder = find_spikformer(model)
    if max_batches is not None:
        check_integer('max_batches', max_batches, 1)
    if accuracy and encoder.num_classes == 0:
        raise ValueError('Accuracy was requested, but the model has no classifier.')
    conventions, cost = check_conventions(conventions), to_cost_model(cost)
    if not isinstance(data, Iterable):
        raise ValueError(f'Expected a tensor of images, or an iterable of batches, got {type(data).__name__}.')
    predictions = Predictions() if encoder.num_classes > 0 else None
    recorder = Recorder(encoder, by_channel=find_autoencoder(model) is not None)
    device = next(encoder.parameters()).device
    images, layout = 0, None
    with measurement_context(encoder, time_steps):
        for batch in itertools.islice([data] if isinstance(data, Tensor) else data, max_batches):
            x, y = split_batch(batch)
            if len(x) == 0:
                continue
            layout = check_layout(x, encoder.time_steps, time_steps, layout)
            if predictions is not None:
                y = check_labels(y, len(x), encoder.num_classes, accuracy)
            with recorder.record():
                output = model(x.to(device))
            recorder.check_time_steps(layout.time_steps, layout.is_sequence)
            if predictions is not None:
                logits = classify_outputs(encoder, recorder.outputs)
                if contains_logits(output, logits[-1], encoder):
                    predictions.add(logits, y)
                else:
                    predictions = _without_predictions(model, y)
            recorder.outputs.clear()
            images += len(x)
    if layout is None:
        raise ValueError('`data` contains no images.')
    layer_counts = list(recorder.layer_counts.values())
    result = Profile(
        model=getattr(encoder, 'pretrained_cfg', {}).get('architecture', type(encoder).__name__),
        time_steps=layout.time_steps,
        images=images,
        is_sequence=layout.is_sequence,
        by_channel=any(x.neuron_spikes is None for x in layer_counts if x.spikes is not None),
        conventions=conventions,
        cost=cost,
        _layer_counts=layer_counts,
        _predictions=predictions,
    )
    warning = describe_silent_layers(result)
    if warning is not None:
        _logger.warning(
            '%s In eval mode, BN needs running statistics of the data: train for some steps, or load weights.', warning)
    return result
