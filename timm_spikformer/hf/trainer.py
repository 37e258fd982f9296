"""What stock Trainer lacks for a spiking network."""
import itertools
import logging
import os
from typing import Any, Dict, Optional

import torch
from spikingjelly.activation_based.monitor import OutputMonitor
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn
from transformers import Trainer, TrainerCallback

from ..neurons import LIF

__all__ = ['FiringRateCallback', 'ProfileCallback', 'SpikformerTrainer']

_logger = logging.getLogger(__name__)


class FiringRateCallback(TrainerCallback):
    """Logs firing rates with Trainer's own log, and warns where a layer falls silent or saturates.

    The rate, spikes per neuron and time step, is that of the training step that is logged: `firing_rate` for the mean
    over layers, and `firing_rate/NAME` for each.
    """

    def __init__(self, silent: float = 0.001, saturated: float = 0.9, log_layers: bool = True):
        """
        Args:
            silent: Rate below which a layer is reported as silent.
            saturated: Rate above which it is reported as saturated.
            log_layers: Log each layer's rate, not only the mean.
        """
        if not 0. <= silent < saturated <= 1.:
            raise ValueError(f'Expected 0 <= silent < saturated <= 1, got silent={silent} and saturated={saturated}.')
        self.silent = silent
        self.saturated = saturated
        self.log_layers = log_layers
        self.monitor: Optional[OutputMonitor] = None

    def on_train_begin(self, args, state, control, model: nn.Module = None, **kwargs) -> None:
        self.monitor = OutputMonitor(model, LIF, lambda spikes: spikes.detach().float().mean())
        self.monitor.disable()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        step = state.global_step + 1
        if step == 1 or step % max(1, state.logging_steps) == 0:
            self.monitor.clear_recorded_data()
            self.monitor.enable()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.monitor.disable()

    def on_log(self, args, state, control, logs: Optional[Dict[str, Any]] = None, **kwargs) -> None:
        if self.monitor is None or logs is None or 'loss' not in logs or not self.monitor.records:
            return
        rates = {name: float(self.monitor[name][0]) for name in self.monitor.monitored_layers}
        added = {'firing_rate': sum(rates.values()) / len(rates)}
        if self.log_layers:
            added.update({f'firing_rate/{name}': rate for name, rate in rates.items()})
        logs.update(added)  # for the callbacks that report
        state.log_history[-1].update(added)
        for name, rate in rates.items():
            if rate < self.silent or rate > self.saturated:
                what = 'silent' if rate < self.silent else 'saturated'
                _logger.warning(
                    'Step %d: the layer %s is %s, its firing rate is %.4f.', state.global_step, name, what, rate)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.monitor.remove_hooks()
        self.monitor = None


class ProfileCallback(TrainerCallback):
    """Profiles the model at each evaluation: rates and energy into Trainer's log, more and pictures into TensorBoard.

    Every process runs it, as the data loader is shared; the first one writes.
    """

    def __init__(self, max_batches: int = 4, tb_writer: Any = None, **options: Any):
        """
        Args:
            max_batches: Number of evaluation batches to run.
            tb_writer: A `SummaryWriter`; by default one in the folder of Trainer's own.
            options: Of `timm_spikformer.profiling.profile`: time_steps, conventions, cost.
        """
        if max_batches < 1:
            raise ValueError(f'max_batches must be at least 1, got {max_batches}.')
        self.max_batches = max_batches
        self.tb_writer = tb_writer
        self.options = options

    def on_evaluate(
            self,
            args,
            state,
            control,
            model: nn.Module = None,
            eval_dataloader=None,
            metrics: Optional[Dict[str, Any]] = None,
            **kwargs,
    ) -> None:
        from ..profiling import log_profile, look, profile
        batches = list(itertools.islice(eval_dataloader, self.max_batches))
        result = profile(model, batches, **self.options)
        added = {'profile/firing_rate': result.firing_rate, 'profile/energy_mj': result.totals.energy_mj}
        state.log_history[-1].update(added)
        if metrics is not None:
            metrics.update(added)
        if not state.is_world_process_zero:
            return
        if self.tb_writer is None:
            from torch.utils.tensorboard import SummaryWriter
            folder = os.getenv('TENSORBOARD_LOGGING_DIR') or os.path.join(args.output_dir, 'runs')
            self.tb_writer = SummaryWriter(os.path.join(os.path.expanduser(folder), 'profile'))
        samples = look(model, batches[0]['pixel_values'][:8], time_steps=self.options.get('time_steps'))
        log_profile(self.tb_writer, result, state.global_step, samples)


class SpikformerTrainer(Trainer):
    """Trainer with timm's parameter groups and, across GPUs, synchronised BN.

    Stock Trainer decays the weights of BN, which it does not know as a norm by their names, and has neither layer decay
    nor a conversion to SyncBatchNorm.
    """

    def __init__(self, *args, layer_decay: Optional[float] = None, sync_bn: bool = True, **kwargs):
        """
        Args:
            layer_decay: Factor of the learning rate from each layer to the one before, as for fine-tuning; the whole
                stem is layer 0.
            sync_bn: Convert BN to SyncBatchNorm where there are several processes with a GPU each.
        """
        super().__init__(*args, **kwargs)
        self.layer_decay = layer_decay
        if sync_bn and self.args.world_size > 1 and self.args.device.type == 'cuda':
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            self.model_wrapped = self.model

    def create_optimizer(self, model: Optional[nn.Module] = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_cls, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_cls(
                parameter_groups(model, self.args.weight_decay, self.args.learning_rate, self.layer_decay),
                **optimizer_kwargs)
        return self.optimizer


def parameter_groups(
        model: nn.Module,
        weight_decay: float,
        learning_rate: Optional[float] = None,
        layer_decay: Optional[float] = None,
) -> list:
    """Groups for an optimiser: no decay of BN, norms, biases and the mask token; with `layer_decay`, timm's groups."""
    if layer_decay is None:
        no_decay = {name for name, _ in model.named_parameters() if name.endswith('mask_token')}
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=no_decay)
    if learning_rate is None:
        raise ValueError('layer_decay needs a learning_rate, which it scales.')
    encoder = model.encoder
    if {id(p) for p in model.parameters()} != {id(p) for p in encoder.parameters()}:
        raise ValueError(f'layer_decay is for fine-tuning a classifier; {type(model).__name__} has a decoder.')
    groups = param_groups_layer_decay(encoder, weight_decay, layer_decay=layer_decay)
    for group in groups:
        group['lr'] = learning_rate * group.pop('lr_scale')
    return groups
