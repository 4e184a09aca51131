"""How many adapters fit on one GPU, and with how many slots; and what serving adapters costs there."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import cpu_count
from pathlib import Path
from typing import Any

from deltaworks.serving.estimate import SLOT_WAIT, UTILISATION, estimate, traffic_of
from deltaworks.serving.feasible import check_possible
from deltaworks.serving.goals import Goal
from deltaworks.serving.judge import MARGIN, SLOTS, best_configuration, keeps_up
from deltaworks.serving.profile import Profile, allowed_rank
from deltaworks.serving.schema import number, whole
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.twin import step_s
from deltaworks.serving.workload import Adapter, Workload, parse_workload, requests_of
from deltaworks.wording import counted

MAX_ADAPTERS = 4096
_PRECISION = 0.02


def alike(rank: int, rate: float, lengths: Any, duration_s: float = 3600.0) -> Workload:
    """A workload of one adapter, of which more can be had with `of_adapters`.

    Args:
        rank: Its rank.
        rate: Requests/s.
        lengths: As a workload writes them.
        duration_s: Seconds.

    Raises:
        WorkloadError: any of them is impossible.
    """
    number(rate, "rate", above=True)
    allowed_rank(whole(rank, "rank", 1))
    adapters = [{"name": "adapter", "rank": rank, "rate": rate}]
    return parse_workload({"duration": duration_s, "lengths": lengths, "adapters": adapters}, Path(), "advice")


def of_adapters(one: Workload, count: int) -> Workload:
    """The same with so many adapters."""
    adapter = one.adapters[0]
    return replace(one, adapters=tuple(Adapter(f"adapter-{i:04}", adapter.rank, adapter.rate) for i in range(count)))


def capacities(
    profile: Profile, one: Workload, headroom: float, goals: Sequence[Goal], told: Callable[[int], None]
) -> list[dict[str, Any]]:
    """For every number of slots that memory allows and adapters use, the most adapters that the twin sees served.

    Args:
        profile: Of the GPU.
        one: A workload of one adapter (`alike`).
        headroom: How much more traffic they must stand, a share.
        goals: Latencies to keep.
        told: Told how many more numbers of slots are done.

    Returns:
        A row for each server that was simulated, by rising ``slots``, which are at most its ``adapters``; with
        ``adapters_is_lower_bound`` (none of up to `MAX_ADAPTERS` was refused), ``throughput_tps``, ``ttft_p50_ms``,
        ``ttft_p99_ms``, ``itl_mean_ms`` (at the plain traffic), ``throughput_with_margin_tps`` (with `MARGIN` more
        traffic, or the headroom), ``kv_tokens``.

    Raises:
        ImpossibleError: a single request on an idle GPU does not fit, or does not keep the goals.
    """
    check_possible(one, [profile], goals, [requests_of(one, profile.output_share)])
    rank = allowed_rank(one.adapters[0].rank)
    most = profile.most_slots(rank)
    listed = [slots for slots in SLOTS if slots <= most]

    def row(slots: int) -> dict[str, Any] | None:
        found = _most_adapters(profile, one, slots, rank, headroom, goals)
        told(1)
        if found is None:
            return None
        count, answer, is_cut_off = found
        more = _ask(profile, one, count, slots, rank, 1 + max(headroom, MARGIN))
        return {
            "slots": min(slots, count),
            "adapters": count,
            "adapters_is_lower_bound": is_cut_off,
            "throughput_tps": answer["throughput_tps"],
            "throughput_with_margin_tps": more["throughput_tps"],
            "ttft_p50_ms": answer["ttft_ms"]["p50"],
            "ttft_p99_ms": answer["ttft_ms"]["p99"],
            "itl_mean_ms": answer["itl_ms"]["mean"],
            "kv_tokens": answer["kv_tokens"],
        }

    rows, workers = [], cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for at in range(0, len(listed), workers):
            rows += [found for found in pool.map(row, listed[at : at + workers]) if found is not None]
            # More slots cannot serve more than the most that are tried.
            if any(found["adapters"] >= MAX_ADAPTERS * (1 - _PRECISION) for found in rows):
                break
    # Several numbers of slots above that of the adapters are one and the same server.
    by_slots: dict[int, dict[str, Any]] = {}
    for found in rows:
        known = by_slots.setdefault(found["slots"], found)
        if found["adapters"] > known["adapters"]:
            by_slots[found["slots"]] = found
    return [by_slots[slots] for slots in sorted(by_slots)]


def best_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows of `capacities` the one to recommend: of those with the most adapters, by `best_configuration`."""
    most = max(row["adapters"] for row in rows)
    kept = [row for row in rows if row["adapters"] == most]
    outlook = [(r["throughput_tps"], r["throughput_with_margin_tps"], r["ttft_p99_ms"] or 0.0) for r in kept]
    return kept[best_configuration(outlook)]


def _most_adapters(
    profile: Profile, one: Workload, slots: int, rank: int, headroom: float, goals: Sequence[Goal]
) -> tuple[int, dict[str, Any], bool] | None:
    """The most adapters served with so many slots; None if not even one.

    Returns:
        Their number, the twin's answer at the plain traffic, and whether no number up to `MAX_ADAPTERS` was refused,
        so that more may be served.
    """

    def accepted(count: int, factor: float) -> bool:
        answer = _ask(profile, one, count, slots, rank, factor)
        if answer["starved"] or not all(goal.met(answer) for goal in goals):
            return False
        if not answer["short"]:
            return True
        asked = _asked(one, count, factor)
        traffic = traffic_of(asked, profile.output_share, profile.server.max_model_len)
        return keeps_up(asked, profile, Configuration(min(slots, count), rank, count), traffic, answer)

    def served(count: int) -> bool:
        return all(accepted(count, factor) for factor in sorted({1 + headroom, 1.0}, reverse=True))

    guess = _guess(profile, one, slots, rank, 1 + headroom)
    low, high = 0, guess
    while high < MAX_ADAPTERS and served(high):
        low, high = high, min(int(high * 1.3) + 1, MAX_ADAPTERS)
    while high - low > max(1, int(low * _PRECISION)):
        middle = (low + high) // 2
        low, high = (middle, high) if served(middle) else (low, middle)
    return (low, _ask(profile, one, low, slots, rank, 1.0), high == MAX_ADAPTERS) if low else None


def _guess(profile: Profile, one: Workload, slots: int, rank: int, factor: float) -> int:
    """How many adapters the closed form sees served."""
    low, high = 1, MAX_ADAPTERS
    while high - low > max(1, low // 20):
        middle = (low + high) // 2
        traffic = traffic_of(of_adapters(one, middle), profile.output_share, profile.server.max_model_len).scaled(
            factor
        )
        found = estimate(traffic, profile, min(slots, middle), rank)
        low, high = (middle, high) if found[UTILISATION] < 1.0 and found[SLOT_WAIT] < 0.1 else (low, middle)
    return low


def _ask(profile: Profile, one: Workload, count: int, slots: int, rank: int, factor: float) -> dict[str, Any]:
    return simulate(_asked(one, count, factor), profile, Configuration(min(slots, count), rank, count))


def _asked(one: Workload, count: int, factor: float) -> Workload:
    """So many adapters at ``factor`` times the rate."""
    workload = of_adapters(one, count)
    faster = tuple(replace(a, rate=tuple((s, r * factor) for s, r in a.rate)) for a in workload.adapters)
    return replace(workload, adapters=faster)


def overheads(profile: Profile, rank: int, slots: int, batch: int = 128) -> dict[str, str]:
    """The four overheads of serving adapters, each in a sentence with the profile's numbers.

    Args:
        profile: It.
        rank: Of the adapters.
        slots: Of the server.
        batch: Running requests of an example.
    """
    allowed = allowed_rank(rank)
    plain, left = profile.kv_tokens(0, allowed), profile.kv_tokens(slots, allowed)
    loading, queue, costs = profile.loading, profile.scheduler, profile.costs(slots, allowed)
    distinct = min(slots, batch)
    with_ms, without_ms = (1000 * step_s(costs, batch, 0, 300.0 * batch, adapters, 0) for adapters in (distinct, 0))
    return {
        "memory": f"{counted(slots, 'slot')} of rank {allowed} {'takes' if slots == 1 else 'take'} {plain - left:,} of"
        f" {plain:,} KV tokens ({(plain - left) / max(plain, 1):.0%}); {left:,} are left for requests",
        "model": f"a step that decodes {batch} requests of 300 tokens takes {with_ms:.1f} ms with"
        f" {counted(distinct, 'adapter')} among them, and {without_ms:.1f} ms with none",
        "loading": f"an adapter takes {loading.slot + loading.slot_rank * rank:.1f} ms from host memory into a slot,"
        f" and {loading.disk + loading.disk_rank * rank:.0f} ms from disk before that; the step waits",
        "scheduler": f"{queue.step + queue.running * batch:.2f} ms a step with {batch} running, and"
        f" {1000 * queue.skipped:.2g} ms more for every thousand requests that wait for a slot",
    }
