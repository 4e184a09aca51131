"""What no number of GPUs can do is said before any search, with what can be done."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_server import LENGTHS, SMALL, check_placement, judge, workload

from deltaworks.errors import ImpossibleError, WorkloadError
from deltaworks.serving.censored import statistics
from deltaworks.serving.feasible import _least_interpolated, check_possible
from deltaworks.serving.goals import Goal, parse_goal
from deltaworks.serving.judge import Demand, Judge
from deltaworks.serving.parts import Piece
from deltaworks.serving.placement import place
from deltaworks.serving.profile import find_profile
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.surrogate import find_surrogate
from deltaworks.serving.workload import parse_workload, requests_of

ONE = [{"name": "a", "count": 4, "rank": 8, "rate": 0.5}]


@pytest.mark.parametrize(("goals", "lengths", "said"), [
    (("itl_mean=1ms",), LENGTHS, r"itl_mean=1.0 ms cannot be kept: .* idle small it is 6.4 ms"),
    (("itl_p99=1ms",), LENGTHS, r"itl_p99=1.0 ms cannot be kept: .* it is 6.4 ms"),
    (("tpot_p50=1ms",), LENGTHS, r"tpot_p50=1.0 ms cannot be kept: .* it is 6.4 ms"),
    (("ttft_p99=1ms",), LENGTHS, r"ttft_p99=1.0 ms cannot be kept: .* it is 15.4 ms"),
    (("ttft_p50=1s", "ttft_mean=2ms"), LENGTHS, "ttft_mean=2.0 ms cannot be kept"),
    ((), {"distribution": "fixed", "input_mean": 6000, "output_mean": 50}, r"a-0: 100% of its tokens .* 5,920 tokens"),
    ((), {"distribution": "fixed", "input_mean": 50, "output_mean": 1e6}, "a-0: 100% of its tokens"),
])  # fmt: skip
def test_the_impossible_is_said(goals: tuple[str, ...], lengths: dict[str, Any], said: str) -> None:
    asker = judge(workload(ONE, lengths=lengths), 0.1, goals)
    with pytest.raises(ImpossibleError, match=said):
        place(asker)
    assert asker.runs < 200


@pytest.mark.parametrize(
    "adapters",
    [
        pytest.param({"name": "a", "count": 4, "rank": 8, "rate": 10.0}, id="several adapters"),
        pytest.param({"name": "a", "rank": 8, "rate": 250.0}, id="less than a hundredth of one adapter a GPU"),
    ],
)
def test_there_are_more_gpus_than_make_sense(adapters: dict[str, Any]) -> None:
    """One request at a time is fast enough and two are not: a GPU must be idle nearly always."""
    asker = judge(workload([adapters]), 0.1, ("itl_p99=6.5ms",))
    with pytest.raises(
        ImpossibleError,
        match=r"even with the traffic spread over \d+ GPUs, the latency goals are missed: .* itl_p99 is ",
    ):
        place(asker)
    assert asker.runs < 200


@pytest.mark.parametrize(("duration", "note"), [
    pytest.param(2, r"; the run \(2 s\) is too short: .* use a duration of at least 4 s$", id="too short"),
    pytest.param(4, r"add another GPU type$", id="long enough"),
])  # fmt: skip
def test_where_no_placement_is_found_a_short_run_is_said(duration: float, note: str) -> None:
    """The first request loads the adapter, so it keeps no limit that loaded ones keep."""
    asked = workload([{"name": "a", "rank": 8, "rate": 1.0}], duration=duration)
    with pytest.raises(ImpossibleError, match=note):
        place(judge(asked, 0.1, ("ttft_p99=40ms",)))


def test_what_is_said_to_be_possible_is() -> None:
    asker = judge(workload([{"name": "a", "rank": 8, "rate": 0.1}]), 0.1, ("ttft_p50=16ms", "itl_mean=6.6ms"))
    check_placement(asker, place(asker))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([8, 32]), st.sampled_from([0.05, 1.0, 8.0])), min_size=1, max_size=4),
    st.sampled_from([1, 3, 600, 2500]), st.sampled_from([1, 2, 40, 300]), st.integers(1, 6),
)  # fmt: skip
def test_no_server_is_faster_than_single_requests(
    adapters: list[tuple[int, float]], prompt: int, output: int, slots: int
) -> None:
    """A goal that the twin sees kept is never called impossible."""
    asked = parse_workload({
        "duration": 60, "lengths": {"distribution": "fixed", "input_mean": prompt, "output_mean": output},
        "adapters": [{"name": f"a{i}", "rank": rank, "rate": rate} for i, (rank, rate) in enumerate(adapters)],
    }, Path())  # fmt: skip
    answer = simulate(asked, SMALL, Configuration(slots))
    for quantity in ("ttft", "itl", "tpot"):
        for statistic in ("mean", "p50", "p99"):
            value = answer[f"{quantity}_ms"][statistic]
            if value is not None:
                goal = Goal(quantity, statistic, value * 1.000001)
                check_possible(asked, [SMALL], [goal], [requests_of(asked)])


def answer_of(**changed: Any) -> dict[str, Any]:
    usual = {"requests": {"arrived": 4}, "offered_output_tps": 5.0, "duration_s": 10.0}
    return usual | {f"{q}_ms": {"mean": None, "p50": None, "p99": None} for q in ("ttft", "itl", "tpot")} | changed


@pytest.mark.parametrize(("goal", "changed", "met"), [
    ("ttft_p99=1s", {"ttft_ms": {"p99": 1000.0}}, True),
    ("ttft_p99=1s", {"ttft_ms": {"p99": 1000.1}}, False),
    ("ttft_p99=1s", {}, False),
    ("itl_mean=1s", {}, False),
    ("tpot_p50=1s", {}, False),
    ("ttft_p99=1s", {"requests": {"arrived": 0}}, True),
    ("itl_mean=1s", {"requests": {"arrived": 0}}, True),
    # Answers of one token have no gaps, but they have a first token.
    ("itl_mean=1s", {"offered_output_tps": 0.4}, True),
    ("ttft_p99=1s", {"offered_output_tps": 0.4}, False),
])  # fmt: skip
def test_nothing_observed_is_no_goal_kept(goal: str, changed: dict[str, Any], met: bool) -> None:
    assert parse_goal(goal).met(answer_of(**changed)) is met


def test_a_share_without_requests_proves_nothing() -> None:
    asker = judge(workload([{"name": "a", "rank": 8, "rate": 0.02}, {"name": "still", "rank": 8, "rate": 0.0}]))
    whole, still = (Piece(0),), (Piece(1),)
    assert asker.passes(whole, 0, 1)
    assert asker.passes(still, 0, 1)
    pieces = [(Piece(0, 1 / 64, i / 64),) for i in range(64)]
    arrived = [asker.ask(part, 0, 1)["requests"]["arrived"] for part in pieces]
    assert sum(arrived) == asker.ask(whole, 0, 1)["requests"]["arrived"]
    assert any(arrived)
    assert all(asker.passes(part, 0, 1) == bool(n) for part, n in zip(pieces, arrived, strict=True) if n == 0)


@pytest.mark.parametrize("duration", [10, 20, 60, 600])
def test_the_duration_decides_little(duration: float) -> None:
    """Answers of 7 s and more, on as many GPUs in 10 s as in 10 minutes."""
    lengths = {"distribution": "lognormal", "input_mean": 50, "input_sd": 20, "output_mean": 900, "output_sd": 300}
    adapters = [{"name": "think", "count": 8, "rank": 8, "rate": 0.25}]
    asker: Judge = judge(workload(adapters, lengths=lengths, duration=duration))
    found = place(asker)
    check_placement(asker, found)
    assert (len(found.gpus), found.lower_bound) == (2, 2)


@pytest.mark.parametrize("duration", [60, 600, 3600])
def test_long_answers_that_preempt_each_other_need_room(duration: float) -> None:
    """By its utilisation alone, a GPU would take one of these adapters and a third of another."""
    lengths = {"distribution": "fixed", "input_mean": 300, "output_mean": 20_000}
    adapters = [{"name": "a", "count": 4, "rank": 16, "rate": 0.05}]
    profile = find_profile("llama-3.1-8b-h100-64gb")
    asked = parse_workload({"duration": duration, "lengths": lengths, "adapters": adapters}, Path())
    assert len(place(Judge(Demand(asked), [profile], [find_surrogate(profile)])).gpus) == 6


@pytest.mark.parametrize(
    ("seconds", "quantile", "bound"),
    [
        pytest.param([0.05], 0.99, 0.05, id="one request"),
        pytest.param([0.05] * 100, 0.99, 0.05, id="all alike"),
        # (10 - L) / (10 - 0.05) = 0.01 * 50: what a single GPU would measure is a little more, 5.12 s.
        pytest.param([0.05] * 49 + [10.0], 0.99, 5.025, id="one slow request of fifty"),
        pytest.param([0.05] * 98 + [10.0] * 2, 0.99, 5.025, id="two slow ones, which two GPUs may share"),
        pytest.param([0.05] * 5 + [10.0] * 95, 0.99, 10.0 - 9.95 / 95, id="nearly all slow"),
        pytest.param([1.0, 3.0], 0.5, 1.0, id="a GPU each, and then the median of both"),
    ],
)
def test_a_quantile_is_bounded_by_what_interpolation_leaves(
    seconds: list[float], quantile: float, bound: float
) -> None:
    found = _least_interpolated(np.array(seconds), quantile)
    assert found == pytest.approx(bound)
    measured = statistics(np.array(seconds))["p99" if quantile == 0.99 else "p50"]
    assert measured is not None
    assert 1000 * found <= measured + 1e-6


@pytest.mark.parametrize("seed", range(20))
def test_no_division_among_gpus_is_below_the_bound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    seconds = rng.lognormal(0, 1.5, 120)
    bound = 1000 * _least_interpolated(seconds, 0.99)
    for gpus in range(1, 6):
        chosen = rng.integers(0, gpus, seconds.size)
        worst = max(statistics(seconds[chosen == gpu])["p99"] or 0.0 for gpu in range(gpus))
        assert worst >= bound - 1e-6


def test_a_trace_for_the_base_model_alone_has_nothing_to_place() -> None:
    rows = [{"time": t, "adapter": "", "prompt_tokens": 5, "output_tokens": 5} for t in range(3)]
    with pytest.raises(WorkloadError, match="has no adapters to place"):
        place(judge(parse_workload({"requests": rows, "duration": 60}, Path())))
