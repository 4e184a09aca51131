"""Which of several configurations is recommended."""

import pytest

from deltaworks.serving.advice import best_row
from deltaworks.serving.judge import best_configuration


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
