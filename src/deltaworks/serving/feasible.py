"""What no number of GPUs can do, told before any search.

A GPU on which every request is served alone is the fastest there can be. If the requests of a workload, each served
alone on the type of GPU that serves it fastest, miss a mean or a quantile, then so does at least one GPU of every
placement. The same is true of requests that fit into no KV cache.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deltaworks.errors import ImpossibleError, WorkloadError
from deltaworks.serving import server
from deltaworks.serving.arrays import F64, I64
from deltaworks.serving.censored import QUANTILES
from deltaworks.serving.goals import Goal
from deltaworks.serving.idle import alone
from deltaworks.serving.model_length import check_lengths, cut_to_length, is_beyond
from deltaworks.serving.profile import Profile, allowed_rank
from deltaworks.serving.simulate import UNLIMITED, server_limits
from deltaworks.serving.starvation import STARVED_DEFICIT
from deltaworks.serving.workload import Requests, Workload
from deltaworks.units import format_time

_TOLERANCE = 1.01
"""ITL quantiles are bin centres of a histogram with bins 1.5% wide; allow for that error."""

_BISECTIONS = 60


class _Fastest(NamedTuple):
    """What each request takes alone on the idle GPU of the type that is fastest at it; infinite where it fits on none.

    Attributes:
        first_s: Seconds to the first token, (n,) float64.
        token_s: Mean seconds between tokens, (n,) float64; 0 where there is but one.
        gap_s: Seconds of the shortest gap between tokens, (n,) float64.
        gaps: How many gaps there are, (n,) float64.
    """

    first_s: F64
    token_s: F64
    gap_s: F64
    gaps: F64


def check_possible(
    workload: Workload, profiles: Sequence[Profile], goals: Sequence[Goal], drawn: Sequence[Requests]
) -> None:
    """Raise unless single requests on idle GPUs fit, and keep the goals.

    Args:
        workload: What is to be served.
        profiles: The types of GPU.
        goals: Latencies to keep.
        drawn: The workload's requests as each type serves them.

    Raises:
        WorkloadError: there are no adapters, or every prompt of an adapter is beyond the model's length.
        ImpossibleError: an adapter fits on no GPU, its requests fit into no KV cache, or a goal cannot be kept even
            where every request has a GPU to itself; the sentence says what can be kept.
    """
    if not workload.adapters:
        raise WorkloadError("the workload has no adapters to place: every request of its trace is for the base model")
    check_lengths(workload, profiles)
    drawn = [cut_to_length(own, p.server.max_model_len) for p, own in zip(profiles, drawn, strict=True)]
    room = [_room(workload, profile) for profile in profiles]
    for place, adapter in enumerate(workload.adapters):
        if not any(own[place] for own in room):
            raise ImpossibleError(
                f"{adapter.name}: no GPU has memory for one slot of rank {adapter.rank}; use a type with more memory"
            )
    _check_lengths(workload, profiles, drawn, room)
    if not goals:
        return
    fastest = _fastest(workload, profiles, drawn, room)
    for goal in goals:
        least_ms = _least_ms(goal, fastest)
        if least_ms is not None and least_ms > goal.limit_ms:
            names = " or ".join(sorted(profile.name for profile in profiles))
            raise ImpossibleError(
                f"{goal.name}={format_time(goal.limit_ms)} cannot be kept: with every request alone on an idle {names}"
                f" it is {format_time(least_ms)}; ask for more than that"
            )


def _room(workload: Workload, profile: Profile) -> I64:
    """KV tokens that one request of each adapter can have on a server with one slot, (adapters,) int64; 0 for none."""
    found: dict[int, int] = {}
    for rank in {allowed_rank(adapter.rank) for adapter in workload.adapters}:
        limit = server_limits(profile, 1, rank, 1)
        found[rank] = int(limit[server.BLOCKS] * limit[server.BLOCK]) if profile.starts(1, rank) else 0
    return np.array([found[allowed_rank(adapter.rank)] for adapter in workload.adapters], np.int64)


def _check_lengths(
    workload: Workload, profiles: Sequence[Profile], drawn: Sequence[Requests], room: Sequence[I64]
) -> None:
    adapters = len(workload.adapters)
    missing = np.full(adapters, np.inf)
    for profile, own, requests in zip(profiles, room, drawn, strict=True):
        chosen = requests.adapter < adapters
        adapter, tokens = requests.adapter[chosen], (requests.prompt + requests.output)[chosen].astype(np.float64)
        beyond = (tokens > own[adapter]) | is_beyond(requests, profile)[chosen]
        refused = np.bincount(adapter, np.where(beyond, tokens, 0.0), adapters)
        missing = np.minimum(missing, refused / np.maximum(np.bincount(adapter, tokens, adapters), 1.0))
    worst = int(np.argmax(missing))
    if missing[worst] >= STARVED_DEFICIT:
        most = [
            min(int(own[worst]), p.server.max_model_len or UNLIMITED) for p, own in zip(profiles, room, strict=True)
        ]
        best = int(np.argmax(most))
        raise ImpossibleError(
            f"{workload.adapters[worst].name}: {missing[worst]:.0%} of its tokens belong to requests that are longer"
            f" than any KV cache or the model: {profiles[best].name} holds prompts and answers of up to {most[best]:,}"
            " tokens together with one slot of that rank; shorten them"
        )


def _fastest(
    workload: Workload, profiles: Sequence[Profile], drawn: Sequence[Requests], room: Sequence[I64]
) -> _Fastest:
    rank = np.array([allowed_rank(adapter.rank) for adapter in workload.adapters], np.int64)
    # Types differ at most in how long the answers are.
    chosen = np.flatnonzero(drawn[0].adapter < rank.size)
    adapter = drawn[0].adapter[chosen]
    first_s, token_s, gap_s = (np.full(chosen.size, np.inf) for _ in range(3))
    for profile, own, requests in zip(profiles, room, drawn, strict=True):
        prompt, output = requests.prompt[chosen], requests.output[chosen]
        fits = (prompt + output <= own[adapter]) & ~is_beyond(requests, profile)[chosen]
        for value in np.unique(rank[adapter]):
            members = np.flatnonzero((rank[adapter] == value) & fits)
            times = alone(profile, 1, int(value), prompt[members], output[members])
            first_s[members] = np.minimum(first_s[members], times.first_s)
            token_s[members] = np.minimum(token_s[members], times.decode_s / np.maximum(output[members] - 1, 1))
            gap_s[members] = np.minimum(gap_s[members], times.gap_s)
    return _Fastest(first_s, token_s, gap_s, np.maximum(drawn[0].output[chosen] - 1.0, 0.0))


def _least_ms(goal: Goal, fastest: _Fastest) -> float | None:
    """The least that a goal's quantity can be, milliseconds; None where no request has it."""
    values = {
        "ttft": fastest.first_s,
        "tpot": fastest.token_s,
        "itl": fastest.token_s if goal.statistic == "mean" else fastest.gap_s / _TOLERANCE,
    }[goal.quantity]
    weight = fastest.gaps if goal.quantity == "itl" else np.ones(values.size)
    counted = np.isfinite(values) & ((fastest.gaps > 0) | (goal.quantity == "ttft"))
    if not counted.any():
        return None
    if goal.statistic == "mean":
        return 1000 * float(np.average(values[counted], weights=weight[counted]))
    if goal.quantity == "itl":
        return 1000 * _quantile(values[counted], weight[counted], QUANTILES[goal.statistic])
    return 1000 * _least_interpolated(values[counted], QUANTILES[goal.statistic])


def _quantile(values: F64, weight: F64, quantile: float) -> float:
    """The least value such that values up to it have that share of the weight."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order])
    return float(values[order[np.searchsorted(reached, quantile * reached[-1] * (1 - 1e-12))]])


def _least_interpolated(values: F64, quantile: float) -> float:
    """A lower bound of the largest quantile of any GPU, however the requests are divided among GPUs.

    The twin interpolates between observations (`censored.statistics`), so a GPU of few requests may keep a limit below
    its slowest one. Let ``x`` be values above a limit ``L`` and ``a`` the least value. A GPU with ``n`` values,
    ``m`` of them above ``L``, keeps ``L`` only if ``m <= (1 - q) * (n - 1) + f``, where the weight ``f`` of the
    smallest ``x`` in the interpolation is at most ``(L - a) / (x - a)``. The sum over all GPUs gives the condition
    ``sum((x - L) / (x - a)) <= (1 - q) * total``, whose least ``L`` is the bound.

    Args:
        values: Of all requests, (n,) float64.
        quantile: Between 0 and 1.
    """
    least = float(values.min())
    above = values[values > least]
    room = (1.0 - quantile) * values.size
    low, high = least, float(values.max())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        over = above[above > middle]
        low, high = (low, middle) if float(((over - middle) / (over - least)).sum()) <= room else (middle, high)
    return low
