"""Faults during downloads, and repositories that cannot be read: the cache never holds incomplete files."""
import json
import re

from hub_client import FAULTS, REPO, put
from loopback_hub import File
from safetensors.torch import load, save


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
