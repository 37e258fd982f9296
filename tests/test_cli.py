"""Console script: imports at startup, error messages, terminals, and printing of recipes and configurations."""
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml

from timm_spikformer import cli, errors
from timm_spikformer_cli import COMMANDS, create_parser

ROOT = Path(__file__).parents[1]
HEAVY = ('torch', 'timm', 'numpy', 'transformers', 'huggingface_hub', 'datasets', 'matplotlib', 'rich', 'yaml')
# Code that hides the packages named in sys.argv[1] from imports
BLOCK = """
    import sys
    from importlib.machinery import PathFinder
    BLOCKED = sys.argv[1].split(',')
    find_spec = PathFinder.find_spec
    PathFinder.find_spec = classmethod(
        lambda cls, name, *args: None if name.partition('.')[0] in BLOCKED else find_spec(name, *args))
"""
OPTIONAL = 'spikingjelly,datasets,matplotlib,rich,jinja2,accelerate,transformers,pyarrow'


def run(*args, check=True, code=None, **kwargs):
    env = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', **kwargs.pop('env', {}))
    start = ['-c', textwrap.dedent(code)] if code else ['-m', 'timm_spikformer_cli']
    return subprocess.run(
        [sys.executable, *start, *map(str, args)], capture_output=True, env=env, check=check, timeout=120,
        **{'text': True, **kwargs})


# -- startup

ANSWERED = [
    ['--version'], ['--help'], *([name, '--help'] for name in COMMANDS), ['recipe'], ['config', 'spikformer_8_384']]


@pytest.mark.parametrize('args', ANSWERED, ids=' '.join)
def test_help_version_and_config_import_no_heavy_packages(args):
    out = run(*args, code=f"""
        import sys, timm_spikformer_cli
        try:
            timm_spikformer_cli.main()
        except SystemExit as e:
            assert not e.code, e.code
        print([name for name in {HEAVY!r} if name in sys.modules])""").stdout
    assert out.splitlines()[-1] == '[]' and len(out) > 10


@pytest.mark.parametrize('args', [['--version'], ['profile', '--help']], ids=' '.join)
def test_help_and_version_take_less_than_300_ms(args):
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(*args)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert sorted(seconds)[2] < 0.3, seconds


def test_models_work_without_optional_packages():
    """Create, train and export a model, and load the included weights."""
    out = run(OPTIONAL, code=BLOCK + """
    import io, timm, torch, timm_spikformer
    model = timm.create_model('spikformer_v2_2_64_patch4_32.fashion_mnist', pretrained=True)
    x = torch.randn(2, 3, 28, 28)
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    mae = timm_spikformer.SpikformerMAE(timm.create_model('test_spikformer_v2'), decoder_embed_dim=32, decoder_depth=1,
                                        decoder_num_heads=2)
    mae(torch.randn(2, 3, 64, 64)).loss.backward()
    model.eval()
    with torch.no_grad():
        expected = model(x)
        assert expected.std() > 0
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
    print([name for name in BLOCKED if name in sys.modules])
    import timm_spikformer.profiling
    for package, name in ((timm_spikformer, 'SpikformerConfig'), (timm_spikformer, 'SpikformerTrainer'),
                          (timm_spikformer.profiling, 'render'), (timm_spikformer.profiling, 'profile')):
        try:
            getattr(package, name)
        except ModuleNotFoundError as e:
            print(e)
    """).stdout.splitlines()
    assert out[0] == '[]'
    for (name, module), line in zip((
            ('SpikformerConfig', 'transformers'), ('SpikformerTrainer', 'transformers'),
            ('profiling.render', 'matplotlib'), ('profiling.profile', 'spikingjelly')), out[1:], strict=True):
        assert line.startswith(f'timm_spikformer.{name}: {module} is required here but is not installed. Run: pip')


def test_convert_works_without_packages_for_cards_and_profiles(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model('test_spikformer_v2').state_dict(), tmp_path / 'a.pth')
    run('spikingjelly,datasets,matplotlib,rich,jinja2,accelerate', 'convert', tmp_path / 'a.pth', '--model',
        'test_spikformer_v2', '--output', tmp_path / 'out', code=BLOCK + """
    import timm_spikformer_cli
    timm_spikformer_cli.main(sys.argv[2:])""")
    assert (tmp_path / 'out' / 'model.safetensors').is_file()


@pytest.mark.parametrize('blocked, args', [
    ('torch', ['profile', 'x']),
    ('transformers', ['convert', 'FILE', '--model', 'test_spikformer_v2', '--output', 'out']),
    ('jinja2', ['publish', 'FILE', '--repo', 'a/b', '--license', 'mit', '--dry-run', '--output', 'out']),
])
def test_error_names_missing_package(blocked, args, tmp_path):
    (tmp_path / 'FILE').write_bytes(b'x')
    result = run(blocked, *args, cwd=tmp_path, check=False, env=dict(PYTHONPATH=str(ROOT)), code=BLOCK + """
    import timm_spikformer_cli
    timm_spikformer_cli.main(sys.argv[2:])""")
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    assert f'error: {blocked} is required here but is not installed. Run: pip install "{blocked}' in result.stderr
    assert os.listdir(tmp_path) == ['FILE']


# -- errors

def test_user_errors_are_explained_and_bugs_are_raised(monkeypatch):
    from timm_spikformer.publishing import command

    def explain_raised(error):
        def fail(*args):
            raise error
        monkeypatch.setattr(command, 'run_publish', fail)
        cli.main(['publish', 'x', '--repo', 'a/b', '--license', 'mit'])

    import huggingface_hub.errors as hub
    from safetensors import SafetensorError
    with pytest.raises(RuntimeError) as info:
        torch.empty(2 ** 60)
    no_memory, caused_by_it = info.value, ValueError('cannot be created')
    caused_by_it.__cause__ = no_memory
    for error, text in (
            (OSError(28, 'No space left on device', '/out'), '/out: No space left on device. Free some space'),
            (PermissionError(13, 'Permission denied', '/out'), '/out: Permission denied. Change its permissions'),
            (hub.StrictDataclassFieldValidationError('steps', TypeError('x')), 'Data cannot be read: .*steps'),
            (SafetensorError('header too large'), 'Data cannot be read: header too large'),
            (hub.OfflineModeIsEnabled('offline'), 'The Hub cannot be reached: offline. Check the network'),
            (ConnectionError('refused'), 'The Hub cannot be reached: refused'),
            (yaml.YAMLError('bad'), 'Data cannot be read: bad'),
            (UnicodeDecodeError('utf-8', b'x', 0, 1, 'bad byte'), 'Data cannot be read: .*bad byte'),
            (torch.OutOfMemoryError('too much'), 'There is not enough memory: too much. Use a smaller batch'),
            (MemoryError(), 'There is not enough memory: MemoryError. Use a smaller batch size, fewer time steps'),
            (no_memory, 'There is not enough memory: .*DefaultCPUAllocator.* Use a smaller batch size'),
            (caused_by_it, 'There is not enough memory: cannot be created. Use a smaller batch size'),
    ):
        with pytest.raises(SystemExit, match=f'^error: {text}'):
            explain_raised(error)
    for bug in (ValueError('other package'), TypeError('x'), KeyError('x'), AssertionError(), RuntimeError('x'),
                ZeroDivisionError()):
        with pytest.raises(type(bug)):
            explain_raised(bug)


@pytest.mark.parametrize('command', [['profile', 'hf-hub:foo/bar'], ['profile', 'hf-hub:foo/bar@v1', '--images', '1']])
def test_uncached_repository_while_offline(command, tmp_path):
    done = run(*command, cwd=tmp_path, env=dict(HF_HOME=str(tmp_path), PYTHONPATH=str(ROOT)), check=False)
    assert done.returncode == 1 and done.stderr == (
        f'error: config.json of {command[1].removeprefix("hf-hub:")} is not in the cache, and HF_HUB_OFFLINE is set. '
        f'Unset it, and try again. Specify weights with --checkpoint, or use random weights with --calibrate.\n')


def test_only_value_errors_raised_by_package_are_explained():
    from timm_spikformer.publishing.command import parse_kwargs

    def check_repository_parts(name):
        a, b = name.split('/')  # the interpreter raises a ValueError, in a function attributed to the package below

    check_repository_parts.__code__ = check_repository_parts.__code__.replace(co_filename=errors.__file__)
    with pytest.raises(ValueError) as info:
        parse_kwargs(['x'])
    assert errors.user_message(info.value) == "--model-kwargs: 'x' is not KEY=VALUE."
    with pytest.raises(AttributeError) as info:
        parse_kwargs([3])
    assert errors.user_message(info.value) is None
    with pytest.raises(ValueError) as info:
        check_repository_parts('one')
    assert errors.user_message(info.value) is None


def test_requirement_returns_declared_bounds():
    # The order of the bounds depends on the build back end.
    assert sorted(errors.pip_requirement('transformers').removeprefix('transformers').split(',')) == ['<6', '>=5.18']
    assert errors.pip_requirement('yaml').startswith('pyyaml>=') and errors.pip_requirement('nothing') == 'nothing'
    assert errors.pip_requirement('torch').startswith('torch>=')  # not torchvision


# -- terminals

def test_ascii_terminals_and_non_utf8_file_names(tmp_path):
    env = dict(PYTHONIOENCODING='ascii', LC_ALL='C')
    name = os.fsdecode(b'caf\xe9-\xc2\xb5.yaml')
    result = run('recipe', 'cifar10', '--output', tmp_path / name, env=env, text=False)
    assert result.stdout.startswith(b'Written to ') and (tmp_path / name).is_file()
    out = run(env=env, code="""
        import timm_spikformer_cli, sys
        try:
            timm_spikformer_cli.main(['--version'])
        except SystemExit:
            print('12 \\u00b5J \\u2192 3 \\u00d7 \\u00e9 \\u2603')""").stdout
    assert out.splitlines()[-1] == '12 uJ -> 3 x e ?'


@pytest.mark.parametrize('columns', ['1', '20', '500'])
def test_narrow_and_wide_terminals(columns):
    for name in COMMANDS:
        assert run(name, '--help', env=dict(COLUMNS=columns, NO_COLOR='1')).stdout.startswith('usage:')


@pytest.mark.parametrize('args', [['recipe', 'cifar10'], ['publish', '--help']], ids=' '.join)
def test_closed_pipe(args):
    process = subprocess.Popen(
        [sys.executable, '-m', 'timm_spikformer_cli', *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait(60) in (0, 1)  # argparse ignores closed pipes


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='requires /dev/full')
@pytest.mark.parametrize('buffered', [True, False])
@pytest.mark.parametrize('args', [['--version'], ['profile', '--help'], ['recipe', 'cifar10']], ids=' '.join)
def test_stdout_on_full_disk(args, buffered):
    env = dict(os.environ, PYTHONUNBUFFERED='' if buffered else '1')
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, '-m', 'timm_spikformer_cli', *args], stdout=full, stderr=subprocess.PIPE, text=True,
            env=env, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
    assert 'No space left on device' in done.stderr


@pytest.mark.parametrize('command', ['profile', 'demo'])
@pytest.mark.parametrize('device', ['meta', 'lazy', 'cuda:99', 'abacus', 'cpu:x'])
def test_unusable_devices(command, device, tmp_path):
    model = {'profile': ['spikformer_v2_2_64_patch4_32'], 'demo': ['--stages', 'train']}[command]
    with pytest.raises(SystemExit, match=f'^error: --device {device} cannot be used: '):
        cli.main([command, *model, '--device', device, '--output', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('number, message', [(signal.SIGINT, 'Interrupted. No partial output'), (signal.SIGTERM, '')])
def test_signal_leaves_no_output(number, message, tmp_path):
    """Send the signal while the folder is written. Background jobs of a shell ignore SIGINT, so the child resets it."""
    torch.save(timm.create_model('test_spikformer_v2').state_dict(), tmp_path / 'a.pth')
    code = """
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import timm_spikformer_cli
        from timm_spikformer.publishing import folder
        def wait(*args):
            print('ready', flush=True)
            time.sleep(60)
        folder.verify_folder = wait
        timm_spikformer_cli.main(sys.argv[1:])"""
    process = subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(code), 'convert', str(tmp_path / 'a.pth'), '--model',
         'test_spikformer_v2', '--output', str(tmp_path / 'out')],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    assert len(os.listdir(tmp_path)) == 2
    time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (1, 128 + number) and message in err and 'Traceback' not in err
    assert os.listdir(tmp_path) == ['a.pth']


def test_full_disk(tmp_path):
    """A limit on the file size simulates a full disk; safetensors raises its own error type."""
    torch.save(timm.create_model('test_spikformer_v2').state_dict(), tmp_path / 'a.pth')
    result = run('convert', tmp_path / 'a.pth', '--model', 'test_spikformer_v2', '--output', tmp_path / 'out', code="""
        import signal, sys
        from resource import RLIMIT_FSIZE, setrlimit
        import timm_spikformer_cli
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        setrlimit(RLIMIT_FSIZE, (100_000, 100_000))
        timm_spikformer_cli.main(sys.argv[1:])""", check=False)
    assert result.stderr.splitlines()[-1].startswith(f'error: {tmp_path / "out"}: File too large; nothing was written.')
    assert 'Traceback' not in result.stderr and os.listdir(tmp_path) == ['a.pth']


def test_ctrl_c_before_arguments_are_parsed(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_spikformer_cli.create_parser', interrupt)
    with pytest.raises(SystemExit, match='^\nInterrupted. No partial output was written.$'):
        cli.main(['demo'])


def test_signal_handlers_are_restored(capsys):
    cli.main(['recipe'])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# -- recipes and configurations

def test_recipes_are_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(['recipe'])
    names = capsys.readouterr().out.split()
    assert names == sorted(path.stem for path in (ROOT / 'recipes').glob('*.yaml'))
    for name in names:
        cli.main(['recipe', name])
        recipe = yaml.safe_load(capsys.readouterr().out)
        expected = yaml.safe_load((ROOT / 'recipes' / f'{name}.yaml').read_text())
        data = recipe.pop('dataset', ''), expected.pop('dataset', '')
        assert recipe == expected and (data[0] == data[1] or Path(data[0].removeprefix('hfds/')).is_dir())
    cli.main(['recipe', 'cifar10', '--output', 'my recipe.yaml'])
    assert capsys.readouterr().out == 'Written to my recipe.yaml\n'
    assert Path('my recipe.yaml').read_text() == (ROOT / 'recipes' / 'cifar10.yaml').read_text()
    for args, message in (
            (['nothing'], "There is no recipe 'nothing'. Expected one of "), (['--output', 'x'], 'requires the NAME'),
            (['cifar10', '--output', 'my recipe.yaml'], 'already exists'),
            (['cifar10', '--output', str(tmp_path)], 'is a folder, expected a file'),
            (['cifar10', '--output', 'a/b'], 'cannot be written: .* is not a folder'),
            (['../README'], 'There is no recipe')):
        with pytest.raises(SystemExit, match=f'error: .*{message}'):
            cli.main(['recipe', *args])
    assert os.listdir(tmp_path) == ['my recipe.yaml']


def test_configurations_are_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(['config'])
    assert {'spikformer_v2_8_512', 'pretrain_imagenet'} <= set(capsys.readouterr().out.split())
    cli.main(['config', 'spikformer_v2_8_512'])
    folder = ROOT / 'hf_configs' / 'spikformer_v2_8_512'
    assert capsys.readouterr().out == (folder / 'config.json').read_text()
    cli.main(['config', 'spikformer_v2_8_512', '--output', 'out'])
    assert {p.name: p.read_text() for p in folder.iterdir()} == {
        p.name: p.read_text() for p in Path('out').iterdir() if not p.name.startswith('.')}
    cli.main(['config', 'spikformer_v2_8_512', '--output', 'out'])
    with pytest.raises(SystemExit, match='which `timm-spikformer config spikformer_v2_8_512` wrote. Choose an'):
        cli.main(['config', 'spikformer_8_384', '--output', 'out'])
    cli.main(['config', 'pretrain_imagenet', '--output', 'args.json'])
    expected = json.loads((ROOT / 'hf_configs' / 'args' / 'pretrain_imagenet.json').read_text())
    written = json.loads(Path('args.json').read_text())
    processor = Path(written.pop('image_processor_name'))  # a path that is valid in any folder
    assert processor == ROOT / expected.pop('image_processor_name') and processor.is_dir()
    assert written == expected


def test_parser_has_all_commands():
    assert list(create_parser()._subparsers._group_actions[0].choices) == list(COMMANDS)
