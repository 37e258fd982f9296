"""Digests of files. This module imports the standard library only."""
import hashlib
import os
from typing import Union

__all__ = ['sha256_of_file']


def sha256_of_file(path: Union[str, 'os.PathLike[str]']) -> str:
    """Return the SHA-256 of the content of a file, in hexadecimal."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
