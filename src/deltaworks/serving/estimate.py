"""What a server would settle at, without simulating it: the equilibrium of the twin's costs, in closed form.

In equilibrium a step lasts as long as the work that arrives during a step takes. That, how many slots the adapters
would like to hold at once, and how long an adapter waits for one, say nearly all about whether a server keeps up; they
are what the surrogate learns from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from deltaworks.checkpoints.jit import kernel
from deltaworks.serving import twin
from deltaworks.serving.arrays import F64, I64
from deltaworks.serving.lengths import Lengths
from deltaworks.serving.profile import Profile
from deltaworks.serving.workload import Workload

FEATURES = {
    "utilisation": "share of its time that the GPU needs for the traffic at the largest batch that its memory holds",
    "slot_wait": "how long an adapter waits for a slot in equilibrium, as a share of the duration",
    "crowded_wait": "the same if the server is already crowded, with a request running in every slot",
    "slot_load": "slots held if adapters wait a tenth of the duration for one, divided by the number of slots",
    "in_flight": "share of the requests that are under way, or wait for a slot, when time is up",
    "slot_pressure": "slots that adapters would hold at once if each had its own, divided by the number of slots",
    "kv_pressure": "KV tokens held in equilibrium, divided by those there are",
    "load_share": "share of the time spent on bringing adapters into slots",
    "startup": "time to look for all the adapters' tokenizers once, as a share of the duration",
    "token_share": "share of the time needed for tokens alone: no adapters, no cost of a step",
    "step_ms": "how long a step lasts in equilibrium, milliseconds",
    "running": "requests running in equilibrium",
    "slots": "max_loras",
    "adapters": "adapters with traffic",
    "adapters_per_slot": "adapters with traffic, divided by the number of slots",
    "max_rank": "max_lora_rank",
    "rate": "requests a second",
    "top_share": "the busiest adapter's share of the requests",
    "input_mean": "prompt tokens of a request, mean",
    "output_mean": "output tokens of a request, mean",
    "output_spread": "mean of squared output tokens, divided by the square of their mean",
    "duration_s": "seconds for which the server is asked",
}
"""What the surrogate knows of a server and its traffic, in this order."""

MONOTONE = ("utilisation", "slot_wait", "crowded_wait")
"""More of any of these never means more throughput, or less starvation."""

NO_MEMORY = 1000.0
"""The utilisation of a server that has too little memory to start."""

(_UTILISATION, _WAIT, _CROWDED, _LOAD, _IN_FLIGHT, _PRESSURE, _KV, _LOADS, _STARTUP, _TOKENS, _STEP, _RUNNING, _SLOTS,
 _ADAPTERS, _PER_SLOT, _RANK, _RATE, _TOP, _INPUT, _OUTPUT, _SPREAD, _DURATION) = range(len(FEATURES))  # fmt: skip
UTILISATION, SLOT_WAIT, SLOT_PRESSURE, STEP_MS = _UTILISATION, _WAIT, _PRESSURE, _STEP
"""Places of features that others read."""
_TURNS = 16


@dataclass(frozen=True)
class Traffic:
    """The traffic of adapters, as means: what the estimate needs to know of a workload.

    Attributes:
        rate: Requests/s of each adapter, (adapters,) float64.
        rank: Of each, (adapters,) float64.
        prompt: Mean prompt tokens, (adapters,) float64.
        output: Mean output tokens, (adapters,) float64.
        spread: Mean of squared output tokens over mean output tokens, (adapters,) float64.
        duration_s: Seconds.
    """

    rate: F64
    rank: F64
    prompt: F64
    output: F64
    spread: F64
    duration_s: float

    def scaled(self, factor: float) -> "Traffic":
        """The same at ``factor`` times the rates."""
        return Traffic(self.rate * factor, self.rank, self.prompt, self.output, self.spread, self.duration_s)

    def of(self, chosen: I64) -> "Traffic":
        """That of some adapters, by place."""
        return Traffic(
            self.rate[chosen], self.rank[chosen], self.prompt[chosen], self.output[chosen], self.spread[chosen],
            self.duration_s,
        )  # fmt: skip

    @cached_property
    def offered_tps(self) -> float:
        """Input and output tokens asked for, per second."""
        return float((self.rate * (self.prompt + self.output)).sum())


def traffic_of(workload: Workload, output_share: float = 1.0, longest: int | None = None) -> Traffic:
    """The traffic of a workload's adapters, in their order.

    Args:
        workload: It.
        output_share: As in a profile: of a data set's reference answers, how much the model generates.
        longest: The model's length, at which answers end; None for no limit.
    """
    if workload.trace is not None:
        return _traced(workload, longest)
    rows = []
    means: dict[int, tuple[float, float, float]] = {}
    for adapter in workload.adapters:
        lengths = adapter.lengths or workload.lengths
        assert lengths is not None
        rate = adapter.expected(workload.duration_s) / workload.duration_s
        if id(lengths) not in means:
            means[id(lengths)] = _means(lengths, output_share, longest)
        rows.append((rate, adapter.rank, *means[id(lengths)]))
    return _of_rows(rows, workload.duration_s)


def _means(lengths: Lengths, output_share: float, longest: int | None) -> tuple[float, float, float]:
    """Mean prompt tokens, mean output tokens, and mean squared output tokens over mean output tokens."""
    output = lengths.output * (output_share if lengths.stops_early else 1.0)
    if longest is not None:
        output = np.minimum(output, max(longest - float(lengths.prompt.mean()), 1.0))
    mean = float(output.mean())
    return float(lengths.prompt.mean()), mean, float((output**2).mean()) / mean


def _traced(workload: Workload, longest: int | None) -> Traffic:
    trace = workload.trace
    assert trace is not None
    nothing = np.empty(0, np.int64)
    rows = []
    for adapter in workload.adapters:
        own = trace.by_adapter.get(adapter.name, nothing)
        own = own[trace.arrival_s[own] < workload.duration_s]
        if not own.size:
            rows.append((0.0, adapter.rank, 1.0, 1.0, 1.0))
            continue
        output = trace.output[own].astype(np.float64)
        if longest is not None:
            output = np.minimum(output, np.maximum(longest - trace.prompt[own], 1))
        mean = float(output.mean())
        rows.append((
            own.size / workload.duration_s, adapter.rank, float(trace.prompt[own].mean()), mean,
            float((output**2).mean()) / mean,
        ))  # fmt: skip
    return _of_rows(rows, workload.duration_s)


def _of_rows(rows: Sequence[tuple[float, ...]], duration_s: float) -> Traffic:
    rate, rank, prompt, output, spread = np.ascontiguousarray(np.array(rows, np.float64).reshape(-1, 5).T)
    return Traffic(rate, rank, prompt, output, spread, duration_s)


def estimate(traffic: Traffic, profile: Profile, slots: int, max_rank: int) -> F64:
    """The `FEATURES` of a server, (features,) float64; without memory to start, its utilisation is `NO_MEMORY`."""
    if not traffic.rate.all():
        traffic = traffic.of(np.flatnonzero(traffic.rate))
    costs = profile.costs(slots, max_rank)
    kv_tokens = float(profile.kv_tokens(slots, max_rank)) if profile.starts(slots, max_rank) else 0.0
    load_s, _ = profile.load_s(traffic.rank)
    found = np.empty(len(FEATURES))
    features(
        traffic.rate, traffic.prompt, traffic.output, traffic.spread, load_s, costs, kv_tokens,
        float(profile.server.block_size), float(profile.server.max_num_seqs), slots, max_rank,
        traffic.duration_s, found,
    )  # fmt: skip
    return found


@kernel
def _step_s(costs: F64, decodes: float, prefill: float, context: float, adapters: float) -> float:
    """Mean seconds of a step of mean composition: as `twin.step_s`, with edges smoothed."""
    tokens = decodes + prefill
    seconds = costs[twin.BASE] + costs[twin.QUEUE]
    seconds += (costs[twin.PER_DECODE] + costs[twin.PER_RUNNING] + costs[twin.LORA_DECODE]) * decodes
    seconds += (costs[twin.PER_PREFILL] + costs[twin.LORA_PREFILL]) * prefill + costs[twin.PER_CONTEXT] * context
    seconds += costs[twin.DECODE_PREFILL] * decodes * prefill
    seconds += costs[twin.EAGER] * min(max(tokens / costs[twin.GRAPH_TOKENS] - 0.5, 0.0), 1.0)
    seconds += costs[twin.LORA] * min(adapters, 1.0)
    seconds += costs[twin.PER_ADAPTER] * adapters + costs[twin.ADAPTER_TOKEN] * adapters * tokens
    if tokens < costs[twin.SMALL_TOKENS]:
        seconds += costs[twin.SMALL] + costs[twin.SMALL_ADAPTER] * adapters
    return float(seconds)


@kernel
def _busy(rate: F64, output: F64, step_s: float) -> float:
    """Distinct adapters with a request running, each with a slot of its own: as many infinite-server queues."""
    found = 0.0
    for i in range(rate.size):
        found += 1.0 - math.exp(-rate[i] * output[i] * step_s)
    return found


@kernel
def _held(rate: F64, output: F64, step_s: float, wait_s: float, duration_s: float) -> float:
    """Slots held on average if an adapter waits so long for one, and all that wait with it join at once.

    A visit lasts while requests of the adapter are running, at most the whole duration: an infinite-server queue's busy
    period.
    """
    found = 0.0
    for i in range(rate.size):
        mean = min(rate[i] * output[i] * step_s, 50.0)
        visit = (math.exp(mean) - 1.0) / rate[i] * (1.0 + math.log(1.0 + rate[i] * wait_s))
        visit = min(visit, duration_s)
        found += visit / (1.0 / rate[i] + wait_s + visit)
    return found


@kernel
def _wait(rate: F64, output: F64, step_s: float, slots: int, duration_s: float) -> float:
    """How long adapters wait for one of the slots: not at all, or a thousandth to ten times the duration."""
    wait = 0.0
    if _held(rate, output, step_s, 0.0, duration_s) > slots:
        least, most = 1e-3 * duration_s, 10.0 * duration_s
        for _ in range(_TURNS):
            wait = math.sqrt(least * most)
            if _held(rate, output, step_s, wait, duration_s) > slots:
                least = wait
            else:
                most = wait
    return wait


@kernel
def features(
    rate: F64, prompt: F64, output: F64, spread: F64, load_s: F64, costs: F64, kv_tokens: float, block: float,
    max_seqs: float, slots: int, max_rank: int, duration_s: float, out: F64,
) -> None:  # fmt: skip
    """Fill in the `FEATURES` of a server.

    Args:
        rate: Requests/s of each adapter, (adapters,) float64; as the next four.
        prompt: Mean prompt tokens.
        output: Mean output tokens.
        spread: Mean of squared output tokens over the mean.
        load_s: Seconds to bring it into a slot.
        costs: Of the twin, (`twin.COSTS`,) float64.
        kv_tokens: KV tokens there are; 0 if the server does not start.
        block: KV tokens of a block.
        max_seqs: Requests that may run at once.
        slots: Adapter slots.
        max_rank: The server's maximum rank.
        duration_s: Seconds.
        out: Out: (features,) float64.
    """
    out[:] = 0.0
    out[_SLOTS], out[_ADAPTERS], out[_PER_SLOT], out[_RANK] = slots, rate.size, rate.size / slots, max_rank
    if kv_tokens <= 0 or rate.size == 0:
        out[_UTILISATION] = NO_MEMORY if rate.size else 0.0
        return
    total, prompts, outputs, spreads, top, loads = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(rate.size):
        total += rate[i]
        prompts += rate[i] * prompt[i]
        outputs += rate[i] * output[i]
        spreads += rate[i] * output[i] * spread[i]
        loads += load_s[i]
        top = max(top, rate[i])
    context = prompts / total + spreads / outputs / 2
    most = max(min(kv_tokens / (context + block / 2), max_seqs), 1.0)

    # The step that lasts as long as the work which arrives during it; at most that of the largest batch.
    longest = most / outputs
    step, own_step = 0.0, 0.0
    for _ in range(_TURNS):
        busy = _busy(rate, output, step)
        decodes = outputs * step
        step = min(_step_s(costs, decodes, prompts * step, decodes * context, min(busy, slots)), longest)
        busy = _busy(rate, output, own_step)
        decodes = outputs * own_step
        own_step = min(_step_s(costs, decodes, prompts * own_step, decodes * context, busy), longest)
    busy = min(_busy(rate, output, longest), slots)
    out[_UTILISATION] = _step_s(costs, most, prompts * longest, most * context, busy) / longest
    tokens_s = _step_s(costs, most, prompts * longest, most * context, 0.0) - costs[twin.BASE]
    out[_TOKENS] = tokens_s / longest
    out[_PRESSURE] = _busy(rate, output, own_step) / slots
    # While some adapters wait, the others have the GPU to themselves.
    active = min(1.0, slots / max(_busy(rate, output, own_step), 1e-12))
    lighter = 0.0
    for _ in range(_TURNS):
        decodes = active * outputs * lighter
        busy = min(_busy(rate, output, lighter) * active, slots)
        lighter = min(_step_s(costs, decodes, active * prompts * lighter, decodes * context, busy), longest)
    wait = _wait(rate, output, lighter, slots, duration_s)
    out[_CROWDED] = _wait(rate, output, step, slots, duration_s) / duration_s
    out[_WAIT] = wait / duration_s
    out[_LOAD] = _held(rate, output, lighter, 0.1 * duration_s, duration_s) / slots
    out[_IN_FLIGHT] = (outputs / total * step + wait) / duration_s
    visits = 0.0
    for i in range(rate.size):
        mean = rate[i] * output[i] * step
        visits += rate[i] / (math.exp(min(mean, 50.0)) + rate[i] * wait)
    absent = max(1.0 - slots / rate.size, 0.0)
    out[_LOADS] = visits * absent * loads / rate.size
    out[_STARTUP] = rate.size * costs[twin.FIRST_REQUEST] / duration_s
    out[_STEP], out[_RUNNING] = 1000.0 * step, outputs * step
    out[_KV] = outputs * step / most
    out[_RATE], out[_TOP], out[_INPUT], out[_OUTPUT] = total, top / total, prompts / total, outputs / total
    out[_SPREAD], out[_DURATION] = spreads * total / outputs**2, duration_s
