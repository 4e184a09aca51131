"""Sums of deltas on a base: task arithmetic, TIES, DARE, DELLA and Model Breadcrumbs.

One operation covers the family, as one formula does: each delta is thinned out (by magnitude, at random, by both, or
not), weighted, optionally kept only where its sign agrees with the majority, summed, optionally divided by the weights
that took part, scaled and added to the base.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.histogram import (
    KEEP_ALL,
    Cut,
    Interval,
    kept_elements,
    pack_cut,
    place_ties,
    ranks_between,
    unpack_cut,
)
from deltaworks.checkpoints.codec import TILE
from deltaworks.merging.methods.delta_kernels import collect_lower_bits, delta_masses, merge_deltas
from deltaworks.merging.methods.delta_tiles import Thinning
from deltaworks.merging.methods.exact_sum import exact_sums
from deltaworks.merging.methods.operation import Block, Operation, sum_to_zero, tile_sum_reference
from deltaworks.merging.methods.random_mask import random_mask_reference, split_density
from deltaworks.merging.methods.ranked_mask import chances, draw_ranked_masks, ranked_mask_reference, rows_block

SMALLEST_MASS = 1e-7
NEVER = np.uint32(0xFFFFFFFE)
"""A threshold above every magnitude, and so is the next."""


class Sparsify(StrEnum):
    """How a delta is thinned out."""

    NONE = "none"
    MAGNITUDE = "magnitude"
    OUTLIERS = "outliers"
    RANDOM = "random"
    RANKS = "ranks"

    @property
    def trims(self) -> bool:
        """Whether elements stay by their magnitude among those of their tensor."""
        return self in (Sparsify.MAGNITUDE, Sparsify.OUTLIERS)

    @property
    def looks_at_sizes(self) -> bool:
        """Whether what stays hangs on magnitudes."""
        return self.trims or self is Sparsify.RANKS

    @property
    def draws(self) -> bool:
        """Whether elements stay by chance."""
        return self in (Sparsify.RANDOM, Sparsify.RANKS)


@dataclass(frozen=True, slots=True)
class DeltaSum(Operation):
    """Thin out, weight, elect, sum and add deltas; the first input is the base.

    Task arithmetic (arXiv 2212.04089), TIES (2306.01708, section 3), DARE (2311.03099, section 3), DELLA (2406.11617,
    section 3), which lets larger magnitudes stay likelier, and Model Breadcrumbs (2312.06795, section 3), which trims
    the largest magnitudes as well as the smallest. All arithmetic is float32 in the order of the experts; `rescale`
    restores each delta's L1 norm after thinning, as mergekit does.

    Attributes:
        weights: of each expert.
        densities: share of each delta that stays; matters only where `sparsify` is not none.
        sparsify: how.
        rescale: multiply each thinned delta so that its sum of magnitudes is what it was.
        consensus: keep only values whose sign is that of the weighted sum over all experts (zero counts as positive).
        normalize: divide by the sum of the weights that took part.
        scale: multiplies the merged delta (`lambda`).
        cuts: for magnitude and outliers, which elements of each delta stay; None where the density is 0 or 1.
        keys: for random and ranks, what each expert's random mask is derived from.
        scales: the factors of `rescale`, once the tensor's sums are known.
        gammas: for outliers, the share of each delta's largest elements that goes.
        tops: for outliers, which elements those are; None where there are none.
        epsilons: for ranks, by how much each expert's smallest elements are less likely to stay, and its largest more.
        row: for ranks, elements in a row: those are ranked together.
    """

    kind: ClassVar[str] = "delta"
    measures_deltas: ClassVar[bool] = True

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
    gammas: tuple[float, ...] = ()
    tops: tuple[Cut | Interval | None, ...] = ()
    epsilons: tuple[float, ...] = ()
    row: int = 1

    def depends_on(self, k: int) -> bool:
        """A delta of weight or density 0 counts for nothing."""
        if k == 0:
            return True
        is_dropped = self.sparsify is not Sparsify.NONE and self.densities[k - 1] <= 0
        return self.weights[k - 1] != 0 and self.scale != 0 and not is_dropped

    def cancels(self, inputs: Sequence[int]) -> bool:
        """Equal deltas of which the same elements stay cancel out where their weights sum to 0 and signs do not count.

        The base does not cancel out, and neither do deltas that are thinned at random: their masks differ.
        """
        if 0 in inputs or self.consensus:
            return False
        experts = [k - 1 for k in inputs]
        kept = {tuple(shares[k] for shares in (self.densities, self.gammas) if shares) for k in experts}
        is_same = self.sparsify is Sparsify.NONE or (len(kept) == 1 and not self.sparsify.draws)
        return is_same and sum_to_zero([self.weights[k] for k in experts])

    @property
    def divisor(self) -> float:
        """What sums are divided by where nothing is elected."""
        everyone = math.fsum(self.weights)
        return everyone if self.normalize and abs(everyone) >= 1e-8 else 1.0

    @property
    def passes(self) -> int:
        """One for cuts that are known as intervals only, one for the sums that `rescale` needs."""
        return int(self._has_open_cuts) + int(self._needs_masses)

    def without(self, inputs: Collection[int]) -> Self:
        """Deltas that are not read are zero, wherever they are cut."""
        cuts, tops = (
            tuple(KEEP_ALL if k + 1 in inputs and isinstance(c, Interval) else c for k, c in enumerate(which))
            for which in (self.cuts, self.tops)
        )
        return replace(self, cuts=cuts, tops=tops)

    def sees(self, k: int) -> bool:
        """The pass that places cuts looks at experts whose cuts are open, and at the base."""
        return not self._has_open_cuts or k == 0 or bool(self._open_cuts(k - 1))

    def _open_cuts(self, k: int) -> list[Interval]:
        """The cuts of an expert that are known as intervals only: its own, and its top's."""
        both = [c[k] for c in (self.cuts, self.tops) if c]
        return [c for c in both if isinstance(c, Interval)]

    @property
    def _has_open_cuts(self) -> bool:
        return any(isinstance(c, Interval) for c in (*self.cuts, *self.tops))

    @property
    def thins(self) -> bool:
        """Whether a part of any delta goes."""
        return self.sparsify is not Sparsify.NONE and any(0 < d < 1 for d in self.densities)

    @property
    def _needs_masses(self) -> bool:
        return self.rescale and self.thins and self.scales is None

    @property
    def draws_masks(self) -> bool:
        """See `Operation`."""
        return self.sparsify.draws

    @property
    def alignment(self) -> int:
        """The block in which the statistics counted the ties of a cut must not be torn apart, and no row either."""
        if self.sparsify is Sparsify.RANKS:
            return rows_block(self.row)
        return max((c.align for c in (*self.cuts, *self.tops) if isinstance(c, Cut)), default=1)

    def measure(self, block: Block) -> list[list[NDArray[np.uint16]]] | NDArray[np.float64]:
        """The magnitudes of a block inside each open cut; then its partial sums, [tiles, 2 * experts]."""
        if self._has_open_cuts:
            return [[_inside(block, k, c) for c in self._open_cuts(k)] for k in range(len(self.weights))]
        sums = np.empty((-(-block.count // TILE), 2 * len(self.weights)), np.float64)
        delta_masses(block.inputs, block.start, block.count, self._thinning(block), block.scratch, sums)
        return sums

    def unread(self, count: int) -> list[list[NDArray[np.uint16]]] | NDArray[np.float64]:
        """See `Operation`."""
        del count
        if self._has_open_cuts:
            return [[np.empty(0, np.uint16) for _ in self._open_cuts(k)] for k in range(len(self.weights))]
        return np.empty((0, 2 * len(self.weights)), np.float64)

    def settle(self, parts: Sequence[Any], block_size: int) -> Self:
        """This operation with its open cuts placed; or with the factors that restore each delta's sum of magnitudes."""
        if self._has_open_cuts:
            cuts, tops = list(self.cuts), list(self.tops)
            for k in range(len(self.weights)):
                inside = zip(*(part[k] for part in parts), strict=True)
                for which in (cuts, tops):
                    if which and isinstance(cut := which[k], Interval):
                        which[k] = close_cut(cut, next(inside), block_size)
            return replace(self, cuts=tuple(cuts), tops=tuple(tops))
        sums = exact_sums(parts)
        pairs = zip(sums[::2], sums[1::2], strict=True)
        return replace(self, scales=tuple(b / a if min(a, b) >= SMALLEST_MASS else 1.0 for b, a in pairs))

    def merge(self, block: Block) -> int:
        """Fill `block.out`."""
        return merge_deltas(
            block.inputs,
            block.start,
            block.count,
            self._thinning(block),
            np.array(self.scales or [1.0] * len(self.weights), np.float32),
            np.array(self.weights, np.float32),
            self.consensus,
            self.normalize,
            np.float32(self.scale),
            block.scratch,
            block.out,
            block.out_code,
        )

    def _thinning(self, block: Block) -> Thinning:
        """What of each delta stays in a block."""
        n = len(self.weights)
        at_random = self.sparsify.draws
        shares = _split_densities(self.keys if at_random else (0,) * n, self.densities)
        (thresholds, ceilings), (ties, tops) = np.zeros((2, n), np.uint32), np.zeros((2, n, 3), np.int64)
        cuts_tops = self.sparsify is Sparsify.OUTLIERS
        masks_known = at_random and block.is_again
        if self.sparsify is Sparsify.RANKS and not masks_known:
            lines, limits = _chances(self.densities, self.epsilons)
            draw_ranked_masks(
                block.inputs, block.start, block.count, self.row, shares[0], lines, limits, block.scratch, block.masks
            )
            masks_known = True
        ties[:, 0] = tops[:, 0] = block.count
        if self.sparsify.trims:
            ceilings[:] = NEVER
            # What reads as the base has no delta.
            for k in np.flatnonzero(block.inputs.row_of[1:] != block.inputs.row_of[0]).tolist():
                density = self.densities[k]
                if density <= 0:
                    thresholds[k] = NEVER
                elif density < 1:
                    thresholds[k], ties[k] = place_cut(self.cuts[k], block)
                    if cuts_tops and self.tops[k] is not None:
                        ceilings[k], tops[k] = place_cut(self.tops[k], block)
        return Thinning(at_random, thresholds, ties, cuts_tops, ceilings, tops, *shares, block.masks, masks_known)

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
            keep[:] = random_mask_reference(self.keys[k], density, np.arange(size))
        elif self.sparsify is Sparsify.RANKS:
            keep[:] = ranked_mask_reference(self.keys[k], chances(density, self.epsilons[k]), self.row, delta)
        else:
            first, end = 0, kept_elements(density, size)
            if self.sparsify is Sparsify.OUTLIERS:
                first, end = ranks_between(density, self.gammas[k], size)
            keep[np.argsort(-np.abs(delta), kind="stable")[first:end]] = True
        thinned = np.where(keep, delta, np.float32(0))
        if self.rescale:
            before, after = (tile_sum_reference(np.abs(x)) for x in (delta, thinned))
            if min(before, after) >= SMALLEST_MASS:
                thinned = thinned * np.float32(before / after)
        return thinned

    def to_json(self) -> dict[str, Any]:
        """What a plan stores of it."""
        content: dict[str, Any] = {
            "weights": self.weights,
            "consensus": self.consensus,
            "normalize": self.normalize,
            "lambda": self.scale,
        }
        if self.sparsify is not Sparsify.NONE:
            content |= {"sparsify": self.sparsify.value, "densities": self.densities, "rescale": self.rescale}
        if self.sparsify.trims:
            content["cuts"] = [c and pack_cut(c) for c in self.cuts]
        if self.sparsify is Sparsify.OUTLIERS:
            content |= {"gammas": self.gammas, "tops": [c and pack_cut(c) for c in self.tops]}
        if self.sparsify.draws:
            content["keys"] = [f"{k:016x}" for k in self.keys]
        if self.sparsify is Sparsify.RANKS:
            content |= {"epsilons": self.epsilons, "row": self.row}
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
            gammas=tuple(content.get("gammas", [])),
            tops=tuple(None if c is None else unpack_cut(c) for c in content.get("tops", [])),
            epsilons=tuple(content.get("epsilons", [])),
            row=content.get("row", 1),
        )


def _inside(block: Block, k: int, cut: Interval) -> NDArray[np.uint16]:
    """The lower bits of the magnitudes of delta `k` in a block that are inside a cut's interval."""
    found = np.empty(block.count, np.uint16)
    count = collect_lower_bits(block.inputs, k + 1, block.count, cut.bin >> 1, block.scratch, found)
    return found[:count].copy()


def place_cut(cut: Cut | Interval | None, block: Block) -> tuple[int, tuple[int, int, int]]:
    """A cut as kernels take it in a block: the threshold, and which of its equals survive; see `Thinning`."""
    assert isinstance(cut, Cut)
    if cut.start < block.start:
        # The equals that survive all stand in earlier blocks; here the threshold itself is trimmed.
        return cut.threshold + 1, (block.count, 0, block.count)
    if cut.start >= block.start + block.count:
        return cut.threshold, (block.count, 0, block.count)
    # Where the block of the last equals was omitted, none of a later block takes their place.
    start = cut.start - block.start
    return cut.threshold, (start, cut.quota, start + cut.align)


@lru_cache
def _chances(
    densities: tuple[float, ...], epsilons: tuple[float, ...]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Densities of ranked masks as kernels take them; see `draw_ranked_masks`."""
    found = [chances(density, epsilon) for density, epsilon in zip(densities, epsilons, strict=True)]
    return np.array([c[:2] for c in found], np.float32), np.array([c[2:] for c in found], np.int64)


@lru_cache
def _split_densities(
    keys: tuple[int, ...], densities: tuple[float, ...]
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Keys and densities of random masks as kernels take them; see `Thinning`."""
    split = [split_density(min(max(density, 0.0), 1.0)) for density in densities]
    return np.array(keys, np.uint64), np.array(split, np.uint64).reshape(-1, 2)


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
