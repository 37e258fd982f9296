"""Selection of the device that a command runs on."""
from typing import Optional

import torch

from .errors import first_line

__all__ = ['choose_device']

_TYPES = {'cpu', 'cuda', 'mps', 'xpu'}


def choose_device(name: Optional[str] = None) -> torch.device:
    """Return the device with the given name; by default CUDA if available, else the CPU.

    Raises:
        ValueError: The device is not available, or cannot run the models, such as PyTorch's `meta` device.
    """
    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
        accelerator = torch.accelerator.current_accelerator()
        types = _TYPES | ({accelerator.type} if accelerator is not None else set())
        if device.type not in types:
            raise ValueError(f'--device {name} cannot be used: expected one of {", ".join(sorted(types))}.')
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'--device {name} cannot be used: {first_line(e)}.') from e
    return device
