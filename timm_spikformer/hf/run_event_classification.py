"""Train a `SpikformerForImageClassification` on event sequences with Trainer.

This script is the counterpart of transformers' run_image_classification.py for event cameras. It accepts all arguments
of `TrainingArguments`. Pass either options, as in this example, or one JSON file that contains the arguments:

    python -m timm_spikformer.hf.run_event_classification --do_train --do_eval --output_dir DIR \
        --dataset_name "events/dvs128_gesture?time_steps=16" --data_dir FOLDER --model spikformer_2_256_patch16_128
"""
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
from torch import Tensor
from torch.utils.data import Dataset
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..arguments import check_count
from ..errors import first_line
from ..event_data.dataset import EventSequences, collate
from ..event_data.names import EventName, parse_name, read_event_splits
from ..event_data.transforms import SequenceTransform
from ..images import match_classes
from ..losses import TETLoss
from ..pretrained import download_if_exists, get_training_cfg
from ..spikformer import check_model_name
from ..state_dicts import PARSING_ERRORS, read_json
from .configuration_spikformer import SpikformerConfig, label_maps, ordered_labels
from .event_processing import SpikformerEventProcessor
from .modeling_spikformer import SpikformerForImageClassification
from .processing import read_event_processor
from .trainer import FiringRateCallback, SpikformerTrainer

__all__ = ['DataArguments', 'ModelArguments', 'main']


@dataclass
class DataArguments:
    """Arguments of the dataset and of augmentation."""
    dataset_name: str = field(metadata={'help': 'Name of the dataset, such as events/cifar10_dvs?time_steps=16.'})
    data_dir: Optional[str] = field(default=None, metadata={'help': 'Folder with the original files of the dataset.'})
    hflip: float = field(default=0., metadata={'help': 'Probability of a horizontal flip in training.'})
    erase_prob: float = field(default=0., metadata={'help': 'Probability of erasing a square in training.'})
    max_train_samples: Optional[int] = field(default=None, metadata={'help': 'Maximum number of training sequences.'})
    max_eval_samples: Optional[int] = field(default=None, metadata={'help': 'Maximum number of test sequences.'})


@dataclass
class ModelArguments:
    """Arguments of the model and of the loss."""
    model: str = field(
        default='spikformer_2_256_patch16_128',
        metadata={'help': 'Name of a registered model, which is initialized randomly, or a folder or a Hub repository '
                          'with a pre-trained model.'})
    loss: str = field(
        default='mean',
        metadata={'help': 'mean: cross-entropy of the mean of the logits over time; tet: temporal efficient '
                          'training loss, on the logits of each time step.',
                  'choices': ['mean', 'tet']})

    def __post_init__(self):
        if self.loss not in ('mean', 'tet'):  # transformers does not check the choices of a JSON file
            raise ValueError(f"loss must be 'mean' or 'tet', got {self.loss!r}.")


class _ModelInputs(Dataset):
    """Preprocessed sequences and their labels, as keyword arguments of the model."""

    def __init__(self, sequences: EventSequences, processor: SpikformerEventProcessor):
        self.sequences = sequences
        self.processor = processor

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, i: int) -> Dict[str, Any]:
        frames, label = self.sequences[i]
        return dict(pixel_values=self.processor(frames, return_tensors='pt')['pixel_values'][0], labels=label)


def _collate(batch: List[Dict[str, Any]]) -> Dict[str, Tensor]:
    pixel_values, labels = collate([(sample['pixel_values'], sample['labels']) for sample in batch])
    return dict(pixel_values=pixel_values, labels=labels)


def _compute_accuracy(prediction: Any) -> Dict[str, float]:
    return {'accuracy': float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _is_pretrained(name: str) -> bool:
    return os.path.isdir(name) or '/' in name


def _read_data(name: str, folder: Optional[str]) -> Tuple[EventSequences, EventSequences]:
    """Read the training and test sequences of a dataset; without a test split, those of the validation split.

    Raises:
        ValueError: The dataset lacks one of these splits, or has no class names.
    """
    splits = read_event_splits(name, folder)
    test = splits.get('test', splits.get('validation'))
    if 'train' not in splits or test is None:
        raise ValueError(
            f'{name} has only the splits {", ".join(splits)} in {folder}, expected train and either test or '
            f'validation.')
    if splits['train'].classes is None:
        raise ValueError(
            f'{name}: the data in {folder} has no class names. Use a ClassLabel of `datasets` as the label column of '
            f'the parquet files, or an image folder.')
    return splits['train'], test


def _create_model(name: str, classes: Sequence[str], time_steps: int) -> SpikformerForImageClassification:
    """Create a model for the classes and the frames of a dataset.

    A pre-trained model with the same class names keeps their order. A pre-trained model with other class names gets a
    new, randomly initialized classifier. `time_steps` applies to new models only.

    Raises:
        ValueError: A pre-trained model does not have 2 input channels, or there is no model with this name.
    """
    labels = dict(num_labels=len(classes), **label_maps(classes))
    if not _is_pretrained(name):
        check_model_name(name)
        cfg = dict(mean=(0., 0.), std=(1., 1.), input_size=(2, *get_training_cfg(name).input_size[1:]))
        timm_model = timm.create_model(
            name, in_chans=2, img_size=cfg['input_size'][1:], time_steps=time_steps, pretrained_cfg_overlay=cfg)
        return SpikformerForImageClassification(SpikformerConfig.from_timm(timm_model, **labels))
    config = SpikformerConfig.from_pretrained(name)
    if config.num_channels != 2:
        raise ValueError(
            f'Event frames have 2 channels, one per polarity, but {name} has {config.num_channels} input channels. Use '
            f'a model that was trained on event frames, or the name of a registered model.')
    if sorted(ordered_labels(config.id2label)) == sorted(classes):
        return SpikformerForImageClassification.from_pretrained(name)
    model = SpikformerForImageClassification.from_pretrained(name, ignore_mismatched_sizes=True, **labels)
    model.timm_model.init_layer(model.timm_model.head.fc)
    print(f'The classes of {name} are not those of the dataset, so the classifier is initialized randomly.')
    return model


def _read_processor(model_name: str) -> Optional[SpikformerEventProcessor]:
    """Read the processor of a pre-trained model; return None if its folder or repository does not contain one.

    Raises:
        ValueError: The file cannot be read, or is not the file of a `SpikformerEventProcessor`.
        RuntimeError: The Hub cannot be reached to check whether the repository contains a processor.
    """
    filename = 'preprocessor_config.json'
    path = os.path.join(model_name, filename) if os.path.isdir(model_name) else download_if_exists(model_name, filename)
    if path is None or not os.path.lexists(path):
        return None
    try:
        return read_event_processor(read_json(Path(path)))
    except PARSING_ERRORS as e:
        raise ValueError(f'The processor of {model_name} cannot be used: {first_line(e)}.') from e


def _create_processor(
        model: SpikformerForImageClassification,
        model_name: str,
        dataset: EventName,
        sensor_size: Tuple[int, int],
        is_training: bool,
) -> SpikformerEventProcessor:
    """Create the processor of the dataset, with the mean and standard deviation of a pre-trained model.

    Raises:
        ValueError: The processor of a pre-trained model is damaged, or the model is evaluated without training, and the
            dataset has another `time_steps` or `split_by` than its processor.
    """
    cfg = model.config.to_dict()['pretrained_cfg']
    mean, std = cfg['mean'], cfg['std']
    saved = _read_processor(model_name) if _is_pretrained(model_name) else None
    if saved is not None:
        mean, std = saved.image_mean, saved.image_std
        requested, own = (dataset.time_steps, dataset.split_by), (saved.time_steps, saved.split_by)
        if not is_training and requested != own:
            raise ValueError(
                f'The processor of {model_name} has time_steps={own[0]} and split_by={own[1]}, but the name of the '
                f'dataset has time_steps={requested[0]} and split_by={requested[1]}. Change '
                f'--dataset_name to match the processor.')
    size = model.config.image_size
    return SpikformerEventProcessor(
        size=(size, size) if isinstance(size, int) else size, sensor_size=sensor_size,
        time_steps=dataset.time_steps, split_by=dataset.split_by, image_mean=mean, image_std=std)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    is_file = len(sys.argv) == 2 and sys.argv[1].endswith('.json')
    model_args, data_args, args = (
        parser.parse_json_file(sys.argv[1]) if is_file else parser.parse_args_into_dataclasses())
    set_seed(args.seed)
    name = parse_name(data_args.dataset_name)
    for option in ('max_train_samples', 'max_eval_samples'):
        if getattr(data_args, option) is not None:
            check_count(f'--{option}', getattr(data_args, option))
    if args.do_train and args.resume_from_checkpoint is None and os.path.isdir(args.output_dir):
        if get_last_checkpoint(args.output_dir) is not None:
            raise ValueError(
                f'{args.output_dir} contains checkpoints of an earlier run. Continue it with --resume_from_checkpoint '
                f'CHECKPOINT, or use another --output_dir.')
    train, test = _read_data(data_args.dataset_name, data_args.data_dir)
    model = _create_model(model_args.model, train.classes, name.time_steps)
    processor = _create_processor(model, model_args.model, name, train.source.size, args.do_train)
    labels = ordered_labels(model.config.id2label)
    train, test = (match_classes(sequences, labels, len(labels)) for sequences in (train, test))
    if data_args.max_train_samples is not None:
        train = train.sample_stratified(data_args.max_train_samples, args.seed)
    if data_args.max_eval_samples is not None:
        test = test.sample_stratified(data_args.max_eval_samples, args.seed)
    step_loss = None
    if model_args.loss == 'tet':
        step_loss = TETLoss(label_smoothing=args.label_smoothing_factor)
        args.label_smoothing_factor = 0.  # the loss applies it; SpikformerTrainer rejects both together
    train.transform = SequenceTransform(
        hflip=data_args.hflip, roll=name.roll, erase_prob=data_args.erase_prob)
    trainer = SpikformerTrainer(
        model=model,
        args=args,
        train_dataset=_ModelInputs(train, processor),
        eval_dataset=_ModelInputs(test, processor),
        data_collator=_collate,
        processing_class=processor,
        compute_metrics=_compute_accuracy,
        callbacks=[FiringRateCallback(log_layers=False)],
        step_loss=step_loss,
    )
    if args.do_train:
        result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics('train', result.metrics)
        trainer.save_metrics('train', result.metrics)
        trainer.save_state()
    if args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics('eval', metrics)
        trainer.save_metrics('eval', metrics)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == '__main__':
    main()
