"""Reads and writes that the system cuts short are completed, or are errors."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import write_family

from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.checkpoints.transfer import read_available, write_all
from deltaworks.checkpoints.writer import OutputTensor, ShardWriter, plan_shards
from deltaworks.errors import CheckpointError, DeltaworksError
from deltaworks.layers.cells import DEPTH
from deltaworks.layers.file import LayerFile
from deltaworks.layers.writer import LayerWriter

LIMIT = 7
"""Bytes that one call transfers."""


def shorten(monkeypatch: pytest.MonkeyPatch, limit: int = LIMIT) -> None:
    """Have the system transfer at most `limit` bytes a call."""
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: pread(fd, [memoryview(buffers[0])[:limit]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, memoryview(data)[:limit], at))


def test_transfers_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    data = np.arange(100, dtype=np.uint8)
    with (tmp_path / "file").open("w+b") as file:
        write_all(file.fileno(), data, 3)
        assert (tmp_path / "file").read_bytes() == bytes(3) + data.tobytes()
        back = np.zeros(50, np.uint16)
        assert read_available(file.fileno(), back, 3) == 100
        assert back.tobytes() == data.tobytes()
        assert read_available(file.fileno(), np.zeros(100, np.uint8), 60) == 43, "to the end of the file"


def test_a_device_that_takes_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match="takes no more") as caught:
        write_all(file.fileno(), b"x", 0)
    assert caught.value.errno == errno.EIO


def _range(path: Path) -> bytes:
    (path / "file").write_bytes(bytes(range(200)))
    with RangeReader(path / "file", ByteCounter()) as reader:
        return reader.read(10, 150)


def _shard(path: Path) -> bytes:
    (layout,) = plan_shards([OutputTensor("t", DTYPES["F32"], (25,))], 1000)
    writer = ShardWriter(path / layout.name, layout)
    writer.write("t", 0, np.arange(100, dtype=np.uint8))
    writer.finish()
    return (path / layout.name).read_bytes()


def _layers(path: Path) -> bytes:
    """A file of layers that holds one raw tensor, written and read back."""
    from deltaworks.layers.file import LayeredTensor

    tensor = LayeredTensor("t", "F32", (25,), is_delta=False, first=0, blocks=1, residual=0)
    writer = LayerWriter(path / "file.layers", 1, 0, 4096)
    writer.add_raw(0, np.arange(100, dtype=np.uint8))
    writer.commit([tensor], {"block_size": 4096})
    writer.abandon()
    file = LayerFile(path / "file.layers", ByteCounter())
    elements = file.restore(tensor, 0, None)
    assert file.index["ends"][0, DEPTH - 1] == 100
    file.close()
    return elements.tobytes() + (path / "file.layers").read_bytes()


@pytest.mark.parametrize("work", [_range, _shard, _layers])
def test_files_are_the_same_where_transfers_are_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Any
) -> None:
    (tmp_path / "usual").mkdir()
    expected = work(tmp_path / "usual")
    shorten(monkeypatch)
    assert work(tmp_path) == expected


def test_a_file_that_ends_early_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with RangeReader(tmp_path / "file", ByteCounter()) as reader, pytest.raises(CheckpointError, match="file ends at"):
        reader.read(0, 10)


@pytest.mark.parametrize("fault", ["short", "ends", "fails"])
def test_the_spool_of_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """What later passes need is put aside in a file: a merge gives the same bytes, or an error."""
    from families import recipe
    from merges import merge, raw_tensors

    from deltaworks.catalog.store import Catalog
    from deltaworks.merging import execute, stream
    from deltaworks.merging.budget import parse_budget
    from deltaworks.merging.prepare import MergeOptions

    write_family(tmp_path / "family")
    text = recipe("sce", tmp_path / "family", parameters="select_topk: 0.5")
    options = MergeOptions(budget=parse_budget("50%"))
    monkeypatch.setattr(execute, "_HELD_BYTES", 0)
    taken = []
    whole = read_available

    def faulty(fd: int, buffer: Any, offset: int) -> int:
        taken.append(len(buffer))
        if fault == "fails":
            raise OSError(errno.EIO, "Input/output error")
        return len(buffer) // 2 if fault == "ends" else whole(fd, buffer, offset)

    with Catalog(tmp_path / "catalog") as catalog:
        merge(catalog, text, tmp_path / "usual", options)
        monkeypatch.setattr(stream, "read_available", faulty)
        if fault == "short":
            shorten(monkeypatch, 1001)
            merge(catalog, text, tmp_path / "out", options)
            assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "usual")
        else:
            with pytest.raises(DeltaworksError, match=r"spool file in .*\.out\.deltaworks"):
                merge(catalog, text, tmp_path / "out", options)
            assert not (tmp_path / "out").exists()
    assert taken
