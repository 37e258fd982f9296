"""The folder that both ecosystems load, and the proof that they do."""
import json
import shutil
from pathlib import Path
from typing import Dict, Optional, Union

import timm
import torch
import yaml
from timm.data import create_transform
from torch import Tensor
from transformers import AutoModelForImageClassification, AutoModelForMaskedImageModeling

from ..checkpoints import TRAINING_FILE
from ..demo.data import FASHION_MNIST
from ..demo.training import watch_firing
from ..hf.configuration_spikformer import SpikformerConfig, label_maps
from ..hf.image_processing import create_image_processor
from ..hf.modeling_spikformer import (
    SpikformerForImageClassification,
    SpikformerForMaskedImageModeling,
    SpikformerModel,
    SpikformerPreTrainedModel,
)
from ..hf.remote_code import save_remote_code
from ..masked_autoencoder import SpikformerMAE
from .checkpoint import Checkpoint, timm_part

__all__ = ['example_images', 'save_folder', 'verify_folder']


def _to_transformers(checkpoint: Checkpoint) -> SpikformerPreTrainedModel:
    model, encoder = checkpoint.model, checkpoint.encoder
    encoder.set_input_size(checkpoint.data_config['input_size'][1:])
    config = SpikformerConfig.from_timm(encoder, **(label_maps(checkpoint.labels) if checkpoint.labels else {}))
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
    timm_part(hf_model).load_state_dict(model.state_dict())
    return hf_model.eval()


def save_folder(checkpoint: Checkpoint, folder: Union[str, Path], card: Optional[str] = None, **files: str) -> None:
    """Write model.safetensors, config.json, preprocessor_config.json, the code, and what is given as text.

    All is written beside the folder first, so that it is never there by half.

    Args:
        checkpoint: What to save
        folder: Where to; what is there already is replaced
        card: The README.md
        files: Further texts by their paths in the folder
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + '.partial')
    shutil.rmtree(partial, ignore_errors=True)
    hf_model = _to_transformers(checkpoint)
    hf_model.save_pretrained(partial)
    if checkpoint.processor is None:
        create_image_processor(hf_model.config.to_dict()['pretrained_cfg']).save_pretrained(partial)
    else:
        (partial / 'preprocessor_config.json').write_text(json.dumps(checkpoint.processor, indent=2) + '\n')
    save_remote_code(partial)
    texts: Dict[str, str] = dict(files)
    if card is not None:
        texts['README.md'] = card
    if checkpoint.training is not None:
        texts[TRAINING_FILE] = yaml.safe_dump(
            {'command': checkpoint.training.command, **checkpoint.training.args}, sort_keys=False)
    for name, text in texts.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(text, encoding='utf-8')
    if folder.exists():
        shutil.rmtree(folder)
    partial.replace(folder)


def example_images(checkpoint: Checkpoint, count: int = 8) -> Tensor:
    """The first test images that the package ships, presented as the model wants them, `[count, C, H, W]`."""
    import datasets
    transform = create_transform(**checkpoint.data_config, is_training=False)
    mode = {1: 'L', 3: 'RGB'}.get(checkpoint.encoder.in_chans)
    if mode is None:
        return torch.randn(count, *checkpoint.data_config['input_size'], generator=torch.Generator().manual_seed(0))
    images = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'test.parquet'))[:count]['image']
    return torch.stack([transform(image.convert(mode)) for image in images])


@torch.no_grad()
def verify_folder(folder: Union[str, Path], checkpoint: Checkpoint) -> Dict[str, float]:
    """Load a folder through timm and through transformers, and compare with what it was made from, bit for bit.

    Returns:
        The firing rate of every neuron layer on shipped images.

    Raises:
        RuntimeError: One of them gives something else, or all of the last block's neurons are silent, so that there
            is nothing to compare.
    """
    x = example_images(checkpoint)
    model, encoder = checkpoint.model, checkpoint.encoder
    is_mae = isinstance(model, SpikformerMAE)  # its encoder's classifier, if it has one, is not saved
    monitor = watch_firing(encoder)
    expected = encoder.forward_features(x) if is_mae else encoder(x)
    rates = {name: monitor[name][0] for name in monitor.monitored_layers}
    monitor.remove_hooks()
    if not any(rate > 0. for name, rate in rates.items() if name.startswith('blocks.')):
        raise RuntimeError(
            'No neuron of the encoder fires on the shipped images. In a model that was not trained, BN has seen no '
            'data: train it, or forward some batches in train mode, before it is published.')
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    if not torch.equal(loaded.forward_features(x) if is_mae else loaded(x), expected):
        raise RuntimeError(f'{folder} gives other outputs in timm than the model that it was made from.')

    auto_class = AutoModelForMaskedImageModeling if is_mae else AutoModelForImageClassification
    if not is_mae and not encoder.num_classes:
        hf_model = SpikformerModel.from_pretrained(folder).eval()
    else:
        hf_model = auto_class.from_pretrained(folder).eval()
    if is_mae:
        noise = torch.rand(len(x), (x.shape[-2] // model.mask_unit) * (x.shape[-1] // model.mask_unit))
        same = torch.equal(hf_model(x, noise=noise).reconstruction, model(x, noise=noise).reconstruction)
    elif encoder.num_classes:
        same = torch.equal(hf_model(x).logits, expected)
    else:
        same = torch.equal(hf_model.timm_model(x), expected)
    if not same:
        raise RuntimeError(f'{folder} gives other outputs in transformers than the model that it was made from.')
    if checkpoint.labels is not None:
        if list(hf_model.config.id2label.values()) != checkpoint.labels:
            raise RuntimeError(f'The labels in {folder} are not the ones that were given.')
        if list(loaded.pretrained_cfg['label_names']) != checkpoint.labels:
            raise RuntimeError(f'The labels that timm reads in {folder} are not the ones that were given.')
    return rates
