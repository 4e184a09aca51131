import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from deltaworks.catalog.store import Catalog, default_path
from deltaworks.errors import CatalogError


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
