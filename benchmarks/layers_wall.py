#!/usr/bin/env python3
"""How long cold merges take that read layers, beside the same merges that read originals.

    python benchmarks/layers_wall.py .bench [--experts 16] [--rounds 3]
    python benchmarks/layers_wall.py --render                     # write the docs from what was measured

FOLDER/family holds `base` and `expert_00` on, as `make bench` makes them; FOLDER/layered becomes a catalog with layers
of the experts. Task arithmetic. Runs are interleaved: each round runs every budget from layers and from originals, one
after the other, with the files of neither in the page cache. Wall time is of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from marked import fill
from merging import deltaworks, measured, register_experts

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "layers_wall.json"
BUDGETS = ("6.25%", "12.5%", "25.1%", "50%", None)
COMMAND = str(Path(sys.executable).with_name("deltaworks"))


def forget(folder: Path) -> None:
    """Have the page cache hold nothing of the models and of their layers."""
    os.sync()
    for path in (*folder.glob("family/*/*.safetensors"), *folder.glob("layered/layers/**/*.layers")):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def merge(folder: Path, budget: str | None, *, layers: bool) -> dict[str, Any]:
    """One cold run."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    forget(folder)
    command = [COMMAND, "merge", str(folder / "layered.yml"), str(folder / "out"), "--quiet", "--json"]
    command += ["--catalog", str(folder / "layered"), "--layers" if layers else "--no-layers"]
    result = measured([*command, *(["--budget", budget] if budget else [])], folder / "result.json")
    own = json.loads((folder / "result.json").read_text())
    return result | {k: own[k] for k in ("expert_bytes_read", "predicted_error")}


def render(known: dict[str, Any]) -> None:
    """Write the table of docs/layers.md."""
    lines = ["", "| budget | layers | originals |", "|---|---|---|"]
    for name, both in known["runs"].items():
        cells = [name]
        for kind in ("layers", "originals"):
            rows = both[kind]
            error = rows[0]["predicted_error"]
            told = f"{error:.2f}" if error else "exact"
            wall = statistics.median(r["wall_s"] for r in rows)
            cells.append(f"{wall:.1f} s, {rows[0]['expert_bytes_read'] / 1e9:.1f} GB, {told}")
        lines.append(f"| {' | '.join(cells)} |")
    fill(ROOT / "docs" / "layers.md", "table: wall", [*lines, ""])


def main() -> None:
    """Measure, or render what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--render", action="store_true")
    given = parser.parse_args()
    if given.folder:
        folder = given.folder.resolve()
        names = register_experts(folder / "layered", folder / "family", given.experts)
        deltaworks("analyze", *names, "--layers", "--catalog", str(folder / "layered"), "--quiet")
        models = "\n".join(f"  - model: {folder / 'family' / name}" for name in names)
        head = "merge_method: task_arithmetic\ndtype: bfloat16\nparameters: {weight: 0.3}\n"
        (folder / "layered.yml").write_text(f"{head}base_model: {folder / 'family' / 'base'}\nmodels:\n{models}\n")
        runs: dict[str, dict[str, list[Any]]] = {b or "none": {"layers": [], "originals": []} for b in BUDGETS}
        for number in range(given.rounds + 1):
            for budget in BUDGETS:
                for kind in ("layers", "originals"):
                    row = merge(folder, budget, layers=kind == "layers")
                    if number:  # the first round compiles, and warms the programs
                        runs[budget or "none"][kind].append(row)
                    print(number, budget, kind, row, flush=True)
        known = {"experts": given.experts, "rounds": given.rounds, "cores": os.cpu_count(), "runs": runs}
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    render(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
