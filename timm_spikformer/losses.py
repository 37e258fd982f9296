"""Losses on the logits of each time step."""
from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import check_finite, check_rate

__all__ = ['TETLoss']


class TETLoss(nn.Module):
    """Temporal efficient training (TET), https://arxiv.org/abs/2202.11946.

    `(1 - weight) * mean_t CE(logits_t, target) + weight * mean (logits - constant)^2`: the cross-entropy at each time
    step, and a regularization term that reduces the distance of all logits from one constant, and thereby outliers at
    single time steps. The usual loss, in contrast, is the cross-entropy of the mean of the logits over time. The
    defaults are those of the authors' code.

    Args:
        weight: Weight of the second term, at least 0 and less than 1.
        constant: Target value of all logits in the second term.
        label_smoothing: Label smoothing of the cross-entropy, at least 0 and less than 1.

    Raises:
        ValueError: An argument is out of its range.

    >>> import timm
    >>> model = timm.create_model('test_spikformer_v2', num_classes=10, time_steps=2)
    >>> logits = model.forward_steps(torch.rand(3, 3, 64, 64), cumulative=False)
    >>> TETLoss()(logits, torch.tensor([0, 1, 2])).shape
    torch.Size([])
    """

    def __init__(self, weight: float = 1e-3, constant: float = 1., label_smoothing: float = 0.):
        super().__init__()
        check_rate('weight', weight)
        check_rate('label_smoothing', label_smoothing)
        check_finite('constant', constant)
        self.weight = weight
        self.constant = constant
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss, a scalar.

        Args:
            logits: Logits of each time step, `[T, B, K]`, from `forward_steps(x, cumulative=False)`.
            target: Class indices `[B]`, or probabilities `[B, K]`, such as those of Mixup.

        Raises:
            ValueError: The logits are not `[T, B, K]`, or the batch sizes differ.
        """
        if logits.ndim != 3 or not len(logits) or target.shape not in (logits.shape[1:2], logits.shape[1:]):
            raise ValueError(
                f'Expected logits [T, B, K], from forward_steps(x, cumulative=False), and targets [B] or [B, K], got '
                f'logits {list(logits.shape)} and targets {list(target.shape)}.')
        logits = logits.float()
        steps = logits.shape[0]
        targets = target.repeat(steps, *(1,) * (target.ndim - 1))
        loss = F.cross_entropy(logits.flatten(0, 1), targets, label_smoothing=self.label_smoothing)
        return (1. - self.weight) * loss + self.weight * (logits - self.constant).square().mean()
