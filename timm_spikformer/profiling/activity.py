"""Activity of a model on a few images: spike rasters, attention maps and reconstructions."""
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..layers import SpikingSelfAttention
from ..neurons import LIF
from ..spikformer import Spikformer, find_spikformer
from .batches import check_images
from .counting import find_autoencoder, measurement_context

__all__ = ['Activity', 'check_layers', 'default_layers', 'divide_by_largest', 'record_activity']

_NUM_NEURONS = 64  # maximum number of neurons in the raster of a layer


@dataclass
class Activity:
    """Activity of a model on a few images.

    Args:
        images: The images, or means over time of the sequences, `[n, C, H, W]`, in the range 0 to 1. Event counts (2
            channels) are divided by the largest of the image.
        frames: Frames of event sequences, `[n, T, 2, H, W]`, divided by the largest count of the sequence.
        rasters: For each layer, the binary spikes of at most 64 evenly spaced neurons, `[n, T, neurons]`.
        attention: For each block, the attention that each token receives, `[n, H / patch_size, W / patch_size]`.
        masked: For a masked autoencoder, the images with masked patches gray, `[n, C, H, W]`.
        reconstructed: For a masked autoencoder, the images with masked patches reconstructed, `[n, C, H, W]`.

    >>> import timm
    >>> model = timm.create_model('test_spikformer_v2', time_steps=2)
    >>> activity = record_activity(model, torch.rand(1, 3, 64, 64), layers=['blocks.0.mlp.fc1'])
    >>> activity.rasters['blocks.0.mlp.fc1'].shape, activity.attention['blocks.0'].shape
    (torch.Size([1, 2, 64]), torch.Size([1, 4, 4]))
    """
    images: Tensor
    frames: Optional[Tensor] = None
    rasters: Dict[str, Tensor] = field(default_factory=dict)
    attention: Dict[str, Tensor] = field(default_factory=dict)
    masked: Optional[Tensor] = None
    reconstructed: Optional[Tensor] = None


def divide_by_largest(counts: Tensor, reference: Tensor) -> Tensor:
    """Divide counts `[n, ...]` by the largest value of each sample in `reference`, and clamp the result to 0 to 1."""
    largest = reference.flatten(1).amax(1).clamp(min=1e-6)
    return (counts / largest.view(-1, *(1,) * (counts.ndim - 1))).clamp(0, 1)


def _neurons(encoder: Spikformer) -> Dict[str, LIF]:
    """Return the LIF modules by layer name, as in a `Profile`."""
    neurons = {}
    for name, m in encoder.named_modules():
        if isinstance(m, LIF):
            neurons[name.rpartition('.')[0]] = m
    return neurons


def default_layers(encoder: Spikformer) -> List[str]:
    """Return the names of the last layer of each stem stage, and of attention and MLP in the first and last block."""
    names = list(_neurons(encoder))
    parts = [f'stem.stages.{i}' for i in range(len(encoder.stem.stages))]
    for i in sorted({0, len(encoder.blocks) - 1} if len(encoder.blocks) else ()):
        parts += [f'blocks.{i}.attn', f'blocks.{i}.mlp']
    return [[name for name in names if name.startswith(f'{part}.')][-1] for part in parts]


@torch.no_grad()
def _attention_map(qkv: Tensor, num_heads: int, grid: Tuple[int, int]) -> Tensor:
    """Average q k^T over queries, heads and time steps: spikes `[T, n, N, 3 * C]` to `[n, *grid]`, on the CPU."""
    T, n, N, _ = qkv.shape
    q, k, _ = qkv.float().view(T, n, N, 3, num_heads, -1).unbind(3)  # [T, n, N, heads, d]
    received = (k * q.mean(2, keepdim=True)).sum(-1)  # [T, n, N, heads]
    return received.mean((0, 3)).view(n, *grid).cpu()


def check_layers(encoder: Spikformer, layers: Optional[Sequence[str]]) -> None:
    """Raise a ValueError if a name is not that of a layer with neurons."""
    neurons = _neurons(encoder)
    for name in layers or ():
        if name not in neurons:
            raise ValueError(f'Unknown spiking layer {name!r}. Expected one of {", ".join(neurons)}.')


def record_activity(
        model: nn.Module,
        x: Tensor,
        layers: Optional[Sequence[str]] = None,
        time_steps: Optional[int] = None,
        mean: Optional[Sequence[float]] = None,
        std: Optional[Sequence[float]] = None,
) -> Activity:
    """Run a model on a few images, and record spikes and attention, or reconstructions for a masked autoencoder.

    The model is not changed. Spiking attention has no softmax, so an attention map is not a probability distribution:
    it is q k^T averaged over queries, heads and time steps.

    Args:
        model: Model, as in `profile`.
        x: Normalized images `[n, C, H, W]`, or sequences `[n, T, C, H, W]`, whose mean over time is shown.
        layers: Names of the layers whose spikes are recorded, as in a `Profile`. By default, the last
            layer of each stem stage, and of attention and MLP in the first and last block.
        time_steps: Number of time steps; by default, that of the model.
        mean: Mean used to normalize the images, a sequence of one value or of one per channel; by default, that of the
            model.
        std: Standard deviation used to normalize the images, in the same form.

    Raises:
        ValueError: A name in `layers` is not that of a layer with neurons, `x` is not a batch of images or sequences,
            or `mean` or `std` does not fit its channels.
    """
    encoder = find_spikformer(model)
    mae = find_autoencoder(model)
    neurons = _neurons(encoder)
    layers = default_layers(encoder) if layers is None else list(layers)
    check_layers(encoder, layers)
    x = check_images(x).to(next(encoder.parameters()).device)
    for name, values in (('mean', mean), ('std', std)):
        if values is not None and (not hasattr(values, '__len__') or len(values) not in (1, x.shape[-3])):
            raise ValueError(
                f'{name} must contain one value, or one for each of {x.shape[-3]} channels, got {values!r}.')
    n, grid = len(x), (x.shape[-2] // encoder.patch_size, x.shape[-1] // encoder.patch_size)

    cfg = getattr(encoder, 'pretrained_cfg', {})
    mean = cfg.get('mean', (0.,)) if mean is None else mean
    std = cfg.get('std', (1.,)) if std is None else std

    is_events = x.shape[-3] == 2

    def to_counts(images: Tensor) -> Tensor:
        """Undo the normalization."""
        m, s = (torch.tensor(v if len(v) in (1, images.shape[-3]) else [sum(v) / len(v)]) for v in (mean, std))
        return images.float().cpu() * s.view(-1, 1, 1) + m.view(-1, 1, 1)

    def to_pixels(images: Tensor) -> Tensor:
        if is_events:
            return divide_by_largest(to_counts(images), to_counts(shown))
        return to_counts(images).clamp(0, 1)

    shown = x.mean(1) if x.ndim == 5 else x
    activity = Activity(to_pixels(shown))
    if is_events and x.ndim == 5:
        activity.frames = divide_by_largest(to_counts(x), to_counts(x))
    handles = []

    def record_spikes(name: str) -> None:
        def hook(m: nn.Module, args: Tuple, spikes: Tensor) -> None:
            flat = spikes.reshape(len(spikes), n, -1)
            at = torch.linspace(0, flat.shape[2] - 1, min(_NUM_NEURONS, flat.shape[2]), device=flat.device).long()
            activity.rasters[name] = flat[:, :, at].transpose(0, 1).cpu()
        handles.append(neurons[name].register_forward_hook(hook))

    def record_attention(name: str, attn: SpikingSelfAttention) -> None:
        def hook(m: nn.Module, args: Tuple, qkv: Tensor) -> None:
            activity.attention[name] = _attention_map(qkv, attn.num_heads, grid)
        handles.append(attn.qkv.register_forward_hook(hook))

    try:
        for name in layers:
            record_spikes(name)
        if mae is None:  # the encoder of a masked autoencoder processes only visible tokens
            for i, block in enumerate(encoder.blocks):
                record_attention(f'blocks.{i}', block.attn)
        with measurement_context(encoder, time_steps):
            if mae is None:
                model(x)
            else:
                _, masked, reconstructed = mae.reconstruct(x)
                activity.masked, activity.reconstructed = to_pixels(masked), to_pixels(reconstructed)
    finally:
        for handle in handles:
            handle.remove()
    activity.rasters = {name: activity.rasters[name] for name in layers}
    return activity
