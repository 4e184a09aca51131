"""The statistics of one delta in one Parquet file.

It holds one row a block, in order, with the columns of `BLOCK_FIELDS`, the energy that survives trims, the sketch and
the histogram of the magnitudes of the block's delta; and in its last row group one row a tensor, with the same of the
whole tensor and with the places of its trim cuts.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3
from numpy.typing import NDArray

from deltaworks.catalog.histogram import Histogram, kept_elements, pack_cut, place_cuts, surviving_energy
from deltaworks.catalog.statistics import (
    BLOCK_FIELDS,
    CUT_DENSITIES,
    DENSITIES,
    FORMAT_VERSION,
    BlockStatistics,
    TensorStatistics,
)
from deltaworks.checkpoints.partial import open_partial, partial_path
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES
from deltaworks.checkpoints.transfer import read_available, write_all
from deltaworks.errors import CatalogError, DamagedError

# Arrow's own allocator keeps what it once had, which adds up over the tensors of a large model.
pa.set_memory_pool(pa.system_memory_pool())

SCHEMA = pa.schema(
    [
        ("tensor", pa.dictionary(pa.int32(), pa.string())),
        ("block", pa.int32()),
        ("elements", pa.int64()),
        *((f, pa.float64()) for f in BLOCK_FIELDS),
        # Numbers as bytes: lists of them take four times as long to read, and are most of what planning reads.
        ("survives", pa.binary(4 * len(DENSITIES))),
        ("sketch", pa.binary(4 * BUCKETS)),
        ("sample", pa.binary(4 * SAMPLES)),
        ("bins", pa.list_(pa.uint16())),
        ("counts", pa.list_(pa.int64())),
        ("cuts", pa.list_(pa.int64())),
    ]
)


class StatisticsWriter:
    """Writes tensor after tensor; nothing stands under the final name before `commit`.

    Args:
        path: the file to appear.
        block_size: elements a block.

    Raises:
        BlockingIOError: this process is writing it already.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, block_size: int) -> None:
        self._path = path
        self._partial = partial_path(path)
        metadata = {b"deltaworks": json.dumps({"version": FORMAT_VERSION, "block_size": block_size}).encode()}
        # Sketches do not compress, and are what planning reads most of.
        leaves = [f"{f.name}.list.element" if pa.types.is_nested(f.type) else f.name for f in SCHEMA]
        packed = {leaf: "none" if leaf in _BULKY else "zstd" for leaf in leaves}
        self._fd = open_partial(self._partial, os.O_RDWR)
        try:
            self._file = pq.ParquetWriter(
                self._partial, SCHEMA.with_metadata(metadata), compression=packed, use_dictionary=["tensor"]
            )
        except BaseException:
            self._partial.unlink(missing_ok=True)
            os.close(self._fd)
            raise
        self._blocks: list[_Row] = []
        self._totals: list[_Row] = []

    def add(self, tensor: TensorStatistics) -> None:
        """Add a tensor that is complete."""
        histograms, size = [b.histogram for b in tensor.blocks], tensor.elements
        survives = surviving_energy(tensor.total, histograms, size, DENSITIES)
        keeps = sorted({kept_elements(d, size) for d in CUT_DENSITIES}) if size else []
        cuts = place_cuts(tensor.total, histograms, tensor.block_size, size, keeps)
        values = np.sum([b.values for b in tensor.blocks], axis=0)
        sketch = np.sum([b.sketch for b in tensor.blocks], axis=0)
        nothing = np.zeros(SAMPLES, np.float32)
        self._totals.append(
            (
                (tensor.name, -1, size),
                values,
                survives.sum(axis=0),
                sketch,
                nothing,
                tensor.total,
                [v for keep, cut in zip(keeps, cuts, strict=True) for v in (keep, *pack_cut(cut))],
            )
        )
        self._blocks += [
            ((tensor.name, i, b.elements), b.values, survives[i], b.sketch, b.sample, b.histogram, [])
            for i, b in enumerate(tensor.blocks)
        ]
        if len(self._blocks) >= _ROWS:
            self._flush(self._blocks)
            self._blocks = []

    def commit(self) -> None:
        """Write what is left, flush it and give the file its name."""
        self._flush(self._blocks)
        self._flush(self._totals)
        self._file.add_key_value_metadata({_DIGEST: _NO_DIGEST})
        self._file.close()
        place = _digest_place(self._fd)
        if place is None:
            raise CatalogError(f"{self._partial} lacks the place of its digest; is this another Parquet library?")
        write_all(self._fd, _hash_but(self._fd, place).encode(), place)
        os.fsync(self._fd)
        self._partial.replace(self._path)

    def abandon(self) -> None:
        """Leave nothing behind; harmless after `commit`."""
        if self._fd < 0:
            return
        with suppress(OSError, pa.ArrowException):  # what closing would write is deleted anyway
            self._file.close()
        try:
            self._partial.unlink(missing_ok=True)
        finally:
            os.close(self._fd)
            self._fd = -1

    def _flush(self, rows: list["_Row"]) -> None:
        if rows:
            self._file.write_table(pa.Table.from_batches([_batch(rows)], SCHEMA), row_group_size=1 << 30)


_MEND = "analyze the expert again with --force"
_WITHOUT_DIGEST = 3
"""The version before, which had no digest and is otherwise the same."""
_DIGEST_BYTES = 64
_DIGEST, _NO_DIGEST = b"deltaworks_blake3", b"0" * _DIGEST_BYTES
_DIGEST_KEY = _DIGEST + bytes((0x18, _DIGEST_BYTES))
"""A key in Thrift's compact protocol, the mark of a second field of text, and the size of that."""
_TAIL_BYTES = 8
"""The end of a Parquet file: the size of the footer before it, and four letters."""
_CHUNK = 1 << 20
_Floats = NDArray[np.float32]
_Row = tuple[tuple[str, int, int], NDArray[np.float64], NDArray[np.float64], _Floats, _Floats, Histogram, list[int]]
_ROWS = 512
_BULKY = ("survives", "sketch", "sample")


def _batch(rows: list[_Row]) -> pa.RecordBatch:
    values = np.array([r[1] for r in rows], np.float64).reshape(len(rows), len(BLOCK_FIELDS))
    bins = _offsets([len(r[5].bins) for r in rows])
    return pa.RecordBatch.from_arrays(
        [
            pa.array([r[0][0] for r in rows]).dictionary_encode(),
            pa.array([r[0][1] for r in rows], pa.int32()),
            pa.array([r[0][2] for r in rows], pa.int64()),
            *(pa.array(values[:, i]) for i in range(len(BLOCK_FIELDS))),
            pack_floats(np.stack([r[2] for r in rows])),
            pack_floats(np.stack([r[3] for r in rows])),
            pack_floats(np.stack([r[4] for r in rows])),
            pa.ListArray.from_arrays(bins, np.concatenate([r[5].bins for r in rows])),
            pa.ListArray.from_arrays(bins, np.concatenate([r[5].counts for r in rows])),
            pa.ListArray.from_arrays(
                _offsets([len(r[6]) for r in rows]), np.array([v for r in rows for v in r[6]], np.int64)
            ),
        ],
        schema=SCHEMA,
    )


def _offsets(lengths: list[int]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def read_statistics(path: Path) -> Iterator[TensorStatistics]:
    """Every tensor of a statistics file, in the order in which they were analyzed; only a few are in memory at once.

    Raises:
        CatalogError: the file is damaged or of another version.
    """
    with open_statistics(path) as (file, block_size):
        yield from _tensors(file, block_size)


@contextmanager
def open_statistics(path: Path) -> Iterator[tuple[pq.ParquetFile, int]]:
    """A statistics file, and its block size.

    Raises:
        DamagedError: it is damaged or of another version.
    """
    try:
        has_digest = check_digest(path)
        with pq.ParquetFile(path) as file:
            about = json.loads((file.schema_arrow.metadata or {})[b"deltaworks"])
            if about["version"] not in (FORMAT_VERSION, _WITHOUT_DIGEST):
                raise DamagedError(f"{path} has statistics of version {about['version']}; {_MEND}")
            if about["version"] == FORMAT_VERSION and not has_digest:
                raise DamagedError(f"the statistics in {path} are damaged: their digest is gone; {_MEND}")
            yield file, int(about["block_size"])
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise DamagedError(f"cannot read the statistics in {path}: {error}; {_MEND}") from error


def check_digest(path: Path) -> bool:
    """Make sure that a statistics file holds what was written.

    Returns:
        Whether it has a digest; files of version 3 have none.

    Raises:
        DamagedError: it holds something else.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        fd = file.fileno()
        place = _digest_place(fd)
        if place is None:
            return False
        kept = bytearray(_DIGEST_BYTES)
        read_available(fd, kept, place)
        if _hash_but(fd, place).encode() != kept:
            raise DamagedError(f"the statistics in {path} are damaged: their digest differs; {_MEND}")
    return True


def stored_digest(path: Path) -> str | None:
    """The digest that stands in a statistics file, in hex; None where it has none. The rest is not read.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        place = _digest_place(file.fileno())
        kept = bytearray(_DIGEST_BYTES)
        if place is None or read_available(file.fileno(), kept, place) < _DIGEST_BYTES:
            return None
    return kept.decode("ascii", "replace")


def _digest_place(fd: int) -> int | None:
    """Where the digest stands in a Parquet file: in its footer, as the value of a key; None where there is none."""
    size = os.fstat(fd).st_size
    tail = bytearray(min(size, _TAIL_BYTES))
    read_available(fd, tail, size - len(tail))
    length = int.from_bytes(tail[:4], "little") + len(tail)
    footer = bytearray(min(size, length))
    read_available(fd, footer, size - len(footer))
    found = footer.rfind(_DIGEST_KEY)
    return None if found < 0 else size - len(footer) + found + len(_DIGEST_KEY)


def _hash_but(fd: int, place: int) -> str:
    """The BLAKE3 of an open file as it was before its digest was put in its place, in hex."""
    hasher, size, buffer = blake3(max_threads=blake3.AUTO), os.fstat(fd).st_size, bytearray(_CHUNK)
    for first, last in ((0, place), (place + _DIGEST_BYTES, size)):
        if first:
            hasher.update(_NO_DIGEST)
        for start in range(first, last, _CHUNK):
            part = memoryview(buffer)[: min(_CHUNK, last - start)]
            hasher.update(part[: read_available(fd, part, start)])
    return hasher.hexdigest()


def pack_floats(rows: NDArray[Any]) -> pa.FixedSizeBinaryArray:
    """Rows of numbers as a column of float32 bytes, little-endian."""
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinity
        data = np.ascontiguousarray(rows, "<f4")
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * data.shape[1]), len(data), [None, pa.py_buffer(data)])


def unpack_floats(column: pa.ChunkedArray, width: int) -> NDArray[np.float32]:
    """The inverse of `pack_floats`: [rows, width]."""
    parts = [
        np.frombuffer(c.buffers()[1], "<f4", len(c) * width, c.offset * width * 4).reshape(-1, width)
        for c in column.chunks
    ]
    return np.concatenate(parts) if parts else np.empty((0, width), np.float32)


def _tensors(file: pq.ParquetFile, block_size: int) -> Iterator[TensorStatistics]:
    last = file.num_row_groups - 1
    if last < 0:
        return
    totals = file.read_row_group(last, ["tensor", "elements", "bins", "counts"])
    names, sizes = totals.column("tensor").to_pylist(), totals.column("elements").to_pylist()
    tensors = iter(zip(names, sizes, _histograms(totals), strict=True))
    for group in range(last):
        table = file.read_row_group(group)
        histograms = _histograms(table)
        elements = table.column("elements").to_numpy()
        values = np.stack([table.column(f).to_numpy() for f in BLOCK_FIELDS], axis=1)
        sketches = unpack_floats(table.column("sketch"), BUCKETS)
        samples = unpack_floats(table.column("sample"), SAMPLES)
        row = 0
        while row < table.num_rows:
            name, size, total = next(tensors)
            rows = range(row, row + max(1, -(-size // block_size)))
            row = rows.stop
            blocks = [
                BlockStatistics(int(elements[r]), values[r], sketches[r], samples[r], histograms[r]) for r in rows
            ]
            yield TensorStatistics(name, block_size, total, blocks)


def _histograms(table: pa.Table) -> list[Histogram]:
    bins, counts = table.column("bins").combine_chunks(), table.column("counts").combine_chunks()
    offsets = bins.offsets.to_numpy()
    flat_bins, flat_counts = bins.values.to_numpy(), counts.values.to_numpy()
    return [Histogram(flat_bins[a:b], flat_counts[a:b]) for a, b in pairwise(offsets)]
