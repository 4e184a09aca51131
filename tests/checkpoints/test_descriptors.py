"""More files than a process may have open."""

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from families import recipe, write_family
from merges import raw_tensors

from deltaworks.checkpoints import descriptors
from deltaworks.checkpoints.checkpoint import open_checkpoint
from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.checkpoints.source import Source
from deltaworks.checkpoints.together import RowRange, read_together
from deltaworks.errors import CheckpointError

EXPERTS = 6


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Hold few descriptors at once."""
    monkeypatch.setattr(descriptors, "_most", lambda: 8)
    return 8


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[list[RangeReader]]:
    for i in range(40):
        (tmp_path / f"file{i}").write_bytes(bytes([i]) * 5000)
    opened = [RangeReader(tmp_path / f"file{i}", ByteCounter(), direct=i % 2 == 0) for i in range(40)]
    yield opened
    for reader in opened:
        reader.close()


def count_open(folder: Path) -> int:
    paths = (os.path.realpath(fd) for fd in map(str, Path("/proc/self/fd").iterdir()))
    return sum(p.startswith(str(folder)) for p in paths)


def test_few_are_open_and_all_are_read(few: int, readers: list[RangeReader], tmp_path: Path) -> None:
    assert count_open(tmp_path) <= few
    for _ in range(2):
        assert [r.read(7, 3) for r in readers] == [bytes([i]) * 3 for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: readers[i % 40].read(i, 1), range(4000)))
    assert found == [bytes([i % 40]) for i in range(4000)]
    assert count_open(tmp_path) <= few
    raw = np.zeros((40, 4096), np.uint8)
    read_together([RowRange(r, 0, 4096, i, 0) for i, r in enumerate(readers)], raw)
    np.testing.assert_array_equal(raw, np.repeat(np.arange(40, dtype=np.uint8), 4096).reshape(40, 4096))
    assert [r._counter.value for r in readers] == [readers[0]._counter.value] * 40
    assert count_open(tmp_path) <= few
    for reader in readers:
        reader.close()
    assert count_open(tmp_path) == 0


def test_a_file_that_was_replaced_while_its_descriptor_was_lent(
    few: int, readers: list[RangeReader], tmp_path: Path
) -> None:
    (tmp_path / "new").write_bytes(bytes(5000))
    (tmp_path / "new").replace(tmp_path / "file0")
    with pytest.raises(CheckpointError, match="file0 changed while it was being read"):
        readers[0].read(0, 1)


def test_a_closed_file_is_not_opened_again(readers: list[RangeReader]) -> None:
    readers[0].close()
    with pytest.raises(CheckpointError, match="closed"):
        readers[0].read(0, 1)


def test_where_the_system_gives_no_more(readers: list[RangeReader], monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may hold what was thought to be left: idle files give theirs back."""
    for reader in readers:
        reader.read(0, 1)
    readers[0]._file.close()
    readers[0]._file._is_closed = False
    failing = [True]
    whole = os.open

    def once(*arguments: object, **more: object) -> int:
        if failing.pop() if failing else False:
            raise OSError(24, "Too many open files")
        return whole(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", once)
    assert readers[0].read(0, 1) == b"\0"
    assert not failing


def test_a_file_that_opens_slowly_stops_no_other(readers: list[RangeReader], monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may take seconds to open a file; files that are open are read meanwhile."""
    slow, other = readers[0], readers[1]
    descriptors._POOL.close(slow._file)
    whole, is_opening, may_go_on = os.open, threading.Event(), threading.Event()

    def slowly(path: Path, *arguments: Any, **more: Any) -> int:
        if path == slow.path:
            is_opening.set()
            assert may_go_on.wait(60)
        return whole(path, *arguments, **more)

    monkeypatch.setattr(os, "open", slowly)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(slow.read, 0, 1) for _ in range(2)]
        assert is_opening.wait(60)
        assert other.read(0, 1) == b"\1"
        may_go_on.set()
        assert [f.result() for f in both] == [b"\0"] * 2


def test_a_file_that_is_closed_while_it_opens_holds_no_descriptor(
    readers: list[RangeReader], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, whole = readers[0]._file, os.open
    descriptors._POOL.close(file)
    before = count_open(tmp_path)

    def close_meanwhile(path: Path, *arguments: Any, **more: Any) -> int:
        fd = whole(path, *arguments, **more)
        file.close()
        return fd

    monkeypatch.setattr(os, "open", close_meanwhile)
    with pytest.raises(CheckpointError, match="closed"):
        readers[0].read(0, 1)
    assert count_open(tmp_path) == before


def test_a_model_of_which_a_file_cannot_be_opened_holds_no_others(tmp_path: Path) -> None:
    write_family(tmp_path, 1, shards=3)
    model = SimpleNamespace(checkpoint=open_checkpoint(tmp_path / "base", ByteCounter()))
    (tmp_path / "base" / model.checkpoint.shards[-1].name).unlink()
    with pytest.raises(CheckpointError, match="cannot open"):
        Source(model, ByteCounter(), direct=True)
    assert count_open(tmp_path) == 0


@pytest.mark.parametrize(
    ("method", "options"),
    [("linear", ()), ("ties", ("--layers", "--budget", "50%"))],
)
@pytest.mark.parametrize("soft", [128])
def test_a_family_of_many_files(tmp_path: Path, method: str, options: tuple[str, ...], soft: int) -> None:
    """Six experts of 30 files and their base, where soft and hard limit are 128: 210 files, and what else is open."""
    write_family(tmp_path / "family", experts=EXPERTS, shards=30)
    listed = tuple(f"expert{i}" for i in range(EXPERTS))
    text = recipe(method, tmp_path / "family", parameters="weight: 1", listed=listed)
    (tmp_path / "recipe.yml").write_text(
        text.replace("weight: 1", "weight: 1, density: 0.5" if method == "ties" else "weight: 1")
    )
    command = [sys.executable, "-m", "deltaworks.cli.main"]
    environment = os.environ | {"DELTAWORKS_CATALOG": str(tmp_path / "catalog")}
    merge = [*command, "merge", "recipe.yml", *options, "--shard-size", "20kB", "-q"]
    if "--layers" in options:
        for name in ("base", *listed):
            base = [] if name == "base" else ["--base", "base"]
            subprocess.run(
                [*command, "register", name, f"family/{name}", *base, "-q"], cwd=tmp_path, env=environment, check=True
            )
        subprocess.run([*command, "analyze", "--all", "--layers", "-q"], cwd=tmp_path, env=environment, check=True)
    subprocess.run([*merge, "usual"], cwd=tmp_path, env=environment, check=True)

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))

    subprocess.run([*merge, "few"], cwd=tmp_path, env=environment, check=True, preexec_fn=lower)
    assert raw_tensors(tmp_path / "few") == raw_tensors(tmp_path / "usual")
    fresh = environment | {"DELTAWORKS_CATALOG": str(tmp_path / "fresh")}
    if not options:
        subprocess.run([*merge, "again"], cwd=tmp_path, env=fresh, check=True, preexec_fn=lower)
        assert raw_tensors(tmp_path / "again") == raw_tensors(tmp_path / "usual")


def test_the_limit_is_raised_to_what_is_allowed() -> None:
    code = (
        "import resource; from deltaworks.checkpoints.descriptors import raise_limit; raise_limit();"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, preexec_fn=lower)
    assert done.stdout == "(300, 300)\n"
