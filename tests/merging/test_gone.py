"""Merged models whose folders were deleted: said wherever they are named, and dropped from the catalog on request."""

import shutil
from pathlib import Path

import pytest
from families import recipe, write_family
from merges import merge
from shell import Shell

from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.merging.gone import Gone, find_gone


@pytest.fixture
def chain(tmp_path: Path, catalog: Catalog) -> Path:
    """`first` is merged from experts, `second` from `first`, and `alone` from an expert; all are in the catalog."""
    write_family(tmp_path, experts=2)
    for out, listed in (("first", ("expert0", "expert1")), ("second", ("first",)), ("alone", ("expert0",))):
        text = recipe("task_arithmetic", tmp_path, listed=listed, parameters="weight: 0.5")
        merge(catalog, text, tmp_path / out)
    return tmp_path


CASES = [
    pytest.param([], {}, id="all are there"),
    pytest.param(["alone"], {"alone": None}, id="one that nothing was made from"),
    pytest.param(["first"], {"first": "second"}, id="one that another was made from"),
    pytest.param(["first", "second"], {"first": None, "second": None}, id="both"),
]


@pytest.mark.parametrize(("deleted", "expected"), CASES)
def test_records_of_what_is_gone_stay_while_they_are_needed(
    catalog: Catalog, chain: Path, deleted: list[str], expected: dict[str, str | None]
) -> None:
    for name in deleted:
        shutil.rmtree(chain / name)
    assert find_gone(catalog) == [
        Gone(chain / name, needed and str(chain / needed)) for name, needed in expected.items()
    ]


def test_a_registered_copy_needs_the_record(catalog: Catalog, chain: Path) -> None:
    shutil.copytree(chain / "second", chain / "copy")
    register(catalog, "copied", str(chain / "copy"))
    for name in ("first", "second"):
        shutil.rmtree(chain / name)
    assert find_gone(catalog) == [Gone(chain / "first", "copied"), Gone(chain / "second", "copied")]


def test_a_folder_that_was_emptied_holds_nothing(catalog: Catalog, chain: Path) -> None:
    shutil.rmtree(chain / "alone")
    (chain / "alone").mkdir()
    assert find_gone(catalog) == [Gone(chain / "alone", None)]
    (chain / "alone" / "model.safetensors").touch()
    assert find_gone(catalog) == []


def test_commands_say_what_is_gone_and_drop_it_on_request(catalog: Catalog, chain: Path) -> None:
    shell = Shell(chain)
    for name in ("first", "alone"):
        shutil.rmtree(chain / name)
    present = {Path(s["path"]).name: s["present"] for s in shell.json("list")["snapshots"]}
    assert present == {"first": False, "second": True, "alone": False}
    assert shell.run("list").stdout.count(", gone)") == 2
    shown = shell.json("show", str(chain / "alone"))
    assert (shown["present"], shown["method"]) == (False, "task_arithmetic")
    assert "gone; this is what the catalog recorded of it" in shell.run("show", str(chain / "alone")).stdout
    (row,) = [i for i in shell.json("lineage", str(chain / "second"))["inputs"] if i["role"] != "base"]
    assert (row["snapshot"], row["snapshot_present"]) == (str(chain / "first"), False)
    assert not shell.json("lineage", str(chain / "alone"))["present"]
    plan = shown["plan_digest"]
    expected = [(str(chain / "first"), str(chain / "second")), (str(chain / "alone"), None)]
    would = shell.json("gc", "--gone", "--plans", "--dry-run")
    assert [(g["path"], g["needed_by"], g["dropped"]) for g in would["gone"]] == [(*e, False) for e in expected]
    assert would["plans"] == [plan]
    assert "alone, which is gone; drop it with --gone" in shell.run("gc").stdout
    assert len(catalog.snapshots()) == 3
    did = shell.json("gc", "--gone", "--plans")
    assert [g["dropped"] for g in did["gone"]] == [False, True]
    assert did["plans"] == [plan]
    assert [path for path, *_ in catalog.snapshots()] == [chain / "first", chain / "second"]
