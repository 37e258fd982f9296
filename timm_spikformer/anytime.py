"""Anytime inference: run one time step at a time, and stop for each sample once its prediction is confident."""
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import check_number
from .network import find_spikformer
from .neurons import StatefulInference

__all__ = ['AnytimeOutput', 'predict_anytime']


class AnytimeOutput(NamedTuple):
    """Prediction for each sample, at the time step at which it stopped.

    >>> output = AnytimeOutput(torch.zeros(2, 10), steps=torch.tensor([1, 4]), time_steps=4)
    >>> output.skipped_fraction
    0.375
    """
    logits: Tensor  # [B, num_classes]
    steps: Tensor  # [B], number of time steps computed for each sample
    time_steps: int  # maximum number of time steps

    @property
    def skipped_fraction(self) -> float:
        """Fraction of the time steps that were not computed, in [0, 1)."""
        if len(self.steps) == 0:
            return 0.
        return 1. - self.steps.float().mean().item() / self.time_steps


def _logits_of(output: Any) -> Tensor:
    logits = getattr(output, 'logits', output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(
            f'The model must return logits [B, num_classes], or an output with such logits as its attribute logits; it '
            f'returned {type(output).__name__}{list(logits.shape) if isinstance(logits, Tensor) else ""}.')
    return logits


@torch.no_grad()
def predict_anytime(model: nn.Module, x: Tensor, confidence: float = 0.9) -> AnytimeOutput:
    """Classify one time step at a time; stop for each sample once its highest probability reaches `confidence`.

    Membrane potentials are carried from step to step, so each step is computed once, and only for remaining samples. A
    sample that stops after t steps gets the logits after t steps; after all steps, these equal the logits of `forward`.
    The whole `model`, including layers around the Spikformer, is called at each step. The model is not modified, and
    other threads can use it concurrently.

    Layers around the Spikformer must process each time step independently and in the same way, for example normalize
    pixels.

    The stopping criterion is specific to this project; the paper uses a fixed number of time steps.

    Args:
        model: A Spikformer with a classifier, or a module that contains one, in eval mode.
        x: Images `[B, C, H, W]`, presented for at most `time_steps` steps of the Spikformer, or sequences
            `[B, T, C, H, W]`.
        confidence: Probability after softmax, in (0, 1]. 1 is reached only by rounding.

    Raises:
        ValueError: The model has no classifier, is in train mode, or contains a module that `StatefulInference` cannot
            run; the shape of `x` is invalid, or `confidence` is out of range; or the probabilities of a sample are NaN.

    >>> import timm
    >>> model = timm.create_model('spikformer_v2_2_64_patch4_32', pretrained=True, time_steps=2).eval()
    >>> predict_anytime(model, torch.zeros(3, 3, 28, 28), confidence=0.01).steps
    tensor([1, 1, 1])
    """
    encoder = find_spikformer(model)
    check_number('confidence', confidence, above=0, maximum=1)
    if encoder.num_classes == 0:
        raise ValueError('predict_anytime requires a classifier; call reset_classifier(num_classes).')
    if x.ndim not in (4, 5):
        raise ValueError(f'Expected images [B, C, H, W] or sequences [B, T, C, H, W], got shape {list(x.shape)}.')
    is_sequence = x.ndim == 5
    time_steps = x.shape[1] if is_sequence else encoder.time_steps
    if time_steps == 0:
        raise ValueError(f'Expected sequences of at least one time step, got shape {list(x.shape)}.')
    stateful = StatefulInference(model)
    remaining = torch.arange(len(x), device=x.device)
    steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
    logits = None
    for t in range(time_steps):
        out = _logits_of(stateful(x[:, t:t + 1] if is_sequence else x))
        if logits is None:
            logits = torch.empty_like(out)
        logits[remaining] = out
        steps[remaining] = t + 1
        highest = out.float().softmax(-1).amax(-1)
        if highest.isnan().any():
            raise ValueError(
                f'The logits of {highest.isnan().sum()} of {len(highest)} samples contain NaN or infinity in time '
                f'step {t + 1}, so there is no prediction. Check the input and the weights of the model.')
        is_below = highest < confidence
        if not is_below.any():
            break
        if not is_below.all():
            below = is_below.nonzero().squeeze(1)
            x, remaining = x[below], remaining[below]
            stateful.select_samples(below)
    return AnytimeOutput(logits, steps, time_steps)
