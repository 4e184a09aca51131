"""Placing adapters on the fewest GPUs, or the cheapest, accepted by the twin.

For a number of GPUs there are several ways to deal the adapters: balanced by the GPU time that each costs, hot ones
split or not; those of like rank together; and the simple ways that people use. The surrogate proposes slots for every
GPU, the twin is asked, and a placement counts only when it accepts every GPU with all the headroom. Numbers of GPUs are
tried from the lower bound up.

Source: greedy placement checked by a twin is the idea of arXiv 2508.08343 and 2602.24044.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

import numpy as np

from deltaworks.errors import PlacementError
from deltaworks.serving import partition
from deltaworks.serving.bound import Capacities, fewest
from deltaworks.serving.estimate import Traffic
from deltaworks.serving.judge import HOPELESS, SLOTS, Judge, latency_ms
from deltaworks.serving.parts import Part, Piece
from deltaworks.serving.profile import allowed_rank
from deltaworks.serving.server import F64

RANDOM_SEED = 0
_REPAIRS = 3
_LIGHTER = 0.96
_FARTHEST = 1.5
_HOT = 0.1

Deal = Callable[[F64], list[Part]]
"""From the capacities of GPUs, (gpus,) float64, to what each of them serves."""

Told = Callable[[str], None]
"""Is told what is being tried."""


@dataclass(frozen=True)
class Gpu:
    """A GPU and what it serves.

    Attributes:
        kind: Its type, by place in the judge's profiles.
        part: Its adapters.
        slots: `max_loras`.
    """

    kind: int
    part: Part
    slots: int


@dataclass(frozen=True)
class Placement:
    """Where every adapter is served.

    Attributes:
        gpus: The GPUs.
        lower_bound: GPUs below which, as far as the bound goes, nothing can do; of whatever type.
        price_bound: The same of the price; None without prices.
        dealt: How the adapters were dealt.
    """

    gpus: tuple[Gpu, ...]
    lower_bound: int
    price_bound: float | None
    dealt: str


def place(
    judge: Judge, prices: Sequence[float] | None = None, told: Told = lambda _: None, *, bounded: bool = True
) -> Placement:
    """The placement with the fewest GPUs, or with the lowest price.

    Args:
        judge: Of the demand and the types of GPU.
        prices: Of a GPU of each type; None to count GPUs.
        told: Is told what is being tried.
        bounded: Find a lower bound too; without, in a fraction of the time, it says how many GPUs were tried first.

    Raises:
        PlacementError: some adapter cannot be served at all, or no placement was found that the twin accepts.
    """
    check_servable(judge)
    kinds = len(judge.profiles)
    price = np.ones(kinds) if prices is None else np.array(prices, np.float64)
    alone = None
    for kind in np.argsort(price, kind="stable") if kinds > 1 else [0]:
        told(f"1 GPU of {judge.profiles[kind].name}")
        if (slots := judge.fits(whole(judge), int(kind), tries=len(SLOTS))) is not None:
            alone = Gpu(int(kind), whole(judge), slots)
            break
    if alone is not None and price[alone.kind] == price.min():
        bound = None if prices is None else float(price.min())
        return Placement(_polished(judge, [alone]), 1, bound, "all on one")
    if kinds == 1 and (found := attempt(judge, [0, 0], np.ones(2))):
        bound = None if prices is None else 2 * float(price[0])
        return Placement(_polished(judge, found[0]), 2, bound, found[1])
    told("what single GPUs can take")
    capacities = [Capacities(judge, kind, evenly=not bounded) for kind in range(kinds)]
    columns = np.concatenate([c.columns for c in capacities])
    each = np.concatenate([np.full(c.columns.shape[0], price[k]) for k, c in enumerate(capacities)])
    least = 1 if alone else max(ceil(fewest(columns) - 1e-6), 2)
    bound = None if prices is None else fewest(columns, each)
    even = np.array([c.columns[0].max() for c in capacities])
    cost = capacities[0].prices(columns)
    best = Placement((alone,), least, bound, "all on one") if alone else None
    for counts in _mixes(even, price, least):
        chosen = [kind for kind, count in enumerate(counts) for _ in range(count)]
        if best is not None and price[chosen].sum() >= price[[g.kind for g in best.gpus]].sum():
            break
        told(f"{len(chosen)} GPUs")
        if found := attempt(judge, chosen, even[chosen], cost):
            best = Placement(found[0], least, bound, found[1])
            break
    if best is not None:
        return replace(best, gpus=_polished(judge, best.gpus))
    raise PlacementError(
        "no placement was found that the twin accepts on every GPU; lower --headroom, loosen --slo, or give more types"
    )


def place_on(judge: Judge, kinds: Sequence[int], told: Told = lambda _: None, ways: int | None = None) -> Placement:
    """The placement on given GPUs whose worst 99th percentile of TTFT is the lowest that was found.

    Args:
        judge: Of the demand and the types.
        kinds: The type of each GPU.
        told: Is told what is being tried.
        ways: How many ways of dealing to try; None for all.

    Raises:
        PlacementError: the twin accepts no placement on those GPUs.
    """
    check_servable(judge)
    even = np.array([1.0 / partition.weights(judge.traffic[k], judge.profiles[k], len(kinds)).sum() for k in kinds])
    best: tuple[float, tuple[Gpu, ...], str] | None = None
    for name, deal in list(dealings(judge, kinds).items())[:ways]:
        told(f"{name} on {len(kinds)} GPUs")
        capacity = even.copy()
        for _ in range(_REPAIRS + 1):
            found = accepted(judge, deal, kinds, capacity)
            if found is None:
                break
            found = _polished(judge, found, reach=2)
            latency = [latency_ms(judge.ask(gpu.part, gpu.kind, gpu.slots)) if gpu.part else 0.0 for gpu in found]
            if best is not None and max(latency) >= best[0]:
                break
            best = max(latency), found, name
            capacity = capacity.copy()
            capacity[int(np.argmax(latency))] *= _LIGHTER
    if best is None:
        raise PlacementError(f"the twin accepts no placement on {len(kinds)} GPUs; give more with --gpus")
    return Placement(best[1], len(kinds), None, best[2])


def _polished(judge: Judge, gpus: Sequence[Gpu], reach: int = 1) -> tuple[Gpu, ...]:
    """The same with slots of lower latency, where the twin accepts them."""

    def better(gpu: Gpu) -> Gpu:
        return replace(gpu, slots=judge.polished(gpu.part, gpu.kind, gpu.slots, reach)) if gpu.part else gpu

    return tuple(judge.pool.map(better, gpus))


def check_servable(judge: Judge) -> None:
    """Raise unless some type of GPU has memory for a slot of every adapter's rank.

    Raises:
        PlacementError: none has; the adapter is named.
    """
    for adapter in judge.demand.workload.adapters:
        if not any(profile.starts(1, allowed_rank(adapter.rank)) for profile in judge.profiles):
            raise PlacementError(f"{adapter.name}: no GPU has memory for one slot of rank {adapter.rank}")


def _mixes(even: F64, price: F64, least: int) -> Iterator[tuple[int, ...]]:
    """Numbers of GPUs of each type, cheapest first, that could be enough and are not far too many.

    Args:
        even: The share of all the traffic that a GPU of each type can take, (types,) float64.
        price: (types,) float64.
        least: GPUs at least.
    """
    most = [max(ceil(_FARTHEST / share), least) + 2 for share in even]
    if even.size == 1:
        yield from ((count,) for count in range(least, most[0] + 1))
        return
    counts = np.array(list(product(*(range(m + 1) for m in most))))
    counts = counts[(counts.sum(1) >= least) & (counts @ even >= 0.95)]
    for index in np.lexsort((counts.sum(1), counts @ price)):
        yield tuple(int(count) for count in counts[index])


def attempt(
    judge: Judge, kinds: Sequence[int], capacity: F64, cost: F64 | None = None
) -> tuple[tuple[Gpu, ...], str] | None:
    """A placement on given GPUs that the twin accepts, and how it was dealt; None if none was found.

    Args:
        judge: Of the demand and the types.
        kinds: The type of each GPU.
        capacity: What they can take, in like units, (gpus,) float64.
        cost: What each adapter takes of a GPU, (adapters,) float64, where that was measured.
    """
    for name, deal in dealings(judge, kinds, cost).items():
        if (found := accepted(judge, deal, kinds, capacity)) is not None:
            return found, name
    return None


def dealings(judge: Judge, kinds: Sequence[int], cost: F64 | None = None) -> dict[str, Deal]:
    """Ways to deal all adapters to GPUs of these types, by name, the most promising first."""
    traffic = judge.traffic[kinds[0]]
    estimated = partition.weights(traffic, judge.profiles[kinds[0]], len(kinds))
    mixed = len({allowed_rank(int(rank)) for rank in traffic.rank}) > 1
    ways: dict[str, Deal] = {}
    for suffix, weight in (("", cost), (" by estimate", estimated)):
        if weight is not None:
            ways |= {f"{name}{suffix}": deal for name, deal in _weighted(traffic, weight, len(kinds), mixed).items()}
    return ways | simple(judge, kinds[0])


def _weighted(traffic: Traffic, weight: F64, gpus: int, mixed: bool) -> dict[str, Deal]:
    """Ways that go by what each adapter costs; those that keep ranks apart only where there are several."""
    hot = gpus > 1 and weight.max() * gpus > _HOT * weight.sum()
    ways: dict[str, Deal] = {"balanced": lambda capacity: partition.balanced(weight, capacity, traffic.rate)}
    if mixed:
        ways["by rank"] = lambda capacity: partition.by_rank(traffic.rank, weight, traffic.rate, capacity, _HOT)
    if hot:
        ways["split"] = lambda capacity: partition.balanced(weight, capacity, traffic.rate, _HOT)
    return ways


def simple(judge: Judge, kind: int) -> dict[str, Deal]:
    """The ways in which people deal adapters to GPUs, by name."""
    traffic = judge.traffic[kind]
    adapters = traffic.rate.size
    tokens = traffic.rate * (traffic.prompt + traffic.output) + 1e-9
    shuffled = np.random.Generator(np.random.PCG64(RANDOM_SEED)).permutation(adapters)
    return {
        "by count": lambda capacity: partition.counted(adapters, capacity.size),
        "round robin": lambda capacity: partition.dealt(range(adapters), capacity.size),
        "random": lambda capacity: partition.dealt(shuffled, capacity.size),
        "rate-balanced": lambda capacity: partition.balanced(tokens, np.ones(capacity.size), np.zeros(adapters)),
    }


def accepted(judge: Judge, deal: Deal, kinds: Sequence[int], capacity: F64) -> tuple[Gpu, ...] | None:
    """The GPUs of one way of dealing if the twin accepts them all, some made lighter where it does not at first.

    Args:
        judge: Of the demand and the types.
        deal: From capacities to what each GPU serves.
        kinds: The type of each GPU.
        capacity: What they can take, in like units, (gpus,) float64.
    """
    capacity = capacity.astype(np.float64)
    tried: set[tuple[Part, ...]] = set()
    for _ in range(_REPAIRS + 1):
        parts = deal(capacity)
        if tuple(parts) in tried:
            return None
        tried.add(tuple(parts))
        strain = [_strain(judge, part, kind) for part, kind in zip(parts, kinds, strict=True)]
        if max(strain) > HOPELESS:
            return None
        order = sorted(range(len(kinds)), key=lambda g: -strain[g])
        slots: dict[int, int | None] = {}
        for at in range(0, len(order), judge.threads):
            some = order[at : at + judge.threads]
            slots |= dict(
                zip(some, judge.pool.map(judge.fits, [parts[g] for g in some], [kinds[g] for g in some]), strict=True)
            )
            if sum(s is None for s in slots.values()) > max(len(kinds) // 4, 1):
                return None
        if None not in slots.values():
            return tuple(Gpu(kinds[g], parts[g], slots[g] or 1) for g in range(len(kinds)))
        for gpu, found in slots.items():
            if found is None:
                capacity[gpu] *= _LIGHTER
    return None


def _strain(judge: Judge, part: Part, kind: int) -> float:
    if not part:
        return 0.0
    ranked = judge.slots(part, kind)
    return ranked[0][0] if ranked else float("inf")


def whole(judge: Judge) -> Part:
    """All adapters, whole."""
    return tuple(Piece(i) for i in range(len(judge.demand.workload.adapters)))
