"""The network of Spikformer and Spikformer V2: stem, encoder blocks, classifier, and the methods of a timm model."""
from collections import OrderedDict
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import torch
import torch.fx
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, to_2tuple
from timm.models import get_model_traits
from torch import Tensor, nn

from ._timm import feature_take_indices, update_model_args, update_model_input_size
from .arguments import check_integer, check_pooling, check_positive, check_rate
from .checkpoints import check_keys, checkpoint_filter_fn
from .layers import SpikingBlock, SpikingBlocks
from .masking import VisibleTokens
from .neurons import get_stateful_inference
from .recompute import checkpoint_with_bn
from .sequences import check_time_steps, mean_over_time, to_time_major
from .stems import STEMS

__all__ = ['Spikformer', 'find_spikformer']

# integer arguments and their minimum values
_INTEGERS = dict(patch_size=1, in_chans=1, num_classes=0, embed_dim=8, depth=0, num_heads=1)

torch.fx.wrap('to_time_major')  # a leaf for FX: it branches on the shape of the input


class SpikformerHead(ClassifierHead):
    """timm's classifier head with a `reset` that ignores calls without arguments.

    spikingjelly's `reset_net` calls the `reset` of every module that has one, to reset the state of neurons.
    """

    def reset(self, num_classes: Optional[int] = None, *args: Any, **kwargs: Any) -> None:
        if num_classes is not None:
            super().reset(num_classes, *args, **kwargs)


class Spikformer(nn.Module):
    """ Spikformer, a spiking vision transformer

    A stem of four convolutional stages, encoder blocks of spiking self-attention and spiking MLP, and a linear
    classifier on the mean over time and tokens.

    An image `[B, C, H, W]` is presented unchanged at each of `time_steps` steps; the first convolution and its BN are
    identical at all steps and computed once. For event or video input `[B, T, C, H, W]`, T is taken from the input.
    Weights depend on neither T nor the image size, which may be any multiple of the patch size. Membrane potentials are
    local to one forward call: there is no state to reset.

    >>> import timm
    >>> model = timm.create_model('spikformer_v2_2_64_patch4_32.fashion_mnist', pretrained=True, time_steps=2).eval()
    >>> images = torch.zeros(3, 3, 28, 28)
    >>> model(images).shape, model.forward_features(images).shape, model.forward_steps(images).shape
    (torch.Size([3, 10]), torch.Size([3, 64, 7, 7]), torch.Size([2, 3, 10]))
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
            img_size: Nominal input size, a multiple of patch_size. At run time, any multiple of patch_size is accepted.
            patch_size: Patch side in pixels: 1, 2, 4, 8 or 16.
            in_chans: Number of input channels.
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Pooling over tokens, '' for none.
            stem: 'scs' (Spiking Convolutional Stem, V2) or 'sps' (Spiking Patch Splitting, V1).
            stem_strides: Stride, 1 or 2, of each of the four stages. By default the last stages have stride 2.
            embed_dim: Width of the encoder.
            depth: Number of encoder blocks.
            num_heads: Number of attention heads. It cannot be inferred from the published parameter counts; V1 uses 8
                at width 512.
            mlp_ratio: Ratio of the MLP's hidden width to embed_dim.
            attn_scale: Factor of q k^T v before the attention neuron: 0.125 in the authors' V1 code for ImageNet and
                CIFAR-10, 0.25 in their code for CIFAR10-DVS.
            time_steps: Number of time steps for which an image is presented.
            drop_rate: Dropout rate before the classifier.
            proj_drop_rate: Dropout rate of the spikes of attention and MLP, sampled independently at each time step.
            drop_path_rate: Stochastic depth rate of the last block; a branch is dropped at all time steps together.

        Raises:
            ValueError: A value is invalid; the message states the argument, the value and what was expected.
        """
        super().__init__()
        self._init_args = init_args = dict(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            stem=stem,
            stem_strides=stem_strides,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            attn_scale=attn_scale,
            time_steps=time_steps,
            drop_rate=drop_rate,
            proj_drop_rate=proj_drop_rate,
            drop_path_rate=drop_path_rate,
        )
        dd = {'device': device, 'dtype': dtype}
        if not isinstance(stem, str) or stem not in STEMS:
            raise ValueError(f'Unknown stem {stem!r}, expected one of {", ".join(map(repr, STEMS))}.')
        for name, minimum in _INTEGERS.items():
            check_integer(name, init_args[name], minimum)
        for name in ('mlp_ratio', 'attn_scale'):
            check_positive(name, init_args[name])
        for name in ('drop_rate', 'proj_drop_rate', 'drop_path_rate'):
            check_rate(name, init_args[name])
        check_pooling(global_pool, num_classes)
        if embed_dim * mlp_ratio < 1:
            raise ValueError(f'embed_dim * mlp_ratio must be at least 1, got {embed_dim} * {mlp_ratio}.')
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

        # one feature level per stem stage; the last level is the output of the encoder, which follows the last stage
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
        """Initialize as in V1.

        Conv and linear weights are initialized by PyTorch's defaults, the head by trunc_normal (std 0.02), biases by 0.
        In train mode BN normalizes the input current of every neuron except `attn_lif`, so neurons fire at every depth.
        """
        for m in self.modules():
            self.init_layer(m)

    @torch.jit.ignore
    def init_layer(self, m: nn.Module) -> None:
        """Initialize one layer of this model."""
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
        if len(size) != 2:
            raise ValueError(f'img_size must be one integer or two, got {img_size!r}.')
        size = tuple(check_integer('img_size', s, 1) for s in size)
        if any(s % self.patch_size for s in size):
            raise ValueError(
                f'img_size must be a positive multiple of the patch size {self.patch_size}, got {img_size}.')
        return size

    @torch.jit.ignore
    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Set the nominal input size. No weight depends on it.

        Raises:
            ValueError: The size is not a positive multiple of the patch size.
        """
        update_model_input_size(self, self._check_img_size(img_size))

    @torch.jit.ignore
    def set_time_steps(self, time_steps: int) -> None:
        """Set the number of time steps for images. It is saved with the model's arguments.

        Raises:
            ValueError: `time_steps` is not an integer of at least 1.
        """
        self.time_steps = check_time_steps(time_steps)
        update_model_args(self, time_steps=self.time_steps)

    @torch.jit.ignore
    def get_init_args(self) -> Dict[str, Any]:
        """Return the arguments of `__init__`, without device and dtype, that create this model in its current form."""
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
        """Load a state dict of any format that `checkpoint_filter_fn` converts.

        The same formats can be passed to timm as `checkpoint_path`.

        Raises:
            RuntimeError: With `strict`, the state dict is from a different architecture.
            ValueError: A shape does not match, or the checkpoint's attention scale differs from the model's.
        """
        converted = OrderedDict(checkpoint_filter_fn(state_dict, self))
        if strict:
            check_keys(converted, self)
        converted._metadata = getattr(state_dict, '_metadata', {})
        return super().load_state_dict(converted, strict, assign)

    @torch.jit.ignore
    def no_weight_decay(self) -> set:
        return set()  # timm excludes BN parameters and biases by their shape; there are no others

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
        check_integer('num_classes', num_classes, 0)
        if global_pool is not None:
            check_pooling(global_pool, num_classes)
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features
        if getattr(self, 'pretrained_cfg', {}).get('label_names'):  # names of the classes of the former classifier
            self.pretrained_cfg = self.default_cfg = {**self.pretrained_cfg, 'label_names': None}

    def _prepare_input(self, x: Tensor) -> Tuple[Tensor, int]:
        """Check the input, put time first and return the number of time steps: see `to_time_major`."""
        time_steps = self.time_steps
        if not torch.jit.is_scripting():
            stateful = get_stateful_inference()
            if stateful is not None:
                stateful.check_input(x)
                time_steps = stateful.time_steps
        return to_time_major(x, time_steps, self.in_chans, self.patch_size)

    @torch.jit.ignore
    def _forward_stages(
            self,
            x: Tensor,
            time_steps: int,
            num_stages: int,
            take_indices: List[int],
    ) -> Tuple[Tensor, List[Tensor]]:
        """Run the first `num_stages` stages of the stem, and return selected outputs.

        Args:
            x: `[T or 1, B, C, H, W]`
            time_steps: T
            num_stages: Number of stages to run
            take_indices: Stages whose output is returned; the last stage of the stem is ignored

        Returns:
            The last output `[T, B, C', H', W']`, and the means over time of the selected outputs
        """
        outputs: List[Tensor] = []
        for i, stage in enumerate(self.stem.stages):
            if i < num_stages:
                if self.grad_checkpointing:
                    x = checkpoint_with_bn(stage, x, time_steps, None)
                else:
                    x = stage(x, time_steps)
                if i < self.num_levels - 1 and i in take_indices:
                    outputs.append(mean_over_time(x))
        return x, outputs

    @torch.jit.ignore
    def _forward_blocks(self, x: Tensor) -> Tuple[Tensor, List[Tensor]]:
        """Run the encoder blocks on tokens `[T, B, N, C]`; return the means over time of the input and each output."""
        outputs = [mean_over_time(x)]
        for block in self.blocks:
            x = checkpoint_with_bn(block, x) if self.grad_checkpointing else block(x)
            outputs.append(mean_over_time(x))
        return x, outputs

    def forward_maps(self, x: Tensor) -> Tensor:
        """Run the stem and the blocks on `[B, C, H, W]` or `[B, T, C, H, W]`; return `[T, B, D, H / p, W / p]`."""
        x, time_steps = self._prepare_input(x)
        return self._encode_maps(self.stem(x, time_steps))

    def _encode_maps(self, x: Tensor) -> Tensor:
        """Run the encoder blocks on the maps of the stem, `[T, B, D, H', W']`; a no-op if the encoder was pruned."""
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
            return_hidden_states: bool = False,
    ) -> Tuple[Tensor, List[Tensor]]:
        """Return features as tokens in row-major order, and optionally the outputs of the stem and of each block.

        Args:
            x: Images `[B, C, H, W]` or sequences `[B, T, C, H, W]`
            visible: Indices of the visible tokens, `[B, N']`, in increasing order. Masked tokens do not influence them.
            return_hidden_states: Return the outputs of the stem and of each block

        Returns:
            Features `[B, N, D]`, or `[B, N', D]` of visible tokens, and the list of outputs; all are means over time
        """
        grid: Optional[VisibleTokens] = None
        x, time_steps = self._prepare_input(x)
        if visible is not None:
            grid = VisibleTokens(visible, x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        x = self.stem(x, time_steps, grid)
        x = x.flatten(3).transpose(2, 3)  # [T, B, N, C]
        if visible is not None:
            x = x.gather(2, visible.unsqueeze(2).expand(x.shape[0], -1, -1, x.shape[3]))
        outputs: List[Tensor] = []
        if return_hidden_states:
            x, outputs = self._forward_blocks(x)
        else:
            x = self.blocks(x)
        return mean_over_time(x), outputs

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
        num_stages = max_index + 1 if stop_early else len(self.stem.stages)
        x, time_steps = self._prepare_input(x)
        x, intermediates = self._forward_stages(x, time_steps, num_stages, take_indices)
        if num_stages == self.num_levels:
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
            # the head has the width of the encoder, so it is removed too
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features `[B, D, H / p, W / p]` of images `[B, C, H, W]` or sequences `[B, T, C, H, W]`."""
        return mean_over_time(self.forward_maps(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    @torch.jit.ignore
    def classify_steps(self, x: Tensor, cumulative: bool = True) -> Tensor:
        """Return the logits `[T, B, K]` of the features at each step, `[T, B, D, H, W]`: see `forward_steps`."""
        steps = [x[:t].mean(0) for t in range(1, len(x) + 1)] if cumulative else x.unbind(0)
        return torch.stack([self.forward_head(features) for features in steps])

    @torch.jit.ignore
    def forward_steps(self, x: Tensor, cumulative: bool = True) -> Tensor:
        """Return logits for each time step, `[T, B, num_classes]`.

        Args:
            x: Images `[B, C, H, W]` or sequences `[B, T, C, H, W]`
            cumulative: Return the logits after each time step, computed from the mean of all features so far. In eval
                mode, a step does not depend on later steps: the logits after t steps equal those of `forward` with
                `time_steps=t`. If False, return the logits of each single time step, from the features of this step, as
                required by `TETLoss`; with average pooling, their mean equals the logits of `forward`.

        Raises:
            ValueError: A `StatefulInference` is running the model.
        """
        if get_stateful_inference() is not None:
            raise ValueError('forward_steps cannot be called within StatefulInference: call the model itself.')
        return self.classify_steps(self.forward_maps(x), cumulative)

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def find_spikformer(model: nn.Module) -> Spikformer:
    """Return the only Spikformer in a module, such as a wrapper of timm or transformers, an autoencoder or DDP.

    Raises:
        ValueError: The module contains no Spikformer, or more than one.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [m for m in modules if isinstance(m, Spikformer)]
    if len(found) != 1:
        raise ValueError(
            f'Expected a Spikformer or a module that contains one: a model of timm.list_models(module="spikformer"), a '
            f'SpikformerMAE, or one of the Spikformer classes of transformers. Got a {type(model).__name__}, which '
            f'contains {len(found) or "no Spikformer"}.')
    return found[0]
