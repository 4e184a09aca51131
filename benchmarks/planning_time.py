#!/usr/bin/env python3
"""Time and memory of planning for a large family: 20 experts of 7 B parameters, from generated statistics.

    python benchmarks/planning_time.py [--experts 20] [--layers 32]

Statistics files of a Llama 2 7B and its experts are generated in a temporary catalog; no weights exist. Each plan is
made by a process of its own, which reads the statistics, plans, and writes the plan; its peak resident size is the
kernel's. Writes benchmarks/results/planning_time.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deltaworks.catalog import statistics
from deltaworks.catalog.histogram import kept_elements
from deltaworks.catalog.models import Kind, Model
from deltaworks.catalog.statistics import CUT_DENSITIES, DENSITIES
from deltaworks.catalog.statistics_file import SCHEMA, pack_floats
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.checkpoint import Checkpoint, ShardFile
from deltaworks.checkpoints.dtypes import BF16
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES

BLOCK = 1 << 20
PLAN = """
import json, sys, time
started = time.monotonic()
from pathlib import Path
from deltaworks.catalog.store import Catalog
from deltaworks.merging import prepare
from deltaworks.merging.plan import save_plan
from deltaworks.merging.recipe import load_recipe
import deltaworks.merging.selection, deltaworks.merging.contributions
from deltaworks.merging.budget import parse_budget
imported = time.monotonic()
prepare.check_unchanged = lambda catalog, model, progress=None: model  # there are no files
prepare.ensure_registered = lambda catalog, reference, *a, **k: catalog.find(reference)
prepare.vocabulary = lambda path: {}
with Catalog(Path(sys.argv[1])) as catalog:
    recipe = load_recipe(Path(sys.argv[2]))
    options = prepare.MergeOptions(budget=parse_budget(sys.argv[3]))
    planned = prepare.Prepared(catalog, recipe, options, weighs=True)
    read = time.monotonic()
    plan = planned.plan(recipe, options.budget)
    made = time.monotonic()
    plan.digest
    save_plan(plan, Path(sys.argv[4]))
written = time.monotonic()
print(json.dumps({
    "import_s": imported - started, "read_statistics_s": read - imported,
    "plan_s": made - read, "write_s": written - made,
    "total_s": written - imported, "predicted_error": plan.predicted_error,
    "peak_mib": int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024,
}))
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    h, inter, vocabulary = 4096, 11008, 32000
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, h)}
    for i in range(layers):
        p = f"model.layers.{i}."
        found |= {p + f"self_attn.{n}_proj.weight": (h, h) for n in "qkvo"}
        found |= {p + f"mlp.{n}_proj.weight": (inter, h) for n in ("gate", "up")}
        found |= {p + "mlp.down_proj.weight": (h, inter)}
        found |= {p + f"{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    return found | {"model.norm.weight": (h,), "lm_head.weight": (vocabulary, h)}


def model(name: str, folder: Path, tensors: dict[str, tuple[int, ...]], base: str | None) -> Model:
    (folder / name).mkdir()
    infos, offset = {}, 0
    for tensor, shape in tensors.items():
        nbytes = int(np.prod(shape)) * 2
        infos[tensor] = TensorInfo(tensor, BF16, shape, "model.safetensors", offset, nbytes)
        offset += nbytes
    shard = ShardFile("model.safetensors", offset, 0, 0, 0)
    checkpoint = Checkpoint(folder / name, (shard,), infos, {"model_type": "llama"}, None, False)
    return Model(name, Kind.EXPERT if base else Kind.BASE, name, base, True, f"{name:0<64}", checkpoint)


def write_statistics(path: Path, tensors: dict[str, tuple[int, ...]], seed: int) -> int:
    """A statistics file as analysis writes it, but with made-up numbers; returns the number of blocks."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("tensor", "block", "elements")}
    totals: dict[str, list[Any]] = {name: [] for name in ("tensor", "elements", "cuts")}
    for name, shape in tensors.items():
        size = int(np.prod(shape))
        count = -(-size // BLOCK)
        rows["tensor"] += [name] * count
        rows["block"] += range(count)
        rows["elements"] += [BLOCK] * (count - 1) + [size - (count - 1) * BLOCK]
        cuts = [[kept_elements(d, size), 0x38000000 - i * 0x10000, size, 0, 1] for i, d in enumerate(CUT_DENSITIES)]
        totals["tensor"].append(name)
        totals["elements"].append(size)
        totals["cuts"].append([v for row in {c[0]: c for c in cuts}.values() for v in row])
    count = len(rows["tensor"])
    elements = np.array(rows["elements"], np.float64)
    scale = np.exp(rng.normal(-8, 1, count))
    square = elements * scale**2
    metadata = {b"deltaworks": json.dumps({"version": statistics.FORMAT_VERSION, "block_size": BLOCK}).encode()}
    schema = SCHEMA.with_metadata(metadata)
    share = np.sqrt(np.array(DENSITIES))
    columns = {
        "zeros": np.zeros(count),
        "changed": elements,
        "nonfinite": np.zeros(count),
        "delta_square": square,
        "base_square": elements * 4e-4,
        "base_delta": np.zeros(count),
        "survives": pack_floats(square[:, None] * share),
        "sketch": pack_floats(rng.standard_normal((count, BUCKETS)) * np.sqrt(square / BUCKETS)[:, None]),
        "sample": pack_floats(rng.standard_normal((count, SAMPLES)) * scale[:, None]),
    }
    empty = pa.array([[]] * count, pa.list_(pa.int64()))
    table = pa.table(
        {
            "tensor": pa.array(rows["tensor"]).dictionary_encode(),
            "block": pa.array(rows["block"], pa.int32()),
            "elements": pa.array(rows["elements"], pa.int64()),
            **columns,
            "bins": pa.array([[]] * count, pa.list_(pa.uint16())),
            "counts": empty,
            "cuts": empty,
        },
        schema=schema,
    )
    lasts = len(totals["tensor"])
    zeros = {c: np.zeros(lasts) for c in statistics.BLOCK_FIELDS}
    last = pa.table(
        {
            "tensor": pa.array(totals["tensor"]).dictionary_encode(),
            "block": pa.array([-1] * lasts, pa.int32()),
            "elements": pa.array(totals["elements"], pa.int64()),
            **zeros,
            "survives": pack_floats(np.zeros((lasts, len(DENSITIES)))),
            "sketch": pack_floats(np.zeros((lasts, BUCKETS))),
            "sample": pack_floats(np.zeros((lasts, SAMPLES))),
            "bins": pa.array([[]] * lasts, pa.list_(pa.uint16())),
            "counts": pa.array([[]] * lasts, pa.list_(pa.int64())),
            "cuts": pa.array(totals["cuts"], pa.list_(pa.int64())),
        },
        schema=schema,
    )
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=["tensor"]) as file:
        for start in range(0, count, 512):
            file.write_table(table.slice(start, 512))
        file.write_table(last)
    return count


METHODS = {"linear": "weight: 1.0", "task_arithmetic": "weight: 0.3", "ties": "weight: 1.0, density: 0.2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=20)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "planning_time.json")
    args = parser.parse_args()
    tensors = shapes(args.layers)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        blocks = 0
        with Catalog(folder / "catalog") as catalog:
            base = model("base", folder, tensors, None)
            catalog.save_model(base)
            for i in range(args.experts):
                expert = model(f"expert{i:02}", folder, tensors, "base")
                catalog.save_model(expert)
                path = catalog.statistics_file(expert.fingerprint, base.fingerprint)
                blocks += write_statistics(path, tensors, i)
                catalog.save_analysis(expert.fingerprint, base.fingerprint, BLOCK, path, {"nonfinite": []})
        found: dict[str, list[dict[str, float]]] = {m: [] for m in METHODS}
        for run in range(args.runs + 1):
            for method, parameters in METHODS.items():
                recipe = folder / f"{method}.yml"
                lines = [f"merge_method: {method}", f"parameters: {{{parameters}}}", "base_model: base", "models:"]
                lines += [f"  - model: expert{i:02}" for i in range(args.experts)]
                lines = [line for line in lines if method != "linear" or "base_model" not in line]
                recipe.write_text("\n".join(lines) + "\n")
                command = [sys.executable, "-c", PLAN, str(folder / "catalog"), str(recipe), "25%", str(folder / "p")]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                if run:  # the first compiles kernels
                    found[method].append(json.loads(done.stdout))
        for method, results in found.items():
            rows[method] = {key: round(float(np.median([r[key] for r in results])), 4) for key in results[0]}
    size = sum(int(np.prod(s)) for s in tensors.values())
    result = {
        "experts": args.experts,
        "parameters": size,
        "blocks": blocks,
        "runs": args.runs,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "medians": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{args.experts} experts of {size / 1e9:.1f} B parameters, {blocks:,} blocks")
    for method, row in rows.items():
        print(
            f"{method:<18}{row['total_s']:.2f} s ({row['read_statistics_s']:.2f} to read statistics,"
            f" {row['plan_s']:.2f} to plan, {row['write_s']:.2f} to write), {row['peak_mib']:.0f} MiB"
        )


if __name__ == "__main__":
    main()
