#!/usr/bin/env python3
"""Draw what error_vs_budget.py and loss_vs_budget.py measured.

    pip install matplotlib
    python benchmarks/plot_budget.py

Reads the JSON files in benchmarks/results and writes error_vs_budget.svg and loss_vs_budget.svg beside them.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
FAMILIES = ("0.5b", "scribe", "micro")
STYLES = {
    "deltaworks": {"color": "#0b6e4f", "marker": "o", "label": "deltaworks"},
    "predicted": {"color": "#0b6e4f", "linestyle": ":", "label": "deltaworks, predicted"},
    "oracle": {"color": "#c84630", "linestyle": "--", "label": "oracle"},
    "random": {"color": "#7a7a7a", "marker": ".", "label": "random blocks"},
    "reference": {"color": "#b7a57a", "marker": ".", "label": "reference code's rule"},
}
CHOICES = {
    "least error": {"color": "#0b6e4f", "marker": "o"},
    "balanced": {"color": "#2e5eaa", "marker": "s"},
    "random": {"color": "#7a7a7a", "marker": "."},
}


def draw_errors() -> None:
    found = {f: json.loads(p.read_text()) for f in FAMILIES if (p := RESULTS / f"error_vs_budget_{f}.json").is_file()}
    methods = ("linear", "ties")
    figure, axes = plt.subplots(len(methods), len(found), figsize=(4 * len(found), 6.4), sharex=True, sharey=True)
    for row, method in zip(axes.reshape(len(methods), -1), methods, strict=True):
        for axis, (family, result) in zip(row, found.items(), strict=True):
            rows = result["methods"][method]
            for name, style in STYLES.items():
                axis.plot([100 * r["budget"] for r in rows], [r[name] for r in rows], **style)
            axis.set_title(f"{method}, {family} ({result['experts']} experts)", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("budget, % of expert bytes")
    for row in axes:
        row[0].set_ylabel("relative L2 error")
    axes[0][0].legend(fontsize=8)
    save(figure, "error_vs_budget.svg")


def draw_losses() -> None:
    found = {f: json.loads(p.read_text()) for f in FAMILIES if (p := RESULTS / f"loss_vs_budget_{f}.json").is_file()}
    methods = ("task_arithmetic", "ties")
    figure, axes = plt.subplots(len(methods), len(found), figsize=(4.6 * len(found), 6.4), sharex=True, sharey="col")
    for row, method in zip(axes.reshape(len(methods), -1), methods, strict=True):
        for axis, (family, result) in zip(row, found.items(), strict=True):
            merges = [m for m in result["merges"] if m["method"] == method]
            full = next(m for m in merges if m["budget"] == 1.0)
            for choice, style in CHOICES.items():
                rows = [m for m in merges if m["choice"] == choice and m["budget"] < 1] + [full]
                axis.plot([100 * m["budget"] for m in rows], [mean(m["losses"]) for m in rows], label=choice, **style)
            axis.axhline(mean(result["base"]), color="black", linewidth=0.8, linestyle="--", label="base model")
            axis.set_title(f"{method}, {family} ({len(result['experts'])} experts)", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("budget, % of expert bytes")
    for row in axes:
        row[0].set_ylabel("mean loss, nats a token")
    axes[0][0].legend(fontsize=8)
    save(figure, "loss_vs_budget.svg")


def mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)


def save(figure: Figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(RESULTS / name, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    plt.close(figure)


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "deltaworks"
    draw_errors()
    draw_losses()
