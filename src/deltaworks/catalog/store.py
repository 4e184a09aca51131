"""The catalog: one SQLite file for entities, one Parquet file an analyzed expert beside it."""

import json
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from deltaworks.catalog.cells import parse_cut, parse_manifest, parse_model, parse_object, row_parses
from deltaworks.catalog.database import connect, copy_to_memory
from deltaworks.catalog.models import Model
from deltaworks.catalog.rows import (
    CHECKED,
    SCHEMA_VERSION,
    Value,
    checksum,
    columns,
    damaged_rows,
    is_sound,
    row_name,
    update_schema,
)
from deltaworks.errors import CatalogError, DeltaworksError

_DATABASE = "catalog.sqlite"
KEPT = ".files"
"""Suffix of the folder that keeps the small files of an expert beside its layers."""

TABLE = ".table"
"""Ending of what planning reads of statistics; see `tables`."""


def default_path() -> Path:
    """Where the catalog is unless told otherwise: `DELTAWORKS_CATALOG`, or the user's data folder."""
    if chosen := os.environ.get("DELTAWORKS_CATALOG"):
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "deltaworks"


def is_catalog(path: Path) -> bool:
    """Whether a folder holds a catalog; to open one makes it."""
    return (path / _DATABASE).is_file()


class Catalog:
    """An open catalog. Several processes may use one at once; one object belongs to one thread.

    Args:
        path: its folder.
        only_reads: see `to_read`.

    Attributes:
        path: its folder.
        is_copy: whether what is written is lost; see `to_read`.

    Raises:
        CatalogError: the folder cannot be used, or was written by another version.
    """

    def __init__(self, path: Path | None = None, only_reads: bool = False) -> None:
        self.path, self.is_copy = path or default_path(), False
        try:
            self._db = self._open(only_reads=only_reads)
            version = self._update_schema()
        except (OSError, sqlite3.Error) as error:
            raise CatalogError(
                f"cannot use {self.path} as a catalog: {error}; choose another with --catalog"
            ) from error
        if version != SCHEMA_VERSION:
            self._db.close()
            raise CatalogError(
                f"the catalog at {self.path} has schema {version}, this deltaworks reads {SCHEMA_VERSION};"
                " choose another with --catalog"
            )

    @classmethod
    def to_read(cls, path: Path | None = None) -> Self:
        """Open a catalog for a command that need not write.

        A folder without a catalog reads as an empty one and is not touched; of a catalog that cannot be written, a copy
        in memory is read.

        Raises:
            CatalogError: the folder cannot be read, or was written by another version.
        """
        return cls(path, True)

    @property
    def database(self) -> Path:
        """The database file."""
        return self.path / _DATABASE

    def _open(self, *, only_reads: bool) -> sqlite3.Connection:
        if only_reads and not is_catalog(self.path):
            with suppress(FileNotFoundError):
                os.listdir(self.path)  # noqa: PTH208  # a file in its place, or a folder that may not be entered, is an error
            self.is_copy = True
            return connect(":memory:")
        try:
            (self.path / "statistics").mkdir(parents=True, exist_ok=True)
            db = connect(str(self.database))
            db.execute("PRAGMA journal_mode = WAL")
            if not only_reads:  # what cannot be written is refused before any work
                db.execute("BEGIN IMMEDIATE")
                db.execute("ROLLBACK")
            is_usable = not only_reads or db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
        except (OSError, sqlite3.Error):
            if not only_reads:
                raise
            is_usable = False
        if is_usable:
            return db
        self.is_copy = True
        return copy_to_memory(self.database)

    def _update_schema(self) -> int:
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version == SCHEMA_VERSION:  # most often; a reader does not wait for writers then
            return version
        with self.transaction():
            return update_schema(self._db)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside happen, or none. One inside another is part of that.

        Raises:
            DeltaworksError: the database is locked or cannot be written.
        """
        if self._is_in_transaction():
            yield
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._is_in_transaction():  # some errors, such as a full disk, end it
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as error:
            raise self._failure("written", error) from error

    def _is_in_transaction(self) -> bool:
        return self._db.in_transaction

    def _rows(self, statement: str, *values: Value) -> list[tuple[Any, ...]]:
        """All rows that a query finds.

        Raises:
            CatalogError: the database is damaged.
            DeltaworksError: it cannot be read.
        """
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._failure("read", error) from error

    def _write(self, statement: str, rows: Iterable[Sequence[Value]]) -> None:
        """Execute a statement for each of some rows, all or none.

        Raises:
            DeltaworksError: the database cannot be written.
        """
        try:
            with self.transaction():
                self._db.executemany(statement, rows)
        except sqlite3.Error as error:
            raise self._failure("written", error) from error

    def _failure(self, what: str, error: sqlite3.Error) -> DeltaworksError:
        if isinstance(error, sqlite3.OperationalError):
            return DeltaworksError(f"the catalog {self.database} cannot be {what}: {error}")
        return CatalogError(
            f"the catalog {self.database} is damaged: {error}; move it away and register the models again,"
            " or choose another with --catalog"
        )

    def _save(self, table: str, *rows: Sequence[Value]) -> None:
        """Add or replace rows of a table, each with its checksum."""
        marks = ", ".join("?" * (len(CHECKED[table]) + 1))
        self._write(
            f"REPLACE INTO {table}({columns(table)}) VALUES ({marks})",  # noqa: S608  # constants
            [(*row, checksum(table, row)) for row in rows],
        )

    def _sound(self, table: str, where: str = "", *values: Value) -> list[tuple[Any, ...]]:
        """The rows of a table that are what was written, without their checksums; the others are left out."""
        found = self._rows(f"SELECT {columns(table)} FROM {table} {where}", *values)  # noqa: S608  # constants
        return [row[:-1] for row in found if is_sound(table, row)]

    def damaged(self) -> list[str]:
        """The names of the damaged rows."""
        return [name for _, _, name in self._damaged()]

    def drop_damaged(self) -> list[str]:
        """Delete the damaged rows, all or none; returns their names."""
        with self.transaction():
            found = self._damaged()
            for table, rowid, _ in found:
                self._write(f"DELETE FROM {table} WHERE rowid = ?", [(rowid,)])  # noqa: S608  # a constant
        return [name for _, _, name in found]

    def _damaged(self) -> list[tuple[str, int, str]]:
        try:
            return list(damaged_rows(self._db, row_parses))
        except sqlite3.Error as error:
            raise self._failure("read", error) from error

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Models

    def save_model(self, model: Model) -> None:
        """Add or replace `model`."""
        checkpoint = model.checkpoint
        self._save(
            "models",
            (
                model.name,
                model.kind.value,
                model.source,
                str(checkpoint.path),
                model.base,
                int(model.base_is_declared),
                model.fingerprint,
                json.dumps([asdict(s) for s in checkpoint.shards]),
                json.dumps(
                    [[t.name, t.dtype.name, t.shape, t.file, t.offset, t.nbytes] for t in checkpoint.tensors.values()]
                ),
                json.dumps([checkpoint.config, checkpoint.config_file and asdict(checkpoint.config_file)]),
            ),
        )

    def models(self) -> list[Model]:
        """Every model, in the order of registration.

        Raises:
            CatalogError: a row is damaged.
        """
        return self._models("ORDER BY registered_at, rowid")

    def find(self, name: str) -> Model | None:
        """The model called `name`, if there is one.

        Raises:
            CatalogError: its row is damaged.
        """
        return next(iter(self._models("WHERE name = ?", name)), None)

    def find_path(self, path: Path) -> Model | None:
        """The model registered from the folder `path`, if there is one.

        Raises:
            CatalogError: its row is damaged.
        """
        return next(iter(self._models("WHERE path = ?", str(path))), None)

    def _models(self, where: str, *values: Value) -> list[Model]:
        found = self._rows(f"SELECT {columns('models')} FROM models {where}", *values)  # noqa: S608  # constants
        models = []
        for row in found:
            model = parse_model(row[:-1]) if is_sound("models", row) else None
            if model is None:
                raise CatalogError(
                    f"the row {row_name('models', row)} of {self.database} is damaged; drop it with `deltaworks gc`"
                    " and register that model again"
                )
            models.append(model)
        return models

    def names(self) -> list[str]:
        """The names in use."""
        return [row[0] for row in self._rows("SELECT name FROM models ORDER BY rowid")]

    # Analyses

    def statistics_file(self, expert: str, base: str) -> Path:
        """Where the statistics of the delta between two fingerprints are kept."""
        return self.path / "statistics" / f"{expert[:24]}-{base[:24]}.parquet"

    def table_file(self, expert: str, base: str) -> Path:
        """Where what planning reads of those statistics is kept unpacked, from the first plan on."""
        return self.statistics_file(expert, base).with_suffix(TABLE)

    def layers_file(self, expert: str, base: str) -> Path:
        """Where the layers of the delta between two fingerprints are kept, once they are built."""
        return self.path / "layers" / f"{expert[:24]}-{base[:24]}.layers"

    def kept_files(self, expert: str) -> Path | None:
        """The folder of the small files of an expert (a fingerprint) of which layers are kept; None where none are."""
        for file in (self.path / "layers").glob(f"{expert[:24]}-*.layers"):
            if file.with_suffix(KEPT).is_dir():
                return file.with_suffix(KEPT)
        return None

    def save_analysis(self, expert: str, base: str, block_size: int, file: Path, summary: dict[str, Any]) -> None:
        """Record that the statistics of the delta `expert` minus `base` (fingerprints) stand in `file`."""
        with self.transaction():
            self._save("analyses", (expert, base, block_size, file.name, json.dumps(summary)))
            self._write("DELETE FROM cuts WHERE expert = ? AND base = ?", [(expert, base)])

    def find_analysis(self, expert: str, base: str) -> tuple[int, Path, dict[str, Any]] | None:
        """Block size, statistics file and summary of an analyzed delta.

        None where it is not analyzed, or the row that says so is damaged: then it is to be analyzed again.
        """
        for _, _, block_size, name, summary in self._sound("analyses", "WHERE expert = ? AND base = ?", expert, base):
            file = self.path / "statistics" / name
            if file.is_file():
                found = parse_object(summary)
                return None if found is None else (block_size, file, found)
        return None

    def save_cuts(self, expert: str, base: str, cuts: Mapping[tuple[str, int], Sequence[int]]) -> None:
        """Remember packed trim cuts, each under its tensor and number of kept elements."""
        rows = ((expert, base, tensor, keep, json.dumps(cut)) for (tensor, keep), cut in cuts.items())
        self._save("cuts", *rows)

    def find_cuts(self, expert: str, base: str) -> dict[tuple[str, int], list[int]]:
        """Every remembered cut of a delta, packed, by tensor and number of kept elements; no damaged ones."""
        rows = self._sound("cuts", "WHERE expert = ? AND base = ?", expert, base)
        parsed = {(tensor, keep): parse_cut(cut) for _, _, tensor, keep, cut in rows}
        return {key: cut for key, cut in parsed.items() if cut is not None}

    # Storages

    def save_storage(self, device: str, request_s: float, bytes_per_s: float) -> None:
        """Remember what reading costs on a storage."""
        self._save("storages", (device, request_s, bytes_per_s))

    def find_storage(self, device: str) -> tuple[float, float] | None:
        """Seconds a request and bytes a second of a storage; None where it was not measured, or its row is damaged."""
        return next((row[1:] for row in self._sound("storages", "WHERE device = ?", device)), None)

    # Servers

    def twin_runs(self, profile: str) -> Path:
        """The folder for runs of the digital twin that a surrogate of a profile (its digest) learns from."""
        return self.path / "twin" / profile

    @property
    def surrogates(self) -> Path:
        """The folder of surrogates that were trained here, by the digest of their profile."""
        return self.path / "surrogates"

    # Plans and snapshots

    def save_plan(self, digest: str, content: str) -> None:
        """Keep a plan's text under its digest."""
        self._save("plans", (digest, content))

    def has_plan(self, digest: str) -> bool:
        """Whether the text of the plan with this digest is kept."""
        return bool(self._sound("plans", "WHERE digest = ?", digest))

    def find_plans(self, prefix: str) -> list[str]:
        """The text of every plan whose digest begins with `prefix`."""
        return [row[1] for row in self._sound("plans", "WHERE substr(digest, 1, ?) = ?", len(prefix), prefix)]

    def unused_plans(self, without: Collection[Path] = ()) -> list[tuple[str, int]]:
        """Digest and bytes of every plan that no recorded snapshot and no unfinished merge was made by.

        Args:
            without: folders of snapshots that do not count.
        """
        return self._rows(
            "SELECT digest, length(CAST(content AS BLOB)) FROM plans WHERE digest NOT IN"
            " (SELECT plan_digest FROM snapshots WHERE path NOT IN (SELECT value FROM json_each(?))"
            " UNION SELECT plan_digest FROM stagings) ORDER BY made_at, digest",
            json.dumps([str(path) for path in without]),
        )

    def drop_unused_plans(self) -> list[tuple[str, int]]:
        """Delete the plans that `unused_plans` finds, and give the space to the file system.

        Returns:
            Digest and bytes of each.

        Raises:
            DeltaworksError: the database cannot be written.
        """
        with self.transaction():
            found = self.unused_plans()
            self._write("DELETE FROM plans WHERE digest = ?", [(digest,) for digest, _ in found])
        try:
            self._db.execute("VACUUM")
        except sqlite3.Error as error:
            raise self._failure("written", error) from error
        return found

    def save_snapshot(self, path: Path, plan_digest: str, manifest: dict[str, Any], when: float | None = None) -> None:
        """Record a committed merged model; what was begun for it is finished then.

        Args:
            path: its folder.
            plan_digest: of the plan it was made by.
            manifest: its manifest.
            when: it was committed, in seconds since 1970; None for now.
        """
        with self.transaction():
            self._save("snapshots", (str(path), plan_digest, json.dumps(manifest)))
            if when is not None:
                self._write(
                    "UPDATE snapshots SET committed_at = datetime(?, 'unixepoch') WHERE path = ?", [(when, str(path))]
                )
            self._write("DELETE FROM stagings WHERE out = ?", [(str(path),)])

    def drop_snapshots(self, paths: Iterable[Path]) -> None:
        """Forget merged models, given by their folders.

        Raises:
            DeltaworksError: the database cannot be written.
        """
        self._write("DELETE FROM snapshots WHERE path = ?", [(str(path),) for path in paths])

    def snapshots(self) -> list[tuple[Path, str, dict[str, Any], str]]:
        """Path, plan digest, manifest and time of every committed snapshot, newest last.

        Raises:
            CatalogError: a row is damaged.
        """
        rows = self._rows(
            f"SELECT committed_at, {columns('snapshots')} FROM snapshots ORDER BY committed_at, rowid"  # noqa: S608
        )
        manifests = [parse_manifest(row[3]) for row in rows]
        for (_, *row), manifest in zip(rows, manifests, strict=True):
            if not is_sound("snapshots", row) or manifest is None:
                raise CatalogError(
                    f"the row {row_name('snapshots', row)} of {self.database} is damaged; drop it with `deltaworks gc`"
                    " and enter that merged model again: deltaworks verify OUT"
                )
        return [
            (Path(path), digest, manifest, when)
            for (when, path, digest, *_), manifest in zip(rows, manifests, strict=True)
            if manifest is not None
        ]

    # Merges that are not finished

    def begin_staging(self, path: Path, out: Path, plan_digest: str, replaces: str | None = None) -> None:
        """Record the folder in which a merge builds what will appear at `out`.

        Args:
            path: the folder.
            out: the output.
            plan_digest: of the plan that is executed.
            replaces: the identity of what stands at `out` and is to change places with the folder.
        """
        self._write(
            "REPLACE INTO stagings(path, out, plan_digest, replaces) VALUES (?, ?, ?, ?)",
            [(str(path), str(out), plan_digest, replaces)],
        )

    def end_staging(self, path: Path) -> None:
        """Forget a folder in which a merge was building."""
        self._write("DELETE FROM stagings WHERE path = ?", [(str(path),)])

    def stagings(self) -> list["Staged"]:
        """Every merge that was begun and is not recorded as finished."""
        rows = self._rows("SELECT path, out, plan_digest, replaces FROM stagings ORDER BY started_at, rowid")
        return [Staged(Path(path), Path(out), digest, replaces) for path, out, digest, replaces in rows]


class Staged(NamedTuple):
    """A merge that was begun; see `Catalog.begin_staging`."""

    path: Path
    out: Path
    plan_digest: str
    replaces: str | None
