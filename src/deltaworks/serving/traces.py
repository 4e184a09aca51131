"""Traces of requests: our own format, and those of Azure, BurstGPT, Mooncake, Qwen-Bailian and vLLM."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from deltaworks.bounds import SURROGATE
from deltaworks.errors import WorkloadError, did_you_mean, one_line, quoted
from deltaworks.serving import trace_times
from deltaworks.serving.arrays import F64, I64
from deltaworks.serving.lengths import MAX_TOKENS
from deltaworks.serving.schema import MAX_TEXT, has_controls
from deltaworks.serving.trace_rows import VLLM_BENCH, rows_of
from deltaworks.wording import counted

FIELDS: dict[str, tuple[str, ...]] = {
    "time": ("time", "arrival_s", "time_s", "t", "arrived_at", "timestamp", "start_time", "startTime"),
    "adapter": ("adapter", "lora", "lora_name", "model"),
    "prompt": ("prompt_tokens", "prompt_len", "input_tokens", "input_length", "prompt", "num_prefill_tokens"),
    "output": ("output_tokens", "output_len", "output_length", "completion_tokens", "generated_tokens", "output",
               "num_decode_tokens"),
}  # fmt: skip
"""What the columns of a trace may be called; the first of each is what we write."""

MAX_REQUESTS = 20_000_000
"""Requests of a workload, at most: about 2 GB of memory in the twin."""

_NEEDED = ("time", "prompt", "output")
_UNIT_NOT_SAID = ("timestamp", "start_time", "startTime")
"""Columns whose name is used for seconds and for milliseconds."""


@dataclass(frozen=True)
class _Format:
    """A format of traces that others write.

    Attributes:
        columns: Of the time, the prompt's tokens and the output's.
        marks: Columns that it is told by, beside those.
        unit: Of its times; None where files of these columns differ.
    """

    columns: tuple[str, str, str]
    marks: tuple[str, ...] = ()
    unit: str | None = "s"


_MOONCAKE = ("timestamp", "input_length", "output_length")
_FOREIGN = {
    "azure": _Format(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), unit=None),
    "burstgpt": _Format(("Timestamp", "Request tokens", "Response tokens")),
    "vllm-bench": _Format(VLLM_BENCH),
    "qwen": _Format(_MOONCAKE, ("chat_id", "turn")),
    "mooncake": _Format(_MOONCAKE, unit=None),
}
FORMATS = ("deltaworks", *_FOREIGN)


@dataclass(frozen=True)
class Trace:
    """Requests in order of time.

    Attributes:
        arrival_s: Seconds since the start, (n,) float64; a foreign trace, and one with dates, starts at 0.
        adapter: Name of each request's adapter, "" for the base model; None where the trace has no adapters.
        prompt: Prompt tokens, (n,) int64.
        output: Output tokens, (n,) int64.
        notes: What a user should know of how it was read.
    """

    arrival_s: F64
    adapter: tuple[str, ...] | None
    prompt: I64
    output: I64
    notes: tuple[str, ...] = ()

    @cached_property
    def by_adapter(self) -> dict[str, I64]:
        """The places of each adapter's requests in order of time, (requests of the adapter,) int64, by its name."""
        codes: dict[str, int] = {}
        named = np.array([codes.setdefault(name, len(codes)) for name in self.adapter or ()], np.int64)
        order = np.argsort(named, kind="stable")
        ends = np.cumsum(np.bincount(named, minlength=len(codes)))
        return dict(zip(codes, np.split(order, ends[:-1]), strict=True)) if codes else {}


def read_trace(path: Path, form: str | None = None, unit: str | None = None) -> Trace:
    """Read a trace from a file of `trace_rows`' kinds.

    Args:
        path: The file.
        form: One of `FORMATS`; None to find it out by the columns.
        unit: Of its times, one of `trace_times.UNITS`; None to find it out.

    Raises:
        WorkloadError: it cannot be read, has no known columns, or a row is malformed; the row is named.
    """
    return trace_of(rows_of(path), str(path), form, unit)


def trace_of(rows: Iterable[Mapping[str, Any]], where: str, form: str | None = None, unit: str | None = None) -> Trace:
    """The trace in rows of named columns, as `read_trace` reads them from a file.

    Raises:
        WorkloadError: there is none, or no known columns, or a row is malformed.
    """
    if form is not None and form not in FORMATS:
        raise WorkloadError(
            f"{where}: the trace format {quoted(form)} is not one of {', '.join(FORMATS)}{did_you_mean(form, FORMATS)}"
        )
    if unit is not None and (not isinstance(unit, str) or unit not in trace_times.UNITS):
        raise WorkloadError(f"{where}: the unit {quoted(unit)} is not one of {', '.join(trace_times.UNITS)}")
    columns = _Columns(where, form)
    for index, row in enumerate(rows, 1):
        columns.add(index, row)
    return columns.trace(unit)


class _Columns:
    """The columns of a trace, as its rows are read."""

    def __init__(self, where: str, form: str | None) -> None:
        self._where, self._form, self._asked_for = where, form, form
        self._names: dict[str, str] = {}
        self._first: frozenset[str] = frozenset()
        self._numbers, self._dates = array("d"), array("q")
        self._prompt, self._output = array("q"), array("q")
        self._adapter: list[str] = []
        self._known: dict[str, str] = {}

    def add(self, index: int, row: Any) -> None:
        """Add the row of a request; the first has number 1."""
        where = f"{self._where}: request {index} is malformed"
        if not isinstance(row, Mapping):
            raise WorkloadError(f"{where}: expected columns and values, not {quoted(row)}")
        if index == 1:
            self._set_up(row)
        if index > MAX_REQUESTS:
            raise WorkloadError(f"{self._where}: the trace has more than {MAX_REQUESTS:,} requests; split it")
        names = self._names
        try:
            at = trace_times.instant(row[names["time"]])
            # A date is a whole number: a trace has either, or half of its times would mean something else.
            (self._numbers if isinstance(at, float) else self._dates).append(at)  # type: ignore[arg-type]
            self._prompt.append(_tokens(row[names["prompt"]]))
            self._output.append(_tokens(row[names["output"]]))
            if "adapter" in names:
                self._adapter.append(self._name(row[names["adapter"]]))
        except KeyError as error:
            raise WorkloadError(f"{where}: it has no {error}") from None
        except (TypeError, ValueError, OverflowError) as error:
            raise WorkloadError(f"{where}: {error}") from None
        if self._numbers and self._dates:
            raise WorkloadError(f"{where}: the trace's times are dates in some requests and numbers in others")
        if self._form == "deltaworks" and min(self._prompt[-1], self._output[-1]) < 1:
            raise WorkloadError(
                f"{self._where}: every request needs a prompt and an output of at least one token; request {index} has"
                " not"
            )

    def _set_up(self, row: Mapping[Any, Any]) -> None:
        self._first = frozenset(str(name) for name in row)
        if self._form is None:
            told = (f for f, kind in _FOREIGN.items() if {*kind.columns, *kind.marks} <= self._first)
            self._form = next(told, "deltaworks")
            if self._form == "deltaworks":
                _check_foreign(self._first, self._where)
        if self._form == "deltaworks":
            self._names = _own_columns(row, self._where)
            return
        self._names = dict(zip(_NEEDED, _FOREIGN[self._form].columns, strict=True))
        # "model" is the base model's name there, if anything.
        named = next((n for n in FIELDS["adapter"] if n in self._first and n != "model"), None)
        if named:
            self._names["adapter"] = named

    def _name(self, raw: Any) -> str:
        """An adapter's name, "" for the base model; the same text for the same name."""
        if raw is None:
            return ""
        if isinstance(raw, bool) or not isinstance(raw, str | int):
            raise ValueError(f"{quoted(raw)} is not an adapter's name")  # noqa: TRY004  # one error for all such rows
        name = str(raw)
        if name not in self._known:
            if len(name) > MAX_TEXT:
                raise ValueError(f"an adapter's name has {len(name):,} characters; at most {MAX_TEXT:,} are taken")
            if SURROGATE.search(name):
                raise ValueError(f"the adapter's name {quoted(name)} has half of a surrogate pair")
            if has_controls(name):
                raise ValueError(f"the adapter's name {quoted(name)} holds a control character or a line break")
            self._known[name] = name
        return self._known[name]

    def trace(self, unit: str | None) -> Trace:
        """The trace of the rows so far."""
        if not self._prompt:
            raise WorkloadError(f"{self._where}: there are no requests in it")
        at, notes = self._arrivals(unit)
        prompt, output = np.frombuffer(self._prompt, np.int64), np.frombuffer(self._output, np.int64)
        served = (prompt > 0) & (output > 0)
        if not served.all():
            failed = int(served.size - served.sum())
            said = counted(
                failed, "request without tokens, which failed, is", "requests without tokens, which failed, are"
            )
            notes.append(f"{self._where}: {said} left out")
            if failed == served.size:
                raise WorkloadError(f"{self._where}: no request in it has a prompt and an output")
        if "hash_ids" in self._first:
            notes.append(f"{self._where}: its hash_ids are not used: prefix caching is not modelled")
        order = np.argsort(at, kind="stable")
        order = order[served[order]]
        named = tuple(self._adapter[i] for i in order) if self._adapter else None
        return Trace(at[order], named, prompt[order], output[order], tuple(notes))

    def _arrivals(self, unit: str | None) -> tuple[F64, list[str]]:
        """Seconds since the start, (n,) float64, in the order of rows, and what to remark on them."""
        if self._dates:
            return trace_times.from_dates(np.frombuffer(self._dates, np.int64)), []
        values, own, notes = np.frombuffer(self._numbers), self._form == "deltaworks", []
        kind = None if own else _FOREIGN[str(self._form)]
        if unit is None and (kind.unit is None if kind else self._names["time"] in _UNIT_NOT_SAID):
            if self._asked_for == "mooncake":
                unit = trace_times.epoch_unit(values) or "ms"
            else:
                unit, note = trace_times.guess_unit(values, self._where)
                notes += [note] if note else []
        unit = unit or trace_times.epoch_unit(values) or "s"
        if values.min() < 0:
            raise WorkloadError(f"{self._where}: times must not be negative")
        return trace_times.seconds(values, unit, shifted=not own), notes


def zipf_shares(count: int, exponent: float) -> F64:
    """Shares of adapters whose popularity falls with their place: (count,) float64, summing to 1."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def _own_columns(row: Mapping[Any, Any], where: str) -> dict[str, str]:
    found = {}
    for field, names in FIELDS.items():
        given = [name for name in names if name in row and not _is_content(name, row[name])]
        if len(given) > 1:
            raise WorkloadError(
                f"{where}: the columns {given[0]!r} and {given[1]!r} both give the {field}; remove or rename one"
            )
        if given:
            found[field] = given[0]
            continue
        for column in map(str, row):
            # "Model" is mostly the base model.
            meant = next((n for n in names if n != "model" and n.casefold() == column.strip().casefold()), None)
            if meant is not None and column not in names:
                raise WorkloadError(f"{where}: the column {quoted(column)} is unknown; write it as {meant!r}")
        if field != "adapter":
            listed = ", ".join(str(column)[:MAX_TEXT] for column in list(row)[:20])
            raise WorkloadError(
                f"{where}: no column for the {field}; expected {names[0]!r} among {one_line(listed, 200)}"
            )
    return found


def _is_content(column: str, value: Any) -> bool:
    """Whether a column that may give a number of tokens holds the text of a prompt or an output instead."""
    if column not in ("prompt", "output") or not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _check_foreign(columns: frozenset[str], where: str) -> None:
    """Refuse columns of a known format that have spaces around their names, which CSV takes for a part of them."""
    by_name = {column.strip(): column for column in columns}
    for kind in _FOREIGN.values():
        spaced = [by_name[name] for name in kind.columns if by_name.get(name, name) != name]
        if spaced and by_name.keys() >= set(kind.columns):
            raise WorkloadError(
                f"{where}: the column {quoted(spaced[0])} is unknown; write it as {spaced[0].strip()!r}"
            )


def _tokens(raw: Any) -> int:
    if isinstance(raw, bool):
        raise ValueError(f"{raw} is not a number of tokens")  # noqa: TRY004  # one error for all such rows
    try:
        value = float(raw)
        fine = value == int(value)
    except (TypeError, ValueError, OverflowError):
        fine = False
    if not fine:
        raise ValueError(f"{quoted(raw)} is not a number of tokens")
    if not 0 <= value <= MAX_TOKENS:
        raise ValueError(f"{quoted(raw)} tokens are not between 0 and {MAX_TOKENS:,}")
    return int(value)
