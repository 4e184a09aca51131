"""The built-in profiles beside published and recorded runs of vLLM, where a checkout has them beside it."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from families import SHARED

from deltaworks.serving.profile import find_profile, with_flags
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.workload import parse_workload

PUBLISHED = SHARED / "data" / "adapter-serving" / "real_runs.csv"
CASES = SHARED / "data" / "vllm-cpu" / "cases"
MODELS = {"llama-3.1-8b-instruct": "llama-3.1-8b-h100-64gb", "qwen-2.5-7b-instruct": "qwen-2.5-7b-h100-64gb"}


def near(value: float, other: float, percent: float) -> bool:
    return 100 * abs(value - other) <= percent * (value + other)


def ask(row: dict[str, str]) -> dict[str, Any]:
    ranks = [(p.split(":")[0], int(p.split(":")[1])) for p in row["adapter_rank_counts"].split("|")]
    largest = int(max(ranks, key=lambda pair: int(pair[0]))[0])
    adapters = [
        {"name": f"g{i}", "count": int(count), "rank": largest, "rate": float(rate)}
        for i, (rate, _, count) in enumerate(p.partition(":") for p in row["adapter_rate_counts"].split("|"))
    ]
    lengths = {"distribution": "sharegpt", "input_mean": 222.7, "output_mean": 196.1}
    workload = parse_workload({"duration": 3600, "lengths": lengths, "adapters": adapters}, Path())
    started = Configuration(int(row["max_loras"]), int(row["max_lora_rank"]), int(row["max_cpu_loras"]), 25_500)
    return simulate(workload, find_profile(MODELS[row["model"]]), started)


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="the published runs are not beside this checkout")
@pytest.mark.parametrize("model", MODELS)
def test_published_runs(model: str) -> None:
    with PUBLISHED.open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["model"] == model and r["vllm_version"].startswith("0.8.5")]
    failed = [r for r in rows if r["failure_class"] == "infeasible_memory"]
    served = [r for r in rows if r["failed"] == "False" and r["server_port_collision"] == "none"]
    assert all(ask(r)["memory_error"] for r in failed[::6])
    answers = [(ask(r), r) for r in served[::25]]
    assert not any(a["memory_error"] for a, _ in answers)
    assert sum(near(a["throughput_tps"], float(r["total_throughput_tps"]), 4) for a, r in answers) >= len(answers) - 1
    assert sum(near(a["itl_ms"]["mean"], float(r["itl_mean_ms"]), 9) for a, r in answers) >= len(answers) - 2
    assert sum(a["starved_server"] == (r["starved"] == "True") for a, r in answers) >= len(answers) - 1


@pytest.mark.skipif(not CASES.is_dir(), reason="the recorded runs are not beside this checkout")
@pytest.mark.parametrize("path", sorted(CASES.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_runs_on_a_cpu(path: Path) -> None:
    case = json.loads(path.read_text())
    flags, duration = case["case"]["server"], case["case"]["duration_s"]
    requests = [{"time": r["arrival_s"], "adapter": r["adapter"], "prompt_tokens": r["prompt_len"],
                 "output_tokens": r["output_len"]} for r in case["requests"]]  # fmt: skip
    adapters = [{"name": a["name"], "rank": a["rank"]} for a in case["case"]["adapters"]]
    workload = parse_workload({"duration": duration, "adapters": adapters, "requests": requests}, path.parent)
    tokens = int(flags["kv_cache_memory_bytes"][:-1]) * 2**20 // case["machine"]["kv_bytes_per_token"]
    profile = with_flags(find_profile("tiny-llama-cpu"), kv_tokens=tokens, block_size=flags["block_size"])
    answer = simulate(
        workload, profile, Configuration(flags["max_loras"], flags["max_lora_rank"], flags["max_cpu_loras"])
    )
    done = [r for r in case["requests"] if r["finished"] and r["finish_s"] <= duration]
    assert near(answer["throughput_tps"], sum(r["prompt_len"] + r["output_len"] for r in done) / duration, 6)
    assert near(answer["itl_ms"]["mean"], 1000 * case["summary"]["itl_mean_s"], 12)
    assert answer["starved_server"] == case["summary"]["starved"]
