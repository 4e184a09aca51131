#!/usr/bin/env python3
"""Error of a merge against its I/O budget: our plans beside an oracle, random blocks and the reference code's rule.

    python benchmarks/make_family.py FAMILY --preset 0.5b --experts 8
    python benchmarks/error_vs_budget.py FAMILY --name 0.5b

The error is the relative L2 error of the merged delta against the full merge, in float32, measured by computing both
merges. All choices are of the same blocks at the same bytes:

oracle      greedy with the true deltas in memory: for methods that add deltas up, the true inner products of every
            block; for TIES, the true squares that survive trimming.
random      random blocks, other ones for every expert.
reference   the rule of the MergePipe reference code: blocks by a hash of tensor and block, the same for all experts.

Writes benchmarks/results/error_vs_budget_NAME.json and prints a table; plot_error_vs_budget.py draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from deltaworks.catalog.models import Model
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.codec import decode_reference
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.source import Source
from deltaworks.merging.budget import Budget
from deltaworks.merging.candidate import runs_of
from deltaworks.merging.contributions import Overlapping
from deltaworks.merging.measured_error import measure_error
from deltaworks.merging.plan import InputTensor, Plan, PlannedTensor
from deltaworks.merging.prepare import MergeOptions, Prepared
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.selection import choose

METHODS = {
    "linear": "weight: 1.0",
    "task_arithmetic": "weight: 0.3",
    "ties": "weight: 1.0, density: 0.2",
}
BUDGETS = (0.02, 0.05, 0.10, 0.25, 0.35, 0.50, 0.75, 1.0)
Costs = NDArray[np.int64]
Reads = NDArray[np.bool_]


def recipe_text(family: Path, experts: Sequence[str], method: str) -> str:
    lines = [f"merge_method: {method}", "dtype: float32", "out_dtype: bfloat16", f"parameters: {{{METHODS[method]}}}"]
    lines += [] if method == "linear" else [f"base_model: {family / 'base'}"]
    return "\n".join([*lines, "models:", *(f"  - model: {family / e}" for e in experts)]) + "\n"


class Truth:
    """What an oracle knows of one tensor: bytes of each block, [blocks, experts], and inner products."""

    def __init__(self, plan: Plan, tensor: PlannedTensor, sources: dict[int, Source], models: Sequence[Model]) -> None:
        assert tensor.stand_in is not None
        base = values_of(tensor.stand_in, sources, models)
        experts = [k for k, i in enumerate(tensor.inputs) if plan.models[i.model].role != "base"]
        deltas = np.stack([values_of(tensor.inputs[k], sources, models) - base for k in experts])
        size, count = deltas.shape[1], max(1, -(-deltas.shape[1] // plan.block_size))
        edges = [min(i * plan.block_size, size) for i in range(count + 1)]
        bits = [_bits(tensor.inputs[k], models) for k in experts]
        self.sizes = np.array([[(b - a) * w // 8 for w in bits] for a, b in pairwise(edges)], np.int64)
        density = getattr(tensor.operation, "densities", [1.0])[0]
        if density < 1:
            keep = max(1, int(density * size))
            magnitude = np.abs(deltas)
            threshold = np.partition(magnitude, size - keep, axis=1)[:, size - keep]
            deltas *= magnitude >= threshold[:, None]
        parts = [deltas[:, a:b].astype(np.float64) for a, b in pairwise(edges)]
        self.gram = np.stack([p @ p.T for p in parts])
        squares = np.einsum("pee->pe", self.gram)
        self.costs = np.where(squares > 0, self.sizes, 0)
        if density < 1:
            self.gram = np.einsum("pe,ef->pef", squares, np.eye(len(experts)))


def values_of(source: InputTensor, sources: dict[int, Source], models: Sequence[Model]) -> NDArray[np.float32]:
    info = models[source.model].checkpoint.find(source.tensor)
    assert info is not None
    raw = np.empty(info.nbytes, np.uint8)
    sources[source.model].read(info, 0, info.count, raw)
    return decode_reference(raw, info.dtype)


def _bits(source: InputTensor, models: Sequence[Model]) -> int:
    info = models[source.model].checkpoint.find(source.tensor)
    assert info is not None
    return info.dtype.bits


def oracle(truths: Sequence[Truth], budget: int) -> list[Reads]:
    rankings = [Overlapping(t.gram, 0.0, np.zeros(t.costs.shape), is_fixed=True).rank(t.costs, 1) for t in truths]
    return [c.reads for c in choose(rankings, budget)]


def random_blocks(truths: Sequence[Truth], budget: int, *, alike: bool) -> list[Reads]:
    """Blocks in the order of a hash of tensor and block, and of the expert where they are not alike."""
    entries = []
    for t, truth in enumerate(truths):
        for p, e in np.ndindex(truth.sizes.shape):
            entries.append((blake3(f"{t}/{p}/{0 if alike else e}".encode()).digest(8), t, p, e))
    reads = [np.zeros(t.sizes.shape, bool) for t in truths]
    for _, t, p, e in sorted(entries):
        cost = int(truths[t].sizes[p, e])
        if cost <= budget:
            budget -= cost
            reads[t][p, e] = True
    return reads


def with_reads(plan: Plan, chosen: Sequence[Reads]) -> Plan:
    """The plan with other blocks read."""
    tensors = []
    for tensor, reads in zip(plan.tensors, chosen, strict=True):
        experts = [k for k, i in enumerate(tensor.inputs) if plan.models[i.model].role != "base"]
        own = dict(zip(experts, runs_of(reads), strict=True))
        tensors.append(replace(tensor, reads=tuple(own.get(k) for k in range(len(tensor.inputs)))))
    return replace(plan, tensors=tuple(tensors))


def measure(catalog: Catalog, family: Path, experts: Sequence[str], method: str) -> list[dict[str, Any]]:
    prepared = Prepared(catalog, parse_recipe(recipe_text(family, experts, method)), MergeOptions(), weighs=True)
    full = prepared.plan(parse_recipe(recipe_text(family, experts, method)), None)
    models = [prepared.models[m.reference] for m in full.models]
    everything = prepared.within(full, Budget(share=0.0))
    sources = {i: Source(m, ByteCounter()) for i, m in enumerate(models)}
    truths = [Truth(everything, t, sources, models) for t in everything.tensors]
    for source in sources.values():
        source.close()
    rows = []
    for share in BUDGETS:
        plan = prepared.within(full, Budget(share=share))
        budget = plan.budget_bytes or 0
        choices = {"oracle": oracle(truths, budget)}
        choices |= {n: random_blocks(truths, budget, alike=n == "reference") for n in ("random", "reference")}
        errors = {"deltaworks": measure_error(plan, models).relative}
        errors |= {n: measure_error(with_reads(everything, c), models).relative for n, c in choices.items()}
        row = {"budget": share, "predicted": plan.predicted_error, "bound": plan.error_bound, **errors}
        row["read"] = plan.expert_bytes_planned / full.expert_bytes
        rows.append(row)
        print(
            f"{method:<16}{share:>6.0%}"
            + "".join(f"  {k} {v:.4f}" for k, v in row.items() if k != "budget" and v is not None),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--name", required=True, help="for the result's file")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    family = args.family.resolve()
    folders = {family, family / "experts"}
    experts = sorted(
        str(p.relative_to(family))
        for folder in folders
        if folder.is_dir()
        for p in folder.iterdir()
        if (p / "config.json").is_file() and p.name != "base" and not (p / "adapter_config.json").is_file()
    )
    with tempfile.TemporaryDirectory() as scratch, Catalog(Path(scratch)) as catalog:
        register(catalog, "base", str(family / "base"))
        for expert in experts:
            register(catalog, Path(expert).name, str(family / expert), "base")
        methods = {m: measure(catalog, family, experts, m) for m in args.methods}
    size = sum(p.stat().st_size for e in experts for p in (family / e).glob("*.safetensors"))
    result = {"family": args.name, "experts": len(experts), "expert_bytes": size, "methods": methods}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"error_vs_budget_{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")
    main()
