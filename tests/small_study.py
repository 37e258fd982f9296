"""A study that runs in seconds: small models, three epochs, and the images in the package."""
from pathlib import Path
from typing import Any

import yaml

from reproduction.experiment import Study
from reproduction.protocol import Run, read_protocol
from reproduction.results import write_json
from timm_spikformer.images import FASHION_MNIST

TINY = dict(
    seeds=[0, 1],
    datasets={'fashion_mnist': {
        'train': 5700, 'validation': 300, 'test': 1000,
        'sha256': {
            'train': '88ed683dcc967f7b28f42ff5e80bea5e9006282dadb745aa0a12901aa78988e3',
            'test': '7092207ee39fb5bf64bebe8328f42a408c41902c1066de2cf1e7121e25f26e62',
        }}},
    defaults=dict(
        dataset='fashion_mnist', model='spikformer_v2_2_64_patch4_32', model_kwargs={'embed_dim': 16}, labels=96,
        recipe=dict(epochs=3, lr=1e-2, batch_size=32, weight_decay=0.05, warmup_epochs=0.25),
        tries=[{}, {'epochs': '2x'}]),
    cells=dict(
        mae=dict(title='masked', objective='reconstruct', tries=[{}]),
        tuned=dict(title='pre-trained', init='mae'),
        scratch=dict(title='scratch')),
    questions=dict(Q=dict(
        title='Does it help?', text='An example.', rows=['tuned', 'scratch'],
        claims={'it helps': ['tuned', 'scratch']})),
)


def create_study(folder: Path) -> Study:
    """Write the protocol of the study to a folder, and return the study."""
    (folder / 'protocol.yaml').write_text(yaml.safe_dump(TINY))
    (folder / 'data').mkdir()
    (folder / 'data' / 'fashion_mnist').symlink_to(FASHION_MNIST)
    return Study(read_protocol(folder / 'protocol.yaml'), folder / 'runs', folder / 'checkpoints', folder / 'data')


def pretend(study: Study, run: Run, **values) -> None:
    """Write a result without training."""
    result = dict(
        cell=run.cell.name, seed=run.seed, config=run.config(),
        training=study.protocol.digest(run), initial=study._initial_digest(run),
        images=study.protocol.images[run.cell.dataset], attempt=run.attempt, cpu_seconds=0., history=[],
        machine=dict.fromkeys(('cpu', 'python', 'torch', 'timm'), 'x'),
        validation=dict(accuracy=50., loss=0.5), test=dict(accuracy=50., loss=0.5),
        operations=dict(parameters=1e6, dense_macs=2e6, total_macs=2e6, energy_uj=3., firing_rate=0.2))
    write_json(study.result_path(run), {**result, **values})


def without_times(value: Any) -> Any:
    """Return a result without the values that differ between runs with the same settings."""
    if isinstance(value, dict):
        return {key: without_times(x) for key, x in value.items() if 'seconds' not in key}
    return [without_times(x) for x in value] if isinstance(value, list) else value
