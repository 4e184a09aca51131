#!/usr/bin/env python3
"""Error and loss of merges that read layers, against the budget, beside blocks alone and plain quantisers.

    python benchmarks/layers_vs_budget.py examples/micro ../shared/families/scribe FAMILY
    python benchmarks/layers_vs_budget.py --render                # write the docs from what was measured

A family is a folder with `base` and experts beside it. The error is the relative L2 error of the merged delta against
the full merge, in float32, measured by computing both merges; budgets are shares of the experts' bytes.

layers      our plans, of experts analyzed with --layers.
blocks      our plans with --no-layers.
oracle      the best blocks, chosen with the true deltas in memory: see error_vs_budget.py.
uniform     every delta quantised to 1, 2, 4 or 8 bits an element, with a scale for every 64 that was chosen for the
            least error and is not counted; only for methods that add deltas up.
bound       what no code can beat if every block of every delta were normal with the variance it has: reverse
            water-filling over their variances (Cover and Thomas, Elements of Information Theory, section 10.3.3). Real
            deltas are not normal, and what is exact costs a finite number of bits, so it can be beaten.

Where a family has `eval/DOMAIN*.npy` (token ids): the loss of every expert rebuilt alone from a share of its bytes, as
the share of its own-domain gain over the base that is kept; and how far a merge of all is from the full merge.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from error_vs_budget import Truth, oracle, recipe_text, values_of, with_reads
from marked import fill
from numpy.typing import NDArray

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.source import Source
from deltaworks.merging.budget import Budget
from deltaworks.merging.measured_error import measure_error
from deltaworks.merging.prepare import MergeOptions, Prepared, plan_inputs
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.snapshot import layer_files, run_plan
from deltaworks.reports.loss import load_weights, mean_loss

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "layers_vs_budget.json"
BUDGETS = (1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 0.45, 1 / 2)
UNIFORM_BITS = {1 / 16: 1, 1 / 8: 2, 1 / 4: 4, 1 / 2: 8}
CLIPS = {2: (0.6, 0.7, 0.8), 4: (0.8, 0.9, 1.0), 8: (1.0,)}
"""Scales tried, in shares of the one that holds the largest of a group."""
METHODS = ("task_arithmetic", "ties")
ALONE = (1 / 16, 1 / 8, 3 / 16)
WINDOWS = 24


def quantised(deltas: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Deltas ([experts, elements]) as a uniform quantiser tells them, with the best of a few scales for every 64."""
    experts, count = deltas.shape
    groups = np.pad(deltas, ((0, 0), (0, -count % 64))).reshape(experts, -1, 64)
    levels = 1 << (bits - 1)
    peak = np.abs(groups).max(axis=2, keepdims=True)
    best, least = np.zeros_like(groups), np.full(peak.shape, np.inf)
    if bits == 1:
        mean: NDArray[np.float32] = np.copysign(np.abs(groups).mean(axis=2, keepdims=True), groups)
        return mean.reshape(experts, -1)[:, :count]
    for clip in CLIPS[bits]:
        step = np.maximum(np.float32(clip) * peak / levels, np.float32(1e-30))
        told = (np.minimum(np.floor(np.abs(groups) / step), levels - 1) + np.float32(0.5)) * step
        told = np.copysign(told, groups)
        error = np.square(told - groups).sum(axis=2, keepdims=True)
        np.copyto(best, told, where=error < least)
        np.minimum(error, least, out=least)
    return best.reshape(experts, -1)[:, :count]


def gaussian_bound(variances: NDArray[np.float64], sizes: NDArray[np.float64], bits: float) -> float:
    """The least sum of squares that so many bits leave of normal blocks."""
    low, high = 0.0, float(variances.max())
    for _ in range(100):
        level = (low + high) / 2
        with np.errstate(divide="ignore"):
            rate = np.where(variances > level, sizes * 0.5 * np.log2(variances / max(level, 1e-300)), 0.0).sum()
        low, high = (level, high) if rate > bits else (low, level)
    return float((sizes * np.minimum(variances, high)).sum())


def errors(catalog: Catalog, family: Path, experts: Sequence[str], method: str) -> list[dict[str, Any]]:
    """Errors of one method at every budget."""
    recipe = parse_recipe(recipe_text(family, experts, method))
    layered = Prepared(catalog, recipe, MergeOptions(), weighs=True)
    plain = Prepared(catalog, recipe, MergeOptions(layers=False), weighs=True)
    full, full_plain = layered.plan(recipe, None), plain.plan(recipe, None)
    models = [layered.models[m.reference] for m in full.models]
    everything = plain.within(full_plain, Budget(share=0.0))
    sources = {i: Source(m, ByteCounter()) for i, m in enumerate(models)}
    truths = [Truth(everything, t, sources, models) for t in everything.tensors]
    uniform = _uniform(everything, sources, models) if method != "ties" else {}
    for source in sources.values():
        source.close()
    squares = np.concatenate([np.einsum("pee->pe", t.gram).ravel() for t in truths])
    sizes = np.concatenate([t.sizes.ravel() for t in truths]) / 2.0
    whole = sum(float(t.gram.sum()) for t in truths)
    rows = []
    for share in BUDGETS:
        plan = layered.within(full, Budget(share=share))
        blocks = plain.within(full_plain, Budget(share=share))
        files = layer_files(catalog, plan, models, everywhere=False)
        row = {
            "budget": share,
            "read": plan.expert_bytes_planned / full.expert_bytes,
            "predicted": plan.predicted_error,
            "bound": plan.error_bound,
            "layers": measure_error(plan, models, layers=files).relative,
            "blocks": measure_error(blocks, models).relative,
            "oracle": measure_error(
                with_reads(everything, oracle(truths, int(share * full.expert_bytes))), models
            ).relative,
            "uniform": uniform.get(UNIFORM_BITS.get(share, 0)),
        }
        if method != "ties":
            left = gaussian_bound(squares / np.maximum(sizes, 1), sizes, 8 * share * full.expert_bytes)
            row["gaussian"] = math.sqrt(left / whole)
        rows.append(row)
        print(method, {k: round(v, 4) for k, v in row.items() if v is not None}, flush=True)
    return rows


def _uniform(plan: Any, sources: dict[int, Source], models: Sequence[Any]) -> dict[int, float]:
    lost, full = dict.fromkeys(UNIFORM_BITS.values(), 0.0), 0.0
    for tensor in plan.tensors:
        base = values_of(tensor.stand_in, sources, models)
        deltas = np.stack(
            [values_of(i, sources, models) - base for i in tensor.inputs if plan.models[i.model].role != "base"]
        )
        for start in range(0, deltas.shape[1], 1 << 15):
            part = deltas[:, start : start + (1 << 15)]
            full += float(np.square(part.sum(axis=0, dtype=np.float64)).sum())
            for bits in lost:
                missing = (part - quantised(part, bits)).sum(axis=0, dtype=np.float64)
                lost[bits] += float(np.square(missing).sum())
    return {bits: math.sqrt(n / full) for bits, n in lost.items()}


def losses(catalog: Catalog, family: Path, experts: Sequence[str], scratch: Path) -> dict[str, Any] | None:
    """What experts rebuilt alone keep of their gain, and how near merges come to the full merge."""
    texts = {p.stem.partition(".")[0]: np.load(p) for p in sorted((family / "eval").glob("*.npy"))}
    if not texts:
        return None

    def judge(path: Path, domains: Sequence[str]) -> dict[str, float]:
        config, weights = load_weights(path)
        return {d: mean_loss(config, weights, texts[d], WINDOWS) for d in domains}

    def merged(names: Sequence[str], weight: float, share: float | None, domains: Sequence[str]) -> dict[str, float]:
        text = recipe_text(family, names, "task_arithmetic").replace("weight: 0.3", f"weight: {weight}")
        recipe = parse_recipe(text)
        prepared = Prepared(catalog, recipe, MergeOptions(), weighs=True)
        plan = prepared.plan(recipe, None if share is None else Budget(share=share))
        run_plan(catalog, plan, plan_inputs(catalog, plan), scratch / "out", force=True)
        return judge(scratch / "out", domains)

    base = judge(family / "base", list(texts))
    own = {e: judge(family / e, [e])[e] for e in experts}
    kept = {
        share: {e: (base[e] - merged([e], 1.0, share, [e])[e]) / (base[e] - own[e]) for e in experts} for share in ALONE
    }
    for share, of in kept.items():
        print(f"alone from {share:.4f}: kept {np.mean(list(of.values())):.3f}", of, flush=True)
    weight = round(1 / len(experts), 4)
    full, eighth = (merged(experts, weight, s, list(texts)) for s in (None, 1 / 8))
    apart = {d: abs(eighth[d] - full[d]) / abs(base[d] - own[d]) for d in texts if d in own}
    print("a merge at 1/8 from the full merge, of the distance between base and expert:", apart, flush=True)
    return {"base": base, "experts": own, "kept": kept, "full": full, "eighth": eighth, "apart": apart}


def measure(family: Path) -> dict[str, Any]:
    """Everything about one family."""
    family = family.resolve()
    experts = sorted(p.name for p in family.iterdir() if (p / "config.json").is_file() and p.name != "base")[:8]
    with tempfile.TemporaryDirectory() as scratch, Catalog(Path(scratch) / "catalog") as catalog:
        base = register(catalog, "base", str(family / "base"))
        for expert in experts:
            analyze(catalog, register(catalog, expert, str(family / expert), "base"), base, layers=True)
        return {
            "experts": experts,
            "errors": {m: errors(catalog, family, experts, m) for m in METHODS},
            "losses": losses(catalog, family, experts, Path(scratch)),
        }


def render(known: dict[str, Any]) -> None:
    """Write the tables of docs/layers.md."""
    names = {1 / 32: "1/32", 1 / 16: "1/16", 1 / 8: "1/8", 3 / 16: "3/16", 1 / 4: "1/4", 3 / 8: "3/8", 1 / 2: "1/2"}

    def cell(value: float | None) -> str:
        return "" if value is None else "0" if value == 0 else f"{value:.3f}" if value >= 0.0005 else f"{value:.5f}"

    lines = [
        "",
        "| family | method | budget | layers | predicted | blocks | best blocks | uniform bits | Gaussian bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family, result in known.items():
        for method, rows in result["errors"].items():
            for row in rows:
                shown = [row.get(k) for k in ("predicted", "blocks", "oracle", "uniform", "gaussian")]
                budget = names.get(row["budget"], f"{row['budget']:.0%}")
                lines.append(
                    f"| {family} | {method} | {budget} | **{cell(row['layers'])}** | "
                    + " | ".join(cell(v) for v in shown)
                    + " |"
                )
    fill(ROOT / "docs" / "layers.md", "table: budgets", [*lines, ""])
    lines = ["", "| family | from 1/16 | from 1/8 | from 3/16 | a merge at 1/8 |", "|---|---|---|---|---|"]
    for family, result in known.items():
        if found := result["losses"]:
            kept = [float(np.mean(list(of.values()))) for of in found["kept"].values()]
            lines.append(
                f"| {family} | " + " | ".join(f"{k:.1%}" for k in kept) + f" | {max(found['apart'].values()):.2%} |"
            )
    fill(ROOT / "docs" / "layers.md", "table: losses", [*lines, ""])


def main() -> None:
    """Measure and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", type=Path, nargs="*")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for family in arguments.families:
        known[family.resolve().name] = json.loads(json.dumps(measure(family)))
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    render(known)


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")
    main()
