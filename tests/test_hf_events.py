"""Event sequences in transformers: the processor, the loss at each time step, and the training script."""
import json
import sys

import event_files
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoFeatureExtractor, Trainer, TrainingArguments

import timm_spikformer
from timm_spikformer.event_data.frames import Events, integrate, resize
from timm_spikformer.event_data.names import parse_name
from timm_spikformer.hf import run_event_classification
from timm_spikformer.hf.event_processing import SpikformerEventProcessor
from timm_spikformer.losses import TETLoss

pytestmark = pytest.mark.filterwarnings('ignore:.*recordings of .*:UserWarning')


@pytest.fixture
def processor() -> SpikformerEventProcessor:
    return SpikformerEventProcessor(
        size=(32, 32), sensor_size=(34, 34), time_steps=4, image_mean=(0.5, 0.25), image_std=(2., 4.))


def test_processor(processor):
    events = [event_files.random_events((34, 34), count, seed=count) for count in (50, 80)]
    pixel_values = processor(events, return_tensors='pt')['pixel_values']
    assert pixel_values.shape == (2, 4, 2, 32, 32) and pixel_values.dtype == torch.float32
    mean, std = (np.array(v, dtype=np.float32).reshape(2, 1, 1) for v in ((0.5, 0.25), (2., 4.)))
    expected = (resize(integrate(events[1], 4, (34, 34)), (32, 32)) - mean) / std
    np.testing.assert_array_equal(pixel_values[1], expected)
    for same in (events[1]._asdict(), integrate(events[1], 4, (34, 34))):
        np.testing.assert_array_equal(processor(same)['pixel_values'][0], expected)


def test_processor_is_saved_and_loaded(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = SpikformerEventProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    model = timm.create_model('test_spikformer_v2', in_chans=2)
    timm_spikformer.SpikformerConfig.from_timm(model).save_pretrained(tmp_path)
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is SpikformerEventProcessor


EVENTS = event_files.random_events((34, 34))


@pytest.mark.parametrize('sample, message', [
    ([], 'no samples'),
    ([np.zeros((4, 2, 8, 8)), np.zeros((5, 2, 8, 8))], r'same number of time steps, got \[4, 5\]'),
    (np.zeros((4, 3, 8, 8)), 'one channel per polarity'),
    (np.zeros((2, 8, 8)), 'one channel per polarity'),
    ({'t': EVENTS.t, 'x': EVENTS.x, 'y': EVENTS.y}, 'p is missing'),
    (EVENTS._replace(x=EVENTS.x + 34), 'x of the events must be from 0 to 33'),
    (Events(*(a[:0] for a in EVENTS)), 'Expected at least one event, got none'),
    (-np.ones((4, 2, 8, 8)), 'finite counts of at least 0'),
    (np.full((4, 2, 8, 8), np.nan), 'finite counts'),
    (np.zeros((0, 2, 8, 8)), 'one channel per polarity'),
])
def test_processor_refuses_invalid_samples(processor, sample, message):
    with pytest.raises(ValueError, match=message):
        processor(sample)


def test_processor_accepts_tensors_and_structured_arrays(processor):
    events = event_files.random_events((34, 34))
    structured = np.zeros(len(events.t), dtype=[('x', int), ('y', int), ('t', int), ('p', bool)])
    for name, values in events._asdict().items():
        structured[name] = values
    np.testing.assert_array_equal(processor(structured)['pixel_values'], processor(events)['pixel_values'])
    frames = torch.from_numpy(integrate(events, 4, (34, 34)).astype(np.float32)).bfloat16().requires_grad_()
    np.testing.assert_array_equal(processor(frames)['pixel_values'], processor(events)['pixel_values'])
    with pytest.raises(TypeError, match='time_steps'):
        processor(events, time_steps=8)


@pytest.mark.parametrize('kwargs', [
    dict(time_steps=0), dict(time_steps='4'), dict(image_mean=(float('nan'), 1.)), dict(image_mean=('a', 'b')),
    dict(image_mean=0.), dict(split_by='frames'), dict(image_std=(1., 0.)), dict(image_mean=(0.,)), dict(size=32),
    dict(size=(0, 32))])
def test_processor_refuses_invalid_arguments(kwargs):
    with pytest.raises(ValueError):
        SpikformerEventProcessor(**kwargs)


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    model = timm.create_model('test_spikformer_v2', in_chans=2, num_classes=10)
    return timm_spikformer.SpikformerForImageClassification(timm_spikformer.SpikformerConfig.from_timm(model))


def test_step_logits(classifier):
    x, labels = torch.rand(3, 5, 2, 32, 32), torch.tensor([0, 1, 2])
    classifier.train()
    output = classifier(x, labels=labels, output_step_logits=True)
    assert output.step_logits.shape == (5, 3, 10)
    torch.testing.assert_close(output.step_logits.mean(0), output.logits)
    assert classifier(x).step_logits is None
    with pytest.raises(ValueError, match='cannot be combined'):
        classifier(x, output_step_logits=True, output_hidden_states=True)


def test_trainer_uses_the_loss_on_steps(classifier, tmp_path):
    x, labels = 3 * torch.rand(8, 3, 2, 32, 32), torch.arange(8)
    data = [dict(pixel_values=frames, labels=label) for frames, label in zip(x, labels)]
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=8, per_device_eval_batch_size=8, max_steps=1, report_to=[], use_cpu=True)
    trainer = timm_spikformer.SpikformerTrainer(
        classifier, args, train_dataset=data, eval_dataset=data, step_loss=TETLoss(weight=0.1))
    trainer.train()
    classifier.eval()
    with torch.no_grad():
        expected = TETLoss(weight=0.1)(classifier.forward_steps(x, cumulative=False), labels)
        logits = classifier(x).logits
    prediction = trainer.predict(data)
    assert prediction.metrics['test_loss'] == pytest.approx(expected.item(), rel=1e-4)
    np.testing.assert_allclose(prediction.predictions, logits, rtol=1e-4, atol=1e-5)
    assert Trainer.compute_loss is not timm_spikformer.SpikformerTrainer.compute_loss


@pytest.mark.parametrize('loss', ['mean', 'tet'])
def test_training_script(loss, tmp_path, monkeypatch):
    event_files.write_n_mnist(tmp_path / 'data', per_class=1)
    arguments = dict(
        dataset_name='events/n_mnist?time_steps=3&roll=2', data_dir=str(tmp_path / 'data'), model='test_spikformer_v2',
        loss=loss, hflip=0.5, erase_prob=0.5, output_dir=str(tmp_path / 'output'), do_train=True, do_eval=True,
        num_train_epochs=2, per_device_train_batch_size=5, use_cpu=True, report_to=[], save_strategy='epoch')
    (tmp_path / 'arguments.json').write_text(json.dumps(arguments))
    monkeypatch.setattr(sys, 'argv', ['run_event_classification', str(tmp_path / 'arguments.json')])
    run_event_classification.main()
    metrics = json.loads((tmp_path / 'output' / 'all_results.json').read_text())
    assert 0 <= metrics['eval_accuracy'] <= 1 and metrics['train_loss'] > 0

    model = timm_spikformer.SpikformerForImageClassification.from_pretrained(tmp_path / 'output')
    assert model.config.id2label[3] == '3' and model.config.num_channels == 2
    processor = SpikformerEventProcessor.from_pretrained(tmp_path / 'output')
    assert (processor.sensor_size, processor.size, processor.time_steps) == ([34, 34], [64, 64], 3)
    in_timm = timm.create_model(f'local-dir:{tmp_path / "output"}', pretrained=True)
    data = timm.data.resolve_data_config(model=in_timm)
    assert (data['input_size'], data['mean'], data['std']) == ((2, 64, 64), [0., 0.], [1., 1.])


def test_training_script_refuses_a_model_of_images(tmp_path, monkeypatch):
    event_files.write_n_mnist(tmp_path / 'data', per_class=1)
    timm_spikformer.SpikformerForImageClassification(
        timm_spikformer.SpikformerConfig.from_timm('test_spikformer_v2')).save_pretrained(tmp_path / 'images')
    monkeypatch.setattr(sys, 'argv', [
        'run_event_classification', '--dataset_name', 'events/n_mnist', '--data_dir', str(tmp_path / 'data'), '--model',
        str(tmp_path / 'images'), '--output_dir', str(tmp_path / 'output'), '--use_cpu', '--report_to', 'none'])
    with pytest.raises(ValueError, match='has 3 input channels'):
        run_event_classification.main()


def test_training_script_refuses_an_unknown_loss(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="loss must be 'mean' or 'tet', got 'TET'"):
        run_script(monkeypatch, tmp_path, 'output', loss='TET', model='test_spikformer_v2')


def run_script(monkeypatch, tmp_path, output, **arguments):
    arguments = dict(
        dict(dataset_name='events/n_mnist?time_steps=3', data_dir=str(tmp_path / 'data'), use_cpu=True, report_to=[],
             output_dir=str(tmp_path / output)), **arguments)
    (tmp_path / 'arguments.json').write_text(json.dumps(arguments))
    monkeypatch.setattr(sys, 'argv', ['run_event_classification', str(tmp_path / 'arguments.json')])
    run_event_classification.main()
    return json.loads((tmp_path / output / 'all_results.json').read_text())


@pytest.fixture
def pretrained(classifier, tmp_path):
    """A folder with a model whose classes are in reverse order, and with a processor that scales the counts."""
    event_files.write_n_mnist(tmp_path / 'data', per_class=1)
    classifier.config.id2label = {i: str(9 - i) for i in range(10)}
    classifier.config.label2id = {str(9 - i): i for i in range(10)}
    classifier.save_pretrained(tmp_path / 'pretrained')
    SpikformerEventProcessor(
        size=(64, 64), sensor_size=(34, 34), time_steps=3, image_mean=(0.1, 0.2), image_std=(0.5, 0.5)).save_pretrained(
            tmp_path / 'pretrained')
    return str(tmp_path / 'pretrained')


def test_script_keeps_labels_and_processor_of_a_pretrained_model(pretrained, tmp_path, monkeypatch):
    seen = []
    compute_loss = timm_spikformer.SpikformerTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        seen.append((inputs['pixel_values'].clone(), inputs['labels'].clone()))
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(timm_spikformer.SpikformerTrainer, 'compute_loss', record)
    run_script(monkeypatch, tmp_path, 'output', model=pretrained, do_eval=True)
    labels = torch.cat([y for _, y in seen])
    assert labels.tolist() == [9 - i for i in range(10)]
    assert seen[0][0].amin() == pytest.approx(-0.4)  # the pixels without events: (0 - 0.2) / 0.5
    with pytest.raises(ValueError, match='time_steps=3 .* but the name of the dataset has time_steps=5'):
        run_script(
            monkeypatch, tmp_path, 'other', model=pretrained, do_eval=True,
            dataset_name='events/n_mnist?time_steps=5')


def test_script_gives_a_new_classifier_to_other_classes(pretrained, tmp_path, monkeypatch, capsys):
    model = timm_spikformer.SpikformerForImageClassification.from_pretrained(pretrained)
    names = [f'digit {i}' for i in range(10)]
    new = run_event_classification._create_model(pretrained, names, 3)
    assert list(new.config.id2label.values()) == names and 'initialized randomly' in capsys.readouterr().out
    assert not torch.equal(new.timm_model.head.fc.weight, model.timm_model.head.fc.weight)
    weights = [m.timm_model.blocks[0].mlp.fc1.linear.weight for m in (new, model)]
    assert torch.equal(*weights)


def create_processor(folder):
    """Create the processor with which the script trains the model in a folder, or in a repository of the Hub."""
    model = timm_spikformer.SpikformerForImageClassification(timm_spikformer.SpikformerConfig(
        num_channels=2, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        pretrained_cfg=dict(mean=[0., 0.], std=[1., 1.])))
    name = parse_name('events/n_mnist?time_steps=3')
    return run_event_classification._create_processor(model, str(folder), name, (34, 34), is_training=True)


@pytest.mark.parametrize('change, message', [
    (lambda path: path.write_bytes(path.read_bytes()[:40]), 'preprocessor_config.json is not JSON'),
    (lambda path: path.write_text(''), 'preprocessor_config.json is not JSON'),
    (lambda path: path.write_text('[]'), 'contains a list, expected a JSON object'),
    (lambda path: (path.unlink(), path.mkdir()), 'preprocessor_config.json cannot be read: Is a directory'),
    (lambda path: (path.unlink(), path.symlink_to('nowhere')), 'preprocessor_config.json cannot be read: No such file'),
    (lambda path: path.write_text('{"image_processor_type": "ViTImageProcessor"}'), "'ViTImageProcessor', expected"),
    (lambda path: path.write_text(path.read_text().replace('time_steps', 'steps')), 'the setting steps is unknown'),
])
def test_damaged_processor_is_not_replaced_by_a_default(change, message, pretrained, tmp_path, monkeypatch):
    assert create_processor(pretrained).image_mean == [0.1, 0.2]
    path = tmp_path / 'pretrained' / 'preprocessor_config.json'
    monkeypatch.setattr(run_event_classification, 'download_if_exists', lambda repo, filename: str(path))
    assert create_processor('organization/model').image_std == [0.5, 0.5]
    change(path)
    for model in (pretrained, 'organization/model'):
        if path.exists() or model == pretrained:
            with pytest.raises(ValueError, match=f'The processor of {model} cannot be used: .*{message}'):
                create_processor(model)


def test_model_without_processor(pretrained, tmp_path, monkeypatch):
    (tmp_path / 'pretrained' / 'preprocessor_config.json').unlink()
    monkeypatch.setattr(run_event_classification, 'download_if_exists', lambda repo, filename: None)
    for model in (pretrained, 'organization/model'):
        assert create_processor(model).image_std == [1., 1.]


def write_images(folder, splits, with_names=True):
    """Write images of 28x28 pixels of 2 classes to an image folder, or without names to parquet files."""
    import datasets
    images = [Image.effect_noise((28, 28), 80) for _ in range(4)]
    for split in splits:
        if not with_names:
            data = datasets.Dataset.from_dict(dict(image=images, label=[0, 1, 0, 1]))
            data.cast_column('image', datasets.Image()).to_parquet(str(folder / f'{split}.parquet'))
            continue
        for i, image in enumerate(images):
            path = folder / split / f'class {i % 2}' / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)


@pytest.mark.parametrize('splits, with_names, message', [
    ([''], True, 'has only the splits all in .*data, expected train and either test or validation'),
    (['test', 'validation'], True, 'has only the splits .*, expected train and'),
    (['train'], True, 'has only the splits train in'),
    (['train', 'test'], False, 'the data in .*data has no class names'),
])
def test_script_refuses_images_without_splits_or_names(splits, with_names, message, tmp_path, monkeypatch):
    (tmp_path / 'data').mkdir()
    write_images(tmp_path / 'data', splits, with_names)
    with pytest.raises(ValueError, match=message):
        run_script(
            monkeypatch, tmp_path, 'output', do_train=True, model='test_spikformer_v2',
            dataset_name='events/simulated_fashion_mnist?time_steps=2')


def test_script_evaluates_on_the_validation_split(tmp_path, monkeypatch):
    write_images(tmp_path / 'data', ['train', 'validation'])
    results = run_script(
        monkeypatch, tmp_path, 'output', do_eval=True, model='test_spikformer_v2',
        dataset_name='events/simulated_fashion_mnist?time_steps=2')
    assert results['eval_accuracy'] in (0., 0.25, 0.5, 0.75, 1.)


@pytest.mark.parametrize('arguments, message', [
    (dict(model='nope'), "There is no Spikformer 'nope'"),
    (dict(model='test_spikformer_v2', max_train_samples=0), '--max_train_samples must be at least 1'),
])
def test_script_refuses_invalid_arguments(arguments, message, tmp_path, monkeypatch):
    event_files.write_n_mnist(tmp_path / 'data', per_class=1)
    with pytest.raises(ValueError, match=message):
        run_script(monkeypatch, tmp_path, 'output', do_train=True, **arguments)


def test_script_does_not_continue_another_run_in_silence(tmp_path, monkeypatch):
    event_files.write_n_mnist(tmp_path / 'data', per_class=1)
    (tmp_path / 'output' / 'checkpoint-4').mkdir(parents=True)
    with pytest.raises(ValueError, match='contains checkpoints of an earlier run'):
        run_script(monkeypatch, tmp_path, 'output', model='test_spikformer_v2', do_train=True)


def test_label_smoothing_of_the_step_loss(classifier, tmp_path):
    args = TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match='label_smoothing'):
        timm_spikformer.SpikformerTrainer(classifier, args, step_loss=TETLoss())
