"""Scripts run with `python -m timm_spikformer`, directly and with torchrun and accelerate, in separate processes."""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from torch import nn

from timm_spikformer import SpikformerConfig, SpikformerForImageClassification, SpikformerForMaskedImageModeling

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / 'tests' / 'scripts'
TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']


def run(*args, check=True):
    env = dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1')
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, env=env, check=check, timeout=300)


def lines(result):
    """Return the JSON objects in the output. Processes share a pipe, so the newline may follow that of another one."""
    text = result.stdout.replace('}{', '}\n{')
    return [json.loads(line) for line in text.splitlines() if line.startswith('{')]


@pytest.mark.parametrize('launcher, num_processes', [
    ([], 1),
    pytest.param(TORCHRUN, 2, marks=pytest.mark.slow),
    (['-m', 'accelerate.commands.launch', '--cpu', '--num_processes', '1', '--num_machines', '1',
      '--mixed_precision', 'no', '--dynamo_backend', 'no'], 1),
], ids=['python', 'torchrun', 'accelerate launch'])
def test_script_finds_models(launcher, num_processes):
    script = str(SCRIPTS / 'create_model.py')
    reports = lines(run(*launcher, '-m', 'timm_spikformer', script, '7'))
    assert sorted(r.pop('rank') for r in reports) == list(range(num_processes))
    assert all(r == dict(name='__main__', argv=[script, '7'], classes=7, neighbor='neighbor') for r in reports)


def test_script_without_launcher_fails():
    result = run(SCRIPTS / 'create_model.py', '7', check=False)
    assert result.returncode != 0 and 'Unknown model' in result.stderr


@pytest.mark.parametrize('method', ['spawn', pytest.param('forkserver', marks=pytest.mark.slow)])
def test_child_processes_find_models(method):
    """DataLoader workers, child processes and their children find the models; results are of the script's classes."""
    script = str(SCRIPTS / 'spawn.py')
    (report,) = lines(run('-m', 'timm_spikformer', script, method))
    assert report == dict(
        loader=[3, 4], child=5, grandchild=5, is_ours=True, file=script, argv=[script, method])


def test_symlinked_script_imports_from_folder_of_target(tmp_path):
    (tmp_path / 'link.py').symlink_to(SCRIPTS / 'create_model.py')
    (report,) = lines(run('-m', 'timm_spikformer', tmp_path / 'link.py', '7'))
    assert report['neighbor'] == 'neighbor' and report['argv'] == [str(tmp_path / 'link.py'), '7']


def test_safe_path_is_unchanged(tmp_path):
    """With -P, neither the folder of the script nor the current folder is added to sys.path, and nothing is removed."""
    (tmp_path / 'script.py').write_text('import json, sys; print(json.dumps(dict(path=sys.path)))')
    expected = lines(run('-P', '-c', 'import json, sys; print(json.dumps(dict(path=sys.path)))'))
    assert lines(run('-P', '-m', 'timm_spikformer', tmp_path / 'script.py')) == expected


def test_help():
    result = run('-m', 'timm_spikformer', '--help')
    assert result.stdout.startswith('Run an unmodified script') and not result.stderr


def test_no_script():
    result = run('-m', 'timm_spikformer', check=False)
    assert result.returncode == 1 and 'Expected: python -m timm_spikformer SCRIPT ARGS' in result.stderr
    result = run('-m', 'timm_spikformer', 'nowhere.py', check=False)
    assert result.returncode == 1 and "There is no script 'nowhere.py'" in result.stderr


def test_run_mae_is_rejected(tmp_path):
    """run_mae.py would train a ViTMAE, without an error."""
    (tmp_path / 'run_mae.py').write_text('print("trained a ViTMAE")')
    result = run('-m', 'timm_spikformer', tmp_path / 'run_mae.py', check=False)
    assert result.returncode != 0 and not result.stdout and 'Pre-train with run_mim.py' in result.stderr


def test_ddp_ranks_have_equal_weights():
    (report,) = lines(run(*TORCHRUN, '-m', 'timm_spikformer', SCRIPTS / 'train_ddp.py'))
    assert report['world_size'] == 2 and report['equal'] and report['grads_equal'] and report['grad_norm'] > 0


@pytest.mark.slow
def test_fsdp_matches_single_process():
    """The classes in `_no_split_modules` are sharded: stages of the stem, blocks of the encoder and of the decoder."""
    (report,) = lines(run(*TORCHRUN[:-2], '--nproc-per-node', '2', SCRIPTS / 'train_fsdp.py'))
    assert report['units'] == 4 + 2 + 4
    assert report['sharded'] == pytest.approx(report['plain'], rel=1e-5)
    assert report['plain'][1] < report['plain'][0]


def test_sync_bn_conversion_does_not_change_outputs(model, images, monkeypatch):
    """Results are bit-equal without kernels; there is no kernel for SyncBatchNorm."""
    monkeypatch.setattr('timm_spikformer.kernels.switch._default', 'plain')
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in converted.modules())
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(converted(images), model(images))
    for grad_checkpointing in (False, True):
        converted.set_grad_checkpointing(grad_checkpointing)
        for m in (model, converted):
            m.train().zero_grad()
            m(images).square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), converted.parameters()):
            assert torch.equal(p.grad, q.grad), name
        assert torch.equal(converted.blocks[0].mlp.fc1.bn.running_var, model.blocks[0].mlp.fc1.bn.running_var)


@pytest.mark.parametrize('stem', ['scs', 'sps'])
@pytest.mark.parametrize('cls', [SpikformerForImageClassification, SpikformerForMaskedImageModeling])
def test_accelerate_recipe_shards_stages_and_blocks(cls, stem, monkeypatch):
    """accelerate uses DDP on CPUs, so only the policy of its FSDP plugin is checked."""
    config = load_config_from_file(str(ROOT / 'recipes' / 'accelerate_fsdp2.yaml'))
    assert config.distributed_type == DistributedType.FSDP
    for key, value in config.fsdp_config.items():  # as `accelerate launch` passes them
        monkeypatch.setenv(key.upper(), str(value))
    model = cls(SpikformerConfig.from_timm('test_spikformer_v2', stem=stem))
    plugin = FullyShardedDataParallelPlugin()
    plugin.set_auto_wrap_policy(model)
    assert plugin.fsdp_version == 2
    stage = 'SpikingConvStage' if stem == 'scs' else 'SpikingPatchStage'
    wrapped = {c.__name__ for c in plugin.auto_wrap_policy.keywords['transformer_layer_cls']}
    assert wrapped == {stage, 'SpikingBlock'} | ({'Block'} if cls is SpikformerForMaskedImageModeling else set())
