"""What each block of each expert adds to a merge, from statistics alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.sketch import BUCKETS
from deltaworks.merging.deltas import Delta
from deltaworks.merging.methods.delta import DeltaSum, Sparsify
from deltaworks.merging.methods.operation import Operation
from deltaworks.merging.methods.sce import SelectedSum
from deltaworks.merging.methods.spherical import Slerp, slerp_coefficients
from deltaworks.merging.methods.weighted import WeightedSum
from deltaworks.merging.products import inner_products
from deltaworks.merging.sampled import sample_experts
from deltaworks.merging.selection import Ranking, overlapping_loss, pool, rank_overlapping


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
    products = inner_products(sketches)
    mixed = pooled = _to_cosines(products.sum(axis=0, keepdims=True))
    if blocks > 1 and experts > 1:
        own = _to_cosines(products)
        apart = own - pooled
        apart[:, range(experts), range(experts)] = 0.0
        spread = float(np.square(apart).sum()) / (blocks * experts * (experts - 1))
        trust = trust_in(spread, 1.0 / BUCKETS)
        mixed = trust * own + (1 - trust) * pooled
    cosines: NDArray[np.float64] = np.repeat(mixed, blocks // len(mixed), axis=0)
    cosines[:, range(experts), range(experts)] = 1.0
    return cosines


def _to_cosines(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products, [rows, experts, experts], by the lengths of both; zero where one has none."""
    lengths = np.sqrt(np.einsum("pee->pe", products))
    both = lengths[:, :, None] * lengths[:, None, :]
    cosines: NDArray[np.float64] = np.divide(products, both, out=np.zeros_like(products), where=both > 0)
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
    if isinstance(operation, SelectedSum) or (
        isinstance(operation, DeltaSum) and (operation.consensus or operation.sparsify.looks_at_sizes)
    ):
        return sample_experts(operation, deltas, count)
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
