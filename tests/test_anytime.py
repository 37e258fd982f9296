"""Logits after each time step, membranes carried across calls, and anytime inference."""
import threading

import pytest
import timm
import torch
from conftest import calibrate
from spikingjelly.activation_based import neuron as sj_neuron
from torch import nn

from timm_spikformer import LIF, SpikformerForImageClassification, predict_anytime, record_membrane_potentials
from timm_spikformer.hf.configuration_spikformer import SpikformerConfig
from timm_spikformer.images import make_loader, read_splits, training_data_config
from timm_spikformer.neurons import StatefulInference


@pytest.fixture
def sequences(images):
    return torch.stack([images, images * 0.5, images * 1.5, images.flip(3)], 1)


@torch.no_grad()
def test_last_step_equals_forward(model, images, sequences):
    for x in (images, sequences):
        steps = model.forward_steps(x)
        assert steps.shape == (4, 16, 10)
        assert torch.equal(steps[-1], model(x))
        assert (steps[0] - steps[-1]).abs().max() > 0


@torch.no_grad()
def test_step_t_equals_forward_with_t_steps(model, images, sequences):
    steps = model.forward_steps(images)
    by_sequence = model.forward_steps(sequences)
    for t in range(1, 5):
        model.set_time_steps(t)
        assert torch.equal(steps[t - 1], model(images))
        assert torch.equal(by_sequence[t - 1], model(sequences[:, :t]))


def test_steps_have_gradients(model, images):
    model.train()
    loss = sum(nn.functional.cross_entropy(logits, torch.arange(16) % 10) for logits in model.forward_steps(images))
    loss.backward()  # as in temporal efficient training (TET)
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_transformers(model, images):
    hf = SpikformerForImageClassification(SpikformerConfig.from_timm(model)).eval()
    hf.timm_model.load_state_dict(model.state_dict())
    assert torch.equal(hf.forward_steps(images)[-1], hf(images).logits)
    assert torch.equal(predict_anytime(hf, images, 1.).logits, hf(images).logits)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_carried_membranes_give_same_spikes_as_whole_sequence(model, sequences, memory_format, kernels):
    model = model.to(memory_format=memory_format)
    neurons = {name: m for name, m in model.named_modules() if isinstance(m, LIF)}
    whole, parts = {}, {name: [] for name in neurons}

    handles = [
        m.register_forward_hook(lambda m, args, out, name=name: whole.update({name: out}))
        for name, m in neurons.items()]
    expected = model(sequences)
    for handle in handles:
        handle.remove()
    handles = [
        m.register_forward_hook(lambda m, args, out, name=name: parts[name].append(out))
        for name, m in neurons.items()]
    stateful = StatefulInference(model)
    for part in sequences.split((1, 2, 1), dim=1):
        logits = stateful(part)
    for handle in handles:
        handle.remove()
    for name in neurons:
        assert torch.equal(torch.cat(parts[name]), whole[name]), name
        assert whole[name].mean() > 0, name
    torch.testing.assert_close(logits, expected)
    assert torch.equal(model(sequences), expected)  # no state remains in the model


@torch.no_grad()
def test_keep_selects_membranes_of_samples(model, sequences):
    kept = torch.tensor([3, 11, 4])
    stateful = StatefulInference(model)
    first = stateful(sequences[:, :2])
    stateful.select_samples(kept)
    second = stateful(sequences[kept, 2:])
    stateful = StatefulInference(model)
    torch.testing.assert_close(stateful(sequences[kept, :2]), first[kept])
    torch.testing.assert_close(stateful(sequences[kept, 2:]), second)
    stateful = StatefulInference(model)
    stateful(sequences[:, :1])
    with pytest.raises(ValueError, match='Expected inputs of the same shape'):
        stateful(sequences[:4, 1:2])


@torch.no_grad()
def test_predict_anytime(model, images, sequences, kernels):
    for x in (images, sequences):
        steps = model.forward_steps(x)
        confidence = steps.softmax(-1).amax(-1)  # [T, B]
        threshold = confidence[:3].median().item()
        out = predict_anytime(model, x, threshold)
        assert out.steps.unique().numel() > 1 and out.time_steps == 4
        for i in range(16):
            reached = (confidence[:, i] >= threshold).nonzero().flatten().tolist() + [3]
            assert out.steps[i] == reached[0] + 1
            torch.testing.assert_close(out.logits[i], steps[out.steps[i] - 1, i], rtol=1e-4, atol=1e-5)
        assert out.skipped_fraction == pytest.approx(1 - out.steps.float().mean().item() / 4)
        everything = predict_anytime(model, x, 1.)
        assert torch.equal(everything.logits, steps[-1]) and everything.skipped_fraction == 0
        assert predict_anytime(model, x, 1e-6).steps.tolist() == [1] * 16
    assert model.time_steps == 4


@torch.no_grad()
def test_anytime_runs_only_remaining_samples(model, images):
    seen = []
    handle = model.blocks[0].register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    out = predict_anytime(model, images, model.forward_steps(images).softmax(-1).amax(-1)[:3].median().item())
    handle.remove()
    assert seen[-out.steps.max():] == [(out.steps > t).sum().item() for t in range(out.steps.max())]


@pytest.mark.parametrize('make, message', [
    (lambda m, x: predict_anytime(m, x, 0.), 'confidence must be greater than 0 and at most 1'),
    (lambda m, x: predict_anytime(m, x, 1.5), 'confidence must be greater than 0 and at most 1'),
    (lambda m, x: predict_anytime(m, x, 'a'), "confidence must be greater than 0 and at most 1, got 'a'"),
    (lambda m, x: predict_anytime(m, x.where(torch.arange(16).view(16, 1, 1, 1) > 1, torch.nan)),
     'The logits of 2 of 16 samples contain NaN or infinity in time step 1'),
    (lambda m, x: StatefulInference(m, time_steps=0), 'time_steps must be an integer of at least 1, got 0'),
    (lambda m, x: predict_anytime(m.train(), x), 'train mode'),
    (lambda m, x: predict_anytime(timm.create_model('test_spikformer_v2', num_classes=0).eval(), x),
     'requires a classifier'),
    (lambda m, x: predict_anytime(nn.Linear(2, 2), x), 'Expected a Spikformer'),
    (lambda m, x: predict_anytime(m, x[:, :1]), 'Expected 3 channels'),
])
def test_bad_input(model, images, make, message):
    with pytest.raises(ValueError, match=message):
        make(model, images)
    assert model.time_steps == 4


def test_half_precision(images):
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=10), images).bfloat16()
    x = images.bfloat16()
    with torch.no_grad():
        assert torch.equal(predict_anytime(model, x, 1.).logits, model(x))


# -- no state in the model

@torch.no_grad()
def test_concurrent_use_by_other_threads(model, images):
    expected = model(images[:4])
    stop = threading.Event()
    results = []

    def run():
        with torch.no_grad():
            while not stop.is_set():
                results.append(torch.equal(model(images[:4]), expected))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            predict_anytime(model, images, 1.)
    finally:
        stop.set()
        thread.join()
    assert len(results) > 2 and all(results)


@torch.no_grad()
def test_shared_block_has_separate_membranes_per_call(model, images, kernels):
    model.blocks.append(model.blocks[0])
    assert torch.equal(predict_anytime(model, images, 1.).logits, model(images))


class Normalize(nn.Module):
    def forward(self, x):
        return (x - 0.1) / 0.8


@pytest.mark.parametrize('wrap', [
    lambda m: nn.Sequential(Normalize(), m),
    lambda m: nn.Sequential(m, nn.Linear(10, 10), nn.Softmax(1)),
    lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 0.5,)) and m,
    lambda m: m.stem.register_forward_pre_hook(lambda m, args: (args[0] * 0.5, *args[1:])) and m,
    lambda m: m.head.register_forward_hook(lambda m, args, out: out + 1) and m,
], ids=['normalization', 'additional head', 'pre-hook', 'hook of the stem', 'hook of the head'])
@torch.no_grad()
def test_layers_and_hooks_around_encoder_are_called(model, images, sequences, wrap):
    bare = [model(x) for x in (images, sequences)]
    wrapped = wrap(model).eval()
    for x, without in zip((images, sequences), bare):
        logits = predict_anytime(wrapped, x, 1.).logits
        assert torch.equal(logits, wrapped(x)) and not torch.equal(logits, without)


@torch.no_grad()
def test_transformers_model_casts_input_dtype(images):
    torch.manual_seed(0)
    model = SpikformerForImageClassification(SpikformerConfig.from_timm('test_spikformer_v2', num_labels=10))
    model = calibrate(model, images).double()
    assert torch.equal(predict_anytime(model, images, 1.).logits, model(images).logits)


class OwnLIF(LIF):
    def forward(self, x):
        return super().forward(x * 2)


@pytest.mark.parametrize('change, message', [
    (lambda m: setattr(m.blocks[0].mlp.fc1, 'lif', sj_neuron.LIFNode(step_mode='m')),
     r'blocks\.0\.mlp\.fc1\.lif \(LIFNode\) is stateful'),
    (lambda m: setattr(m.blocks[1].attn, 'attn_lif', OwnLIF(v_threshold=0.5)),
     r'forward of blocks\.1\.attn\.attn_lif \(OwnLIF\) has been replaced'),
    (lambda m: m.blocks[0].train(), r'blocks\.0 \(SpikingBlock\) is in train mode.*and \d+ more'),
    (lambda m: setattr(m.blocks[0], 'mlp', torch.jit.script(m.blocks[0].mlp)), r'blocks\.0\.mlp .* is scripted'),
])
def test_unsupported_module_is_named_in_error(model, images, change, message):
    change(model)
    with pytest.raises(ValueError, match=message):
        predict_anytime(model, images)


def test_data_parallel_is_rejected(model, images):
    with pytest.raises(ValueError, match='DataParallel.*other threads'):
        predict_anytime(nn.DataParallel(model).eval(), images)


@torch.no_grad()
def test_empty_batch(model, images):
    out = predict_anytime(model, images[:0])
    assert out.logits.shape == (0, 10) and out.steps.shape == (0,) and out.skipped_fraction == 0.


class Encode(nn.Module):
    """Direct encoding: each image becomes a sequence."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.unsqueeze(1).repeat(1, 4, 1, 1, 1))


class LastStep(Encode):
    def forward(self, x):
        return self.model.forward_steps(x)[-1]


@pytest.mark.parametrize('wrap, message', [
    (Encode, 'changes the number of time steps of its input, from an image to 4'),
    (LastStep, 'forward_steps cannot be called within StatefulInference'),
])
def test_wrappers_that_change_time_steps_are_rejected(model, images, wrap, message):
    with pytest.raises(ValueError, match=message):
        predict_anytime(wrap(model).eval(), images)


def test_bn_without_running_statistics_is_rejected(model, images):
    model.blocks[0].mlp.fc1.bn = nn.BatchNorm1d(256, track_running_stats=False)
    with pytest.raises(ValueError, match=r'blocks\.0\.mlp\.fc1\.bn.*statistics of the batch'):
        predict_anytime(model.eval(), images)


def test_record_membranes_rejects_carried_membranes(model, images):
    with record_membrane_potentials(model), pytest.raises(ValueError, match='does not support StatefulInference'):
        predict_anytime(model, images)


def compile_forward(model):
    model.forward = torch.compile(model.forward, backend='eager')
    return model


def compile_block(model):
    model.blocks[0].compile(backend='eager')
    return model


@pytest.mark.parametrize('compile', [
    compile_forward, compile_block, lambda model: torch.compile(model, backend='eager')],
    ids=['method', 'block', 'model'])
@torch.no_grad()
def test_compiled_models_run_in_eager_mode(compile):
    """A compiled graph would process each part without the state of the previous ones."""
    model = timm.create_model('spikformer_v2_2_64_patch4_32.fashion_mnist_t4', pretrained=True).eval()
    x, _ = next(iter(make_loader(read_splits()['test'].sample_evenly(32), training_data_config(), 32)))
    expected = predict_anytime(model, x, 0.7)
    assert 1 < expected.steps.float().mean() < 4
    compiled = compile(model)
    compiled(x)
    out = predict_anytime(compiled, x, 0.7)
    assert torch.equal(out.logits, expected.logits) and torch.equal(out.steps, expected.steps)


def test_model_without_neurons_raises():
    with pytest.raises(ValueError, match=r'The model \(Linear\) has not called any LIF neurons'):
        StatefulInference(nn.Linear(3, 2).eval())(torch.rand(2, 3))


@torch.no_grad()
def test_sum_of_many_steps_in_bfloat16():
    """In bfloat16, adding to a sum has no effect once it is 256 times larger."""
    model = timm.create_model('spikformer_v2_2_64_patch4_32.fashion_mnist', pretrained=True).eval().bfloat16()
    stateful, x = StatefulInference(model), torch.rand(2, 3, 28, 28).bfloat16()
    for _ in range(600):
        stateful.mean_over_time(x[None])
        stateful._next_index = 0
    torch.testing.assert_close(stateful.mean_over_time(x[None]), x)


def test_failed_call_does_not_change_the_state(model, sequences):
    """A call that fails in the last block, for example because memory runs out, can be repeated."""
    expected = model(sequences)
    stateful = StatefulInference(model)
    stateful(sequences[:, :2])
    handle = model.blocks[-1].register_forward_pre_hook(lambda m, args: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        stateful(sequences[:, 2:])
    handle.remove()
    torch.testing.assert_close(stateful(sequences[:, 2:]), expected)


@pytest.mark.parametrize('depths', [(2, 1), (1, 2)])
def test_calls_that_run_other_layers_raise(depths, images):
    model = calibrate(timm.create_model('test_spikformer_v2', depth=2), images)
    blocks = list(model.blocks)
    stateful = StatefulInference(model, time_steps=2)
    model.blocks = nn.Sequential(*blocks[:depths[0]])
    stateful(images)
    model.blocks = nn.Sequential(*blocks[:depths[1]])
    with pytest.raises(ValueError, match='Expected each call to run the same layers'):
        stateful(images)


def test_recorded_layers_are_unique(model, images):
    name = 'blocks.0.attn.attn_lif'
    for layers in (name, [name, name]):
        with record_membrane_potentials(model, layers) as membranes:
            model(images)
        assert [len(calls) for calls in membranes.values()] == [1]
