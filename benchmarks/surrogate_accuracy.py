"""The errors and the speed of the surrogates that come with the package, and the table of docs/surrogates.md.

    python benchmarks/surrogate_accuracy.py

Errors were measured when they were trained; time is measured here.
"""

import json
import time
from pathlib import Path
from typing import Any

import marked
import numpy as np

from deltaworks.serving.estimate import FEATURES, Traffic, estimate
from deltaworks.serving.profile import find_profile
from deltaworks.serving.surrogate import built_in_surrogates, load_surrogate

RESULTS = Path(__file__).parent / "results" / "surrogate_accuracy.json"
DOC = Path(__file__).parents[1] / "docs" / "surrogates.md"
ROUNDS, CALLS = 7, 20_000


def microseconds(call: Any, count: int) -> float:
    """The median time of a call, in microseconds."""
    call()
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - started) / count * 1e6)
    return round(float(np.median(times)), 2)


def main() -> None:
    rows = {}
    for name, path in built_in_surrogates().items():
        found, profile, ones = load_surrogate(path), find_profile(name), np.ones(100)
        traffic = Traffic(ones * 0.1, ones * 16, ones * 200, ones * 200, ones * 400, 3600.0)
        features = estimate(traffic, profile, 32, 16)
        rows[name] = found.accuracy | {
            "throughput_us": microseconds(lambda f=found, x=features: f.throughput.predict(x), CALLS),
            "starvation_us": microseconds(lambda f=found, x=features: f.starvation.predict(x), CALLS),
            "features_of_100_adapters_us": microseconds(
                lambda p=profile, t=traffic: estimate(t, p, 32, 16), CALLS // 20
            ),
        }
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "| profile | throughput SMAPE | tree | starvation macro-F1 | tree | leaves | a prediction | its features |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        learned, trees = row["learned"], row["trees"]
        lines.append(
            f"| {name} | {learned['throughput_smape']:.2f} | {trees['throughput_smape']:.2f}"
            f" | {learned['starvation_macro_f1']:.3f} | {trees['starvation_macro_f1']:.3f}"
            f" | {trees['throughput_leaves']} and {trees['starvation_leaves']}"
            f" | {max(row['throughput_us'], row['starvation_us']):.1f} us"
            f" | {row['features_of_100_adapters_us']:.0f} us |"
        )
    table = ["| feature | |", "|---|---|", *(f"| `{name}` | {meaning} |" for name, meaning in FEATURES.items())]
    marked.fill(DOC, "table: benchmarks/surrogate_accuracy.py", lines)
    marked.fill(DOC, "table: features", table)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
