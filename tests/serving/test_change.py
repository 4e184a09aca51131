"""Placements of changed workloads, what-if, advice, and the simpler ways beside ours."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_server import SMALL, check_placement, judge, workload

from deltaworks.errors import ImpossibleError, PlacementError, WorkloadError
from deltaworks.serving.advice import alike, capacities, of_adapters, overheads
from deltaworks.serving.baselines import compare
from deltaworks.serving.change import Change, _new_gpu, _repair, _roomiest, _without, change
from deltaworks.serving.change import _State as change_state
from deltaworks.serving.document import FILE, describe, read_placement
from deltaworks.serving.goals import parse_goal
from deltaworks.serving.partition import weights
from deltaworks.serving.placement import place
from deltaworks.serving.profile import KvCache, Profile
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.what_if import what_if
from deltaworks.serving.workload import parse_workload

LENGTHS = {"distribution": "fixed", "input_mean": 100, "output_mean": 50}


def content(**rates: float) -> dict[str, Any]:
    adapters = [{"name": name, "rank": 8, "rate": rate} for name, rate in rates.items()]
    return {"duration": 120, "lengths": LENGTHS, "adapters": adapters}


BEFORE = {f"a{i:02}": 2.0 for i in range(100)}


def changed(tmp_path: Path, before: dict[str, float], rates: dict[str, float]) -> tuple[Change, Any]:
    old = judge(workload(content(**before)["adapters"]))
    found = place(old)
    assert len(found.gpus) > 1
    (tmp_path / FILE).write_text(json.dumps(describe(old, found, content(**before), {}, None)))
    asker = judge(workload(content(**rates)["adapters"]))
    after = change(asker, read_placement(tmp_path))
    check_placement(asker, after.placement)
    return after, found


def test_nothing_moves_if_nothing_changed(tmp_path: Path) -> None:
    after, found = changed(tmp_path, BEFORE, BEFORE)
    assert after.moves == []
    assert [gpu.part for gpu in after.placement.gpus] == [gpu.part for gpu in found.gpus]


def test_a_new_adapter_moves_no_other(tmp_path: Path) -> None:
    after, _ = changed(tmp_path, BEFORE, BEFORE | {"zz": 0.1})
    assert [(m["adapter"], m["from"], m["why"]) for m in after.moves] == [("zz", [], "it is new")]


def test_an_adapter_that_grew_makes_some_move(tmp_path: Path) -> None:
    after, _ = changed(tmp_path, BEFORE, BEFORE | {"a00": 100.0})
    assert after.moves
    assert all("would starve" in move["why"] or "it frees" in move["why"] for move in after.moves)
    assert len(after.moves) < len(BEFORE) / 2


SMALL_MEMORY = replace(SMALL, name="small-memory", kv_cache=KvCache(6000, 10, 20, 1000))
BIG = replace(SMALL, name="big", kv_cache=KvCache(100_000, 10, 20, 1000))


@pytest.mark.parametrize(
    ("rank", "types", "goals", "error"),
    [
        pytest.param(512, (SMALL_MEMORY, BIG), (), None, id="the old type has no memory for the new rank"),
        pytest.param(
            8, (SMALL_MEMORY,), ("ttft_p99=12ms",), "latency goals are missed|cannot be kept", id="hopeless goal"
        ),
    ],
)
def test_a_change_that_the_old_gpus_cannot_follow_ends(
    tmp_path: Path, rank: int, types: tuple[Profile, ...], goals: tuple[str, ...], error: str | None
) -> None:
    rates = {"a": 1.0}
    old = judge(workload(content(**rates)["adapters"]), 0.1, (), SMALL_MEMORY)
    (tmp_path / FILE).write_text(json.dumps(describe(old, place(old), content(**rates), {}, None)))
    grown = [entry | {"rank": rank} for entry in content(**rates)["adapters"]]
    asker = judge(workload(grown), 0.1, goals, *types)
    if error is not None:
        with pytest.raises(ImpossibleError, match=error):
            change(asker, read_placement(tmp_path))
        return
    after = change(asker, read_placement(tmp_path))
    check_placement(asker, after.placement)
    assert {types[gpu.kind].name for gpu in after.placement.gpus if gpu.part} == {"big"}


def test_the_number_of_gpus_is_bounded() -> None:
    asker = judge(workload(content(a=1.0)["adapters"]))
    state = change_state(["gpu-0"], [0], [{0: 1.0}], most_gpus=2)
    assert _roomiest(asker, state, 0, 0.5, 0) == 1
    with pytest.raises(PlacementError, match="could not be mended with at most 2 GPUs; make a new one without --from"):
        _new_gpu(asker, state, 0)


def test_a_gpu_is_freed_when_traffic_falls(tmp_path: Path) -> None:
    after, found = changed(tmp_path, BEFORE, dict.fromkeys(BEFORE, 0.2))
    assert len(after.placement.gpus) < len(found.gpus)
    assert any("it frees gpu-" in move["why"] for move in after.moves)


HOT = {"hot": 60.0} | {f"b{i}": 1.0 for i in range(6)}


@pytest.mark.parametrize(
    ("rates", "why"),
    [
        pytest.param(HOT | {"hot": 6.0}, "it frees gpu-", id="both shares of the hot one are lighter"),
        pytest.param(HOT | {"hot": 0.0}, "it has too few requests to be split", id="nobody asks for it"),
        pytest.param(dict.fromkeys(HOT, 0.02), "it frees gpu-", id="all ask next to nothing"),
        pytest.param({"hot": 1e-5, "b1": 1.0}, "it has too few requests to be split", id="less than a request is left"),
        pytest.param(
            {"hot": 1e-3, "b1": 1.0}, "it has too few requests to be split", id="no request of a half arrives"
        ),
        pytest.param({"hot": 0.05}, "it frees gpu-", id="it is left alone"),
    ],
)
def test_shares_of_a_split_adapter_meet_when_traffic_falls(tmp_path: Path, rates: dict[str, float], why: str) -> None:
    after, found = changed(tmp_path, HOT, rates)
    served = [gpu for gpu in found.gpus if any(piece.share < 1.0 for piece in gpu.part)]
    assert len(served) > 1  # else nothing was split before
    assert len(after.placement.gpus) == len(after.fresh.gpus) == len(after.ids) == 1
    assert next(move["why"] for move in after.moves if move["adapter"] == "hot").startswith(why)
    assert all(piece.share == 1.0 for piece in after.placement.gpus[0].part)


@pytest.mark.parametrize(
    "rates",
    [
        pytest.param(HOT | {"hot": 90.0}, id="half more"),
        pytest.param(HOT | {"hot": 150.0}, id="much more"),
        pytest.param(HOT | {"b0": 60.0}, id="a second hot one"),
    ],
)
def test_a_split_adapter_is_spread_by_the_room_there_is(tmp_path: Path, rates: dict[str, float]) -> None:
    after, _ = changed(tmp_path, HOT, rates)
    assert len(after.placement.gpus) <= len(after.fresh.gpus) + 1


def test_a_share_that_no_request_reaches_is_merged_again() -> None:
    rows = [{"time": t, "adapter": "a", "prompt_tokens": 9, "output_tokens": 3} for t in (1, 2)]
    asker = judge(parse_workload({"duration": 60, "requests": rows}, Path()))
    # The two requests lie at 0.62 and 0.24 of the adapter's interval.
    state = change_state(["gpu-0", "gpu-1"], [0, 0], [{0: 0.2}, {0: 0.8}], most_gpus=9)
    _repair(asker, state, weights(asker.traffic[0], SMALL, 2))
    assert state.shares == [{}, {0: 1.0}]


def test_every_step_that_frees_gpus_leaves_fewer() -> None:
    asker = judge(workload(content(**HOT)["adapters"]))
    shares = [{0: 0.5, 1: 1.0, 2: 1.0}, {0: 0.5, 3: 1.0}, {4: 1.0}, {5: 1.0, 6: 1.0}]
    state = change_state([f"gpu-{i}" for i in range(4)], [0] * 4, shares, most_gpus=4)
    weight = weights(asker.traffic[0], SMALL, 4)
    for gone, hot in itertools.product(range(4), (float("inf"), 0.3, 0.0)):
        trial = _without(asker, state, gone, hot, weight)
        assert trial is not None
        assert trial.ids == [name for g, name in enumerate(state.ids) if g != gone]
        for adapter in range(7):
            assert sum(own.get(adapter, 0.0) for own in trial.shares) == pytest.approx(1.0)


def test_what_if_answers() -> None:
    asker = judge(workload(content(**BEFORE)["adapters"]))
    found = place(asker)
    answers = {answer["question"]: answer for answer in what_if(asker, found)}
    assert list(answers) == ["one more adapter", "twice the traffic", "one more GPU", "twice the ranks"]
    assert answers["twice the traffic"]["gpus"] > len(found.gpus)
    assert answers["one more GPU"]["gpus"] == len(found.gpus) + 1
    assert answers["twice the ranks"]["gpus"] >= len(found.gpus)


def test_the_simpler_ways_need_no_fewer() -> None:
    adapters = [
        {"name": "hot", "count": 4, "rank": 32, "rate": 12.0},
        {"name": "x", "count": 60, "rank": 8, "rate": 0.4},
    ]
    asker = judge(workload(adapters))
    found = place(asker)
    table = compare(asker, 0, len(found.gpus))
    assert set(table) == {"by count", "round robin", "random", "rate-balanced", "as many as fit in memory"}
    for row in table.values():
        good = row["gpus"] is not None and not row["starved"] and not row["memory_errors"]
        assert not good or row["gpus"] >= len(found.gpus)


def test_advice_is_what_the_twin_says() -> None:
    one = alike(8, 0.5, LENGTHS, 120.0)
    rows = capacities(SMALL, one, 0.0, (), lambda _: None)
    best = max(rows, key=lambda row: row["adapters"])
    assert best["slots"] > 1
    for row in rows[::6]:
        slots = min(row["slots"], row["adapters"])
        answer = simulate(of_adapters(one, row["adapters"]), SMALL, Configuration(slots, 8))
        assert not answer["starved"]
        assert answer["throughput_tps"] == row["throughput_tps"]
    assert sum(row["slots"] >= best["adapters"] for row in rows) <= 1
    quick = capacities(SMALL, one, 0.0, [parse_goal("ttft_p99=150ms")], lambda _: None)
    assert max(row["adapters"] for row in quick) < best["adapters"]
    assert all(row["ttft_p99_ms"] <= 150 for row in quick)
    costs = overheads(SMALL, 8, 10)
    assert set(costs) == {"memory", "model", "loading", "scheduler"}
    assert "10 slots of rank 8" in costs["memory"]
    assert "5.8 ms from host memory" in costs["loading"]
    with pytest.raises(WorkloadError, match="rate: expected a number above 0"):
        alike(8, 0.0, LENGTHS)


def test_small_cases_are_proven() -> None:
    pytest.importorskip("ortools")
    from deltaworks.serving.exact import fewest_gpus

    adapters = [{"name": "a", "count": 9, "rank": 8, "rate": 9.0}, {"name": "b", "count": 5, "rank": 32, "rate": 3.0}]
    asker = judge(workload(adapters))
    found = place(asker)
    proven = fewest_gpus(asker, 0, len(found.gpus) + 1)
    assert proven is not None
    assert found.lower_bound is not None
    assert found.lower_bound <= proven
    split = any(piece.share < 1 for gpu in found.gpus for piece in gpu.part)
    assert split or proven == len(found.gpus)
    many = judge(workload([{"name": f"a{i}", "rank": 8, "rate": 0.1 + i} for i in range(13)]))
    with pytest.raises(PlacementError, match="up to 12 kinds"):
        fewest_gpus(many, 0, 3)


def test_an_adapter_goes_where_there_is_room() -> None:
    asker = judge(workload(content(**BEFORE)["adapters"]))
    shares = [dict.fromkeys(range(start, stop), 1.0) for start, stop in ((0, 10), (10, 90), (90, 100))]
    state = change_state(["gpu-0", "gpu-1", "gpu-2"], [0, 0, 0], shares)
    # Both others are alike but for their numbers: the first is taken, as long as both are asked about the same.
    assert _roomiest(asker, state, 50, 1.0, 1) == 0
    del shares[2][99]
    assert _roomiest(asker, state, 50, 1.0, 1) == 2


def test_a_tiny_workload_on_several_types_needs_no_bound() -> None:
    asker = judge(workload([{"name": "a", "count": 3, "rank": 8, "rate": 0.01}]), 0.1, (), SMALL, SMALL)
    assert len(place(asker, [2.0, 1.0]).gpus) == 1
    assert asker.runs < 20


def test_what_was_assumed_or_left_out_is_noted() -> None:
    assumed = {"step.context": "steps.csv has no column 'context'", "step.lora": "no step shows it"}
    rows = [{"time": t, "adapter": "a", "prompt_tokens": 9, "output_tokens": 3} for t in (1, 2, 99)]
    asker = judge(parse_workload({"duration": 60, "requests": rows}, Path()), 0.1, (), replace(SMALL, assumed=assumed))
    said = describe(asker, place(asker), {}, {}, None)["notes"]
    assert "1 of 3 requests of the trace come after the duration of 60 s and are left out" in said
    assert any(
        note.startswith("2 costs of small were not measured but assumed (step.context and step.lora)") for note in said
    )
