"""Shared helpers and fixtures: real images, calibrated models, and checks that all neuron layers fire."""
import os
import shutil
from pathlib import Path
from typing import Callable, Dict, Iterator

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # pytest-xdist workers share the cores; PyTorch reads this on import

import datasets
import event_files
import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from timm_spikformer import use_kernels
from timm_spikformer.event_data.catalog import DATASETS
from timm_spikformer.images import FASHION_MNIST
from timm_spikformer.monitor import FiringRateMonitor

SHIPPED_WEIGHTS = [  # in the package
    'spikformer_v2_2_64_patch4_32.fashion_mnist',
    'spikformer_v2_2_64_patch4_32.fashion_mnist_t4',
    'spikformer_v2_2_64_patch4_32.mae_fashion_mnist',
    'spikformer_v2_2_128_patch4_32.cifar10',
]


def firing_rates(model: nn.Module, x: Tensor) -> Dict[str, float]:
    """Return the firing rate of each neuron layer in one forward pass."""
    with FiringRateMonitor(model) as monitor, torch.no_grad():
        model(x)
    return monitor.rates


def calibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """Set BN's running statistics to those of `x`, check that all neuron layers fire, and return the model."""
    update_bn(x.chunk(2), model)
    model.eval()
    assert_neurons_fire(model, x)
    return model


def assert_neurons_fire(model: nn.Module, x: Tensor) -> None:
    rates = firing_rates(model, x)
    assert rates and min(rates.values()) > 0., f'silent neurons: {[n for n, r in rates.items() if not r > 0.]}'


def write_images(folder: Path, split: str, classes: int, count: int) -> None:
    """Write the first images of the first classes of the included dataset as RGB files, one folder per class."""
    source = datasets.Dataset.from_parquet(str(FASHION_MNIST / f'{split}.parquet'))
    labels = np.asarray(source['label'])
    for label in range(classes):
        (folder / f'class_{label}').mkdir(parents=True)
        for i in np.flatnonzero(labels == label)[:count]:
            source[int(i)]['image'].convert('RGB').save(folder / f'class_{label}' / f'{i}.png')


@pytest.fixture(params=['auto', 'plain'])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with kernels and with plain modules."""
    with use_kernels(request.param):
        yield request.param


@pytest.fixture(scope='session')
def images() -> Tensor:
    """16 normalized RGB images of Fashion-MNIST, `[16, 3, 64, 64]`."""
    split = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'test.parquet'))[:16]['image']
    x = torch.from_numpy(np.stack([np.asarray(image.resize((64, 64))) for image in split])).float()
    return ((x / 255 - 0.286) / 0.353).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


@pytest.fixture(params=['test_spikformer_v2', 'tiny_v1'])
def model(request: pytest.FixtureRequest, images: Tensor) -> nn.Module:
    """Small calibrated V2 and V1 models in eval mode."""
    torch.manual_seed(0)
    kwargs = dict(stem='sps') if request.param == 'tiny_v1' else {}
    return calibrate(timm.create_model('test_spikformer_v2', num_classes=10, **kwargs), images)


@pytest.fixture(scope='session')
def originals(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, Path]:
    """Small event datasets in their original formats, by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in DATASETS}
    for name, folder in folders.items():
        getattr(event_files, f'write_{name}')(folder)
    return folders


@pytest.fixture
def original(originals: Dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A function that copies a small event dataset and returns its folder."""
    return lambda name: shutil.copytree(originals[name], tmp_path / name)


@pytest.fixture
def study(tmp_path: Path) -> 'Study':  # noqa: F821
    """A study that runs in seconds."""
    from small_study import create_study  # imports reproduction/, which most tests do not need
    return create_study(tmp_path)


# Fixtures of tests/hub, which import what most tests do not need

@pytest.fixture
def hub() -> 'LoopbackHub':  # noqa: F821
    """A local Hub server that is not running yet."""
    from hub_client import create_hub
    return create_hub()


@pytest.fixture
def client(hub: 'LoopbackHub', tmp_path: Path) -> Iterator['Client']:  # noqa: F821
    """A client of the running server `hub`."""
    from hub_client import Client
    with hub.serve() as url:
        yield Client(url, tmp_path)


@pytest.fixture(scope='session')
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the included weights in `model`, and images and their logits and features in `expected.pt`."""
    from hub_client import save_shipped
    folder = tmp_path_factory.mktemp('shipped')
    save_shipped(folder)
    return folder


@pytest.fixture
def published(hub: 'LoopbackHub', shipped: Path) -> Dict[str, 'File']:  # noqa: F821
    """The files of a repository on the server with the included weights."""
    from hub_client import REPO, put
    return put(hub, REPO, shipped / 'model')
