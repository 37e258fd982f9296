"""Training for the demo, with timm's optimiser, schedule and EMA: resumable, and the same at the same seed."""
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
from spikingjelly.activation_based.monitor import OutputMonitor
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from ..neurons import LIF
from .data import Data, check_batch, make_loader

# (model, images, labels) to the loss, and to the logits where there are any
Objective = Callable[[nn.Module, Tensor, Tensor], Tuple[Tensor, Optional[Tensor]]]


class Stage(NamedTuple):
    """One training: what it is called, and its settings."""
    name: str
    title: str
    epochs: int
    lr: float
    batch_size: int
    weight_decay: float = 0.05
    beta2: float = 0.999
    seed: int = 0


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    logits = model(x)
    return F.cross_entropy(logits.float(), y, label_smoothing=0.1), logits


def reconstruct(model: nn.Module, x: Tensor, y: Tensor) -> Tuple[Tensor, None]:
    return model(x).loss, None


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


def fit_linear(data: Data, device: torch.device) -> float:
    """Test accuracy, in percent, of logistic regression on the same pixels.

    Pixels are of 0 to 1 and the L2 penalty is 1, as by scikit-learn's default; fitted by L-BFGS.
    """
    mean, std = (torch.tensor(data.config[k], device=device).view(-1, 1, 1) for k in ('mean', 'std'))

    def pixels(is_training: bool) -> Tuple[Tensor, Tensor]:
        batches = [(x * std + mean, y) for x, y in make_loader(data, 500, device, is_training)]
        x, y = (torch.cat(parts) for parts in zip(*batches))
        if torch.equal(x, x[:, :1].expand_as(x)):  # grey, so one channel says it all
            x = x[:, :1]
        return x.flatten(1), y

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


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write beside, then rename: an interruption leaves the previous checkpoint whole."""
    partial = path.with_suffix('.partial')
    torch.save(state, partial)
    os.replace(partial, path)


def train(
        stage: Stage,
        model: nn.Module,
        objective: Objective,
        data: Data,
        output: Path,
        resume: bool = False,
) -> Tuple[nn.Module, float]:
    """Train with AdamW, cosine decay and EMA; a checkpoint after every epoch.

    Args:
        resume: Go on from the stage's checkpoint, where there is one; a finished stage is only loaded.

    Returns:
        The averaged model, its BN statistics recomputed, and the seconds that it took.
    """
    start = time.time()
    device = next(model.parameters()).device
    loader = make_loader(data, stage.batch_size, device, is_training=True, augment=True)
    if not len(loader):
        raise ValueError(f'There are {len(data.train)} training images, fewer than --batch-size {stage.batch_size}.')
    optimizer = create_optimizer_v2(
        model, 'adamw', lr=stage.lr, weight_decay=stage.weight_decay, betas=(0.9, stage.beta2))
    ema = ModelEmaV3(model, decay=0.99, use_warmup=True)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=stage.epochs, warmup_epochs=1, warmup_lr=stage.lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    checkpoint = output / f'{stage.name}.pth.tar'
    start_epoch, seconds_before = 0, 0.
    if resume and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state['state_dict'])
        ema.module.load_state_dict(state['state_dict_ema'])
        optimizer.load_state_dict(state['optimizer'])
        start_epoch, seconds_before = state['epoch'] + 1, state['seconds']

    num_images = len(loader) * stage.batch_size
    monitor = watch_firing(model)
    monitor.disable()
    bar = tqdm(
        total=stage.epochs * num_images,
        initial=start_epoch * num_images,
        unit='img',
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 20.,
    )
    firing_rate = float('nan')
    for epoch in range(start_epoch, stage.epochs):
        random_seed(stage.seed, rank=epoch)  # so that a resumed run goes on as an uninterrupted one would have
        losses, top1 = AverageMeter(), AverageMeter()
        model.train()
        bar.set_description(f'{stage.title} {epoch + 1}/{stage.epochs}')
        for i, (x, y) in enumerate(loader):
            check_batch(x)
            update = epoch * len(loader) + i
            scheduler.step_update(update)
            watch = i % 20 == 0
            if watch:
                monitor.clear_recorded_data()
                monitor.enable()
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
                loss, logits = objective(model, x.contiguous(memory_format=torch.channels_last), y)
            if watch:
                monitor.disable()
                firing_rate = sum(monitor.records) / len(monitor.records)
            if not loss.isfinite():
                raise ValueError(f'The loss is {loss.item()}. Try a lower --lr than {stage.lr}.')
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model, step=update)
            losses.update(loss.item(), len(x))
            if logits is not None:
                top1.update(accuracy(logits, y)[0].item(), len(x))
            acc = f'acc {top1.avg:.1f} %, ' if top1.count else ''
            bar.set_postfix_str(f'loss {losses.avg:.3f}, {acc}firing {firing_rate:.3f}', refresh=False)
            bar.update(len(x))
        save_checkpoint(
            checkpoint, epoch=epoch, seconds=seconds_before + time.time() - start, state_dict=model.state_dict(),
            state_dict_ema=ema.module.state_dict(), optimizer=optimizer.state_dict())
        acc = f'train accuracy {top1.avg:5.1f} %   ' if top1.count else ''
        tqdm.write(
            f'{stage.title} {epoch + 1:2d}/{stage.epochs}   loss {losses.avg:.3f}   {acc}firing rate {firing_rate:.3f}')
    bar.close()
    monitor.remove_hooks()
    # running statistics lag behind, by hundreds of updates where they are averaged, and neurons fall silent for it
    random_seed(stage.seed)
    update_bn(make_loader(data, stage.batch_size, device, is_training=True), ema.module, device)
    return ema.module, seconds_before + time.time() - start
