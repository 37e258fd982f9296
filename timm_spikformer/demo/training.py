"""Training for the demo, with timm's optimizer, schedule and EMA: resumable, and deterministic for a seed."""
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

# (model, images, labels) to the loss, and to the logits if there are any
Objective = Callable[[nn.Module, Tensor, Tensor], Tuple[Tensor, Optional[Tensor]]]


class Stage(NamedTuple):
    """One training run: its name, a title for people, and its settings.

    Args:
        cost: Time that an image takes, in units of the time that it takes in supervised training.
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
        """Name of the file of its checkpoint."""
        return f'{self.name}.pth.tar'

    def work(self, images: Images) -> float:
        """Time that it takes, in units of the time of an image in supervised training."""
        return self.epochs * (len(images) // self.batch_size) * self.batch_size * self.cost


class Progress:
    """One progress bar over several training runs, with the time left for all of them; lines only if not a terminal."""

    def __init__(self, total: float):
        """
        Args:
            total: Sum of the `work` of the stages.
        """
        self.bar = tqdm(
            total=total,
            bar_format='{desc} |{bar}| {percentage:.0f} %, {elapsed} so far, {remaining} left{postfix}',
            dynamic_ncols=True,
            smoothing=0,
            mininterval=0.2,
            disable=None,  # where the output is not a terminal
        )

    def skip(self, work: float) -> None:
        """Count work that an earlier run has done."""
        if not self.bar.disable:
            self.bar.initial += work
            self.bar.n += work

    def update(self, work: float, postfix: str = '') -> None:
        self.bar.set_postfix_str(postfix, refresh=False)
        self.bar.update(min(work, self.bar.total - self.bar.n))  # rounding could make it a little more

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
    """Return the test accuracy, in percent, of logistic regression on the same pixels.

    Pixels are in 0 to 1 and the L2 penalty is 1, as by scikit-learn's default; fitted by L-BFGS. None for data so large
    that this would take longer than training.
    """
    features = math.prod(config['input_size'])
    if features * len(train.classes) > 50_000 or features * len(train) > 100_000_000:
        return None

    def pixels(images: Images) -> Tuple[Tensor, Tensor]:
        batches = [(to_pixels(x, config), y) for x, y in make_loader(images, config, 500, device)]
        x, y = (torch.cat(parts) for parts in zip(*batches))
        if torch.equal(x, x[:, :1].expand_as(x)):  # gray: one channel is enough
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
    """Check that there are enough images for one batch."""
    if len(images) < stage.batch_size:
        raise ValueError(
            f'{stage.title} has {len(images)} images, fewer than its batch size of {stage.batch_size}. '
            f'Lower --batch-size.')


def save_checkpoint(path: Path, **state: Any) -> None:
    """Replace a checkpoint; if it is interrupted, the previous one stays whole."""
    buffer = io.BytesIO()  # of a full disk torch.save only says that a position is unexpected
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
    """Load the states of `modules` from a checkpoint; return the number of epochs done, and the seconds they took.

    Raises:
        ValueError: The file is damaged, or is of another run: with more than `epochs`, or trained with something else
            than `trained_with`.
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
    """Train with AdamW, cosine decay and EMA; a checkpoint is written after every epoch.

    Args:
        stage: Settings.
        model: Model to train.
        objective: Loss.
        images: Training images with labels.
        config: timm's data config.
        output: Folder of the checkpoints.
        progress: Bar to advance.
        trained_with: Arguments and data of the run, by names for people, which checkpoints record.
        resume: Continue from the checkpoint of the stage if there is one; a finished stage is only loaded.

    Returns:
        The averaged model with its BN statistics recomputed, and the duration in seconds.
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
            random_seed(stage.seed, rank=epoch)  # so that a resumed run gives the same as an uninterrupted one
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
    # running statistics lag behind by many updates if weights are averaged, which silences neurons
    random_seed(stage.seed)
    update_bn(make_loader(images, config, stage.batch_size, device), ema.module, device)
    return ema.module, seconds_before + time.time() - start
