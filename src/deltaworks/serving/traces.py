"""Traces of requests: our own format, and those of Azure, BurstGPT and Mooncake."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.errors import WorkloadError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

FIELDS: dict[str, tuple[str, ...]] = {
    "time": ("time", "arrival_s", "time_s", "t", "arrived_at"),
    "adapter": ("adapter", "lora", "lora_name", "model"),
    "prompt": ("prompt_tokens", "prompt_len", "input_tokens", "input_length", "prompt", "num_prefill_tokens"),
    "output": ("output_tokens", "output_len", "output_length", "generated_tokens", "output", "num_decode_tokens"),
}
"""What the columns of a trace may be called; the first of each is what we write."""

_NEEDED = ("time", "prompt", "output")
FORMATS = ("deltaworks", "azure", "burstgpt", "mooncake")
_FOREIGN = {
    "azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "burstgpt": ("Timestamp", "Request tokens", "Response tokens"),
    "mooncake": ("timestamp", "input_length", "output_length"),
}


@dataclass(frozen=True)
class Trace:
    """Requests in order of time.

    Attributes:
        arrival_s: Seconds since the start, (n,) float64; a foreign trace starts at 0.
        adapter: Name of each request's adapter, "" for the base model; None where the format has no adapters.
        prompt: Prompt tokens, (n,) int64.
        output: Output tokens, (n,) int64.
    """

    arrival_s: F64
    adapter: tuple[str, ...] | None
    prompt: I64
    output: I64


def read_trace(path: Path, form: str | None = None) -> Trace:
    """Read a trace: CSV, JSON lines, a JSON list, or Parquet, in one of `FORMATS` (found out if not told).

    Raises:
        WorkloadError: it cannot be read, has no known columns, or a row is malformed; the row is named.
    """
    if form is not None and form not in FORMATS:
        raise WorkloadError(f"{path}: the trace format {form!r} is none of {', '.join(FORMATS)}")
    return trace_of(_rows(path), str(path), form)


def trace_of(rows: Iterable[Mapping[str, Any]], where: str, form: str | None = None) -> Trace:
    """The trace in rows of named columns, as `read_trace` reads them from a file.

    Raises:
        WorkloadError: there is none, or no known columns, or a row is malformed.
    """
    listed = list(rows)
    if not listed:
        raise WorkloadError(f"{where}: there are no requests in it")
    if form is None:
        form = next((f for f, names in _FOREIGN.items() if set(names) <= set(listed[0])), "deltaworks")
    own = form == "deltaworks"
    names = _columns(listed[0], where) if own else dict(zip(_NEEDED, _FOREIGN[form], strict=True))
    times, prompts, outputs, adapters = [], [], [], []
    for index, row in enumerate(listed, 1):
        try:
            times.append(_seconds(row[names["time"]], form))
            prompts.append(_tokens(row[names["prompt"]]))
            outputs.append(_tokens(row[names["output"]]))
            if "adapter" in names:
                adapters.append(str(row[names["adapter"]] or ""))
        except (KeyError, TypeError, ValueError) as error:
            raise WorkloadError(f"{where}: request {index} is malformed: {error}") from None
    at = np.asarray(times)
    if not np.isfinite(at).all() or at.min() < 0:
        raise WorkloadError(f"{where}: times must be seconds from 0 on")
    if not own:
        at = at - at.min()
    prompt, output = np.asarray(prompts, np.int64), np.asarray(outputs, np.int64)
    if not own:
        # Failed requests have no tokens; they were never served.
        served = (prompt > 0) & (output > 0)
        at, prompt, output = at[served], prompt[served], output[served]
    elif min(prompt.min(), output.min()) < 1:
        raise WorkloadError(f"{where}: every request needs a prompt and an output of at least one token")
    order = np.argsort(at, kind="stable")
    named = tuple(adapters[i] for i in order) if adapters else None
    return Trace(at[order], named, prompt[order], output[order])


def zipf_shares(count: int, exponent: float) -> F64:
    """Shares of adapters whose popularity falls with their place: (count,) float64, summing to 1."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def _columns(row: Mapping[str, Any], where: str) -> dict[str, str]:
    found = {}
    for field, names in FIELDS.items():
        name = next((n for n in names if n in row), None)
        if name is not None:
            found[field] = name
        elif field != "adapter":
            raise WorkloadError(
                f"{where}: no column for the {field}; expected {names[0]!r} among {', '.join(map(str, row))}"
            )
    return found


def _seconds(raw: Any, form: str) -> float:
    if form == "azure":
        # Seven digits of a second, where Python reads six.
        head, dot, rest = str(raw).strip().partition(".")
        digits = "".join(c for c in rest if c.isdigit())[:6]
        return datetime.fromisoformat(head + (dot + digits if digits else "")).timestamp()
    return float(raw) / 1000 if form == "mooncake" else float(raw)


def _tokens(raw: Any) -> int:
    value = float(raw)
    if value != int(value):
        raise ValueError(f"{raw!r} is no number of tokens")
    return int(value)


def _rows(path: Path) -> list[Mapping[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import ArrowException, parquet  # noqa: PLC0415  # slow to import, seldom needed

        try:
            rows: list[Mapping[str, Any]] = parquet.read_table(path).to_pylist()
        except (OSError, ArrowException) as error:
            raise WorkloadError(f"{path}: cannot be read: {error}") from None
        return rows
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: cannot be read: {error}") from None
    start = content.lstrip()[:1]
    try:
        if start == "[":
            return list(json.loads(content))
        if start == "{":
            return [json.loads(line) for line in content.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise WorkloadError(f"{path}: is not valid JSON: {error}") from None
    return list(csv.DictReader(io.StringIO(content)))
