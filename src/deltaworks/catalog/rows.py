"""The tables of the catalog's database, and checksums of their rows.

SQLite checks the structure of its file and not what is in it: a flipped bit in the text of a row would be believed.
Every row that a merge depends on therefore carries a checksum of its other columns.
"""

import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from blake3 import blake3

SCHEMA_VERSION: Final = 3
_OLDEST_VERSION: Final = 2

SCHEMA: Final = """
CREATE TABLE models(
    name TEXT PRIMARY KEY, kind TEXT NOT NULL, source TEXT NOT NULL, path TEXT NOT NULL, base TEXT,
    base_is_declared INTEGER NOT NULL, fingerprint TEXT NOT NULL, shards TEXT NOT NULL, tensors TEXT NOT NULL,
    config TEXT NOT NULL, registered_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
) STRICT;
CREATE TABLE analyses(
    expert TEXT NOT NULL, base TEXT NOT NULL, block_size INTEGER NOT NULL, file TEXT NOT NULL, summary TEXT NOT NULL,
    analyzed_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, PRIMARY KEY (expert, base)
) STRICT;
CREATE TABLE cuts(
    expert TEXT NOT NULL, base TEXT NOT NULL, tensor TEXT NOT NULL, keep INTEGER NOT NULL,
    cut TEXT NOT NULL, PRIMARY KEY (expert, base, tensor, keep)
) STRICT;
CREATE TABLE storages(
    device TEXT PRIMARY KEY, request_s REAL NOT NULL, bytes_per_s REAL NOT NULL,
    measured_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
) STRICT;
CREATE TABLE plans(
    digest TEXT PRIMARY KEY, content TEXT NOT NULL, made_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
) STRICT;
CREATE TABLE snapshots(
    path TEXT PRIMARY KEY, plan_digest TEXT NOT NULL, manifest TEXT NOT NULL,
    committed_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
) STRICT;
"""
"""As of version 2."""

_STAGINGS: Final = """
CREATE TABLE stagings(
    path TEXT PRIMARY KEY, out TEXT NOT NULL, plan_digest TEXT NOT NULL, replaces TEXT,
    started_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP
) STRICT;
"""

CHECKED: Final[Mapping[str, tuple[str, ...]]] = {
    "models": (
        "name", "kind", "source", "path", "base", "base_is_declared", "fingerprint", "shards", "tensors", "config",
    ),
    "analyses": ("expert", "base", "block_size", "file", "summary"),
    "cuts": ("expert", "base", "tensor", "keep", "cut"),
    "storages": ("device", "request_s", "bytes_per_s"),
    "plans": ("digest", "content"),
    "snapshots": ("path", "plan_digest", "manifest"),
}  # fmt: skip
"""The columns under each table's checksum; the leading columns identify a row in messages."""

NAMED_BY: Final[Mapping[str, int]] = {"analyses": 2, "cuts": 4}
"""Number of leading columns that identify a row, for tables where it is more than one."""

Value = str | int | float | None


def checksum(table: str, values: Sequence[Value]) -> str:
    """The checksum of a row: the first 64 bits of a BLAKE3, in hex."""
    hasher = blake3(table.encode())
    for value in values:
        text = (value if isinstance(value, str) else repr(value)).encode("utf-8", "surrogatepass")
        hasher.update(f"\0{type(value).__name__} {len(text)} ".encode())
        hasher.update(text)
    return hasher.hexdigest()[:16]


def is_sound(table: str, row: Sequence[Value]) -> bool:
    """Whether a row, of which the last column is the checksum, is what was written."""
    return checksum(table, row[:-1]) == row[-1]


def columns(table: str) -> str:
    """The columns of a checked row, as SQL."""
    return ", ".join((*CHECKED[table], "checksum"))


def update_schema(db: sqlite3.Connection) -> int:
    """Bring a database to the present schema, inside of a transaction; one of an unknown version stays as it is.

    Rows of version 2 had no checksums: what they hold now is taken as right.

    Returns:
        The version that the database has then.

    Raises:
        sqlite3.Error: it cannot be read or written.
    """
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version == 0:
        for statement in filter(str.strip, SCHEMA.split(";")):
            db.execute(statement)
        version = _OLDEST_VERSION
    if version == _OLDEST_VERSION:
        db.execute(_STAGINGS)
        for table in CHECKED:
            db.execute(f"ALTER TABLE {table} ADD COLUMN checksum TEXT NOT NULL DEFAULT ''")
            names = ", ".join(CHECKED[table])
            rows = db.execute(f"SELECT rowid, {names} FROM {table}").fetchall()  # noqa: S608  # constants
            db.executemany(
                f"UPDATE {table} SET checksum = ? WHERE rowid = ?",  # noqa: S608  # constants
                [(checksum(table, row[1:]), row[0]) for row in rows],
            )
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        version = SCHEMA_VERSION
    return version


def damaged_rows(
    db: sqlite3.Connection, parses: Callable[[str, Sequence[Any]], bool]
) -> Iterator[tuple[str, int, str]]:
    """Find the damaged rows: those whose checksum differs, and those that do not parse in spite of it.

    A row that was damaged before its table had checksums has a checksum that matches.

    Args:
        db: the database.
        parses: given a table and the values of a row without its checksum, whether the row can be read.

    Yields:
        Table, rowid and name of each damaged row.

    Raises:
        sqlite3.Error: the database cannot be read.
    """
    for table in CHECKED:
        for rowid, *row in db.execute(f"SELECT rowid, {columns(table)} FROM {table}").fetchall():  # noqa: S608
            if not (is_sound(table, row) and parses(table, row[:-1])):
                yield table, rowid, row_name(table, row)


def row_name(table: str, row: Sequence[Value]) -> str:
    """What messages call a row: its key, shortened."""
    return f"{table}({', '.join(str(v)[:60] for v in row[: NAMED_BY.get(table, 1)])})"
