"""Sums of deltas on a base: task arithmetic, TIES and DARE.

One operation covers the family, as one formula does: each delta is thinned out (by magnitude, at random, or not),
weighted, optionally kept only where its sign agrees with the majority, summed, optionally divided by the weights that
took part, scaled and added to the base.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Self

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from deltaworks.catalog.histogram import Cut, Interval, kept_elements, pack_cut, place_ties, unpack_cut
from deltaworks.checkpoints.codec import TILE, decode, encode
from deltaworks.checkpoints.jit import kernel
from deltaworks.merging.methods.operation import Block, Operation, exact_sums, lane_sum, tile_sum_reference

_KEEP, _TRIM, _DROP, _NOTHING = range(4)
SMALLEST_MASS = 1e-7


class Sparsify(StrEnum):
    """How a delta is thinned out."""

    NONE = "none"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class DeltaSum(Operation):
    """Thin out, weight, elect, sum and add deltas; the first input is the base.

    Task arithmetic (arXiv 2212.04089), TIES (2306.01708, section 3) and DARE (2311.03099, section 3). All arithmetic
    is float32 in the order of the experts; `rescale` restores each delta's L1 norm after thinning, as mergekit does.

    Attributes:
        weights: of each expert.
        densities: share of each delta that stays; matters only where `sparsify` is not none.
        sparsify: how.
        rescale: multiply each thinned delta so that its sum of magnitudes is what it was.
        consensus: keep only values whose sign is that of the weighted sum over all experts (zero counts as positive).
        normalize: divide by the sum of the weights that took part.
        scale: multiplies the merged delta (`lambda`).
        cuts: for magnitude, which elements of each delta stay; None where the density is 0 or 1.
        keys: for random, what each expert's random stream is derived from.
        scales: the factors of `rescale`, once the tensor's sums are known.
    """

    kind: ClassVar[str] = "delta"

    weights: tuple[float, ...]
    densities: tuple[float, ...]
    sparsify: Sparsify
    rescale: bool
    consensus: bool
    normalize: bool
    scale: float
    cuts: tuple[Cut | Interval | None, ...] = ()
    keys: tuple[int, ...] = ()
    scales: tuple[float, ...] | None = None

    @property
    def passes(self) -> int:
        """One for cuts that are known as intervals only, one for the sums that `rescale` needs."""
        return int(self._has_open_cuts) + int(self._needs_masses)

    @property
    def _has_open_cuts(self) -> bool:
        return any(isinstance(c, Interval) for c in self.cuts)

    @property
    def _needs_masses(self) -> bool:
        thins = self.sparsify is not Sparsify.NONE and any(0 < d < 1 for d in self.densities)
        return self.rescale and thins and self.scales is None

    @property
    def alignment(self) -> int:
        """The block in which the statistics counted the ties of a cut must not be torn apart."""
        return max((c.align for c in self.cuts if isinstance(c, Cut)), default=1)

    def measure(self, block: Block) -> list[NDArray[np.uint16]] | NDArray[np.float64]:
        """The magnitudes of a block inside each open cut; then its partial sums, [tiles, 2 * experts]."""
        if self._has_open_cuts:
            return [self._inside(block, k) for k in range(len(self.weights))]
        sums = np.empty((-(-block.count // TILE), 2 * len(self.weights)), np.float64)
        delta_masses(block.rows, block.codes, block.start, block.count, *self._thinning(block), block.scratch, sums)
        return sums

    def _inside(self, block: Block, k: int) -> NDArray[np.uint16]:
        cut = self.cuts[k]
        if not isinstance(cut, Interval):
            return np.empty(0, np.uint16)
        found = np.empty(block.count, np.uint16)
        base, expert = ((block.rows[r], int(block.codes[r])) for r in (0, k + 1))
        count = collect_lower_bits(*base, *expert, block.count, cut.bin >> 1, block.scratch, found)
        return found[:count].copy()

    def settle(self, parts: Sequence[Any], block_size: int) -> Self:
        """This operation with its open cuts placed; or with the factors that restore each delta's sum of magnitudes."""
        if self._has_open_cuts:
            cuts = [
                close_cut(c, [part[k] for part in parts], block_size) if isinstance(c, Interval) else c
                for k, c in enumerate(self.cuts)
            ]
            return replace(self, cuts=tuple(cuts))
        sums = exact_sums(parts)
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return replace(self, scales=tuple(b / a if min(a, b) >= SMALLEST_MASS else 1.0 for b, a in pairs))

    def merge(self, block: Block) -> int:
        """Fill `block.out`."""
        return merge_deltas(
            block.rows,
            block.codes,
            block.start,
            block.count,
            *self._thinning(block),
            np.array(self.scales or [1.0] * len(self.weights), np.float32),
            np.array(self.weights, np.float32),
            self.consensus,
            self.normalize,
            np.float32(self.scale),
            block.scratch,
            block.out,
            block.out_code,
        )

    def _thinning(
        self, block: Block
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint64]]:
        """Per expert, for the kernels: mode; threshold; [start, quota, end] of ties; [key, limit] of randomness."""
        n = len(self.weights)
        modes = np.full(n, _KEEP, np.int64)
        thresholds = np.zeros(n, np.uint32)
        ties = np.zeros((n, 3), np.int64)
        streams = np.zeros((n, 2), np.uint64)
        for k, density in enumerate(self.densities):
            if self.sparsify is Sparsify.NONE or density >= 1:
                continue
            if density <= 0:
                modes[k] = _NOTHING
            elif self.sparsify is Sparsify.RANDOM:
                modes[k] = _DROP
                streams[k] = self.keys[k], int(density * 2.0**64)
            else:
                cut = self.cuts[k]
                assert isinstance(cut, Cut)
                modes[k], thresholds[k], ties[k, 0] = _TRIM, cut.threshold, block.count
                if cut.start < block.start:
                    # The equals that stay all stand in earlier blocks; here the threshold itself is trimmed.
                    thresholds[k] += 1
                elif cut.start < block.start + block.count:
                    # Where the block of the last equals was omitted, none of a later block takes their place.
                    start = cut.start - block.start
                    ties[k] = start, cut.quota, start + cut.align
        return modes, thresholds, ties, streams

    def reference(self, inputs: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The same with NumPy."""
        base = inputs[0]
        deltas = [self._thin_reference(k, x - base) for k, x in enumerate(inputs[1:])]
        weights = [np.float32(w) for w in self.weights]
        deltas = [d * w for d, w in zip(deltas, weights, strict=True)]
        total = np.zeros_like(base)
        for d in deltas:
            total += d
        if self.consensus:
            elected = np.where(total >= 0, np.float32(1), np.float32(-1))
            total, divisor = np.zeros_like(base), np.zeros_like(base)
            for d, w in zip(deltas, weights, strict=True):
                agrees = np.sign(d) == elected
                total += np.where(agrees, d, np.float32(0))
                divisor += np.where(agrees, w, np.float32(0))
            divisor[divisor == 0] = 1
        else:
            everyone = sum(weights, np.float32(0))
            divisor = np.full_like(base, everyone if abs(everyone) >= np.float32(1e-8) else np.float32(1))
        if self.normalize:
            total /= divisor
        if self.scale != 1:
            total *= np.float32(self.scale)
        return base + total

    def _thin_reference(self, k: int, delta: NDArray[np.float32]) -> NDArray[np.float32]:
        density, size = self.densities[k], len(delta)
        if self.sparsify is Sparsify.NONE or density >= 1 or size == 0:
            return delta
        if density <= 0:
            return np.zeros_like(delta)
        keep = np.zeros(size, bool)
        if self.sparsify is Sparsify.RANDOM:
            keep[:] = random_reference(self.keys[k], size) < np.uint64(int(density * 2.0**64))
        else:
            keep[np.argsort(-np.abs(delta), kind="stable")[: kept_elements(density, size)]] = True
        thinned = np.where(keep, delta, np.float32(0))
        if self.rescale:
            before, after = (tile_sum_reference(np.abs(x.astype(np.float64))) for x in (delta, thinned))
            if min(before, after) >= SMALLEST_MASS:
                thinned = thinned * np.float32(before / after)
        return thinned

    def to_json(self) -> dict[str, Any]:
        """What a plan stores of it."""
        content: dict[str, Any] = {
            "weights": list(self.weights),
            "consensus": self.consensus,
            "normalize": self.normalize,
            "lambda": self.scale,
        }
        if self.sparsify is not Sparsify.NONE:
            content |= {"sparsify": self.sparsify.value, "densities": list(self.densities), "rescale": self.rescale}
        if self.sparsify is Sparsify.MAGNITUDE:
            content["cuts"] = [c and list(pack_cut(c)) for c in self.cuts]
        if self.sparsify is Sparsify.RANDOM:
            content["keys"] = [f"{k:016x}" for k in self.keys]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        weights = tuple(content["weights"])
        return cls(
            weights,
            tuple(content.get("densities", [1.0] * len(weights))),
            Sparsify(content.get("sparsify", "none")),
            content.get("rescale", False),
            content["consensus"],
            content["normalize"],
            content["lambda"],
            tuple(None if c is None else unpack_cut(c) for c in content.get("cuts", [])),
            tuple(int(k, 16) for k in content.get("keys", [])),
        )


def close_cut(cut: Interval, inside: Sequence[NDArray[np.uint16]], block_size: int) -> Cut:
    """The exact place of a cut, from the lower bits of every magnitude inside its interval, block by block.

    Where blocks were omitted, fewer magnitudes are there than the statistics counted; the cut then falls at the same
    share of those that are.
    """
    descending = np.sort(np.concatenate(inside))[::-1]
    if not len(descending):
        return Cut((cut.bin >> 1 << 16) + 1, 0, 0, 1)
    rank = cut.rank if len(descending) == cut.total else max(1, cut.rank * len(descending) // cut.total)
    lower = int(descending[rank - 1])
    above = int(np.searchsorted(-descending.astype(np.int32), -lower))
    equals = [int(np.count_nonzero(part == lower)) for part in inside]
    return place_ties((cut.bin >> 1 << 16) | lower, equals, block_size, rank - above)


def lower_bits_reference(base: NDArray[np.float32], expert: NDArray[np.float32], upper: int) -> NDArray[np.uint16]:
    """What `collect_lower_bits` collects of a block (both flat), with NumPy."""
    magnitudes = np.abs(expert - base).view(np.uint32)
    inside = (magnitudes >> 16 == upper) & (magnitudes & 0xFFFF != 0)
    lower: NDArray[np.uint16] = (magnitudes[inside] & 0xFFFF).astype(np.uint16)
    return lower


@kernel
def collect_lower_bits(
    base: NDArray[np.uint8],
    base_code: int,
    expert: NDArray[np.uint8],
    expert_code: int,
    count: int,
    upper: int,
    scratch: NDArray[np.float32],
    out: NDArray[np.uint16],
) -> int:
    """Write the lower 16 bits, not zero, of every magnitude whose upper 16 bits are `upper`; returns how many."""
    b, d = scratch[0], scratch[1]
    bits = d.view(np.uint32)
    found = 0
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        decode(base, base_code, start, n, b)
        decode(expert, expert_code, start, n, d)
        for i in range(n):
            d[i] = d[i] - b[i]
        for i in range(n):
            magnitude = bits[i] & np.uint32(0x7FFFFFFF)
            lower = magnitude & np.uint32(0xFFFF)
            if (magnitude >> np.uint32(16)) == np.uint32(upper) and lower != np.uint32(0):
                out[found] = np.uint16(lower)
                found += 1
    return found


def random_key(seed: int, expert: int, tensor: str) -> int:
    """64 bits from which the random stream of one expert's tensor is derived."""
    return int.from_bytes(blake3(f"{seed}\0{expert}\0{tensor}".encode()).digest(8), "little")


def random_reference(key: int, size: int) -> NDArray[np.uint64]:
    """Elements 0 to `size` of the random stream `key`, with NumPy."""
    return random_stream(key, np.arange(size))


def random_stream(key: int, places: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Some elements of the random stream `key`, with NumPy: SplitMix64 (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = np.uint64(key) + (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@kernel
def _thin(
    d: NDArray[np.float32],
    n: int,
    start: int,
    first: int,
    mode: int,
    threshold: int,
    tie_start: int,
    tie_quota: int,
    tie_end: int,
    key: int,
    limit: int,
) -> int:
    """Thin out a tile of a delta in place.

    `d` holds the `n` elements from `start` in the block whose first element has the flat index `first`; the rest is
    as `DeltaSum._thinning` says. Returns the tie quota left for the tiles that follow.
    """
    bits = d.view(np.uint32)
    if mode == _TRIM:
        for i in range(n):
            d[i] = d[i] if (bits[i] & np.uint32(0x7FFFFFFF)) >= np.uint32(threshold) else np.float32(0.0)
        if start + n > tie_start:
            for i in range(max(0, tie_start - start), n):
                if (bits[i] & np.uint32(0x7FFFFFFF)) == np.uint32(threshold):
                    if tie_quota > 0 and start + i < tie_end:
                        tie_quota -= 1
                    else:
                        d[i] = np.float32(0.0)
    elif mode == _DROP:
        for i in range(n):
            z = np.uint64(key) + np.uint64(first + start + i + 1) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
            d[i] = d[i] if z < np.uint64(limit) else np.float32(0.0)
    elif mode == _NOTHING:
        d[:n] = np.float32(0.0)
    return tie_quota


@kernel
def delta_masses(
    rows: NDArray[np.uint8],
    codes: NDArray[np.int64],
    first: int,
    count: int,
    modes: NDArray[np.int64],
    thresholds: NDArray[np.uint32],
    ties: NDArray[np.int64],
    streams: NDArray[np.uint64],
    scratch: NDArray[np.float32],
    sums: NDArray[np.float64],
) -> None:
    """Per tile and expert: the sum of a delta's magnitudes, before and after thinning."""
    magnitudes = np.empty(TILE, np.float64)
    quotas = ties[:, 1].copy()
    b, d = scratch[0], scratch[1]
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        decode(rows[0], codes[0], start, n, b)
        for k in range(len(modes)):
            decode(rows[k + 1], codes[k + 1], start, n, d)
            for i in range(n):
                d[i] = d[i] - b[i]
                magnitudes[i] = abs(np.float64(d[i]))
            sums[start // TILE, 2 * k] = lane_sum(magnitudes, n)
            quotas[k] = _thin(
                d,
                n,
                start,
                first,
                modes[k],
                thresholds[k],
                ties[k, 0],
                quotas[k],
                ties[k, 2],
                streams[k, 0],
                streams[k, 1],
            )
            for i in range(n):
                magnitudes[i] = abs(np.float64(d[i]))
            sums[start // TILE, 2 * k + 1] = lane_sum(magnitudes, n)


@kernel
def merge_deltas(
    rows: NDArray[np.uint8],
    codes: NDArray[np.int64],
    first: int,
    count: int,
    modes: NDArray[np.int64],
    thresholds: NDArray[np.uint32],
    ties: NDArray[np.int64],
    streams: NDArray[np.uint64],
    scales: NDArray[np.float32],
    weights: NDArray[np.float32],
    consensus: bool,
    normalize: bool,
    scale: np.float32,
    scratch: NDArray[np.float32],
    out: NDArray[np.uint8],
    out_code: int,
) -> int:
    """Merge one block; see `Block`, `DeltaSum` and `DeltaSum._thinning` for the arguments."""
    wrong = 0
    quotas = ties[:, 1].copy()
    experts = len(weights)
    base, total, divisor = scratch[experts], scratch[experts + 1], scratch[experts + 2]
    everyone = np.float32(0.0)
    for k in range(experts):
        everyone += weights[k]
    if abs(everyone) < np.float32(1e-8):
        everyone = np.float32(1.0)
    zero = np.float32(0.0)
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        decode(rows[0], codes[0], start, n, base)
        total[:] = zero
        for k in range(experts):
            d = scratch[k]
            decode(rows[k + 1], codes[k + 1], start, n, d)
            bits, largest = d.view(np.uint32), np.uint32(0)
            for i in range(n):
                d[i] = d[i] - base[i]
                largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
            # Thinning or the vote could drop a NaN, which would then go unnoticed.
            wrong += 1 if largest >= np.uint32(0x7F800000) else 0
            quotas[k] = _thin(
                d,
                n,
                start,
                first,
                modes[k],
                thresholds[k],
                ties[k, 0],
                quotas[k],
                ties[k, 2],
                streams[k, 0],
                streams[k, 1],
            )
            w, s = weights[k], scales[k]
            if s != np.float32(1.0):
                for i in range(n):
                    d[i] = d[i] * s
            for i in range(n):
                d[i] = d[i] * w
                total[i] += d[i]
        if consensus:
            divisor[:] = zero
            mixed = scratch[experts + 3]
            mixed[:] = zero
            for k in range(experts):
                d, w = scratch[k], weights[k]
                for i in range(n):
                    along = d[i] if total[i] >= zero else -d[i]
                    mixed[i] += d[i] if along > zero else zero
                    divisor[i] += w if along > zero else zero
            if normalize:
                for i in range(n):
                    mixed[i] = mixed[i] / (divisor[i] if divisor[i] != zero else np.float32(1.0))
            for i in range(n):
                total[i] = mixed[i]
        elif normalize:
            for i in range(n):
                total[i] = total[i] / everyone
        if scale != np.float32(1.0):
            for i in range(n):
                total[i] = total[i] * scale
        for i in range(n):
            total[i] = base[i] + total[i]
        wrong += encode(total, n, out_code, out, start)
    return wrong
