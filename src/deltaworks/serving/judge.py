"""Whether a GPU can serve what it is given: slots that the surrogate proposes, and the twin's word on them."""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import cpu_count
from threading import Lock
from typing import Any

import numpy as np

from deltaworks.errors import PlacementError, did_you_mean, quoted
from deltaworks.serving.estimate import SLOT_PRESSURE, SLOT_WAIT, UTILISATION, Traffic, estimate, traffic_of
from deltaworks.serving.limits import check_one_model
from deltaworks.serving.parts import Part, part_of
from deltaworks.serving.profile import Profile, allowed_rank
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.starvation import STARVED_DEFICIT
from deltaworks.serving.surrogate import Surrogate
from deltaworks.serving.workload import Requests, Workload, requests_of

SLOTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320,
         384, 448, 512)  # fmt: skip
"""Values of `max_loras` that are tried."""

TRIES = 5
LONGEST_WAIT = 0.15
"""An adapter that waits for a slot longer than this share of the duration is at the edge of starvation."""

FULL = 0.95
"""A utilisation above which more slots cost more than they help."""

COMFORTABLE = 0.7
"""Slots that adapters hold on average, of those there are, at which hardly any waits for one."""

MARGIN = 0.1
"""How much more traffic tells configurations apart whose throughput is alike."""

ALIKE = 0.005
"""Throughputs that differ by less than this share are alike: repeated runs of a real server differ as much."""

KEPT_ADAPTERS = 1_000_000
"""The oldest of the twin's answers are forgotten where those remembered tell of more adapters than this in all; an
adapter takes about a kilobyte."""

KEPT_REQUESTS = 4_000_000
"""The most requests that are remembered for the next number of slots on the same GPU."""

GOALS = ("ttft", "itl", "tpot")
MAX_HEADROOM = 10.0
"""The largest headroom, a share: eleven times the traffic."""
HOPELESS = 1.5
"""Skip the simulation if the estimated strain exceeds this.

Strain is the larger of the utilisation and the wait for a slot relative to `LONGEST_WAIT`; 1 is the edge of starvation.
"""


@dataclass(frozen=True)
class Goal:
    """A limit on a latency, like ``ttft_p99=2s``.

    Attributes:
        quantity: One of `GOALS`.
        statistic: ``mean``, ``p50`` or ``p99``.
        limit_ms: Milliseconds.
    """

    quantity: str
    statistic: str
    limit_ms: float

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.quantity}_{self.statistic}"

    def value(self, answer: dict[str, Any]) -> float | None:
        """What an answer of `simulate` says of it, milliseconds; None where nothing was observed."""
        found: float | None = answer[f"{self.quantity}_ms"][self.statistic]
        return found

    def met(self, answer: dict[str, Any]) -> bool:
        """Whether an answer of `simulate` keeps to it."""
        value = self.value(answer)
        if value is not None:
            return bool(value <= self.limit_ms)
        # Nothing was observed. That is no proof, unless nobody asked for anything that could be.
        asked = answer["requests"]["arrived"]
        single = answer["offered_output_tps"] * answer["duration_s"] <= asked + 0.5
        return not asked or (self.quantity != "ttft" and single)


def parse_goal(text: str) -> Goal:
    """A goal from ``ttft_p99=2s``, ``itl_mean=50ms``.

    Raises:
        PlacementError: it is not a goal.
    """
    match = re.fullmatch(r"\s*(\w+?)_(\w+)\s*=\s*([0-9.]+)\s*(ms|s)\s*", text)
    if match is None:
        raise PlacementError(f"{text!r} is not a latency goal; write it like ttft_p99=2s or itl_mean=50ms")
    quantity, statistic, value, unit = match.groups()
    check = goal_of(f"{quantity}_{statistic}", 1.0)
    try:
        limit = float(value) * (1000 if unit == "s" else 1)
    except ValueError:
        raise PlacementError(f"{text!r}: {value!r} is not a number") from None
    if not 0 < limit < float("inf"):
        raise PlacementError(f"{quoted(text)}: a latency must be above 0 and finite")
    return replace(check, limit_ms=limit)


def goal_of(name: str, limit_ms: float) -> Goal:
    """A goal from its name, like ``ttft_p99``, and its limit in milliseconds.

    Raises:
        PlacementError: there is no such latency.
    """
    known = {f"{q}_{s}": (q, s) for q in GOALS for s in ("mean", "p50", "p99")}
    if name not in known:
        hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
        raise PlacementError(f"unknown latency {quoted(name)}{hint}")
    return Goal(*known[name], limit_ms)


def parse_goals(listed: Iterable[str]) -> tuple[Goal, ...]:
    """Goals from texts such as ``ttft_p99=2s``.

    Raises:
        PlacementError: one is not a goal, or a latency is limited twice.
    """
    goals = [parse_goal(text) for text in listed]
    for index, goal in enumerate(goals):
        if goal.name in {other.name for other in goals[:index]}:
            raise PlacementError(f"{goal.name} is limited twice; give one limit for each latency")
    return tuple(goals)


@dataclass(frozen=True)
class Demand:
    """What servers are asked, and what is accepted of them.

    Attributes:
        workload: All that is to be served.
        headroom: How much more traffic every GPU must be able to take, a share.
        goals: Latencies to keep.
    """

    workload: Workload
    headroom: float = 0.1
    goals: tuple[Goal, ...] = ()


class Judge:
    """Asks the surrogate and the twin about GPUs of several types; remembers what the twin said.

    Args:
        demand: What is asked.
        profiles: The types of GPU.
        surrogates: Of each type, None where there is none.
        threads: Number of worker threads; None for one per core.

    Raises:
        ProfileError: the types of GPU serve different base models.
    """

    def __init__(
        self,
        demand: Demand,
        profiles: Sequence[Profile],
        surrogates: Sequence[Surrogate | None],
        threads: int | None = None,
    ) -> None:
        check_one_model(profiles)
        self.demand, self.profiles, self.surrogates = demand, tuple(profiles), tuple(surrogates)
        self.threads = threads or cpu_count() or 1
        self.pool = ThreadPoolExecutor(self.threads)
        self.traffic = [traffic_of(demand.workload, p.output_share, p.server.max_model_len) for p in profiles]
        self.runs = 0
        self._said: dict[tuple[Part, int, int, int, float], dict[str, Any]] = {}
        self._kept_adapters = 0
        self._recent: dict[tuple[Part, float, float], tuple[Workload, Requests]] = {}
        self._lock = Lock()
        self._workload = demand.workload
        self._drawn: dict[int, Requests] = {}

    def requests(self, kind: int) -> Requests:
        """All requests of the workload, with answers as a type of GPU generates them."""
        if kind not in self._drawn:
            self._drawn[kind] = requests_of(self._workload, self.profiles[kind].output_share)
        return self._drawn[kind]

    def rank_of(self, part: Part) -> int:
        """The least `--max-lora-rank` that a part needs; the least that vLLM takes if the part is empty."""
        return allowed_rank(max((self._workload.adapters[p.adapter].rank for p in part), default=1))

    def traffic_of(self, part: Part, kind: int, factor: float = 1.0) -> Traffic:
        """The traffic of a part on a type of GPU."""
        places = np.array([p.adapter for p in part], np.int64)
        own = self.traffic[kind].of(places)
        share = np.array([p.share for p in part]) * factor
        return Traffic(own.rate * share, own.rank, own.prompt, own.output, own.spread, own.duration_s)

    def slots(self, part: Part, kind: int) -> list[tuple[float, int]]:
        """Numbers of slots to try for a part with all its headroom, the most promising first, each with its strain.

        More slots let adapters wait less for one until the GPU has no time left; where nobody waits, fewer are better.
        What the surrogate says does not starve comes before the rest.
        """
        traffic = self.traffic_of(part, kind, 1.0 + self.demand.headroom)
        profile, surrogate, rank = self.profiles[kind], self.surrogates[kind], self.rank_of(part)
        most = min(len(part), profile.most_slots(rank))
        found = []
        for slots in sorted({*(s for s in SLOTS if s < most), most} - {0}):
            features = estimate(traffic, profile, slots, rank)
            starved = surrogate is not None and surrogate.starvation.predict(features) > 0.5
            wait, used = features[SLOT_WAIT] / LONGEST_WAIT, float(features[UTILISATION])
            crowded = features[SLOT_PRESSURE] > COMFORTABLE
            cost = wait + 5.0 * max(used - FULL, 0.0)
            found.append(((starved, round(float(cost), 3), bool(crowded), used), max(used, float(wait)), slots))
        return [(strain, slots) for _, strain, slots in sorted(found)]

    def promising(self, part: Part, kind: int, tries: int) -> list[tuple[float, int]]:
        """The most promising numbers of slots, as `slots` has them, then the largest: it shuts out the fewest."""
        ranked = self.slots(part, kind)
        largest = max(ranked, key=lambda item: item[1], default=None)
        return ranked[:tries] + ([largest] if largest is not None and largest not in ranked[:tries] else [])

    def has_memory(self, adapter: int, kind: int) -> bool:
        """Whether a type of GPU has memory for one slot of an adapter's rank."""
        return self.profiles[kind].starts(1, allowed_rank(self._workload.adapters[adapter].rank))

    def strain(self, part: Part, kind: int) -> float:
        """The estimated strain of a part at the most promising number of slots.

        It is 0 for an empty part, and infinite on a type of GPU without memory for one slot of the part's rank.
        """
        if not part:
            return 0.0
        ranked = self.slots(part, kind)
        return ranked[0][0] if ranked else float("inf")

    def ask(self, part: Part, kind: int, slots: int, factor: float = 1.0) -> dict[str, Any]:
        """The twin's answer for a GPU, at ``factor`` times the traffic."""
        rank = self.rank_of(part)
        key = (part, kind, slots, rank, factor)
        if (known := self._said.get(key)) is not None:
            return known
        profile = self.profiles[kind]
        workload, requests = self._offered(part, kind, factor)
        answer = simulate(workload, profile, Configuration(slots, rank, len(part)), requests)
        with self._lock:
            self._kept_adapters += 0 if key in self._said else len(part)
            self._said[key] = answer
            while self._kept_adapters > KEPT_ADAPTERS and len(self._said) > 1:
                oldest = next(iter(self._said))
                del self._said[oldest]
                self._kept_adapters -= len(oldest[0])
            self.runs += 1
        return answer

    def _offered(self, part: Part, kind: int, factor: float) -> tuple[Workload, Requests]:
        """What a GPU is asked at ``factor`` times the traffic, which is the same for any number of slots."""
        key = part, self.profiles[kind].output_share, factor
        with self._lock:
            found = self._recent.pop(key, None)
        if found is None:
            workload = part_of(self._workload, part, factor)
            found = workload, requests_of(workload, self.profiles[kind].output_share)
        with self._lock:
            self._recent[key] = found
            while len(self._recent) > 1 and sum(r.arrival_s.size for _, r in self._recent.values()) > KEPT_REQUESTS:
                del self._recent[next(iter(self._recent))]
            if len(self._recent) > 2 * self.threads:
                del self._recent[next(iter(self._recent))]
        return found

    def accepts(self, answer: dict[str, Any]) -> bool:
        """Whether an answer of the twin is one to accept: no adapter starves, and all goals are kept."""
        return (
            not answer["starved"] and not answer["memory_error"] and all(goal.met(answer) for goal in self.demand.goals)
        )

    def serves(self, part: Part, kind: int, slots: int, factor: float) -> bool:
        """Whether the twin accepts a GPU at ``factor`` times the traffic, and its answer proves something.

        A run that is short against one answer, or ends before a request of any adapter that asks is served, ends before
        queues form; there the equilibrium must keep up as well. A share of an adapter of which no request arrived in
        the run was not tried at all.
        """
        answer = self.ask(part, kind, slots, factor)
        if not self.accepts(answer):
            return False
        traffic = self.traffic_of(part, kind, factor)
        if not answer["requests"]["arrived"] and any(
            piece.share < 1.0 and rate > 0 for piece, rate in zip(part, traffic.rate, strict=True)
        ):
            return False
        return not is_inconclusive(answer) or keeps_up(traffic, self.profiles[kind], slots, self.rank_of(part))

    def fits(self, part: Part, kind: int, tries: int = TRIES) -> int | None:
        """Slots with which the twin accepts a GPU, with all the headroom and without, or None if none were found.

        Args:
            part: What the GPU serves.
            kind: Its type.
            tries: How many numbers of slots to try.
        """
        if not part:
            return 1
        for strain, slots in self.promising(part, kind, tries):
            if strain <= HOPELESS and self.passes(part, kind, slots):
                return slots
        return None

    def passes(self, part: Part, kind: int, slots: int) -> bool:
        """Whether the twin accepts a GPU, with all the headroom and without."""
        # Without as well: a queue that drains under more traffic may by chance not drain under less.
        factors = (1.0 + self.demand.headroom, 1.0) if self.demand.headroom else (1.0,)
        return all(self.serves(part, kind, slots, factor) for factor in factors)

    def polished(self, part: Part, kind: int, slots: int, reach: int = 1, *, fastest: bool = False) -> int:
        """The best number of slots, by `best_configuration`, near one that the twin accepts, that it accepts too.

        Args:
            part: What the GPU serves.
            kind: Its type.
            slots: That the twin accepts.
            reach: How many numbers of slots above and below are tried.
            fastest: Whether only the 99th percentile of TTFT counts.
        """
        ranked = sorted(s for _, s in self.slots(part, kind))
        at = ranked.index(slots)
        near = [s for s in ranked[max(at - reach, 0) : at + reach + 1] if s == slots or self.passes(part, kind, s)]
        if fastest or len(near) == 1:
            return min(near, key=lambda s: (latency_ms(self.ask(part, kind, s)), s))
        more = 1.0 + max(self.demand.headroom, MARGIN)
        answers = [(self.ask(part, kind, s), self.ask(part, kind, s, more)) for s in near]
        return near[best_configuration([(a["throughput_tps"], b["throughput_tps"], latency_ms(a)) for a, b in answers])]


def best_configuration(answers: Sequence[tuple[float, float, float]]) -> int:
    """Which of several configurations to recommend, by place.

    The one of most throughput; of those alike (`ALIKE`), the one that gets most through when traffic grows; of those
    alike in that too, the one with the lowest 99th percentile of TTFT. The twin predicts throughput within a few
    percent, but near the edge of starvation its tail of TTFT says little about a real server.

    Args:
        answers: Of each configuration, which the twin accepts: throughput in tokens/s, throughput with `MARGIN` more
            traffic, and the 99th percentile of TTFT in milliseconds.
    """
    kept = list(range(len(answers)))
    for column in (0, 1):
        most = max(answers[i][column] for i in kept)
        kept = [i for i in kept if answers[i][column] >= (1 - ALIKE) * most]
    return min(kept, key=lambda i: (answers[i][2], i))


def is_inconclusive(answer: dict[str, Any]) -> bool:
    """Whether a run of the twin ended too soon to say who would starve."""
    asked = sum(adapter["arrived"] > 0 for adapter in answer["adapters"].values())
    return bool(answer["short"] or (asked and len(answer["unjudged_adapters"]) == asked))


def keeps_up(traffic: Traffic, profile: Profile, slots: int, max_rank: int) -> bool:
    """Whether a server that was given time without end would deliver all but the share that starvation takes."""
    needed = estimate(traffic, profile, slots, max_rank)[UTILISATION]
    return bool(needed * (1.0 - STARVED_DEFICIT) < 1.0)


def latency_ms(answer: dict[str, Any]) -> float:
    """The 99th percentile of TTFT, milliseconds; infinite where nobody who asked is served."""
    if answer["starved"] or answer["memory_error"]:
        return float("inf")
    p99 = answer["ttft_ms"]["p99"]
    if p99 is None:
        return float("inf") if answer["requests"]["arrived"] else 0.0
    return float(p99)
