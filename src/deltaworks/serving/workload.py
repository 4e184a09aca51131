"""What a server is asked to do: adapters with their rates, and requests with their lengths, from a seed."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.documents import load_document
from deltaworks.errors import WorkloadError, quoted
from deltaworks.serving import arrivals
from deltaworks.serving.arrays import F64, I64
from deltaworks.serving.lengths import KeptLengths, Lengths, scaled
from deltaworks.serving.profile import RANKS
from deltaworks.serving.schema import adapter_name, check_keys, instead, number, text, whole
from deltaworks.serving.traces import Trace, read_trace, trace_of, zipf_shares
from deltaworks.serving.workload_size import (
    MAX_ADAPTERS,
    MAX_BURSTINESS,
    MAX_DURATION_S,
    MIN_BURSTINESS,
    MIN_DURATION_S,
    check_size,
)
from deltaworks.wording import counted

KEYS = ("duration", "seed", "lengths", "arrivals", "adapters", "requests")
ADAPTER_KEYS = ("name", "count", "rank", "rate", "burstiness", "lengths")
TRACE_KEYS = ("path", "format", "unit", "zipf")
DEFAULT_RANK = 16
_SALTS = (np.uint64(1), np.uint64(2), np.uint64(3))
_SPLIT = np.uint64(4)
_DEAL = 4


@dataclass(frozen=True)
class Adapter:
    """One adapter and its traffic.

    Attributes:
        name: Its name.
        rank: Its LoRA rank.
        rate: Pieces ``(start in seconds, requests/s)``, the first from 0; none where a trace says who asks.
        burstiness: Shape of the gamma distribution of the gaps between requests, as in vLLM's benchmark: 1 is a
            Poisson process, less is burstier.
        lengths: Its own lengths, or None for the workload's.
        interval: The part of its requests that is meant, from ``[0, 1)``; all of them are drawn first, so that disjoint
            intervals share none and together hold all.
    """

    name: str
    rank: int
    rate: tuple[tuple[float, float], ...] = ()
    burstiness: float = 1.0
    lengths: Lengths | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def expected(self, duration_s: float) -> float:
        """Requests expected in a duration."""
        ends = [*[start for start, _ in self.rate[1:]], duration_s]
        drawn = sum(r * max(min(e, duration_s) - s, 0.0) for (s, r), e in zip(self.rate, ends, strict=True))
        return drawn * (self.interval[1] - self.interval[0])


@dataclass(frozen=True)
class Workload:
    """A workload, as a file describes it.

    Attributes:
        duration_s: Seconds.
        seed: Of everything random.
        adapters: By name.
        lengths: Lengths of requests; None where a trace has them.
        trace: The requests themselves, or None where they come from rates.
        notes: What a user should know of how it was read.
    """

    duration_s: float
    seed: int
    adapters: tuple[Adapter, ...]
    lengths: Lengths | None = None
    trace: Trace | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def ranks(self) -> I64:
        """Of the adapters, (adapters,) int64."""
        return np.array([adapter.rank for adapter in self.adapters], np.int64)

    @property
    def max_rank(self) -> int:
        """The largest rank of an adapter; 0 if there is none."""
        return int(self.ranks.max(initial=0))


@dataclass(frozen=True)
class Requests:
    """The requests of a workload, in order of arrival.

    Attributes:
        arrival_s: (n,) float64.
        adapter: Place in the workload's adapters, (n,) int64; the number of adapters stands for the base model.
        prompt: Prompt tokens, (n,) int64.
        output: Output tokens, (n,) int64.
    """

    arrival_s: F64
    adapter: I64
    prompt: I64
    output: I64

    def offered_tps(self, duration_s: float) -> float:
        """Input and output tokens asked for, per second."""
        return float((self.prompt.sum() + self.output.sum()) / duration_s)


def read_workload(path: Path) -> Workload:
    """Read a workload from YAML or JSON; paths in it are relative to its folder.

    Raises:
        WorkloadError: it cannot be read, a key is unknown (a close one is suggested), or a value is impossible.
    """
    return parse_workload(read_content(path), path.parent, str(path))


def read_content(path: Path) -> Any:
    """What a workload's file holds, as keys and values; JSON is read by a JSON parser.

    Raises:
        WorkloadError: it cannot be read.
    """
    return load_document(path, "a workload", WorkloadError)


def parse_workload(content: Any, folder: Path, where: str = "workload") -> Workload:
    """A workload from what its file holds.

    Args:
        content: Keys and values, see `docs/workloads.md`.
        folder: What relative paths start from.
        where: What to call it in errors.

    Raises:
        WorkloadError: a key is unknown or missing, a value is impossible, or the workload is too large to simulate.
    """
    given = check_keys(content, KEYS, where)
    duration_s = None
    if "duration" in given:
        duration_s = number(given["duration"], f"{where}: duration", MIN_DURATION_S, most=MAX_DURATION_S)
    seed = whole(given.get("seed", 0), f"{where}: seed", most=1 << 64)
    shape = check_keys(given.get("arrivals", {}), ("burstiness",), f"{where}: arrivals").get("burstiness", 1.0)
    traced, kept = "requests" in given, KeptLengths(_lengths_reader(folder))
    adapters = _adapters_of(given.get("adapters", []), where, shape, traced, kept)
    if traced:
        if "lengths" in given:
            raise WorkloadError(f"{where}: give lengths or requests, not both: a trace has lengths of its own")
        return _of_trace(given["requests"], folder, where, adapters, seed, duration_s)
    if duration_s is None:
        raise WorkloadError(f"{where}: duration is missing; give a number of seconds")
    if not adapters:
        raise WorkloadError(f"{where}: no adapters; list them with their ranks and rates, or name a trace as requests")
    lengths = None
    if "lengths" in given:
        lengths = kept.parse(given["lengths"], f"{where}: lengths")
    elif any(a.lengths is None for a in adapters):
        raise WorkloadError(
            f"{where}: lengths is missing; for example"
            " {distribution: sharegpt, input_mean: 222.7, output_mean: 196.1}"
        )
    workload = Workload(duration_s, seed, tuple(adapters), lengths)
    check_size(workload, where)
    return workload


def _lengths_reader(folder: Path) -> Callable[[str, str | None], tuple[I64, I64]]:
    """A function from the path and the format of a trace to the prompt and output tokens of its requests."""

    @cache
    def read(path: str, form: str | None) -> tuple[I64, I64]:
        trace = read_trace(folder / path, form, "s")  # only tokens count here, whatever the unit of its times
        return trace.prompt, trace.output

    return read


def _adapters_of(entries: Any, where: str, shape: Any, traced: bool, kept: KeptLengths) -> list[Adapter]:
    """The adapters of a workload's list, by name."""
    if not isinstance(entries, list):
        raise WorkloadError(f"{where}: adapters: expected a list, {instead(entries)}")
    adapters: list[Adapter] = []
    for index, raw in enumerate(entries):
        adapters += _adapters(raw, f"{where}: adapters[{index}]", shape, traced, kept)
        if len(adapters) > MAX_ADAPTERS:
            raise WorkloadError(f"{where}: adapters: there are more than {MAX_ADAPTERS:,}, which is the most")
    counts = Counter(a.name for a in adapters)
    if len(counts) < len(adapters):
        twice = next(name for name, count in counts.items() if count > 1)
        raise WorkloadError(f"{where}: two adapters are called {quoted(twice)}")
    return sorted(adapters, key=lambda a: a.name)


def _of_trace(
    raw: Any, folder: Path, where: str, adapters: list[Adapter], seed: int, duration_s: float | None
) -> Workload:
    """A workload whose requests are a trace's."""
    trace, adapters = _trace(raw, folder, f"{where}: requests", adapters, seed)
    if len(adapters) > MAX_ADAPTERS:
        raise WorkloadError(f"{where}: requests: they name more than {MAX_ADAPTERS:,} adapters, which is the most")
    first, last = float(trace.arrival_s[0]), float(trace.arrival_s[-1])
    notes = list(trace.notes)
    if duration_s is None:
        duration_s = float(np.nextafter(last, np.inf))
        if last == 0:
            raise WorkloadError(f"{where}: duration is missing; all requests of the trace come at its start")
        if last < MIN_DURATION_S:
            raise WorkloadError(
                f"{where}: duration is missing; all requests of the trace come within {last:.2g} s, and fewer than"
                f" {MIN_DURATION_S:g} s are not simulated, so give a duration, or the unit of its times"
            )
        if duration_s > MAX_DURATION_S:
            raise WorkloadError(
                f"{where}: requests: they span {last:,.0f} s; at most {MAX_DURATION_S:,.0f} s are simulated, so give a"
                " duration"
            )
    elif first >= duration_s:
        raise WorkloadError(
            f"{where}: no request of the trace comes within the duration of {duration_s:g} s; the first comes after"
            f" {first:g} s"
        )
    elif late := int((trace.arrival_s >= duration_s).sum()):
        notes.append(
            f"{late:,} of {counted(trace.arrival_s.size, 'request')} of the trace come after the duration of"
            f" {duration_s:g} s"
            " and are left out"
        )
    return Workload(duration_s, seed, tuple(adapters), None, trace, tuple(notes))


def requests_of(workload: Workload, output_share: float = 1.0) -> Requests:
    """The requests of a workload: the same for the same workload, whatever else is asked.

    Args:
        workload: It.
        output_share: Of the tokens of a data set's reference answers, how many the model generates before it stops.
    """
    if workload.trace is not None:
        return _traced(workload)
    duration_s, adapters = workload.duration_s, workload.adapters
    seeds = np.array([stream_seed(workload.seed, a.name) for a in adapters], np.uint64)
    bounds, mass = _rates(adapters, duration_s)
    counts = arrivals.poisson_counts(seeds, np.ascontiguousarray(mass[:, -1]))
    bursty = {}
    for i, adapter in enumerate(adapters):
        if adapter.burstiness != 1.0:
            room = np.empty(int(counts[i] + 12 * np.sqrt((counts[i] + 1) / min(adapter.burstiness, 1.0)) + 64))
            counts[i] = arrivals.renewal(seeds[i], adapter.burstiness, bounds[i], mass[i], room)
            bursty[i] = room[: counts[i]].copy()
    times = np.empty(int(counts.sum()))
    arrivals.poisson(seeds, counts, bounds, mass, times)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for i, own in bursty.items():
        times[starts[i] : starts[i + 1]] = own
    prompt, output = _drawn(workload, seeds, counts, starts, output_share)
    asked = np.repeat(np.arange(len(adapters)), counts)
    if any(adapter.interval != (0.0, 1.0) for adapter in adapters):
        kept = _kept(adapters, seeds, counts)
        times, asked, prompt, output = times[kept], asked[kept], prompt[kept], output[kept]
    return Requests(*arrivals.in_order(times, asked, prompt, output, duration_s))


def _kept(adapters: tuple[Adapter, ...], seeds: Any, counts: I64) -> NDArray[np.bool_]:
    """Which of the requests drawn lie in their adapter's interval, (requests,) bool.

    Every request has a number in [0, 1), evenly spread within every 64 requests of an adapter: a random split, as a
    router with weights makes it, but for the chance of an uneven one.
    """
    place = np.empty(int(counts.sum()))
    arrivals.quantiles(seeds, counts, _SPLIT, place)
    start, end = (np.repeat([adapter.interval[i] for adapter in adapters], counts) for i in range(2))
    return np.asarray((place >= start) & (place < end))


def stream_seed(seed: int, name: str) -> int:
    """The seed of an adapter's stream: the same wherever, and beside whichever others, the adapter is served."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def _rates(adapters: tuple[Adapter, ...], duration_s: float) -> tuple[F64, F64]:
    """Where rates change and the requests expected before: (adapters, pieces + 1) float64 each."""
    pieces = max(len(a.rate) for a in adapters)
    bounds, mass = np.full((len(adapters), pieces + 1), duration_s), np.empty((len(adapters), pieces + 1))
    if pieces == 1:  # the usual case, without a loop in Python
        rates = np.array([adapter.rate[0][1] for adapter in adapters])
        bounds[:, 0], mass[:, 0] = 0.0, 0.0
        mass[:, 1] = duration_s * rates
        return bounds, mass
    for i, adapter in enumerate(adapters):
        bounds[i, : len(adapter.rate)] = np.minimum([s for s, _ in adapter.rate], duration_s)
        rates = np.array([r for _, r in adapter.rate])
        mass[i, 0] = 0.0
        mass[i, 1 : rates.size + 1] = np.cumsum(np.diff(bounds[i, : rates.size + 1]) * rates)
        mass[i, rates.size + 1 :] = mass[i, rates.size]
    return bounds, mass


def _drawn(workload: Workload, seeds: Any, counts: I64, starts: I64, output_share: float) -> tuple[I64, I64]:
    """Prompt and output tokens, adapter after adapter."""
    requests = int(starts[-1])
    chosen = np.empty((len(_SALTS), requests))
    for row, salt in enumerate(_SALTS):
        arrivals.quantiles(seeds, counts, salt, chosen[row])
    prompt, output = np.empty(requests, np.int64), np.empty(requests, np.int64)
    for lengths, where in _by_lengths(workload, starts):
        outputs = lengths.output
        if lengths.stops_early:
            outputs = scaled(outputs, max(float(outputs.mean()) * output_share, 1.0))
        arrivals.tokens(lengths.prompt, outputs, lengths.opposed, chosen[:, where], prompt[where], output[where])
    return prompt, output


def _by_lengths(workload: Workload, starts: I64) -> list[tuple[Lengths, Any]]:
    """Which requests have which lengths, as slices."""
    if all(a.lengths is None for a in workload.adapters):
        assert workload.lengths is not None
        return [(workload.lengths, slice(None))]
    return [
        (adapter.lengths or workload.lengths, slice(starts[i], starts[i + 1]))  # type: ignore[misc]
        for i, adapter in enumerate(workload.adapters)
    ]


def _adapters(raw: Any, where: str, shape: Any, traced: bool, kept: KeptLengths) -> list[Adapter]:
    """The adapters of one entry of the list: one with a name, or a group with a count."""
    given = check_keys(raw, ADAPTER_KEYS, where)
    rank = whole(given.get("rank", DEFAULT_RANK if traced else None), f"{where}.rank", 1, RANKS[-1])
    rate: tuple[tuple[float, float], ...] = ()
    if "rate" in given:
        rate = _rate(given["rate"], f"{where}.rate")
    elif not traced:
        raise WorkloadError(f"{where}: rate is missing; give requests per second")
    lengths = kept.parse(given["lengths"], f"{where}.lengths") if "lengths" in given else None
    burstiness = number(given.get("burstiness", shape), f"{where}.burstiness", MIN_BURSTINESS, most=MAX_BURSTINESS)
    if "count" not in given:
        return [Adapter(adapter_name(given.get("name"), f"{where}.name"), rank, rate, burstiness, lengths)]
    count = whole(given["count"], f"{where}.count", 1, MAX_ADAPTERS)
    prefix = adapter_name(given.get("name", f"adapter-{where.rpartition('[')[2].rstrip(']')}"), f"{where}.name")
    digits = len(str(count - 1))
    return [Adapter(f"{prefix}-{i:0{digits}}", rank, rate, burstiness, lengths) for i in range(count)]


def _rate(raw: Any, where: str) -> tuple[tuple[float, float], ...]:
    """A rate: a number, or pairs of a time in seconds and the rate from then on."""
    if not isinstance(raw, list):
        return ((0.0, number(raw, where)),)
    pairs = []
    for index, pair in enumerate(raw):
        if not isinstance(pair, list) or len(pair) != 2:
            raise WorkloadError(f"{where}[{index}]: expected [seconds, requests per second], not {quoted(pair)}")
        pairs.append((number(pair[0], f"{where}[{index}]"), number(pair[1], f"{where}[{index}]")))
    if not pairs or pairs[0][0] != 0.0 or any(b[0] <= a[0] for a, b in pairwise(pairs)):
        raise WorkloadError(f"{where}: times must start at 0 and rise")
    return tuple(pairs)


def _trace(raw: Any, folder: Path, where: str, adapters: list[Adapter], seed: int) -> tuple[Trace, list[Adapter]]:
    """A trace with an adapter for every request, and all the adapters it names."""
    exponent = 1.0
    if isinstance(raw, list):
        trace = trace_of(raw, where)
    elif isinstance(raw, str):
        trace = read_trace(folder / raw)
    else:
        given = check_keys(raw, TRACE_KEYS, where)
        exponent = number(given.get("zipf", 1.0), f"{where}.zipf", most=100)
        trace = read_trace(folder / text(given.get("path"), f"{where}.path"), given.get("format"), given.get("unit"))
    if trace.adapter is None:
        if not adapters:
            raise WorkloadError(f"{where}: the trace names no adapters; list those that share its requests")
        trace = replace(trace, adapter=_dealt(len(trace.prompt), [a.name for a in adapters], exponent, seed))
    assert trace.adapter is not None
    known = {a.name for a in adapters}
    new = sorted(set(trace.adapter) - known - {""})
    return trace, sorted([*adapters, *(Adapter(name, DEFAULT_RANK) for name in new)], key=lambda a: a.name)


def _dealt(requests: int, names: list[str], exponent: float, seed: int) -> tuple[str, ...]:
    """Deal requests to adapters by a seeded Zipf distribution over a seeded order of them."""
    rng = np.random.Generator(np.random.PCG64([seed, _DEAL]))
    order = rng.permutation(len(names))
    bounds = np.cumsum(zipf_shares(len(names), exponent))
    chosen = np.minimum(np.searchsorted(bounds, rng.random(requests), side="right"), len(names) - 1)
    return tuple(names[order[i]] for i in chosen)


def _traced(workload: Workload) -> Requests:
    trace = workload.trace
    assert trace is not None
    assert trace.adapter is not None
    places: Mapping[str, int] = {a.name: i for i, a in enumerate(workload.adapters)} | {"": len(workload.adapters)}
    kept = trace.arrival_s < workload.duration_s
    adapter = np.array([places[name] for name in trace.adapter], np.int64)
    return Requests(trace.arrival_s[kept], adapter[kept], trace.prompt[kept], trace.output[kept])


def workload_from(raw: Any, folder: Path, where: str) -> Workload:
    """A workload given as its content, or as the path of its file, from ``folder`` or from where we are.

    Raises:
        WorkloadError: it is neither, or no workload.
    """
    if not isinstance(raw, str):
        return parse_workload(raw, folder, where)
    beside = folder / text(raw, where)
    try:
        return read_workload(beside if beside.is_file() else Path(raw))
    except OSError as error:  # a name that is too long, which is_file does not take for a missing file
        raise WorkloadError(f"{where}: {quoted(raw)}: cannot be read as a workload: {error.strerror}") from None
