"""A small server for tests, workloads for it, and what must hold of every placement."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaworks.serving.goals import parse_goal
from deltaworks.serving.judge import Demand, Judge
from deltaworks.serving.parts import part_of
from deltaworks.serving.placement import Placement
from deltaworks.serving.profile import FrontEnd, KvCache, LoadTime, Profile, ServerFlags, StepTime
from deltaworks.serving.workload import Workload, parse_workload, requests_of

SMALL = Profile(
    "small", "vLLM 0.11.0", "org/model", "g", KvCache(6000, 10, 5, 1000),
    StepTime(5, 0.02, 0.03, 5e-5, lora=1, adapter=0.4, lora_decode=0.01, lora_prefill=0.02),
    ServerFlags(32, 512, 16), loading=LoadTime(5, 0.1, 40, 2), front_end=FrontEnd(4, 2, 0.0, 0, 32),
)  # fmt: skip
LENGTHS = {"distribution": "fixed", "input_mean": 100, "output_mean": 50}


def workload(adapters: list[dict[str, Any]], **changed: Any) -> Workload:
    return parse_workload({"duration": 120, "lengths": LENGTHS, "adapters": adapters} | changed, Path())


def judge(asked: Workload, headroom: float = 0.1, goals: tuple[str, ...] = (), *profiles: Profile) -> Judge:
    types = profiles or (SMALL,)
    demand = Demand(asked, headroom, tuple(parse_goal(goal) for goal in goals))
    return Judge(demand, types, [None] * len(types))


def check_placement(asker: Judge, found: Placement) -> None:
    """What holds of every placement."""
    served: dict[int, float] = {}
    intervals: dict[int, list[tuple[float, float]]] = {}
    for gpu in found.gpus:
        assert gpu.part
        assert list(gpu.part) == sorted(gpu.part)
        for piece in gpu.part:
            assert 0 < piece.share <= 1
            served[piece.adapter] = served.get(piece.adapter, 0.0) + piece.share
            intervals.setdefault(piece.adapter, []).append((piece.start, piece.start + piece.share))
            assert asker.demand.workload.adapters[piece.adapter].rank <= asker.rank_of(gpu.part)
        for factor in {1.0, 1 + asker.demand.headroom}:
            answer = asker.ask(gpu.part, gpu.kind, gpu.slots, factor)
            assert not answer["memory_error"]
            assert not answer["starved_adapters"]
            assert all(goal.met(answer) for goal in asker.demand.goals)
    assert sorted(served) == list(range(len(asker.demand.workload.adapters)))
    assert all(share == pytest.approx(1.0) for share in served.values())
    for own in intervals.values():
        bounds = sorted(own)
        assert bounds[0][0] == 0
        assert bounds[-1][1] == pytest.approx(1.0)
        assert all(a[1] == pytest.approx(b[0]) for a, b in itertools.pairwise(bounds))
    assert found.lower_bound is None or found.lower_bound <= len(found.gpus)
    # Every request is offered once.
    whole = requests_of(asker.demand.workload)
    parts = [requests_of(part_of(asker.demand.workload, gpu.part)) for gpu in found.gpus]
    chosen = whole.adapter < len(asker.demand.workload.adapters)
    for column in ("prompt", "output", "arrival_s"):
        offered = np.concatenate([getattr(part, column) for part in parts])
        assert np.array_equal(np.sort(offered), np.sort(getattr(whole, column)[chosen]))
