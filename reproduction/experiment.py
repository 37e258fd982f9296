"""Execution of one run of the study: train, evaluate, and write the result to a JSON file."""
import platform
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from timm_spikformer import SpikformerMAE
from timm_spikformer.environment.command import cpu_name
from timm_spikformer.folders import lock_folder_for_run
from timm_spikformer.images import make_loader
from timm_spikformer.pretrained import WEIGHTS_FOLDER, check_shipped_weights, read_metadata
from timm_spikformer.profiling import COST_MODELS, profile
from timm_spikformer.spikformer import Spikformer
from timm_spikformer.temporaries import create_temporary, replace_file
from timm_spikformer.training import (
    Callback,
    Recipe,
    TrainingResult,
    classify,
    classify_steps,
    evaluate,
    reconstruct,
    reconstruction_loss,
    train,
)

from .data import Data, read_data
from .models import create, create_autoencoder
from .protocol import Cell, Protocol, Run
from .results import read_result, write_json

__all__ = ['PROFILED_IMAGES', 'Study']

_KIND = 'reproduction'
_CHECKPOINT, _FINISHED, _IMAGES = 'last.pth.tar', 'finished', 'images.sha256'
_BATCH_SIZE = 250  # for evaluation and profiling; divides the numbers of images
PROFILED_IMAGES = 500  # validation images from which operations and energy are measured


def _git_commit() -> str:
    """Return the current commit, followed by '+' if there are uncommitted changes."""
    def git(*args: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(['git', *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git('status', '--porcelain', '--', 'timm_spikformer', 'reproduction/*.py', 'reproduction/*.yaml')
        return git('rev-parse', '--short=12', 'HEAD') + ('+' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'


def _machine() -> Dict[str, Any]:
    return dict(
        cpu=cpu_name(), threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__,
        timm=timm.__version__)


class _EpochLogger(Callback):
    """Record the CPU time of each epoch, or the GPU that it ran on, and print progress after it."""

    def __init__(self, name: str, epochs: int):
        self.name = name
        self.epochs = epochs
        self.start = time.process_time()

    def on_start(self, epoch: int) -> None:
        self.start = time.process_time()

    def on_epoch(self, epoch: int, model: nn.Module, record: Dict[str, Any]) -> None:
        now = time.process_time()
        device = next(model.parameters()).device
        if device.type == 'cpu':
            record['cpu_seconds'] = now - self.start
        else:
            record['gpu'] = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
        self.start = now
        accuracy = '' if record['accuracy'] is None else f', training accuracy {record["accuracy"]:.1f}%'
        print(f'{self.name}: epoch {epoch + 1}/{self.epochs}, loss {record["loss"]:.4f}{accuracy}', flush=True)


class Study(NamedTuple):
    """A protocol, and the folders that the study reads and writes.

    Args:
        protocol: The protocol.
        runs: Folder with the results, one JSON file per run.
        checkpoints: Folder with the checkpoints, one folder per set of trained weights.
        data: Folder with the datasets.
        device: Device for training. Trained weights are evaluated on a CPU.
    """
    protocol: Protocol
    runs: Path
    checkpoints: Path
    data: Path
    device: torch.device = torch.device('cpu')

    def result_path(self, run: Run) -> Path:
        return self.runs / f'{run.name}.json'

    def result(self, run: Run) -> Optional[Dict[str, Any]]:
        """Return the result of a run; None if it is missing or belongs to other settings, images or initial weights.

        Raises:
            ValueError: The file is damaged or is not the result of such a run.
        """
        return read_result(self.result_path(run), run, dict(
            training=self.protocol.digest(run), initial=self._initial_digest(run),
            images=self.protocol.images[run.cell.dataset]))

    def tries(self, cell: Cell) -> List[Run]:
        """Return the runs that select the settings of a cell; empty if the cell has only one try."""
        count = len(cell.tries)
        return [Run(cell, attempt, 0, False) for attempt in range(count)] if count > 1 else []

    def best_try(self, cell: Cell) -> Optional[int]:
        """Return the index of the best try of a cell; None until all tries have finished."""
        results = [self.result(run) for run in self.tries(cell)]
        if None in results:
            return None
        accuracies = [result['validation']['accuracy'] for result in results]
        return accuracies.index(max(accuracies)) if accuracies else 0

    def final_runs(self, cell: Cell) -> List[Run]:
        """Return the final runs of a cell; empty until all tries have finished."""
        attempt = self.best_try(cell)
        return [] if attempt is None else [Run(cell, attempt, seed, True) for seed in cell.seeds]

    def initial_run(self, run: Run) -> Optional[Run]:
        """Return the final run whose weights initialize a run; None if the run starts from random weights.

        Raises:
            ValueError: The tries of the initial cell have not finished, so its settings are not selected yet.
        """
        if run.cell.init is None:
            return None
        for initial in self.final_runs(self.protocol.cells[run.cell.init]):
            if initial.seed == run.seed:
                return initial
        raise ValueError(f'{run.name} starts from the weights of {run.cell.init}, whose tries have not finished yet.')

    def _initial_digest(self, run: Run) -> Optional[str]:
        """Return the digest of the initial run; None if there is none, or if its settings are not selected yet."""
        if run.cell.init is None or self.best_try(self.protocol.cells[run.cell.init]) is None:
            return None
        return self.protocol.digest(self.initial_run(run))

    def checkpoint_folder(self, run: Run) -> Path:
        """Return the folder with the checkpoint of a run."""
        return self.checkpoints / self.protocol.digest(run)

    def has_weights(self, run: Run) -> bool:
        """Return whether the weights of a run exist. Results in git come without them, except those that ship."""
        return self.is_trained(run) or self._shipped_file(run) is not None

    def is_trained(self, run: Run) -> bool:
        """Return whether the training of a run has finished."""
        return all((self.checkpoint_folder(run) / name).is_file() for name in (_CHECKPOINT, _FINISHED))

    def _shipped_file(self, run: Run) -> Optional[Path]:
        """Return the file in the package with the weights of a run; None if there is none.

        Raises:
            ValueError: The file is damaged.
        """
        path = WEIGHTS_FOLDER / f'{run.cell.ships}.safetensors'
        if run.cell.ships is None or not run.is_final or run.seed != 0 or not path.is_file():
            return None
        try:
            check_shipped_weights(str(path))
        except RuntimeError as e:
            raise ValueError(str(e)) from e
        return path if read_metadata(path).get('training') == self.protocol.digest(run) else None

    def _weights(self, run: Run, data: Data) -> Dict[str, torch.Tensor]:
        """Return the trained weights of a run, from the package or from `train`."""
        file = self._shipped_file(run)
        return self.train(run, data).model.state_dict() if file is None else load_file(file)

    def read_data(self, run: Run) -> Data:
        dataset = run.cell.dataset
        return read_data(self.data, dataset, self.protocol.images[dataset])

    def train(self, run: Run, data: Data) -> TrainingResult:
        """Train the weights of a run, or load them if they exist already. Missing initial weights are trained first.

        Raises:
            ValueError: The settings do not fit the model or the data, see `create` and `training.train`.
        """
        cell, config = run.cell, run.config()
        model = create(config, data.num_classes, data.config['input_size'][-1])
        initial, is_trained = self.initial_run(run), self.is_trained(run)
        if initial is not None and not is_trained:
            try:
                model.load_state_dict(self._weights(initial, data))
            except RuntimeError as e:
                raise ValueError(f'{run.name}: the weights of {initial.name} are those of another model: {e}') from e
        objective = classify_steps if cell.objective == 'classify_steps' else classify
        if cell.objective == 'reconstruct':
            model, objective = create_autoencoder(model), reconstruct
        if cell.labels is not None and cell.labels > len(data.train):
            raise ValueError(f'{run.name}: labels is {cell.labels}, but there are {data.train.description}.')
        model = model.to(self.device)
        images = data.train if cell.labels is None else data.train.sample_stratified(cell.labels, run.seed)
        folder = self.checkpoint_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        recipe = Recipe(**config['recipe'])
        # no lock for finished weights: several runs may read them at the same time
        with nullcontext() if is_trained else lock_folder_for_run(folder):
            if not is_trained:  # also if the checkpoint of a finished training was moved away
                (folder / _FINISHED).unlink(missing_ok=True)
            _check_content(folder / _IMAGES, self.protocol.images[cell.dataset].get('sha256'))
            trained = train(
                model, objective, images, data.config, recipe, folder / _CHECKPOINT, run.name, _KIND,
                dict(training=self.protocol.digest(run), images=images.fingerprint()), resume=True,
                callback=_EpochLogger(run.name, recipe.epochs))
            (folder / _FINISHED).touch()
        return trained

    def execute(self, run: Run) -> Dict[str, Any]:
        """Train and evaluate a run, write its result to a JSON file, and return it."""
        path = self.result_path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        with create_temporary(path, path.parent):  # fails before the training if the result cannot be written
            pass
        data = self.read_data(run)
        commit = _git_commit()
        trained = self.train(run, data)
        model = trained.model.cpu()
        result: Dict[str, Any] = dict(
            cell=run.cell.name, seed=run.seed, attempt=run.attempt, config=run.config(),
            training=self.protocol.digest(run),
            initial=self._initial_digest(run), images=self.protocol.images[run.cell.dataset],
            commit=commit, machine=_machine(),
            cpu_seconds=sum(record.get('cpu_seconds', 0.) for record in trained.history), history=trained.history)
        for split in run.splits:
            result.update(self.evaluate(run, model, data, split))
        if run.is_final:
            result['operations'] = _operations(model, data)
        write_json(path, result)
        return result

    def evaluate(self, run: Run, model: nn.Module, data: Data, split: str) -> Dict[str, Any]:
        """Return the entries of the result with the metrics of a model on the 'validation' or 'test' images."""
        loader = make_loader(data.test if split == 'test' else data.validation, data.config, _BATCH_SIZE)
        if run.cell.objective == 'reconstruct':
            loss, of_mean = reconstruction_loss(model, loader, seed=0)
            return {split: dict(loss=loss, loss_of_mean=of_mean)}
        accuracy, rates = evaluate(model, loader)
        metrics = {split: dict(accuracy=round(accuracy, 4))}  # floating-point errors are smaller
        return {**metrics, 'firing_rates': rates} if split == 'test' else metrics


def _check_content(path: Path, digests: Optional[Dict[str, str]]) -> None:
    """Compare the digest of the training images with that in a file, which is written if it does not exist.

    `train` compares the sizes of image files, but not their content.

    Args:
        path: The file.
        digests: Digests in the protocol, with which `read_data` has compared the images; None if there are no files.
    """
    if digests is None:
        return
    if not path.is_file():
        replace_file(path, digests['train'].encode())
    elif path.read_text(encoding='utf-8') != digests['train']:
        raise ValueError(
            f'The training in {path.parent} has used other images. Remove this folder to train again, or use the '
            f'images that it was started with.')


@torch.no_grad()
def _count_macs(model: nn.Module, data: Data, module: str = 'Global') -> float:
    """Return the dense multiply-accumulates of a model, or of a module of it, for one image.

    Args:
        model: The model.
        data: Dataset of the images.
        module: Name of the module, `CLASS.NAME`, where CLASS is that of the model.
    """
    # FlopCounterMode does not count fused attention on a CPU; the matrix products of the math back end are counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *data.config['input_size']))
    return sum(counter.get_flop_counts()[module].values()) / 2


def _operations(model: nn.Module, data: Data) -> Dict[str, Any]:
    """Return the number of parameters, and the operations and energy per validation image by the papers' conventions.

    `dense_macs` are those of one time step; `total_macs` of an autoencoder are those of one time step of the encoder,
    and of the decoder. `macs`, `acs` and the energies are those of all time steps.
    """
    images = data.validation.sample_evenly(PROFILED_IMAGES)
    parameters = sum(p.numel() for p in model.parameters())
    if not any(isinstance(m, Spikformer) for m in model.modules()):
        macs = _count_macs(model, data)
        return dict(
            parameters=parameters, dense_macs=macs, macs=macs, acs=0.,
            energy_uj=COST_MODELS['fp32'].energy_mj(macs, 0., 0.) * 1e3)
    result = profile(model, make_loader(images, data.config, _BATCH_SIZE))
    operations, totals = {}, result.totals
    if isinstance(model, SpikformerMAE):
        operations['total_macs'] = totals.dense_macs + _count_macs(model, data, 'SpikformerMAE.decoder')
    return dict(
        **operations, parameters=parameters, encoder_parameters=totals.parameters, dense_macs=totals.dense_macs,
        macs=totals.macs, acs=totals.acs, energy_uj=totals.energy_mj * 1e3, ann_energy_uj=totals.ann_energy_mj * 1e3,
        firing_rate=result.firing_rate, silent_layers=result.silent_layers)
