"""From layers to elements: a tile at a time, inside compiled kernels.

A block's layers are opened once, which tells where everything of each tile lies; then any tile can be decoded, against
the same tile of the base.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.byte_vector import (
    bytes_where,
    widened,
)
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inlined, kernel
from deltaworks.checkpoints.vector import (
    LANES,
    lanes,
    load,
    lookup,
    splat,
    store,
)
from deltaworks.layers.arithmetic import mean_code, means_of, scaled, signed
from deltaworks.layers.bitstream import count_ones
from deltaworks.layers.cells import DRAFTS, GROUP, RAW, TOLD, WAYS
from deltaworks.layers.opened import (
    STRIDE,
    Parts,
    add_told,
    changed_of,
    depth_of,
    draft_of,
    factors_of,
    next_bits,
    parts_of,
    write_base,
    write_told,
)
from deltaworks.layers.places import decode_places
from deltaworks.layers.trellis import CODES, LENGTHS, path_at, window_of


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
    depth = depth_of(row)
    if depth <= DRAFTS:
        _decode_draft(row, tile, base, count, np.float32(1.0), out)
    elif depth <= 4:
        _decode_cells(row, parts_of(row, tile), base, count, None, base, out)
    else:
        decode_places(row, parts_of(row, tile), base, count, out)
    for i in range(count, -(-count // LANES) * LANES):
        out[i] = np.float32(0.0)


@kernel
def add_tile(
    row: NDArray[np.uint8],
    base: NDArray[np.float32],
    tile: int,
    count: int,
    weight: np.float32,
    sums: NDArray[np.float32],
) -> bool:
    """Add the delta of a tile that its layers tell, times a weight, to sums, where that takes no more than four layers.

    Args:
        row: as in `decode_tile`, as are the next three.
        base: see there.
        tile: see there.
        count: see there.
        weight: the factor.
        sums: float32, [1, TILE]; what to add to.

    Returns:
        Whether it was done.
    """
    depth = depth_of(row)
    if depth <= DRAFTS:
        _decode_draft(row, tile, sums, count, weight, sums[0])
    elif depth <= 4:
        _decode_cells(row, parts_of(row, tile), base, count, weight, sums, sums[0])
    return depth <= 4


@inlined
def _put(
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


@kernel
def _decode_draft(
    row: NDArray[np.uint8],
    tile: int,
    before: NDArray[np.float32],
    count: int,
    weight: np.float32,
    out: NDArray[np.float32],
) -> None:
    """Add the delta that a draft tells of a tile, times a weight, to the elements of `before`, and write that to `out`.

    The weight is multiplied into the few values that a draft can tell, so that each element takes a lookup and a sum.
    """
    draft = draft_of(row, tile)
    means = means_of(draft.top) * splat(weight * (LENGTHS[0] if draft.depth == 1 else LENGTHS[1]))
    for g in range(-(-count // GROUP)):
        scale = lookup(means, splat(mean_code(row, draft.means, g)))
        kind = int(row[draft.even + (g >> 3)]) >> (g & 7) & 1
        first, path = load(CODES, kind, 0) * scale, path_at(row, draft.paths[0], g)
        start = g * GROUP
        if draft.depth == 1:
            for step in range(min(GROUP, count - start + LANES - 1) // LANES):
                i = start + step * LANES
                store(out, i, load(before, 0, i) + lookup(first, window_of(path, step)))
        else:
            second, finer = load(CODES, 2 + kind, 0) * scale, path_at(row, draft.paths[1], g)
            for step in range(min(GROUP, count - start + LANES - 1) // LANES):
                i = start + step * LANES
                told = lookup(first, window_of(path, step)) + lookup(second, window_of(finer, step))
                store(out, i, load(before, 0, i) + told)


@kernel
def _decode_cells(
    row: NDArray[np.uint8],
    parts: Parts,
    base: NDArray[np.float32],
    count: int,
    weight: np.float32 | None,
    sums: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """A tile of which 3 or 4 layers were asked for; see `_put`."""
    depth, top = parts.depth, parts.range_top
    sparse, at = parts.sparse, parts.signs
    bit2, bit3, bit4 = parts.planes[0] - at, parts.planes[1] - at, parts.planes[2] - at
    eight, cells = splat(np.uint32(8)), 1 << (depth - 1)
    half, quarter, eighth = np.uint8(cells >> 1), np.uint8(cells >> 2), np.uint8(cells >> 3)
    own = (lanes() & splat(np.uint32(7))) + splat(np.uint32(cells - 4))
    factors = factors_of(row)
    for g in range(0, count, GROUP):
        code = int(row[parts.ranges + g // GROUP])
        known = code not in (0, RAW)
        # What the cells tell, those of positive deltas in the first eight lanes: one lookup gives a delta.
        below = scaled(TOLD, max(1, code), top)
        above = below * load(factors, 0, (max(1, code) - 1) % WAYS * LANES)
        deltas = signed(lanes() >= eight, lookup(below, own), lookup(above, own))
        for i in range(g, min(g + GROUP, count), STRIDE):
            where = changed_of(row, parts, i, count)
            if known:
                cell = bytes_where(next_bits(row, at, where, sparse), np.uint8(8))
                cell = cell | bytes_where(next_bits(row, at + bit2, where, sparse), half)
                cell = cell | bytes_where(next_bits(row, at + bit3, where, sparse), quarter)
                if depth > 3:
                    cell = cell | bytes_where(next_bits(row, at + bit4, where, sparse), eighth)
                a, b, c, d = widened(cell)
                _put(load(base, 0, i) + lookup(deltas, a), where, base, i, 0, weight, sums, out)
                _put(load(base, 0, i + LANES) + lookup(deltas, b), where, base, i, LANES, weight, sums, out)
                _put(load(base, 0, i + 2 * LANES) + lookup(deltas, c), where, base, i, 2 * LANES, weight, sums, out)
                _put(load(base, 0, i + 3 * LANES) + lookup(deltas, d), where, base, i, 3 * LANES, weight, sums, out)
            elif weight is None:
                write_base(base, i, out)
            at += count_ones(where) if sparse else STRIDE


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
