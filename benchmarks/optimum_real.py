"""How good is the configuration that we recommend, looked up in measured runs? (needs the shared measurements)

    python benchmarks/optimum_real.py [DATA [HEADROOM]]

For every workload whose configurations (adapters served, slots) were measured on a real server, the twin is asked about
each of them; recommended is, of those that it sees the server keep up with, the one that `place` and `advise` would
choose (`judge.best_configuration`). Writes benchmarks/results/optimum_real.json.
"""

import csv
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import serving_runs

from deltaworks.serving.batch import answer_lines
from deltaworks.serving.judge import MARGIN, best_configuration
from deltaworks.serving.profile import find_profile

RESULTS = Path(__file__).parent / "results" / "optimum_real.json"
PROFILES = {"llama-3.1-8b-instruct": "llama-3.1-8b-h100-64gb", "qwen-2.5-7b-instruct": "qwen-2.5-7b-h100-64gb"}
HEADROOM = float(sys.argv[2]) if len(sys.argv) > 2 else 0.02


def question(row: dict[str, str], factor: float) -> dict[str, Any]:
    """What the twin is asked about a measured configuration."""
    rates, sizes = row["rates"].split("-"), row["sizes"].split("-")
    served = int(row["served_adapters"])
    adapters = [
        {"name": f"a{i:03}", "rank": int(sizes[i % len(sizes)]), "rate": factor * float(rates[i % len(rates)])}
        for i in range(served)
    ]
    lengths = {"distribution": "sharegpt", "input_mean": 222.7, "output_mean": 196.1}
    workload = {"duration": 3600, "lengths": lengths, "adapters": adapters}
    rank = max(map(int, sizes))
    return {"workload": workload, "slots": int(row["adapter_slots"]), "max_rank": rank, "served": served}


def answers(rows: list[dict[str, str]], factor: float) -> Iterator[dict[str, Any]]:
    """The twin's answers at some times the traffic."""
    profile = find_profile(PROFILES[rows[0]["model"]])
    return answer_lines((json.dumps(question(row, factor)) for row in rows), Path(), profile)


def recommended(rows: list[dict[str, str]]) -> dict[str, str]:
    """The configuration to recommend of those that the twin sees kept up with, with headroom."""
    plain, more, margin = (list(answers(rows, factor)) for factor in (1.0, 1.0 + HEADROOM, 1.0 + MARGIN))
    good = [
        i
        for i, (a, b) in enumerate(zip(plain, more, strict=True))
        if not (a["starved_server"] or b["starved_server"] or a["memory_error"])
    ]
    outlook = [
        (plain[i]["throughput_tps"], margin[i]["throughput_tps"], plain[i]["ttft_completed_ms"]["p99"] or 0.0)
        for i in good
    ]
    return rows[good[best_configuration(outlook)]]


def main() -> None:
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else serving_runs.DATA
    groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    with (data / "optimum_points_real.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["failed"] == "False" and row["total_throughput_tps"] and row["server_port_collision"] != "confirmed":
                groups[row["workload_id"], row["model"]].append(row)
    found: list[dict[str, Any]] = []
    for (workload, model), rows in sorted(groups.items()):
        best = max(float(r["total_throughput_tps"]) for r in rows if r["starved"] == "False")
        chosen = recommended(rows)
        found.append({
            "workload": workload, "model": model, "served": int(chosen["served_adapters"]),
            "slots": int(chosen["adapter_slots"]), "measured_tps": float(chosen["total_throughput_tps"]),
            "starved": chosen["starved"] == "True", "optimum_tps": best,
            "share": round(float(chosen["total_throughput_tps"]) / best, 4),
        })  # fmt: skip
        print(found[-1])
    shares = [row["share"] for row in found]
    summary = {"workloads": len(found), "mean": statistics.mean(shares), "worst": min(shares),
               "starved": sum(row["starved"] for row in found), "headroom": HEADROOM}  # fmt: skip
    print(summary)
    RESULTS.write_text(json.dumps({"summary": summary, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
