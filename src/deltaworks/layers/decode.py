"""From layers to elements: a tile at a time, inside compiled kernels.

A block's layers are opened once, which tells where everything of each tile lies; then any tile can be decoded, against
the same tile of the base.
"""

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.byte_vector import bytes_where, widened
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inner, kernel
from deltaworks.checkpoints.memory_vector import load, load_at, prefetch, store
from deltaworks.checkpoints.vector import LANES, lanes, lookup, splat
from deltaworks.layers.arithmetic import mean_at, scaled, signed
from deltaworks.layers.bitstream import count_ones
from deltaworks.layers.cells import DRAFTS, GROUP, RAW, TOLD, WAYS
from deltaworks.layers.opened import (
    STRIDE,
    Parts,
    changed_of,
    depth_of,
    draft_at,
    is_even,
    load_factors,
    next_bits,
    parts_of,
    put_told,
    write_base,
)
from deltaworks.layers.places import decode_places
from deltaworks.layers.trellis import CODES, LENGTHS, path_of, window_of


@inner
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
        _decode_draft(row, tile, base, count, out)
    elif depth <= 4:
        _decode_cells(row, parts_of(row, tile), base, count, None, base, out)
    else:
        decode_places(row, parts_of(row, tile), base, count, None, base, out)
    for i in range(count, -(-count // LANES) * LANES):
        out[i] = np.float32(0.0)


@inner
def add_tile(
    row: NDArray[np.uint8],
    base: NDArray[np.float32],
    tile: int,
    count: int,
    weight: np.float32,
    sums: NDArray[np.float32],
) -> bool:
    """Add the delta of a tile that its layers tell, times a weight, to sums, where that takes 3 layers or more.

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
        return False
    if depth <= 4:
        _decode_cells(row, parts_of(row, tile), base, count, weight, sums, sums[0])
    else:
        decode_places(row, parts_of(row, tile), base, count, weight, sums, sums[0])
    return True


@inner
def add_drafts(
    flat: NDArray[np.uint8],
    width: int,
    which: NDArray[np.int64],
    weights: NDArray[np.float32],
    many: int,
    tile: int,
    count: int,
    places: NDArray[np.int64],
    sums: NDArray[np.float32],
) -> None:
    """Add the deltas that the drafts of several experts tell of a tile, each times a weight, to sums.

    A weight is multiplied into the few values that a draft can tell, so that an element takes a shift, a lookup and a
    sum, in registers.

    Args:
        flat: uint8; rows of so many bytes each, opened blocks among them.
        width: see above.
        which: int64; rows of blocks of which drafts were asked for.
        weights: float32; of each; what takes their place is of no use.
        many: how many there are.
        tile: which.
        count: elements in the tile.
        places: int64, [at least that many, 4]; room for where the drafts lie.
        sums: float32, [1, TILE]; what to add to. Anything is added to what is beyond the tile.
    """
    units = weights
    for x in range(many):
        draft = draft_at(flat, which[x] * width, tile)
        places[x, 0], places[x, 1], places[x, 2] = draft.means, draft.even, draft.paths[0]
        places[x, 3] = 0 if draft.depth == 1 else draft.paths[1]
        units[x] = draft.unit * (units[x] * (LENGTHS[0] if draft.depth == 1 else LENGTHS[1]))
        # What the next tile needs: there are more streams than a processor follows by itself.
        for line in range(TILE // 8, TILE // 4, 64):
            prefetch(flat, 0, draft.paths[0] + line)
            if draft.depth > 1:
                prefetch(flat, 0, draft.paths[1] + line)
    for g in range(-(-count // GROUP)):
        i = g * GROUP
        a, b, c, d = load(sums, 0, i), load(sums, 0, i + 16), load(sums, 0, i + 32), load(sums, 0, i + 48)
        e, f, h, k = load(sums, 0, i + 64), load(sums, 0, i + 80), load(sums, 0, i + 96), load(sums, 0, i + 112)
        for x in range(many):
            scale, kind = splat(mean_at(flat, places[x, 0], g) * units[x]), is_even(flat, places[x, 1], g)
            path, codes = path_of(flat, places[x, 2], g), load(CODES, kind, 0) * scale
            a, b = a + lookup(codes, window_of(path, 0)), b + lookup(codes, window_of(path, 1))
            c, d = c + lookup(codes, window_of(path, 2)), d + lookup(codes, window_of(path, 3))
            e, f = e + lookup(codes, window_of(path, 4)), f + lookup(codes, window_of(path, 5))
            h, k = h + lookup(codes, window_of(path, 6)), k + lookup(codes, window_of(path, 7))
            if places[x, 3] > 0:
                path, codes = path_of(flat, places[x, 3], g), load(CODES, 2 + kind, 0) * scale
                a, b = a + lookup(codes, window_of(path, 0)), b + lookup(codes, window_of(path, 1))
                c, d = c + lookup(codes, window_of(path, 2)), d + lookup(codes, window_of(path, 3))
                e, f = e + lookup(codes, window_of(path, 4)), f + lookup(codes, window_of(path, 5))
                h, k = h + lookup(codes, window_of(path, 6)), k + lookup(codes, window_of(path, 7))
        own = sums[0]
        store(own, i, a)
        store(own, i + 16, b)
        store(own, i + 32, c)
        store(own, i + 48, d)
        store(own, i + 64, e)
        store(own, i + 80, f)
        store(own, i + 96, h)
        store(own, i + 112, k)


@inner
def _decode_draft(
    row: NDArray[np.uint8], tile: int, base: NDArray[np.float32], count: int, out: NDArray[np.float32]
) -> None:
    """A tile of which drafts were asked for; see `decode_tile`."""
    draft = draft_at(row, 0, tile)
    length = LENGTHS[0] if draft.depth == 1 else LENGTHS[1]
    for g in range(-(-count // GROUP)):
        scale, kind = splat(mean_at(row, draft.means, g) * (draft.unit * length)), is_even(row, draft.even, g)
        codes, path = load(CODES, kind, 0) * scale, path_of(row, draft.paths[0], g)
        # Whole groups: there is room for them, and what is beyond the tile counts for nothing.
        for step in range(GROUP // LANES):
            i = g * GROUP + step * LANES
            store(out, i, load(base, 0, i) + lookup(codes, window_of(path, step)))
        if draft.depth == 2:
            codes, path = load(CODES, 2 + kind, 0) * scale, path_of(row, draft.paths[1], g)
            for step in range(GROUP // LANES):
                i = g * GROUP + step * LANES
                store(out, i, load_at(out, i) + lookup(codes, window_of(path, step)))


@inner
def _decode_cells(
    row: NDArray[np.uint8],
    parts: Parts,
    base: NDArray[np.float32],
    count: int,
    weight: np.float32 | None,
    sums: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """A tile of which 3 or 4 layers were asked for; see `put_told`."""
    depth, top = parts.depth, parts.range_top
    sparse, at = parts.sparse, parts.signs
    bit2, bit3, bit4 = parts.planes[0] - at, parts.planes[1] - at, parts.planes[2] - at
    eight, cells = splat(np.uint32(8)), 1 << (depth - 1)
    half, quarter, eighth = np.uint8(cells >> 1), np.uint8(cells >> 2), np.uint8(cells >> 3)
    own = (lanes() & splat(np.uint32(7))) + splat(np.uint32(cells - 4))
    for g in range(0, count, GROUP):
        code = int(row[parts.ranges + g // GROUP])
        known = code not in (0, RAW)
        # What the cells tell, those of positive deltas in the first eight lanes: one lookup gives a delta.
        below = scaled(TOLD, max(1, code), top)
        above = below * load_factors(row, (max(1, code) - 1) % WAYS)
        deltas = signed(lanes() >= eight, lookup(below, own), lookup(above, own))
        for i in range(g, min(g + GROUP, count), STRIDE):
            where = changed_of(row, parts, i, count)
            if known and where != np.uint64(0):
                cell = bytes_where(next_bits(row, at, where, sparse), np.uint8(8))
                cell = cell | bytes_where(next_bits(row, at + bit2, where, sparse), half)
                cell = cell | bytes_where(next_bits(row, at + bit3, where, sparse), quarter)
                if depth > 3:
                    cell = cell | bytes_where(next_bits(row, at + bit4, where, sparse), eighth)
                a, b, c, d = widened(cell)
                put_told(load(base, 0, i) + lookup(deltas, a), where, base, i, 0, weight, sums, out)
                put_told(load(base, 0, i + LANES) + lookup(deltas, b), where, base, i, LANES, weight, sums, out)
                put_told(load(base, 0, i + 2 * LANES) + lookup(deltas, c), where, base, i, 2 * LANES, weight, sums, out)
                put_told(load(base, 0, i + 3 * LANES) + lookup(deltas, d), where, base, i, 3 * LANES, weight, sums, out)
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
