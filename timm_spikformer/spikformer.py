""" Spikformer and Spikformer V2

Spiking vision transformers: every activation between layers is a spike, or a small integer sum of spikes.

`Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN Ticket` - https://arxiv.org/abs/2401.02020
`Spikformer: When Spiking Neural Network Meets Transformer` - https://arxiv.org/abs/2209.15425

The authors have released code for V1 only, https://github.com/ZK-Zhou/spikformer. V1 follows it. V2 is built from the
paper and its published parameter counts; the docstrings say where a choice is this project's.
"""
import numbers
from collections import OrderedDict
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.fx
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, to_2tuple
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_model_traits,
    list_models,
    register_model,
)
from torch import Tensor, nn

from ._timm import FeatureGetterNet, feature_take_indices, update_model_args, update_model_input_size
from .checkpoints import check_keys, checkpoint_filter_fn
from .kernels.rules import back_end, in_transform
from .layers import SpikingBlock, SpikingBlocks
from .masking import Visible
from .neurons import carried_membranes
from .pretrained import locate_weights, shipped_weights
from .recompute import checkpoint_once
from .stems import STEMS

__all__ = ['Spikformer', 'check_model_name', 'find_spikformer']


@torch.fx.wrap  # checks and branches on the shape, which symbolic tracing cannot
def to_time_major(x: Tensor, time_steps: int, in_chans: int, patch_size: int) -> Tuple[Tensor, int]:
    """Check the input and put time first: `[B, C, H, W] -> [1, B, ...]`, `[B, T, C, H, W] -> [T, B, ...]`, and T.

    On a CPU the images become channels-last, and with them all maps of the stem, as the kernels expect it. A compiler
    chooses its layouts itself.

    Raises:
        ValueError: The number of dimensions, of channels or of time steps, or the image size, is not what is expected.
    """
    if x.ndim != 4 and x.ndim != 5:
        raise ValueError(
            f'Expected images [B, C, H, W] or sequences [B, T, C, H, W], got {x.ndim} dimensions: {x.shape}.')
    if x.shape[-3] != in_chans:
        raise ValueError(f'Expected {in_chans} channels (in_chans), got {x.shape[-3]} in an input of {x.shape}.')
    if x.shape[-2] % patch_size != 0 or x.shape[-1] % patch_size != 0:
        raise ValueError(
            f'Height and width must be multiples of the patch size {patch_size}, got an input of {x.shape}.')
    if x.ndim == 5:
        if x.shape[1] == 0:
            raise ValueError(f'Expected sequences of at least one time step, got an input of {x.shape}.')
        x, time_steps = x.transpose(0, 1), x.shape[1]
    else:
        x = x.unsqueeze(0)
    if torch.jit.is_scripting():
        is_channels_last = x.device.type == 'cpu'
    else:  # vmap has no rule for memory formats
        is_channels_last = not torch.compiler.is_compiling() and not in_transform() and back_end(x) == 'cpu'
    if is_channels_last:
        S = x.shape[0]
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (S, -1))
    return x, time_steps


def mean_over_time(x: Tensor) -> Tensor:
    """Return the mean over time, `[T, ...] -> [...]`; over all steps so far where membranes are carried."""
    if not torch.jit.is_scripting():
        carried = carried_membranes()
        if carried is not None:
            return carried.mean_over_time(x)
    return x.mean(0)


def check_time_steps(time_steps: int) -> int:
    """Return a number of time steps as Python's int.

    Raises:
        ValueError: It is not an integer of at least 1; integers of NumPy are, True is not.
    """
    is_integer = isinstance(time_steps, numbers.Integral) and not isinstance(time_steps, bool)
    if not is_integer or time_steps < 1:
        raise ValueError(f'time_steps must be an integer of at least 1, got {time_steps!r}.')
    return int(time_steps)


class SpikformerHead(ClassifierHead):
    """timm's classifier head, whose `reset()` without arguments does nothing.

    spikingjelly's `reset_net` calls the `reset` of every module that has one, to reset the state of neurons.
    """

    def reset(self, num_classes: Optional[int] = None, *args: Any, **kwargs: Any) -> None:
        if num_classes is not None:
            super().reset(num_classes, *args, **kwargs)


class Spikformer(nn.Module):
    """ Spikformer, a spiking vision transformer

    A stem of four convolutional stages, encoder blocks of spiking self-attention and spiking MLP, and a linear
    classifier on the mean over time and tokens.

    An image `[B, C, H, W]` is presented unchanged at each of `time_steps` steps; what is the same at all of them, the
    first convolution and its BN, is computed once. Event or video input `[B, T, C, H, W]` brings its own number of
    steps. Weights depend neither on the number of steps nor on the size of the image, which may be any multiple of the
    patch. The membranes live inside one forward call: there is no state to reset.
    """

    def __init__(
            self,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            patch_size: int = 16,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            stem: str = 'scs',
            stem_strides: Optional[Sequence[int]] = None,
            embed_dim: int = 512,
            depth: int = 8,
            num_heads: int = 8,
            mlp_ratio: float = 4.,
            attn_scale: float = 0.125,
            time_steps: int = 4,
            drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        """
        Args:
            img_size: Nominal input size. The model takes any; a given one is checked against the patch size.
            patch_size: Pixels per token and side: 1, 2, 4, 8 or 16.
            in_chans: Number of input channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling over tokens, '' for none.
            stem: 'scs' (Spiking Convolutional Stem, V2) or 'sps' (Spiking Patch Splitting, V1).
            stem_strides: Stride, 1 or 2, of each of the four stages of the stem. By default the last ones reduce.
            embed_dim: Width of the encoder.
            depth: Number of encoder blocks.
            num_heads: Number of attention heads. The published parameter counts do not depend on it; 8 at width 512
                is V1's.
            mlp_ratio: Width of the MLP's hidden layer over embed_dim.
            attn_scale: Factor of q k^T v before the attention neuron: 0.125 in the authors' V1 code for ImageNet and
                CIFAR-10, 0.25 in their code for CIFAR10-DVS.
            time_steps: Number of time steps for which an image is presented.
            drop_rate: Dropout before the classifier.
            proj_drop_rate: Dropout of the spikes that leave the linear layers, drawn anew at each time step.
            drop_path_rate: Stochastic depth rate of the last block; it drops a branch at all time steps together.
        """
        init_args = {k: v for k, v in locals().items() if k not in ('self', '__class__', 'device', 'dtype')}
        super().__init__()
        self._init_args = init_args
        dd = {'device': device, 'dtype': dtype}
        if stem not in STEMS:
            raise ValueError(f'Unknown stem {stem!r}, expected one of {", ".join(map(repr, STEMS))}.')
        if depth < 0:
            raise ValueError(f'depth must not be negative, got {depth}.')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.patch_size = patch_size
        self.num_features = self.embed_dim = embed_dim
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.set_time_steps(time_steps)

        self.stem = STEMS[stem](in_chans, embed_dim, patch_size, stem_strides, **dd)
        dpr = calculate_drop_path_rates(drop_path_rate, depth)
        self.blocks = SpikingBlocks(*[
            SpikingBlock(
                embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                attn_scale=attn_scale,
                proj_drop=proj_drop_rate,
                drop_path=dpr[i],
                **dd,
            )
            for i in range(depth)
        ])
        self.head = SpikformerHead(embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features

        # one level per stage of the stem, but for the last: the encoder runs on it, so its output is the level
        self.num_levels = len(self.stem.widths)
        self.feature_info = []
        reduction = 1
        for i, (num_chs, stride) in enumerate(zip(self.stem.widths, self.stem.strides)):
            reduction *= stride
            is_last = i == self.num_levels - 1
            self.feature_info.append(
                dict(num_chs=num_chs, reduction=reduction, module='blocks' if is_last else f'stem.stages.{i}'))

        if img_size is not None:
            self.set_input_size(img_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as V1 does: PyTorch's scale for convolutions and the encoder, no bias, a small classifier.

        BN keeps every neuron's current at unit variance, so in train mode neurons fire at every depth.
        """
        for m in self.modules():
            self.init_layer(m)

    @torch.jit.ignore
    def init_layer(self, m: nn.Module) -> None:
        """Initialise one layer of this model."""
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.reset_parameters()
            if m is self.head.fc:
                nn.init.trunc_normal_(m.weight, std=.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
            nn.init.zeros_(m.running_mean)
            nn.init.ones_(m.running_var)
            nn.init.zeros_(m.num_batches_tracked)

    def _check_img_size(self, img_size: Union[int, Tuple[int, int]]) -> Tuple[int, int]:
        size = to_2tuple(img_size)
        if any(s < self.patch_size or s % self.patch_size for s in size):
            raise ValueError(
                f'img_size must be a positive multiple of the patch size {self.patch_size}, got {img_size}.')
        return size

    @torch.jit.ignore
    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Record another nominal input size. No weight depends on it."""
        update_model_input_size(self, self._check_img_size(img_size))

    @torch.jit.ignore
    def set_time_steps(self, time_steps: int) -> None:
        """Present images for another number of time steps, from the next forward on; exported with the model."""
        self.time_steps = check_time_steps(time_steps)
        update_model_args(self, time_steps=self.time_steps)

    @torch.jit.ignore
    def get_init_args(self) -> Dict[str, Any]:
        """Arguments of `__init__`, without device and dtype, that build this model, as changed by its methods since."""
        return {
            **self._init_args,
            'img_size': get_model_traits(self).get('img_size'),
            'num_classes': self.num_classes,
            'global_pool': self.head.global_pool.pool_type,
            'stem_strides': list(self.stem.strides),
            'depth': len(self.blocks),
            'time_steps': self.time_steps,
        }

    @torch.jit.ignore
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what `pretrained=True` loads, see `checkpoint_filter_fn`; timm does so with `checkpoint_path`.

        Raises:
            RuntimeError: With `strict`, the state dict is of another architecture.
            ValueError: A tensor has another shape, or the checkpoint is of code with another attention scale.
        """
        converted = OrderedDict(checkpoint_filter_fn(state_dict, self))
        if strict:
            check_keys(converted, self)
        converted._metadata = getattr(state_dict, '_metadata', {})
        return super().load_state_dict(converted, strict, assign)

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return set()  # timm leaves out BN and biases by their shape, and there is nothing else

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^stem',
            blocks=[(r'^blocks\.(\d+)', None)],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = self.stem.grad_checkpointing = self.blocks.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features

    def _present(self, x: Tensor) -> Tuple[Tensor, int]:
        """Check the input, put time first and return the number of time steps: see `to_time_major`."""
        time_steps = self.time_steps
        if not torch.jit.is_scripting():
            carried = carried_membranes()
            if carried is not None:
                time_steps = carried.time_steps
        return to_time_major(x, time_steps, self.in_chans, self.patch_size)

    @torch.jit.ignore
    def _forward_stages(
            self,
            x: Tensor,
            time_steps: int,
            num_levels: int,
            take_indices: List[int],
    ) -> Tuple[Tensor, List[Tensor]]:
        """Run some stages of the stem, and return the output of some.

        Args:
            x: `[T or 1, B, C, H, W]`
            time_steps: T
            num_levels: Number of stages to run
            take_indices: Stages, other than the last one, whose output to return
        Returns:
            The last output `[T, B, C', H', W']`, and the means over time of those that are to be returned
        """
        taken: List[Tensor] = []
        for i, stage in enumerate(self.stem.stages):
            if i < num_levels:
                if self.grad_checkpointing:
                    x = checkpoint_once(stage, x, time_steps, None)
                else:
                    x = stage(x, time_steps)
                if i < self.num_levels - 1 and i in take_indices:
                    taken.append(mean_over_time(x))
        return x, taken

    @torch.jit.ignore
    def _forward_each_block(self, x: Tensor) -> Tuple[Tensor, List[Tensor]]:
        """Run the encoder blocks on tokens `[T, B, N, C]`; return the means over time of the input and each output."""
        taken = [mean_over_time(x)]
        for block in self.blocks:
            x = checkpoint_once(block, x) if self.grad_checkpointing else block(x)
            taken.append(mean_over_time(x))
        return x, taken

    def _forward_maps(self, x: Tensor) -> Tensor:
        """Run stem and blocks, `[B, C, H, W]` or `[B, T, C, H, W]` to `[T, B, D, H / patch, W / patch]`."""
        x, time_steps = self._present(x)
        return self._encode_maps(self.stem(x, time_steps))

    def _encode_maps(self, x: Tensor) -> Tensor:
        """Run the encoder blocks on the maps of the stem, `[T, B, D, H', W']`; a pruned model has neither."""
        if len(self.stem.stages) < self.num_levels:
            return x
        H, W = x.shape[-2:]
        x = self.blocks(x.flatten(3).transpose(2, 3))
        return x.transpose(2, 3).unflatten(3, (H, W))

    @torch.jit.ignore
    def forward_tokens(
            self,
            x: Tensor,
            visible: Optional[Tensor] = None,
            take_blocks: bool = False,
    ) -> Tuple[Tensor, List[Tensor]]:
        """Return features as tokens, row by row, and on request the stem's output and that of each block.

        Args:
            x: Images `[B, C, H, W]` or sequences `[B, T, C, H, W]`
            visible: Indices of the visible tokens, `[B, N']`, in increasing order. Nothing of the others reaches them.
            take_blocks: Return the stem's output and that of each block
        Returns:
            Features `[B, N, D]`, or `[B, N', D]` of the visible tokens, and the list, all of them means over time
        """
        grid: Optional[Visible] = None
        x, time_steps = self._present(x)
        if visible is not None:
            grid = (visible, x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        x = self.stem(x, time_steps, grid)
        x = x.flatten(3).transpose(2, 3)  # [T, B, N, C]
        if visible is not None:
            x = x.gather(2, visible.unsqueeze(2).expand(x.shape[0], -1, -1, x.shape[3]))
        taken: List[Tensor] = []
        if take_blocks:
            x, taken = self._forward_each_block(x)
        else:
            x = self.blocks(x)
        return mean_over_time(x), taken

    def forward_intermediates(
            self,
            x: Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[Tensor], Tuple[Tensor, List[Tensor]]]:
        """ Forward features that returns intermediates.

        Args:
            x: Images `[B, C, H, W]` or sequences `[B, T, C, H, W]`
            indices: Take last n levels if int, all if None, select matching indices if sequence. The first three are
                stages of the stem, the fourth is the encoder's output.
            norm: Apply norm layer to compatible intermediates (there is none)
            stop_early: Stop iterating over blocks when last desired intermediate hit
            output_fmt: Shape of intermediate feature outputs
            intermediates_only: Only return intermediate features
        Returns:
            The final features and the intermediates, `[B, C, H, W]` each, averaged over time
        """
        assert output_fmt == 'NCHW', 'Output format must be NCHW.'
        take_indices, max_index = feature_take_indices(self.num_levels, indices)
        num_levels = max_index + 1 if stop_early else len(self.stem.stages)
        x, time_steps = self._present(x)
        x, intermediates = self._forward_stages(x, time_steps, num_levels, take_indices)
        if num_levels == self.num_levels:
            x = self._encode_maps(x)
        x = mean_over_time(x)
        if self.num_levels - 1 in take_indices:
            intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """ Prune layers not required for specified intermediates.
        """
        take_indices, max_index = feature_take_indices(self.num_levels, indices)
        prune_end = max_index < self.num_levels - 1
        if prune_end:
            self.stem.stages = self.stem.stages[:max_index + 1]
            self.blocks = SpikingBlocks()
            # the head is sized for the encoder's output, so it goes too
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` or sequences `[B, T, C, H, W]` to features `[B, D, H / patch, W / patch]`."""
        return mean_over_time(self._forward_maps(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    @torch.jit.ignore
    def classify_steps(self, x: Tensor) -> Tensor:
        """Return the logits after each time step, `[T, B, K]`, given the features at each, `[T, B, D, H, W]`."""
        return torch.stack([self.forward_head(x[:t].mean(0)) for t in range(1, len(x) + 1)])

    @torch.jit.ignore
    def forward_steps(self, x: Tensor) -> Tensor:
        """Return the logits after each time step, `[T, B, num_classes]`; the last are those of `forward` in eval mode.

        Time is causal: in eval mode the logits after t steps are those of a model with `time_steps=t`.

        Args:
            x: Images `[B, C, H, W]` or sequences `[B, T, C, H, W]`
        """
        return self.classify_steps(self._forward_maps(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def check_model_name(name: str) -> None:
    """
    Raises:
        ValueError: It is not the name of a registered Spikformer.
    """
    models = list_models(module='spikformer')
    if name not in models:
        raise ValueError(f'There is no Spikformer {name!r}, expected one of {", ".join(models)}.')


def find_spikformer(model: nn.Module) -> Spikformer:
    """The Spikformer that a module is or holds: one of timm's or transformers' wrappers, a masked autoencoder, DDP.

    Raises:
        ValueError: There is none, or more than one.
    """
    found = [m for m in model.modules() if isinstance(m, Spikformer)]
    if len(found) != 1:
        raise ValueError(
            f'Expected a Spikformer or a module that holds one: a model of timm.list_models(module="spikformer"), a '
            f'SpikformerMAE, or one of the Spikformer classes of transformers. Got a {type(model).__name__}, which '
            f'holds {len(found) or "none"}.')
    return found[0]


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (14, 14), 'crop_pct': 1.0,
        'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.stages.0.down.conv', 'classifier': 'head.fc',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:2401.02020',
        'paper_name': 'Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN Ticket',
        'origin_url': 'https://github.com/ZK-Zhou/spikformer',
        **kwargs
    }


def _cfg_v1(**kwargs) -> Dict[str, Any]:
    return _cfg(**{
        'first_conv': 'stem.stages.0.proj.conv', 'paper_ids': 'arXiv:2209.15425',
        'paper_name': 'Spikformer: When Spiking Neural Network Meets Transformer',
        **kwargs
    })


_CIFAR10 = dict(
    num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8),
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616),
)

# Frames of the authors' code are counts of events, given to the network as they are.
_CIFAR10_DVS = dict(num_classes=10, input_size=(2, 128, 128), pool_size=(8, 8), mean=(0., 0.), std=(1., 1.))

# Where there is no file, weights are those that a Hub namespace of the user's has under the same name.
default_cfgs = generate_default_cfgs({
    'spikformer_v2_8_384.in1k': _cfg(),
    'spikformer_v2_8_512.in1k': _cfg(),
    'spikformer_v2_8_768.in1k': _cfg(),
    'spikformer_v2_16_768.in1k': _cfg(),
    'spikformer_v2_4_384_patch4_32.cifar10': _cfg(**_CIFAR10),
    'spikformer_v2_2_128_patch4_32.cifar10': _cfg(**_CIFAR10),
    'spikformer_v2_2_64_patch4_32.fashion_mnist': _cfg(
        file=shipped_weights('spikformer_v2_2_64_patch4_32.fashion_mnist'),
        num_classes=10, input_size=(3, 28, 28), pool_size=(7, 7), mean=(0.286,) * 3, std=(0.353,) * 3,
        label_names=(
            'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'),
    ),
    'spikformer_v2_2_64_patch4_32.cifar10': _cfg(**_CIFAR10),
    'spikformer_v2_2_256_patch16_128.cifar10_dvs': _cfg(**_CIFAR10_DVS),
    'test_spikformer_v2.untrained': _cfg(input_size=(3, 64, 64), pool_size=(4, 4)),

    'spikformer_8_384.in1k': _cfg_v1(),
    'spikformer_8_512.in1k': _cfg_v1(),
    'spikformer_8_768.in1k': _cfg_v1(),
    'spikformer_4_384_patch4_32.cifar10': _cfg_v1(**_CIFAR10),
    'spikformer_2_256_patch16_128.cifar10_dvs': _cfg_v1(**_CIFAR10_DVS),
})


def _pretrained_filter_fn(state_dict: Dict[str, Any], model: Spikformer) -> Dict[str, Tensor]:
    """Convert a checkpoint, and fail with a short message if it is of another architecture."""
    state_dict = checkpoint_filter_fn(state_dict, model)
    check_keys(state_dict, model)
    return state_dict


def _check_feature_args(model_args: Dict[str, Any], kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Check the arguments that timm gives to models for dense prediction; return `kwargs` without `output_stride`."""
    kwargs = dict(kwargs)
    feature_cls = kwargs.get('feature_cls', 'getter')
    if kwargs.get('features_only') and feature_cls not in ('getter', FeatureGetterNet):
        raise ValueError(
            f"feature_cls must be 'getter', got {feature_cls!r}: features are means over time, which the other "
            f'feature extractors of timm cannot compute.')
    args = {**model_args, **kwargs}
    patch_size = args.get('patch_size', 16)
    if kwargs.pop('output_stride', patch_size) != patch_size:
        raise ValueError(
            f'output_stride must be the patch size, {patch_size}, got {args["output_stride"]}: the stem has no dilated '
            f'convolutions. Choose the resolution of the features with patch_size and stem_strides.')
    return kwargs


def _create_spikformer(
        variant: str,
        pretrained: bool,
        model_args: Dict[str, Any],
        kwargs: Dict[str, Any],
) -> Spikformer:
    kwargs = _check_feature_args(model_args, kwargs)
    if pretrained:
        model_args, kwargs = locate_weights(variant, model_args, kwargs)
    kwargs = {**model_args, **kwargs}
    out_indices = kwargs.pop('out_indices', (0, 1, 2, 3))
    return build_model_with_cfg(
        Spikformer,
        variant,
        pretrained,
        pretrained_filter_fn=_pretrained_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls='getter'),
        **kwargs,
    )


@register_model
def spikformer_v2_8_384(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer V2-8-384, 29.11 M parameters."""
    model_args = dict(embed_dim=384, depth=8, num_heads=8)
    return _create_spikformer('spikformer_v2_8_384', pretrained, model_args, kwargs)


@register_model
def spikformer_v2_8_512(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer V2-8-512, 51.55 M parameters."""
    model_args = dict(embed_dim=512, depth=8, num_heads=8)
    return _create_spikformer('spikformer_v2_8_512', pretrained, model_args, kwargs)


@register_model
def spikformer_v2_8_768(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer V2-8-768, a size between those that the paper reports."""
    model_args = dict(embed_dim=768, depth=8, num_heads=12)
    return _create_spikformer('spikformer_v2_8_768', pretrained, model_args, kwargs)


@register_model
def spikformer_v2_16_768(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer V2-16-768, 172.28 M parameters, which the paper trains with one time step.

    172.70 M is quoted in places. No structure fits it together with the counts of the two 8-layer models.
    """
    model_args = dict(embed_dim=768, depth=16, num_heads=12, time_steps=1)
    return _create_spikformer('spikformer_v2_16_768', pretrained, model_args, kwargs)


@register_model
def spikformer_v2_4_384_patch4_32(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer V2-4-384 for 32x32 images, this project's counterpart of V1's CIFAR model."""
    model_args = dict(patch_size=4, embed_dim=384, depth=4, num_heads=12)
    return _create_spikformer('spikformer_v2_4_384_patch4_32', pretrained, model_args, kwargs)


@register_model
def spikformer_v2_2_128_patch4_32(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer V2-2-128 for 32x32 images, small enough to train on a CPU; strides as in V2-2-64."""
    model_args = dict(patch_size=4, stem_strides=(1, 2, 2, 1), embed_dim=128, depth=2, num_heads=4)
    return _create_spikformer('spikformer_v2_2_128_patch4_32', pretrained, model_args, kwargs)


@register_model
def spikformer_v2_2_64_patch4_32(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer V2-2-64 for 32x32 images, the demo's model: trains in minutes on a CPU.

    Its stem keeps the resolution in the first stage, where the image becomes spikes, and then reduces early: on the
    demo's data that gave 82.1 % against 79.0 % for strides (2, 2, 1, 1), at 1.4 times the time.
    """
    model_args = dict(patch_size=4, stem_strides=(1, 2, 2, 1), embed_dim=64, depth=2, num_heads=2, time_steps=1)
    return _create_spikformer('spikformer_v2_2_64_patch4_32', pretrained, model_args, kwargs)


@register_model
def spikformer_v2_2_256_patch16_128(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer V2-2-256 for 128x128 event frames of two channels, this project's counterpart of V1's DVS model."""
    model_args = dict(embed_dim=256, depth=2, num_heads=16, attn_scale=0.25, time_steps=16)
    return _create_spikformer('spikformer_v2_2_256_patch16_128', pretrained, model_args, kwargs)


@register_model
def test_spikformer_v2(pretrained: bool = False, **kwargs) -> Spikformer:
    """A tiny Spikformer V2 for unit tests."""
    model_args = dict(embed_dim=64, depth=2, num_heads=2)
    return _create_spikformer('test_spikformer_v2', pretrained, model_args, kwargs)


@register_model
def spikformer_8_384(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer-8-384 (V1), 16.81 M parameters."""
    model_args = dict(stem='sps', embed_dim=384, depth=8, num_heads=8)
    return _create_spikformer('spikformer_8_384', pretrained, model_args, kwargs)


@register_model
def spikformer_8_512(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer-8-512 (V1), 29.68 M parameters."""
    model_args = dict(stem='sps', embed_dim=512, depth=8, num_heads=8)
    return _create_spikformer('spikformer_8_512', pretrained, model_args, kwargs)


@register_model
def spikformer_8_768(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer-8-768 (V1), 66.34 M parameters; heads as in the family's later models."""
    model_args = dict(stem='sps', embed_dim=768, depth=8, num_heads=12)
    return _create_spikformer('spikformer_8_768', pretrained, model_args, kwargs)


@register_model
def spikformer_4_384_patch4_32(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer-4-384 (V1) for 32x32 images, V1's CIFAR model."""
    model_args = dict(stem='sps', patch_size=4, embed_dim=384, depth=4, num_heads=12)
    return _create_spikformer('spikformer_4_384_patch4_32', pretrained, model_args, kwargs)


@register_model
def spikformer_2_256_patch16_128(pretrained: bool = False, **kwargs) -> Spikformer:
    """Spikformer-2-256 (V1) for 128x128 event frames of two channels, V1's CIFAR10-DVS model of 16 time steps.

    Its attention scale is 0.25, which is one over the square root of a head's width; V1's other models have 0.125.
    """
    model_args = dict(stem='sps', embed_dim=256, depth=2, num_heads=16, attn_scale=0.25, time_steps=16)
    return _create_spikformer('spikformer_2_256_patch16_128', pretrained, model_args, kwargs)
