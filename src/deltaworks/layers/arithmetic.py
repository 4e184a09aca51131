"""What encoder and decoder compute alike, bit by bit, inside compiled kernels: numbers, cells and what those tell."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import inlined
from deltaworks.checkpoints.memory_vector import load
from deltaworks.checkpoints.vector import bits, floats, lookup, power_of_two, select, splat
from deltaworks.layers.bitstream import whole_bits
from deltaworks.layers.cells import FRACTIONS, MEANS, OCTAVES, SHARES, STEPS, TOLD, WAYS

_SIGN = np.uint32(0x80000000)
_ZERO, _ONE, _ALL = np.uint32(0), np.uint32(1), np.uint32(0xFFFFFFFF)


@inlined
def places_of(value: Any, shift: Any) -> Any:
    """The rank of the least number that is no less than `value` (F32) among those whose last `shift` bits are zero."""
    b = bits(value)
    ones = (splat(_ONE) << shift) - splat(_ONE)
    negative = splat(_ZERO) - (b >> splat(np.uint32(31)))
    return ((b ^ (negative | splat(_SIGN))) + (ones & (negative ^ splat(_ALL)))) >> shift


@inlined
def places_before(value: Any, shift: Any) -> Any:
    """What `places_of` says, less one."""
    b = bits(value)
    ones = (splat(_ONE) << shift) - splat(_ONE)
    negative = splat(_ZERO) - (b >> splat(np.uint32(31)))
    return ((b ^ (negative | splat(_SIGN))) + ((ones & negative) ^ splat(_ALL))) >> shift


@inlined
def number_at(place: Any, shift: Any) -> Any:
    """The number (F32) of a rank."""
    upper = place << shift
    positive = splat(_ZERO) - (upper >> splat(np.uint32(31)))
    return floats((upper ^ (splat(_SIGN) | (positive ^ splat(_ALL)))) & (splat(_ALL) << shift))


@inlined
def indices(i2: Any, i3: Any, i4: Any) -> Any:
    """The cells (U32) that the bits of layers 3 and 4 (MASK) name."""
    zero = splat(_ZERO)
    return select(i2, splat(np.uint32(4)), zero) | select(i3, splat(np.uint32(2)), zero) | select(i4, splat(_ONE), zero)


@inlined
def estimate(centres: Any, depth: int, cell: Any) -> Any:
    """The magnitude that 3 or 4 layers tell of the cell (U32) of each lane, from the scaled row of TOLD (F32)."""
    return lookup(centres, (cell >> splat(np.uint32(4 - depth))) + splat(np.uint32((1 << (depth - 1)) - 4)))


@inlined
def scaled(table: NDArray[np.float32], code: int, top: int) -> Any:
    """The row of EDGES or TOLD (F32) for the range of a code."""
    return load(table, (code - 1) % WAYS, 0) * splat(np.float32(power_of_two(top + (code - 1) // WAYS - OCTAVES)))


@inlined
def centres_above(code: int, top: int, unchanged: int) -> Any:
    """The row of TOLD (F32) for positive deltas, the first cells of which hold the unchanged elements as well.

    Args:
        code: of the range.
        top: of the ranges.
        unchanged: 256ths of the elements.
    """
    return scaled(TOLD, code, top) * factors_above((code - 1) % WAYS, unchanged)


@inlined
def factors_above(way: int, unchanged: int) -> Any:
    """Of the row of TOLD (F32) for a way, what is left where unchanged elements count; see `centres_above`."""
    share = np.float32(unchanged) / np.float32(256.0)
    changed = load(SHARES, way, 0) * splat((np.float32(1.0) - share) * np.float32(0.5))
    return changed / (splat(share) + changed)


@inlined
def unit_of(top: int) -> np.float32:
    """The largest mean of a block, `top` steps of an octave."""
    return np.float32(power_of_two(top // STEPS) * FRACTIONS[top % STEPS])


@inlined
def mean_at(codes: NDArray[np.uint8], first: int, group: int) -> np.float32:
    """The mean of a group, relative to the block's largest; there is half a byte for each from byte `first` on."""
    pair = whole_bits(codes, 8 * (first + (group >> 1)))
    return MEANS[pair >> np.uint64(4 * (group & 1)) & np.uint64(15)]  # type: ignore[no-any-return]


@inlined
def signed(negative: Any, below: Any, above: Any) -> Any:
    """`above`, or where `negative` is set, the opposite of `below`."""
    return select(negative, splat(np.float32(0.0)) - below, above)


@inlined
def cells_of(base: Any, negative: Any, edges: Any, cell: Any, shift: Any) -> Any:
    """The ranks of the first number of a cell of the delta, and how many there are (one at least): U32 each.

    Args:
        base: F32.
        negative: MASK; whether the delta is.
        edges: F32; the scaled row of EDGES.
        cell: U32.
        shift: U32; of the expert's element type.
    """
    zero = splat(np.float32(0.0))
    lower, upper = lookup(edges, cell), lookup(edges, cell + splat(_ONE))
    first = places_of(base + select(negative, zero - upper, lower), shift)
    end = places_of(base + select(negative, zero - lower, upper), shift)
    return first, select(end > first, end - first, splat(_ONE))
