"""Many simulations: one question a line, one answer a line, in order, on all cores."""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any

from deltaworks.bounds import SURROGATE
from deltaworks.documents import DOCUMENT_BYTES, decoded, parse_json
from deltaworks.errors import DeltaworksError, WorkloadError
from deltaworks.serving.model_length import check_lengths
from deltaworks.serving.profile import Profile
from deltaworks.serving.schema import check_keys, whole
from deltaworks.serving.simulate import MOST, Configuration, simulate
from deltaworks.serving.workload import workload_from

LIMITS = ("slots", "max_rank", "served", "client_max_outstanding")
"""Keys of a question that are fields of `Configuration`."""
KEYS = ("id", "workload", *LIMITS)
BATCH_BYTES = 1 << 30
"""The largest batch that is read."""
_AHEAD = 8


_AMBIGUOUS = re.compile(f"[\x85\u2028\u2029]|{SURROGATE.pattern}")
"""Characters that some readers take for the end of a line, and halves of surrogate pairs, which UTF-8 cannot hold."""
_ID = re.compile(r'"id"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|true|false|null)')


def answer_lines(
    lines: Iterable[str | bytes],
    folder: Path,
    profile: Profile,
    threads: int | None = None,
    defaults: Mapping[str, int] | None = None,
) -> Iterator[dict[str, Any]]:
    """Answer questions like ``{"id", "workload", "slots", "max_rank", "served", "client_max_outstanding"}``.

    Args:
        lines: JSON, one question each; the last three keys are optional, and so are those in ``defaults``; null is
            as good as no key. ``workload`` is its content or a path. Blank lines are skipped.
        folder: What paths start from.
        profile: Of the server.
        threads: Number of worker threads; None for one per core.
        defaults: Of the keys in `LIMITS`, for questions that do not set them.

    Yields:
        For each question in order the answer of `simulate` with its ``id``, or ``{"id", "error"}`` where it cannot be
        answered: whatever a line holds costs nobody else's answer.
    """
    workers = threads or cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[dict[str, Any]]] = deque()
        for number, line in enumerate(lines, 1):
            if line.strip():
                waiting.append(pool.submit(_answer, line, number, folder, profile, defaults or {}))
            while len(waiting) > workers * _AHEAD or (waiting and waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def answer_text(answer: dict[str, Any]) -> str:
    """An answer as one line of JSON, without its end."""
    text = json.dumps(answer, ensure_ascii=False)
    return text if text.isascii() or not _AMBIGUOUS.search(text) else json.dumps(answer)


def _answer(
    line: str | bytes, number: int, folder: Path, profile: Profile, defaults: Mapping[str, int]
) -> dict[str, Any]:
    where, name = f"line {number}", None
    try:
        if len(line) > DOCUMENT_BYTES:
            raise WorkloadError(f"{where}: has more than {DOCUMENT_BYTES:,} bytes, which is the most")  # noqa: TRY301
        name = _id_of(line)
        asked = check_keys(parse_line(line, where), KEYS, where)
        set_here = {key: whole(asked[key], f"{where}: {key}", 1, MOST) for key in LIMITS if asked.get(key) is not None}
        chosen = {**defaults, **set_here}
        for key, is_there in (("workload", "workload" in asked), ("slots", "slots" in chosen)):
            if not is_there:
                raise WorkloadError(f"{where}: {key} is missing")  # noqa: TRY301  # an answer like any other
        workload = workload_from(asked["workload"], folder, where)
        check_lengths(workload, [profile])
        answer = simulate(workload, profile, Configuration(**chosen))
    except DeltaworksError as error:
        return {"id": name, "error": str(error)}
    except Exception as error:  # an unforeseen failure must not take the other lines' answers along
        return {"id": name, "error": f"{where}: failed with {type(error).__name__}: {error}"}
    return {"id": name, **answer}


def parse_line(line: str | bytes, where: str) -> Any:
    """What a line of JSON holds; a mistake is placed by its column, where a document's would be by its line.

    Raises:
        WorkloadError: it is not JSON, or beyond one of the bounds of `deltaworks.documents`.
    """
    text = decoded(line, where, "a question", WorkloadError) if isinstance(line, bytes) else line
    try:
        return parse_json(text, where, "a question", WorkloadError)
    except WorkloadError:
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise WorkloadError(f"{where}: is not valid JSON: {error.msg}: column {error.colno}") from None
        except (RecursionError, ValueError):
            pass  # well formed as far as it goes, and beyond a bound
        raise


def _id_of(line: str | bytes) -> Any:
    """The id of a question, as far as it can be made out, even of one that is malformed; None where there is none."""
    text = line.decode("utf-8-sig", "replace") if isinstance(line, bytes) else line
    try:
        asked = json.loads(text)
        found = asked.get("id") if isinstance(asked, dict) else None
    except (ValueError, RecursionError):
        match = _ID.search(text)
        try:
            found = json.loads(match[1]) if match else None
        except ValueError:
            found = None
    try:
        json.dumps([found], allow_nan=False)
    except (ValueError, RecursionError):  # NaN, which JSON has no word for; nesting without end
        return None
    return found
