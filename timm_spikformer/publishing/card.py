"""The model card and the files of results: what is known of a checkpoint, and no figure of anybody else's."""
import csv
import json
from importlib import resources
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from huggingface_hub import eval_result_entries_to_yaml as entries_to_yaml

from ..masked_autoencoder import SpikformerMAE
from ..profiling import Profile
from ..stems import SpikingPatchSplitting
from .checkpoint import Checkpoint

__all__ = ['Dataset', 'Result', 'read_results', 'render_card', 'results_files']

_TAGS = ['timm', 'transformers', 'snn', 'spikformer']
_CITATIONS = {
    'scs': """@article{zhou2024spikformerv2,
  title   = {Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN Ticket},
  author  = {Zhou, Zhaokun and Che, Kaiwei and Fang, Wei and Tian, Keyu and Zhu, Yuesheng and Yan, Shuicheng and
             Tian, Yonghong and Yuan, Li},
  journal = {arXiv:2401.02020},
  year    = {2024}
}""",
    'sps': """@inproceedings{zhou2023spikformer,
  title     = {Spikformer: When Spiking Neural Network Meets Transformer},
  author    = {Zhou, Zhaokun and Zhu, Yuesheng and He, Chao and Wang, Yaowei and Yan, Shuicheng and Tian, Yonghong and
               Yuan, Li},
  booktitle = {International Conference on Learning Representations},
  year      = {2023}
}""",
}


class Dataset(NamedTuple):
    """What a result was measured on: id on the Hub, pretty name, split."""
    id: str
    name: str
    split: str


class Result(NamedTuple):
    """An accuracy in percent, and who measured it."""
    name: str
    value: float
    dataset: Dataset
    measured_by: str


def read_results(path: Union[str, Path], dataset: Dataset) -> List[Result]:
    """Top-1 and top-5 accuracy from the file that timm's validate.py has written, JSON or CSV.

    Raises:
        ValueError: The file holds no top1.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'There is no {path}. Expected a file that validate.py --results-file has written.')
    text = path.read_text()
    try:
        rows = json.loads(text) if path.suffix == '.json' else list(csv.DictReader(text.splitlines()))
        row = rows[0] if isinstance(rows, list) else rows
        values = {key: float(row[key]) for key in ('top1', 'top5') if key in row}
    except (ValueError, IndexError, TypeError) as e:
        raise ValueError(f'{path} is not a file that validate.py --results-file has written: {e}.') from e
    if 'top1' not in values:
        raise ValueError(f'{path} has no top1. Expected a file that validate.py --results-file has written.')
    names = dict(top1='Top-1 accuracy', top5='Top-5 accuracy')
    return [Result(names[key], value, dataset, "timm's validate.py") for key, value in values.items()]


def results_files(results: List[Result], date: str) -> Dict[str, str]:
    """The results as `.eval_results/*.yaml`, texts by path."""
    entries = [
        EvalResultEntry(
            dataset_id=r.dataset.id, task_id='image-classification', value=r.value, date=date,
            notes=f'{r.name} in percent, {r.dataset.split} split, measured by {r.measured_by}')
        for r in results
    ]
    if not entries:
        return {}
    return {'.eval_results/image-classification.yaml': yaml.safe_dump(entries_to_yaml(entries), sort_keys=False)}


def render_card(
        checkpoint: Checkpoint,
        repo_id: str,
        license: str,
        profile: Profile,
        results: List[Result],
        profiled_on: Optional[str] = None,
        datasets: Optional[List[str]] = None,
        base_model: Optional[str] = None,
) -> ModelCard:
    """The card, metadata and text.

    Args:
        checkpoint: What the card is of
        repo_id: `ORG/NAME`
        license: Identifier of the licence of the weights, as the Hub has them
        profile: Of its operations, counted as the papers do
        results: What was measured of this checkpoint
        profiled_on: What the images were, if rates and energy are those of data like the training's
        datasets: Ids of the datasets that it was trained on
        base_model: Id of the repository that training started from
    """
    encoder, is_mae = checkpoint.encoder, isinstance(checkpoint.model, SpikformerMAE)
    version = 'Spikformer' if isinstance(encoder.stem, SpikingPatchSplitting) else 'Spikformer V2'
    if is_mae:
        task, auto_class = 'image-feature-extraction', 'AutoModelForMaskedImageModeling'
        summary = (
            f'A {version}, a spiking vision transformer, pre-trained without labels as a masked autoencoder: the '
            f'spiking encoder and the artificial decoder. It is to be fine-tuned.')
    elif encoder.num_classes:
        task, auto_class = 'image-classification', 'AutoModelForImageClassification'
        summary = (
            f'A {version}, a spiking vision transformer: an image classifier whose neurons exchange spikes, 0 or 1, '
            f'and sums of spikes.')
    else:
        task, auto_class = 'image-feature-extraction', 'AutoModel'
        summary = f'A {version}, a spiking vision transformer, without a classifier: it gives features of images.'
    ids = sorted({r.dataset.id for r in results}) if datasets is None else datasets
    data = ModelCardData(
        library_name='timm',
        pipeline_tag=task,
        license=license,
        datasets=ids or None,
        metrics=['accuracy'] if results else None,
        base_model=base_model,
        tags=[*_TAGS, task],
        model_name=repo_id.split('/')[-1] if results else None,
        eval_results=[
            EvalResult(
                task_type='image-classification', task_name='Image Classification', dataset_type=r.dataset.id,
                dataset_name=r.dataset.name, dataset_split=r.dataset.split, metric_type='accuracy',
                metric_name=r.name, metric_value=r.value)
            for r in results
        ] or None,
    )
    details: Dict[str, Any] = dict(
        checkpoint.data_config,
        name=repo_id.split('/')[-1], repo_id=repo_id, summary=summary, auto_class=auto_class,
        architecture=encoder.pretrained_cfg['architecture'], time_steps=encoder.time_steps,
        parameters=sum(p.numel() for p in encoder.parameters()), num_classes=encoder.num_classes,
        labels=checkpoint.labels, profile=profile, profiled_on=profiled_on, training=checkpoint.training,
        rates=[x.mean_firing_rate for x in profile.layers if x.firing_rate is not None], results=results,
        citation=_CITATIONS['sps' if version == 'Spikformer' else 'scs'],
    )
    template = resources.files(__package__).joinpath('card.md.jinja').read_text(encoding='utf-8')
    return ModelCard.from_template(data, template_str=template, **details)
