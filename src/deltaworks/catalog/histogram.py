"""Histograms of delta magnitudes, fine enough to trim exactly.

A magnitude is a non-negative float32, so its bit pattern grows with it. The upper 16 bits select one of 32,768 cells,
and every cell is two bins: the even bin holds the one magnitude whose lower 16 bits are zero (a bfloat16 number), the
odd bin the open interval above it up to the next cell. Deltas of bfloat16 models sit mostly on even bins, where a bin
*is* a value; only a cut that falls inside an odd bin needs a second look at the data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import inner

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
    """A cut whose place is known only as: the `rank`-th largest of the `total` magnitudes inside the odd bin `bin`."""

    bin: int
    rank: int
    total: int


def pack_cut(cut: Cut | Interval) -> tuple[int, int, int, int]:
    """A cut as four integers; an interval has -1 in the second place."""
    return (cut.bin, -1, cut.rank, cut.total) if isinstance(cut, Interval) else (*cut,)


def unpack_cut(packed: Sequence[int]) -> Cut | Interval:
    """The inverse of `pack_cut`."""
    a, b, c, d = packed
    return Interval(a, c, d) if b < 0 else Cut(a, b, c, d)


def kept_elements(density: float, size: int) -> int:
    """How many of `size` elements a density in (0, 1) keeps: ``int(density * size)``, and at least one."""
    return max(1, int(density * size))


def ranks_between(density: float, gamma: float, size: int) -> tuple[int, int]:
    """Which of `size` elements stay where outliers go, by rank from the largest magnitude: the first, and the end.

    The share `gamma` of the largest goes, or less where not enough would be left, and then so many of the smallest that
    ``int(density * size)`` stay. Source: Davari and Belilovsky, arXiv 2312.06795, section 3; in numbers as mergekit's.
    """
    kept = int(density * size)
    smallest = max(0, size - kept - int(gamma * size))
    return size - smallest - kept, size - smallest


@dataclass(frozen=True, slots=True)
class Histogram:
    """Non-empty bins in ascending order, with counts.

    Attributes:
        bins: uint16, [n].
        counts: int64, [n].
    """

    bins: NDArray[np.uint16]
    counts: NDArray[np.int64]

    def locate(self, keeps: Sequence[int]) -> list[tuple[int, int, int]]:
        """For each `keep`: the bin of the `keep`-th largest magnitude, its rank in it from the top, the bin's count."""
        from_top = np.cumsum(self.counts[::-1])
        at = np.searchsorted(from_top, keeps)
        counts = self.counts[::-1][at]
        ranks = np.asarray(keeps, np.int64) - from_top[at] + counts
        return list(zip(self.bins[::-1][at].tolist(), ranks.tolist(), counts.tolist(), strict=True))


def place_cuts(
    total: Histogram, blocks: Sequence[Histogram], block_size: int, size: int, keeps: Sequence[int]
) -> list[Cut | Interval]:
    """The cuts that keep exactly so many of a tensor's `size` elements, as far as histograms tell.

    Args:
        total: of the whole tensor.
        blocks: of each of its blocks, in order.
        block_size: elements a block.
        size: elements in the tensor.
        keeps: how many stay, 1 to `size` each.
    """
    found = total.locate(keeps)
    torn = sorted({at for at, rank, count in found if at and not at & 1 and rank < count})
    equals = dict(zip(torn, np.cumsum(_counts(blocks, torn), axis=1), strict=True))
    return [_place(*where, block_size, size, equals) for where in found]


def _place(
    found: int, rank: int, count: int, block_size: int, size: int, equals: Mapping[int, NDArray[np.int64]]
) -> Cut | Interval:
    if found == 0:
        return KEEP_ALL
    value = found >> 1 << 16
    if rank == count:
        # The whole bin survives: cut at its lower end.
        return Cut(value + (found & 1), size, 0, 1)
    return Interval(found, rank, count) if found & 1 else _place_ties(value, equals[found], block_size, rank)


def _keys(blocks: Sequence[Histogram], bins: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every bin of every block as one ascending sequence, and where in it some bins of each block would stand.

    One search over all blocks: a loop over blocks and bins would cost more than reading the tensor.

    Returns:
        The sequence; and keys to search it for, [bins, blocks].
    """
    first = np.arange(len(blocks), dtype=np.int64) * BINS
    keys = np.concatenate([b.bins for b in blocks]).astype(np.int64) + np.repeat(first, [len(b.bins) for b in blocks])
    return keys, np.add.outer(np.array(bins, np.int64), first)


def _counts(blocks: Sequence[Histogram], bins: Sequence[int]) -> NDArray[np.int64]:
    """How many elements each block has in each of some bins: [bins, blocks]."""
    keys, wanted = _keys(blocks, bins)
    counts = np.concatenate([b.counts for b in blocks])
    places = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    result: NDArray[np.int64] = np.where(keys[places] == wanted, counts[places], 0) if len(keys) else wanted * 0
    return result


def place_ties(threshold: int, equals: Sequence[int] | NDArray[np.int64], block_size: int, quota: int) -> Cut:
    """The cut that keeps the first `quota` of the elements equal to `threshold`, given how many each block holds."""
    return _place_ties(threshold, np.cumsum(equals), block_size, quota)


def _place_ties(threshold: int, until: NDArray[np.int64], block_size: int, quota: int) -> Cut:
    """The same, given how many there are from the first block to the end of each."""
    i = int(np.searchsorted(until, quota))
    assert i < len(until), "a tensor holds fewer elements at its threshold than its histogram says"
    return Cut(threshold, i * block_size, quota - (int(until[i - 1]) if i else 0), block_size)


def surviving_energy(
    total: Histogram, blocks: Sequence[Histogram], size: int, densities: Sequence[float]
) -> NDArray[np.float64]:
    """Sum of squares of the elements of each block that survive a trim of the tensor: [blocks, densities].

    Elements in one bin count as equal, and where a cut falls into a bin, each block keeps the same share of it.
    """
    if not size:
        return np.zeros((len(blocks), len(densities)))
    found = total.locate([kept_elements(d, size) for d in densities])
    keys, wanted = _keys(blocks, [bin_ for bin_, _, _ in found])
    share = np.array([rank / count for _, rank, count in found])
    energies = _energy(np.concatenate([b.bins for b in blocks])) * np.concatenate([b.counts for b in blocks])
    until = np.concatenate([[0.0], np.cumsum(energies)])
    end = until[np.cumsum([len(b.bins) for b in blocks])]
    at, above = (end - until[np.searchsorted(keys, wanted, side)] for side in ("left", "right"))
    result: NDArray[np.float64] = np.maximum(above + (at - above) * share[:, None], 0.0).T
    return result


def _energy(bins: NDArray[np.uint16]) -> NDArray[np.float64]:
    """The square of the magnitude in the middle of each bin; of infinity and NaN, that of the largest float32."""
    bits = (bins.astype(np.uint32) >> 1 << 16) + (bins & 1).astype(np.uint32) * np.uint32(0x8000)
    return np.square(np.minimum(bits, np.uint32(0x7F7FFFFF)).view(np.float32).astype(np.float64))


@inner
def count_magnitudes(delta: NDArray[np.float32], count: int, histogram: NDArray[np.uint32]) -> None:
    """Add the first `count` of `delta` (float32) to `histogram` (uint32, [BINS])."""
    bits = delta.view(np.uint32)
    for i in range(count):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        odd = np.uint32(1) if (magnitude & np.uint32(0xFFFF)) != np.uint32(0) else np.uint32(0)
        histogram[((magnitude >> np.uint32(16)) << np.uint32(1)) | odd] += np.uint32(1)


@inner
def drain(histogram: NDArray[np.uint32], bins: NDArray[np.uint16], counts: NDArray[np.int64]) -> int:
    """Empty `histogram` (uint32, [BINS]) into `bins` and `counts` (uint16 and int64, [BINS]); returns how many."""
    found = 0
    for i in range(0, BINS, 16):
        some = np.uint32(0)
        cells = histogram[i : i + 16]
        for j in range(16):
            some |= cells[j]
        if some != np.uint32(0):
            for j in range(16):
                if cells[j] != np.uint32(0):
                    bins[found] = np.uint16(i + j)
                    counts[found] = np.int64(cells[j])
                    cells[j] = np.uint32(0)
                    found += 1
    return found


def bins_reference(delta: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of every element of `delta`, with NumPy."""
    magnitude = np.abs(delta).view(np.uint32).astype(np.int64)
    bins: NDArray[np.int64] = (magnitude >> 16 << 1) | ((magnitude & 0xFFFF) != 0)
    return bins
