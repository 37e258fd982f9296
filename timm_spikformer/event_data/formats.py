"""Checks of files in the original formats, because spikingjelly reads them without checks.

The formats contain no checksums and, apart from AEDAT 3.1, no lengths. A file that was cut off between two events, or
that contains wrong values, is therefore not detected.
"""
import csv
import struct
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

__all__ = ['check_file', 'read_labels']

_NUM_GESTURES = 11


def check_file(path: Path, expected: str) -> None:
    """Check that a file is complete and contains events.

    Args:
        path: File to check.
        expected: Expected format: 'AEDAT 2.0', 'AEDAT 3.1' or 'ATIS'.

    Raises:
        ValueError: The file is empty or truncated, has no events, or has another format.
    """
    problem = _CHECKS[expected](path)
    if problem is not None:
        raise ValueError(
            f'{path} {problem}. Expected a complete file in the format {expected}. Unpack the archive again.')


def _check_atis(path: Path) -> Optional[str]:
    """Check events of 5 bytes: x, y, 1 bit of polarity, 23 bits of time."""
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        return 'is empty'
    return f'is damaged: its last event has {num_bytes % 5} of 5 bytes' if num_bytes % 5 else None


def _check_aedat2(path: Path) -> Optional[str]:
    """Check a header of lines that start with '#', and events of 8 bytes: address and time, big-endian."""
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        return 'is empty'
    with open(path, 'rb') as f:
        line = f.readline()
        if not line.startswith(b'#') or line.startswith(b'#!AER-DAT') and not line.startswith(b'#!AER-DAT2'):
            return f'starts with {line[:16]!r}, not with #!AER-DAT2'
        start = 0
        while line.startswith(b'#'):
            start += len(line)
            line = f.readline()
    if start == num_bytes:
        return 'has no events'
    rest = (num_bytes - start) % 8
    return f'is damaged: its last event has {rest} of 8 bytes' if rest else None


def _check_aedat3(path: Path) -> Optional[str]:
    """Check lines that start with '#', and packets: a header of 28 bytes, then polarity events (type 1) of 8 bytes."""
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        return 'is empty'
    num_events = 0
    with open(path, 'rb') as f:
        line = f.readline()
        if not line.startswith(b'#!AER-DAT3'):
            return f'starts with {line[:16]!r}, not with #!AER-DAT3.1'
        while line != b'#!END-HEADER\r\n':
            line = f.readline()
            if not line.startswith(b'#'):
                return 'is damaged: its header has no line #!END-HEADER'
        while True:
            header = f.read(28)
            if not header:
                break
            if len(header) < 28:
                return f'is damaged: the header of its last packet has {len(header)} of 28 bytes'
            kind, _, length, _, _, capacity = struct.unpack('<HHIIII', header[:20])
            if kind == 1 and length != 8:
                return f'is damaged: its polarity events have {length} bytes, expected 8'
            if f.tell() + capacity * length > num_bytes:
                return f'is damaged: its last packet has {num_bytes - f.tell()} of {capacity * length} bytes'
            f.seek(capacity * length, 1)
            num_events += capacity if kind == 1 else 0
    return None if num_events else 'has no events'


# each check returns a description of the problem, or None
_CHECKS: Dict[str, Callable[[Path], Optional[str]]] = {
    'AEDAT 2.0': _check_aedat2, 'AEDAT 3.1': _check_aedat3, 'ATIS': _check_atis}


def read_labels(path: Path) -> List[Tuple[int, int, int]]:
    """Read the label file of a recording of DVS128 Gesture.

    Returns:
        Class from 1 to 11, start time and end time in microseconds of each gesture.

    Raises:
        ValueError: The file is damaged, or has fewer than two gestures, which spikingjelly cannot read.
    """
    try:
        with open(path, newline='', encoding='utf-8') as f:
            rows = [tuple(int(value) for value in row) for row in [*csv.reader(f)][1:] if row]
        if len(rows) < 2:
            raise ValueError(f'expected at least 2 gestures, got {len(rows)}')
        for row in rows:
            if len(row) != 3 or not 1 <= row[0] <= _NUM_GESTURES or not 0 <= row[1] < row[2] < 2 ** 32:
                row = ','.join(map(str, row))
                raise ValueError(f'{row!r} is not a class from 1 to {_NUM_GESTURES}, a start time and a later end time')
    except (OSError, ValueError, csv.Error) as e:
        raise ValueError(
            f'{path} cannot be read: {e}. Expected the columns class, startTime_usec and endTime_usec. Unpack the '
            f'archive again.') from e
    return rows
