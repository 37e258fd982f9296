"""transformers classes for Spikformer and Spikformer V2, https://arxiv.org/abs/2401.02020.

Each class wraps a `timm_spikformer.Spikformer` and saves its weights under timm's names, so that timm can load the same
folder or repository.
"""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple, Union

import torch
from timm.layers import to_2tuple
from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    ModelOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .._timm import update_model_args
from ..masked_autoencoder import SpikformerMAE
from ..sequences import mean_over_time
from ..spikformer import Spikformer  # not from network: this import registers the models, which remote code relies on
from .configuration_spikformer import SpikformerConfig

__all__ = [
    'SpikformerBackbone',
    'SpikformerClassifierOutput',
    'SpikformerForImageClassification',
    'SpikformerForMaskedImageModeling',
    'SpikformerMaskedImageModelingOutput',
    'SpikformerModel',
    'SpikformerPreTrainedModel',
]


def _create_timm_model(config: SpikformerConfig, num_classes: int = 0) -> Spikformer:
    model = Spikformer(**config.to_timm_args(num_classes))
    # attributes that timm's factory sets, from which timm resolves the data config and saves the model
    values = config.to_dict()
    model.pretrained_cfg = model.default_cfg = {**values['pretrained_cfg'], 'architecture': values['architecture']}
    update_model_args(model, **values['model_args'])
    return model


# From the names in a file, which are timm's, to the names in the transformers model
_CONVERSIONS = [PrefixChange(prefix_to_add='timm_model')]
_MAE_CONVERSIONS = [
    WeightRenaming(r'^(stem|blocks)\.', r'mae.encoder.\1.'),
    WeightRenaming(r'^decoder\.', 'mae.decoder.'),
]
register_checkpoint_conversion_mapping('spikformer', _CONVERSIONS, overwrite=True)
register_checkpoint_conversion_mapping('SpikformerForMaskedImageModeling', _MAE_CONVERSIONS, overwrite=True)


class SpikformerPreTrainedModel(PreTrainedModel):
    """Base class: initialization, loading and saving.

    Weights are saved under timm's names. Weights with either naming scheme can be loaded.

    >>> model = SpikformerModel(SpikformerConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
    >>> model.set_time_steps(2)
    >>> model.config.time_steps, isinstance(model, SpikformerPreTrainedModel)
    (2, True)
    """
    config: SpikformerConfig
    config_class = SpikformerConfig
    base_model_prefix = 'timm_model'
    main_input_name = 'pixel_values'
    input_modalities = ('image',)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    model_tags = ['timm', 'snn', 'spikformer']
    _no_split_modules = ['SpikingConvStage', 'SpikingPatchStage', 'SpikingBlock', 'Block']
    # running statistics need more than half precision; num_batches_tracked remains an integer
    _keep_in_fp32_modules_strict = ['bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var']
    _keys_to_ignore_on_load_unexpected = [r'(^|\.)(head|decoder)\.']
    _conversions = _CONVERSIONS

    def post_init(self) -> None:
        for m in self.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.weight.dtype in (torch.float16, torch.bfloat16):
                m.float()  # transformers does this when it loads a model, but not when it creates one
        super().post_init()
        # accelerate's FSDP raises an error if the model has no module of a listed class
        classes = {type(m).__name__ for m in self.modules()}
        self._no_split_modules = [name for name in type(self)._no_split_modules if name in classes]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers patches torch.nn.init during this call, so that loaded tensors are not initialized
        self.encoder.init_layer(module)

    def _set_gradient_checkpointing(
            self,
            enable: bool = True,
            gradient_checkpointing_func=None,
            every_n_layers: int = 1,
    ) -> None:
        """Use the timm model's own checkpointing, which does not update BN statistics when it recomputes."""
        if every_n_layers != 1:
            raise ValueError(f'every_n_layers must be 1, got {every_n_layers}: all or no layers are checkpointed.')
        self.encoder.set_grad_checkpointing(enable)

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.encoder.grad_checkpointing

    is_gradient_checkpointing = is_activation_checkpointing

    @property
    def encoder(self) -> Spikformer:
        return self.timm_model

    def set_time_steps(self, time_steps: int) -> None:
        """Set the number of time steps for images, in the model and in the configuration."""
        self.encoder.set_time_steps(time_steps)
        self.config.time_steps = self.encoder.time_steps

    def _config_fields_to_update(self) -> Tuple[str, ...]:
        """Return the fields of the configuration that methods of the timm model can change."""
        return 'time_steps', 'image_size'

    def save_pretrained(self, *args, **kwargs) -> None:
        """Save the weights and the configuration, including changes made by methods of the timm model."""
        self._update_config()
        # save under timm's names; from_pretrained has replaced this list by the conversions that the loaded file needed
        self._weight_conversions = list(self._conversions)
        super().save_pretrained(*args, **kwargs)

    def _update_config(self) -> None:
        """Set the fields of the configuration that methods of the timm model can change."""
        fields = SpikformerConfig.fields_from_timm(self.encoder)
        if to_2tuple(self.config.image_size) == to_2tuple(fields['image_size']):
            fields['image_size'] = self.config.image_size  # an integer or a list, as given by the user
        for name in self._config_fields_to_update():
            setattr(self.config, name, fields[name])

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.stem

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Load a state dict with the names of this module or with timm's; Trainer loads the latter when it resumes."""
        renamed = {}
        for key, value in state_dict.items():
            for conversion in self._conversions:
                key, _ = conversion.rename_source_key(key)
            renamed[key] = value
        return super().load_state_dict(renamed, *args, **kwargs)

    def _check_no_attentions(self, output_attentions: Optional[bool]) -> None:
        if output_attentions:
            raise ValueError(
                'output_attentions is not supported: spiking attention has no softmax and can be computed as '
                'q (k^T v), without a matrix of attention weights.')

    def _check_no_mask(self, kwargs: Dict[str, Any]) -> None:
        """Raise a ValueError if a mask is given, which `**kwargs` would ignore."""
        given = [name for name in ('bool_masked_pos', 'noise') if kwargs.get(name) is not None]
        if given:
            raise ValueError(
                f'{type(self).__name__} does not support {given[0]}: it has no mask token to replace masked patches. '
                f'Use SpikformerForMaskedImageModeling, which encodes only visible patches and returns their features '
                f'as hidden_states.')

    def _to_maps(self, x: Tensor, pixel_values: Tensor) -> Tensor:
        """Convert tokens `[B, N, D]` of all patches to maps `[B, D, H, W]`."""
        p = self.config.patch_size
        return x.transpose(1, 2).unflatten(2, (pixel_values.shape[-2] // p, pixel_values.shape[-1] // p))

    def _wants_hidden_states(self, output_hidden_states: Optional[bool]) -> bool:
        return self.config.output_hidden_states if output_hidden_states is None else output_hidden_states


class SpikformerModel(SpikformerPreTrainedModel):
    """Encoder without a classifier; returns the output of the last block, averaged over time.

    `bool_masked_pos` is not supported. ViTModel and SwinModel replace masked patches with a mask token; this model has
    none, because its pre-training removes masked patches. Use `SpikformerForMaskedImageModeling` to encode with a mask.

    >>> model = SpikformerModel(SpikformerConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4))
    >>> output = model(torch.rand(2, 3, 32, 32))
    >>> output.last_hidden_state.shape, output.pooler_output.shape
    (torch.Size([2, 4, 64]), torch.Size([2, 64]))
    """

    def __init__(self, config: SpikformerConfig):
        super().__init__(config)
        self.timm_model = _create_timm_model(config)
        self.post_init()

    @can_return_tuple
    def forward(
            self,
            pixel_values: Tensor,
            output_hidden_states: Optional[bool] = None,
            output_attentions: Optional[bool] = None,
            **kwargs,
    ) -> Union[Tuple, BaseModelOutputWithPooling]:
        """
        Args:
            pixel_values: Images `[B, C, H, W]`, or sequences `[B, T, C, H, W]` with their own number of time steps.
            output_hidden_states: Return the outputs of the stem and of each block, `[B, N, D]`.

        Returns:
            `last_hidden_state` `[B, N, D]`, in row-major order of patches; `pooler_output` `[B, D]`, pooled according
            to `global_pool` (`[B, 2 * D]` for `'catavgmax'`, None for `''`); `hidden_states`. All are means over time.

        Raises:
            ValueError: Attentions or a mask are requested, or the input does not fit the model.
        """
        self._check_no_attentions(output_attentions)
        self._check_no_mask(kwargs)
        return_hidden_states = self._wants_hidden_states(output_hidden_states)
        pixel_values = pixel_values.to(self.dtype)
        x, hidden_states = self.timm_model.forward_tokens(pixel_values, return_hidden_states=return_hidden_states)
        pooled = None
        if self.config.global_pool:
            pooled = self.timm_model.head.global_pool(self._to_maps(x, pixel_values))
        return BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=pooled,
            hidden_states=tuple(hidden_states) if return_hidden_states else None,
        )


@dataclass
class SpikformerClassifierOutput(ImageClassifierOutput):
    """
    Output of [`SpikformerForImageClassification`].

    Args:
        step_logits: `[T, B, num_labels]`, logits of each single time step, returned if `output_step_logits` is True.

    >>> SpikformerClassifierOutput(logits=torch.zeros(2, 10)).logits.shape
    torch.Size([2, 10])
    """
    step_logits: Optional[Tensor] = None


class SpikformerForImageClassification(SpikformerPreTrainedModel):
    """Linear classifier on the pooled tokens, averaged over time; `timm_model` is the timm model with its head.

    >>> config = SpikformerConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_labels=10)
    >>> model = SpikformerForImageClassification(config)
    >>> output = model(torch.rand(2, 3, 32, 32), labels=torch.tensor([3, 7]))
    >>> output.logits.shape, output.loss.ndim
    (torch.Size([2, 10]), 0)
    """
    _keys_to_ignore_on_load_unexpected = [r'(^|\.)decoder\.']

    def __init__(self, config: SpikformerConfig):
        super().__init__(config)
        if config.num_labels and not config.global_pool:
            raise ValueError(
                f"A classifier of {config.num_labels} labels requires a pooling type, got global_pool=''. Load the "
                f"model with global_pool='avg'.")
        self.num_labels = config.num_labels
        self.timm_model = _create_timm_model(config, config.num_labels)
        self.post_init()

    def _config_fields_to_update(self) -> Tuple[str, ...]:
        return *super()._config_fields_to_update(), 'num_labels', 'global_pool'

    def _check_labels(self, labels: Tensor) -> None:
        """Check the range of labels on CPU. On a GPU, the check would synchronize, and CUDA has its own assertion."""
        if self.num_labels == 1 or labels.dtype not in (torch.int64, torch.int32) or labels.device.type != 'cpu':
            return
        is_valid = (labels == -100) | ((labels >= 0) & (labels < self.num_labels))  # -100: ignored by the loss
        if labels.ndim == 1 and not is_valid.all():
            raise ValueError(
                f'labels must be from 0 to {self.num_labels - 1}, or -100 for images that the loss ignores, got '
                f'{labels[~is_valid][0]}. Load the model with num_labels=N to give it a classifier of N classes.')

    def forward_steps(self, pixel_values: Tensor, cumulative: bool = True) -> Tensor:
        """Return logits for each time step, `[T, B, num_labels]`: see `Spikformer.forward_steps`.

        Raises:
            ValueError: The input does not fit the model.
        """
        return self.timm_model.forward_steps(pixel_values.to(self.dtype), cumulative)

    @can_return_tuple
    def forward(
            self,
            pixel_values: Tensor,
            labels: Optional[Tensor] = None,
            output_hidden_states: Optional[bool] = None,
            output_attentions: Optional[bool] = None,
            output_step_logits: bool = False,
            **kwargs,
    ) -> Union[Tuple, SpikformerClassifierOutput]:
        """
        Args:
            pixel_values: Images `[B, C, H, W]`, or sequences `[B, T, C, H, W]` with their own number of time steps.
            labels: `[B]` class indices; `[B, num_labels]` floats for multi-label classification; floats for regression
                if `num_labels` is 1.
            output_hidden_states: Return the outputs of the stem and of each block, `[B, N, D]`.
            output_attentions: Not supported.
            output_step_logits: Return the logits of each single time step, `[T, B, num_labels]`, for `TETLoss`. Cannot
                be combined with hidden states.

        Raises:
            ValueError: A label is out of range (checked on a CPU only), attentions or a mask are requested, or the
                input does not fit the model.
        """
        self._check_no_attentions(output_attentions)
        self._check_no_mask(kwargs)
        return_hidden_states = self._wants_hidden_states(output_hidden_states)
        pixel_values = pixel_values.to(self.dtype)
        hidden_states, step_logits = None, None
        if return_hidden_states and output_step_logits:
            raise ValueError('output_hidden_states and output_step_logits cannot be combined.')
        if return_hidden_states:
            x, hidden_states = self.timm_model.forward_tokens(pixel_values, return_hidden_states=True)
            logits = self.timm_model.forward_head(self._to_maps(x, pixel_values))
        elif output_step_logits:
            maps = self.timm_model.forward_maps(pixel_values)
            step_logits = self.timm_model.classify_steps(maps, cumulative=False)
            logits = self.timm_model.forward_head(mean_over_time(maps))
        else:
            logits = self.timm_model(pixel_values)

        loss = None
        if labels is not None:
            if not torch.compiler.is_compiling():
                self._check_labels(labels)
            loss = self.loss_function(labels, logits, self.config)
        return SpikformerClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(hidden_states) if return_hidden_states else None,
            step_logits=step_logits,
        )


@dataclass
class SpikformerMaskedImageModelingOutput(ModelOutput):
    """
    Output of [`SpikformerForMaskedImageModeling`].

    Args:
        loss: Scalar, mean squared error over the masked patches.
        reconstruction: `[B, C, H, W]`, predictions for all patches; normalized like the target with `norm_pix_loss`.
        mask: `[B, N]`, 1 for masked patches, else 0.
        hidden_states: Outputs of the stem and of each block for the visible patches, `[B, N', D]`.

    >>> output = SpikformerMaskedImageModelingOutput(loss=torch.tensor(0.5), mask=torch.ones(2, 4))
    >>> list(output.keys())
    ['loss', 'mask']
    """
    loss: Optional[Tensor] = None
    reconstruction: Optional[Tensor] = None
    mask: Optional[Tensor] = None
    hidden_states: Optional[Tuple[Tensor, ...]] = None


class SpikformerForMaskedImageModeling(SpikformerPreTrainedModel):
    """Masked autoencoder for self-supervised pre-training; `mae` is a `timm_spikformer.SpikformerMAE`.

    >>> config = SpikformerConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, decoder_hidden_size=32)
    >>> output = SpikformerForMaskedImageModeling(config)(torch.rand(2, 3, 64, 64))
    >>> output.reconstruction.shape, output.mask.sum(1).tolist()
    (torch.Size([2, 3, 64, 64]), [12.0, 12.0])
    """
    _conversions = _MAE_CONVERSIONS
    _keys_to_ignore_on_load_unexpected = [r'(^|\.)head\.']

    def __init__(self, config: SpikformerConfig):
        super().__init__(config)
        self.mae = SpikformerMAE(
            _create_timm_model(config),
            mask_ratio=config.mask_ratio,
            mask_unit=config.mask_unit_size,
            decoder_embed_dim=config.decoder_hidden_size,
            decoder_depth=config.decoder_num_hidden_layers,
            decoder_num_heads=config.decoder_num_attention_heads,
            decoder_mlp_ratio=config.decoder_mlp_ratio,
            norm_pix_loss=config.norm_pix_loss,
        )
        self.post_init()

    @property
    def encoder(self) -> Spikformer:
        return self.mae.encoder

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        is_of_decoder = any(module is m for m in self.mae.decoder.modules())
        (self.mae.decoder if is_of_decoder else self.encoder).init_layer(module)

    @can_return_tuple
    def forward(
            self,
            pixel_values: Tensor,
            bool_masked_pos: Optional[Tensor] = None,
            noise: Optional[Tensor] = None,
            output_hidden_states: Optional[bool] = None,
            output_attentions: Optional[bool] = None,
            return_loss: bool = True,
            **kwargs,
    ) -> Union[Tuple, SpikformerMaskedImageModelingOutput]:
        """
        Args:
            pixel_values: Images `[B, C, H, W]`, or sequences `[B, T, C, H, W]` with their own number of time steps.
            bool_masked_pos: Mask of patches or of larger square units, `[B, units]`, 1 or True for masked units. All
                images must have the same number of masked units.
            noise: One value per unit, `[B, units]`; the units with the highest values are masked. By default the mask
                is random.
            output_hidden_states: Return the outputs of the stem and each block for visible patches, `[B, N', D]`.
            return_loss: Ignored: the loss is always returned. Trainer checks for an argument with this name.

        Raises:
            ValueError: The mask or the noise does not fit the images, attentions are requested, or the input does not
                fit the model.
        """
        self._check_no_attentions(output_attentions)
        return_hidden_states = self._wants_hidden_states(output_hidden_states)
        output = self.mae(pixel_values.to(self.dtype), bool_masked_pos, noise, return_hidden_states)
        return SpikformerMaskedImageModelingOutput(
            loss=output.loss,
            reconstruction=output.reconstruction,
            mask=output.mask.float(),
            hidden_states=tuple(output.hidden_states) if return_hidden_states else None,
        )


class SpikformerBackbone(BackboneMixin, SpikformerPreTrainedModel):
    """Feature maps of the stages of the stem and of the encoder, averaged over time, for dense prediction.

    >>> config = SpikformerConfig(
    ...     hidden_size=64, num_hidden_layers=1, num_attention_heads=4, out_features=['stage2', 'stage4'])
    >>> [maps.shape for maps in SpikformerBackbone(config)(torch.rand(1, 3, 64, 64)).feature_maps]
    [torch.Size([1, 16, 16, 16]), torch.Size([1, 64, 4, 4])]
    """
    has_attentions = False

    def __init__(self, config: SpikformerConfig):
        super().__init__(config)
        self.timm_model = _create_timm_model(config)
        self.num_features = self.timm_model.stem.widths
        self.post_init()

    @can_return_tuple
    def forward(
            self,
            pixel_values: Tensor,
            output_hidden_states: Optional[bool] = None,
            output_attentions: Optional[bool] = None,
            **kwargs,
    ) -> Union[Tuple, BackboneOutput]:
        """
        Args:
            pixel_values: Images `[B, C, H, W]`, or sequences `[B, T, C, H, W]` with their own number of time steps.
            output_hidden_states: Also return the maps of all four stages.

        Raises:
            ValueError: Attentions or a mask are requested, or the input does not fit the model.
        """
        self._check_no_attentions(output_attentions)
        self._check_no_mask(kwargs)
        maps = self.timm_model.forward_intermediates(pixel_values.to(self.dtype), intermediates_only=True)
        return BackboneOutput(
            feature_maps=tuple(maps[self.stage_names.index(name)] for name in self.out_features),
            hidden_states=tuple(maps) if self._wants_hidden_states(output_hidden_states) else None,
        )
