"""Which blocks to read, and how deep: the choice that keeps most of a merge for the bytes it may read.

Blocks at one place of one tensor, one from each expert, are weighed together, because their deltas add up, cancel or
outvote each other. At each place experts are ranked greedily, by what reading one more of them, or more layers of one,
takes off the error for each byte; the ranking is cut into steps of falling worth (the upper hull of error taken off
over bytes). Steps of all places then compete in one list, best first, until the budget is spent. As every step is worth
less a byte than those before it, more budget never leaves more error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import kernel
from deltaworks.layers.cells import DEPTH

Number = TypeVar("Number", np.int64, np.float64)


@dataclass(frozen=True, slots=True)
class Ranking:
    """What to read at every place of one tensor, best first, in steps: all arrays are [places, entries].

    Attributes:
        experts: how many there are.
        order: int64; the expert of each entry, -1 after the last.
        depth: int64; how many of its layers are read from that entry on, DEPTH for all of it.
        end: int64; how many entries are in once each step is taken, 0 after the last step.
        cost: int64; bytes of each step, 0 after the last.
        gain: float64; squared error that each step takes off.
    """

    experts: int
    order: NDArray[np.int64]
    depth: NDArray[np.int64]
    end: NDArray[np.int64]
    cost: NDArray[np.int64]
    gain: NDArray[np.float64]

    @classmethod
    def empty(cls, places: int, experts: int, depths: int = 1) -> "Ranking":
        """A ranking without steps, for a kernel to fill; of so many depths, one where experts are read whole."""
        shape = (places, experts * depths)
        depth = np.full(shape, DEPTH, np.int64)
        order, end, cost = np.full(shape, -1, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        return cls(experts, order, depth, end, cost, np.zeros(shape))

    def scaled(self, factor: float) -> "Ranking":
        """The ranking with every gain multiplied by `factor`."""
        return replace(self, gain=self.gain * factor)


@dataclass(frozen=True, slots=True)
class Choice:
    """What is read of one tensor, and the squared error that is left by the ranking's account.

    Attributes:
        depths: int8, [places, experts]; how many layers of each, none where it is not read, DEPTH for all of it.
        lost: the error.
    """

    depths: NDArray[np.int8]
    lost: float

    @property
    def reads(self) -> NDArray[np.bool_]:
        """Of which experts anything is read: [places, experts]."""
        return self.depths > 0


def choose(rankings: Sequence[Ranking], budget: int, *, nested: bool = False) -> list[Choice]:
    """Choose blocks of at most `budget` bytes in all; blocks that cost nothing are never chosen.

    Args:
        rankings: of every tensor.
        budget: in bytes.
        nested: stop at the first step that does not fit, so that a larger budget reads all that a smaller one does;
            else go on with those that do.
    """
    if not rankings:
        return []
    cost = np.concatenate([r.cost.ravel() for r in rankings])
    # Divisions round: a step must not come before the one it follows.
    worths = [np.minimum.accumulate(r.gain / np.maximum(r.cost, 1), axis=1).ravel() for r in rankings]
    used = np.flatnonzero(cost)
    best_first = used[np.argsort(-np.concatenate(worths)[used], kind="stable")]
    first = np.concatenate([np.tile(np.arange(r.order.shape[1]) == 0, len(r.order)) for r in rankings])
    taken = np.zeros(len(cost), bool)
    spend(best_first, cost, first, budget, nested, taken)
    start, choices = 0, []
    for ranking in rankings:
        steps = taken[start : start + ranking.order.size].reshape(ranking.order.shape)
        start += ranking.order.size
        entries = np.max(np.where(steps, ranking.end, 0), axis=1, initial=0)
        place, position = np.nonzero(np.arange(ranking.order.shape[1]) < entries[:, None])
        depths = np.zeros((len(ranking.order), ranking.experts), np.int8)
        # Later entries of an expert are deeper ones.
        depths[place, ranking.order[place, position]] = ranking.depth[place, position]
        choices.append(Choice(depths, float(ranking.gain[~steps & (ranking.cost > 0)].sum())))
    return choices


def pool(rows: NDArray[Number], run: int) -> NDArray[Number]:
    """Sums of every `run` rows; the last may be of fewer."""
    sums: NDArray[Number] = np.add.reduceat(rows, np.arange(0, len(rows), run), axis=0)
    return sums


@kernel
def spend(
    best_first: NDArray[np.int64],
    cost: NDArray[np.int64],
    first: NDArray[np.bool_],
    budget: int,
    nested: bool,
    taken: NDArray[np.bool_],
) -> None:
    """Take steps, best first, each if it fits and the step before it at its place (the entry before it) is taken."""
    for i in best_first:
        if cost[i] <= budget and (first[i] or taken[i - 1]):
            taken[i] = True
            budget -= cost[i]
        elif nested:
            break


@kernel
def add_step(
    rank: int,
    steps: int,
    nbytes: int,
    gain: float,
    end: NDArray[np.int64],
    cost: NDArray[np.int64],
    gains: NDArray[np.float64],
) -> int:
    """Append the entry of rank `rank` as a step of a place's arrays; returns how many steps there are."""
    # A step worth more than the one before it belongs to it: who takes the one wants both.
    while steps > 0 and gains[steps - 1] * nbytes <= gain * cost[steps - 1]:
        steps -= 1
        gain += gains[steps]
        nbytes += cost[steps]
    gains[steps], cost[steps], end[steps] = gain, nbytes, rank + 1
    # What belonged to it is not a step of its own any more.
    gains[steps + 1 : rank + 1], cost[steps + 1 : rank + 1], end[steps + 1 : rank + 1] = 0.0, 0, 0
    return steps + 1


@kernel
def rank_overlapping(
    cost: NDArray[np.int64],
    gram: NDArray[np.float64],
    order: NDArray[np.int64],
    end: NDArray[np.int64],
    step_cost: NDArray[np.int64],
    step_gain: NDArray[np.float64],
) -> None:
    """Rank experts whose parts of the merge add up.

    Args:
        cost: int64, [places, experts]; experts that cost nothing are left out.
        gram: float64, [places, experts, experts]; inner products of the parts.
        order: as in an empty `Ranking`; set, as are the others.
        end: likewise.
        step_cost: likewise.
        step_gain: likewise.
    """
    places, experts = cost.shape
    left = np.empty(experts, np.bool_)
    pull = np.empty(experts, np.float64)
    for p in range(places):
        for e in range(experts):
            left[e] = cost[p, e] > 0
            pull[e] = 0.0
            for f in range(experts):
                pull[e] += gram[p, e, f]
        steps = 0
        for rank in range(experts):
            best, best_worth = -1, 0.0
            for e in range(experts):
                if left[e]:
                    worth = (2.0 * pull[e] - gram[p, e, e]) / cost[p, e]
                    if best < 0 or worth > best_worth:
                        best, best_worth = e, worth
            if best < 0:
                break
            left[best] = False
            order[p, rank] = best
            gain = 2.0 * pull[best] - gram[p, best, best]
            for e in range(experts):
                pull[e] -= gram[p, e, best]
            steps = add_step(rank, steps, cost[p, best], gain, end[p], step_cost[p], step_gain[p])


def overlapping_loss(gram: NDArray[np.float64], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Squared error at each place, where the omitted experts' parts add up: [places]."""
    left = (~chosen).astype(np.float64)
    energy: NDArray[np.float64] = np.einsum("pe,pef,pf->p", left, gram, left, optimize=True)
    return np.maximum(energy, 0.0)


@kernel
def rank_layers(
    cost: NDArray[np.int64],
    part: NDArray[np.float64],
    cosine: NDArray[np.float64],
    order: NDArray[np.int64],
    depth: NDArray[np.int64],
    end: NDArray[np.int64],
    step_cost: NDArray[np.int64],
    step_gain: NDArray[np.float64],
) -> None:
    """Rank layers of experts whose parts of the merge add up; see `rank_overlapping` for what is not said here.

    Args:
        cost: int64, [places, experts, depths]; bytes of so many layers, -1 where so many cannot be read alone. Experts
            of which all layers cost nothing are left out.
        part: float64, [places, experts, depths]; norm of what so many layers leave of an expert's part, negative where
            the expert is subtracted.
        cosine: float64, [experts, depths, experts, depths]; between what they leave. On the diagonal may stand more
            than one, where chance adds to an expert's own energy.
        order: as in an empty `Ranking`; set, as are the others.
        depth: likewise.
        end: likewise.
        step_cost: likewise.
        step_gain: likewise.
    """
    places, experts, depths = cost.shape
    at = np.empty(experts, np.int64)
    # What the others leave, seen along what each leaves at each depth.
    pull = np.empty((experts, depths), np.float64)
    for p in range(places):
        at[:] = 0
        for e in range(experts):
            for x in range(depths):
                pull[e, x] = 0.0
                for f in range(experts):
                    if f != e:
                        pull[e, x] += part[p, e, x] * part[p, f, 0] * cosine[e, x, f, 0]
        steps = rank = 0
        while True:
            best, to, best_worth, best_gain = -1, 0, 0.0, 0.0
            for e in range(experts):
                d = at[e]
                if cost[p, e, depths - 1] == 0 or d == depths - 1:
                    continue
                now = part[p, e, d] ** 2 * cosine[e, d, e, d] + 2.0 * pull[e, d]
                for x in range(d + 1, depths):
                    if cost[p, e, x] < 0:
                        continue
                    gain = now - part[p, e, x] ** 2 * cosine[e, x, e, x] - 2.0 * pull[e, x]
                    worth = gain / max(1, cost[p, e, x] - cost[p, e, d])
                    if best < 0 or worth > best_worth:
                        best, to, best_worth, best_gain = e, x, worth, gain
            if best < 0:
                break
            before = at[best]
            for f in range(experts):
                if f != best:
                    for x in range(depths):
                        pull[f, x] += part[p, f, x] * (
                            part[p, best, to] * cosine[f, x, best, to]
                            - part[p, best, before] * cosine[f, x, best, before]
                        )
            at[best] = to
            order[p, rank], depth[p, rank] = best, to
            nbytes = max(1, cost[p, best, to] - cost[p, best, before])
            steps = add_step(rank, steps, nbytes, best_gain, end[p], step_cost[p], step_gain[p])
            rank += 1


@kernel
def rank_in_order(
    cost: NDArray[np.int64],
    wanted: NDArray[np.int64],
    gain: NDArray[np.float64],
    order: NDArray[np.int64],
    end: NDArray[np.int64],
    step_cost: NDArray[np.int64],
    step_gain: NDArray[np.float64],
) -> None:
    """Rank experts in a given order; see `rank_overlapping` for what is not said here.

    Args:
        cost: int64, [places, experts].
        wanted: int64, [places, experts]; the order.
        gain: float64, [places, experts]; squared error that each takes off, in that order.
        order: set, as are `end`, `step_cost` and `step_gain`.
        end: see there.
        step_cost: see there.
        step_gain: see there.
    """
    places, experts = cost.shape
    for p in range(places):
        rank, steps = 0, 0
        for i in range(experts):
            e = wanted[p, i]
            if cost[p, e] > 0:
                order[p, rank] = e
                steps = add_step(rank, steps, cost[p, e], gain[p, i], end[p], step_cost[p], step_gain[p])
                rank += 1
