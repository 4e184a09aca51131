"""What a block is like before it is written: what changed, how far, and the ranges that hold its groups."""

import math

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import inner, kernel
from deltaworks.checkpoints.memory_vector import load
from deltaworks.checkpoints.vector import (
    LANES,
    MAGNITUDE,
    bits,
    floats,
    lanes_set,
    largest,
    maximum,
    packed,
    select,
    splat,
    sum_in_order,
    widen,
)
from deltaworks.layers.arithmetic import cells_of, places_of, scaled
from deltaworks.layers.cells import EDGES, GROUP, HIGHEST, OCTAVES, RANGES, RAW, STEPS, WAYS
from deltaworks.layers.trellis import EVEN_FROM

INFINITE = np.uint32(0x7F800000)
"""Bits of the least float32 magnitude that is not finite."""

_ZERO, _ALL16 = np.uint32(0), np.uint32(0xFFFF)
_BETWEEN = 2.0 ** ((np.arange(STEPS) + 0.5) / STEPS)
"""Where the next step is nearer, from one to two."""
_LEAST_TOP, _LARGEST_TOP, _NO_STEP = -STEPS * 126, STEPS * 128 - 1, -(1 << 20)
_WHOLE = np.zeros_like(EDGES)
_WHOLE[:, 1] = EDGES[:, 8]


@kernel
def survey(
    b: NDArray[np.float32],
    x: NDArray[np.float32],
    n: int,
    start: int,
    squares: NDArray[np.float64],
    sizes: NDArray[np.float64],
    peaks: NDArray[np.uint32],
    ones: NDArray[np.int64],
) -> int:
    """Look at a tile of `n` elements that begins at an element of its block.

    Args:
        b: float32, [1, TILE]; of the base.
        x: float32, [1, TILE]; of the expert.
        n: elements in the tile.
        start: the first's place in the block.
        squares: float64; set to the sum of squares of what is finite in every GROUP.
        sizes: float64; set to the sum of its magnitudes.
        peaks: uint32; set to the bits of the largest magnitude of every GROUP.
        ones: int64; set to how many elements of the group changed.

    Returns:
        How many elements changed.
    """
    changed, magnitude = 0, splat(MAGNITUDE)
    for g in range(0, n, GROUP):
        energy, total, peak, own = splat(0.0), splat(0.0), splat(_ZERO), 0
        for i in range(g, min(g + GROUP, n), LANES):
            vb, vx = load(b, 0, i), load(x, 0, i)
            size = bits(vx - vb) & magnitude
            own += lanes_set(bits(vb) != bits(vx))
            peak = maximum(peak, size)
            wide = widen(select(size < splat(INFINITE), floats(size), splat(np.float32(0.0))))
            energy, total = energy + wide * wide, total + wide
        place = (start + g) // GROUP
        peaks[place], ones[place], squares[place] = largest(peak), own, sum_in_order(energy)
        sizes[place] = sum_in_order(total)
        changed += own
    return changed


@inner
def top_of(highest: np.uint32) -> int:
    """The least power of two, as exponent, that is above the float32 with these bits."""
    return max(-126, (int(highest) >> 23) - 126)


@kernel
def write_means(
    squares: NDArray[np.float64],
    sizes: NDArray[np.float64],
    count: int,
    means: NDArray[np.uint8],
    even: NDArray[np.uint8],
) -> int:
    """Turn sums of squares into quadratic means, and write their codes and which groups are even; returns their top.

    Args:
        squares: float64; of every group.
        sizes: float64; sums of magnitudes of every group.
        count: elements in the block.
        means: uint8, zeros; set to half a byte a group.
        even: uint8, zeros; set to a bit a group.
    """
    steps = np.empty(len(squares), np.int64)
    top = _LEAST_TOP
    for g in range(len(steps)):
        many = min(GROUP, count - g * GROUP)
        steps[g] = _nearest_step(math.sqrt(squares[g] / many)) if squares[g] > 0 else _NO_STEP
        top = max(top, steps[g])
        if sizes[g] ** 2 > EVEN_FROM * many * squares[g]:
            even[g >> 3] |= 1 << (g & 7)
    top = min(top, _LARGEST_TOP)
    for g in range(len(steps)):
        below = top - steps[g]
        code = max(1, HIGHEST - max(0, below)) if below <= HIGHEST + 1 else 0
        means[g >> 1] |= code << (4 * (g & 1))
    return top


@inner
def _nearest_step(mean: float) -> int:
    """The exponent of the power of two, in steps of an octave, that is next to a positive number by ratio."""
    fraction, octave = math.frexp(mean)
    return STEPS * (octave - 1) + int(np.searchsorted(_BETWEEN, 2.0 * fraction))


@kernel
def choose_range(
    peak: np.uint32,
    differs: bool,
    top: int,
    b: NDArray[np.float32],
    x: NDArray[np.float32],
    start: int,
    end: int,
    shift: int,
) -> int:
    """The code of the smallest range that holds a group; RAW where none does."""
    if not differs:
        return 0
    if peak >= INFINITE:
        return RAW
    pattern = np.empty(1, np.uint32)
    pattern[0] = peak
    relative = np.float32(math.ldexp(float(pattern.view(np.float32)[0]), -top))
    code = max(1, int(np.searchsorted(RANGES, relative)))
    for candidate in range(code, min(code + 2, RAW)):
        if candidate <= WAYS * OCTAVES and _holds(candidate, top, b, x, start, end, shift):
            return candidate
    return RAW


@kernel
def _holds(
    code: int, top: int, b: NDArray[np.float32], x: NDArray[np.float32], start: int, end: int, shift: int
) -> bool:
    """Whether every number of a group lies in the range, so that its cell gives it back."""
    # A single cell, as wide as the whole range.
    edges = scaled(_WHOLE, code, top)
    shifts, zeros = splat(np.uint32(shift)), splat(_ZERO)
    for i in range(start, end, LANES):
        vb, vx = load(b, 0, i), load(x, 0, i)
        place, own = places_of(vx, shifts), places_of(vb, shifts)
        negative = place < own
        first, many = cells_of(vb, negative, edges, zeros, shifts)
        inside = (place >= first) & (place < first + many)
        if packed(inside | (bits(vb) == bits(vx))) != _ALL16:
            return False
    return True
