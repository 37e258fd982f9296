"""The order of runs, and resuming after kills."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from small_study import pretend, without_times

from reproduction import schedule
from reproduction.protocol import Run, read_protocol
from reproduction.report import write_report


def test_order_of_jobs(study):
    """Tries run before final runs, and runs before those that start from their weights; the best try is selected."""
    def names(*patterns):
        jobs = schedule.next_jobs(study, patterns or ('*',))
        return [job.run.name + (' weights' if job.weights_only else '') for job in jobs]

    assert names() == ['mae/seed-0', 'mae/seed-1', 'scratch/try-0', 'scratch/try-1']
    assert names('tuned') == ['mae/seed-0', 'mae/seed-1']
    assert [job.run.name for job in schedule.next_jobs(study, ['mae'], seeds=[1])] == ['mae/seed-1']
    cells = study.protocol.cells
    for run in study.final_runs(cells['mae']):
        pretend(study, run)
    assert names('tuned') == ['mae/seed-0 weights']
    study.checkpoint_folder(Run(cells['mae'], 0, 0, True)).mkdir(parents=True)
    for name in ('last.pth.tar', 'finished'):
        (study.checkpoint_folder(Run(cells['mae'], 0, 0, True)) / name).touch()
    assert names('tuned') == ['tuned/try-0', 'tuned/try-1']
    for run, accuracy in zip(study.tries(cells['tuned']), (70., 71.)):
        assert study.final_runs(cells['tuned']) == []
        pretend(study, run, validation=dict(accuracy=accuracy))
    assert [run.attempt for run in study.final_runs(cells['tuned'])] == [1, 1]
    assert names('tuned') == ['tuned/seed-0', 'mae/seed-1 weights']
    for run in study.final_runs(cells['tuned']):
        pretend(study, run)
    assert names('tuned') == []
    other = read_protocol(study.runs.parent / 'protocol.yaml')
    other.cells['tuned'].recipe['lr'] = 0.5  # results of other settings are ignored
    assert study._replace(protocol=other).result(Run(other.cells['tuned'], 1, 0, True)) is None


def test_tries_with_other_seeds_require_seed_0_of_the_initial_cell(study):
    names = [job.run.name for job in schedule.next_jobs(study, ['tuned'], seeds=[1])]
    assert names == ['mae/seed-0', 'mae/seed-1']


@pytest.mark.slow
def test_killed_study_resumes(study, tmp_path):
    """After two SIGKILLs at arbitrary times, results and report equal those of an uninterrupted study."""
    def command(folder):
        return [
            sys.executable, '-m', 'reproduction', 'run', '--jobs', '2', '--protocol', str(tmp_path / 'protocol.yaml'),
            '--runs', str(folder / 'runs'), '--checkpoints', str(folder / 'checkpoints'), '--data', str(study.data)]

    env = dict(os.environ, OMP_NUM_THREADS='1')
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    subprocess.run(command(whole), env=env, check=True)
    for seconds in (17, 23):
        process = subprocess.Popen(command(killed), env=env, start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command(killed), env=env, check=True)

    def results(folder):
        return {
            str(path.relative_to(folder)): without_times(json.loads(path.read_text()))
            for path in (folder / 'runs').rglob('*.json')}

    assert len(results(whole)) == 2 + 2 * 4 and results(killed) == results(whole)
    for folder in (whole, killed):
        write_report(study.protocol, folder / 'runs', folder)
    assert ' points, 95% interval ' in (whole / 'README.md').read_text()

    def text(folder):
        return [line for line in (folder / 'README.md').read_text().splitlines() if 'CPU hours' not in line]
    assert text(whole) == text(killed)
