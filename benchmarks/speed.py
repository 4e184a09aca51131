#!/usr/bin/env python3
"""How long merges take, beside mergekit 0.1.5 and beside what the machine's memory and disk allow.

    make bench                                                    # everything, into .bench
    python benchmarks/speed.py .bench [--mergekit .venv-peers/bin/python] [--only ties-8-warm ...] [--rounds 5]
    python benchmarks/speed.py .bench --render                    # write the docs from what was measured
    python benchmarks/speed.py .bench --only ties-8-cold --reference CHECKOUT --reference-command "..."

Runs are interleaved: each round runs every case once, and in each case every program and the bare reading and writing
of the same bytes, one after the other. Medians over the rounds are reported, and how many runs they are of. What was
measured is kept after every run (benchmarks/results/speed.json), so an interrupted benchmark goes on where it was; a
round takes about half an hour, nearly all of it mergekit's.

The reference code of the MergePipe paper runs beside them where a checkout of it is given. How its command is called
changes with its version, so that is given too: words in braces stand for {base} and {experts} (folders), {method},
{budget} (bytes, all of the experts' where a case has none) and {out}; it runs in the checkout.

A cold run begins with none of the models' files in the page cache, a warm one with all of them; the programs' own files
are warm, and kernels are compiled. Read and written bytes are those of the device, as the kernel accounts them to the
process (/proc/PID/io).
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import multiprocessing
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from marked import fill
from merging import MERGEKIT, deltaworks, measured, register_experts
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE, cached_bytes
from deltaworks.checkpoints.checkpoint import Checkpoint, open_checkpoint
from deltaworks.checkpoints.codec import decode_reference
from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.merging.budget import parse_budget

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
PAGE_OF_DOCS = ROOT / "docs" / "benchmarks.md"
PARAMETERS = {
    "linear": "weight: 1.0",
    "task_arithmetic": "weight: 0.3",
    "ties": "weight: 1.0, density: 0.2",
    "dare_ties": "weight: 0.5, density: 0.5",
    "della": "weight: 0.5, density: 0.5",
    "breadcrumbs_ties": "weight: 0.5, density: 0.3",
    "sce": "select_topk: 0.2",
}


@dataclass(frozen=True)
class Case:
    """One thing to time; `times` is how many times faster than mergekit it is meant to be."""

    method: str
    experts: int
    cold: bool = False
    budget: str | None = None
    peer: bool = True
    times: float | None = None

    @property
    def name(self) -> str:
        parts = [self.method, str(self.experts), *([self.budget] if self.budget else [])]
        return "-".join([*parts, "cold" if self.cold else "warm"])

    @property
    def peer_runs(self) -> str:
        """The case that has mergekit's runs: it knows no budget."""
        return replace(self, budget=None).name

    @property
    def reads_base(self) -> bool:
        return self.method != "linear" or self.budget is not None


FIXED = "1GB"
GROWTH = (2, 4, 8, 16, 32)
CASES = (
    Case("linear", 4, times=4),
    Case("linear", 16, times=4),
    Case("linear", 4, cold=True),
    Case("linear", 16, cold=True),
    Case("dare_ties", 4, times=25),
    Case("della", 4, times=25),
    Case("breadcrumbs_ties", 4, times=25),
    Case("sce", 4, times=25),
    Case("task_arithmetic", 4),
    Case("ties", 8, times=40),
    Case("ties", 8, cold=True, times=25),
    Case("linear", 16, cold=True, budget="12.5%", times=10),
    Case("ties", 16, cold=True),
    Case("ties", 16, cold=True, budget="12.5%", times=100),
    *(Case(m, k, cold=True, budget=FIXED, peer=False) for m in ("linear", "ties") for k in GROWTH),
    *(Case("linear", k, cold=True, peer=False) for k in (2, 8, 32)),
    *(Case("ties", k, cold=True, peer=False) for k in (2, 4, 32)),
)


@dataclass(frozen=True)
class Reference:
    """A checkout of the reference MergePipe code, and how it is called there."""

    checkout: Path
    command: str

    def words(self, case: Case, family: Path, out: Path) -> list[str]:
        """The command for a case."""
        experts = [family / f"expert_{i:02d}" for i in range(case.experts)]
        whole = sum(p.stat().st_size for e in experts for p in e.glob("*.safetensors"))
        limit = parse_budget(case.budget or "100%").of(whole)
        known = {"base": family / "base", "method": case.method, "budget": limit, "out": out}
        words: list[str] = []
        for word in shlex.split(self.command):
            words += map(str, experts) if word == "{experts}" else [word.format(**known)]
        return words


class Bench:
    """A folder with the family, a catalog that knows it, recipes and outputs."""

    def __init__(self, folder: Path, mergekit: Path | None, reference: Reference | None) -> None:
        self.folder, self.mergekit, self.reference = folder.resolve(), mergekit, reference
        self.family = self.folder / "family"
        self.catalog = self.folder / "catalog"
        self.command = [str(Path(sys.executable).with_name("deltaworks"))]

    def prepare(self, experts: int) -> None:
        """Make the family where it is missing, and register and analyze it."""
        made = [ROOT / "benchmarks" / "make_family.py", self.family, "--preset", "0.5b", "--experts", experts]
        if not (self.family / f"expert_{experts - 1:02d}").is_dir():
            subprocess.run([sys.executable, *map(str, made)], check=True)
        register_experts(self.catalog, self.family, experts)
        deltaworks("analyze", "--all", "--no-layers", "--catalog", str(self.catalog), "--quiet")

    def inputs(self, case: Case) -> list[Path]:
        """The weight files a case is about, base included where it is read."""
        models = [*(["base"] if case.reads_base else []), *(f"expert_{i:02d}" for i in range(case.experts))]
        return [path for m in models for path in sorted((self.family / m).glob("*.safetensors"))]

    def read_bare(self, case: Case) -> list[Path]:
        """The weight files that are read alone beside a case.

        Where cases of few and of many experts are compared, they are the same for all: a virtual machine's disk has a
        cache of its own behind it, and what was read last comes faster from there.
        """
        if case.budget == FIXED:
            return sorted(self.family.glob("*/*.safetensors"))
        return self.inputs(case)

    def recipe(self, case: Case) -> Path:
        """The case's recipe, as mergekit's documentation would write it."""
        lines = [f"merge_method: {case.method}", "dtype: bfloat16", f"parameters: {{{PARAMETERS[case.method]}}}"]
        lines += [] if case.method == "linear" else [f"base_model: {self.family / 'base'}"]
        lines += ["models:", *(f"  - model: {self.family / f'expert_{i:02d}'}" for i in range(case.experts))]
        path = self.folder / f"{case.method}-{case.experts}.yml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def temper(self, case: Case) -> None:
        """Bring the inputs into the page cache, or out of it."""
        os.sync()
        programs = [p.absolute().parents[1] for p in (Path(sys.executable), self.mergekit) if p]
        # Some systems drop what nobody has read for a while: the programs themselves, the standard library's too.
        for folder in (self.catalog, *programs, Path(sys.base_prefix)):
            for path in folder.rglob("*"):
                endings = (".py", ".pyc", ".nbi", ".nbc", ".parquet", ".table", ".sqlite")
                is_read = path.suffix in endings or ".so" in path.suffixes
                if is_read and path.is_file():
                    path.read_bytes()
        for path in self.inputs(case):
            with path.open("rb") as file:
                if case.cold:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    while file.read(8 << 20):
                        pass
        if case.cold and any(path.stat().st_size < 2 * _in_memory(path) for path in self.inputs(case)):
            raise SystemExit("the models' files stay in the page cache: is another process reading them?")

    def ours(self, case: Case, out: Path) -> dict[str, Any]:
        """One run of deltaworks."""
        budget = ["--budget", case.budget] if case.budget else []
        arguments = ["merge", str(self.recipe(case)), str(out), "--catalog", str(self.catalog), "--quiet", "--json"]
        result = measured([*self.command, *arguments, *budget], self.folder / "result.json")
        own = json.loads((self.folder / "result.json").read_text())
        kept = ("expert_bytes_read", "base_bytes_read", "output_bytes_written", "wall_s", "stages")
        return {**result, "own": {k: own[k] for k in kept}}

    def theirs(self, case: Case, out: Path) -> dict[str, Any]:
        """One run of mergekit."""
        return measured([str(self.mergekit), "-c", MERGEKIT, str(self.recipe(case)), str(out)])

    def references(self, case: Case, out: Path) -> dict[str, Any]:
        """One run of the reference MergePipe code."""
        assert self.reference is not None
        return measured(self.reference.words(case, self.family, out), folder=self.reference.checkout)


def _in_memory(path: Path) -> int:
    with path.open("rb") as file:
        return cached_bytes(file.fileno(), 0, path.stat().st_size) or 0


def bare_reading(paths: Iterable[Path], *, cold: bool) -> float:
    """Seconds it takes to read files with what is fastest here: around the page cache if cold, else from it."""
    threads, chunk = (8, 2 << 20) if cold else (os.cpu_count() or 1, 1 << 19)
    flags = os.O_RDONLY | (os.O_DIRECT if cold else 0)
    files = [(os.open(path, flags), path.stat().st_size) for path in paths]
    # Across the files, as a merge reads: some devices like that better than one file after the other.
    pieces = iter(sorted(((fd, start) for fd, size in files for start in range(0, size, chunk)), key=lambda p: p[1]))

    def read(piece: tuple[int, int], buffer: mmap.mmap) -> None:
        os.preadv(piece[0], [buffer], piece[1])

    seconds = _in_threads(threads, pieces, chunk, read)
    for fd, _ in files:
        os.close(fd)
    return seconds


def bare_writing(path: Path, nbytes: int) -> float:
    """Seconds it takes to write a file of so many bytes and flush it, with what is fastest here."""
    chunk = 4 << 20
    started = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
    os.posix_fallocate(fd, 0, nbytes)

    def write(start: int, buffer: mmap.mmap) -> None:
        os.pwrite(fd, memoryview(buffer)[: min(chunk, (nbytes - start) // PAGE * PAGE)], start)

    _in_threads(2, iter(range(0, nbytes // PAGE * PAGE, chunk)), chunk, write)
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def _in_threads(count: int, pieces: Iterator[Any], chunk: int, work: Any) -> float:
    lock = threading.Lock()

    def run() -> None:
        buffer = mmap.mmap(-1, chunk)
        buffer.write(bytes(chunk))
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            work(piece, buffer)

    started = time.perf_counter()
    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def distance(ours: Path, theirs: Path, base: Path) -> float:
    """L2 distance of two merged models, relative to the distance of ours from the base."""
    apart = moved = 0.0
    models = [open_checkpoint(p, ByteCounter()) for p in (ours, theirs, base)]
    for name in models[0].tensors:
        a, b, c = (_values(m, name) for m in models)
        apart += float(np.square(a - b, dtype=np.float64).sum())
        moved += float(np.square(a - c, dtype=np.float64).sum())
    return float(np.sqrt(apart / moved))


def _values(model: Checkpoint, name: str) -> NDArray[np.float32]:
    info = model.find(name)
    assert info is not None, name
    raw = np.empty(info.nbytes, np.uint8)
    with RangeReader(model.path / info.file, ByteCounter()) as reader:
        reader.read_into(raw, info.offset)
    return decode_reference(raw, info.dtype)


def run(bench: Bench, cases: list[Case], rounds: int, known: dict[str, Any]) -> None:
    """Measure what is missing of `known`, and keep it."""
    runs: dict[str, dict[str, list[Any]]] = known.setdefault("runs", {})
    for number, case in itertools.product(range(rounds), cases):
        own = runs.setdefault(case.name, {"ours": [], "limit": [], "mergekit": []})
        out, other = bench.folder / "out", bench.folder / "other"
        for folder in (out, other):
            shutil.rmtree(folder, ignore_errors=True)
        if len(own["limit"]) <= number:
            bench.temper(case)
            inputs = bench.read_bare(case)
            read_s = bare_reading(inputs, cold=case.cold)
            size = sum(p.stat().st_size for p in (bench.family / "base").glob("*.safetensors"))
            write_s = bare_writing(bench.folder / "written", size)
            total = sum(p.stat().st_size for p in inputs)
            own["limit"].append({"read_s": read_s, "write_s": write_s, "read": total, "written": size})
        if len(own["ours"]) <= number:
            if not own["ours"]:
                bench.ours(case, out)  # compiles what the machine has not compiled yet
                shutil.rmtree(out)
            bench.temper(case)
            own["ours"].append(bench.ours(case, out))
        wanted = case.peer and case.budget is None and bench.mergekit
        if wanted and len(own["mergekit"]) <= number:
            bench.temper(case)
            own["mergekit"].append(bench.theirs(case, other))
            agreement = known.setdefault("agreement", {})
            if case.name not in agreement and out.is_dir():
                # In a process of its own: children are charged with what their parent held when they began.
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    agreement[case.name] = pool.submit(distance, out, other, bench.family / "base").result()
        reference = own.setdefault("reference", []) if bench.reference and case.peer else None
        if reference is not None and len(reference) <= number:
            bench.temper(case)
            shutil.rmtree(other, ignore_errors=True)
            reference.append(bench.references(case, other))
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        ours, theirs = (own[t][-1]["wall_s"] if own[t] else None for t in ("ours", "mergekit"))
        print(f"{number + 1} {case.name}: {ours} s, mergekit {theirs} s, limit {own['limit'][-1]}", flush=True)


def median(rows: list[dict[str, Any]], key: str) -> float:
    """The median of one quantity over the rounds."""
    return float(statistics.median(r[key] for r in rows))


def limit_s(case: Case, own: dict[str, list[Any]]) -> float:
    """Seconds that reading and writing this case's bytes take at the speed of the bare runs beside it."""
    read = median(own["ours"], "device_read") if case.cold else sum(_logical(own["ours"]))
    rate = float(statistics.median(r["read"] / r["read_s"] for r in own["limit"]))
    return read / rate + median(own["limit"], "write_s")


def _logical(rows: list[dict[str, Any]]) -> tuple[float, float]:
    read = [r["own"] for r in rows]
    return median(read, "expert_bytes_read"), median(read, "base_bytes_read")


def render(known: dict[str, Any]) -> None:
    """Write the tables of docs/benchmarks.md."""
    fill(PAGE_OF_DOCS, "table: machine", machine_lines(known))
    fill(PAGE_OF_DOCS, "table: beside mergekit", beside_lines(known))
    fill(PAGE_OF_DOCS, "table: limits", limit_lines(known))
    fill(PAGE_OF_DOCS, "table: growth", growth_lines(known))


def machine_lines(known: dict[str, Any]) -> list[str]:
    """What it was measured on."""
    limits = {c.name: known["runs"][c.name]["limit"] for c in CASES if known["runs"].get(c.name, {}).get("limit")}
    cold = [r["read"] / r["read_s"] / 1e9 for n, rows in limits.items() if n.endswith("cold") for r in rows]
    warm = [r["read"] / r["read_s"] / 1e9 for n, rows in limits.items() if n.endswith("warm") for r in rows]
    written = [r["written"] / r["write_s"] / 1e9 for rows in limits.values() for r in rows]
    about = known["machine"]
    lines = ["", f"{about['processor']}, {about['cores']} cores, {about['memory_gb']:.0f} GB; {about['versions']}.", ""]
    for what, rates in (("from the device", cold), ("from the page cache", warm), ("written and flushed", written)):
        if rates:
            low, middle, high = (float(np.percentile(rates, q)) for q in (10, 50, 90))
            lines.append(f"- {what}: {middle:.1f} GB/s (nine of ten runs from {low:.1f} to {high:.1f})")
    return [*lines, ""]


def beside_lines(known: dict[str, Any]) -> list[str]:
    """A row for each case that mergekit runs too."""
    lines = [
        "",
        "| | runs | deltaworks | mergekit | times faster | asked | processor | memory | device bytes | apart |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for case in CASES:
        ours, theirs = (known["runs"].get(n, {}).get(t) for n, t in ((case.name, "ours"), (case.peer_runs, "mergekit")))
        if not ours or not theirs or not case.peer:
            continue
        ratio = median(theirs, "wall_s") / median(ours, "wall_s")
        moved = [(median(r, "device_read") + median(r, "device_written")) / 1e9 for r in (ours, theirs)]
        apart = known.get("agreement", {}).get(case.name)
        cells = [
            case.name.replace("-", " "),
            f"{len(ours)}, {len(theirs)}",
            f"{median(ours, 'wall_s'):.2f} s",
            f"{median(theirs, 'wall_s'):.1f} s",
            f"**{ratio:.1f}**",
            f"{case.times:g}" if case.times else "",
            f"{median(ours, 'processor_s'):.1f} s, {median(theirs, 'processor_s'):.0f} s",
            ", ".join(f"{median(r, 'peak_mib'):,.0f} MiB" if "peak_mib" in r[0] else "?" for r in (ours, theirs)),
            f"{moved[0]:.1f} GB, {moved[1]:.1f} GB" if case.cold else "",
            "" if apart is None else "at random" if case.method.startswith(("dare", "della")) else f"{apart:.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *reference_lines(known)]


def reference_lines(known: dict[str, Any]) -> list[str]:
    """A row for each case that the reference MergePipe code ran too; nothing where there is none."""
    lines = []
    for case in CASES:
        own = known["runs"].get(case.name, {})
        if own.get("reference") and own["ours"]:
            walls = [median(own[t], "wall_s") for t in ("ours", "reference")]
            read = median(own["reference"], "device_read") / 1e9
            name = case.name.replace("-", " ")
            lines.append(f"| {name} | {walls[0]:.2f} s | {walls[1]:.1f} s, {read:.1f} GB | {walls[1] / walls[0]:.1f} |")
    head = ["| | deltaworks | reference MergePipe, read of devices | times faster |", "|---|---|---|---|"]
    return [*head, *lines, ""] if lines else []


def limit_lines(known: dict[str, Any]) -> list[str]:
    """Each case beside the bare reading and writing of the same bytes."""
    lines = [
        "",
        "| | deltaworks | read and write alone | times that | share of the limit reached |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        own = known["runs"].get(case.name)
        if own and own["ours"] and own["limit"]:
            wall, limit = median(own["ours"], "wall_s"), limit_s(case, own)
            cells = [case.name.replace("-", " "), f"{wall:.2f} s", f"{limit:.2f} s", f"{wall / limit:.2f}"]
            lines.append(f"| {' | '.join(cells)} | {limit / wall:.0%} |")
    return [*lines, ""]


def growth_lines(known: dict[str, Any]) -> list[str]:
    """Wall time by the number of experts, cold."""
    lines = ["", f"| | {' | '.join(f'{k} experts' for k in GROWTH)} |", "|---|" + "---|" * len(GROWTH)]
    for method, budget in itertools.product(("linear", "ties"), (FIXED, None)):
        row = []
        for k in GROWTH:
            own = known["runs"].get(Case(method, k, cold=True, budget=budget).name, {"ours": []})["ours"]
            row.append(f"{median(own, 'wall_s'):.2f} s" if own else "")
        lines.append(f"| {method}, {f'{FIXED} of the experts' if budget else 'everything'} | {' | '.join(row)} |")
    return [*lines, ""]


def machine() -> dict[str, Any]:
    """What a reader needs to know of this machine."""
    found = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    used = ", ".join(f"{n} {version(n)}" for n in ("deltaworks", "numpy", "numba"))
    return {
        "processor": found[0] if found else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        "versions": f"Python {platform.python_version()}, {used}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the family (33 GB), the catalog and outputs")
    parser.add_argument("--mergekit", type=Path, help="interpreter that has mergekit 0.1.5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="CASE", help=", ".join(c.name for c in CASES).replace("%", "%%"))
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--reference", type=Path, metavar="CHECKOUT", help="of the reference MergePipe code")
    parser.add_argument("--reference-command", metavar="WORDS", help="how it is called; see above")
    args = parser.parse_args()
    if (args.reference is None) != (args.reference_command is None):
        parser.error("--reference and --reference-command go together")
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not args.render:
        known["machine"] = machine()
        args.folder.mkdir(parents=True, exist_ok=True)
        reference = Reference(args.reference.resolve(), args.reference_command) if args.reference else None
        bench = Bench(args.folder, args.mergekit, reference)
        cases = [c for c in CASES if not args.only or c.name in args.only]
        bench.prepare(max(c.experts for c in cases))
        run(bench, list(dict.fromkeys(cases)), args.rounds, known)
    render(known)


if __name__ == "__main__":
    main()
