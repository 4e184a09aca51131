#!/usr/bin/env python3
"""Peak memory of merging many experts by TIES, deltaworks beside mergekit 0.1.5.

    python benchmarks/make_family.py FAMILY --preset 0.5b --experts 16
    python benchmarks/merge_memory.py FAMILY [--mergekit .venv-peers/bin/python]

Each merge runs in a process of its own; the kernel's record of its largest resident size is taken when it ends. The
bare interpreter is measured the same way. Writes benchmarks/results/merge_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merging import MERGEKIT, measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--mergekit", type=Path, help="interpreter that has mergekit 0.1.5")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "merge_memory.json")
    args = parser.parse_args()
    experts = [args.family / f"expert_{i:02d}" for i in range(args.experts)]
    lines = ["merge_method: ties", f"base_model: {args.family / 'base'}", "dtype: float32", "out_dtype: bfloat16"]
    lines += [f"parameters: {{weight: 1.0, density: {args.density}}}", "models:", *(f"  - model: {e}" for e in experts)]
    rows: dict[str, Any] = {"interpreter": measured([sys.executable, "-c", "pass"])}
    with tempfile.TemporaryDirectory(dir=args.family) as scratch:
        recipe = Path(scratch) / "recipe.yml"
        recipe.write_text("\n".join(lines) + "\n")
        merge = [sys.executable, "-m", "deltaworks.cli.main", "merge", str(recipe), str(Path(scratch) / "ours")]
        merge += ["--force", "--catalog", str(Path(scratch) / "catalog")]
        rows["deltaworks, first merge (registers and analyzes)"] = measured(merge)
        rows["deltaworks, every later merge"] = measured(merge)
        if args.mergekit:
            rows["mergekit 0.1.5"] = measured(
                [str(args.mergekit), "-c", MERGEKIT, str(recipe), str(Path(scratch) / "t")]
            )
    result = {
        "experts": args.experts,
        "density": args.density,
        "expert_bytes": sum(p.stat().st_size for e in experts for p in e.glob("*.safetensors")),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "numba": version("numba")},
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'':<50}{'wall s':>10}{'processor s':>13}{'peak MiB':>10}")
    for name, row in rows.items():
        print(f"{name:<50}{row['wall_s']:>10}{row['processor_s']:>13}{row['peak_mib']:>10}")


if __name__ == "__main__":
    main()
