"""Targets that the serving half reads: workloads, traces, batches, profiles, measurement tables, placements."""

import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from deltaworks.serving.batch import answer_lines, answer_text
from deltaworks.serving.document import read_placement
from deltaworks.serving.fit import fit_profile
from deltaworks.serving.profile import Profile, built_in_profiles, find_profile
from deltaworks.serving.surrogate import built_in_surrogates, load_surrogate
from deltaworks.serving.traces import read_trace
from deltaworks.serving.workload import Workload, read_workload, requests_of
from fuzz.harness import Target
from fuzz.mutate import as_json, as_yaml

FEW = 2000
"""Requests that a workload may have for a fuzz target to draw them."""


@cache
def _profile() -> Profile:
    return find_profile("tiny-llama-cpu")


# Workloads

FIXED = {"distribution": "fixed", "input_mean": 20, "output_mean": 5}
ROWS = [
    {"time": 0.5, "adapter": "a", "prompt_tokens": 5, "output_tokens": 3},
    {"time": 2, "adapter": None, "prompt_tokens": 50, "output_tokens": 1},
]
WORKLOADS: list[Any] = [
    {
        "duration": 60,
        "seed": 1,
        "lengths": FIXED,
        "arrivals": {"burstiness": 0.5},
        "adapters": [
            {"name": "a", "rank": 8, "rate": 0.5},
            {"count": 3, "rank": 16, "rate": [[0, 0.1], [30, 0.2]], "burstiness": 2},
            {
                "name": "b",
                "count": 2,
                "rank": 8,
                "rate": 0.01,
                "lengths": {
                    "distribution": "lognormal",
                    "input_mean": 9,
                    "input_sd": 3,
                    "output_mean": 5,
                    "output_sd": 1,
                },
            },
        ],
    },
    {"duration": 10, "requests": ROWS, "adapters": [{"name": "a", "rank": 32}]},
    {"requests": {"path": "trace.csv", "format": "deltaworks", "unit": "s", "zipf": 1.5}, "adapters": [{"count": 3}]},
]
TRACE = b"time,prompt_tokens,output_tokens\n0,5,3\n1.5,6,4\n"


def _read_workload(name: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        (folder / "trace.csv").write_bytes(TRACE)
        (folder / name).write_bytes(content)
        _drawn(read_workload(folder / name))

    return read


def _drawn(workload: Workload) -> None:
    if workload.trace or sum(a.expected(workload.duration_s) for a in workload.adapters) <= FEW:
        requests_of(workload)


# Traces

TRACES: list[bytes] = [
    TRACE,
    b"time,adapter,prompt_tokens,output_tokens\n0.25,a,5,3\n1764547200,,6,4\n",
    b"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-11 23:59:59.500000+00:00,2162,5\n2024-05-12 00:00:00Z,2399,6\n",
    b"Timestamp,Request tokens,Response tokens\n5,472,18\n45,100,0\n",
    (
        b'{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0]}\n'
        b'{"timestamp": 3600000, "input_length": 7319, "output_length": 490, "hash_ids": [0, 1]}\n'
    ),
    b'{"chat_id": 159, "timestamp": 61.114, "input_length": 5, "output_length": 2, "turn": 2}\n',
    json.dumps(ROWS, indent=1).encode(),
    json.dumps({"requests": ROWS}).encode(),
    json.dumps({"input_lens": [5, 6], "output_lens": [2, 3], "start_times": [100.5, 101.25]}, indent=2).encode(),
]


def _read_trace(content: bytes, folder: Path) -> None:
    (folder / "trace").write_bytes(content)
    read_trace(folder / "trace")


def _parquet() -> Sequence[bytes]:
    file = io.BytesIO()
    at = pa.array([1_764_547_200_000_000_000, 1_764_547_203_000_000_000], pa.timestamp("ns"))
    parquet.write_table(pa.table({"timestamp": at, "input_tokens": [5, 6], "output_tokens": [2, 3]}), file)
    return [file.getvalue()]


# Batches

QUESTIONS: list[Any] = [
    {"id": 1, "workload": {"duration": 20, "lengths": FIXED, "adapters": [{"name": "a", "rank": 8, "rate": 0.5}]},
     "slots": 4, "max_rank": 8, "served": 4, "client_max_outstanding": 5},
    {"id": ["x"], "slots": 2, "workload": {"requests": ROWS, "duration": 20}},
    {"id": None, "slots": 2, "workload": "w.json"},
]  # fmt: skip


def _answer(content: bytes, folder: Path) -> None:
    (folder / "w.json").write_text(json.dumps(WORKLOADS[0]))
    lines = content.split(b"\n")
    answers = list(answer_lines(lines, folder, _profile(), threads=1))
    assert len(answers) == sum(bool(line.strip()) for line in lines)
    for answer in answers:
        json.loads(answer_text(answer).encode())
        assert "failed with" not in answer.get("error", ""), answer["error"]


# Profiles, and the tables that they come from


def _profiles() -> Sequence[Any]:
    return [find_profile(name).to_json() for name in built_in_profiles()]


def _read_profile(content: bytes, folder: Path) -> None:
    (folder / "profile.json").write_bytes(content)
    profile = find_profile(str(folder / "profile.json"))
    profile.costs(4, 16)
    profile.most_slots(16)
    assert profile.digest


FOLDER: dict[str, bytes] = {
    "about.yaml": b"name: p\nengine: vLLM\nmodel: m\ngpu: g\nserver: {max_num_seqs: 64}\nfront_end: {request: 2}\n"
    b"graph_tokens: 128\nsources: {step: here}\n",
    "steps.csv": b"step_ms,decode,prefill,context,adapters,slots,max_rank,skipped\n"
    b"20,10,0,900,1,4,16,0\n25,20,0,95,2,8,16,0\n33,20,90,980,4,4,8,3\n40,64,0,900,6,8,16,0\n50,80,0,1,9,16,16,0\n",
    "kv_cache.csv": b"slots,max_rank,kv_tokens\n4,8,98400\n8,16,96800\n500,512,\n9,8,96000\n",
    "loads.csv": b"load_ms,source,rank\n5,memory,8\n6,memory,16\n50,disk,8\n",
    "scheduler.csv": b"scheduler_ms,running,skipped\n0.1,5,0\n0.2,9,50\n",
    "first_tokens.jsonl": b'{"ttft_ms": 40, "prefill": 20, "adapters": 1, "slots": 4, "max_rank": 8}\n',
    "runs.jsonl": b'{"slots": 2, "measured": {"itl_ms": 20}, "workload": {"duration": 20, "requests": [{"time": 1,'
    b' "adapter": "a", "prompt_tokens": 5, "output_tokens": 3}]}}\n',
}


def _tables() -> Sequence[bytes]:
    """Each file of a folder of tables, after a line with its name."""
    return [name.encode() + b"\n" + content for name, content in FOLDER.items()]


def _fit(content: bytes, folder: Path) -> None:
    """Fit the usual tables with one file replaced."""
    first, _, text = content.partition(b"\n")
    changed = first.decode(errors="replace")
    for name, usual in FOLDER.items():
        (folder / name).write_bytes(text if name == changed else usual)
    fitted = fit_profile(folder)
    (folder / "fitted.json").write_text(json.dumps(fitted.to_json(), allow_nan=False))
    assert find_profile(str(folder / "fitted.json")) == fitted


# Placements and surrogates


def _placements() -> Sequence[Any]:
    profile = _profile()
    gpus = [
        {"id": f"gpu-{i}", "type": profile.name, "max_loras": 4, "max_cpu_loras": 4, "max_lora_rank": 16,
         "adapters": [{"name": "a", "share": 0.5, "rank": 8, "rate": 0.1}, {"name": n, "share": 1.0, "rank": 16}]}
        for i, n in enumerate("bc")
    ]  # fmt: skip
    adapters = [{"name": n, "rank": r, "rate": 0.2} for n, r in (("a", 8), ("b", 16), ("c", 16))]
    return [
        {
            "schema": 1,
            "gpus": gpus,
            "workload": {"duration": 60, "lengths": FIXED, "adapters": adapters},
            "profiles": {profile.name: profile.to_json()},
            "prices": {profile.name: 2.5},
        }
    ]


def _read_placement(content: bytes, folder: Path) -> None:
    (folder / "placement.json").write_bytes(content)
    read_placement(folder)


def _surrogates() -> Sequence[Any]:
    content = json.loads(next(iter(built_in_surrogates().values())).read_text())
    return [content]


def _read_surrogate(content: bytes, folder: Path) -> None:
    (folder / "surrogate.json").write_bytes(content)
    load_surrogate(folder / "surrogate.json")


TARGETS = [
    Target("workload", lambda: WORKLOADS, _read_workload("w.yaml"), write=as_yaml),
    Target("workload-json", lambda: WORKLOADS, _read_workload("w.json"), write=as_json),
    Target("trace", lambda: TRACES, _read_trace),
    Target("trace-parquet", _parquet, _read_trace),
    Target("batch", lambda: QUESTIONS, _answer),
    Target("profile", _profiles, _read_profile),
    Target("tables", _tables, _fit),
    Target("placement", _placements, _read_placement),
    Target("surrogate", _surrogates, _read_surrogate),
]
