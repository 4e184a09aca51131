"""Block statistics of one delta: measured in one streaming pass, kept in one Parquet file.

The file holds one row a block, in order, with the columns of `BLOCK_FIELDS` and the histogram of the magnitudes of the
block's delta; and in its last row group one row a tensor, with the same of the whole tensor.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deltaworks.catalog.histogram import BINS, Histogram, bins_reference, count_magnitudes
from deltaworks.checkpoints.codec import TILE, decode
from deltaworks.checkpoints.jit import kernel
from deltaworks.errors import CatalogError

FORMAT_VERSION = 1
DEFAULT_BLOCK_SIZE = 1 << 18

BLOCK_FIELDS = ("zeros", "nonfinite", "delta_abs", "delta_square", "delta_max", "base_square", "base_delta")
"""What is measured of a block: elements whose delta is zero; elements not finite in the delta; sum of |delta|; sum of
delta squared; largest |delta|; sum of the base squared; inner product of base and delta. Sums in float64."""

_LANES = 16

# Arrow's own allocator keeps what it once had, which adds up over the tensors of a large model.
pa.set_memory_pool(pa.system_memory_pool())

_SCHEMA = pa.schema(
    [
        ("tensor", pa.dictionary(pa.int32(), pa.string())),
        ("block", pa.int32()),
        ("elements", pa.int64()),
        *((f, pa.float64()) for f in BLOCK_FIELDS),
        ("bins", pa.list_(pa.uint16())),
        ("counts", pa.list_(pa.int64())),
    ]
)


@kernel
def measure_block(
    base: NDArray[np.uint8],
    base_code: int,
    expert: NDArray[np.uint8],
    expert_code: int,
    count: int,
    scratch: NDArray[np.float32],
    histogram: NDArray[np.uint32],
    out: NDArray[np.float64],
) -> None:
    """Measure one block of the delta `expert` minus `base`.

    Args:
        base: raw elements of the base, uint8.
        base_code: their type's code.
        expert: raw elements of the expert, uint8.
        expert_code: their type's code.
        count: elements in the block.
        scratch: float32, [2, TILE].
        histogram: uint32, [BINS]; counts are added.
        out: float64, [len(BLOCK_FIELDS)]; set.
    """
    sums = np.zeros((4, _LANES), np.float64)
    out[:] = 0.0
    b, d = scratch[0], scratch[1]
    bits = d.view(np.uint32)
    for start in range(0, count, TILE):
        n = min(TILE, count - start)
        decode(base, base_code, start, n, b)
        decode(expert, expert_code, start, n, d)
        for i in range(n):
            d[i] = d[i] - b[i]
        count_magnitudes(d, n, histogram)
        zeros, wrong, largest = 0, 0, np.uint32(0)
        for i in range(n):
            magnitude = bits[i] & np.uint32(0x7FFFFFFF)
            zeros += 1 if magnitude == np.uint32(0) else 0
            wrong += 1 if magnitude >= np.uint32(0x7F800000) else 0
            largest = max(largest, magnitude)
        out[0] += zeros
        out[1] += wrong
        for i in range(n, -(-n // _LANES) * _LANES):
            b[i] = np.float32(0.0)
            d[i] = np.float32(0.0)
        for i in range(0, n, _LANES):
            for lane in range(_LANES):
                x, y = np.float64(d[i + lane]), np.float64(b[i + lane])
                sums[0, lane] += abs(x)
                sums[1, lane] += x * x
                sums[2, lane] += y * y
                sums[3, lane] += x * y
        bits[0] = largest
        out[4] = max(out[4], np.float64(d[0]))
    out[2] = sums[0].sum()
    out[3] = sums[1].sum()
    out[5] = sums[2].sum()
    out[6] = sums[3].sum()


def measure_reference(base: NDArray[np.float32], expert: NDArray[np.float32]) -> tuple[NDArray[np.float64], Histogram]:
    """What `measure_block` measures of a block (both flat), with NumPy; sums may differ in their last bits."""
    delta = expert - base
    b, d = base.astype(np.float64), delta.astype(np.float64)
    magnitudes = np.abs(d)
    values = [
        np.count_nonzero(delta == 0),
        np.count_nonzero(~np.isfinite(delta)),
        magnitudes.sum(),
        np.square(d).sum(),
        magnitudes.max(initial=0.0),
        np.square(b).sum(),
        (b * d).sum(),
    ]
    bins, counts = np.unique(bins_reference(delta), return_counts=True)
    return np.array(values, np.float64), Histogram(bins.astype(np.uint16), counts)


@dataclass(frozen=True, slots=True)
class BlockStatistics:
    """What was measured of one block: `values` in the order of `BLOCK_FIELDS`, and its histogram."""

    elements: int
    values: NDArray[np.float64]
    histogram: Histogram


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """What was measured of one tensor's delta, block by block."""

    name: str
    block_size: int
    total: Histogram
    blocks: list[BlockStatistics]

    @property
    def elements(self) -> int:
        """Elements in the tensor."""
        return sum(b.elements for b in self.blocks)


def sparse(dense: NDArray[np.uint32]) -> Histogram:
    """The non-empty bins of a dense histogram."""
    bins = np.flatnonzero(dense)
    return Histogram(bins.astype(np.uint16), dense[bins].astype(np.int64))


def add_up(parts: list[Histogram]) -> Histogram:
    """The histogram of everything the parts hold."""
    dense = np.zeros(BINS, np.int64)
    for part in parts:
        dense[part.bins] += part.counts
    bins = np.flatnonzero(dense)
    return Histogram(bins.astype(np.uint16), dense[bins])


class StatisticsWriter:
    """Writes tensor after tensor; nothing stands under the final name before `commit`."""

    def __init__(self, path: Path, block_size: int) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{os.getpid()}")
        metadata = {b"deltaworks": json.dumps({"version": FORMAT_VERSION, "block_size": block_size}).encode()}
        schema = _SCHEMA.with_metadata(metadata)
        self._file = pq.ParquetWriter(self._partial, schema, compression="zstd", use_dictionary=["tensor"])
        self._blocks: list[_Row] = []
        self._totals: list[_Row] = []

    def add(self, tensor: TensorStatistics) -> None:
        """Add a tensor that is complete."""
        values = np.sum([b.values for b in tensor.blocks], axis=0)
        self._totals.append((tensor.name, -1, tensor.elements, values, tensor.total))
        self._blocks += [(tensor.name, i, b.elements, b.values, b.histogram) for i, b in enumerate(tensor.blocks)]
        if len(self._blocks) >= _ROWS:
            self._flush(self._blocks)
            self._blocks = []

    def commit(self) -> None:
        """Write what is left, flush it and give the file its name."""
        self._flush(self._blocks)
        self._flush(self._totals)
        self._file.close()
        with self._partial.open("rb") as f:
            os.fsync(f.fileno())
        self._partial.replace(self._path)

    def abandon(self) -> None:
        """Leave nothing behind; harmless after `commit`."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _flush(self, rows: list["_Row"]) -> None:
        if rows:
            self._file.write_table(pa.Table.from_batches([_batch(rows)], _SCHEMA), row_group_size=1 << 30)


_Row = tuple[str, int, int, NDArray[np.float64], Histogram]
_ROWS = 512


def _batch(rows: list[_Row]) -> pa.RecordBatch:
    values = np.array([r[3] for r in rows], np.float64).reshape(len(rows), len(BLOCK_FIELDS))
    offsets = np.concatenate([[0], np.cumsum([len(r[4].bins) for r in rows])]).astype(np.int32)
    return pa.RecordBatch.from_arrays(
        [
            pa.array([r[0] for r in rows]).dictionary_encode(),
            pa.array([r[1] for r in rows], pa.int32()),
            pa.array([r[2] for r in rows], pa.int64()),
            *(pa.array(values[:, i]) for i in range(len(BLOCK_FIELDS))),
            pa.ListArray.from_arrays(offsets, np.concatenate([r[4].bins for r in rows])),
            pa.ListArray.from_arrays(offsets, np.concatenate([r[4].counts for r in rows])),
        ],
        schema=_SCHEMA,
    )


def read_statistics(path: Path) -> Iterator[TensorStatistics]:
    """Every tensor of a statistics file, in the order in which they were analyzed; only a few are in memory at once.

    Raises:
        CatalogError: the file is damaged or of another version.
    """
    try:
        with pq.ParquetFile(path) as file:
            yield from _tensors(file, path)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise CatalogError(
            f"cannot read the statistics in {path}: {error}; analyze the expert again with --force"
        ) from error


def _tensors(file: pq.ParquetFile, path: Path) -> Iterator[TensorStatistics]:
    about = json.loads((file.schema_arrow.metadata or {})[b"deltaworks"])
    if about["version"] != FORMAT_VERSION:
        raise CatalogError(
            f"{path} has statistics of version {about['version']}; analyze the expert again with --force"
        )
    block_size = int(about["block_size"])
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
        row = 0
        while row < table.num_rows:
            name, size, total = next(tensors)
            rows = range(row, row + max(1, -(-size // block_size)))
            row = rows.stop
            blocks = [BlockStatistics(int(elements[r]), values[r], histograms[r]) for r in rows]
            yield TensorStatistics(name, block_size, total, blocks)


def _histograms(table: pa.Table) -> list[Histogram]:
    bins, counts = table.column("bins").combine_chunks(), table.column("counts").combine_chunks()
    offsets = bins.offsets.to_numpy()
    flat_bins, flat_counts = bins.values.to_numpy(), counts.values.to_numpy()
    return [Histogram(flat_bins[a:b], flat_counts[a:b]) for a, b in pairwise(offsets)]
