"""Layers 5 to 7: which of the numbers in its cell each element is, inside compiled kernels."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.byte_vector import (
    bytes_above,
    bytes_where,
    from_words,
    less_one,
    lookup_bytes,
    narrowed,
    shifted_sum,
    widened,
    words_of,
)
from deltaworks.checkpoints.jit import inlined, inner
from deltaworks.checkpoints.vector import (
    LANES,
    from_bytes,
    lanes,
    leading_zeros,
    load,
    lookup,
    lower_bytes,
    maximum,
    minimum,
    packed,
    select,
    splat,
    unpacked,
    upper_bytes,
)
from deltaworks.layers.arithmetic import cells_of, indices, number_at, places_of, scaled, signed
from deltaworks.layers.bitstream import EVEN, ODD, count_ones, gather, interleaved, take_word
from deltaworks.layers.cells import DEPTH, EDGES, GROUP, RAW
from deltaworks.layers.opened import STRIDE, Parts, changed_of, next_bits, write_base, write_told

_ZERO, _ONE = np.uint32(0), np.uint32(1)
_HALF = np.uint64(0xFFFFFFFF)
_WIDEST = 16
"""Bits of the widest place in a cell that is found together with STRIDE - 1 others."""
_NARROW_FROM = 32 - _WIDEST
"""Types that leave so many bits of a float32 at zero have no wider ones."""
_TOLD_BITS = 10
"""Bits of a place that layers 5 and 6 tell."""


def _table_of(values: Iterable[int]) -> tuple[np.uint64, np.uint64]:
    """What widths from 1 to _WIDEST stand for; see `lookup_bytes`."""
    words = np.array([*values], np.uint8).view(np.uint64)
    return words[0], words[1]


_SECOND = [min(max(0, width - 2), 8) for width in range(1, _WIDEST + 1)]
_THIRD = [max(0, width - _TOLD_BITS) for width in range(1, _WIDEST + 1)]
_SECOND_BITS, _THIRD_BITS = _table_of(_SECOND), _table_of(_THIRD)
_SECOND_FIELDS = _table_of((1 << n) - 1 for n in _SECOND)
_SECOND_MIDDLES, _THIRD_MIDDLES = (_table_of(1 << n >> 1 for n in part) for part in (_SECOND, _THIRD))
"""Of places of every width: how many bits are in layers 6 and 7, as many ones, and the middle of what they can say."""


@inner
def decode_places(
    row: NDArray[np.uint8], parts: Parts, base: NDArray[np.float32], count: int, out: NDArray[np.float32]
) -> None:
    """A tile of which 5, 6 or 7 layers were asked for; see `decode_tile`."""
    depth, top = parts.depth, parts.range_top
    sparse, at = parts.sparse, parts.signs
    bit2, bit3, bit4 = parts.planes[0] - at, parts.planes[1] - at, parts.planes[2] - at
    first, second, third = parts.streams
    shift, one = splat(parts.shift), splat(_ONE)
    eight = splat(np.uint32(8))
    own = lanes() & splat(np.uint32(7))
    for g in range(0, count, GROUP):
        code = int(row[parts.ranges + g // GROUP])
        raw = code == RAW
        known = code != 0 and (not raw or depth == DEPTH)
        wide = raw or parts.shift < _NARROW_FROM
        edges = scaled(EDGES, max(1, code), top)
        # The two ends of every cell, those of positive deltas in the first eight lanes.
        inner, outer = lookup(edges, own), lookup(edges, own + one)
        low = signed(lanes() >= eight, outer, inner)
        high = signed(lanes() >= eight, inner, outer)
        for i in range(g, min(g + GROUP, count), STRIDE):
            where = changed_of(row, parts, i, count)
            if known and where != np.uint64(0):
                negative = next_bits(row, at, where, sparse)
                i2 = next_bits(row, at + bit2, where, sparse)
                i3 = next_bits(row, at + bit3, where, sparse)
                i4 = next_bits(row, at + bit4, where, sparse)
                if wide:
                    cells = (negative, i2, i3, i4)
                    first, second, third = _decode_wide(
                        row, (first, second, third), depth, code, top, where, cells, parts.shift, base, i, out
                    )
                else:
                    cell = bytes_where(negative, np.uint8(8)) | bytes_where(i2, np.uint8(4))
                    cell = cell | bytes_where(i3, np.uint8(2)) | bytes_where(i4, np.uint8(1))
                    a, b, c, d = widened(cell)
                    first_a, last_a = _ends_of(base, i, a, low, high, shift)
                    first_b, last_b = _ends_of(base, i + LANES, b, low, high, shift)
                    first_c, last_c = _ends_of(base, i + 2 * LANES, c, low, high, shift)
                    first_d, last_d = _ends_of(base, i + 3 * LANES, d, low, high, shift)
                    widths = bytes_where(
                        where, narrowed((_width_of(last_a), _width_of(last_b), _width_of(last_c), _width_of(last_d)))
                    )
                    index = less_one(widths)
                    found, first = _take_pairs(row, first, widths)
                    rest = lookup_bytes(_SECOND_MIDDLES, index)
                    if depth > 5:
                        rest, second = _take_bytes(row, second, lookup_bytes(_SECOND_FIELDS, index))
                    places = shifted_sum(found, lookup_bytes(_SECOND_BITS, index), rest)
                    if bytes_above(widths, np.uint8(_TOLD_BITS)) != np.uint64(0):
                        # What is not told is taken to be in the middle, of layer 5 by what was added already.
                        rest = bytes_where(np.uint64(0), np.uint8(0))
                        if depth > 6:
                            rest, third = _take_planes(row, third, widths)
                        elif depth > 5:
                            rest = lookup_bytes(_THIRD_MIDDLES, index)
                        places = shifted_sum(places, lookup_bytes(_THIRD_BITS, index), rest)
                    a, b, c, d = widened(places)
                    write_told(number_at(first_a + minimum(a, last_a), shift), where, base, i, 0, out)
                    write_told(number_at(first_b + minimum(b, last_b), shift), where, base, i, LANES, out)
                    write_told(number_at(first_c + minimum(c, last_c), shift), where, base, i, 2 * LANES, out)
                    write_told(number_at(first_d + minimum(d, last_d), shift), where, base, i, 3 * LANES, out)
            else:
                write_base(base, i, out)
            at += count_ones(where) if sparse else STRIDE


@inlined
def _ends_of(base: NDArray[np.float32], i: int, cell: Any, low: Any, high: Any, shift: Any) -> Any:
    """The ranks of the first number of the cells (U32) of LANES elements, and how many follow it there: U32 each.

    `low` and `high` (F32) are the ends of all cells, positive ones first; see `cells_of`.
    """
    b, one = load(base, 0, i), splat(_ONE)
    first = places_of(b + lookup(low, cell), shift)
    return first, maximum(places_of(b + lookup(high, cell), shift) - first, one) - one


@inlined
def _width_of(last: Any) -> Any:
    """Bits of the places in a cell, of which this (U32) is the last."""
    return splat(np.uint32(32)) - leading_zeros(last)


@inlined
def _take_pairs(row: NDArray[np.uint8], bit: int, widths: Any) -> Any:
    """The first two bits, as U8, of places of so many bits (U8), and the bit of the row after them."""
    half = np.uint64(32)
    ones, twos = bytes_above(widths, np.uint8(0)), bytes_above(widths, np.uint8(1))
    pairs = interleaved(ones & _HALF, twos & _HALF)
    lower = take_word(row, bit, pairs)
    bit += count_ones(pairs)
    pairs = interleaved(ones >> half, twos >> half)
    upper = take_word(row, bit, pairs)
    found = bytes_where(gather(lower, EVEN) | gather(upper, EVEN) << half, np.uint8(1))
    found = found | bytes_where(gather(lower, ODD) | gather(upper, ODD) << half, np.uint8(2))
    return found, bit + count_ones(pairs)


@inlined
def _take_bytes(row: NDArray[np.uint8], bit: int, fields: Any) -> Any:
    """The next bits, one to each set bit of U8 `fields`, as U8, and the bit of the row after them."""
    a, b, c, d, e, f, g, h = words_of(fields)
    at_b = bit + count_ones(a)
    at_c = at_b + count_ones(b)
    at_d = at_c + count_ones(c)
    at_e = at_d + count_ones(d)
    at_f = at_e + count_ones(e)
    at_g = at_f + count_ones(f)
    at_h = at_g + count_ones(g)
    end = at_h + count_ones(h)
    a, b, c, d = take_word(row, bit, a), take_word(row, at_b, b), take_word(row, at_c, c), take_word(row, at_d, d)
    e, f, g, h = take_word(row, at_e, e), take_word(row, at_f, f), take_word(row, at_g, g), take_word(row, at_h, h)
    return from_words((a, b, c, d, e, f, g, h)), end


@inlined
def _take_planes(row: NDArray[np.uint8], bit: int, widths: Any) -> Any:
    """What layer 7 tells of places of so many bits (U8), as U8, and the bit of the row after it."""
    of_a, of_b = bytes_above(widths, np.uint8(_TOLD_BITS)), bytes_above(widths, np.uint8(_TOLD_BITS + 1))
    of_c, of_d = bytes_above(widths, np.uint8(_TOLD_BITS + 2)), bytes_above(widths, np.uint8(_TOLD_BITS + 3))
    of_e, of_f = bytes_above(widths, np.uint8(_TOLD_BITS + 4)), bytes_above(widths, np.uint8(_TOLD_BITS + 5))
    a = b = c = d = e = f = np.uint64(0)
    for j in range(0, STRIDE, LANES):
        if of_a >> np.uint64(j) & np.uint64(0xFFFF):
            a, bit = _take_plane(row, bit, of_a, j, a)
            b, bit = _take_plane(row, bit, of_b, j, b)
            c, bit = _take_plane(row, bit, of_c, j, c)
            d, bit = _take_plane(row, bit, of_d, j, d)
            e, bit = _take_plane(row, bit, of_e, j, e)
            f, bit = _take_plane(row, bit, of_f, j, f)
    rest = _with_plane(bytes_where(a, np.uint8(1)), of_b, b)
    rest = _with_plane(_with_plane(rest, of_c, c), of_d, d)
    return _with_plane(_with_plane(rest, of_e, e), of_f, f), bit


@inlined
def _take_plane(row: NDArray[np.uint8], bit: int, wanted: np.uint64, j: int, plane: np.uint64) -> Any:
    """A plane with the next bits of those of LANES elements, from element `j` on, that want one; and the bit after."""
    own = wanted >> np.uint64(j) & np.uint64(0xFFFF)
    return plane | take_word(row, bit, own) << np.uint64(j), bit + count_ones(own)


@inlined
def _with_plane(rest: Any, wanted: np.uint64, plane: np.uint64) -> Any:
    """Numbers (U8) with one more bit where one is wanted."""
    return rest + bytes_where(wanted, rest) + bytes_where(plane, np.uint8(1))


@inner
def _decode_wide(
    row: NDArray[np.uint8],
    streams: tuple[int, int, int],
    depth: int,
    code: int,
    top: int,
    where: np.uint64,
    cells: tuple[np.uint64, np.uint64, np.uint64, np.uint64],
    type_shift: np.uint32,
    base: NDArray[np.float32],
    start: int,
    out: NDArray[np.float32],
) -> tuple[int, int, int]:
    """Write STRIDE elements whose places in their cells may have any number of bits.

    Args:
        row: holds the bits.
        streams: where those of layers 5 to 7 begin.
        depth: how many layers are there.
        code: of the range; RAW where numbers are kept as they are.
        top: of the ranges.
        where: which elements changed.
        cells: what layers 3 and 4 tell of them.
        type_shift: bits of a float32 that the expert's type leaves at zero.
        base: float32, [1, TILE].
        start: the first element.
        out: float32, [TILE]; set.

    Returns:
        Where the bits of the next elements begin.
    """
    first_bit, second_bit, third_bit = streams
    shift, zero, one, two = splat(type_shift), splat(_ZERO), splat(_ONE), splat(np.uint32(2))
    twice, edges = lanes() + lanes(), scaled(EDGES, code, top)
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
        write_told(number_at(first + found, shift), where, base, start, j, out)
    return first_bit, second_bit, third_bit


@inlined
def _next_bit(row: NDArray[np.uint8], bit: int, reads: Any, found: Any) -> Any:
    """One more bit of the numbers that have one, and the place of the bits after."""
    wanted = packed(reads)
    one = splat(_ONE)
    more = select(unpacked(np.uint32(take_word(row, bit, np.uint64(wanted)))), one, splat(_ZERO))
    return select(reads, (found << one) | more, found), bit + count_ones(wanted)
