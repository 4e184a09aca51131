"""The published vLLM runs with LoRA adapters (arXiv 2508.08343), as workloads and configurations for the twin."""

import csv
from pathlib import Path
from typing import Any

from deltaworks.serving.calibrate import Run
from deltaworks.serving.simulate import Configuration
from deltaworks.serving.workload import Workload, parse_workload

DATA = Path(__file__).parents[2] / "shared" / "data" / "adapter-serving"
STUDIES = ("digital_twin_modelling", "ml_modelling_test")
PORTS = 25_500
"""Requests that the load generator could have open at once: then it ran out of local ports (errno 99)."""


def published_runs(model: str, data: Path = DATA) -> list[dict[str, str]]:
    """The hour-long runs of a model on vLLM 0.8.5, those that failed for want of memory as well."""
    with (data / "real_runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        r
        for r in rows
        if r["study"] in STUDIES
        and r["model"].startswith(model)
        and r["server_port_collision"] != "confirmed"
        and (r["failure_class"] == "infeasible_memory" or (r["failed"] == "False" and r["total_throughput_tps"]))
    ]


def family(row: dict[str, str]) -> str:
    """The workload that a run belongs to: its rates and ranks, whatever the number of adapters, slots and the model."""
    return row["workload_id"].rpartition("|n")[0] if row["workload_id"].startswith("dt|") else row["workload_id"]


def pairs(text: str) -> list[tuple[str, str]]:
    """``a:b|c:d`` as the pairs it lists."""
    return [(left, right) for left, _, right in (part.partition(":") for part in text.split("|"))]


def workload_content(row: dict[str, str], seed: int = 0) -> dict[str, Any]:
    """A run's workload as a file would describe it. Which adapter has which rank is not known; rates and ranks are."""
    groups = [(float(rate), int(count)) for rate, count in pairs(row["adapter_rate_counts"])]
    ranks = [int(rank) for rank, count in pairs(row["adapter_rank_counts"]) for _ in range(int(count))]
    adapters, at = [], 0
    for index, (rate, count) in enumerate(groups):
        own = ranks[at : at + count]
        adapters += [
            {"name": f"g{index}r{rank}", "count": own.count(rank), "rank": rank, "rate": rate}
            for rank in sorted(set(own))
        ]
        at += count
    lengths = {"distribution": "sharegpt", "input_mean": float(row["pool_mean_input_tokens"] or 222.7),
               "output_mean": float(row["pool_mean_output_tokens"] or 196.1)}  # fmt: skip
    return {"duration": 3600, "seed": seed, "lengths": lengths, "adapters": adapters}


def workload(row: dict[str, str], seed: int = 0) -> Workload:
    """A run's workload."""
    return parse_workload(workload_content(row, seed), DATA)


def configuration(row: dict[str, str]) -> Configuration:
    """How a run's server and load generator were started."""
    return Configuration(int(row["max_loras"]), int(row["max_lora_rank"]), int(row["max_cpu_loras"]), PORTS)


def run_of(row: dict[str, str]) -> Run:
    """A run with what a profile should agree with: no TTFT of a client in trouble or of a queue that only grows."""
    measured = {"itl_ms": float(row["itl_mean_ms"])}
    ttft = float(row["ttft_mean_ms"])
    if row["starved"] == "True":
        measured["throughput_tps"] = float(row["total_throughput_tps"])
    elif ttft < 1000:
        measured["ttft_ms"] = ttft
    return Run(workload(row), configuration(row), measured)
