"""Loops of event-driven products, compiled by numba.

A product adds the weight rows of the nonzero inputs, instead of multiplying all inputs. Inputs are bytes,
`[N, H, W, C]`: spikes or sums of spikes, where a value v counts as v events. A linear layer is a 1x1 convolution.

Output channels are computed in blocks of 32 and input channels in chunks, so that the weights of one block and chunk
stay in the cache, and sums in registers. An output tile of a few rows of pixels is computed in two steps:

1. The events of its input rows are converted to lists of weight-row indices, one list per pixel, time step and chunk.
2. For each block and chunk, the weight rows of each list are added. All blocks use the same lists.

The order of additions depends only on shapes and events, not on the number of threads.

This module requires numba, so only `compiled` imports it, at first use.
"""
import numpy as np

from .simd import BLOCK, add_rows, append_indices, copy_indices

__all__ = ['convolve', 'largest_chunk', 'pack_weights', 'read_events', 'unpack_weights', 'weight_gradient']

MAX_EVENTS = 15  # largest value of an input


def largest_chunk(kernel_size: int) -> int:
    """Return the number of input channels per chunk; the weights of a block and a chunk then take 64 to 72 KiB."""
    return 64 if kernel_size == 3 else 512


def read_events(x, start, stop, out):
    """Convert floats to bytes.

    Args:
        x: float32 `[n]`.
        start: First element to convert.
        stop: End of the elements to convert, exclusive.
        out: Output, uint8 `[n]`.

    Returns:
        Sum and maximum of the converted elements; (-1, 0) if any of them is not an integer in [0, 15].
    """
    total = 0
    largest = np.int32(0)
    for i in range(start, stop, 4096):
        source, target = x[i:min(i + 4096, stop)], out[i:min(i + 4096, stop)]
        wrong, part, part_largest = 0, 0, np.int32(0)
        for j in range(len(source)):
            value = source[j]
            is_valid = value >= np.float32(0.) and value <= np.float32(MAX_EVENTS)
            integer = np.int32(value) if is_valid else np.int32(MAX_EVENTS + 1)
            target[j] = np.uint8(integer)
            wrong |= np.int32(np.float32(integer) != value)
            part += integer
            part_largest = max(part_largest, integer)
        if wrong != 0 or part_largest > MAX_EVENTS:
            return -1, 0
        total += part
        largest = max(largest, part_largest)
    return total, np.int64(largest)


def pack_weights(w, OC, C, taps, chunk, block0, block1, limit, packed):
    """Reorder weights to `[blocks, chunks, taps * chunk + 1, 32]`, rows of 32 output channels.

    The last row of each block and chunk is 0; it pads the lists of row indices.

    Args:
        w: float32 `[OC * taps * C]`.
        OC: Output channels.
        C: Input channels.
        taps: Number of kernel positions, the squared kernel size.
        chunk: Input channels in a chunk.
        block0: First block to write.
        block1: End of the blocks to write, exclusive.
        limit: Largest allowed absolute value.
        packed: Output, float32 `[blocks * chunks * (taps * chunk + 1) * 32]`.

    Returns:
        Whether all weights are finite and within the limit.
    """
    num_chunks = (C + chunk - 1) // chunk
    rows = taps * chunk + 1
    is_fine = True
    tile = np.empty(BLOCK * BLOCK, np.float32)
    for block in range(block0, block1):
        width = min(BLOCK, OC - block * BLOCK)
        for part in range(num_chunks):
            base = (block * num_chunks + part) * rows * BLOCK
            num_channels = min(chunk, C - part * chunk)
            _clear(packed[base + (rows - 1) * BLOCK:base + rows * BLOCK])
            if num_channels < chunk:
                packed[base:base + rows * BLOCK] = 0.
            for tap in range(taps):
                for c in range(0, num_channels, BLOCK):
                    source = (block * BLOCK * taps + tap) * C + part * chunk + c
                    target = base + (tap * chunk + c) * BLOCK
                    if width == BLOCK and num_channels - c >= BLOCK:
                        for j in range(BLOCK):
                            i = source + j * taps * C
                            _copy(w[i:i + BLOCK], tile[j * BLOCK:(j + 1) * BLOCK])
                        _transpose(tile, packed[target:target + BLOCK * BLOCK])
                    else:
                        for i in range(min(BLOCK, num_channels - c)):
                            for j in range(BLOCK):
                                value = w[source + j * taps * C + i] if j < width else np.float32(0.)
                                packed[target + i * BLOCK + j] = value
            is_fine &= _all_within(packed[base:base + rows * BLOCK], limit)
    return is_fine


def unpack_weights(packed, OC, C, taps, block0, block1, w):
    """Reorder rows of 32 output channels, `[blocks, taps, C, 32]`, to `[OC, taps, C]`.

    Args:
        packed: float32 `[blocks * taps * C * 32]`.
        OC: Output channels.
        C: Input channels.
        taps: Number of kernel positions, the squared kernel size.
        block0: First block to write.
        block1: End of the blocks to write, exclusive.
        w: Output, float32 `[OC * taps * C]`.
    """
    tile = np.empty(BLOCK * BLOCK, np.float32)
    for block in range(block0, block1):
        width = min(BLOCK, OC - block * BLOCK)
        for tap in range(taps):
            for c in range(0, C, BLOCK):
                source = ((block * taps + tap) * C + c) * BLOCK
                target = (block * BLOCK * taps + tap) * C + c
                if C - c >= BLOCK:
                    _transpose(packed[source:source + BLOCK * BLOCK], tile)
                    for j in range(width):
                        i = target + j * taps * C
                        _copy(tile[j * BLOCK:(j + 1) * BLOCK], w[i:i + BLOCK])
                else:
                    for i in range(C - c):
                        for j in range(width):
                            w[target + j * taps * C + i] = packed[source + i * BLOCK + j]


def _all_within(values, limit):
    """Return whether all absolute values are finite and at most `limit`."""
    wrong = 0
    for i in range(len(values)):
        wrong |= np.int32(not abs(values[i]) <= limit)
    return wrong == 0


# The following helpers loop over 32 elements; numba vectorizes such loops of constant length.

def _fire(sums, scale, shift, membrane, tau, v_threshold, spikes):
    """Write the spikes of 32 neurons for one time step, as bytes, and update their membrane potentials."""
    for j in range(BLOCK):
        v = membrane[j]
        v += (sums[j] * scale[j] + shift[j] - v) / tau
        is_spike = v >= v_threshold
        membrane[j] = np.float32(0.) if is_spike else v
        spikes[j] = np.uint8(is_spike)


def _copy(source, target):
    """Copy 32 values, converted to the dtype of `target`."""
    for j in range(BLOCK):
        target[j] = source[j]


def _clear(target):
    """Set 32 values to 0."""
    for j in range(BLOCK):
        target[j] = 0


def _transpose(source, target):
    """Copy a matrix of 32 x 32 values, transposed."""
    for i in range(BLOCK):
        for j in range(BLOCK):
            target[i * BLOCK + j] = source[j * BLOCK + i]


def _add(source, values, target):
    """Add two arrays of 32 values."""
    for j in range(BLOCK):
        target[j] = source[j] + values[j]


def _copy_and_check(source, target, check):
    """Copy 32 floats. `check`, 32 floats initialized to 0, stays 0 if all are finite and otherwise becomes NaN."""
    for j in range(BLOCK):
        value = source[j]
        target[j] = value
        check[j] += value * np.float32(0.)


def _append_row(x, i, W, C, c0, c1, chunk, max_events, byte_indices, byte_counts, out, n0, offsets, o):
    """Append the events of one image row, channels c0 to c1, to `out[n0:]` as `column * chunk + channel - c0`.

    Set `offsets[o + column]` to the number of events before that column; return the number of events in the row.
    """
    n = n0
    for column in range(W):
        offsets[o + column] = n - n0
        start = i + column * C
        first = column * chunk - c0
        if max_events == 1:
            for c in range(c0, c1, 8):
                n = append_indices(x, start + c, byte_indices, byte_counts, out, n, first + c)
        else:
            for c in range(c0, c1):
                value = x[start + c]
                out[n] = first + c
                n += np.int64(value > 0)
                out[n] = first + c
                n += np.int64(value > 1)
                for _ in range(2, value):
                    out[n] = first + c
                    n += 1
    offsets[o + W] = n - n0
    return n - n0


def convolve(
        x, w, T, B, H, W, C, OC, k, pad, chunk, tile_rows, tile0, tile1, block0, block1, max_events,
        out, out_bytes, sn, sy, sx, so, is_fused, scale, shift, tau, v_threshold, byte_indices, byte_counts):
    """Convolve events, `[T * B, H, W, C] -> [T * B, H', W', OC]`, with stride 1; optionally followed by BN and LIF.

    Args:
        x: Input, uint8 `[T * B * H * W * C]`.
        w: Weights from `pack_weights`, float32, flat.
        T: Time steps.
        B: Batch size.
        H: Height of the input.
        W: Width of the input.
        C: Input channels, a multiple of 8.
        OC: Output channels.
        k: Kernel size.
        pad: Padding.
        chunk: Input channels in a chunk.
        tile_rows: Rows of the output in a tile.
        tile0: First tile to compute; tiles are numbered across images.
        tile1: End of the tiles to compute, exclusive.
        block0: First block of output channels to compute.
        block1: End of the blocks to compute, exclusive.
        max_events: Largest value of x.
        out: Output, float32, flat; empty if spikes are written as bytes.
        out_bytes: Output, uint8, flat; empty if the output is float32.
        sn: Stride of the output between images, in elements.
        sy: Stride of the output between rows.
        sx: Stride of the output between columns.
        so: Stride of the output between channels.
        is_fused: Whether to write the spikes of LIF neurons with the input current `product * scale + shift`; otherwise
            `product + shift` is written.
        scale: float32; its length is OC rounded up to a multiple of 32.
        shift: float32, of the same length as `scale`.
        tau: Membrane time constant.
        v_threshold: Firing threshold.
        byte_indices: `simd.BYTE_INDICES`.
        byte_counts: `simd.BYTE_COUNTS`.
    """
    num_chunks = (C + chunk - 1) // chunk
    num_rows = k * k * chunk + 1  # weight rows in a block and a chunk; the last is 0
    OH, OW = H + 2 * pad - k + 1, W + 2 * pad - k + 1
    tiles_per_image = (OH + tile_rows - 1) // tile_rows
    max_rows = tile_rows + k - 1
    # ring buffer with the events of the input rows of a tile; consecutive tiles share k - 1 rows
    capacity = W * chunk * max_events + 32
    events = np.empty(max_rows * T * num_chunks * capacity + 32, np.uint16)
    offsets = np.empty(max_rows * T * num_chunks * (W + 1), np.int32)
    counts = np.zeros(max_rows, np.int64)
    row_in_slot = np.full(max_rows, -1, np.int64)
    max_pairs = tile_rows * OW * T
    lists = np.empty(1, np.uint16)
    starts = np.empty(num_chunks * max_pairs + 1, np.int64)
    sums = np.empty(max_pairs * BLOCK, np.float32)
    membrane = np.empty(BLOCK, np.float32)
    spikes = np.empty(BLOCK, np.uint8)
    has_bytes = len(out_bytes) > 0
    for tile in range(tile0, tile1):
        b = tile // tiles_per_image
        y0 = tile % tiles_per_image * tile_rows
        y1 = min(OH, y0 + tile_rows)
        num_pairs = (y1 - y0) * OW * T
        total = 0
        for y in range(max(0, y0 - pad), min(H, y1 - 1 - pad + k)):
            slot = y % max_rows
            if row_in_slot[slot] != b * H + y:
                row_in_slot[slot] = b * H + y
                counts[slot] = 0
                for t in range(T):
                    for part in range(num_chunks):
                        i = (slot * T + t) * num_chunks + part
                        c0 = part * chunk
                        counts[slot] += _append_row(
                            x, ((t * B + b) * H + y) * W * C, W, C, c0, min(C, c0 + chunk), chunk, max_events,
                            byte_indices, byte_counts, events, i * capacity, offsets, i * (W + 1))
            total += counts[slot]
        needed = k * k * total + 4 * num_pairs * num_chunks + 64
        if len(lists) < needed:
            lists = np.empty(needed + needed // 4, np.uint16)
        n = 0
        pair = 0
        for part in range(num_chunks):
            for y in range(y0, y1):
                for column in range(OW):
                    left, right = max(0, column - pad), min(W, column - pad + k)
                    for t in range(T):
                        starts[pair] = n
                        pair += 1
                        start = n
                        for ky in range(k):
                            row = y - pad + ky
                            if row < 0 or row >= H:
                                continue
                            i = (row % max_rows * T + t) * num_chunks + part
                            first = offsets[i * (W + 1) + left]
                            length = offsets[i * (W + 1) + right] - first
                            offset = (ky * k - column + pad) * chunk
                            for j in range(0, length, 32):
                                copy_indices(events, i * capacity + first + j, lists, n + j, offset)
                            n += length
                        for j in range(4):
                            lists[n + j] = num_rows - 1
                        n = start + ((n - start + 3) & ~3)
        starts[pair] = n
        for block in range(block0, block1):
            for part in range(num_chunks):
                base = (block * num_chunks + part) * num_rows * BLOCK
                for pair in range(num_pairs):
                    i = part * num_pairs + pair
                    add_rows(w, base, lists, starts[i], starts[i + 1], sums, pair * BLOCK, part == 0)
            c0 = block * BLOCK
            width = min(BLOCK, OC - c0)
            is_vector = so == 1 and width == BLOCK
            block_scale, block_shift = scale[c0:c0 + BLOCK], shift[c0:c0 + BLOCK]
            for pixel in range(num_pairs // T):
                y, column = y0 + pixel // OW, pixel % OW
                target = b * sn + y * sy + column * sx + c0 * so
                _clear(membrane)
                for t in range(T):
                    i = (pixel * T + t) * BLOCK
                    o = target + t * B * sn
                    if is_fused:
                        _fire(sums[i:i + BLOCK], block_scale, block_shift, membrane, tau, v_threshold, spikes)
                        if not is_vector:
                            for j in range(width):
                                if has_bytes:
                                    out_bytes[o + j * so] = spikes[j]
                                else:
                                    out[o + j * so] = spikes[j]
                        elif has_bytes:
                            _copy(spikes, out_bytes[o:o + BLOCK])
                        else:
                            _copy(spikes, out[o:o + BLOCK])
                    elif is_vector:
                        _add(sums[i:i + BLOCK], block_shift, out[o:o + BLOCK])
                    else:
                        for j in range(width):
                            out[o + j * so] = sums[i + j] + block_shift[j]


def weight_gradient(
        x, grad, sn, sy, sx, so, N, H, W, C, OC, k, pad, tile_images, tile_rows, c0, c1, max_events, out,
        byte_indices, byte_counts):
    """Accumulate the weight gradient of a convolution of events, for input channels c0 to c1.

    For each event, the matching rows of the output gradient are added.

    Args:
        x: Input, uint8 `[N * H * W * C]`.
        grad: Output gradient, float32, flat.
        sn: Stride of `grad` between images, in elements.
        sy: Stride of `grad` between rows.
        sx: Stride of `grad` between columns.
        so: Stride of `grad` between channels.
        N: Number of images.
        H: Height of the input.
        W: Width of the input.
        C: Input channels, a multiple of 8.
        OC: Output channels.
        k: Kernel size.
        pad: Padding.
        tile_images: Images in a tile.
        tile_rows: Rows of the input in a tile.
        c0: First input channel, a multiple of 8.
        c1: End of the input channels, exclusive.
        max_events: Largest value of x.
        out: Output, float32 `[blocks * k * k * C * 32]`, initialized to 0: rows of 32 output channels.
        byte_indices: `simd.BYTE_INDICES`.
        byte_counts: `simd.BYTE_COUNTS`.

    Returns:
        Whether the output gradient is finite. If not, the result is invalid, because the products of zero inputs with
        NaN or infinity, which are NaN, are missing.
    """
    check = np.zeros(BLOCK, np.float32)
    border = k - 1
    OH, OW = H + 2 * pad - border, W + 2 * pad - border
    num_blocks = (OC + BLOCK - 1) // BLOCK
    padded = W + border
    image = (tile_rows + border) * padded  # number of rows of 32 values per image in a gradient tile
    zero_row = image * tile_images  # from here on, rows are 0 for every kernel position
    tile = np.zeros((zero_row + border * padded + border + 1) * BLOCK, np.float32)
    capacity = tile_images * tile_rows * W * max_events + 8
    pixels = np.empty((c1 - c0) * capacity, np.uint16)  # pixel indices of the events of each channel
    counts = np.empty(c1 - c0, np.int64)
    channels = np.empty((c1 - c0) * max_events + 8, np.uint16)
    offsets = np.empty(2, np.int32)
    for n0 in range(0, N, tile_images):
        n1 = min(N, n0 + tile_images)
        for y0 in range(0, H, tile_rows):
            y1 = min(H, y0 + tile_rows)
            counts[:] = 0
            for n in range(n0, n1):
                for y in range(y0, y1):
                    for column in range(W):
                        pixel = (n - n0) * image + (y - y0) * padded + column
                        length = _append_row(
                            x, ((n * H + y) * W + column) * C, 1, C, c0, c1, 0, max_events,
                            byte_indices, byte_counts, channels, 0, offsets, 0)
                        for i in range(length):
                            c = np.int64(channels[i])
                            pixels[c * capacity + counts[c]] = pixel
                            counts[c] += 1
            for c in range(c1 - c0):
                while counts[c] & 3:
                    pixels[c * capacity + counts[c]] = zero_row
                    counts[c] += 1
            for block in range(num_blocks):
                width = min(BLOCK, OC - block * BLOCK)
                for n in range(n0, n1):
                    for row in range(tile_rows + border):
                        y = y0 + pad - border + row
                        start = ((n - n0) * image + row * padded) * BLOCK
                        if y < 0 or y >= OH:
                            tile[start:start + padded * BLOCK] = 0.
                            continue
                        source = n * sn + y * sy + block * BLOCK * so
                        for column in range(padded):
                            target = start + column * BLOCK
                            at = column + pad - border
                            if at < 0 or at >= OW:
                                tile[target:target + BLOCK] = 0.
                                continue
                            at = source + at * sx
                            if so == 1 and width == BLOCK:
                                _copy_and_check(grad[at:at + BLOCK], tile[target:target + BLOCK], check)
                            else:
                                for j in range(width):
                                    tile[target + j] = grad[at + j * so]
                                    check[j] += grad[at + j * so] * np.float32(0.)
                for ky in range(k):
                    for kx in range(k):
                        base = ((border - ky) * padded + border - kx) * BLOCK
                        target = (block * k * k + ky * k + kx) * C
                        for c in range(c1 - c0):
                            add_rows(
                                tile, base, pixels, c * capacity, c * capacity + counts[c], out,
                                (target + c0 + c) * BLOCK, False)
    return check.sum() == 0.
