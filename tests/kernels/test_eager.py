"""`force_eager`: without compilation until the last of several blocks that overlap ends."""
from contextlib import ExitStack

import torch

from timm_spikformer.kernels.eager import force_eager
from timm_spikformer.profiling.counting import measurement_context


def stance():
    return torch._dynamo.eval_frame._stance.stance


def test_last_block_restores_the_stance():
    """The blocks overlap, as in two threads."""
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(force_eager())
        second.enter_context(force_eager())
        first.close()
        assert stance() == 'force_eager'
    assert stance() == 'default'


def test_measurement_context_shares_force_eager(model):
    """With a stance of its own, `measurement_context` would restore the one that it found, which is out of date."""
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(force_eager())
        second.enter_context(measurement_context(model))
        first.close()
        assert stance() == 'force_eager'
    assert stance() == 'default'
