"""Files of the study."""
import os
from pathlib import Path

from timm_spikformer.temporaries import create_temporary

__all__ = ['write']


def write(path: Path, content: bytes) -> None:
    """Write or replace a file completely or not at all, and create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with create_temporary(path, path.parent) as partial:
        partial.write_bytes(content)
        os.replace(partial, path)
