"""The state of a simulated server, and what may happen to it: requests queue, join the batch and leave it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import kernel
from deltaworks.serving.arrays import F64, I64

PREVIOUS, NEXT = 0, 1
NEVER, COMPLETED, RUNNING, WAITING, REJECTED = -1, 0, 1, 2, 3
"""What became of a request (`Server.state`)."""

WAIT, RUN, DECODES, CONTEXT, FREE, DISTINCT, FIRST, LAST, PARTIAL, DONE, STEP, IN_SLOTS, IN_HOST = range(13)
PREEMPTIONS, LOADS, DISK_LOADS, STEPS, MOST_DISTINCT, LABEL_SETS, JOINED, JUMPS = range(13, 21)
COUNTS = 21
"""Places in `Server.total`: requests waiting and running; those that decode, and the tokens in their KV cache; free
blocks; distinct adapters in the batch; places of the queue's ends; the request whose prefill is unfinished (-1 for
none) and its tokens done; the step; adapters in slots and in host memory. Then totals, and adapters new in a step."""

MAX_SEQS, MAX_TOKENS, BLOCK, BLOCKS, SLOTS, CPU_ADAPTERS, OUTSTANDING = range(7)
LIMITS = 7
"""Places in `Server.limit`."""


class Server(NamedTuple):
    """One server with its requests. Lists are circular and doubly linked, their sentinels behind the requests.

    Attributes:
        adapter: Adapter of each request, (n,) int64; the number of adapters stands for the base model.
        prompt: Prompt tokens, (n,) int64.
        output: Tokens to generate, (n,) int64.
        limit: (`LIMITS`,) int64.
        total: (`COUNTS`,) int64.
        state: What became of each request, (n,) int64.
        queue: The waiting requests in order, (n + 1, 2) int64.
        own: The same for each adapter, (n + adapters + 1, 2) int64.
        batch: The running requests in order of admission, (n + 1, 2) int64.
        ends: Decoding requests by the step in which they finish, modulo the ring, (n + ring, 2) int64.
        place: Order in the queue, (n,) int64.
        generated: Tokens generated when the request last began to decode, (n,) int64.
        offset: Tokens of a decoding request in the KV cache before step s, less s, (n,) int64.
        crossing: Decoding requests that need a new block in steps of each phase, (block size,) int64.
        running_of: Running requests of each adapter, (adapters + 1,) int64.
        waiting_of: Waiting requests of each adapter, (adapters + 1,) int64.
        distinct: The adapters in the batch, (slots + 1,) int64.
        spot: Where each is in `distinct`, (adapters,) int64.
        in_slot: Whether an adapter is in a slot, (adapters,) bool.
        in_host: Whether it is in host memory, (adapters,) bool.
        used_at: The last step in which it was used, before those in which it is in the batch, (adapters,) int64.
        turn: Its place in the order in which a batch's adapters are touched, (adapters,) int64.
        fresh: Whether it joined the batch in this step and was not touched yet, (adapters,) bool.
        joined: Adapters that joined the batch in this step, (slots + 1,) int64.
        label: Hash of the sets of running and of waiting adapters, (1,) uint64.
        labels: Those that were seen, an open-addressed set, uint64; of size 1 if nobody counts them.
        clock: When the current step began, seconds, (1,) float64; at last, when a step ended that time did not allow.
        preempted_s: When each request was last preempted, seconds, (n,) float64; NaN where it never was.
    """

    adapter: I64
    prompt: I64
    output: I64
    limit: I64
    total: I64
    state: I64
    queue: I64
    own: I64
    batch: I64
    ends: I64
    place: I64
    generated: I64
    offset: I64
    crossing: I64
    running_of: I64
    waiting_of: I64
    distinct: I64
    spot: I64
    in_slot: NDArray[np.bool_]
    in_host: NDArray[np.bool_]
    used_at: I64
    turn: I64
    fresh: NDArray[np.bool_]
    joined: I64
    label: NDArray[np.uint64]
    labels: NDArray[np.uint64]
    clock: F64
    preempted_s: F64


def _lists(requests: int, lists: int) -> I64:
    links = np.empty((requests + lists, 2), np.int64)
    links[requests:] = np.arange(requests, requests + lists)[:, None]
    return links


def empty_server(adapter: I64, prompt: I64, output: I64, adapters: int, limit: I64, label_sets: int = 0) -> Server:
    """A server before its first request.

    Args:
        adapter: Adapter of each request, (n,) int64, in order of arrival; ``adapters`` stands for the base model.
        prompt: Prompt tokens, (n,) int64.
        output: Tokens to generate, (n,) int64.
        adapters: How many adapters there are.
        limit: (`LIMITS`,) int64.
        label_sets: Room to count the sets of adapters that were in a batch, a power of two; 0 not to count.
    """
    requests = adapter.size
    ring = 1 << int(output.max(initial=1)).bit_length()
    count = np.zeros(COUNTS, np.int64)
    count[FREE], count[PARTIAL] = limit[BLOCKS], -1
    slots = int(limit[SLOTS])
    return Server(
        adapter=adapter,
        prompt=prompt,
        output=output,
        limit=limit,
        total=count,
        state=np.full(requests, NEVER),
        queue=_lists(requests, 1),
        own=_lists(requests, adapters + 1),
        batch=_lists(requests, 1),
        ends=_lists(requests, ring),
        place=np.empty(requests, np.int64),
        generated=np.zeros(requests, np.int64),
        offset=np.empty(requests, np.int64),
        crossing=np.zeros(int(limit[BLOCK]), np.int64),
        running_of=np.zeros(adapters + 1, np.int64),
        waiting_of=np.zeros(adapters + 1, np.int64),
        distinct=np.empty(slots + 1, np.int64),
        spot=np.empty(adapters, np.int64),
        in_slot=np.zeros(adapters, np.bool_),
        in_host=np.zeros(adapters, np.bool_),
        used_at=np.full(adapters, -1),
        turn=turns(adapters),
        fresh=np.zeros(adapters, np.bool_),
        joined=np.empty(slots + 1, np.int64),
        label=np.zeros(1, np.uint64),
        labels=np.zeros(max(label_sets, 1), np.uint64),
        clock=np.zeros(1),
        preempted_s=np.full(requests, np.nan),
    )


@kernel
def _insert(links: I64, item: int, behind: int) -> None:
    following = links[behind, NEXT]
    links[item, PREVIOUS], links[item, NEXT] = behind, following
    links[behind, NEXT] = links[following, PREVIOUS] = item


@kernel
def _remove(links: I64, item: int) -> None:
    previous, following = links[item, PREVIOUS], links[item, NEXT]
    links[previous, NEXT], links[following, PREVIOUS] = following, previous


@kernel
def _mixed(value: int) -> np.uint64:
    """A 64-bit number that looks random, one for each small number (the finaliser of splitmix64)."""
    mixed = np.uint64(value + 1) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@kernel
def turns(adapters: int) -> I64:
    """The order in which the adapters of a batch are touched: in vLLM that of a hash set, any but always the same."""
    keys = np.empty(adapters, np.uint64)
    for adapter in range(adapters):
        keys[adapter] = _mixed(adapter)
    places = np.empty(adapters, np.int64)
    order = np.argsort(keys)
    for place in range(adapters):
        places[order[place]] = place
    return places


@kernel
def enqueue(server: Server, item: int, first: bool) -> None:
    """Put a request at the back of the queue, or before all others."""
    requests, adapter = server.state.size, server.adapter[item]
    if first:
        server.total[FIRST] -= 1
        server.place[item] = server.total[FIRST]
        _insert(server.queue, item, requests)
        _insert(server.own, item, requests + adapter)
    else:
        server.total[LAST] += 1
        server.place[item] = server.total[LAST]
        _insert(server.queue, item, server.queue[requests, PREVIOUS])
        _insert(server.own, item, server.own[requests + adapter, PREVIOUS])
    server.state[item] = WAITING
    server.total[WAIT] += 1
    server.waiting_of[adapter] += 1
    if server.waiting_of[adapter] == 1:
        server.label[0] ^= _mixed(2 * adapter)


@kernel
def first_admissible(server: Server) -> int:
    """The first waiting request whose adapter is in the batch or may still join it; -1 if there is none."""
    requests, adapters = server.state.size, server.spot.size
    if server.total[DISTINCT] < server.limit[SLOTS]:
        item = server.queue[requests, NEXT]
        return int(item) if item < requests else -1
    best = server.own[requests + adapters, NEXT]
    for j in range(server.total[DISTINCT]):
        item = server.own[requests + server.distinct[j], NEXT]
        if item < requests and (best >= requests or server.place[item] < server.place[best]):
            best = item
    return int(best) if best < requests else -1


@kernel
def passed_over(server: Server, item: int) -> int:
    """Waiting requests that the scheduler looks at before this one, at most; all of them if it is -1."""
    if item < 0:
        return int(server.total[WAIT])
    head = server.queue[server.state.size, NEXT]
    return int(min(server.total[WAIT], server.place[item] - server.place[head]))


@kernel
def admit(server: Server, item: int) -> None:
    """Move a request from the queue to the back of the batch."""
    requests, adapter, count = server.state.size, server.adapter[item], server.total
    _remove(server.queue, item)
    _remove(server.own, item)
    _insert(server.batch, item, server.batch[requests, PREVIOUS])
    server.state[item] = RUNNING
    count[WAIT] -= 1
    count[RUN] += 1
    server.waiting_of[adapter] -= 1
    if server.waiting_of[adapter] == 0:
        server.label[0] ^= _mixed(2 * adapter)
    server.running_of[adapter] += 1
    if server.running_of[adapter] == 1 and adapter < server.spot.size:
        server.label[0] ^= _mixed(2 * adapter + 1)
        server.distinct[count[DISTINCT]] = adapter
        server.spot[adapter] = count[DISTINCT]
        count[DISTINCT] += 1
        count[MOST_DISTINCT] = max(count[MOST_DISTINCT], count[DISTINCT])
        server.joined[count[JOINED]] = adapter
        count[JOINED] += 1


@kernel
def start_decoding(server: Server, item: int, tokens: int) -> None:
    """A prefill of so many tokens ended in this step; from the next one on the request decodes."""
    count, requests, step = server.total, server.state.size, server.total[STEP]
    server.offset[item] = tokens - (step + 1)
    server.crossing[(-server.offset[item]) % server.limit[BLOCK]] += 1
    count[DECODES] += 1
    count[CONTEXT] += tokens
    ring = server.ends.shape[0] - requests
    last = step + server.output[item] - server.generated[item]
    _insert(server.ends, item, requests + last % ring)


@kernel
def leave(server: Server, item: int, before: int) -> None:
    """Take a request out of the batch before step ``before``, and its blocks with it."""
    count, size, adapter = server.total, server.limit[BLOCK], server.adapter[item]
    if item == count[PARTIAL]:
        tokens = count[DONE]
        count[PARTIAL], count[DONE] = -1, 0
    else:
        tokens = server.offset[item] + before
        server.crossing[(-server.offset[item]) % size] -= 1
        count[DECODES] -= 1
        count[CONTEXT] -= tokens
        _remove(server.ends, item)
    _remove(server.batch, item)
    count[FREE] += (tokens + size - 1) // size
    count[RUN] -= 1
    server.running_of[adapter] -= 1
    if server.running_of[adapter] == 0 and adapter < server.spot.size:
        server.label[0] ^= _mixed(2 * adapter + 1)
        count[DISTINCT] -= 1
        moved = server.distinct[count[DISTINCT]]
        server.distinct[server.spot[adapter]], server.spot[moved] = moved, server.spot[adapter]
        server.used_at[adapter] = before - 1


@kernel
def preempt_last(server: Server) -> int:
    """Send the request that was admitted last back to the head of the queue; what it generated it keeps."""
    item = server.batch[server.state.size, PREVIOUS]
    step = server.total[STEP]
    if item != server.total[PARTIAL]:
        # The first token came with the prefill, the others one a step since.
        held = server.offset[item] + step
        server.generated[item] = held - server.prompt[item] + 1
    leave(server, item, step)
    enqueue(server, item, True)
    server.preempted_s[item] = server.clock[0]
    server.total[PREEMPTIONS] += 1
    return int(item)


@kernel
def _touched(server: Server, adapter: int, served: int) -> int:
    """When an adapter was last touched, for comparison; ``served`` is the largest rank already touched in this step."""
    adapters, rank = server.spot.size, server.turn[adapter]
    if server.running_of[adapter] == 0 or server.fresh[adapter]:
        return int(server.used_at[adapter] * adapters + rank)
    return int((server.total[STEP] - (rank > served)) * adapters + rank)


@kernel
def _least_recent(server: Server, among: NDArray[np.bool_], served: int) -> int:
    """The adapter untouched for longest among some."""
    best, best_touched = -1, 0
    for adapter in range(among.size):
        if among[adapter]:
            touched = _touched(server, adapter, served)
            if best < 0 or touched < best_touched:
                best, best_touched = adapter, touched
    return best


@kernel
def load_joined(server: Server, load_s: F64, disk_s: F64) -> float:
    """Bring the adapters that joined the batch in this step into slots; returns the seconds that takes.

    vLLM touches the adapters of a batch one after another and, where a slot is wanted, empties the one untouched for
    longest, even if its adapter has its turn later in the same step: it is then loaded again, at the cost of the next.
    With as many adapters in the batch as slots, one new adapter so costs a chain of loads.
    """
    total = server.total
    missing = False
    for j in range(total[JOINED]):
        server.fresh[server.joined[j]] = True
        missing = missing or not server.in_slot[server.joined[j]]
    seconds = 0.0
    if missing:
        order = server.distinct[: total[DISTINCT]].copy()
        order = order[np.argsort(server.turn[order])]
        for adapter in order:
            served = server.turn[adapter] - 1
            if not server.in_host[adapter]:
                if total[IN_HOST] == server.limit[CPU_ADAPTERS]:
                    victim = _least_recent(server, server.in_host, served)
                    server.in_host[victim] = False
                    total[IN_HOST] -= 1
                    if server.in_slot[victim]:
                        server.in_slot[victim] = False
                        total[IN_SLOTS] -= 1
                server.in_host[adapter] = True
                total[IN_HOST] += 1
                total[DISK_LOADS] += 1
                seconds += disk_s[adapter]
            if not server.in_slot[adapter]:
                if total[IN_SLOTS] == server.limit[SLOTS]:
                    server.in_slot[_least_recent(server, server.in_slot, served)] = False
                    total[IN_SLOTS] -= 1
                server.in_slot[adapter] = True
                total[IN_SLOTS] += 1
                total[LOADS] += 1
                seconds += load_s[adapter]
            server.fresh[adapter] = False
    for j in range(total[JOINED]):
        server.fresh[server.joined[j]] = False
    total[JOINED] = 0
    return seconds


@kernel
def note_label(server: Server) -> None:
    """Count the set of adapters in the batch and in the queue, if it is new."""
    room = server.labels.size
    if room == 1 or server.total[LABEL_SETS] * 2 >= room:
        return
    key = server.label[0] | np.uint64(1)
    spot = np.int64((key >> np.uint64(1)) & np.uint64(room - 1))
    while server.labels[spot] != 0:
        if server.labels[spot] == key:
            return
        spot = (spot + 1) & (room - 1)
    server.labels[spot] = key
    server.total[LABEL_SETS] += 1
