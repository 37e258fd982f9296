"""Write the folder that timm and transformers load, and verify that both load it correctly."""
import json
from pathlib import Path
from typing import Dict, Iterable, Optional, Sequence, Union

import timm
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, AutoModelForMaskedImageModeling

from ..checkpoints import TRAINING_FILE
from ..folders import write_folder
from ..hf.configuration_spikformer import SpikformerConfig, label_maps, ordered_labels
from ..hf.modeling_spikformer import (
    SpikformerForImageClassification,
    SpikformerForMaskedImageModeling,
    SpikformerModel,
    SpikformerPreTrainedModel,
)
from ..hf.processing import create_processor
from ..hf.remote_code import save_remote_code
from ..images import DATA_KEYS, data_config, make_loader, read_splits
from ..masked_autoencoder import SpikformerMAE
from ..monitor import FiringRateMonitor
from ..reading import Checkpoint, check_data_config, copy_checkpoint, unwrap_timm_model

__all__ = ['check_processor', 'example_images', 'save_folder', 'verify_folder', 'write_checkpoint']


def _to_transformers(checkpoint: Checkpoint) -> SpikformerPreTrainedModel:
    model, encoder = checkpoint.model, checkpoint.encoder
    height, width = checkpoint.data_config['input_size'][1:]
    labels = label_maps(checkpoint.labels) if checkpoint.labels else dict(num_labels=encoder.num_classes)
    config = SpikformerConfig.from_timm(
        encoder, image_size=height if height == width else [height, width], **labels)
    config.pretrained_cfg.update(checkpoint.data_config)
    if isinstance(model, SpikformerMAE):
        decoder = model.decoder
        config.mask_ratio = model.mask_ratio
        config.mask_unit_size = model.mask_unit
        config.norm_pix_loss = model.norm_pix_loss
        config.decoder_hidden_size = decoder.embed.out_features
        config.decoder_num_hidden_layers = len(decoder.blocks)
        config.decoder_num_attention_heads = decoder.blocks[0].attn.num_heads
        config.decoder_mlp_ratio = decoder.blocks[0].mlp.fc1.out_features / decoder.embed.out_features
        cls = SpikformerForMaskedImageModeling
    else:
        cls = SpikformerForImageClassification if encoder.num_classes else SpikformerModel
    hf_model = cls(config)
    unwrap_timm_model(hf_model).load_state_dict(model.state_dict())
    return hf_model.eval()


def check_processor(checkpoint: Checkpoint) -> None:
    """Check that a processor of transformers can preprocess images like the data config of a checkpoint.

    Raises:
        ValueError: There is no such processor, and the checkpoint does not contain a processor.
    """
    if checkpoint.processor is None:
        create_processor(checkpoint.data_config, checkpoint.encoder.time_steps)


def write_checkpoint(
        checkpoint: Checkpoint,
        folder: Path,
        card: Optional[str] = None,
        texts: Optional[Dict[str, str]] = None,
) -> None:
    """Write weights, configs, remote code, model card and other text files to an empty folder.

    Args:
        checkpoint: Checkpoint to write.
        folder: An empty folder.
        card: Content of README.md.
        texts: Contents of other text files by their path in the folder.
    """
    hf_model = _to_transformers(checkpoint)
    hf_model.save_pretrained(folder)
    if checkpoint.processor is None:
        config = hf_model.config
        args = {} if checkpoint.training is None else checkpoint.training.args
        create_processor(
            config.to_dict()['pretrained_cfg'], config.time_steps, args.get('dataset')).save_pretrained(folder)
    else:
        text = json.dumps(checkpoint.processor, indent=2) + '\n'
        (folder / 'preprocessor_config.json').write_text(text, encoding='utf-8')
    save_remote_code(folder)
    texts = dict(texts or {})
    if card is not None:
        texts['README.md'] = card
    if checkpoint.training is not None:
        texts[TRAINING_FILE] = yaml.safe_dump(
            {'command': checkpoint.training.command, **checkpoint.training.args}, sort_keys=False)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding='utf-8')


def save_folder(
        checkpoint: Union[nn.Module, Checkpoint],
        folder: Union[str, Path],
        labels: Optional[Sequence[str]] = None,
        inputs: Iterable[Union[str, Path]] = (),
        require_spikes: bool = True,
        command: str = 'save_folder',
) -> None:
    """Write and verify a folder that timm and transformers load. After an error, nothing is written.

    Args:
        checkpoint: Model or checkpoint to save; see `copy_checkpoint`. It is not modified.
        labels: Class names, instead of those of the checkpoint.
        folder: Output folder. Only files that the same command wrote there for the same architecture are replaced; see
            `folders.write_folder`.
        inputs: Files that the checkpoint was read from; the folder must not contain them.
        require_spikes: Whether at least one neuron of the encoder must fire, see `verify_folder`.
        command: Name of the command, for the manifest of the folder.

    Raises:
        ValueError: The folder contains files that must not be overwritten, or see `check_processor`.
        RuntimeError: The written folder gives outputs that differ from those of the checkpoint.
    """
    checkpoint = copy_checkpoint(checkpoint, labels)
    check_data_config('The checkpoint', checkpoint)
    check_processor(checkpoint)
    kind = f'{command} {checkpoint.encoder.pretrained_cfg["architecture"]}'
    with write_folder(folder, kind, inputs) as temporary:
        write_checkpoint(checkpoint, temporary)
        verify_folder(temporary, checkpoint, require_spikes)


def example_images(checkpoint: Checkpoint, count: int = 8) -> Tensor:
    """Return at most `count` of the shipped test images, preprocessed for the model, `[count, C, H, W]`."""
    config, count = checkpoint.data_config, checkpoint.limit_batch_size(count)
    if checkpoint.encoder.in_chans not in (1, 3):
        return torch.randn(count, *config['input_size'], generator=torch.Generator().manual_seed(0))
    images = read_splits()['test'].select(range(count))
    return next(iter(make_loader(images, config, count)))[0]


@torch.no_grad()
def verify_folder(folder: Union[str, Path], checkpoint: Checkpoint, require_spikes: bool = True) -> Dict[str, float]:
    """Load a folder with timm and with transformers, and check that tensors and outputs equal the source bit for bit.

    Args:
        folder: The folder.
        checkpoint: The source, see `reading.read_checkpoint`.
        require_spikes: Whether at least one neuron of the encoder blocks must fire on the shipped images. If none
            fires, equal outputs do not prove that the weights are equal.

    Returns:
        The firing rate (spikes per neuron and time step) of every neuron layer on the shipped images.

    Raises:
        RuntimeError: An output, a tensor, a label or the data config differs, or no neuron fires.
    """
    x = example_images(checkpoint)
    model, encoder = checkpoint.model, checkpoint.encoder
    is_mae = isinstance(model, SpikformerMAE)  # the encoder's classifier, if it has one, is not saved
    expected = encoder.forward_features(x) if is_mae else encoder(x)
    with FiringRateMonitor(encoder) as monitor:  # its hooks disable kernels that round differently
        encoder.forward_features(x)
        rates = dict(monitor.rates)
    if require_spikes and not any(rate > 0. for name, rate in rates.items() if name.startswith('blocks.')):
        raise RuntimeError(
            'No neuron of the encoder fires on the shipped images. An untrained model has initial BN statistics: train '
            'it, or run some batches in train mode, before saving it.')

    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    if not torch.equal(loaded.forward_features(x) if is_mae else loaded(x), expected):
        raise RuntimeError(
            _difference_message('outputs', 'timm', 'A config.json cannot represent all of its arguments.'))
    _compare_tensors(loaded, encoder, 'timm', skip_head=is_mae)
    read_back = data_config(loaded)
    for key in DATA_KEYS:
        if _as_list(read_back[key]) != _as_list(checkpoint.data_config[key]):
            raise RuntimeError(
                _difference_message(key, 'timm', f'{read_back[key]}, expected {checkpoint.data_config[key]}.'))

    if not is_mae and not encoder.num_classes:
        hf_model = SpikformerModel.from_pretrained(folder).eval()
    else:
        auto_class = AutoModelForMaskedImageModeling if is_mae else AutoModelForImageClassification
        hf_model = auto_class.from_pretrained(folder).eval()
    if is_mae:
        units = (x.shape[-2] // model.mask_unit) * (x.shape[-1] // model.mask_unit)
        noise = torch.rand(len(x), units, generator=torch.Generator().manual_seed(0))
        is_equal = torch.equal(hf_model(x, noise=noise).reconstruction, model(x, noise=noise).reconstruction)
    elif encoder.num_classes:
        is_equal = torch.equal(hf_model(x).logits, expected)
    else:
        is_equal = torch.equal(hf_model.timm_model(x), expected)
    if not is_equal:
        raise RuntimeError(_difference_message('outputs', 'transformers'))
    _compare_tensors(unwrap_timm_model(hf_model), model, 'transformers', skip_head=is_mae)
    if checkpoint.labels is not None:
        if ordered_labels(hf_model.config.id2label) != checkpoint.labels:
            raise RuntimeError(_difference_message('labels', 'transformers'))
        if list(loaded.pretrained_cfg['label_names']) != checkpoint.labels:
            raise RuntimeError(_difference_message('labels', 'timm'))
    return rates


def _compare_tensors(loaded: torch.nn.Module, source: torch.nn.Module, library: str, skip_head: bool) -> None:
    theirs, ours = ({k: v for k, v in m.state_dict().items() if not (skip_head and 'head.' in k)}
                    for m in (loaded, source))
    if theirs.keys() != ours.keys() or not all(torch.equal(theirs[k], ours[k]) for k in ours):
        raise RuntimeError(_difference_message('weights', library))


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _difference_message(what: str, library: str, detail: str = '') -> str:
    return (f'The written folder has different {what} in {library} than the original model, so it is discarded. '
            f'{detail}').rstrip()
