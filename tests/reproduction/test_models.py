"""The models of the study: attention variants and sizes."""
import pytest
import torch
from conftest import calibrate

from reproduction import models
from reproduction.protocol import Run, read_protocol
from timm_spikformer.profiling import profile


def test_softmax_attention_matches_pytorch():
    torch.manual_seed(0)
    layer = models.SoftmaxAttention(16, 2)
    x = torch.randint(0, 3, (2, 3, 5, 16)).float()
    for _ in range(3):
        layer(x)
    layer.eval()
    q, k, v = layer.qkv(x).unflatten(3, (3, 2, 8)).permute(3, 0, 1, 4, 2, 5)
    assert 0 < q.mean() < 1
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)
    torch.testing.assert_close(layer(x), layer.proj(expected))


@pytest.mark.parametrize('attention, layer', [('softmax', models.SoftmaxAttention), ('none', models.NoAttention)])
def test_attention_of_cell(attention, layer):
    config = read_protocol().cells['ssa']
    config = dict(Run(config, 0, 0, True).config(), attention=attention)
    model = models.create(config, 10, 28)
    assert all(type(block.attn) is layer for block in model.blocks)
    assert model(torch.rand(2, 3, 28, 28)).isfinite().all()


@pytest.mark.parametrize('name, by', [('sps-parameters', 'parameters'), ('sps-operations', 'dense_macs')])
def test_stems_are_compared_at_equal_size(name, by):
    """Sizes differ by at most 1%."""
    def size(name):
        model = models.create(Run(read_protocol().cells[name], 0, 0, True).config(), 10, 28)
        x = torch.rand(8, 3, 28, 28)
        return getattr(profile(calibrate(model, x), [x]).totals, by)

    assert size(name) == pytest.approx(size('ssa'), rel=0.01)
