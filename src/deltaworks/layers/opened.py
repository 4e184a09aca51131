"""An opened block of layers: where everything of each tile lies, and its next bits, inside compiled kernels."""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inlined, kernel
from deltaworks.checkpoints.vector import LANES, load, select, splat, store, unpacked
from deltaworks.layers.arithmetic import factors_above
from deltaworks.layers.bitstream import SLACK, lanes_below, take_word, whole_bits
from deltaworks.layers.cells import GROUP, WAYS

IS_SPARSE: Final = 1
"""Flag of a block in which layers tell which elements changed at all."""

HEAD: Final = 8
"""Bytes at the start of layer 1: flags; which share of the elements is unchanged, in 256ths; two of zeros; the tops of
means and ranges (int16 each; steps of an octave and octaves)."""

_SHIFT, _TOPS, _STARTS, _UNCHANGED, _TILES, _FACTORS = 1, 3, 5, 12, 13, 16
_TABLES = _FACTORS + WAYS * LANES

STRIDE: Final = 4 * LANES
"""Elements that are decoded at once."""


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
    at += -(-count // (2 * GROUP))
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


class Parts(NamedTuple):
    """Where a tile begins in its opened block: bytes for means and ranges, bits for all else.

    Attributes:
        depth: how many layers there are.
        shift: bits of a float32 that the expert's type leaves at zero.
        sparse: whether only elements that changed have bits; `mask` tells which those are.
        unchanged: their share of the elements, in 256ths.
        means: half a byte for every GROUP elements.
        mean_top: the exponent of the largest, in steps of an octave.
        ranges: a byte for every GROUP elements.
        range_top: the exponent of the largest.
        mask: a bit an element.
        signs: of layer 1.
        planes: of layers 2 to 4.
        streams: of layers 5 to 7.
    """

    depth: int
    shift: np.uint32
    sparse: bool
    unchanged: int
    means: int
    mean_top: int
    ranges: int
    range_top: int
    mask: int
    signs: int
    planes: tuple[int, int, int]
    streams: tuple[int, int, int]


@inlined
def parts_of(row: NDArray[np.uint8], tile: int) -> Parts:
    """The parts of a tile of an opened block."""
    table = row[: len(row) // 4 * 4].view(np.int32)
    depth, tiles = int(table[0]), int(table[_TILES])
    active, at = int(table[_TABLES + tile]), _TABLES + tiles + tile
    return Parts(
        depth,
        np.uint32(table[_SHIFT]),
        table[2] != 0,
        int(table[_UNCHANGED]),
        int(table[_STARTS]) + tile * (TILE // (2 * GROUP)),
        int(table[_TOPS]),
        int(table[_STARTS + 3]) + tile * (TILE // GROUP),
        int(table[_TOPS + 1]),
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


@inlined
def factors_of(row: NDArray[np.uint8]) -> Any:
    """What `factors_above` gave when the block was opened: a float32 table of one row, LANES for each way."""
    return row[4 * _FACTORS : 4 * _TABLES].view(np.float32).reshape((1, WAYS * LANES))


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
def write_base(base: NDArray[np.float32], i: int, out: NDArray[np.float32]) -> None:
    """STRIDE elements as the base has them."""
    for j in range(i, i + STRIDE, LANES):
        store(out, j, load(base, 0, j))
