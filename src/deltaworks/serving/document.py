"""placement.json: where every adapter is served, what the twin says of it, and all that is needed to do it again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaworks.errors import PlacementError, UserError
from deltaworks.serving.judge import Goal, Judge
from deltaworks.serving.placement import Gpu, Placement, check_totals
from deltaworks.serving.profile import Profile, parse_profile
from deltaworks.serving.workload import Workload, parse_workload
from deltaworks.units import format_time

SCHEMA = 1
FILE = "placement.json"
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
    """

    content: Mapping[str, Any]
    workload: Workload
    profiles: dict[str, Profile]
    prices: dict[str, float] | None
    gpus: tuple[tuple[str, str, dict[str, float], int], ...]


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
    count = len(gpus)
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "deltaworks": version("deltaworks"),
        **asked,
        "headroom": judge.demand.headroom,
        "slo": {goal.name: goal.limit_ms for goal in judge.demand.goals},
        "gpu_count": count,
        "lower_bound": placement.lower_bound,
        "gap": count - placement.lower_bound,
        "verified": all(judge.passes(gpu.part, gpu.kind, gpu.slots) for gpu in placement.gpus if gpu.part),
        "dealt": placement.dealt,
        "adapter_count": len(judge.demand.workload.adapters),
        "offered_tps": sum(gpu["predicted"]["offered_tps"] for gpu in gpus),
        "throughput_tps": sum(gpu["predicted"]["throughput_tps"] for gpu in gpus),
        "gpus": gpus,
        "waits": headline_waits([gpu["predicted"] for gpu in gpus], judge.demand.goals),
        "notes": notes(gpus, judge),
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
    predicted = judge.ask(gpu.part, gpu.kind, gpu.slots) if gpu.part else None
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
        "predicted": {k: v for k, v in predicted.items() if k != "wall_s"} if predicted else idle(profile, judge),
    }


def idle(profile: Profile, judge: Judge) -> dict[str, Any]:
    """What the twin would say of a GPU with nothing to do."""
    return {
        "throughput_tps": 0.0, "offered_tps": 0.0, "starved": False, "starved_adapters": [], "starved_server": False,
        "memory_error": False, "kv_tokens": profile.kv_tokens(1, judge.rank_of(())), "adapters": {}, "notes": [],
        "requests": {"arrived": 0, "completed": 0, "running": 0, "waiting": 0, "rejected": 0},
        "ttft_ms": {"mean": None, "p50": None, "p99": None}, "itl_ms": {"mean": None, "p50": None, "p99": None},
    }  # fmt: skip


def notes(gpus: list[dict[str, Any]], judge: Judge) -> list[str]:
    """What a user should know before using a placement."""
    found = list(judge.demand.workload.notes)
    said = [gpu["predicted"] for gpu in gpus]
    if headline_waits(said, judge.demand.goals):
        found.append("nobody starves, but requests wait for slots; ask for less with --slo ttft_p99=2s")
    if not sum(answer["requests"]["arrived"] for answer in said):
        found.append("no request arrives in the time simulated, so nothing was tried; give a longer duration")
    if refused := sum(answer["requests"]["rejected"] for answer in said):
        found.append(f"{refused:,} requests are longer than the KV cache of their GPU and are refused")
    if short := [(gpu["id"], note) for gpu in gpus for note in gpu["predicted"]["notes"]]:
        found.append(f"on {short[0][0]}, {short[0][1]}")
    if any(a["share"] < 1 for gpu in gpus for a in gpu["adapters"]):
        found.append("some adapters are served by several GPUs; routes.json says which share of requests each takes")
    trace = judge.demand.workload.trace
    if trace is not None and (plain := (trace.adapter or ()).count("")):
        found.append(f"{plain:,} requests of the trace are for the base model itself; they are placed nowhere")
    found += [
        f"{len(p.assumed)} costs of {p.name}, such as {next(iter(p.assumed))}, were not measured; its file says which"
        " and why, under assumed"
        for p in judge.profiles
        if p.assumed
    ]
    for profile, surrogate in zip(judge.profiles, judge.surrogates, strict=True):
        if surrogate is None:
            found.append(
                f"{profile.name} has no surrogate, so slots were proposed by the closed-form estimate alone; train one"
                " with: deltaworks surrogate train"
            )
    return found


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


def with_traces(content: Any, origin: Path) -> tuple[Any, dict[str, Path]]:
    """A workload's content for another folder, and the traces to be copied there, by the names they get.

    Args:
        content: As its file has it.
        origin: The folder of that file.
    """
    traces: dict[str, Path] = {}

    def moved(value: Any, key: str = "") -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if isinstance(value, Mapping):
            return {name: moved(item, name) for name, item in value.items()}
        if not isinstance(value, str) or key not in ("path", "requests"):
            return value
        source, number = (origin / value).resolve(), 1
        name = source.name
        while traces.get(name, source) != source:
            number += 1
            name = f"{source.stem}-{number}{source.suffix}"
        traces[name] = source
        return name

    return moved(content), traces


def read_placement(path: Path) -> Recorded:
    """A placement from its file, or from the folder that holds it.

    Raises:
        PlacementError: it is none, or of another version.
    """
    file = path / FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlacementError(f"{file}: cannot be read as a placement: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or "gpus" not in content:
        raise PlacementError(f"{file}: is no placement of version {SCHEMA}; make it again with `deltaworks place`")
    try:
        return Recorded(
            content,
            parse_workload(content["workload"], file.parent, f"{file}: workload"),
            {name: parse_profile(raw, f"{file}: {name}") for name, raw in content["profiles"].items()},
            content.get("prices"),
            tuple(
                (gpu["id"], gpu["type"], {a["name"]: float(a["share"]) for a in gpu["adapters"]}, int(gpu["max_loras"]))
                for gpu in content["gpus"]
            ),
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlacementError(f"{file}: is damaged: {error!r}") from None
