"""Write small event-camera datasets in their original binary formats."""
import struct
from pathlib import Path
from typing import Iterable, Optional, Tuple

import numpy as np

from timm_spikformer.event_data.catalog import DATASETS
from timm_spikformer.event_data.frames import Events

__all__ = [
    'random_events', 'write_aedat2', 'write_aedat3', 'write_atis', 'write_cifar10_dvs', 'write_dvs128_gesture',
    'write_n_caltech101', 'write_n_mnist']


def random_events(size: Tuple[int, int], count: int = 50, seed: int = 0, start: int = 0) -> Events:
    """Return random events, sorted by time, about 100 microseconds apart."""
    rng = np.random.default_rng(seed)
    return Events(
        t=start + np.sort(rng.integers(0, 100 * count, count)),
        x=rng.integers(0, size[1], count),
        y=rng.integers(0, size[0], count),
        p=rng.integers(0, 2, count),
    )


def write_aedat2(path: Path, events: Events) -> None:
    """Write a file of CIFAR10-DVS: lines of text, then pairs of address and time, big-endian.

    Bits 8 to 14 of the address are 127 - x, bits 1 to 7 are 127 - y, and bit 0 is 1 - p. From these, spikingjelly reads
    the given events.
    """
    address = (127 - events.x) << 8 | (127 - events.y) << 1 | (1 - events.p)
    header = b'#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Timestamps tick is 1 us\r\n'
    path.write_bytes(header + np.stack([address, events.t], 1).astype('>u4').tobytes())


def write_aedat3(path: Path, events: Events, packet: int = 16, other_packets: bool = True) -> None:
    """Write a file of DVS128 Gesture: lines of text, then packets of events, little-endian.

    Args:
        packet: Number of events per packet.
        other_packets: Also write a packet of special events, which readers have to skip.
    """
    data = b'#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n'

    def header(kind: int, count: int) -> bytes:
        return struct.pack('<HHIIIIII', kind, 1, 8, 4, 0, count, count, count)

    if other_packets:
        data += header(0, 1) + struct.pack('<II', 1, int(events.t[0]))
    for i in range(0, len(events.t), packet):
        t, x, y, p = (array[i:i + packet] for array in events)
        data += header(1, len(t)) + np.stack([x << 17 | y << 2 | p << 1 | 1, t], 1).astype('<u4').tobytes()
    path.write_bytes(data)


def write_atis(path: Path, events: Events) -> None:
    """Write a file of N-MNIST or N-Caltech101: events of 40 bits: x, y, polarity, and 23 bits of time, big-endian."""
    t = events.t
    columns = [events.x, events.y, events.p << 7 | t >> 16, t >> 8 & 255, t & 255]
    path.write_bytes(np.stack(columns, 1).astype(np.uint8).tobytes())


def write_cifar10_dvs(folder: Path, numbers: Iterable[int] = (*range(8), 10, 100), count: int = 50) -> None:
    """Write the unpacked archives of CIFAR10-DVS: for each class, recordings with the given numbers."""
    for label, name in enumerate(DATASETS['cifar10_dvs'].classes):
        (folder / name).mkdir(parents=True)
        for i in numbers:
            events = random_events((128, 128), count, seed=1000 * label + i)
            write_aedat2(folder / name / f'cifar10_{name}_{i}.aedat', events)


def write_dvs128_gesture(folder: Path, labels: Optional[Iterable[int]] = None, count: int = 50) -> None:
    """Write the unpacked archive of DVS128 Gesture: one recording for training and one for testing.

    Gesture i of a recording, counted from 0, lasts from 1,000,000 i to 1,000,000 i + 500,000 microseconds. Between the
    gestures are events that belong to no gesture.

    Args:
        labels: Classes of the gestures of each recording, from 1 to 11; by default, all classes.
    """
    labels = [*(range(1, 12) if labels is None else labels)]
    folder = folder / 'DvsGesture'
    folder.mkdir(parents=True)
    for user, split in ((1, 'train'), (24, 'test')):
        name = f'user{user:02}_lab'
        (folder / f'trials_to_{split}.txt').write_text(f'{name}.aedat\n')
        parts, rows = [], ['class,startTime_usec,endTime_usec']
        for i, label in enumerate(labels):
            parts.append(random_events((128, 128), count, seed=100 * user + i, start=1_000_000 * i))
            parts.append(random_events((128, 128), 5, seed=i, start=1_000_000 * i + 600_000))
            rows.append(f'{label},{1_000_000 * i},{1_000_000 * i + 500_000}')
        events = Events(*(np.concatenate(arrays) for arrays in zip(*parts)))
        write_aedat3(folder / f'{name}.aedat', events)
        (folder / f'{name}_labels.csv').write_text('\n'.join(rows) + '\n')


def write_n_mnist(folder: Path, per_class: int = 2, count: int = 50) -> None:
    """Write the unpacked archives of N-MNIST."""
    for k, split in enumerate(('Train', 'Test')):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(per_class):
                events = random_events((34, 34), count, seed=k * 1000 + label * 100 + i)
                write_atis(folder / split / str(label) / f'{label * per_class + i + 1:05}.bin', events)


def write_n_caltech101(
        folder: Path,
        classes: Iterable[str] = ('BACKGROUND_Google', 'accordion', 'yin_yang'),
        per_class: int = 10,
        count: int = 50,
) -> None:
    """Write the unpacked archive of N-Caltech101."""
    for k, name in enumerate(classes):
        (folder / 'Caltech101' / name).mkdir(parents=True)
        for i in range(per_class):
            events = random_events((180, 240), count, seed=100 * k + i)
            write_atis(folder / 'Caltech101' / name / f'image_{i + 1:04}.bin', events)
