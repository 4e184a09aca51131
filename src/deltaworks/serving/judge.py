"""Whether a GPU can serve what it is given: slots that the surrogate proposes, and the twin's word on them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from os import cpu_count
from threading import Lock
from typing import Any

import numpy as np

from deltaworks.serving.arrays import F64, I64
from deltaworks.serving.estimate import SLOT_PRESSURE, SLOT_WAIT, UTILISATION, Traffic, estimate, traffic_of
from deltaworks.serving.goals import Goal
from deltaworks.serving.parts import Part, part_of
from deltaworks.serving.profile import Profile, allowed_rank, check_one_model
from deltaworks.serving.simulate import Configuration, simulate
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

KEPT_ADAPTERS = 4_000_000
"""What was asked about the oldest parts is forgotten where those remembered hold more adapters than this in all; an
adapter takes about 200 bytes."""

KEPT_REQUESTS = 4_000_000
"""The most requests that are remembered for the next number of slots on the same GPU."""

_SUSTAINED = 0.8
"""A utilisation below which the twin sees servers keep up even if they preempt: above it, long answers starve some."""

_PROLONGED = 4.0
"""A run that ended too soon is made at least this many times as long."""

_MAX_PROLONGED_REQUESTS = 100_000

MAX_HEADROOM = 10.0
"""The largest headroom, a share: eleven times the traffic."""
HOPELESS = 1.5
"""Skip the simulation if the estimated strain exceeds this.

Strain is the larger of the utilisation and the wait for a slot relative to `LONGEST_WAIT`; 1 is the edge of starvation.
"""


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


@dataclass(eq=False)
class _Known:
    """What the judge remembers about one part.

    Attributes:
        part: The part, as it was first asked about.
        places: Indices of its adapters in the workload, (pieces,) int64.
        shares: The share of each adapter's requests that it serves, (pieces,) float64.
        rank: The least `--max-lora-rank` that it needs.
        size: The number of adapters in all equal parts that were asked about, counted once for each part.
        ids: The ``id()`` of each of these parts, so that a large part is hashed only once.
        slots: The result of `Judge.slots`, by type of GPU.
        answers: The twin's answers, by type of GPU, slots and factor of the traffic.
        keeps_up: The results of `keeps_up` for those answers that are of a run that ended too soon.
    """

    part: Part
    places: I64
    shares: F64
    rank: int
    size: int = 0
    ids: list[int] = field(default_factory=list)
    slots: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    answers: dict[tuple[int, int, float], dict[str, Any]] = field(default_factory=dict)
    keeps_up: dict[tuple[int, int, float], bool] = field(default_factory=dict)


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
        self._known: dict[Part, _Known] = {}
        self._by_id: dict[int, tuple[Part, _Known]] = {}
        self._kept_adapters = 0
        self._recent: dict[tuple[_Known, float, float], tuple[Workload, Requests]] = {}
        self._lock = Lock()
        self._workload = demand.workload
        self._drawn: dict[int, Requests] = {}
        # Without headroom as well: a queue that drains under more traffic may by chance not drain under less.
        self.factors = (1.0 + demand.headroom, 1.0) if demand.headroom else (1.0,)

    def requests(self, kind: int) -> Requests:
        """All requests of the workload, with answers as a type of GPU generates them."""
        if kind not in self._drawn:
            self._drawn[kind] = requests_of(self._workload, self.profiles[kind].output_share)
        return self._drawn[kind]

    def _about(self, part: Part) -> _Known:
        """What is known of a part, and of others equal to it; the oldest parts are forgotten where they are many."""
        with self._lock:
            same, found = self._by_id.get(id(part), (None, None))
            if found is not None and same is part:
                return found
            found = self._known.get(part)
            if found is None:
                places = np.array([piece.adapter for piece in part], np.int64)
                shares = np.array([piece.share for piece in part], np.float64)
                found = _Known(part, places, shares, allowed_rank(int(self._workload.ranks[places].max(initial=1))))
                self._known[part] = found
            found.ids.append(id(part))
            found.size += len(part)
            self._by_id[id(part)] = part, found
            self._kept_adapters += len(part)
            while self._kept_adapters > KEPT_ADAPTERS and len(self._known) > 1:
                oldest = self._known.pop(next(iter(self._known)))
                self._kept_adapters -= oldest.size
                for own in oldest.ids:
                    del self._by_id[own]
            return found

    def rank_of(self, part: Part) -> int:
        """The least `--max-lora-rank` that a part needs; the least that vLLM takes if the part is empty."""
        return self._about(part).rank

    def traffic_of(self, part: Part, kind: int, factor: float = 1.0) -> Traffic:
        """The traffic of a part on a type of GPU."""
        known = self._about(part)
        own = self.traffic[kind].of(known.places)
        rate = own.rate * (known.shares * factor)
        return Traffic(rate, own.rank, own.prompt, own.output, own.spread, own.duration_s)

    def slots(self, part: Part, kind: int) -> list[tuple[float, int]]:
        """Numbers of slots to try for a part with all its headroom, the most promising first, each with its strain.

        More slots let adapters wait less for one until the GPU has no time left; where nobody waits, fewer are better.
        What the surrogate says does not starve comes before the rest, and what is hopeless comes last.
        """
        known = self._about(part)
        if kind in known.slots:
            return known.slots[kind]
        traffic = self.traffic_of(part, kind, 1.0 + self.demand.headroom)
        profile, surrogate, rank = self.profiles[kind], self.surrogates[kind], known.rank
        most = min(len(part), profile.most_slots(rank))
        found = []
        for slots in sorted({*(s for s in SLOTS if s < most), most} - {0}):
            features = estimate(traffic, profile, slots, rank)
            starved = surrogate is not None and surrogate.starvation.predict(features) > 0.5
            wait, used = features[SLOT_WAIT] / LONGEST_WAIT, float(features[UTILISATION])
            crowded = features[SLOT_PRESSURE] > COMFORTABLE
            cost = wait + 5.0 * max(used - FULL, 0.0)
            strain = max(used, float(wait))
            # What the surrogate says of a server that the closed form sees far beyond its limits is worth little.
            found.append(((strain > HOPELESS, starved, round(float(cost), 3), bool(crowded), used), strain, slots))
        known.slots[kind] = [(strain, slots) for _, strain, slots in sorted(found)]
        return known.slots[kind]

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
        """The twin's answer for a GPU, at ``factor`` times the traffic; `details` has ``adapters`` as well."""
        known, key = self._about(part), (kind, slots, factor)
        if (said := known.answers.get(key)) is not None:
            return said
        answer = self._simulated(known, kind, slots, factor)
        with self._lock:
            known.answers[key] = answer
            self.runs += 1
        return answer

    def details(self, part: Part, kind: int, slots: int) -> dict[str, Any]:
        """All that the twin says of a GPU, adapter by adapter; it is simulated again."""
        return self._simulated(self._about(part), kind, slots, 1.0, by_adapter=True)

    def _simulated(
        self, known: _Known, kind: int, slots: int, factor: float, *, by_adapter: bool = False
    ) -> dict[str, Any]:
        workload, requests = self._offered(known, kind, factor)
        configuration = Configuration(slots, known.rank, len(known.part))
        return simulate(workload, self.profiles[kind], configuration, requests, by_adapter=by_adapter)

    def _offered(self, known: _Known, kind: int, factor: float) -> tuple[Workload, Requests]:
        """What a GPU is asked at ``factor`` times the traffic, which is the same for any number of slots."""
        key = known, self.profiles[kind].output_share, factor
        with self._lock:
            found = self._recent.pop(key, None)
        if found is None:
            workload = part_of(self._workload, known.part, factor)
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
        queues form; there the server must keep up for longer as well (`keeps_up`). A share of an adapter of which no
        request arrived in the run was not tried at all.
        """
        answer = self.ask(part, kind, slots, factor)
        if not self.accepts(answer):
            return False
        if not answer["requests"]["arrived"] and self.is_untried(part, kind, factor):
            return False
        return not answer["short"] or self._keeps_up(part, kind, slots, factor, answer)

    def _keeps_up(self, part: Part, kind: int, slots: int, factor: float, answer: dict[str, Any]) -> bool:
        """What `keeps_up` says of a GPU; remembered."""
        known, key = self._about(part), (kind, slots, factor)
        if key not in known.keeps_up:
            workload, traffic = part_of(self._workload, part, factor), self.traffic_of(part, kind, factor)
            configuration = Configuration(slots, known.rank, len(part))
            known.keeps_up[key] = keeps_up(workload, self.profiles[kind], configuration, traffic, answer)
        return known.keeps_up[key]

    def is_untried(self, part: Part, kind: int, factor: float = 1.0) -> bool:
        """Whether a part has a share of an adapter that asks, and no request comes at ``factor`` times the traffic."""
        rates = self.traffic[kind].rate
        shared = any(piece.share < 1.0 and rates[piece.adapter] > 0 for piece in part)
        return shared and not self._offered(self._about(part), kind, factor)[1].arrival_s.size

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
        return all(self.serves(part, kind, slots, factor) for factor in self.factors)

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


def keeps_up(
    workload: Workload, profile: Profile, configuration: Configuration, traffic: Traffic, answer: dict[str, Any]
) -> bool:
    """Whether a server keeps up where a run of the twin ended too soon to say so.

    The twin is asked about a run that is long enough, with the last rates going on. The arrivals of a trace cannot be
    continued, and some runs would have too many requests; there the closed form must see room for preemptions, which
    it does not know.

    Args:
        workload: What the server is asked.
        profile: Of the server.
        configuration: How it is started.
        traffic: The traffic of the workload.
        answer: The twin's, of the run that ended too soon.
    """
    duration_s = max(answer["least_duration_s"], _PROLONGED * workload.duration_s)
    if workload.trace is None:
        last = sum(adapter.rate[-1][1] for adapter in workload.adapters)
        if max(last, float(traffic.rate.sum())) * duration_s <= _MAX_PROLONGED_REQUESTS:
            longer = replace(workload, duration_s=duration_s)
            return not simulate(longer, profile, configuration, by_adapter=False)["starved"]
    rank = allowed_rank(int(traffic.rank.max(initial=1)))
    used = estimate(traffic, profile, configuration.slots, rank)[UTILISATION]
    return bool(used < _SUSTAINED)


def latency_ms(answer: dict[str, Any]) -> float:
    """The 99th percentile of TTFT, milliseconds; infinite where nobody who asked is served."""
    if answer["starved"] or answer["memory_error"]:
        return float("inf")
    p99 = answer["ttft_ms"]["p99"]
    if p99 is None:
        return float("inf") if answer["requests"]["arrived"] else 0.0
    return float(p99)
