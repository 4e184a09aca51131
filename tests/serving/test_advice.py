"""The servers that advice compares are those that the twin simulated."""

import pytest
from small_server import LENGTHS, SMALL

from deltaworks.serving.advice import alike, best_row, capacities, of_adapters
from deltaworks.serving.goals import parse_goals
from deltaworks.serving.simulate import Configuration, simulate


@pytest.mark.parametrize("goals", [(), ("ttft_p99=500ms",)])
def test_every_row_is_a_server_that_was_simulated(goals: tuple[str, ...]) -> None:
    rank = 8
    one = alike(rank, 1.0, LENGTHS, 120.0)
    rows = capacities(SMALL, one, 0.1, parse_goals(goals), lambda _: None)
    slots = [row["slots"] for row in rows]
    assert slots == sorted(set(slots))
    assert slots[-1] == rows[-1]["adapters"], "memory allows a slot for each adapter here"
    for row in rows:
        assert row["slots"] <= row["adapters"]
        server = Configuration(row["slots"], rank, row["adapters"])
        answer = simulate(of_adapters(one, row["adapters"]), SMALL, server)
        assert row["throughput_tps"] == answer["throughput_tps"]
        assert row["kv_tokens"] == answer["kv_tokens"] == SMALL.kv_tokens(row["slots"], rank)
    assert best_row(rows) in rows
