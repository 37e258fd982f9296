"""Training with timm's data loader, optimizer, scheduler and EMA; resumable and, on a CPU, deterministic.

The demo and the study in `reproduction/` use this loop. Unlike timm's train.py, it is called as a function, a resumed
run on a CPU equals an uninterrupted one bit for bit, and it can also train a masked autoencoder. The fields of `Recipe`
are named like the options of train.py.
"""
import contextlib
import io
import math
import pickle
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy, random_seed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from .arguments import check_integer, check_number
from .errors import first_line
from .folders import check_output_file, write_file
from .images import Images, make_loader
from .losses import TETLoss
from .masked_autoencoder import SpikformerMAE
from .monitor import FiringRateMonitor

__all__ = [
    'Callback', 'Recipe', 'TrainingResult', 'check_recipe', 'classify', 'classify_steps', 'evaluate', 'init_bn_bias',
    'masking_noise', 'reconstruct', 'reconstruction_loss', 'train',
]

# Function of (model, images, labels) that returns the loss and the logits, or None without logits
Objective = Callable[[nn.Module, Tensor, Tensor], Tuple[Tensor, Optional[Tensor]]]

_LABEL_SMOOTHING = 0.1
_tet_loss = TETLoss(label_smoothing=_LABEL_SMOOTHING)
# arguments of timm's `create_loader` that augment images, and leave the format of batches unchanged
_AUGMENTATIONS = (
    'scale', 'ratio', 'vflip', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob',
    'auto_augment', 're_prob', 're_mode', 're_count', 'interpolation', 'train_crop_mode')
_BN_BIAS = 0.7
_BN_IMAGES = 10_000  # images from which BN statistics are recomputed after training


class Recipe(NamedTuple):
    """Settings of one training run with AdamW and a cosine schedule, which changes the learning rate at every update.

    Args:
        epochs: Number of epochs.
        lr: Peak learning rate.
        batch_size: Number of images per batch.
        weight_decay: Weight decay of AdamW.
        beta2: Second beta of AdamW.
        layer_decay: Factor of the learning rate from each layer to the preceding one; None for no layer decay.
        warmup_epochs: Epochs during which the learning rate rises from a hundredth of its peak; fewer than `epochs`.
        fixed_bn: Fraction of the updates, at the end, that use fixed BN statistics: see `train`.
        ema_decay: Final decay of the moving average of the weights, which training returns. timm's warmup raises the
            decay from 0; it reaches 0.99 after about 1,000 updates.
        bf16: Use bfloat16 autocast on a CPU, which is faster on CPUs with bfloat16 instructions. CUDA always uses it.
        hflip: Probability of a horizontal flip.
        augmentation: Further arguments of timm's `create_loader` for training: `scale`, `ratio`, `vflip`,
            `color_jitter`, `auto_augment`, `re_prob`, and others that change single images.
        num_workers: Number of processes that load the training images. Random augmentation depends on it.
        seed: Random seed.

    >>> recipe = Recipe(epochs=10, lr=1e-2, batch_size=32, augmentation=dict(auto_augment='rand-m9-n2'))
    >>> recipe._replace(seed=1).seed, recipe.ema_decay
    (1, 0.99)
    """
    epochs: int
    lr: float
    batch_size: int
    weight_decay: float = 0.05
    beta2: float = 0.999
    layer_decay: Optional[float] = None
    warmup_epochs: float = 0.5
    fixed_bn: float = 0.
    ema_decay: float = 0.99
    bf16: bool = False
    hflip: float = 0.
    augmentation: Mapping[str, Any] = {}
    num_workers: int = 0
    seed: int = 0


class Callback:
    """Base class of callbacks for `train`. Its methods do nothing.

    >>> class PrintLoss(Callback):
    ...     def on_epoch(self, epoch, model, record):
    ...         print(f'epoch {epoch}: loss {record["loss"]:.2f}')
    >>> PrintLoss().on_epoch(0, nn.Identity(), dict(loss=0.5))
    epoch 0: loss 0.50
    """

    def on_start(self, epoch: int) -> None:
        """Called before the first epoch that runs; `epoch` is greater than 0 for a resumed run."""

    def on_step(self, epoch: int, num_images: int, loss: float) -> None:
        """Called after each update of `num_images` images, with the mean loss of the epoch so far."""

    def on_epoch(self, epoch: int, model: nn.Module, record: Dict[str, Any]) -> None:
        """Called after each epoch, before its checkpoint is written; may add entries to the record of the epoch."""


class TrainingResult(NamedTuple):
    """Result of `train`.

    Args:
        model: The moving average of the model, in eval mode, with the BN statistics that `train` describes.
        history: For each epoch `loss`, `accuracy` in percent (None without logits), `firing_rate` (mean of the
            layers in the last measured batch, in train mode), `seconds`, and entries added by the callback.
        seconds: Training time in seconds, including the time before an interruption.

    >>> import tempfile, timm
    >>> from timm_spikformer.images import read_splits, training_data_config
    >>> model = timm.create_model('spikformer_v2_2_64_patch4_32', time_steps=1, img_size=28)
    >>> images, config = read_splits()['train'].sample_stratified(32, seed=0), training_data_config()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result = train(
    ...         model, classify, images, config, Recipe(epochs=1, lr=1e-3, batch_size=16), Path(folder, 'last.pth.tar'),
    ...         'Example', 'example', {})
    >>> len(result.history), sorted(result.history[0])
    (1, ['accuracy', 'firing_rate', 'loss', 'seconds'])
    """
    model: nn.Module
    history: List[Dict[str, Any]]
    seconds: float


def classify(model: nn.Module, x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    """Objective of `train`: return the cross-entropy with label smoothing of 0.1, and the logits."""
    logits = model(x)
    return F.cross_entropy(logits.float(), y, label_smoothing=_LABEL_SMOOTHING), logits


def classify_steps(model: nn.Module, x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    """Objective of `train`: return the TET loss with label smoothing of 0.1, see `TETLoss`, and the mean logits."""
    logits = model.forward_steps(x, cumulative=False)
    return _tet_loss(logits, y), logits.mean(0)


def reconstruct(model: nn.Module, x: Tensor, y: Tensor) -> Tuple[Tensor, None]:
    """Objective of `train` for a masked autoencoder: return its loss, and None."""
    return model(x).loss, None


def init_bn_bias(model: nn.Module) -> None:
    """Set the bias of all BN layers to 0.7, which speeds up the first epochs.

    At initialization, the outputs of BN (input currents of the neurons) have mean 0 and variance 1. A neuron fires in
    the first time step if its current is at least 2. About 2% of normally distributed currents are, and 10% with this
    bias. This is the project's choice.
    """
    for module in _bn_layers(model):
        nn.init.constant_(module.bias, _BN_BIAS)


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any) -> Tuple[float, Dict[str, float]]:
    """Return the accuracy in percent, and the firing rate (spikes per neuron and time step) of every neuron layer.

    Args:
        model: Model that returns logits. It is left in eval mode.
        loader: Iterable of pairs of images and labels.

    Raises:
        ValueError: There are no images, or a logit is NaN, for example because training diverged.
    """
    model.eval()
    top1 = AverageMeter()
    with FiringRateMonitor(model) as monitor:
        for x, y in loader:
            logits = model(x)
            if logits.isnan().any():
                raise ValueError(
                    'The logits contain NaN, so the accuracy cannot be computed. Check the images and the weights of '
                    'the model.')
            top1.update(accuracy(logits, y)[0].item(), len(x))
    _check_count(top1)
    return top1.avg, monitor.rates


def _check_count(meter: AverageMeter) -> None:
    if meter.count == 0:
        raise ValueError('There is no data: the loader returned no images.')


def masking_noise(mae: SpikformerMAE, x: Tensor, seed: int) -> Tensor:
    """Return reproducible `noise` for masking images `[B, C, H, W]`, see `SpikformerMAE.make_mask`."""
    num_units = (x.shape[-2] // mae.mask_unit) * (x.shape[-1] // mae.mask_unit)
    return torch.rand(len(x), num_units, generator=torch.Generator().manual_seed(seed)).to(x.device)


@torch.no_grad()
def reconstruction_loss(mae: SpikformerMAE, loader: Any, seed: int) -> Tuple[float, float]:
    """Return the loss over the masked patches of all images, and the loss of predicting the mean of each patch.

    With targets normalized per patch, the second loss is 1 if no patch is constant; constant patches contribute 0.

    Args:
        mae: Masked autoencoder. It is left in eval mode.
        loader: Iterable of pairs of images and labels.
        seed: Seed of the masks, which are the same in each batch.

    Raises:
        ValueError: There are no images.
    """
    mae.eval()
    ours, means = AverageMeter(), AverageMeter()
    for x, _ in loader:
        out = mae(x, noise=masking_noise(mae, x, seed))
        target = mae.target(x)
        error = (target - target.mean(-1, keepdim=True)).square().mean(-1)
        ours.update(out.loss.item(), len(x))
        means.update(error[out.mask].mean().item(), len(x))
    _check_count(ours)
    return ours.avg, means.avg


def save_checkpoint(path: Path, kind: str, **state: Any) -> None:
    """Write or replace a checkpoint atomically: after an interruption, the previous file is intact."""
    buffer = io.BytesIO()  # on a full disk, torch.save would raise an error that does not state the cause
    torch.save(state, buffer)
    with write_file(path, kind) as partial:
        partial.write_bytes(buffer.getbuffer())


def load_checkpoint(
        path: Path,
        device: torch.device,
        modules: Dict[str, Any],
        epochs: int,
        run_config: Dict[str, Any],
) -> Tuple[int, List[Dict[str, Any]], float]:
    """Load the states of `modules` from a checkpoint.

    Returns:
        Number of epochs done, their history, and their time in seconds.

    Raises:
        ValueError: The file cannot be read, is damaged, or belongs to another run: it has more than `epochs` epochs, or
            its arguments or data differ from `run_config`.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        epoch, history, seconds = state['epoch'], list(state['history']), state['seconds']
        before = dict(state['trained_with'])
        for name in sorted({*before, *run_config}):
            if before.get(name) != run_config.get(name):
                raise ValueError(f'it was trained with {name} = {before.get(name)}, now it is {run_config.get(name)}')
        if type(epoch) is not int or not 0 <= epoch < epochs:
            raise ValueError(f'it was saved after epoch {epoch}, expected 0 to {epochs - 1}')
        if len(history) != epoch + 1:
            raise ValueError(f'it records {len(history)} epochs, expected {epoch + 1}')
        if type(seconds) is not float or not 0. <= seconds < math.inf:
            raise ValueError(f'its training time is {seconds} seconds')
        for key, module in modules.items():
            module.load_state_dict(state[key])
        return epoch + 1, history, seconds
    except KeyError as e:
        reason = f'it does not contain {e}'
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, TypeError, ValueError, AttributeError) as e:
        reason = first_line(e)
    raise ValueError(
        f'{path} is damaged or is not a checkpoint of this run: {reason}. Move it away to start again, or repeat the '
        f'command with the settings and data that it was written with.')


def train(
        model: nn.Module,
        objective: Objective,
        images: Images,
        config: Dict[str, Any],
        recipe: Recipe,
        checkpoint: Path,
        title: str,
        kind: str,
        run_config: Dict[str, Any],
        resume: bool = False,
        callback: Optional[Callback] = None,
) -> TrainingResult:
    """Train a model, and write a checkpoint after every epoch.

    After training, BN statistics are computed from up to 10,000 images. With few time steps, small changes of the
    statistics matter: where all background pixels have the same value, a neuron fires for all of them or for none. If
    `recipe.fixed_bn` is above 0, the statistics are computed before the last updates instead, and then kept, so that
    the weights adapt to the statistics that inference uses. This is the project's choice.

    Args:
        model: Model to train.
        objective: Function that returns the loss and the logits.
        images: Training images with labels.
        config: timm's data config.
        recipe: Settings.
        checkpoint: Path of the checkpoint. Its folder is created.
        title: Title of the run for messages.
        kind: Name of the command that trains, such as 'demo'. Files of other commands are not replaced or read.
        run_config: Arguments and data of the run by display name; stored in the checkpoint and compared on resuming.
        resume: Continue from the checkpoint if there is one; a finished run is loaded without training.
        callback: Receives the progress; by default none.

    Returns:
        The result, whose model is a copy with averaged weights. `model` itself has the weights of the last update.

    Raises:
        ValueError: A setting is out of its range, the augmentation is not possible, there are no labels or fewer images
            than one batch, the loss is not finite, or the checkpoint was changed since it was written or belongs to
            another run.
    """
    start = time.time()
    _check_settings(images, recipe, title)
    callback = callback or Callback()
    device = next(model.parameters()).device
    loader = _make_training_loader(images, config, recipe, device, title)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    optimizer = create_optimizer_v2(
        model, 'adamw', lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, recipe.beta2),
        layer_decay=recipe.layer_decay)
    ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
    scheduler, _ = create_scheduler_v2(
        optimizer, 'cosine', num_epochs=recipe.epochs, warmup_epochs=recipe.warmup_epochs, warmup_lr=recipe.lr / 100,
        step_on_epochs=False, updates_per_epoch=len(loader))
    start_epoch, history, seconds_before = 0, [], 0.
    check_output_file(checkpoint, kind)  # compares the digest; torch.load does not detect all kinds of damage
    if resume and checkpoint.is_file():
        start_epoch, history, seconds_before = load_checkpoint(
            checkpoint, device, dict(state_dict=model, state_dict_ema=ema.module, optimizer=optimizer), recipe.epochs,
            run_config)
    callback.on_start(start_epoch)
    num_updates = recipe.epochs * len(loader)
    first_fixed = num_updates - round(recipe.fixed_bn * num_updates)  # first update with fixed BN statistics

    # not `with FiringRateMonitor(...)`, which would run a compiled model in eager mode
    with contextlib.closing(FiringRateMonitor(model)) as monitor:
        monitor.enabled = False
        for epoch in range(start_epoch, recipe.epochs):
            epoch_start = time.time()
            # Seeding each epoch makes a resumed run equal to an uninterrupted one. `random_seed` adds the epoch to the
            # seed, so epoch 1 of seed 0 has the same order of images as epoch 0 of seed 1, but not the same weights.
            random_seed(recipe.seed, rank=epoch)
            losses, top1 = AverageMeter(), AverageMeter()
            _set_train_mode(model, has_fixed_bn=epoch * len(loader) > first_fixed)
            for i, (x, y) in enumerate(loader):
                update = epoch * len(loader) + i
                if update == first_fixed:
                    _compute_bn(model, images, config, recipe)
                    _set_train_mode(model, has_fixed_bn=True)
                scheduler.step_update(update)
                if i % 20 == 0:
                    monitor.reset()
                    monitor.enabled = True
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16 or device.type == 'cuda'):
                    loss, logits = objective(model, _to_channels_last(x), y)
                monitor.enabled = False
                if not loss.isfinite():
                    raise ValueError(
                        f'{title}: the loss is {loss.item()}. Try a lower learning rate than {recipe.lr}, or a lower '
                        f'weight decay than {recipe.weight_decay}.')
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                ema.update(model, step=update)
                losses.update(loss.item(), len(x))
                if logits is not None:
                    top1.update(accuracy(logits, y)[0].item(), len(x))
                callback.on_step(epoch, len(x), losses.avg)
            record = dict(
                loss=losses.avg, accuracy=top1.avg if top1.count else None, firing_rate=monitor.mean,
                seconds=time.time() - epoch_start)
            callback.on_epoch(epoch, model, record)
            history.append(record)
            save_checkpoint(
                checkpoint, kind, epoch=epoch, history=history, seconds=seconds_before + time.time() - start,
                trained_with=run_config, state_dict=model.state_dict(), state_dict_ema=ema.module.state_dict(),
                optimizer=optimizer.state_dict())
    if first_fixed < num_updates:
        for averaged, fixed in zip(_bn_layers(ema.module), _bn_layers(model)):
            for name, buffer in fixed.named_buffers():
                averaged.get_buffer(name).copy_(buffer)
    else:  # the averaged running statistics lag behind the weights: with them, many neurons would not fire
        _compute_bn(ema.module, images, config, recipe)
    return TrainingResult(ema.module, history, seconds_before + time.time() - start)


def check_recipe(recipe: Recipe) -> None:
    """Check the settings of a recipe, before any data is read.

    Raises:
        ValueError: A setting is out of its range.
    """
    for name in ('epochs', 'batch_size'):
        check_integer(name, getattr(recipe, name), 1)
    check_integer('num_workers', recipe.num_workers, 0)
    for name in ('lr', 'weight_decay'):
        check_number(name, getattr(recipe, name), maximum=1000)  # far above useful values
    check_number('warmup_epochs', recipe.warmup_epochs, below=recipe.epochs)
    for name in ('fixed_bn', 'ema_decay', 'hflip'):
        check_number(name, getattr(recipe, name), maximum=1)
    check_number('beta2', recipe.beta2, below=1)
    if recipe.layer_decay is not None:
        check_number('layer_decay', recipe.layer_decay, above=0, maximum=1)
    if check_integer('seed', recipe.seed, 0) + recipe.epochs > 2 ** 32:  # epoch i is seeded with seed + i
        raise ValueError(f'seed + epochs must be at most 2 ** 32, got {recipe.seed} + {recipe.epochs}.')
    if not isinstance(recipe.bf16, bool):
        raise ValueError(f'bf16 must be True or False, got {recipe.bf16!r}.')
    if not isinstance(recipe.augmentation, Mapping) or not {*recipe.augmentation} <= {*_AUGMENTATIONS}:
        raise ValueError(
            f'augmentation must be a mapping with keys among {", ".join(_AUGMENTATIONS)}, got {recipe.augmentation!r}.')


def _check_settings(images: Images, recipe: Recipe, title: str) -> None:
    check_recipe(recipe)
    if images.labels is None:
        raise ValueError(f'{title}: training requires labels, but these images have none: {images.description}.')
    if len(images) < recipe.batch_size:
        raise ValueError(
            f'{title}: there are fewer training images ({images.description}) than the batch_size of '
            f'{recipe.batch_size}. Use a smaller batch_size.')


def _make_training_loader(
        images: Images,
        config: Dict[str, Any],
        recipe: Recipe,
        device: torch.device,
        title: str,
) -> Any:
    try:
        loader = make_loader(
            images, config, recipe.batch_size, device, augment=True, hflip=recipe.hflip, num_workers=recipe.num_workers,
            **recipe.augmentation)
        loader.dataset[0]  # augments an image
        return loader
    except (TypeError, AssertionError, LookupError, ArithmeticError, AttributeError) as e:
        raise ValueError(
            f"{title}: the augmentation {dict(recipe.augmentation)} is not possible: {first_line(e)}. Expected "
            f"arguments of timm's create_loader, such as scale=(0.5, 1.0) or auto_augment='rand-m9-n2'.") from e


def _to_channels_last(x: Tensor) -> Tensor:
    """Convert images to channels-last layout; sequences are returned unchanged."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _bn_layers(model: nn.Module) -> List[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _set_train_mode(model: nn.Module, has_fixed_bn: bool) -> None:
    model.train()
    if has_fixed_bn:
        for m in _bn_layers(model):
            m.eval()


def _compute_bn(model: nn.Module, images: Images, config: Dict[str, Any], recipe: Recipe) -> None:
    """Compute BN statistics from images without augmentation."""
    random_seed(recipe.seed)
    device = next(model.parameters()).device
    images = images.sample_stratified(_BN_IMAGES, recipe.seed)
    update_bn(make_loader(images, config, recipe.batch_size, device), model, device)
