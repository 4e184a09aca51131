"""Sketches and samples: a few numbers of a block's delta that tell how it goes together with other experts' deltas.

A sketch is for inner products, a sample (the same places for every expert) for everything that is no inner product. A
sketch is a CountSketch (Charikar, Chen and Farach-Colton, ICALP 2002) with a fixed layout: element i of a block falls
into bucket i mod 128 and is added there with a random sign that hangs on its place in the tensor alone. Two experts
share the signs, so the inner product of their sketches is an unbiased estimate of the inner product of their deltas.
"""

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.jit import inner

BUCKETS = 128
SAMPLES = 128
_PERIOD = 1 << 13


def sample_places(block: int, count: int) -> NDArray[np.int64]:
    """The elements sampled of block number `block` of a tensor, which has `count`: int64, [SAMPLES], ascending.

    One at random from each of as many equal stretches; in a block of fewer elements some come more than once.
    """
    strata = np.arange(SAMPLES, dtype=np.uint64)
    z = np.uint64(_mix(block)) + (strata + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    inside = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    places: NDArray[np.int64] = ((strata + inside) * (count / SAMPLES)).astype(np.int64)
    return places


def signs() -> NDArray[np.float32]:
    """The table that signs are taken from, of 1 and -1: float32, [_PERIOD + TILE]. Part of the file format."""
    table = np.array([-1.0 if _mix(i) >> 63 else 1.0 for i in range(_PERIOD)], np.float32)
    return np.concatenate([table, table[:TILE]])


def _mix(value: int) -> int:
    """SplitMix64 (Steele et al., OOPSLA 2014) of `value`."""
    mask = (1 << 64) - 1
    z = (value + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


@inner
def add_to_sketch(
    delta: NDArray[np.float32], count: int, tile: int, table: NDArray[np.float32], sketch: NDArray[np.float32]
) -> None:
    """Add the first `count` of `delta` (float32, [TILE]), which is tile `tile` of its tensor, to `sketch` ([BUCKETS]).

    Elements from `count` to the next multiple of BUCKETS must be zero.
    """
    z = np.uint64(tile + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    offset = int((z >> np.uint64(32)) % np.uint64(_PERIOD))
    for start in range(0, count, BUCKETS):
        values = delta[start : start + BUCKETS]
        signed = table[offset + start : offset + start + BUCKETS]
        for j in range(BUCKETS):
            sketch[j] += values[j] * signed[j]


def sketch_reference(delta: NDArray[np.float32], first: int) -> NDArray[np.float64]:
    """The sketch of a block (flat) whose first element has the flat index `first`, a multiple of TILE, with NumPy."""
    table = signs()
    result = np.zeros(BUCKETS)
    for start in range(0, len(delta), TILE):
        part = delta[start : start + TILE].astype(np.float64)
        tile = (first + start) // TILE
        z = (tile + 1) * 0x9E3779B97F4A7C15 & ((1 << 64) - 1)
        offset = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9 & ((1 << 64) - 1)) >> 32
        signed = part * table[offset % _PERIOD :][: len(part)]
        result += np.pad(signed, (0, -len(part) % BUCKETS)).reshape(-1, BUCKETS).sum(axis=0)
    return result
