"""Histograms of delta magnitudes, fine enough to trim exactly.

A magnitude is a non-negative float32, so its bit pattern grows with it. The upper 16 bits select one of 32,768 cells,
and every cell is two bins: the even bin holds the one magnitude whose lower 16 bits are zero (a bfloat16 number), the
odd bin the open interval above it up to the next cell. Deltas of bfloat16 models sit mostly on even bins, where a bin
*is* a value; only a cut that falls inside an odd bin needs a second look at the data.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import kernel

BINS = 1 << 16


class Cut(NamedTuple):
    """Which elements of one delta tensor survive a trim; everything with a larger magnitude does.

    Attributes:
        threshold: bit pattern of the float32 magnitude at the cut.
        start: flat index; elements before it with exactly that magnitude survive.
        quota: from `start` on, how many elements with exactly that magnitude survive, lowest index first. All of
            them stand in one block of the statistics.
        align: elements in that block; blocks in which the cut is applied must be multiples of it.
    """

    threshold: int
    start: int
    quota: int
    align: int


KEEP_ALL = Cut(0, 0, 0, 1)
"""Nothing is trimmed but zeros, which change nothing."""


class Interval(NamedTuple):
    """A cut whose place is known only as: the `rank`-th largest magnitude inside the odd bin `bin`."""

    bin: int
    rank: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Non-empty bins in ascending order, with counts.

    Attributes:
        bins: uint16, [n].
        counts: int64, [n].
    """

    bins: NDArray[np.uint16]
    counts: NDArray[np.int64]

    def locate(self, keep: int) -> tuple[int, int, int]:
        """The bin that holds the `keep`-th largest magnitude, its rank inside the bin from the top, the bin's count."""
        from_top = np.cumsum(self.counts[::-1])
        i = int(np.searchsorted(from_top, keep))
        count = int(self.counts[len(self.counts) - 1 - i])
        return int(self.bins[len(self.bins) - 1 - i]), keep - int(from_top[i]) + count, count

    def count_of(self, wanted: int) -> int:
        """How many elements lie in the bin `wanted`."""
        i = int(np.searchsorted(self.bins, wanted))
        return int(self.counts[i]) if i < len(self.bins) and self.bins[i] == wanted else 0


def place_cut(total: Histogram, blocks: list[Histogram], block_size: int, size: int, keep: int) -> Cut | Interval:
    """The cut that keeps exactly `keep` of a tensor's `size` elements, as far as histograms tell.

    Args:
        total: of the whole tensor.
        blocks: of each of its blocks, in order.
        block_size: elements a block.
        size: elements in the tensor.
        keep: how many stay, 1 to `size`.
    """
    found, rank, count = total.locate(keep)
    if found == 0:
        return KEEP_ALL
    value = found >> 1 << 16
    if rank == count:
        # The whole bin survives: cut at its lower end.
        return Cut(value + (found & 1), size, 0, 1)
    if found & 1:
        return Interval(found, rank)
    return place_ties(value, [b.count_of(found) for b in blocks], block_size, rank)


def place_ties(threshold: int, equals: list[int], block_size: int, quota: int) -> Cut:
    """The cut that keeps the first `quota` of the elements equal to `threshold`, given how many each block holds."""
    for i, count in enumerate(equals):
        if quota <= count:
            return Cut(threshold, i * block_size, quota, block_size)
        quota -= count
    raise AssertionError("a tensor holds fewer elements at its threshold than its histogram says")


@kernel
def count_magnitudes(delta: NDArray[np.float32], count: int, histogram: NDArray[np.uint32]) -> None:
    """Add the first `count` of `delta` (float32) to `histogram` (uint32, [BINS])."""
    bits = delta.view(np.uint32)
    for i in range(count):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        odd = np.uint32(1) if (magnitude & np.uint32(0xFFFF)) != np.uint32(0) else np.uint32(0)
        histogram[((magnitude >> np.uint32(16)) << np.uint32(1)) | odd] += np.uint32(1)


def bins_reference(delta: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of every element of `delta`, with NumPy."""
    magnitude = np.abs(delta).view(np.uint32).astype(np.int64)
    bins: NDArray[np.int64] = (magnitude >> 16 << 1) | ((magnitude & 0xFFFF) != 0)
    return bins
