import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import random_tensors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from deltaworks.checkpoints.dtypes import DTYPES
from deltaworks.checkpoints.header import TensorInfo, read_header, write_header
from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.errors import CheckpointError


def parse(path: Path) -> dict[str, TensorInfo]:
    with RangeReader(path, ByteCounter()) as reader:
        return read_header(reader)


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_agrees_with_the_library(tmp_path: Path) -> None:
    tensors = random_tensors(0, {"b": (3, 5), "a": (7,), "empty": (0, 4)})
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    found = parse(tmp_path / "m.safetensors")
    assert found.keys() == tensors.keys()
    content = (tmp_path / "m.safetensors").read_bytes()
    for name, info in found.items():
        assert info.shape == tensors[name].shape
        assert content[info.offset : info.offset + info.nbytes] == tensors[name].tobytes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b"abc"), "too short"),
        (lambda p: raw_file(p, {}, length=1 << 62), "claims a header of"),
        (lambda p: raw_file(p, {}, length=5000), "inside its header"),
        (lambda p: raw_file(p, b"{not json"), "not valid JSON"),
        (lambda p: raw_file(p, b"\xff{}"), "not text in UTF-8"),
        (lambda p: raw_file(p, b"[" * 100_000), "nested more than 100 deep"),
        (lambda p: raw_file(p, [1, 2]), "not a JSON object"),
        (
            lambda p: raw_file(p, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"1234"),
            "given twice",
        ),
        (lambda p: raw_file(p, {"a": 5}), "lacks dtype"),
        (lambda p: raw_file(p, {"a": entry(dtype="F33")}, bytes(8)), "unknown dtype 'F33'"),
        (lambda p: raw_file(p, {"a": entry(dtype=["F32"])}, bytes(8)), "unknown dtype"),
        (lambda p: raw_file(p, {"a": entry(shape=[-2])}, bytes(8)), "impossible shape"),
        (lambda p: raw_file(p, {"a": entry(shape=[True, 2])}, bytes(8)), "impossible shape"),
        (lambda p: raw_file(p, {"a": entry(shape=[2.0])}, bytes(8)), "impossible shape"),
        (lambda p: raw_file(p, {"a": entry(shape=[1 << 60] * 100_000)}, bytes(8)), "impossible shape"),
        (lambda p: raw_file(p, b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "has 5,000 digits"),
        (lambda p: raw_file(p, {"a": entry(offsets=[0, 8, 9])}, bytes(8)), "impossible data_offsets"),
        (lambda p: raw_file(p, {"a": entry(offsets=[8, 0])}, bytes(8)), "needs 8"),
        (lambda p: raw_file(p, {"a": entry(shape=[1 << 40, 1 << 40])}, bytes(8)), "bytes of data where its shape"),
        (lambda p: raw_file(p, {"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps"),
        (lambda p: raw_file(p, {"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20)), "leaves a hole"),
        (lambda p: raw_file(p, {"a": entry()}, bytes(7)), "cut short"),
        (lambda p: raw_file(p, {"a": entry()}, bytes(9)), "bytes after its last tensor"),
    ],
)
def test_refuses(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "bad.safetensors"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        parse(path)
    assert str(path) in str(caught.value)


@given(st.data())
def test_damage_never_surprises(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever bytes change, a header parses to ranges inside the file or raises a CheckpointError."""
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    save_file({"a": np.zeros((3, 2), np.float32), "b": np.ones(4, np.float16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path.write_bytes(content)
    try:
        tensors = parse(path)
    except CheckpointError:
        return
    for info in tensors.values():
        assert 8 <= info.offset <= info.offset + info.nbytes <= len(content)


def test_written_headers_are_read_by_the_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = [("x", DTYPES["F32"], (2, 3)), ("ü", DTYPES["BF16"], (5,)), ("i", DTYPES["I64"], ())]
    prefix, offsets = write_header(tensors)
    assert len(prefix) % 8 == 0
    assert offsets == [len(prefix), len(prefix) + 24, len(prefix) + 34]
    (tmp_path / "m.safetensors").write_bytes(prefix + bytes(42))
    with safe_open(tmp_path / "m.safetensors", "np") as f:
        assert f.metadata() == {"format": "pt"}
        assert set(f.keys()) == {"x", "ü", "i"}
    assert list(parse(tmp_path / "m.safetensors")) == ["x", "ü", "i"]
