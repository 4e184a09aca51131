#!/usr/bin/env python3
"""How small the exact delta of an expert gets, and how near each layer comes, on families of real checkpoints.

    python benchmarks/layer_sizes.py ../shared/families/scribe examples/micro
    python benchmarks/layer_sizes.py --render                     # write the docs from what was measured

A family is a folder with `base` and experts beside it. Sizes are of all deltas with their headers and checksums, in
bits a parameter, and apart from them of the sketches and samples that plans are made from. Beside them stands what zstd
makes of the same delta, taken as the distance of the two numbers among those of the type (int16), as it is and with its
bytes split in two planes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from marked import fill
from numpy.typing import NDArray

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.checkpoint import Checkpoint, open_checkpoint
from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.layers.cells import DEPTH, DRAFTS
from deltaworks.layers.file import LayerFile

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "layer_sizes.json"
LEVELS = (3, 19)


def places(checkpoint: Checkpoint, name: str) -> NDArray[np.int32]:
    """The elements of a BF16 tensor as their ranks among all numbers."""
    info = checkpoint.tensors[name]
    raw = np.empty(info.nbytes, np.uint8)
    with RangeReader(checkpoint.path / info.file, ByteCounter()) as reader:
        reader.read_into(raw, info.offset)
    bits = raw.view(np.uint16).astype(np.int32)
    return np.where(bits & 0x8000, 0x7FFF - bits, bits)


def entropy(values: NDArray[Any]) -> float:
    """Bits a value of the distribution of `values`."""
    counts = np.unique(values, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def measure(family: Path) -> dict[str, Any]:
    """Sizes and errors of every expert of a family."""
    rows = {}
    with tempfile.TemporaryDirectory() as folder, Catalog(Path(folder)) as catalog:
        base = register(catalog, "base", str(family / "base"))
        for path in sorted(family.iterdir()):
            if path.name == "base" or not (path / "config.json").is_file():
                continue
            expert = register(catalog, path.name, str(path), "base")
            analyze(catalog, expert, base, layers=True)
            file = LayerFile(catalog.layers_file(expert.fingerprint, base.fingerprint), ByteCounter())
            count = expert.checkpoint.count
            left = file.index["left"].astype(np.float64).sum(axis=0)
            read = file.read_bytes.sum(axis=0)
            on_disk = file.path.stat().st_size - file.residuals.nbytes
            old, new = (open_checkpoint(m.path, ByteCounter()) for m in (base, expert))
            distance = np.concatenate([(places(new, n) - places(old, n)).ravel() for n in new.tensors]).astype(np.int16)
            split = distance.view(np.uint8).reshape(-1, 2).T.copy()
            rows[path.name] = {
                "parameters": count,
                "exact_bits": 8 * (on_disk - int(read[DRAFTS - 1])) / count,
                "disk_bits": 8 * on_disk / count,
                "sketch_bits": 8 * file.residuals.nbytes / count,
                "bits": [8 * int(n) / count for n in read],
                "left": [float(np.sqrt(v / left[0])) for v in left[1:]],
                "entropy": entropy(distance),
                "zstd": {str(k): 8 * len(_zstd(k).compress(distance, asbytes=True)) / count for k in LEVELS},
                "split_zstd": {str(k): 8 * len(_zstd(k).compress(split, asbytes=True)) / count for k in LEVELS},
            }
            file.close()
    return rows


def _zstd(level: int) -> pa.Codec:
    return pa.Codec("zstd", compression_level=level)


def render(known: dict[str, Any]) -> None:
    """Write the tables of docs/layers.md."""
    columns = "family | expert | exact layers | entropy | zstd -3 | -19 | split, -3 | -19 | with drafts | sketches"
    lines = ["", f"| {columns} |", "|---|" + "---|" * 9]
    depths = [f"{d} layer{'s' if d > 1 else ''}" for d in range(1, DEPTH)]
    near = ["", f"| family | expert | {' | '.join(depths)} |", "|---|---|" + "---|" * len(depths)]
    for family, experts in known.items():
        for name, row in experts.items():
            sizes = [
                row["exact_bits"],
                row["entropy"],
                *row["zstd"].values(),
                *row["split_zstd"].values(),
                row["disk_bits"],
                row["sketch_bits"],
            ]
            lines.append(
                f"| {family} | {name} | **{sizes[0]:.2f}** | " + " | ".join(f"{s:.2f}" for s in sizes[1:]) + " |"
            )
            both = zip(row["bits"], row["left"], strict=True)
            near.append(f"| {family} | {name} | " + " | ".join(f"{b:.2f}: {e:.3f}" for b, e in list(both)[:-1]) + " |")
    fill(ROOT / "docs" / "layers.md", "table: sizes", [*lines, ""])
    fill(ROOT / "docs" / "layers.md", "table: errors", [*near, ""])


def main() -> None:
    """Measure and render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", type=Path, nargs="*")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for family in arguments.families:
        known[family.resolve().name] = measure(family)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    render(known)


if __name__ == "__main__":
    main()
