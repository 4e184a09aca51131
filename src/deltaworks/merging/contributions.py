"""What each block of each expert adds to a merge, from statistics alone."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.histogram import Cut, Interval, ranks_between
from deltaworks.catalog.statistics import DENSITIES, DeltaTable
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES, sample_places
from deltaworks.merging.election import ELECT, ELECT_AND_DIVIDE, SUM, elected_loss, elected_path, stretch_samples
from deltaworks.merging.methods.delta import DeltaSum, Sparsify
from deltaworks.merging.methods.operation import Operation
from deltaworks.merging.methods.random_mask import random_mask_reference
from deltaworks.merging.methods.spherical import Slerp, slerp_coefficients
from deltaworks.merging.methods.weighted import WeightedSum
from deltaworks.merging.selection import Ranking, overlapping_loss, rank_in_order, rank_overlapping

_STRETCH = 3.0
Number = TypeVar("Number", np.int64, np.float64)


@dataclass(frozen=True, slots=True)
class Delta:
    """Statistics of one expert's tensor: a row a block."""

    table: DeltaTable
    rows: slice

    @property
    def square(self) -> NDArray[np.float64]:
        """Squared norm of each block's delta."""
        return self.table.delta_square[self.rows]

    @property
    def changed(self) -> NDArray[np.float64]:
        """Elements of each block that differ from the base's."""
        return self.table.changed[self.rows]

    def survives(self, density: float) -> NDArray[np.float64]:
        """Squared norm of what a trim to `density` leaves of each block, interpolated between those measured."""
        if density >= 1:
            return self.square
        if density <= 0:
            return np.zeros_like(self.square)
        known = (0.0, *DENSITIES, 1.0)
        i = bisect_right(known, density)
        measured = self.table.survives[self.rows]
        below = measured[:, i - 2].astype(np.float64) if i > 1 else 0.0
        above = measured[:, i - 1].astype(np.float64) if i <= len(DENSITIES) else self.square
        share = (density - known[i - 1]) / (known[i] - known[i - 1])
        between: NDArray[np.float64] = (1 - share) * below + share * above
        return between


class Contribution(Protocol):
    """What the experts of one tensor add to its merge, block by block."""

    @property
    def full(self) -> float:
        """Squared norm of the full merged delta."""

    def rank(self, cost: NDArray[np.int64], run: int) -> Ranking:
        """Rank the experts; blocks cost so many bytes, [blocks, experts], and so many are chosen together."""

    def lost(self, chosen: NDArray[np.bool_]) -> float:
        """Squared error where only the `chosen` blocks are read, [blocks, experts]."""

    def without(self, chosen: NDArray[np.bool_], expert: int) -> float:
        """Square of what changes where one expert's `chosen` blocks are not read after all."""

    def energies(self) -> NDArray[np.float64]:
        """Squared norm of each expert's own part: [blocks, experts]."""


@dataclass(frozen=True, slots=True)
class Overlapping:
    """Parts that add up.

    Attributes:
        gram: float64, [blocks, experts, experts]; inner products of the experts' parts of the merged delta.
        constant: the rest of the squared norm of the merged delta: what is there without any delta.
        norms: float64, [blocks, experts]; the exact norm of each part.
        is_fixed: whether a block's part of the merge hangs on no other block, so that `norms` bound what is lost.
    """

    gram: NDArray[np.float64]
    constant: float
    norms: NDArray[np.float64]
    is_fixed: bool

    @property
    def full(self) -> float:
        """See `Contribution`."""
        return max(0.0, float(self.gram.sum()) + self.constant)

    def rank(self, cost: NDArray[np.int64], run: int) -> Ranking:
        """See `Contribution`."""
        cost = pool(cost, run)
        ranking = Ranking.empty(len(cost), cost.shape[1])
        rank_overlapping(cost, pool(self.gram, run), ranking.order, ranking.end, ranking.cost, ranking.gain)
        return ranking

    def lost(self, chosen: NDArray[np.bool_]) -> float:
        """See `Contribution`."""
        return float(overlapping_loss(self.gram, chosen).sum())

    def without(self, chosen: NDArray[np.bool_], expert: int) -> float:
        """See `Contribution`."""
        return float(self.gram[chosen[:, expert], expert, expert].sum())

    def energies(self) -> NDArray[np.float64]:
        """See `Contribution`."""
        experts = range(self.gram.shape[1])
        own: NDArray[np.float64] = self.gram[:, experts, experts]
        return own


@dataclass(frozen=True, slots=True)
class Elected:
    """Parts of which every element hangs on all of them, or on its place in its tensor, seen through samples.

    Attributes:
        samples: float32, [blocks, experts, SAMPLES]; weighted, thinned deltas, each scaled so that squares add up to
            those of its block.
        residual: float64, [blocks, experts]; squares that no sampled element stands for.
        factors: float32, [blocks, experts]; what samples were multiplied by, to be weighed and scaled.
        weights: float32, [experts].
        rule: how values combine: `SUM`, `ELECT` or `ELECT_AND_DIVIDE`.
    """

    samples: NDArray[np.float32]
    residual: NDArray[np.float64]
    factors: NDArray[np.float32]
    weights: NDArray[np.float32]
    rule: int

    @property
    def full(self) -> float:
        """See `Contribution`."""
        return float(self._loss(np.zeros(self.residual.shape, bool))[1].sum())

    def rank(self, cost: NDArray[np.int64], run: int) -> Ranking:
        """See `Contribution`.

        Experts are ranked by their own squares for each byte. What they add then is far from that: who joins others
        changes what those count. The samples of one place are too few to tell, and whoever picks the best of noisy
        numbers is disappointed; so the samples of the whole tensor tell by what factor squares of each rank count.
        """
        energies = self.energies()
        pooled_cost, pooled = pool(cost, run), pool(energies, run)
        worth = np.divide(pooled, pooled_cost, out=np.zeros_like(pooled), where=pooled_cost > 0)
        order = np.argsort(-worth, axis=1, kind="stable")
        squares = np.take_along_axis(pooled, order, 1)
        left = np.empty(energies.shape[1] + 1)
        elected_path(self.samples, self.residual, self.weights, self.rule, order, run, left)
        left[-1] = 0.0
        taken, total = -np.diff(np.minimum.accumulate(left)), squares.sum(axis=0)
        gain = squares * np.divide(taken, total, out=np.zeros_like(total), where=total > 0)
        ranking = Ranking.empty(len(pooled_cost), pooled_cost.shape[1])
        rank_in_order(pooled_cost, order, gain, ranking.order, ranking.end, ranking.cost, ranking.gain)
        return ranking

    def lost(self, chosen: NDArray[np.bool_]) -> float:
        """See `Contribution`."""
        return float(self._loss(chosen)[0].sum())

    def without(self, chosen: NDArray[np.bool_], expert: int) -> float:
        """See `Contribution`."""
        left = chosen.copy()
        left[:, expert] = False
        read = replace(
            self,
            samples=np.where(chosen[:, :, None], self.samples, np.float32(0)),
            residual=np.where(chosen, self.residual, 0.0),
        )
        return read.lost(left)

    def _loss(self, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
        result = np.empty((2, len(chosen)))
        elected_loss(self.samples, self.residual, self.weights, self.rule, chosen, *result)
        return result

    def energies(self) -> NDArray[np.float64]:
        """See `Contribution`."""
        own: NDArray[np.float64] = np.square(self.samples.astype(np.float64)).sum(axis=2) + self.residual
        return own


def pool(rows: NDArray[Number], run: int) -> NDArray[Number]:
    """Sums of every `run` rows; the last may be of fewer."""
    sums: NDArray[Number] = np.add.reduceat(rows, np.arange(0, len(rows), run), axis=0)
    return sums


class Overlaps:
    """How alike the deltas of different experts are, from their sketches; computed once for many plans."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[int, int], ...], NDArray[np.float64]] = {}

    def of(self, deltas: Sequence[Delta]) -> NDArray[np.float64]:
        """Cosines between the experts' deltas in each block of a tensor: float64, [blocks, experts, experts].

        A block's own estimate is noisy (variance 1 / 128), that of its whole tensor hardly. Blocks are drawn towards
        their tensor by as much as noise explains how they differ from it (empirical Bayes: James and Stein, Berkeley
        Symposium 1961). Cosines of sketches are positive semidefinite with a diagonal of ones, and so is a mixture of
        them: no choice of blocks is ever predicted to leave less than no error.
        """
        key = tuple((id(d.table), d.rows.start) for d in deltas)
        if key not in self._known:
            self._known[key] = _cosines(np.stack([d.table.sketch[d.rows] for d in deltas], axis=1))
        return self._known[key]


def trust_in(spread: float, noise: float) -> float:
    """How far to believe estimates that differ by a variance of `spread`, of which this is noise (see `Overlaps`)."""
    return max(0.0, 1.0 - noise / spread) if spread > 0 else 0.0


def _cosines(sketches: NDArray[np.float32]) -> NDArray[np.float64]:
    blocks, experts, _ = sketches.shape
    products = sketches @ sketches.transpose(0, 2, 1)
    mixed = pooled = _to_cosines(products.sum(axis=0, keepdims=True))
    if blocks > 1 and experts > 1:
        own = _to_cosines(products)
        apart = own - pooled
        apart[:, range(experts), range(experts)] = 0.0
        spread = float(np.vdot(apart, apart)) / (blocks * experts * (experts - 1))
        trust = np.float32(trust_in(spread, 1.0 / BUCKETS))
        mixed = trust * own + (1 - trust) * pooled
    cosines: NDArray[np.float64] = np.repeat(mixed, blocks // len(mixed), axis=0).astype(np.float64)
    cosines[:, range(experts), range(experts)] = 1.0
    return cosines


def _to_cosines(products: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inner products, [rows, experts, experts], by the lengths of both; zero where one has none."""
    lengths = np.sqrt(np.einsum("pee->pe", products))
    both = lengths[:, :, None] * lengths[:, None, :]
    cosines: NDArray[np.float32] = np.divide(products, both, out=np.zeros_like(products), where=both > 0)
    return cosines


def contribution(
    operation: Operation, experts: Sequence[int], deltas: Sequence[Delta], overlaps: Overlaps, count: int
) -> Contribution:
    """What the experts add to a tensor.

    Args:
        operation: how the tensor is made.
        experts: places of the experts among the operation's inputs; the other inputs are the base.
        deltas: their statistics.
        overlaps: cosines between them.
        count: elements in the tensor.
    """
    if isinstance(operation, DeltaSum) and (operation.consensus or operation.sparsify.trims):
        return _elected(operation, deltas, count)
    coefficients, thinning = coefficients_of(operation, experts, deltas)
    norms = np.sqrt(np.stack([d.square for d in deltas], axis=1)) * np.abs(coefficients)
    signed = norms * np.sign(coefficients)
    gram = overlaps.of(deltas) * (signed[:, :, None] * signed[:, None, :])
    gram[:, range(len(deltas)), range(len(deltas))] *= thinning
    constant = 0.0
    if isinstance(operation, WeightedSum):
        # Where weights do not add up to one, the base itself moves.
        drift = math.fsum(operation.weights) / float(operation.divisor) - 1.0
        if abs(drift) > 1e-6:
            base = float(deltas[0].table.base_square[deltas[0].rows].sum())
            along = [float(d.table.base_delta[d.rows].sum()) for d in deltas]
            constant = drift**2 * base + 2 * drift * float(np.dot(coefficients, along))
    is_fixed = not isinstance(operation, Slerp) and bool(np.all(thinning == 1))
    return Overlapping(gram, constant, norms, is_fixed)


def coefficients_of(
    operation: Operation, experts: Sequence[int], deltas: Sequence[Delta]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each delta is multiplied by on average, and by how much random thinning raises its energy beyond that."""
    ones = np.ones(len(experts))
    if isinstance(operation, WeightedSum):
        divisor = float(operation.divisor)
        return np.array([operation.weights[e] / divisor for e in experts]), ones
    if isinstance(operation, Slerp):
        return np.array([_slerp(operation, experts, deltas)[e] for e in experts]), ones
    if isinstance(operation, DeltaSum):
        weights = np.array(operation.weights) * operation.scale / operation.divisor
        if operation.sparsify is not Sparsify.RANDOM:
            return weights, ones
        kept = np.array(operation.densities)
        safe = np.where(kept > 0, kept, 1.0)
        return np.where(kept > 0, weights * (1.0 if operation.rescale else kept), 0.0), 1.0 / safe
    return ones, ones


def _slerp(operation: Slerp, experts: Sequence[int], deltas: Sequence[Delta]) -> tuple[float, float]:
    """The coefficients of slerp, by the norms and inner products of the whole tensor."""
    base = float(deltas[0].table.base_square[deltas[0].rows].sum())
    along = {e: float(d.table.base_delta[d.rows].sum()) for e, d in zip(experts, deltas, strict=True)}
    square = {e: float(d.square.sum()) for e, d in zip(experts, deltas, strict=True)}
    norms = [base + 2 * along.get(i, 0.0) + square.get(i, 0.0) for i in (0, 1)]
    product = base + along.get(0, 0.0) + along.get(1, 0.0)
    if len(deltas) == 2:
        sketches = [d.table.sketch[d.rows].astype(np.float64) for d in deltas]
        product += float(np.sum(sketches[0] * sketches[1]))
    return slerp_coefficients(operation.t, max(norms[0], 0.0), max(norms[1], 0.0), product)


def _elected(operation: DeltaSum, deltas: Sequence[Delta], count: int) -> Elected:
    """Samples of what each expert brings to a merge that elects or trims, and the squares they leave out."""
    blocks, size = len(deltas[0].square), deltas[0].table.block_size
    rule = (ELECT_AND_DIVIDE if operation.normalize else ELECT) if operation.consensus else SUM
    places = _places(blocks, size, count)
    each = np.full(blocks, size / SAMPLES)
    each[-1] = (count - (blocks - 1) * size) / SAMPLES
    samples = np.zeros((blocks, len(deltas), SAMPLES), np.float32)
    residual = np.zeros((blocks, len(deltas)))
    factors = np.zeros((blocks, len(deltas)), np.float32)
    for k, delta in enumerate(deltas):
        density = operation.densities[k]
        sample, threshold, equal_until, factor = _thinning_of_sample(
            operation, k, delta.table.sample[delta.rows], places
        )
        if operation.sparsify is Sparsify.RANDOM:
            exact = delta.square * (factor**2 * min(1.0, density))
        elif operation.sparsify is Sparsify.OUTLIERS and 0 < density < 1:
            first, end = (rank / count for rank in ranks_between(density, operation.gammas[k], count))
            exact = np.maximum(delta.survives(end) - delta.survives(first), 0.0)
        else:
            exact = delta.survives(density)
        weight = operation.weights[k] * operation.scale / (1.0 if rule != SUM else operation.divisor)
        # What the samples miss is taken to survive alone, where normalizing gives it back its full size.
        alone = operation.scale if rule == ELECT_AND_DIVIDE else weight
        stretch_samples(
            sample, threshold, equal_until, places, exact, each, _STRETCH, weight, alone, samples[:, k],
            residual[:, k], factors[:, k],
        )  # fmt: skip
    return Elected(samples, residual, factors, np.array(operation.weights, np.float32), rule)


def told_samples(
    operation: DeltaSum, k: int, delta: Delta, count: int, owners: NDArray[np.int64], seen: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Samples of an expert's delta as something tells them, thinned as those of the delta itself are.

    Args:
        operation: how the tensor is made.
        k: which expert.
        delta: its statistics.
        count: elements in the tensor.
        owners: int64, [rows, SAMPLES]; the block that each sample is of.
        seen: float32, [rows, SAMPLES]; the samples.
    """
    places = _places(len(delta.square), delta.table.block_size, count)[owners, np.arange(SAMPLES)]
    sample, threshold, equal_until, _ = _thinning_of_sample(operation, k, seen, places)
    return np.where(_survive(sample, places, threshold, equal_until), sample, np.float32(0))


@lru_cache(maxsize=64)
def _places(blocks: int, size: int, count: int) -> NDArray[np.int64]:
    """Flat indices of the sampled elements of a tensor of `count`: [blocks, SAMPLES]; many tensors are of one size."""
    return np.stack([sample_places(b, min(size, count - b * size)) + b * size for b in range(blocks)])


def _thinning_of_sample(
    operation: DeltaSum, k: int, sample: NDArray[np.float32], places: NDArray[np.int64]
) -> tuple[NDArray[np.float32], int, int, float]:
    """How a sample of an expert's delta, at flat indices of the tensor, is thinned.

    Returns:
        The sample, thinned already where that is random; the bits of the least magnitude that stays; the flat index
        before which magnitudes equal to it do; and what a kept element is multiplied by.
    """
    density = operation.densities[k]
    if density <= 0:
        return np.zeros_like(sample), 0, 0, 0.0
    if density >= 1 or operation.sparsify is Sparsify.NONE:
        return sample, 0, 0, 1.0
    if operation.sparsify is Sparsify.RANDOM:
        factor = 1.0 / density if operation.rescale else 1.0
        kept = random_mask_reference(operation.keys[k], density, places)
        return np.where(kept, sample * np.float32(factor), np.float32(0)), 0, 0, factor
    cut = operation.cuts[k]
    assert cut is not None
    if operation.sparsify is Sparsify.OUTLIERS and (top := operation.tops[k]) is not None:
        sample = np.where(_survive(sample, places, *_of_sample(top)), np.float32(0), sample)
    return sample, *_of_sample(cut), 1.0


def _survive(
    sample: NDArray[np.float32], places: NDArray[np.int64], threshold: int, equal_until: int
) -> NDArray[np.bool_]:
    """Which elements of a sample, at flat indices of the tensor, survive a cut; see `_of_sample`."""
    size = np.abs(sample).view(np.uint32).astype(np.int64)
    survive: NDArray[np.bool_] = (size > threshold) | ((size == threshold) & (places < equal_until))
    return survive


def _of_sample(cut: Cut | Interval) -> tuple[int, int]:
    """The bits of a cut's magnitude, and the flat index before which magnitudes equal to it survive."""
    if isinstance(cut, Interval):
        return (cut.bin >> 1 << 16) + int((1 - cut.rank / cut.total) * 0xFFFF), 1 << 62
    return cut.threshold, cut.start


Deltas = Mapping[tuple[int, int], DeltaTable]
"""Statistics by the places in a plan of an expert and of the base it is taken against."""
