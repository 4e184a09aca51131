"""The lower bound, the groups and costs behind it, and placements that must be near it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_server import SMALL, check_placement, judge, workload

from deltaworks.serving import partition
from deltaworks.serving.bound import Capacities, Relaxation
from deltaworks.serving.estimate import STEP_MS, UTILISATION, Traffic, estimate, traffic_of
from deltaworks.serving.groups import MAX_GROUPS, group
from deltaworks.serving.judge import Demand, Judge
from deltaworks.serving.parts import part_of
from deltaworks.serving.placement import attempt, place
from deltaworks.serving.profile import Profile, find_profile
from deltaworks.serving.surrogate import find_surrogate
from deltaworks.serving.workload import parse_workload, requests_of

LONG = {"distribution": "lognormal", "input_mean": 400, "input_sd": 300, "output_mean": 40, "output_sd": 30}
SHORT = {"distribution": "fixed", "input_mean": 20, "output_mean": 20}
MIDDLE = {"distribution": "fixed", "input_mean": 100, "output_mean": 50}
SHAREGPT = {"distribution": "sharegpt", "input_mean": 222.7, "output_mean": 196.1}

mixed_groups = st.lists(
    st.fixed_dictionaries({
        "count": st.integers(1, 8), "rank": st.sampled_from([8, 32, 128]), "rate": st.sampled_from([0.3, 1.0, 6.0]),
        "lengths": st.sampled_from([LONG, SHORT, MIDDLE]),
    }),
    min_size=2, max_size=4,
)  # fmt: skip


# The bound is measured, not proven: the examples are always the same.
@settings(max_examples=8, deadline=None, derandomize=True)
@given(mixed_groups)
def test_no_way_of_dealing_needs_fewer_gpus_than_the_bound(adapters: list[dict[str, Any]]) -> None:
    asker = judge(workload(adapters))
    relaxation = Relaxation([Capacities(asker, 0)], np.ones(1))
    below = int(np.ceil(relaxation.gpus - 1e-6)) - 1
    # `place` tries one GPU, with every number of slots, before it asks for a bound.
    if below > 1:
        assert attempt(asker, [0] * below, np.ones(below), relaxation) is None


@settings(max_examples=10, deadline=None, derandomize=True)
@given(mixed_groups)
def test_placements_of_mixed_lengths_and_ranks_are_near_the_bound(adapters: list[dict[str, Any]]) -> None:
    asker = judge(workload(adapters))
    found = place(asker)
    check_placement(asker, found)
    assert found.lower_bound is not None
    assert len(found.gpus) - found.lower_bound <= 1


def test_groups_that_cost_next_to_nothing_are_no_obstacle() -> None:
    """Other groups decide how many GPUs there are, so the relaxation gives those a price of 0."""
    long = {"distribution": "fixed", "input_mean": 1, "output_mean": 2000}
    asked = [
        {"name": "a", "rank": 1, "rate": 0.01, "lengths": long, "burstiness": 0.01},
        {"name": "b", "count": 60, "rank": 256, "rate": 0.01, "lengths": long, "burstiness": 0.01},
        {"name": "c", "rank": 1, "rate": [[0, 0.2]]},
    ]
    asker = judge(
        workload(asked, duration=20, lengths={"distribution": "fixed", "input_mean": 1, "output_mean": 1}), 0.0
    )
    assert Relaxation([Capacities(asker, 0)], np.ones(1)).gpus > 1


@pytest.mark.parametrize("profile_name", ["llama-3.1-8b-h100-64gb", "qwen-2.5-7b-h100-64gb"])
def test_long_prompts_and_two_ranks_on_real_gpus(profile_name: str) -> None:
    long = {"distribution": "lognormal", "input_mean": 900, "input_sd": 600, "output_mean": 400, "output_sd": 200}
    adapters = [
        {"name": f"a{i}", "rank": 128 if i % 2 else 8, "rate": 14, "lengths": long if i < 3 else SHAREGPT}
        for i in range(8)
    ]
    asked = parse_workload({"duration": 600, "adapters": adapters}, Path())
    profile = find_profile(profile_name)
    asker = Judge(Demand(asked), [profile], [find_surrogate(profile)])
    found = place(asker)
    check_placement(asker, found)
    assert found.lower_bound is not None
    assert found.lower_bound > 4
    assert len(found.gpus) - found.lower_bound <= 1


@pytest.mark.parametrize(("lengths", "rate"), [(LONG, 8.0), (SHORT, 60.0), (MIDDLE, 20.0)])
def test_what_adapters_cost_is_what_the_twin_can_take(lengths: dict[str, Any], rate: float) -> None:
    asker = judge(workload([{"name": "a", "count": 8, "rank": 8, "rate": rate, "lengths": lengths}]))
    capacities = Capacities(asker, 0)
    # The bound's capacity is at 10% more traffic, of which up to a tenth may be lost.
    assert capacities.weight.sum() * float(capacities.columns[0].max()) == pytest.approx(1.0, rel=0.2)


def equal_adapters(count: int, rate: float) -> Traffic:
    return traffic_of(workload([{"count": count, "rank": 8, "rate": rate}]))


def full_rate(profile: Profile, count: int) -> float:
    """The rate of equal adapters at which they need all of one GPU's time."""
    low, high = 0.0, 1000.0
    for _ in range(50):
        middle = (low + high) / 2
        is_full = estimate(equal_adapters(count, middle), profile, count, 8)[UTILISATION] >= 1.0
        low, high = (low, middle) if is_full else (middle, high)
    return low


@pytest.mark.parametrize("decode_prefill", [0.0, 1e-4, 1e-3, 4e-3])
def test_what_decoding_costs_beside_prompts_is_part_of_what_adapters_cost(decode_prefill: float) -> None:
    profile = replace(SMALL, step=replace(SMALL.step, decode_prefill=decode_prefill))
    rate = full_rate(profile, 8)
    for gpus in (1, 2, 5):
        assert partition.weights(equal_adapters(8 * gpus, rate), profile, gpus).sum() == pytest.approx(gpus, rel=0.03)
    traffic = equal_adapters(8, rate)
    without = partition.resources(traffic, SMALL, 1)[:, partition.COMPUTE]
    taken = partition.resources(traffic, profile, 1)[:, partition.COMPUTE]
    step_s = estimate(traffic, profile, 8, 8)[STEP_MS] / 1000
    decodes, prefill = (float((traffic.rate * tokens).sum()) * step_s for tokens in (traffic.output, traffic.prompt))
    assert (taken - without).sum() == pytest.approx(decode_prefill / 1000 * decodes * prefill / step_s)


@pytest.mark.parametrize(("kinds", "ratio"), [
    pytest.param((MIDDLE, MIDDLE), 1.0, id="the same lengths"),
    # The one has all the prompts, the other decodes nearly all: each pays half of what meets.
    pytest.param(({**MIDDLE, "input_mean": 1000, "output_mean": 2}, {**MIDDLE, "input_mean": 2, "output_mean": 1000}),
                 1.0, id="prompts of one meet answers of the other"),
    pytest.param(({**MIDDLE, "input_mean": 200, "output_mean": 100}, MIDDLE), 2.0, id="twice as long"),
])  # fmt: skip
def test_prompts_and_answers_share_what_they_cost_together(kinds: tuple[Any, Any], ratio: float) -> None:
    asked = workload([{"name": n, "rank": 8, "rate": 1.0, "lengths": own} for n, own in zip("ab", kinds, strict=True)])
    profile = replace(SMALL, step=replace(SMALL.step, decode_prefill=0.01))
    more = partition.resources(traffic_of(asked), profile, 1) - partition.resources(traffic_of(asked), SMALL, 1)
    assert more[0, partition.COMPUTE] / more[1, partition.COMPUTE] == pytest.approx(ratio)


def test_the_api_server_limits_short_requests() -> None:
    asker = judge(workload([{"name": "a", "rank": 8, "rate": 100.0, "lengths": {**SHORT, "output_mean": 2}}]))
    taken = partition.resources(asker.traffic[0], SMALL, 1)
    assert taken[0, partition.FRONT_END] == pytest.approx(0.4)
    assert taken[0, partition.FRONT_END] > taken[0, : partition.FRONT_END].sum() / 2
    assert partition.weights(asker.traffic[0], SMALL, 1)[0] >= taken[0, partition.FRONT_END]


def test_groups_keep_ranks_and_loads_apart() -> None:
    entries = [
        {"name": f"{rank}-{name}", "count": 3, "rank": rank, "rate": 2.0, "lengths": lengths}
        for rank in (8, 64)
        for name, lengths in (("long", LONG), ("short", SHORT))
    ]
    asker = judge(workload([*entries, {"name": "idle", "rank": 8, "rate": 0.0, "lengths": SHORT}]))
    taken = partition.resources(asker.traffic[0], SMALL, 2)
    found = group(asker.traffic[0].rank, taken)
    names = [a.name for a in asker.demand.workload.adapters]
    kinds = {number: {names[i].rpartition("-")[0] for i in np.flatnonzero(found == number)} for number in set(found)}
    assert kinds.pop(-1) == {""}
    assert sorted(kinds.values(), key=str) == [{"64-long"}, {"64-short"}, {"8-long"}, {"8-short"}]


def test_there_are_few_groups_even_of_many_kinds() -> None:
    rng = np.random.default_rng(0)
    taken = rng.random((200, 4))
    found = group(rng.choice([8.0, 16, 32, 64, 128, 256, 320, 512], 200), taken)
    assert set(found) == set(range(MAX_GROUPS))


@given(
    st.lists(st.tuples(st.floats(0.001, 5.0), st.integers(0, 400)), min_size=1, max_size=30),
    st.lists(st.floats(0.5, 1.5), min_size=1, max_size=9),
)
def test_a_row_is_cut_where_gpus_are_full(adapters: list[tuple[float, int]], capacity: list[float]) -> None:
    weight, requests = (np.array(column, np.float64) for column in zip(*adapters, strict=True))
    room = np.array(capacity)
    parts = partition.in_a_row([(i, 1.0) for i in range(weight.size)], weight, requests, room)
    served = np.zeros(weight.size)
    load = np.zeros(room.size)
    for gpu, part in enumerate(parts):
        for piece in part:
            served[piece.adapter] += piece.share
            load[gpu] += weight[piece.adapter] * piece.share
            assert piece.share == pytest.approx(1.0) or piece.share * requests[piece.adapter] >= 1 - 1e-9
    assert served == pytest.approx(1.0)
    assert sum(map(len, parts)) <= weight.size + room.size - 1
    # A cut may be off by half of what cannot be split.
    solid = max(weight[i] * min(1.0, 2.0 / max(requests[i], 1.0)) for i in range(weight.size))
    even = weight.sum() * room / room.sum()
    assert (np.abs(np.cumsum(load) - np.cumsum(even)) <= solid + 0.021 * weight.sum() / room.size + 1e-9).all()


def test_every_request_of_a_split_adapter_is_dealt() -> None:
    asker = judge(
        workload([{"name": "hot", "rank": 8, "rate": 300}, {"name": "cold", "count": 9, "rank": 64, "rate": 2}])
    )
    found = place(asker)
    asked = asker.demand.workload
    total = sum(requests_of(part_of(asked, gpu.part)).arrival_s.size for gpu in found.gpus)
    assert total == requests_of(asked).arrival_s.size
