"""Merges as processes of their own, ours and the peer's, and what they cost."""

from __future__ import annotations

import os
import subprocess
import time
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


def measured(command: list[str], out: Path | None = None) -> dict[str, Any]:
    """Run a command: seconds of wall and processor, peak memory, and what it read from and wrote to devices."""
    # Without it, a program may have to compile its own modules in every run.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with (out or Path(os.devnull)).open("w") as stream:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.DEVNULL, env=environment)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        wall = time.perf_counter() - started
    lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
    device = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} failed with {process.returncode}")
    return {
        "wall_s": round(wall, 3),
        "processor_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
        "device_read": device["read_bytes"],
        "device_written": device["write_bytes"],
    }
