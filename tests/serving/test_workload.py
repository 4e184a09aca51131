"""Workloads: what files may say, and the requests that come of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from deltaworks.errors import WorkloadError
from deltaworks.serving.workload import Requests, Workload, parse_workload, read_workload, requests_of

SHAREGPT = {"distribution": "sharegpt", "input_mean": 222.7, "output_mean": 196.1}


def content(**changed: Any) -> dict[str, Any]:
    usual = {"duration": 600, "lengths": SHAREGPT, "adapters": [{"count": 8, "rank": 16, "rate": 0.5}]}
    return {k: v for k, v in (usual | changed).items() if v is not None}


def parsed(**changed: Any) -> Workload:
    return parse_workload(content(**changed), Path())


def of(requests: Requests, adapter: int) -> tuple[Any, Any, Any]:
    own = requests.adapter == adapter
    return requests.arrival_s[own], requests.prompt[own], requests.output[own]


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(
        "duration: 600\nlengths: {distribution: sharegpt, input_mean: 222.7, output_mean: 196.1}\n"
        "adapters:\n- {count: 8, rank: 16, rate: 0.5}\n"
    )
    (tmp_path / "w.json").write_text(json.dumps(content()))
    a, b = (requests_of(read_workload(tmp_path / name)) for name in ("w.yaml", "w.json"))
    assert np.array_equal(a.arrival_s, b.arrival_s)
    assert np.array_equal(a.output, b.output)


def test_means_are_what_was_asked() -> None:
    requests = requests_of(parsed(duration=3600))
    assert requests.arrival_s.size == pytest.approx(8 * 0.5 * 3600, rel=0.001)
    assert requests.prompt.mean() == pytest.approx(222.7, rel=0.01)
    assert requests.output.mean() == pytest.approx(196.1, rel=0.01)
    assert (np.diff(requests.arrival_s) >= 0).all()
    early = requests_of(parsed(duration=3600), output_share=0.9)
    assert early.output.mean() == pytest.approx(0.9 * 196.1, rel=0.01)


def test_gaps_are_those_of_a_poisson_process() -> None:
    gaps = np.diff(requests_of(parsed(duration=3600)).arrival_s)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, abs=0.03)
    assert np.quantile(gaps * 4, 0.5) == pytest.approx(np.log(2), rel=0.04)


@pytest.mark.parametrize("shape", [0.25, 4.0])
def test_burstiness_is_the_shape_of_the_gaps(shape: float) -> None:
    group = [{"count": 1, "rank": 8, "rate": 5.0, "burstiness": shape}]
    gaps = np.diff(requests_of(parsed(duration=4000, adapters=group)).arrival_s)
    assert gaps.size == pytest.approx(20_000, rel=0.05)
    assert (gaps.std() / gaps.mean()) ** 2 == pytest.approx(1 / shape, rel=0.1)


def test_rates_change_with_time() -> None:
    group = [{"name": "a", "rank": 8, "rate": [[0, 1.0], [100, 0.0], [200, 3.0]]}]
    times = requests_of(parsed(duration=400, adapters=group)).arrival_s
    counts = np.histogram(times, [0, 100, 200, 400])[0]
    assert counts[1] == 0
    assert counts.sum() == 700
    assert counts[2] == pytest.approx(600, abs=60)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(5)), st.integers(0, 3), st.sampled_from([1.0, 0.5]))
def test_a_stream_is_its_adapters_own(order: list[int], seed: int, burstiness: float) -> None:
    """Neither the order of the adapters nor the others change when an adapter is asked, and for how much."""
    each = [{"name": f"a{i}", "rank": 8, "rate": 0.1 * (i + 1), "burstiness": burstiness} for i in range(5)]
    whole = requests_of(parsed(adapters=each, seed=seed))
    shuffled = requests_of(parsed(adapters=[each[i] for i in order], seed=seed))
    alone = requests_of(parsed(adapters=[each[order[0]]], seed=seed))
    assert np.array_equal(whole.arrival_s, shuffled.arrival_s)
    assert np.array_equal(whole.adapter, shuffled.adapter)
    for mine, theirs in zip(of(alone, 0), of(whole, order[0]), strict=True):
        assert np.array_equal(mine, theirs)


def test_lengths_of_each_kind(tmp_path: Path) -> None:
    fixed = requests_of(parsed(lengths={"distribution": "fixed", "input_mean": 250, "output_mean": 230}))
    assert set(fixed.prompt) == {250}
    assert set(fixed.output) == {230}
    spread = {"distribution": "lognormal", "input_mean": 500, "input_sd": 300, "output_mean": 100, "output_sd": 10}
    drawn = requests_of(parsed(lengths=spread, duration=6000))
    assert drawn.prompt.mean() == pytest.approx(500, rel=0.02)
    assert drawn.prompt.std() == pytest.approx(300, rel=0.05)
    assert drawn.output.std() == pytest.approx(10, rel=0.05)
    (tmp_path / "t.csv").write_text("time,prompt_tokens,output_tokens\n0,10,5\n1,10,5\n2,30,7\n")
    traced = parse_workload(content(lengths={"distribution": "trace", "path": "t.csv"}), tmp_path)
    assert set(requests_of(traced).output) <= {5, 6, 7}
    own = [{"name": "a", "rank": 8, "rate": 1}, {"name": "b", "rank": 8, "rate": 1,
           "lengths": {"distribution": "fixed", "input_mean": 9, "output_mean": 4}}]  # fmt: skip
    requests = requests_of(parsed(adapters=own))
    assert set(of(requests, 1)[1]) == {9}
    assert len(set(of(requests, 0)[1])) > 50


def test_a_trace_says_who_asks(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"time": 2.5, "adapter": "b", "prompt_tokens": 7, "output_tokens": 3}\n'
        '{"time": 1.5, "adapter": "a", "prompt_tokens": 5, "output_tokens": 2}\n'
        '{"time": 2.0, "adapter": "", "prompt_tokens": 6, "output_tokens": 1}\n'
    )
    workload = parse_workload({"requests": "t.jsonl", "adapters": [{"name": "a", "rank": 64}]}, tmp_path)
    requests = requests_of(workload)
    assert [a.name for a in workload.adapters] == ["a", "b"]
    assert workload.max_rank == 64
    assert requests.arrival_s.tolist() == [1.5, 2.0, 2.5]
    assert requests.adapter.tolist() == [0, 2, 1]
    assert requests.prompt.tolist() == [5, 6, 7]
    assert workload.duration_s > 2.5


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,110,27\n"
)
BURST = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,1,2,GPT-4,472,18,490,Conversation log\n45,1,2,GPT-4,100,0,100,API log\n118,2,3,ChatGPT,30,40,70,API log\n"
)
MOONCAKE = '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n{"timestamp": 3000, "input_length": 7319, "output_length": 490, "hash_ids": [1]}\n'  # noqa: E501


@pytest.mark.parametrize(
    ("text", "suffix", "times", "prompts"),
    [
        (AZURE, "csv", [0, 0.052], [4808, 110]),
        (BURST, "csv", [0, 113], [472, 30]),
        (MOONCAKE, "jsonl", [0, 3], [6758, 7319]),
    ],
)
def test_foreign_traces(tmp_path: Path, text: str, suffix: str, times: list[float], prompts: list[int]) -> None:
    (tmp_path / f"t.{suffix}").write_text(text)
    adapters = [{"count": 3, "rank": 8}]
    workload = parse_workload({"requests": {"path": f"t.{suffix}"}, "adapters": adapters}, tmp_path)
    requests = requests_of(workload)
    assert requests.arrival_s == pytest.approx(times)
    assert requests.prompt.tolist() == prompts
    assert requests.adapter.max() < 3


def test_one_trace_in_every_file_format(tmp_path: Path) -> None:
    rows = [{"arrival_s": 0.5, "lora": "a", "prompt_len": 5, "output_len": 2},
            {"arrival_s": 0.25, "lora": "b", "prompt_len": 6, "output_len": 3}]  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.csv").write_text("arrival_s,lora,prompt_len,output_len\n0.5,a,5,2\n0.25,b,6,3\n")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for suffix in ("json", "jsonl", "csv", "parquet"):
        requests = requests_of(parse_workload({"requests": f"t.{suffix}"}, tmp_path))
        assert requests.arrival_s.tolist() == [0.25, 0.5]
        assert requests.adapter.tolist() == [1, 0]
        assert requests.output.tolist() == [3, 2]
    inline = requests_of(parse_workload({"requests": rows}, tmp_path))
    assert inline.prompt.tolist() == [6, 5]
    (tmp_path / "broken.parquet").write_text("PAR")
    with pytest.raises(WorkloadError, match=r"broken.parquet: cannot be read"):
        parse_workload({"requests": "broken.parquet"}, tmp_path)
    with pytest.raises(WorkloadError, match="'azur' is not one of deltaworks, azure"):
        parse_workload({"requests": {"path": "t.csv", "format": "azur"}}, tmp_path)


def test_requests_are_dealt_by_zipf(tmp_path: Path) -> None:
    rows = [{"timestamp": 10 * i, "input_length": 5, "output_length": 5} for i in range(20_000)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapters = [{"count": 10, "rank": 8}]

    def counts(seed: int, exponent: float) -> Any:
        asked = {"requests": {"path": "t.jsonl", "zipf": exponent}, "adapters": adapters, "seed": seed}
        return np.bincount(requests_of(parse_workload(asked, tmp_path)).adapter, minlength=10)

    popular = np.sort(counts(0, 1.0))[::-1]
    assert popular[0] / popular[9] == pytest.approx(10, rel=0.2)
    assert np.array_equal(counts(0, 1.0), counts(0, 1.0))
    assert not np.array_equal(counts(0, 1.0), counts(1, 1.0))
    assert counts(0, 0.0) == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"duraton": 5}, "unknown key 'duraton'; did you mean 'duration'?"),
        ({"duration": None}, "duration is missing"),
        ({"duration": 0}, "duration: expected a number of at least 0.001, not 0"),
        ({"duration": True}, "duration: expected a number"),
        ({"lengths": None}, "lengths is missing; for example"),
        ({"lengths": {"distribution": "sharegtp"}}, "'sharegtp' is not one of sharegpt, fixed"),
        ({"lengths": {"distribution": "fixed", "input_mean": 5}}, "output_mean is missing"),
        ({"lengths": {**SHAREGPT, "input_sd": 5}}, "input_sd: not for the distribution 'sharegpt'"),
        ({"adapters": []}, "no adapters"),
        ({"adapters": [{"count": 2, "rank": 8}]}, r"adapters\[0\]: rate is missing"),
        ({"adapters": [{"rank": 8, "rate": 1}]}, r"adapters\[0\].name: expected a text"),
        ({"adapters": [{"name": "a", "rank": 0, "rate": 1}]}, "rank: expected a number of at least 1"),
        ({"adapters": [{"name": "a", "rank": 8.5, "rate": 1}]}, "rank: expected a whole number"),
        ({"adapters": [{"name": "a", "rank": 8, "rate": float("nan")}]}, "rate: expected a number"),
        ({"adapters": [{"name": "a", "rank": 8, "rate": [[5, 1]]}]}, "times must start at 0"),
        ({"adapters": 2 * [{"name": "a", "rank": 8, "rate": 1}]}, "two adapters are called 'a'"),
        ({"requests": "t.csv", "lengths": SHAREGPT}, "give lengths or requests, not both"),
        ({"requests": "missing.csv", "lengths": None}, "missing.csv: cannot be read"),
        ({"requests": [], "lengths": None}, "there are no requests"),
        ({"requests": [{"time": 0, "prompt_tokens": 5}], "lengths": None}, "no column for the output"),
        ({"requests": [{"time": 0, "prompt_tokens": 5, "output_tokens": 0}], "lengths": None}, "at least one token"),
        ({"requests": [{"time": -1, "prompt_tokens": 5, "output_tokens": 5}], "lengths": None}, "must not be negative"),
        (
            {"requests": [{"time": "x", "prompt_tokens": 5, "output_tokens": 5}], "lengths": None},
            "request 1 is malformed",
        ),
    ],
)
def test_a_mistake_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        parsed(**changed)


FIXED = {"distribution": "fixed", "input_mean": 200, "output_mean": 100}


def one(**changed: Any) -> dict[str, Any]:
    """A workload of one adapter, with some of its keys changed."""
    return {"adapters": [{"name": "a", "rank": 8, "rate": 0.5} | changed]}


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (one(rate=1e9), "its rates make 6e\\+11 requests in 600 s; at most 20,000,000 are simulated"),
        (one(rate=10**400), "rate: expected a number of at most 1e\\+15, not 0x"),
        (one(rate=float("inf")), "rate: expected a number of at most"),
        (one(count=10**9), "count: expected a number of at most 100,000"),
        ({"adapters": 2 * [{"count": 100_000, "rank": 8, "rate": 0}]}, "there are more than 100,000"),
        (one(rank=10**9), "rank: expected a number of at most 512"),
        (one(name="x" * 10**7), "a text of 10,000,000 characters is too long"),
        (one(burstiness=1e-300), "burstiness: expected a number of at least 0.001"),
        (one(burstiness=float("nan")), "burstiness: expected a number of at least"),
        (one(rate=[[0, 1], deep(5000)]), r"rate\[1\]: expected \[seconds, requests per second\], not \[\[\[\[\.\.\."),
        ({"adapters": deep(5000)}, r"adapters\[0\]: expected keys and values, not \[\[\[\["),
        ({"lengths": FIXED | {"input_mean": 1e12}}, "input_mean: expected a number of at most 10,000,000"),
        ({"lengths": FIXED | {"distribution": deep(5000)}}, "distribution: .* is not one of sharegpt, fixed"),
        ({"lengths": FIXED | {"output_mean": 1e7}, "duration": 1e7, **one(rate=1)}, "its requests have 1e\\+14 tokens"),
        ({"duration": 1e-320}, "duration: expected a number of at least 0.001, not 1e-320"),
        (
            {"lengths": None, "duration": None, "requests": [
                {"time": t, "adapter": "a", "prompt_tokens": 1, "output_tokens": 1} for t in (0, 1e-9)
            ]},
            "duration is missing; all requests of the trace come within 1e-09 s",
        ),
        (one(name="a\0"), r"adapters\[0\].name: 'a\\x00' holds a control character or a line break"),
        (one(name="a\nb"), "holds a control character or a line break"),
        ({"duration": 1e12}, "duration: expected a number of at most 31,622,400"),
        ({"seed": 10**50}, "seed: expected a number of at most"),
        ({"seed": 1.5}, "seed: expected a whole number"),
        ({"seed": float("nan")}, "seed: expected a number of at least 0, not nan"),
        ({"lengths": None, "requests": {"path": "t.csv", "zipf": 1e9}}, "zipf: expected a number of at most 100"),
        ({"lengths": None, "requests": [1, 2]}, "request 1 is malformed: expected columns and values, not 1"),
        ({"lengths": None, "requests": "x" * 500}, "File name too long"),
        (
            {"adapters": [{"name": "a", "rank": 8, "rate": [[t, 0] for t in range(101)]},
                          {"count": 99_999, "rank": 8, "rate": 0}]},
            "a rate with 101 pieces is too much for 100,000 adapters",
        ),
    ],
)  # fmt: skip
def test_what_is_absurd_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said) as caught:
        parsed(**changed)
    assert len(str(caught.value)) < 800


def test_lengths_that_are_written_alike_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    group = [{"name": f"a{i}", "rank": 8, "rate": 0.01, "lengths": FIXED | {"input_mean": i % 2 + 1}} for i in range(9)]
    workload = parsed(adapters=group)
    assert len({id(a.lengths) for a in workload.adapters}) == 2
    monkeypatch.setattr("deltaworks.serving.lengths.MAX_LENGTHS", 1)
    with pytest.raises(WorkloadError, match=r"adapters\[1\].lengths: the adapters have more than 1 different lengths"):
        parsed(adapters=group)


def test_crowded_requests_are_in_order() -> None:
    """All within a second of a day: the order is that of a stable sort, whichever way it is made."""
    group = [{"name": n, "rank": 8, "rate": [[0, 3000], [1, 0]]} for n in "abc"]
    crowded = requests_of(parsed(duration=86_400, adapters=group))
    spread = requests_of(parsed(duration=1, adapters=group))
    assert crowded.arrival_s.size == 9000
    assert (np.diff(crowded.arrival_s) >= 0).all()
    for mine, theirs in zip(vars(crowded).values(), vars(spread).values(), strict=True):
        assert np.array_equal(mine, theirs)


def row(time: float) -> dict[str, Any]:
    return {"time": time, "prompt_tokens": 5, "output_tokens": 3, "adapter": "a"}


def test_requests_after_the_duration_are_said() -> None:
    late = {"requests": [row(1), row(2), row(30), row(40)], "duration": 10}
    workload = parse_workload(late, Path())
    assert workload.notes == ("2 of 4 requests of the trace come after the duration of 10 s and are left out",)
    assert requests_of(workload).arrival_s.tolist() == [1, 2]
    assert parse_workload(late | {"duration": 41}, Path()).notes == ()
    with pytest.raises(WorkloadError, match=r"no request of the trace comes within .* 0.5 s; .* after 1 s"):
        parse_workload(late | {"duration": 0.5}, Path())
    with pytest.raises(WorkloadError, match="duration is missing; all requests of the trace come at its start"):
        parse_workload({"requests": [row(0), row(0)]}, Path())
    with pytest.raises(WorkloadError, match="they span 40,000,000 s; at most 31,622,400 s"):
        parse_workload({"requests": [row(0), row(4e7)]}, Path())


def test_times_from_1970_make_a_trace_of_their_span() -> None:
    workload = parse_workload({"requests": [row(1764547200.5), row(1764547260.5)]}, Path())
    assert workload.duration_s == pytest.approx(60)
    assert requests_of(workload).arrival_s.tolist() == [0, 60]


def test_the_unit_of_a_trace_is_a_key(tmp_path: Path) -> None:
    rows = [{"timestamp": t, "input_length": 5, "output_length": 3} for t in (0, 10, 25)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = {"requests": {"path": "t.jsonl", "unit": "s"}, "adapters": [{"name": "a", "rank": 8}]}
    assert requests_of(parse_workload(asked, tmp_path)).arrival_s.tolist() == [0, 10, 25]
    with pytest.raises(WorkloadError, match=r"may be in seconds or in milliseconds; say which, as in requests: \{path"):
        parse_workload({**asked, "requests": "t.jsonl"}, tmp_path)
    lengths = {"distribution": "trace", "path": "t.jsonl"}  # whose times do not matter
    assert parse_workload(content(lengths=lengths), tmp_path).lengths is not None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "rare.json",
            (
                '{"duration": 600, "lengths": {"distribution": "fixed", "input_mean": 2e2, "output_mean": 100},'
                ' "adapters": [{"name": "fox \\ud83e\\udd8a", "rank": 8, "rate": 5e-05}]}'
            ),
        ),
        (
            "rare.yaml",
            (
                "duration: 6e2\nlengths: {distribution: fixed, input_mean: 200, output_mean: 100}\n"
                "adapters:\n- {name: fox \N{FOX FACE}, rank: 8, rate: 5e-05}\n"
            ),
        ),
    ],
)
def test_numbers_and_escapes_mean_what_they_say(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    workload = read_workload(tmp_path / name)
    assert workload.duration_s == 600
    assert workload.adapters[0].name == "fox \N{FOX FACE}"
    assert workload.adapters[0].rate == ((0.0, 5e-5),)


def test_a_file_that_is_no_workload(tmp_path: Path) -> None:
    for text, said in (
        ("{", "cannot be read as a workload"),
        ("5", "expected keys and values"),
        ("", "expected keys"),
        ("duration: 5\nduration: 6\n", "line 2: the key 'duration' is given twice"),
        ("duration: 0100\n", "line 1: '0100' is an octal number in YAML; write it without the leading zero"),
        ("adapters:\n\t- 5", "line 2 begins with a tab; YAML indents with spaces"),
        ("adapters: " + 5000 * "[", "nested more than 100 deep"),
    ):
        (tmp_path / "w.yaml").write_text(text)
        with pytest.raises(WorkloadError, match=said):
            read_workload(tmp_path / "w.yaml")
