"""Configuration of the transformers classes around Spikformer and Spikformer V2."""
from typing import Any, Dict, List, Sequence

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

__all__ = ['SpikformerConfig']

# What timm reads in a config.json and this configuration derives from its own fields, or has no use for.
# `image_processor_type` is of the folder that it was read from.
_NOT_KEPT = (
    'num_classes', 'num_features', 'global_pool', 'label_names', 'label_descriptions', 'model_args',
    'image_processor_type')


def label_maps(labels: Sequence[str]) -> Dict[str, Dict]:
    """`id2label` and `label2id` of the names of the classes, in their order."""
    return dict(id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})


def ordered_labels(id2label: Dict[Any, str]) -> List[str]:
    """Return the names of the classes by number: a config.json has the numbers as strings, and '10' before '2'."""
    return [name for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))]


@strict
class SpikformerConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`SpikformerModel`] and of the models with a head. The defaults are those of Spikformer V2-8-512.

    A config.json that it writes is one of timm too: it holds timm's `architecture`, `num_classes`, `label_names`,
    `model_args` and `pretrained_cfg` beside transformers' fields, and so one folder or repository loads in both. One
    that timm alone has written is read as well.

    Args:
        stem (`str`, *optional*, defaults to `"scs"`):
            `"scs"`, the Spiking Convolutional Stem of V2, or `"sps"`, Spiking Patch Splitting of V1.
        stem_strides (`list[int]`, *optional*):
            Stride, 1 or 2, of each of the four stages of the stem. By default the last ones reduce.
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Nominal size, in pixels. The model takes any multiple of the patch.
        patch_size (`int`, *optional*, defaults to 16):
            Pixels per token and side: 1, 2, 4, 8 or 16.
        num_channels (`int`, *optional*, defaults to 3):
            Number of input channels.
        hidden_size (`int`, *optional*, defaults to 512):
            Width of the encoder.
        num_hidden_layers (`int`, *optional*, defaults to 8):
            Number of encoder blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of attention heads.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of the MLP's hidden layer over `hidden_size`.
        time_steps (`int`, *optional*, defaults to 4):
            Number of time steps for which an image is presented. No weight depends on it.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout of the spikes that leave the linear layers of the encoder.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth rate of the last block.
        classifier_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout before the classifier.
        encoder_stride (`int`, *optional*):
            Pixels that a token stands for: always `patch_size`. Here because run_mim.py asks for it.
        mask_ratio (`float`, *optional*, defaults to 0.75):
            Share of an image that pre-training masks where no mask is given.
        mask_unit_size (`int`, *optional*):
            Side, in pixels, of the squares that are then masked, a multiple of the patch; by default the patch.
        norm_pix_loss (`bool`, *optional*, defaults to `True`):
            Reconstruct patches normalised by their own mean and standard deviation.
        decoder_hidden_size (`int`, *optional*, defaults to 256):
            Width of pre-training's decoder.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 4):
            Number of its blocks.
        decoder_num_attention_heads (`int`, *optional*, defaults to 4):
            Number of its attention heads.
        decoder_mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of its MLP's hidden layer over `decoder_hidden_size`.
        out_features, out_indices (`list[str]`, `list[int]`, *optional*):
            Stages that a [`SpikformerBackbone`] returns, of `"stage1"` to `"stage4"`, at strides 2, 4, 8 and 16 of a
            model of patch size 16; by default the last.
        architecture (`str`, *optional*):
            Name under which timm builds the model, every dimension given beside it. By default the entry of 8 blocks
            and width 512 that has this stem.
        pretrained_cfg (`dict`, *optional*):
            timm's description of how images are presented: `input_size`, `mean`, `std`, `interpolation`, `crop_pct`
            and more; by default ImageNet's.

    Raises:
        ValueError: A value does not fit the others. A value of a wrong type raises too, as of any strict configuration.
    """
    model_type = 'spikformer'

    stem: str = 'scs'
    stem_strides: list[int] | tuple[int, ...] | None = None
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    mlp_ratio: float | int = 4.0
    time_steps: int = 4
    hidden_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    classifier_dropout_prob: float | int = 0.0
    encoder_stride: int | None = None
    mask_ratio: float = 0.75
    mask_unit_size: int | None = None
    norm_pix_loss: bool = True
    decoder_hidden_size: int = 256
    decoder_num_hidden_layers: int = 4
    decoder_num_attention_heads: int = 4
    decoder_mlp_ratio: float | int = 4.0
    architecture: str | None = None
    pretrained_cfg: dict | None = None

    def __post_init__(self, **kwargs):
        for key in _NOT_KEPT:
            kwargs.pop(key, None)
        if self.encoder_stride is None:
            self.encoder_stride = self.patch_size
        if self.stem_strides is not None:
            self.stem_strides = list(self.stem_strides)
        self.stage_names = [f'stage{i}' for i in range(1, 5)]
        self.set_output_features_output_indices(
            out_features=kwargs.pop('out_features', None), out_indices=kwargs.pop('out_indices', None))
        super().__post_init__(**kwargs)
        self.id2label = dict(enumerate(ordered_labels(self.id2label)))

    def validate_architecture(self):
        if self.time_steps < 1:
            raise ValueError(f'time_steps must be at least 1, got {self.time_steps}.')
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f'hidden_size must be divisible by num_attention_heads, got hidden_size={self.hidden_size} and '
                f'num_attention_heads={self.num_attention_heads}.')
        if not 0. < self.mask_ratio < 1.:
            raise ValueError(f'mask_ratio must be greater than 0 and less than 1, got {self.mask_ratio}.')

    @classmethod
    def from_dict(cls, config_dict: Dict[str, Any], **kwargs):
        if 'pretrained_cfg' in config_dict and 'hidden_size' not in config_dict:
            config_dict = cls._from_timm_dict(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def _from_timm_dict(cls, config_dict: Dict[str, Any]) -> Dict[str, Any]:
        """Of a config.json that timm has written, which says by a name and what differs from it."""
        import timm
        model = timm.create_model(
            config_dict['architecture'], pretrained_cfg=config_dict['pretrained_cfg'], device='meta',
            **{**config_dict.get('model_args', {}), 'num_classes': config_dict['num_classes']})
        labels = config_dict.get('label_names')
        return cls.from_timm(model, **(label_maps(labels) if labels else {})).to_dict()

    def to_dict(self) -> Dict[str, Any]:
        output = super().to_dict()
        is_classifier = any('ForImageClassification' in name for name in self.architectures or [])
        labels = ordered_labels(self.id2label)
        size = self.image_size
        height, width = [size, size] if isinstance(size, int) else size
        output['architecture'] = self.architecture or (
            'spikformer_v2_8_512' if self.stem == 'scs' else 'spikformer_8_512')
        output['num_classes'] = self.num_labels if is_classifier else 0
        if is_classifier and labels != [f'LABEL_{i}' for i in range(len(labels))]:
            output['label_names'] = labels
        output['model_args'] = dict(
            stem=self.stem, stem_strides=self.stem_strides, patch_size=self.patch_size, in_chans=self.num_channels,
            img_size=[height, width], embed_dim=self.hidden_size, depth=self.num_hidden_layers,
            num_heads=self.num_attention_heads, mlp_ratio=self.mlp_ratio, time_steps=self.time_steps)
        output['pretrained_cfg'] = {
            'crop_pct': 1.0, 'crop_mode': 'center', 'interpolation': 'bicubic',
            'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225],
            **(self.pretrained_cfg or {}),
            'num_classes': output['num_classes'],
            'input_size': [self.num_channels, height, width],
            'pool_size': [height // self.patch_size, width // self.patch_size],
            'first_conv': 'stem.stages.0.down.conv' if self.stem == 'scs' else 'stem.stages.0.proj.conv',
            'classifier': 'head.fc',
            'fixed_input_size': False,
            'hf_hub_filename': 'model.safetensors',  # timm would take a pickle where there is no such file
        }
        for key in ('label_names', 'label_descriptions'):
            output['pretrained_cfg'].pop(key, None)
        return output

    @classmethod
    def from_timm(cls, model, **kwargs) -> 'SpikformerConfig':
        """The configuration of a timm model, given by its registered name or itself; `kwargs` go on top."""
        if isinstance(model, str):
            import timm
            model = timm.create_model(model, device='meta')
        from timm.models import filter_pretrained_cfg, get_model_input_config
        _, height, width = get_model_input_config(model)['input_size']
        pretrained_cfg = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True)
        architecture = pretrained_cfg.pop('architecture')
        for key in ('tag', 'custom_load'):  # of the weights that the model may once have come with
            pretrained_cfg.pop(key, None)
        values = dict(
            stem='sps' if hasattr(model.stem.stages[-1], 'pos_embed') else 'scs',
            stem_strides=list(model.stem.strides),
            image_size=height if height == width else [height, width],
            patch_size=model.patch_size,
            num_channels=model.in_chans,
            hidden_size=model.embed_dim,
            num_hidden_layers=len(model.blocks),
            num_attention_heads=model.blocks[0].attn.num_heads,
            mlp_ratio=model.blocks[0].mlp.fc1.linear.out_features / model.embed_dim,
            time_steps=model.time_steps,
            num_labels=model.num_classes,
            architecture=architecture,
            pretrained_cfg={k: list(v) if isinstance(v, tuple) else v for k, v in pretrained_cfg.items()},
        )
        return cls(**{**values, **kwargs})
