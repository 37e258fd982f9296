"""The progress bar of the demo."""
import sys
from typing import Any, Dict, NamedTuple

from torch import nn
from tqdm import tqdm

from ..images import Images
from ..training import Callback, Recipe


class Stage(NamedTuple):
    """One training run of the demo.

    Args:
        name: Name of the run and of its checkpoint file.
        title: Title for messages.
        recipe: Settings of training.
        cost: Time per image, relative to supervised training.
    """
    name: str
    title: str
    recipe: Recipe
    cost: float = 1.

    @property
    def checkpoint(self) -> str:
        """File name of the checkpoint."""
        return f'{self.name}.pth.tar'

    def work(self, images: Images) -> float:
        """Duration of the run, in units of the time per image of supervised training."""
        return self.recipe.epochs * self.work_of_epoch(images)

    def work_of_epoch(self, images: Images) -> float:
        batch_size = self.recipe.batch_size
        return len(images) // batch_size * batch_size * self.cost


class Progress:
    """One progress bar for several training runs. If the output is not a terminal, only lines are printed."""

    def __init__(self, total: float):
        """
        Args:
            total: Sum of `Stage.work` over all runs.
        """
        self.bar = tqdm(
            total=total,
            bar_format='{desc} |{bar}| {percentage:.0f}%, {elapsed} so far, {remaining} left{postfix}',
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


class StageProgress(Callback):
    """Show the training of one stage on the progress bar, and print a line per epoch."""

    def __init__(self, progress: Progress, stage: Stage, images: Images):
        self.progress = progress
        self.stage = stage
        self.images = images

    def _title(self, epoch: int) -> str:
        return f'{self.stage.title}, epoch {epoch + 1}/{self.stage.recipe.epochs}'

    def on_start(self, epoch: int) -> None:
        self.progress.skip(epoch * self.stage.work_of_epoch(self.images))

    def on_step(self, epoch: int, num_images: int, loss: float) -> None:
        self.progress.title(self._title(epoch))
        self.progress.update(num_images * self.stage.cost, f'loss {loss:.3f}')

    def on_epoch(self, epoch: int, model: nn.Module, record: Dict[str, Any]) -> None:
        correct = '' if record['accuracy'] is None else f'training accuracy {record["accuracy"]:5.1f}%   '
        self.progress.write(
            f'{self._title(epoch)}   loss {record["loss"]:.3f}   {correct}firing rate {record["firing_rate"]:.3f}')
