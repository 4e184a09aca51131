"""Which deltas take part in a tile and what of each stays, as the kernels of `delta_kernels` see it."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inner, kernel
from deltaworks.checkpoints.memory_vector import load
from deltaworks.checkpoints.vector import LANES, MAGNITUDE, bits, lanes_set, packed, splat
from deltaworks.merging.methods.operation import Inputs, find_rows, stage, stage_stand_in
from deltaworks.merging.methods.random_mask import draw_masks, round_density


class Thinning(NamedTuple):
    """What of the deltas stays in one block, as kernels take it.

    Attributes:
        at_random: whether by chance.
        thresholds: uint32, [experts]; magnitudes (their float32 bits) from here on stay.
        ties: int64, [experts, 3]; from an element of the block on only so many magnitudes that equal the threshold
            stay, the first, and none from a later element on.
        cuts_tops: whether outliers go.
        ceilings: uint32, [experts]; magnitudes from here on go as well.
        tops: int64, [experts, 3]; as `ties`, of the magnitudes that equal the ceiling: which of them go.
        keys: uint64, [experts]; of the random masks.
        densities: uint64, [experts, 2]; see `split_density`.
        masks: uint16, [experts, vectors]; room for a bit for each element of the block that says whether it stays by
            chance; see `draw_masks`.
        masks_known: whether they are drawn already.
    """

    at_random: bool
    thresholds: NDArray[np.uint32]
    ties: NDArray[np.int64]
    cuts_tops: bool
    ceilings: NDArray[np.uint32]
    tops: NDArray[np.int64]
    keys: NDArray[np.uint64]
    densities: NDArray[np.uint64]
    masks: NDArray[np.uint16]
    masks_known: bool


class Tile(NamedTuple):
    """The deltas that take part in one tile, as kernels take them: one entry an expert, at the front of each array.

    Attributes:
        rows: int64, [experts + 1]; where to load the base and then the experts from; see `load`.
        places: int64, [experts + 1]; likewise.
        experts: int64, [experts]; which they are.
        thresholds: uint32, [experts]; see `Thinning`.
        ceilings: uint32, [experts]; likewise.
        equals: int64, [experts]; how many magnitudes of each that equal its threshold stay.
        densities: uint32, [experts]; see `round_density`.
        weights: float32, [experts]; room for those of the experts that are added together.
        drafts: int64, [experts, 4]; room for where their drafts lie.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    experts: NDArray[np.int64]
    thresholds: NDArray[np.uint32]
    ceilings: NDArray[np.uint32]
    equals: NDArray[np.int64]
    densities: NDArray[np.uint32]
    weights: NDArray[np.float32]
    drafts: NDArray[np.int64]


@kernel
def make_tile(experts: int) -> Tile:
    """One that is not filled in."""
    places = np.empty((4, experts + 1), np.int64)
    limits = np.empty((3, experts), np.uint32)
    weights, drafts = np.empty(experts, np.float32), np.empty((experts, 4), np.int64)
    return Tile(places[0], places[1], places[2], limits[0], limits[1], places[3], limits[2], weights, drafts)


@inner
def find_tile(
    inputs: Inputs, first: int, start: int, n: int, thinning: Thinning, rows: NDArray[np.int64], tile: Tile
) -> tuple[int, bool]:
    """Fill in `tile` but its thresholds; returns how many experts take part, and whether it can be loaded as it is."""
    half = find_rows(inputs, start // TILE, rows) and n % LANES == 0
    tile.rows[0], tile.places[0] = rows[0], inputs.places[rows[0]] + start
    found = 0
    for k in range(1, len(rows)):
        # What reads as the base has no delta.
        if rows[k] != rows[0]:
            tile.rows[found + 1], tile.places[found + 1] = rows[k], inputs.places[rows[k]] + start
            tile.experts[found] = k - 1
            if thinning.at_random:
                tile.densities[found] = round_density(thinning.keys[k - 1], thinning.densities[k - 1], first + start)
            found += 1
    return found, half


@inner
def draw_tile(thinning: Thinning, first: int, start: int, n: int, found: int, tile: Tile) -> None:
    """Draw who stays by chance in a tile."""
    for a in range(found):
        k = tile.experts[a]
        draw_masks(thinning.keys[k], tile.densities[a], first + start, n, thinning.masks, k, start // LANES)


@inner
def stage_tile(inputs: Inputs, start: int, n: int, found: int, tile: Tile, scratch: NDArray[np.float32]) -> None:
    """Bring what a tile is made of to `scratch`, base first, and have it loaded from there."""
    below = scratch[len(scratch) - 1 :]
    stage_stand_in(inputs, start, n, below)
    for a in range(found + 1):
        stage(inputs, tile.rows[a], start, n, scratch[a], below)
        tile.rows[a], tile.places[a] = a, 0


@inner
def set_thresholds(
    table: NDArray[Any], start: int, n: int, found: int, thinning: Thinning, quotas: NDArray[np.int64], tile: Tile
) -> bool:
    """Fill in the thresholds of `tile`, and take what stays of their equals from `quotas`.

    Returns:
        Whether equals stay in one part of the tile and not in another; then nothing was taken from `quotas`.
    """
    torn = False
    for a in range(found):
        k = tile.experts[a]
        tile.thresholds[a], tile.equals[a] = thinning.thresholds[k], 0
        begin, end = thinning.ties[k, 0], thinning.ties[k, 2]
        if start + n <= begin:
            continue
        if quotas[k] == 0 or start >= end:
            tile.thresholds[a] += np.uint32(1)
            continue
        tile.equals[a] = _equals(table, n, a, tile)
        torn |= tile.equals[a] > quotas[k] or start < begin or start + n > end
    if not torn:
        for a in range(found):
            quotas[tile.experts[a]] -= tile.equals[a]
    return torn


@inner
def set_ceilings(start: int, n: int, found: int, thinning: Thinning, tile: Tile) -> bool:
    """Fill in the ceilings of `tile`.

    Returns:
        Whether some of the magnitudes that equal one may go and others stay; see `drop_equals`.
    """
    torn = False
    if thinning.cuts_tops:
        for a in range(found):
            k = tile.experts[a]
            tile.ceilings[a] = thinning.ceilings[k]
            if start + n > thinning.tops[k, 0]:
                tile.ceilings[a] += np.uint32(1)
                torn |= start < thinning.tops[k, 2]
    return torn


@inner
def _equals(table: NDArray[Any], n: int, a: int, tile: Tile) -> int:
    """How many magnitudes of a delta in the tile equal its threshold."""
    found = 0
    for i in range(0, n, LANES):
        d = load(table, tile.rows[a + 1], tile.places[a + 1] + i) - load(table, tile.rows[0], tile.places[0] + i)
        found += lanes_set((bits(d) & splat(MAGNITUDE)) == splat(tile.thresholds[a]))
    return found


@inner
def drop_equals(
    scratch: NDArray[np.float32],
    start: int,
    n: int,
    found: int,
    limits: NDArray[np.uint32],
    ties: NDArray[np.int64],
    quotas: NDArray[np.int64],
    first: bool,
    tile: Tile,
) -> None:
    """Set to the base's, in a staged tile, the elements whose magnitudes equal a limit and do not stay.

    Args:
        scratch: the staged tile.
        start: its first element in the block.
        n: its elements.
        found: how many experts take part.
        limits: uint32, [experts]; the thresholds, or the ceilings.
        ties: int64, [experts, 3]; see `Thinning`.
        quotas: int64, [experts]; what is left of those in `ties`.
        first: whether it is the first ones that go, or all others.
        tile: who takes part.
    """
    for a in range(found):
        k = tile.experts[a]
        x, begin, end = scratch[a + 1], ties[k, 0], ties[k, 2]
        for i in range(0, n, LANES):
            size = bits(load(scratch, a + 1, i) - load(scratch, 0, i)) & splat(MAGNITUDE)
            equals = int(packed(size == splat(limits[k])))
            if not equals:
                continue
            for j in range(i, min(n, i + LANES)):
                if equals >> (j - i) & 1:
                    is_first = start + j < begin
                    if not is_first and quotas[k] > 0 and start + j < end:
                        quotas[k] -= 1
                        is_first = True
                    if is_first == first:
                        x[j] = scratch[0, j]
