"""Train a small Spikformer V2 on real images in minutes, and show what it did: `timm-spikformer demo`.

Three things, on the images of Fashion-MNIST that the package ships or on a folder of one's own: training with all
labels; pre-training without labels, as a masked autoencoder; and, with a few labels only, fine-tuning of what has been
pre-trained beside training from scratch.
"""
import argparse
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any, Dict

import datasets
import timm
import torch
import yaml
from timm.models import save_for_hf
from timm.utils import random_seed
from torch import nn

from ..checkpoints import TRAINING_FILE
from ..masked_autoencoder import SpikformerMAE
from ..spikformer import check_model_name
from .data import Data, load_data, make_loader, take
from .picture import reconstruction_loss, save_picture
from .training import Stage, classify, evaluate, fit_linear, reconstruct, train

# what --resume leaves as it is given
_OF_THE_CALL = ('resume', 'output', 'device')
_OF_SUPERVISED_TRAINING = ('model', 'time_steps', 'epochs', 'batch_size', 'lr', 'weight_decay', 'seed')


def save(model: nn.Module, data: Data, folder: Path, args: argparse.Namespace) -> None:
    """Save for `timm.create_model('local-dir:...')`, with a note of how it was trained; load it back and compare."""
    partial = folder.with_name(folder.name + '.partial')
    model = model.eval().to(memory_format=torch.contiguous_format)  # safetensors takes no other
    save_for_hf(
        model, str(partial), model_config=dict(label_names=data.classes), safe_serialization=True,
        data_config=data.config)
    training = {name: getattr(args, name) for name in _OF_SUPERVISED_TRAINING}
    options = ' '.join(f'--{name.replace("_", "-")} {value}' for name, value in training.items())
    command = f'timm-spikformer demo {"--data DIR " if args.data else ""}{options}'
    (partial / TRAINING_FILE).write_text(yaml.safe_dump({'command': command, **training}, sort_keys=False))
    folder.mkdir(exist_ok=True)
    for path in partial.iterdir():
        os.replace(path, folder / path.name)
    partial.rmdir()

    device = next(model.parameters()).device
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device).eval()
    x = torch.randn(8, *data.config['input_size'], device=device)
    with torch.no_grad():
        if not torch.equal(loaded(x), model(x)):
            raise RuntimeError(f'The model saved in {folder} gives other logits than the trained one.')


def check_arguments(args: argparse.Namespace) -> None:
    check_model_name(args.model)
    for name in ('epochs', 'pretrain_epochs', 'finetune_epochs', 'batch_size', 'labelled'):
        if getattr(args, name) < 1:
            raise ValueError(f'--{name.replace("_", "-")} must be at least 1, got {getattr(args, name)}.')
    if not 0. < args.mask_ratio < 1.:
        raise ValueError(f'--mask-ratio must be greater than 0 and less than 1, got {args.mask_ratio}.')
    try:
        torch.device(args.device)
    except RuntimeError as e:
        raise ValueError(f'--device: {e}') from e


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Train, evaluate, save; the results are returned, and written to `results.json` in the output folder."""
    output = Path(args.output)
    settings = output / 'args.json'
    if args.resume:
        if not settings.is_file():
            raise ValueError(f'There is no {settings} to resume from. Start without --resume.')
        vars(args).update({k: v for k, v in json.loads(settings.read_text()).items() if k not in _OF_THE_CALL})
        print(f'Going on in {output}, with the arguments of that run.')
    check_arguments(args)
    output.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for checkpoint in output.glob('*.pth.tar'):  # another run's, which a later --resume would take for this one's
            checkpoint.unlink()
        settings.write_text(json.dumps(vars(args), indent=2) + '\n')

    start = time.time()
    datasets.disable_progress_bars()  # one bar is enough
    device = torch.device(args.device)
    data = load_data(args.data and Path(args.data), args.model, args.seed)
    if args.quick:
        data = data._replace(train=take(data.train, 320, args.seed), test=take(data.test, 100, args.seed))
        args.epochs = args.pretrain_epochs = args.finetune_epochs = 1
    few = data._replace(train=take(data.train, min(args.labelled, len(data.train) // 2), args.seed))
    C, H, W = data.config['input_size']

    def create_model() -> nn.Module:
        random_seed(args.seed)
        model = timm.create_model(
            args.model, num_classes=len(data.classes), in_chans=C, img_size=(H, W), time_steps=args.time_steps)
        return model.to(device=device, memory_format=torch.channels_last)

    def stage(name: str, title: str, epochs: int, **kwargs) -> Stage:
        defaults = dict(lr=args.lr, batch_size=args.batch_size, weight_decay=args.weight_decay, seed=args.seed)
        return Stage(name, title, epochs, **{**defaults, **kwargs})

    model = create_model()
    print(
        f'{args.data or "Fashion-MNIST"}: {len(data.train):,} training and {len(data.test):,} test images of '
        f'{len(data.classes)} classes, {H}x{W}')
    print(
        f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {args.time_steps} time step(s), '
        f'on {device}')
    test = make_loader(data, 250, device, is_training=False)

    print(f'\nWith the labels of all {len(data.train):,} images')
    model, _ = train(stage('supervised', 'epoch', args.epochs), model, classify, data, output, args.resume)
    top1, rates = evaluate(model, test)
    linear = fit_linear(data, device)
    save(model, data, output / 'model', args)

    print('\nWithout labels: pre-training as a masked autoencoder')
    mae = SpikformerMAE(
        create_model(), mask_ratio=args.mask_ratio, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)
    mae = mae.to(device=device, memory_format=torch.channels_last)
    pretraining = stage(
        'pretraining', 'pre-training', args.pretrain_epochs, lr=args.pretrain_lr, batch_size=2 * args.batch_size,
        beta2=0.95)
    mae, pretrain_seconds = train(pretraining, mae, reconstruct, data, output, args.resume)
    mae_loss, mean_loss = reconstruction_loss(mae, test, args.seed)
    save_picture(mae, test, data, output / 'reconstruction.png', args.seed)

    print(f'\nWith the labels of {len(few.train):,} images')
    model = create_model()
    model.load_state_dict(mae.state_dict())  # the encoder; the classifier stays as it is
    tuned, tune_seconds = train(
        stage('finetuning', 'fine-tuning', args.finetune_epochs), model, classify, few, output, args.resume)
    # as many images in all as pre-training and fine-tuning have seen together, and so about the same time
    scratch_epochs = args.finetune_epochs + round(args.pretrain_epochs * len(data.train) / len(few.train))
    scratch, scratch_seconds = train(
        stage('scratch', 'from scratch', scratch_epochs), create_model(), classify, few, output, args.resume)
    tuned_top1, scratch_top1 = (evaluate(m, test)[0] for m in (tuned, scratch))

    results = dict(
        accuracy=top1, linear_accuracy=linear, firing_rate=sum(rates.values()) / len(rates), firing_rates=rates,
        reconstruction_loss=mae_loss, reconstruction_loss_of_mean=mean_loss, labelled=len(few.train),
        finetuned_accuracy=tuned_top1, scratch_accuracy=scratch_top1,
        finetuned_seconds=round(pretrain_seconds + tune_seconds, 1), scratch_seconds=round(scratch_seconds, 1),
        seconds=round(time.time() - start, 1), model=args.model, time_steps=args.time_steps, seed=args.seed)
    (output / 'results.json').write_text(json.dumps(results, indent=2) + '\n')

    lowest, highest = min(rates, key=rates.get), max(rates, key=rates.get)
    folder = shlex.quote(str(output / 'model'))
    print(f"""
With all {len(data.train):,} labels
  test accuracy         {top1:.1f} %
  linear classifier     {linear:.1f} %  (logistic regression on the same pixels)
  firing rate           {results['firing_rate']:.3f} on average: from {rates[lowest]:.3f} ({lowest}) to \
{rates[highest]:.3f} ({highest})
With {len(few.train):,} labels
  pre-trained on all images, without labels   {tuned_top1:.1f} %  in {pretrain_seconds + tune_seconds:.0f} s
  from scratch                                {scratch_top1:.1f} %  in {scratch_seconds:.0f} s
Reconstruction of masked patches
  loss                  {mae_loss:.3f}, where the mean of each patch has {mean_loss:.3f}
  picture               {output / 'reconstruction.png'}  (original, masked, reconstructed)
Time                    {results['seconds']:.0f} s

The classifier is saved in {folder}. What to do next:
  load it         python -c "import timm, timm_spikformer; timm.create_model('local-dir:{folder}', pretrained=True)"
  look inside     timm-spikformer profile {args.model} --checkpoint {folder}
  your own images timm-spikformer demo --data DIR       (DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, or parquet)
  train for real  python -m timm_spikformer train.py -c recipes/cifar10.yaml   (timm's own script, with a GPU)""")
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--data', metavar='DIR', help='image folder or parquet files (default: the shipped slice of Fashion-MNIST)')
    add('--output', metavar='DIR', default='output/demo', help='where checkpoints and models go (default: %(default)s)')
    add('--resume', action='store_true', help='go on from the last checkpoint in the output folder')
    add('--quick', action='store_true', help='one epoch of few images of each: only to see that all runs')
    add('--model', default='spikformer_v2_2_64_patch4_32', help='(default: %(default)s)')
    add('--time-steps', type=int, default=1, metavar='T', help='(default: %(default)s)')
    add('--epochs', type=int, default=10, metavar='N', help='with all labels (default: %(default)s)')
    add('--pretrain-epochs', type=int, default=5, metavar='N', help='(default: %(default)s)')
    add('--finetune-epochs', type=int, default=40, metavar='N', help='(default: %(default)s)')
    add('--labelled', type=int, default=600, metavar='N', help='images with a label then (default: %(default)s)')
    add('--mask-ratio', type=float, default=0.75, help='share of the patches to mask (default: %(default)s)')
    add('--batch-size', type=int, default=32, metavar='N', help='(default: %(default)s)')
    add('--lr', type=float, default=1e-2, help='peak learning rate (default: %(default)s)')
    add('--pretrain-lr', type=float, default=4e-3, help='the same for pre-training (default: %(default)s)')
    add('--weight-decay', type=float, default=0.05, help='(default: %(default)s)')
    add('--seed', type=int, default=0, help='(default: %(default)s)')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='(default: %(default)s)')
