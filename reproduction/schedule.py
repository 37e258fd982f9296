"""Parallel execution of the missing runs of the study, each in a process with one thread."""
import fnmatch
import os
import subprocess
import sys
import time
from typing import Container, Dict, List, NamedTuple, Optional, Sequence

from .experiment import Study
from .protocol import Run

__all__ = ['Job', 'next_jobs', 'run_missing']

# Two processes with one thread each process more images per second than one process with two threads. The MALLOC
# variables make glibc keep freed memory, which saves about a tenth of the time of a training step.
_ENVIRONMENT = dict(
    OMP_NUM_THREADS='1', MALLOC_MMAP_MAX_='0', MALLOC_TRIM_THRESHOLD_=str(1 << 34), MALLOC_TOP_PAD_=str(1 << 28))


class Job(NamedTuple):
    """A run to execute. `weights_only`: the result exists, but another run needs the weights, which are missing."""
    run: Run
    weights_only: bool = False


def next_jobs(
        study: Study,
        patterns: Sequence[str] = ('*',),
        seeds: Optional[Container[int]] = None,
) -> List[Job]:
    """Return the missing runs that can start now, in the order of the protocol.

    Args:
        study: The study.
        patterns: Names of cells, or patterns such as `pretrained-*`. Cells that provide their initial weights are
            included.
        seeds: Seeds of the final runs; all seeds by default.
    """
    cells = study.protocol.cells
    wanted = {name for name in cells if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    for name in reversed(cells):
        if name in wanted and cells[name].init is not None:
            wanted.add(cells[name].init)
    jobs: Dict[str, Job] = {}
    for name in (name for name in cells if name in wanted):
        cell = cells[name]
        for run in [*study.tries(cell), *study.final_runs(cell)]:
            if study.result(run) is not None or run.is_final and seeds is not None and run.seed not in seeds:
                continue
            job: Optional[Job] = Job(run)
            if cell.init is not None and not study.has_weights(run):
                has_best_try = study.best_try(cells[cell.init]) is not None
                initial = study.initial_run(run) if has_best_try else None
                if initial is None or study.result(initial) is None:
                    job = None  # a job above must finish first
                elif not study.has_weights(initial):
                    job = Job(initial, weights_only=True)
            if job is not None:
                jobs.setdefault(study.protocol.digest(job.run), job)
    return list(jobs.values())


def run_missing(
        study: Study,
        patterns: Sequence[str],
        seeds: Optional[Container[int]],
        jobs: int,
        options: Sequence[str],
) -> List[str]:
    """Execute all missing runs, and return the names of the runs that failed.

    Args:
        study: The study.
        patterns: See `next_jobs`.
        seeds: See `next_jobs`.
        jobs: Number of processes.
        options: Command-line options with the folders, which are passed to each process.
    """
    running: Dict[str, subprocess.Popen] = {}
    failed: List[str] = []
    try:
        while True:
            waiting = [job for job in next_jobs(study, patterns, seeds) if job.run.name not in (*running, *failed)]
            if not running and not waiting:
                return failed
            for job in waiting[:jobs - len(running)]:
                print(f'{job.run.name}: started', flush=True)
                command = [sys.executable, '-m', 'reproduction', 'run-one', job.run.name, *options]
                if job.weights_only:
                    command.append('--weights-only')
                running[job.run.name] = subprocess.Popen(command, env={**os.environ, **_ENVIRONMENT})
            ended: List[str] = []
            while not ended:
                time.sleep(0.5)
                ended = [name for name, process in running.items() if process.poll() is not None]
            for name in ended:
                is_failed = running.pop(name).returncode != 0
                failed += [name] if is_failed else []
                print(f'{name}: {"failed" if is_failed else "done"}', flush=True)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
