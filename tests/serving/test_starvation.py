"""Who starves, and how long waits are that are not over."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_server import LENGTHS, SMALL, judge

from deltaworks.serving.censored import statistics
from deltaworks.serving.parts import Piece
from deltaworks.serving.simulate import BASE_MODEL, Configuration, simulate
from deltaworks.serving.workload import parse_workload

seconds = st.lists(st.floats(0.001, 1000, allow_subnormal=False), min_size=0, max_size=40)


@given(seconds, seconds)
def test_censored_statistics_are_never_below_the_times_so_far(over: list[float], waiting: list[float]) -> None:
    found = statistics(np.array(over), np.array(waiting))
    times = np.array(over + waiting)
    if not times.size:
        assert found == {"mean": None, "p50": None, "p99": None}
        return
    plain = {"mean": times.mean(), "p50": np.percentile(times, 50), "p99": np.percentile(times, 99)}
    for name, value in found.items():
        assert value is not None
        assert value >= 1000 * plain[name] * (1 - 1e-9)
        assert value <= 1000 * times.max() * (1 + 1e-9)
        if not waiting:
            assert value == 1000 * plain[name]


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=40), st.lists(st.floats(0, 0.5), max_size=40))
def test_requests_that_arrived_a_moment_ago_change_nothing(over: list[float], waiting: list[float]) -> None:
    found = statistics(np.array(over), np.array(waiting))
    assert found["mean"] == pytest.approx(1000 * np.mean(over))
    for name, percent in (("p50", 50), ("p99", 99)):
        low, high = (np.percentile(over, percent, method=method) for method in ("lower", "higher"))
        value = found[name]
        assert value is not None
        assert 1000 * low * (1 - 1e-9) <= value <= 1000 * high * (1 + 1e-9)


@pytest.mark.parametrize(("over", "waiting", "mean", "median"), [
    ([1.0, 3.0], [], 2.0, 2.0),
    # The one that waits is as likely to wait 3 s as 5 s.
    ([1.0, 3.0, 5.0], [2.0], (1 + 1.5 * 3 + 1.5 * 5) / 4, 3.0),
    # Nothing longer was seen: the longest time stands for all that wait.
    ([1.0], [7.0, 9.0], (1 + 9 + 9) / 3, 9.0),
    ([], [4.0], 4.0, 4.0),
])  # fmt: skip
def test_the_kaplan_meier_estimate(over: list[float], waiting: list[float], mean: float, median: float) -> None:
    found = statistics(np.array(over), np.array(waiting))
    assert found["mean"] == pytest.approx(1000 * mean)
    assert found["p50"] == pytest.approx(1000 * median)


def request(time: float, adapter: str, prompt: int = 100, output: int = 50) -> dict[str, Any]:
    return {"time": time, "adapter": adapter, "prompt_tokens": prompt, "output_tokens": output}


def ask(rows: list[dict[str, Any]], duration: float, slots: int = 1, **changed: Any) -> dict[str, Any]:
    workload = parse_workload({"duration": duration, "requests": rows}, Path())
    return simulate(workload, SMALL, Configuration(slots, **changed))


# A request every tenth of a second, of three tenths each: the adapter never leaves the only slot.
BUSY = [request(i / 10, "busy") for i in range(6000)]


@pytest.mark.parametrize(("what", "rows", "starved"), [
    ("nobody waits", [request(t, "a") for t in range(0, 600, 5)], []),
    ("one request waits from the first minute on", [*BUSY, request(60, "cold")], ["cold"]),
    ("one request waits for more than a tenth of the run", [*BUSY, request(530, "cold")], ["cold"]),
    ("one request waits for less than that", [*BUSY, request(550, "cold")], []),
    ("one request arrived a moment ago", [*BUSY, request(599.5, "cold")], []),
    ("an adapter that comes late gets nothing", [*BUSY, *(request(t, "cold") for t in range(550, 600, 5))], ["cold"]),
    ("an adapter that comes late gets next to nothing",
     [*(r for r in BUSY if not 559 < r["time"] < 561), *(request(t, "cold") for t in range(550, 600))], ["cold"]),
    ("an adapter comes in the last seconds", [*BUSY, *(request(595 + t / 2, "cold") for t in range(10))], []),
    ("all but one in a hundred were served before the slot was taken",
     [*(request(t / 10, "cold") for t in range(100)), *(request(11 + r["time"], "busy") for r in BUSY[:5890]),
      request(200, "cold")], []),
    ("and nobody who asks later is served",
     [*(request(t / 10, "cold") for t in range(100)), *(request(11 + r["time"], "busy") for r in BUSY[:5890]),
      request(400, "cold")], ["cold"]),
    ("a fifth comes after the slot was taken",
     [*(request(t, "cold") for t in range(40)), *(request(41 + r["time"], "busy") for r in BUSY[:5590]),
      *(request(100 + t, "cold") for t in range(10))], ["cold"]),
    # "cold" gets the slot for a moment every quarter of the run, and last of all in the last second.
    ("it is let in every other minute",
     [request(t, "cold") for t in range(300, 596, 4)]
     + [request(t + i / 10, "busy") for t in (0, 150, 300, 450) for i in range(1420)], ["cold"]),
    ("an answer is longer than the run", [request(0, "a", 10, 5000), request(590, "b", 10, 5000)], []),
    ("requests are too long for the KV cache", [request(1, "a"), request(2, "b", 9000)], ["b"]),
    ("one of many is too long", [*(request(t, "a") for t in range(600)), request(300, "a", 9000)], []),
    ("the base model's own requests need no slot", [*BUSY, request(60, "")], []),
    ("all are asked for too much", [request(t / 150, f"a{t % 2}") for t in range(90000)], ["a0", "a1"]),
    ("the base model is asked for too much", [request(t / 150, "") for t in range(90000)], [BASE_MODEL]),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_who_starves(what: str, rows: list[dict[str, Any]], starved: list[str]) -> None:
    answer = ask(sorted(rows, key=lambda row: row["time"]), 600)
    assert answer["starved_adapters"] == starved, what
    assert answer["starved"] == bool(starved)
    assert [name for name, adapter in answer["adapters"].items() if adapter["starved"]] == starved


@pytest.mark.parametrize(("rows", "starved", "unjudged"), [
    pytest.param([request(0, "a"), request(599.999, "b")], [], ["b"], id="the only request comes at the bell"),
    pytest.param([request(0, "a"), *[request(600, "b", 100, 5000)] * 3], [], ["b"], id="several do, and none can end"),
    pytest.param([request(600, "a"), request(600, "")], [], ["a", BASE_MODEL], id="everything comes at the bell"),
    pytest.param([*BUSY, request(550, "cold")], [], ["cold"], id="it waits, but not for a tenth of the run"),
    pytest.param([*BUSY, request(530, "cold")], ["cold"], [], id="it waits for more than that, and starves"),
    pytest.param([request(300, "b"), request(599.999, "b")], [], [], id="a request of the adapter was served before"),
    pytest.param([request(598, "b", 100, 5000)], [], [], id="its request is under way"),
    pytest.param([request(0, "a"), request(2, "b", 9000)], ["b"], [], id="its request is refused"),
])  # fmt: skip
def test_who_cannot_be_judged(rows: list[dict[str, Any]], starved: list[str], unjudged: list[str]) -> None:
    answer = ask(rows, 600.0001)
    assert answer["starved_adapters"] == starved
    assert answer["unjudged_adapters"] == unjudged


def test_a_run_that_judges_nobody_proves_nothing() -> None:
    """All of 16,000 requests come at the bell: nobody starves, but they are twice what a GPU can take."""
    rows = [request(600, f"a{i % 4}", 100, 200) for i in range(16_000)]
    asked = judge(parse_workload({"duration": 600.0001, "requests": rows}, Path()))
    part = tuple(Piece(adapter) for adapter in range(4))
    assert asked.accepts(asked.ask(part, 0, 4))
    assert not asked.serves(part, 0, 4, 1.0)
    assert asked.serves(part[:1], 0, 1, 1.0)


def test_waiting_counts_in_latencies() -> None:
    waits = ask(sorted([*BUSY, *(request(60 + t, "cold") for t in range(200))], key=lambda row: row["time"]), 600)
    assert waits["adapters"]["cold"] == {
        "arrived": 200, "completed_share": 0.0, "served_share": 0.0, "waiting": 200, "rejected": 0,
        "oldest_wait_s": 540.0, "starved": True,
    }  # fmt: skip
    assert not waits["starved_server"]
    assert waits["ttft_completed_ms"]["p99"] < 1000
    assert waits["ttft_ms"]["p99"] > 300_000


def test_dropped_requests_are_not_served() -> None:
    rows = [request(t / 150, "a") for t in range(90000)]
    answer = ask(rows, 600, client_max_outstanding=10)
    assert answer["adapters"]["a"]["oldest_wait_s"] < 60
    assert answer["adapters"]["a"]["rejected"] > 9000
    assert answer["starved_adapters"] == ["a"]
    assert answer["ttft_ms"]["p99"] == 600_000


def test_a_preempted_request_waits_since_then() -> None:
    """Ten answers grow until the KV cache is full; the last is sent back and waits for the others to end."""
    rows = [request(t / 100, "a", 100, 560) for t in range(10)]
    answer = ask(rows, 4.0)
    assert answer["preemptions"] > 0
    adapter = answer["adapters"]["a"]
    assert adapter["waiting"] > 0
    assert 0 < adapter["oldest_wait_s"] < 2.0
    assert 0.7 < adapter["served_share"] < 1.0


@pytest.mark.parametrize(("duration", "output", "short"), [(600, 50, False), (300, 5000, True), (1, 50, True)])
def test_a_run_that_is_short_against_one_answer_says_so(duration: float, output: int, short: bool) -> None:
    answer = ask([request(0, "a", 100, output)], duration)
    assert answer["short"] is short
    assert len(answer["notes"]) == short
    assert all(") is too short: 5% of requests take" in note for note in answer["notes"])


groups = st.lists(
    st.fixed_dictionaries({
        "count": st.integers(1, 8), "rank": st.sampled_from([8, 16]), "rate": st.sampled_from([0.0, 0.01, 0.3, 6.0]),
    }),
    min_size=1, max_size=3,
)  # fmt: skip


@given(groups, st.integers(1, 12), st.integers(0, 3))
def test_what_starves_waits(adapters: list[dict[str, Any]], slots: int, seed: int) -> None:
    content = {"duration": 60, "lengths": LENGTHS, "adapters": adapters, "seed": seed}
    answer = simulate(parse_workload(content, Path()), SMALL, Configuration(slots))
    entries = answer["adapters"]
    assert answer["starved"] == bool(answer["starved_adapters"])
    assert answer["starved_adapters"] == [name for name, entry in entries.items() if entry["starved"]]
    for count in ("arrived", "waiting", "rejected"):
        assert sum(entry[count] for entry in entries.values()) == answer["requests"][count]
    for name in answer["unjudged_adapters"]:
        assert entries[name]["waiting"] > 0 == entries[name]["served_share"]
        assert not entries[name]["starved"]
    for entry in entries.values():
        assert entry["waiting"] > 0 or entry["oldest_wait_s"] == 0
        assert not entry["starved"] or entry["oldest_wait_s"] > 6 or answer["ttft_ms"]["p99"] > 6000
        assert entry["completed_share"] <= 1 >= entry["served_share"]
    for name in ("mean", "p50", "p99"):
        plain = answer["ttft_completed_ms"][name]
        if not answer["requests"]["waiting"] + answer["requests"]["running"]:
            assert answer["ttft_ms"][name] == plain
