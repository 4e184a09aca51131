import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import random_tensors, write_model

from deltaworks.catalog import database
from deltaworks.catalog.register import register
from deltaworks.catalog.rows import CHECKED, checksum, columns
from deltaworks.catalog.store import Catalog, default_path
from deltaworks.errors import CatalogError, DeltaworksError


def test_the_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTAWORKS_CATALOG", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert default_path() == Path("/data/deltaworks")
    monkeypatch.setenv("DELTAWORKS_CATALOG", "/elsewhere")
    assert default_path() == Path("/elsewhere")


def test_a_catalog_of_another_version_is_refused(tmp_path: Path) -> None:
    Catalog(tmp_path).close()
    with sqlite3.connect(tmp_path / "catalog.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(CatalogError, match="schema 99"):
        Catalog(tmp_path)


def test_a_file_that_is_no_catalog(tmp_path: Path) -> None:
    (tmp_path / "catalog.sqlite").write_text("hello" * 1000)
    with pytest.raises(CatalogError, match="cannot use"):
        Catalog(tmp_path)


def test_many_processes_open_a_new_catalog_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from deltaworks.catalog.store import Catalog\n"
        "c = Catalog(Path(sys.argv[1]))\n"
        "for i in range(20): c.save_plan(f'{sys.argv[2]}-{i}', '{}')"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)]) for i in range(4)]
    assert [p.wait() for p in running] == [0] * 4
    with sqlite3.connect(tmp_path / "catalog.sqlite") as db:
        assert db.execute("SELECT count(*) FROM plans").fetchone() == (80,)
    db.close()


SHAPES = {"model.layers.0.mlp.up_proj.weight": (64, 64)}
ANALYSIS = ("e" * 64, "b" * 64)


def _filled(root: Path) -> Path:
    """A catalog with a row in every table."""
    made = random_tensors(0, SHAPES)
    with Catalog(root / "catalog") as catalog:
        register(catalog, "base", str(write_model(root / "base", made)))
        file = catalog.statistics_file(*ANALYSIS)
        file.write_bytes(b"")
        catalog.save_analysis(*ANALYSIS, 4096, file, {"nonfinite": []})
        catalog.save_cuts(*ANALYSIS, {("t", 5): (1, 2, 3, 4)})
        catalog.save_storage("dev", 0.5, 2.0)
        catalog.save_plan("d" * 64, "{}")
        catalog.save_snapshot(root / "out", "d" * 64, {"inputs": []})
        catalog.begin_staging(root / ".two.deltaworks", root / "two", "d" * 64)
    return root / "catalog"


def _execute(catalog: Path, statement: str) -> None:
    with sqlite3.connect(catalog / "catalog.sqlite") as db:
        assert db.execute(statement).rowcount == 1
    db.close()


@pytest.mark.parametrize(
    ("change", "row"),
    [
        ("UPDATE models SET tensors = '[[1]]'", "models(base)"),
        ("UPDATE models SET tensors = 'x'", "models(base)"),
        ("UPDATE models SET shards = replace(shards, '1', '2')", "models(base)"),
        ("UPDATE models SET config = 7", "models(base)"),
        ("UPDATE models SET kind = 'teapot'", "models(base)"),
        ("UPDATE models SET path = CAST(x'ff2f' AS TEXT)", "models(base)"),
        ("UPDATE models SET checksum = ''", "models(base)"),
        ("UPDATE snapshots SET manifest = 'x'", "snapshots("),
        ("UPDATE snapshots SET plan_digest = 'e'", "snapshots("),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, change: str, row: str) -> None:
    """And can be dropped; the rest of the catalog stays."""
    _execute(_filled(tmp_path), change)
    with Catalog(tmp_path / "catalog") as catalog:
        with pytest.raises(CatalogError, match="deltaworks gc") as caught:
            (catalog.models(), catalog.snapshots())
        assert row in str(caught.value)
        assert len(str(caught.value)) < 400
        assert len(catalog.damaged()) == 1
        (dropped,) = catalog.drop_damaged()
        assert dropped.startswith(row)
        assert not catalog.damaged()
        assert len(catalog.models()) + len(catalog.snapshots()) == 1


def test_a_row_that_parses_and_is_wrong_is_damaged_even_with_a_checksum(tmp_path: Path) -> None:
    _execute(_filled(tmp_path), "UPDATE models SET config = '[1]'")
    with sqlite3.connect(tmp_path / "catalog" / "catalog.sqlite") as db:
        row = db.execute(f"SELECT {columns('models')} FROM models").fetchone()
        db.execute("UPDATE models SET checksum = ?", (checksum("models", row[:-1]),))
    db.close()
    with Catalog(tmp_path / "catalog") as catalog, pytest.raises(CatalogError, match=r"models\(base\) .* is damaged"):
        catalog.find("base")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE analyses SET block_size = 8192",
        "UPDATE cuts SET cut = replace(cut, '3', '4')",
        "UPDATE storages SET request_s = 0.25",
        "UPDATE plans SET content = '[]'",
    ],
)
def test_damaged_rows_of_what_can_be_made_anew_are_not_believed(tmp_path: Path, change: str) -> None:
    def known(catalog: Catalog) -> list[bool]:
        return [
            catalog.find_analysis(*ANALYSIS) is not None,
            bool(catalog.find_cuts(*ANALYSIS)),
            catalog.find_storage("dev") is not None,
            catalog.has_plan("d" * 64),
        ]

    path = _filled(tmp_path)
    with Catalog(path) as catalog:
        assert known(catalog) == [True] * 4
    _execute(path, change)
    with Catalog(path) as catalog:
        assert known(catalog).count(False) == 1
        assert len(catalog.drop_damaged()) == 1


def test_a_catalog_of_the_version_before_is_taken_over(tmp_path: Path) -> None:
    """Its rows get checksums; a reader that may not write sees the same and leaves it alone."""
    path = _filled(tmp_path)
    with sqlite3.connect(path / "catalog.sqlite") as db:
        for table in CHECKED:
            db.execute(f"ALTER TABLE {table} DROP COLUMN checksum")
        db.execute("DROP TABLE stagings")
        db.execute("PRAGMA user_version = 2")
    db.close()
    with Catalog.to_read(path) as catalog:
        assert catalog.is_copy
        assert catalog.find("base") is not None
        assert len(catalog.snapshots()) == 1
    with Catalog(path) as catalog:
        assert not catalog.damaged()
        assert catalog.find("base") is not None
        assert catalog.has_plan("d" * 64)
        assert catalog.stagings() == []
    with Catalog.to_read(path) as catalog:
        assert not catalog.is_copy


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE models SET tensors = 'x'",
        "UPDATE models SET shards = '[{}]'",
        "UPDATE models SET kind = 'teapot'",
        "UPDATE snapshots SET manifest = 'x'",
        "UPDATE snapshots SET manifest = '{}'",
        "UPDATE snapshots SET manifest = '{\"inputs\": [{}]}'",
    ],
)
def test_a_row_that_was_damaged_before_it_had_a_checksum_can_be_dropped(tmp_path: Path, change: str) -> None:
    path = _filled(tmp_path)
    _execute(path, change)
    with sqlite3.connect(path / "catalog.sqlite") as db:
        for table in CHECKED:
            db.execute(f"ALTER TABLE {table} DROP COLUMN checksum")
        db.execute("DROP TABLE stagings")
        db.execute("PRAGMA user_version = 2")
    db.close()
    with Catalog(path) as catalog:
        with pytest.raises(CatalogError, match="drop it with `deltaworks gc`"):
            (catalog.models(), catalog.snapshots())
        assert len(catalog.drop_damaged()) == 1
        assert catalog.damaged() == []
        assert len(catalog.models()) + len(catalog.snapshots()) == 1


def test_to_read_makes_no_catalog(tmp_path: Path) -> None:
    with Catalog.to_read(tmp_path / "none") as catalog:
        assert catalog.models() == []
        assert catalog.is_copy
    assert not (tmp_path / "none").exists()


def test_a_catalog_that_cannot_be_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _filled(tmp_path)
    connect = sqlite3.connect

    def read_only(database: str, **more: Any) -> Any:
        if database.endswith("catalog.sqlite"):
            raise sqlite3.OperationalError("unable to open database file")
        if database.endswith("mode=ro"):
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return connect(database, **more)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    with Catalog.to_read(path) as catalog:
        assert [m.name for m in catalog.models()] == ["base"]
        assert catalog.is_copy
    with pytest.raises(CatalogError, match=r"cannot use .*catalog as a catalog: unable to open"):
        Catalog(path)


def test_the_latest_rows_are_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in the database's log alone until that is folded in."""
    connect = sqlite3.connect
    path = _filled(tmp_path)

    def read_only(database: str, **more: Any) -> Any:
        if database == str(path / "catalog.sqlite") or database.endswith("mode=ro"):
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return connect(database, **more)

    with Catalog(path) as writer:
        register(writer, "late", str(tmp_path / "base"))
        assert (path / "catalog.sqlite-wal").stat().st_size
        monkeypatch.setattr(sqlite3, "connect", read_only)
        before = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}
        with Catalog.to_read(path) as catalog:
            assert catalog.names() == ["base", "late"]
        assert {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()} == before


def test_a_database_that_is_being_written_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "catalog.sqlite").write_bytes(b"x")
    (tmp_path / "catalog.sqlite-wal").write_bytes(b"x")
    monkeypatch.setattr(database, "_state", lambda *_: object())
    with pytest.raises(OSError, match="being written"):
        database._copy_with_log(
            tmp_path / "catalog.sqlite", tmp_path / "catalog.sqlite-wal", sqlite3.connect(":memory:")
        )


def test_a_locked_database_is_one_sentence(tmp_path: Path) -> None:
    path = _filled(tmp_path)
    with Catalog(path) as catalog, Catalog(path) as other:
        catalog._db.execute("PRAGMA busy_timeout = 1")
        catalog.save_plan("a" * 64, "x")
        with other.transaction():
            for write in (
                catalog.drop_damaged,
                catalog.drop_unused_plans,
                lambda: catalog.save_plan("b" * 64, "x"),
                lambda: catalog.end_staging(tmp_path),
            ):
                with pytest.raises(DeltaworksError, match="cannot be written: database is locked"):
                    write()
        assert [digest for digest, _ in catalog.drop_unused_plans()] == ["a" * 64]


def test_an_error_that_ends_a_transaction_is_reported(tmp_path: Path) -> None:
    """SQLite rolls back by itself where a disk is full; nothing is left to roll back then."""

    def fill_the_disk(catalog: Catalog) -> None:
        with catalog.transaction():
            catalog._db.execute("ROLLBACK")
            raise sqlite3.OperationalError("disk full")

    with Catalog(tmp_path) as catalog:
        with pytest.raises(DeltaworksError, match="disk full"):
            fill_the_disk(catalog)
        catalog.save_plan("a" * 64, "x")
        assert catalog.has_plan("a" * 64)


def test_a_database_without_structure_is_named(tmp_path: Path) -> None:
    path = _filled(tmp_path)
    content = bytearray((path / "catalog.sqlite").read_bytes())
    for page in range(1, len(content) // 4096):  # the first page has the schema
        content[page * 4096 : page * 4096 + 100] = b"\xff" * 100
    (path / "catalog.sqlite").write_bytes(content)
    with Catalog(path) as catalog, pytest.raises(CatalogError, match=r"catalog\.sqlite is damaged: .*malformed"):
        catalog.models()


def test_plans_that_nothing_was_made_by_can_be_dropped(tmp_path: Path) -> None:
    with Catalog(_filled(tmp_path)) as catalog:
        catalog.save_plan("a" * 64, "x" * 1_000_000)
        assert catalog.unused_plans() == [("a" * 64, 1_000_000)]
        assert catalog.drop_unused_plans() == [("a" * 64, 1_000_000)]
        assert catalog.unused_plans() == []
        assert catalog.has_plan("d" * 64)
    assert (tmp_path / "catalog" / "catalog.sqlite").stat().st_size < 500_000


def test_a_flipped_bit_anywhere_in_the_schema_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "catalog"
    Catalog(path).close()
    database = path / "catalog.sqlite"
    content = database.read_bytes()[:4096]
    rest = database.read_bytes()[4096:]
    start = content.find(b"CREATE TABLE")
    assert start > 0
    messages = []
    for place in range(start - 40, start + 20):
        damaged = bytearray(content)
        damaged[place] ^= 0x80
        for opened in (Catalog, Catalog.to_read):
            database.write_bytes(damaged + rest)
            try:
                opened(path).close()
            except CatalogError as error:
                messages.append(str(error))
    assert len(messages) > 20
    assert all("cannot use" in m and m.endswith("choose another with --catalog") and "\n" not in m for m in messages)
