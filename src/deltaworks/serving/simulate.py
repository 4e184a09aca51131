"""What a vLLM server would do with a workload: the twin run once, and what a client would have measured."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaworks.errors import WorkloadError
from deltaworks.serving import server, twin
from deltaworks.serving.profile import Profile, allowed_rank
from deltaworks.serving.workload import Requests, Workload, requests_of

STARVED_DEFICIT = 0.1
"""A server starves its adapters when this share of the offered tokens does not get through (arXiv 2508.08343)."""

LABEL_SETS = 1 << 19
_UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Configuration:
    """How a server is started.

    Attributes:
        slots: `--max-loras`.
        max_rank: `--max-lora-rank`; None for the least that holds every adapter.
        served: `--max-cpu-loras`, adapters kept in host memory; None for all of the workload's.
        client_max_outstanding: Requests that the load generator can have open at once; it drops the others. None for
            no limit.
    """

    slots: int
    max_rank: int | None = None
    served: int | None = None
    client_max_outstanding: int | None = None


def simulate(
    workload: Workload, profile: Profile, configuration: Configuration, requests: Requests | None = None
) -> dict[str, Any]:
    """Run the twin; the answer is the JSON of `deltaworks simulate`.

    Args:
        workload: What the server is asked.
        profile: What it is.
        configuration: How it is started.
        requests: The workload's requests, where they are known already.

    Raises:
        WorkloadError: the configuration cannot serve the workload's adapters.
    """
    started = time.perf_counter()
    slots, max_rank = configuration.slots, _rank(workload, configuration)
    if slots < 1:
        raise WorkloadError(f"slots: expected at least 1, not {slots}")
    served = max(configuration.served or len(workload.adapters), slots)
    if requests is None:
        requests = requests_of(workload, profile.output_share)
    kv_tokens = profile.kv_tokens(slots, max_rank)
    if not profile.starts(slots, max_rank):
        return _no_start(workload, requests, kv_tokens)
    run = _run(workload, requests, profile, slots, max_rank, served, configuration.client_max_outstanding)
    return {**_answer(workload, requests, run, kv_tokens), "wall_s": time.perf_counter() - started}


@dataclass(frozen=True)
class _Run:
    """What a run of the twin left."""

    state: server.Server
    first_token_s: server.F64
    finish_s: server.F64
    gaps: server.F64
    sums: server.F64
    too_long: server.I64


def _rank(workload: Workload, configuration: Configuration) -> int:
    needed = workload.max_rank
    if configuration.max_rank is None:
        return allowed_rank(needed)
    if configuration.max_rank < needed:
        raise WorkloadError(f"an adapter has rank {needed}, more than the maximum rank {configuration.max_rank}")
    return configuration.max_rank


def limits(profile: Profile, slots: int, max_rank: int, served: int, outstanding: int | None = None) -> server.I64:
    """The limits of a configured server, (`server.LIMITS`,) int64."""
    flags = profile.server
    limit = np.empty(server.LIMITS, np.int64)
    limit[server.MAX_SEQS], limit[server.MAX_TOKENS] = flags.max_num_seqs, flags.max_num_batched_tokens
    # One block is never given out: vLLM keeps it as a placeholder.
    limit[server.BLOCK] = flags.block_size
    limit[server.BLOCKS] = profile.kv_tokens(slots, max_rank) // flags.block_size - 1
    limit[server.SLOTS], limit[server.CPU_ADAPTERS] = slots, max(served, slots)
    limit[server.OUTSTANDING] = _UNLIMITED if outstanding is None else outstanding
    return limit


def _run(
    workload: Workload, requests: Requests, profile: Profile, slots: int, max_rank: int, served: int,
    outstanding: int | None,
) -> _Run:  # fmt: skip
    limit = limits(profile, slots, max_rank, served, outstanding)
    room = int(limit[server.BLOCKS] * limit[server.BLOCK])
    fits = requests.prompt + requests.output <= room
    kept = slice(None) if fits.all() else np.flatnonzero(fits)
    arrival_s, prompt, output = requests.arrival_s[kept], requests.prompt[kept], requests.output[kept]
    adapters = len(workload.adapters)
    scraped = profile.front_end.scrape_period_s > 0
    state = server.empty_server(
        requests.adapter[kept], prompt, output, adapters, limit, LABEL_SETS if scraped else 0
    )  # fmt: skip
    load_s, disk_s = profile.load_s(np.array([float(a.rank) for a in workload.adapters]))
    first_token_s, finish_s = np.full(arrival_s.size, np.nan), np.full(arrival_s.size, np.nan)
    gaps, sums = np.zeros(twin.BINS), np.zeros(twin.SUMS)
    arrived = twin.run(
        state, arrival_s, load_s, disk_s, profile.costs(slots, max_rank), workload.duration_s, first_token_s, finish_s,
        gaps, sums,
    )  # fmt: skip
    check_conservation(state, arrived)
    return _Run(state, first_token_s, finish_s, gaps, sums, np.flatnonzero(~fits))


def check_conservation(state: server.Server, arrived: int) -> None:
    """Assert what holds in every run: no request and no KV block is lost, and no batch has too many adapters."""
    total, limit, size = state.total, state.limit, state.limit[server.BLOCK]
    by_state = np.bincount(state.state[:arrived] + 1, minlength=5)
    assert by_state[server.RUNNING + 1] == total[server.RUN]
    assert by_state[server.WAITING + 1] == total[server.WAIT]
    assert (state.state[arrived:] == server.NEVER).all()
    held, item = 0, state.batch[state.state.size, server.NEXT]
    while item < state.state.size:
        tokens = total[server.DONE] if item == total[server.PARTIAL] else _computed(state, int(item))
        held += -(-tokens // size)
        item = state.batch[item, server.NEXT]
    assert held + total[server.FREE] == limit[server.BLOCKS]
    assert total[server.MOST_DISTINCT] <= limit[server.SLOTS]
    assert total[server.IN_SLOTS] == state.in_slot.sum() <= limit[server.SLOTS]
    assert total[server.IN_HOST] == state.in_host.sum() <= limit[server.CPU_ADAPTERS]


def _computed(state: server.Server, item: int) -> int:
    return int(state.offset[item] + state.total[server.STEP])


def _no_start(workload: Workload, requests: Requests, kv_tokens: int) -> dict[str, Any]:
    """The answer for a server that has too little memory to start: nobody is served."""
    arrived = requests.arrival_s.size
    nothing = {"mean": None, "p50": None, "p99": None}
    return {
        "throughput_tps": 0.0,
        "input_throughput_tps": 0.0,
        "output_throughput_tps": 0.0,
        "offered_tps": requests.offered_tps(workload.duration_s),
        "ttft_ms": nothing,
        "ttft_penalised_ms": 1000 * workload.duration_s,
        "itl_ms": nothing,
        "tpot_ms": nothing,
        "requests": {"arrived": arrived, "completed": 0, "running": 0, "waiting": 0, "rejected": arrived},
        "starved": arrived > 0,
        "memory_error": True,
        "kv_tokens": max(kv_tokens, 0),
        "preemptions": 0,
        "adapter_loads": 0,
        "running_mean": 0.0,
        "waiting_mean": 0.0,
        "adapters": {a.name: {"arrived": int(n), "completed_share": 0.0} for a, n in zip(
            workload.adapters, np.bincount(requests.adapter, minlength=len(workload.adapters)), strict=False)},
        "duration_s": workload.duration_s,
        "wall_s": 0.0,
    }  # fmt: skip


def _answer(workload: Workload, requests: Requests, run: _Run, kv_tokens: int) -> dict[str, Any]:
    state, duration_s = run.state, workload.duration_s
    done = np.flatnonzero(state.state == server.COMPLETED)
    prompt, output = state.prompt[done], state.output[done]
    first, finish = run.first_token_s[done], run.finish_s[done]
    fitting = np.ones(requests.arrival_s.size, bool)
    fitting[run.too_long] = False
    ttft = first - requests.arrival_s[fitting][done]
    decoded = output > 1
    tpot = (finish - first)[decoded] / (output[decoded] - 1)
    gaps = float((output - 1).sum())
    # Tokens that reached the client in one piece with others have no gap of their own.
    merged = float(run.sums[twin.MERGED]) / max(float(run.gaps.sum()), 1.0)
    itl_mean = 1000 * float((finish - first).sum()) / (gaps * (1.0 - merged)) if gaps else None
    throughput, offered = float((prompt.sum() + output.sum()) / duration_s), requests.offered_tps(duration_s)
    unfinished = min(_unfinished(run, duration_s), float(run.state.state.size))
    dropped = int((state.state == server.REJECTED).sum() + run.too_long.size)
    arrived = requests.arrival_s.size
    adapters = len(workload.adapters)
    arrived_of = np.bincount(requests.adapter, minlength=adapters + 1)
    completed_of = np.bincount(state.adapter[done], minlength=adapters + 1)
    share = completed_of / np.maximum(arrived_of, 1)
    return {
        "throughput_tps": throughput,
        "input_throughput_tps": float(prompt.sum() / duration_s),
        "output_throughput_tps": float(output.sum() / duration_s),
        "offered_tps": offered,
        "ttft_ms": _milliseconds(ttft),
        "ttft_penalised_ms": _penalised(ttft, unfinished + dropped, arrived, duration_s),
        "itl_ms": {"mean": itl_mean, "p50": _gap(run.gaps, 0.5), "p99": _gap(run.gaps, 0.99)},
        "tpot_ms": _milliseconds(tpot),
        "requests": {
            "arrived": arrived,
            "completed": done.size,
            "running": int(state.total[server.RUN]),
            "waiting": int(state.total[server.WAIT] + (state.state == server.NEVER).sum()),
            "rejected": dropped,
        },
        "starved": bool(offered > 0 and 1 - throughput / offered >= STARVED_DEFICIT),
        "memory_error": False,
        "kv_tokens": kv_tokens,
        "preemptions": int(state.total[server.PREEMPTIONS]),
        "adapter_loads": int(state.total[server.LOADS]),
        "running_mean": float(run.sums[twin.RUNNING_S] / duration_s),
        "waiting_mean": float(run.sums[twin.WAITING_S] / duration_s),
        "adapters": {
            a.name: {"arrived": int(arrived_of[i]), "completed_share": round(float(share[i]), 4)}
            for i, a in enumerate(workload.adapters)
        },
        "duration_s": duration_s,
    }


def _unfinished(run: _Run, duration_s: float) -> float:
    """Requests expected to be unfinished at the end: a straight line through the second half of the run."""
    middle = run.sums[twin.LATE] / (duration_s / 2)
    slope = run.sums[twin.LATE_SLOPE] / ((duration_s / 2) ** 3 / 12)
    return max(float(middle + slope * duration_s / 4), 0.0)


def _penalised(ttft: server.F64, unfinished: float, arrived: int, duration_s: float) -> float | None:
    """Mean TTFT in milliseconds if every request that is never finished counts as the whole run (arXiv 2508.08343)."""
    if not arrived:
        return None
    mean = float(ttft.mean()) if ttft.size else duration_s
    return 1000 * (mean * max(arrived - unfinished, 0.0) + duration_s * min(unfinished, arrived)) / arrived


def _milliseconds(seconds: server.F64) -> dict[str, float | None]:
    if not seconds.size:
        return {"mean": None, "p50": None, "p99": None}
    middle, high = np.percentile(seconds, [50, 99])
    return {"mean": 1000 * float(seconds.mean()), "p50": 1000 * float(middle), "p99": 1000 * float(high)}


def _gap(gaps: server.F64, quantile: float) -> float | None:
    """A quantile of the gaps between tokens, in milliseconds, from their histogram."""
    total = gaps.sum()
    if total <= 0:
        return None
    place = int(np.searchsorted(np.cumsum(gaps), quantile * total))
    return float(1000 * twin.SHORTEST_GAP_S * 2 ** ((min(place, gaps.size - 1) + 0.5) / twin.BINS_PER_DOUBLING))
