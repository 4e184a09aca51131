"""Measurement tables: rows of numbers from CSV or JSON lines, with every column accounted for."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaworks.documents import decoded, json_values, read_bytes
from deltaworks.errors import ProfileError, WorkloadError, did_you_mean, quoted
from deltaworks.serving.profile import check_max_rank
from deltaworks.serving.schema import MAX_NUMBER
from deltaworks.serving.trace_rows import csv_rows

TABLES = {
    "steps": ("step_ms", "decode", "prefill", "context", "adapters", "slots", "max_rank", "skipped"),
    "kv_cache": ("slots", "max_rank", "kv_tokens"),
    "scheduler": ("scheduler_ms", "running", "skipped"),
    "loads": ("load_ms", "source", "rank"),
    "first_tokens": ("ttft_ms", "prefill", "adapters", "slots", "max_rank"),
}
"""The tables of a folder, and their columns. The first column of each table is required, and so is ``kv_tokens``."""

MAX_ROWS = 100_000
_WHAT = "a table"
ABOUT_FILE = "about.yaml"
"""The file that names the engine, model and GPU."""

RUNS_FILE = "runs.jsonl"
"""The file of recorded runs."""

_SUFFIXES = (".csv", ".jsonl")
_NOISE = 1.02
"""How much more KV tokens a server may report with more slots: vLLM measures what memory is left."""
_ALIKE = 0.65
_SOURCES = ("memory", "disk")


@dataclass(frozen=True)
class Table:
    """A measurement table.

    Attributes:
        name: One of `TABLES`.
        file: Its file, for errors; None where there is none.
        rows: Numbers by column, 0 where a column or a cell is missing; ``source`` is text, and ``kv_tokens`` is NaN
            where a cell is empty.
        missing: Columns that it could have and has not.
        unused: Columns that it has and that mean nothing here.
    """

    name: str
    file: Path | None
    rows: list[dict[str, Any]]
    missing: tuple[str, ...]
    unused: tuple[str, ...] = ()

    def why_missing(self, column: str) -> str:
        """Why nothing is known of a column's cost; empty where the column is there."""
        if self.file is None:
            return f"there is no {self.name}.csv"
        return f"{self.file.name} has no column {column!r}" if column in self.missing else ""


def read_table(folder: Path, name: str) -> Table:
    """The table of a name in a folder.

    Raises:
        ProfileError: it is malformed (the row is named), lacks its first column, or has a column that must be a
            misspelling of one it lacks.
    """
    columns = TABLES[name]
    there = [p for p in (folder / f"{name}.csv", folder / f"{name}.jsonl") if p.is_file()]
    if not there:
        return Table(name, None, [], columns)
    if len(there) > 1:
        raise ProfileError(f"{folder}: there are both {name}.csv and {name}.jsonl in it; remove one")
    path = there[0]
    content = read_bytes(path, _WHAT, ProfileError)
    if path.suffix == ".csv":
        raw = csv_rows(path, content, _WHAT, ProfileError)
    else:
        raw = json_values(decoded(content, str(path), _WHAT, ProfileError), str(path), _WHAT, ProfileError)
    rows: list[dict[str, Any]] = []
    present: dict[str, None] = {}
    for index, row in enumerate(raw, 1):
        if not isinstance(row, Mapping):
            raise ProfileError(f"{path}: row {index}: expected columns and values, not {quoted(row)}")
        if index > MAX_ROWS:
            raise ProfileError(f"{path}: there are more than {MAX_ROWS:,} rows in it")
        present |= dict.fromkeys(map(str, row))
        rows.append({column: _cell(row.get(column), column, f"{path}: row {index}") for column in columns})
    if not rows:
        return Table(name, path, [], columns)
    missing = tuple(column for column in columns if column not in present)
    unused = tuple(column for column in present if column not in columns)
    misspelt = [(column, hint) for column in unused if (hint := _meant(column, missing))]
    if misspelt:
        named = ", ".join(f"{quoted(column)} ({hint.removeprefix('; ')})" for column, hint in misspelt[:5])
        raise ProfileError(f"{path}: unknown columns: {named}")
    for column in (columns[0], "kv_tokens"):
        if column in missing:
            raise ProfileError(f"{path}: there is no column {column!r}; expected are {', '.join(columns)}")
    table = Table(name, path, rows, missing, unused)
    _check_rows(table)
    return table


def unknown_files(folder: Path, named: str) -> list[str]:
    """Files of a folder that could be tables, and that nothing reads: mostly misspelt ones.

    Args:
        folder: The folder of measurement tables.
        named: The text of the recorded runs: a file whose name occurs in it is taken for one that is read.
    """
    known = {f"{name}{suffix}" for name in TABLES for suffix in _SUFFIXES} | {ABOUT_FILE, RUNS_FILE}
    found = (p.name for p in folder.iterdir() if p.suffix in (*_SUFFIXES, ".yaml", ".yml", ".json"))
    return sorted(name for name in found if name not in known and name not in named)


def _order(row: Mapping[str, Any]) -> tuple[float, float]:
    """Where a row comes among others: those with fewer slots first, and of equally many those with more KV tokens."""
    tokens = row.get("kv_tokens", 0.0)
    return row.get("slots", 0.0), -tokens if tokens > 0 else 0.0


def _check_rows(table: Table) -> None:
    """Refuse rows that no server can have given.

    Raises:
        ProfileError: there are some; the row is named.
    """
    least: dict[float, tuple[float, int]] = {}
    for place, row in sorted(enumerate(table.rows, 1), key=lambda numbered: _order(numbered[1])):
        where, rank, slots = f"{table.file}: row {place}", row.get("max_rank", 0), row.get("slots", 0)
        if rank:
            try:
                check_max_rank(int(rank) if rank == int(rank) else rank)
            except WorkloadError as error:
                raise ProfileError(f"{where}: max_rank: {error}") from None
        if 0 < slots < row.get("adapters", 0):
            raise ProfileError(
                f"{where}: {row['adapters']:g} adapters cannot be in a batch of a server with {slots:g} slots"
            )
        tokens = row.get("kv_tokens", 0)
        if not tokens > 0:
            continue
        fewest, other = least.get(rank, (tokens, place))
        if tokens > fewest * _NOISE:
            raise ProfileError(
                f"{where}: {tokens:g} KV tokens with {slots:g} slots contradict the {fewest:g} of row {other}, which"
                " has fewer slots of the same rank; adapters take memory"
            )
        least[rank] = min((fewest, other), (tokens, place))


def _meant(column: str, missing: Collection[str]) -> str:
    """The end of an error about a column that is nearly one of those missing, or its abbreviation; else nothing.

    Columns such as ``notes`` or ``comment`` are like ``slots`` or ``context`` by chance, and are only noted.
    """
    abbreviated = next((name for name in missing if name[:1] == column[:1] and _is_within(column, name)), None)
    if abbreviated is not None:
        return f"; did you mean {abbreviated!r}?"
    return did_you_mean(column, missing, cutoff=_ALIKE)


def _is_within(short: str, name: str) -> bool:
    """Whether the letters of a text occur in another in the same order."""
    letters = iter(name)
    return len(short) > 1 and all(letter in letters for letter in short)


def _cell(raw: Any, column: str, where: str) -> Any:
    """A cell: a finite number of at least 0, and 0 where it is empty, but for two columns (see `Table`)."""
    if column == "source":
        if raw not in _SOURCES:
            raise ProfileError(f"{where}: source: expected {' or '.join(_SOURCES)}, not {quoted(raw)}")
        return raw
    if raw is None or raw == "":
        return math.nan if column == "kv_tokens" else 0.0
    try:
        value = float(raw) if not isinstance(raw, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        raise ProfileError(f"{where}: {column}: expected a number, not {quoted(raw)}") from None
    if not 0 <= value <= MAX_NUMBER:
        raise ProfileError(f"{where}: {column}: expected a number from 0 to {MAX_NUMBER:g}, not {quoted(raw)}")
    return value
