"""Generate `config.json` and `preprocessor_config.json` for every registered model.

    python hf_configs/make_configs.py [FOLDER]
"""
import os
import sys
import tempfile
from pathlib import Path

import timm

from timm_spikformer import SpikformerConfig
from timm_spikformer.hf.processing import create_processor
from timm_spikformer.pretrained import get_training_cfg


def write(name: str, folder: Path, **kwargs) -> None:
    """Write the two files of an untrained model; existing files are replaced after both are complete."""
    cfg = get_training_cfg(name)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        # the number of time steps is that of the model, not of weights; the training scripts read the labels from the
        # dataset
        kwargs = {'time_steps': timm.create_model(name, device='meta').time_steps, **kwargs}
        config = SpikformerConfig.from_timm(f'{name}.{cfg.tag}', num_labels=2, **kwargs)
        config.save_pretrained(temporary)
        create_processor(cfg.to_dict(), config.time_steps).save_pretrained(temporary)
        for file in os.listdir(temporary):
            os.replace(Path(temporary, file), folder / file)


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name in timm.list_models(module='spikformer'):
        write(name, root / name)
    # for time_steps_1_to_4_imagenet.json: four time steps after training with one, as in related work
    write('spikformer_v2_16_768', root / 'spikformer_v2_16_768_4_time_steps', time_steps=4)


if __name__ == '__main__':
    main()
