"""Kernels that measure and merge deltas: thin out, weight, elect, sum and add, in one pass over tiles."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE, encode
from deltaworks.checkpoints.dtypes import BF16
from deltaworks.checkpoints.jit import inlined, inner, kernel
from deltaworks.checkpoints.memory_vector import load, prefetch, store
from deltaworks.checkpoints.vector import (
    LANES,
    MAGNITUDE,
    NOT_FINITE,
    ONE,
    ZERO,
    bits,
    floats,
    lanes_set,
    largest,
    maximum,
    select,
    splat,
    sum_in_order,
    unpacked,
    widen,
)
from deltaworks.layers.decode import add_drafts, add_tile
from deltaworks.layers.opened import is_draft
from deltaworks.merging.methods.delta_tiles import (
    Thinning,
    Tile,
    draw_tile,
    drop_equals,
    find_tile,
    make_tile,
    set_ceilings,
    set_thresholds,
    stage_tile,
)
from deltaworks.merging.methods.operation import LAYERED, Inputs, find_rows, stage, stage_stand_in

_BF16 = BF16.code
_DONE = -1
"""Stands for the row of an expert that is added already."""


@kernel
def delta_masses(
    inputs: Inputs,
    first: int,
    count: int,
    thinning: Thinning,
    scratch: NDArray[np.float32],
    sums: NDArray[np.float64],
) -> None:
    """Per tile and expert: the sum of a delta's magnitudes, before and after thinning."""
    experts = len(thinning.keys)
    quotas, top_quotas = thinning.ties[:, 1].copy(), thinning.tops[:, 1].copy()
    rows = np.empty(experts + 1, np.int64)
    tile = make_tile(experts)
    halves, before = inputs.rows.view(np.uint16), np.empty(2 * experts, np.float64)
    sums[:] = 0.0
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        found, half = find_tile(inputs, first, start, n, thinning, rows, tile)
        own = sums[start // TILE]
        if thinning.at_random and not thinning.masks_known:
            draw_tile(thinning, first, start, n, found, tile)
        torn_top = set_ceilings(start, n, found, thinning, tile)
        if half and not torn_top and not set_thresholds(halves, start, n, found, thinning, quotas, tile):
            _masses_tile(halves, n, found, thinning, start, tile, own)
            continue
        stage_tile(inputs, start, n, found, tile, scratch)
        torn = set_thresholds(scratch, start, n, found, thinning, quotas, tile)
        _masses_tile(scratch, n, found, thinning, start, tile, own)
        if torn or torn_top:
            before[:] = own
            if torn:
                drop_equals(scratch, start, n, found, thinning.thresholds, thinning.ties, quotas, False, tile)
            if torn_top:
                drop_equals(scratch, start, n, found, thinning.ceilings, thinning.tops, top_quotas, True, tile)
            _masses_tile(scratch, n, found, thinning, start, tile, own)
            own[::2] = before[::2]


@inner
def _masses_tile(
    table: NDArray[Any],
    n: int,
    found: int,
    thinning: Thinning,
    start: int,
    tile: Tile,
    sums: NDArray[np.float64],
) -> None:
    """Sums of magnitudes, before thinning and after, in a tile from element `start` of the block on."""
    magnitude, zero = splat(MAGNITUDE), splat(ZERO)
    for a in range(found):
        k = tile.experts[a]
        before, after = zero, zero
        for i in range(0, n, LANES):
            # A tile of BF16 is a page, at the end of which the machine stops fetching ahead by itself.
            prefetch(table, tile.rows[a + 1], tile.places[a + 1] + i + TILE)
            if a == 0:
                prefetch(table, tile.rows[0], tile.places[0] + i + TILE)
            d = load(table, tile.rows[a + 1], tile.places[a + 1] + i) - load(table, tile.rows[0], tile.places[0] + i)
            size = bits(d) & magnitude
            if thinning.at_random:
                stays = unpacked(np.uint32(thinning.masks[k, (start + i) // LANES]))
            else:
                stays = size >= splat(tile.thresholds[a])
                if thinning.cuts_tops:
                    stays = stays & (size < splat(tile.ceilings[a]))
            before = before + floats(size)
            after = select(stays, after + floats(size), after)
        sums[2 * k], sums[2 * k + 1] = sum_in_order(widen(before)), sum_in_order(widen(after))


@kernel
def merge_deltas(
    inputs: Inputs,
    first: int,
    count: int,
    thinning: Thinning,
    scales: NDArray[np.float32],
    weights: NDArray[np.float32],
    consensus: bool,
    normalize: bool,
    scale: np.float32,
    scratch: NDArray[np.float32],
    out: NDArray[np.uint8],
    out_code: int,
) -> int:
    """Merge one block; see `Block`, `DeltaSum` and `Thinning` for the arguments."""
    wrong = 0
    experts = len(weights)
    quotas, top_quotas = thinning.ties[:, 1].copy(), thinning.tops[:, 1].copy()
    rows = np.empty(experts + 1, np.int64)
    tile = make_tile(experts)
    halves, flat, total = inputs.rows.view(np.uint16), inputs.rows.reshape(-1), scratch[experts + 1]
    scaled = False
    for k in range(experts):
        scaled |= scales[k] != ONE
    adds_up = not consensus and not thinning.cuts_tops
    everyone = ZERO
    for k in range(experts):
        adds_up &= thinning.at_random or thinning.thresholds[k] == np.uint32(0)
        everyone += weights[k]
    if abs(everyone) < np.float32(1e-8):
        everyone = ONE
    how = (consensus, normalize, everyone, scale)
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        found, half = find_tile(inputs, first, start, n, thinning, rows, tile)
        if thinning.at_random and not thinning.masks_known:
            draw_tile(thinning, first, start, n, found, tile)
        if adds_up and not half:
            largest_ = _add_tile(inputs, flat, n, found, thinning, start, tile, scales, weights, how, scratch)
            wrong += 1 if largest_ >= NOT_FINITE else 0
            wrong += encode(total, n, out_code, out, start)
            continue
        if found == 0 and half and out_code == _BF16:
            largest_ = _keep_tile(halves, n, tile, how, out, start)
            wrong += 1 if largest_ >= NOT_FINITE else 0
            continue
        torn_top = set_ceilings(start, n, found, thinning, tile)
        if half and not torn_top and not set_thresholds(halves, start, n, found, thinning, quotas, tile):
            largest_ = _merge_tile(halves, n, found, thinning, start, tile, scaled, scales, weights, how, total)
        else:
            stage_tile(inputs, start, n, found, tile, scratch)
            if set_thresholds(scratch, start, n, found, thinning, quotas, tile):
                drop_equals(scratch, start, n, found, thinning.thresholds, thinning.ties, quotas, False, tile)
            if torn_top:
                drop_equals(scratch, start, n, found, thinning.ceilings, thinning.tops, top_quotas, True, tile)
            largest_ = _merge_tile(scratch, n, found, thinning, start, tile, scaled, scales, weights, how, total)
        # Thinning or the vote could drop a NaN, which would then go unnoticed.
        wrong += 1 if largest_ >= NOT_FINITE else 0
        wrong += encode(total, n, out_code, out, start)
    return wrong


@inlined
def _count_in(sums: Any, d: Any, stays: Any, weight: Any, consensus: bool) -> Any:
    """Add what stays of a weighted delta: to the total, and to the sum, and the weights, of those of its sign."""
    total, up, down, for_up, for_down = sums
    total = select(stays, total + d, total)
    if consensus:
        zero = splat(ZERO)
        ups, downs = stays & (d > zero), stays & (d < zero)
        up, down = select(ups, up + d, up), select(downs, down + d, down)
        for_up, for_down = select(ups, for_up + weight, for_up), select(downs, for_down + weight, for_down)
    return total, up, down, for_up, for_down


@inlined
def _outcome(sums: Any, how: tuple[bool, bool, np.float32, np.float32]) -> Any:
    """The merged delta, once every expert is counted in."""
    total, up, down, for_up, for_down = sums
    consensus, normalize, everyone, scale = how
    if consensus:
        elected = total >= splat(ZERO)
        total = select(elected, up, down)
        if normalize:
            divisor = select(elected, for_up, for_down)
            total = total / select(divisor != splat(ZERO), divisor, splat(ONE))
    elif normalize:
        total = total / splat(everyone)
    return total * splat(scale)


@inner
def _keep_tile(
    table: NDArray[np.uint16],
    n: int,
    tile: Tile,
    how: tuple[bool, bool, np.float32, np.float32],
    out: NDArray[np.uint8],
    start: int,
) -> Any:
    """As `_merge_tile` and `encode` where no expert takes part and all is BF16; `out` has the tile at `start`."""
    zero, magnitude, sixteen = splat(ZERO), splat(MAGNITUDE), splat(np.uint32(16))
    # A zero that is added all the same, as it has a sign.
    nothing = _outcome((zero, zero, zero, zero, zero), how)
    top = splat(np.uint32(0))
    row, place, merged = tile.rows[0], tile.places[0], out.view(np.uint16)[start : start + n]
    for i in range(0, n, LANES):
        pattern = bits(load(table, row, place + i) + nothing)
        top = maximum(top, pattern & magnitude)
        store(merged, i, pattern >> sixteen)
    return largest(top)


@inner
def _merge_tile(
    table: NDArray[Any],
    n: int,
    found: int,
    thinning: Thinning,
    start: int,
    tile: Tile,
    scaled: bool,
    scales: NDArray[np.float32],
    weights: NDArray[np.float32],
    how: tuple[bool, bool, np.float32, np.float32],
    out: NDArray[np.float32],
) -> Any:
    """Merge a tile from element `start` of the block on; returns the largest magnitude met, as bits."""
    zero, magnitude, consensus = splat(ZERO), splat(MAGNITUDE), how[0]
    top = splat(np.uint32(0))
    # Two vectors at a time share what is looked up of each expert; an odd last one is its own neighbour.
    for i in range(0, n, 2 * LANES):
        j = i + LANES if i + LANES < n else i
        base_i, base_j = load(table, tile.rows[0], tile.places[0] + i), load(table, tile.rows[0], tile.places[0] + j)
        sums_i = sums_j = (zero, zero, zero, zero, zero)
        for a in range(found):
            k, row, place = tile.experts[a], tile.rows[a + 1], tile.places[a + 1]
            d_i, d_j = load(table, row, place + i) - base_i, load(table, row, place + j) - base_j
            size_i, size_j = bits(d_i) & magnitude, bits(d_j) & magnitude
            top = maximum(top, maximum(size_i, size_j))
            if thinning.at_random:
                stays_i = unpacked(np.uint32(thinning.masks[k, (start + i) // LANES]))
                stays_j = unpacked(np.uint32(thinning.masks[k, (start + j) // LANES]))
            else:
                threshold = splat(tile.thresholds[a])
                stays_i, stays_j = size_i >= threshold, size_j >= threshold
                if thinning.cuts_tops:
                    ceiling = splat(tile.ceilings[a])
                    stays_i, stays_j = stays_i & (size_i < ceiling), stays_j & (size_j < ceiling)
            if scaled:
                factor = splat(scales[k])
                d_i, d_j = d_i * factor, d_j * factor
            weight = splat(weights[k])
            sums_i = _count_in(sums_i, d_i * weight, stays_i, weight, consensus)
            sums_j = _count_in(sums_j, d_j * weight, stays_j, weight, consensus)
        store(out, i, base_i + _outcome(sums_i, how))
        store(out, j, base_j + _outcome(sums_j, how))
    return largest(top)


@inner
def _add_tile(
    inputs: Inputs,
    flat: NDArray[np.uint8],
    n: int,
    found: int,
    thinning: Thinning,
    start: int,
    tile: Tile,
    scales: NDArray[np.float32],
    weights: NDArray[np.float32],
    how: tuple[bool, bool, np.float32, np.float32],
    scratch: NDArray[np.float32],
) -> Any:
    """As `_merge_tile`, where no expert's part hangs on another's: staged and added one at a time, all is in cache.

    Nothing is trimmed by magnitude. `flat` has all rows in one. The result is in the row of `scratch` after those of
    the inputs.
    """
    total = len(weights) + 1
    out = scratch[total]
    zero, magnitude = splat(ZERO), splat(MAGNITUDE)
    top = splat(np.uint32(0))
    last = len(scratch) - 1
    over_base, below = tile.rows[0] == inputs.stand_in, scratch[last:]
    base = last if over_base else 0
    if not over_base:
        stage_stand_in(inputs, start, n, below)
    stage(inputs, tile.rows[0], start, n, scratch[base], below)
    for i in range(0, n, LANES):
        store(out, i, zero)
    added = scratch[total : total + 1]
    # Nothing is lost on `top`: where the base is not finite, neither is the sum.
    adds_layers = over_base and not thinning.at_random
    drafts, width = 0, inputs.rows.shape[1]
    for a in range(found):
        k, row = tile.experts[a], tile.rows[a + 1]
        is_told = adds_layers and inputs.codes[row] >= LAYERED and scales[k] == ONE
        if is_told and is_draft(flat, row * width):
            # They come first. Whatever takes the place of the tile's first parts is through with them.
            tile.places[drafts], tile.weights[drafts], tile.rows[a + 1] = row, weights[k], _DONE
            drafts += 1
    if drafts > 0:
        add_drafts(flat, width, tile.places, tile.weights, drafts, start // TILE, n, tile.drafts, added)
    for a in range(found):
        k, row = tile.experts[a], tile.rows[a + 1]
        if row == _DONE:
            continue
        is_told = adds_layers and inputs.codes[row] >= LAYERED and scales[k] == ONE
        if is_told and add_tile(inputs.rows[row], below, start // TILE, n, weights[k], added):
            continue
        stage(inputs, row, start, n, scratch[1], below)
        factor, weight = splat(scales[k]), splat(weights[k])
        for i in range(0, n, LANES):
            d = load(scratch, 1, i) - load(scratch, base, i)
            top = maximum(top, bits(d) & magnitude)
            mask = thinning.masks[k, (start + i) // LANES] if thinning.at_random else np.uint16(0xFFFF)
            sums = (load(scratch, total, i), zero, zero, zero, zero)
            store(out, i, _count_in(sums, d * factor * weight, unpacked(np.uint32(mask)), weight, False)[0])
    for i in range(0, n, LANES):
        sums = (load(scratch, total, i), zero, zero, zero, zero)
        store(out, i, load(scratch, base, i) + _outcome(sums, how))
    return largest(top)


@kernel
def collect_lower_bits(
    inputs: Inputs, k: int, count: int, upper: int, scratch: NDArray[np.float32], out: NDArray[np.uint16]
) -> int:
    """Write the lower 16 bits, not zero, of every magnitude of delta `k` whose upper 16 are `upper`; says how many."""
    rows = np.empty(len(inputs.present), np.int64)
    patterns = scratch[1].view(np.uint32)
    lower, sixteen, wanted = splat(np.uint32(0xFFFF)), splat(np.uint32(16)), splat(np.uint32(upper))
    found = 0
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        find_rows(inputs, start // TILE, rows)
        below = scratch[len(scratch) - 1 :]
        stage_stand_in(inputs, start, n, below)
        stage(inputs, rows[0], start, n, scratch[0], below)
        stage(inputs, rows[k], start, n, scratch[1], below)
        for i in range(0, n, LANES):
            d = load(scratch, 1, i) - load(scratch, 0, i)
            magnitude = bits(d) & splat(MAGNITUDE)
            inside = ((magnitude >> sixteen) == wanted) & ((magnitude & lower) != splat(np.uint32(0)))
            if lanes_set(inside):
                store(scratch[1], i, d)
                for j in range(i, i + LANES):
                    part = patterns[j] & np.uint32(0xFFFF)
                    if (patterns[j] & MAGNITUDE) >> np.uint32(16) == np.uint32(upper) and part != np.uint32(0):
                        out[found] = np.uint16(part)
                        found += 1
    return found
