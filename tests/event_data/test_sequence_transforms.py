"""Augmentation of event sequences: the same at all time steps, and mixing of whole sequences."""
import numpy as np
import pytest
import torch

from timm_spikformer.event_data.transforms import SequenceMixup, SequenceTransform


def still_sequence(steps=5, size=16):
    """A sequence with the same random frame at every step."""
    return torch.rand(1, 2, size, size).expand(steps, -1, -1, -1) + 0.1


@pytest.mark.parametrize('kwargs', [
    dict(hflip=0.5), dict(vflip=0.5), dict(roll=3), dict(erase_prob=1.),
    dict(hflip=0.5, vflip=0.5, roll=3, erase_prob=0.5)])
def test_all_steps_are_transformed_in_the_same_way(kwargs):
    torch.manual_seed(0)
    transform = SequenceTransform(**kwargs)
    x = still_sequence()
    outputs = [transform(x) for _ in range(20)]
    for out in outputs:
        assert out.shape == x.shape and (out == out[:1]).all()
    assert len({out.numpy().tobytes() for out in outputs}) > 1


def test_flips_and_shifts():
    torch.manual_seed(0)
    x = still_sequence()
    assert torch.equal(SequenceTransform(hflip=1.)(x), x.flip(-1))
    assert torch.equal(SequenceTransform(vflip=1.)(x), x.flip(-2))
    assert torch.equal(SequenceTransform()(x), x)
    shifts = {tuple(np.unravel_index(int(SequenceTransform(roll=2)(x)[0, 0].argmax()), (16, 16))) for _ in range(300)}
    assert len(shifts) == 25  # -2 to 2 pixels in both directions


def test_erase():
    torch.manual_seed(0)
    x = still_sequence()
    original = x.clone()
    sides = set()
    for _ in range(100):
        erased = (SequenceTransform(erase_prob=1., erase_size=0.25)(x) == 0.).all(0).all(0)
        rows, columns = erased.any(1).sum().item(), erased.any(0).sum().item()
        assert rows == columns and erased.sum() == rows * columns
        sides.add(rows)
    assert sides == {1, 2, 3, 4} and torch.equal(x, original)


@pytest.mark.parametrize('kwargs, name', [
    (dict(hflip=1.1), 'hflip'), (dict(erase_prob=-0.1), 'erase_prob'), (dict(roll=-1), 'roll'),
    (dict(roll=0.5), 'roll')])
def test_invalid_arguments(kwargs, name):
    with pytest.raises(ValueError, match=name):
        SequenceTransform(**kwargs)


@pytest.mark.parametrize('mode', ['batch', 'pair', 'elem'])
@pytest.mark.parametrize('kwargs', [dict(mixup_alpha=1., cutmix_alpha=0.), dict(mixup_alpha=0., cutmix_alpha=1.)])
def test_mixup_of_sequences(mode, kwargs):
    """Each step of a mixed sequence mixes the same step of both sequences. Weight and region are equal at all steps."""
    np.random.seed(0)
    mixup = SequenceMixup(**kwargs, mode=mode, num_classes=4, label_smoothing=0.)
    x = torch.stack([torch.full((3, 2, 8, 8), float(10 * i)) for i in range(4)])
    x += torch.arange(3).view(1, 3, 1, 1, 1)  # step t of sequence i has the value 10 i + t
    mixed, target = mixup(x.clone(), torch.arange(4))
    assert mixed.shape == x.shape and not torch.equal(mixed, x)
    weights = (mixed - torch.arange(3).view(1, 3, 1, 1, 1)).mean((2, 3, 4))  # of each step
    torch.testing.assert_close(weights, (target @ (10. * torch.arange(4)))[:, None].expand(-1, 3))
    if kwargs['cutmix_alpha']:
        assert set(mixed[0, 0].flatten().tolist()) <= {0., 30.}


def test_mixup_of_images_is_that_of_timm():
    import timm.data
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    results = []
    for cls in (SequenceMixup, timm.data.mixup.Mixup):
        np.random.seed(3)
        results.append(cls(cutmix_alpha=1., num_classes=4)(x.clone(), y))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
