"""Repositories that this package or transformers has uploaded, loaded by timm, transformers and TimmWrapper."""
import textwrap

import pytest
import timm
import torch
from conftest import SHIPPED_WEIGHTS, calibrate
from hub_client import LOADERS, REPO, put
from timm.utils import natural_key

from timm_spikformer import SpikformerMAE
from timm_spikformer.publishing import save_folder
from timm_spikformer.reading import checkpoint_from_model


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
    assert out[1] == str(sorted([*SHIPPED_WEIGHTS, cifar, 'spikformer_v2_8_384.in1k'], key=natural_key))
    assert out[3] == f'org/{cifar}'
    assert out[4] == (
        'error The repository org/spikformer_v2_8_384.in1k contains the model spikformer_v2_2_64_patch4_32, expected '
        'spikformer_v2_8_384.')
    requests = len(hub.requests)
    offline = client.run(code, shipped / 'expected.pt', 'org', HF_HUB_OFFLINE='1', TIMM_SPIKFORMER_HUB='org')
    assert len(hub.requests) == requests
    assert offline.stdout.splitlines()[0] == str(sorted([*SHIPPED_WEIGHTS, cifar], key=natural_key))
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
