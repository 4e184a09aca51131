"""Which of several configurations is recommended, and what the judge remembers."""

from dataclasses import replace

import pytest
from small_server import SMALL, judge, workload

from deltaworks.errors import PlacementError
from deltaworks.serving.advice import best_row
from deltaworks.serving.goals import parse_goals
from deltaworks.serving.judge import best_configuration
from deltaworks.serving.parts import Piece
from deltaworks.serving.profile import KvCache

NO_MEMORY = replace(SMALL, kv_cache=KvCache(6000, 10, 20, 1000))


@pytest.mark.parametrize(
    ("answers", "best"),
    [
        pytest.param([(100, 105, 900), (110, 110, 9000)], 1, id="most throughput"),
        pytest.param([(100, 100, 9), (100.4, 105, 900)], 1, id="alike: what gets through with more traffic"),
        pytest.param([(100, 110, 900), (100.4, 105, 9)], 0, id="alike: though its throughput is a little less"),
        pytest.param([(100, 110, 900), (100.4, 110.4, 9)], 1, id="alike in both: latency"),
        pytest.param([(100, 110, 9), (102, 102, 900)], 1, id="latency does not make up for throughput"),
        pytest.param([(100, 110, 9), (100, 110, 9)], 0, id="the first of equals"),
        pytest.param([(0, 0, 0)], 0, id="no traffic"),
    ],
)
def test_throughput_decides_before_latency(answers: list[tuple[float, float, float]], best: int) -> None:
    assert best_configuration(answers) == best


def test_advice_is_a_row_with_the_most_adapters() -> None:
    keys = ("slots", "adapters", "throughput_tps", "throughput_with_margin_tps", "ttft_p99_ms")
    rows = [
        dict(zip(keys, row, strict=True))
        for row in [(8, 90, 910, 990, 5), (16, 91, 905, 920, 50), (32, 91, 906, 960, 800), (64, 60, 600, 660, 1)]
    ]
    assert best_row(rows)["slots"] == 32


def test_old_answers_are_forgotten_and_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asker = judge(workload([{"name": "a", "count": 2, "rank": 8, "rate": 0.5}]))
    parts = [(Piece(0), Piece(1)), (Piece(0),)]
    monkeypatch.setattr("deltaworks.serving.judge.KEPT_ADAPTERS", 2)
    monkeypatch.setattr("deltaworks.serving.judge.KEPT_REQUESTS", 0)
    first = [asker.ask(part, 0, 1) for part in parts]
    assert asker.runs == 2
    again = [asker.ask(part, 0, 1) for part in reversed(parts)]
    assert asker.runs == 3
    for answer, other in zip(reversed(first), again, strict=True):
        assert answer | {"wall_s": 0} == other | {"wall_s": 0}


def test_equal_parts_are_asked_about_once() -> None:
    asker = judge(workload([{"name": "a", "count": 3, "rank": 8, "rate": 0.5}]))
    first = asker.ask((Piece(0), Piece(2, 0.5)), 0, 1)
    assert asker.ask((Piece(0), Piece(2, 0.5)), 0, 1) is first
    assert asker.ask((Piece(0), Piece(2, 0.5, 0.5)), 0, 1) is not first
    assert asker.runs == 2
    # Other objects may get the ids of parts that are gone.
    for adapter in (0, 1, 2) * 30:
        part = (Piece(adapter),)
        assert asker.traffic_of(part, 0).rate.tolist() == asker.traffic[0].rate[[adapter]].tolist()


def test_details_are_the_answer_and_its_adapters() -> None:
    asker = judge(workload([{"name": "a", "count": 3, "rank": 8, "rate": 0.5}]))
    part = (Piece(0), Piece(2))
    details = asker.details(part, 0, 1)
    assert list(details.pop("adapters")) == ["a-0", "a-2"]
    assert details | {"wall_s": 0} == asker.ask(part, 0, 1) | {"wall_s": 0}


def test_the_strain_of_nothing_and_of_what_has_no_memory() -> None:
    asker = judge(workload([{"name": "a", "rank": 512, "rate": 0.5}]))
    no_memory = judge(workload([{"name": "a", "rank": 512, "rate": 0.5}]), 0.1, (), NO_MEMORY)
    assert asker.strain((), 0) == 0.0
    assert 0.0 < asker.strain((Piece(0),), 0) < 1.0
    assert no_memory.strain((Piece(0),), 0) == float("inf")
    assert asker.has_memory(0, 0)
    assert not no_memory.has_memory(0, 0)


def test_a_latency_is_limited_once() -> None:
    assert [goal.limit_ms for goal in parse_goals(["ttft_p99=2s", "ttft_p50=5ms"])] == [2000, 5]
    with pytest.raises(PlacementError, match="ttft_p99 is limited twice"):
        parse_goals(["ttft_p99=2s", "ttft_p99=1s"])
