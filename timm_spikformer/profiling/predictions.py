"""Predictions of a profiled model after each time step: agreement with the last step, confidence and accuracy."""
import dataclasses
from typing import Any, Iterator, List, Mapping, Optional

import torch
from torch import Tensor, nn

from ..network import Spikformer
from .recording import check_finite

__all__ = ['Predictions', 'classify_outputs', 'contains_logits']

_TOLERANCE = 0.02  # of the largest logit; a wrapper may compute in another dtype than the Spikformer


class Predictions:
    """Sums over all images of agreement, confidence and correct predictions: `[T]`, or 0 before the first batch."""

    def __init__(self) -> None:
        self.agreement = self.confidence = torch.zeros((), dtype=torch.float64)
        self.correct: Optional[Tensor] = torch.zeros((), dtype=torch.float64)  # None without labels

    def add(self, logits: Tensor, y: Optional[Tensor]) -> None:
        """Add a batch: logits after each time step `[T, B, K]`, and labels `[B]`."""
        confidence, predicted = logits.float().softmax(-1).cpu().max(-1)
        self.agreement = self.agreement + (predicted == predicted[-1]).sum(1)
        self.confidence = self.confidence + confidence.double().sum(1)
        self.correct = None if y is None or self.correct is None else self.correct + (predicted == y.cpu()).sum(1)


def classify_outputs(encoder: Spikformer, outputs: List[Tensor]) -> Tensor:
    """Return the logits after each time step, `[T, B, K]`.

    Args:
        encoder: The model.
        outputs: Outputs of the last block, `[T, B', N, D]`. There is one for each part of the batch that a wrapper of
            the model has processed separately.

    Raises:
        NonFiniteError: The logits contain NaN or infinity.
    """
    logits = torch.cat([encoder.classify_steps(x.transpose(2, 3).unsqueeze(-1)) for x in outputs], 1)
    check_finite(logits.float().softmax(-1).cpu(), 'output of head.fc')
    return logits


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif dataclasses.is_dataclass(output):
        yield from _tensors(vars(output))
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def contains_logits(output: Any, logits: Tensor, encoder: Spikformer) -> bool:
    """Return whether the output of a model is, or contains, the logits of its Spikformer, `[B, K]`.

    Dropout before the classifier is random, so in train mode with such dropout only the shape is compared.
    """
    is_random = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in encoder.head.modules())
    expected = logits.float()
    atol = _TOLERANCE * expected.abs().max().item()
    return any(
        x.shape == logits.shape and (is_random or torch.allclose(x.to(expected), expected, rtol=0., atol=atol))
        for x in _tensors(output))
