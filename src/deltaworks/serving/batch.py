"""Many simulations: one question a line, one answer a line, in order, on all cores."""

import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any

from deltaworks.errors import UserError, WorkloadError
from deltaworks.serving.profile import Profile
from deltaworks.serving.schema import check_keys, whole
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.workload import workload_from

KEYS = ("id", "workload", "slots", "max_rank", "served", "client_max_outstanding")
_AHEAD = 8


def answer_lines(
    lines: Iterable[str], folder: Path, profile: Profile, threads: int | None = None
) -> Iterator[dict[str, Any]]:
    """Answer questions like ``{"id", "workload", "slots", "max_rank", "served", "client_max_outstanding"}``.

    Args:
        lines: JSON, one question each; the last three keys are optional; ``workload`` is its content or a path.
        folder: What paths start from.
        profile: Of the server.
        threads: At once; None for all cores.

    Yields:
        For each question in order the answer of `simulate` with its ``id``, or ``{"id", "error"}`` where it cannot be
        answered: one bad line costs nobody else's answer.
    """
    workers = threads or cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[dict[str, Any]]] = deque()
        for number, line in enumerate(lines, 1):
            if line.strip():
                waiting.append(pool.submit(_answer, line, number, folder, profile))
            while len(waiting) > workers * _AHEAD or (waiting and waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _answer(line: str, number: int, folder: Path, profile: Profile) -> dict[str, Any]:
    where, name = f"line {number}", None
    try:
        asked = check_keys(json.loads(line), KEYS, where)
        name = asked.get("id")
        for key in ("workload", "slots"):
            if key not in asked:
                raise WorkloadError(f"{where}: {key} is missing")  # an answer like any other
        chosen = {key: whole(asked[key], f"{where}: {key}") for key in KEYS[2:] if asked.get(key) is not None}
        answer = simulate(workload_from(asked["workload"], folder, where), profile, Configuration(**chosen))
    except json.JSONDecodeError as error:
        return {"id": name, "error": f"{where}: is not valid JSON: {error}"}
    except UserError as error:
        return {"id": name, "error": str(error)}
    return {"id": name, **answer}
