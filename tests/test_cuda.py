"""GPU tests: `python -m pytest -m cuda`. By default, most of them run on a CPU with small inputs.

tests/kernels/test_cuda_path.py runs the CUDA kernels without a GPU.
"""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Tuple

import pytest
import timm
import torch
from conftest import assert_neurons_fire, calibrate
from torch import Tensor, nn

from benchmarks.peer import PeerSpikformer
from timm_spikformer import SpikformerMAE, lif, predict_anytime, use_kernels
from timm_spikformer.images import make_loader, read_splits, training_data_config
from timm_spikformer.neurons import lif_plain
from timm_spikformer.profiling import profile
from timm_spikformer.training import Recipe, classify, evaluate, init_bn_bias, train

ROOT = Path(__file__).parent.parent
ON_CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')]


def on_cuda(test: Callable) -> Callable:
    for mark in ON_CUDA:
        test = mark(test)
    return test


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=ON_CUDA)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def same_convolutions() -> Iterator[None]:
    """Use deterministic convolution algorithms without TF32, which PyTorch does not use for matrix products either."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def make(device: torch.device, stem: str = 'scs', **kwargs: Any) -> nn.Module:
    """Return a model whose neurons all fire: in float32 on CUDA, in float64 on a CPU, where summation orders differ."""
    torch.manual_seed(0)
    model = timm.create_model('test_spikformer_v2', num_classes=10, stem=stem, time_steps=2, **kwargs)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(m.bias, 1.)
    return model.to(device, torch.float32 if device.type == 'cuda' else torch.float64)


def take(images: Tensor, model: nn.Module) -> Tensor:
    """Return images on the device and in the dtype of a model; fewer on a CPU."""
    weight = next(model.parameters())
    return images[:16 if weight.is_cuda else 4].to(weight)


def step(model: nn.Module, *args: Any, **kwargs: Any) -> Tuple[Any, Dict[str, Tensor]]:
    """Return output and gradients of a training step."""
    model.zero_grad()
    out = model(*args, **kwargs)
    (out if isinstance(out, Tensor) else out.loss).float().square().sum().backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_grads_close(grads: Dict[str, Tensor], expected: Dict[str, Tensor], tolerance: float = 1e-3) -> None:
    for name, grad in expected.items():
        if not name.endswith('linear.bias'):  # its gradient is 0, because BN follows
            assert grad.norm() > 0, name
            assert (grads[name] - grad).norm() <= tolerance * grad.norm(), name


LAYOUTS = {
    'contiguous': lambda x: x,
    'channels last': lambda x: x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, x.shape[:2]),
    'expanded over time': lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('time_steps', [1, 4])
def test_neuron(device, time_steps, layout, dtype):
    torch.manual_seed(0)
    data = torch.randn(time_steps, 3, 6, 7, 5).mul(2).to(dtype)
    grad = torch.randn_like(data)
    results = []
    for neuron, place in ((lif, device), (lif_plain, 'cpu')):
        x = data.to(place).requires_grad_()
        spikes = neuron(LAYOUTS[layout](x))
        spikes.backward(grad.to(place))
        results.append((spikes.cpu(), x.grad.cpu()))
    (spikes, x_grad), (expected, expected_grad) = results
    assert 0.05 < expected.float().mean() < 0.5 and spikes.dtype == dtype and torch.equal(spikes, expected)
    rtol = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(x_grad, expected_grad, rtol=rtol, atol=rtol)


@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
def test_neuron_with_nonfinite_current(device, bad):
    torch.manual_seed(0)
    x = torch.randn(3, 40).mul(2)
    x[0, 0] = x[1, 7] = x[2, 14] = bad
    expected = lif_plain(x)
    assert expected.isnan().all(0).sum() == 3 and expected.nansum() > 0
    torch.testing.assert_close(lif(x.to(device)).cpu(), expected, rtol=0., atol=0., equal_nan=True)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('stem', ['scs', 'sps'])
def test_training_step(device, images, stem, memory_format):
    model = make(device, stem).to(memory_format=memory_format)
    x = take(images, model).contiguous(memory_format=memory_format)
    assert_neurons_fire(model, x)
    with use_kernels('plain'):
        expected, expected_grads = step(model, x)
    logits, grads = step(model, x)
    torch.testing.assert_close(logits, expected)
    assert_grads_close(grads, expected_grads)
    model.set_grad_checkpointing()
    _, grads = step(model, x)
    assert_grads_close(grads, expected_grads)


@pytest.mark.parametrize('stem', ['scs', 'sps'])
def test_masked_autoencoder_step(device, images, stem):
    encoder = make(device, stem)
    model = SpikformerMAE(encoder, mask_ratio=0.5, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    model.to(next(encoder.parameters()))
    x = take(images, encoder)
    noise = torch.rand(len(x), 16, device=device)
    with use_kernels('plain'):
        expected, expected_grads = step(model, x, noise=noise)
    out, grads = step(model, x, noise=noise)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.reconstruction, expected.reconstruction, rtol=1e-3, atol=1e-3)
    assert_grads_close(grads, expected_grads)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_amp(device, images, dtype):
    """Three training steps under autocast; the neurons run in half precision on membranes of float32."""
    model = make(device).float()
    x = take(images, model)
    y = torch.arange(len(x), device=device) % 10
    dtypes = set()
    for m in model.modules():
        if type(m).__name__ == 'LIF':
            m.register_forward_hook(lambda m, args, spikes: dtypes.update((args[0].dtype, spikes.dtype)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device.type, init_scale=128., enabled=dtype == torch.float16)
    losses = []
    for _ in range(3):
        with torch.autocast(device.type, dtype):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert dtypes == {dtype}
    assert losses[2] < losses[0]
    assert all(p.grad.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())


def test_spikes_are_saved_as_bytes(device, images):
    """On CUDA, layer inputs that are outputs of a neuron are saved as bytes; on a CPU, sums of spikes are, too."""
    model, dtypes = make(device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: dtypes.append(t.dtype) or t, lambda t: t):
        model(take(images, model))
    assert dtypes.count(torch.int8) == (4 * 2 + 2 * 2 if device.type == 'cuda' else 4 * 3 - 1 + 2 * 4)


@torch.no_grad()
def test_predict_anytime(device, model, images):
    model, x = model.to(device), images.to(device)
    steps = model.forward_steps(x)
    out = predict_anytime(model, x, steps.softmax(-1).amax(-1)[:3].median().item())
    assert out.steps.unique().numel() > 1 and out.logits.device.type == device.type
    whole = predict_anytime(model, x, 1.).logits  # convolution algorithms can differ from those for a whole sequence
    assert (whole.argmax(1) == steps[-1].argmax(1)).float().mean() >= 0.9


def test_training_loop(device, tmp_path):
    """Images are loaded in another process; the result of a run that is read from its checkpoint is the same."""
    torch.manual_seed(0)
    data = read_splits()['train'].sample_stratified(96, seed=0)
    recipe = Recipe(2, 1e-2, 32, fixed_bn=0.5, num_workers=1)
    weights = []
    for _ in range(2):
        model = timm.create_model('spikformer_v2_2_64_patch4_32', num_classes=10, img_size=28, embed_dim=16)
        init_bn_bias(model)
        result = train(
            model.to(device), classify, data, training_data_config(), recipe, tmp_path / 'last.pth.tar', 'Test', 'test',
            {}, resume=True)
        weights.append(result.model.state_dict())
    assert {t.device.type for t in weights[0].values()} == {device.type}
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values()))
    loader = make_loader(data, training_data_config(), 32, device)
    assert min(evaluate(result.model, loader)[1].values()) > 0


def test_inference_mode(device, model, images):
    model, x = model.to(device), images.to(device)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(predict_anytime(model, x, 1.).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision_model(device, images, dtype):
    model = calibrate(make(torch.device('cpu')).float(), images).to(device, dtype)
    x = take(images, model)
    assert_neurons_fire(model, x)
    logits = model(x)
    assert logits.dtype == dtype and logits.isfinite().all()
    with use_kernels('plain'):
        torch.testing.assert_close(model(x), logits)


@on_cuda
@pytest.mark.parametrize('stem', ['scs', 'sps'])
def test_training_step_does_not_synchronize(images, stem):
    encoder = make(torch.device('cuda'), stem)
    x = images.cuda()
    for model in (encoder, SpikformerMAE(encoder, decoder_depth=1).cuda()):
        step(model, x)  # the first run compiles kernels
        torch.cuda.set_sync_debug_mode('error')
        try:
            out = model(x)
            (out if isinstance(out, Tensor) else out.loss).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode('default')


def peak_memory(model: nn.Module, x: Tensor) -> int:
    """Return the peak memory of a training step in bytes, without weights and gradients."""
    step(model, x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x).sum().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@on_cuda
def test_peak_memory_is_less_than_that_of_spikingjelly():
    torch.manual_seed(0)
    model = timm.create_model('spikformer_v2_8_384', num_classes=10, time_steps=4).cuda()
    x = torch.randn(4, 3, 224, 224, device='cuda')
    peer = PeerSpikformer(copy.deepcopy(model).cpu()).cuda().train()
    ours, theirs = peak_memory(model, x), peak_memory(peer, x)
    print(f'peak memory {ours / 2 ** 20:.0f} MiB, {ours / theirs:.0%} of that with spikingjelly')
    assert ours < theirs


@on_cuda
def test_compile(images):
    model = make(torch.device('cuda'))
    x = images.cuda()
    expected, expected_grads = step(model, x)
    logits, grads = step(torch.compile(model), x)
    # the compiler rounds BN differently, which changes a few spikes
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > 0.9
    assert all(grad.isfinite().all() for grad in grads.values()) and len(grads) == len(expected_grads)


@on_cuda
def test_ddp():
    """Run on one GPU and on all GPUs."""
    for world_size in sorted({1, torch.cuda.device_count()}):
        result = subprocess.run(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(world_size),
             '-m', 'timm_spikformer', str(ROOT / 'tests' / 'scripts' / 'train_ddp.py'), 'nccl'],
            capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=300)
        assert result.returncode == 0, result.stderr
        (report,) = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{')]
        assert report['world_size'] == world_size
        assert report['equal'] and report['grads_equal'] and report['grad_norm'] > 0


@on_cuda
def test_profile(model, images):
    on_cpu = profile(model, images)
    seen = profile(model.cuda(), images)
    assert seen.totals.dense_macs == on_cpu.totals.dense_macs
    assert seen.totals.acs == pytest.approx(on_cpu.totals.acs, rel=0.05)  # rounding changes a few spikes
