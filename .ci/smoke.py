"""Smoke test of the installed package: commands, included files, and the models without optional dependencies.

    python smoke.py FOLDER    # an empty folder for the output, outside a checkout
"""
import json
import os
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name('timm-spikformer')
# Uses the models with optional dependencies hidden from the import system
ALONE = """
import sys
from importlib.machinery import PathFinder
blocked = ('spikingjelly', 'datasets', 'matplotlib', 'rich', 'jinja2', 'accelerate', 'transformers', 'pyarrow')
find_spec = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *args: None if name.partition('.')[0] in blocked else find_spec(name, *args))
import timm, torch, timm_spikformer
assert 'site-packages' in timm_spikformer.__file__, timm_spikformer.__file__
model = timm.create_model('spikformer_v2_2_64_patch4_32.fashion_mnist', pretrained=True)
model(torch.randn(2, 3, 28, 28)).sum().backward()
model.eval()
with torch.no_grad():
    torch.export.export(model, (torch.randn(2, 3, 28, 28),))
torch.save(model.state_dict(), 'weights.pth')
assert not set(blocked) & sys.modules.keys()
"""
ACCURACY = """
import timm, torch, timm_spikformer
from timm_spikformer.images import data_config, make_loader, read_splits
model = timm.create_model('spikformer_v2_2_64_patch4_32.fashion_mnist', pretrained=True).eval()
with torch.no_grad():
    right = [(model(x).argmax(1) == y).float() for x, y in make_loader(read_splits()['test'], data_config(model), 250)]
print(torch.cat(right).mean().item())
"""


def run(*args: object) -> str:
    return subprocess.run(list(map(str, args)), check=True, text=True, stdout=subprocess.PIPE).stdout


def main() -> None:
    os.chdir(sys.argv[1])
    os.environ['HF_HUB_OFFLINE'] = '1'
    version = run(COMMAND, '--version').strip()
    assert version == run(sys.executable, '-c', 'import timm_spikformer; print(timm_spikformer.__version__)').strip()
    for name in ('demo', 'profile', 'publish', 'convert', 'recipe', 'config', 'env'):
        assert run(COMMAND, name, '--help').startswith('usage:')
    run(sys.executable, '-c', ALONE)
    accuracy = float(run(sys.executable, '-c', ACCURACY))
    assert accuracy > 0.8, accuracy
    assert json.loads(run(COMMAND, 'env', '--json'))['Kernels']['event-driven products'].startswith('available')
    assert 'device_modules' in run(COMMAND, 'recipe', 'fashion_mnist')
    assert json.loads(run(COMMAND, 'config', 'spikformer_v2_8_512'))['model_type'] == 'spikformer'
    model = 'spikformer_v2_2_64_patch4_32'
    run(COMMAND, 'convert', 'weights.pth', '--model', model, '--output', 'converted')
    run(COMMAND, 'publish', 'converted', '--repo', 'me/model', '--license', 'mit', '--dry-run', '--output', 'published')
    run(COMMAND, 'profile', f'{model}.fashion_mnist', '--images', 8, '--output', 'profile')
    assert {'model.safetensors', 'config.json', 'README.md', 'modeling_spikformer.py'} <= set(os.listdir('published'))
    Path('script.py').write_text('import timm; print(timm.create_model("test_spikformer_v2").num_classes)')
    assert run(sys.executable, '-m', 'timm_spikformer', 'script.py') == '1000\n'
    print(f'timm-spikformer {version}: accuracy {100 * accuracy:.1f}% on the included images; all commands passed')


if __name__ == '__main__':
    main()
