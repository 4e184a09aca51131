#!/usr/bin/env python3
"""Loss per domain against the I/O budget: merges of a real family, judged on held-out text.

    python benchmarks/loss_vs_budget.py examples/micro --name micro

FAMILY holds base/, experts beside it, and eval/DOMAIN*.npy with token ids. Every merge is planned and executed as a
user would, at each budget, by our plan for the least error, by our plan that weighs
all tensors alike, and with the same bytes in random blocks. Writes
benchmarks/results/loss_vs_budget_NAME.json and prints a table; plot_budget.py draws it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from error_vs_budget import with_reads

from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.merging.budget import Budget
from deltaworks.merging.plan import Plan
from deltaworks.merging.prepare import MergeOptions, Prepared, plan_inputs
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.snapshot import run_plan
from deltaworks.reports.demo import family_recipe
from deltaworks.reports.loss import load_weights, mean_loss

BUDGETS = (0.05, 0.10, 0.25, 0.50, 0.75, 1.0)


def methods(experts: int) -> dict[str, str]:
    return {
        "linear": "weight: 1.0",
        "task_arithmetic": f"weight: {1 / experts:.4f}",
        "ties": "weight: 1.0, density: 0.5, lambda: 0.35",
    }


def random_plan(plan: Plan, budget: int, seed: int) -> Plan:
    """The plan with random blocks of every expert, of as many bytes."""
    rng = np.random.default_rng(seed)
    places = []
    for t, tensor in enumerate(plan.tensors):
        experts = sum(plan.models[i.model].role != "base" for i in tensor.inputs)
        blocks = max(1, -(-tensor.count // plan.block_size))
        places += [(t, p, e) for p in range(blocks) for e in range(experts)]
    reads = []
    for tensor in plan.tensors:
        experts = sum(plan.models[i.model].role != "base" for i in tensor.inputs)
        reads.append(np.zeros((max(1, -(-tensor.count // plan.block_size)), experts), bool))
    for i in rng.permutation(len(places)):
        t, p, e = places[i]
        tensor = plan.tensors[t]
        cost = (min(tensor.count, (p + 1) * plan.block_size) - p * plan.block_size) * tensor.dtype.bits // 8
        if cost <= budget:
            budget -= cost
            reads[t][p, e] = True
    return replace(with_reads(plan, reads), budget_bytes=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--name", required=True, help="for the result's file")
    parser.add_argument("--windows", type=int, default=24, help="windows of 256 tokens, of each domain")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    family = args.family.resolve()
    experts = sorted(p.name for p in family.iterdir() if (p / "config.json").is_file() and p.name != "base")
    texts = {p.stem.partition(".")[0]: np.load(p) for p in sorted((family / "eval").glob("*.npy"))}

    def judge(path: Path) -> dict[str, float]:
        config, weights = load_weights(path)
        return {d: round(mean_loss(config, weights, t, args.windows), 5) for d, t in texts.items()}

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, Catalog(Path(scratch) / "catalog") as catalog:
        base = register(catalog, "base", str(family / "base"))
        for expert in experts:
            register(catalog, expert, str(family / expert), "base")
        base_losses = judge(base.path)
        print(f"{'':<34}" + "".join(f"{d:>11}" for d in texts) + f"{'mean':>9}")

        def show(label: str, losses: dict[str, float]) -> None:
            mean = sum(losses.values()) / len(losses)
            print(f"{label:<34}" + "".join(f"{v:>11.4f}" for v in losses.values()) + f"{mean:>9.4f}", flush=True)

        show("base", base_losses)
        for method, parameters in methods(len(experts)).items():
            recipe = parse_recipe(family_recipe(family, experts, method, parameters))
            prepared = Prepared(catalog, recipe, MergeOptions(), weighs=True)
            balanced = Prepared(catalog, recipe, MergeOptions(balanced=True), weighs=True)
            full = prepared.plan(recipe, None)
            for share in BUDGETS:
                ours = prepared.within(full, Budget(share=share))
                plans = {"least error": ours}
                if share < 1:
                    plans["balanced"] = balanced.within(full, Budget(share=share))
                    plans["random"] = random_plan(prepared.within(full, Budget(share=0.0)), ours.budget_bytes or 0, 0)
                for choice, plan in plans.items():
                    out = Path(scratch) / "out"
                    run_plan(catalog, plan, plan_inputs(catalog, plan), out, force=True)
                    losses = judge(out)
                    show(f"{method} {share:.0%} {choice}", losses)
                    row = {"method": method, "budget": share, "choice": choice, "losses": losses}
                    rows.append(row | {"predicted_error": None if choice == "random" else plan.predicted_error})
    result = {"family": args.name, "experts": experts, "windows": args.windows, "base": base_losses, "merges": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"loss_vs_budget_{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
