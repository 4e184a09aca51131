import errno
import os
import random
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from families import BF16, read_model
from hypothesis import given
from hypothesis import strategies as st

from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.checkpoints.reader import page_aligned
from deltaworks.checkpoints.writer import OutputTensor, ShardWriter, plan_shards
from deltaworks.errors import DeltaworksError

NUMPY = {"F32": np.dtype(np.float32), "BF16": BF16, "I64": np.dtype(np.int64), "U8": np.dtype(np.uint8)}


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(NUMPY)), st.lists(st.integers(0, 9), max_size=3)), min_size=1, max_size=12
    ),
    st.integers(1, 2000),
    st.randoms(use_true_random=False),
)
def test_blocks_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, specs: list[tuple[str, list[int]]], limit: int, order: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("out")
    tensors = [OutputTensor(f"t{i}", DTYPES[d], tuple(s)) for i, (d, s) in enumerate(specs)]
    data = {t.name: np.random.default_rng(i).integers(0, 256, t.nbytes, dtype=np.uint8) for i, t in enumerate(tensors)}
    layouts = plan_shards(tensors, limit)
    assert [t.name for layout in layouts for t in sorted(layout.tensors, key=lambda t: int(t.name[1:]))] == [
        t.name for t in tensors
    ]
    for layout in layouts:
        assert len(layout.tensors) == 1 or sum(t.nbytes for t in layout.tensors) <= limit
        for t in layout.tensors:
            assert layout.offsets[t.name] % (t.dtype.bits // 8) == 0
        writer = ShardWriter(folder / layout.name, layout)
        pieces = [(t.name, start) for t in layout.tensors for start in range(0, t.nbytes, 7)]
        order.shuffle(pieces)
        for name, start in pieces:
            writer.write(name, start, data[name][start : start + 7])
        writer.finish()
        assert (folder / layout.name).stat().st_size == layout.nbytes
    back = read_model(folder)
    for (dtype, shape), tensor in zip(specs, tensors, strict=True):
        assert back[tensor.name].dtype == NUMPY[dtype]
        assert back[tensor.name].shape == tuple(shape)
        assert back[tensor.name].tobytes() == data[tensor.name].tobytes()
        assert prod(shape) == tensor.count


@pytest.mark.parametrize("aligned", [True, False])
def test_whole_pages_and_their_edges(tmp_path: Path, aligned: bool) -> None:
    """Blocks of which the pages inside go around the page cache, and the ends through it."""
    rng = np.random.default_rng(0)
    shapes = [(3 * PAGE,), (5, 1000), (PAGE,), (2 * PAGE + 1,), (70, 300)]
    tensors = [OutputTensor(f"t{i}", DTYPES["F32" if i % 2 else "U8"], s) for i, s in enumerate(shapes)]
    (layout,) = plan_shards(tensors, 1 << 30)
    assert layout.offsets["t0"] % PAGE == layout.offsets["t2"] % PAGE == 0
    writer = ShardWriter(tmp_path / layout.name, layout)
    content = bytearray(layout.header)
    for tensor in layout.tensors:
        data = rng.integers(0, 256, tensor.nbytes, dtype=np.uint8)
        for start in range(0, tensor.nbytes, 3001):
            part = data[start : start + 3001 if start + 6002 < tensor.nbytes else tensor.nbytes]
            place = writer.place(tensor.name, start) if aligned else 77
            (row,) = page_aligned(1, len(part) + PAGE)
            row[place : place + len(part)] = part
            writer.write(tensor.name, start, row[place : place + len(part)])
            writer.hash(tensor.name, start, part)
            if len(part) != 3001:
                break
        content += data.tobytes()
    assert writer.finish() == blake3(content).hexdigest()
    assert (tmp_path / layout.name).read_bytes() == content


def test_names_are_the_hubs() -> None:
    tensors = [OutputTensor(f"t{i}", DTYPES["F32"], (10,)) for i in range(3)]
    assert [s.name for s in plan_shards(tensors, 1000)] == ["model.safetensors"]
    assert [s.name for s in plan_shards(tensors, 80)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (layout,) = plan_shards([OutputTensor("t", DTYPES["F32"], (10,))], 1000)

    def write() -> None:
        writer = ShardWriter(tmp_path / layout.name, layout)
        monkeypatch.setattr(os, call, full)
        writer.write("t", 0, np.zeros(40, np.uint8))
        writer.finish()

    if call == "posix_fallocate":
        monkeypatch.setattr(os, call, full)
    with pytest.raises(DeltaworksError, match="no space left"):
        write()
    if call == "posix_fallocate":  # then there is no writer that could be closed
        assert tmp_path / layout.name not in [Path(os.path.realpath(fd)) for fd in Path("/proc/self/fd").iterdir()]


def test_a_file_system_that_cannot_allocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    (layout,) = plan_shards([OutputTensor("t", DTYPES["F32"], (10,))], 1000)
    ShardWriter(tmp_path / layout.name, layout).finish()
    assert (tmp_path / layout.name).stat().st_size == layout.nbytes
