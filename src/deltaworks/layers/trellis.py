"""The trellis code of drafts: a bit an element, each of which counts for four elements, inside compiled kernels.

What an element is told to be hangs on its own bit and on those of the three elements before it that stand in the same
lane of a vector: four bits name one of sixteen values. An encoder that looks for the best path through all of them
(Viterbi, IEEE Transactions on Information Theory 1967) leaves 0.31 of the squares of a normal delta, where a sign and
one size leave 0.36 (Max, IRE Transactions on Information Theory 1960), and a second bit that codes what the first
leaves, 0.10. Nothing is decoded in turn: every value is looked up by itself.

Source: trellis-coded quantisation (Marcellin and Fischer, IEEE Transactions on Communications 1990), with a shift
register for a trellis (Tseng et al., "QTIP", NeurIPS 2024, section 3).

A tile has one path a lane, which begins with zeros; the bits of GROUP elements are sixteen bytes, one a lane, the first
element's bit the lowest.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import inlined, inner
from deltaworks.checkpoints.memory_vector import load, load_at, store
from deltaworks.checkpoints.vector import LANES, bits, lookup, lower_bytes, select, splat, upper_bytes
from deltaworks.layers.bitstream import put
from deltaworks.layers.cells import GROUP

# fmt: off
CODES: Final = np.array(
    [
        (
            -0.706, 0.761, 0.407, -1.051, 0.982, -0.533, 1.729, 0.137,
            0.709, -0.731, -1.213, 0.491, -0.474, 0.891, -0.008, -1.523,
        ),
        (
            0.92, -0.925, -0.936, -0.906, -0.93, -0.938, 0.915, 0.929,
            -0.941, 0.925, 0.94, 0.937, 0.939, 0.923, -0.927, -0.922,
        ),
        (
            0.639, -0.177, 0.191, -0.849, -0.38, 0.386, 0.386, -0.337,
            -0.3, 0.855, -0.798, 0.178, 0.357, -0.343, -0.332, 0.476,
        ),
        (
            -0.395, 0.211, -0.138, 0.33, 0.288, -0.19, 0.119, -0.547,
            0.206, -0.279, 0.576, -0.176, -0.142, 0.494, -0.46, 0.133,
        ),
    ],
    np.float32,
)
# fmt: on
"""What four bits, the element's own the highest, tell of an element whose group has a quadratic mean of one: by the
first layer in groups that are normally distributed and in even ones, and what the second adds to that. float32,
[4, 16]; see ``benchmarks/make_trellis.py``."""

EVEN_FROM: Final = 0.74
"""A group is even whose mean magnitude, squared, is so much of its mean square; it is 0.64 where all is normal."""

LENGTHS: Final = (np.float32(1.22), np.float32(1.06))
"""By how much drafts of one layer and of two are longer than what is nearest to the delta. Models depend on how far a
draft goes along the delta more than on what it leaves across."""

STATES: Final = 8
_STEPS = GROUP // LANES
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_FAR = np.float32(1e30)


@inner
def find_path(
    values: NDArray[np.float32],
    groups: int,
    codes: NDArray[np.float32],
    even: NDArray[np.uint8],
    first: int,
    out: NDArray[np.uint8],
    place: int,
    steps: NDArray[np.uint16],
) -> None:
    """Write the bits of the path that is nearest to the values of a tile, and take what they tell from these.

    Args:
        values: float32, [1, TILE]; relative to the quadratic means of their groups. What is left of them is set.
        groups: how many there are.
        codes: float32, [2, 16]; the rows of CODES of this layer.
        even: uint8; a bit for each group of the block, that of the tile's first is `first`.
        first: see there.
        out: uint8, zeros from `place` on; the bits are set.
        place: of their first byte.
        steps: uint16, [TILE]; scratch.
    """
    table = steps.reshape((1, len(steps)))
    far, zero, one = splat(_FAR), splat(np.uint32(0)), splat(np.uint32(1))
    a, b, c, d, e, f, g, h = splat(np.float32(0.0)), far, far, far, far, far, far, far
    for group in range(groups):
        row = codes[_kind(even, first + group)]
        for i in range(group * GROUP, (group + 1) * GROUP, LANES):
            v = load(values, 0, i)
            na, da = _nearer(a, b, v, row, 0)
            nb, db = _nearer(c, d, v, row, 1)
            nc, dc = _nearer(e, f, v, row, 2)
            nd, dd = _nearer(g, h, v, row, 3)
            ne, de = _nearer(a, b, v, row, 4)
            nf, df = _nearer(c, d, v, row, 5)
            ng, dg = _nearer(e, f, v, row, 6)
            nh, dh = _nearer(g, h, v, row, 7)
            a, b, c, d, e, f, g, h = na, nb, nc, nd, ne, nf, ng, nh
            store(steps, i, (da | db) | (dc | dd) | ((de | df) | (dg | dh)))
    best, state = a, zero
    best, state = _least(best, state, b, 1)
    best, state = _least(best, state, c, 2)
    best, state = _least(best, state, d, 3)
    best, state = _least(best, state, e, 4)
    best, state = _least(best, state, f, 5)
    best, state = _least(best, state, g, 6)
    best, state = _least(best, state, h, 7)
    for group in range(groups - 1, -1, -1):
        told, word = load(codes, _kind(even, first + group), 0), zero
        for step in range(_STEPS - 1, -1, -1):
            i = group * GROUP + step * LANES
            taken = (bits(load(table, 0, i)) >> splat(np.uint32(16))) >> state
            word = word | ((state >> splat(np.uint32(2))) << splat(np.uint32(step)))
            window = (state << one) | (taken & one)
            store(values[0], i, load(values, 0, i) - lookup(told, window))
            state = window & splat(np.uint32(STATES - 1))
        at = 8 * (place + group * LANES)
        put(out, at, lower_bytes(word), _ALL)
        put(out, at + 64, upper_bytes(word), _ALL)


@inlined
def _kind(even: NDArray[np.uint8], group: int) -> int:
    return int(even[group >> 3]) >> (group & 7) & 1


@inlined
def _nearer(x: Any, y: Any, value: Any, row: NDArray[np.float32], state: int) -> Any:
    """How far the better way to a state is, from the two before it, and in the state's bit which of them it is."""
    first, second = value - splat(row[2 * state]), value - splat(row[2 * state + 1])
    x, y = x + first * first, y + second * second
    taken = y < x
    return select(taken, y, x), select(taken, splat(np.uint32(1 << state)), splat(np.uint32(0)))


@inlined
def _least(best: Any, state: Any, distance: Any, number: int) -> Any:
    nearer = distance < best
    return select(nearer, distance, best), select(nearer, splat(np.uint32(number)), state)


@inlined
def path_of(row: NDArray[np.uint8], byte: int, group: int) -> Any:
    """The bits of a group of a tile whose own begin at a byte, above those of the group before: U32 for `window_of`."""
    at = byte + group * LANES
    # Before the first group there are zeros, where other bytes stand.
    kept = splat(np.uint32(0xFFFFFFFF) if group > 0 else np.uint32(0))
    return load_at(row, at) << splat(np.uint32(8)) | (load_at(row, at - LANES) & kept)


@inlined
def window_of(path: Any, step: int) -> Any:
    """The four bits, beside others above, that name the values of the vector number `step` of a group."""
    return path >> splat(np.uint32(5 + step))


def windows_reference(packed: NDArray[np.uint8], groups: int) -> NDArray[np.int64]:
    """The four bits, as a number, that name the values of a tile of so many groups, with NumPy: [groups * GROUP]."""
    own = np.unpackbits(packed.reshape(groups, LANES, 1), axis=2, bitorder="little")
    path = np.pad(own.transpose(0, 2, 1).reshape(-1, LANES).astype(np.int64), ((3, 0), (0, 0)))
    windows: NDArray[np.int64] = np.sum([path[k : len(path) - 3 + k] << k for k in range(4)], axis=0).ravel()
    return windows


def told_reference(
    packed: NDArray[np.uint8], groups: int, even: NDArray[np.bool_], codes: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What the bits of a tile tell, with NumPy: float32, [groups * GROUP], for quadratic means of one.

    Args:
        packed: uint8, [groups * 16].
        groups: how many there are.
        even: which are even.
        codes: float32, [2, 16]; the rows of CODES of the layer.
    """
    told: NDArray[np.float32] = codes[np.repeat(even, GROUP).astype(np.int64), windows_reference(packed, groups)]
    return told
