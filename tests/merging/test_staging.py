"""Where a merge builds its output: nothing of anybody else's is removed, and what is left is found again."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import recipe, write_family
from merges import merge, raw_tensors
from shell import Shell

from deltaworks.catalog.store import Catalog
from deltaworks.catalog.tidy import Waste
from deltaworks.checkpoints.writer import ShardWriter
from deltaworks.errors import CheckpointError, DeltaworksError, OutputError
from deltaworks.merging import snapshot
from deltaworks.merging.manifest import MANIFEST
from deltaworks.merging.owned_folder import JOURNAL, OwnedFolder, identity
from deltaworks.merging.prepare import MergeOptions
from deltaworks.merging.snapshot import verify
from deltaworks.merging.unfinished import enter_finished, find_unfinished, remove_unfinished

SMALL_SHARDS = MergeOptions(shard_bytes=9000)


@pytest.fixture
def text(tmp_path: Path) -> str:
    write_family(tmp_path / "family")
    return recipe("linear", tmp_path / "family", base=False, parameters="weight: 1")


def tree(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): "" if p.is_dir() else p.read_text() for p in sorted(path.rglob("*"))}


def _link(staging: Path) -> None:
    _folder(staging.parent / "precious")
    staging.symlink_to("precious")


def _folder(staging: Path) -> None:
    (staging / "deep").mkdir(parents=True)
    (staging / "thesis.txt").write_text("keep")
    (staging / "deep" / "data").write_text("keep")


def _with_foreign_journal(staging: Path) -> None:
    _folder(staging)
    (staging / JOURNAL).write_text(json.dumps({"plan": "x", "shards": {}, "expert_bytes": {}}))


def _with_escaping_journal(staging: Path) -> None:
    staging.mkdir()
    (staging.parent / "thesis.txt").write_text("keep")
    names = {"deltaworks_staging": 1, "plan": "x", "shards": {}, "expert_bytes": {}, "files": ["../thesis.txt"]}
    (staging / JOURNAL).write_text(json.dumps(names))


def _with_more_than_its_journal(staging: Path) -> None:
    with OwnedFolder(staging) as folder:
        folder.claim(["model.safetensors"], plan="x", shards={}, expert_bytes={})
    (staging / "model.safetensors").write_text("ours")
    (staging / "notes.txt").write_text("keep")


def _with_a_link_for_a_file(staging: Path) -> None:
    with OwnedFolder(staging) as folder:
        folder.claim(["model.safetensors"], plan="x", shards={}, expert_bytes={})
    (staging.parent / "thesis.txt").write_text("keep")
    (staging / "model.safetensors").symlink_to("../thesis.txt")


def _with_an_empty_folder(staging: Path) -> None:
    (staging / "inside").mkdir(parents=True)


def _file(staging: Path) -> None:
    staging.write_text("keep")


FOREIGN: dict[Callable[[Path], None], str] = {
    _link: "it is a link",
    _folder: "was not created by deltaworks",
    _with_foreign_journal: "is not the journal of a merge",
    _with_escaping_journal: "is not the journal of a merge",
    _with_more_than_its_journal: "holds 'notes.txt'",
    _with_a_link_for_a_file: "holds 'model.safetensors'",
    _with_an_empty_folder: "holds 'inside'",
    _file: "it is not a folder",
}


@pytest.mark.parametrize("make", FOREIGN, ids=lambda f: f.__name__)
def test_what_is_not_ours_is_kept(catalog: Catalog, tmp_path: Path, text: str, make: Any) -> None:
    place = tmp_path / "place"
    place.mkdir()
    make(place / ".out.deltaworks")
    before = tree(place)
    with pytest.raises(OutputError, match=FOREIGN[make]) as caught:
        merge(catalog, text, place / "out", force=True)
    assert str(place / ".out.deltaworks") in str(caught.value)
    assert tree(place) == before
    assert find_unfinished(catalog) == [] or make is _with_foreign_journal
    remove_unfinished(catalog, find_unfinished(catalog))
    assert tree(place) == before


def test_a_folder_of_another_user_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(OutputError, match="belongs to another user"):
        OwnedFolder(tmp_path / "folder")


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "[" * 5000, '{"deltaworks_staging": 1}', '{"deltaworks_staging": 1, "plan": 7}', "\ud800", "1e999"],
)
def test_a_malformed_journal_is_one_sentence(catalog: Catalog, tmp_path: Path, text: str, content: str) -> None:
    (tmp_path / ".out.deltaworks").mkdir()
    (tmp_path / ".out.deltaworks" / JOURNAL).write_text(content, errors="surrogatepass")
    with pytest.raises(OutputError, match=r"\.journal\.json") as caught:
        merge(catalog, text, tmp_path / "out")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_a_link_to_an_empty_folder_is_replaced_by_force_alone(catalog: Catalog, tmp_path: Path, text: str) -> None:
    (tmp_path / "big" / "empty").mkdir(parents=True)
    (tmp_path / "out").symlink_to("big/empty")
    with pytest.raises(OutputError, match="--force"):
        merge(catalog, text, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    merge(catalog, text, tmp_path / "out", force=True)
    assert not (tmp_path / "out").is_symlink()
    assert verify(tmp_path / "out")["verified"]
    assert list((tmp_path / "big").iterdir()) == [tmp_path / "big" / "empty"], "what it led to stays"
    assert not list(tmp_path.glob(".*"))


def _stop(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Have a merge stop when so many shards are finished."""
    finish, done = ShardWriter.finish, list[ShardWriter]()

    def finish_or_stop(writer: ShardWriter) -> str:
        if len(done) == after:
            raise error
        done.append(writer)
        return finish(writer)

    monkeypatch.setattr(ShardWriter, "finish", finish_or_stop)


def test_a_failed_merge_says_what_it_leaves(
    catalog: Catalog, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        _stop(patched, 2, DeltaworksError("the device fails"))
        with pytest.raises(DeltaworksError, match="the device fails; the files that are finished stay in") as caught:
            merge(catalog, text, tmp_path / "out", SMALL_SHARDS)
    assert "deltaworks gc" in str(caught.value)
    staging = tmp_path / ".out.deltaworks"
    assert str(staging) in str(caught.value)
    (found,) = find_unfinished(catalog)
    assert found.path == staging
    assert found.nbytes > 0
    assert remove_unfinished(catalog, [found]) == found.nbytes
    assert not staging.exists()
    assert catalog.stagings() == []


def test_a_merge_that_finished_nothing_leaves_nothing(
    catalog: Catalog, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(DeltaworksError, match=r"make room first$"):
            merge(catalog, text, tmp_path / "out")
    with monkeypatch.context() as patched:
        _stop(patched, 0, DeltaworksError("the device fails"))
        with pytest.raises(DeltaworksError, match=r"the device fails$"):
            merge(catalog, text, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / "out").exists()
    assert catalog.stagings() == []


def test_a_catalog_that_is_locked_hides_no_error(
    catalog: Catalog, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The merge fails, and then the catalog as well: the first error is reported, and the folder is let go."""

    def fail(*_: Any, **__: Any) -> None:
        raise DeltaworksError("the catalog cannot be written: database is locked")

    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "end_staging", fail)
        patched.setattr(OwnedFolder, "claim", _full)
        with pytest.raises(DeltaworksError, match="no space left"):
            merge(catalog, text, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "end_staging", fail)
        _stop(patched, 0, DeltaworksError("the device fails"))
        with pytest.raises(DeltaworksError, match=r"the device fails$"):
            merge(catalog, text, tmp_path / "out")
    held = [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]
    assert not [path for path in held if Path(path.removesuffix(" (deleted)")).name == ".out.deltaworks"]
    assert remove_unfinished(catalog, []) == 0
    assert catalog.stagings() == []
    merge(catalog, text, tmp_path / "out")


def _full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(
    catalog: Catalog, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Merges work there and are resumed; what a merge left is kept, because it may be running."""

    def no_locks(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with monkeypatch.context() as patched:
        _stop(patched, 2, DeltaworksError("the device fails"))
        with pytest.raises(DeltaworksError, match="the device fails"):
            merge(catalog, text, tmp_path / "out", SMALL_SHARDS)
    (staged,) = catalog.stagings()
    assert find_unfinished(catalog) == []
    remove_unfinished(catalog, [Waste(staged.path, 1, "")])
    assert staged.path.is_dir()
    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "save_snapshot", _killed)
        with pytest.raises(KeyboardInterrupt):
            merge(catalog, text, tmp_path / "out", SMALL_SHARDS)
    assert enter_finished(catalog) == [tmp_path / "out"]
    assert verify(tmp_path / "out")["verified"]


def test_a_folder_that_changed_places_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between making the folder and opening it, another user puts one in its place."""
    whole, turns = OwnedFolder._open, list[int]()

    def swap(folder: OwnedFolder) -> int:
        turns.append(1)
        if len(turns) > 1:
            return whole(folder)
        folder.path.rename(tmp_path / "moved")
        folder.path.mkdir()
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        return -1

    monkeypatch.setattr(OwnedFolder, "_open", swap)
    with pytest.raises(OutputError, match="belongs to another user"):
        OwnedFolder(tmp_path / "folder")


def test_a_claim_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is flushed before it gets its name, and its folder afterwards."""
    whole, steps = os.fsync, list[str]()

    def fsync(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        steps.append(f"{name}, {(tmp_path / 'folder' / JOURNAL).exists()}")
        whole(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with OwnedFolder(tmp_path / "folder") as folder:
        folder.claim(["model.safetensors"], plan="x", shards={}, expert_bytes={})
    assert steps == [f"{JOURNAL}.new, False", "folder, True"]


def test_a_small_file_that_cannot_be_copied_fails_before_the_weights_are_read(
    catalog: Catalog, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = tmp_path / "family" / "expert0"
    (donor / "vocab.json").write_text("{}")
    monkeypatch.setattr(snapshot, "_check_space", lambda *_: (donor / "vocab.json").unlink())
    monkeypatch.setattr(snapshot, "execute", None)
    with pytest.raises(CheckpointError, match=r"vocab\.json is gone"):
        merge(catalog, text, tmp_path / "out")
    assert not list(tmp_path.glob(".*"))
    assert catalog.stagings() == []


def test_a_small_file_that_is_added_during_the_merge_is_not_copied(
    catalog: Catalog, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = tmp_path / "family" / "expert0"
    monkeypatch.setattr(snapshot, "_check_space", lambda *_: (donor / "vocab.json").write_text("{}"))
    merge(catalog, text, tmp_path / "out")
    assert verify(tmp_path / "out")["unknown"] == []
    assert not (tmp_path / "out" / "vocab.json").exists()


def test_a_running_merge_is_no_waste(catalog: Catalog, tmp_path: Path) -> None:
    with OwnedFolder(tmp_path / ".out.deltaworks") as folder:
        folder.claim(["model.safetensors"], plan="x", shards={}, expert_bytes={})
        catalog.begin_staging(folder.path, tmp_path / "out", "x")
        assert find_unfinished(catalog) == []
        remove_unfinished(catalog, [])
        assert len(catalog.stagings()) == 1
    assert len(find_unfinished(catalog)) == 1


def test_what_another_process_removed_is_forgotten(catalog: Catalog, tmp_path: Path) -> None:
    catalog.begin_staging(tmp_path / ".out.deltaworks", tmp_path / "out", "x")
    assert remove_unfinished(catalog, [Waste(tmp_path / ".out.deltaworks", 1, "left")]) == 0
    assert catalog.stagings() == []


def test_folders_that_cannot_change_places_leave_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError):
        snapshot._exchange(tmp_path / "missing", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["verify", "list", "lineage", "show", "merge", "gc"])
def test_an_output_that_the_catalog_missed_is_entered(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """The process is killed between renaming the output and writing the row."""
    (tmp_path / "recipe.yml").write_text(text)
    with Catalog(tmp_path / "catalog") as catalog, monkeypatch.context() as patched:
        patched.setattr(Catalog, "save_snapshot", _killed)
        with pytest.raises(KeyboardInterrupt):
            merge(catalog, text, tmp_path / "out")
        assert catalog.snapshots() == []
    shell = Shell(tmp_path)
    if command == "merge":
        assert "exists" in shell.error("merge", "recipe.yml", "out")
    else:
        shell.run(command, *(["out"] if command not in ("list", "gc") else []))
    with Catalog(tmp_path / "catalog") as catalog:
        assert [path for path, *_ in catalog.snapshots()] == [tmp_path / "out"]
        assert catalog.stagings() == []


def _killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_catalog_that_fails_at_the_end(catalog: Catalog, tmp_path: Path, text: str, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise DeltaworksError("the catalog cannot be written: disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "save_snapshot", fail)
        with pytest.raises(DeltaworksError, match="out is complete, but the catalog cannot be written"):
            merge(catalog, text, tmp_path / "out")
    assert verify(tmp_path / "out")["verified"]
    assert enter_finished(catalog) == [tmp_path / "out"]


def test_a_moved_output_is_entered_by_verify(tmp_path: Path, text: str) -> None:
    with Catalog(tmp_path / "catalog") as catalog:
        merge(catalog, text, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    Shell(tmp_path).run("verify", "moved")
    with Catalog(tmp_path / "catalog") as catalog:
        assert [path.name for path, *_ in catalog.snapshots()] == ["out", "moved"]


@pytest.mark.parametrize("point", ["before the exchange", "after it", "while removing"])
@pytest.mark.parametrize("old", ["folder", "link", "file"])
def test_killed_while_it_replaces(
    catalog: Catalog, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, point: str, old: str
) -> None:
    """What --force was to replace is recognised by its identity, and removed by the next run."""
    out = tmp_path / "out"
    if old == "folder":
        (out / "deep").mkdir(parents=True)
        (out / "deep" / "data").write_text("old")
        (out / "old").write_text("old")
    elif old == "link":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "data").write_text("keep")
        out.symlink_to("elsewhere")
    else:
        out.write_text("old")
    with monkeypatch.context() as patched:
        if point == "before the exchange":
            patched.setattr(snapshot, "_exchange", _killed)
        elif point == "after it":
            patched.setattr(snapshot, "_remove", _killed)
        else:

            def remove_some(path: Path, _: str) -> None:
                shutil.rmtree(path / "deep", ignore_errors=True)
                raise KeyboardInterrupt

            patched.setattr(snapshot, "_remove", remove_some)
        with pytest.raises(KeyboardInterrupt):
            merge(catalog, text, out, force=True)
    if point != "before the exchange":
        assert verify(out)["verified"]
        assert enter_finished(catalog) == [out]
    merge(catalog, text, out, force=True)
    assert verify(out)["unknown"] == []
    assert not list(tmp_path.glob(".*"))
    assert old != "link" or tree(tmp_path / "elsewhere") == {"data": "keep"}


def test_sealed_and_killed(catalog: Catalog, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal goes just before the output appears; the manifest tells then what is ours."""
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", _killed)
        with pytest.raises(KeyboardInterrupt):
            merge(catalog, text, tmp_path / "out")
    staging = tmp_path / ".out.deltaworks"
    assert not (staging / JOURNAL).exists()
    assert (staging / MANIFEST).exists()
    (found,) = find_unfinished(catalog)
    assert found.path == staging
    merge(catalog, text, tmp_path / "out")
    assert verify(tmp_path / "out")["verified"]


def test_any_kill_leaves_what_the_next_run_takes(tmp_path: Path, text: str) -> None:
    """SIGKILL at each change of a name or a folder: the next run succeeds, and leaves nothing."""
    (tmp_path / "recipe.yml").write_text(text)
    command = [sys.executable, "-c", _KILLED_AT, "merge", "recipe.yml", "out", "-q", "--force",
               "--catalog", str(tmp_path / "catalog"), "--shard-size", "9kB"]  # fmt: skip
    environment = os.environ | {"KILL_AT": "0"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    expected = raw_tensors(tmp_path / "out")
    for at in range(1, 200, 3):
        done = subprocess.run(command, cwd=tmp_path, env=environment | {"KILL_AT": str(at)}, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -9
        if (tmp_path / "out").exists():
            verify(tmp_path / "out")
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        assert verify(tmp_path / "out")["unknown"] == []
        assert raw_tensors(tmp_path / "out") == expected
        assert not list(tmp_path.glob(".*"))
    assert at > 10


_KILLED_AT = """
import ctypes, os, signal, sys
from pathlib import Path
left = [int(os.environ["KILL_AT"])]

def step(call):
    def run(*arguments, **more):
        result = call(*arguments, **more)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return run

from deltaworks.merging import snapshot
from deltaworks.catalog.store import Catalog
for name in ("rename", "mkdir", "rmdir"):
    setattr(os, name, step(getattr(os, name)))
snapshot._exchange = step(snapshot._exchange)
for name in ("begin_staging", "save_snapshot", "end_staging"):
    setattr(Catalog, name, step(getattr(Catalog, name)))
from deltaworks.cli.main import main
main()
"""


def test_identities_tell_folders_apart(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    known = identity(tmp_path / "a")
    assert known != identity(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "c")
    assert identity(tmp_path / "c") == known
