"""Anytime inference: classify step by step, and stop for each sample as soon as the prediction is confident."""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .neurons import carry_membranes
from .spikformer import find_spikformer

__all__ = ['AnytimeOutput', 'predict_anytime']


class AnytimeOutput(NamedTuple):
    """What is known when each sample has stopped."""
    logits: Tensor  # [B, num_classes]
    steps: Tensor  # [B], time steps that each sample has taken
    time_steps: int  # that each could have taken

    @property
    def saving(self) -> float:
        """Share of the time steps that were not taken."""
        return 1. - self.steps.float().mean().item() / self.time_steps


def predict_anytime(model: nn.Module, x: Tensor, confidence: float = 0.9) -> AnytimeOutput:
    """Classify, a time step at a time; a sample leaves the batch once its highest probability reaches `confidence`.

    The membranes are carried from step to step, so each step is computed once, and only for the samples that are left.
    A sample that takes all steps gets the logits of the ordinary forward, one that takes t those after t steps. When to
    stop is this project's choice; the paper knows a fixed number of steps only.

    Args:
        model: A Spikformer with a classifier, in eval mode, or what holds one.
        x: Images `[B, C, H, W]`, for up to the model's time steps, or sequences `[B, T, C, H, W]`.
        confidence: Probability in (0, 1] after a softmax; 1 is reached by rounding only.

    Raises:
        ValueError: The model has no classifier or is in train mode, or the confidence is out of its range.
    """
    encoder = find_spikformer(model)
    if not 0. < confidence <= 1.:
        raise ValueError(f'confidence must be a probability greater than 0 and at most 1, got {confidence}.')
    if encoder.num_classes == 0:
        raise ValueError('The model has no classifier to be confident. Give it one by reset_classifier(num_classes).')
    if encoder.training:
        raise ValueError('The model is in train mode, in which BN mixes samples and time steps. Call eval() first.')
    time_steps = x.shape[1] if x.ndim == 5 else encoder.time_steps
    left = torch.arange(len(x), device=x.device)
    steps = torch.zeros(len(x), dtype=torch.long, device=x.device)
    features = logits = None
    before = encoder.time_steps
    encoder.time_steps = 1
    try:
        with carry_membranes(encoder) as membranes:
            for t in range(time_steps):
                new = encoder.forward_features(x[:, t:t + 1] if x.ndim == 5 else x)  # [B, D, H, W]
                features = new if features is None else features + new
                out = encoder.forward_head(features / (t + 1))
                if logits is None:
                    logits = torch.empty_like(out)
                logits[left] = out
                steps[left] = t + 1
                unsure = (out.float().softmax(-1).amax(-1) < confidence).nonzero().squeeze(1)
                if len(unsure) == 0:
                    break
                if len(unsure) < len(left):
                    x, features, left = x[unsure], features[unsure], left[unsure]
                    membranes.keep(unsure)
    finally:
        encoder.time_steps = before
    return AnytimeOutput(logits, steps, time_steps)
