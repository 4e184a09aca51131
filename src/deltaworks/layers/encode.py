"""From elements to layers: a block at a time, inside a compiled kernel."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE, decode
from deltaworks.checkpoints.jit import inlined, inner, kernel
from deltaworks.checkpoints.memory_vector import load, store
from deltaworks.checkpoints.sketch import BUCKETS, add_to_sketch
from deltaworks.checkpoints.vector import (
    LANES,
    MAGNITUDE,
    bits,
    leading_zeros,
    lookup,
    lower_bytes,
    minimum,
    packed,
    select,
    splat,
    sum_in_order,
    unpacked,
    upper_bytes,
    widen,
)
from deltaworks.layers.arithmetic import (
    cells_of,
    centres_above,
    estimate,
    indices,
    mean_at,
    number_at,
    places_of,
    scaled,
    signed,
    unit_of,
)
from deltaworks.layers.bitstream import SLACK, count_ones, interleaved, lanes_below, put, put_half
from deltaworks.layers.cells import DEPTH, DRAFTS, EDGES, GROUP, RAW, TOLD
from deltaworks.layers.opened import DRAFT_HEAD, HEAD, IS_SPARSE
from deltaworks.layers.survey import INFINITE, choose_range, survey, top_of, write_means
from deltaworks.layers.trellis import CODES, LENGTHS, find_path

_ZERO, _ONE, _ALL16 = np.uint32(0), np.uint32(1), np.uint32(0xFFFF)

SPARSE_FROM = 6
"""A block is sparse where one in so many elements is unchanged: telling them apart costs a bit, which that saves."""


def most_bytes(count: int) -> int:
    """Bytes that the layers of a block of `count` elements can come to, with slack for the kernels."""
    tiles, groups = -(-count // TILE), -(-count // GROUP)
    drafts = DRAFT_HEAD + groups + DRAFTS * groups * LANES
    return drafts + HEAD + 4 * (tiles + 1) + groups + 5 * (count // 8 + 1) + 3 * 3 * tiles + 4 * count + 16 * SLACK


class Residuals(NamedTuple):
    """What is told of what the first layers of a block leave of its delta, beyond its squares.

    Attributes:
        first: flat index of the block's first element.
        signs: of sketches, see `signs`.
        places: int64, [SAMPLES]; the elements that are sampled, ascending.
        sketches: float32, [DEPTH - 1, BUCKETS]; of what one layer leaves, two layers, and so on.
        samples: float32, [DEPTH - 1, SAMPLES].
    """

    first: int
    signs: NDArray[np.float32]
    places: NDArray[np.int64]
    sketches: NDArray[np.float32]
    samples: NDArray[np.float32]


@kernel
def encode_block(
    base: NDArray[np.uint8],
    base_code: int,
    expert: NDArray[np.uint8],
    expert_code: int,
    count: int,
    shift: int,
    scratch: NDArray[np.uint8],
    out: NDArray[np.uint8],
    ends: NDArray[np.int64],
    left: NDArray[np.float64],
    residuals: Residuals,
) -> None:
    """Write the layers of a block of the delta `expert` minus `base`.

    Args:
        base: raw elements of the base, uint8, a multiple of 8 bytes.
        base_code: their type's code.
        expert: raw elements of the expert, likewise.
        expert_code: their type's code.
        count: elements in the block.
        shift: bits of a float32 that the expert's type leaves at zero.
        scratch: uint8, [2, `most_bytes(count)`].
        out: uint8, at least `most_bytes(count)`; set.
        ends: int64, [DEPTH]; set to where each layer ends.
        left: float64, [DEPTH + 1]; set to the sum of squares of what so many layers leave of the delta, none first;
            what is infinite or NaN does not count.
        residuals: sketches and samples of the same; set.
    """
    tiles = -(-count // TILE)
    residuals.sketches[:] = np.float32(0.0)
    residuals.samples[:] = np.float32(0.0)
    residual, sampled = np.zeros((DEPTH - 1, TILE), np.float32), 0
    b, x = np.zeros((1, TILE), np.float32), np.zeros((1, TILE), np.float32)
    squares, sizes = np.zeros(-(-count // GROUP), np.float64), np.zeros(-(-count // GROUP), np.float64)
    peaks = np.zeros(len(squares), np.uint32)
    ones = np.zeros(len(peaks), np.int64)
    changed = np.zeros(tiles + 1, np.int64)
    for t in range(tiles):
        n = _load_tiles(base, base_code, expert, expert_code, t, count, b, x)
        changed[t + 1] = changed[t] + survey(b, x, n, t * TILE, squares, sizes, peaks, ones)
    groups = len(squares)
    even = DRAFT_HEAD + -(-groups // 2)
    paths = np.array([even + -(-groups // 8), 0])
    ends[0] = paths[1] = paths[0] + groups * LANES
    at = ends[1] = paths[1] + groups * LANES
    out[: at + SLACK] = 0
    mean_top = out[:DRAFT_HEAD].view(np.int16)
    mean_top[0] = write_means(squares, sizes, count, out[DRAFT_HEAD:], out[even:])
    head = at
    sparse = (count - changed[tiles]) * SPARSE_FROM > count
    out[at : at + HEAD + SLACK] = 0
    out[at] = IS_SPARSE if sparse else 0
    unchanged = 0 if sparse else min(255, (256 * (count - changed[tiles]) + count // 2) // max(1, count))
    out[at + 1] = unchanged
    at += HEAD
    if sparse:
        for t in range(tiles + 1):
            for byte in range(4):
                out[at] = changed[t] >> (8 * byte) & 0xFF
                at += 1
    mask_bit = 8 * at
    if sparse:
        out[at : at + -(-count // 8) + SLACK] = 0
        at += -(-count // 8)
    highest = _ZERO
    for peak in peaks:
        highest = max(highest, peak if peak < INFINITE else _ZERO)
    top = top_of(highest)
    out[head + 2], out[head + 3] = top & 0xFF, top >> 8 & 0xFF
    ranges = at
    at += groups
    plane = -(-(changed[tiles] if sparse else count) // 8)
    # Of signs, and of layers 3 (two) and 4.
    planes = np.empty(4, np.int64)
    for i in range(4):
        planes[i] = 8 * at
        out[at : at + plane + SLACK] = 0
        at += plane
        if i >= 2:
            ends[i] = at
    left[:] = 0.0
    lengths = at
    at += 2 * tiles
    # Layer 5 is written where it belongs; where those after it begin is known when it is complete.
    filled = np.zeros(3, np.int64)
    filled[0] = at
    active = 0
    relative, steps = np.zeros((1, TILE), np.float32), np.zeros(TILE, np.uint16)
    for t in range(tiles):
        n = _load_tiles(base, base_code, expert, expert_code, t, count, b, x)
        out[filled[0] : filled[0] + n // 4 + SLACK] = 0
        for layer in range(2):
            start = 2 * tiles + filled[layer + 1]
            scratch[layer, start : start + 4 * n + SLACK] = 0
        bit = np.array([8 * filled[0], 8 * (2 * tiles + filled[1]), 8 * (2 * tiles + filled[2])])
        first = t * (TILE // GROUP)
        _write_draft(b, x, n, out, even, mean_top[0], first, paths, relative, steps, left, residual)
        for g in range(0, n, GROUP):
            place = first + g // GROUP
            code = choose_range(peaks[place], ones[place] > 0, top, b, x, g, min(n, g + GROUP), shift)
            out[ranges + place] = code
            active = _write_group(
                b, x, g, n, code, top, unchanged, shift, sparse, out, mask_bit + t * TILE, planes, active, scratch, bit,
                left, residual,
            )  # fmt: skip
        residual[:, -(-n // LANES) * LANES : -(-n // BUCKETS) * BUCKETS] = np.float32(0.0)
        for layer in range(DEPTH - 1):
            add_to_sketch(residual[layer], n, residuals.first // TILE + t, residuals.signs, residuals.sketches[layer])
        while sampled < len(residuals.places) and residuals.places[sampled] < t * TILE + n:
            residuals.samples[:, sampled] = residual[:, residuals.places[sampled] - t * TILE]
            sampled += 1
        for layer in range(3):
            start = filled[layer] + (2 * tiles if layer else 0)
            nbytes = -(-bit[layer] // 8) - start
            filled[layer] += nbytes
            table = lengths + 2 * t
            if layer:
                scratch[layer - 1, 2 * t], scratch[layer - 1, 2 * t + 1] = nbytes & 0xFF, nbytes >> 8
            else:
                out[table], out[table + 1] = nbytes & 0xFF, nbytes >> 8
    at = ends[4] = filled[0]
    for layer in range(2):
        nbytes = 2 * tiles + filled[layer + 1]
        out[at : at + nbytes] = scratch[layer, :nbytes]
        at += nbytes
        ends[layer + 5] = at


@inner
def _load_tiles(
    base: NDArray[np.uint8],
    base_code: int,
    expert: NDArray[np.uint8],
    expert_code: int,
    tile: int,
    count: int,
    b: NDArray[np.float32],
    x: NDArray[np.float32],
) -> int:
    """Bring a tile of both models to `b` and `x` (float32, [1, TILE]), with zeros up to a whole vector."""
    start = tile * TILE
    n = min(TILE, count - start)
    decode(base, base_code, start, n, b[0])
    decode(expert, expert_code, start, n, x[0])
    end = -(-n // LANES) * LANES
    b[0, n:end] = np.float32(0.0)
    x[0, n:end] = np.float32(0.0)
    return n


@inner
def _write_draft(
    b: NDArray[np.float32],
    x: NDArray[np.float32],
    n: int,
    out: NDArray[np.uint8],
    even: int,
    top: int,
    first: int,
    paths: NDArray[np.int64],
    relative: NDArray[np.float32],
    steps: NDArray[np.uint16],
    left: NDArray[np.float64],
    residual: NDArray[np.float32],
) -> None:
    """Write the drafts of a tile of `n` elements, and what they leave.

    Args:
        b: float32, [1, TILE]; of the base, as in `encode_block`, as are all that are not named here.
        x: float32, [1, TILE]; of the expert.
        n: see there.
        out: holds the means and, from byte `even` on, which groups are even.
        even: see there.
        top: of the means.
        first: the tile's first group in the block.
        paths: int64, [DRAFTS]; where those of the block begin.
        relative: float32, [1, TILE]; scratch.
        steps: uint16, [TILE]; scratch.
        left: of drafts; added to.
        residual: of drafts; set.
    """
    groups, unit, nothing = -(-n // GROUP), unit_of(top), splat(np.float32(0.0))
    relative[0, n:] = np.float32(0.0)
    for g in range(groups):
        mean = splat(mean_at(out, DRAFT_HEAD, first + g) * unit)
        for i in range(g * GROUP, min((g + 1) * GROUP, n), LANES):
            delta = load(x, 0, i) - load(b, 0, i)
            real = ((bits(delta) & splat(MAGNITUDE)) < splat(INFINITE)) & (mean > nothing)
            store(relative[0], i, select(real, delta / mean, nothing))
    for layer in range(DRAFTS):
        codes, place = CODES[2 * layer : 2 * layer + 2], paths[layer] + first * LANES
        find_path(relative, groups, codes, out[even:], first, out, place, steps)
        for g in range(groups):
            mean = splat(mean_at(out, DRAFT_HEAD, first + g) * unit)
            length = splat(LENGTHS[0] if layer == 0 else LENGTHS[1])
            missed = nothing
            for i in range(g * GROUP, min((g + 1) * GROUP, n), LANES):
                delta = load(x, 0, i) - load(b, 0, i)
                real = unpacked(np.uint32(lanes_below(n - i))) & ((bits(delta) & splat(MAGNITUDE)) < splat(INFINITE))
                # What is told, relative to the mean, is what there was to tell but for what is left of it.
                told = select(mean > nothing, delta - load(relative, 0, i) * mean, nothing)
                rest = select(real, delta - told * length, nothing)
                store(residual[layer], i, rest)
                missed = missed + _square(rest)
            left[1 + layer] += sum_in_order(widen(missed))


@inner
def _write_group(
    b: NDArray[np.float32],
    x: NDArray[np.float32],
    start: int,
    n: int,
    code: int,
    top: int,
    unchanged: int,
    shift: int,
    sparse: bool,
    out: NDArray[np.uint8],
    mask_bit: int,
    planes: NDArray[np.int64],
    active: int,
    scratch: NDArray[np.uint8],
    bit: NDArray[np.int64],
    left: NDArray[np.float64],
    residual: NDArray[np.float32],
) -> int:
    """Write the exact layers of one group; returns how many elements of the block have bits so far."""
    edges, below = scaled(EDGES, max(1, code), top), scaled(TOLD, max(1, code), top)
    above = centres_above(max(1, code), top, unchanged)
    left0 = left3 = left4 = left5 = left6 = splat(np.float32(0.0))
    zeros, nothing, shifts = splat(_ZERO), splat(np.float32(0.0)), splat(np.uint32(shift))
    for i in range(start, min(start + GROUP, n), LANES):
        vb, vx = load(b, 0, i), load(x, 0, i)
        where = np.uint32(np.uint32(lanes_below(n - i)) & _ALL16)
        if sparse:
            where = np.uint32(packed(bits(vb) != bits(vx)) & where)
            put(out, mask_bit + i, np.uint64(where), np.uint64(_ALL16))
        changed = unpacked(where)
        place = places_of(vx, shifts)
        negative = place < places_of(vb, shifts)
        _put_lanes(out, planes[0] + active, negative, where, sparse)
        delta = vx - vb
        finite = (bits(delta) & splat(MAGNITUDE)) < splat(INFINITE)
        real = changed & finite
        whole = select(real, delta, nothing)
        own = _square(whole)
        left0 = left0 + own
        if code in (0, RAW):
            for layer in range(DRAFTS, DEPTH - 1):
                store(residual[layer], i, whole)
            left3, left4, left5, left6 = left3 + own, left4 + own, left5 + own, left6 + own
            if code == RAW:
                _write_rest(place, splat(np.uint32(32)) - shifts, changed, out, scratch, bit)
            active += count_ones(where)
            continue
        i2, i3, i4 = _cell(vb, place, negative, edges, shifts)
        cell = indices(i2, i3, i4)
        _put_lanes(out, planes[1] + active, i2, where, sparse)
        _put_lanes(out, planes[2] + active, i3, where, sparse)
        _put_lanes(out, planes[3] + active, i4, where, sparse)
        active += count_ones(where)
        rest = _miss(delta, 3, cell, below, above, negative, changed)
        store(residual[2], i, rest)
        left3 = left3 + _square(rest)
        rest = _miss(delta, 4, cell, below, above, negative, changed)
        store(residual[3], i, rest)
        left4 = left4 + _square(rest)
        first, many = cells_of(vb, negative, edges, cell, shifts)
        width = splat(np.uint32(32)) - leading_zeros(many - splat(_ONE))
        found = select(changed, place - first, zeros)
        _write_rest(found, width, changed, out, scratch, bit)
        told = number_at(first + _middle(found, many, width, splat(np.uint32(2))), shifts) - vb
        rest = select(changed, delta - told, nothing)
        store(residual[4], i, rest)
        left5 = left5 + _square(rest)
        told = number_at(first + _middle(found, many, width, splat(np.uint32(10))), shifts) - vb
        rest = select(changed, delta - told, nothing)
        store(residual[5], i, rest)
        left6 = left6 + _square(rest)
    left[0] += sum_in_order(widen(left0))
    left[3] += sum_in_order(widen(left3))
    left[4] += sum_in_order(widen(left4))
    left[5] += sum_in_order(widen(left5))
    left[6] += sum_in_order(widen(left6))
    return active


@inlined
def _put_lanes(out: NDArray[np.uint8], bit: int, lanes: Any, where: np.uint32, sparse: bool) -> None:
    """Write the bits of those lanes that have any."""
    if sparse or bit & 7 or where != _ALL16:
        put(out, bit, np.uint64(packed(lanes)), np.uint64(where))
    else:
        put_half(out, bit >> 3, packed(lanes))


@inlined
def _square(x: Any) -> Any:
    """The squares of F32: their sums over a group are far more exact than what is made of them."""
    return x * x


@inlined
def _miss(delta: Any, depth: int, cell: Any, below: Any, above: Any, negative: Any, changed: Any) -> Any:
    """What 3 or 4 layers leave of a delta."""
    told = signed(negative, estimate(below, depth, cell), estimate(above, depth, cell))
    return select(changed, delta - told, splat(np.float32(0.0)))


@inlined
def _middle(found: Any, many: Any, width: Any, known: Any) -> Any:
    """What a reader who knows the first bits of a number's place in its cell takes it for."""
    rest = select(width > known, width - known, splat(_ZERO))
    middle = ((found >> rest) << rest) + ((splat(_ONE) << rest) >> splat(_ONE))
    return minimum(middle, many - splat(_ONE))


@inlined
def _cell(vb: Any, place: Any, negative: Any, edges: Any, shift: Any) -> Any:
    """The bits of the index of the cell that holds each lane, the highest first."""
    nothing, zero = splat(np.float32(0.0)), splat(_ZERO)
    edge = lookup(edges, splat(np.uint32(4)))
    i2 = (place >= places_of(vb + select(negative, nothing - edge, edge), shift)) ^ negative
    at = select(i2, splat(np.uint32(4)), zero)
    edge = lookup(edges, at | splat(np.uint32(2)))
    i3 = (place >= places_of(vb + select(negative, nothing - edge, edge), shift)) ^ negative
    edge = lookup(edges, at | select(i3, splat(np.uint32(2)), zero) | splat(_ONE))
    i4 = (place >= places_of(vb + select(negative, nothing - edge, edge), shift)) ^ negative
    return i2, i3, i4


@inlined
def _write_rest(
    found: Any, width: Any, changed: Any, out: NDArray[np.uint8], scratch: NDArray[np.uint8], bit: NDArray[np.int64]
) -> None:
    """Write a number's place in its cell: its first two bits, up to eight more and all others to a layer each."""
    zero, one, two = splat(_ZERO), splat(_ONE), splat(np.uint32(2))
    width = select(changed, width, zero)
    pairs = interleaved(np.uint64(packed(width > zero)), np.uint64(packed(width > one)))
    left = select(width > two, width - two, zero)
    first = found >> left
    put(out, bit[0], _pairs_of(first), pairs)
    bit[0] += count_ones(pairs)
    more = minimum(left, splat(np.uint32(8)))
    left = left - more
    fields = (one << more) - one
    second = (found >> left) & fields
    for half in range(2):
        where = upper_bytes(fields) if half else lower_bytes(fields)
        put(scratch[0], bit[1], upper_bytes(second) if half else lower_bytes(second), where)
        bit[1] += count_ones(where)
    for n in range(32):
        reads = left > splat(np.uint32(n))
        wanted = packed(reads)
        if wanted == _ZERO:
            break
        own = packed(((found >> select(reads, left - splat(np.uint32(n)) - one, zero)) & one) == one)
        put(scratch[1], bit[2], np.uint64(own), np.uint64(wanted))
        bit[2] += count_ones(wanted)


@inlined
def _pairs_of(x: Any) -> np.uint64:
    """The two lowest bits of each lane, side by side."""
    one = splat(_ONE)
    low, high = packed((x & one) == one), packed(((x >> one) & one) == one)
    return interleaved(np.uint64(low), np.uint64(high))
