"""placement.json: where every adapter is served, what the twin says of it, and all that is needed to do it again."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaworks.documents import load_json
from deltaworks.errors import PlacementError, WorkloadError, did_you_mean, quoted
from deltaworks.serving.goals import Goal, goal_of
from deltaworks.serving.judge import MAX_HEADROOM, Judge
from deltaworks.serving.placement import Gpu, Placement, check_totals
from deltaworks.serving.profile import Profile, built_in_profiles, check_max_rank, parse_profile
from deltaworks.serving.schema import instead, mapping, number, text, whole
from deltaworks.serving.workload import Workload, parse_workload
from deltaworks.units import format_time
from deltaworks.wording import counted, listed

SCHEMA = 1
FILE = "placement.json"
PATIENCE_NOTE = "no adapter starves, but requests wait long for a first token; set a limit with --slo ttft_p99=2s"
PATIENCE_MS = 10_000.0
"""A 99th percentile of TTFT beyond which the headline tells it: nobody starves, but somebody waits."""


@dataclass(frozen=True)
class Recorded:
    """A placement as its file tells it.

    Attributes:
        content: What the file holds.
        workload: What was placed.
        profiles: The types of GPU, by name.
        prices: Of a GPU of each type, by name, or None.
        gpus: For each GPU its id, its type's name, its adapters' shares by name, and its slots.
        idle: Ids of further GPUs, which serve nothing.
        headroom: How much more traffic every GPU was to take, a share.
        goals: The latencies that were to be kept.
    """

    content: Mapping[str, Any]
    workload: Workload
    profiles: dict[str, Profile]
    prices: dict[str, float] | None
    gpus: tuple[tuple[str, str, dict[str, float], int], ...]
    idle: tuple[str, ...] = ()
    headroom: float = 0.1
    goals: tuple[Goal, ...] = ()


def describe(
    judge: Judge,
    placement: Placement,
    content: Any,
    asked: Mapping[str, Any],
    prices: Mapping[str, float] | None,
    ids: Sequence[str] | None = None,
) -> dict[str, Any]:
    """What placement.json holds.

    Args:
        judge: That accepted it.
        placement: It.
        content: The workload, as its file has it.
        asked: Objective, and what else the user asked for.
        prices: Of a GPU of each type, by name.
        ids: Of the GPUs; None to number them.
    """
    names = ids or [f"gpu-{i}" for i in range(len(placement.gpus))]
    gpus = [_gpu(judge, name, gpu) for name, gpu in zip(names, placement.gpus, strict=True)]
    check_totals(judge, placement.gpus)
    count, least = len(gpus), placement.lower_bound
    untried = [gpu["id"] for gpu in gpus if not gpu["predicted"]["requests"]["arrived"]]
    accepted = all(judge.passes(gpu.part, gpu.kind, gpu.slots) for gpu in placement.gpus)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "deltaworks": version("deltaworks"),
        **asked,
        "headroom": judge.demand.headroom,
        "slo": {goal.name: goal.limit_ms for goal in judge.demand.goals},
        "gpu_count": count,
        "lower_bound": least,
        "gap": None if least is None else count - least,
        "verified": None if accepted and untried else accepted,
        "untried": untried,
        "dealt": placement.dealt,
        "adapter_count": len(judge.demand.workload.adapters),
        "offered_tps": sum(gpu["predicted"]["offered_tps"] for gpu in gpus),
        "throughput_tps": sum(gpu["predicted"]["throughput_tps"] for gpu in gpus),
        "gpus": gpus,
        "waits": headline_waits([gpu["predicted"] for gpu in gpus], judge.demand.goals),
        "notes": notes(gpus, untried, judge),
        "workload": content,
        "profiles": {profile.name: profile.to_json() for profile in judge.profiles},
    }
    if prices is not None:
        found["prices"] = dict(prices)
        found["price"] = sum(prices[gpu["type"]] for gpu in gpus)
        found["price_lower_bound"] = placement.price_bound
    return found


def _gpu(judge: Judge, name: str, gpu: Gpu) -> dict[str, Any]:
    profile, workload = judge.profiles[gpu.kind], judge.demand.workload
    predicted = judge.details(gpu.part, gpu.kind, gpu.slots)
    return {
        "id": name,
        "type": profile.name,
        "adapters": [
            {
                "name": workload.adapters[piece.adapter].name,
                "share": piece.share,
                "rank": workload.adapters[piece.adapter].rank,
                "rate": float(judge.traffic[gpu.kind].rate[piece.adapter] * piece.share),
            }
            for piece in gpu.part
        ],
        "max_loras": gpu.slots,
        "max_cpu_loras": max(len(gpu.part), gpu.slots),
        "max_lora_rank": judge.rank_of(gpu.part),
        "predicted": {k: v for k, v in predicted.items() if k != "wall_s"},
    }


def notes(gpus: list[dict[str, Any]], untried: Sequence[str], judge: Judge) -> list[str]:
    """What a user should know before using a placement.

    Args:
        gpus: As placement.json has them.
        untried: Ids of those on which no request arrives.
        judge: That accepted them.
    """
    found = list(judge.demand.workload.notes)
    said = [gpu["predicted"] for gpu in gpus]
    if headline_waits(said, judge.demand.goals):
        found.append(PATIENCE_NOTE)
    if untried:
        where = "" if len(untried) == len(gpus) else f" on {listed(untried)}"
        found.append(
            f"no request arrives{where} in the {judge.demand.workload.duration_s:g} s that were simulated, so the twin"
            f" tried nothing{' there' if where else ''}; give higher rates or a longer duration"
        )
    if refused := sum(answer["requests"]["rejected"] for answer in said):
        found.append(
            f"{counted(refused, 'request is', 'requests are')} refused: longer than the GPU's KV cache or the model's"
            " length"
        )
    if short := [(gpu["id"], note) for gpu in gpus for note in gpu["predicted"]["notes"]]:
        found.append(f"on {short[0][0]}, {short[0][1]}")
    if unjudged := sorted({name for answer in said for name in answer["unjudged_adapters"]}):
        found.append(
            f"{counted(len(unjudged), 'adapter')} cannot be judged, because the run ends before any of their requests"
            f" on a GPU is served: {listed(unjudged)}; give a longer duration to have them judged"
        )
    if any(a["share"] < 1 for gpu in gpus for a in gpu["adapters"]):
        found.append("some adapters are served by several GPUs; routes.json says which share of requests each takes")
    trace = judge.demand.workload.trace
    if trace is not None and (plain := _base_requests(judge)):
        found.append(
            f"{counted(plain, 'request of the trace is', 'requests of the trace are')} for the base model itself and"
            f" placed nowhere"
        )
    found += [assumed_note(p) for p in judge.profiles if p.assumed]
    for profile, surrogate in zip(judge.profiles, judge.surrogates, strict=True):
        if surrogate is None:
            found.append(
                f"{profile.name} has no surrogate, so slots were proposed by the closed-form estimate alone; train one"
                f" with: deltaworks surrogate train --profile"
                f" {profile.name if profile.name in built_in_profiles() else 'FILE'}"
            )
    return found


def assumed_note(profile: Profile) -> str:
    """Says that costs of a profile were not measured."""
    costs = counted(len(profile.assumed), f"cost of {profile.name} was", f"costs of {profile.name} were")
    named = listed(list(profile.assumed), 3)
    return f"{costs} not measured but assumed ({named}); the profile's file says why, under assumed"


def _base_requests(judge: Judge) -> int:
    """Requests for the base model itself that arrive in the duration."""
    workload = judge.demand.workload
    assert workload.trace is not None
    own = workload.trace.by_adapter.get("")
    return 0 if own is None else int((workload.trace.arrival_s[own] < workload.duration_s).sum())


def headline_waits(answers: Sequence[Mapping[str, Any]], goals: Sequence[Goal]) -> str:
    """The worst median and 99th percentile of TTFT for the headline, where they are long and no goal limits them.

    Args:
        answers: Of `simulate`, one for each GPU.
        goals: Latencies that were asked for.
    """
    p50, p99 = (max((answer["ttft_ms"][q] or 0.0 for answer in answers), default=0.0) for q in ("p50", "p99"))
    if p99 <= PATIENCE_MS or any(goal.quantity == "ttft" for goal in goals):
        return ""
    return f"TTFT p50 {format_time(p50)}, p99 {format_time(p99)}"


def with_traces(
    content: Mapping[str, Any], origin: Path, taken: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Path]]:
    """A workload's content for another folder, and the traces to be copied there, by the names they get.

    Args:
        content: The workload as its file has it: one that `parse_workload` accepts.
        origin: The folder of that file.
        taken: Names of other files in the new folder, which no trace gets.
    """
    traces: dict[str, Path] = {}

    def copied(path: str) -> str:
        source, number = (origin / path).resolve(), 1
        name = source.name
        while name in taken or traces.get(name, source) != source:
            number += 1
            name = f"{source.stem}-{number}{source.suffix}"
        traces[name] = source
        return name

    def moved(key: str, value: Any) -> Any:
        if key == "requests" and isinstance(value, str):
            return copied(value)
        if key in ("requests", "lengths") and isinstance(value, Mapping) and isinstance(value.get("path"), str):
            return {**value, "path": copied(value["path"])}
        if key == "adapters" and isinstance(value, list):
            return [{k: moved(k, v) for k, v in entry.items()} for entry in value]
        return value

    return {key: moved(key, value) for key, value in content.items()}, traces


_GPU_ID = re.compile("[a-z0-9](?:[-a-z0-9]{0,56}[a-z0-9])?")
"""Ids of GPUs: part of the names of Kubernetes services, which are DNS labels."""
_SHARES = 1e-6
"""Shares of an adapter add up to 1 within this."""


def read_placement(path: Path) -> Recorded:
    """A placement from its file, or from the folder that holds it.

    Raises:
        PlacementError: it is none, of another version, or does not say where every adapter is served.
        WorkloadError: its workload is malformed.
        ProfileError: one of its profiles is malformed.
    """
    file = path / FILE if path.is_dir() else path
    content = load_json(file, "a placement", PlacementError)
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "gpus" not in content:
        raise PlacementError(f"{file}: is not a placement of version {SCHEMA}; make it again with `deltaworks place`")
    workload = parse_workload(content.get("workload"), file.parent, f"{file}: workload")
    try:
        profiles = _profiles(content.get("profiles"), file)
        gpus = _gpus(content["gpus"], profiles, {adapter.name: adapter.rank for adapter in workload.adapters})
        prices = _prices(content.get("prices"), profiles)
        headroom = number(content.get("headroom", 0.1), "headroom", most=MAX_HEADROOM)
        goals = tuple(
            goal_of(name, number(limit_ms, f"slo.{name}", above=True))
            for name, limit_ms in mapping(content.get("slo", {}), "slo").items()
        )
    except (WorkloadError, PlacementError) as error:
        raise PlacementError(f"{file}: is damaged: {error}; make it again with `deltaworks place`") from None
    served = tuple(gpu for gpu in gpus if gpu[2])
    idle = tuple(gpu[0] for gpu in gpus if not gpu[2])
    return Recorded(content, workload, profiles, prices, served, idle, headroom, goals)


def _profiles(raw: Any, file: Path) -> dict[str, Profile]:
    """The types of GPU, by name."""
    found = {name: parse_profile(value, f"{file}: profiles.{name}") for name, value in mapping(raw, "profiles").items()}
    for name, profile in found.items():
        if profile.name != name:
            raise WorkloadError(f"profiles.{quoted(name)}: is called {quoted(profile.name)}")
    return found


def _gpus(
    raw: Any, profiles: Mapping[str, Profile], ranks: Mapping[str, int]
) -> list[tuple[str, str, dict[str, float], int]]:
    """The GPUs of a recorded placement, as `Recorded.gpus` and those that serve nothing.

    Args:
        raw: What the file holds.
        profiles: The types of GPU, by name.
        ranks: Of the workload's adapters, by name.
    """
    if not isinstance(raw, list):
        raise WorkloadError(f"gpus: expected a list, {instead(raw)}")
    found: list[tuple[str, str, dict[str, float], int]] = []
    total = dict.fromkeys(ranks, 0.0)
    ids: set[str] = set()
    for index, value in enumerate(raw):
        where = f"gpus[{index}]"
        given = mapping(value, where)
        name, kind = text(given.get("id"), f"{where}.id"), text(given.get("type"), f"{where}.type")
        if not _GPU_ID.fullmatch(name):
            raise WorkloadError(
                f"{where}.id: {quoted(name)} is not an id; GPU ids have 1 to 58 characters: lower-case letters, digits"
                " and inner hyphens"
            )
        if name in ids:
            raise WorkloadError(f"{where}.id: two GPUs are called {name!r}")
        ids.add(name)
        if kind not in profiles:
            raise WorkloadError(f"{where}.type: there is no profile {quoted(kind)}{did_you_mean(kind, profiles)}")
        slots = whole(given.get("max_loras"), f"{where}.max_loras", 1)
        own = _shares(given.get("adapters"), where, ranks)
        if "max_cpu_loras" in given:
            whole(given["max_cpu_loras"], f"{where}.max_cpu_loras", slots)
        if "max_lora_rank" in given:
            largest = check_max_rank(whole(given["max_lora_rank"], f"{where}.max_lora_rank", 1))
            for adapter in own:
                if ranks[adapter] > largest:
                    raise WorkloadError(
                        f"{where}.max_lora_rank: {largest} is less than rank {ranks[adapter]} of {quoted(adapter)}"
                    )
        for adapter, share in own.items():
            total[adapter] += share
        found.append((name, kind, own, slots))
    for adapter, share in total.items():
        if abs(share - 1.0) > _SHARES:
            raise WorkloadError(f"gpus: shares of adapter {quoted(adapter)} add up to {share:.7g}, not 1")
    return found


def _shares(raw: Any, where: str, ranks: Mapping[str, int]) -> dict[str, float]:
    """The shares of a GPU's adapters, by name."""
    if not isinstance(raw, list):
        raise WorkloadError(f"{where}.adapters: expected a list, {instead(raw)}")
    found: dict[str, float] = {}
    for index, value in enumerate(raw):
        at = f"{where}.adapters[{index}]"
        given = mapping(value, at)
        name, share = text(given.get("name"), f"{at}.name"), number(given.get("share"), f"{at}.share", above=True)
        if name not in ranks:
            raise WorkloadError(f"{at}.name: the workload has no adapter {quoted(name)}{did_you_mean(name, ranks)}")
        if name in found:
            raise WorkloadError(f"{at}.name: {quoted(name)} is on this GPU twice")
        if share > 1.0 + _SHARES:
            raise WorkloadError(f"{at}.share: expected at most 1, not {share:g}")
        found[name] = share
    return found


def _prices(raw: Any, profiles: Mapping[str, Profile]) -> dict[str, float] | None:
    """Prices by the type of GPU, or None where there are none."""
    if raw is None:
        return None
    given = mapping(raw, "prices")
    if set(given) != set(profiles):
        raise WorkloadError(f"prices: expected one for each of {', '.join(profiles)}, not for {quoted(list(given))}")
    return {name: number(value, f"prices.{name}", above=True) for name, value in given.items()}
