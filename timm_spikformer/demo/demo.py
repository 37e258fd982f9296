"""The three stages of the demo: classify with the shipped weights; train; pre-train and fine-tune."""
import argparse
import contextlib
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import timm
import torch
import yaml
from timm.models import save_for_hf
from timm.utils import random_seed
from torch import nn

from ..arguments import check_count, check_number
from ..checkpoints import DIGEST_ARG, TRAINING_FILE
from ..devices import choose_device
from ..folders import (
    check_output_file,
    check_output_folder,
    lock_folder_for_run,
    manifest_files,
    remove_files,
    write_file,
    write_folder,
)
from ..images import (
    SHIPPED_MODEL,
    Images,
    data_config,
    make_loader,
    read_splits,
    select_train_test,
    training_data_config,
)
from ..linear import fit_linear
from ..masked_autoencoder import SpikformerMAE
from ..spikformer import check_model_name
from ..training import Objective, Recipe, classify, evaluate, init_bn_bias, reconstruct, reconstruction_loss, train
from .command import DEFAULTS, KIND, SETTINGS, STAGES
from .pictures import save_predictions, save_reconstructions
from .progress import Progress, Stage, StageProgress

_PREDICTIONS, _RECONSTRUCTIONS = 'predictions.png', 'reconstruction.png'
_RESULTS, _MODEL = 'results.json', 'model'
_CHECKPOINTS = [f'{name}.pth.tar' for name in ('supervised', 'pretraining', 'finetuning', 'scratch')]
_FILES = [SETTINGS, *_CHECKPOINTS, _PREDICTIONS, _RECONSTRUCTIONS, _RESULTS]
_ARGS_NOT_RESTORED = ('resume', 'output', 'device')  # arguments of the current call, which --resume does not restore
_TRAINING_ARGS = ('model', 'time_steps', 'epochs', 'batch_size', 'lr', 'weight_decay', 'seed')
_ADVICE = 'Lower --batch-size.'  # if there are fewer images than one batch
_PRETRAINING_COST = 0.6  # time per image in pre-training, relative to supervised training


def run_demo(args: argparse.Namespace) -> Dict[str, Any]:
    """Run the stages, write the results to `results.json` in the output folder, and return them.

    All arguments and the data are checked before anything is written.

    Returns:
        The results of the selected stages, and the total time `seconds`. Accuracies are in percent, times in seconds.

        - classify: `shipped_accuracy`.
        - train: `accuracy`; `linear_accuracy`, None if no linear classifier was fitted; `tested_on`, a description of
          the test images; `firing_rate`, the mean of the layers, and `firing_rates` by layer, in spikes per neuron and
          time step; `training_seconds`.
        - pretrain: `reconstruction_loss`; `reconstruction_loss_of_mean`, that of predicting the mean of each patch;
          `labeled`, the number of labeled images; `finetuned_accuracy`; `scratch_accuracy`; `finetuned_seconds`, which
          includes pre-training; `scratch_seconds`.
        - train and pretrain: `model`, `time_steps` and `seed`.

    Raises:
        ValueError: An argument, the data or the output folder is invalid, or training diverged.
        RuntimeError: The saved model returns different logits than the trained model.
    """
    start = time.time()
    output = Path(args.output)
    if args.data is not None:
        if not args.data:
            raise ValueError('--data is empty. Give a folder, or omit --data to use the shipped images.')
        args.data = os.path.abspath(args.data)
    if args.resume:
        _restore_args(args, output / SETTINGS)
        print(f'Resuming the run in {output} with its arguments.')
    for name, default in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    _check_arguments(args)
    stages = args.stages or (STAGES if args.data is None else STAGES[1:])
    data = [] if args.data is None else [args.data]
    check_output_folder(output, KIND, data=data, allow_other_files=True, names=_FILES)
    if 'train' in stages:
        check_output_folder(output / _MODEL, KIND, data=data)
    demo = _Demo(args, output, stages) if {'train', 'pretrain'} & {*stages} else None
    with lock_folder_for_run(output), _remove_settings_on_error(output):
        if not args.resume:
            remove_files(output, _FILES, KIND)
            _write_json(output / SETTINGS, vars(args))
        results: Dict[str, Any] = {}
        if 'classify' in stages:
            results.update(_classify_shipped(output / _PREDICTIONS))
        if demo is not None:
            results.update(demo.run())
        results['seconds'] = round(time.time() - start, 1)
        _write_json(output / _RESULTS, results)
    _print_results(results, args, output)
    return results


@contextlib.contextmanager
def _remove_settings_on_error(output: Path) -> Iterator[None]:
    """After an error, remove the arguments file if it is the only file that the run has written."""
    try:
        yield
    except Exception:
        if manifest_files(output) == [SETTINGS]:
            remove_files(output, _FILES, KIND)
        raise


def _write_json(path: Path, values: Dict[str, Any]) -> None:
    with write_file(path, KIND) as partial:
        partial.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')


def _restore_args(args: argparse.Namespace, settings: Path) -> None:
    """Set the arguments to those of the resumed run; raise a ValueError if one was given a different value."""
    if not settings.is_file():
        raise ValueError(f'There is no {settings} to resume from. Start without --resume.')
    check_output_file(settings, KIND)
    saved = json.loads(settings.read_text(encoding='utf-8'))
    expected = vars(args).keys() - {*_ARGS_NOT_RESTORED}
    if not expected <= saved.keys():
        raise ValueError(f'{settings} does not contain the arguments of this version. Start without --resume.')
    for name in sorted(expected):
        if getattr(args, name) not in (None, saved[name]):
            raise ValueError(
                f'--{name.replace("_", "-")} is {getattr(args, name)}, but the run to resume was started with '
                f'{saved[name]}. Omit it, or start without --resume.')
        setattr(args, name, saved[name])


def _check_arguments(args: argparse.Namespace) -> None:
    check_model_name(args.model)
    if args.data is not None and 'classify' in (args.stages or ()):
        raise ValueError(
            'The stage classify uses the shipped images and weights, so --data has no effect on it. Omit --data or '
            'classify.')
    for name in ('time_steps', 'epochs', 'pretrain_epochs', 'finetune_epochs', 'batch_size', 'labeled'):
        check_count(f'--{name.replace("_", "-")}', getattr(args, name))
    check_number('--mask-ratio', args.mask_ratio, above=0, below=1)
    check_number('--weight-decay', args.weight_decay)
    for name in ('lr', 'pretrain_lr'):
        check_number(f'--{name.replace("_", "-")}', getattr(args, name), above=0)
    if not 0 <= args.seed < 2 ** 31:
        raise ValueError(f'--seed must be from 0 to 2147483647, got {args.seed}.')
    args.device = str(choose_device(args.device))


@torch.no_grad()
def _classify_shipped(path: Path) -> Dict[str, Any]:
    """Evaluate the shipped weights on the shipped test images; print and draw the predictions for ten of them."""
    model = timm.create_model(SHIPPED_MODEL, pretrained=True).eval()
    config, test = data_config(model), read_splits()['test']
    examples = test.sample_evenly(10)
    x, y = next(iter(make_loader(examples, config, len(examples))))
    confidence, predicted = model(x).softmax(-1).max(-1)
    names = [examples.classes[i] for i in predicted]
    print(f'{model.pretrained_cfg["architecture"]} with the shipped weights, on {test.name}')
    print('  predicted      confidence  label')
    for name, share, label in zip(names, confidence, y):
        print(f'  {name:<13}  {100 * share:8.0f}%  {examples.classes[label]}')
    save_predictions(x, names, config, path)
    top1, _ = evaluate(model, make_loader(test, config, 250))
    print(f'  Accuracy {top1:.1f}% on {test.description}. Picture: {path}\n')
    return dict(shipped_accuracy=top1)


class _TrainingRun(NamedTuple):
    """Settings and images of a training run."""
    stage: Stage
    images: Images
    advice: str = _ADVICE

    def check(self) -> None:
        """Raise a ValueError if there are fewer images than one batch needs."""
        stage, images, advice = self
        if len(images) < stage.recipe.batch_size:
            raise ValueError(
                f'{stage.title} has {_count(len(images), "image")}, fewer than its batch size of '
                f'{stage.recipe.batch_size}. {advice}')


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}' if number == 1 else f'{number:,} {noun}s'


def _describe_images(images: Images) -> str:
    return f'{len(images)} images, SHA-256 {images.fingerprint()}'


class _Demo:
    """Data, models and training runs of the stages `train` and `pretrain`; the constructor does all checks."""

    def __init__(self, args: argparse.Namespace, output: Path, stages: Sequence[str]):
        self.run_config = {name: value for name, value in vars(args).items() if name not in _ARGS_NOT_RESTORED}
        if args.quick:
            args = argparse.Namespace(**{**vars(args), 'epochs': 1, 'pretrain_epochs': 1, 'finetune_epochs': 1})
        self.args = args
        self.output = output
        self.stages = stages
        self.device = torch.device(args.device)
        self.images, self.test_images = select_train_test(read_splits(args.data), args.seed)
        self.all_training_images = self.images
        self.config = training_data_config(None if args.data is None else args.model)
        self.run_config.update(
            {'classes': self.images.classes, 'training images': _describe_images(self.images),
             'test images': _describe_images(self.test_images)})
        if args.quick:
            self.images = self.images.sample_stratified(320, args.seed)
            self.test_images = self.test_images.sample_stratified(100, args.seed)
        most_labeled = max(1, len(self.images) // 2)
        labeled_images = self.images.sample_stratified(min(args.labeled, most_labeled), args.seed)
        labeled_advice = _ADVICE
        if args.labeled < min(most_labeled, args.batch_size):
            labeled_advice = f'Raise --labeled, which is {args.labeled}, or lower --batch-size.'

        def stage(name: str, title: str, epochs: int, cost: float = 1., **kwargs: Any) -> Stage:
            defaults = dict(
                lr=args.lr, batch_size=args.batch_size, weight_decay=args.weight_decay, seed=args.seed,
                hflip=0. if args.data is None else 0.5)  # no flips for Fashion-MNIST: all shoes point to the left
            return Stage(name, title, Recipe(epochs, **{**defaults, **kwargs}), cost)

        self.training_run = _TrainingRun(stage('supervised', 'Training', args.epochs), self.images)
        self.pretraining_runs = [
            _TrainingRun(stage(
                'pretraining', 'Pre-training', args.pretrain_epochs, lr=args.pretrain_lr,
                batch_size=2 * args.batch_size, beta2=0.95, cost=_PRETRAINING_COST), self.images),
            _TrainingRun(stage('finetuning', 'Fine-tuning', args.finetune_epochs), labeled_images, labeled_advice),
            _TrainingRun(stage('scratch', 'From scratch', args.finetune_epochs), labeled_images, labeled_advice),
        ]
        for run in (self.training_run, *self.pretraining_runs):
            run.check()
        model = self._create_model()
        if 'pretrain' in stages:
            # raises an error now, not after the first stage, if the model or the mask ratio does not fit the images
            with torch.no_grad():
                self._create_mae().eval()(torch.zeros(1, *self.config['input_size'], device=self.device))
        self.test_loader = make_loader(self.test_images, self.config, 250, self.device)
        self.description = (
            f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, '
            f'{_count(args.time_steps, "time step")}, on {self.device}\nTraining on {self.images.description}; '
            f'testing on {self.test_images.description}; {len(self.images.classes)} classes')

    def _create_model(self) -> nn.Module:
        C, H, W = self.config['input_size']
        random_seed(self.args.seed)
        model = timm.create_model(
            self.args.model, num_classes=len(self.images.classes), in_chans=C, img_size=(H, W),
            time_steps=self.args.time_steps)
        init_bn_bias(model)
        return model.to(device=self.device, memory_format=torch.channels_last)

    def _create_mae(self) -> SpikformerMAE:
        mae = SpikformerMAE(
            self._create_model(), mask_ratio=self.args.mask_ratio, decoder_embed_dim=64, decoder_depth=2,
            decoder_num_heads=2)
        return mae.to(device=self.device, memory_format=torch.channels_last)

    def _train(
            self,
            run: _TrainingRun,
            model: nn.Module,
            objective: Objective,
            progress: Progress,
    ) -> Tuple[nn.Module, float]:
        """Return the trained model and the training time in seconds."""
        stage, images = run.stage, run.images
        trained = train(
            model, objective, images, self.config, stage.recipe, self.output / stage.checkpoint, stage.title, KIND,
            self.run_config, self.args.resume, StageProgress(progress, stage, images))
        return trained.model, trained.seconds

    def run(self) -> Dict[str, Any]:
        """Run the stages; return their results."""
        print(self.description)
        parts = {'train': (self.train, [self.training_run]), 'pretrain': (self.pretrain, self.pretraining_runs)}
        chosen = [part for stage, part in parts.items() if stage in self.stages]
        results: Dict[str, Any] = {}
        with Progress(sum(run.stage.work(run.images) for _, runs in chosen for run in runs)) as progress:
            for function, _ in chosen:
                results.update(function(progress))
        return dict(results, model=self.args.model, time_steps=self.args.time_steps, seed=self.args.seed)

    def train(self, progress: Progress) -> Dict[str, Any]:
        """Train with all labels, and save the model."""
        model, seconds = self._train(self.training_run, self._create_model(), classify, progress)
        progress.title('Testing')
        top1, rates = evaluate(model, self.test_loader)
        linear = fit_linear(self.images, self.test_images, self.config, self.device)
        self._save(model)
        return dict(
            accuracy=top1, linear_accuracy=linear, tested_on=self.test_images.description,
            firing_rate=sum(rates.values()) / len(rates), firing_rates=rates, training_seconds=round(seconds, 1))

    def pretrain(self, progress: Progress) -> Dict[str, Any]:
        """Pre-train without labels, fine-tune with few labels, and compare with training from scratch."""
        pretraining, finetuning, scratch = self.pretraining_runs
        args = self.args
        mae, pretrain_seconds = self._train(pretraining, self._create_mae(), reconstruct, progress)
        mae_loss, mean_loss = reconstruction_loss(mae, self.test_loader, args.seed)
        save_reconstructions(mae, self.test_loader, self.config, self.output / _RECONSTRUCTIONS, args.seed)
        model = self._create_model()
        model.load_state_dict(mae.state_dict())  # loads the encoder; the classifier keeps its initialization
        tuned, tune_seconds = self._train(finetuning, model, classify, progress)
        from_scratch, scratch_seconds = self._train(scratch, self._create_model(), classify, progress)
        progress.title('Testing')
        return dict(
            reconstruction_loss=mae_loss, reconstruction_loss_of_mean=mean_loss, labeled=len(finetuning.images),
            finetuned_accuracy=evaluate(tuned, self.test_loader)[0],
            scratch_accuracy=evaluate(from_scratch, self.test_loader)[0],
            finetuned_seconds=round(pretrain_seconds + tune_seconds, 1), scratch_seconds=round(scratch_seconds, 1))

    def _save(self, model: nn.Module) -> None:
        """Save the model and its training arguments for `timm.create_model('local-dir:...')`, and verify the result."""
        model = model.eval().to(memory_format=torch.contiguous_format)  # required by safetensors
        args = self.args
        training = {name: getattr(args, name) for name in _TRAINING_ARGS}
        options = [f'--{name.replace("_", "-")}={value}' for name, value in training.items()]
        if args.data is not None:
            options = ['--data', 'DIR', *options]
        if args.quick:  # trains on a sample of the images
            options.append('--quick')
        command = ['timm-spikformer', 'demo', '--stages', 'train', *options]
        if self.test_images.split.startswith('held-out'):  # lets `publish` identify the held-out images
            training[DIGEST_ARG] = self.all_training_images.digest()
        with write_folder(self.output / _MODEL, KIND) as folder:
            save_for_hf(
                model, str(folder), model_config=dict(label_names=self.images.classes), safe_serialization=True,
                data_config=self.config)
            training_args = yaml.safe_dump({'command': shlex.join(command), **training}, sort_keys=False)
            (folder / TRAINING_FILE).write_text(training_args, encoding='utf-8')
            loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(self.device).eval()
            x = torch.randn(8, *self.config['input_size'], device=self.device)
            with torch.no_grad():
                if not torch.equal(loaded(x), model(x)):
                    raise RuntimeError(f'The model saved in {folder} returns different logits than the trained model.')


def _print_results(results: Dict[str, Any], args: argparse.Namespace, output: Path) -> None:
    lines: List[str] = []
    if 'accuracy' in results:
        rates, linear = results['firing_rates'], results['linear_accuracy']
        lowest, highest = min(rates, key=rates.get), max(rates, key=rates.get)
        lines += [
            '',
            f'With all labels, tested on: {results["tested_on"]}',
            f'  accuracy              {results["accuracy"]:.1f}%',
            '  linear classifier     ' + (
                'not fitted, because the dataset is large' if linear is None else
                f'{linear:.1f}%  (logistic regression on the same pixels)'),
            f'  firing rate           {results["firing_rate"]:.3f} on average: from {rates[lowest]:.3f} ({lowest}) to '
            f'{rates[highest]:.3f} ({highest})',
        ]
    if 'finetuned_accuracy' in results:
        lines += [
            '',
            f'With {results["labeled"]:,} labels',
            f'  pre-trained           {results["finetuned_accuracy"]:.1f}%  in {results["finetuned_seconds"]:.0f} s',
            f'  from scratch          {results["scratch_accuracy"]:.1f}%  in {results["scratch_seconds"]:.0f} s',
            f'  reconstruction loss   {results["reconstruction_loss"]:.3f}; predicting the mean of each patch: '
            f'{results["reconstruction_loss_of_mean"]:.3f}',
            f'  picture               {output / _RECONSTRUCTIONS}  (original, masked, reconstructed)',
        ]
    lines += ['', f'Time {results["seconds"]:.0f} s']
    if 'accuracy' in results:
        folder = str(output / _MODEL)
        load = f'import timm, timm_spikformer; timm.create_model({"local-dir:" + folder!r}, pretrained=True)'
        profile = ['timm-spikformer', 'profile', args.model, '--checkpoint', folder]
        commands = {
            'load it': ['python', '-c', load],
            'profile it': [*profile, *([] if args.data is None else ['--data', args.data])],
            'use your own images': ['timm-spikformer', 'demo', '--data', 'DIR'],
            'train a larger model': ['timm-spikformer', 'recipe', 'cifar10'],  # prints the recipe and its command
        }
        lines += ['', f'The classifier is saved in {folder}. What to do next:']
        lines += [f'  {title:<20}  {shlex.join(command)}' for title, command in commands.items()]
    print('\n'.join(lines))
