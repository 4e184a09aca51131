"""Workloads that nobody would write: an answer that adds up, or one sentence, soon and in little memory.

``DELTAWORKS_EXAMPLES`` is how many workloads each command is tried on (20 by default, 4 for `advise`).
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_server import SMALL, check_placement

from deltaworks.errors import DeltaworksError
from deltaworks.serving.advice import alike, capacities
from deltaworks.serving.document import describe
from deltaworks.serving.goals import parse_goal
from deltaworks.serving.judge import Demand, Judge
from deltaworks.serving.placement import place
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.workload import parse_workload

EXAMPLES = int(os.environ.get("DELTAWORKS_EXAMPLES", "20"))
hostile = settings(
    max_examples=EXAMPLES, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes long
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip

WRONG = (0, -1, 1e9, 1e12, 1e300, math.inf, math.nan, None, "7", "x" * 5000, [1], True)
"""Values that are seldom right, whatever the key."""


Values = Callable[..., st.SearchStrategy[Any]]
"""Makes a strategy for one value from those that are usual."""


def usually(*usual: Any) -> st.SearchStrategy[Any]:
    """One of the usual values."""
    return st.sampled_from(usual)


def mostly(*usual: Any) -> st.SearchStrategy[Any]:
    """One of the usual values nine times of ten, else a wrong one."""
    return st.integers(0, 9).flatmap(lambda n: st.sampled_from(WRONG if n == 9 else usual))


def lengths_of(value: Values) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.fixed_dictionaries({
            "distribution": st.just("fixed"), "input_mean": value(1, 100, 3000, 9000),
            "output_mean": value(1, 50, 2000),
        }),
        st.fixed_dictionaries({
            "distribution": st.just("lognormal"), "input_mean": value(1, 200, 3000), "input_sd": value(1e-9, 200, 1e4),
            "output_mean": value(1, 60, 2000), "output_sd": value(1e-9, 60, 1e4),
        }),
        st.fixed_dictionaries({
            "distribution": st.just("sharegpt"), "input_mean": value(1, 222.7, 5000),
            "output_mean": value(1, 196, 5000),
        }),
    )  # fmt: skip


def workloads_of(value: Values, rates: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lengths = lengths_of(value)
    adapter = st.fixed_dictionaries(
        {
            "name": value("a", "../c", "é", "$(x)", "a b"), "rank": value(1, 8, 16, 64, 256, 512), "rate": rates,
        },
        optional={"count": value(1, 2, 7, 60), "lengths": lengths, "burstiness": value(0.01, 0.3, 1.0)},
    )  # fmt: skip
    return st.fixed_dictionaries(
        {
            "duration": value(0.01, 1, 20, 60, 600), "lengths": lengths,
            "adapters": st.lists(adapter, min_size=1, max_size=4, unique_by=lambda a: str(a["name"])),
        },
        optional={"seed": value(0, 1, 2**31), "arrivals": st.fixed_dictionaries({"burstiness": value(0.2, 1.0)})},
    )  # fmt: skip


pairs = st.tuples(st.sampled_from([0, 1, 7, 30]), st.sampled_from([0.0, 0.1, 20.0]))
steps = st.lists(pairs.map(list), min_size=1, max_size=3)
rising = st.lists(pairs, max_size=3).map(
    lambda given: [[0, 0.2], *([second, rate] for second, rate in sorted(dict(given).items()) if second)]
)

# Half of the workloads have nothing wrong with them but what they ask.
tame = workloads_of(usually, st.one_of(usually(0.0, 1e-6, 0.01, 0.3, 5.0, 60.0), rising))
wild = workloads_of(mostly, st.one_of(mostly(0.0, 1e-6, 0.01, 0.3, 5.0, 60.0), steps, rising))
workloads = st.one_of(tame, wild)
lengths = st.one_of(lengths_of(usually), lengths_of(mostly))

goals = st.lists(
    st.sampled_from(["ttft_p99=2s", "ttft_p50=20ms", "ttft_mean=1ms", "itl_mean=50ms", "itl_p99=7ms", "tpot_p99=8ms",
                     "ttft_p99=0ms", "itl_mean=1e9s", "ttft_p98=1s", "=", "tpot_mean=99999999999999999999s"]),
    max_size=2,
)  # fmt: skip


def check_sentence(error: DeltaworksError) -> None:
    """What holds of every refusal: one line, not too long."""
    said = str(error)
    assert 10 < len(said) < 600
    assert "\n" not in said


def check_answer(answer: dict[str, Any]) -> None:
    """What holds of every answer of `simulate`."""
    json.dumps(answer, allow_nan=False)
    requests, entries = answer["requests"], answer["adapters"]
    assert requests["arrived"] == sum(requests[k] for k in ("completed", "running", "waiting", "rejected"))
    assert requests["arrived"] == sum(entry["arrived"] for entry in entries.values())
    assert 0 <= answer["throughput_tps"] <= answer["offered_tps"] * (1 + 1e-9)
    assert answer["starved_adapters"] == [name for name, entry in entries.items() if entry["starved"]]
    for quantity in ("ttft_ms", "ttft_completed_ms", "itl_ms", "tpot_ms"):
        assert all(value is None or 0 <= value < math.inf for value in answer[quantity].values())
    if requests["arrived"] and not answer["memory_error"]:
        assert answer["ttft_ms"]["p50"] <= answer["ttft_ms"]["p99"] <= 1000 * answer["duration_s"] * (1 + 1e-9)


@hostile
@given(workloads, st.integers(1, 70), st.sampled_from([None, 1, 30]))
def test_simulate(content: dict[str, Any], slots: int, outstanding: int | None) -> None:
    try:
        asked = parse_workload(content, Path())
        answer = simulate(asked, SMALL, Configuration(slots, client_max_outstanding=outstanding))
    except DeltaworksError as error:
        check_sentence(error)
    else:
        check_answer(answer)


@hostile
@given(workloads, st.sampled_from([0.0, 0.1, 3.0]), goals)
def test_place(content: dict[str, Any], headroom: float, slo: list[str]) -> None:
    try:
        asked = parse_workload(content, Path())
        demand = Demand(asked, headroom, tuple(parse_goal(text) for text in slo))
        asker = Judge(demand, [SMALL], [None])
        found = place(asker)
    except DeltaworksError as error:
        check_sentence(error)
        return
    check_placement(asker, found)
    document = describe(asker, found, content, {}, None)
    assert document["verified"] is (None if document["untried"] else True)
    assert len(found.gpus) <= max(asker.requests(0).arrival_s.size, 1)
    for gpu in document["gpus"]:
        assert gpu["predicted"]["starved_adapters"] == []
        assert not gpu["adapters"] or math.isfinite(gpu["predicted"]["offered_tps"])


@settings(hostile, max_examples=EXAMPLES if "DELTAWORKS_EXAMPLES" in os.environ else 4)
@given(mostly(1, 8, 64, 512), mostly(1e-6, 0.05, 2.0, 90.0), lengths, goals)
def test_advise(rank: Any, rate: Any, given_lengths: dict[str, Any], slo: list[str]) -> None:
    try:
        one = alike(rank, rate, given_lengths, 60.0)
        rows = capacities(SMALL, one, 0.1, [parse_goal(text) for text in slo], lambda _: None)
    except DeltaworksError as error:
        check_sentence(error)
        return
    for row in rows:
        assert 1 <= row["adapters"] <= 4096
        assert math.isfinite(row["throughput_tps"])


@pytest.mark.parametrize("value", WRONG)
def test_a_wrong_rate_is_named(value: Any) -> None:
    """The wrong values do reach the loaders: each is refused by name, or is a rate that some workload has."""
    content = {
        "duration": 600, "adapters": [{"name": "a", "rank": 8, "rate": value}],
        "lengths": {"distribution": "fixed", "input_mean": 10, "output_mean": 10},
    }  # fmt: skip
    if value == 0 and not isinstance(value, bool):
        assert parse_workload(content, Path()).adapters[0].rate == ((0.0, 0.0),)
        return
    with pytest.raises(DeltaworksError, match=r"rate|requests") as caught:
        parse_workload(content, Path())
    check_sentence(caught.value)
