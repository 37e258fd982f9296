"""A huggingface_hub client in separate processes, a local Hub server for it, and code that runs in the client."""
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import timm
import torch
from conftest import firing_rates
from loopback_hub import File, LoopbackHub, Repo, User

from timm_spikformer.publishing import save_folder
from timm_spikformer.publishing.folder import example_images
from timm_spikformer.reading import checkpoint_from_model, set_labels

REPO = 'me/spikformer_v2_2_64_patch4_32.fashion_mnist'


class Client:
    """Runner of code and scripts in new processes that use the local Hub server, with a separate cache."""

    def __init__(self, url: str, folder: Path):
        self.folder = folder
        self.env = dict(
            os.environ, HF_ENDPOINT=url, HF_HOME=str(folder / 'home'), HF_TOKEN='hf_writer', OMP_NUM_THREADS='1',
            HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_PROGRESS_BARS='1')
        for name in ('HF_HUB_OFFLINE', 'TIMM_SPIKFORMER_HUB'):
            self.env.pop(name, None)

    def run(self, code: str, *arguments: object, ok: bool = True, **env: str) -> subprocess.CompletedProcess:
        script = self.folder / 'script.py'
        script.write_text(textwrap.dedent(code))
        return self.run_command([str(script), *arguments], ok, **env)

    def run_command(self, arguments: list, ok: bool = True, **env: str) -> subprocess.CompletedProcess:
        out = subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, env={**self.env, **env},
            cwd=self.folder)
        assert (out.returncode == 0) == ok, out.stdout + out.stderr
        return out

    def publish(self, *arguments: object, ok: bool = True, **env: str) -> subprocess.CompletedProcess:
        command = ['-m', 'timm_spikformer.cli', 'publish', *arguments, '--license', 'mit']
        return self.run_command(command, ok, **env)


def create_hub() -> LoopbackHub:
    """Return a server with tokens of three users."""
    return LoopbackHub({
        'hf_writer': User('me', ['me', 'org']), 'hf_reader': User('me', []), 'hf_other': User('other', ['other'])})


def save_shipped(folder: Path) -> None:
    """Save the included weights in `model`, and images and their logits and features in `expected.pt`."""
    model = timm.create_model(REPO.split('/')[1], pretrained=True).eval()
    checkpoint = checkpoint_from_model(model)
    set_labels(checkpoint, model.pretrained_cfg['label_names'])
    save_folder(checkpoint, folder / 'model')
    x = example_images(checkpoint)
    assert min(firing_rates(model, x).values()) > 0.
    with torch.no_grad():
        torch.save((x, model(x), model.forward_features(x)), folder / 'expected.pt')


def put(hub: LoopbackHub, name: str, folder: Path, branch: str = 'main') -> dict:
    """Add a folder to the server as a repository, without a client; return its files."""
    files = {p.name: File(p.read_bytes(), p.suffix == '.safetensors') for p in folder.iterdir()}
    hub.repos.setdefault(name, Repo()).add(branch, 'put there', files)
    return files


LOADERS = """
    import sys, torch
    x, logits, features = torch.load(sys.argv[1])
    REPO = 'me/spikformer_v2_2_64_patch4_32.fashion_mnist'
    torch.set_grad_enabled(False)
    def same(name, a, b=logits):
        assert torch.equal(a, b), name
        print('same', name)
"""


FAULTS = """
    import json, os, sys, time, urllib.request
    from pathlib import Path
    time.sleep = lambda seconds: None  # huggingface_hub waits between retries
    def set_faults(*faults):
        data = json.dumps(faults).encode()
        urllib.request.urlopen(urllib.request.Request(os.environ['HF_ENDPOINT'] + '/faults', data, method='POST'))
    def attempt(function):
        try:
            return function()
        except Exception as e:
            return ' '.join(f'{type(e).__name__} {e}'.split())
    def state(repo):
        from huggingface_hub import HfApi
        return HfApi().list_repo_files(repo)
"""
