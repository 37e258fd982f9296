"""The model card and the evaluation result files of a checkpoint."""
import csv
import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Union

import jinja2  # noqa: F401  required by ModelCard; without this import, rendering would fail only after the measurements
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData
from huggingface_hub import eval_result_entries_to_yaml as entries_to_yaml

from ..folders import resolve
from ..masked_autoencoder import SpikformerMAE
from ..profiling import Profile
from ..profiling.conventions import describe_assumptions
from ..reading import Checkpoint, TrainingRecord
from ..stems import SpikingPatchSplitting

__all__ = ['AccuracyResult', 'Dataset', 'escape', 'read_results', 'render_card', 'results_files']

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
    """Dataset of a result.

    Args:
        id: Id of the dataset on the Hub.
        name: Name to show.
        split: Name of the split. None means the split of the images that are evaluated.

    >>> import tempfile, timm
    >>> from timm_spikformer.publishing import publish
    >>> model = timm.create_model('spikformer_v2_2_64_patch4_32.fashion_mnist', pretrained=True)
    >>> dataset = Dataset('zalando-datasets/fashion_mnist', 'Fashion-MNIST', 'test')
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     results = Path(folder, 'results.json')
    ...     _ = results.write_text('{"model": "spikformer_v2_2_64_patch4_32.fashion_mnist", "top1": 92.5}')
    ...     output = Path(folder, 'model')
    ...     _ = publish(model, 'org/name', 'mit', results=results, dataset=dataset, output=output, dry_run=True)
    ...     '| Fashion-MNIST | test | Top-1 accuracy | 92.5% |' in Path(output, 'README.md').read_text()
    True
    """
    id: str
    name: str
    split: Optional[str] = None


class AccuracyResult(NamedTuple):
    """An accuracy of a checkpoint.

    Args:
        name: Name of the metric.
        value: Accuracy in percent, 0 to 100.
        dataset: Dataset that it was measured on.
        measured_by: Tool that measured it.

    >>> result = AccuracyResult('Top-1 accuracy', 86.8, Dataset('org/data', 'Data', 'test'), "timm's validate.py")
    >>> list(results_files([result], date='2026-01-31'))
    ['.eval_results/image-classification.yaml']
    """
    name: str
    value: float
    dataset: Dataset
    measured_by: str


def escape(value: object) -> str:
    """Return a value as single-line Markdown text, with markup, HTML, links and table separators escaped."""
    text = ' '.join(str(value).split())
    # $ starts math, @ mentions a user of the Hub, and :// and www. turn a URL into a link
    return re.sub(r'([\\`*_\[\]<>|~&$@]|:(?=//)|(?<=www)\.)', r'\\\1', text)


def read_results(path: Union[str, Path], dataset: Dataset, checkpoint: Checkpoint) -> List[AccuracyResult]:
    """Read the top-1 and top-5 accuracy of a checkpoint from a JSON or CSV file that timm's validate.py wrote.

    Args:
        path: Path of the file.
        dataset: Dataset that the results were measured on.
        checkpoint: Checkpoint whose row is read.

    Raises:
        ValueError: The file was not written by validate.py, it does not have exactly one row for the checkpoint, or a
            value is not an accuracy.
    """
    path = Path(path)
    expected = 'Expected a file that validate.py --results-file wrote'
    if not path.is_file():
        raise ValueError(f'There is no {path}. {expected}.')
    try:
        text = path.read_text(encoding='utf-8-sig')
        rows = json.loads(text) if path.suffix == '.json' else list(csv.DictReader(text.splitlines()))
    except (ValueError, csv.Error, RecursionError) as e:
        raise ValueError(f'{path} cannot be read: {e}. {expected}.') from e
    rows = rows if isinstance(rows, list) else [rows]
    if not rows or not all(isinstance(row, dict) and row.get('model') for row in rows):
        raise ValueError(f'{path} has no rows, or a row without a model name. {expected}.')
    matching = [row for row in rows if _is_row_of(row, checkpoint)]
    if len(matching) != 1:
        what = 'more than one row' if matching else 'no row'
        models = ', '.join(sorted({str(row.get('checkpoint') or row['model'])[:100] for row in rows})[:5])
        source = '' if checkpoint.source is None else f', read from {checkpoint.source}'
        raise ValueError(
            f'{path} has {what} for this checkpoint of {checkpoint.name}{source}. Its rows are for {models}. Expected '
            f'one row that names the file or folder of this checkpoint, or, without a path, exactly this model.')
    row = matching[0]
    if row.get('error') not in (None, ''):
        raise ValueError(f'{path} reports an error for this checkpoint: {row["error"]}.')
    values = {
        key: _read_accuracy(path, key, row[key]) for key in ('top1', 'top5') if row.get(key) not in (None, '')}
    if 'top1' not in values:
        raise ValueError(f'{path} has no top1 for {row["model"]}. {expected}.')
    if values.get('top5', 100.) < values['top1']:
        raise ValueError(f'{path} has top5={values["top5"]} below top1={values["top1"]}, which is impossible.')
    names = dict(top1='Top-1 accuracy', top5='Top-5 accuracy')
    return [AccuracyResult(names[key], value, dataset, "timm's validate.py") for key, value in values.items()]


def _read_accuracy(path: Path, key: str, value: Any) -> float:
    """Return an accuracy in percent from a number (JSON) or a text (CSV)."""
    is_text = isinstance(value, str) and path.suffix != '.json'
    try:
        percent = float(value) if is_text or type(value) in (int, float) else None
    except (ValueError, OverflowError):
        percent = None
    if percent is None or not 0. <= percent <= 100.:
        raise ValueError(f'{path} has {key}={str(value)[:100]}. Expected an accuracy from 0 to 100 percent.')
    return percent


def _is_row_of(row: Dict[str, Any], checkpoint: Checkpoint) -> bool:
    """Return whether a row belongs to a checkpoint.

    A row that names a file or folder must name the source of the checkpoint. Otherwise its model name must be the name
    of the checkpoint, including the tag of the weights, or the architecture.
    """
    name, source = str(row['model']), checkpoint.source
    file = row.get('checkpoint') or (name.removeprefix('local-dir:') if name.startswith('local-dir:') else None)
    if file:
        try:
            return source is not None and resolve(str(file)) == resolve(source)
        except (OSError, ValueError):  # not a valid path
            return False
    return name in (checkpoint.name, checkpoint.encoder.pretrained_cfg['architecture'])


def results_files(results: List[AccuracyResult], date: str) -> Dict[str, str]:
    """Return the contents of the Hub's `.eval_results/*.yaml` files by path; empty without results."""
    entries = [
        EvalResultEntry(
            dataset_id=r.dataset.id, task_id='image-classification', value=r.value, date=date,
            notes=f'{r.name} in percent, {r.dataset.split} split, measured by {r.measured_by}')
        for r in results
    ]
    if not entries:
        return {}
    return {'.eval_results/image-classification.yaml': yaml.safe_dump(entries_to_yaml(entries), sort_keys=False)}


class _Task(NamedTuple):
    """Task of a model on the Hub, the Auto class of transformers, and a summary for the card."""
    name: str
    auto_class: str
    summary: str


def _task(checkpoint: Checkpoint, family: str) -> _Task:
    if isinstance(checkpoint.model, SpikformerMAE):
        return _Task('image-feature-extraction', 'AutoModelForMaskedImageModeling', (
            f'{family}, a spiking vision transformer, pre-trained without labels as a masked autoencoder with a '
            f'spiking encoder and an ANN decoder. Fine-tune it before use.'))
    if checkpoint.encoder.num_classes:
        return _Task('image-classification', 'AutoModelForImageClassification', (
            f'{family}, a spiking vision transformer: an image classifier whose neurons emit binary spikes.'))
    return _Task('image-feature-extraction', 'AutoModel', (
        f'{family}, a spiking vision transformer, without a classifier: it returns image features.'))


def _metadata(
        name: str,
        license: str,
        task: str,
        results: List[AccuracyResult],
        datasets: Optional[List[str]],
        base_model: Optional[str],
) -> ModelCardData:
    if datasets is None:
        datasets = sorted({r.dataset.id for r in results})
    return ModelCardData(
        library_name='timm',
        pipeline_tag=task,
        license=license,
        datasets=datasets or None,
        metrics=['accuracy'] if results else None,
        base_model=base_model,
        tags=[*_TAGS, task],
        model_name=name if results else None,
        eval_results=[
            EvalResult(
                task_type='image-classification', task_name='Image Classification', dataset_type=r.dataset.id,
                dataset_name=r.dataset.name, dataset_split=r.dataset.split, metric_type='accuracy',
                metric_name=r.name, metric_value=r.value)
            for r in results
        ] or None,
    )


def _training_details(training: Optional[TrainingRecord]) -> Optional[Dict[str, Any]]:
    if training is None:
        return None
    words = training.command.split()
    return dict(
        is_command=words[:1] in (['python'], ['timm-spikformer']),  # else a description, such as 'transformers Trainer'
        command=' '.join(words),  # for a code block
        text=escape(training.command),  # for running text
        args={escape(key): escape(value) for key, value in training.args.items()},
    )


def render_card(
        checkpoint: Checkpoint,
        repo_id: str,
        license: str,
        profile: Profile,
        results: List[AccuracyResult],
        profiled_on: Optional[str] = None,
        datasets: Optional[List[str]] = None,
        base_model: Optional[str] = None,
) -> ModelCard:
    """Render the model card with its metadata.

    Args:
        checkpoint: The checkpoint.
        repo_id: `ORG/NAME`.
        license: License identifier of the Hub for the weights.
        profile: Operations and energy of the model, or of the encoder of a masked autoencoder with all patches visible.
        results: Accuracies of this checkpoint.
        profiled_on: Description of the profiled images. None if they are only example images, so that firing rates and
            energy do not represent the dataset.
        datasets: Hub ids of the training datasets; by default, the datasets of the results.
        base_model: Hub id of the model that training started from.
    """
    encoder = checkpoint.encoder
    is_v2 = not isinstance(encoder.stem, SpikingPatchSplitting)
    task = _task(checkpoint, 'Spikformer V2' if is_v2 else 'Spikformer')
    name = repo_id.split('/')[-1]
    details: Dict[str, Any] = dict(
        checkpoint.data_config,
        name=name,
        repo_id=repo_id,
        summary=task.summary,
        auto_class=task.auto_class,
        is_v2=is_v2,
        is_mae=isinstance(checkpoint.model, SpikformerMAE),
        is_event_model=checkpoint.data_config['input_size'][0] == 2,
        architecture=encoder.pretrained_cfg['architecture'],
        time_steps=encoder.time_steps,
        parameters=sum(p.numel() for p in checkpoint.model.parameters()),
        encoder_parameters=sum(p.numel() for p in encoder.parameters()),
        num_classes=encoder.num_classes,
        labels=[escape(label) for label in checkpoint.labels or ()],
        profile=profile,
        profiled_on=None if profiled_on is None else escape(profiled_on),
        assumptions=describe_assumptions(profile.conventions, profile.cost),
        rates=[x.mean_firing_rate for x in profile.layers if x.firing_rate is not None],
        training=_training_details(checkpoint.training),
        results=[dict(
            dataset=escape(r.dataset.name), split=escape(r.dataset.split), metric=r.name, value=r.value,
            measured_by=escape(r.measured_by)) for r in results],
        citation=_CITATIONS['scs' if is_v2 else 'sps'],
    )
    data = _metadata(name, license, task.name, results, datasets, base_model)
    template = resources.files(__package__).joinpath('card.md.jinja').read_text(encoding='utf-8')
    return ModelCard.from_template(data, template_str=template, **details)
