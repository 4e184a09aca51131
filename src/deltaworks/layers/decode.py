"""From layers to elements: a tile at a time, inside compiled kernels.

A block's layers are opened once, which tells where everything of each tile lies; then any tile can be decoded, against
the same tile of the base.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inlined, kernel
from deltaworks.checkpoints.vector import (
    LANES,
    bits,
    floats,
    from_bytes,
    lanes,
    leading_zeros,
    load,
    lookup,
    lower_bytes,
    packed,
    power_of_two,
    select,
    splat,
    store,
    unpacked,
    upper_bytes,
)
from deltaworks.layers.bitstream import SLACK, count_ones, lanes_below, scatter, take, take_word, whole_bits
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
_SIXTEEN = np.uint32(0xFFFF)


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
    negative = b >= splat(_SIGN)
    return select(negative, b ^ splat(_ALL), (b | splat(_SIGN)) + ones) >> shift


@inlined
def number_at(place: Any, shift: Any) -> Any:
    """The number (F32) of a rank."""
    upper = place << shift
    ones = (splat(_ONE) << shift) - splat(_ONE)
    return floats(select(upper >= splat(_SIGN), upper ^ splat(_SIGN), (upper | ones) ^ splat(_ALL)))


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
        base: float32, [1, TILE]; the same tile of the base, with zeros from `count` up to a whole vector.
        tile: which.
        count: elements in the tile.
        out: float32, [TILE]; set, with zeros from `count` up to a whole vector.
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
    sparse, mask, signs = parts.sparse, parts.mask, parts.signs
    for s in range(0, count, SPAN):
        mean = unit * MEANS[row[means + s // SPAN]]
        above, below = splat(mean_above(mean, parts.unchanged)), splat(mean)
        for i in range(s, min(s + SPAN, count), LANES):
            b = load(base, 0, i)
            if sparse:
                where = take(row, mask + i, lanes_below(count - i))
                told = b + signed(unpacked(take(row, signs, where)), below, above)
                store(out, i, select(unpacked(where), told, b))
                signs += count_ones(where)
            else:
                store(out, i, b + signed(unpacked(np.uint32(whole_bits(row, signs + i))), below, above))


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
    sparse, mask, at = parts.sparse, parts.mask, parts.signs
    bit2, bit3, bit4 = parts.planes[0] - at, parts.planes[1] - at, parts.planes[2] - at
    zero, eight, cells = splat(_ZERO), splat(np.uint32(8)), 1 << (depth - 1)
    half, quarter, eighth = splat(np.uint32(cells >> 1)), splat(np.uint32(cells >> 2)), splat(np.uint32(cells >> 3))
    own = (lanes() & splat(np.uint32(7))) + splat(np.uint32(cells - 2))
    header = row[: 4 * _TABLES].view(np.float32).reshape((1, _TABLES))
    for g in range(0, count, GROUP):
        code = int(row[ranges + g // GROUP])
        known = code not in (0, RAW)
        # What the cells tell, those of positive deltas in the first eight lanes: one lookup gives a delta.
        below = scaled(TOLD, max(1, code), top)
        above = below * load(header, 0, _FACTORS + (max(1, code) - 1) % WAYS * LANES)
        deltas = signed(lanes() >= eight, lookup(below, own), lookup(above, own))
        for i in range(g, min(g + GROUP, count), LANES):
            b = load(base, 0, i)
            where = take(row, mask + i, lanes_below(count - i)) if sparse else _SIXTEEN
            if known:
                cell = select(take_some(row, at, where, sparse), eight, zero)
                cell = cell | select(take_some(row, at + bit2, where, sparse), half, zero)
                if depth > 2:
                    cell = cell | select(take_some(row, at + bit3, where, sparse), quarter, zero)
                if depth > 3:
                    cell = cell | select(take_some(row, at + bit4, where, sparse), eighth, zero)
                told = b + lookup(deltas, cell)
                b = select(unpacked(where), told, b) if sparse else told
            store(out, i, b)
            at += count_ones(where) if sparse else LANES


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
    sparse, mask, at = parts.sparse, parts.mask, parts.signs
    bit2, bit3, bit4 = parts.planes[0] - at, parts.planes[1] - at, parts.planes[2] - at
    first_bit, second_bit, third_bit = parts.streams
    shift, zero, one = splat(type_shift), splat(_ZERO), splat(_ONE)
    all_bits = splat(np.uint32(32)) - shift
    twice = lanes() + lanes()
    for g in range(0, count, GROUP):
        code = int(row[ranges + g // GROUP])
        raw = code == RAW
        known = code != 0 and (not raw or depth == DEPTH)
        edges = scaled(EDGES, max(1, code), top)
        for i in range(g, min(g + GROUP, count), LANES):
            b = load(base, 0, i)
            where = take(row, mask + i, lanes_below(count - i)) if sparse else lanes_below(count - i)
            if known and where != _ZERO:
                changed = unpacked(where)
                if raw:
                    first, many, width = zero, zero, all_bits
                else:
                    i2 = take_some(row, at + bit2, where, sparse)
                    i3 = take_some(row, at + bit3, where, sparse)
                    cell = indices(i2, i3, take_some(row, at + bit4, where, sparse))
                    first, many = cells_of(b, take_some(row, at, where, sparse), edges, cell, shift)
                    width = splat(np.uint32(32)) - leading_zeros(many - one)
                two = splat(np.uint32(2))
                pairs = interleaved(packed(changed & (width > zero)), packed(changed & (width > one)))
                found = (splat(np.uint32(take(row, first_bit, pairs))) >> twice) & splat(np.uint32(3))
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
                b = select(changed, number_at(first + found, shift), b)
            store(out, i, b)
            at += count_ones(where) if sparse else LANES


@inlined
def _next_bit(row: NDArray[np.uint8], bit: int, reads: Any, found: Any) -> Any:
    """One more bit of the numbers that have one, and the place of the bits after."""
    wanted = packed(reads)
    one = splat(_ONE)
    more = select(unpacked(take(row, bit, wanted)), one, splat(_ZERO))
    return select(reads, (found << one) | more, found), bit + count_ones(wanted)


@inlined
def interleaved(even: np.uint32, odd: np.uint32) -> np.uint32:
    """The bits of two numbers of sixteen bits, in turn."""
    return np.uint32(scatter(np.uint64(even), np.uint64(0x55555555)) | scatter(np.uint64(odd), np.uint64(0xAAAAAAAA)))


@inlined
def smaller(x: Any, y: Any) -> Any:
    """The smaller of U32, lane by lane."""
    return select(x < y, x, y)


@inlined
def take_some(row: NDArray[np.uint8], bit: int, where: np.uint32, sparse: bool) -> Any:
    """The next bits of some of sixteen lanes, or of all, which then begin with a byte, as MASK."""
    return unpacked(take(row, bit, where) if sparse else np.uint32(whole_bits(row, bit)))


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
