"""Training for the demo with timm's optimizer, scheduler and EMA; resumable, and deterministic for a given seed."""
import io
import math
import pickle
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from ..folders import write_file
from ..images import Images, make_loader, to_pixels
from ..monitor import FiringRateMonitor
from .command import KIND

# Function of (model, images, labels) that returns the loss and the logits, or None without logits
Objective = Callable[[nn.Module, Tensor, Tensor], Tuple[Tensor, Optional[Tensor]]]


class Stage(NamedTuple):
    """Settings of one training run.

    Args:
        name: Name of the run and of its checkpoint file.
        title: Title for messages.
        epochs: Number of epochs.
        lr: Peak learning rate.
        batch_size: Number of images per batch.
        weight_decay: Weight decay of AdamW.
        beta2: Second beta of AdamW.
        seed: Random seed.
        cost: Time per image, relative to supervised training.
        hflip: Probability of a horizontal flip.
    """
    name: str
    title: str
    epochs: int
    lr: float
    batch_size: int
    weight_decay: float = 0.05
    beta2: float = 0.999
    seed: int = 0
    cost: float = 1.
    hflip: float = 0.5

    @property
    def checkpoint(self) -> str:
        """File name of the checkpoint."""
        return f'{self.name}.pth.tar'

    def work(self, images: Images) -> float:
        """Duration of the run, in units of the time per image of supervised training."""
        return self.epochs * (len(images) // self.batch_size) * self.batch_size * self.cost


class Progress:
    """One progress bar for several training runs. If the output is not a terminal, only lines are printed."""

    def __init__(self, total: float):
        """
        Args:
            total: Sum of `Stage.work` over all runs.
        """
        self.bar = tqdm(
            total=total,
            bar_format='{desc} |{bar}| {percentage:.0f} %, {elapsed} so far, {remaining} left{postfix}',
            dynamic_ncols=True,
            smoothing=0,
            mininterval=0.2,
            disable=None,  # disables the bar if the output is not a terminal
        )

    def skip(self, work: float) -> None:
        """Count work that was done before the run was resumed."""
        if not self.bar.disable:
            self.bar.initial += work
            self.bar.n += work

    def update(self, work: float, postfix: str = '') -> None:
        self.bar.set_postfix_str(postfix, refresh=False)
        self.bar.update(min(work, self.bar.total - self.bar.n))  # rounding errors must not exceed the total

    def title(self, text: str) -> None:
        self.bar.set_description_str(text)

    def write(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text)
        sys.stdout.flush()

    def __enter__(self) -> 'Progress':
        return self

    def __exit__(self, *args: Any) -> None:
        self.bar.close()


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    logits = model(x)
    return F.cross_entropy(logits.float(), y, label_smoothing=0.1), logits


def reconstruct(model: nn.Module, x: Tensor, y: Tensor) -> Tuple[Tensor, None]:
    return model(x).loss, None


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any) -> Tuple[float, Dict[str, float]]:
    """Return the accuracy in percent, and the firing rate (spikes per neuron and time step) of every neuron layer."""
    model.eval()
    top1 = AverageMeter()
    with FiringRateMonitor(model) as monitor:
        for x, y in loader:
            top1.update(accuracy(model(x), y)[0].item(), len(x))
    return top1.avg, monitor.rates


def fit_linear(train: Images, test: Images, config: Dict[str, Any], device: torch.device) -> Optional[float]:
    """Return the test accuracy, in percent, of logistic regression on the same pixels, fitted by L-BFGS.

    Pixels are scaled to 0 to 1, and the regularization is scikit-learn's default (L2, C = 1). Returns None for large
    datasets, for which fitting would take longer than training.
    """
    features = math.prod(config['input_size'])
    if features * len(train.classes) > 50_000 or features * len(train) > 100_000_000:
        return None

    def pixels(images: Images) -> Tuple[Tensor, Tensor]:
        batches = [(to_pixels(x, config), y) for x, y in make_loader(images, config, 500, device)]
        x, y = (torch.cat(parts) for parts in zip(*batches))
        if torch.equal(x, x[:, :1].expand_as(x)):  # grayscale: keep one channel
            x = x[:, :1]
        return x.flatten(1), y

    x, y = pixels(train)
    classifier = nn.Linear(x.shape[1], len(train.classes), device=device)
    nn.init.zeros_(classifier.weight)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=200, line_search_fn='strong_wolfe')

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(x), y) + classifier.weight.square().sum() / (2 * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
    x, y = pixels(test)
    with torch.no_grad():
        return accuracy(classifier(x), y)[0].item()


def check_batches(stage: Stage, images: Images) -> None:
    """Raise a ValueError if there are fewer images than one batch needs."""
    if len(images) < stage.batch_size:
        raise ValueError(
            f'{stage.title} has {len(images)} images, fewer than its batch size of {stage.batch_size}. '
            f'Lower --batch-size.')


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write or replace a checkpoint atomically: after an interruption, the previous file is intact."""
    buffer = io.BytesIO()  # on a full disk, torch.save would raise an error that does not name the cause
    torch.save(state, buffer)
    with write_file(path, KIND) as partial:
        partial.write_bytes(buffer.getbuffer())


def load_checkpoint(
        path: Path,
        device: torch.device,
        modules: Dict[str, Any],
        epochs: int,
        trained_with: Dict[str, Any],
) -> Tuple[int, float]:
    """Load the states of `modules` from a checkpoint; return the number of epochs done and their time in seconds.

    Raises:
        ValueError: The file is damaged or belongs to another run: it has more than `epochs` epochs, or its arguments
            or data differ from `trained_with`.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        epoch, seconds, before = state['epoch'], state['seconds'], dict(state['trained_with'])
        for name in sorted({*before, *trained_with}):
            if before.get(name) != trained_with.get(name):
                raise ValueError(
                    f'it was trained with {name} = {before.get(name)}, and now it is {trained_with.get(name)}.')
        if type(epoch) is not int or not 0 <= epoch < epochs:
            raise ValueError(f'it was saved after epoch {epoch}, expected 0 to {epochs - 1}.')
        if type(seconds) is not float or not 0. <= seconds < math.inf:
            raise ValueError(f'it says that training took {seconds} seconds.')
        for key, module in modules.items():
            module.load_state_dict(state[key])
        return epoch + 1, seconds
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(
            f'{path} is damaged or is not a checkpoint of this run: {str(e).splitlines()[0] if str(e) else e!r} '
            f'Remove it, or start without --resume.') from e


def train(
        stage: Stage,
        model: nn.Module,
        objective: Objective,
        images: Images,
        config: Dict[str, Any],
        output: Path,
        progress: Progress,
        trained_with: Dict[str, Any],
        resume: bool = False,
) -> Tuple[nn.Module, float]:
    """Train with AdamW, cosine decay and EMA, and write a checkpoint after every epoch.

    Args:
        stage: Settings.
        model: Model to train.
        objective: Function that returns the loss and the logits.
        images: Training images with labels.
        config: timm's data config.
        output: Folder for the checkpoint.
        progress: Progress bar to update.
        trained_with: Arguments and data of the run by display name; stored in the checkpoint and compared on resuming.
        resume: Continue from the checkpoint of the stage if there is one; a finished stage is loaded without training.

    Returns:
        The EMA model with recomputed BN statistics, and the training time in seconds.
    """
    start = time.time()
    device = next(model.parameters()).device
    loader = make_loader(images, config, stage.batch_size, device, augment=True, hflip=stage.hflip)
    optimizer = create_optimizer_v2(
        model, 'adamw', lr=stage.lr, weight_decay=stage.weight_decay, betas=(0.9, stage.beta2))
    ema = ModelEmaV3(model, decay=0.99, use_warmup=True)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=stage.epochs, warmup_epochs=0.5, warmup_lr=stage.lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    checkpoint = output / stage.checkpoint
    start_epoch, seconds_before = 0, 0.
    if resume and checkpoint.is_file():
        start_epoch, seconds_before = load_checkpoint(
            checkpoint, device, dict(state_dict=model, state_dict_ema=ema.module, optimizer=optimizer), stage.epochs,
            trained_with)
        progress.skip(start_epoch * len(loader) * stage.batch_size * stage.cost)

    with FiringRateMonitor(model) as monitor:
        monitor.enabled = False
        for epoch in range(start_epoch, stage.epochs):
            random_seed(stage.seed, rank=epoch)  # makes a resumed run equal to an uninterrupted one
            losses, top1 = AverageMeter(), AverageMeter()
            model.train()
            progress.title(f'{stage.title}, epoch {epoch + 1}/{stage.epochs}')
            for i, (x, y) in enumerate(loader):
                update = epoch * len(loader) + i
                scheduler.step_update(update)
                if i % 20 == 0:
                    monitor.reset()
                    monitor.enabled = True
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
                    loss, logits = objective(model, x.contiguous(memory_format=torch.channels_last), y)
                monitor.enabled = False
                if not loss.isfinite():
                    raise ValueError(
                        f'{stage.title}: the loss is {loss.item()}. Try a lower learning rate than {stage.lr}, or a '
                        f'lower --weight-decay than {stage.weight_decay}.')
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                ema.update(model, step=update)
                losses.update(loss.item(), len(x))
                if logits is not None:
                    top1.update(accuracy(logits, y)[0].item(), len(x))
                progress.update(len(x) * stage.cost, f'loss {losses.avg:.3f}')
            save_checkpoint(
                checkpoint, epoch=epoch, seconds=seconds_before + time.time() - start, trained_with=trained_with,
                state_dict=model.state_dict(), state_dict_ema=ema.module.state_dict(),
                optimizer=optimizer.state_dict())
            correct = f'training accuracy {top1.avg:5.1f} %   ' if top1.count else ''
            progress.write(
                f'{stage.title}, epoch {epoch + 1}/{stage.epochs}   loss {losses.avg:.3f}   {correct}'
                f'firing rate {monitor.mean:.3f}')
    # with the averaged running statistics, which lag behind the weights, many neurons would not fire
    random_seed(stage.seed)
    update_bn(make_loader(images, config, stage.batch_size, device), ema.module, device)
    return ema.module, seconds_before + time.time() - start
