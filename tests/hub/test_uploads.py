"""Faults, permissions and other content during publishing: the repository stays unchanged."""
import json
import re
import subprocess
import sys
import time

import pytest
import timm
import torch
from conftest import calibrate
from hub_client import FAULTS, REPO, put
from loopback_hub import Fault, File, Repo

from timm_spikformer.publishing import save_folder
from timm_spikformer.reading import checkpoint_from_model


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
