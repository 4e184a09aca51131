"""profile and simulate as a user runs them."""

import json
from pathlib import Path
from typing import Any

import pytest
from shell import Shell

LENGTHS = {"distribution": "sharegpt", "input_mean": 222.7, "output_mean": 196.1}
WORKLOAD = {"duration": 300, "lengths": LENGTHS, "adapters": [{"count": 32, "rank": 16, "rate": 0.1}]}
P = ("--profile", "llama-3.1-8b-h100-64gb")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    root = tmp_path_factory.mktemp("serving")
    (root / "w.json").write_text(json.dumps(WORKLOAD))
    (root / "empty.jsonl").write_text("\n \n")
    return Shell(root)


def batch(shell: Shell, lines: list[Any], *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (shell.root / "batch.jsonl").write_text(text)
    done = shell.run("simulate", *P, "--batch", "batch.jsonl", *arguments, code=code)
    return [json.loads(line) for line in done.stdout.splitlines()]


def timeless(answer: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in answer.items() if k not in ("id", "wall_s")}


def test_simulate_answers(shell: Shell) -> None:
    answer = shell.json("simulate", "w.json", *P, "--slots", 16)
    assert not answer["starved"]
    assert not answer["memory_error"]
    requests = answer["requests"]
    assert requests["arrived"] == 960
    assert requests["arrived"] == sum(requests[k] for k in ("completed", "running", "waiting", "rejected"))
    assert answer["throughput_tps"] == pytest.approx(answer["input_throughput_tps"] + answer["output_throughput_tps"])
    for key in ("ttft_ms", "itl_ms", "tpot_ms"):
        assert 0 < answer[key]["p50"] <= answer[key]["p99"]
        assert answer[key]["mean"] > 0
    assert len(answer["adapters"]) == 32
    text = shell.run("simulate", "w.json", *P, "--slots", 16).stdout
    assert "not starved" in text
    assert "960" not in text.splitlines()[0]
    assert "tokens/s offered" in text


def test_memory_and_starvation_are_foreseen(shell: Shell) -> None:
    answer = shell.json("simulate", "w.json", *P, "--slots", 384, "--max-rank", 64)
    assert answer["memory_error"]
    assert answer["throughput_tps"] == 0
    assert "out of memory" in shell.run("simulate", "w.json", *P, "--slots", 384, "--max-rank", 64).stdout
    busy = {**WORKLOAD, "adapters": [{"count": 32, "rank": 16, "rate": 3}]}
    (shell.root / "busy.json").write_text(json.dumps(busy))
    assert shell.json("simulate", "busy.json", *P, "--slots", 8)["starved"]
    assert "STARVED" in shell.run("simulate", "busy.json", *P, "--slots", 8).stdout


LAST = [{"time": t, "adapter": a, "prompt_tokens": 100, "output_tokens": 50} for t, a in ((0, "a"), (99.999, "b"))]


@pytest.mark.parametrize(("rows", "said"), [
    pytest.param(LAST[:1], ": not starved", id="all are served"),
    pytest.param(LAST, "CANNOT BE JUDGED: b (1 of 2 that ask)", id="one is not, too late to tell"),
    pytest.param(LAST[1:], "CANNOT BE JUDGED: b (1 of 1 that ask)", id="nobody is, too late to tell"),
])  # fmt: skip
def test_the_headline_says_who_cannot_be_judged(shell: Shell, rows: list[Any], said: str) -> None:
    (shell.root / "last.json").write_text(json.dumps({"duration": 100, "requests": rows}))
    headline = shell.run("simulate", "last.json", *P, "--slots", 2).stdout.splitlines()[0]
    assert said in headline
    assert ("not starved" in headline) == ("a" in {row["adapter"] for row in rows})


def test_a_batch_is_answered_in_order_on_any_number_of_threads(shell: Shell) -> None:
    lines = [{"id": f"q{i}", "workload": {**WORKLOAD, "seed": i % 3}, "slots": 4 + i} for i in range(12)]
    one = batch(shell, lines, "--threads", "1")
    four = batch(shell, lines, "--threads", "4")
    assert [a["id"] for a in four] == [f"q{i}" for i in range(12)]
    assert [timeless(a) for a in one] == [timeless(a) for a in four]
    alone = batch(shell, [{"workload": "w.json", "slots": 4}])[0]
    assert timeless(alone) == timeless(one[0])
    assert alone["id"] is None


def test_a_bad_line_costs_no_other(shell: Shell) -> None:
    good = {"id": 1, "workload": "w.json", "slots": 8, "max_rank": 16, "served": 32, "client_max_outstanding": 5}
    long = {"distribution": "fixed", "input_mean": 150_000, "output_mean": 9}
    bad = [{**good, "slot": 3}, "{", {"id": 7, "workload": "w.json"}, {**good, "max_rank": 8},
           {**good, "workload": "missing.json"}, {**good, "slots": 0}, {**good, "max_rank": 24}, {**good, "served": 7},
           {**good, "workload": WORKLOAD | {"lengths": long}}]  # fmt: skip
    answers = batch(shell, [good, *bad, "", good], code=2)
    assert len(answers) == 11
    assert timeless(answers[0]) == timeless(answers[-1])
    assert answers[0]["requests"]["rejected"] > 0
    said = ["did you mean 'slots'", "line 3: is not valid JSON", "slots is missing", "has rank 16, more than the max",
            "missing.json: cannot be read", "slots: expected a number of at least 1", "a maximum rank of 24",
            "give 8 or more, not 7", "every prompt has 150,000 tokens or more"]  # fmt: skip
    for answer, text in zip(answers[1:-1], said, strict=True):
        assert text in answer["error"]


def test_a_batch_of_any_bytes_is_answered(shell: Shell) -> None:
    question = json.dumps({"id": "a\u2028b", "slots": 4, "workload": WORKLOAD}, ensure_ascii=False).encode()
    content = b"\xef\xbb\xbf" + b"\r\n".join([question, b"", b'{"id": "\xff"}', b'{"id": "\\ud800"', question])
    (shell.root / "bytes.jsonl").write_bytes(content)
    done = shell.run("simulate", *P, "--batch", "bytes.jsonl", code=2)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a["id"] for a in answers] == ["a\u2028b", "\ufffd", "\ud800", "a\u2028b"]
    assert ["error" in a for a in answers] == [False, True, True, False]
    assert "2 of 4 lines could not be answered" in done.stderr
    assert "it is a device" in shell.error("simulate", *P, "--batch", "/dev/zero")


def test_flags_are_defaults_of_a_batch(shell: Shell) -> None:
    keys = {"slots": 16, "max_rank": 64, "served": 32, "client_max_outstanding": 2}
    flags = ("--slots", "16", "--max-rank", "64", "--served", "32", "--client-max-outstanding", "2")
    (answer,) = batch(shell, [{"workload": "w.json"}], *flags)
    assert timeless(answer) == timeless(batch(shell, [{"workload": "w.json", **keys}])[0])


def test_other_flags_of_the_server(shell: Shell) -> None:
    few = shell.json("simulate", "w.json", *P, "--slots", 16, "--kv-tokens", 8000)
    assert few["kv_tokens"] == 8000
    assert few["preemptions"] > 0
    slow = shell.json("simulate", "w.json", *P, "--slots", 16, "--max-num-seqs", 4)
    assert slow["running_mean"] <= 4
    assert shell.json("simulate", "w.json", *P, "--slots", 16, "--max-model-len", 400)["requests"]["rejected"] > 0
    unread = shell.json("simulate", "w.json", *P, "--slots", 16, "--scrape-period", 0)
    assert unread["itl_ms"]["mean"] < shell.json("simulate", "w.json", *P, "--slots", 16)["itl_ms"]["mean"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("w.json", *P), "give a WORKLOAD and --slots N, or --batch"),
        (
            ("w.json", "--profile", "lama", "--slots", 4),
            "unknown profile 'lama'; built-in profiles are llama-3.1-8b-h100-64gb",
        ),
        (("w.json", *P, "--slots", 4, "--batch", "b"), "give no WORKLOAD"),
        ((*P, "--batch", "empty.jsonl"), "empty.jsonl: there are no questions in it"),
        (("nothing.json", *P, "--slots", 4), "nothing.json: cannot be read as a workload"),
        (("w.json", *P, "--slots", 4, "--max-rank", 8), "an adapter has rank 16, more than the maximum rank 8"),
        (("w.json", *P, "--slots", 4, "--max-num-seqs", 4096), "more than max_num_batched_tokens 2048"),
        (("w.json", *P, "--slots", 4, "--max-rank", 24), "vLLM does not take a maximum rank of 24"),
        (("w.json", *P, "--slots", 32, "--served", 16), "give 32 or more, not 16"),
        (("w.json", *P, "--slots", 4, "--block-size", 10), "block_size 10 is not one that vLLM takes"),
        (("w.json", *P, "--slots", 4, "--max-model-len", 200_000), "more than the 131,072"),
        (("w.json", *P, "--slots", 4, "--max-model-len", 1), "every prompt has"),
        (("w.json", *P, "--slots", 10**12), "slots: expected at most 1,000,000"),
        (("w.json", *P, "--slots", 4, "--served", 10**30), "served: expected at most 1,000,000"),
        (("w.json", *P, "--slots", 4, "--kv-tokens", 10**30), "kv_tokens: expected a number of at most"),
        (("w.json", *P, "--slots", 4, "--scrape-period", "nan"), "scrape_period_s: expected a number of at least 0"),
    ],
)
def test_mistakes_are_told(shell: Shell, arguments: tuple[Any, ...], said: str) -> None:
    assert said in shell.error("simulate", *arguments)


def test_a_profile_from_tables(shell: Shell) -> None:
    tables = shell.root / "tables"
    tables.mkdir()
    (tables / "about.yaml").write_text("{name: mine, engine: vLLM, model: m, gpu: g}")
    (tables / "steps.csv").write_text("step_ms,decode\n" + "".join(f"{10 + 0.1 * b},{b}\n" for b in (1, 50, 100)))
    (tables / "kv_cache.csv").write_text("slots,max_rank,kv_tokens\n1,8,90000\n8,8,83000\n8,16,80000\n")
    done = shell.run("profile", "--table", "tables", "-o", "mine.json")
    assert "mine: m on g, vLLM; written to mine.json" in done.stdout
    assert json.loads((shell.root / "mine.json").read_text())["step"]["decode"] == pytest.approx(0.1)
    assert shell.json("simulate", "w.json", "--profile", "mine.json", "--slots", 4)["kv_tokens"] > 0
    assert "about.yaml: does not exist" in shell.error("profile", "--table", str(Path("nowhere")), "-o", "x.json")
