"""Baseline: logistic regression on pixels."""
from typing import Any, Dict, Optional, Tuple

import torch
from timm.utils import accuracy
from torch import Tensor, nn
from torch.nn import functional as F

from .images import Images, make_loader, to_pixels

__all__ = ['fit_linear']

_MAX_WEIGHTS = 100_000
_MAX_VALUES = 100_000_000  # 400 MB in float32


def fit_linear(train: Images, test: Images, config: Dict[str, Any], device: torch.device) -> Optional[float]:
    """Fit logistic regression on pixels with L-BFGS, and return its test accuracy in percent.

    Pixels are scaled to the range 0 to 1. For event sequences, the features are the counts of all frames. The
    regularization is scikit-learn's default (L2, C = 1). Return None if there are more than 100,000
    weights or 100 million input values (including all channels), for which fitting would take longer than training.
    """
    features = next(iter(make_loader(train, config, 1, device)))[0].numel()
    if features * len(train.classes) > _MAX_WEIGHTS or features * len(train) > _MAX_VALUES:
        return None

    def pixels(images: Images) -> Tuple[Tensor, Tensor]:
        batches = [(to_pixels(x, config), y) for x, y in make_loader(images, config, 500, device)]
        return tuple(torch.cat(parts) for parts in zip(*batches))

    (x, y), (x_test, y_test) = pixels(train), pixels(test)
    if x.ndim == 4 and all(torch.equal(images, images[:, :1].expand_as(images)) for images in (x, x_test)):
        x, x_test = x[:, :1], x_test[:, :1]  # grayscale: keep one channel
    x, x_test = x.flatten(1), x_test.flatten(1)
    classifier = nn.Linear(x.shape[1], len(train.classes), device=device)
    nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(x), y) + classifier.weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return accuracy(classifier(x_test), y_test)[0].item()
