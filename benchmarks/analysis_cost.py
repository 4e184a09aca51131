#!/usr/bin/env python3
"""What analyzing an expert costs, beside reading it and its base once at the machine's own sequential speed.

    python benchmarks/make_family.py FAMILY --preset 0.5b --experts 8
    python benchmarks/analysis_cost.py FAMILY

Runs take turns: a plain sequential read of both models' files (8 MiB at a time, nothing done with the bytes), first
one file after the other, then two at a time; then the analysis. Before a cold run the files are
dropped from the page cache. Medians; writes benchmarks/results/analysis_cost.json.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog

CHUNK = 8 << 20


def drop(files: list[Path]) -> None:
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(path: Path) -> int:
    buffer = memoryview(mmap.mmap(-1, CHUNK))
    file, place = os.open(path, os.O_RDONLY), 0
    while got := os.preadv(file, [buffer], place):
        place += got
    os.close(file)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--expert", default="expert_00")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "analysis_cost.json")
    args = parser.parse_args()
    folders = [args.family / "base", args.family / args.expert]
    files = [p for folder in folders for p in sorted(folder.glob("*.safetensors"))]
    nbytes = sum(p.stat().st_size for p in files)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch, Catalog(Path(scratch)) as catalog:
        base = register(catalog, "base", str(folders[0]))
        expert = register(catalog, "expert", str(folders[1]), "base")
        analyze(catalog, expert, base)  # compiles kernels
        for state in ("cold", "warm"):
            reading: dict[int, list[float]] = {1: [], 2: []}
            analyzing = []
            for _ in range(args.runs):
                for streams, times in reading.items():
                    if state == "cold":
                        drop(files)
                    started = time.perf_counter()
                    with ThreadPoolExecutor(streams) as pool:
                        list(pool.map(read, files))
                    times.append(time.perf_counter() - started)
                if state == "cold":
                    drop(files)
                started = time.perf_counter()
                analyze(catalog, expert, base, force=True)
                analyzing.append(time.perf_counter() - started)
            row = {"analyze_s": statistics.median(analyzing)}
            for streams, times in reading.items():
                ratios = [a / r for a, r in zip(analyzing, times, strict=True)]
                row[f"read_{streams}_s"] = statistics.median(times)
                row[f"ratio_{streams}"] = statistics.median(ratios)
            rows[state] = {k: round(v, 3) for k, v in row.items()}
            print(state, rows[state], flush=True)
    result = {
        "bytes": nbytes,
        "runs": args.runs,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "numba": version("numba")},
        "medians": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
