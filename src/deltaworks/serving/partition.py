"""Ways to deal adapters to a given number of GPUs."""

from collections.abc import Sequence

import numpy as np

from deltaworks.serving import twin
from deltaworks.serving.arrays import F64, I64
from deltaworks.serving.estimate import STEP_MS, Traffic, estimate
from deltaworks.serving.parts import GOLDEN, Part, cut
from deltaworks.serving.profile import Profile, allowed_rank

COMPUTE, MEMORY, ADAPTER, FRONT_END = range(4)
"""Columns of `resources`: the model's time for tokens, a step's fixed time by the KV cache that is held, the time of
one more adapter in the batch, and the API server's time."""

_SHARPNESS = 8.0
_CRUMB = 0.01


def resources(traffic: Traffic, profile: Profile, gpus: int) -> F64:
    """Estimated load of each adapter on a busy GPU: seconds per second of four resources, (adapters, 4) float64.

    An adapter costs the time of its tokens and, for every step in which it is busy, the time of one more adapter in the
    batch; how long a step is follows from ``1 / gpus`` of all the traffic. What prompts and decoding requests cost
    beside each other (``decode_prefill``) is shared equally between the two. On a busy GPU the KV cache is full, so the
    fixed time of a step is shared in proportion to the KV cache that requests hold. The API server works beside the
    GPU, so that either may be the one that limits a server.

    Args:
        traffic: Of all adapters.
        profile: Of the GPU.
        gpus: Over which the traffic is spread.
    """
    found = np.zeros((traffic.rate.size, 4))
    rank = allowed_rank(int(traffic.rank.max(initial=1)))
    busy = np.flatnonzero(traffic.rate)
    if not busy.size:
        return found
    count = max(round(busy.size / gpus), 1)
    mix = traffic.of(busy[np.linspace(0, busy.size - 1, count).astype(np.int64)])
    mix = mix.scaled(float(traffic.rate.sum() / gpus / mix.rate.sum()))
    slots = max(min(count, profile.most_slots(rank)), 1)
    step_s = max(estimate(mix, profile, slots, rank)[STEP_MS] / 1000.0, 1e-3)
    costs = profile.costs(slots, rank)
    held_tokens = traffic.output * (traffic.prompt + traffic.spread / 2 + profile.server.block_size / 2)
    token = (costs[twin.PER_DECODE] + costs[twin.PER_RUNNING] + costs[twin.LORA_DECODE]) * traffic.output
    token += (costs[twin.PER_PREFILL] + costs[twin.LORA_PREFILL]) * traffic.prompt
    # Decoding requests and prompt tokens in a mean step of one GPU.
    in_step = step_s * traffic.rate / gpus
    decodes, prefill = float((in_step * traffic.output).sum()), float((in_step * traffic.prompt).sum())
    token += costs[twin.DECODE_PREFILL] * (decodes * traffic.prompt + prefill * traffic.output) / 2
    found[:, COMPUTE] = traffic.rate * (token + costs[twin.PER_CONTEXT] * held_tokens)
    fixed_s = costs[twin.BASE] + costs[twin.QUEUE] + costs[twin.LORA]
    kv_share = np.maximum(
        held_tokens / max(profile.kv_tokens(slots, rank), 1), traffic.output / profile.server.max_num_seqs
    )
    found[:, MEMORY] = traffic.rate * fixed_s * kv_share
    held = 1.0 - np.exp(-traffic.rate * traffic.output * step_s)
    own_rank = np.array([allowed_rank(int(r)) for r in traffic.rank])
    per_adapter = {r: profile.costs(slots, r)[twin.PER_ADAPTER] for r in np.unique(own_rank).tolist()}
    found[:, ADAPTER] = held * np.array([per_adapter[r] for r in own_rank.tolist()]) / step_s
    found[:, FRONT_END] = traffic.rate * costs[twin.REQUEST]
    return found


def weights(traffic: Traffic, profile: Profile, gpus: int) -> F64:
    """The share of a GPU that each adapter costs, about: (adapters,) float64, next to nothing without traffic.

    It is the share of the GPU's time, or of the API server's where that limits the servers; where both are near
    their limits, it is a mean of the two.

    Args:
        traffic: Of all adapters.
        profile: Of the GPU.
        gpus: Over which the traffic is spread.
    """
    taken = resources(traffic, profile, gpus)
    gpu, front_end = taken[:, :FRONT_END].sum(1), taken[:, FRONT_END]
    total = np.array([gpu.sum(), front_end.sum()])
    if not total.any():
        return np.full(traffic.rate.size, 1e-9)
    # The gradient of a norm of both loads: that of their maximum, without its jump.
    norm = float((total**_SHARPNESS).sum() ** (1.0 / _SHARPNESS))
    mix = (total / norm) ** (_SHARPNESS - 1.0)
    return np.asarray(gpu * mix[0] + front_end * mix[1] + 1e-9)


def balanced(weight: F64, capacity: F64, requests: F64, piece: float = 1.0) -> list[Part]:
    """Each adapter to the GPU that is then the least loaded, heaviest adapters first (LPT).

    An adapter heavier than ``piece`` of the load that each GPU should have is split into equal shares of at most that
    much, each on another GPU.

    Args:
        weight: Of the adapters, (adapters,) float64.
        capacity: Of the GPUs, (gpus,) float64.
        requests: Expected of the adapters, (adapters,) float64: every piece gets at least one.
        piece: How large a piece may be.
    """
    gpus = capacity.size
    even = float(weight.sum() / gpus)
    count = np.minimum(_pieces(weight, requests, piece * even), gpus)
    items = sorted(
        ((float(weight[a] / count[a]), int(a)) for a in range(weight.size) for _ in range(count[a])),
        key=lambda item: (-item[0], item[1]),
    )
    load, numbers, shares = np.zeros(gpus), np.zeros(gpus), []
    taken: dict[int, list[int]] = {}
    for size, adapter in items:
        after = np.round((load + size) / capacity, 12)
        if count[adapter] > 1:
            after[taken.setdefault(adapter, [])] = np.inf
        least = np.flatnonzero(after == after.min())
        # Of those that would be loaded alike, the one with the fewest adapters.
        gpu = int(least[np.argmin(numbers[least])])
        load[gpu] += size
        numbers[gpu] += 1
        if count[adapter] > 1:
            taken[adapter].append(gpu)
        shares.append((gpu, adapter, 1.0 / count[adapter]))
    return cut(shares, gpus)


def _pieces(weight: F64, requests: F64, largest: float) -> I64:
    """Into how many pieces of at most ``largest`` weight each adapter is split, (adapters,) int64."""
    wanted = np.ceil(weight / largest - 1e-9)
    return np.maximum(np.minimum(wanted, np.floor(requests)), 1).astype(np.int64)


def by_rank(rank: F64, weight: F64, requests: F64, capacity: F64, piece: float) -> list[Part]:
    """Adapters of like rank together, for a server pays for its largest one; hot and cold ones alternate.

    They are laid out in order of rank, and the row is cut into runs of the loads that the GPUs should have.

    Args:
        rank: Of the adapters, (adapters,) float64.
        weight: (adapters,) float64.
        requests: Expected of the adapters, (adapters,) float64: every piece gets at least one.
        capacity: Of the GPUs, (gpus,) float64.
        piece: How large a share of a GPU's load a piece of an adapter may be.
    """
    even = float(weight.sum() / capacity.size)
    count = _pieces(weight, requests, piece * even)
    row: list[tuple[int, float]] = []
    for own in sorted({allowed_rank(int(r)) for r in rank}):
        members = [i for i in np.argsort(-weight, kind="stable") if allowed_rank(int(rank[i])) == own]
        pieces = [(int(i), 1.0 / count[i]) for i in members for _ in range(count[i])]
        # Every stretch of this order has its share of hot and of cold ones.
        row += [pieces[place] for place in interleaved(len(pieces))]
    ends = np.cumsum(capacity) / capacity.sum() * weight.sum()
    shares: dict[tuple[int, int], float] = {}
    at = 0.0
    for adapter, share in row:
        middle = at + weight[adapter] * share / 2
        gpu = min(int(np.searchsorted(ends, middle)), capacity.size - 1)
        shares[gpu, adapter] = shares.get((gpu, adapter), 0.0) + share
        at += float(weight[adapter] * share)
    return cut([(gpu, adapter, share) for (gpu, adapter), share in shares.items()], capacity.size)


def in_a_row(row: Sequence[tuple[int, float]], weight: F64, requests: F64, capacity: F64) -> list[Part]:
    """Pieces of adapters laid out in a row, and the row cut where a GPU is full, so that few adapters are on two GPUs.

    A piece across a cut is split, unless one side would have next to nothing of it, or less than one request; then the
    other side takes it whole.

    Args:
        row: ``(adapter, share)`` in their order; the shares of an adapter add up to 1.
        weight: Of the adapters, (adapters,) float64.
        requests: Expected of the adapters, (adapters,) float64: every piece gets at least one.
        capacity: Of the GPUs, (gpus,) float64.
    """
    ends = np.cumsum(capacity) / capacity.sum() * weight.sum()
    crumb = _CRUMB * float(weight.sum()) / capacity.size
    shares: dict[tuple[int, int], float] = {}
    at, gpu = 0.0, 0
    for adapter, share in row:
        whole = float(weight[adapter])
        left = whole * share
        least = max(crumb, whole / max(float(requests[adapter]), 1.0))
        while gpu < capacity.size - 1 and at + left > ends[gpu] + crumb:
            room = max(float(ends[gpu]) - at, 0.0)
            if left < 2 * least:
                room = left if room >= left / 2 else 0.0
            else:
                room = min(room, left - least) if room >= least else 0.0
            if room > 0.0:
                shares[gpu, adapter] = shares.get((gpu, adapter), 0.0) + room / whole
                at, left = at + room, left - room
            if left <= 0.0:
                break
            gpu += 1
        if left > 0.0:
            shares[gpu, adapter] = shares.get((gpu, adapter), 0.0) + left / whole
            at += left
    return cut([(gpu, adapter, share) for (gpu, adapter), share in shares.items()], capacity.size)


def interleaved(count: int) -> I64:
    """An order of so many places, (count,) int64, of which every stretch has its share of the first and of the last."""
    return np.argsort((np.arange(count) * GOLDEN) % 1.0, kind="stable").astype(np.int64)


def counted(adapters: int, gpus: int) -> list[Part]:
    """Equal numbers of adapters per GPU, in order of their names."""
    return cut([(i * gpus // adapters, i, 1.0) for i in range(adapters)], gpus)


def dealt(order: Sequence[int] | I64, gpus: int) -> list[Part]:
    """Adapters dealt out in turn."""
    return cut([(turn % gpus, int(adapter), 1.0) for turn, adapter in enumerate(order)], gpus)
