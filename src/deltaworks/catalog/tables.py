"""What planning needs of the statistics of a delta, kept unpacked beside them and checked when it is read.

The file, ``EXPERT-BASE.table``, is made from the statistics when it is first asked for, and made anew where they have
changed since. It is a safetensors file; what else there is to say stands in one of its arrays, as JSON.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from deltaworks.catalog.statistics import DENSITIES, FORMAT_VERSION
from deltaworks.catalog.store import TABLE
from deltaworks.checkpoints.dtypes import DTYPES, F32, F64
from deltaworks.checkpoints.header import read_header, write_header
from deltaworks.checkpoints.partial import partial_path, replacing
from deltaworks.checkpoints.reader import ByteCounter, RangeReader, page_aligned
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES
from deltaworks.errors import CheckpointError

_VERSION = 2
_KEEP_BITS = 44
"""Of a key for a tensor and a number of its elements."""
_BLOCKS = {
    "changed": F64, "delta_square": F64, "base_square": F64, "base_delta": F64,
    "survives": F32, "sketch": F32, "sample": F32,
}  # fmt: skip
_ARRAYS = {"cut_keys": DTYPES["I64"], "cuts": DTYPES["I64"], **_BLOCKS}
"""The larger their elements are, the earlier they come, so that all lie where theirs may."""
_ABOUT, _DIGEST = "about", "blake3"
"""The last arrays: what else there is to say, as JSON; and the digest of all that comes before it."""
_LARGE = 1 << 20
"""Bytes from which on several threads hash faster than one."""
_NUMPY = {"F64": "<f8", "F32": "<f4", "I64": "<i8"}
_WIDTHS = {"survives": len(DENSITIES), "sketch": BUCKETS, "sample": SAMPLES, "cuts": 4}


@dataclass(frozen=True, slots=True)
class KnownCuts:
    """The trim cuts that stand in the statistics of one delta.

    Attributes:
        tensors: their names and sizes, as JSON: the same text for most experts of a family.
        keys: int64, [cuts], rising; the number of the tensor, above that of the elements kept.
        cuts: int64, [cuts, 4]; packed.
    """

    tensors: str
    keys: NDArray[np.int64]
    cuts: NDArray[np.int64]

    def find(self, wanted: tuple[tuple[str, int], ...]) -> list[list[int] | None]:
        """The packed cut of each wanted tensor and number of kept elements; None where it is not among them."""
        keys = _keys(self.tensors, wanted)
        if not len(self.keys):
            return [None] * len(keys)
        found = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        cuts, known = self.cuts[found].tolist(), (self.keys[found] == keys).tolist()
        return [cut if is_known else None for cut, is_known in zip(cuts, known, strict=True)]


@dataclass(frozen=True, slots=True)
class DeltaTable:
    """What planning needs of one delta: a row a block, tensor after tensor; see `BLOCK_FIELDS` for the columns.

    Attributes:
        block_size: elements a block.
        rows: the rows of each tensor.
        changed, delta_square, base_square, base_delta: float64, [blocks].
        survives: float32, [blocks, DENSITIES]; sum of squares of what a trim leaves.
        sketch: float32, [blocks, BUCKETS].
        sample: float32, [blocks, SAMPLES]; the delta at `sample_places`.
        cuts: where its trims fall.
    """

    block_size: int
    rows: Mapping[str, slice]
    changed: NDArray[np.float64]
    delta_square: NDArray[np.float64]
    base_square: NDArray[np.float64]
    base_delta: NDArray[np.float64]
    survives: NDArray[np.float32]
    sketch: NDArray[np.float32]
    sample: NDArray[np.float32]
    cuts: KnownCuts


def read_table(statistics: Path) -> DeltaTable:
    """What planning needs of a statistics file.

    Raises:
        CatalogError: the statistics are damaged or of another version.
    """
    about, arrays = _unpacked(statistics)
    block_size, tensors = about["block_size"], about["tensors"]
    blocks = {name: arrays[name] for name in _BLOCKS}
    cuts = KnownCuts(tensors, arrays["cut_keys"], arrays["cuts"])
    return DeltaTable(block_size, _rows(tensors, block_size), **blocks, cuts=cuts)


@lru_cache(maxsize=16)
def _rows(tensors: str, block_size: int) -> dict[str, slice]:
    """The rows of each tensor, given as JSON: the same text for most experts of a family."""
    rows, end = {}, 0
    for name, size in json.loads(tensors):
        start, end = end, end + max(1, -(-size // block_size))
        rows[name] = slice(start, end)
    return rows


@lru_cache(maxsize=16)
def _keys(tensors: str, wanted: tuple[tuple[str, int], ...]) -> NDArray[np.int64]:
    """The keys of cuts; see `KnownCuts`. Merges want the same of all experts."""
    places = {name: i for i, (name, _) in enumerate(json.loads(tensors))}
    return np.array([(places[tensor] << _KEEP_BITS) + keep for tensor, keep in wanted], np.int64)


_Unpacked = tuple[dict[str, Any], dict[str, NDArray[Any]]]


def _unpacked(statistics: Path) -> _Unpacked:
    """What the table beside a statistics file says, which is written unless it is there."""
    path, stamp = statistics.with_suffix(TABLE), _stamp(statistics)
    with suppress(OSError, ValueError, KeyError, CheckpointError):
        about, arrays = _map(path)
        if about["stamp"] == stamp:
            return about, arrays
    about, arrays = _unpack(statistics)
    about["stamp"] = stamp
    with suppress(OSError):  # where nothing can be written, they are unpacked every time
        _write(path, about, arrays)
    return about, arrays


def _stamp(statistics: Path) -> list[int]:
    """What tells whether a table was made from statistics as they are now."""
    try:
        state = statistics.stat()
    except FileNotFoundError:
        return []  # reading them says so
    return [_VERSION, FORMAT_VERSION, state.st_size, state.st_mtime_ns, state.st_ino]


def _map(path: Path) -> _Unpacked:
    with RangeReader(path, ByteCounter()) as reader:
        header, size = read_header(reader), reader.size
        # Read and not mapped: every byte is looked at for the digest, and a map would hold a descriptor.
        content = page_aligned(1, size)[0, :size]
        reader.read_into(content, 0)
    content.flags.writeable = False
    end = header[_DIGEST].offset
    threads = blake3.AUTO if size >= _LARGE else 1
    if blake3(content[:end].data, max_threads=threads).digest() != content[end:].tobytes():
        raise CheckpointError(f"{path} is damaged")
    arrays = {n: np.frombuffer(content, _NUMPY[d.name], header[n].count, header[n].offset) for n, d in _ARRAYS.items()}
    start, count = header[_ABOUT].offset, header[_ABOUT].nbytes
    return json.loads(content[start : start + count].tobytes()), {
        name: flat.reshape(-1, _WIDTHS[name]) if name in _WIDTHS else flat for name, flat in arrays.items()
    }


def _write(path: Path, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a table; nothing stands under its name before all of it is on the device."""
    partial = partial_path(path.with_stem(f"{path.stem}-{threading.get_ident()}"))
    text = json.dumps(about).encode()
    kinds = [(name, dtype, arrays[name].shape) for name, dtype in _ARRAYS.items()]
    u8 = DTYPES["U8"]
    header, _ = write_header([*kinds, (_ABOUT, u8, (len(text),)), (_DIGEST, u8, (blake3.digest_size,))])
    data: Iterator[NDArray[np.uint8]] = (
        np.ascontiguousarray(arrays[n], _NUMPY[d.name]).reshape(-1).view(np.uint8) for n, d in _ARRAYS.items()
    )
    hasher = blake3()
    with replacing(path, partial) as file:
        parts: list[bytes | memoryview] = [header, *(d.data for d in data), text]
        for part in parts:
            hasher.update(part)
            file.write(part)
        file.write(hasher.digest())


def _unpack(statistics: Path) -> _Unpacked:
    from deltaworks.catalog.statistics_file import open_statistics, unpack_floats  # noqa: PLC0415  # slow, seldom

    with open_statistics(statistics) as (file, block_size):
        last = file.num_row_groups - 1
        blocks = file.read_row_groups(range(max(0, last)), list(_BLOCKS))
        arrays: dict[str, NDArray[Any]] = {
            name: unpack_floats(blocks[name], _WIDTHS[name]) if name in _WIDTHS else blocks[name].to_numpy()
            for name in _BLOCKS
        }
        names: Sequence[str] = []
        sizes: Sequence[int] = []
        keys, cuts = np.empty(0, np.int64), np.empty((0, 5), np.int64)
        if last >= 0:
            totals = file.read_row_group(last, ["tensor", "elements", "cuts"])
            names, sizes = totals["tensor"].to_pylist(), totals["elements"].to_pylist()
            lists = totals["cuts"].combine_chunks()
            cuts = lists.values.to_numpy().reshape(-1, 5)
            each = np.diff(lists.offsets.to_numpy().astype(np.int64)) // 5
            keys = (np.repeat(np.arange(len(names)), each) << _KEEP_BITS) + cuts[:, 0]
        arrays |= {"cut_keys": keys, "cuts": np.ascontiguousarray(cuts[:, 1:])}
    tensors = json.dumps(list(zip(names, sizes, strict=True)), separators=(",", ":"))
    return {"block_size": block_size, "tensors": tensors}, arrays
