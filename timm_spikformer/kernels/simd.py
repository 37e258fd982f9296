"""Vector operations for `event_loops`, written as LLVM intrinsics because numba does not vectorize their loops.

Each operation has a plain Python counterpart with the same arguments and results, which numba can also compile. LLVM
selects the machine's instructions (AVX2, AVX-512, NEON), so the operations are portable.

This module imports numba, so it is imported only by `event_loops`.
"""
import numpy as np

try:  # transformers treats imports outside `try` as requirements of remote code
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic
except ImportError:
    raise

__all__ = [
    'BLOCK',
    'BYTE_COUNTS',
    'BYTE_INDICES',
    'SEGMENT',
    'add_rows',
    'add_rows_plain',
    'append_indices',
    'append_indices_plain',
    'copy_indices',
    'copy_indices_plain',
]

BLOCK = 32  # output channels accumulated in registers, in two chains of 4 AVX2 or 2 AVX-512 vectors each

SEGMENT = 32  # rows in a partial sum, which is then added to the result: shorter chains have less rounding error
# For each byte value: the positions of its set bits, padded to 8, and their number.
_BITS = [[i for i in range(8) if byte >> i & 1] for byte in range(256)]
BYTE_INDICES = np.array([bits + [0] * (8 - len(bits)) for bits in _BITS], np.uint8).ravel()
BYTE_COUNTS = np.array([len(bits) for bits in _BITS], np.uint8)

_i8, _i16, _i32, _i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_floats = ir.VectorType(ir.FloatType(), BLOCK)


def _data(context, builder, array_type, value):
    return context.make_array(array_type)(context, builder, value).data


def _vector_at(builder, data, offset, vector_type):
    return builder.bitcast(builder.gep(data, [offset]), vector_type.as_pointer())


def _broadcast(builder, value, lanes):
    vector = builder.insert_element(
        ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, ir.Constant(_i32, 0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_i32, lanes), [0] * lanes))


@intrinsic
def add_rows(typingctx, rows, base, indices, start, stop, total, offset, is_first):
    """Add rows of 32 floats: `total[offset:offset + 32] (+)= sum of rows[base + 32 * i:][:32] for i in indices`.

    Args:
        rows: float32, flat.
        base: Offset of row 0 in `rows`.
        indices: Row indices, uint16, flat.
        start: Position in `indices` of the first index to use.
        stop: End of the indices to use, exclusive; `stop - start` is a multiple of 4.
        total: Output, float32, flat.
        offset: Offset of the result in `total`.
        is_first: Whether to overwrite `total` instead of adding to it.
    """
    signature = types.void(
        rows, types.int64, indices, types.int64, types.int64, total, types.int64, types.boolean)

    def codegen(context, builder, signature, args):
        rows_data, indices_data, total_data = (_data(context, builder, signature.args[i], args[i]) for i in (0, 2, 5))
        _, base, _, start, stop, _, offset, is_first = args
        target = _vector_at(builder, total_data, offset, _floats)
        origin = builder.gep(rows_data, [base])
        zero = ir.Constant(_floats, None)
        entry = builder.block
        segment, head, body, end, finish, add, store = (
            builder.append_basic_block(name)
            for name in ('segment', 'head', 'body', 'end', 'finish', 'add', 'store'))
        builder.branch(segment)

        builder.position_at_end(segment)  # up to SEGMENT rows, whose sums are then added to the result
        begin = builder.phi(_i64)
        result = builder.phi(_floats)
        begin.add_incoming(start, entry)
        result.add_incoming(zero, entry)
        far = builder.add(begin, ir.Constant(_i64, SEGMENT))
        limit = builder.select(builder.icmp_signed('<', far, stop), far, stop)
        builder.cbranch(builder.icmp_signed('<', begin, stop), head, finish)

        builder.position_at_end(head)
        k = builder.phi(_i64)
        sums = [builder.phi(_floats) for _ in range(2)]
        k.add_incoming(begin, segment)
        for s in sums:
            s.add_incoming(zero, segment)
        builder.cbranch(builder.icmp_signed('<', k, limit), body, end)

        builder.position_at_end(body)
        new_sums = list(sums)
        for j in range(4):
            index = builder.load(builder.gep(indices_data, [builder.add(k, ir.Constant(_i64, j))]))
            row = builder.mul(builder.zext(index, _i64), ir.Constant(_i64, BLOCK))
            values = builder.load(_vector_at(builder, origin, row, _floats), align=4)
            new_sums[j % 2] = builder.fadd(new_sums[j % 2], values)
        k.add_incoming(builder.add(k, ir.Constant(_i64, 4)), body)
        for s, new in zip(sums, new_sums):
            s.add_incoming(new, body)
        builder.branch(head)

        builder.position_at_end(end)
        begin.add_incoming(limit, end)
        result.add_incoming(builder.fadd(result, builder.fadd(*sums)), end)
        builder.branch(segment)

        builder.position_at_end(finish)
        builder.cbranch(is_first, store, add)
        builder.position_at_end(add)
        both = builder.fadd(builder.load(target, align=4), result)
        builder.branch(store)
        builder.position_at_end(store)
        value = builder.phi(_floats)
        value.add_incoming(result, finish)
        value.add_incoming(both, add)
        builder.store(value, target, align=4)
        return context.get_dummy_value()

    return signature, codegen


def add_rows_plain(rows, base, indices, start, stop, total, offset, is_first):
    """Plain counterpart of `add_rows`."""
    for j in range(BLOCK):
        result = np.float32(0.)
        for begin in range(start, stop, SEGMENT):
            even = odd = np.float32(0.)
            for k in range(begin, min(begin + SEGMENT, stop), 2):
                even += rows[base + np.int64(indices[k]) * BLOCK + j]
                odd += rows[base + np.int64(indices[k + 1]) * BLOCK + j]
            result += even + odd
        total[offset + j] = result if is_first else total[offset + j] + result


@intrinsic
def append_indices(typingctx, values, i, byte_indices, byte_counts, out, n, first):
    """Append `first + j` to `out` for each j from 0 to 7 where `values[i + j]` is 1; return the new length `n`.

    Up to 8 elements from `out[n]` on are overwritten, even if fewer are appended.

    Args:
        values: 0 or 1, uint8, flat.
        i: Offset of the 8 bytes in `values`.
        byte_indices: `BYTE_INDICES`.
        byte_counts: `BYTE_COUNTS`.
        out: Output, uint16, flat.
        n: Number of indices already in `out`.
        first: Index that stands for `values[i]`.
    """
    signature = types.int64(values, types.int64, byte_indices, byte_counts, out, types.int64, types.int64)
    vector = ir.VectorType(_i16, 8)

    def codegen(context, builder, signature, args):
        values_data, indices_data, counts_data, out_data = (
            _data(context, builder, signature.args[j], args[j]) for j in (0, 2, 3, 4))
        _, i, _, _, _, n, first = args
        word = builder.load(builder.bitcast(builder.gep(values_data, [i]), _i64.as_pointer()), align=1)
        # the multiplication gathers bit 0 of each byte into the highest byte
        byte = builder.lshr(builder.mul(word, ir.Constant(_i64, 0x0102040810204080)), ir.Constant(_i64, 56))
        positions = builder.load(_vector_at(
            builder, indices_data, builder.mul(byte, ir.Constant(_i64, 8)), ir.VectorType(_i8, 8)), align=1)
        indices = builder.add(builder.zext(positions, vector), _broadcast(builder, builder.trunc(first, _i16), 8))
        builder.store(indices, _vector_at(builder, out_data, n, vector), align=2)
        return builder.add(n, builder.zext(builder.load(builder.gep(counts_data, [byte])), _i64))

    return signature, codegen


def append_indices_plain(values, i, byte_indices, byte_counts, out, n, first):
    """Plain counterpart of `append_indices`."""
    for j in range(8):
        out[n] = first + j
        n += np.int64(values[i + j])
    return n


@intrinsic
def copy_indices(typingctx, source, i, target, n, offset):
    """Copy 32 elements: `target[n:n + 32] = source[i:i + 32] + offset`, modulo 2^16.

    Args:
        source: uint16, flat.
        i: Offset in `source`.
        target: Output, uint16, flat.
        n: Offset in `target`.
        offset: Number to add.
    """
    signature = types.void(source, types.int64, target, types.int64, types.int64)
    vector = ir.VectorType(_i16, 32)

    def codegen(context, builder, signature, args):
        source_data, target_data = (_data(context, builder, signature.args[j], args[j]) for j in (0, 2))
        _, i, _, n, offset = args
        values = builder.load(_vector_at(builder, source_data, i, vector), align=2)
        values = builder.add(values, _broadcast(builder, builder.trunc(offset, _i16), 32))
        builder.store(values, _vector_at(builder, target_data, n, vector), align=2)
        return context.get_dummy_value()

    return signature, codegen


def copy_indices_plain(source, i, target, n, offset):
    """Plain counterpart of `copy_indices`."""
    for j in range(32):
        target[n + j] = np.uint16((np.int64(source[i + j]) + offset) & 0xffff)
