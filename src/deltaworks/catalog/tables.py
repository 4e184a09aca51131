"""What planning needs of the statistics of a delta, kept unpacked beside them in a file that is mapped, not read.

The file, ``EXPERT-BASE.table``, is made from the statistics when it is first asked for, and made anew where they have
changed since. It is one Arrow record of one row, of which each column holds the bytes of an array.
"""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from deltaworks.catalog.statistics import DENSITIES, FORMAT_VERSION, open_statistics, unpack_floats
from deltaworks.catalog.store import TABLE
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES

_VERSION = 1
_KEEP_BITS = 44
"""Of a key for a tensor and a number of its elements."""
_BLOCKS = {
    "changed": "<f8", "delta_square": "<f8", "base_square": "<f8", "base_delta": "<f8",
    "survives": "<f4", "sketch": "<f4", "sample": "<f4",
}  # fmt: skip
_ARRAYS = _BLOCKS | {"cut_keys": "<i8", "cuts": "<i8"}
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
    with suppress(OSError, ValueError, KeyError, pa.ArrowException):
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
    with pa.memory_map(str(path)) as file:
        batch = pa.ipc.open_file(file).get_batch(0)
    about = json.loads(batch.schema.metadata[b"deltaworks"])
    # The bytes of a column of one row; as a value they would be copied.
    return about, {name: _shaped(name, batch.column(name).buffers()[2]) for name in _ARRAYS}


def _shaped(name: str, buffer: Any) -> NDArray[Any]:
    flat: NDArray[Any] = np.frombuffer(buffer, _ARRAYS[name])
    return flat.reshape(-1, _WIDTHS[name]) if name in _WIDTHS else flat


def _write(path: Path, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write a table; nothing stands under its name before all of it is on the device."""
    partial = path.with_name(f".{path.stem}-{threading.get_ident()}{TABLE}.{os.getpid()}")
    columns = [pa.array([np.ascontiguousarray(arrays[name]).tobytes()], pa.large_binary()) for name in _ARRAYS]
    schema = pa.schema([(name, pa.large_binary()) for name in _ARRAYS], {b"deltaworks": json.dumps(about).encode()})
    try:
        with partial.open("wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _unpack(statistics: Path) -> _Unpacked:
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
