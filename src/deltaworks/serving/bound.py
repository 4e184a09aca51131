"""How few GPUs could do: a lower bound from the best that the twin finds on any single GPU.

The adapters are sorted into a few groups of like rank and rate. For many mixes of groups (each alone, every pair, all)
the twin says how much of such a mix a single GPU can take, over its numbers of slots. GPUs filled with those mixes, in
any fractions, must cover every group: the least number of them is a linear program (the configuration relaxation of
bin packing; Gilmore and Gomory, Operations Research 1961).

Every number errs on the side of a smaller bound: capacities are those at which the twin was first seen to starve, and
neither whole adapters nor whole GPUs are asked for. What is not proven is that no other mix of groups would fill a GPU
better.
"""

from itertools import combinations

import numpy as np
from scipy.optimize import linprog

from deltaworks.serving.judge import Judge
from deltaworks.serving.parts import Part, Piece
from deltaworks.serving.profile import allowed_rank
from deltaworks.serving.server import F64, I64

GROUPS = 4
_PRECISION = 0.03
_TRIES = 5
_PLENTY = 50.0


class Capacities:
    """What single GPUs of one type can take of a workload's groups.

    Args:
        judge: Of the demand.
        kind: The type of GPU.
        evenly: Ask about the mix of all groups alone: enough to know where to begin, not for a bound.

    Attributes:
        groups: Of every adapter, (adapters,) int64.
        columns: What a GPU can take, in shares of the groups: (mixes, groups) float64.
    """

    def __init__(self, judge: Judge, kind: int, *, evenly: bool = False) -> None:
        self._judge, self._kind = judge, kind
        self.groups = group(judge)
        count = int(self.groups.max(initial=0)) + 1
        mixes = [np.ones(count)]
        if not evenly:
            mixes += [np.eye(count)[i] for i in range(count)] if count > 1 else []
            mixes += [np.eye(count)[[i, j]].sum(0) for i, j in combinations(range(count), 2)] if count > 2 else []
        capacities = judge.pool.map(self._capacity, mixes)
        self.columns = np.stack([mix * share for mix, share in zip(mixes, capacities, strict=True)])

    def _capacity(self, mix: F64) -> float:
        """The share of a mix of groups at which every number of slots that was tried starves."""
        low, high = 0.0, 1.0
        while high < _PLENTY and self._fits(mix, high):
            low, high = high, high * 1.6
        while high - low > _PRECISION * high:
            middle = (low + high) / 2 if low else high / 2
            low, high = (middle, high) if self._fits(mix, middle) else (low, middle)
            if high < 1e-6:
                break
        return high

    def _fits(self, mix: F64, share: float) -> bool:
        """Whether some number of slots serves ``share`` of every group of a mix."""
        judge, kind = self._judge, self._kind
        part = self._sample(mix, share)
        if not part:
            return True
        factor = 1.0 + judge.demand.headroom
        ranked = judge.slots(part, kind)[: _TRIES * (2 if judge.demand.goals else 1)]
        return any(strain < 2 and judge.serves(part, kind, slots, factor) for strain, slots in ranked)

    def _sample(self, mix: F64, share: float) -> Part:
        """Adapters that make up a share of the traffic of each group, hot and cold ones as in the group."""
        rate, pieces = self._judge.traffic[self._kind].rate, []
        for place in np.flatnonzero(mix):
            members = np.flatnonzero(self.groups == place)
            pieces += spread(members[np.argsort(-rate[members], kind="stable")], rate, share)
        return tuple(sorted(pieces))

    def prices(self, columns: F64) -> F64:
        """What each adapter takes of a GPU at the prices of the relaxation, (adapters,) float64.

        Args:
            columns: What a GPU can take, in shares of the groups, (mixes, groups) float64.
        """
        rate = self._judge.traffic[self._kind].rate
        found = linprog(np.ones(columns.shape[0]), -columns.T, -np.ones(columns.shape[1]), method="highs")
        price = np.maximum(-np.asarray(found.ineqlin.marginals), 1e-9)
        total = np.bincount(self.groups[self.groups >= 0], rate[self.groups >= 0], price.size)
        each = np.where(self.groups >= 0, price[self.groups] / total[self.groups] * rate, 0.0)
        return np.asarray(each + 1e-9)


def spread(members: I64, rate: F64, share: float) -> list[Piece]:
    """Adapters that make up a share of the traffic of some.

    That share of their number, evenly chosen from the busiest to the idlest, and a piece of one so that the traffic is
    right.

    Args:
        members: By place, the busiest first, (members,) int64.
        rate: Of all adapters, (adapters,) float64.
        share: Of the members' traffic; above 1 they come several times.
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
    pieces += [Piece(m, kept, float(copies)) for m, kept in chosen.items() if kept > 0.01]
    return pieces


def group(judge: Judge) -> I64:
    """Sorts the adapters with traffic by allowed rank and rate into groups of like load; others are in group -1.

    There are at most `GROUPS`, or one for each rank; all types of GPU have the same.
    """
    traffic = judge.traffic[0]
    rank = np.array([allowed_rank(int(r)) for r in traffic.rank])
    load = traffic.rate * (traffic.prompt + traffic.output)
    ranks = sorted(set(rank[traffic.rate > 0].tolist()))
    found, at = np.full(rank.size, -1, np.int64), 0
    for own in ranks:
        members = np.flatnonzero((rank == own) & (traffic.rate > 0))
        members = members[np.argsort(traffic.rate[members], kind="stable")]
        parts = max(GROUPS // len(ranks), 1)
        alike = np.allclose(traffic.rate[members], traffic.rate[members[0]])
        bounds = np.cumsum(load[members]) / load[members].sum() * (1 if alike else parts)
        numbers = np.minimum((bounds - 1e-9).astype(np.int64), parts - 1)
        _, numbers = np.unique(numbers, return_inverse=True)
        found[members] = at + numbers
        at += int(numbers.max()) + 1
    return found


def fewest(columns: F64, price: F64 | None = None) -> float:
    """The least number (or price) of GPUs, in fractions, that takes every group whole.

    Args:
        columns: What a GPU can take in shares of the groups, (mixes, groups) float64.
        price: Of a GPU of each row, (mixes,) float64; None for 1 each.
    """
    cost = np.ones(columns.shape[0]) if price is None else price
    found = linprog(cost, -columns.T, -np.ones(columns.shape[1]), method="highs")
    assert found.fun is not None
    return float(found.fun)
