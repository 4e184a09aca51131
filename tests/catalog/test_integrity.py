"""What the catalog keeps is checked before it is believed: one flipped bit never gives a silently different merge."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from families import recipe, write_family
from merges import merge, raw_tensors
from shell import Shell

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.cuts import find_cuts
from deltaworks.catalog.register import find_model, register
from deltaworks.catalog.statistics_file import StatisticsWriter, check_digest, read_statistics, stored_digest
from deltaworks.catalog.store import Catalog
from deltaworks.catalog.tables import read_table
from deltaworks.catalog.tidy import find_waste, layers_of, remove
from deltaworks.checkpoints.partial import partial_path
from deltaworks.errors import CatalogError, DamagedError, DeltaworksError
from deltaworks.layers.file import LayerIndex
from deltaworks.layers.writer import LayerWriter
from deltaworks.merging.budget import parse_budget
from deltaworks.merging.manifest import read_manifest
from deltaworks.merging.prepare import MergeOptions
from deltaworks.progress import Silent

EXPERTS = ("expert0", "expert1")
BUDGET = MergeOptions(budget=parse_budget("40%"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family, and a catalog that has statistics, tables and layers of it."""
    root = tmp_path_factory.mktemp("made")
    write_family(root / "family", experts=2)
    with Catalog(root / "catalog") as catalog:
        base = register(catalog, "base", str(root / "family" / "base"))
        for name in EXPERTS:
            expert = register(catalog, name, str(root / "family" / name), "base")
            analyze(catalog, expert, base, layers=True)
            read_table(catalog.statistics_file(expert.fingerprint, base.fingerprint))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy of the catalog, for the same family."""
    shutil.copytree(made / "catalog", tmp_path / "catalog")
    for file in (tmp_path / "catalog").glob("statistics/*.parquet"):
        read_table(file)  # tables tell by its times and its inode what they were made from
    return tmp_path


def text_of(made: Path, density: str = "0.3751") -> str:
    """A density that is not a whole percent has its cuts placed by histograms, in the Parquet file."""
    return recipe("ties", made / "family", parameters=f"weight: 1, density: {density}", listed=EXPERTS)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def one(folder: Path, pattern: str) -> Path:
    return min(folder.glob(pattern))


def places(path: Path, count: int) -> Iterator[int]:
    """Bits of a file: some at random, and the first and last bytes."""
    size = path.stat().st_size
    yield from (8 * b + 3 for b in (0, 9, size - 1, size - 6, size - 40))
    yield from np.random.default_rng(0).integers(0, 8 * size, count).tolist()


@pytest.mark.parametrize(("pattern", "bits"), [("statistics/*.table", 8), ("statistics/*.parquet", 8)])
def test_a_flipped_bit_of_statistics_changes_no_merge(made: Path, root: Path, pattern: str, bits: int) -> None:
    with Catalog(root / "usual") as catalog:
        expected = [
            merge(catalog, text_of(made), root / "usual-out"),
            merge(catalog, text_of(made), root / "usual-b", BUDGET),
        ]
    victim = one(root / "catalog", pattern)
    good = victim.read_bytes()
    for i, bit in enumerate(places(victim, bits)):
        victim.write_bytes(good)
        flip(victim, bit)
        with Catalog(root / "catalog") as catalog:
            catalog._write("DELETE FROM cuts WHERE 1", [()])
            # The Parquet file is read where the table is missing, and for cuts.
            for table in (root / "catalog").glob("statistics/*.table" if "parquet" in pattern else "none"):
                table.unlink()
            made_now = merge(catalog, text_of(made), root / f"out{i}")
        assert made_now.plan_digest == expected[0].plan_digest
        assert raw_tensors(root / f"out{i}") == raw_tensors(root / "usual-out")
        assert victim.read_bytes() == good, "it was made anew"


def test_a_damaged_file_is_named_and_made_anew(made: Path, root: Path) -> None:
    class Noting(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    victim = one(root / "catalog", "statistics/*.parquet")
    flip(victim, 8 * 1000)
    victim.with_suffix(".table").unlink()
    progress = Noting()
    with Catalog(root / "catalog") as catalog:
        from deltaworks.merging.prepare import prepare_plan
        from deltaworks.merging.recipe import parse_recipe

        prepare_plan(catalog, parse_recipe(text_of(made)), progress=progress)
    assert any(str(victim) in note and "measuring expert" in note for note in progress.notes)


def test_damaged_statistics_of_an_expert_that_is_gone_are_refused(made: Path, root: Path) -> None:
    write_family(root / "family", experts=2)
    with Catalog(root / "catalog") as catalog:
        for name in ("base", *EXPERTS):
            register(
                catalog, name, str(root / "family" / name), None if name == "base" else "base", replace_existing=True
            )
        expert, base = find_model(catalog, "expert0"), find_model(catalog, "base")
        victim = catalog.statistics_file(expert.fingerprint, base.fingerprint)
        flip(victim, 8 * 1000)
        victim.with_suffix(".table").unlink()
        shutil.rmtree(root / "family" / "expert0")
        with pytest.raises(DamagedError, match="analyze the expert again") as caught:
            merge(catalog, text_of(root), root / "out")
    assert str(victim) in str(caught.value)


def test_statistics_without_a_digest_are_measured_again(made: Path, root: Path) -> None:
    """Those of the version before; of an expert that is there."""
    with Catalog(root / "catalog") as catalog:
        expert, base = find_model(catalog, "expert0"), find_model(catalog, "base")
        found = catalog.find_analysis(expert.fingerprint, base.fingerprint)
        assert found is not None
        summary = {k: v for k, v in found[2].items() if k != "format_version"}
        catalog.save_analysis(expert.fingerprint, base.fingerprint, found[0], found[1], summary)
        merge(catalog, text_of(made), root / "out")
        found = catalog.find_analysis(expert.fingerprint, base.fingerprint)
        assert found is not None
        assert "format_version" in found[2]


def test_a_digest_that_is_gone_is_damage(root: Path) -> None:
    victim = one(root / "catalog", "statistics/*.parquet")
    assert check_digest(victim)
    digest = stored_digest(victim)
    assert digest is not None
    assert digest.encode() in victim.read_bytes()
    content = victim.read_bytes()
    victim.write_bytes(content.replace(b"deltaworks_blake3", b"deltaworks_blake4"))
    with pytest.raises(DamagedError, match="digest is gone"):
        list(read_statistics(victim))


def test_a_flipped_bit_of_layers_is_found(made: Path, root: Path) -> None:
    """Or it is where nothing is read: padding, or blocks that the budget leaves out."""
    victim = one(root / "catalog", "layers/*.layers")
    good, found = victim.read_bytes(), 0
    with Catalog(root / "catalog") as catalog:
        expected = merge(catalog, text_of(made), root / "usual", BUDGET)
        for i, bit in enumerate(places(victim, 12)):
            victim.write_bytes(good)
            flip(victim, bit)
            try:  # some bits are of padding, or of blocks that are not read
                result = merge(
                    catalog, text_of(made), root / f"out{i}", MergeOptions(budget=BUDGET.budget, layers=True)
                )
            except CatalogError as error:
                found += str(victim) in str(error)
            else:
                assert result.plan_digest == expected.plan_digest
                assert raw_tensors(root / f"out{i}") == raw_tensors(root / "usual")
    assert found >= 5, "the first and last bytes at least, by name"


def damage_index(root: Path) -> Path:
    victim = one(root / "catalog", "layers/*.layers")
    flip(victim, 8 * (victim.stat().st_size - 2000))
    with pytest.raises(CatalogError):
        _ = LayerIndex(victim).residuals
    return victim


def test_damaged_layers_that_nobody_asked_for_are_a_note_everywhere(made: Path, root: Path) -> None:
    (root / "recipe.yml").write_text(text_of(made))
    victim, shell = damage_index(root), Shell(root)
    done = shell.run("merge", "recipe.yml", "out", "--budget", "40%", "--json", "-q")
    assert str(victim) in done.stderr
    assert done.stderr.startswith("note: ")
    (note,) = (n for n in json.loads(done.stdout)["notes"] if str(victim) in n)
    assert note in read_manifest(root / "out")["notes"]
    planned = shell.run("plan", "recipe.yml", "-o", "plan.json", "--budget", "40%", "--json", "-q")
    assert str(victim) in planned.stderr
    assert note in json.loads(planned.stdout)["notes"]


@pytest.mark.parametrize("command", [("merge", "recipe.yml", "out"), ("plan", "recipe.yml", "-o", "plan.json")])
def test_damaged_layers_that_were_asked_for_are_an_error(made: Path, root: Path, command: tuple[str, ...]) -> None:
    (root / "recipe.yml").write_text(text_of(made))
    victim = damage_index(root)
    said = Shell(root).error(*command, "--budget", "40%", "--layers", "-q")
    assert str(victim) in said
    assert "analyze --layers --force" in said


@pytest.mark.parametrize("change", ["edit", "remove", "add"])
def test_kept_files_of_an_expert_that_is_gone(made: Path, root: Path, change: str) -> None:
    write_family(root / "family", experts=2)
    with Catalog(root / "catalog") as catalog:
        for name in ("base", *EXPERTS):
            register(
                catalog, name, str(root / "family" / name), None if name == "base" else "base", replace_existing=True
            )
        shutil.rmtree(root / "family" / "expert0")
        text = text_of(root) + f"tokenizer_source: {root / 'family' / 'expert0'}\n"
        merge(catalog, text, root / "out")
        kept = catalog.kept_files(find_model(catalog, "expert0").fingerprint)
        assert kept is not None
        if change == "edit":
            (kept / "tokenizer.json").write_text('{"evil": 1}')
        elif change == "remove":
            (kept / "tokenizer.json").unlink()
        else:
            (kept / "tokenizer_more.json").write_text("{}")
        with pytest.raises(DamagedError, match=r"tokenizer\w*\.json (differs|is gone|was added)"):
            merge(catalog, text, root / "out2")


def test_kept_files_are_those_of_the_last_analysis(made: Path, root: Path) -> None:
    with Catalog(root / "catalog") as catalog:
        expert, base = find_model(catalog, "expert0"), find_model(catalog, "base")
        kept = catalog.kept_files(expert.fingerprint)
        assert kept is not None
        (kept / "vocab.txt").write_text("of an earlier analysis")
        analyze(catalog, expert, base, force=True, layers=True)
        assert not (kept / "vocab.txt").exists()
        names = LayerIndex(kept.with_suffix(".layers")).about["files"]
        assert names.keys() == {p.name for p in kept.iterdir()}


def test_what_others_put_into_the_catalog_is_no_waste(root: Path) -> None:
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "thesis.txt").write_text("keep")
    with Catalog(root / "catalog") as catalog:
        for folder in ("statistics", "layers"):
            (catalog.path / folder / "notes.txt").write_text("keep")
            (catalog.path / folder / "a-b.files").symlink_to(root / "elsewhere")
            (catalog.path / folder / "my-data").mkdir()
            (catalog.path / folder / "my-data" / "data").write_text("keep")
        catalog._write("DELETE FROM models WHERE name = ?", [("expert0",)])
        found = find_waste(catalog, unregistered_layers=True)
        assert {p.suffix for p in (w.path for w in found)} >= {".parquet", ".table", ".layers"}
        remove(found)
        assert not find_waste(catalog, unregistered_layers=True)
        remove(layers_of(catalog, [find_model(catalog, "expert1")]))
        assert (catalog.path / "layers" / "my-data" / "data").is_file()
    assert len(list((root / "catalog").rglob("notes.txt"))) == 2
    assert (root / "elsewhere" / "thesis.txt").is_file()


PAIR = f"{'0' * 24}-{'1' * 24}"
PARTIAL = "4194303-0123abcd"


@pytest.mark.parametrize(
    ("name", "is_made_by_the_catalog"),
    [
        (f"{PAIR}.parquet", True),
        (f"{PAIR}.table", True),
        (f".{PAIR}.parquet.{PARTIAL}", True),
        (f".{PAIR}-140001.table.{PARTIAL}", True),
        (f".{PAIR}.parquet.4194303", True),
        ("2024-06-01.csv", False),
        ("ab-cd-notes.txt", False),
        ("be-fa.md", False),
        (f"{PAIR}.parquet.bak", False),
        (f"copy-{PAIR}.parquet", False),
        (".backup.parquet.2024", False),
        (f".backup.table.{PARTIAL}", False),
        (f".{PAIR}.parquet.2024.old", False),
    ],
)
def test_only_files_that_the_catalog_named_are_waste(tmp_path: Path, name: str, is_made_by_the_catalog: bool) -> None:
    with Catalog(tmp_path / "catalog") as catalog:
        (catalog.path / "statistics" / name).write_text("content")
        assert [w.path.name for w in find_waste(catalog, unregistered_layers=True)] == [name] * is_made_by_the_catalog


@pytest.mark.parametrize("lost", ["expert0", "base"])
def test_gc_keeps_the_last_copy_of_an_expert_whose_row_was_lost(made: Path, root: Path, lost: str) -> None:
    """One bit of a row flips while the expert's folder is gone: `gc`, as often as it is run, keeps its layers."""
    shutil.copytree(made / "family", root / "family")
    with Catalog(root / "catalog") as catalog:
        for name in ("base", *EXPERTS):
            base = None if name == "base" else "base"
            register(catalog, name, str(root / "family" / name), base, replace_existing=True)
        expert = find_model(catalog, "expert0")
        kept = catalog.kept_files(expert.fingerprint)
        assert kept is not None
        (root / "family" / "expert0").rename(root / "backup")
        catalog._write("UPDATE models SET source = source || 'x' WHERE name = ?", [(lost,)])
    layers, shell = kept.with_suffix(".layers"), Shell(root)
    before = {p: p.read_bytes() for p in (layers, *kept.iterdir())}
    assert shell.json("gc")["damaged_rows"] == [f"models({lost})"]
    said = shell.run("gc").stdout
    found = shell.json("gc")
    assert found["removed"] == []
    listed = {entry["path"] for entry in found["unregistered_layers"]}
    # Those that a registered expert needs are not offered for removal.
    assert (f"kept  {layers.name}" in said) == (str(layers) in listed) == (lost == "expert0")
    assert {p: p.read_bytes() for p in before} == before
    with Catalog(root / "catalog") as catalog:
        if lost == "expert0":  # from a backup, it is the same expert again
            (root / "backup").rename(root / "family" / "expert0")
            register(catalog, "expert0", str(root / "family" / "expert0"), "base")
            shutil.rmtree(root / "family" / "expert0")
        else:
            register(catalog, "base", str(root / "family" / "base"))
        merge(catalog, text_of(root), root / "out")


def test_gc_removes_layers_of_unregistered_models_on_request(made: Path, root: Path) -> None:
    shell = Shell(root)
    with Catalog(root / "catalog") as catalog:
        layers = catalog.layers_file(
            find_model(catalog, "expert0").fingerprint, find_model(catalog, "base").fingerprint
        )
        catalog._write("DELETE FROM models WHERE name = ?", [("expert0",)])
    shell.run("gc")
    assert layers.is_file()
    assert str(layers) in shell.json("gc", "--unregistered")["removed"]
    assert not layers.exists()
    assert not layers.with_suffix(".files").exists()


def test_gc_counts_layers_once(made: Path, root: Path) -> None:
    """They are unregistered, as their base is, and of an expert that is named."""
    with Catalog(root / "catalog") as catalog:
        catalog._write("DELETE FROM models WHERE name = ?", [("base",)])
    found = [entry["path"] for entry in Shell(root).json("gc", "expert0", "--unregistered", "--dry-run")["found"]]
    assert len([p for p in found if p.endswith(".layers")]) >= 1
    assert len(found) == len(set(found))


def test_gc_keeps_layers_that_a_registered_expert_needs(made: Path, root: Path) -> None:
    """Its base alone is unregistered, and its folder is gone: even on request its layers stay."""
    with Catalog(root / "catalog") as catalog:
        layers = catalog.layers_file(
            find_model(catalog, "expert0").fingerprint, find_model(catalog, "base").fingerprint
        )
        catalog.save_model(
            replace(
                find_model(catalog, "expert0"),
                checkpoint=replace(find_model(catalog, "expert0").checkpoint, path=root / "gone"),
            )
        )
        catalog._write("DELETE FROM models WHERE name = ?", [("base",)])
        found = {w.path for w in find_waste(catalog, unregistered_layers=True)}
    assert layers not in found
    assert len([p for p in found if p.suffix == ".layers"]) == 1


def test_what_another_host_is_writing_is_no_waste(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a number that no process has here; its lock tells."""
    from deltaworks.checkpoints import partial

    with Catalog(root / "catalog") as catalog:
        monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)
        monkeypatch.setattr(partial, "_place", lambda: "0123abcd")
        statistics = StatisticsWriter(catalog.statistics_file("a" * 64, "b" * 64), 4096)
        layers = LayerWriter(catalog.layers_file("a" * 64, "b" * 64), 1, 0, 4096)
        files = [
            partial_path(catalog.statistics_file("a" * 64, "b" * 64)),
            partial_path(catalog.layers_file("a" * 64, "b" * 64)),
        ]
        assert all(f.is_file() for f in files)
        assert find_waste(catalog) == []
        for fd in (statistics._fd, layers._fd):  # as if it were killed
            fcntl.flock(fd, fcntl.LOCK_UN)
        assert {w.path for w in find_waste(catalog)} == set(files)
        statistics.abandon()
        layers.abandon()
        (catalog.path / "statistics" / f".{'a' * 24}-{'b' * 24}.parquet.{2**22 + 1}").write_bytes(
            b"of an earlier version"
        )
        assert len(find_waste(catalog)) == 1


def test_cuts_are_read_from_what_was_checked(made: Path, root: Path) -> None:
    with Catalog(root / "catalog") as catalog:
        expert, base = find_model(catalog, "expert0"), find_model(catalog, "base")
        victim = catalog.statistics_file(expert.fingerprint, base.fingerprint)
        victim.with_suffix(".table").unlink()
        flip(victim, 8 * 500)
        with pytest.raises(DamagedError):
            find_cuts(catalog, expert, base, [("model.norm.weight", 2)])
        with pytest.raises(DeltaworksError, match="their digest differs"):
            check_digest(victim)


def held_open(folder: Path) -> list[str]:
    paths = (os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir())
    return [path for path in paths if path.startswith(str(folder))]


def test_a_writer_that_cannot_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(pq, "ParquetWriter", fail)
    with pytest.raises(OSError, match="No space left"):
        StatisticsWriter(tmp_path / "a.parquet", 4096)
    assert list(tmp_path.iterdir()) == []
    assert held_open(tmp_path) == []


def test_a_writer_that_is_abandoned_on_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the Parquet file writes its footer."""

    def fail(_: object) -> None:
        raise OSError(28, os.strerror(28))

    writer = StatisticsWriter(tmp_path / "a.parquet", 4096)
    whole = writer._file.close
    with monkeypatch.context() as patched:
        patched.setattr(pq.ParquetWriter, "close", fail)
        writer.abandon()
    assert list(tmp_path.iterdir()) == []
    whole()
    assert held_open(tmp_path) == []


def test_a_file_that_is_written_by_now_is_not_removed(root: Path) -> None:
    """Between finding and removing waste, a process begins to write under the name of an abandoned file."""
    with Catalog(root / "catalog") as catalog:
        file = catalog.statistics_file("a" * 64, "b" * 64)
        partial = partial_path(file)
        partial.write_bytes(b"left by a process that died")
        found = find_waste(catalog)
        assert [w.path for w in found] == [partial]
        writer = StatisticsWriter(file, 4096)
        assert remove(found) == 0
        assert partial.is_file()
        writer.abandon()
