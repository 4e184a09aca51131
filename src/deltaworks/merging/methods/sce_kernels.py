"""Kernels that select elements by how far experts disagree, weigh experts by what is selected, and merge the rest."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.histogram import BINS, count_magnitudes, drain
from deltaworks.checkpoints.codec import TILE, encode
from deltaworks.checkpoints.jit import inlined, inner, kernel
from deltaworks.checkpoints.memory_vector import load, store
from deltaworks.checkpoints.vector import (
    LANES,
    MAGNITUDE,
    NOT_FINITE,
    ZERO,
    bits,
    lanes_set,
    largest,
    maximum,
    packed,
    select,
    splat,
    sum_in_order,
    unpacked,
    widen,
)
from deltaworks.merging.methods.operation import Inputs, find_rows, stage, stage_stand_in

SMALLEST_SHARE = np.float32(1e-6)
"""Least sum of shares that a merged delta is divided by."""


class Selection(NamedTuple):
    """Which elements of one block are selected, as kernels take it.

    Attributes:
        selects: whether any are left out.
        threshold: spreads (their float32 bits) from here on are selected.
        ties: int64, [3]; from an element of the block on only so many spreads that equal the threshold are selected,
            the first, and none from a later element on.
        upper: upper 16 bits of spreads that are no bfloat16 numbers and of which it is not known yet; -1 for none.
    """

    selects: bool
    threshold: int
    ties: NDArray[np.int64]
    upper: int


class _Tile(NamedTuple):
    """Where to load the base and then the experts from in one tile: int64, [experts + 1] each; see `load`."""

    rows: NDArray[np.int64]
    places: NDArray[np.int64]


@inner
def _find_tile(inputs: Inputs, start: int, n: int, scratch: NDArray[np.float32], tile: _Tile) -> tuple[bool, bool]:
    """Fill in `tile`, of `n` elements from `start` of the block on.

    Returns:
        Whether any expert differs from the base there, and whether rows can be loaded as they are; else they are staged
        in `scratch`.
    """
    half = find_rows(inputs, start // TILE, tile.rows) and n % LANES == 0
    differs = False
    for row in tile.rows:
        differs |= row != tile.rows[0]
    if half:
        for k in range(len(tile.rows)):
            tile.places[k] = inputs.places[tile.rows[k]] + start
        return differs, True
    below = scratch[len(scratch) - 1 :]
    stage_stand_in(inputs, start, n, below)
    for k in range(len(tile.rows)):
        stage(inputs, tile.rows[k], start, n, scratch[k], below)
        tile.rows[k], tile.places[k] = k, 0
    return differs, False


@inner
def _spread(table: NDArray[Any], n: int, tile: _Tile, out: NDArray[np.float32]) -> None:
    """Sums of squares of how far each delta is from the mean of all: float32, [n]."""
    zero, experts = splat(ZERO), splat(np.float32(len(tile.rows) - 1))
    # Each addition waits for the one before it, so two go side by side; an odd last vector is its own neighbour.
    for i in range(0, n, 2 * LANES):
        j = i + LANES if i + LANES < n else i
        base_i, base_j = load(table, tile.rows[0], tile.places[0] + i), load(table, tile.rows[0], tile.places[0] + j)
        mean_i = mean_j = spread_i = spread_j = zero
        for k in range(1, len(tile.rows)):
            row, place = tile.rows[k], tile.places[k]
            mean_i = mean_i + (load(table, row, place + i) - base_i)
            mean_j = mean_j + (load(table, row, place + j) - base_j)
        mean_i, mean_j = mean_i / experts, mean_j / experts
        for k in range(1, len(tile.rows)):
            row, place = tile.rows[k], tile.places[k]
            apart_i = load(table, row, place + i) - base_i - mean_i
            apart_j = load(table, row, place + j) - base_j - mean_j
            spread_i, spread_j = spread_i + apart_i * apart_i, spread_j + apart_j * apart_j
        store(out, i, spread_i)
        store(out, j, spread_j)


@inner
def _spread_of_tile(inputs: Inputs, start: int, n: int, scratch: NDArray[np.float32], tile: _Tile) -> tuple[bool, bool]:
    """The spreads in a tile, in the row of `scratch` after those of the inputs; else as `_find_tile`."""
    differs, half = _find_tile(inputs, start, n, scratch, tile)
    out = scratch[len(tile.rows)]
    if not differs:
        out[:] = ZERO  # where nothing was read, what is in the rows means nothing
    elif half:
        _spread(inputs.rows.view(np.uint16), n, tile, out)
    else:
        _spread(scratch, n, tile, out)
    return differs, half


@kernel
def _make_tile(inputs: Inputs) -> _Tile:
    """One that is not filled in."""
    places = np.empty((2, len(inputs.present)), np.int64)
    return _Tile(places[0], places[1])


@kernel
def spread_histogram(
    inputs: Inputs, count: int, scratch: NDArray[np.float32]
) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """The bins, and counts, of the histogram of a block's spreads; see `Histogram`."""
    tile, dense = _make_tile(inputs), np.zeros(BINS, np.uint32)
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        _spread_of_tile(inputs, start, n, scratch, tile)
        count_magnitudes(scratch[len(tile.rows)], n, dense)
    used = np.count_nonzero(dense)
    bins, counts = np.empty(used, np.uint16), np.empty(used, np.int64)
    drain(dense, bins, counts)
    return bins, counts


@inner
def _select_tile(
    scratch: NDArray[np.float32],
    row: int,
    start: int,
    n: int,
    selection: Selection,
    quota: int,
    masks: NDArray[np.uint16],
) -> int:
    """Note who is selected in a tile, a bit an element, by the spreads in a row of `scratch`.

    Inside the block's ties elements are looked at one by one; elsewhere equals of the threshold are all alike.

    Returns:
        What is left of `quota`, of equals.
    """
    threshold, begin, end = selection.threshold, selection.ties[0], selection.ties[2]
    all_stay = start + n <= begin
    if all_stay or (start >= begin and (quota == 0 or start >= end)):
        limit = splat(np.uint32(threshold if all_stay else threshold + 1))
        for i in range(0, n, LANES):
            above = (bits(load(scratch, row, i)) & splat(MAGNITUDE)) >= limit
            masks[i // LANES] = np.uint16(packed(above))
        return quota
    patterns = scratch[row].view(np.uint32)
    for i in range(0, n, LANES):
        mask = np.uint32(0)
        for j in range(i, min(n, i + LANES)):
            size = patterns[j] & MAGNITUDE
            is_in = size > threshold
            if size == threshold:
                is_in = start + j < begin
                if not is_in and quota > 0 and start + j < end:
                    quota -= 1
                    is_in = True
            mask |= np.uint32(is_in) << np.uint32(j - i)
        masks[i // LANES] = np.uint16(mask)
    return quota


@kernel
def _grown(array: NDArray[Any], used: int, room: int) -> NDArray[Any]:
    """The array, or a copy of the first `used` of it with room for that many more."""
    if used + room <= len(array):
        return array
    larger = np.empty((max(used + room, 2 * len(array)), array.shape[1]), array.dtype)
    larger[:used] = array[:used]
    return larger


@kernel
def selected_squares(
    inputs: Inputs, count: int, selection: Selection, scratch: NDArray[np.float32], sums: NDArray[np.float64]
) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Per tile and expert ([tiles, experts]): the sum of squares of what is selected of a delta.

    Returns:
        Of each element of which it is not known yet: the lower 16 bits of its spread, [elements, 1], and the squares of
        the deltas, [elements, experts].
    """
    tile, quota = _make_tile(inputs), selection.ties[1]
    experts, found = len(tile.rows) - 1, 0
    masks, room = np.empty(TILE // LANES, np.uint16), np.empty(experts * LANES, np.float32)
    masks[:] = 0xFFFF
    lower, squares = np.empty((0, 1), np.uint16), np.empty((0, experts), np.float32)
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        if selection.selects:
            differs, half = _spread_of_tile(inputs, start, n, scratch, tile)
            quota = _select_tile(scratch, experts + 1, start, n, selection, quota, masks)
        else:
            differs, half = _find_tile(inputs, start, n, scratch, tile)
        if not differs:
            sums[start // TILE] = 0.0
            continue
        if selection.upper >= 0:
            lower, squares = _grown(lower, found, n), _grown(squares, found, n)
        spread, own = scratch[experts + 1], sums[start // TILE]
        if half:
            halves = inputs.rows.view(np.uint16)
            _squares_of_tile(halves, n, tile, masks, own)
            if selection.upper >= 0:
                found = _collect_tile(halves, n, tile, spread, selection.upper, found, room, lower, squares)
        else:
            _squares_of_tile(scratch, n, tile, masks, own)
            if selection.upper >= 0:
                found = _collect_tile(scratch, n, tile, spread, selection.upper, found, room, lower, squares)
    return lower[:found], squares[:found]


@inner
def _squares_of_tile(
    table: NDArray[Any], n: int, tile: _Tile, masks: NDArray[np.uint16], sums: NDArray[np.float64]
) -> None:
    for k in range(1, len(tile.rows)):
        total = splat(ZERO)
        for i in range(0, n, LANES):
            d = load(table, tile.rows[k], tile.places[k] + i) - load(table, tile.rows[0], tile.places[0] + i)
            total = select(unpacked(np.uint32(masks[i // LANES])), total + d * d, total)
        sums[k - 1] = sum_in_order(widen(total))


@kernel
def _collect_tile(
    table: NDArray[Any],
    n: int,
    tile: _Tile,
    spread: NDArray[np.float32],
    upper: int,
    found: int,
    own: NDArray[np.float32],
    lower: NDArray[np.uint16],
    squares: NDArray[np.float32],
) -> int:
    """Add what is not known of a tile to the first `found` of `lower` and `squares`; returns how many that makes.

    `own` (float32, [experts * LANES]) is scratch.
    """
    patterns, experts, row = spread.view(np.uint32), len(tile.rows) - 1, spread.reshape(1, -1)
    low, sixteen, wanted = splat(np.uint32(0xFFFF)), splat(np.uint32(16)), splat(np.uint32(upper))
    for i in range(0, n, LANES):
        size = bits(load(row, 0, i)) & splat(MAGNITUDE)
        if not lanes_set(((size >> sixteen) == wanted) & ((size & low) != splat(np.uint32(0)))):
            continue
        first = found
        for j in range(i, min(n, i + LANES)):
            part = patterns[j] & np.uint32(0xFFFF)
            if (patterns[j] & MAGNITUDE) >> np.uint32(16) == np.uint32(upper) and part != np.uint32(0):
                lower[found, 0] = np.uint16(part)
                squares[found, 0] = np.float32(j - i)
                found += 1
        for k in range(experts):
            place, base = tile.places[k + 1] + i, load(table, tile.rows[0], tile.places[0] + i)
            d = load(table, tile.rows[k + 1], place) - base
            store(own, k * LANES, d * d)
        for f in range(first, found):
            lane = int(squares[f, 0])
            for k in range(experts):
                squares[f, k] = own[k * LANES + lane]
    return found


@kernel
def merge_selected(
    inputs: Inputs,
    count: int,
    selection: Selection,
    shares: NDArray[np.float32],
    scratch: NDArray[np.float32],
    out: NDArray[np.uint8],
    out_code: int,
) -> int:
    """Merge one block; see `Block` and `SelectedSum` for the arguments."""
    tile, quota, wrong = _make_tile(inputs), selection.ties[1], 0
    experts = len(tile.rows) - 1
    total = scratch[experts + 2]
    masks = np.empty(TILE // LANES, np.uint16)
    masks[:] = 0xFFFF
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        if selection.selects:
            _, half = _spread_of_tile(inputs, start, n, scratch, tile)
            quota = _select_tile(scratch, experts + 1, start, n, selection, quota, masks)
        else:
            _, half = _find_tile(inputs, start, n, scratch, tile)
        if half:
            top = _merge_tile(inputs.rows.view(np.uint16), n, masks, shares, tile, total)
        else:
            top = _merge_tile(scratch, n, masks, shares, tile, total)
        # The selection or the vote could drop a NaN, which would then go unnoticed.
        wrong += 1 if top >= NOT_FINITE else 0
        wrong += encode(total, n, out_code, out, start)
    return wrong


@inlined
def _count_in(sums: Any, d: Any, share: Any) -> Any:
    """Add a delta to the total, and to the sum, and the shares, of those of its sign."""
    total, up, down, for_up, for_down = sums
    zero, part = splat(ZERO), d * share
    ups, downs = d > zero, d < zero
    up, down = select(ups, up + part, up), select(downs, down + part, down)
    for_up, for_down = select(ups, for_up + share, for_up), select(downs, for_down + share, for_down)
    return total + d, up, down, for_up, for_down


@inlined
def _outcome(sums: Any) -> Any:
    """The merged delta, once every expert is counted in."""
    total, up, down, for_up, for_down = sums
    elected, least = total >= splat(ZERO), splat(SMALLEST_SHARE)
    divisor = select(elected, for_up, for_down)
    return select(elected, up, down) / select(divisor > least, divisor, least)


@inner
def _merge_tile(
    table: NDArray[Any],
    n: int,
    masks: NDArray[np.uint16],
    shares: NDArray[np.float32],
    tile: _Tile,
    out: NDArray[np.float32],
) -> Any:
    """Merge a tile; returns the largest magnitude met, as bits."""
    zero, magnitude = splat(ZERO), splat(MAGNITUDE)
    top = splat(np.uint32(0))
    # Two vectors at a time, as in `_spread`.
    for i in range(0, n, 2 * LANES):
        j = i + LANES if i + LANES < n else i
        base_i, base_j = load(table, tile.rows[0], tile.places[0] + i), load(table, tile.rows[0], tile.places[0] + j)
        sums_i = sums_j = (zero, zero, zero, zero, zero)
        for k in range(1, len(tile.rows)):
            row, place, share = tile.rows[k], tile.places[k], splat(shares[k - 1])
            d_i, d_j = load(table, row, place + i) - base_i, load(table, row, place + j) - base_j
            top = maximum(top, maximum(bits(d_i) & magnitude, bits(d_j) & magnitude))
            sums_i, sums_j = _count_in(sums_i, d_i, share), _count_in(sums_j, d_j, share)
        store(out, i, base_i + select(unpacked(np.uint32(masks[i // LANES])), _outcome(sums_i), zero))
        store(out, j, base_j + select(unpacked(np.uint32(masks[j // LANES])), _outcome(sums_j), zero))
    return largest(top)
