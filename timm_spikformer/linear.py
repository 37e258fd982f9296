"""Baseline: logistic regression on pixels."""
from typing import Any, Dict, Optional, Tuple

import torch
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional as F

from .images import Images, make_loader, to_pixels

__all__ = ['fit_linear']


def fit_linear(train: Images, test: Images, config: Dict[str, Any], device: torch.device) -> Optional[float]:
    """Fit logistic regression on pixels with L-BFGS, and return its test accuracy in percent.

    Pixels are scaled to the range 0 to 1. For event sequences, the features are the counts of all frames. The
    regularization is scikit-learn's default (L2, C = 1). Return None for large datasets, for which fitting would take
    longer than training.
    """
    features = next(iter(make_loader(train, config, 1, device)))[0].numel()
    if features * len(train.classes) > 100_000 or features * len(train) > 100_000_000:
        return None

    def pixels(images: Images) -> Tuple[Tensor, Tensor]:
        batches = [(to_pixels(x, config), y) for x, y in make_loader(images, config, 500, device)]
        x, y = (torch.cat(parts) for parts in zip(*batches))
        if torch.equal(x, x[:, :1].expand_as(x)):  # grayscale: keep one channel
            x = x[:, :1]
        return x.flatten(1), y

    x, y = pixels(train)
    classifier = nn.Linear(x.shape[1], len(train.classes), device=device)
    nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(x), y) + classifier.weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    x, y = pixels(test)
    with torch.no_grad():
        return accuracy(classifier(x), y)[0].item()
