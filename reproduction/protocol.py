"""Reader of `protocol.yaml`: cells, and the training runs of each cell."""
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Collection, Dict, List, NamedTuple, Optional, Tuple

import timm
import yaml

from timm_spikformer.arguments import check_integer
from timm_spikformer.training import Recipe, check_recipe

from .data import DATASETS, IMAGE_DATASETS, SPLITS

__all__ = ['PROTOCOL', 'SPIKFORMERS', 'Cell', 'Protocol', 'Run', 'read_protocol']

PROTOCOL = Path(__file__).with_name('protocol.yaml')
_REQUIRED = {'seeds', 'datasets', 'defaults', 'cells'}
_CELL_KEYS = {
    'title', 'dataset', 'model', 'model_kwargs', 'attention', 'objective', 'labels', 'init', 'recipe', 'tries', 'seeds',
    'ships', 'note'}
_RESERVED = {'img_size', 'num_classes', 'pretrained'}  # arguments of models that follow from the dataset
_RECIPE_KEYS = {*Recipe._fields} - {'seed'}  # the seed is that of the run
_RECIPE_REQUIRED = {*Recipe._fields} - {*Recipe._field_defaults}
SPIKFORMERS = frozenset(timm.list_models(module='spikformer'))  # names of models
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
        recipe: Fields of `timm_spikformer.training.Recipe`. In protocol.yaml, null removes a value of
            `defaults: recipe`, so that the default of `Recipe` is used.
        tries: Candidate changes to the recipe. The try with the highest validation accuracy with seed 0 is used for
            all seeds.
        seeds: Seeds of the final runs.
        ships: `MODEL.TAG` of the weights that the package includes from the final run with seed 0; None for most cells.
        note: One line that the model card of these weights shows; None for no line.
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
    note: Optional[str] = None

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
        attempt: Index of the try that the run uses (`try` is a keyword of Python).
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

    @property
    def splits(self) -> Tuple[str, ...]:
        """Splits on which the run is evaluated."""
        return ('validation', 'test') if self.is_final else ('validation',)

    def config(self) -> Dict[str, Any]:
        """Return the settings of the run, as stored in its result."""
        cell = self.cell
        return dict(
            dataset=cell.dataset, model=cell.model, model_kwargs=cell.model_kwargs, attention=cell.attention,
            objective=cell.objective, labels=cell.labels, init=cell.init,
            recipe={**cell.recipe_of(self.attempt), 'seed': self.seed})


class Protocol(NamedTuple):
    """Contents of `protocol.yaml`.

    Args:
        cells: Cells by name, in the order in which they are run.
        images: For each dataset, the numbers of images by split: 'train', 'validation' (held out from the training
            images) and 'test'; and, for datasets in files, `sha256`: the results of `Images.digest` for the splits
            'train' (before the validation images are held out) and 'test'.
        seeds: Default seeds of the final runs.
        questions: For each question, its title, text, `rows` (names of cells), `claims` (names of the two or four
            cells whose test accuracies are compared, by claim) and, once there are results, `conclusion`.
        label_curves: Curves of accuracy against the number of labels: panel, curve, number of labels, name of the cell.
    """
    cells: Dict[str, Cell]
    images: Dict[str, Dict[str, Any]]
    seeds: List[int]
    questions: Dict[str, Dict[str, Any]]
    label_curves: Dict[str, Dict[str, Dict[int, str]]]

    def digest(self, run: Run) -> str:
        """Return a digest of the settings that affect the trained weights, including those of the initial cells.

        A try and a final run may have the same digest. Changes to the code are not detected.
        """
        images = self.images[run.cell.dataset]
        held_out = images['validation'] / (images['train'] + images['validation'])
        config = {**run.config(), 'held_out': held_out}
        if run.cell.init is not None:
            config['initial'] = self._settings(self.cells[run.cell.init])
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

    def _settings(self, cell: Cell) -> Dict[str, Any]:
        """Return the settings that affect the weights of a cell, except the seed."""
        initial = None if cell.init is None else self._settings(self.cells[cell.init])
        return {**Run(cell, 0, 0, True).config(), 'recipe': cell.recipe, 'tries': cell.tries, 'initial': initial}


def read_protocol(path: Path = PROTOCOL) -> Protocol:
    """Read and check a protocol.

    Raises:
        ValueError: The file is not a valid protocol. The message names the cell and the problem.
    """
    try:
        return _read(path)
    except OSError as e:
        raise ValueError(f'{path} cannot be read: {e.strerror}.') from e
    except yaml.YAMLError as e:
        raise ValueError(f'{path} is not a YAML file: {" ".join(str(e).split())}.') from e
    except ValueError as e:
        raise ValueError(f'{path}: {e}') from e


class _Loader(yaml.SafeLoader):
    """Loader that rejects duplicate keys; PyYAML silently uses the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f'the key {key!r} appears twice in one mapping, at line {node.start_mark.line + 1}.')
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Protocol:
    try:
        content = yaml.load(path.read_text(encoding='utf-8'), _Loader)
    except (TypeError, LookupError, AttributeError, RecursionError) as e:  # of PyYAML, for wrong tags
        raise ValueError(f'it contains YAML that cannot be read: {e!r}.') from e
    _check_keys('the file', content, _REQUIRED, _REQUIRED | {'recipes', 'tries', 'questions', 'label_curves'})
    for key in ('datasets', 'cells', 'questions', 'label_curves'):
        _check_mapping(key, content.get(key, {}))
    for name, images in content['datasets'].items():
        _check_dataset(name, images)
    _check_keys('defaults', content['defaults'], {'recipe'}, _CELL_KEYS)
    cells: Dict[str, Cell] = {}
    for name, entry in content['cells'].items():
        try:
            cells[name] = _read_cell(name, entry, content, cells)
        except ValueError as e:
            raise ValueError(f'cell {name}: {e}') from e
    questions, curves = content.get('questions', {}), content.get('label_curves', {})
    for name, question in questions.items():
        _check_question(name, question, cells)
    _check_label_curves(curves, cells)
    return Protocol(cells, content['datasets'], content['seeds'], questions, curves)


def _check_dataset(name: Any, images: Any) -> None:
    if name not in DATASETS:
        raise ValueError(f'unknown dataset {name!r}, expected one of {", ".join(DATASETS)}.')
    has_files = name in IMAGE_DATASETS
    keys = {*SPLITS, 'sha256'} if has_files else {*SPLITS}
    _check_keys(f'dataset {name}', images, keys, keys)
    for split in SPLITS:
        check_integer(f'dataset {name}: {split}', images[split], 1)
    if has_files:
        _check_keys(f'dataset {name}: sha256', images['sha256'], {'train', 'test'}, {'train', 'test'})
        for split, digest in images['sha256'].items():
            if not isinstance(digest, str) or not re.fullmatch('[0-9a-f]{64}', digest):
                raise ValueError(
                    f'dataset {name}: the sha256 of {split} must be a string of 64 hexadecimal digits, got {digest!r}. '
                    f'If it is unknown, enter 64 zeros in quotes: `run` will report the actual one.')


def _read_cell(name: Any, entry: Any, content: Dict[str, Any], before: Dict[str, Cell]) -> Cell:
    """Return a cell.

    Args:
        name: Name of the cell.
        entry: Entry of the cell in the file.
        content: Parsed content of the file.
        before: Cells that are listed earlier in the file.
    """
    _check_keys('the entry', entry, {'title'}, _CELL_KEYS)
    merged = {**content['defaults'], **entry}
    for key in ('recipe', 'model_kwargs'):
        _check_mapping(key, merged.get(key, {}))
    recipe = {**content['defaults']['recipe'], **merged['recipe']}
    cell = Cell(**{
        'name': name, 'dataset': None, 'model': None, 'model_kwargs': {}, 'attention': 'ssa', 'objective': 'classify',
        'labels': None, 'init': None, 'tries': None, 'seeds': content['seeds'], **merged,
        'recipe': {key: value for key, value in recipe.items() if value is not None}})
    _check_names(cell, before)
    _check_model_and_data(cell, tuple(content['datasets']))
    _check_seeds(cell.seeds)
    _check_tries(cell)
    if cell.init is not None:
        _check_init(cell, before)
    return cell


def _check_names(cell: Cell, before: Dict[str, Cell]) -> None:
    for key, value in (('the name', cell.name), ('ships', cell.ships)):  # both are used as file names
        if value is not None and not (isinstance(value, str) and re.fullmatch(r'\w[\w.-]*', value)):
            raise ValueError(f'{key} must consist of letters, digits, ".", "_" and "-", got {value!r}.')
    if cell.ships is not None and (not cell.ships.startswith(f'{cell.model}.') or cell.model not in SPIKFORMERS):
        raise ValueError(f'ships must be MODEL.TAG with the model of the cell, a Spikformer, got {cell.ships!r}.')
    for other in before.values():
        if cell.ships is not None and cell.ships == other.ships:
            raise ValueError(f'ships is {cell.ships!r}, which cell {other.name} uses already.')
    _check_text('title', cell.title)
    if cell.note is not None:
        _check_text('note', cell.note)


def _check_model_and_data(cell: Cell, datasets: Collection[str]) -> None:
    for key, value, allowed in (
            ('dataset', cell.dataset, datasets),
            ('attention', cell.attention, _ATTENTIONS),
            ('objective', cell.objective, _OBJECTIVES)):
        if value not in allowed:
            raise ValueError(f'{key} must be one of {", ".join(allowed)}, got {value!r}.')
    if not isinstance(cell.model, str) or not timm.is_model(cell.model):
        raise ValueError(f'model must be the name of a timm model, got {cell.model!r}.')
    _check_json('model_kwargs', cell.model_kwargs)
    for key in _RESERVED & {*cell.model_kwargs}:
        raise ValueError(f'model_kwargs must not contain {key}, which the study sets.')
    if cell.labels is not None:
        check_integer('labels', cell.labels, 1)


def _check_tries(cell: Cell) -> None:
    _check_json('recipe', cell.recipe)
    if not isinstance(cell.tries, list) or not cell.tries:
        raise ValueError(f'tries must be a non-empty list, got {cell.tries!r}.')
    _check_json('tries', cell.tries)
    if 0 not in cell.seeds:
        raise ValueError(f'seeds must include 0, the seed of the tries, got {cell.seeds}.')
    if cell.objective == 'reconstruct' and len(cell.tries) > 1:
        raise ValueError("the objective 'reconstruct' allows one try only: tries are selected by validation accuracy.")
    for i, change in enumerate(cell.tries):
        _check_mapping(f'try {i}', change)
        _check_recipe(cell.recipe, change)


def _check_init(cell: Cell, before: Dict[str, Cell]) -> None:
    """Check the cell that provides the initial weights."""
    if not _is_cell(cell.init, before):
        raise ValueError(f'init must be a cell that is listed earlier in the file, got {cell.init!r}.')
    initial = before[cell.init]
    if not set(cell.seeds) <= set(initial.seeds):
        raise ValueError(f'seeds must be among those of {cell.init} ({initial.seeds}), got {cell.seeds}.')
    if cell.dataset != initial.dataset:
        raise ValueError(f'dataset must be that of {cell.init} ({initial.dataset}), got {cell.dataset}.')


def _check_json(key: str, value: Any) -> None:
    """Check that a value is the same after it was written to JSON, as in a result, and read."""
    try:
        is_json = json.loads(json.dumps(value, sort_keys=True)) == value
    except (TypeError, ValueError):
        is_json = False
    if not is_json:
        raise ValueError(f'{key} must consist of JSON values, got {value!r}.')


def _is_cell(value: Any, cells: Dict[str, Cell]) -> bool:
    return isinstance(value, str) and value in cells


def _check_text(name: str, value: Any) -> None:
    """Check a text that the report shows in a table."""
    if not isinstance(value, str) or not value or '|' in value or '\n' in value:
        raise ValueError(f'{name} must be a string of one line without "|", got {value!r}.')


def _check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f'{name} must be a mapping, got {value!r}.')


def _check_keys(name: str, value: Any, required: Collection[str], allowed: Collection[str]) -> None:
    """Check that a value is a mapping with all required and no unknown keys."""
    _check_mapping(name, value)
    unknown = sorted(str(key) for key in value if key not in allowed)
    missing = sorted(key for key in required if key not in value)
    for problem, keys in (('unknown keys', unknown), ('missing keys', missing)):
        if keys:
            raise ValueError(f'{name}: {problem}: {", ".join(keys)}.')


def _check_seeds(seeds: Any) -> None:
    """Check that seeds differ, because results of equal seeds would be counted as independent."""
    is_list = isinstance(seeds, list)
    for seed in seeds if is_list else ():
        if check_integer('each seed', seed, 0) >= 2 ** 32:
            raise ValueError(f'each seed must be less than 2 ** 32, got {seed}.')
    if not is_list or len({*seeds}) < len(seeds):
        raise ValueError(f'seeds must be a list of distinct integers, got {seeds!r}.')


def _check_recipe(recipe: Dict[str, Any], change: Dict[str, Any]) -> None:
    """Check the recipe of a try."""
    _check_keys('the recipe', {**recipe, **change}, _RECIPE_REQUIRED, _RECIPE_KEYS)
    factor = change.get('epochs')
    if isinstance(factor, str):
        if not re.fullmatch(r'[1-9]\d*x', factor):
            raise ValueError(f'epochs of a try must be an integer, or a factor such as 2x, got {factor!r}.')
        if 'warmup_epochs' in change:
            raise ValueError(f'a try with a factor ({factor}) of epochs also multiplies warmup_epochs. Omit it.')
        _check_keys('the recipe', recipe, {'epochs', 'warmup_epochs'}, _RECIPE_KEYS)
        change = {key: value for key, value in change.items() if key != 'epochs'}
    check_recipe(Recipe(**{**recipe, **change}))


def _check_question(name: str, question: Any, cells: Dict[str, Cell]) -> None:
    keys = {'title', 'text', 'rows', 'claims'}
    _check_keys(name, question, keys, keys | {'conclusion'})
    for key in {'title', 'text', 'conclusion'} & {*question}:
        if not isinstance(question[key], str):
            raise ValueError(f'{name}: {key} must be a string, got {question[key]!r}.')
    _check_mapping(f'{name}: claims', question['claims'])
    lists = [('rows', question['rows']), *question['claims'].items()]
    for key, names in lists:
        if not isinstance(names, list):
            raise ValueError(f'{name}: {key}: expected a list of cells, got {names!r}.')
        unknown = sorted(str(cell) for cell in names if not _is_cell(cell, cells))
        if unknown:
            raise ValueError(f'{name} uses cells that do not exist: {", ".join(unknown)}.')
    for claim, compared in question['claims'].items():
        _check_text(f'{name}: each claim', claim)
        if len(compared) not in (2, 4) or len({*compared}) < len(compared):
            raise ValueError(
                f'{name}: the claim {claim!r} must compare 2 different cells, or 2 differences of 4 cells, got '
                f'{", ".join(compared)}.')
        first = cells[compared[0]]
        for cell in (cells[other] for other in compared):
            if cell.objective == 'reconstruct':
                raise ValueError(f"{name}: {cell.name} cannot be compared: its objective is 'reconstruct'.")
            if len(cell.seeds) < 2:
                raise ValueError(f'{name}: {cell.name} cannot be compared: it has only one seed.')
            if (cell.dataset, cell.seeds) != (first.dataset, first.seeds):
                raise ValueError(
                    f'{name} compares {first.name} and {cell.name}. They must have the same dataset and seeds.')
        for a, b in zip(compared[::2], compared[1::2]):
            if len(cells[a].tries) != len(cells[b].tries):
                raise ValueError(f'{name} compares {a} and {b}. They must have the same number of tries.')


def _check_label_curves(curves: Dict[str, Any], cells: Dict[str, Cell]) -> None:
    for panel, lines in curves.items():
        _check_mapping(f'label_curves: {panel}', lines)
        for line, points in lines.items():
            where = f'label_curves: {panel}, {line}'
            _check_mapping(where, points)
            for count, name in points.items():
                check_integer(f'{where}: each number of labels', count, 1)
                cell = cells[name] if _is_cell(name, cells) else None
                if cell is None or cell.objective == 'reconstruct' or cell.labels not in (None, count):
                    raise ValueError(f'{where}: {name} is not a cell with {count} labels.')
