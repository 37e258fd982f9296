"""Script that starts workers, which use the models and the classes of this script. Prints JSON.

    python spawn.py START_METHOD
"""
import json
import multiprocessing
import sys
from dataclasses import dataclass

import timm
import torch
from torch.utils.data import DataLoader, Dataset


@dataclass
class Answer:
    classes: int
    grandchild: int


class Models(Dataset):
    """Dataset that creates a model for each item."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor(timm.create_model('test_spikformer_v2', num_classes=i + 3).num_classes)


def count(method: str, deeper: bool) -> Answer:
    classes = timm.create_model('test_spikformer_v2', num_classes=5).num_classes
    return Answer(classes, start(method, False).classes if deeper else 0)


def start(method: str, deeper: bool) -> Answer:
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        return pool.submit(count, method, deeper).result()


if __name__ == '__main__':
    method = sys.argv[1]
    loader = DataLoader(Models(), num_workers=1, multiprocessing_context=method)
    answer = start(method, True)
    print(json.dumps(dict(
        loader=[x.item() for x in loader], child=answer.classes, grandchild=answer.grandchild,
        is_ours=type(answer) is Answer, file=__file__, argv=sys.argv)))
