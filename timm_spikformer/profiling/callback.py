"""Callback that profiles a model during training with transformers' Trainer."""
import itertools
import logging
import os
from typing import Any, Dict, Optional

from torch import nn
from transformers import TrainerCallback

from ..arguments import check_integer
from .activity import record_activity
from .conventions import check_conventions, to_cost_model
from .counting import profile
from .recording import NonFiniteError
from .tensorboard import log_profile

__all__ = ['ProfileCallback']

_OPTIONS = ('time_steps', 'conventions', 'cost', 'accuracy')

_logger = logging.getLogger(__name__)


class ProfileCallback(TrainerCallback):
    """Profile the model at each evaluation.

    Firing rate and energy (mJ per image) are added to Trainer's log; details and pictures are written to TensorBoard.
    All processes run the profile because the data loader is shared; only the main process writes to TensorBoard. If an
    activation is NaN or infinite, as after a training that has diverged, a warning replaces the profile.

    >>> import tempfile, timm, torch
    >>> from transformers import PrinterCallback, Trainer, TrainingArguments
    >>> from timm_spikformer import SpikformerConfig, SpikformerForImageClassification
    >>> model = SpikformerForImageClassification(SpikformerConfig.from_timm(timm.create_model('test_spikformer_v2')))
    >>> examples = [dict(pixel_values=torch.rand(3, 64, 64), labels=0) for _ in range(2)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = TrainingArguments(folder, report_to='none', use_cpu=True, disable_tqdm=True)
    ...     trainer = Trainer(model, args, eval_dataset=examples, callbacks=[ProfileCallback(max_batches=1)])
    ...     trainer.remove_callback(PrinterCallback)
    ...     metrics = trainer.evaluate()
    >>> metrics['profile/energy_mj'] > 0
    True
    """

    def __init__(self, max_batches: int = 4, tb_writer: Any = None, **options: Any):
        """
        Args:
            max_batches: Maximum number of evaluation batches to profile.
            tb_writer: A `SummaryWriter`; by default, one that writes to Trainer's TensorBoard folder.
            options: Options of `timm_spikformer.profiling.profile`: time_steps, conventions, cost, accuracy.

        Raises:
            ValueError: The name or value of an option is invalid.
        """
        for name in options:
            if name not in _OPTIONS:
                raise ValueError(f'Unknown option {name!r}. Expected one of {", ".join(_OPTIONS)}.')
        check_conventions(options.get('conventions'))
        to_cost_model(options.get('cost', 'fp32'))
        self.max_batches = check_integer('max_batches', max_batches, 1)
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
        batches = list(itertools.islice(eval_dataloader, self.max_batches))
        try:
            result = profile(model, batches, **self.options)
        except NonFiniteError as e:
            _logger.warning('Step %d: there is no profile. %s', state.global_step, e)
            return
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
        activity = record_activity(
            model, batches[0]['pixel_values'][:8], time_steps=self.options.get('time_steps'))
        log_profile(self.tb_writer, result, state.global_step, activity)
