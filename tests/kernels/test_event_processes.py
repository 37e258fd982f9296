"""Event-driven products in other processes: forks, threads, caches on disk, and environments without numba."""
import os
import subprocess
import sys
import textwrap

import pytest


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=120,
        env=dict(os.environ, **env))


PREPARE = """
    import os, sys, threading, time
    import numpy as np, torch
    from torch import nn
    from timm_spikformer.kernels import events
    torch.set_num_threads(2)
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 64, 3, padding=1)
    x = torch.from_numpy((np.random.default_rng(0).random((8, 14, 14, 32)) < 0.2).astype(np.float32))
    x = x.permute(0, 3, 1, 2)
    @torch.no_grad()
    def product():
        events.MIN_MACS = 0
        counted = events.try_read_events(layer, x)
        return 'dense' if counted is None else f'{events.convolve(layer, x, counted).sum():.3f}'
"""


def run_script(code, **env):
    return run_python(textwrap.dedent(PREPARE) + textwrap.dedent(code), PYTHONWARNINGS='ignore', **env)


SCRIPT = """
    import multiprocessing, sys
    import numpy as np
    import torch
    from torch import nn
    from timm_spikformer.kernels import events

    def product(_=None):
        # PyTorch's own parallel operators hang in forked processes, so the tensors are small or from NumPy
        torch.manual_seed(0)
        layer = nn.Conv2d(32, 64, 3, padding=1)
        x = (np.random.default_rng(0).random((8, 14, 14, 32)) < 0.2).astype(np.float32)
        x = torch.from_numpy(x).permute(0, 3, 1, 2)
        with torch.no_grad():
            return events.convolve(layer, x, events.read_events(layer, x)).numpy().sum()

    if __name__ == '__main__':
        torch.set_num_threads(2)
        expected = product()
        with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
            assert pool.map(product, range(4)) == [expected] * 4
        print('equal')
"""


@pytest.mark.parametrize('method', ['fork', 'spawn', pytest.param('forkserver', marks=pytest.mark.slow)])
def test_child_processes(method, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(textwrap.dedent(SCRIPT))
    out = subprocess.run(
        [sys.executable, '-W', 'ignore', str(script), method], capture_output=True, text=True, timeout=120)
    assert out.stdout == 'equal\n', out.stderr


def test_without_numba(tmp_path):
    """Without numba, products are dense, without a warning; `explain_kernels` reports that numba is missing."""
    code = """
        import sys
        sys.modules['numba'] = None
        import timm, torch, timm_spikformer
        from timm_spikformer.kernels import events
        events.MIN_MACS = 0
        model = timm.create_model('test_spikformer_v2').eval()
        print(model(torch.rand(1, 3, 64, 64)).shape)
        print(timm_spikformer.explain_kernels(model))"""
    out = run_python(code)
    assert out.returncode == 0 and 'pip install numba' in out.stdout and not out.stderr, out.stderr


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    env = dict(NUMBA_CACHE_DIR=str(tmp_path / 'file'), XDG_CACHE_HOME=str(tmp_path / 'file'))
    code = """
        import numpy as np
        from timm_spikformer.kernels import compiled
        loops = compiled.load_loops()
        x = np.array([0, 1, 2], np.float32)
        print(loops.read_events(x, 0, 3, np.empty(3, np.uint8)))"""
    out = run_python(code, **env)
    assert out.stdout == '(3, 2)\n', out.stderr


def test_a_thread_that_outlives_the_main_thread():
    out = run_script("""
        def work():
            torch.set_num_threads(2)
            threading.main_thread().join()
            time.sleep(0.5)
            print(product())
        print(product(), flush=True)
        threading.Thread(target=work).start()""")
    first, second = out.stdout.split()
    assert first == second, out.stderr


def test_a_fork_while_another_thread_compiles(tmp_path):
    out = run_script("""
        thread = threading.Thread(target=product)
        thread.start()
        time.sleep(0.5)
        pid = os.fork()
        if pid == 0:
            os._exit(0 if product() != 'dense' else 1)
        for _ in range(600):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
        else:
            os.kill(pid, 9)
            status = 'hangs'
        thread.join()
        print(status)""", NUMBA_CACHE_DIR=str(tmp_path))
    assert out.stdout == '0\n', out.stderr


IS_RIGHT = "result = product(); print(result != 'dense' and abs(float(result) - layer(x).sum().item()) < 0.1)"


@pytest.mark.parametrize('damage', ['truncated', 'full disk'])
def test_a_cache_that_is_damaged(damage, tmp_path):
    env = dict(NUMBA_CACHE_DIR=str(tmp_path))
    if damage == 'truncated':
        run_script('product()', **env)
        for path in tmp_path.rglob('*.nb?'):
            path.write_bytes(b'')
    limit = """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        """ if damage == 'full disk' else ''
    out = run_script(textwrap.dedent(limit) + IS_RIGHT, **env)
    assert out.stdout == 'True\n', out.stderr
    assert 'Traceback' not in out.stderr


def test_numba_without_its_compiler():
    out = run_script('print(product())', NUMBA_DISABLE_JIT='1')
    assert out.stdout == 'dense\n', out.stderr
