"""The header of a safetensors file: parse with suspicion, write aligned.

Format: eight bytes of little-endian length, that many bytes of JSON, then the tensors' data without holes
(https://github.com/huggingface/safetensors#format).
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.downloads import HEAD_BYTES, explain_weights
from deltaworks.checkpoints.dtypes import DTYPES, DType
from deltaworks.checkpoints.reader import RangeReader
from deltaworks.documents import parse_json
from deltaworks.errors import CheckpointError, quoted

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its name in the file.
        dtype: its element type.
        shape: its shape; empty for a scalar.
        file: name of the file, without a folder.
        offset: position of its first byte from the start of the file.
        nbytes: its size.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(reader: RangeReader) -> dict[str, TensorInfo]:
    """Parse and check the header of an open safetensors file.

    Returns:
        The tensors by name, in the order of their data.

    Raises:
        CheckpointError: the file is truncated, or its header is not what the format allows.
    """
    path, size = reader.path, reader.size
    if size < 8:
        problem = explain_weights(reader.read(0, size), size)
        raise CheckpointError(
            f"{path} {problem or f'is {size} bytes long, too short for a safetensors file; fetch it again'}"
        )
    (length,) = struct.unpack("<Q", reader.read(0, 8))
    if length == 0 or 8 + length > size:
        problem = explain_weights(reader.read(0, min(size, HEAD_BYTES)), size)
        if problem is not None:
            raise CheckpointError(f"{path} {problem}")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path} claims a header of {length:,} bytes; the format allows {MAX_HEADER_BYTES:,},"
            " so it is not a safetensors file"
        )
    if 8 + length > size:
        raise CheckpointError(f"{path} is cut short inside its header ({size:,} bytes); fetch it again")
    header = parse_json(reader.read(8, length), f"{path}: header", "safetensors metadata", CheckpointError)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a header that is not a JSON object")
    header.pop("__metadata__", None)
    start, data_size = 8 + length, size - 8 - length
    tensors = sorted(
        (_tensor(path, name, entry, start) for name, entry in header.items()), key=lambda t: (t.offset, t.nbytes)
    )
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            what = "overlaps another" if tensor.offset < end else "leaves a hole before it"
            raise CheckpointError(f"{path}: the data of tensor {quoted(tensor.name)} {what}; the file is damaged")
        end += tensor.nbytes
    if end != size:
        what = "is cut short" if end > size else "has bytes after its last tensor"
        raise CheckpointError(
            f"{path} {what}: its header describes {end - start:,} bytes of data and it holds {data_size:,};"
            " fetch it again"
        )
    return {t.name: t for t in tensors}


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {quoted(name)} {what}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise bad("lacks dtype, shape or data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise bad(f"has the unknown dtype {quoted(entry['dtype'])}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or any(type(n) is not int or n < 0 for n in shape):
        raise bad(f"has the impossible shape {quoted(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
        raise bad(f"has impossible data_offsets {quoted(offsets)}")
    bits = math.prod(shape) * dtype.bits
    nbytes = offsets[1] - offsets[0]
    if bits % 8 or nbytes * 8 != bits:
        wanted = f"{bits / 8:,g}" if bits < 1 << 64 else "more than any file holds"
        raise bad(f"has {quoted(nbytes)} bytes of data where its shape {quoted(shape)} in {dtype.name} needs {wanted}")
    return TensorInfo(name, dtype, tuple(shape), path.name, start + offsets[0], nbytes)


def write_header(tensors: list[tuple[str, DType, tuple[int, ...]]]) -> tuple[bytes, list[int]]:
    """The bytes before the data of a file that holds `tensors` in this order, and each one's absolute offset.

    The data begin at a page, so that they can be written around the page cache.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = [], 0
    for name, dtype, shape in tensors:
        nbytes = dtype.nbytes(math.prod(shape))
        header[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        offsets.append(end)
        end += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    prefix = struct.pack("<Q", len(text)) + text
    return prefix, [len(prefix) + o for o in offsets]
