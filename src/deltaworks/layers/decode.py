"""From layers to elements: a tile at a time, inside compiled kernels.

A block's layers are opened once, which tells where everything of each tile lies; then any tile can be decoded, against
the same tile of the base.
"""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inlined, kernel
from deltaworks.checkpoints.vector import (
    LANES,
    bits,
    bytes_above,
    bytes_where,
    floats,
    from_bytes,
    from_words,
    lanes,
    leading_zeros,
    less_one,
    load,
    lookup,
    lookup_bytes,
    lower_bytes,
    maximum,
    narrowed,
    packed,
    power_of_two,
    select,
    shifted_sum,
    splat,
    store,
    unpacked,
    upper_bytes,
    widened,
    words_of,
)
from deltaworks.layers.bitstream import SLACK, count_ones, gather, lanes_below, scatter, take_word, whole_bits
from deltaworks.layers.cells import DEPTH, EDGES, GROUP, MEANS, OCTAVES, RAW, SHARES, SPAN, TOLD, WAYS

IS_SPARSE: Final = 1
"""Flag of a block in which layers tell which elements changed at all."""

HEAD: Final = 8
"""Bytes at the start of layer 1: flags; which share of the elements is unchanged, in 256ths; two of zeros; the tops of
means and ranges (int16 each)."""

_SHIFT, _TOPS, _STARTS, _UNCHANGED, _TILES, _FACTORS = 1, 3, 5, 12, 13, 16
_TABLES = _FACTORS + WAYS * LANES
_SIGN = np.uint32(0x80000000)
_ZERO, _ONE, _ALL = np.uint32(0), np.uint32(1), np.uint32(0xFFFFFFFF)
_EVEN, _ODD, _HALF = np.uint64(0x5555555555555555), np.uint64(0xAAAAAAAAAAAAAAAA), np.uint64(0xFFFFFFFF)

STRIDE: Final = 4 * LANES
"""Elements that are decoded at once."""
_WIDEST = np.uint8(16)
"""Bits of the widest place in a cell that is found together with STRIDE - 1 others."""
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


def opened_bytes(count: int, layer_bytes: int) -> int:
    """Bytes of an opened block of `count` elements whose layers have so many bytes: a multiple of PAGE."""
    return layers_start(count) + -(-(layer_bytes + SLACK) // PAGE) * PAGE


def layers_start(count: int) -> int:
    """The byte of an opened block at which its layers begin: a multiple of PAGE, for reads around the page cache."""
    return -(-4 * (_TABLES + 4 * -(-count // TILE)) // PAGE) * PAGE


_layers_start = kernel(layers_start)


@kernel
def open_block(row: NDArray[np.uint8], count: int, ends: NDArray[np.int64], depth: int, shift: int) -> None:
    """Work out where everything lies in a block whose layers stand in `row` from byte `layers_start(count)` on.

    Args:
        row: uint8; at least `opened_bytes`.
        count: elements in the block.
        ends: int64, [DEPTH]; the byte at which each layer ends, from the first's start.
        depth: how many layers are there, one at least.
        shift: bits of a float32 that the expert's type leaves at zero.
    """
    tiles = -(-count // TILE)
    start = _layers_start(count)
    table = row[:start].view(np.int32)
    table[0], table[_SHIFT], table[_TILES] = depth, shift, tiles
    head = row[start : start + HEAD]
    sparse = head[0] & IS_SPARSE
    table[2], table[_UNCHANGED] = sparse, head[1]
    factors = row[:start].view(np.float32)
    for way in range(WAYS):
        store(factors, _FACTORS + way * LANES, factors_above(way, head[1]))
    tops = head[4:8].view(np.int16)
    table[_TOPS], table[_TOPS + 1] = tops[0], tops[1]
    at = start + HEAD
    table[_STARTS] = at
    at += -(-count // SPAN)
    active = table[_TABLES : _TABLES + tiles]
    if sparse:
        # Where each tile's changed elements begin among those of the block.
        for t in range(tiles):
            active[t] = row[at] | row[at + 1] << 8 | row[at + 2] << 16 | row[at + 3] << 24
            at += 4
        table[_STARTS + 1] = at
        at += -(-count // 8)
    else:
        for t in range(tiles):
            active[t] = t * TILE
    table[_STARTS + 2] = at
    if depth >= 2:
        at = start + ends[0]
        table[_STARTS + 3] = at
        table[_STARTS + 4] = at + -(-count // GROUP)
    for layer in range(2, min(depth, 4)):
        table[_STARTS + 3 + layer] = start + ends[layer - 1]
    for layer in range(4, depth):
        at = start + ends[layer - 1]
        place = 8 * (at + 2 * tiles)
        streams = table[_TABLES + (layer - 3) * tiles : _TABLES + (layer - 2) * tiles]
        for t in range(tiles):
            streams[t] = place
            place += 8 * (row[at + 2 * t] | row[at + 2 * t + 1] << 8)


@inlined
def places_of(value: Any, shift: Any) -> Any:
    """The rank of the least number that is no less than `value` (F32) among those whose last `shift` bits are zero."""
    b = bits(value)
    ones = (splat(_ONE) << shift) - splat(_ONE)
    negative = splat(_ZERO) - (b >> splat(np.uint32(31)))
    return ((b ^ (negative | splat(_SIGN))) + (ones & (negative ^ splat(_ALL)))) >> shift


@inlined
def number_at(place: Any, shift: Any) -> Any:
    """The number (F32) of a rank."""
    upper = place << shift
    positive = splat(_ZERO) - (upper >> splat(np.uint32(31)))
    return floats((upper ^ (splat(_SIGN) | (positive ^ splat(_ALL)))) & (splat(_ALL) << shift))


@inlined
def indices(i2: Any, i3: Any, i4: Any) -> Any:
    """The cells (U32) that the bits of layers 2 to 4 (MASK) name."""
    zero = splat(_ZERO)
    return select(i2, splat(np.uint32(4)), zero) | select(i3, splat(np.uint32(2)), zero) | select(i4, splat(_ONE), zero)


@inlined
def estimate(centres: Any, depth: int, cell: Any) -> Any:
    """The magnitude that 2, 3 or 4 layers tell of the cell (U32) of each lane, from the scaled row of TOLD (F32)."""
    return lookup(centres, (cell >> splat(np.uint32(4 - depth))) + splat(np.uint32((1 << (depth - 1)) - 2)))


@inlined
def scaled(table: NDArray[np.float32], code: int, top: int) -> Any:
    """The row of EDGES or TOLD (F32) for the range of a code."""
    return load(table, (code - 1) % WAYS, 0) * splat(np.float32(power_of_two(top + (code - 1) // WAYS - OCTAVES)))


@inlined
def centres_above(code: int, top: int, unchanged: int) -> Any:
    """The row of TOLD (F32) for positive deltas, the first cells of which hold the unchanged elements as well.

    Args:
        code: of the range.
        top: of the ranges.
        unchanged: 256ths of the elements.
    """
    return scaled(TOLD, code, top) * factors_above((code - 1) % WAYS, unchanged)


@inlined
def factors_above(way: int, unchanged: int) -> Any:
    """Of the row of TOLD (F32) for a way, what is left where unchanged elements count; see `centres_above`."""
    share = np.float32(unchanged) / np.float32(256.0)
    changed = load(SHARES, way, 0) * splat((np.float32(1.0) - share) * np.float32(0.5))
    return changed / (splat(share) + changed)


@inlined
def mean_above(mean: np.float32, unchanged: int) -> np.float32:
    """The mean of what is not negative, where changed elements have this mean magnitude."""
    share = np.float32(unchanged) / np.float32(256.0)
    return mean * ((np.float32(1.0) - share) / (np.float32(1.0) + share))


@inlined
def signed(negative: Any, below: Any, above: Any) -> Any:
    """`above`, or where `negative` is set, the opposite of `below`."""
    return select(negative, splat(np.float32(0.0)) - below, above)


@inlined
def cells_of(base: Any, negative: Any, edges: Any, cell: Any, shift: Any) -> Any:
    """The ranks of the first number of a cell of the delta, and how many there are (one at least): U32 each.

    Args:
        base: F32.
        negative: MASK; whether the delta is.
        edges: F32; the scaled row of EDGES.
        cell: U32.
        shift: U32; of the expert's element type.
    """
    zero = splat(np.float32(0.0))
    lower, upper = lookup(edges, cell), lookup(edges, cell + splat(_ONE))
    first = places_of(base + select(negative, zero - upper, lower), shift)
    end = places_of(base + select(negative, zero - lower, upper), shift)
    return first, select(end > first, end - first, splat(_ONE))


class _Parts(NamedTuple):
    """Where the bits of a tile begin in its opened block.

    `mask` tells which elements changed where the block is `sparse`, `planes` are those of layers 2 to 4, and `streams`
    those of layers 5 to 7. `unchanged` is their share of the elements in 256ths.
    """

    sparse: bool
    unchanged: int
    mask: int
    signs: int
    planes: tuple[int, int, int]
    streams: tuple[int, int, int]


@kernel
def decode_tile(
    row: NDArray[np.uint8], base: NDArray[np.float32], tile: int, count: int, out: NDArray[np.float32]
) -> None:
    """Write the tile of an expert that its layers tell to `out`.

    Args:
        row: uint8; an opened block.
        base: float32, [1, TILE]; the same tile of the base.
        tile: which.
        count: elements in the tile.
        out: float32, [TILE]; set, with zeros from `count` up to a whole vector and anything after that.
    """
    table = row[: len(row) // 4 * 4].view(np.int32)
    depth, means, tiles = int(table[0]), int(table[_STARTS]), int(table[_TILES])
    active, at = int(table[_TABLES + tile]), _TABLES + tiles + tile
    parts = _Parts(
        table[2] != 0,
        int(table[_UNCHANGED]),
        8 * int(table[_STARTS + 1]) + tile * TILE,
        8 * int(table[_STARTS + 2]) + active,
        (
            8 * int(table[_STARTS + 4]) + active,
            8 * int(table[_STARTS + 5]) + active,
            8 * int(table[_STARTS + 6]) + active,
        ),
        (
            int(table[at]) if depth > 4 else 0,
            int(table[at + tiles]) if depth > 5 else 0,
            int(table[at + 2 * tiles]) if depth > 6 else 0,
        ),
    )
    ranges, top = int(table[_STARTS + 3]) + tile * (TILE // GROUP), int(table[_TOPS + 1])
    if depth == 1:
        unit = np.float32(power_of_two(np.int64(table[_TOPS])))
        _decode_signs(row, means + tile * (TILE // SPAN), unit, parts, base, count, out)
    elif depth <= 4:
        _decode_cells(row, ranges, top, parts, depth, base, count, out)
    else:
        _decode_rest(row, ranges, top, parts, depth, np.uint32(table[_SHIFT]), base, count, out)
    for i in range(count, -(-count // LANES) * LANES):
        out[i] = np.float32(0.0)


@kernel
def _decode_signs(
    row: NDArray[np.uint8],
    means: int,
    unit: np.float32,
    parts: _Parts,
    base: NDArray[np.float32],
    count: int,
    out: NDArray[np.float32],
) -> None:
    """A tile of which layer 1 is there: signs, and means of which the first's code stands at a byte."""
    sparse, at = parts.sparse, parts.signs
    for s in range(0, count, SPAN):
        mean = unit * MEANS[row[means + s // SPAN]]
        above, below = splat(mean_above(mean, parts.unchanged)), splat(mean)
        for i in range(s, min(s + SPAN, count), STRIDE):
            where = _changed(row, parts, i, count)
            signs = _next_bits(row, at, where, sparse)
            for j in range(0, STRIDE, LANES):
                told = load(base, 0, i + j) + signed(unpacked(np.uint32(signs >> np.uint64(j))), below, above)
                _tell(told, where, base, i, j, out)
            at += count_ones(where) if sparse else STRIDE


@inlined
def _changed(row: NDArray[np.uint8], parts: _Parts, i: int, count: int) -> np.uint64:
    """Which elements of a tile from element `i` on changed: a bit for each of STRIDE."""
    below = lanes_below(count - i)
    return whole_bits(row, parts.mask + i) & below if parts.sparse else below


@inlined
def _next_bits(row: NDArray[np.uint8], bit: int, where: np.uint64, sparse: bool) -> np.uint64:
    """The next bits of some of STRIDE elements, or of all, which then begin with a byte."""
    return take_word(row, bit, where) if sparse else whole_bits(row, bit)


@inlined
def _tell(told: Any, where: np.uint64, base: NDArray[np.float32], i: int, j: int, out: NDArray[np.float32]) -> None:
    """Write the elements (F32) from ``i + j`` on, where bits of `where` from `j` on are set; the base's elsewhere."""
    changed = unpacked(np.uint32(where >> np.uint64(j)))
    store(out, i + j, select(changed, told, load(base, 0, i + j)))


@kernel
def _decode_cells(
    row: NDArray[np.uint8],
    ranges: int,
    top: int,
    parts: _Parts,
    depth: int,
    base: NDArray[np.float32],
    count: int,
    out: NDArray[np.float32],
) -> None:
    """A tile of which layers 1 to 2, 3 or 4 are there; the code of its first range stands at byte `ranges`."""
    sparse, at = parts.sparse, parts.signs
    bit2, bit3, bit4 = parts.planes[0] - at, parts.planes[1] - at, parts.planes[2] - at
    eight, cells = splat(np.uint32(8)), 1 << (depth - 1)
    half, quarter, eighth = np.uint8(cells >> 1), np.uint8(cells >> 2), np.uint8(cells >> 3)
    own = (lanes() & splat(np.uint32(7))) + splat(np.uint32(cells - 2))
    header = row[: 4 * _TABLES].view(np.float32).reshape((1, _TABLES))
    for g in range(0, count, GROUP):
        code = int(row[ranges + g // GROUP])
        known = code not in (0, RAW)
        # What the cells tell, those of positive deltas in the first eight lanes: one lookup gives a delta.
        below = scaled(TOLD, max(1, code), top)
        above = below * load(header, 0, _FACTORS + (max(1, code) - 1) % WAYS * LANES)
        deltas = signed(lanes() >= eight, lookup(below, own), lookup(above, own))
        for i in range(g, min(g + GROUP, count), STRIDE):
            where = _changed(row, parts, i, count)
            if known:
                cell = bytes_where(_next_bits(row, at, where, sparse), np.uint8(8))
                cell = cell | bytes_where(_next_bits(row, at + bit2, where, sparse), half)
                if depth > 2:
                    cell = cell | bytes_where(_next_bits(row, at + bit3, where, sparse), quarter)
                if depth > 3:
                    cell = cell | bytes_where(_next_bits(row, at + bit4, where, sparse), eighth)
                a, b, c, d = widened(cell)
                _tell(load(base, 0, i) + lookup(deltas, a), where, base, i, 0, out)
                _tell(load(base, 0, i + LANES) + lookup(deltas, b), where, base, i, LANES, out)
                _tell(load(base, 0, i + 2 * LANES) + lookup(deltas, c), where, base, i, 2 * LANES, out)
                _tell(load(base, 0, i + 3 * LANES) + lookup(deltas, d), where, base, i, 3 * LANES, out)
            else:
                _copy(base, i, out)
            at += count_ones(where) if sparse else STRIDE


@inlined
def _copy(base: NDArray[np.float32], i: int, out: NDArray[np.float32]) -> None:
    """STRIDE elements as the base has them."""
    for j in range(i, i + STRIDE, LANES):
        store(out, j, load(base, 0, j))


@kernel
def _decode_rest(
    row: NDArray[np.uint8],
    ranges: int,
    top: int,
    parts: _Parts,
    depth: int,
    type_shift: np.uint32,
    base: NDArray[np.float32],
    count: int,
    out: NDArray[np.float32],
) -> None:
    """A tile of which layers 1 to 5, 6 or 7 are there; see `_decode_cells`."""
    sparse, at = parts.sparse, parts.signs
    bit2, bit3, bit4 = parts.planes[0] - at, parts.planes[1] - at, parts.planes[2] - at
    first, second, third = parts.streams
    shift, one = splat(type_shift), splat(_ONE)
    eight = splat(np.uint32(8))
    own = lanes() & splat(np.uint32(7))
    for g in range(0, count, GROUP):
        code = int(row[ranges + g // GROUP])
        raw = code == RAW
        known = code != 0 and (not raw or depth == DEPTH)
        edges = scaled(EDGES, max(1, code), top)
        # The two ends of every cell, those of positive deltas in the first eight lanes.
        inner, outer = lookup(edges, own), lookup(edges, own + one)
        low = signed(lanes() >= eight, outer, inner)
        high = signed(lanes() >= eight, inner, outer)
        for i in range(g, min(g + GROUP, count), STRIDE):
            where = _changed(row, parts, i, count)
            if known and where != np.uint64(0):
                negative = _next_bits(row, at, where, sparse)
                i2 = _next_bits(row, at + bit2, where, sparse)
                i3 = _next_bits(row, at + bit3, where, sparse)
                i4 = _next_bits(row, at + bit4, where, sparse)
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
                if raw or bytes_above(widths, _WIDEST) != np.uint64(0):
                    cells = (negative, i2, i3, i4)
                    first, second, third = _decode_wide(
                        row, (first, second, third), depth, code, top, where, cells, type_shift, base, i, out
                    )
                else:
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
                    _tell(number_at(first_a + smaller(a, last_a), shift), where, base, i, 0, out)
                    _tell(number_at(first_b + smaller(b, last_b), shift), where, base, i, LANES, out)
                    _tell(number_at(first_c + smaller(c, last_c), shift), where, base, i, 2 * LANES, out)
                    _tell(number_at(first_d + smaller(d, last_d), shift), where, base, i, 3 * LANES, out)
            else:
                _copy(base, i, out)
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
    found = bytes_where(gather(lower, _EVEN) | gather(upper, _EVEN) << half, np.uint8(1))
    found = found | bytes_where(gather(lower, _ODD) | gather(upper, _ODD) << half, np.uint8(2))
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


@kernel
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
        cells: what layers 1 to 4 tell of them.
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
            more = select(changed, smaller(left, splat(np.uint32(8))), zero)
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
        _tell(number_at(first + found, shift), where, base, start, j, out)
    return first_bit, second_bit, third_bit


@inlined
def _next_bit(row: NDArray[np.uint8], bit: int, reads: Any, found: Any) -> Any:
    """One more bit of the numbers that have one, and the place of the bits after."""
    wanted = packed(reads)
    one = splat(_ONE)
    more = select(unpacked(np.uint32(take_word(row, bit, np.uint64(wanted)))), one, splat(_ZERO))
    return select(reads, (found << one) | more, found), bit + count_ones(wanted)


@inlined
def interleaved(even: np.uint64, odd: np.uint64) -> np.uint64:
    """The lower thirty-two bits of two numbers, in turn."""
    return scatter(even, _EVEN) | scatter(odd, _ODD)  # type: ignore[no-any-return]


@inlined
def smaller(x: Any, y: Any) -> Any:
    """The smaller of U32, lane by lane."""
    return select(x < y, x, y)


@kernel
def decode_block(row: NDArray[np.uint8], base: NDArray[np.float32], count: int, out: NDArray[np.float32]) -> None:
    """All tiles of an opened block: `base` and `out` are float32, [count]."""
    before, after = np.zeros((1, TILE), np.float32), np.empty(TILE, np.float32)
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        before[0, :n] = base[start : start + n]
        before[0, n:] = np.float32(0.0)
        decode_tile(row, before, start // TILE, n, after)
        out[start : start + n] = after[:n]
