"""Typical user modifications of a model: hooks, adapters, pruning, replaced norms and neurons, sharing, wrapping.

Each modification is a function `(rng, model)` that changes a model in place, at a random place drawn with `rng`. It may
return a context manager, which must be active while the model is called.
"""
import contextlib
import functools
import random
from typing import Callable, Dict, List, Tuple, Type

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrizations, parametrize, prune

from timm_spikformer import LIF
from timm_spikformer.layers import ConvBNLIF, LinearBNLIF

PRODUCTS = (nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def places(model: nn.Module, *classes: Type[nn.Module]) -> List[Tuple[nn.Module, str, nn.Module]]:
    """Return parent, name and module of all instances of the classes in the encoder."""
    return [
        (parent, name, m) for path, parent in model.named_modules() for name, m in parent.named_children()
        if isinstance(m, classes) and 'decoder' not in path and 'head' not in path
    ]


def draw(rng: random.Random, model: nn.Module, *classes: Type[nn.Module]) -> Tuple[nn.Module, str, nn.Module]:
    return rng.choice(places(model, *classes))


def any_module(rng: random.Random, model: nn.Module) -> nn.Module:
    return draw(rng, model, *PRODUCTS, *NORMS, LIF, nn.MaxPool2d, ConvBNLIF, LinearBNLIF)[2]


class LoRA(nn.Module):
    """A layer with a parallel low-rank adapter."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        if isinstance(base, nn.Conv2d):
            args = dict(kernel_size=base.kernel_size, stride=base.stride, padding=base.padding, bias=False)
            self.down = nn.Conv2d(base.in_channels, 2, **args)
            self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Scale(nn.Module):
    def __init__(self, factor: float = 0.7):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class ScaledLIF(LIF):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.7


class ShiftedBN2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.3


class ShiftedBN1d(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.3


class ScaledTensor(torch.Tensor):
    """A tensor subclass whose values are multiplied by 1.5 in each operation."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        plain = [a.as_subclass(Tensor) * 1.5 if isinstance(a, ScaledTensor) else a for a in args]
        return func(*plain, **(kwargs or {}))


def pre_hook(rng, model):
    any_module(rng, model).register_forward_pre_hook(lambda m, args: (args[0] * 0.9, *args[1:]))


def hook(rng, model):
    any_module(rng, model).register_forward_hook(lambda m, args, out: out * 0.9)


def in_place_hook(rng, model):
    def halve(m, args, out):
        with torch.no_grad():
            out.mul_(0.5)
    draw(rng, model, LIF)[2].register_forward_hook(halve)


def backward_hook(rng, model):
    draw(rng, model, *PRODUCTS, *NORMS, LIF)[2].register_full_backward_hook(
        lambda m, grad_in, grad_out: tuple(g if g is None else g * 0.5 for g in grad_in))


def backward_pre_hook(rng, model):
    draw(rng, model, *PRODUCTS, *NORMS, LIF)[2].register_full_backward_pre_hook(
        lambda m, grad_out: tuple(g * 0.5 for g in grad_out))


@contextlib.contextmanager
def _global_hook():
    def scale(m, args, out):
        return out * 0.8 if isinstance(m, (LIF, nn.BatchNorm2d)) else None
    handle = torch_module.register_module_forward_hook(scale)
    try:
        yield
    finally:
        handle.remove()


def global_hook(rng, model):
    return _global_hook()


@contextlib.contextmanager
def _class_method(cls, forward):
    original = cls.forward
    cls.forward = forward
    try:
        yield
    finally:
        cls.forward = original


def class_forward(rng, model):
    cls = rng.choice((nn.Conv2d, nn.Linear, nn.BatchNorm2d, LIF))
    original = cls.forward
    return _class_method(cls, lambda self, x: original(self, x) * 0.8)


def instance_forward(rng, model):
    m = draw(rng, model, *PRODUCTS, *NORMS, LIF, nn.MaxPool2d)[2]
    forward = type(m).forward
    m.forward = functools.partial(lambda self, x: forward(self, x) * 0.8, m)


def pruned(rng, model):
    """Prune, then change the original weights; a pre-hook reapplies the mask."""
    m = draw(rng, model, *PRODUCTS)[2]
    prune.random_unstructured(m, 'weight', 0.5)
    with torch.no_grad():
        m.weight_orig.mul_(1.3)


def pruned_permanently(rng, model):
    m = draw(rng, model, *PRODUCTS)[2]
    prune.remove(prune.l1_unstructured(m, 'weight', 0.5), 'weight')


def weight_norm(rng, model):
    parametrizations.weight_norm(draw(rng, model, *PRODUCTS)[2])


def old_weight_norm(rng, model):
    m = draw(rng, model, *PRODUCTS)[2]
    nn.utils.weight_norm(m)
    with torch.no_grad():
        m.weight_g.mul_(1.2)


def parametrized(rng, model):
    parametrize.register_parametrization(draw(rng, model, *PRODUCTS, *NORMS)[2], 'weight', Scale())


def subclass_parameter(rng, model):
    m = draw(rng, model, *PRODUCTS)[2]
    weight = m.weight.detach()
    del m.weight
    m.weight = weight.as_subclass(ScaledTensor)


def tensor_attribute(rng, model):
    m = draw(rng, model, *PRODUCTS)[2]
    weight = m.weight.detach() * 0.9
    del m.weight
    m.weight = weight


def lora(rng, model):
    parent, name, m = draw(rng, model, *PRODUCTS)
    setattr(parent, name, LoRA(m))


def scale_before_a_neuron(rng, model):
    parent, name, m = draw(rng, model, LIF)
    setattr(parent, name, nn.Sequential(Scale(), m))


def scale_after_a_neuron(rng, model):
    parent, name, m = draw(rng, model, LIF)
    setattr(parent, name, nn.Sequential(m, Scale()))


def scale_after_a_layer(rng, model):
    parent, name, m = draw(rng, model, LinearBNLIF)
    setattr(parent, name, nn.Sequential(m, Scale()))


def dropout(rng, model):
    parent, name, _ = rng.choice([p for p in places(model, nn.Identity) if 'drop' in p[1]])
    setattr(parent, name, nn.Dropout(0.3))


def scaled_neuron(rng, model):
    parent, name, _ = draw(rng, model, LIF)
    setattr(parent, name, ScaledLIF())


def other_constants(rng, model):
    parent, name, _ = draw(rng, model, LIF)
    setattr(parent, name, LIF(tau=rng.uniform(1.2, 4.), v_threshold=rng.uniform(0.3, 1.), alpha=rng.uniform(1., 6.)))


def learnable_constants(rng, model):
    """Make a constant of the neuron a parameter, as in PLIF, which learns its time constant."""
    m = draw(rng, model, LIF)[2]
    name = rng.choice(('tau', 'v_threshold', 'alpha'))
    value = getattr(m, name)
    delattr(m, name)
    setattr(m, name, nn.Parameter(torch.tensor(value)))


class StatelessNode(nn.Module):
    """spikingjelly's multi-step neuron, reset before each call."""

    def __init__(self):
        super().__init__()
        self.node = neuron.LIFNode(
            tau=2., decay_input=True, v_reset=0., detach_reset=True, step_mode='m',
            surrogate_function=surrogate.Sigmoid(4.))

    def forward(self, x: Tensor) -> Tensor:
        self.node.reset()
        return self.node(x)


def spikingjelly_neuron(rng, model):
    parent, name, _ = draw(rng, model, LIF)
    setattr(parent, name, StatelessNode())


def other_norm(rng, model):
    parent, name, m = draw(rng, model, *NORMS)
    n, is_2d = m.num_features, isinstance(m, nn.BatchNorm2d)
    cls = type(m)
    new = rng.choice([
        lambda: nn.GroupNorm(2, n) if n % 2 == 0 else nn.Identity(),
        nn.Identity,
        lambda: cls(n, affine=False),
        lambda: cls(n, track_running_stats=False),
        lambda: cls(n, eps=0.1, momentum=0.9),
        lambda: cls(n, momentum=None),
        lambda: ShiftedBN2d(n) if is_2d else ShiftedBN1d(n),
        lambda: nn.SyncBatchNorm(n),
    ])()
    setattr(parent, name, new)


def incomplete_norm(rng, model):
    m = draw(rng, model, *NORMS)[2]
    what = rng.choice(('bias', 'num_batches_tracked', 'statistics'))
    if what == 'statistics':
        m.running_mean = m.running_var = None
    else:
        setattr(m, what, None)


def frozen_norm(rng, model):
    """Keep some BN layers in eval mode regardless of the model's mode."""
    for _, _, m in rng.sample(places(model, *NORMS), 3):
        m.train = lambda mode=True: None
        m.training = False


def frozen_weights(rng, model):
    for _, _, m in rng.sample(places(model, *PRODUCTS, *NORMS), 4):
        m.requires_grad_(False)


def shared_block(rng, model):
    blocks = next(m.blocks for m in model.modules() if hasattr(m, 'blocks') and hasattr(m, 'stem'))
    blocks.append(blocks[0])


def shared_norm(rng, model):
    layers = [m for _, _, m in places(model, LinearBNLIF)]
    groups = [[m for m in layers if m.bn.num_features == n] for n in {m.bn.num_features for m in layers}]
    group = rng.choice([g for g in groups if len(g) > 1])
    group[0].bn = group[1].bn


def shared_neuron(rng, model):
    lif = LIF()
    for parent, name, _ in rng.sample(places(model, LIF), 3):
        setattr(parent, name, lif)


def other_convolution(rng, model):
    convs = [p for p in places(model, nn.Conv2d) if p[2].kernel_size == (3, 3)]
    parent, name, m = rng.choice(convs)
    groups = 2 if m.in_channels % 2 == 0 and m.out_channels % 2 == 0 else 1
    kwargs = rng.choice((
        dict(padding=1, padding_mode='reflect'), dict(padding=1, padding_mode='circular'), dict(padding='same'),
        dict(padding=2, dilation=2), dict(padding=1, groups=groups), dict(padding=1, bias=True)))
    setattr(parent, name, nn.Conv2d(m.in_channels, m.out_channels, 3, **{'bias': False, **kwargs}))


def larger_kernel(rng, model):
    convs = [p for p in places(model, nn.Conv2d) if p[2].kernel_size == (3, 3)]
    parent, name, m = rng.choice(convs)
    setattr(parent, name, nn.Conv2d(m.in_channels, m.out_channels, 5, padding=2))


def other_pool(rng, model):
    pools = places(model, nn.MaxPool2d)
    if pools:
        parent, name, _ = rng.choice(pools)
        setattr(parent, name, rng.choice((nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(2, 2), nn.MaxPool2d(5, 2, 2))))


def wrapped_layer(rng, model):
    parent, name, m = draw(rng, model, *PRODUCTS, *NORMS, LIF)
    setattr(parent, name, nn.Sequential(nn.Identity(), m))


def compiled_method(rng, model):
    """Simulate `Module.compile`, which sets `_compiled_call_impl`, without compiling."""
    m = draw(rng, model, *PRODUCTS, *NORMS)[2]
    m._compiled_call_impl = lambda *args: m._call_impl(*args) * 0.9


def function_mode(rng, model):
    return _Halved()


class _Halved(torch.overrides.TorchFunctionMode):
    """Function mode that scales the output of each normalization."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 0.9 if func is nn.functional.batch_norm else out


SURGERIES: Dict[str, Callable] = {f.__name__: f for f in (
    pre_hook, hook, in_place_hook, backward_hook, backward_pre_hook, global_hook, class_forward, instance_forward,
    pruned, pruned_permanently, weight_norm, old_weight_norm, parametrized, subclass_parameter, tensor_attribute, lora,
    scale_before_a_neuron, scale_after_a_neuron, scale_after_a_layer, dropout, scaled_neuron, other_constants,
    learnable_constants, spikingjelly_neuron, other_norm, incomplete_norm, frozen_norm, frozen_weights, shared_block,
    shared_norm, shared_neuron, other_convolution, larger_kernel, other_pool, wrapped_layer, compiled_method,
    function_mode)}
