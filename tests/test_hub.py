"""Publishing and downloading with the real huggingface_hub client, in separate processes, with a local Hub server."""
import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import timm
import torch
from conftest import SHIPPED_WEIGHTS, calibrate, firing_rates
from loopback_hub import Fault, File, LoopbackHub, Repo, User
from safetensors.torch import load, save

from timm_spikformer import SpikformerMAE
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


@pytest.fixture
def hub():
    return LoopbackHub({
        'hf_writer': User('me', ['me', 'org']), 'hf_reader': User('me', []), 'hf_other': User('other', ['other'])})


@pytest.fixture
def client(hub, tmp_path):
    with hub.serve() as url:
        yield Client(url, tmp_path)


@pytest.fixture(scope='module')
def shipped(tmp_path_factory):
    """A folder with the included weights in `model`, and images and their logits and features in `expected.pt`."""
    folder = tmp_path_factory.mktemp('shipped')
    model = timm.create_model(REPO.split('/')[1], pretrained=True).eval()
    checkpoint = checkpoint_from_model(model)
    set_labels(checkpoint, model.pretrained_cfg['label_names'])
    save_folder(checkpoint, folder / 'model')
    x = example_images(checkpoint)
    assert min(firing_rates(model, x).values()) > 0.
    with torch.no_grad():
        torch.save((x, model(x), model.forward_features(x)), folder / 'expected.pt')
    return folder


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


def put(hub: LoopbackHub, name: str, folder: Path, branch: str = 'main') -> dict:
    """Add a folder to the server as a repository, without a client; return its files."""
    files = {p.name: File(p.read_bytes(), p.suffix == '.safetensors') for p in folder.iterdir()}
    hub.repos.setdefault(name, Repo()).add(branch, 'put there', files)
    return files


# -- all loaders on one repository

LOADERS = """
    import sys, torch
    x, logits, features = torch.load(sys.argv[1])
    REPO = 'me/spikformer_v2_2_64_patch4_32.fashion_mnist'
    torch.set_grad_enabled(False)
    def same(name, a, b=logits):
        assert torch.equal(a, b), name
        print('same', name)
"""


def test_all_loaders_on_one_repository(hub, client, shipped):
    out = client.publish(shipped / 'model', '--repo', REPO, '--tag', 'v1')
    assert out.stdout.startswith(f'{client.env["HF_ENDPOINT"]}/{REPO}  (')
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2 and repo.tags['v1'] == repo.branches['main']  # one commit after the initial one
    assert {'model.safetensors', 'config.json', 'preprocessor_config.json', 'README.md', 'modeling_spikformer.py'} <= \
        repo.commits[repo.tags['v1']].files.keys()
    expected = shipped / 'expected.pt'
    with_plugin = client.run(LOADERS + """
    import timm, timm_spikformer
    same('hf-hub', timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()(x))
    same('hf-hub at a tag', timm.create_model(f'hf-hub:{REPO}@v1', pretrained=True).eval()(x))
    from huggingface_hub import snapshot_download
    same('local-dir', timm.create_model(f'local-dir:{snapshot_download(REPO)}', pretrained=True).eval()(x))
    from transformers import *
    classifier = AutoModelForImageClassification.from_pretrained(REPO).eval()
    assert type(classifier) is timm_spikformer.SpikformerForImageClassification
    same('AutoModelForImageClassification', classifier(x).logits)
    mim = AutoModelForMaskedImageModeling.from_pretrained(REPO).eval()
    same('AutoModelForMaskedImageModeling', mim.encoder.forward_features(x), features)
    same('AutoModel', AutoModel.from_pretrained(REPO).eval().timm_model.forward_features(x), features)
    processor = AutoImageProcessor.from_pretrained(REPO)
    classify = pipeline('image-classification', model=REPO, device='cpu', top_k=10)
    from PIL import Image
    image = Image.new('RGB', (40, 30), (200, 90, 10))
    scores = {p['label']: p['score'] for p in classify(image, function_to_apply='none')}
    expected = classifier(**processor(image, return_tensors='pt')).logits[0].tolist()
    assert [scores[classifier.config.id2label[i]] for i in range(10)] == expected
    print('same pipeline')""", expected)
    assert with_plugin.stdout.count('same') == 7
    # TimmWrapper in a script that does not import this package, run by the launcher
    (client.folder / 'wrapper.py').write_text(textwrap.dedent(LOADERS + """
    from transformers import TimmWrapperForImageClassification
    same('TimmWrapper', TimmWrapperForImageClassification.from_pretrained(REPO).eval()(x).logits)"""))
    out = client.run_command(['-m', 'timm_spikformer', 'wrapper.py', expected])
    assert 'same TimmWrapper' in out.stdout
    # without this package: the code in the repository, which also registers the model for timm and TimmWrapper
    without_plugin = client.run(LOADERS + """
    sys.modules['timm_spikformer'] = None  # importing it raises
    from transformers import AutoModelForImageClassification, TimmWrapperForImageClassification
    model = AutoModelForImageClassification.from_pretrained(REPO, trust_remote_code=True).eval()
    assert type(model).__module__.startswith('transformers_modules')
    same('remote code', model(x).logits)
    same('TimmWrapper', TimmWrapperForImageClassification.from_pretrained(REPO).eval()(x).logits)
    import timm
    same('timm', timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()(x))""", expected)
    assert without_plugin.stdout.count('same') == 3


def test_push_to_hub_of_timm_and_transformers_models(hub, client, shipped):
    out = client.run(LOADERS + """
    import timm, timm_spikformer
    from transformers import AutoModelForImageClassification, TimmWrapperForImageClassification
    from timm_spikformer.publishing import publish
    model = timm.create_model(REPO.split('/')[1], pretrained=True).eval()
    timm.models.push_to_hf_hub(model, 'me/by_timm', safe_serialization=True)
    same('timm to timm', timm.create_model('hf-hub:me/by_timm', pretrained=True).eval()(x))
    ours = timm_spikformer.SpikformerForImageClassification.from_pretrained('me/by_timm').eval()
    same('timm to SpikformerForImageClassification', ours(x).logits)
    config = dict(model_type='spikformer')
    timm.models.push_to_hf_hub(model, 'me/by_timm_for_auto', safe_serialization=True, model_config=config)
    auto = AutoModelForImageClassification.from_pretrained('me/by_timm_for_auto').eval()
    same('timm to AutoModelForImageClassification', auto(x).logits)
    ours.push_to_hub('me/by_transformers')
    same('transformers to timm', timm.create_model('hf-hub:me/by_transformers', pretrained=True).eval()(x))
    print(publish(model, 'me/by_us', 'mit'))
    print(publish(ours, 'me/by_us_too', 'mit'))
    for name in ('me/by_us', 'me/by_us_too'):
        same(name, timm.create_model(f'hf-hub:{name}', pretrained=True).eval()(x))
        same(name, AutoModelForImageClassification.from_pretrained(name).eval()(x).logits)
        same(name, TimmWrapperForImageClassification.from_pretrained(name).eval()(x).logits)
    """, shipped / 'expected.pt')
    assert out.stdout.count('same') == 10


def test_namespace(hub, client, shipped):
    """Set by function and by environment variable, with a revision, offline from the cache, and with a wrong model."""
    put(hub, 'org/spikformer_v2_2_64_patch4_32.cifar10', shipped / 'model')
    put(hub, 'org/spikformer_v2_2_64_patch4_32.cifar10', shipped / 'model', 'stable')
    put(hub, 'org/spikformer_v2_8_384.in1k', shipped / 'model')  # under the name of another model
    code = LOADERS + """
    import timm, timm_spikformer
    print(timm.list_pretrained('*spikformer*'))
    timm_spikformer.set_hub_namespace(sys.argv[2])
    print(timm.list_pretrained('*spikformer*'))
    model = timm.create_model('spikformer_v2_2_64_patch4_32.cifar10', pretrained=True).eval()
    same('namespace', model(x))
    assert model.pretrained_cfg['label_names'][0] == 'T-shirt/top'
    print(model.pretrained_cfg['hf_hub_id'])
    try:
        timm.create_model('spikformer_v2_8_384', pretrained=True)
    except (ValueError, RuntimeError) as e:
        print('error', e)"""
    cifar = 'spikformer_v2_2_64_patch4_32.cifar10'
    out = client.run(code, shipped / 'expected.pt', 'org').stdout.splitlines()
    assert out[0] == str(SHIPPED_WEIGHTS)
    assert out[1] == str(sorted([*SHIPPED_WEIGHTS, cifar, 'spikformer_v2_8_384.in1k']))
    assert out[3] == f'org/{cifar}'
    assert out[4] == (
        'error The repository org/spikformer_v2_8_384.in1k contains the model spikformer_v2_2_64_patch4_32, expected '
        'spikformer_v2_8_384.')
    requests = len(hub.requests)
    offline = client.run(code, shipped / 'expected.pt', 'org', HF_HUB_OFFLINE='1', TIMM_SPIKFORMER_HUB='org')
    assert len(hub.requests) == requests
    assert offline.stdout.splitlines()[0] == str(sorted([*SHIPPED_WEIGHTS, cifar]))
    assert offline.stdout.splitlines()[2:] == out[2:]
    pinned = client.run(code, shipped / 'expected.pt', 'org@stable').stdout.splitlines()
    assert pinned[3] == f'org/{cifar}@stable'


@pytest.mark.slow
def test_train_py_checkpoint_to_pretrained_at_full_size(hub, client, images):
    """Publish a checkpoint of spikformer_v2_8_512 with random weights, and load it with `pretrained=True`."""
    import argparse

    from timm.utils import CheckpointSaver
    torch.manual_seed(0)
    x = torch.nn.functional.interpolate(images, 224)
    model = calibrate(timm.create_model('spikformer_v2_8_512', time_steps=2), x[:4]).train()
    args = argparse.Namespace(model='spikformer_v2_8_512', num_classes=1000, model_kwargs=dict(time_steps=2), epochs=1)
    CheckpointSaver(
        model, torch.optim.SGD(model.parameters()), args, checkpoint_dir=str(client.folder),
        recovery_dir=str(client.folder)).save_checkpoint(0, 0.)
    client.publish('last.pth.tar', '--repo', 'org/spikformer_v2_8_512.in1k')
    with torch.no_grad():
        torch.save((x[:2], model.eval()(x[:2]), None), client.folder / 'expected.pt')
    code = LOADERS + """
    import timm, timm_spikformer
    model = timm.create_model('spikformer_v2_8_512', pretrained=True).eval()
    same('pretrained', model(x))
    assert model.time_steps == 2
    assert timm.create_model('spikformer_v2_8_512', pretrained=True, time_steps=4).time_steps == 4"""
    client.run(code, 'expected.pt', TIMM_SPIKFORMER_HUB='org')
    requests = len(hub.requests)
    client.run(code, 'expected.pt', TIMM_SPIKFORMER_HUB='org', HF_HUB_OFFLINE='1')
    assert len(hub.requests) == requests


# -- faults during publishing: the repository is unchanged

@pytest.mark.parametrize('cases', [[
    # pattern, kind, number of times, whether the client recovers by itself
    ('POST .*/commit/main', '500', 10, False),
    ('PUT /lfs/.*', 'cut', 10, False),
    ('PUT /lfs/.*', '500', 1, True),
    ('POST .*/preupload/main', 'slow', 1, True),
]])
def test_failed_upload_can_be_repeated(cases, hub, client, shipped):
    out = client.run(FAULTS + """
    from timm_spikformer.publishing import publish, read_checkpoint
    checkpoint = read_checkpoint(sys.argv[1])
    for i, fault in enumerate(json.loads(sys.argv[2])):
        set_faults(fault)
        print(json.dumps(attempt(lambda: publish(checkpoint, f'me/case{i}', 'mit').commit)))
        print(json.dumps(state(f'me/case{i}')))
        set_faults()
        print(json.dumps(attempt(lambda: publish(checkpoint, f'me/case{i}', 'mit').commit)))
    """, shipped / 'model', json.dumps([case[:3] for case in cases]))
    lines = [json.loads(line) for line in out.stdout.splitlines()]
    for i, (*_, mended) in enumerate(cases):
        first, left, second = lines[3 * i:3 * i + 3]
        if mended:
            assert first == hub.repos[f'me/case{i}'].branches['main'] and 'model.safetensors' in left
        else:
            assert first.startswith('RuntimeError The upload to me/case')
            assert first.endswith('Run the same command again to finish it.')
            assert left == ['.gitattributes']
        head = hub.repos[f'me/case{i}'].branches['main']
        assert second == head and 'model.safetensors' in hub.repos[f'me/case{i}'].commits[head].files


def test_killed_upload_leaves_repository_empty(hub, client, shipped):
    hub.faults.append(Fault('PUT /lfs/.*', 'slow'))
    command = [sys.executable, '-m', 'timm_spikformer.cli', 'publish', str(shipped / 'model'), '--repo', REPO]
    with subprocess.Popen([*command, '--license', 'mit'], env=client.env, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not any(line.startswith('PUT') for line in hub.requests):
            time.sleep(0.05)
        process.kill()
    assert [list(c.files) for c in hub.repos[REPO].commits.values()] == [['.gitattributes']]


def test_only_files_in_manifest_are_removed_from_repository(hub, client, shipped):
    """The manifest in the repository lists the published files; all other files are kept."""
    out = client.run(FAULTS + """
    from huggingface_hub import HfApi
    from timm_spikformer.publishing import publish, read_checkpoint
    api = HfApi()
    api.create_repo('me/foreign')
    for name in ('pytorch_model.bin', 'model-00001-of-00002.safetensors', 'notes.txt'):
        api.upload_file(path_or_fileobj=b'old', path_in_repo=name, repo_id='me/foreign')
    checkpoint = read_checkpoint(sys.argv[1])
    publish(checkpoint, 'me/foreign', 'mit')
    print(json.dumps(state('me/foreign')))
    api.upload_file(path_or_fileobj=b'mine', path_in_repo='more_notes.txt', repo_id='me/foreign')
    Path('out').mkdir()
    publish(checkpoint, 'me/foreign', 'mit', output='out')
    Path('out/secret.txt').write_text('secret')
    from timm_spikformer.reading import TrainingRecord
    checkpoint.training = TrainingRecord('timm')
    publish(checkpoint, 'me/foreign', 'mit', output='out')
    print(json.dumps(state('me/foreign')))
    checkpoint.training = None
    publish(checkpoint, 'me/foreign', 'mit', output='out')
    print(json.dumps(state('me/foreign')))
    print(json.dumps(sorted(os.listdir('out'))))
    """, shipped / 'model')
    first, second, third, folder = (set(json.loads(line)) for line in out.stdout.splitlines())
    theirs = {'pytorch_model.bin', 'model-00001-of-00002.safetensors', 'notes.txt'}
    assert theirs | {'model.safetensors', '.timm-spikformer.json'} <= first
    assert second == first | {'more_notes.txt', 'training_args.yaml'}
    assert third == first | {'more_notes.txt'}
    assert folder == third - theirs - {'more_notes.txt', '.gitattributes'} | {'secret.txt'}


def test_repository_with_unknown_content_is_unchanged(hub, client, shipped):
    """Publishing stops unless the repository can be read and holds the same model, or does not exist."""
    published = put(hub, 'me/theirs', shipped / 'model')
    config = json.loads(published['config.json'].data)
    for name, text in (('me/other', json.dumps({**config, 'architecture': 'resnet18'})), ('me/unknown', '{}'),
                       ('me/broken', '{'), ('me/list', '[]')):
        hub.repos[name] = Repo()
        hub.repos[name].add('main', 'put there', {**published, 'config.json': File(text.encode(), False)})
    hub.repos['me/manifest'] = Repo()
    hub.repos['me/manifest'].add('main', 'put there', {
        **published, '.timm-spikformer.json': File(b'{"files": 3}', False)})
    before = {name: dict(repo.branches) for name, repo in hub.repos.items()}
    cases = [(pattern, kind) for pattern in (
        'GET /api/models/me/theirs', '(HEAD|GET) .*/config.json', '(HEAD|GET) .*/.timm-spikformer.json')
        for kind in ('500', '403', 'cut')]
    out = client.run(FAULTS + """
    from timm_spikformer.publishing import publish, read_checkpoint
    checkpoint = read_checkpoint(sys.argv[1])
    for pattern, kind in json.loads(sys.argv[2]):
        set_faults((pattern, kind, 100))
        print(attempt(lambda: publish(checkpoint, 'me/theirs', 'mit')))
    set_faults()
    for name in ('other', 'unknown', 'broken', 'list', 'manifest'):
        print(attempt(lambda: publish(checkpoint, f'me/{name}', 'mit')))
    print(attempt(lambda: publish(checkpoint, 'me/theirs', 'mit', private=True)))
    """, shipped / 'model', json.dumps(cases)).stdout.splitlines()
    assert {name: dict(repo.branches) for name, repo in hub.repos.items()} == before
    for (pattern, kind), line in zip(cases, out):
        assert re.match('RuntimeError The Hub (cannot be reached|returned an error)', line), (pattern, kind, line)
    other, unknown, broken, a_list, manifest, public = out[len(cases):]
    assert 'contains resnet18, but this is a spikformer_v2_2_64_patch4_32' in other
    assert 'contains another model, but this' in unknown
    assert 'config.json of the repository me/broken is not JSON' in broken
    assert 'config.json of the repository me/list is not a JSON object' in a_list
    assert manifest.startswith('ValueError') and 'manifest' in manifest
    assert public.startswith('ValueError The repository me/theirs is public. Make it private in its settings')


@pytest.mark.slow
def test_thousand_named_classes(hub, client, images):
    """The order is kept by the pipeline, by timm, and after transformers has saved the model again."""
    torch.manual_seed(0)
    model = calibrate(timm.create_model('test_spikformer_v2', num_classes=1000, time_steps=1), images)
    with torch.no_grad():
        torch.save((images[:1], model(images[:1]), None), client.folder / 'expected.pt')
    names = [f'{chr(97 + i % 26)} {i}' for i in range(1000)]
    (client.folder / 'labels.txt').write_text('\n'.join(names) + '\n')
    save_folder(checkpoint_from_model(model), client.folder / 'model')
    client.publish('model', '--repo', 'me/thousand', '--labels', 'labels.txt')
    out = client.run(LOADERS + """
    import timm, timm_spikformer
    from transformers import AutoModelForImageClassification, pipeline
    from PIL import Image
    names = [f'{chr(97 + i % 26)} {i}' for i in range(1000)]
    image = Image.new('RGB', (80, 70), (200, 90, 10))
    AutoModelForImageClassification.from_pretrained('me/thousand').push_to_hub('me/again')
    for repo in ('me/thousand', 'me/again'):
        model = timm.create_model(f'hf-hub:{repo}', pretrained=True).eval()
        same(repo, model(x))
        assert list(model.pretrained_cfg['label_names']) == names
        hf_model = AutoModelForImageClassification.from_pretrained(repo).eval()
        assert [hf_model.config.id2label[i] for i in range(1000)] == names
        assert list(hf_model.config.id2label.values()) == names
        assert [hf_model.config.label2id[name] for name in names] == list(range(1000))
        if repo == 'me/thousand':
            classify = pipeline('image-classification', model=repo, device='cpu', top_k=1000)
            scores = {p['label']: p['score'] for p in classify(image, function_to_apply='none')}
            pixels = classify.image_processor(image, return_tensors='pt').pixel_values
            assert [scores[name] for name in names] == hf_model(pixels).logits[0].tolist()
            print('same pipeline')
    """, 'expected.pt')
    assert out.stdout.count('same') == 3


def test_publish_without_permission(hub, client, shipped):
    no_token = dict(HF_TOKEN='', HF_TOKEN_PATH=str(client.folder / 'none'))
    out = client.publish(shipped / 'model', '--repo', REPO, ok=False, **no_token)
    assert 'error: There is no Hub token. Log in with `hf auth login`, or set HF_TOKEN.' in out.stderr
    assert 'Traceback' not in out.stderr
    out = client.run(FAULTS + """
    from timm_spikformer.publishing import publish, read_checkpoint
    checkpoint = read_checkpoint(sys.argv[1])
    for token in ('hf_wrong', 'hf_reader', 'hf_other'):
        print(attempt(lambda: publish(checkpoint, 'me/name', 'mit', token=token)))
    """, shipped / 'model')
    wrong, reader, other = out.stdout.splitlines()
    assert wrong.startswith('ValueError The Hub does not accept the token.')
    assert reader == other == (
        'ValueError The token may not write to me/name. Use one with write access to it.')
    assert not hub.repos


def test_repository_of_other_model_or_with_existing_tag(hub, client, shipped, images):
    torch.manual_seed(0)
    other = calibrate(timm.create_model('test_spikformer_v2', num_classes=10), images)
    save_folder(checkpoint_from_model(other), client.folder / 'other')
    client.publish('other', '--repo', REPO, '--tag', 'v1')
    before = dict(hub.repos[REPO].branches)
    out = client.run(FAULTS + """
    from timm_spikformer.publishing import publish
    print(attempt(lambda: publish(sys.argv[1], sys.argv[2], 'mit')))
    print(attempt(lambda: publish('other', sys.argv[2], 'mit', tag='v1')))
    """, shipped / 'model', REPO)
    architecture, tag = out.stdout.splitlines()
    assert f'{REPO} contains test_spikformer_v2, but this is a spikformer_v2_2_64_patch4_32. Choose' in architecture
    assert f"The repository {REPO} already has a tag 'v1'. Choose another." in tag
    assert hub.repos[REPO].branches == before


def test_without_network(client, shipped):
    client.env['HF_ENDPOINT'] = 'http://127.0.0.1:9'
    out = client.publish(shipped / 'model', '--repo', REPO, ok=False, HF_HUB_OFFLINE='1')
    assert 'error: The Hub cannot be reached' in out.stderr and 'Traceback' not in out.stderr
    out = client.run(
        "import timm, timm_spikformer; timm.create_model('spikformer_v2_8_512', pretrained=True)", ok=False,
        TIMM_SPIKFORMER_HUB='org', HF_HUB_OFFLINE='1')
    assert 'is not in the cache, and HF_HUB_OFFLINE is set. Unset it' in out.stderr


def test_private_repositories(hub, client, shipped):
    client.publish(shipped / 'model', '--repo', REPO, '--private')
    assert hub.repos[REPO].private
    out = client.run(FAULTS + """
    import timm, timm_spikformer
    overlay = dict(hf_hub_id=sys.argv[1])
    load = lambda: timm.create_model('spikformer_v2_2_64_patch4_32.cifar10', True, pretrained_cfg_overlay=overlay)
    print(attempt(lambda: type(load()).__name__))
    """, REPO, HF_TOKEN='hf_other').stdout
    assert out.startswith(f'RuntimeError There is no repository {REPO} on the Hub, or no access to it.')


# -- faults during downloads: the cache never holds incomplete files

@pytest.fixture
def published(hub, shipped):
    return put(hub, REPO, shipped / 'model')


def test_failed_downloads(hub, client, published):
    cases = [
        # kind, number of times, error message
        ('cut', 2, ''), ('slow', 1, ''),
        ('corrupt', 50, 'was damaged during the download: its sha'), ('truncate', 50, 'could not be downloaded'),
        ('500', 50, 'could not be downloaded'), ('cut', 50, 'could not be downloaded|cannot be reached'),
    ]
    out = client.run(FAULTS + """
    import timm, timm_spikformer
    load = lambda i: type(timm.create_model(f'hf-hub:{sys.argv[1]}', pretrained=True, cache_dir=f'cache{i}')).__name__
    for i, (kind, times) in enumerate(json.loads(sys.argv[2])):
        set_faults(('GET .*/resolve/.*/model.safetensors', kind, times))
        first = attempt(lambda: load(i))
        cached = [p.name for p in Path(f'cache{i}').rglob('*') if p.is_file()]
        set_faults()
        print(json.dumps((first, cached, attempt(lambda: load(i)))))
    """, REPO, json.dumps([case[:2] for case in cases]))
    weights = published['model.safetensors']
    for i, ((*_, message), line) in enumerate(zip(cases, out.stdout.splitlines(), strict=True)):
        first, cached, second = json.loads(line)
        if message:
            assert re.match(f'RuntimeError model.safetensors of {REPO}.*({message})', first), first
            assert 'model.safetensors' not in cached and weights.sha256 not in cached
        assert second == 'Spikformer' and (first == second or message)
        assert (client.folder / f'cache{i}').rglob(weights.sha256).__next__().read_bytes() == weights.data


def test_repository_is_read_from_one_commit(hub, client, shipped):
    """Weights may be in several files. A commit during the download does not mix files of two commits."""
    files = dict(put(hub, REPO, shipped / 'model'))
    tensors = load(files.pop('model.safetensors').data)
    names = sorted(tensors)
    parts = {'model-00001-of-00002.safetensors': names[:40], 'model-00002-of-00002.safetensors': names[40:]}
    for name, part in parts.items():
        files[name] = File(save({key: tensors[key] for key in part}, dict(format='pt')), True)
    index = dict(metadata={}, weight_map={key: name for name, part in parts.items() for key in part})
    files['model.safetensors.index.json'] = File(json.dumps(index).encode(), False)
    files['training_args.yaml'] = File(b'command: old', False)
    hub.repos[REPO].add('main', 'shards', files)
    out = client.run(FAULTS + """
    from huggingface_hub import HfApi
    from timm_spikformer import reading
    read, download, repo = reading.read_checkpoint_source, reading.download, f'hf-hub:{sys.argv[1]}'
    def download_and_commit(name, file):
        path = download(name, file)
        if file == 'config.json':
            new = dict(path_or_fileobj=b'command: new', path_in_repo='training_args.yaml', repo_id=sys.argv[1])
            HfApi().upload_file(**new)
        return path
    reading.download = download_and_commit
    checkpoint = read(repo)
    print(checkpoint.training.command, len(checkpoint.model.state_dict()))
    reading.download = download
    print(read(repo).training.command)
    """, REPO).stdout
    assert out.split() == ['old', str(len(tensors)), 'new']


def test_failed_download_of_optional_file(hub, client, published):
    """Only a file that does not exist is optional; other errors are not ignored."""
    out = client.run(FAULTS + """
    from timm_spikformer.reading import read_checkpoint_source
    read = lambda: type(read_checkpoint_source(f'hf-hub:{sys.argv[1]}').processor).__name__
    set_faults(('(HEAD|GET) .*/resolve/.*/preprocessor_config.json', '500', 50))
    print(attempt(read))
    set_faults()
    print(attempt(read))
    """, REPO).stdout.splitlines()
    assert re.match(f'RuntimeError preprocessor_config.json of {REPO}@.* is not in the cache, and the Hub', out[0]), out
    assert out[1] == 'dict'
    client.run("""
    import sys
    from timm_spikformer.reading import read_checkpoint_source
    assert read_checkpoint_source(f'hf-hub:{sys.argv[1]}').processor['do_resize']
    """, REPO, HF_HUB_OFFLINE='1')


def test_bad_repositories(hub, client, published):
    head = hub.repos[REPO].branches['main']
    files = dict(published)
    files['pytorch_model.bin'] = files.pop('model.safetensors')
    hub.repos[REPO].add('pickle', 'a pickle', files)
    config = json.loads(published['config.json'].data)
    config['pretrained_cfg']['hf_hub_filename'] = '../../../evil.safetensors'
    hub.repos[REPO].add('traversal', 'a path', {
        **published, 'config.json': File(json.dumps(config).encode(), False)})
    hub.repos[REPO].branches['main'] = head
    out = client.run(FAULTS + """
    import timm, timm_spikformer
    for revision in ('pickle', 'traversal'):
        print(attempt(lambda: timm.create_model(f'hf-hub:{sys.argv[1]}@{revision}', pretrained=True)))
    for repo in ('me/nothing', f'{sys.argv[1]}@nothing'):
        overlay = dict(hf_hub_id=repo)
        print(attempt(lambda: timm.create_model('spikformer_v2_8_512', True, pretrained_cfg_overlay=overlay)))
    """, REPO).stdout.splitlines()
    assert out[0].startswith(f'RuntimeError The repository {REPO}@pickle contains no model.safetensors.')
    assert out[1].startswith("ValueError '../../../evil.safetensors' of")
    assert out[2].startswith('RuntimeError There is no repository me/nothing on the Hub, or no access to it.')
    assert out[3] == f"RuntimeError The repository {REPO} has no revision 'nothing'."


# -- Trainer

TRAIN = """
    import sys, datasets, torch, timm_spikformer
    from pathlib import Path
    from transformers import Trainer, TrainingArguments, AutoImageProcessor, CLIPImageProcessor
    from timm_spikformer import *
    from timm_spikformer.images import FASHION_MNIST

    def data(is_mim):
        processor = CLIPImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
        rows = datasets.Dataset.from_parquet(str(FASHION_MNIST / 'test.parquet'))[:32]
        x = processor([i.convert('RGB') for i in rows['image']], return_tensors='pt').pixel_values
        items = [dict(pixel_values=a) if is_mim else dict(pixel_values=a, labels=b) for a, b in zip(x, rows['label'])]
        return processor, items

    def trainer(is_mim, output, strategy):
        torch.manual_seed(0)
        processor, items = data(is_mim)
        config = SpikformerConfig.from_timm(
            'test_spikformer_v2', num_labels=10, image_size=32, time_steps=1, decoder_hidden_size=32,
            decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
        cls = SpikformerForMaskedImageModeling if is_mim else SpikformerForImageClassification
        args = TrainingArguments(
            output, per_device_train_batch_size=8, max_steps=4, save_steps=2, logging_steps=1, report_to='none',
            use_cpu=True, push_to_hub=True, hub_model_id=f'me/{Path(output).name}', hub_strategy=strategy, seed=0,
            hub_always_push=True)
        model = cls(config)
        for m in model.modules():
            if hasattr(m, 'momentum'):
                m.momentum = 0.9  # so that BN adapts within a few steps, and neurons fire in eval mode
        return Trainer(model, args, train_dataset=items, eval_dataset=items, processing_class=processor)
"""


@pytest.mark.parametrize('is_mim', [False, True])
@pytest.mark.slow
def test_trainer_pushes_with_all_strategies(is_mim, hub, client):
    out = client.run(TRAIN + f"""
    import timm
    is_mim = {is_mim}
    for strategy in ('end', 'every_save', 'checkpoint', 'all_checkpoints'):
        t = trainer(is_mim, strategy, strategy)
        t.train()
        t.push_to_hub()
        model = t.model.eval()
        x = torch.stack([item['pixel_values'] for item in t.train_dataset])
        part = model.mae.encoder if is_mim else model.timm_model
        loaded = timm.create_model(f'hf-hub:me/{{strategy}}', pretrained=True).eval()
        with torch.no_grad():
            assert torch.equal(loaded.forward_features(x), part.eval().forward_features(x))
            assert is_mim or torch.equal(loaded(x), model(x).logits)
    losses = [entry['loss'] for entry in t.state.log_history if 'loss' in entry]
    from huggingface_hub import snapshot_download
    folder = Path(snapshot_download('me/checkpoint', allow_patterns='last-checkpoint/*')) / 'last-checkpoint'
    step2 = Path(snapshot_download('me/all_checkpoints', allow_patterns='checkpoint-2/*')) / 'checkpoint-2'
    assert {{p.name for p in folder.iterdir()}} >= {{'model.safetensors', 'optimizer.pt', 'trainer_state.json'}}
    again = trainer(is_mim, 'again', 'end')
    again.train(resume_from_checkpoint=str(step2))
    resumed = [entry['loss'] for entry in again.state.log_history if 'loss' in entry]
    assert resumed == losses and len(losses) == 4, (resumed, losses)
    longer = trainer(is_mim, 'longer', 'end')
    longer.args.max_steps = 6
    longer.train(resume_from_checkpoint=str(folder))
    assert longer.state.global_step == 6
    print('resumed')""")
    assert 'resumed' in out.stdout
    for strategy in ('end', 'every_save', 'checkpoint', 'all_checkpoints'):
        files = hub.repos[f'me/{strategy}'].commits[hub.repos[f'me/{strategy}'].branches['main']].files
        assert {'model.safetensors', 'config.json', 'preprocessor_config.json', 'README.md'} <= files.keys()
        assert ('last-checkpoint/model.safetensors' in files) == (strategy == 'checkpoint')
        assert ('checkpoint-2/model.safetensors' in files) == (strategy == 'all_checkpoints')
    card = hub.repos['me/end'].commits[hub.repos['me/end'].branches['main']].files['README.md'].data.decode()
    assert 'More Information Needed' in card or 'More information needed' in card  # card of transformers' Trainer
    client.publish('end', '--repo', 'me/end')
    card = hub.repos['me/end'].commits[hub.repos['me/end'].branches['main']].files['README.md'].data.decode()
    assert 'nformation needed' not in card.lower() and 'Trained with transformers Trainer.' in card


@pytest.mark.slow
def test_masked_autoencoder_loads_into_classifier(hub, client, images):
    torch.manual_seed(0)
    encoder = timm.create_model('test_spikformer_v2', num_classes=0, time_steps=1)
    mae = calibrate(SpikformerMAE(encoder, 0.25, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2), images)
    save_folder(checkpoint_from_model(mae), client.folder / 'mae')
    client.publish('mae', '--repo', 'me/mae')
    torch.save((images, mae.encoder.forward_features(images), None), client.folder / 'expected.pt')
    client.run(LOADERS + """
    import timm, timm_spikformer
    from transformers import AutoModelForImageClassification, AutoModelForMaskedImageModeling
    model = timm.create_model('hf-hub:me/mae', pretrained=True, num_classes=7).eval()
    assert model(x).shape == (16, 7)
    same('timm', model.forward_features(x))
    model = AutoModelForImageClassification.from_pretrained('me/mae', num_labels=7).eval()
    assert model(x).logits.shape == (16, 7)
    same('classifier', model.timm_model.forward_features(x))
    assert AutoModelForMaskedImageModeling.from_pretrained('me/mae').eval()(x).loss.isfinite()""", 'expected.pt')
