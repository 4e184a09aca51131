"""What a vLLM server would do with a workload: the twin run once, and what a client would have measured."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltaworks.errors import WorkloadError, quoted
from deltaworks.serving import censored, server, starvation, twin
from deltaworks.serving.arrays import F64, I64
from deltaworks.serving.idle import alone
from deltaworks.serving.model_length import cut_to_length, is_beyond
from deltaworks.serving.profile import Profile, allowed_rank, check_max_rank
from deltaworks.serving.starvation import STARVED_DEFICIT
from deltaworks.serving.workload import Requests, Workload, requests_of

BASE_MODEL = "(base model)"
"""What the requests of a trace that name no adapter are called in an answer."""

SHORT = 0.1
"""A run is short if a long answer alone takes more than this share of it."""

LABEL_SETS = 1 << 19
UNLIMITED = 1 << 62
"""Stands for no limit in an int64."""
MOST = 1_000_000
"""The largest number in a configuration: memory grows with slots and adapters."""


@dataclass(frozen=True)
class Configuration:
    """How a server is started.

    Attributes:
        slots: `--max-loras`.
        max_rank: `--max-lora-rank`; None for the least that holds every adapter.
        served: `--max-cpu-loras`, adapters kept in host memory; None for all of the workload's (vLLM's own default is
            as many as slots).
        client_max_outstanding: Requests that the load generator can have open at once; it drops the others. None for
            no limit.
    """

    slots: int
    max_rank: int | None = None
    served: int | None = None
    client_max_outstanding: int | None = None


def simulate(
    workload: Workload,
    profile: Profile,
    configuration: Configuration,
    requests: Requests | None = None,
    *,
    by_adapter: bool = True,
) -> dict[str, Any]:
    """Run the twin; the answer is the JSON of `deltaworks simulate`.

    Args:
        workload: What the server is asked.
        profile: What it is.
        configuration: How it is started.
        requests: The workload's requests, where they are known already.
        by_adapter: Whether the answer holds ``adapters``, which takes a kilobyte and some time for each.

    Raises:
        WorkloadError: the configuration cannot serve the workload's adapters.
    """
    started = time.perf_counter()
    slots, max_rank = configuration.slots, _rank(workload, configuration)
    for name, value in vars(configuration).items():
        if value is not None and value < 1:
            raise WorkloadError(f"{name}: expected at least 1, not {quoted(value)}")
        if value is not None and value > MOST:
            raise WorkloadError(f"{name}: expected at most {MOST:,}, not {quoted(value)}")
    served = max(len(workload.adapters), slots) if configuration.served is None else configuration.served
    if served < slots:
        raise WorkloadError(
            f"served: vLLM keeps at least as many adapters in host memory (--max-cpu-loras) as there are slots; give"
            f" {slots} or more, not {served}"
        )
    if requests is None:
        requests = requests_of(workload, profile.output_share)
    requests = cut_to_length(requests, profile.server.max_model_len)
    kv_tokens = profile.kv_tokens(slots, max_rank)
    if not profile.starts(slots, max_rank):
        return _no_start(workload, requests, kv_tokens, by_adapter=by_adapter)
    run = _run(workload, requests, profile, slots, max_rank, served, configuration.client_max_outstanding)
    enough_s = enough_duration_s(run.state.prompt, run.state.output, profile, slots, max_rank)
    answer, services = _answer(workload, requests, run, kv_tokens, enough_s)
    if by_adapter:
        answer["adapters"] = _adapters(workload, services)
    return {**answer, "wall_s": time.perf_counter() - started}


@dataclass(frozen=True)
class _Run:
    """What a run of the twin left."""

    state: server.Server
    arrived: int
    arrival_s: F64
    first_token_s: F64
    finish_s: F64
    gaps: F64
    sums: F64
    too_long: I64


def _rank(workload: Workload, configuration: Configuration) -> int:
    needed = workload.max_rank
    if configuration.max_rank is None:
        return allowed_rank(needed)
    if configuration.max_rank < needed:
        raise WorkloadError(f"an adapter has rank {needed}, more than the maximum rank {configuration.max_rank}")
    return check_max_rank(configuration.max_rank)


def server_limits(profile: Profile, slots: int, max_rank: int, served: int, outstanding: int | None = None) -> I64:
    """The limits of a configured server, (`server.LIMITS`,) int64."""
    flags = profile.server
    limit = np.empty(server.LIMITS, np.int64)
    limit[server.MAX_SEQS], limit[server.MAX_TOKENS] = flags.max_num_seqs, flags.max_num_batched_tokens
    # One block is never given out: vLLM keeps it as a placeholder.
    limit[server.BLOCK] = flags.block_size
    limit[server.BLOCKS] = profile.kv_tokens(slots, max_rank) // flags.block_size - 1
    limit[server.SLOTS], limit[server.CPU_ADAPTERS] = slots, served
    limit[server.OUTSTANDING] = UNLIMITED if outstanding is None else outstanding
    return limit


def _run(
    workload: Workload, requests: Requests, profile: Profile, slots: int, max_rank: int, served: int,
    outstanding: int | None,
) -> _Run:  # fmt: skip
    limit = server_limits(profile, slots, max_rank, served, outstanding)
    room = int(limit[server.BLOCKS] * limit[server.BLOCK])
    fits = (requests.prompt + requests.output <= room) & ~is_beyond(requests, profile)
    kept = slice(None) if fits.all() else np.flatnonzero(fits)
    arrival_s, prompt, output = requests.arrival_s[kept], requests.prompt[kept], requests.output[kept]
    adapters = len(workload.adapters)
    scraped = profile.front_end.scrape_period_s > 0
    state = server.empty_server(
        requests.adapter[kept], prompt, output, adapters, limit, LABEL_SETS if scraped else 0
    )  # fmt: skip
    load_s, disk_s = profile.load_s(workload.ranks.astype(np.float64))
    first_token_s, finish_s = np.full(arrival_s.size, np.nan), np.full(arrival_s.size, np.nan)
    gaps, sums = np.zeros(twin.BINS), np.zeros(twin.SUMS)
    arrived = twin.run(
        state, arrival_s, load_s, disk_s, profile.costs(slots, max_rank), workload.duration_s, first_token_s, finish_s,
        gaps, sums,
    )  # fmt: skip
    check_conservation(state, arrived)
    return _Run(state, arrived, arrival_s, first_token_s, finish_s, gaps, sums, np.flatnonzero(~fits))


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


def _no_start(workload: Workload, requests: Requests, kv_tokens: int, *, by_adapter: bool) -> dict[str, Any]:
    """The answer for a server that has too little memory to start: nobody is served."""
    arrived = requests.arrival_s.size
    nothing = {"mean": None, "p50": None, "p99": None}
    groups = len(workload.adapters) + 1
    arrived_of = np.bincount(requests.adapter, minlength=groups)
    served = starvation.Service(
        arrived=arrived_of,
        completed=np.zeros(groups, np.int64),
        waiting=np.zeros(groups, np.int64),
        rejected=arrived_of,
        oldest_wait_s=np.zeros(groups),
        served_share=np.where(arrived_of > 0, 0.0, 1.0),
        starved=arrived_of > 0,
        unjudged=np.zeros(groups, bool),
    )
    return {
        "throughput_tps": 0.0,
        "input_throughput_tps": 0.0,
        "output_throughput_tps": 0.0,
        "offered_tps": requests.offered_tps(workload.duration_s),
        "offered_output_tps": float(requests.output.sum() / workload.duration_s),
        "ttft_ms": nothing,
        "ttft_completed_ms": nothing,
        "ttft_penalised_ms": 1000 * workload.duration_s,
        "itl_ms": nothing,
        "tpot_ms": nothing,
        "requests": {"arrived": arrived, "completed": 0, "running": 0, "waiting": 0, "rejected": arrived},
        **_verdict(workload, served),
        "starved_server": arrived > 0,
        "memory_error": True,
        "kv_tokens": max(kv_tokens, 0),
        "preemptions": 0,
        "adapter_loads": 0,
        "running_mean": 0.0,
        "waiting_mean": 0.0,
        "short": False,
        "least_duration_s": 0.0,
        "notes": list(workload.notes),
        "duration_s": workload.duration_s,
        **({"adapters": _adapters(workload, served)} if by_adapter else {}),
        "wall_s": 0.0,
    }


def _answer(
    workload: Workload, requests: Requests, run: _Run, kv_tokens: int, enough_s: float
) -> tuple[dict[str, Any], starvation.Service]:
    """What a run says of the server as a whole, and of each adapter."""
    state, duration_s = run.state, workload.duration_s
    done = np.flatnonzero(state.state == server.COMPLETED)
    prompt, output = state.prompt[done], state.output[done]
    completed_ttft = run.first_token_s[done] - run.arrival_s[done]
    throughput, offered = float((prompt.sum() + output.sum()) / duration_s), requests.offered_tps(duration_s)
    unfinished = min(_unfinished(run, duration_s), float(run.state.state.size))
    dropped = int((state.state == server.REJECTED).sum() + run.too_long.size)
    arrived = requests.arrival_s.size
    refused = starvation.Refused(
        requests.adapter[run.too_long], requests.prompt[run.too_long] + requests.output[run.too_long]
    )
    served = starvation.service(state, run.arrival_s, run.first_token_s, run.arrived, refused, duration_s)
    nobody_judged = bool(served.unjudged.any() and (served.unjudged == (served.arrived > 0)).all())
    answer = {
        "throughput_tps": throughput,
        "input_throughput_tps": float(prompt.sum() / duration_s),
        "output_throughput_tps": float(output.sum() / duration_s),
        "offered_tps": offered,
        "offered_output_tps": float(requests.output.sum() / duration_s),
        "ttft_ms": _ttft_ms(run, dropped, duration_s),
        "ttft_completed_ms": censored.statistics(completed_ttft),
        "ttft_penalised_ms": _penalised(completed_ttft, unfinished + dropped, arrived, duration_s),
        **_decoding(run, done, duration_s),
        "requests": {
            "arrived": arrived,
            "completed": done.size,
            "running": int(state.total[server.RUN]),
            "waiting": int(state.total[server.WAIT] + (state.state == server.NEVER).sum()),
            "rejected": dropped,
        },
        **_verdict(workload, served),
        "starved_server": bool(offered > 0 and 1 - throughput / offered >= STARVED_DEFICIT),
        "memory_error": False,
        "kv_tokens": kv_tokens,
        "preemptions": int(state.total[server.PREEMPTIONS]),
        "adapter_loads": int(state.total[server.LOADS]),
        "running_mean": float(run.sums[twin.RUNNING_S] / duration_s),
        "waiting_mean": float(run.sums[twin.WAITING_S] / duration_s),
        "short": duration_s < enough_s or nobody_judged,
        "least_duration_s": enough_s,
        "notes": [*workload.notes, *filter(None, [short_note(enough_s, duration_s)])],
        "duration_s": duration_s,
    }
    return answer, served


def enough_duration_s(prompt: I64, output: I64, profile: Profile, slots: int, max_rank: int) -> float:
    """Seconds that a run must last so that the 95th-percentile request, served alone, takes at most `SHORT` of it.

    Args:
        prompt: Prompt tokens of the requests, (n,) int64.
        output: Their output tokens, (n,) int64.
        profile: Of the server.
        slots: `--max-loras`.
        max_rank: `--max-lora-rank`.
    """
    if not prompt.size:
        return 0.0
    times = alone(profile, slots, max_rank, prompt, output)
    return float(np.percentile(times.first_s + times.decode_s, 95)) / SHORT


def short_note(enough_s: float, duration_s: float) -> str:
    """Says that a run is short against one answer, and which duration would be enough; empty if it is not."""
    if duration_s >= enough_s:
        return ""
    return (
        f"the run ({duration_s:g} s) is too short: 5% of requests take {enough_s * SHORT:.3g} s or longer even on an"
        f" idle server; use a duration of at least {_round_up(enough_s):,.0f} s"
    )


def _round_up(seconds: float) -> float:
    """The next number of seconds with two digits that count."""
    step = 10.0 ** max(math.floor(math.log10(seconds)) - 1, 0)
    return step * math.ceil(seconds / step)


def _verdict(workload: Workload, served: starvation.Service) -> dict[str, Any]:
    """Who starves, and of whom the run says nothing: ``starved``, and the names of the adapters."""
    names = [*(adapter.name for adapter in workload.adapters), BASE_MODEL]
    starved, unjudged = (
        [names[place] for place in np.flatnonzero(which)] for which in (served.starved, served.unjudged)
    )
    return {"starved": bool(starved), "starved_adapters": starved, "unjudged_adapters": unjudged}


def _adapters(workload: Workload, served: starvation.Service) -> dict[str, dict[str, Any]]:
    """What became of the requests of each adapter, and of the base model's where it has any."""
    names = [adapter.name for adapter in workload.adapters]
    if served.arrived[-1]:
        names.append(BASE_MODEL)
    completed = np.round(served.completed / np.maximum(served.arrived, 1), 4)
    columns = {
        "arrived": served.arrived,
        "completed_share": completed,
        "served_share": np.round(served.served_share, 4),
        "waiting": served.waiting,
        "rejected": served.rejected,
        "oldest_wait_s": np.round(served.oldest_wait_s, 3),
        "starved": served.starved,
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return {name: dict(zip(columns, row, strict=True)) for name, row in zip(names, rows, strict=False)}


def _ttft_ms(run: _Run, refused: int, duration_s: float) -> dict[str, float | None]:
    """TTFT of all requests: of those without a first token the time that they have waited, at least.

    A refused request never gets one; it counts with the whole duration, longer than any other.
    """
    ttft = run.first_token_s[: run.arrived] - run.arrival_s[: run.arrived]
    pending = np.isnan(ttft) & (run.state.state[: run.arrived] != server.REJECTED)
    so_far = duration_s - run.arrival_s[: run.arrived][pending]
    return censored.statistics(ttft[~np.isnan(ttft)], np.concatenate([so_far, np.full(refused, duration_s)]))


def _decoding(run: _Run, done: I64, duration_s: float) -> dict[str, Any]:
    """ITL and TPOT of the completed requests; where there are none, of those under way so far."""
    state, first, last, tokens = run.state, run.first_token_s, run.finish_s, run.state.output
    if not done.size:
        tokens = starvation.tokens_made(state, duration_s)
        done = np.flatnonzero((state.state == server.RUNNING) & (tokens > 1))
        last = np.full(first.size, duration_s)
    output, lasted = tokens[done], (last - first)[done]
    gaps = float((output - 1).sum())
    # Tokens that reached the client in one piece with others have no gap of their own.
    merged = float(run.sums[twin.MERGED]) / max(float(run.gaps.sum()), 1.0)
    decoded = output > 1
    return {
        "itl_ms": {
            "mean": 1000 * float(lasted.sum()) / (gaps * (1.0 - merged)) if gaps else None,
            "p50": _gap(run.gaps, 0.5),
            "p99": _gap(run.gaps, 0.99),
        },
        "tpot_ms": censored.statistics(lasted[decoded] / (output[decoded] - 1)),
    }


def _unfinished(run: _Run, duration_s: float) -> float:
    """Requests expected to be unfinished at the end: a straight line through the second half of the run."""
    middle = run.sums[twin.LATE] / (duration_s / 2)
    slope = run.sums[twin.LATE_SLOPE] / ((duration_s / 2) ** 3 / 12)
    return max(float(middle + slope * duration_s / 4), 0.0)


def _penalised(ttft: F64, unfinished: float, arrived: int, duration_s: float) -> float | None:
    """Mean TTFT in milliseconds if every request that is never finished counts as the whole run (arXiv 2508.08343)."""
    if not arrived:
        return None
    mean = float(ttft.mean()) if ttft.size else duration_s
    return 1000 * (mean * max(arrived - unfinished, 0.0) + duration_s * min(unfinished, arrived)) / arrived


def _gap(gaps: F64, quantile: float) -> float | None:
    """A quantile of the gaps between tokens, in milliseconds, from their histogram."""
    total = gaps.sum()
    if total <= 0:
        return None
    place = int(np.searchsorted(np.cumsum(gaps), quantile * total))
    return float(1000 * twin.SHORTEST_GAP_S * 2 ** ((min(place, gaps.size - 1) + 0.5) / twin.BINS_PER_DOUBLING))
