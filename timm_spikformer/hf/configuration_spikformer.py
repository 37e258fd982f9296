"""Configuration of the transformers classes for Spikformer and Spikformer V2."""
import numbers
from typing import Any, Dict, List, Optional, Sequence

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

__all__ = ['SpikformerConfig']

# Fields of the configuration by argument of the timm model; used for both directions of the conversion
_FIELDS_BY_ARG = {
    'img_size': 'image_size',
    'patch_size': 'patch_size',
    'in_chans': 'num_channels',
    'num_classes': 'num_labels',
    'global_pool': 'global_pool',
    'stem': 'stem',
    'stem_strides': 'stem_strides',
    'embed_dim': 'hidden_size',
    'depth': 'num_hidden_layers',
    'num_heads': 'num_attention_heads',
    'mlp_ratio': 'mlp_ratio',
    'attn_scale': 'attn_scale',
    'time_steps': 'time_steps',
    'drop_rate': 'classifier_dropout_prob',
    'proj_drop_rate': 'hidden_dropout_prob',
    'drop_path_rate': 'drop_path_rate',
}

# Keys of timm's config.json that are not kept: they are computed from the fields of this configuration or not used.
# `image_processor_type` depends on the folder from which the configuration was read.
_NOT_KEPT = (
    'num_classes', 'num_features', 'label_names', 'label_descriptions', 'model_args', 'image_processor_type')


def label_maps(labels: Sequence[str]) -> Dict[str, Dict]:
    """Return `id2label` and `label2id` for class names in order."""
    return dict(id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})


def ordered_labels(id2label: Dict[Any, str]) -> List[str]:
    """Return the class names sorted by class index; in a config.json, indices are strings, with '10' before '2'.

    If a key is not an integer, the names are returned in their original order.
    """
    if not all(str(key).isdigit() for key in id2label):
        return list(id2label.values())
    return [name for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))]


def _to_json(value: Any) -> Any:
    """Convert numbers of NumPy and other libraries to Python numbers, and tuples to lists."""
    if isinstance(value, (list, tuple)):
        return [_to_json(v) for v in value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


@strict
class SpikformerConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a [`SpikformerModel`] and of the models with a head. The defaults are those of Spikformer V2-8-512.

    Its config.json is valid for timm too: in addition to transformers' fields, it contains timm's `architecture`,
    `num_classes`, `label_names`, `model_args` and `pretrained_cfg`, so both libraries can load the same folder or
    repository. A config.json written by timm can be read as well.

    Args:
        stem (`str`, *optional*, defaults to `"scs"`):
            `"scs"`, the Spiking Convolutional Stem of V2, or `"sps"`, Spiking Patch Splitting of V1.
        stem_strides (`list[int]`, *optional*):
            Stride, 1 or 2, of each of the four stages of the stem. By default the last stages have stride 2.
        image_size (`int` or `list[int]`, *optional*, defaults to 224):
            Nominal size in pixels. The model accepts any multiple of the patch size.
        patch_size (`int`, *optional*, defaults to 16):
            Side of a patch in pixels: 1, 2, 4, 8 or 16.
        num_channels (`int`, *optional*, defaults to 3):
            Number of input channels.
        hidden_size (`int`, *optional*, defaults to 512):
            Width of the encoder.
        num_hidden_layers (`int`, *optional*, defaults to 8):
            Number of encoder blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Number of attention heads.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Ratio of the MLP's hidden width to `hidden_size`.
        attn_scale (`float`, *optional*, defaults to 0.125):
            Scale of the product of queries, keys and values, before the attention neuron.
        global_pool (`str`, *optional*, defaults to `"avg"`):
            Pooling over tokens: `"avg"`, `"max"`, `"avgmax"`, `"catavgmax"`, or, without a classifier, `""` for none.
        time_steps (`int`, *optional*, defaults to 4):
            Number of time steps for which an image is presented. No weight depends on it.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout rate of the spikes of attention and MLP.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth rate of the last block.
        classifier_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout rate before the classifier.
        encoder_stride (`int`, *optional*):
            Side in pixels of the square that a token represents, equal to `patch_size`; used by run_mim.py.
        mask_ratio (`float`, *optional*, defaults to 0.75):
            Fraction of masked patches in pre-training, if no mask is given.
        mask_unit_size (`int`, *optional*):
            Side in pixels of the masked squares if no mask is given; a multiple of the patch size (the default).
        norm_pix_loss (`bool`, *optional*, defaults to `True`):
            Normalize the target patches by their own mean and standard deviation.
        decoder_hidden_size (`int`, *optional*, defaults to 256):
            Width of the decoder in pre-training.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 4):
            Number of decoder blocks.
        decoder_num_attention_heads (`int`, *optional*, defaults to 4):
            Number of attention heads in the decoder.
        decoder_mlp_ratio (`float`, *optional*, defaults to 4.0):
            Ratio of the decoder MLP's hidden width to `decoder_hidden_size`.
        out_features, out_indices (`list[str]`, `list[int]`, *optional*):
            Stages that a [`SpikformerBackbone`] returns, from `"stage1"` to `"stage4"`. With patch size 16, their
            strides are 2, 4, 8 and 16. By default the last stage.
        architecture (`str`, *optional*):
            Registered name from which timm creates the model, with all of `model_args` as arguments. By default the
            model with 8 blocks, width 512 and this stem.
        pretrained_cfg (`dict`, *optional*):
            timm's data configuration: `input_size`, `mean`, `std`, `interpolation`, `crop_pct` and more. By default,
            that for ImageNet.

    Raises:
        huggingface_hub.errors.StrictDataclassFieldValidationError: A value has the wrong type.
        huggingface_hub.errors.StrictDataclassClassValidationError: A value is out of its range, or values are
            inconsistent. The other values are checked when a model is created.

    >>> config = SpikformerConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=10)
    >>> config.to_timm_args(num_classes=10)['embed_dim']
    64
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
    attn_scale: float | int = 0.125
    global_pool: str = 'avg'
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
        if self.patch_size < 1:
            raise ValueError(f'patch_size must be at least 1, got {self.patch_size}.')
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f'image_size must be one integer, or a height and a width, got {self.image_size}.')
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads != 0:
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
        """Convert a config.json written by timm, which contains a registered name and its arguments."""
        import timm
        pretrained_cfg = dict(config_dict['pretrained_cfg'])
        if config_dict.get('label_names'):
            pretrained_cfg['label_names'] = config_dict['label_names']
        model = timm.create_model(
            config_dict['architecture'], pretrained_cfg=pretrained_cfg, device='meta',
            **{**config_dict.get('model_args', {}), 'num_classes': config_dict['num_classes']})
        return cls.from_timm(model).to_dict()

    def to_timm_args(self, num_classes: Optional[int] = None) -> Dict[str, Any]:
        """Return the arguments of timm's Spikformer.

        Args:
            num_classes: Number of classes, 0 for no classifier; by default `num_labels`.
        """
        args = {arg: getattr(self, field) for arg, field in _FIELDS_BY_ARG.items()}
        if num_classes is not None:
            args['num_classes'] = num_classes
        return args

    @staticmethod
    def fields_from_timm(model) -> Dict[str, Any]:
        """Return the fields that correspond to the arguments of a timm model.

        Raises:
            ValueError: The model is not a Spikformer.
        """
        from timm.models import get_model_input_config

        from ..network import Spikformer
        if not isinstance(model, Spikformer):
            raise ValueError(
                f'Expected a timm_spikformer.Spikformer, or the registered name of one, got a {type(model).__name__}. '
                f'The names are those of timm.list_models("*spikformer*").')
        args = dict(model.get_init_args(), img_size=get_model_input_config(model)['input_size'][1:])
        fields = {field: _to_json(args[arg]) for arg, field in _FIELDS_BY_ARG.items()}
        height, width = fields['image_size']
        if height == width:
            fields['image_size'] = height
        return fields

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
        model_args = self.to_timm_args()
        del model_args['num_classes']
        output['model_args'] = {**model_args, 'img_size': [height, width]}
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
            'hf_hub_filename': 'model.safetensors',  # otherwise timm loads a pickle if there is no such file
        }
        for key in ('label_names', 'label_descriptions'):
            output['pretrained_cfg'].pop(key, None)
        return output

    @classmethod
    def from_timm(cls, model, **kwargs) -> 'SpikformerConfig':
        """Create the configuration of a timm model.

        Args:
            model: Registered name, or a `timm_spikformer.Spikformer`.
            kwargs: Fields of the configuration, which take precedence.

        Raises:
            ValueError: The model is not a Spikformer.
        """
        if isinstance(model, str):
            import timm
            model = timm.create_model(model, device='meta')
        from timm.models import filter_pretrained_cfg
        pretrained_cfg = filter_pretrained_cfg(getattr(model, 'pretrained_cfg', {}), remove_source=True)
        architecture = pretrained_cfg.pop('architecture', None)
        for key in ('tag', 'custom_load'):  # these describe the weights with which the model was created
            pretrained_cfg.pop(key, None)
        values = dict(
            cls.fields_from_timm(model),
            architecture=architecture,
            pretrained_cfg={k: list(v) if isinstance(v, tuple) else v for k, v in pretrained_cfg.items()},
        )
        labels = pretrained_cfg.get('label_names') or ()
        labels = ordered_labels(labels) if isinstance(labels, dict) else list(labels)
        is_given = bool(kwargs.keys() & {'num_labels', 'id2label', 'label2id'})
        if labels and len(labels) == values['num_labels'] and not is_given:
            values.update(label_maps(labels))
        return cls(**{**values, **kwargs})
