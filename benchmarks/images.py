"""Photographs as inputs, and parameters of BN with which the neurons of models with random weights fire."""
from importlib import resources
from typing import Dict

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.transforms import v2


def open_photographs() -> Dict[str, Image.Image]:
    """Return scikit-learn's two sample photographs, 640x427, by name."""
    folder = resources.files('sklearn.datasets.images')
    return {name: Image.open(str(folder.joinpath(f'{name}.jpg'))).convert('RGB') for name in ('china', 'flower')}


def crop_photographs(count: int, size: int) -> Tensor:
    """Return normalized random crops of the photographs, `[count, 3, size, size]`; they are the same in every call."""
    sources = list(open_photographs().values())
    transform = v2.Compose([
        v2.ToImage(), v2.RandomResizedCrop(size, (0.3, 1.0)), v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = [transform(sources[i % len(sources)]) for i in range(count)]
    return torch.stack(images).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def make_neurons_fire(model: nn.Module, x: Tensor, bias: float = 0.7) -> nn.Module:
    """Set BN's biases to `bias`, and BN's running statistics to those of `x`; return the model in eval mode.

    Args:
        model: Model, which is modified.
        x: Normalized images `[B, C, H, W]`.
        bias: Bias of all BN layers. The default gives firing rates of about 0.1 to 0.2.
    """
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(m.bias, bias)
    update_bn([x], model)
    return model.eval()
