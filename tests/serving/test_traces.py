"""Traces: what time means in each format, and what files may hold."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from deltaworks.errors import WorkloadError
from deltaworks.serving import trace_rows, traces
from deltaworks.serving.traces import read_trace, trace_of

AZURE_2024 = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-11 23:59:59.500000+00:00,2162,5
2024-05-12 00:00:00+00:00,2399,6
2024-05-12 00:00:00.001163+00:00,76,15
2024-05-12 00:00:01.250000+00:00,900,20
"""
OWN = "time,prompt_tokens,output_tokens\n"


def written(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def mooncake(*times: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"timestamp": t, "input_length": 5, "output_length": 3, **more} for t in times]


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo", "Australia/Lord_Howe"])
def test_dates_do_not_hang_on_the_time_zone_of_the_machine(tmp_path: Path, zone: str) -> None:
    """With and without an offset, and across the hour that New York's clocks repeat."""
    written(tmp_path, AZURE_2024, "offsets.csv")
    dates = "".join(f"2023-11-05 {t},1,1\n" for t in ("00:59:59", "01:30:00", "02:30:00.25", "03:30:00+01:00"))
    written(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens\n" + dates, "naive.csv")
    code = (
        "from pathlib import Path; from deltaworks.serving.traces import read_trace\n"
        "for name in ('offsets', 'naive'): print(read_trace(Path(name + '.csv')).arrival_s.tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env=os.environ | {"TZ": zone},
    )  # fmt: skip
    offsets, naive = map(json.loads, done.stdout.splitlines())
    assert offsets == pytest.approx([0, 0.5, 0.501163, 1.75], abs=1e-9)
    assert naive == pytest.approx([0, 1801, 5401, 5401.25], abs=1e-9)


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        (["2024-05-12T00:00:00Z", "2024-05-12T00:00:00.1234567Z"], [0, 0.1234567]),
        (["2024-05-12 00:00:00+02:00", "2024-05-11 22:00:01"], [0, 1]),
        (["2024-05-12 00:00:00+0530", "2024-05-11T18:30:02,5"], [0, 2.5]),
        (["2024-02-29 23:59", "2024-03-01 00:00"], [0, 60]),
        (["2024-03-01", "20240301T000005"], [0, 5]),
        ([1764547200.5, 1764547260.5], [0, 60]),
        (["1764547200.5", "1764547260.5"], [0, 60]),
        ([1764547200500, 1764547260500], [0, 60]),
        ([1764547200500000, 1764547200600000], [0, 0.1]),
        ([1764547200500000000, 1764547260500000000], [0, 60]),
        ([3, 4.5], [3, 4.5]),
    ],
)
@pytest.mark.parametrize("column", ["time", "startTime"])
def test_times_are_dates_or_count_from_1970_or_from_the_start(
    times: list[Any], seconds: list[float], column: str
) -> None:
    rows = [{column: t, "prompt_tokens": 5, "output_tokens": 3} for t in times]
    assert trace_of(rows, "t").arrival_s == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "seconds"),
    [
        (mooncake(0, 27_482, 3_600_000), [0, 27.482, 3600]),  # Mooncake's own: whole milliseconds
        (mooncake(0, 3000, 6000), [0, 3, 6]),
        (mooncake(0, 10.5), [0, 10.5]),  # vLLM's timed traces
        (mooncake(61.114, 62.5, 90.0, chat_id=1, parent_chat_id=-1, turn=1), [0, 1.386, 28.886]),  # Qwen-Bailian
        (mooncake(61, 63, 90, chat_id=1, turn=1), [0, 2, 29]),
        (mooncake(1764547200.25, 1764547201.25), [0, 1]),
        (mooncake(1764547200250, 1764547201250), [0, 1]),
        (mooncake(7), [0]),
    ],
)
def test_seconds_are_told_from_milliseconds(rows: list[dict[str, Any]], seconds: list[float]) -> None:
    assert trace_of(rows, "t").arrival_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    "rows",
    [
        mooncake(0, 10, 25),
        mooncake(*range(0, 3600, 180)),
        mooncake(*range(1000)),
        [{"timestamp": t, "prompt_tokens": 5, "output_tokens": 3} for t in (0, 7)],
    ],
)
def test_a_unit_that_cannot_be_told_is_asked_for(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(WorkloadError, match=r"may be in seconds or in milliseconds; say which, as in .*unit: s"):
        trace_of(rows, "t")
    span = rows[-1]["timestamp"]
    for unit, seconds in (("s", span), ("ms", span / 1e3), ("us", span / 1e6), ("ns", span / 1e9)):
        assert trace_of(rows, "t", unit=unit).arrival_s[-1] == pytest.approx(seconds)


def test_what_was_guessed_or_left_out_is_remarked_on() -> None:
    assert "taken to be in milliseconds, which makes 3,600 s" in trace_of(mooncake(0, 3_600_000), "t").notes[0]
    assert trace_of(mooncake(0, 3_600_000), "t", "mooncake").notes == ()
    assert "its only time, 3600, is taken to be in milliseconds" in trace_of(mooncake(3600), "t").notes[0]
    assert trace_of(mooncake(0), "t").notes == ()
    assert "prefix caching is not modelled" in trace_of(mooncake(0, 0.5, hash_ids=[1]), "t").notes[0]
    failed = [*mooncake(0, 0.5), {"timestamp": 1.5, "input_length": 9, "output_length": 0}]
    assert trace_of(failed, "t").notes == ("t: 1 request without tokens, which failed, is left out",)


def test_adapters_are_names_numbers_or_none() -> None:
    rows = [{"time": t, "adapter": a, "prompt_tokens": 1, "output_tokens": 1} for t, a in enumerate(["a", 0, None, ""])]
    assert trace_of(rows, "t").adapter == ("a", "0", "", "")
    assert trace_of(mooncake(0, 0.5, lora="x"), "t").adapter == ("x", "x")
    found = trace_of(rows, "t").by_adapter
    assert {name: places.tolist() for name, places in found.items()} == {"a": [0], "0": [1], "": [2, 3]}
    assert trace_of(mooncake(0), "t").by_adapter == {}


def test_every_layout_of_json_is_read(tmp_path: Path) -> None:
    rows = [{"time": 0.25, "prompt_tokens": 5, "output_tokens": 2}, {"time": 1, "prompt_tokens": 6, "output_tokens": 3}]
    for text in (
        json.dumps(rows),
        json.dumps(rows, indent=2),
        "\ufeff" + json.dumps(rows),
        json.dumps({"requests": rows}, indent=2),
        "".join(json.dumps(row) + "\r\n\n" for row in rows),
        "".join(json.dumps(row, indent=4) + "\n" for row in rows),
        '{"time": 0.25, "prompt_tokens": 5, "output_tokens": 2, "user": "a\u2028b"}\n' + json.dumps(rows[1]),
    ):
        trace = read_trace(written(tmp_path, text, "t.json"))
        assert trace.arrival_s.tolist() == [0.25, 1]
        assert trace.prompt.tolist() == [5, 6]


def test_a_result_of_the_benchmark_of_vllm_is_read(tmp_path: Path) -> None:
    result = {"backend": "vllm", "input_lens": [200, 180, 220], "output_lens": [100, 0, 110], "ttfts": [0.05, 0, 0.06],
              "start_times": [100.0, 100.3, 100.75]}  # fmt: skip
    trace = read_trace(written(tmp_path, json.dumps(result, indent=1), "t.json"))
    assert trace.arrival_s == pytest.approx([0, 0.75])
    assert trace.output.tolist() == [100, 110]
    del result["start_times"]
    with pytest.raises(WorkloadError, match="without start_times; run it with --save-detailed"):
        read_trace(written(tmp_path, json.dumps(result), "t.json"))


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_dates_in_parquet(tmp_path: Path, unit: str) -> None:
    at = pa.array([1_764_547_200_000_000_000, 1_764_547_203_000_000_000], pa.timestamp("ns")).cast(pa.timestamp(unit))
    table = pa.table({"timestamp": at, "input_tokens": [5, 6], "completion_tokens": [2, 3]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert read_trace(tmp_path / "t.parquet").arrival_s.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"status": "success", "data": {"resultType": "matrix", "result": []}}', "is a response of Prometheus"),
        ('{\n "date": "x",\n "completed": 3\n}', "no column for the time; expected 'time' among date, completed"),
        ('[{"time": 0,\n]', "line 2, column 1 is not valid JSON"),
        ('[{"time": 0, "prompt_tokens": 1, "output_tokens": 1}', "is not valid JSON: Expecting ',' or ']'"),
        ('[{"time": 0, "prompt_tokens": 1, "output_tokens": 1}] x', "Extra data"),
        ("[1, 2]", "request 1 is malformed: expected columns and values, not 1"),
        ("[]", "there are no requests in it"),
        ("", "there are no requests in it"),
        ("[" * 100_000, "nested more than 100 deep"),
        ('{"time": 0, "time": 1}', "the key 'time' is given twice"),
        ('{"time": NaN}', "NaN is not a number that JSON allows"),
        (OWN + "nan,1,1\n", "request 1 is malformed: 'nan' is not a time"),
        (OWN + "0,1,1\n1,inf,1\n", "request 2 is malformed: 'inf' is not a number of tokens"),
        (OWN + "0,1.5,1\n", "'1.5' is not a number of tokens"),
        (OWN + "0,1000000000000,1\n", "tokens are not between 0 and 10,000,000"),
        (OWN + "0,-1,1\n", "tokens are not between 0 and 10,000,000"),
        (OWN + "0,1\n", "line 2 has 2 values for 3 columns"),
        (OWN + "0,1,1\n1,5,1,1\n", "line 3 has 4 values for 3 columns"),
        ('[{"time": 0, "prompt_tokens": 1, "output_tokens": 1},]', "Illegal trailing comma"),
        (OWN + "9999-01-01 00:00:00,1,1\n", "is not a time from the year 1678 to 2261"),
        (OWN + "2024-13-45 00:00:00,1,1\n", "'2024-13-45 00:00:00' is not a time: month must be in 1..12"),
        (OWN + "0,1,1\n2024-01-01 00:00:00,1,1\n", "dates in some requests and numbers in others"),
        (OWN + "0,1,1\n5," + "9" * 200_000 + ",1\n", "line 3 is not CSV: field larger than field limit"),
        ("time,time,prompt_tokens,output_tokens\n0,1,1,1\n", "the column 'time' is given twice"),
        (
            "time;prompt_tokens;output_tokens\n0;1;1\n",
            "its columns are separated by semicolons; separate them by commas",
        ),
        ("time\tprompt_tokens\n0\t1\n", "its columns are separated by tabs"),
        ("time, prompt_tokens, output_tokens\n0, 1, 1\n", "' prompt_tokens' is unknown; write it as 'prompt_tokens'"),
        ("time,prompt_tokens,output_tokens, adapter\n0,1,1, a\n", "' adapter' is unknown; write it as 'adapter'"),
        ("TIME,prompt_tokens,output_tokens\n0,1,1\n", "'TIME' is unknown; write it as 'time'"),
        ("TIMESTAMP, ContextTokens, GeneratedTokens\n0, 1, 1\n", "' ContextTokens' is unknown; write it as 'Cont"),
        (gzip.compress((OWN + "0,1,1\n").encode()), "it is compressed by gzip; decompress it first"),
        ((OWN + "0,1,1\n").encode("utf-16"), "it is text in UTF-16; save it in UTF-8"),
        ("timestamp,time,prompt_tokens,output_tokens\n0,0,1,1\n", "'time' and 'timestamp' both give the time"),
        (
            "time,prompt_len,prompt_tokens,output_tokens\n0,1,1,1\n",
            "'prompt_tokens' and 'prompt_len' both give the prom",
        ),
        ("time,model,adapter,prompt_tokens,output_tokens\n0,b,a,1,1\n", "'adapter' and 'model' both give the adapter"),
        ('[{"time": 0, "prompt_tokens": 1, "output_tokens": 1, "adapter": "a\\u0000"}]', "holds a control character"),
        ('time,prompt_tokens,output_tokens,adapter\n0,1,1,"a\nb"\n', "holds a control character or a line break"),
        (b"time,prompt_tokens,output_tokens\n0,1,1\n\xff,1,1\n", "line 3 is not text in UTF-8"),
        ('[{"time": 0, "prompt_tokens": 1, "output_tokens": 1, "adapter": ["x"]}]', "not an adapter's name"),
        ('[{"time": 0, "prompt_tokens": 1, "output_tokens": 1, "adapter": "\\ud83e"}]', "half of a surrogate pair"),
        (f'[{{"time": 0, "prompt_tokens": 1, "output_tokens": 1, "adapter": "{5000 * "x"}"}}]', "5,000 characters"),
        ("PAR1 and no more", "cannot be read as a trace"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        read_trace(written(tmp_path, text))
    assert said in str(caught.value)
    assert "t.csv" in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_the_text_of_a_prompt_is_no_second_column(tmp_path: Path) -> None:
    row = {"time": 0, "prompt": "12 apples?", "prompt_tokens": 5, "output": "yes", "output_tokens": 2, "Model": "m"}
    trace = read_trace(written(tmp_path, json.dumps(row), "t.json"))
    assert (trace.prompt.tolist(), trace.output.tolist(), trace.adapter) == ([5], [2], None)


def test_a_trace_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkloadError, match="it is a device"):
        read_trace(Path("/dev/zero"))
    monkeypatch.setattr(traces, "MAX_REQUESTS", 2)
    with pytest.raises(WorkloadError, match="more than 2 requests"):
        trace_of(mooncake(0, 0.5, 1), "t")
    monkeypatch.setattr(trace_rows, "TRACE_BYTES", 20)
    with pytest.raises(WorkloadError, match="more than 20 bytes"):
        read_trace(written(tmp_path, OWN))


def test_a_format_that_is_asked_for_is_used() -> None:
    assert trace_of(mooncake(0, 10, 25), "t", "mooncake").arrival_s == pytest.approx([0, 0.01, 0.025])
    assert trace_of(mooncake(0, 10, 25), "t", "qwen").arrival_s == pytest.approx([0, 10, 25])
    with pytest.raises(WorkloadError, match=r"'qwn' is not one of deltaworks, .*; did you mean 'qwen'"):
        trace_of(mooncake(0), "t", "qwn")
    with pytest.raises(WorkloadError, match="the unit 'min' is not one of s, ms, us, ns"):
        trace_of(mooncake(0), "t", unit="min")
    with pytest.raises(WorkloadError, match=r"request 1 is malformed: it has no 'ContextTokens'"):
        trace_of([{"TIMESTAMP": 0}], "t", "azure")
    assert np.array_equal(trace_of(mooncake(0.5, 0), "t").arrival_s, [0, 0.5])
