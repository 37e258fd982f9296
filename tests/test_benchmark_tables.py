"""Tests of the results, tables and plots of `benchmarks`."""
import json

import pytest

from benchmarks import __main__ as command
from benchmarks import plot
from benchmarks.results import EventResults, describe_environment, read_results, write_results
from benchmarks.tables import FOLDER, RESULTS, events_tables, update


@pytest.fixture
def results():
    return read_results(RESULTS)


def _scaling(steps=('training step', 'inference'), axes=('time steps', 'batch size')):
    fit = dict(slope=1., fixed=0., each=1., bend=1.)
    curves = [
        dict(step=step, axis=axis, x=[1, 2], seconds=dict(y=[1., 2.], **fit), mib=dict(y=[10., 15.], **fit))
        for step in steps for axis in axes]
    return dict(base=dict(name='a_model', time_steps=1, batch_size=1, size=64, depth=2), curves=curves)


def test_readme_tables_match_committed_results(results):
    readme = (FOLDER / 'README.md').read_text(encoding='utf-8')
    assert update(readme, results) == readme and events_tables(results) in readme


def test_results_round_trip(results, tmp_path):
    events = EventResults.from_json(results['events'])
    assert {row.rate for row in events.layers} == {0.05, 0.08, 0.12, 0.2, 0.3, 0.45}
    write_results(tmp_path / 'x.json', {**results, 'events': events.to_json()})
    assert read_results(tmp_path / 'x.json') == results


def test_tables_have_a_column_per_rate(results):
    text = events_tables(results)
    row = next(row for row in EventResults.from_json(results['events']).models if row.target_rate == 0.13)
    line = next(line for line in text.splitlines() if f'{row.model} | {row.time_steps} |' in line)
    head = next(line for line in text.splitlines() if line.startswith('| model | T | batch size | step | impl'))
    columns = dict(zip(head.split(' | '), line.split(' | ')))
    assert columns['0.13'] == f'{row.events:.2f}'


@pytest.mark.parametrize('count', [0, 2])
def test_readme_without_exactly_one_section_raises(results, count):
    readme = (FOLDER / 'README.md').read_text(encoding='utf-8')
    section = readme[readme.index('<!-- events:'):]
    with pytest.raises(ValueError, match='once each'):
        update('# Title\n' + count * section, results)


def test_unusable_results_raise(results, tmp_path):
    with pytest.raises(ValueError, match='do not contain the group events'):
        events_tables({'environment': {}})
    with pytest.raises(ValueError, match='results of --quick'):
        events_tables({**results, 'quick': True})
    del results['events']['layers'][0]['fused']
    with pytest.raises(ValueError, match='a row of layers must have the keys layer, rate, product, fused, '):
        events_tables(results)
    for content in ('{', '[]', '{"torch": "2.0"}'):
        (tmp_path / 'x.json').write_text(content, encoding='utf-8')
        with pytest.raises(ValueError, match=r'x\.json'):
            read_results(tmp_path / 'x.json')


def test_environment_names_cpu_threads_and_versions():
    environment = describe_environment(3)
    assert environment['threads'] == 3 and environment['CPU'] and {'torch', 'numba', 'Python'} <= set(environment)


def test_plot_chooses_the_group(results, tmp_path, capsys):
    files = {
        'events': results, 'scaling': dict(environment=results['environment'], scaling=_scaling()),
        'both': {**results, 'scaling': _scaling()}, 'neither': dict(environment={})}
    for name, content in files.items():
        (tmp_path / f'{name}.json').write_text(json.dumps(content), encoding='utf-8')
    for name, *option in (('events',), ('scaling',), ('both', '--group', 'scaling')):
        plot.main([str(tmp_path / f'{name}.json'), str(tmp_path / f'{name}.svg'), *option])
        text = (tmp_path / f'{name}.svg').read_text(encoding='utf-8')
        assert ('<!-- a_model, T = 1, batch size 1, 64x64' in text) == (name != 'events')
        assert ('<!-- spikformer_v2_8_512, T = 4, batch size 1, 1 thread -->' in text) == (name == 'events')
    for arguments, message in (
            (['both.json'], "contains both 'scaling' and 'events': choose one with --group"),
            (['neither.json'], "contains neither 'scaling' nor 'events'"),
            (['events.json', '--group', 'scaling'], "does not contain 'scaling'"),
            (['missing.json'], 'missing.json'),
    ):
        with pytest.raises(SystemExit):
            plot.main([str(tmp_path / arguments[0]), str(tmp_path / 'x.svg'), *arguments[1:]])
        assert message in capsys.readouterr().err and not (tmp_path / 'x.svg').exists()


@pytest.mark.parametrize('arguments, message', [
    (['speed'], "unknown group 'speed', expected one of neuron, "),
    (['neuron', '--plot', 'x.png'], '--plot requires the group scaling'),
    (['neuron', '--json', 'missing/x.json'], 'missing/x.json: expected a file in an existing folder'),
])
def test_command_line_errors(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
