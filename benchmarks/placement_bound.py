"""How far placements are from their lower bound, on random workloads of mixed ranks, lengths and rates.

    python benchmarks/placement_bound.py [--seeds 2,3] [--workloads 30] [--only N,M]

Writes benchmarks/results/placement_bound.json and a table of docs/placement.md; with ``--only``, or with other seeds or
numbers than the defaults, it only prints them. Workloads have 2 to 400 adapters, ranks from 8 to 128 in any mix, for
each adapter one of up to four distributions of lengths (ShareGPT, lognormal, fixed), equal or Zipf rates, and traffic
for one to about twelve GPUs.
"""

import argparse
import collections
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import marked
import numpy as np

from deltaworks.serving.judge import Demand, Judge
from deltaworks.serving.placement import place
from deltaworks.serving.profile import find_profile
from deltaworks.serving.surrogate import find_surrogate
from deltaworks.serving.traces import zipf_shares
from deltaworks.serving.workload import parse_workload

RESULTS = Path(__file__).parent / "results" / "placement_bound.json"
DOC = Path(__file__).parents[1] / "docs" / "placement.md"
SEEDS, WORKLOADS = (2, 3), 30
PROFILES = ("llama-3.1-8b-h100-64gb", "qwen-2.5-7b-h100-64gb")
RANKS = (8, 16, 32, 64, 128)
DURATIONS = (600, 1200, 1800, 3600)
MANY_EVERY, MANY = 10, (100, 400)
"""Every tenth workload has hundreds of adapters."""

GPU_TOKENS_PER_S = 9000.0
"""About what one GPU can take: output tokens/s, where four prompt tokens count as one output token."""


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A number between two, evenly distributed in the logarithm."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def random_lengths(rng: np.random.Generator) -> dict[str, Any]:
    """Lengths as a workload writes them."""
    kind = ("sharegpt", "lognormal", "fixed")[int(rng.integers(3))]
    if kind == "sharegpt":
        means = {"input_mean": rng.uniform(100, 400), "output_mean": rng.uniform(80, 300)}
    else:
        means = {"input_mean": log_uniform(rng, 50, 2000), "output_mean": log_uniform(rng, 30, 600)}
    means = {key: float(round(mean)) for key, mean in means.items()}
    if kind == "lognormal":
        means |= {f"{side}_sd": round(means[f"{side}_mean"] * rng.uniform(0.3, 1.0), 1) for side in ("input", "output")}
    return {"distribution": kind, **means}


def content(seed: int, index: int) -> tuple[str, str, dict[str, Any]]:
    """The ``index``-th workload of a seed: a short description, its profile, and what its file would hold."""
    rng = np.random.default_rng([29, seed, index])
    low, high = MANY if index % MANY_EVERY == MANY_EVERY - 1 else (2, 60)
    count = round(log_uniform(rng, low, high))
    ranks = rng.choice(RANKS, size=int(rng.integers(1, len(RANKS) + 1)), replace=False)
    lengths = [random_lengths(rng) for _ in range(int(rng.integers(1, 5)))]
    zipf = bool(rng.integers(2))
    shares = zipf_shares(count, float(rng.uniform(0.6, 1.2))) if zipf else np.full(count, 1 / count)
    adapters: list[dict[str, Any]] = [
        {
            "name": f"a{i:03}",
            "rank": int(ranks[rng.integers(ranks.size)]),
            "lengths": lengths[int(rng.integers(len(lengths)))],
            "rate": float(share),
        }
        for i, share in enumerate(shares)
    ]
    load = sum(a["rate"] * (a["lengths"]["output_mean"] + a["lengths"]["input_mean"] / 4) for a in adapters)
    total = log_uniform(rng, 1, 12) * GPU_TOKENS_PER_S / load
    for adapter in adapters:
        adapter["rate"] = float(f"{adapter['rate'] * total:.6g}")
    used = sorted({a["rank"] for a in adapters})
    kinds = "+".join(sorted({a["lengths"]["distribution"] for a in adapters}))
    name = f"{count} {'zipf' if zipf else 'equal'}, ranks {'/'.join(map(str, used))}, {kinds}, {total:.0f} requests/s"
    asked = {"duration": int(rng.choice(DURATIONS)), "seed": index, "adapters": adapters}
    return name, PROFILES[int(rng.integers(len(PROFILES)))], asked


def run(seed: int, index: int) -> tuple[dict[str, Any], float]:
    """One workload placed, and the seconds that took."""
    name, profile_name, asked = content(seed, index)
    profile = find_profile(profile_name)
    judge = Judge(Demand(parse_workload(asked, Path())), [profile], [find_surrogate(profile)])
    started = time.perf_counter()
    found = place(judge)
    wall_s = time.perf_counter() - started
    refused = sum(
        not judge.accepts(judge.ask(gpu.part, gpu.kind, gpu.slots, factor))
        for gpu in found.gpus if gpu.part for factor in (1.0, 1.0 + judge.demand.headroom)
    )  # fmt: skip
    return {
        "seed": seed, "index": index, "workload": name, "profile": profile_name, "gpus": len(found.gpus),
        "lower_bound": found.lower_bound, "dealt": found.dealt, "twin_runs": judge.runs, "refused": refused,
    }, wall_s  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many workloads are how far from their bound."""
    above = collections.Counter(row["gpus"] - row["lower_bound"] for row in rows)
    return {
        "workloads": len(rows),
        "above_the_bound": {str(gap): above[gap] for gap in sorted(above)},
        "at_most_one_above": round(sum(n for gap, n in above.items() if gap <= 1) / len(rows), 3),
        "gpus": sum(row["gpus"] for row in rows),
        "lower_bounds": sum(row["lower_bound"] for row in rows),
        "refused": sum(row["refused"] for row in rows),
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The table of the docs: gaps by the number of GPUs in the bound."""
    lines = ["| lower bound | workloads | at the bound | one above | more | GPUs | bounds |", "|---|" + "---:|" * 6]
    for low, high in ((1, 1), (2, 3), (4, 6), (7, math.inf), (1, math.inf)):
        some = [row for row in rows if low <= row["lower_bound"] <= high]
        gaps = [row["gpus"] - row["lower_bound"] for row in some]
        name = "all" if (low, high) == (1, math.inf) else f"{low}" if low == high else f"{low} to {high}"
        name = name.replace(" to inf", " and more")
        lines.append(
            f"| {name} | {len(some)} | {gaps.count(0)} | {gaps.count(1)} | {sum(g > 1 for g in gaps)} |"
            f" {sum(r['gpus'] for r in some)} | {sum(r['lower_bound'] for r in some)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--workloads", type=int, default=WORKLOADS)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    chosen = [int(i) for i in arguments.only.split(",")] if arguments.only else list(range(arguments.workloads))
    rows = []
    for seed in seeds:
        for index in chosen:
            row, wall_s = run(seed, index)
            rows.append(row)
            gpu = row["profile"].split("-")[0]
            sys.stderr.write(
                f"{seed}/{index} {row['workload']}, {gpu}: {row['gpus']} >= {row['lower_bound']} {row['dealt']},"
                f" {row['twin_runs']} runs, {wall_s:.1f} s\n"
            )
    lines, found = table(rows), summary(rows)
    print("\n".join(lines))
    print(json.dumps(found, indent=1))
    if seeds == SEEDS and chosen == list(range(WORKLOADS)):
        RESULTS.write_text(json.dumps({"summary": found, "rows": rows}, indent=1) + "\n")
        marked.fill(DOC, "table: benchmarks/placement_bound.py", lines)


if __name__ == "__main__":
    main()
