"""The catalog: one SQLite file for entities, one Parquet file an analyzed expert beside it."""

import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deltaworks.catalog.models import Kind, Model
from deltaworks.checkpoints.checkpoint import Checkpoint, ShardFile
from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.errors import CatalogError

SCHEMA_VERSION = 2

_SCHEMA = """
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
        path: its folder; made where it does not exist.

    Raises:
        CatalogError: the folder cannot be used, or was written by another version.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()
        try:
            (self.path / "statistics").mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path / _DATABASE, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            with self.transaction():
                version = self._db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                    version = SCHEMA_VERSION
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

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside happen, or none."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

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
        self._db.execute(
            f"REPLACE INTO models({_MODEL}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608  # a constant
            (
                model.name,
                model.kind,
                model.source,
                str(checkpoint.path),
                model.base,
                model.base_is_declared,
                model.fingerprint,
                json.dumps([asdict(s) for s in checkpoint.shards]),
                json.dumps(
                    [[t.name, t.dtype.name, t.shape, t.file, t.offset, t.nbytes] for t in checkpoint.tensors.values()]
                ),
                json.dumps([checkpoint.config, checkpoint.config_file and asdict(checkpoint.config_file)]),
            ),
        )

    def models(self) -> list[Model]:
        """Every model, in the order of registration."""
        rows = self._db.execute(f"SELECT {_MODEL} FROM models ORDER BY registered_at, rowid")  # noqa: S608  # a constant
        return [_model(row) for row in rows]

    def find(self, name: str) -> Model | None:
        """The model called `name`, if there is one."""
        row = self._db.execute(f"SELECT {_MODEL} FROM models WHERE name = ?", (name,)).fetchone()  # noqa: S608
        return _model(row) if row else None

    def find_path(self, path: Path) -> Model | None:
        """The model registered from the folder `path`, if there is one."""
        row = self._db.execute(f"SELECT {_MODEL} FROM models WHERE path = ?", (str(path),)).fetchone()  # noqa: S608
        return _model(row) if row else None

    def names(self) -> list[str]:
        """The names in use."""
        return [row[0] for row in self._db.execute("SELECT name FROM models ORDER BY rowid")]

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
            self._db.execute(
                "REPLACE INTO analyses(expert, base, block_size, file, summary) VALUES (?, ?, ?, ?, ?)",
                (expert, base, block_size, file.name, json.dumps(summary)),
            )
            self._db.execute("DELETE FROM cuts WHERE expert = ? AND base = ?", (expert, base))

    def find_analysis(self, expert: str, base: str) -> tuple[int, Path, dict[str, Any]] | None:
        """Block size, statistics file and summary of an analyzed delta; None where it is not analyzed."""
        row = self._db.execute(
            "SELECT block_size, file, summary FROM analyses WHERE expert = ? AND base = ?", (expert, base)
        ).fetchone()
        if row is None or not (file := self.path / "statistics" / row[1]).is_file():
            return None
        return int(row[0]), file, json.loads(row[2])

    def save_cuts(self, expert: str, base: str, cuts: Mapping[tuple[str, int], Sequence[int]]) -> None:
        """Remember packed trim cuts, each under its tensor and number of kept elements."""
        with self.transaction():
            self._db.executemany(
                "REPLACE INTO cuts(expert, base, tensor, keep, cut) VALUES (?, ?, ?, ?, ?)",
                [(expert, base, tensor, keep, json.dumps(cut)) for (tensor, keep), cut in cuts.items()],
            )

    def find_cuts(self, expert: str, base: str) -> dict[tuple[str, int], list[int]]:
        """Every remembered cut of a delta, packed, by tensor and number of kept elements."""
        rows = self._db.execute("SELECT tensor, keep, cut FROM cuts WHERE expert = ? AND base = ?", (expert, base))
        return {(row[0], row[1]): json.loads(row[2]) for row in rows}

    # Storages

    def save_storage(self, device: str, request_s: float, bytes_per_s: float) -> None:
        """Remember what reading costs on a storage."""
        self._db.execute(
            "REPLACE INTO storages(device, request_s, bytes_per_s) VALUES (?, ?, ?)", (device, request_s, bytes_per_s)
        )

    def find_storage(self, device: str) -> tuple[float, float] | None:
        """Seconds a request and bytes a second of a storage; None where it was not measured."""
        row: tuple[float, float] | None = self._db.execute(
            "SELECT request_s, bytes_per_s FROM storages WHERE device = ?", (device,)
        ).fetchone()
        return row

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
        self._db.execute("INSERT OR IGNORE INTO plans(digest, content) VALUES (?, ?)", (digest, content))

    def has_plan(self, digest: str) -> bool:
        """Whether the text of the plan with this digest is kept."""
        return self._db.execute("SELECT 1 FROM plans WHERE digest = ?", (digest,)).fetchone() is not None

    def save_snapshot(self, path: Path, plan_digest: str, manifest: dict[str, Any]) -> None:
        """Record a committed merged model."""
        self._db.execute(
            "REPLACE INTO snapshots(path, plan_digest, manifest) VALUES (?, ?, ?)",
            (str(path), plan_digest, json.dumps(manifest)),
        )

    def find_plans(self, prefix: str) -> list[str]:
        """The text of every plan whose digest begins with `prefix`."""
        rows = self._db.execute("SELECT content FROM plans WHERE substr(digest, 1, ?) = ?", (len(prefix), prefix))
        return [row[0] for row in rows]

    def snapshots(self) -> list[tuple[Path, str, dict[str, Any], str]]:
        """Path, plan digest, manifest and time of every committed snapshot, newest last."""
        rows = self._db.execute(
            "SELECT path, plan_digest, manifest, committed_at FROM snapshots ORDER BY committed_at, rowid"
        )
        return [(Path(row[0]), row[1], json.loads(row[2]), row[3]) for row in rows]


_MODEL = "name, kind, source, path, base, base_is_declared, fingerprint, shards, tensors, config"


def _model(row: tuple[Any, ...]) -> Model:
    name, kind, source, path, base, declared, fingerprint, shards, tensors, config = row
    content, file = json.loads(config)
    checkpoint = Checkpoint(
        Path(path),
        tuple(ShardFile(**s) for s in json.loads(shards)),
        _tensors(tensors),
        content,
        ShardFile(**file) if file else None,
        kind == Kind.ADAPTER,
    )
    return Model(name, Kind(kind), source, base, bool(declared), fingerprint, checkpoint)


@lru_cache(maxsize=16)
def _tensors(text: str) -> dict[str, TensorInfo]:
    """Tensors by name, as the catalog writes them: the same text for most experts of a family."""
    return {t[0]: TensorInfo(t[0], DTYPES[t[1]], tuple(t[2]), t[3], t[4], t[5]) for t in json.loads(text)}
