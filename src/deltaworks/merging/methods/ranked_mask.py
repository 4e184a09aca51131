"""Which elements stay by chance, the larger the likelier: masks by the rank of magnitudes in their row.

MAGPRUNE of DELLA (arXiv 2406.11617, section 3.1): the chance of an element rises from density - epsilon to density +
epsilon with the rank of its magnitude among those of its row. Elements of equal magnitude share the mean of their
ranks; mergekit lets them share the ranks out in any order, which comes to the same chance.

An element stays where its random number of 16 bits (see `random_mask`), and a half, is below its chance in units of
2^-16. Turned around, a number asks for a least rank. Most numbers are below every chance or above; of the others, most
ask for a rank that is far from the element's own, as a histogram of the row's magnitudes tells. Only what is left is
ranked, so nothing is ever sorted.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inner, kernel
from deltaworks.checkpoints.memory_vector import load, load_each, store
from deltaworks.checkpoints.vector import (
    LANES,
    MAGNITUDE,
    ZERO,
    bits,
    bits_below,
    floats,
    lanes_set,
    largest,
    maximum,
    minimum,
    packed,
    ramp,
    splat,
    trailing_zeros,
)
from deltaworks.merging.methods.operation import Inputs, find_rows, stage, stage_stand_in
from deltaworks.merging.methods.random_mask import GOLDEN, random_numbers_reference, split_mix

LONGEST_ROW = 1 << 18
"""Elements that are ranked together, at most: longer rows are ranked in pieces."""
LARGEST_ROWS_BLOCK = 1 << 24
"""Elements of the largest block of whole rows that tensors are streamed in."""

_WORD = 2 * LANES
_BINS = 512
_EXACT, _EXACT_BITS = np.float32(1 << 23), np.uint32(0x4B000000)
_LEAST_SPAN = np.float32(1e-20)


def rows_block(row: int) -> int:
    """Elements in the smallest block that holds whole rows and whole tiles."""
    return math.lcm(row, TILE)


class Chances(NamedTuple):
    """How likely the elements of one delta stay, in units of 2^-16.

    Attributes:
        first: float32; a number and this, times a row's ranks over `span`, is the rank it asks for.
        span: float32; by how much the chance rises from the first rank of a row to the last.
        always: numbers below this let their element stay whatever its rank.
        never: numbers from here on, up to 65,536, let it go.
    """

    first: np.float32
    span: np.float32
    always: int
    never: int


def chances(density: float, epsilon: float) -> Chances:
    """The chances of elements that stay with `density` on average, and by `epsilon` more or less by their rank."""
    if density <= 0 or density >= 1:
        limit = 0 if density <= 0 else 1 << 16
        return Chances(ZERO, _LEAST_SPAN, limit, limit)
    first = np.float32(0.5 - (density - epsilon) * 2.0**16)
    span = 2 * epsilon * 2.0**16
    always = int(np.ceil(-first))
    return Chances(first, max(np.float32(span), _LEAST_SPAN), max(always, 0), min(int(always + span) + 2, 1 << 16))


def ranked_mask_reference(key: int, chance: Chances, row: int, delta: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which elements of a whole flat delta stay, with NumPy; `row` elements are ranked together."""
    numbers = random_numbers_reference(key, np.arange(len(delta)))
    stays = numbers < chance.always
    for start in range(0, len(delta), row):
        part = slice(start, start + row)
        sizes = np.abs(delta[part]).view(np.uint32)
        ascending = np.sort(sizes)
        below, upto = (np.searchsorted(ascending, sizes, side) for side in ("left", "right"))
        ranks = (below + upto - 1).astype(np.float32) / np.float32(2)
        asked = (numbers[part].astype(np.float32) + chance.first) * _ranks_per_unit(len(sizes), chance.span)
        if len(sizes) == 1:
            ranks[:] = 0.5
        stays[part] |= (numbers[part] < chance.never) & (ranks > asked)
    return stays


def _ranks_per_unit_reference(n: int, span: Any) -> Any:
    """By how many ranks a unit of chance differs in a row of `n`: float32. An only one is half way up."""
    return np.float32(max(n - 1, 1)) / span


_ranks_per_unit: Any = kernel(_ranks_per_unit_reference)


class _Row(NamedTuple):
    """A stretch of a delta that holds the row being ranked, as kernels take it.

    Attributes:
        sizes: float32, [1, room]; magnitudes.
        patterns: uint32, [room]; their bits.
        numbers: uint16, [1, room]; what is drawn for each element.
        open: uint16, [room / LANES]; a bit for each element whose number asks for a rank.
        bins: uint16, [1, room]; of each element of the row, from its first on.
        counts: uint32, [2, _BINS]; the elements of the row in each bin, in two parts.
        below: float32, [_BINS + 1]; how many elements of the row are in bins below each.
        known: int64, [_BINS]; the last magnitude of each bin that was ranked, and in which row.
        ranks: float32, [_BINS]; its rank.
    """

    sizes: NDArray[np.float32]
    patterns: NDArray[np.uint32]
    numbers: NDArray[np.uint16]
    open: NDArray[np.uint16]
    bins: NDArray[np.uint16]
    counts: NDArray[np.uint32]
    below: NDArray[np.float32]
    known: NDArray[np.int64]
    ranks: NDArray[np.float32]


@kernel
def _make_row(row: int) -> _Row:
    room = (row + 2 * TILE) // _WORD * _WORD
    sizes, halves = np.zeros((1, room), np.float32), np.zeros((2, room), np.uint16)
    return _Row(
        sizes,
        sizes[0].view(np.uint32),
        halves[:1],
        np.zeros(room // LANES, np.uint16),
        halves[1:],
        np.zeros((2, _BINS), np.uint32),
        np.zeros(_BINS + 1, np.float32),
        np.full(_BINS, -1, np.int64),
        np.zeros(_BINS, np.float32),
    )


@kernel
def draw_ranked_masks(
    inputs: Inputs,
    first: int,
    count: int,
    row: int,
    keys: NDArray[np.uint64],
    lines: NDArray[np.float32],
    limits: NDArray[np.int64],
    scratch: NDArray[np.float32],
    masks: NDArray[np.uint16],
) -> None:
    """Which elements of each delta of a block stay, a bit each, to `masks`; what is zero may stay or go.

    Args:
        inputs: the block, base first.
        first: flat index of its first element in its tensor, at which a row begins.
        count: elements in it; whole rows, or up to the end of the tensor.
        row: elements that are ranked together.
        keys: uint64, [experts]; see `random_key`.
        lines: float32, [experts, 2]; `first` and `span` of their `Chances`.
        limits: int64, [experts, 2]; likewise `always` and `never`.
        scratch: see `Block`.
        masks: uint16, [experts, vectors]; the first element is the lowest bit.
    """
    experts = len(keys)
    rows = np.empty(experts + 1, np.int64)
    halves = inputs.rows.view(np.uint16)
    part = _make_row(row)
    ranked = 0
    for k in range(experts):
        origin = done = 0
        ranks = limits[k, 0] < limits[k, 1]
        for start in range(0, count, TILE):
            n = min(TILE, count - start)
            filled, at = start + n, start - origin
            _draw_tile(keys[k], first + start, n, limits[k, 0], limits[k, 1], part, at, masks, k, start // LANES)
            if ranks:
                half = find_rows(inputs, start // TILE, rows) and n % LANES == 0
                own, base = rows[k + 1], rows[0]
                if half:
                    places = inputs.places[own] + start, inputs.places[base] + start
                    _measure_tile(halves, own, places[0], base, places[1], n, part.sizes[0], at)
                else:
                    below = scratch[len(scratch) - 1 :]
                    stage_stand_in(inputs, start, n, below)
                    stage(inputs, base, start, n, scratch[0], below)
                    stage(inputs, own, start, n, scratch[1], below)
                    _measure_tile(scratch, 1, 0, 0, 0, n, part.sizes[0], at)
            while ranks and done < count and min(done + row, count) <= filled:
                end = min(done + row, count)
                ranked += 1
                _rank_row(part, origin, done, end, lines[k, 0], lines[k, 1], ranked, masks, k)
                done = end
            if not ranks:
                done = filled
            origin = _move_up(part, origin, done, filled)


@inner
def _move_up(part: _Row, origin: int, done: int, filled: int) -> int:
    """Move what follows the rows that are done to the front; returns where in the block that begins."""
    front = done // _WORD * _WORD
    moved, left = front - origin, filled - front
    if moved > 0:
        for i in range(left):
            part.sizes[0, i] = part.sizes[0, i + moved]
            part.numbers[0, i] = part.numbers[0, i + moved]
        for i in range(-(-left // LANES)):
            part.open[i] = part.open[i + moved // LANES]
    return front


@inner
def _measure_tile(
    table: NDArray[Any], own: int, place: int, base: int, base_place: int, n: int, out: NDArray[np.float32], at: int
) -> None:
    """The magnitudes of a delta in a tile, to `out` from `at` on."""
    magnitude = splat(MAGNITUDE)
    for i in range(0, n, LANES):
        d = load(table, own, place + i) - load(table, base, base_place + i)
        store(out, at + i, floats(bits(d) & magnitude))


@inner
def _draw_tile(
    key: int,
    place: int,
    n: int,
    always: int,
    never: int,
    part: _Row,
    at: int,
    masks: NDArray[np.uint16],
    k: int,
    start: int,
) -> None:
    """The numbers of the tile at the flat index `place`, and which of its elements stay whatever their rank."""
    counter = key + ((np.uint64(place) >> np.uint64(2)) + np.uint64(1)) * GOLDEN
    for v in range(0, -(-n // LANES), 2):
        drawn = split_mix(ramp(counter, GOLDEN))
        stay, maybe = bits_below(drawn, np.uint32(always)), bits_below(drawn, np.uint32(never))
        store(part.numbers[0], at + v * LANES, drawn)
        masks[k, start + v], masks[k, start + v + 1] = np.uint16(stay), np.uint16(stay >> np.uint32(16))
        maybe ^= stay
        part.open[at // LANES + v] = np.uint16(maybe)
        part.open[at // LANES + v + 1] = np.uint16(maybe >> np.uint32(16))
        counter += np.uint64(8) * GOLDEN


@inner
def _rank_row(
    part: _Row,
    origin: int,
    begin: int,
    end: int,
    line: np.float32,
    span: np.float32,
    ranked: int,
    masks: NDArray[np.uint16],
    k: int,
) -> None:
    """Decide for the open elements of a row, from `begin` to `end` of the block, of which `part` begins at `origin`."""
    low, n = begin - origin, end - begin
    per_unit = _ranks_per_unit(n, span)
    shift, bins = (17, _BINS) if n >= 8192 else (18, 256) if n >= 512 else (20, 64) if n >= 128 else (21, 16)
    if not _fill_bins(part, low, n, shift, bins):
        return
    exact, offset, sixteen = splat(_EXACT_BITS), splat(_EXACT), splat(np.uint32(16))
    for i in range(0, n, LANES):
        at, inside = low + i, min(n - i, LANES)
        shared = np.uint32(at % LANES)
        word = np.uint32(part.open[at // LANES]) | np.uint32(part.open[at // LANES + 1]) << np.uint32(16)
        asks = word >> shared & np.uint32((1 << inside) - 1)
        # A number of 16 bits after those of 2^23 is one more float32 by as much.
        number = floats((bits(load(part.numbers, 0, at)) >> sixteen) | exact) - offset
        asked = (number + splat(line)) * splat(per_unit)
        bin_ = bits(load(part.bins, 0, i)) >> sixteen
        stays = packed(load_each(part.below, bin_) > asked) & asks
        left = np.int64(packed(load_each(part.below[1:], bin_) > asked) & asks & ~stays)
        while left:
            lane = trailing_zeros(left)
            left &= left - 1
            if _is_above(part, low, n, i + lane, line, per_unit, ranked):
                stays |= np.uint32(1) << np.uint32(lane)
        place, stays = origin + at, stays << shared
        masks[k, place // LANES] |= np.uint16(stays)
        if stays >> np.uint32(16):
            masks[k, place // LANES + 1] |= np.uint16(stays >> np.uint32(16))


@inner
def _is_above(part: _Row, low: int, n: int, i: int, line: np.float32, per_unit: np.float32, ranked: int) -> bool:
    """Whether an element has a rank above the one that it asks for, where its bin does not tell."""
    size, bin_ = part.patterns[low + i], int(part.bins[0, i])
    # What was ranked last in this bin may have been as large.
    tag = ranked << 32 | np.int64(size)
    if part.known[bin_] != tag:
        part.known[bin_] = tag
        part.ranks[bin_] = _mean_rank(part, low, n, size)
    return bool(part.ranks[bin_] > (np.float32(part.numbers[0, low + i]) + line) * per_unit)


@inner
def _fill_bins(part: _Row, low: int, n: int, shift: int, bins: int) -> bool:
    """Count how many elements of a row are in bins below each; false where all are zero."""
    top = splat(np.uint32(0))
    whole = n // LANES * LANES
    for i in range(low, low + whole, LANES):
        top = maximum(top, bits(load(part.sizes, 0, i)))
    most = np.int64(largest(top))
    for i in range(low + whole, low + n):
        most = max(most, np.int64(part.patterns[i]))
    if most == 0:
        return False
    floor: Any = max((most >> shift) - (bins - 1), 0)
    least, by, last = splat(np.uint32(floor)), splat(np.uint32(shift)), splat(np.uint32(bins - 1))
    for i in range(0, n, LANES):
        upper = bits(load(part.sizes, 0, low + i)) >> by
        # The last vector may hold larger ones, of the next row: what is looked up for them must be there too.
        store(part.bins[0], i, minimum(maximum(upper, least) - least, last))
    counts = part.counts
    for b in range(bins):
        counts[0, b] = counts[1, b] = np.uint32(0)
    for i in range(0, n - 1, 2):
        counts[0, part.bins[0, i]] += np.uint32(1)
        counts[1, part.bins[0, i + 1]] += np.uint32(1)
    if n % 2:
        counts[0, part.bins[0, n - 1]] += np.uint32(1)
    below = np.uint32(0)
    for b in range(bins):
        part.below[b] = np.float32(below)
        below += counts[0, b] + counts[1, b]
    part.below[bins] = np.float32(below)
    return True


@inner
def _mean_rank(part: _Row, low: int, n: int, size: np.uint32) -> Any:
    """The rank of a magnitude (as bits) among the `n` from `low` on: the mean of its equals."""
    if n == 1:
        return np.float32(0.5)
    wanted = splat(size)
    twice = np.int64(-1)
    whole = n // LANES * LANES
    for i in range(low, low + whole, LANES):
        other = bits(load(part.sizes, 0, i))
        twice += lanes_set(other < wanted) + lanes_set(other <= wanted)
    for i in range(low + whole, low + n):
        twice += np.int64(part.patterns[i] < size) + np.int64(part.patterns[i] <= size)
    return np.float32(twice) / np.float32(2)
