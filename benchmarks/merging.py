"""Merges as processes of their own, ours and the peer's, and what they cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MERGEKIT = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
recipe, out = sys.argv[1:]
run_merge(MergeConfiguration.model_validate(yaml.safe_load(open(recipe))), out, MergeOptions(quiet=True))
"""
"""What an interpreter that has mergekit 0.1.5 runs; its arguments are a recipe and the output's folder."""


LAUNCHER = """
import json, os, sys, time
started = time.perf_counter()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
wall = time.perf_counter() - started
device = dict(line.split(": ") for line in open(f"/proc/{pid}/io").read().splitlines())
_, status, usage = os.wait4(pid, 0)
json.dump({
    "wall_s": round(wall, 3),
    "processor_s": round(usage.ru_utime + usage.ru_stime, 2),
    "peak_mib": round(usage.ru_maxrss / 1024, 1),
    "device_read": int(device["read_bytes"]),
    "device_written": int(device["write_bytes"]),
}, sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A process is charged with the memory of the one that started it, so that one had better be small."""


def deltaworks(*arguments: str) -> str:
    """Run our command of this environment; returns what it printed."""
    command = str(Path(sys.executable).with_name("deltaworks"))
    return subprocess.run([command, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout


def register_experts(catalog: Path, family: Path, experts: int) -> list[str]:
    """Register `expert_00` on of a family where the catalog does not know them; returns their names."""
    known = {m["name"] for m in json.loads(deltaworks("list", "--catalog", str(catalog), "--json"))["models"]}
    names = [f"expert_{i:02d}" for i in range(experts)]
    for name in names:
        if name not in known:
            at = ["--base", str(family / "base"), "--catalog", str(catalog), "--quiet"]
            deltaworks("register", name, str(family / name), *at)
    return names


def measured(command: list[str], out: Path | None = None, folder: Path | None = None) -> dict[str, Any]:
    """Run a command: seconds of wall and processor, peak memory, and what it read from and wrote to devices.

    What it prints goes to `out`; it runs in `folder`, or here.
    """
    # Without it, a program may have to compile its own modules in every run.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    launcher = [sys.executable, "-S", "-c", LAUNCHER, *command]
    with (out or Path(os.devnull)).open("w") as stream:
        done = subprocess.run(
            launcher, stdout=stream, stderr=subprocess.PIPE, env=environment, cwd=folder, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stderr[done.stderr.rindex("{") :])
    return result
