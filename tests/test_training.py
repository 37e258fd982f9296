"""The training loop of the demo and the study."""
import pytest
import timm
import torch
from timm.utils import random_seed
from torch.optim.swa_utils import update_bn

from timm_spikformer.images import make_loader, read_splits, training_data_config
from timm_spikformer.training import Callback, Recipe, classify, evaluate, init_bn_bias, train


def norms(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def run(tmp_path, **recipe):
    """Train a small model for 2 epochs of 3 updates; return the result, the images, and BN's modes at each update."""
    random_seed(0)
    model = timm.create_model('spikformer_v2_2_64_patch4_32', num_classes=10, img_size=28, embed_dim=16)
    init_bn_bias(model)
    images, modes = read_splits()['train'].sample_stratified(96, seed=0), []

    class Modes(Callback):
        def on_step(self, epoch, num_images, loss):
            modes.append({m.training for m in norms(model)})
            assert model.training and model.head.fc.training

    result = train(
        model, classify, images, training_data_config(), Recipe(2, 1e-2, 32, **recipe),
        tmp_path / 'new' / 'x.pth.tar', 'Test', 'test', {}, callback=Modes())
    return result, images, modes


@pytest.mark.parametrize('recipe, message', [
    (dict(epochs=0), 'epochs must be an integer of at least 1, got 0'),
    (dict(batch_size=0), 'batch_size must be an integer of at least 1, got 0'),
    (dict(batch_size=33), r'Run: there are fewer training images \(32 .*\) than the batch_size of 33'),
    (dict(lr='1e-3'), "lr must be at least 0 and at most 1000, got '1e-3'"),
    (dict(warmup_epochs=1), 'warmup_epochs must be at least 0 and less than 1, got 1'),
    (dict(fixed_bn=2.), 'fixed_bn must be at least 0 and at most 1, got 2.0'),
    (dict(ema_decay=1.5), 'ema_decay must be at least 0 and at most 1, got 1.5'),
    (dict(num_workers=-1), 'num_workers must be an integer of at least 0, got -1'),
    (dict(augmentation=dict(crop=1)), r"augmentation must be a mapping with keys among scale, .*, got {'crop': 1}"),
    (dict(augmentation=dict(collate_fn=None)), 'augmentation must be a mapping with keys among'),
    (dict(augmentation=5), 'augmentation must be a mapping with keys among .*, got 5'),
    (dict(bf16='no'), "bf16 must be True or False, got 'no'"),
    (dict(seed=2 ** 32), 'seed [+] epochs must be at most 2 [*][*] 32, got 4294967296 [+] 1'),
    (dict(lr=1e308), 'lr must be at least 0 and at most 1000, got 1e[+]308'),
    (dict(lr=10 ** 400), 'lr must be at least 0 and at most 1000'),
    (dict(augmentation=dict(scale='x')), "Run: the augmentation {'scale': 'x'} is not possible"),
    (dict(augmentation=dict(auto_augment='x')), 'is not possible: Unknown AA policy x'),
    (None, 'Run: training requires labels, but these images have none: 32 images of Fashion-MNIST'),
])
def test_bad_settings(recipe, message, tmp_path):
    images = read_splits()['train'].sample_stratified(32, seed=0)
    if recipe is None:
        images.labels = None
    recipe = Recipe(**{**dict(epochs=1, lr=1e-2, batch_size=16), **(recipe or {})})
    with pytest.raises(ValueError, match=message):
        train(
            timm.create_model('spikformer_v2_2_64_patch4_32', num_classes=10, img_size=28, embed_dim=16), classify,
            images, training_data_config(), recipe, tmp_path / 'new' / 'x.pth.tar', 'Run', 'test', {})
    assert not (tmp_path / 'new').exists()


def test_other_files_are_noticed_before_training(tmp_path):
    (tmp_path / 'x.pth.tar').write_text('mine')
    callback = Callback()
    callback.on_step = lambda *args: pytest.fail('trained')
    with pytest.raises(ValueError, match='x.pth.tar'):
        train(
            timm.create_model('spikformer_v2_2_64_patch4_32', img_size=28, embed_dim=16), classify,
            read_splits()['train'].sample_stratified(32, seed=0), training_data_config(), Recipe(1, 1e-2, 32),
            tmp_path / 'x.pth.tar', 'Test', 'test', {}, callback=callback)


def test_evaluation_of_diverged_model_raises():
    model = timm.create_model('spikformer_v2_2_64_patch4_32', num_classes=10, img_size=28, embed_dim=16)
    batch = torch.rand(2, 3, 28, 28), torch.tensor([0, 1])
    evaluate(model, [batch])
    torch.nn.init.constant_(model.blocks[0].mlp.fc1.linear.weight, torch.nan)
    with pytest.raises(ValueError, match='The logits contain NaN'):
        evaluate(model, [batch])
    with pytest.raises(ValueError, match='There is no data'):
        evaluate(model, [])


def test_fixed_bn(tmp_path):
    """The last updates use BN statistics that are computed once, and the result keeps them."""
    result, images, modes = run(tmp_path, fixed_bn=0.5)
    assert modes == [{True}] * 3 + [{False}] * 3
    trained_at_the_end = torch.load(tmp_path / 'new' / 'x.pth.tar', weights_only=True)['state_dict']
    for name, buffer in result.model.named_buffers():
        assert torch.equal(buffer, trained_at_the_end[name]), name
    assert {m.num_batches_tracked.item() for m in norms(result.model)} == {3}
    _, rates = evaluate(result.model, make_loader(images, training_data_config(), 32))
    assert min(rates.values()) > 0


def test_bf16_trains_with_autocast(tmp_path):
    dtypes = set()

    def record_dtype(module, args, output):
        if isinstance(module, torch.nn.Linear) and module.training:
            dtypes.add(output.dtype)

    for bf16 in (False, True):
        dtypes.clear()
        with torch.nn.modules.module.register_module_forward_hook(record_dtype):
            result, _, _ = run(tmp_path / str(bf16), bf16=bf16)
        assert (torch.bfloat16 in dtypes) == bf16
        assert {p.dtype for p in result.model.parameters()} == {torch.float32}


@pytest.mark.parametrize('fixed_bn', [0., 0.05])
def test_statistics_are_computed_after_training_without_fixed_bn(fixed_bn, tmp_path):
    """5% of 6 updates are less than half an update."""
    result, images, modes = run(tmp_path, fixed_bn=fixed_bn)
    assert modes == [{True}] * 6 and not result.model.training
    before = {name: buffer.clone() for name, buffer in result.model.named_buffers()}
    update_bn(make_loader(images, training_data_config(), 32), result.model)
    for name, buffer in result.model.named_buffers():
        torch.testing.assert_close(buffer, before[name])
