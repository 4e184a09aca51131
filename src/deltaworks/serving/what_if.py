"""Answers to what a platform team asks next: one more adapter, twice the traffic, another GPU, larger ranks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from deltaworks.errors import PlacementError
from deltaworks.serving.judge import Demand, Judge, latency_ms
from deltaworks.serving.parts import Piece
from deltaworks.serving.placement import Gpu, Placement, Told, place, place_on
from deltaworks.serving.profile import RANKS
from deltaworks.serving.workload import Adapter, Workload
from deltaworks.units import format_time
from deltaworks.wording import counted


def what_if(judge: Judge, placement: Placement, told: Told = lambda _: None) -> list[dict[str, Any]]:
    """Answers, each with ``question``, ``answer``, and ``gpus`` and ``ttft_p99_ms`` as they would be.

    Args:
        judge: That accepted the placement; of one type of GPU.
        placement: It.
        told: Is told which question is being answered.
    """
    found = []
    for question, ask in (
        ("one more adapter", _one_more),
        ("twice the traffic", _twice),
        ("one more GPU", _another_gpu),
        ("twice the ranks", _larger_ranks),
    ):
        told(question)
        found.append({"question": question, **_answered(ask, judge, placement)})
    return found


def _answered(ask: Callable[[Judge, Placement], dict[str, Any]], judge: Judge, placement: Placement) -> dict[str, Any]:
    try:
        return ask(judge, placement)
    except PlacementError as error:
        return {"answer": str(error), "gpus": None, "ttft_p99_ms": None}


def _one_more(judge: Judge, placement: Placement) -> dict[str, Any]:
    """Another adapter like the middling one: does it fit without moving any other?"""
    workload, rate = judge.demand.workload, judge.traffic[0].rate
    middle = int(np.argsort(rate, kind="stable")[rate.size // 2])
    like = workload.adapters[middle].name
    # A piece from 1 on stands for another adapter like it.
    for index, gpu in sorted(enumerate(placement.gpus), key=lambda item: len(item[1].part)):
        part = tuple(sorted((*gpu.part, Piece(middle, 1.0, 1.0))))
        if (slots := judge.fits(part, gpu.kind)) is not None:
            gpus = [*placement.gpus[:index], Gpu(gpu.kind, part, slots), *placement.gpus[index + 1 :]]
            return _told(judge, gpus, f"another like {like} fits on gpu-{index}; nothing else moves")
    count = len(placement.gpus) + 1
    return {"answer": f"another like {like} fits on none of the GPUs as they are", "gpus": count, "ttft_p99_ms": None}


def _twice(judge: Judge, placement: Placement) -> dict[str, Any]:
    workload = judge.demand.workload
    if workload.trace is not None:
        raise PlacementError("of a trace this is not known; place the trace with a shorter duration instead")
    doubled = replace(workload, adapters=tuple(_faster(a) for a in workload.adapters))
    return _placed(judge, doubled, len(placement.gpus))


def _faster(adapter: Adapter) -> Adapter:
    return replace(adapter, rate=tuple((start, 2 * rate) for start, rate in adapter.rate))


def _another_gpu(judge: Judge, placement: Placement) -> dict[str, Any]:
    kinds = [*(gpu.kind for gpu in placement.gpus), 0]
    before = _latency(judge, placement.gpus)
    found = place_on(judge, kinds, ways=1)
    after = _latency(judge, found.gpus)
    unused = "" if len(found.gpus) == len(kinds) else f"; {len(found.gpus)} of the {len(kinds)} GPUs are used"
    return _told(
        judge,
        found.gpus,
        f"the 99th percentile of TTFT goes from {format_time(before)} to {format_time(after)}{unused}",
    )


def _larger_ranks(judge: Judge, placement: Placement) -> dict[str, Any]:
    workload = judge.demand.workload
    larger = tuple(replace(a, rank=min(2 * a.rank, RANKS[-1])) for a in workload.adapters)
    return _placed(judge, replace(workload, adapters=larger), len(placement.gpus))


def _placed(judge: Judge, workload: Workload, before: int) -> dict[str, Any]:
    demand = Demand(workload, judge.demand.headroom, judge.demand.goals)
    other = Judge(demand, judge.profiles, judge.surrogates, judge.threads)
    found = place(other, bounded=False)
    count = len(found.gpus)
    now = "as now" if count == before else f"now {before:,}"
    return _told(other, found.gpus, f"{counted(count, 'GPU')}, {now}")


def _told(judge: Judge, gpus: Any, answer: str) -> dict[str, Any]:
    return {"answer": answer, "gpus": len(gpus), "ttft_p99_ms": _latency(judge, gpus)}


def _latency(judge: Judge, gpus: Any) -> float:
    return max((latency_ms(judge.ask(gpu.part, gpu.kind, gpu.slots)) for gpu in gpus), default=0.0)
