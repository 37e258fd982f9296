"""force_eager."""
import torch

from timm_spikformer.eager import force_eager


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
