"""force_eager."""
import torch

from timm_spikformer.kernels.eager import force_eager
from timm_spikformer.profiling.counting import measurement_context


def test_last_block_restores_the_setting():
    """As in two threads that overlap."""
    def stance():
        return torch._dynamo.eval_frame._stance.stance

    first, second = force_eager(), force_eager()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert stance() == 'force_eager'
    second.__exit__(None, None, None)
    assert stance() == 'default'


def test_all_users_share_the_setting(model):
    """A user of PyTorch's function would restore the setting of another user that has ended."""
    first, second = force_eager(), measurement_context(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch._dynamo.eval_frame._stance.stance == 'default'
