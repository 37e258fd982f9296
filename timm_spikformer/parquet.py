"""Reader of encoded images and labels in parquet files, for `images.py`."""
import io
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import first_line

__all__ = ['read_parquet']

_HIGHEST_LABEL = 2 ** 31 - 1


def read_parquet(
        paths: Sequence[Path],
        expected: str,
) -> Tuple['ParquetSource', Optional[np.ndarray], Optional[List[str]]]:
    """Read parquet files that have the same columns, `image` and `label`.

    Args:
        paths: The files.
        expected: Sentence that states what was expected, appended to errors about the columns.

    Returns:
        The encoded images; the class indices `[N]`, or None without a column `label`; the class names, or None if the
        labels are not a ClassLabel of the `datasets` library.

    Raises:
        ValueError: A file is damaged, has other columns, or has labels that are not class indices.
    """
    source = ParquetSource(paths, expected)
    return (source, *_read_labels(source.files, expected))


class ParquetSource:
    """Encoded images in parquet files. A row group is read on first access to one of its rows, and kept in memory."""

    def __init__(self, paths: Sequence[Path], expected: str):
        self.files: Dict[Path, pq.ParquetFile] = {}
        counts: List[int] = []
        self._groups = []
        for path in paths:
            try:
                file = pq.ParquetFile(path, memory_map=True)
            except (pa.ArrowException, OSError) as e:
                raise ValueError(f'{path} is not a parquet file, or is damaged: {first_line(e)}') from e
            schema = file.schema_arrow
            if 'image' not in schema.names or not _is_image(schema.field('image').type):
                raise ValueError(f'{path} has the columns {_columns(schema)}. {expected}')
            self.files[path] = file
            for i in range(file.num_row_groups):
                self._groups.append((path, i))
                counts.append(file.metadata.row_group(i).num_rows)
        self._starts = np.cumsum([0, *counts])
        self._columns: Dict[int, pa.ChunkedArray] = {}
        if not len(self):
            raise ValueError(f'{paths[0]} has no rows. {expected}')

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, i: int) -> str:
        path, row = self._locate(i)
        return f'{path}, row {row}'

    def open(self, i: int) -> Any:
        group = int(np.searchsorted(self._starts, i, side='right')) - 1
        path, in_file = self._groups[group]
        if group not in self._columns:
            try:
                self._columns[group] = self.files[path].read_row_group(in_file, columns=['image']).column('image')
            except (pa.ArrowException, OSError) as e:
                raise ValueError(f'the file is damaged: {first_line(e)}') from e
        value = self._columns[group][i - int(self._starts[group])].as_py()
        if isinstance(value, dict):
            value = value.get('bytes') or value.get('path')
        if isinstance(value, bytes):
            return io.BytesIO(value)
        if value is None:
            raise ValueError('the image is null.')
        return open(path.parent / value, 'rb')  # joining leaves an absolute path unchanged

    def _locate(self, i: int) -> Tuple[Path, int]:
        """Return the file of an image, and its row in that file."""
        group = int(np.searchsorted(self._starts, i, side='right')) - 1
        path = self._groups[group][0]
        first = next(g for g, (p, _) in enumerate(self._groups) if p == path)
        return path, i - int(self._starts[first])


def _is_image(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        return any(type.get_field_index(name) >= 0 for name in ('bytes', 'path'))
    return any(test(type) for test in (
        pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string))


def _columns(schema: pa.Schema) -> str:
    return ', '.join(f'{field.name} ({field.type})' for field in schema) or 'none'


def _read_labels(
        files: Dict[Path, pq.ParquetFile],
        expected: str,
) -> Tuple[Optional[np.ndarray], Optional[List[str]]]:
    labels: List[np.ndarray] = []
    names: Optional[List[str]] = None
    for path, file in files.items():
        schema = file.schema_arrow
        if 'label' not in schema.names:
            if labels:
                raise ValueError(f'{path} has no column label, but the other files have one. {expected}')
            continue
        if not labels and path != next(iter(files)):
            raise ValueError(f'{path} has a column label, but other files have none. {expected}')
        type = schema.field('label').type
        try:
            column = file.read(columns=['label']).column('label')
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f'{path} is damaged: {first_line(e)}') from e
        if not pa.types.is_integer(type):
            shown = repr(column[0].as_py()) if len(column) else 'none'
            raise ValueError(f'{path} has labels of type {type}, such as {shown}. Expected integers or a ClassLabel.')
        found = _class_names(schema)
        if labels and found != names:
            raise ValueError(f'{path} has different class names than the files before it.')
        names = found
        if column.null_count:
            row = column.is_null().index(True).as_py()
            raise ValueError(f'{path}, row {row}: the label is null. Expected a class index.')
        values = column.to_numpy()
        highest = _HIGHEST_LABEL if names is None else len(names) - 1
        wrong = np.flatnonzero((values < 0) | (values > highest))
        if len(wrong):
            upper = f'0 to {highest}' if names else 'a class index from 0'
            raise ValueError(f'{path}, row {wrong[0]}: the label is {values[wrong[0]]}. Expected {upper}.')
        labels.append(values.astype(np.int64))
    return (np.concatenate(labels) if labels else None), names


def _class_names(schema: pa.Schema) -> Optional[List[str]]:
    """Return the names of a ClassLabel, which the `datasets` library stores in the metadata of the schema."""
    try:
        feature = json.loads(schema.metadata[b'huggingface'])['info']['features']['label']
        return [str(name) for name in feature['names']] if feature['_type'] == 'ClassLabel' else None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
