"""What experts add to merges of which every element hangs on all of them, seen through samples of their deltas."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.catalog.histogram import Cut, Interval, ranks_between
from deltaworks.checkpoints.sketch import SAMPLES, sample_places
from deltaworks.layers.cells import DEPTH
from deltaworks.merging.deltas import Delta, surviving
from deltaworks.merging.election import (
    ELECT,
    ELECT_AND_DIVIDE,
    SUM,
    elected_layers_loss,
    elected_loss,
    elected_path,
    stretch_samples,
)
from deltaworks.merging.methods.delta import DeltaSum, Sparsify
from deltaworks.merging.methods.random_mask import random_mask_reference, random_numbers_reference
from deltaworks.merging.methods.sce import SelectedSum, expert_shares
from deltaworks.merging.methods.sce_kernels import SMALLEST_SHARE
from deltaworks.merging.selection import Ranking, pool, rank_in_order

_STRETCH = 3.0


class Told(NamedTuple):
    """Samples as layers tell them.

    Attributes:
        samples: float32, [parts, experts, DEPTH + 1, SAMPLES]; weighted, thinned deltas by how many layers are read.
        owners: int64, [parts, SAMPLES]; see `Menu`.
        stands_for: int64, [parts]; for how many blocks each sample stands.
    """

    samples: NDArray[np.float32]
    owners: NDArray[np.int64]
    stands_for: NDArray[np.int64]


@dataclass(frozen=True)
class Sampled(ABC):
    """Parts that hang on each other, or on their place in their tensor; a `Contribution`.

    Attributes:
        samples: float32, [blocks, experts, SAMPLES]; weighted, thinned deltas, each scaled so that squares add up to
            those of its block.
        residual: float64, [blocks, experts]; squares that no sampled element stands for.
        factors: float32, [blocks, experts]; what samples were multiplied by, to be weighed and scaled.
    """

    samples: NDArray[np.float32]
    residual: NDArray[np.float64]
    factors: NDArray[np.float32]

    @property
    def full(self) -> float:
        """See `Contribution`."""
        return self.lost(np.zeros(self.residual.shape, bool))

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
        left = self._path(order, run)
        left[-1] = 0.0
        taken, total = -np.diff(np.minimum.accumulate(left)), squares.sum(axis=0)
        gain = squares * np.divide(taken, total, out=np.zeros_like(total), where=total > 0)
        ranking = Ranking.empty(len(pooled_cost), pooled_cost.shape[1])
        rank_in_order(pooled_cost, order, gain, ranking.order, ranking.end, ranking.cost, ranking.gain)
        return ranking

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

    @abstractmethod
    def energies(self) -> NDArray[np.float64]:
        """See `Contribution`."""

    @abstractmethod
    def lost(self, chosen: NDArray[np.bool_]) -> float:
        """See `Contribution`."""

    @abstractmethod
    def _path(self, order: NDArray[np.int64], run: int) -> NDArray[np.float64]:
        """What is left of the squared error as experts join; see `elected_path`."""

    @abstractmethod
    def told_loss(self, told: Told, depths: NDArray[np.int8]) -> float:
        """Squared error where blocks are read to such depths (see `Choice`), as far as samples show it."""


@dataclass(frozen=True)
class Elected(Sampled):
    """Parts that elect the sign of every element, or that are trimmed and summed.

    Attributes:
        weights: float32, [experts].
        rule: how values combine: `SUM`, `ELECT` or `ELECT_AND_DIVIDE`.
    """

    weights: NDArray[np.float32]
    rule: int

    def lost(self, chosen: NDArray[np.bool_]) -> float:
        """See `Contribution`."""
        return float(elected_loss(self.samples, self.residual, self.weights, self.rule, chosen))

    def _path(self, order: NDArray[np.int64], run: int) -> NDArray[np.float64]:
        left = np.empty(order.shape[1] + 1)
        elected_path(self.samples, self.residual, self.weights, self.rule, order, run, left)
        return left

    def told_loss(self, told: Told, depths: NDArray[np.int8]) -> float:
        """See `Sampled`."""
        return float(elected_layers_loss(told.samples, told.owners, depths, self.weights, self.rule))

    def energies(self) -> NDArray[np.float64]:
        """See `Contribution`."""
        own: NDArray[np.float64] = np.square(self.samples.astype(np.float64)).sum(axis=2) + self.residual
        return own


class _Merged(NamedTuple):
    """What SCE makes of samples.

    Attributes:
        values: float32, [rows, SAMPLES]; the merged delta, scaled as the samples are.
        selected: bool, [rows, SAMPLES].
        shares: of each expert.
    """

    values: NDArray[np.float32]
    selected: NDArray[np.bool_]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Selected(Sampled):
    """Parts from which SCE selects elements, over a whole tensor, and shares, by what it selected.

    Attributes:
        each: float64, [blocks]; elements that one sample stands for.
        largest: float64, [blocks, experts]; squares of as many of the largest elements of each delta as are selected.
        topk: see `SelectedSum`.
    """

    each: NDArray[np.float64]
    largest: NDArray[np.float64]
    topk: float

    @cached_property
    def _full(self) -> _Merged:
        return self._merge(self.samples, self.each[:, None], self.residual.sum(axis=0))

    @cached_property
    def _selected_share(self) -> float:
        """The share of squares that is selected."""
        squares = np.square(self.samples).sum(axis=1, dtype=np.float64)
        total = float(squares.sum())
        return float(squares[self._full.selected].sum()) / total if total > 0 else 1.0

    def _merge(self, samples: NDArray[np.float32], each: NDArray[np.float64], rest: NDArray[np.float64]) -> _Merged:
        """Merge samples, each of which stands for so many elements; `rest` are each expert's squares beyond them."""
        selected = np.ones((len(samples), SAMPLES), bool)
        if self.topk < 1:
            each = np.broadcast_to(each, selected.shape)
            spread = np.square(samples - samples.mean(axis=1, keepdims=True)).sum(axis=1) / each
            descending = np.argsort(-spread, axis=None, kind="stable")[: np.count_nonzero(spread)]
            until = np.cumsum(each.ravel()[descending])
            selected = np.zeros(spread.shape, bool)
            if len(until):
                last = np.searchsorted(until, self.topk * until[-1], "right")
                selected.ravel()[descending[:last]] = True
            samples = np.where(selected[:, None], samples, np.float32(0))
            rest = np.zeros_like(rest)  # how much of it is selected, nobody knows
        squares = np.square(samples).sum(axis=(0, 2), dtype=np.float64) + rest
        shares = expert_shares(squares.tolist(), float(np.broadcast_to(each, selected.shape).sum()))
        weights = np.array(shares, np.float32)[:, None]
        agree = np.where(samples.sum(axis=1, keepdims=True) >= 0, samples > 0, samples < 0)
        sums, divisors = (np.where(agree, x, np.float32(0)).sum(axis=1) for x in (samples * weights, weights))
        return _Merged(sums / np.maximum(divisors, SMALLEST_SHARE), selected, shares)

    def lost(self, chosen: NDArray[np.bool_]) -> float:
        """See `Contribution`."""
        rest = np.where(chosen, self.residual, 0.0)
        read = self._merge(
            np.where(chosen[:, :, None], self.samples, np.float32(0)), self.each[:, None], rest.sum(axis=0)
        )
        error = np.square(self._full.values - read.values).sum(dtype=np.float64)
        return float(error) + self._selected_share * float((self.residual - rest).sum())

    def energies(self) -> NDArray[np.float64]:
        """See `Contribution`; each as if it were merged with its share and nobody else.

        What is selected of a block is told by too few samples to choose by; the largest elements of its delta, which
        are most of that, are known exactly.
        """
        energies: NDArray[np.float64] = self.largest * np.square(self._full.shares)
        return energies

    def _path(self, order: NDArray[np.int64], run: int) -> NDArray[np.float64]:
        rank = np.repeat(np.argsort(order, axis=1), run, axis=0)[: len(self.samples)]
        return np.array([self.lost(rank < joined) for joined in range(order.shape[1] + 1)])

    def told_loss(self, told: Told, depths: NDArray[np.int8]) -> float:
        """See `Sampled`."""
        each = self.each[told.owners] * told.stands_for[:, None]
        depth = depths[told.owners].transpose(0, 2, 1).astype(np.int64)
        seen = np.take_along_axis(told.samples, depth[:, :, None], axis=2)[:, :, 0]
        rest = self.residual.sum(axis=0)
        goal, value = (self._merge(x, each, rest).values for x in (told.samples[:, :, DEPTH], seen))
        return float(np.square(goal - value).sum(dtype=np.float64))


def sample_experts(operation: DeltaSum | SelectedSum, deltas: Sequence[Delta], count: int) -> Sampled:
    """Samples of what each expert brings to a merge, and the squares they leave out.

    Args:
        operation: how the tensor is made.
        deltas: of the experts.
        count: elements in the tensor.
    """
    blocks, size = len(deltas[0].square), deltas[0].table.block_size
    places = _places(blocks, size, count)
    each = np.full(blocks, size / SAMPLES)
    each[-1] = max(1, count - (blocks - 1) * size) / SAMPLES
    samples = np.zeros((blocks, len(deltas), SAMPLES), np.float32)
    residual = np.zeros((blocks, len(deltas)))
    factors = np.zeros((blocks, len(deltas)), np.float32)
    thinned = [_thinning_of_sample(operation, k, d.table.sample[d.rows], places) for k, d in enumerate(deltas)]
    exact, weights, alone = _weights_of(operation, deltas, thinned, count)
    stretch_samples(
        np.stack([t.sample for t in thinned]),
        np.array([t.threshold for t in thinned]),
        np.array([t.equal_until for t in thinned]),
        places, exact, each, _STRETCH, weights, alone, samples, residual, factors,
    )  # fmt: skip
    if isinstance(operation, SelectedSum):
        largest = surviving(deltas, [operation.topk] * len(deltas)).T
        return Selected(samples, residual, factors, each, largest, operation.topk)
    return Elected(samples, residual, factors, np.array(operation.weights, np.float32), _rule(operation))


def _rule(operation: DeltaSum) -> int:
    return (ELECT_AND_DIVIDE if operation.normalize else ELECT) if operation.consensus else SUM


def _weights_of(
    operation: DeltaSum | SelectedSum, deltas: Sequence[Delta], thinned: Sequence["_Thinned"], count: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """How much the experts' thinned deltas count.

    Returns:
        Their squares, [experts, blocks]; what they are multiplied by, [experts]; and what elements are multiplied by
        where nobody else has one, [experts].
    """
    ones = np.ones(len(deltas))
    if isinstance(operation, SelectedSum):
        return np.stack([d.square for d in deltas]), ones, ones
    densities = operation.densities
    if operation.sparsify.draws:
        exact = np.stack([d.square * (t.factor**2 * t.share) for d, t in zip(deltas, thinned, strict=True)])
    elif operation.sparsify is Sparsify.OUTLIERS:
        pairs = zip(densities, operation.gammas, strict=True)
        ranks = [ranks_between(d, g, count) if 0 < d < 1 else (0, d * count) for d, g in pairs]
        firsts, ends = ([rank / max(1, count) for rank in side] for side in zip(*ranks, strict=True))
        exact = np.maximum(surviving(deltas, ends) - surviving(deltas, firsts), 0.0)
    else:
        exact = surviving(deltas, densities)
    rule = _rule(operation)
    weights = np.array(operation.weights) * operation.scale / (1.0 if rule != SUM else operation.divisor)
    # What the samples miss is taken to survive alone, where normalizing gives it back its full size.
    return exact, weights, ones * operation.scale if rule == ELECT_AND_DIVIDE else weights


def told_samples(
    operation: DeltaSum | SelectedSum,
    k: int,
    delta: Delta,
    count: int,
    owners: NDArray[np.int64],
    seen: NDArray[np.float32],
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
    thinned = _thinning_of_sample(operation, k, seen, places)
    survives = _survive(thinned.sample, places, thinned.threshold, thinned.equal_until)
    return np.where(survives, thinned.sample, np.float32(0))


class _Thinned(NamedTuple):
    """A sample, and how it is thinned.

    Attributes:
        sample: float32, [rows, SAMPLES]; thinned already where that is random.
        threshold: the bits of the least magnitude that stays.
        equal_until: the flat index before which magnitudes equal to it do.
        factor: what a kept element is multiplied by.
        share: where thinning is random, of the delta's squares, how much stays on average.
    """

    sample: NDArray[np.float32]
    threshold: int = 0
    equal_until: int = 0
    factor: float = 1.0
    share: float = 1.0


@lru_cache(maxsize=64)
def _places(blocks: int, size: int, count: int) -> NDArray[np.int64]:
    """Flat indices of the sampled elements of a tensor of `count`: [blocks, SAMPLES]; many tensors are of one size."""
    return np.stack([sample_places(b, min(size, count - b * size)) + b * size for b in range(blocks)])


def _thinning_of_sample(
    operation: DeltaSum | SelectedSum, k: int, sample: NDArray[np.float32], places: NDArray[np.int64]
) -> _Thinned:
    """How a sample of an expert's delta, at flat indices of the tensor, is thinned."""
    if isinstance(operation, SelectedSum):
        return _Thinned(sample)
    density = operation.densities[k]
    if density <= 0:
        return _Thinned(np.zeros_like(sample), factor=0.0)
    if density >= 1 or operation.sparsify is Sparsify.NONE:
        return _Thinned(sample)
    if operation.sparsify is Sparsify.RANDOM:
        factor = 1.0 / density if operation.rescale else 1.0
        kept = random_mask_reference(operation.keys[k], density, places)
        return _Thinned(np.where(kept, sample * np.float32(factor), np.float32(0)), factor=factor, share=density)
    if operation.sparsify is Sparsify.RANKS:
        return _thinned_by_ranks(operation, k, sample, places)
    cut = operation.cuts[k]
    assert cut is not None
    if operation.sparsify is Sparsify.OUTLIERS and (top := operation.tops[k]) is not None:
        sample = np.where(_survive(sample, places, *_of_sample(top)), np.float32(0), sample)
    return _Thinned(sample, *_of_sample(cut))


def _thinned_by_ranks(operation: DeltaSum, k: int, sample: NDArray[np.float32], places: NDArray[np.int64]) -> _Thinned:
    """A sample whose elements stay by chances that hang on their ranks: here those among the samples of their block."""
    size = np.abs(sample).astype(np.float64)
    ranks = np.argsort(np.argsort(size, axis=1), axis=1)
    chance = operation.densities[k] + operation.epsilons[k] * (2 * ranks / (SAMPLES - 1) - 1)
    kept = random_numbers_reference(operation.keys[k], places) + 0.5 < chance * 2.0**16
    before, after = float(size.sum()), float((size * chance).sum())
    factor = before / after if operation.rescale and after > 0 else 1.0
    squares = np.square(size)
    total = float(squares.sum())
    share = float((squares * chance).sum()) / total if total > 0 else 1.0
    return _Thinned(np.where(kept, sample * np.float32(factor), np.float32(0)), factor=factor, share=share)


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
