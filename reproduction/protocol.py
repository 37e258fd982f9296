"""Reader of `protocol.yaml`: cells, and the training runs of each cell."""
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import yaml

__all__ = ['PROTOCOL', 'Cell', 'Protocol', 'Run', 'read_protocol']

PROTOCOL = Path(__file__).with_name('protocol.yaml')
_CELL_KEYS = {
    'title', 'dataset', 'model', 'model_kwargs', 'attention', 'objective', 'labels', 'init', 'recipe', 'tries', 'seeds',
    'ships'}
_ATTENTIONS = ('ssa', 'softmax', 'none')
_OBJECTIVES = ('classify', 'classify_steps', 'reconstruct')


class Cell(NamedTuple):
    """One configuration of the study, which is one row of the report.

    Args:
        name: Name of the cell and of its folder in runs/.
        title: Name of the cell in the report.
        dataset: 'fashion_mnist', 'cifar10' or 'simulated_events'.
        model: Name of a timm model.
        model_kwargs: Arguments of `timm.create_model`.
        attention: 'ssa' (spiking self-attention), 'softmax' or 'none'; see `models.py`.
        objective: 'classify', 'classify_steps' for the TET loss, or 'reconstruct' for masked pre-training.
        labels: Number of labeled training images; None for all.
        init: Name of the cell whose weights, with the same seed, initialize the model; None for random weights.
        recipe: Fields of `timm_spikformer.training.Recipe`. In the file, null removes a field of the default recipe.
        tries: Alternative changes to the recipe. The try with the highest validation accuracy with seed 0 is used for
            all seeds.
        seeds: Seeds of the final runs.
        ships: `MODEL.TAG` of the weights that the package includes from the final run with seed 0; None for most cells.
    """
    name: str
    title: str
    dataset: str
    model: str
    model_kwargs: Dict[str, Any]
    attention: str
    objective: str
    labels: Optional[int]
    init: Optional[str]
    recipe: Dict[str, Any]
    tries: List[Dict[str, Any]]
    seeds: List[int]
    ships: Optional[str] = None

    def recipe_of(self, attempt: int) -> Dict[str, Any]:
        """Return the fields of the recipe of a try. `epochs: 2x` doubles the number of epochs and of warmup epochs."""
        change = dict(self.tries[attempt])
        recipe = {**self.recipe, **change}
        if isinstance(recipe['epochs'], str):
            factor = int(recipe['epochs'].removesuffix('x'))
            recipe.update(
                epochs=factor * self.recipe['epochs'], warmup_epochs=factor * self.recipe['warmup_epochs'])
        return recipe


class Run(NamedTuple):
    """One training run: a try, evaluated on the validation images, or a final run, also evaluated on the test images.

    Args:
        cell: Cell of the run.
        attempt: Index of the try that the run uses.
        seed: Random seed.
        is_final: Whether the run is a final run.
    """
    cell: Cell
    attempt: int
    seed: int
    is_final: bool

    @property
    def name(self) -> str:
        return f'{self.cell.name}/' + (f'seed-{self.seed}' if self.is_final else f'try-{self.attempt}')

    def config(self) -> Dict[str, Any]:
        """Return everything that determines the trained weights, except the initial weights."""
        cell = self.cell
        return dict(
            dataset=cell.dataset, model=cell.model, model_kwargs=cell.model_kwargs, attention=cell.attention,
            objective=cell.objective, labels=cell.labels, init=cell.init,
            recipe={**cell.recipe_of(self.attempt), 'seed': self.seed})


class Protocol(NamedTuple):
    """Contents of `protocol.yaml`.

    Args:
        cells: Cells by name, in the order in which they are run.
        held_out: For each dataset, the fraction of the training images that is held out for validation.
        seeds: Default seeds of the final runs.
        questions: For each question, its title, text, `rows` (names of cells) and `claims` (names of the two or four
            cells whose test accuracies are compared, by claim).
        label_curves: Curves of accuracy against the number of labels: panel, curve, number of labels, name of the cell.
    """
    cells: Dict[str, Cell]
    held_out: Dict[str, float]
    seeds: List[int]
    questions: Dict[str, Dict[str, Any]]
    label_curves: Dict[str, Dict[str, Dict[int, str]]]

    def digest(self, run: Run) -> str:
        """Return a digest of everything that determines the trained weights. A try and a final run may share one."""
        config = {**run.config(), 'held_out': self.held_out[run.cell.dataset]}
        if run.cell.init is not None:
            config['initial'] = self._settings(self.cells[run.cell.init])
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

    def _settings(self, cell: Cell) -> Dict[str, Any]:
        """Return everything that determines the weights of a cell, except the seed."""
        initial = None if cell.init is None else self._settings(self.cells[cell.init])
        return {**Run(cell, 0, 0, True).config(), 'recipe': cell.recipe, 'tries': cell.tries, 'initial': initial}


def read_protocol(path: Path = PROTOCOL) -> Protocol:
    """Read and check a protocol.

    Raises:
        ValueError: The file is not a valid protocol. The message names the cell and the problem.
    """
    text = yaml.safe_load(path.read_text(encoding='utf-8'))
    held_out = {name: float(entry['held_out']) for name, entry in text['datasets'].items()}
    cells: Dict[str, Cell] = {}
    for name, entry in text['cells'].items():
        unknown = sorted(entry.keys() - _CELL_KEYS)
        if unknown:
            raise ValueError(f'{path}: cell {name} has unknown keys {", ".join(unknown)}.')
        merged = {**text['defaults'], **entry}
        recipe = {**text['defaults']['recipe'], **entry.get('recipe', {})}
        recipe = {key: value for key, value in recipe.items() if value is not None}
        cell = Cell(
            name, merged['title'], merged['dataset'], merged['model'], merged.get('model_kwargs', {}),
            merged.get('attention', 'ssa'), merged.get('objective', 'classify'), merged.get('labels'),
            merged.get('init'), recipe, merged['tries'], merged.get('seeds', text['seeds']), merged.get('ships'))
        _check(cell, cells, held_out, path)
        cells[name] = cell
    questions = text.get('questions', {})
    for name, question in questions.items():
        claims = question['claims']
        used = {*question['rows'], *(cell for compared in claims.values() for cell in compared)}
        if not used <= cells.keys():
            raise ValueError(f'{path}: {name} uses cells that do not exist: {", ".join(sorted(used - cells.keys()))}.')
        for claim, compared in claims.items():
            if len(compared) not in (2, 4):
                raise ValueError(f'{path}: {name}: the claim {claim!r} needs 2 or 4 cells, got {len(compared)}.')
            for first, second in zip(compared[::2], compared[1::2]):
                a, b = cells[first], cells[second]
                if len(a.tries) != len(b.tries) or not a.seeds == b.seeds == cells[compared[0]].seeds:
                    raise ValueError(
                        f'{path}: {name} compares {first} and {second}. They must have the same seeds and the same '
                        f'number of tries.')
    return Protocol(cells, held_out, text['seeds'], questions, text.get('label_curves', {}))


def _check(cell: Cell, before: Dict[str, Cell], held_out: Dict[str, float], path: Path) -> None:
    problem = None
    if cell.dataset not in held_out:
        problem = f'dataset must be one of {", ".join(held_out)}, got {cell.dataset!r}'
    elif cell.attention not in _ATTENTIONS:
        problem = f'attention must be one of {", ".join(_ATTENTIONS)}, got {cell.attention!r}'
    elif cell.objective not in _OBJECTIVES:
        problem = f'objective must be one of {", ".join(_OBJECTIVES)}, got {cell.objective!r}'
    elif cell.init is not None and cell.init not in before:
        problem = f'init must name a cell above it, got {cell.init!r}'
    elif cell.init is not None and not set(cell.seeds) <= set(before[cell.init].seeds):
        problem = f'its initial cell {cell.init} must have all of its seeds, {cell.seeds}'
    elif not cell.tries or 0 not in cell.seeds:
        problem = 'at least one try and the seed 0 are required'
    if problem is not None:
        raise ValueError(f'{path}: cell {cell.name}: {problem}.')
