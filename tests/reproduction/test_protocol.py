"""The protocol of the study: its checks, and the settings of runs."""
import datetime

import pytest
import yaml
from small_study import TINY

from reproduction.protocol import Run, read_protocol

IMAGES = TINY['datasets']['fashion_mnist']


@pytest.mark.parametrize('change, message', [
    ({'cells': {'a': {'title': 'x', 'labelled': 3}}}, 'cell a: the entry: unknown keys: labelled'),
    ({'cells': {'a': {'title': 'x', 'init': 'b'}, 'b': {'title': 'y'}}}, "init must be a cell .* earlier .*, got 'b'"),
    ({'cells': {'a': {'title': 'x', 'note': 'a | b'}}}, 'note must be a string of one line without "|"'),
    ({'cells': {'a': {'title': 'x', 'attention': 'linear'}}}, "attention must be one of .*got 'linear'"),
    ({'cells': {'a': {'title': 'x', 'dataset': 'mnist'}}}, "dataset must be one of fashion_mnist, got 'mnist'"),
    ({'cells': {**TINY['cells'], 'scratch': {'title': 'x', 'tries': [{}]}}}, 'must have the same number of tries'),
    ({'questions': {'Q': {**TINY['questions']['Q'], 'rows': ['nothing']}}}, 'cells that do not exist: nothing'),
    ({'questions': {'Q': {**TINY['questions']['Q'], 'claims': {'it helps': ['mae']}}}}, 'must compare 2 .*mae'),
    ({'seeds': [0, 0, 1]}, r'cell mae: seeds must be a list of distinct integers, got \[0, 0, 1\]'),
    ({'seeds': [0]}, 'Q: tuned cannot be compared: it has only one seed'),
    ({'seeds': None}, 'cell mae: seeds must be a list'),
    ({'datasets': {'fashion_mnist': {**IMAGES, 'validation': 0}}}, 'integer of at least 1, got 0'),
    ({'datasets': {'mnist': {}}}, "unknown dataset 'mnist', expected one of fashion_mnist, "),
    ({'defaults': {'recipe': {}, 'attnetion': 'none'}}, 'defaults: unknown keys: attnetion'),
    ({'cells': {'a': {'title': 'x', 'recipe': {'lr': '1e-2'}}}}, "lr must be at least 0 and at most 1000, got '1e-2'"),
    ({'cells': {'a': {'title': 'x', 'tries': [{'lrr': 1}]}}}, 'cell a: the recipe: unknown keys: lrr'),
    ({'cells': {'a': {'title': 'x', 'tries': [{'epochs': '1.5x'}]}}}, 'or a factor such as 2x, got .1.5x'),
    ({'cells': {'a': {'title': 'x', 'tries': [{'epochs': '2x', 'warmup_epochs': 1}]}}}, 'multiplies warmup_epochs'),
    ({'datasets': {**TINY['datasets'], 'simulated_events': {'train': 1, 'validation': 1, 'test': 1}},
      'cells': {'a': {'title': 'x'}, 'b': {'title': 'y', 'init': 'a', 'dataset': 'simulated_events'}}},
     r'dataset must be that of a \(fashion_mnist\), got simulated_events'),
    ({'cells': {'a': {'title': 'x', 'seeds': [0]}, 'b': {'title': 'y', 'init': 'a'}}},
     r'seeds must be among those of a \(\[0\]\), got \[0, 1\]'),
    ({'cells': {'a': {'title': 'x', 'labels': 0}}}, 'cell a: labels must be an integer of at least 1, got 0'),
    ({'cells': {'a': {'title': 'x', 'model': 'nothing'}}}, "model must be the name of a timm model, got 'nothing'"),
    ({'datasets': {'fashion_mnist': {**IMAGES, 'sha256': {**IMAGES['sha256'], 'test': 'a1'}}}},
     "sha256 of test must be a string of 64 hexadecimal digits, got 'a1'. If it is unknown"),
    ({'datasets': {'fashion_mnist': {key: IMAGES[key] for key in ('train', 'validation', 'test')}}},
     'dataset fashion_mnist: missing keys: sha256'),
    ({'cells': {'../a': {'title': 'x'}}}, 'the name must consist of letters, digits, .*, got ....a'),
    ({'cells': {'a': {'title': 'x', 'objective': 'reconstruct'}}}, "'reconstruct' allows one try only"),
    ({'cells': {'a': {}}}, 'cell a: the entry: missing keys: title'),
    ({'cells': [1]}, r'cells must be a mapping, got \[1\]'),
    ({'questions': {'Q': {**TINY['questions']['Q'], 'conclusion': None}}}, 'Q: conclusion must be a string, got None'),
    ({'questions': {'Q': {**TINY['questions']['Q'], 'claims': {5: ['mae', 'tuned']}}}}, 'must be a string .*, got 5'),
    ({'cells': {'a': {'title': 5}}}, 'title must be a string of one line .*, got 5'),
    ({'cells': {'a': {'title': 'x', 'model_kwargs': {1: 2}}}}, r'must consist of JSON values, got \{1: 2\}'),
    ({'cells': {'a': {'title': 'x', 'model_kwargs': {'a': datetime.date(2026, 1, 1)}}}}, 'model_kwargs must'),
    ({'cells': {'a': {'title': 'x', 'model_kwargs': {'img_size': 32}}}}, 'must not contain img_size, which the study'),
    ({'cells': {'a': {'title': 'x|y'}}}, r'title must be a string of one line without "\|", got .x|y'),
    ({'cells': {'a': {'title': 'x', 'ships': 'spikformer_v2_2_128_patch4_32.a'}}}, 'ships must be MODEL.TAG with the'),
    ({'cells': {'a': {'title': 'x', 'model': 'vit_tiny_patch16_224', 'ships': 'vit_tiny_patch16_224.a'}}},
     'ships must be MODEL.TAG with the model of the cell, a Spikformer'),
    ({'cells': {'a': {'title': 'x', 'seeds': [0, 2 ** 32]}}}, 'each seed must be less than 2 [*][*] 32'),
    ({'cells': {'a': {'title': 'x', 'recipe': {'bf16': 'no'}}}}, "bf16 must be True or False, got 'no'"),
    ({'questions': {'Q': {}}}, 'Q: missing keys: claims, rows, text, title'),
    ({'label_curves': {'a': {'b': {50: 'scratch'}}}}, 'scratch is not a cell with 50 labels'),
    ({'lable_curves': {}}, 'the file: unknown keys: lable_curves'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_bad_protocols(change, message, tmp_path):
    path = tmp_path / 'x.yaml'
    text = {**TINY, **change}
    if 'scratch' not in text['cells']:
        text['questions'] = {}
    path.write_text(yaml.safe_dump(text))
    with pytest.raises(ValueError, match=message):
        read_protocol(path)


@pytest.mark.parametrize('content, message', [
    ('a: [1', 'x.yaml is not a YAML file: .*expected'), ('', 'the file must be a mapping, got None'),
    ('a: 1\nb: 2\na: 3', "the key 'a' appears twice"), ('!!map [1]', 'x.yaml: it contains YAML that cannot be read'),
    ('[' * 10 ** 4, 'x.yaml: it contains YAML that cannot be read: RecursionError'),
    (None, 'x.yaml cannot be read: No such file')], ids=lambda value: repr(value)[:40])
def test_files_that_are_not_protocols(content, message, tmp_path):
    if content is not None:
        (tmp_path / 'x.yaml').write_text(content)
    with pytest.raises(ValueError, match=message):
        read_protocol(tmp_path / 'x.yaml')


def test_compared_cells_have_equal_conditions():
    """Compared cells have the same seeds, number of tries and training images."""
    protocol = read_protocol()
    compared = [cells for question in protocol.questions.values() for cells in question['claims'].values()]
    pairs = [pair for cells in compared for pair in zip(cells[::2], cells[1::2])]
    assert pairs
    for a, b in pairs:
        first, second = protocol.cells[a], protocol.cells[b]
        assert (len(first.tries), first.seeds, first.dataset) == (len(second.tries), second.seeds, second.dataset)
        if {a, b} != {'time-steps-1-to-4', 'time-steps-4'}:
            assert first.labels == second.labels


def test_null_removes_a_default_of_the_recipe(tmp_path):
    text = {**TINY, 'questions': {}, 'cells': {
        'mae': {'title': 'x', 'recipe': {'weight_decay': 0.5}},
        'other': {'title': 'y', 'recipe': {'weight_decay': None}}}}
    (tmp_path / 'x.yaml').write_text(yaml.safe_dump(text))
    cells = read_protocol(tmp_path / 'x.yaml').cells
    assert cells['mae'].recipe['weight_decay'] == 0.5
    assert cells['other'].recipe.keys() == cells['mae'].recipe.keys() - {'weight_decay'}


def test_doubled_epochs_double_the_warmup(study):
    recipe = study.protocol.cells['scratch'].recipe_of(1)
    assert recipe['epochs'] == 6 and recipe['warmup_epochs'] == 0.5
    assert study.protocol.cells['scratch'].recipe_of(0)['epochs'] == 3


def test_changed_pretraining_invalidates_results_that_start_from_it(study):
    cells, digest = study.protocol.cells, study.protocol.digest
    tuned, scratch = (Run(cells[name], 0, 0, True) for name in ('tuned', 'scratch'))
    before = digest(tuned), digest(scratch)
    cells['mae'].recipe['epochs'] += 1
    assert digest(tuned) != before[0] and digest(scratch) == before[1]
