"""How few GPUs could do: a lower bound from the best that the twin finds on any single GPU.

The adapters are sorted into a few groups of like rank and load (`groups`). For mixes of groups the twin says how much
of the mix a single GPU can take, over its numbers of slots. GPUs filled with those mixes, in any fractions, must cover
every group: the least number of them is a linear program (the configuration relaxation of bin packing; Gilmore and
Gomory, Operations Research 1961). It begins with each group alone and all together. Then the closed-form estimate looks
for a mix that is worth more at the program's prices than the GPU it fills, and the twin is asked; mixes that it
confirms are added until the estimate finds none that it confirms (column generation).

Capacities are those at which the twin was first seen to refuse, a few percent above what it accepts, and neither whole
adapters nor whole GPUs are asked for: both make the bound smaller. Three things are not proven: that no other mix fills
a GPU better, that no number of slots does better than the few most promising ones, and that the adapters of a group,
of which a mix takes a representative share, cannot be divided to better effect.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linprog

from deltaworks.serving import partition
from deltaworks.serving.arrays import F64, I64
from deltaworks.serving.estimate import UTILISATION, estimate
from deltaworks.serving.groups import group
from deltaworks.serving.judge import Judge
from deltaworks.serving.parts import Part, Piece

_PRECISION = 0.025
_STEP = 1.06
_TRIES = 5
_PLENTY = 16.0
_LEAST = 1e-6
_ROUNDS = 12


class Capacities:
    """What single GPUs of one type can take of a workload's groups.

    Args:
        judge: Of the demand.
        kind: The type of GPU.
        evenly: Ask about the mix of all groups alone: enough to know where to begin, not for a bound.

    Attributes:
        groups: Of every adapter, (adapters,) int64.
        weight: Of every adapter, the share of a GPU of the first type that it costs by the closed-form estimate,
            (adapters,) float64; a share of a group is meant by this weight.
        requests: Expected of every adapter, (adapters,) float64.
        columns: Maximum share of each group per GPU, for each mix: (mixes, groups) float64. The first is an even mix.
    """

    def __init__(self, judge: Judge, kind: int, *, evenly: bool = False) -> None:
        self._judge, self._kind = judge, kind
        # The same groups and shares of them for all types of GPU.
        traffic, profile = judge.traffic[0], judge.profiles[0]
        rough = max(round(float(partition.weights(traffic, profile, 1).sum())), 1)
        self.weight = partition.weights(traffic, profile, rough)
        self.requests = traffic.rate * traffic.duration_s
        self.groups = group(traffic.rank, partition.resources(traffic, profile, rough))
        self._count = int(self.groups.max(initial=0)) + 1
        self._estimates: dict[tuple[float, ...], float] = {}
        mixes = [np.ones(self._count)]
        if self._count > 1 and not evenly:
            mixes += list(np.eye(self._count))
        shares = judge.pool.map(self._capacity, mixes)
        self.columns = np.stack([mix * share for mix, share in zip(mixes, shares, strict=True)])
        if self._count > 1 and not evenly:
            self._generate()

    def _generate(self) -> None:
        """Add mixes that are worth more than a GPU at the prices of the relaxation, while the twin confirms any."""
        alone = np.array([self._estimated(mix) for mix in np.eye(self._count)])
        # How far the estimate is from the twin, by group.
        off = np.diag(self.columns[1:]) / alone
        refused: dict[tuple[float, ...], float] = {}
        for _ in range(_ROUNDS):
            price = _prices(self.columns)
            best: tuple[float, F64] | None = None
            for mix in self._worthy(price, off):
                share = 1.0 / float(price @ mix)
                if refused.get(tuple(mix), np.inf) <= share * (1.0 + _PRECISION):
                    continue
                worth = self._corrected(mix, off) / share
                if worth > 1.0 + _PRECISION / 2 and (best is None or worth > best[0]):
                    best = worth, mix
            if best is None:
                return
            mix = best[1]
            share = (1.0 + _PRECISION) / float(price @ mix)
            if not self._fits(mix, share):
                refused[tuple(mix)] = share
                continue
            self.columns = np.vstack([self.columns, mix * self._capacity(mix, share)])

    def _worthy(self, price: F64, off: F64) -> Iterator[F64]:
        """Mixes that the estimate finds worth the most at some prices: the best for each largest group."""
        for last in range(1, self._count):
            mix = np.zeros(self._count)
            mix[: last + 1] = 1.0
            value = float(price @ mix) * self._corrected(mix, off)
            for _ in range(2):
                before = value
                for place in range(last + 1):
                    for factor in (0.0, 0.5, 2.0):
                        other = mix.copy()
                        other[place] = other[place] * factor
                        if not other.any():
                            continue
                        other /= other.max()
                        if (found := float(price @ other) * self._corrected(other, off)) > value * 1.001:
                            mix, value = other, found
                if value <= before * 1.001:
                    break
            if (mix > 0).sum() > 1 and value > 0:
                yield mix

    def _corrected(self, mix: F64, off: F64) -> float:
        """The estimate's capacity for a mix, corrected by what the twin said of its groups alone."""
        weight = np.bincount(self.groups[self.groups >= 0], self.weight[self.groups >= 0], self._count) * mix
        return self._estimated(mix) * float(np.exp(np.average(np.log(off), weights=weight)))

    def _estimated(self, mix: F64) -> float:
        """The share of a mix that uses up a GPU, by the closed-form estimate."""
        key = tuple(mix)
        if key not in self._estimates:
            judge, kind = self._judge, self._kind
            profile = judge.profiles[kind]
            inside = self.groups >= 0
            share = 1.0 / max(float((self.weight[inside] * mix[self.groups[inside]]).sum()), 1.0 / _PLENTY)
            for _ in range(4):
                tried = min(share, _PLENTY)
                part = self._sample(mix, tried)
                if not part:
                    break
                rank = judge.rank_of(part)
                slots = max(min(len(part), profile.most_slots(rank)), 1)
                traffic = judge.traffic_of(part, kind, 1.0 + judge.demand.headroom)
                share = tried / max(float(estimate(traffic, profile, slots, rank)[UTILISATION]), 0.1)
            self._estimates[key] = share
        return self._estimates[key]

    def _capacity(self, mix: F64, known: float = 0.0) -> float:
        """The share of a mix of groups at which every number of slots that was tried is refused.

        Args:
            mix: In proportion to the groups' traffic, (groups,) float64.
            known: A share that is accepted; 0 for none.
        """
        low, high, step = known, np.inf, _STEP
        share = known * step if known else self._estimated(mix)
        if share > _PLENTY:
            # Next to nothing of a GPU; twice the estimate errs on the side of a smaller bound.
            return 2.0 * share
        while high > low * (1.0 + _PRECISION) and _LEAST < share < 2.0 * _PLENTY:
            if self._fits(mix, share):
                low = share
            else:
                high = share
            if low and high < np.inf:
                share = float(np.sqrt(low * high))
            else:
                share, step = (share * step if low else share / step), min(step**1.6, 2.0)
        return high if high < np.inf else share

    def _fits(self, mix: F64, share: float) -> bool:
        """Whether some number of slots serves ``share`` of every group of a mix."""
        judge, kind = self._judge, self._kind
        part = self._sample(mix, share)
        if not part:
            return True
        factor = 1.0 + judge.demand.headroom
        ranked = judge.promising(part, kind, _TRIES * (2 if judge.demand.goals else 1))
        return any(strain < 2 and judge.serves(part, kind, slots, factor) for strain, slots in ranked)

    def _sample(self, mix: F64, share: float) -> Part:
        """Adapters that make up a share of the load of each group, hot and cold ones as in the group."""
        pieces = []
        for place in np.flatnonzero(mix):
            members = np.flatnonzero(self.groups == place)
            order = np.argsort(-self.weight[members], kind="stable")
            pieces += spread(members[order], self.weight, share * float(mix[place]))
        return tuple(sorted(pieces))


class Relaxation:
    """The least number, or price, of GPUs in fractions that takes all groups whole, over all types of GPU.

    Args:
        capacities: Of each type.
        price: Of a GPU of each type, (types,) float64.

    Attributes:
        gpus: The least number.
        price: The least price.
        cost: What each adapter takes of a GPU at the relaxation's prices, (adapters,) float64.
        row: ``(adapter, share)`` for all adapters, in an order in which neighbours belong on one GPU.
    """

    def __init__(self, capacities: Sequence[Capacities], price: F64) -> None:
        columns = np.concatenate([c.columns for c in capacities])
        each = np.concatenate([np.full(c.columns.shape[0], price[k]) for k, c in enumerate(capacities)])
        self.gpus, self.price = fewest(columns), fewest(columns, each)
        first = capacities[0]
        self._groups, self._weight, self._requests = first.groups, first.weight, first.requests
        # Fewer mixes than groups do not determine a price for every group; the estimated weights take their place.
        self.cost = self._cost(columns) if columns.shape[0] >= columns.shape[1] else self._weight
        self.row = self._row(columns)

    def _cost(self, columns: F64) -> F64:
        price = np.maximum(_prices(columns), 1e-9)
        inside = self._groups >= 0
        total = np.bincount(self._groups[inside], self._weight[inside], price.size)
        each = np.where(inside, price[self._groups] / total[self._groups] * self._weight, 0.0)
        return np.asarray(each + 1e-9)

    def _row(self, columns: F64) -> list[tuple[int, float]]:
        """The GPUs of the relaxation one after another, each mix with its part of each group, hot and cold mingled."""
        amount = _solution(columns)[:, None] * columns
        amount /= np.maximum(amount.sum(0), 1e-12)
        used = np.flatnonzero(amount.sum(1) > 1e-9)
        largest = [int(np.flatnonzero(amount[place] > 1e-9).max()) for place in used]
        pieces: list[list[tuple[int, float]]] = [[] for _ in used]
        order = np.argsort(-self.cost, kind="stable")
        for number in range(columns.shape[1]):
            members = order[self._groups[order] == number]
            shares = [(number_of, float(amount[place, number])) for number_of, place in enumerate(used)]
            for block, adapter, share in _allotted(members, self.cost, self._requests, shares):
                pieces[block].append((adapter, share))
        row = []
        for block in sorted(range(used.size), key=lambda b: largest[b]):
            own = sorted(pieces[block], key=lambda piece: -self.cost[piece[0]] * piece[1])
            row += [own[place] for place in partition.interleaved(len(own))]
        return row + [(int(idle), 1.0) for idle in np.flatnonzero(self._groups < 0)]


def _allotted(
    members: I64, cost: F64, requests: F64, shares: list[tuple[int, float]]
) -> Iterator[tuple[int, int, float]]:
    """Cut a group's adapters, in their order, into blocks that take given shares of its cost: block, adapter, share."""
    total = float(cost[members].sum())
    ends = np.cumsum([share for _, share in shares]) * total
    at, place = 0.0, 0
    for adapter in members.tolist():
        whole = left = float(cost[adapter])
        least = whole / max(float(requests[adapter]), 1.0)
        while place < len(shares) - 1 and at + left > ends[place] + 1e-9 * total:
            room = float(ends[place]) - at
            if least <= room <= left - least:
                yield shares[place][0], adapter, room / whole
                at, left = at + room, left - room
            place += 1
        yield shares[place][0], adapter, left / whole
        at += left


def spread(members: I64, rate: F64, share: float, least: float = 0.01) -> list[Piece]:
    """Adapters that make up a share of the traffic of some.

    That share of their number, evenly chosen from the busiest to the idlest, and a piece of one so that the traffic is
    right.

    Args:
        members: By place, the busiest first, (members,) int64.
        rate: Of all adapters, (adapters,) float64.
        share: Of the members' traffic; above 1 they come several times.
        least: Pieces with no more than this share of their adapter are left out.
    """
    copies, rest = int(share), share - int(share)
    pieces = [Piece(int(m), 1.0, float(copy)) for copy in range(copies) for m in members]
    wanted = rest * float(rate[members].sum())
    turns = np.floor(0.5 + rest * np.arange(members.size + 1)).astype(np.int64)
    chosen = {int(m): 1.0 for m, before, after in zip(members, turns[:-1], turns[1:], strict=True) if after > before}
    excess = sum(float(rate[m]) for m in chosen) - wanted
    for m in list(chosen):
        if excess > 0:
            taken = min(float(rate[m]), excess)
            chosen[m] -= taken / float(rate[m])
            excess -= taken
    for m in reversed(members.tolist()):
        if excess < 0 and m not in chosen and (rate[m] >= -excess or m == members[0]):
            chosen[m] = min(-excess / float(rate[m]), 1.0)
            break
    pieces += [Piece(m, kept, float(copies)) for m, kept in chosen.items() if kept > least]
    return pieces


def _solution(columns: F64) -> F64:
    """How many GPUs have each mix in the relaxation, (mixes,) float64."""
    return np.asarray(_relaxed(columns, np.ones(columns.shape[0])).x)


def _prices(columns: F64) -> F64:
    """The dual prices of the groups: what a whole group is worth in GPUs, (groups,) float64."""
    marginals = _relaxed(columns, np.ones(columns.shape[0])).ineqlin.marginals
    return np.maximum(-np.asarray(marginals, np.float64), 0.0)


def fewest(columns: F64, price: F64 | None = None) -> float:
    """The least number (or price) of GPUs, in fractions, that takes every group whole.

    Args:
        columns: What a GPU can take in shares of the groups, (mixes, groups) float64.
        price: Of a GPU of each row, (mixes,) float64; None for 1 each.
    """
    found = _relaxed(columns, np.ones(columns.shape[0]) if price is None else price)
    assert found.fun is not None
    return float(found.fun)


def _relaxed(columns: F64, price: F64) -> Any:
    return linprog(price, -columns.T, -np.ones(columns.shape[1]), method="highs")
