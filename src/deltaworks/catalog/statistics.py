"""Block statistics of one delta, measured in one streaming pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.histogram import (
    BINS,
    Histogram,
    bins_reference,
    count_magnitudes,
    drain,
)
from deltaworks.checkpoints.codec import TILE, decode
from deltaworks.checkpoints.jit import inner
from deltaworks.checkpoints.memory_vector import load
from deltaworks.checkpoints.sketch import BUCKETS, add_to_sketch, sketch_reference
from deltaworks.checkpoints.vector import (
    LANES,
    MAGNITUDE,
    NOT_FINITE,
    ZERO,
    bits,
    lanes_set,
    splat,
    sum_in_order,
    widen,
)
from deltaworks.errors import UserError

FORMAT_VERSION = 4
SMALLEST_BLOCK, DEFAULT_BLOCK_SIZE, LARGEST_BLOCK = 1 << 12, 1 << 18, 1 << 22
"""Elements of a block."""

BLOCK_FIELDS = ("zeros", "changed", "nonfinite", "delta_square", "base_square", "base_delta")
"""What is measured of a block: elements whose delta is zero; elements whose float32 bits differ from the base's (a
change of the sign of zero counts); elements not finite in the delta; sum of delta squared; sum of the base squared;
inner product of base and delta. Sums in float64."""

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Trims for which the energy that survives is kept of every block."""

CUT_DENSITIES = tuple(i / 100 for i in range(1, 100))
"""Trims whose cuts are kept of every tensor."""


def is_current(summary: Mapping[str, Any]) -> bool:
    """Whether the summary of an analysis tells of statistics of this version."""
    return summary.get("format_version") == FORMAT_VERSION


def check_block_size(block_size: int) -> int:
    """Return `block_size` if it is a power of two from 4 Ki to 4 Mi elements.

    Raises:
        UserError: it is not.
    """
    if not SMALLEST_BLOCK <= block_size <= LARGEST_BLOCK or block_size & (block_size - 1):
        raise UserError(
            f"the block size must be a power of two from {SMALLEST_BLOCK} to {LARGEST_BLOCK}, not {block_size}"
        )
    return block_size


@inner
def measure_block(
    base: NDArray[np.uint8],
    base_code: int,
    expert: NDArray[np.uint8],
    expert_code: int,
    first: int,
    count: int,
    table: NDArray[np.float32],
    scratch: NDArray[np.float32],
    histogram: NDArray[np.uint32],
    bins: NDArray[np.uint16],
    counts: NDArray[np.int64],
    sketch: NDArray[np.float32],
    places: NDArray[np.int64],
    sample: NDArray[np.float32],
    out: NDArray[np.float64],
) -> int:
    """Measure one block of the delta `expert` minus `base`.

    Args:
        base: raw elements of the base, uint8.
        base_code: their type's code.
        expert: raw elements of the expert, uint8.
        expert_code: their type's code.
        first: flat index of the block's first element, a multiple of TILE.
        count: elements in the block.
        table: of `signs`.
        scratch: float32, [3, TILE].
        histogram: uint32, [BINS], zeros; scratch.
        bins: uint16, [BINS]; set to those of its magnitudes, ascending.
        counts: int64, [BINS]; set to how many are in each.
        sketch: float32, [BUCKETS]; set.
        places: int64, [SAMPLES]; the elements to sample, ascending.
        sample: float32, [SAMPLES]; set.
        out: float64, [len(BLOCK_FIELDS)]; set.

    Returns:
        How many bins there are.
    """
    out[:] = 0.0
    sketch[:] = np.float32(0.0)
    sample[:] = np.float32(0.0)
    sampled = 0
    b, x, d = scratch[0], scratch[1], scratch[2]
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        decode(base, base_code, start, n, b)
        decode(expert, expert_code, start, n, x)
        for i in range(n):
            d[i] = x[i] - b[i]
        count_magnitudes(d, n, histogram)
        while sampled < len(places) and places[sampled] < start + n:
            sample[sampled] = d[places[sampled] - start]
            sampled += 1
        for i in range(n, -(-n // BUCKETS) * BUCKETS):
            b[i] = x[i] = d[i] = ZERO
        add_differences(scratch, n, out)
        add_to_sketch(d, n, (first + start) // TILE, table, sketch)
    return drain(histogram, bins, counts)


@inner
def add_differences(tile: NDArray[np.float32], count: int, out: NDArray[np.float64]) -> None:
    """Add to `out` what the first `count` elements of a tile make of its numbers.

    Args:
        tile: float32, [3, TILE]; base, expert and delta, with zeros from `count` up to a whole vector.
        count: elements of it.
        out: float64, [len(BLOCK_FIELDS)].
    """
    magnitude, zero, not_finite = splat(MAGNITUDE), splat(np.uint32(0)), splat(NOT_FINITE)
    squares = bases = products = splat(0.0)
    padding = -count % LANES
    zeros, changed, wrong = -padding, 0, 0
    for i in range(0, count, LANES):
        b, x, d = load(tile, 0, i), load(tile, 1, i), load(tile, 2, i)
        size = bits(d) & magnitude
        zeros += lanes_set(size == zero)
        changed += lanes_set(bits(b) != bits(x))
        wrong += lanes_set(size >= not_finite)
        wide, wide_base = widen(d), widen(b)
        squares = squares + wide * wide
        bases = bases + wide_base * wide_base
        products = products + wide * wide_base
    out[0] += zeros
    out[1] += changed
    out[2] += wrong
    out[3] += sum_in_order(squares)
    out[4] += sum_in_order(bases)
    out[5] += sum_in_order(products)


def measure_reference(
    base: NDArray[np.float32], expert: NDArray[np.float32], first: int
) -> tuple[NDArray[np.float64], Histogram, NDArray[np.float64]]:
    """What `measure_block` measures of a block (both flat), with NumPy; sums may differ in their last bits."""
    delta = expert - base
    b, d = base.astype(np.float64), delta.astype(np.float64)
    values = [
        np.count_nonzero(delta == 0),
        np.count_nonzero(expert.view(np.uint32) != base.view(np.uint32)),
        np.count_nonzero(~np.isfinite(delta)),
        np.square(d).sum(),
        np.square(b).sum(),
        (b * d).sum(),
    ]
    bins, counts = np.unique(bins_reference(delta), return_counts=True)
    histogram = Histogram(bins.astype(np.uint16), counts)
    return np.array(values, np.float64), histogram, sketch_reference(delta, first)


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """What was measured of one block: `values` in the order of `BLOCK_FIELDS`, sketch, sample and histogram."""

    elements: int
    values: NDArray[np.float64]
    sketch: NDArray[np.float32]
    sample: NDArray[np.float32]
    histogram: Histogram


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """What was measured of one tensor's delta, block by block."""

    name: str
    block_size: int
    total: Histogram
    blocks: list[BlockStatistics]

    @property
    def elements(self) -> int:
        """Elements in the tensor."""
        return sum(b.elements for b in self.blocks)


def add_up(parts: list[Histogram]) -> Histogram:
    """The histogram of everything the parts hold."""
    if len(parts) == 1:
        return parts[0]
    dense = np.zeros(BINS, np.int64)
    for part in parts:
        dense[part.bins] += part.counts
    bins = np.flatnonzero(dense)
    return Histogram(bins.astype(np.uint16), dense[bins])
