"""Train a small Spikformer V2 on real images in minutes, and show what it did: `timm-spikformer demo`.

Everything but the model is timm's: data pipeline, optimiser, schedule, EMA, and the folder that is saved. The default
data is the slice of Fashion-MNIST that the package ships.
"""
import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import datasets
import timm
import torch
from spikingjelly.activation_based.monitor import OutputMonitor
from timm.data import ImageDataset, create_dataset, create_loader
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from .neurons import LIF

FASHION_MNIST = Path(__file__).parent / 'data' / 'fashion_mnist'
CHECKPOINT = 'last.pth.tar'
_TEST_SPLITS = ('test', 'validation')
_HELD_OUT = 0.1  # share of the training images that is tested on where a dataset has no test split


class Data(NamedTuple):
    """Training and test images, the names of their classes, and how they are presented to the model."""
    train: ImageDataset
    test: ImageDataset
    classes: List[str]
    config: Dict[str, Any]  # timm's data config: input_size, mean, std, interpolation, crop_pct


def load_data(folder: Optional[Path], model: str, seed: int = 0) -> Data:
    """Read a folder of images or parquet files, by default the shipped Fashion-MNIST.

    Args:
        folder: `DIR/{train,test}/CLASS/*.png`, `DIR/CLASS/*.png`, or parquet files with columns `image` and `label`.
            Where there is no test split, a tenth of the images of each class is held out.
        model: Name of the model whose input size, mean and standard deviation to take for a folder of one's own.
        seed: Chooses the images that are held out.

    Raises:
        ValueError: The folder does not exist, holds no images, no labels or less than two classes.
    """
    if folder is None:
        folder = FASHION_MNIST
        config = dict(input_size=(1, 28, 28), mean=(0.286,), std=(0.353,), interpolation='bicubic', crop_pct=1.0)
    else:
        cfg = timm.get_pretrained_cfg(model)
        config = dict(
            input_size=cfg.input_size, mean=cfg.mean, std=cfg.std, interpolation='bicubic', crop_pct=1.0)
    expected = 'Expected DIR/{train,test}/CLASS/*.png, or parquet files with columns image and label.'
    if not folder.is_dir():
        raise ValueError(f'{folder} is not a folder. {expected}')
    try:
        splits = datasets.get_dataset_split_names(str(folder))
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as e:
        raise ValueError(f'{folder} holds no images. {expected}') from e
    test_split = next((s for s in _TEST_SPLITS if s in splits), None)
    if 'train' not in splits:
        raise ValueError(f'{folder} has no training split, only {", ".join(splits)}. {expected}')

    dataset = datasets.load_dataset(str(folder), split='train')
    columns = dataset.features
    if not isinstance(columns.get('image'), datasets.Image):
        raise ValueError(f'{folder} has the columns {", ".join(columns) or "none"}. {expected}')
    # datasets gives no labels where all images lie in one folder
    labels = set(dataset['label']) if 'label' in columns else set()
    if len(labels) < 2:
        raise ValueError(f'{folder} has images of one class only, or no labels; 2 or more are needed. {expected}')
    has_names = isinstance(columns['label'], datasets.ClassLabel)
    if not has_names and not all(isinstance(label, int) for label in labels):
        raise ValueError(f'{folder} has labels such as {min(labels)!r}, expected integers or a ClassLabel. {expected}')
    classes = columns['label'].names if has_names else [str(i) for i in range(max(labels) + 1)]
    img_mode = 'L' if config['input_size'][0] == 1 else 'RGB'

    def read(split: str) -> ImageDataset:
        return create_dataset(f'hfds/{folder}', root=None, split=split, input_img_mode=img_mode)

    train = read('train')
    if test_split:
        test = read(test_split)
    else:
        test = read('train')
        stratify_by = 'label' if has_names else None
        parts = train.reader.dataset.train_test_split(_HELD_OUT, seed=seed, stratify_by_column=stratify_by)
        train.reader.dataset, test.reader.dataset = parts['train'], parts['test']
    return Data(train, test, classes, config)


def make_loader(data: Data, batch_size: int, device: torch.device, is_training: bool, augment: bool = False):
    return create_loader(
        data.train if is_training else data.test,
        batch_size=batch_size,
        is_training=augment,
        hflip=0.5,
        scale=(1., 1.),
        ratio=(1., 1.),
        color_jitter=0.,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=device.type == 'cuda',
        device=device,
        **data.config,
    )


def check_batch(x: Tensor) -> None:
    if not torch.isfinite(x).all():
        raise ValueError('An image holds values that are not finite (NaN or infinity), expected pixels of 0 to 255.')


def fit_linear(data: Data, device: torch.device) -> float:
    """Test accuracy, in percent, of logistic regression on the same pixels.

    Pixels are of 0 to 1 and the L2 penalty is 1, as by scikit-learn's default; fitted by L-BFGS.
    """
    mean, std = (torch.tensor(data.config[k], device=device).view(-1, 1, 1) for k in ('mean', 'std'))

    def pixels(is_training: bool) -> Tuple[Tensor, Tensor]:
        batches = [((x * std + mean).flatten(1), y) for x, y in make_loader(data, 500, device, is_training)]
        return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    x, y = pixels(is_training=True)
    classifier = nn.Linear(x.shape[1], len(data.classes), device=device)
    nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(x), y) + classifier.weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    x, y = pixels(is_training=False)
    with torch.no_grad():
        return accuracy(classifier(x), y)[0].item()


def watch_firing(model: nn.Module) -> OutputMonitor:
    """Record the firing rate, spikes per neuron and time step, of every neuron layer at every forward."""
    return OutputMonitor(model, LIF, lambda spikes: spikes.float().mean().item())


@torch.no_grad()
def evaluate(model: nn.Module, loader) -> Tuple[float, Dict[str, float]]:
    """Test accuracy in percent, and the firing rate (spikes per neuron and time step) of every neuron layer."""
    model.eval()
    monitor = watch_firing(model)
    top1, rates = AverageMeter(), {name: AverageMeter() for name in monitor.monitored_layers}
    for x, y in loader:
        check_batch(x)
        monitor.clear_recorded_data()
        top1.update(accuracy(model(x), y)[0].item(), len(x))
        for name, meter in rates.items():
            meter.update(monitor[name][0], len(x))
    monitor.remove_hooks()
    return top1.avg, {name: meter.avg for name, meter in rates.items()}


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write beside, then rename: an interruption leaves the previous checkpoint whole."""
    partial = path.with_suffix('.partial')
    torch.save(state, partial)
    os.replace(partial, path)


def train(args: argparse.Namespace, model: nn.Module, data: Data, resume: Optional[Dict[str, Any]]) -> nn.Module:
    """Train with AdamW, cosine decay and EMA; a checkpoint after every epoch. Returns the averaged model."""
    device = next(model.parameters()).device
    loader = make_loader(data, args.batch_size, device, is_training=True, augment=True)
    if not len(loader):
        raise ValueError(
            f'There are {len(data.train)} training images, fewer than --batch-size {args.batch_size}.')
    optimizer = create_optimizer_v2(model, 'adamw', lr=args.lr, weight_decay=args.weight_decay)
    ema = ModelEmaV3(model, decay=0.99, use_warmup=True)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=args.epochs, warmup_epochs=1, warmup_lr=args.lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    start_epoch = 0
    if resume is not None:
        model.load_state_dict(resume['state_dict'])
        ema.module.load_state_dict(resume['state_dict_ema'])
        optimizer.load_state_dict(resume['optimizer'])
        start_epoch = resume['epoch'] + 1

    num_images = len(loader) * args.batch_size
    monitor = watch_firing(model)
    monitor.disable()
    bar = tqdm(
        total=args.epochs * num_images,
        initial=start_epoch * num_images,
        unit='img',
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 20.,
    )
    firing_rate = float('nan')
    for epoch in range(start_epoch, args.epochs):
        random_seed(args.seed, rank=epoch)  # so that a resumed run goes on as an uninterrupted one would have
        losses, top1 = AverageMeter(), AverageMeter()
        model.train()
        bar.set_description(f'epoch {epoch + 1}/{args.epochs}')
        for i, (x, y) in enumerate(loader):
            check_batch(x)
            update = epoch * len(loader) + i
            scheduler.step_update(update)
            watch = i % 20 == 0
            if watch:
                monitor.clear_recorded_data()
                monitor.enable()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
                logits = model(x.contiguous(memory_format=torch.channels_last))
            if watch:
                monitor.disable()
                firing_rate = sum(monitor.records) / len(monitor.records)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=0.1)
            if not loss.isfinite():
                raise ValueError(f'The loss is {loss.item()}. Try a lower --lr than {args.lr}.')
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model, step=update)
            losses.update(loss.item(), len(x))
            top1.update(accuracy(logits, y)[0].item(), len(x))
            bar.set_postfix_str(f'loss {losses.avg:.3f}, acc {top1.avg:.1f} %, firing {firing_rate:.3f}', refresh=False)
            bar.update(len(x))
        save_checkpoint(
            args.output / CHECKPOINT, epoch=epoch, args=vars(args) | {'output': str(args.output)}, arch=args.model,
            state_dict=model.state_dict(), state_dict_ema=ema.module.state_dict(), optimizer=optimizer.state_dict())
        tqdm.write(
            f'epoch {epoch + 1:2d}/{args.epochs}   loss {losses.avg:.3f}   train accuracy {top1.avg:.1f} %   '
            f'firing rate {firing_rate:.3f}')
    bar.close()
    monitor.remove_hooks()
    # running statistics lag behind, by hundreds of updates where they are averaged, and neurons fall silent for it
    update_bn(make_loader(data, args.batch_size, device, is_training=True), ema.module, device)
    return ema.module


def save(model: nn.Module, data: Data, folder: Path) -> None:
    """Save for `timm.create_model('local-dir:...')`, load it back and compare."""
    partial = folder.with_name(folder.name + '.partial')
    model = model.eval().to(memory_format=torch.contiguous_format)  # safetensors takes no other
    save_for_hf(
        model, str(partial), model_config=dict(label_names=data.classes), safe_serialization=True,
        data_config=data.config)
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


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Train, evaluate, save; the results are returned, and written to `results.json` in the output folder."""
    models = timm.list_models(module='spikformer')
    if args.model not in models:
        raise ValueError(f'There is no Spikformer {args.model!r}, expected one of {", ".join(models)}.')
    if args.epochs < 1:
        raise ValueError(f'--epochs must be at least 1, got {args.epochs}.')
    args.output = Path(args.output)
    checkpoint = args.output / CHECKPOINT
    resume = None
    if args.resume:
        if not checkpoint.is_file():
            raise ValueError(f'There is no {checkpoint} to resume from. Start without --resume.')
        resume = torch.load(checkpoint, map_location='cpu', weights_only=True)
        resumed_args = {k: v for k, v in resume['args'].items() if k not in ('output', 'resume', 'device')}
        vars(args).update(resumed_args)
        print(f'Going on after epoch {resume["epoch"] + 1} in {checkpoint}, with the arguments of that run.')
    args.output.mkdir(parents=True, exist_ok=True)

    start = time.time()
    datasets.disable_progress_bars()  # one bar is enough
    try:
        device = torch.device(args.device)
    except RuntimeError as e:
        raise ValueError(f'--device: {e}') from e
    data = load_data(args.data and Path(args.data), args.model, args.seed)
    random_seed(args.seed)
    C, H, W = data.config['input_size']
    model = timm.create_model(
        args.model, num_classes=len(data.classes), in_chans=C, img_size=(H, W), time_steps=args.time_steps)
    model = model.to(device=device, memory_format=torch.channels_last)
    print(
        f'{args.data or "Fashion-MNIST"}: {len(data.train):,} training and {len(data.test):,} test images of '
        f'{len(data.classes)} classes, {H}x{W}')
    print(
        f'{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {args.time_steps} time step(s), '
        f'on {device}')

    model = train(args, model, data, resume)
    top1, rates = evaluate(model, make_loader(data, 250, device, is_training=False))
    linear = fit_linear(data, device)
    save(model, data, args.output / 'model')
    results = dict(
        accuracy=top1, linear_accuracy=linear, firing_rate=sum(rates.values()) / len(rates), firing_rates=rates,
        seconds=round(time.time() - start, 1), model=args.model, time_steps=args.time_steps, epochs=args.epochs,
        seed=args.seed)
    (args.output / 'results.json').write_text(json.dumps(results, indent=2) + '\n')

    lowest, highest = min(rates, key=rates.get), max(rates, key=rates.get)
    folder = shlex.quote(str(args.output / 'model'))
    print(f"""
Test accuracy       {top1:.1f} %
Linear classifier   {linear:.1f} %  (logistic regression on the same pixels)
Firing rate         {results['firing_rate']:.3f} on average: from {rates[lowest]:.3f} ({lowest}) to \
{rates[highest]:.3f} ({highest})
Time                {results['seconds']:.0f} s

Saved in {folder}. What to do next:
  load it         python -c "import timm, timm_spikformer; timm.create_model('local-dir:{folder}', pretrained=True)"
  your own images timm-spikformer demo --data DIR       (DIR/train/CLASS/*.png and DIR/test/CLASS/*.png, or parquet)
  train for real  python -m timm_spikformer train.py -c recipes/cifar10.yaml   (timm's own script, with a GPU)""")
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--data', metavar='DIR', help='image folder or parquet files (default: the shipped slice of Fashion-MNIST)')
    add('--output', metavar='DIR', default='output/demo', help='where checkpoint and model go (default: %(default)s)')
    add('--resume', action='store_true', help='go on from the last checkpoint in the output folder')
    add('--model', default='spikformer_v2_2_64_patch4_32', help='(default: %(default)s)')
    add('--time-steps', type=int, default=1, metavar='T', help='(default: %(default)s)')
    add('--epochs', type=int, default=10, metavar='N', help='(default: %(default)s)')
    add('--batch-size', type=int, default=32, metavar='N', help='(default: %(default)s)')
    add('--lr', type=float, default=1e-2, help='peak learning rate (default: %(default)s)')
    add('--weight-decay', type=float, default=0.05, help='(default: %(default)s)')
    add('--seed', type=int, default=0, help='(default: %(default)s)')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='(default: %(default)s)')
