"""An opened block of layers: where everything of each tile lies, and its next bits, inside compiled kernels."""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inlined, inner, kernel
from deltaworks.checkpoints.memory_vector import load, load_floats, store
from deltaworks.checkpoints.vector import LANES, select, splat, unpacked
from deltaworks.layers.arithmetic import factors_above, unit_of
from deltaworks.layers.bitstream import SLACK, int_at, lanes_below, take_word, whole_bits
from deltaworks.layers.cells import DRAFTS, GROUP, WAYS

IS_SPARSE: Final = 1
"""Flag of a block in which exact layers tell which elements changed at all."""

DRAFT_HEAD: Final = 2
"""Bytes at the start of layer 1: the top of the means (int16, steps of an octave)."""

HEAD: Final = 4
"""Bytes at the start of layer 3: flags; which share of the elements is unchanged, in 256ths; the top of the ranges
(int16, octaves)."""

_DEPTH, _SHIFT, _SPARSE, _UNCHANGED, _TILES, _TOP = range(6)
_MEANS, _EVEN, _PATHS = 6, 7, 8
_MASK, _SIGNS, _RANGES, _PLANES = 6, 7, 8, 9
_FACTORS = 16
_TABLES = _FACTORS + WAYS * LANES
"""What the int32 at each place of an opened block are; drafts and exact layers share some."""

STRIDE: Final = 4 * LANES
"""Elements that are decoded at once."""


def opened_bytes(count: int, layer_bytes: int) -> int:
    """Bytes of an opened block of `count` elements whose layers have so many bytes: a multiple of PAGE."""
    return layers_start(count) + -(-(layer_bytes + SLACK) // PAGE) * PAGE


def layers_start(count: int) -> int:
    """The byte of an opened block at which its layers begin: a multiple of PAGE, for reads around the page cache."""
    return -(-4 * (_TABLES + 4 * -(-count // TILE)) // PAGE) * PAGE


_layers_start = kernel(layers_start)


@inner
def open_block(row: NDArray[np.uint8], count: int, ends: NDArray[np.int64], depth: int, shift: int) -> None:
    """Work out where everything lies in a block whose layers stand in `row` from byte `layers_start(count)` on.

    Args:
        row: uint8; at least `opened_bytes`.
        count: elements in the block.
        ends: int64, [DEPTH]; the byte at which each layer ends, from the first's start.
        depth: how many layers were asked for, one at least; of more than DRAFTS, those after the drafts are there.
        shift: bits of a float32 that the expert's type leaves at zero.
    """
    tiles = -(-count // TILE)
    start = _layers_start(count)
    table = row[:start].view(np.int32)
    table[_DEPTH], table[_SHIFT], table[_TILES] = depth, shift, tiles
    if depth <= DRAFTS:
        groups = -(-count // GROUP)
        table[_TOP] = row[start : start + DRAFT_HEAD].view(np.int16)[0]
        at = start + DRAFT_HEAD
        table[_MEANS] = at
        at += -(-groups // 2)
        table[_EVEN] = at
        table[_PATHS] = at + -(-groups // 8)
        table[_PATHS + 1] = start + ends[0]
        return
    head = row[start : start + HEAD]
    sparse = head[0] & IS_SPARSE
    table[_SPARSE], table[_UNCHANGED] = sparse, head[1]
    factors = row[:start].view(np.float32)
    for way in range(WAYS):
        store(factors, _FACTORS + way * LANES, factors_above(way, head[1]))
    table[_TOP] = head[2:4].view(np.int16)[0]
    at = start + HEAD
    active = table[_TABLES : _TABLES + tiles]
    plane = -(-count // 8)
    if sparse:
        # Where each tile's changed elements begin among those of the block, and how many there are.
        for t in range(tiles):
            active[t] = row[at] | row[at + 1] << 8 | row[at + 2] << 16 | row[at + 3] << 24
            at += 4
        plane = -(-(row[at] | row[at + 1] << 8 | row[at + 2] << 16 | row[at + 3] << 24) // 8)
        at += 4
        table[_MASK] = at
        at += -(-count // 8)
    else:
        for t in range(tiles):
            active[t] = t * TILE
    table[_RANGES] = at
    at += -(-count // GROUP)
    table[_SIGNS], table[_PLANES], table[_PLANES + 1] = at, at + plane, at + 2 * plane
    start -= ends[DRAFTS - 1]
    table[_PLANES + 2] = start + ends[DRAFTS]
    for layer in range(4, depth):
        at = start + ends[layer - 1]
        place = 8 * (at + 2 * tiles)
        streams = table[_TABLES + (layer - 3) * tiles : _TABLES + (layer - 2) * tiles]
        for t in range(tiles):
            streams[t] = place
            place += 8 * (row[at + 2 * t] | row[at + 2 * t + 1] << 8)


@inlined
def depth_of(row: NDArray[np.uint8]) -> int:
    """How many layers were asked for of an opened block."""
    return int(int_at(row, 4 * _DEPTH))


@inlined
def is_draft(flat: NDArray[np.uint8], start: int) -> bool:
    """Whether drafts were asked for of the opened block that begins at a byte of `flat`."""
    return bool(int_at(flat, start + 4 * _DEPTH) <= DRAFTS)


class Draft(NamedTuple):
    """Where a tile begins in an opened block of which drafts were asked for: bytes.

    Attributes:
        depth: how many layers there are.
        unit: the largest mean.
        means: half a byte for every GROUP elements.
        even: a bit for every GROUP elements, eight of which begin with a byte.
        paths: of both layers; see `trellis`.
    """

    depth: int
    unit: np.float32
    means: int
    even: int
    paths: tuple[int, int]


@inlined
def draft_at(flat: NDArray[np.uint8], start: int, tile: int) -> Draft:
    """The parts of a tile of an opened block of which drafts were asked for, and which begins at a byte of `flat`."""
    groups = TILE // GROUP
    return Draft(
        int_at(flat, start + 4 * _DEPTH),
        unit_of(int_at(flat, start + 4 * _TOP)),
        start + int_at(flat, start + 4 * _MEANS) + tile * (groups // 2),
        start + int_at(flat, start + 4 * _EVEN) + tile * (groups // 8),
        (
            start + int_at(flat, start + 4 * _PATHS) + tile * groups * LANES,
            start + int_at(flat, start + 4 * (_PATHS + 1)) + tile * groups * LANES,
        ),
    )


@inlined
def is_even(flat: NDArray[np.uint8], even: int, group: int) -> int:
    """Whether a group of a tile is even, as a number."""
    return int(whole_bits(flat, 8 * even) >> np.uint64(group) & np.uint64(1))


class Parts(NamedTuple):
    """Where a tile begins in an opened block of which exact layers were asked for: bytes for ranges, bits for all else.

    Attributes:
        depth: how many layers there are, more than DRAFTS.
        shift: bits of a float32 that the expert's type leaves at zero.
        sparse: whether only elements that changed have bits; `mask` tells which those are.
        ranges: a byte for every GROUP elements.
        range_top: the exponent of the largest.
        mask: a bit an element.
        signs: of layer 3.
        planes: of layers 3 (two) and 4.
        streams: of layers 5 to 7.
    """

    depth: int
    shift: np.uint32
    sparse: bool
    ranges: int
    range_top: int
    mask: int
    signs: int
    planes: tuple[int, int, int]
    streams: tuple[int, int, int]


@inlined
def parts_of(row: NDArray[np.uint8], tile: int) -> Parts:
    """The parts of a tile of an opened block of which exact layers were asked for."""
    depth, tiles = int_at(row, 4 * _DEPTH), int_at(row, 4 * _TILES)
    active, at = int_at(row, 4 * (_TABLES + tile)), 4 * (_TABLES + tiles + tile)
    return Parts(
        depth,
        np.uint32(int_at(row, 4 * _SHIFT)),
        int_at(row, 4 * _SPARSE) != 0,
        int_at(row, 4 * _RANGES) + tile * (TILE // GROUP),
        int_at(row, 4 * _TOP),
        8 * int_at(row, 4 * _MASK) + tile * TILE,
        8 * int_at(row, 4 * _SIGNS) + active,
        (
            8 * int_at(row, 4 * _PLANES) + active,
            8 * int_at(row, 4 * (_PLANES + 1)) + active,
            8 * int_at(row, 4 * (_PLANES + 2)) + active,
        ),
        (
            int_at(row, at) if depth > 4 else 0,
            int_at(row, at + 4 * tiles) if depth > 5 else 0,
            int_at(row, at + 8 * tiles) if depth > 6 else 0,
        ),
    )


@inlined
def load_factors(row: NDArray[np.uint8], way: int) -> Any:
    """What `factors_above` gave for a way when the block was opened."""
    return load_floats(row, 4 * (_FACTORS + way * LANES))


@inlined
def changed_of(row: NDArray[np.uint8], parts: Parts, i: int, count: int) -> np.uint64:
    """Which elements of a tile from element `i` on changed: a bit for each of STRIDE."""
    below = lanes_below(count - i)
    return whole_bits(row, parts.mask + i) & below if parts.sparse else below


@inlined
def next_bits(row: NDArray[np.uint8], bit: int, where: np.uint64, sparse: bool) -> np.uint64:
    """The next bits of some of STRIDE elements, or of all, which then begin with a byte."""
    return take_word(row, bit, where) if sparse else whole_bits(row, bit)


@inlined
def write_told(
    told: Any, where: np.uint64, base: NDArray[np.float32], i: int, j: int, out: NDArray[np.float32]
) -> None:
    """Write the elements (F32) from ``i + j`` on, where bits of `where` from `j` on are set; the base's elsewhere."""
    changed = unpacked(np.uint32(where >> np.uint64(j)))
    store(out, i + j, select(changed, told, load(base, 0, i + j)))


@inlined
def add_told(
    told: Any,
    where: np.uint64,
    base: NDArray[np.float32],
    i: int,
    j: int,
    weight: np.float32,
    sums: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Add how far what `write_told` writes is from the base, times a weight, to `sums`, and write that."""
    before = load(base, 0, i + j)
    changed = unpacked(np.uint32(where >> np.uint64(j)))
    store(out, i + j, load(sums, 0, i + j) + (select(changed, told, before) - before) * splat(weight))


@inlined
def put_told(
    told: Any,
    where: np.uint64,
    base: NDArray[np.float32],
    i: int,
    j: int,
    weight: np.float32 | None,
    sums: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Write what is told of some elements; or, where there is a weight, add its delta (decided when compiled)."""
    if weight is None:
        write_told(told, where, base, i, j, out)
    else:
        add_told(told, where, base, i, j, weight, sums, out)


@inlined
def write_base(base: NDArray[np.float32], i: int, out: NDArray[np.float32]) -> None:
    """STRIDE elements as the base has them."""
    for j in range(i, i + STRIDE, LANES):
        store(out, j, load(base, 0, j))
