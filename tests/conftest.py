"""What makes a spiking network worth comparing: real images, calibrated BN, neurons that fire."""
import os
from pathlib import Path
from typing import Dict, Iterator

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # the workers share the cores; PyTorch reads this when it is imported

import datasets
import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from timm_spikformer import use_kernels
from timm_spikformer.images import FASHION_MNIST
from timm_spikformer.monitor import FiringRateMonitor


def firing_rates(model: nn.Module, x: Tensor) -> Dict[str, float]:
    """Mean output of every neuron layer in one forward of `model`."""
    with FiringRateMonitor(model) as monitor, torch.no_grad():
        model(x)
    return monitor.rates


def calibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """Set BN's running statistics to those of `x`; return the model in eval mode, every neuron layer firing."""
    update_bn(x.chunk(2), model)
    model.eval()
    assert_live(model, x)
    return model


def assert_live(model: nn.Module, x: Tensor) -> None:
    rates = firing_rates(model, x)
    assert rates and min(rates.values()) > 0., f'silent neurons: {[n for n, r in rates.items() if not r > 0.]}'


def write_images(folder: Path, split: str, classes: int, count: int) -> None:
    """The first images of the first classes of the shipped data, as RGB, in a folder for each class."""
    source = datasets.Dataset.from_parquet(str(FASHION_MNIST / f'{split}.parquet'))
    labels = np.asarray(source['label'])
    for label in range(classes):
        (folder / f'class_{label}').mkdir(parents=True)
        for i in np.flatnonzero(labels == label)[:count]:
            source[int(i)]['image'].convert('RGB').save(folder / f'class_{label}' / f'{i}.png')


@pytest.fixture(params=['auto', 'plain'])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with kernels, and with the modules alone."""
    with use_kernels(request.param):
        yield request.param


@pytest.fixture(scope='session')
def images() -> Tensor:
    """16 real images as RGB, normalised, `[16, 3, 64, 64]`."""
    split = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'test.parquet'))[:16]['image']
    x = torch.from_numpy(np.stack([np.asarray(image.resize((64, 64))) for image in split])).float()
    return ((x / 255 - 0.286) / 0.353).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


@pytest.fixture(params=['test_spikformer_v2', 'tiny_v1'])
def model(request: pytest.FixtureRequest, images: Tensor) -> nn.Module:
    """A small V2 and a small V1 model, calibrated, in eval mode."""
    torch.manual_seed(0)
    kwargs = dict(stem='sps') if request.param == 'tiny_v1' else {}
    return calibrate(timm.create_model('test_spikformer_v2', num_classes=10, **kwargs), images)
