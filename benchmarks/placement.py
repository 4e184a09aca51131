"""GPUs for generated workloads: ours, the simpler ways, and the lower bound; every GPU checked by the twin.

    python benchmarks/placement.py [--workloads 48] [--only N,M]

Writes benchmarks/results/placement.json and the table of docs/placement.md. Workloads have 10 to 2,000 adapters with
equal, Zipf or bursty traffic, one rank or several, and enough traffic for one to some twenty GPUs.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import marked
import numpy as np

from deltaworks.serving.baselines import compare
from deltaworks.serving.judge import Demand, Judge
from deltaworks.serving.placement import place
from deltaworks.serving.profile import find_profile
from deltaworks.serving.surrogate import find_surrogate
from deltaworks.serving.traces import zipf_shares
from deltaworks.serving.workload import parse_workload

RESULTS = Path(__file__).parent / "results" / "placement.json"
DOC = Path(__file__).parents[1] / "docs" / "placement.md"
PROFILES = ("llama-3.1-8b-h100-64gb", "qwen-2.5-7b-h100-64gb")
COUNTS = (10, 30, 100, 200, 400, 700, 1000, 2000)
KINDS = ("equal", "zipf", "bursty")
RANKS = ((8,), (8, 16, 32), (16, 64))
LENGTHS = {"distribution": "sharegpt", "input_mean": 222.7, "output_mean": 196.1}
WAYS = ("by count", "round robin", "random", "rate-balanced", "as many as fit in memory")


def content(index: int) -> tuple[str, str, dict[str, Any]]:
    """The ``index``-th workload: what it is called, its profile, and what its file would hold."""
    rng = np.random.default_rng([5, index])
    count, kind = COUNTS[index % len(COUNTS)], KINDS[index // len(COUNTS) % len(KINDS)]
    ranks = RANKS[int(rng.integers(len(RANKS)))]
    # Requests/s of the whole: one to some twenty GPUs, but no adapter asks less than once in ten minutes.
    total = float(max(np.exp(rng.uniform(np.log(8), np.log(400))), count / 600))
    shares = zipf_shares(count, float(rng.uniform(0.6, 1.2))) if kind == "zipf" else np.full(count, 1 / count)
    if kind == "bursty":
        shares = rng.lognormal(0, 1, count)
        shares /= shares.sum()
    order = rng.permutation(count)
    adapters = [
        {"name": f"a{i:04}", "rank": int(ranks[order[i] % len(ranks)]), "rate": float(shares[order[i]] * total)}
        | ({"burstiness": float(rng.uniform(0.15, 0.6))} if kind == "bursty" else {})
        for i in range(count)
    ]
    name = f"{count} {kind}, ranks {'/'.join(map(str, ranks))}, {total:.0f} requests/s"
    return name, PROFILES[index % 2], {"duration": 3600, "seed": index, "lengths": LENGTHS, "adapters": adapters}


def run(index: int) -> dict[str, Any]:
    """One workload placed, and the simpler ways beside it."""
    name, profile_name, asked = content(index)
    profile = find_profile(profile_name)
    judge = Judge(Demand(parse_workload(asked, Path())), [profile], [find_surrogate(profile)])
    started = time.perf_counter()
    found = place(judge)
    wall_s = time.perf_counter() - started
    runs = judge.runs
    answers = [judge.ask(g.part, g.kind, g.slots, factor) for g in found.gpus if g.part for factor in (1.0, 1.1)]
    table = compare(judge, 0, len(found.gpus))
    return {
        "workload": name, "profile": profile_name, "gpus": len(found.gpus), "lower_bound": found.lower_bound,
        "dealt": found.dealt, "wall_s": round(wall_s, 2), "twin_runs": runs,
        "starved": sum(a["starved"] for a in answers), "memory_errors": sum(a["memory_error"] for a in answers),
        "ttft_p99_ms": max(a["ttft_ms"]["p99"] for a in answers[::2]), "baselines": table,
    }  # fmt: skip


def cell(row: dict[str, Any]) -> str:
    """GPUs of a simpler way, as the table shows them."""
    if row["gpus"] is None:
        return "-"
    return f"{row['gpus']}{'*' if row['starved'] or row['memory_errors'] else ''}"


def is_valid(row: dict[str, Any]) -> bool:
    """Whether a simpler way found GPUs of which none starves."""
    return row["gpus"] is not None and not row["starved"] and not row["memory_errors"]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How ours stands to the bound, and to each simpler way where that works."""
    gaps = [(row["gpus"], row["lower_bound"]) for row in rows]
    ways = {}
    for way in WAYS:
        works = [(row["gpus"], row["baselines"][way]["gpus"]) for row in rows if is_valid(row["baselines"][way])]
        ways[way] = {
            "works": len(works),
            "ours": sum(ours for ours, _ in works),
            "theirs": sum(theirs for _, theirs in works),
            "below_ours": sum(theirs < ours for ours, theirs in works),
        }
    return {
        "workloads": len(rows),
        "at_the_bound": round(sum(n <= b for n, b in gaps) / len(gaps), 3),
        "beyond_one_and_10_percent": sum(n > b + 1 and n > 1.1 * b for n, b in gaps),
        "starved_or_out_of_memory": sum(row["starved"] + row["memory_errors"] for row in rows),
        "gpus": sum(row["gpus"] for row in rows),
        "lower_bounds": sum(row["lower_bound"] for row in rows),
        "ways": ways,
        "wall_s_median": statistics.median(row["wall_s"] for row in rows),
        "wall_s_most": max(row["wall_s"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workloads", type=int, default=48)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    chosen = [int(i) for i in arguments.only.split(",")] if arguments.only else range(arguments.workloads)
    rows = []
    for index in chosen:
        rows.append(run(index))
        row = rows[-1]
        cells = "  ".join(cell(row["baselines"][way]) for way in WAYS)
        sys.stderr.write(
            f"{index} {row['workload']}: {row['gpus']} >= {row['lower_bound']} {cells} {row['wall_s']} s\n"
        )
    found = summary(rows)
    lines = [
        "| workload | GPU | lower bound | ours | " + " | ".join(WAYS) + " |",
        "|---|---|" + "---:|" * (2 + len(WAYS)),
        *(
            f"| {row['workload']} | {row['profile'].split('-')[0]} | {row['lower_bound']} | **{row['gpus']}** | "
            + " | ".join(cell(row["baselines"][way]) for way in WAYS)
            + " |"
            for row in rows
        ),
    ]
    print("\n".join(lines))
    print(json.dumps(found, indent=1))
    if not arguments.only:
        RESULTS.write_text(json.dumps({"cores": os.cpu_count(), "summary": found, "rows": rows}, indent=1) + "\n")
        marked.fill(DOC, "table: benchmarks/placement.py", lines)


if __name__ == "__main__":
    main()
