"""All or nothing: crashes, locks, resumption, verification."""

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import random_tensors, read_model, recipe, tuned, write_family, write_model
from merges import merge

from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.writer import ShardWriter
from deltaworks.errors import ChangedError, DeltaworksError, OutputError, PlanError, VerificationError
from deltaworks.merging import execute, snapshot
from deltaworks.merging.manifest import MANIFEST, PLAN, read_manifest
from deltaworks.merging.plan import load_plan, save_plan
from deltaworks.merging.prepare import MergeOptions, plan_inputs, prepare_plan
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.snapshot import run_plan, verify

SMALL_SHARDS = MergeOptions(shard_bytes=9000)
TIES = "weight: 1, density: 0.4"


@pytest.fixture
def family(tmp_path: Path) -> Path:
    write_family(tmp_path / "family")
    return tmp_path / "family"


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_a_snapshot_is_a_complete_model(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    (family / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (family / "base" / "notes.txt").write_text("private")
    text = recipe("ties", family, parameters=TIES)
    merge(catalog, text, tmp_path / "out", SMALL_SHARDS)
    names = set(contents(tmp_path / "out"))
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "README.md", "mergekit_config.yml", "model.safetensors.index.json", MANIFEST, PLAN} < names  # fmt: skip
    assert "notes.txt" not in names
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == text
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    tensors = read_model(tmp_path / "out")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert not list(tmp_path.glob(".*")), "no staging folder is left"
    assert [path for path, *_ in catalog.snapshots()] == [tmp_path / "out"]


def test_the_manifest_names_every_input_and_file(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    result = merge(catalog, recipe("ties", family, parameters=TIES), tmp_path / "out", SMALL_SHARDS)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["plan_digest"] == result.plan_digest
    assert [i["role"] for i in manifest["inputs"]] == ["base", "expert", "expert", "expert"]
    for given in manifest["inputs"]:
        model = catalog.find(given["name"])
        assert model is not None
        assert model.fingerprint == given["fingerprint"]
    named = {s["file"] for s in manifest["shards"]} | manifest["files"].keys() | {MANIFEST}
    assert named == set(contents(tmp_path / "out"))


def test_verify_finds_any_flipped_bit(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    out = tmp_path / "out"
    merge(catalog, recipe("ties", family, parameters=TIES), out, SMALL_SHARDS)
    assert verify(out)["verified"]
    rng = np.random.default_rng(0)
    for name, content in contents(out).items():
        if name == MANIFEST:
            continue
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (out / name).write_bytes(flipped)
        with pytest.raises(VerificationError, match=f"{name} differs"):
            verify(out)
        (out / name).write_bytes(content)
    (out / "config.json").unlink()
    with pytest.raises(VerificationError, match=r"config.json is missing"):
        verify(out)


def test_verify_tells_of_unknown_files(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    merge(catalog, recipe("ties", family, parameters=TIES), tmp_path / "out")
    (tmp_path / "out" / "extra").write_text("")
    assert verify(tmp_path / "out")["unknown"] == ["extra"]
    with pytest.raises(OutputError, match="is not a snapshot"):
        verify(family)


def test_an_output_that_exists_is_kept(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    text = recipe("ties", family, parameters=TIES)
    with pytest.raises(OutputError, match="--force"):
        merge(catalog, text, tmp_path / "out")
    assert contents(tmp_path / "out") == {"mine": b"precious"}
    merge(catalog, text, tmp_path / "out", force=True)
    assert verify(tmp_path / "out")["unknown"] == []
    (tmp_path / "empty").mkdir()
    merge(catalog, text, tmp_path / "empty")
    assert verify(tmp_path / "empty")["verified"]


def test_replacing_without_an_atomic_exchange(
    catalog: Catalog, tmp_path: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: object())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    merge(catalog, recipe("ties", family, parameters=TIES), tmp_path / "out", force=True)
    assert verify(tmp_path / "out")["unknown"] == []
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("place", ["expert1", "expert1/merged", "."])
def test_an_input_is_never_replaced(catalog: Catalog, tmp_path: Path, family: Path, place: str) -> None:
    before = {p: p.read_bytes() for p in family.rglob("*.safetensors")}
    with pytest.raises(OutputError, match="overlap; choose another"):
        merge(catalog, recipe("ties", family, parameters=TIES), family / place, force=True)
    assert {p: p.read_bytes() for p in family.rglob("*.safetensors")} == before


@pytest.mark.parametrize("place", ["catalog", "catalog/merged", "link", "."])
def test_the_catalog_is_never_replaced(catalog: Catalog, tmp_path: Path, family: Path, place: str) -> None:
    (tmp_path / "link").symlink_to(catalog.path)
    before = [m.name for m in catalog.models()]
    with pytest.raises(OutputError, match=r"and the catalog .* overlap"):
        merge(catalog, recipe("ties", family, parameters=TIES), tmp_path / place, force=True)
    assert catalog.database.is_file()
    assert [m.name for m in catalog.models()] != before, "the models of the recipe are registered all the same"


def test_plan_and_run_give_the_same_bytes(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    text = recipe("dare_ties", family, parameters=TIES)
    merge(catalog, text, tmp_path / "one", MergeOptions(shard_bytes=9000, seed=7))
    plan = prepare_plan(catalog, parse_recipe(text), MergeOptions(shard_bytes=9000, seed=7))
    save_plan(plan, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    with Catalog(tmp_path / "another") as elsewhere:
        run_plan(elsewhere, loaded, plan_inputs(elsewhere, loaded), tmp_path / "two")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {n: c for n, c in one.items() if n != "README.md"}.keys() == {n for n in two if n != "README.md"}
    assert all(one[n] == two[n] for n in one if n.endswith((".safetensors", ".json")) and n != MANIFEST)
    replayed = load_plan(tmp_path / "two" / PLAN)
    run_plan(catalog, replayed, plan_inputs(catalog, replayed), tmp_path / "three")
    assert {n: c for n, c in contents(tmp_path / "three").items() if n.endswith("tensors")} == {
        n: c for n, c in one.items() if n.endswith("tensors")
    }


def test_a_plan_for_files_that_changed_is_refused(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    plan = prepare_plan(catalog, parse_recipe(recipe("linear", family, base=False, parameters="weight: 1")))
    write_model(family / "expert1", tuned(77, random_tensors(0, {"a": (3,)})), 2)
    with pytest.raises(ChangedError, match="expert1"):
        plan_inputs(catalog, plan)
    from deltaworks.catalog.register import register

    register(catalog, "expert1", str(family / "expert1"))
    with pytest.raises(ChangedError, match=r"expert1 changed since the plan was made"):
        plan_inputs(catalog, plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.replace('"seed": 0', '"seed": 1'), "was edited"),
        (lambda c: c.replace('"deltaworks_plan": 2', '"deltaworks_plan": 99'), "schema 99"),
        (lambda c: c.replace('"deltaworks_plan"', '"plan"'), "not a deltaworks plan"),
        (lambda c: c.replace('"operation": "weighted"', '"operation": "magic"', 1), "malformed"),
        (lambda c: c[:-30], "not valid JSON"),
        (lambda c: "[]", "not a deltaworks plan"),
    ],
)
def test_a_plan_that_is_none(catalog: Catalog, tmp_path: Path, family: Path, change: Any, message: str) -> None:
    plan = prepare_plan(catalog, parse_recipe(recipe("linear", family, base=False, parameters="weight: 1")))
    save_plan(plan, tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(change((tmp_path / "plan.json").read_text()))
    with pytest.raises(PlanError, match=message):
        load_plan(tmp_path / "plan.json")


def test_a_failed_run_resumes_from_finished_shards(
    catalog: Catalog, tmp_path: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = recipe("ties", family, parameters=TIES)
    merge(catalog, text, tmp_path / "whole", SMALL_SHARDS)
    written: list[str] = []

    class Failing(ShardWriter):
        def finish(self) -> str:
            if len(written) == 2:
                raise DeltaworksError("no space left")
            written.append(super().finish())
            return written[-1]

    monkeypatch.setattr(execute, "ShardWriter", Failing)
    with pytest.raises(DeltaworksError, match="no space left"):
        merge(catalog, text, tmp_path / "out", SMALL_SHARDS)
    assert not (tmp_path / "out").exists()
    staging = tmp_path / ".out.deltaworks"
    finished = json.loads((staging / ".journal.json").read_text())["shards"]
    assert len(finished) == 2
    # One finished shard is damaged meanwhile: it is made again, the others are not.
    victim = min(finished)
    (staging / victim).write_bytes(b"x" * (staging / victim).stat().st_size)
    again: list[str] = []

    class Recording(ShardWriter):
        def __init__(self, path: Path, layout: Any) -> None:
            again.append(layout.name)
            super().__init__(path, layout)

    monkeypatch.setattr(execute, "ShardWriter", Recording)
    merge(catalog, text, tmp_path / "out", SMALL_SHARDS)
    assert victim in again
    assert not (finished.keys() - {victim}) & set(again)
    whole = contents(tmp_path / "whole")
    assert all(c == whole[n] for n, c in contents(tmp_path / "out").items() if n.endswith("tensors"))
    verify(tmp_path / "out")


def test_an_expert_that_changes_meanwhile(catalog: Catalog, tmp_path: Path, family: Path, monkeypatch: Any) -> None:
    text = recipe("linear", family, base=False, parameters="weight: 1")
    finish = ShardWriter.finish

    def meddle(writer: ShardWriter) -> None:
        os.utime(family / "expert1" / "model-00001-of-00002.safetensors")
        finish(writer)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "finish", meddle)
        with pytest.raises(ChangedError, match="expert1 changed while it was being read"):
            merge(catalog, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(catalog, text, tmp_path / "out")


def test_another_plan_does_not_resume(catalog: Catalog, tmp_path: Path, family: Path, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DeltaworksError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "finish", fail)
        with pytest.raises(DeltaworksError, match="stopped"):
            merge(catalog, recipe("ties", family, parameters=TIES), tmp_path / "out", SMALL_SHARDS)
    merge(catalog, recipe("linear", family, base=False, parameters="weight: 1"), tmp_path / "out")
    assert verify(tmp_path / "out")["unknown"] == []


def test_two_processes_at_once(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    import fcntl

    (tmp_path / ".out.deltaworks").mkdir()
    lock = os.open(tmp_path / ".out.deltaworks", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    text = recipe("ties", family, parameters=TIES)
    with pytest.raises(OutputError, match="another process is writing"):
        merge(catalog, text, tmp_path / "out")
    os.close(lock)
    merge(catalog, text, tmp_path / "out")


def test_a_disk_too_small_is_met_before_any_work(
    catalog: Catalog, tmp_path: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(DeltaworksError, match=r"needs [\d,]+ bytes .* has 10 free"):
        merge(catalog, recipe("ties", family, parameters=TIES), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_late(catalog: Catalog, tmp_path: Path, family: Path, monkeypatch: Any) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DeltaworksError, match="no space left"):
            merge(catalog, recipe("ties", family, parameters=TIES), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(catalog, recipe("ties", family, parameters=TIES), tmp_path / "out")


def test_stopped_between_manifest_and_rename(catalog: Catalog, tmp_path: Path, family: Path, monkeypatch: Any) -> None:
    """The manifest that is left behind is not a file of the snapshot that the next run completes."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(snapshot._Staging, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(catalog, recipe("ties", family, parameters=TIES), tmp_path / "out")
    assert (tmp_path / ".out.deltaworks" / MANIFEST).exists()
    merge(catalog, recipe("ties", family, parameters=TIES), tmp_path / "out")
    assert verify(tmp_path / "out")["verified"]
    assert MANIFEST not in read_manifest(tmp_path / "out")["files"]


def test_killed_at_any_instant(tmp_path: Path) -> None:
    """SIGKILL after ever longer waits: OUT is absent, or it is whole; the next run resumes and completes."""
    base = random_tensors(0, {f"model.layers.{i}.w.weight": (256, 300) for i in range(24)})
    write_model(tmp_path / "base", base)
    for i in range(2):
        write_model(tmp_path / f"expert{i}", tuned(i, base))
    text = recipe("ties", tmp_path, listed=("expert0", "expert1"), parameters=TIES)
    (tmp_path / "recipe.yml").write_text(text)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "deltaworks.cli.main", "merge", str(tmp_path / "recipe.yml"), str(out), "--quiet",
               "--catalog", str(tmp_path / "catalog"), "--shard-size", "200kB"]  # fmt: skip
    subprocess.run(command, check=True)  # compiles kernels where this is the first run, registers and analyzes
    started = time.monotonic()
    subprocess.run([*command, "--force"], check=True)
    usual = time.monotonic() - started
    expected = contents(out)
    absent = 0
    for share in np.linspace(0.2, 1.0, 12):
        shutil.rmtree(out)
        process = subprocess.Popen(command)
        time.sleep(usual * share)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            verify(out)
        else:
            absent += 1
        subprocess.run([*command, "--force"], check=True)
        verify(out)
        after = contents(out)
        assert {n: c for n, c in after.items() if n.endswith("tensors")} == {
            n: c for n, c in expected.items() if n.endswith("tensors")
        }
    assert absent
