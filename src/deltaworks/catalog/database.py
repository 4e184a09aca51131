"""Connections to the catalog's database, and copies of one that cannot be written."""

import errno
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from deltaworks.errors import quoted

_ATTEMPTS = 5
"""How often a database that cannot be locked is copied until no process wrote it meanwhile."""


class _Connection(sqlite3.Connection):
    """A connection that reports errors of a damaged schema as SQLite's, whatever bytes they quote."""

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        """As `sqlite3.Connection.execute`.

        Raises:
            sqlite3.Error: the statement failed.
        """
        try:
            return super().execute(sql, parameters)
        except UnicodeDecodeError as error:
            # SQLite's message quotes the schema as it is; where that is not UTF-8, Python cannot make its exception.
            text = error.object.decode("utf-8", "backslashreplace")
            raise sqlite3.DatabaseError(quoted(text)) from error


def connect(database: str) -> sqlite3.Connection:
    """Open a database: a path, ``:memory:`` or a ``file:`` URI.

    Raises:
        sqlite3.Error: it cannot be opened.
    """
    is_uri = database.startswith("file:")
    db = sqlite3.connect(database, timeout=60, isolation_level=None, uri=is_uri, factory=_Connection)
    # Text that is damaged is found by its checksum, which names the row.
    db.text_factory = lambda raw: raw.decode("utf-8", "replace")
    return db


def copy_to_memory(database: Path) -> sqlite3.Connection:
    """Copy a database that cannot be written to memory, with the rows that are in its write-ahead log only.

    Raises:
        OSError: it cannot be copied, or is being written.
        sqlite3.Error: it cannot be read.
    """
    copy = connect(":memory:")
    where = f"file:{quote(str(database.resolve()))}"
    try:
        with closing(connect(f"{where}?mode=ro")) as db:
            db.backup(copy)
    except sqlite3.OperationalError:
        # Even to read a database that has a log, SQLite makes files beside it, unless it is told that nobody writes.
        # Then it ignores the log, which holds the latest rows. With a log, copies of both files are read instead.
        log = database.with_name(f"{database.name}-wal")
        if log.is_file() and log.stat().st_size:
            _copy_with_log(database, log, copy)
        else:
            with closing(connect(f"{where}?immutable=1")) as db:
                db.backup(copy)
    return copy


def _copy_with_log(database: Path, log: Path, copy: sqlite3.Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(_ATTEMPTS):
            before = _state(database, log)
            for file in (database, log):
                shutil.copyfile(file, Path(folder) / file.name)
            if _state(database, log) == before:
                with closing(connect(str(Path(folder) / database.name))) as db:
                    db.backup(copy)
                return
    raise OSError(errno.EBUSY, "it is being written and cannot be locked; try again later", str(database))


def _state(*files: Path) -> list[tuple[int, int, int]]:
    """Inode, size and time of modification of some files."""
    return [(s.st_ino, s.st_size, s.st_mtime_ns) for s in (f.stat() for f in files)]
