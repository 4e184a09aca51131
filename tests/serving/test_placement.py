"""Placements: what must hold of every one, whatever the workload."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_server import SMALL, check_placement, judge, workload

from deltaworks.errors import ImpossibleError, PlacementError
from deltaworks.serving.bound import Capacities, fewest
from deltaworks.serving.document import describe
from deltaworks.serving.goals import parse_goal
from deltaworks.serving.parts import Part, Piece, part_of
from deltaworks.serving.placement import Gpu, Placement, place, place_on
from deltaworks.serving.profile import KvCache, Profile, ServerFlags, StepTime
from deltaworks.serving.workload import Workload, parse_workload, requests_of

groups = st.lists(
    st.fixed_dictionaries({
        "count": st.integers(1, 10), "rank": st.sampled_from([8, 16, 32]),
        "rate": st.sampled_from([0.0, 0.05, 0.4, 3.0]),
        "burstiness": st.sampled_from([0.4, 1.0]),
    }),
    min_size=1, max_size=3,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(groups, st.integers(0, 2))
def test_every_adapter_is_placed_once(adapters: list[dict[str, Any]], seed: int) -> None:
    asker = judge(workload(adapters, seed=seed))
    check_placement(asker, place(asker))


@settings(max_examples=15, deadline=None)
@given(groups, st.sampled_from([1.3, 2.0, 3.0]))
def test_more_traffic_never_needs_fewer_gpus(adapters: list[dict[str, Any]], factor: float) -> None:
    more = [entry | {"rate": entry["rate"] * factor} for entry in adapters]
    assert len(place(judge(workload(adapters))).gpus) <= len(place(judge(workload(more))).gpus)


@settings(max_examples=10, deadline=None)
@given(groups, st.randoms(use_true_random=False))
def test_the_order_of_the_input_does_not_matter(adapters: list[dict[str, Any]], random: Any) -> None:
    named = [
        {"name": f"a{i}-{j}", **{k: v for k, v in entry.items() if k != "count"}}
        for i, entry in enumerate(adapters)
        for j in range(entry["count"])
    ]
    shuffled = random.sample(named, len(named))
    assert place(judge(workload(named))) == place(judge(workload(shuffled)))


def test_hot_adapters_are_split() -> None:
    asker = judge(
        workload([{"name": "hot", "rank": 8, "rate": 300}, {"name": "cold", "count": 4, "rank": 8, "rate": 0.1}])
    )
    found = place(asker)
    check_placement(asker, found)
    hot = [a.name for a in asker.demand.workload.adapters].index("hot")
    assert sum(piece.adapter == hot for gpu in found.gpus for piece in gpu.part) > 1


def test_the_bound_of_alike_adapters_is_what_they_need() -> None:
    asker = judge(workload([{"name": "a", "count": 160, "rank": 8, "rate": 1.0}]))
    found = place(asker)
    check_placement(asker, found)
    assert len(found.gpus) > 2
    assert found.lower_bound is not None
    assert len(found.gpus) - found.lower_bound <= 1


def test_the_bound_covers_every_group() -> None:
    columns = np.array([[0.5, 0.0], [0.0, 0.25], [0.3, 0.15]])
    assert fewest(columns) == pytest.approx(16 / 3)
    assert fewest(columns, np.array([1.0, 1.0, 0.5])) == pytest.approx(10 / 3)
    capacities = Capacities(judge(workload([{"name": "a", "count": 120, "rank": 8, "rate": 1.0}])), 0)
    assert capacities.columns.shape == (1, 1)
    assert 0.1 < capacities.columns[0, 0] < 1.0


def test_a_latency_goal_takes_more_gpus() -> None:
    adapters = [{"name": "a", "count": 40, "rank": 8, "rate": 0.5}]
    few, many = judge(workload(adapters)), judge(workload(adapters), 0.1, ("ttft_p99=200ms",))
    loose, strict = place(few), place(many)
    check_placement(many, strict)
    assert len(strict.gpus) >= len(loose.gpus)
    for gpu in strict.gpus:
        assert many.ask(gpu.part, gpu.kind, gpu.slots)["ttft_ms"]["p99"] <= 200


def test_the_latency_objective_uses_what_there_is() -> None:
    adapters = [{"name": "a", "count": 30, "rank": 8, "rate": 0.4}]
    asker = judge(workload(adapters))
    fewest_found, fastest = place(asker), place_on(asker, [0] * 4)
    check_placement(asker, fastest)
    assert len(fastest.gpus) == 4

    def worst(found: Placement) -> float:
        return max(float(asker.ask(g.part, g.kind, g.slots)["ttft_ms"]["p99"]) for g in found.gpus if g.part)

    assert worst(fastest) <= worst(fewest_found)
    with pytest.raises(PlacementError, match="give more with --gpus"):
        place_on(judge(workload([{"name": "a", "count": 30, "rank": 8, "rate": 5.0}])), [0])


@pytest.mark.parametrize(("count", "rate", "gpus"), [
    pytest.param(4, 0.1, 9, id="fewer adapters than GPUs"),
    pytest.param(1, 0.01, 5, id="one request cannot be divided"),
    pytest.param(2, 0.0, 3, id="nobody asks"),
])  # fmt: skip
def test_gpus_that_serve_nothing_are_left_out(count: int, rate: float, gpus: int) -> None:
    asker = judge(workload([{"name": "a", "count": count, "rank": 8, "rate": rate}]))
    found = place_on(asker, [0] * gpus)
    check_placement(asker, found)
    assert len(found.gpus) < gpus
    document = describe(asker, found, {}, {}, None)
    assert document["gpu_count"] == len(document["gpus"]) == len(found.gpus)
    assert all(gpu["adapters"] for gpu in document["gpus"])
    assert (document["lower_bound"], document["gap"]) == (None, None)


@pytest.mark.parametrize(("rates", "duration", "parts", "untried"), [
    pytest.param([0.0, 0.0], 120, None, [0], id="every rate is 0"),
    pytest.param([1e-7] * 50, 120, None, [0], id="too rare for the duration"),
    pytest.param([1.0, 0.0], 120, [[0], [1]], [1], id="nobody asks one of the GPUs"),
    pytest.param([1.0, 0.0], 120, None, [], id="somebody asks"),
])  # fmt: skip
def test_gpus_on_which_no_request_arrives_are_untried(
    rates: list[float], duration: float, parts: list[list[int]] | None, untried: list[int]
) -> None:
    adapters = [{"name": f"a{i:02}", "rank": 8, "rate": rate} for i, rate in enumerate(rates)]
    asker = judge(workload(adapters, duration=duration))
    found = place(asker)
    if parts is not None:
        gpus = [Gpu(0, tuple(Piece(adapter) for adapter in part), 1) for part in parts]
        found = Placement(tuple(gpus), 1, None, "by hand")
    document = describe(asker, found, {}, {}, None)
    assert document["untried"] == [f"gpu-{i}" for i in untried]
    assert document["verified"] is (None if untried else True)
    where = "" if len(untried) == len(found.gpus) else " on gpu-1"
    assert any(f"no request arrives{where} in the 120 s" in note for note in document["notes"]) == bool(untried)


def test_the_cheapest_types_are_taken() -> None:
    step = StepTime(2.5, 0.01, 0.015, 2e-5, adapter=0.2)
    big = Profile("big", "vLLM", "org/model", "g", KvCache(24000, 10, 5, 1000), step, ServerFlags(128, 512, 16))
    adapters = [{"name": "a", "count": 120, "rank": 8, "rate": 1.0}]
    asker = judge(workload(adapters), 0.1, (), SMALL, big)
    dear, cheap = place(asker, [1.0, 100.0]), place(asker, [1.0, 1.0])
    check_placement(asker, dear)
    check_placement(asker, cheap)
    assert {gpu.kind for gpu in dear.gpus} == {0}
    assert {gpu.kind for gpu in cheap.gpus} == {1}
    assert dear.price_bound is not None
    assert dear.price_bound <= len(dear.gpus)


def test_what_cannot_be_served_is_named() -> None:
    tiny = Profile("p", "e", "m", "g", KvCache(6000, 10, 20, 1000), StepTime(5))
    large = judge(workload([{"name": "a", "rank": 512, "rate": 1}]), 0.1, (), tiny)
    with pytest.raises(ImpossibleError, match="a: no GPU has memory for one slot of rank 512"):
        place(large)


@pytest.mark.parametrize(("text", "said"), [
    ("ttft=2s", "write it like ttft_p99=2s"), ("ttft_p98=2s", "did you mean 'ttft_p99'"),
    ("ttft_p99=2", "write it like"), ("itl_mean=1.2.3ms", "is not a number"),
    ("ttft_p99=0s", "a latency must be above 0 and finite"), (f"ttft_p99={400 * '9'}s", "a latency must be above 0"),
])  # fmt: skip
def test_goals_are_read_strictly(text: str, said: str) -> None:
    with pytest.raises(PlacementError, match=said):
        parse_goal(text)


def names_of(asked: Workload, part: Part) -> list[str]:
    return [asked.adapters[piece.adapter].name for piece in part]


def test_a_trace_is_dealt_without_loss() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"time": float(t), "adapter": f"a{rng.zipf(1.6) % 7}", "prompt_tokens": 200, "output_tokens": 40}
        for t in np.sort(rng.random(9000) * 60)
    ]
    late = {"time": 70.0, "adapter": "a1", "prompt_tokens": 9, "output_tokens": 9}
    asked = parse_workload({"duration": 61, "requests": [*rows, late]}, Path())
    asker = judge(asked)
    found = place(asker)
    check_placement(asker, found)
    parts = [part_of(asked, gpu.part) for gpu in found.gpus]
    assert len(found.gpus) > 1
    total = sum(requests_of(part).arrival_s.size for part in parts)
    assert total == requests_of(asked).arrival_s.size
    for gpu, part in zip(found.gpus, parts, strict=True):
        assert part.trace is not None
        assert set(part.trace.adapter or ()) <= set(names_of(asked, gpu.part))
