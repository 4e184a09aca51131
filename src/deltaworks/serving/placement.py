"""Placing adapters on the fewest GPUs, or the cheapest, accepted by the twin.

For a number of GPUs there are several ways to deal the adapters: balanced by the GPU time that each costs, hot ones
split or not; those of like rank together; and the simple ways that people use. The surrogate proposes slots for every
GPU, the twin is asked, and a placement counts only when it accepts every GPU with all the headroom. Numbers of GPUs are
tried from the lower bound up.

Source: greedy placement checked by a twin is the idea of arXiv 2508.08343 and 2602.24044.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from math import ceil

import numpy as np

from deltaworks.errors import ImpossibleError, PlacementError
from deltaworks.serving import partition
from deltaworks.serving.arrays import F64
from deltaworks.serving.bound import Capacities, Relaxation, spread
from deltaworks.serving.estimate import Traffic
from deltaworks.serving.feasible import check_possible
from deltaworks.serving.judge import HOPELESS, SLOTS, Judge, latency_ms
from deltaworks.serving.parts import Part, Piece
from deltaworks.serving.profile import allowed_rank
from deltaworks.serving.simulate import enough_duration_s, short_note
from deltaworks.units import format_time
from deltaworks.wording import counted

RANDOM_SEED = 0
_REPAIRS = 3
_LIGHTER = 0.96
_FARTHEST = 1.5
_HOT = 0.1
_STRIDE = 0.04
_MAX_MIXES = 200_000
_MAX_REPAIRED = 8

MAX_TIMES = 16
"""The search stops at 16 times the number of GPUs needed to process the tokens at full load (counted as at least 2)."""

MIXES = 200
"""The maximum number of GPU combinations to try."""

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
        gpus: The GPUs, each of which serves something.
        lower_bound: GPUs below which, as far as the bound goes, nothing can do; of whatever type. None where the number
            of GPUs was given, so that none was computed.
        price_bound: The same of the price; None without prices.
        dealt: How the adapters were dealt.
    """

    gpus: tuple[Gpu, ...]
    lower_bound: int | None
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
        bounded: Whether to compute the lower bound. If False, `lower_bound` is the first GPU count tried.

    Raises:
        ImpossibleError: a single request on an idle GPU cannot do what is asked, or no placement on a sensible number
            of GPUs was found that the twin accepts.
    """
    check_feasible(judge, range(len(judge.profiles)))
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
    if kinds == 1 and (found := attempt(judge, [0, 0], np.ones(2), None, told)):
        bound = None if prices is None else 2 * float(price[0])
        return Placement(_polished(judge, found[0]), 2, bound, found[1])
    told("what single GPUs can take")
    most = _most_gpus(judge)
    if alone is None:
        _check_lightest(judge, most)
    capacities = [Capacities(judge, kind, evenly=not bounded) for kind in range(kinds)]
    relaxation = Relaxation(capacities, price)
    least = 1 if alone else max(ceil(relaxation.gpus - 1e-6), 2)
    bound = None if prices is None else relaxation.price
    even = np.array([c.columns[0].max() for c in capacities])
    best = Placement((alone,), least, bound, "all on one") if alone else None
    tried: list[int] = []
    for counts in islice(_mixes(even, price, least, most), MIXES):
        chosen = [kind for kind, count in enumerate(counts) for _ in range(count)]
        if best is not None and price[chosen].sum() >= price[[g.kind for g in best.gpus]].sum():
            break
        tried.append(len(chosen))
        if found := attempt(judge, chosen, even[chosen], relaxation, told):
            best = Placement(found[0], least, bound, found[1])
            break
    if best is not None:
        return _used(replace(best, gpus=_polished(judge, best.gpus)), price)
    numbers = f"{min(tried):,} to {max(tried):,}" if tried else f"up to {most:,}"
    raise ImpossibleError(
        f"no placement on {numbers} GPUs was found that the twin accepts on every one; lower --headroom, relax --slo,"
        f" or add another GPU type{_shortness(judge)}"
    )


def _shortness(judge: Judge) -> str:
    """The end of an error: that the workload's duration is short against one answer on any type; empty if it is not."""
    duration_s, rank = judge.demand.workload.duration_s, judge.rank_of(whole(judge))
    enough_s = [
        enough_duration_s(own.prompt, own.output, profile, 1, rank)
        for own, profile in ((judge.requests(kind), profile) for kind, profile in enumerate(judge.profiles))
    ]
    note = short_note(min(enough_s), duration_s)
    return f"; {note}" if note else ""


def _used(placement: Placement, price: F64) -> Placement:
    """The same without GPUs that a way of dealing left empty, which are not needed: no bound is above the others."""
    gpus = tuple(gpu for gpu in placement.gpus if gpu.part)
    least, bound = placement.lower_bound, placement.price_bound
    return replace(
        placement,
        gpus=gpus,
        lower_bound=None if least is None else min(least, len(gpus)),
        price_bound=None if bound is None else min(bound, float(price[[gpu.kind for gpu in gpus]].sum())),
    )


def _most_gpus(judge: Judge) -> int:
    """The largest number of GPUs that is tried.

    It is `MAX_TIMES` the number that the tokens need at full load, rounded up and at least 2; but a GPU that gets no
    request is of no use.
    """
    needed = min(
        float(partition.weights(traffic, profile, 1).sum())
        for traffic, profile in zip(judge.traffic, judge.profiles, strict=True)
    )
    requests = judge.traffic[0].rate.sum() * judge.traffic[0].duration_s
    return max(min(MAX_TIMES * max(ceil(needed), 2), int(requests)), 1)


def _check_lightest(judge: Judge, most: int) -> None:
    """Raise unless some type of GPU can take its share of all the traffic, spread over the most GPUs that are tried.

    Raises:
        ImpossibleError: none can; the sentence says what its latencies are then.
    """
    rate = judge.traffic[0].rate
    busiest = np.argsort(-rate, kind="stable")
    # The share of a single adapter may be less than the crumbs that are left out among several.
    part = tuple(sorted(spread(busiest, rate, 1.0 / most) or spread(busiest, rate, 1.0 / most, least=0.0)))
    if not part or any(judge.fits(part, kind, tries=len(SLOTS)) is not None for kind in range(len(judge.profiles))):
        return
    said = []
    for kind, profile in enumerate(judge.profiles):
        if ranked := judge.slots(part, kind):
            answer = judge.ask(part, kind, ranked[0][1], 1.0 + judge.demand.headroom)
            if not answer["requests"]["arrived"]:
                return
            values = [f"{g.name} is {format_time(g.value(answer))}" for g in judge.demand.goals if not g.met(answer)]
            said.append(f"on {profile.name} {' and '.join(values) or 'adapters starve'}")
    raise ImpossibleError(
        f"even with the traffic spread over {counted(most, 'GPU')}, the latency goals are missed: {'; '.join(said)};"
        f" lower --headroom, relax --slo, or add another GPU type{_shortness(judge)}"
    )


def place_on(judge: Judge, kinds: Sequence[int], told: Told = lambda _: None, ways: int | None = None) -> Placement:
    """The placement on given GPUs whose worst 99th percentile of TTFT is the lowest that was found.

    It has fewer GPUs than were given where none that was found is faster with more.

    Args:
        judge: Of the demand and the types.
        kinds: The type of each GPU.
        told: Is told what is being tried.
        ways: How many ways of dealing to try; None for all.

    Raises:
        ImpossibleError: a single request on an idle GPU cannot do what is asked.
        PlacementError: the twin accepts no placement on those GPUs.
    """
    check_feasible(judge, sorted(set(kinds)))
    even = np.array([1.0 / partition.weights(judge.traffic[k], judge.profiles[k], len(kinds)).sum() for k in kinds])
    best: tuple[float, tuple[Gpu, ...], str] | None = None
    for name, deal in list(dealings(judge, kinds).items())[:ways]:
        told(f"{counted(len(kinds), 'GPU')}, adapters {name}")
        capacity = even.copy()
        for _ in range(_REPAIRS + 1):
            found = accepted(judge, deal, kinds, capacity)
            if found is None:
                break
            found = _polished(judge, found, reach=2, fastest=True)
            latency = [latency_ms(judge.ask(gpu.part, gpu.kind, gpu.slots)) if gpu.part else 0.0 for gpu in found]
            if best is not None and max(latency) >= best[0]:
                break
            best = max(latency), found, name
            capacity = capacity.copy()
            capacity[int(np.argmax(latency))] *= _LIGHTER
    if best is None:
        raise PlacementError(f"the twin accepts no placement on {counted(len(kinds), 'GPU')}; give more with --gpus")
    return Placement(tuple(gpu for gpu in best[1] if gpu.part), None, None, best[2])


def check_feasible(judge: Judge, kinds: Sequence[int]) -> None:
    """Raise where single requests on idle GPUs of these types do not fit or do not keep the goals.

    Raises:
        ImpossibleError: the sentence says what can be kept.
    """
    check_possible(
        judge.demand.workload,
        [judge.profiles[k] for k in kinds],
        judge.demand.goals,
        [judge.requests(k) for k in kinds],
    )


def _polished(judge: Judge, gpus: Sequence[Gpu], reach: int = 1, *, fastest: bool = False) -> tuple[Gpu, ...]:
    """The same with better numbers of slots (`Judge.polished`), where the twin accepts them."""

    def better(gpu: Gpu) -> Gpu:
        if not gpu.part:
            return gpu
        return replace(gpu, slots=judge.polished(gpu.part, gpu.kind, gpu.slots, reach, fastest=fastest))

    found = tuple(judge.pool.map(better, gpus))
    check_totals(judge, found)
    return found


def check_totals(judge: Judge, gpus: Sequence[Gpu]) -> None:
    """Raise unless every request of the adapters is offered to exactly one GPU.

    Raises:
        PlacementError: requests or tokens are missing, or are offered twice.
    """
    requests = judge.requests(0)
    own = requests.adapter < len(judge.demand.workload.adapters)
    asked, offered = np.array([own.sum(), requests.prompt[own].sum()]), np.zeros(2, np.int64)
    for gpu in gpus:
        if gpu.part:
            answer = judge.ask(gpu.part, gpu.kind, gpu.slots)
            prompts = (answer["offered_tps"] - answer["offered_output_tps"]) * answer["duration_s"]
            offered += answer["requests"]["arrived"], round(prompts)
    if (asked != offered).any():
        raise PlacementError(
            f"the GPUs are offered {counted(offered[0], 'request')} with {offered[1]:,} prompt tokens, not the"
            f" workload's {asked[0]:,} with {asked[1]:,}: the shares of some adapter do not add up to one"
        )


def _mixes(even: F64, price: F64, least: int, most: int) -> Iterator[tuple[int, ...]]:
    """Numbers of GPUs of each type, cheapest first, that could be enough and are not far too many.

    Args:
        even: The share of all the traffic that a GPU of each type can take, (types,) float64.
        price: (types,) float64.
        least: GPUs at least.
        most: GPUs at most.
    """
    enough = [min(max(ceil(_FARTHEST / share), least) + 2, max(most, least)) for share in even]
    if even.size == 1:
        yield from ((count,) for count in _numbers(least, enough[0], 1.0 + _STRIDE))
        return
    # The more types, the coarser: all numbers together are bounded.
    stride = _STRIDE
    while np.prod([float(len(_numbers(0, m, 1.0 + stride))) for m in enough]) > _MAX_MIXES:
        stride *= 1.5
    counts = np.array(list(product(*(_numbers(0, m, 1.0 + stride) for m in enough))))
    counts = counts[(counts.sum(1) >= least) & (counts @ even >= 0.95)]
    for index in np.lexsort((counts.sum(1), counts @ price)):
        yield tuple(int(count) for count in counts[index])


def _numbers(first: int, last: int, growth: float) -> list[int]:
    """Numbers from ``first`` to ``last``: one by one while there are few, then in strides that grow with them."""
    found = [first]
    while found[-1] < last:
        found.append(min(max(found[-1] + 1, int(found[-1] * growth)), last))
    return found


def attempt(
    judge: Judge,
    kinds: Sequence[int],
    capacity: F64,
    relaxation: Relaxation | None = None,
    told: Told = lambda _: None,
) -> tuple[tuple[Gpu, ...], str] | None:
    """A placement on given GPUs that the twin accepts, and how it was dealt; None if none was found.

    Args:
        judge: Of the demand and the types.
        kinds: The type of each GPU.
        capacity: What they can take, in like units, (gpus,) float64.
        relaxation: Of the bound, where it was solved.
        told: Is told what is being tried.
    """
    for name, deal in dealings(judge, kinds, relaxation).items():
        told(f"{counted(len(kinds), 'GPU')}, adapters {name}")
        if (found := accepted(judge, deal, kinds, capacity)) is not None:
            return found, name
    return None


def dealings(judge: Judge, kinds: Sequence[int], relaxation: Relaxation | None = None) -> dict[str, Deal]:
    """Ways to deal all adapters to GPUs of these types, by name, the most promising first."""
    traffic = judge.traffic[kinds[0]]
    mixed = len({allowed_rank(int(rank)) for rank in traffic.rank}) > 1
    ways: dict[str, Deal] = {}
    if relaxation is not None:
        row, cost = relaxation.row, relaxation.cost
        ways["packed"] = lambda capacity: partition.in_a_row(row, cost, traffic.rate * traffic.duration_s, capacity)
        ways |= _weighted(traffic, cost, len(kinds), mixed)
    estimated = partition.weights(traffic, judge.profiles[kinds[0]], len(kinds))
    suffix = " by estimate" if ways else ""
    ways |= {f"{name}{suffix}": deal for name, deal in _weighted(traffic, estimated, len(kinds), mixed).items()}
    return ways | simple(judge, kinds[0])


def _weighted(traffic: Traffic, weight: F64, gpus: int, mixed: bool) -> dict[str, Deal]:
    """Ways that go by what each adapter costs; those that keep ranks apart only where there are several."""
    hot = gpus > 1 and weight.max() * gpus > _HOT * weight.sum()
    requests = traffic.rate * traffic.duration_s
    ways: dict[str, Deal] = {"balanced": lambda capacity: partition.balanced(weight, capacity, requests)}
    if mixed:
        ways["by rank"] = lambda capacity: partition.by_rank(traffic.rank, weight, requests, capacity, _HOT)
    if hot:
        ways["split"] = lambda capacity: partition.balanced(weight, capacity, requests, _HOT)
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
        strain: list[float] = []
        for part, kind in zip(parts, kinds, strict=True):
            strain.append(judge.strain(part, kind))
            if strain[-1] > HOPELESS:
                return None
        order = sorted(range(len(kinds)), key=lambda g: -strain[g])
        slots: dict[int, int | None] = {}
        for at in range(0, len(order), judge.threads):
            some = order[at : at + judge.threads]
            slots |= dict(
                zip(some, judge.pool.map(judge.fits, [parts[g] for g in some], [kinds[g] for g in some]), strict=True)
            )
            if sum(s is None for s in slots.values()) > min(max(len(kinds) // 4, 1), _MAX_REPAIRED):
                return None
        if None not in slots.values():
            return tuple(Gpu(kinds[g], parts[g], slots[g] or 1) for g in range(len(kinds)))
        for gpu, found in slots.items():
            if found is None:
                capacity[gpu] *= _LIGHTER
    return None


def whole(judge: Judge) -> Part:
    """All adapters, whole."""
    return tuple(Piece(i) for i in range(len(judge.demand.workload.adapters)))
