"""TETLoss and the logits of single time steps that it requires."""
import pytest
import timm
import torch
from torch.nn import functional as F

from timm_spikformer.losses import TETLoss


def test_tet_loss():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 5, 4, requires_grad=True), torch.tensor([0, 3, 1, 1, 2])
    cross_entropy = sum(F.cross_entropy(step, target, label_smoothing=0.1) for step in logits) / 3
    expected = 0.95 * cross_entropy + 0.05 * ((logits - 2.) ** 2).sum() / 60
    loss = TETLoss(weight=0.05, constant=2., label_smoothing=0.1)(logits, target)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))
    soft = F.one_hot(target, 4).float()
    torch.testing.assert_close(TETLoss()(logits, soft), TETLoss()(logits, target))


def test_one_step_without_second_term_is_cross_entropy():
    logits, target = torch.randn(1, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    torch.testing.assert_close(TETLoss(weight=0.)(logits, target), F.cross_entropy(logits[0], target))


@pytest.mark.parametrize('logits, target', [
    (torch.zeros(5, 4), torch.zeros(5, dtype=torch.long)),
    (torch.zeros(5, 3, 4), torch.zeros(5, dtype=torch.long)),  # batch first
    (torch.zeros(3, 5, 4), torch.zeros(4, dtype=torch.long)),
    (torch.zeros(0, 5, 4), torch.zeros(5, dtype=torch.long)),
    (torch.zeros(3, 5, 4), torch.zeros(5, 3)),
])
def test_shapes_are_checked(logits, target):
    with pytest.raises(ValueError, match='Expected logits .T, B, K.'):
        TETLoss()(logits, target)


@pytest.mark.parametrize('kwargs', [
    dict(weight=1.), dict(constant=float('nan')), dict(constant='a'), dict(label_smoothing=2.)])
def test_arguments_are_checked(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        TETLoss(**kwargs)


def test_logits_of_single_steps(model, images):
    """Their mean is the logits of `forward`, and their cumulative means are the logits after each time step."""
    with torch.no_grad():
        single, cumulative = model.forward_steps(images, cumulative=False), model.forward_steps(images)
        torch.testing.assert_close(single.mean(0), model(images))
        torch.testing.assert_close(single.cumsum(0) / torch.arange(1, 5).view(4, 1, 1), cumulative)
    assert not torch.equal(single[0], single[1])


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = timm.create_model('test_spikformer_v2', num_classes=10, time_steps=2)
    TETLoss()(model.forward_steps(torch.rand(4, 3, 32, 32), cumulative=False), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
