"""``python -m fuzz``: many executions of every target, within bounds of time and memory."""

import argparse
import resource
import sys
import time
from pathlib import Path

from fuzz.harness import run
from fuzz.targets import TARGETS

MEMORY = 3 << 30


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help=f"some of {', '.join(TARGETS)}; all by default")
    parser.add_argument("--executions", type=int, default=100_000, help="of all targets together, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--failures", type=Path, default=Path(".fuzz"), help="folder for inputs that failed")
    asked = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    chosen = asked.targets or list(TARGETS)
    each = -(-asked.executions // len(chosen))
    total = failed = 0
    for name in chosen:
        started = time.monotonic()
        report = run(TARGETS[name], each, asked.seed)
        total, failed = total + report.executions, failed + len(report.failures)
        print(
            f"{name:<16}{report.executions:>8,} executions{report.accepted:>8,} accepted"
            f"{len(report.failures):>4} failures{time.monotonic() - started:>8.1f} s",
            flush=True,
        )
        for number, (content, failure) in enumerate(report.failures):
            asked.failures.mkdir(exist_ok=True)
            (asked.failures / f"{name}-{asked.seed}-{number}").write_bytes(content)
            print("  " + "\n  ".join(failure.splitlines()), flush=True)
    print(f"{'all':<16}{total:>8,} executions, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
