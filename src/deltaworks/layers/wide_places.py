"""Layers 5 to 7 where places in cells may have any number of bits, or numbers are kept as they are.

See `deltaworks.layers.places` for the others, which are most.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import inlined, inner
from deltaworks.checkpoints.memory_vector import load
from deltaworks.checkpoints.vector import (
    LANES,
    from_bytes,
    lanes,
    leading_zeros,
    lower_bytes,
    minimum,
    packed,
    select,
    splat,
    unpacked,
    upper_bytes,
)
from deltaworks.layers.arithmetic import cells_of, indices, number_at, scaled
from deltaworks.layers.bitstream import count_ones, interleaved, take_word
from deltaworks.layers.cells import DEPTH, EDGES, GROUP, RAW
from deltaworks.layers.opened import STRIDE, Parts, changed_of, next_bits, put_told, write_base

_ZERO, _ONE = np.uint32(0), np.uint32(1)


@inner
def decode_wide_places(
    row: NDArray[np.uint8],
    parts: Parts,
    base: NDArray[np.float32],
    count: int,
    weight: np.float32 | None,
    sums: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """A tile in which places may have any number of bits; see `put_told`."""
    depth, sparse, at, streams = parts.depth, parts.sparse, parts.signs, parts.streams
    bit2, bit3, bit4 = parts.planes[0] - at, parts.planes[1] - at, parts.planes[2] - at
    for i in range(0, count, STRIDE):
        code = int(row[parts.ranges + i // GROUP])
        where = changed_of(row, parts, i, count)
        if where != np.uint64(0) and code != 0 and (code != RAW or depth == DEPTH):
            cells = (
                next_bits(row, at, where, sparse),
                next_bits(row, at + bit2, where, sparse),
                next_bits(row, at + bit3, where, sparse),
                next_bits(row, at + bit4, where, sparse),
            )
            streams = _decode_wide(row, parts, streams, code, where, cells, base, i, weight, sums, out)
        elif weight is None:
            write_base(base, i, out)
        at += count_ones(where) if sparse else STRIDE


@inlined
def _width_of(last: Any) -> Any:
    """Bits of the places in a cell, of which this (U32) is the last."""
    return splat(np.uint32(32)) - leading_zeros(last)


@inner
def _decode_wide(
    row: NDArray[np.uint8],
    parts: Parts,
    streams: tuple[int, int, int],
    code: int,
    where: np.uint64,
    cells: tuple[np.uint64, np.uint64, np.uint64, np.uint64],
    base: NDArray[np.float32],
    start: int,
    weight: np.float32 | None,
    sums: NDArray[np.float32],
    out: NDArray[np.float32],
) -> tuple[int, int, int]:
    """STRIDE elements whose places in their cells may have any number of bits.

    Args:
        row: holds the bits.
        parts: of the tile.
        streams: where those of layers 5 to 7 begin.
        code: of the range; RAW where numbers are kept as they are.
        where: which elements changed.
        cells: what layers 3 and 4 tell of them.
        base: float32, [1, TILE].
        start: the first element.
        weight: see `put_told`.
        sums: likewise.
        out: likewise.

    Returns:
        Where the bits of the next elements begin.
    """
    depth = parts.depth
    first_bit, second_bit, third_bit = streams
    shift, zero, one, two = splat(parts.shift), splat(_ZERO), splat(_ONE), splat(np.uint32(2))
    twice, edges = lanes() + lanes(), scaled(EDGES, code, parts.range_top)
    for j in range(0, STRIDE, LANES):
        negative, i2, i3, i4 = cells
        changed = unpacked(np.uint32(where >> np.uint64(j)))
        if code == RAW:
            first, many, width = zero, zero, splat(np.uint32(32)) - shift
        else:
            i2, i3, i4 = i2 >> np.uint64(j), i3 >> np.uint64(j), i4 >> np.uint64(j)
            cell = indices(unpacked(np.uint32(i2)), unpacked(np.uint32(i3)), unpacked(np.uint32(i4)))
            down = unpacked(np.uint32(negative >> np.uint64(j)))
            first, many = cells_of(load(base, 0, start + j), down, edges, cell, shift)
            width = _width_of(many - one)
        pairs = interleaved(np.uint64(packed(changed & (width > zero))), np.uint64(packed(changed & (width > one))))
        found = (splat(np.uint32(take_word(row, first_bit, pairs))) >> twice) & splat(np.uint32(3))
        first_bit += count_ones(pairs)
        left = select(width > two, width - two, zero)
        if depth > 5:
            more = select(changed, minimum(left, splat(np.uint32(8))), zero)
            fields = (one << more) - one
            lower, upper = lower_bytes(fields), upper_bytes(fields)
            middle = second_bit + count_ones(lower)
            rest = from_bytes(take_word(row, second_bit, lower), take_word(row, middle, upper))
            second_bit = middle + count_ones(upper)
            found, left = (found << more) | rest, left - more
        if depth > 6:
            for n in range(32):
                reads = changed & (left > splat(np.uint32(n)))
                if packed(reads) == _ZERO:
                    break
                found, third_bit = _next_bit(row, third_bit, reads, found)
        else:
            # What is not told yet is taken to be in the middle.
            found = (found << left) + ((one << left) >> one)
            found = select(found < many, found, many - one)
        put_told(number_at(first + found, shift), where, base, start, j, weight, sums, out)
    return first_bit, second_bit, third_bit


@inlined
def _next_bit(row: NDArray[np.uint8], bit: int, reads: Any, found: Any) -> Any:
    """One more bit of the numbers that have one, and the place of the bits after."""
    wanted = packed(reads)
    one = splat(_ONE)
    more = select(unpacked(np.uint32(take_word(row, bit, np.uint64(wanted)))), one, splat(_ZERO))
    return select(reads, (found << one) | more, found), bit + count_ones(wanted)
