"""Batches: one answer a line, in order, whatever the lines hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from deltaworks.serving import batch
from deltaworks.serving.batch import answer_lines, answer_text
from deltaworks.serving.profile import Profile, find_profile
from deltaworks.serving.simulate import simulate

WORKLOAD = {"duration": 60, "lengths": {"distribution": "fixed", "input_mean": 200, "output_mean": 100},
            "adapters": [{"name": "a", "rank": 8, "rate": 0.5}]}  # fmt: skip
GOOD = json.dumps({"id": "good", "slots": 4, "workload": WORKLOAD})


@pytest.fixture(scope="module")
def profile() -> Profile:
    return find_profile("tiny-llama-cpu")


def question(**keys: Any) -> str:
    return json.dumps({"id": 7, "slots": 4, "workload": WORKLOAD} | keys)


@pytest.mark.parametrize(
    ("line", "name", "said"),
    [
        ('{"id": 7, "slots": 4, "workl', 7, "line 3: is not valid JSON: "),
        ('{"slots": 4, "id": "x\\u0041", oops}', "xA", "line 3: is not valid JSON: "),
        ("nul", None, "line 3: is not valid JSON: "),
        ('{"id": 7, "slots": ' + 5000 * "9" + "}", 7, "a whole number has 5,000 digits"),
        ("[1, 2]", None, "expected keys and values, not [1, 2]"),
        ('"id"', None, "expected keys and values"),
        ('{"id": 7, "slots": 4}', 7, "workload is missing"),
        ('{"id": 7, "id": 8}', 8, "the key 'id' is given twice"),
        ('{"id": 7, "slotz": 4}', 7, "unknown key 'slotz'; did you mean 'slots'?"),
        ('{"id": NaN, "slots": 4}', None, "NaN is not a number"),
        ('{"id": {"a": [1]}, "slots": NaN}', {"a": [1]}, "NaN is not a number"),
        ('{"id": "\\ud800", "slots": 4}', "\ud800", "half of a surrogate pair"),
        ('{"id": 7, "workload": ' + 5000 * "[", 7, "nested more than 100 deep"),
        (b'{"id": "\xff", "slots": 4}', "\ufffd", "not text in UTF-8"),
        (question(slots=None), 7, "slots is missing"),
        (question(slots=0), 7, "line 3: slots: expected a number of at least 1, not 0"),
        (question(max_rank=0), 7, "line 3: max_rank: expected a number of at least 1, not 0"),
        (question(served=0), 7, "line 3: served: expected a number of at least 1, not 0"),
        (question(client_max_outstanding=0), 7, "client_max_outstanding: expected a number of at least 1, not 0"),
        (question(slots=1e30), 7, "slots: expected a number of at most 1,000,000"),
        (question(max_rank="x"), 7, "max_rank: expected a number"),
        (question(workload="missing.json"), 7, "missing.json: cannot be read as a workload: No such file"),
        (question(workload="x" * 5000), 7, "too long"),
        (question(workload="/dev/zero"), 7, "it is a device"),
        (question(workload=WORKLOAD | {"adapters": [{"name": "a", "rank": 8, "rate": 1e9}]}), 7, "6e+10 requests"),
        (question(workload={"duration": 60, "requests": [1, 2]}), 7, "request 1 is malformed"),
        (question(workload=None), 7, "expected keys and values, but nothing is given"),
    ],
)
def test_a_line_that_cannot_be_answered_costs_no_other(
    profile: Profile, tmp_path: Path, line: str | bytes, name: Any, said: str
) -> None:
    first, bad, last = answer_lines([GOOD, "", line, "  \r", GOOD], tmp_path, profile)
    assert list(bad) == ["id", "error"]
    assert bad["id"] == name
    assert said in bad["error"]
    assert len(bad["error"]) < 1500
    for answer in (first, last):
        assert answer["id"] == "good"
        assert answer["requests"]["arrived"] == 30
    assert json.loads(answer_text(bad)) == bad
    assert len(answer_text(bad).encode().splitlines()) == len(answer_text(bad).splitlines()) == 1


def test_a_failure_of_our_own_costs_no_other(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = simulate

    def failing(workload: Any, *rest: Any) -> dict[str, Any]:
        if workload.duration_s == 61:
            raise MemoryError("Unable to allocate 9 TiB")
        return real(workload, *rest)

    monkeypatch.setattr(batch, "simulate", failing)
    lines = [GOOD, question(workload=WORKLOAD | {"duration": 61}), GOOD]
    answers = list(answer_lines(lines, tmp_path, profile, threads=2))
    assert [a["id"] for a in answers] == ["good", 7, "good"]
    assert answers[1]["error"] == "line 2: failed with MemoryError: Unable to allocate 9 TiB"
    assert answers[0]["throughput_tps"] == answers[2]["throughput_tps"] > 0


def test_a_line_of_any_length_is_bounded(profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "DOCUMENT_BYTES", 1000)
    bad, good = answer_lines([question(id="x" * 1000), GOOD], tmp_path, profile)
    assert bad == {"id": None, "error": "line 1: has more than 1,000 bytes, which is the most"}
    assert good["id"] == "good"


def test_requests_after_the_duration_are_noted(profile: Profile, tmp_path: Path) -> None:
    rows = [{"time": t, "adapter": "a", "prompt_tokens": 5, "output_tokens": 3} for t in (1, 2, 99)]
    (answer,) = answer_lines([question(workload={"requests": rows, "duration": 60})], tmp_path, profile)
    assert "1 of 3 requests of the trace come after the duration of 60 s and are left out" in answer["notes"]


@pytest.mark.parametrize(("key", "value", "other"), [
    ("slots", 2, 4), ("max_rank", 64, 8), ("served", 2, 4), ("client_max_outstanding", 1, 3),
])  # fmt: skip
def test_defaults_are_for_lines_that_do_not_set_them(
    profile: Profile, tmp_path: Path, key: str, value: int, other: int
) -> None:
    busy = WORKLOAD | {"adapters": [{"count": 4, "rank": 8, "rate": 2}]}
    base = {"workload": busy, "slots": 3}
    lines = [json.dumps(base | keys) for keys in ({key: value}, {key: other})]
    first, last = answer_lines(lines, tmp_path, profile)
    assert timeless(first) != timeless(last)
    unset = {k: v for k, v in base.items() if k != key}
    asked = [json.dumps(unset), json.dumps(unset | {key: None}), json.dumps(base | {key: other})]
    answers = answer_lines(asked, tmp_path, profile, defaults={key: value})
    assert [timeless(answer) for answer in answers] == [timeless(first), timeless(first), timeless(last)]


def timeless(answer: dict[str, Any]) -> dict[str, Any]:
    return {key: found for key, found in answer.items() if key != "wall_s"}
