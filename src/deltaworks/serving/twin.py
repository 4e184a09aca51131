"""The digital twin: vLLM V1's scheduler with LoRA adapters, in simulated time.

A step of the engine serves running requests before waiting ones: each decode takes one token of the step's token
budget, prefills take the rest in chunks. KV blocks are given as tokens come; when none is free the request admitted
last is preempted, to be recomputed. At most ``max_loras`` distinct adapters are in a batch, and later requests of other
adapters pass those that must wait for a slot. Between two events nothing in the batch changes: a stretch of such steps
is one jump.

Source: how vLLM behaves (`v1/core/sched/scheduler.py`, `lora/worker_manager.py`, 0.8.5 and 0.32); the idea of a twin
and its four costs from arXiv 2508.08343, section 4.
"""

import math

import numpy as np

from deltaworks.checkpoints.jit import kernel
from deltaworks.serving.arrays import F64
from deltaworks.serving.server import (
    BLOCK,
    COMPLETED,
    CONTEXT,
    DECODES,
    DISTINCT,
    DONE,
    FREE,
    JUMPS,
    LABEL_SETS,
    MAX_SEQS,
    MAX_TOKENS,
    NEXT,
    OUTSTANDING,
    PARTIAL,
    REJECTED,
    RUN,
    STEP,
    STEPS,
    WAIT,
    Server,
    admit,
    enqueue,
    first_admissible,
    leave,
    load_joined,
    note_label,
    passed_over,
    preempt_last,
    start_decoding,
)  # fmt: skip

BASE, PER_DECODE, PER_PREFILL, PER_CONTEXT, EAGER, GRAPH_TOKENS = range(6)
LORA, PER_ADAPTER, LORA_DECODE, LORA_PREFILL, ADAPTER_TOKEN, SMALL, SMALL_ADAPTER, SMALL_TOKENS = range(6, 14)
QUEUE, PER_RUNNING, PER_SKIPPED, REQUEST, FIRST_REQUEST, PER_LABEL_SET, SCRAPE_PERIOD, MERGE_BATCH = range(14, 22)
DECODE_PREFILL = 22
COSTS = 23
"""Places in the vector of costs: seconds a step, a token, an adapter, ..., but for three that are counts."""

BUSY_S, RUNNING_S, WAITING_S, MERGED, LATE, LATE_SLOPE = range(6)
NEXT_SCRAPE, STALL_FROM, STALL_TO, LAST_STEP_S, LAST_DECODES = range(6, 11)
SUMS = 11
"""Places in the vector of sums: seconds, request-seconds, tokens; request-seconds of the second half of the run, and
their moment around its middle; then the front end's clock."""

BINS_PER_DOUBLING, BINS, SHORTEST_GAP_S = 48, 48 * 24, 1e-5
"""The histogram of gaps between tokens: logarithmic bins from 10 us, 1.5% wide."""


@kernel
def step_s(costs: F64, decodes: int, prefill: int, context: float, adapters: int, skipped: int) -> float:
    """Seconds of one step, model and scheduler together.

    Args:
        costs: (`COSTS`,) float64.
        decodes: Requests that decode one token.
        prefill: Prompt tokens processed.
        context: Tokens in the KV cache of the decoding requests.
        adapters: Distinct adapters in the batch.
        skipped: Waiting requests passed over.
    """
    seconds = costs[BASE] + costs[PER_DECODE] * decodes + costs[PER_PREFILL] * prefill + costs[PER_CONTEXT] * context
    seconds += costs[DECODE_PREFILL] * decodes * prefill
    if decodes + prefill > costs[GRAPH_TOKENS]:
        seconds += costs[EAGER]
    if adapters > 0:
        seconds += costs[LORA] + costs[PER_ADAPTER] * adapters + costs[ADAPTER_TOKEN] * adapters * (decodes + prefill)
        seconds += costs[LORA_DECODE] * decodes + costs[LORA_PREFILL] * prefill
        if decodes + prefill < costs[SMALL_TOKENS]:
            seconds += costs[SMALL] + costs[SMALL_ADAPTER] * adapters
    seconds += costs[QUEUE] + costs[PER_RUNNING] * decodes + costs[PER_SKIPPED] * skipped
    return float(seconds)


@kernel
def gap_bin(seconds: float) -> int:
    """The bin of the histogram that holds a gap between two tokens."""
    return int(min(int(math.log2(max(seconds, SHORTEST_GAP_S) / SHORTEST_GAP_S) * BINS_PER_DOUBLING), BINS - 1))


@kernel
def steps_until(first_s: float, growth_s: float, wanted_s: float, most: int) -> int:
    """The fewest steps that last ``wanted_s`` together, at least 1 and at most ``most``.

    Step i (from 0) lasts ``first_s + growth_s * i`` seconds.
    """
    half = first_s - growth_s / 2
    if most * (half + growth_s / 2 * most) < wanted_s:
        return most
    if growth_s > 0:
        guess = (math.sqrt(half * half + 2 * growth_s * max(wanted_s, 0.0)) - half) / growth_s
    else:
        guess = wanted_s / first_s
    steps = min(max(int(guess) - 1, 1), most)
    while steps < most and steps * (half + growth_s / 2 * steps) < wanted_s:
        steps += 1
    return steps


@kernel
def _render_metrics(server: Server, costs: F64, sums: F64, gaps: F64, until: float) -> None:
    """Let the front end render its metrics when somebody asks; it does nothing else meanwhile.

    Tokens that the engine makes in such a stall reach the client in one piece, if the batch is so small that the front
    end handles it without a pause.
    """
    while sums[NEXT_SCRAPE] <= until:
        stall = costs[PER_LABEL_SET] * server.total[LABEL_SETS]
        sums[STALL_FROM] = sums[NEXT_SCRAPE]
        sums[STALL_TO] = sums[STALL_FROM] + stall
        sums[NEXT_SCRAPE] = sums[STALL_TO] + costs[SCRAPE_PERIOD]
        decodes = sums[LAST_DECODES]
        if 0 < decodes <= costs[MERGE_BATCH] and stall > sums[LAST_STEP_S]:
            sums[MERGED] += decodes * (stall / sums[LAST_STEP_S] - 1)
            gaps[gap_bin(stall)] += decodes


@kernel
def _delivered(server: Server, costs: F64, sums: F64, gaps: F64, now: float) -> float:
    """When a token made now reaches the client."""
    _render_metrics(server, costs, sums, gaps, now)
    return float(sums[STALL_TO] if sums[STALL_FROM] <= now < sums[STALL_TO] else now)


@kernel
def _upcoming(arrival_s: F64, coming: int, taken: int, ready: float, duration_s: float) -> float:
    """When something next comes from outside: a request arrives, the front end hands one on, or all ends."""
    if coming == arrival_s.size:
        return duration_s
    return float(min(ready if taken > coming else arrival_s[coming], duration_s))


@kernel
def _make_room(server: Server) -> bool:
    """Give the decoding requests the blocks of this step, in order, preempting the last; whether any was preempted."""
    count, size, requests = server.total, server.limit[BLOCK], server.state.size
    need = server.crossing[count[STEP] % size]
    if need <= count[FREE]:
        count[FREE] -= need
        return False
    preempted = False
    item = server.batch[requests, NEXT]
    while item < requests:
        if item != count[PARTIAL] and (server.offset[item] + count[STEP]) % size == 0:
            victim = -1
            while count[FREE] == 0 and victim != item:
                victim = preempt_last(server)
                preempted = True
            if victim == item:
                break
            count[FREE] -= 1
        item = server.batch[item, NEXT]
    return preempted


@kernel
def _prefill(server: Server, item: int, done: int, budget: int) -> int:
    """Schedule the next chunk of a prefill; returns its tokens, or -1 where there are not blocks enough for it."""
    count, size = server.total, server.limit[BLOCK]
    tokens = min(server.prompt[item] + server.generated[item] - done, budget)
    need = (done + tokens + size - 1) // size - (done + size - 1) // size
    if need > count[FREE]:
        return -1
    count[FREE] -= need
    return int(tokens)


@kernel
def run(
    server: Server, arrival_s: F64, load_s: F64, disk_s: F64, costs: F64, duration_s: float,
    first_token_s: F64, finish_s: F64, gaps: F64, sums: F64,
) -> int:  # fmt: skip
    """Simulate a server from time 0 to ``duration_s``; returns the requests that arrived.

    Args:
        server: As `empty_server` makes it. Every request must fit into its blocks, ``MAX_SEQS <= MAX_TOKENS``.
        arrival_s: When the requests arrive, (n,) float64, ascending.
        load_s: Seconds to bring each adapter from host memory into a slot, (adapters,) float64.
        disk_s: Seconds to bring each from disk into host memory, (adapters,) float64.
        costs: (`COSTS`,) float64.
        duration_s: Simulated seconds.
        first_token_s: Out: when the client got the first token, (n,) float64, NaN where it did not.
        finish_s: Out: when it got the last, (n,) float64, NaN where it did not.
        gaps: Out: tokens by the gap before them, (`BINS`,) float64.
        sums: Out: (`SUMS`,) float64.
    """
    requests, adapters, count, limit = server.state.size, load_s.size, server.total, server.limit
    ring = server.ends.shape[0] - requests
    known = np.zeros(adapters + 1, np.bool_)
    known[adapters] = True
    prefilled, prefilled_tokens = np.empty(limit[MAX_SEQS], np.int64), np.empty(limit[MAX_SEQS], np.int64)
    now, blocked, coming, taken, outstanding = 0.0, 0.0, 0, 0, 0
    sums[:] = 0.0
    sums[NEXT_SCRAPE] = costs[SCRAPE_PERIOD] if costs[SCRAPE_PERIOD] > 0 else np.inf
    sums[STALL_TO] = -1.0
    while True:
        while coming < requests and arrival_s[coming] <= now:
            if taken == coming:
                # One turn of the front end's event loop: it looks at all that wait, then hands all of them on.
                blocked = _delivered(server, costs, sums, gaps, max(blocked, arrival_s[coming]))
                firsts = 0
                while taken < requests and (taken == coming or arrival_s[taken] <= blocked):
                    firsts += not known[server.adapter[taken]]
                    known[server.adapter[taken]] = True
                    taken += 1
                blocked += firsts * costs[FIRST_REQUEST]
            if blocked + costs[REQUEST] > now:
                break
            if outstanding == limit[OUTSTANDING]:
                server.state[coming] = REJECTED
            else:
                outstanding += 1
                enqueue(server, coming, False)
            coming += 1
        if now >= duration_s:
            break
        if count[RUN] == 0 and count[WAIT] == 0:
            now = _upcoming(arrival_s, coming, taken, blocked + costs[REQUEST], duration_s)
            continue

        server.clock[0] = now
        preempted = _make_room(server)
        decodes, ended, prefill, skipped = count[DECODES], 0, 0, 0
        budget = limit[MAX_TOKENS] - decodes
        if count[PARTIAL] >= 0 and budget > 0:
            item = count[PARTIAL]
            tokens = _prefill(server, item, count[DONE], budget)
            if tokens < 0:
                preempt_last(server)
                preempted = True
            else:
                budget -= tokens
                prefill += tokens
                count[DONE] += tokens
                if count[DONE] == server.prompt[item] + server.generated[item]:
                    prefilled[ended], prefilled_tokens[ended] = item, count[DONE]
                    ended += 1
        while not preempted and budget > 0 and count[WAIT] > 0 and count[RUN] < limit[MAX_SEQS]:
            item = first_admissible(server)
            skipped = passed_over(server, item)
            if item < 0:
                break
            tokens = _prefill(server, item, 0, budget)
            if tokens < 0:
                break
            admit(server, item)
            budget -= tokens
            prefill += tokens
            if tokens == server.prompt[item] + server.generated[item]:
                prefilled[ended], prefilled_tokens[ended] = item, tokens
                ended += 1
            else:
                count[PARTIAL], count[DONE] = item, tokens
        loading_s = load_joined(server, load_s, disk_s)
        note_label(server)

        context = float(count[CONTEXT])
        first_s = step_s(costs, decodes, prefill, context, count[DISTINCT], skipped) + loading_s
        steps, lasting_s, growth_s = 1, first_s, 0.0
        if prefill == 0 and not preempted and decodes > 0:
            while server.ends[requests + (count[STEP] + steps - 1) % ring, NEXT] >= requests:
                steps += 1
            growth_s = costs[PER_CONTEXT] * decodes
            upcoming = _upcoming(arrival_s, coming, taken, blocked + costs[REQUEST], duration_s)
            steps = steps_until(first_s, growth_s, upcoming - now, steps)
            steps = _with_blocks(server, steps)
            lasting_s = steps * (first_s + growth_s * (steps - 1) / 2)
        until = min(now + lasting_s, duration_s)
        sums[BUSY_S] += until - now
        sums[RUNNING_S] += count[RUN] * (until - now)
        sums[WAITING_S] += count[WAIT] * (until - now)
        since = max(now, duration_s / 2)
        if until > since:
            late = (count[RUN] + count[WAIT]) * (until - since)
            sums[LATE] += late
            sums[LATE_SLOPE] += late * ((until + since) / 2 - 0.75 * duration_s)
        if decodes > 0:
            gaps[gap_bin(lasting_s / steps)] += decodes * steps
        sums[LAST_STEP_S], sums[LAST_DECODES] = first_s + growth_s * (steps - 1), decodes
        now += lasting_s
        count[STEPS] += steps
        count[JUMPS] += 1
        if now > duration_s:
            # What was given to a step that does not end in time is still held.
            count[STEP] += steps
            for j in range(ended):
                server.offset[prefilled[j]] = prefilled_tokens[j] - count[STEP]
                if prefilled[j] == count[PARTIAL]:
                    count[PARTIAL], count[DONE] = -1, 0
            server.clock[0] = now
            break

        count[CONTEXT] += decodes * steps
        count[STEP] += steps - 1
        sentinel = requests + count[STEP] % ring
        item = server.ends[sentinel, NEXT]
        while item < requests:
            following = server.ends[item, NEXT]
            finish_s[item] = _delivered(server, costs, sums, gaps, now)
            server.state[item] = COMPLETED
            leave(server, item, count[STEP] + 1)
            outstanding -= 1
            item = following
        for j in range(ended):
            item = prefilled[j]
            if item == count[PARTIAL]:
                count[PARTIAL], count[DONE] = -1, 0
            server.generated[item] += 1
            if server.generated[item] == 1:
                first_token_s[item] = _delivered(server, costs, sums, gaps, now)
            start_decoding(server, item, prefilled_tokens[j])
            if server.generated[item] == server.output[item]:
                finish_s[item] = _delivered(server, costs, sums, gaps, now)
                server.state[item] = COMPLETED
                leave(server, item, count[STEP] + 1)
                outstanding -= 1
        count[STEP] += 1
    while coming < requests and arrival_s[coming] < duration_s:  # the front end was still busy
        if outstanding == limit[OUTSTANDING]:
            server.state[coming] = REJECTED
        else:
            outstanding += 1
        coming += 1
    return coming


@kernel
def _with_blocks(server: Server, steps: int) -> int:
    """As many of the next steps as there are blocks for, without preemption; the first step has its blocks."""
    count, size = server.total, server.limit[BLOCK]
    left = steps - 1
    step = count[STEP] + 1
    turns = min(left // size, count[FREE] // count[DECODES])
    count[FREE] -= turns * count[DECODES]
    taken = turns * size
    while taken < left and server.crossing[(step + taken) % size] <= count[FREE]:
        count[FREE] -= server.crossing[(step + taken) % size]
        taken += 1
    return int(taken + 1)
