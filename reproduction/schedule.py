"""Parallel execution of the missing runs of the study, each in a process with one thread."""
import fnmatch
import os
import subprocess
import sys
import time
from typing import Collection, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from .experiment import Study
from .protocol import Run

__all__ = ['Job', 'next_jobs', 'run_missing']

# Two processes with one thread each have a higher throughput in total than one process with two threads. The MALLOC
# variables make glibc keep freed memory, which saves about a tenth of the time of a training step.
_ENVIRONMENT = dict(
    OMP_NUM_THREADS='1', MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_=str(1 << 34), MALLOC_TOP_PAD_=str(1 << 28))


class Job(NamedTuple):
    """A run to execute. `weights_only`: train missing weights that another run needs, and keep the existing result."""
    run: Run
    weights_only: bool = False


def next_jobs(
        study: Study,
        patterns: Sequence[str] = ('*',),
        seeds: Optional[Collection[int]] = None,
) -> List[Job]:
    """Return the jobs that can start now: missing runs, or the training of initial weights that they need.

    The jobs have the order of the protocol.

    Args:
        study: The study.
        patterns: Names of cells, or patterns such as `pretrained-*`. The initial cells of the selected cells are
            included.
        seeds: Seeds of the final runs; all seeds by default. Runs with seed 0 that provide the initial weights of tries
            are included.

    Raises:
        ValueError: A pattern matches no cell, or one of the seeds is not used by any selected cell.
    """
    cells = study.protocol.cells
    wanted = _select_cells(study, patterns, seeds or ())
    with_seed_0 = set()  # cells whose final run with seed 0 provides initial weights of tries
    for name in reversed(cells):  # each cell is listed after its initial cell
        if name in wanted and cells[name].init is not None:
            wanted.add(cells[name].init)
            if study.tries(cells[name]) or name in with_seed_0:
                with_seed_0.add(cells[name].init)
    jobs: Dict[str, Job] = {}
    for name in (name for name in cells if name in wanted):
        cell = cells[name]
        for run in [*study.tries(cell), *study.final_runs(cell)]:
            if study.result(run) is not None:
                continue
            if run.is_final and not (seeds is None or run.seed in seeds or (run.seed == 0 and name in with_seed_0)):
                continue
            job = _job_for(study, run)
            if job is not None:  # runs with the same digest share a checkpoint folder, so only one of them may start
                jobs.setdefault(study.protocol.digest(job.run), job)
    return list(jobs.values())


def _select_cells(study: Study, patterns: Sequence[str], seeds: Collection[int]) -> Set[str]:
    """Return the names of the cells that match a pattern; check patterns and seeds."""
    cells = study.protocol.cells
    names = set()
    for pattern in patterns:
        matching = fnmatch.filter(cells, pattern)
        if not matching:
            raise ValueError(f'No cell matches {pattern!r}. Cells: {", ".join(cells)}.')
        names.update(matching)
    for seed in seeds:
        if not any(seed in cells[name].seeds for name in names):
            raise ValueError(f'None of the selected cells has the seed {seed}.')
    return names


def _job_for(study: Study, run: Run) -> Optional[Job]:
    """Return the job to start for a missing run; None if its initial run has to finish first."""
    init = run.cell.init
    if init is None or study.has_weights(run):
        return Job(run)
    if study.best_try(study.protocol.cells[init]) is None:
        return None
    initial = study.initial_run(run)
    if study.result(initial) is None:
        return None
    return Job(run) if study.has_weights(initial) else Job(initial, weights_only=True)


def run_missing(
        study: Study,
        patterns: Sequence[str],
        seeds: Optional[Collection[int]],
        jobs: int,
        options: Sequence[str],
) -> List[str]:
    """Execute all missing runs, and return the names of the runs that failed.

    Args:
        study: The study.
        patterns: See `next_jobs`.
        seeds: See `next_jobs`.
        jobs: Number of processes.
        options: Command-line options that are passed to each process: protocol, folders and device.

    Raises:
        ValueError: A dataset is missing or incomplete. See also `next_jobs`.
    """
    running: Dict[str, Tuple[Job, subprocess.Popen]] = {}
    failed: List[str] = []
    has_started = False
    checked = set()
    for job in next_jobs(study, patterns, seeds):  # a missing dataset is reported before the first run
        if job.run.cell.dataset not in checked:
            study.read_data(job.run)
            checked.add(job.run.cell.dataset)
    try:
        while True:
            waiting = [job for job in next_jobs(study, patterns, seeds) if job.run.name not in (*running, *failed)]
            if not running and not waiting:
                if not has_started:
                    print(f'There are no missing runs. To repeat a run, remove its result from {study.runs}.')
                return failed
            has_started = True
            for job in waiting[:jobs - len(running)]:
                print(f'{job.run.name}: started', flush=True)
                running[job.run.name] = job, _start(job, options)
            ended: List[str] = []
            while not ended:
                time.sleep(0.5)
                ended = [name for name, (_, process) in running.items() if process.poll() is not None]
            for name in ended:
                job, process = running.pop(name)
                outcome = _outcome(study, job, process)
                if outcome != 'done':  # it is not started again
                    failed.append(name)
                print(f'{name}: {outcome}', flush=True)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _start(job: Job, options: Sequence[str]) -> subprocess.Popen:
    command = [sys.executable, '-m', 'reproduction', 'run-one', job.run.name, *options]
    if job.weights_only:
        command.append('--weights-only')
    return subprocess.Popen(command, env={**os.environ, **_ENVIRONMENT})


def _outcome(study: Study, job: Job, process: subprocess.Popen) -> str:
    if process.returncode != 0:
        return 'failed'
    is_done = study.has_weights(job.run) if job.weights_only else study.result(job.run) is not None
    return 'done' if is_done else 'failed: the protocol has been changed during the run'
