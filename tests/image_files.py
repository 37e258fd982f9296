"""Image files and folders for tests."""
import io
import os
from pathlib import Path

from PIL import Image

from timm_spikformer.images import Images

CONFIG = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bicubic', crop_pct=1.)


def png(image=None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new('RGB', (8, 8), 'red')).save(buffer, options.pop('format', 'PNG'), **options)
    return buffer.getvalue()


def write_tree(root: Path, *paths: str) -> Path:
    """Write an image to each path."""
    content = png()
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def relative(images: Images, root: Path):
    return [os.path.relpath(images.filename(i), root) for i in range(len(images))]
