"""Callbacks and a Trainer for spiking networks."""
import logging
import math
from typing import Any, Dict, Optional

import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from transformers import Trainer, TrainerCallback

from ..arguments import check_number
from ..monitor import FiringRateMonitor
from .modeling_spikformer import SpikformerForImageClassification

__all__ = ['FiringRateCallback', 'SpikformerTrainer']

_logger = logging.getLogger(__name__)


class FiringRateCallback(TrainerCallback):
    """Add firing rates to Trainer's log, and warn about layers that are silent or saturated, or whose spikes are NaN.

    Rates (spikes per neuron and time step) are those of the logged training step: `firing_rate` is the mean over
    layers, `firing_rate/NAME` the rate of one layer.

    >>> import tempfile, timm
    >>> from transformers import PrinterCallback, TrainingArguments
    >>> from timm_spikformer import SpikformerConfig, SpikformerForImageClassification
    >>> model = SpikformerForImageClassification(SpikformerConfig.from_timm(timm.create_model('test_spikformer_v2')))
    >>> examples = [dict(pixel_values=torch.rand(3, 64, 64), labels=0) for _ in range(2)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = TrainingArguments(
    ...         folder, max_steps=1, logging_steps=1, save_strategy='no', report_to='none', use_cpu=True,
    ...         disable_tqdm=True)
    ...     trainer = Trainer(model, args, train_dataset=examples, callbacks=[FiringRateCallback(silent=0.)])
    ...     trainer.remove_callback(PrinterCallback)
    ...     output = trainer.train()
    >>> 0 <= trainer.state.log_history[0]['firing_rate'] < 1
    True
    """

    def __init__(self, silent: float = 0.001, saturated: float = 0.9, log_layers: bool = True):
        """
        Args:
            silent: Rate below which a layer is reported as silent.
            saturated: Rate above which a layer is reported as saturated.
            log_layers: Log the rate of each layer, not only the mean.
        """
        for name, value in (('silent', silent), ('saturated', saturated)):
            check_number(name, value, maximum=1)
        if silent >= saturated:
            raise ValueError(f'Expected 0 <= silent < saturated <= 1, got silent={silent} and saturated={saturated}.')
        self.silent = silent
        self.saturated = saturated
        self.log_layers = log_layers
        self.monitor: Optional[FiringRateMonitor] = None

    def on_train_begin(self, args, state, control, model: nn.Module = None, **kwargs) -> None:
        self.monitor = FiringRateMonitor(model)
        self.monitor.enabled = False

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        step = state.global_step + 1
        if step == 1 or step % max(1, state.logging_steps) == 0:
            self.monitor.reset()
            self.monitor.enabled = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.monitor.enabled = False

    def on_log(self, args, state, control, logs: Optional[Dict[str, Any]] = None, **kwargs) -> None:
        if self.monitor is None or logs is None or 'loss' not in logs:
            return
        rates = self.monitor.rates
        if not rates:
            return
        added = {'firing_rate': self.monitor.mean}
        if self.log_layers:
            added.update({f'firing_rate/{name}': rate for name, rate in rates.items()})
        logs.update(added)  # for reporting callbacks
        state.log_history[-1].update(added)
        bad = [name for name, rate in rates.items() if not math.isfinite(rate)]
        if bad:
            _logger.warning(
                'Step %d: the spikes of %d of %d layers are NaN, first in %s, because a current is NaN or infinite.',
                state.global_step, len(bad), len(rates), bad[0])
        for name, rate in rates.items():
            if rate < self.silent or rate > self.saturated:
                what = 'silent' if rate < self.silent else 'saturated'
                _logger.warning(
                    'Step %d: the layer %s is %s, its firing rate is %.4f.', state.global_step, name, what, rate)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.monitor.close()
        self.monitor = None


class SpikformerTrainer(Trainer):
    """Trainer with timm's parameter groups and, across GPUs, synchronized BN.

    transformers' Trainer applies weight decay to BN, because it does not recognize the parameter names as those of a
    norm, and supports neither layer decay nor SyncBatchNorm.

    >>> import tempfile, timm
    >>> from transformers import TrainingArguments
    >>> from timm_spikformer import SpikformerConfig, SpikformerForImageClassification
    >>> model = SpikformerForImageClassification(SpikformerConfig.from_timm(timm.create_model('test_spikformer_v2')))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = TrainingArguments(folder, learning_rate=1e-3, report_to='none', use_cpu=True)
    ...     trainer = SpikformerTrainer(model, args, layer_decay=0.5)
    >>> [f'{lr:.2e}' for lr in sorted({group['lr'] for group in trainer.create_optimizer().param_groups})]
    ['1.25e-04', '2.50e-04', '5.00e-04', '1.00e-03']
    """

    def __init__(
            self,
            *args,
            layer_decay: Optional[float] = None,
            sync_bn: bool = True,
            step_loss: Optional[nn.Module] = None,
            **kwargs,
    ):
        """
        Args:
            layer_decay: Ratio of the learning rate of each layer to that of the next layer, greater than 0 and at most
                1, for fine-tuning; the whole stem is layer 0. None for no layer decay.
            sync_bn: Convert BN to SyncBatchNorm if there are several processes, each with a GPU.
            step_loss: Loss on the logits of each time step, such as `TETLoss`, for a `SpikformerForImageClassification`
                in place of the loss on the logits after all steps.

        Raises:
            ValueError: `layer_decay` is out of range, or `step_loss` is combined with another model or with the label
                smoothing of the training arguments.
        """
        _check_layer_decay(layer_decay)
        super().__init__(*args, **kwargs)
        if step_loss is not None and not any(
                isinstance(m, SpikformerForImageClassification) for m in self.model.modules()):
            raise ValueError(
                f'step_loss requires a SpikformerForImageClassification, which returns the logits of each time step, '
                f'got a {type(self.model).__name__}.')
        if step_loss is not None and self.args.label_smoothing_factor:
            raise ValueError(
                f'label_smoothing_factor={self.args.label_smoothing_factor} has no effect on step_loss. Set the label '
                f'smoothing of the loss itself: TETLoss(label_smoothing=...).')
        self.layer_decay = layer_decay
        self.step_loss = step_loss
        if sync_bn and self.args.world_size > 1 and self.args.device.type == 'cuda':
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self.model_wrapped = self.model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.step_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop('labels', None)
        if labels is None:
            raise ValueError(
                f"step_loss requires labels, but the samples contain only {', '.join(inputs)}. Add the key 'labels' to "
                f'the samples, or omit step_loss.')
        outputs = dict(model(**inputs, output_step_logits=True))
        loss = self.step_loss(outputs.pop('step_logits'), labels)
        return (loss, {'loss': loss, **outputs}) if return_outputs else loss

    def create_optimizer(self, model: Optional[nn.Module] = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_cls, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_cls(
                parameter_groups(model, self.args.weight_decay, self.args.learning_rate, self.layer_decay),
                **optimizer_kwargs)
        return self.optimizer


def _check_layer_decay(layer_decay: Optional[float]) -> None:
    if layer_decay is not None:  # other values would freeze the lower layers, or train them faster than the classifier
        check_number('layer_decay', layer_decay, above=0, maximum=1)


def parameter_groups(
        model: nn.Module,
        weight_decay: float,
        learning_rate: Optional[float] = None,
        layer_decay: Optional[float] = None,
) -> list:
    """Return parameter groups for an optimizer, without weight decay for BN, norms, biases and the mask token.

    With `layer_decay`, these are timm's layer groups, each with its own learning rate.

    Raises:
        ValueError: `layer_decay` is out of range, or given without `learning_rate`, or for a model with a decoder.
    """
    _check_layer_decay(layer_decay)
    if layer_decay is None:
        no_decay = {name for name, _ in model.named_parameters() if name.endswith('mask_token')}
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay)
    if learning_rate is None:
        raise ValueError('layer_decay requires a learning_rate, which it scales.')
    encoder = model.encoder
    if {id(p) for p in model.parameters()} != {id(p) for p in encoder.parameters()}:
        raise ValueError(f'layer_decay is for fine-tuning a classifier; {type(model).__name__} has a decoder.')
    groups = param_groups_layer_decay(encoder, weight_decay, layer_decay=layer_decay)
    for group in groups:
        group['lr'] = learning_rate * group.pop('lr_scale')
    return groups
