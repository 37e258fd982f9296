"""Statistics and report of the study."""
import re

import matplotlib
import numpy as np
import pytest
import yaml
from scipy import stats
from small_study import pretend

from reproduction.experiment import Study
from reproduction.protocol import Run, read_protocol
from reproduction.report import FOLDER, write_report
from reproduction.statistics import paired_difference, summarize


def test_committed_report_matches_committed_runs(tmp_path):
    with matplotlib.rc_context({'lines.linewidth': 4}):  # the settings of the user have no effect
        write_report(read_protocol(), FOLDER / 'runs', tmp_path)
    assert (tmp_path / 'README.md').read_bytes() == (FOLDER / 'README.md').read_bytes()
    for path in (tmp_path / 'figures').iterdir():
        committed = (FOLDER / 'figures' / path.name).read_bytes()
        version = re.search(rb'Matplotlib v([\d.]+)', committed)[1].decode()
        if version == matplotlib.__version__:  # the output differs between versions
            assert path.read_bytes() == committed, path.name


def test_interval_matches_scipy():
    a, b = [90.1, 90.9, 89.7], [89.9, 90.2, 89.8]
    ours = paired_difference(a, b)
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    assert ours.mean == pytest.approx(np.mean(a) - np.mean(b)) and ours.count == 3 and not ours.excludes_zero
    # by hand: differences 1, 2, 3 have mean 2 and standard deviation 1, and t(0.975, 2) = 4.303
    margin = 4.303 / 3 ** 0.5
    assert paired_difference([1, 2, 3], [0, 0, 0])[:3] == pytest.approx((2, 2 - margin, 2 + margin), abs=1e-3)
    for pair in ([1, 1.1, 1.2], [0, 0, 0]), ([0, 0, 0], [1, 1.1, 1.2]):
        assert paired_difference(*pair).excludes_zero
    assert summarize([1, 2, 3]).deviation == pytest.approx(np.std([1, 2, 3], ddof=1))
    with pytest.raises(ValueError, match='got 1 and 1 values'):
        paired_difference([1], [2])


def pretend_final_runs(study: Study, **accuracies) -> None:
    """Write results of all tries and final runs of cells; `accuracies` are the test accuracies by seed."""
    for name, values in accuracies.items():
        cell = study.protocol.cells[name]
        for run in study.tries(cell):
            pretend(study, run, validation=dict(accuracy=50.), cpu_seconds=1800.)
        for run, accuracy in zip(study.final_runs(cell), values):
            pretend(study, run, cpu_seconds=1800., test=dict(accuracy=accuracy))


@pytest.mark.parametrize('name', ['README.md', 'figures/energy.svg'])
def test_report_does_not_replace_other_files(name, study, tmp_path):
    folder = tmp_path / 'project'
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text('mine')
    with pytest.raises(ValueError, match=f'{name} was not written by `python -m reproduction report`'):
        write_report(study.protocol, FOLDER / 'runs', folder)
    assert [path.read_text() for path in folder.rglob('*.*')] == ['mine']


@pytest.mark.parametrize('name, message', [
    ('figures', 'figures is not a folder'), ('README.md', 'README.md was not written by')])
def test_links_are_not_replaced(name, message, study, tmp_path):
    (tmp_path / name).symlink_to('nowhere')
    with pytest.raises(ValueError, match=message):
        write_report(study.protocol, FOLDER / 'runs', tmp_path)
    assert (tmp_path / name).is_symlink() and not (tmp_path / 'README.md').exists()


def test_report_replaces_an_earlier_report(study, tmp_path):
    write_report(study.protocol, FOLDER / 'runs', tmp_path)
    before = (tmp_path / 'README.md').read_bytes()
    pretend_final_runs(study, scratch=(79., 79.5))
    write_report(study.protocol, study.runs, tmp_path)
    assert (tmp_path / 'README.md').read_bytes() != before


def test_report_of_incomplete_study(study, tmp_path):
    pretend_final_runs(study, tuned=(80., 81.), scratch=(79., 79.5))
    old = Run(study.protocol.cells['mae']._replace(labels=5), 0, 0, True)  # a result of settings that have been changed
    pretend(study, old, cpu_seconds=9000.)
    write_report(study.protocol, study.runs, tmp_path)
    text = (tmp_path / 'README.md').read_text()
    assert 'mae 0/2' in text and '80.50 ± 0.71' in text
    # a try and a final run with the same seed and settings count once: 2 cells, 3 trainings each, half an hour each
    assert 'took 3.0 CPU hours' in text
    interval = stats.ttest_rel([80., 81.], [79., 79.5]).confidence_interval(0.95)
    assert (
        f'- It helps: **not shown** (+1.25 points, 95% interval {interval.low:+.2f} to {interval.high:+.2f})'
        in text)
    assert '| It helps | not shown |' in text and 'of 2 seeds' not in text
    study.result_path(study.final_runs(study.protocol.cells['tuned'])[1]).unlink()
    write_report(study.protocol, study.runs, tmp_path)
    assert '80.00 (1 of 2 seeds) |' in (tmp_path / 'README.md').read_text()


def test_time_on_gpus_is_reported_separately(study, tmp_path):
    """The last two of the three epochs of a run were trained on a GPU."""
    run = study.tries(study.protocol.cells['scratch'])[0]
    epochs = [dict(loss=1., seconds=1800., cpu_seconds=1800.)]
    epochs += [dict(loss=1., seconds=s, gpu='NVIDIA X') for s in (90., 60.)]
    pretend(study, run, cpu_seconds=1800., history=epochs)
    write_report(study.protocol, study.runs, tmp_path)
    text = (tmp_path / 'README.md').read_text()
    assert 'took 0.5 CPU hours in total (one thread per process) and 2.5 minutes on one NVIDIA X, without' in text


@pytest.mark.parametrize('tuned, verdict', [
    ((80., 80.5), 'shown'), ((78., 78.5), 'contradicted'), ((80., 79.), 'not shown'), ((80.,), 'runs are missing'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_verdict(tuned, verdict, study, tmp_path):
    pretend_final_runs(study, tuned=tuned, scratch=(79., 79.51))
    write_report(study.protocol, study.runs, tmp_path)
    assert f'- It helps: **{verdict}**' in (tmp_path / 'README.md').read_text()


def test_difference_of_differences(study, tmp_path):
    text = yaml.safe_load((tmp_path / 'protocol.yaml').read_text())
    text['cells'].update(deep=dict(title='deep, scratch'), tuned_deep=dict(title='deep, pre-trained', init='mae'))
    text['questions']['Q']['claims'] = {'it helps more': ['tuned_deep', 'deep', 'tuned', 'scratch']}
    (tmp_path / 'protocol.yaml').write_text(yaml.safe_dump(text, sort_keys=False))
    study = study._replace(protocol=read_protocol(tmp_path / 'protocol.yaml'))
    pretend_final_runs(study, tuned_deep=(86., 87.), deep=(80., 82.), tuned=(81., 83.), scratch=(79., 81.5))
    write_report(study.protocol, study.runs, tmp_path)
    low, high = stats.ttest_rel([6., 5.], [2., 1.5]).confidence_interval(0.95)  # 4, 3.5
    line = f'- It helps more: **shown** (+3.75 points, 95% interval {low:+.2f} to {high:+.2f})'
    assert line in (tmp_path / 'README.md').read_text()


def test_settings_after_a_change_of_the_order_of_tries(study, tmp_path):
    """A try that has been removed from the protocol does not matter, either."""
    cell = study.protocol.cells['scratch']
    cell.tries[:] = [{'lr': 0.5}, {'lr': 0.25}, {'lr': 0.125}]
    pretend_final_runs(study, scratch=(79., 79.5))
    best = Run(cell, 2, 0, False)
    pretend(study, best, validation=dict(accuracy=60.))
    for run in study.final_runs(cell):
        pretend(study, run)
    del cell.tries[1]
    for attempt, accuracy in ((0, 50.), (1, 60.)):
        pretend(study, Run(cell, attempt, 0, False), validation=dict(accuracy=accuracy))
    write_report(study.protocol, study.runs, tmp_path)
    text = (tmp_path / 'README.md').read_text()
    assert '| scratch | 50.00 ± 0.00 |' in text and '| lr 0.125, 3 epochs |' in text


def test_results_of_other_images_are_ignored(study, tmp_path):
    """The digest of the settings contains the fraction of validation images only."""
    pretend_final_runs(study, tuned=(80., 81.), scratch=(79., 79.5))
    study.protocol.images['fashion_mnist'].update(train=570, validation=30)
    write_report(study.protocol, study.runs, tmp_path)
    assert '80.50' not in (text := (tmp_path / 'README.md').read_text()) and 'scratch 0/2' in text
