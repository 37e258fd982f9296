"""The CUDA path without a GPU: kernels run in Triton's interpreter, the rest on the meta device.

Tests that need a GPU are in tests/test_cuda.py.
"""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from timm_spikformer import SpikformerMAE, lif
from timm_spikformer.kernels import rules

SCRIPT = Path(__file__).parent / 'interpreted_cuda_path.py'


@pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not installed')
def test_in_the_interpreter_of_triton():
    """Triton reads TRITON_INTERPRET when it is imported, hence a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != 'PYTEST_ADDOPTS' and not k.startswith('PYTEST_XDIST')}
    env.update(TRITON_INTERPRET='1', OMP_NUM_THREADS='1')
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(SCRIPT)],
        capture_output=True, text=True, env=env, cwd=Path(__file__).parents[2], timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ' passed' in result.stdout and 'skipped' not in result.stdout


@pytest.fixture
def on_cuda(monkeypatch):
    """Use the CUDA back end for tensors on the meta device, which have no values."""
    monkeypatch.setitem(rules.BACK_ENDS, 'meta', 'cuda')


@pytest.mark.parametrize('grad_checkpointing', [False, True], ids=['', 'checkpointing'])
@pytest.mark.parametrize('stem', ['scs', 'sps'])
def test_training_step_does_not_synchronize(stem, grad_checkpointing, on_cuda):
    """Reading a value, which would synchronize, raises an error on the meta device."""
    encoder = timm.create_model('test_spikformer_v2', stem=stem, num_classes=10, device='meta')
    encoder.set_grad_checkpointing(grad_checkpointing)
    x = torch.rand(2, 3, 64, 64, device='meta')
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        loss = torch.nn.functional.cross_entropy(encoder(x), torch.zeros(2, dtype=torch.long, device='meta'))
    loss.backward()
    assert all(p.grad.shape == p.shape for p in encoder.parameters())
    assert grad_checkpointing or torch.int8 in saved
    model = SpikformerMAE(encoder, decoder_depth=1, device='meta')
    model(x).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize('shape', [(3,), (3, 4), (3, 2, 4, 5)], ids=str)
def test_device_without_kernels_uses_lif_plain(shape):
    """The meta device represents such a device; a kernel that reads values fails on it."""
    x = torch.rand(shape, device='meta', requires_grad=True)
    spikes = lif(x)
    spikes.sum().backward()
    assert spikes.shape == x.grad.shape == x.shape
    model = timm.create_model('test_spikformer_v2', num_classes=10, device='meta')
    assert model(torch.rand(2, 3, 32, 32, device='meta')).shape == (2, 10)


def test_meta_device_detects_reading_of_values():
    """What `test_training_step_does_not_synchronize` relies on: the kernel for CPUs reads values."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match='meta'):
        patch.setitem(rules.BACK_ENDS, 'meta', 'cpu')
        lif(torch.rand(3, 4, device='meta'))
