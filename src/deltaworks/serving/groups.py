"""Adapters of a workload in a few groups of like rank and like load, for the lower bound.

Adapters of different ranks are never in one group, unless there are more ranks than groups: then neighbouring ranks
share one. A group is split where its adapters differ the most in what limits a GPU that serves them: the time for
tokens, the KV cache, the number of adapters in the batch, or the API server. Two kinds of requests of different lengths
that strain the same resources in the same proportions may share a group.
"""

import numpy as np

from deltaworks.serving.arrays import F64, I64
from deltaworks.serving.profile import allowed_rank

MAX_GROUPS = 8
"""Groups at most."""

ALIKE = 0.05
"""A standard deviation of the shares of resources below which adapters are alike."""


def group(rank: F64, taken: F64) -> I64:
    """Sort the adapters with traffic into groups; others are in group -1.

    Args:
        rank: Of the adapters, (adapters,) float64.
        taken: Of resources by each adapter, as `partition.resources` tells, (adapters, resources) float64.

    Returns:
        Of every adapter its group, (adapters,) int64; groups are in order of rank.
    """
    load = taken.sum(1)
    allowed = np.array([allowed_rank(int(r)) for r in rank], np.int64)
    ranks = np.unique(allowed[load > 0])
    if not ranks.size:
        return np.full(rank.size, -1, np.int64)
    by_rank = np.minimum(np.searchsorted(ranks, allowed), ranks.size - 1) * min(MAX_GROUPS, ranks.size) // ranks.size
    sets = [np.flatnonzero((load > 0) & (by_rank == own)) for own in np.unique(by_rank[load > 0])]
    shares = taken / np.maximum(load, 1e-300)[:, None]
    while len(sets) < MAX_GROUPS:
        spreads = [_spread(shares[members], load[members]) for members in sets]
        chosen = int(np.argmax([spread[0] * np.sqrt(load[m].sum()) for spread, m in zip(spreads, sets, strict=True)]))
        deviation, column, middle = spreads[chosen]
        if deviation < ALIKE:
            break
        members = sets.pop(chosen)
        high = shares[members, column] > middle
        sets += [members[~high], members[high]]
    found = np.full(rank.size, -1, np.int64)
    for number, members in enumerate(sorted(sets, key=lambda m: (int(by_rank[m[0]]), int(m[0])))):
        found[members] = number
    return found


def _spread(shares: F64, load: F64) -> tuple[float, int, float]:
    """The largest standard deviation of a resource's share, the resource, and its mean, all weighted by load."""
    mean = np.average(shares, axis=0, weights=load)
    deviation = np.sqrt(np.average((shares - mean) ** 2, axis=0, weights=load))
    column = int(np.argmax(deviation))
    return float(deviation[column]), column, float(mean[column])
