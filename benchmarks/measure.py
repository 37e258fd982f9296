"""Ratios of interleaved timings; peak memory of a function, measured in a separate process."""
import ctypes
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Callable, Dict, List, NamedTuple

import torch


class Ratio(NamedTuple):
    """Median and quartiles of the ratios of all rounds."""
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.median:.2f} ({self.low:.2f} to {self.high:.2f})'


def clock() -> float:
    """Return the time in seconds: with one thread, CPU time, which other load affects less; otherwise wall time.

    If CUDA is in use, it is the wall time after all kernels have finished.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def interleave(functions: Dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> Dict[str, List[float]]:
    """Return the times in seconds of each function, one per round.

    Functions run in turn within a round, so that other load on the machine affects all of them equally.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: Dict[str, List[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return times


def ratio(times: List[float], of: List[float]) -> Ratio:
    """Return the median and quartiles of the per-round ratios `times / of`."""
    ratios = sorted(a / b for a, b in zip(times, of, strict=True))
    quarter = len(ratios) // 4
    return Ratio(statistics.median(ratios), ratios[quarter], ratios[-1 - quarter])


def peak_memory(make: Callable[..., Callable[[], object]], *arguments: object) -> float:
    """Return the peak memory in MiB that a function needs, measured in a new process.

    The process calls `make(*arguments)`, then calls the function that it returns twice. Only the memory growth during
    these two calls counts.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['benchmarks.model', 'sklearn.datasets'])  # imported once, for all processes
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_memory_growth, make, *arguments).result()


def _memory_growth(make: Callable[..., Callable[[], object]], *arguments: object) -> float:
    # M_MMAP_THRESHOLD: return freed memory to the system immediately, so that heap fragmentation does not count
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    function = make(*arguments)
    before = _read_status_mib('VmRSS')
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')  # reset the peak, so that building the model does not count
    function()
    function()
    return _read_status_mib('VmHWM') - before


def _read_status_mib(key: str) -> float:
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) for line in f if line.startswith(f'{key}:')) / 1024
