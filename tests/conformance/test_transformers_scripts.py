"""transformers' example scripts, unmodified, on real images: pre-training, fine-tuning, launchers, remote code.

The scripts are not part of the transformers package: set TRANSFORMERS_EXAMPLES to `examples/pytorch` of a clone of
transformers' repository.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_images
from loopback_hub import LoopbackHub, User
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForMaskedImageModeling

from timm_spikformer.hf.remote_code import save_remote_code

pytestmark = pytest.mark.scripts

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'hf_configs' / 'spikformer_v2_2_64_patch4_32'
PLUGIN = ['-m', 'timm_spikformer']
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *PLUGIN]
ACCELERATE = ['-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '1', '--num_machines', '1',
              '--mixed_precision', 'no', '--dynamo_backend', 'no', *PLUGIN]
MIM = 'image-pretraining/run_mim.py'
CLASSIFY = 'image-classification/run_image_classification.py'
NO_TRAINER = 'image-classification/run_image_classification_no_trainer.py'
TRAIN = ['--remove_unused_columns', 'False', '--do_train', '--do_eval', '--max_steps', 4, '--use_cpu', 'True',
         '--per_device_train_batch_size', 8, '--per_device_eval_batch_size', 25, '--report_to', 'none']

# without a network, run_image_classification.py loads this metric from its working directory
ACCURACY = """
import datasets
import evaluate
import numpy


class Accuracy(evaluate.Metric):
    def _info(self):
        features = datasets.Features({'predictions': datasets.Value('int32'), 'references': datasets.Value('int32')})
        return evaluate.MetricInfo(description='', citation='', features=features)

    def _compute(self, predictions, references):
        return {'accuracy': float(numpy.mean(numpy.equal(predictions, references)))}
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """Working directory with the metric, and image folders in `data`: 20 training and 5 validation images per class."""
    root = tmp_path_factory.mktemp('work')
    write_images(root / 'data' / 'train', 'train', classes=10, count=20)
    write_images(root / 'data' / 'validation', 'test', classes=10, count=5)
    (root / 'accuracy').mkdir()
    (root / 'accuracy' / 'accuracy.py').write_text(ACCURACY)
    return root


@pytest.fixture(scope='module')
def run_script(folder):
    examples = os.environ.get('TRANSFORMERS_EXAMPLES')
    if not examples or not (Path(examples) / MIM).is_file():
        raise pytest.UsageError(
            f"Set TRANSFORMERS_EXAMPLES to examples/pytorch of a clone of transformers' repository, got {examples}.")

    def run(script: str, *args, launcher=PLUGIN, check: bool = True, **env: str) -> subprocess.CompletedProcess:
        result = subprocess.run(
            list(map(str, [sys.executable, *launcher, Path(examples) / script, *args])), cwd=folder,
            env={**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), **env},
            capture_output=True, text=True)
        assert not check or result.returncode == 0, result.stderr[-4000:]
        return result

    return run


def results(folder: Path, name: str) -> dict:
    return json.loads((folder / name / 'all_results.json').read_text())


@pytest.fixture(scope='module')
def pretrained(run_script, folder) -> Path:
    """Folder of a model pre-trained from a folder of configuration files."""
    run_script(
        MIM, '--config_name_or_path', CONFIG, '--image_processor_name', CONFIG, '--dataset_name', 'data',
        '--mask_patch_size', 8, '--output_dir', 'pretrained', *TRAIN)
    assert results(folder, 'pretrained')['eval_loss'] > 0
    AutoModelForMaskedImageModeling.from_pretrained(folder / 'pretrained')
    return folder / 'pretrained'


@pytest.mark.parametrize('launcher', [PLUGIN, TORCHRUN, ACCELERATE], ids=['python', 'torchrun', 'accelerate launch'])
def test_mim_from_checkpoint(launcher, run_script, folder, pretrained, tmp_path):
    run_script(
        MIM, '--model_name_or_path', pretrained, '--dataset_name', 'data', '--mask_patch_size', 4, '--output_dir',
        tmp_path / 'out', *TRAIN, launcher=launcher)
    assert results(tmp_path, 'out')['eval_loss'] > 0


def test_mim_from_overrides(run_script, folder, tmp_path):
    run_script(
        MIM, '--model_type', 'spikformer', '--config_overrides',
        'hidden_size=32,num_hidden_layers=1,num_attention_heads=2,image_size=64,time_steps=1,decoder_hidden_size=32',
        '--image_processor_name', CONFIG, '--dataset_name', 'data', '--mask_patch_size', 16, '--output_dir',
        tmp_path / 'out', *TRAIN)
    assert AutoConfig.from_pretrained(tmp_path / 'out').hidden_size == 32


def test_mim_under_fsdp(run_script, folder, pretrained, tmp_path):
    run_script(
        MIM, '--model_name_or_path', pretrained, '--dataset_name', 'data', '--mask_patch_size', 4, '--output_dir',
        tmp_path / 'out', *TRAIN, '--fsdp', 'full_shard auto_wrap', launcher=TORCHRUN)
    assert results(tmp_path, 'out')['eval_loss'] > 0


@pytest.mark.parametrize('launcher', [PLUGIN, TORCHRUN], ids=['python', 'torchrun'])
def test_classification(launcher, run_script, folder, pretrained, tmp_path):
    run_script(
        CLASSIFY, '--model_name_or_path', pretrained, '--dataset_name', 'data', '--label_column_name', 'label',
        '--output_dir', tmp_path / 'out', *TRAIN, launcher=launcher)
    assert 'eval_accuracy' in results(tmp_path, 'out')
    assert AutoModelForImageClassification.from_pretrained(tmp_path / 'out').config.num_labels == 10


@pytest.mark.parametrize('launcher', [PLUGIN, ACCELERATE], ids=['python', 'accelerate launch'])
def test_classification_without_trainer(launcher, run_script, folder, pretrained, tmp_path):
    run_script(
        NO_TRAINER, '--model_name_or_path', pretrained, '--dataset_name', 'data', '--label_column_name', 'label',
        '--output_dir', tmp_path / 'out', '--max_train_steps', 3, '--per_device_train_batch_size', 8,
        launcher=launcher)
    assert 'eval_accuracy' in results(tmp_path, 'out')


@pytest.mark.parametrize('script, extra', [
    (MIM, ['--mask_patch_size', 4]), (CLASSIFY, ['--label_column_name', 'label']),
])
def test_remote_code_without_the_plugin(script, extra, run_script, folder, pretrained, tmp_path):
    source = tmp_path / 'source'
    AutoModelForMaskedImageModeling.from_pretrained(pretrained).save_pretrained(source)
    (source / 'preprocessor_config.json').write_text((pretrained / 'preprocessor_config.json').read_text())
    save_remote_code(source)
    run_script(
        script, '--model_name_or_path', source, '--trust_remote_code', 'True', '--dataset_name', 'data',
        '--output_dir', tmp_path / 'out', *extra, *TRAIN, launcher=[])
    assert results(tmp_path, 'out')['eval_loss'] > 0


@pytest.mark.parametrize('name', ['pretrain_fashion_mnist', 'finetune_fashion_mnist'])
def test_argument_files(name, run_script, folder, pretrained, tmp_path):
    """Run the argument files with fewer steps and other paths."""
    args = json.loads((ROOT / 'hf_configs' / 'args' / f'{name}.json').read_text())
    args.update(max_steps=3, use_cpu=True, report_to='none', max_eval_samples=50, output_dir=str(tmp_path / 'out'))
    args['dataset_name'] = str(ROOT / args['dataset_name'])
    for key in ('config_name_or_path', 'image_processor_name', 'model_name_or_path'):
        if key in args:
            args[key] = str(pretrained if args[key].startswith('output/') else ROOT / args[key])
    (tmp_path / 'args.json').write_text(json.dumps(args))
    run_script(MIM if name.startswith('pretrain') else CLASSIFY, tmp_path / 'args.json')
    assert results(tmp_path, 'out')['eval_loss'] > 0


def test_run_mae_is_rejected(run_script):
    result = run_script('image-pretraining/run_mae.py', '--model_name_or_path', CONFIG, check=False)
    assert result.returncode != 0 and 'Pre-train with run_mim.py' in result.stderr


def test_both_scripts_push_to_hub(run_script, folder):
    """Pre-train and push a model; fine-tune it from the Hub, and push the result with the last checkpoint."""
    hub = LoopbackHub({'hf_writer': User('me', ['me'])})
    with hub.serve() as url:
        env = dict(
            HF_ENDPOINT=url, HF_TOKEN='hf_writer', HF_HOME=str(folder / 'home'), HF_HUB_OFFLINE='0',
            HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')
        run_script(
            MIM, '--config_name_or_path', CONFIG, '--image_processor_name', CONFIG, '--dataset_name', 'data',
            '--mask_patch_size', 4, *TRAIN, '--output_dir', 'pushed_mim', '--push_to_hub', '--hub_model_id', 'me/mim',
            **env)
        run_script(
            CLASSIFY, '--model_name_or_path', 'me/mim', '--dataset_name', 'data', '--label_column_name', 'label',
            *TRAIN, '--save_steps', 2, '--output_dir', 'pushed', '--push_to_hub', '--hub_model_id', 'me/classifier',
            '--hub_strategy', 'checkpoint', **env)
    heads = {name: repo.commits[repo.branches['main']].files for name, repo in hub.repos.items()}
    common = {'config.json', 'model.safetensors', 'preprocessor_config.json', 'README.md'}
    assert common <= heads['me/mim'].keys() and common <= heads['me/classifier'].keys()
    assert 'last-checkpoint/trainer_state.json' in heads['me/classifier']
    config = json.loads(heads['me/classifier']['config.json'].data)
    assert config['label_names'] == [f'class_{i}' for i in range(10)] and config['num_classes'] == 10
