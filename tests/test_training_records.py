"""Training records: which arguments of train.py are published."""
import pytest

from timm_spikformer.training_records import record_of_train_script


@pytest.mark.parametrize('name, value', [
    ('data_dir', 'images'), ('wandb_project', 'x'), ('pretrained_path', 'a.pth'), ('initial_checkpoint', 'a.pth'),
    ('opt_kwargs', {'file': '/home/me/x'}), ('bce', ['/home/me']), ('note', 'see ~/x'), ('note', r'C:\me'),
    ('model_kwargs', {'a': [{'b': 'file:/home/me'}]}),
])
def test_local_paths_are_not_published(name, value):
    assert record_of_train_script({'lr': 0.1, name: value}).args == {'lr': 0.1}


def test_other_arguments_are_published():
    args = {'lr': 0.1, 'model_kwargs': {'time_steps': 4}, 'mean': [0.1, 0.2, 0.3], 'aa': 'rand-m9-mstd0.5'}
    assert record_of_train_script({**args, 'empty': None}).args == args
