"""Reads the file that holds the layers of one expert; see `deltaworks.layers.records` for what is in it."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.codec import encode_reference
from deltaworks.checkpoints.dtypes import BF16, DTYPES, F8_E4M3, F8_E5M2, F16, F32, DType
from deltaworks.checkpoints.jit import kernel
from deltaworks.checkpoints.reader import ByteCounter, RangeReader, page_aligned
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES
from deltaworks.checkpoints.transfer import read_available
from deltaworks.errors import CatalogError, CheckpointError
from deltaworks.layers.cells import DEPTH, DRAFTS, FORMAT_VERSION
from deltaworks.layers.checksum import checksum_of
from deltaworks.layers.decode import decode_block
from deltaworks.layers.opened import layers_start, open_block, opened_bytes
from deltaworks.layers.records import END, INDEX, MAGIC

RESIDUAL: Final = np.dtype([("sketch", "<f2", (DEPTH - 1, BUCKETS)), ("sample", "<f4", (DEPTH - 1, SAMPLES))])
"""What so many layers, one first, leave of the delta in RESIDUAL_ELEMENTS elements, or in one block where that has
more: sketches, scaled to a norm of one, and samples. Of m blocks that share a record, the first gives its samples 0, m,
2m and so on, the second its samples 1, m + 1, 2m + 1."""
RESIDUAL_ELEMENTS: Final = 1 << 18
ALIGNED_FROM: Final = 1 << 16
"""Elements a block from which on every block takes whole pages."""
SHIFTS: Final = {BF16: 16, F16: 13, F32: 0, F8_E4M3: 20, F8_E5M2: 21}
"""Element types that have layers, and how many bits of a float32 they leave at zero. Others are kept as they are."""
UNKNOWN: Final = -1
"""The cost of a depth to which an expert cannot be read, or at which another gives more for the same bytes."""


@dataclass(frozen=True, slots=True)
class LayeredTensor:
    """One tensor of the expert.

    Attributes:
        name: its name.
        dtype: the expert's element type.
        shape: its shape.
        is_delta: whether its blocks hold layers; else they hold the elements as they are, as the last layer.
        first: the index record of its first block.
        blocks: how many there are.
        residual: the first of its records of residuals; they are for `blocks_sharing` blocks each.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    is_delta: bool
    first: int
    blocks: int
    residual: int


def blocks_sharing(block_size: int) -> int:
    """How many blocks of a delta share a record of residuals."""
    return max(1, RESIDUAL_ELEMENTS // block_size)


def alignment(block_size: int) -> int:
    """Bytes of which everything is a multiple in a file with so many elements a block.

    Large blocks take whole pages, so that they can be read around the page cache.
    """
    return PAGE if block_size >= ALIGNED_FROM else 1


def aligned(nbytes: Any, unit: int) -> Any:
    """The next multiple."""
    return -(-nbytes // unit) * unit


def ends_in_part(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of where the layers of a block end ([..., DEPTH]), where they do in the drafts, or in what comes after those."""
    own = ends.copy()
    own[..., DRAFTS:] -= ends[..., DRAFTS - 1, None]
    return own


class LayerIndex:
    """What a file of layers holds, and how much of it tells how much.

    Args:
        path: the file.

    Attributes:
        path: the file.
        tensors: what it holds, by name.
        about: what its writer said of it.
        index: a record of INDEX a block.

    Raises:
        CatalogError: the file is cut off, damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self._end = end = self._tail(file.fileno(), size)
                head = _section(file.fileno(), 0, min(PAGE, size)).tobytes()
                index = _section(file.fileno(), int(end["index"]), int(end["residuals"]))
                contents = _section(file.fileno(), int(end["contents"]), size - END.itemsize)
        except OSError as error:
            raise CatalogError(f"cannot read {path}: {error.strerror}") from error
        text = contents.tobytes()
        old = re.match(rb'{"version":(\d+),', text)
        if old and int(old[1]) < FORMAT_VERSION:
            raise CatalogError(f"{path} has layers of version {int(old[1])}, not {FORMAT_VERSION}; {_REBUILD}")
        for what, data in (("index", index), ("contents", contents)):
            self._check(what, data)
        about, _, tensors = text.partition(_TENSORS)
        self.about: dict[str, Any] = json.loads(about + b"}")
        self.tensors = _tensors_of(tensors[:-1])
        if head[: aligned(len(MAGIC), alignment(self.block_size))].rstrip(b"\0") != MAGIC:
            raise CatalogError(f"the start of {path} is damaged; {_REBUILD}")
        self.index = index.view(INDEX)

    def _tail(self, fd: int, size: int) -> Any:
        tail = _section(fd, max(0, size - END.itemsize), size).tobytes()
        if len(tail) == END.itemsize:
            end = np.frombuffer(tail, END)[0]
            first, last = int(end["index"]), int(end["contents"])
            if (
                end["magic"] == MAGIC
                and first + int(end["blocks"]) * INDEX.itemsize == int(end["residuals"]) <= last
                and last + int(end["contents_bytes"]) + END.itemsize == size
            ):
                return end
        raise CatalogError(f"{self.path} is cut off or no file of layers; {_REBUILD}")

    def _check(self, what: str, data: NDArray[np.uint8]) -> None:
        if checksum_of(data) != int(self._end[f"{what}_checksum"]):
            raise CatalogError(f"the {what} of {self.path} {'is' if what == 'index' else 'are'} damaged; {_REBUILD}")

    @cached_property
    def residuals(self) -> Any:
        """All records of RESIDUAL, read when they are asked for.

        Raises:
            CatalogError: they are damaged.
        """
        first, last = int(self._end["residuals"]), int(self._end["contents"])
        with self.path.open("rb") as file:
            data = _section(file.fileno(), first, last)
        self._check("residuals", data)
        return data.view(RESIDUAL)

    @cached_property
    def raw_residuals(self) -> NDArray[np.uint8]:
        """The bytes of `residuals`, a row a record, for `scale_sketches`."""
        raw: NDArray[np.uint8] = self.residuals.view(np.uint8).reshape(-1, RESIDUAL.itemsize)
        return raw

    @property
    def block_size(self) -> int:
        """Elements a block."""
        return int(self.about["block_size"])

    def count(self, tensor: LayeredTensor, block: int) -> int:
        """Elements in a block."""
        return min(self.block_size, math.prod(tensor.shape) - block * self.block_size)

    # Of all blocks at once, and picked out of the records, which takes long tensor by tensor.

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Where in its block each layer ends: int64, [blocks, DEPTH]."""
        ends: NDArray[np.int64] = self.index["ends"].astype(np.int64)
        return ends

    @cached_property
    def left(self) -> NDArray[np.float64]:
        """Squares that so many layers leave of each block's delta: float64, [blocks, DEPTH + 1]."""
        return np.ascontiguousarray(self.index["left"], np.float64)

    @cached_property
    def read_bytes(self) -> NDArray[np.int64]:
        """What is read of each block, by how many layers are asked for: int64, [blocks, DEPTH].

        Whole pages where blocks take them; no drafts where more is asked for.
        """
        nbytes: NDArray[np.int64] = aligned(ends_in_part(self.ends), alignment(self.block_size))
        return nbytes

    @cached_property
    def costs(self) -> NDArray[np.int64]:
        """The same, but UNKNOWN for depths at which a deeper one gives more for as many bytes."""
        nbytes = self.read_bytes
        deeper = np.minimum.accumulate(nbytes[:, :0:-1], axis=1)[:, ::-1]
        known = np.concatenate([nbytes[:, :-1] < deeper, np.ones((len(nbytes), 1), bool)], axis=1)
        return np.where(known, nbytes, UNKNOWN)


_TENSORS = b',"tensors":'
"""What comes before the tensors in the JSON document, as their last member."""

_EXPONENT = np.float32(2.0**112)


@lru_cache(maxsize=16)
def _tensors_of(text: bytes) -> Mapping[str, LayeredTensor]:
    """The tensors of a file, given as JSON: the same text for most experts of a family."""
    return {t["name"]: LayeredTensor(**{**t, "shape": tuple(t["shape"])}) for t in json.loads(text)}


def _section(fd: int, first: int, last: int) -> NDArray[np.uint8]:
    """The bytes of a file from one place to another, or to its end."""
    data = np.empty(last - first, np.uint8)
    return data[: read_available(fd, data.data, first)]


@kernel
def scale_sketches(records: NDArray[np.uint8], norms: NDArray[np.float64], out: NDArray[np.float32]) -> None:
    """Bring the sketches of records of residuals to size.

    Args:
        records: uint8, [records, bytes]; of RESIDUAL.
        norms: float64, [records, DEPTH - 1]; of what so many layers leave, one first.
        out: float32, [DEPTH - 1, records, BUCKETS]; set.
    """
    depths, parts, buckets = out.shape
    for p in range(parts):
        for x in range(depths):
            halves = records[p, 2 * x * buckets : 2 * (x + 1) * buckets].view(np.uint16)
            row, norm = out[x, p], np.float32(norms[p, x])
            patterns = row.view(np.uint32)
            for j in range(buckets):
                h = np.uint32(halves[j])
                patterns[j] = (h & np.uint32(0x8000)) << np.uint32(16) | (h & np.uint32(0x7FFF)) << np.uint32(13)
            for j in range(buckets):
                # Of a half's bits as a float32's, the exponent is 112 too small.
                row[j] = row[j] * _EXPONENT * norm


class Places(NamedTuple):
    """Where the layers of the blocks of one tensor of several experts lie.

    Attributes:
        ranges: int64, [experts, blocks, 2]; the first byte, and how many are read.
        checksums: uint64, [experts, blocks]; of what is read.
        checked: int64, [experts, blocks]; how many bytes of that the checksum is of.
        ends: int64, [experts, blocks, DEPTH]; where in the block each layer ends.
    """

    ranges: NDArray[np.int64]
    checksums: NDArray[np.uint64]
    checked: NDArray[np.int64]
    ends: NDArray[np.int64]

    @classmethod
    def empty(cls, experts: int, blocks: int) -> "Places":
        """For `LayerFile.find_places` to fill."""
        shape = (experts, blocks)
        ranges, ends = np.empty((*shape, 2), np.int64), np.empty((*shape, DEPTH), np.int64)
        return cls(ranges, np.empty(shape, np.uint64), np.empty(shape, np.int64), ends)


@kernel
def _find_places(
    first: int,
    depths: NDArray[np.int64],
    offsets: NDArray[np.int64],
    read_bytes: NDArray[np.int64],
    checksums: NDArray[np.uint64],
    checked: NDArray[np.int64],
    ends: NDArray[np.int64],
    k: int,
    out: Places,
) -> None:
    """See `LayerFile.find_places`; `first` is the tensor's first record, and of each record the others tell."""
    for b in range(len(depths)):
        record, last = first + b, max(depths[b], 1) - 1
        # Who reads more than drafts reads none of them.
        skipped = read_bytes[record, DRAFTS - 1] if depths[b] > DRAFTS else 0
        out.ranges[k, b, 0], out.ranges[k, b, 1] = offsets[record] + skipped, read_bytes[record, last]
        out.checksums[k, b], out.checked[k, b] = checksums[record, last], checked[record, last]
        out.ends[k, b] = ends[record]


class LayerFile(LayerIndex):
    """A file of layers, open for reading; safe to share between threads.

    Args:
        path: the file.
        counter: every byte read of blocks is added to it.
        direct: what the page cache does not hold may be read around it.

    Attributes:
        reader: what reads it.

    Raises:
        CatalogError: see `LayerIndex`.
    """

    def __init__(self, path: Path, counter: ByteCounter, *, direct: bool = False) -> None:
        super().__init__(path)
        self.reader = RangeReader(path, counter, direct=direct, wanted=int(self._end["index"]))
        self._offsets = self.index["offset"].astype(np.int64)
        self._checked = ends_in_part(self.ends)
        for last in (DRAFTS - 1, DEPTH - 1):
            self._checked[:, last] = self.read_bytes[:, last]
        self._checksums = np.ascontiguousarray(self.index["checksums"])

    def find_places(self, tensor: LayeredTensor, depths: NDArray[np.int64], k: int, out: Places) -> None:
        """Write to `out`, as expert `k`, where the first so many layers of each block of a tensor lie.

        Of those of which none is asked for, where the first would.
        """
        _find_places(
            tensor.first,
            depths,
            self._offsets,
            self.read_bytes,
            self._checksums,
            self._checked,
            self.ends,
            k,
            out,
        )

    def open_block(
        self, tensor: LayeredTensor, block: int, depth: int, row: NDArray[np.uint8], done: int | None = None
    ) -> None:
        """Read the first layers of a block of a tensor that has any, and open them for `decode_tile`.

        Args:
            tensor: which.
            block: which of its blocks.
            depth: how many layers, one at least.
            row: uint8, at least `opened_bytes` of that; set.
            done: how many bytes of an announced read are there; see `RangeReader.announce`.

        Raises:
            CatalogError: a layer is damaged.
        """
        count = self.count(tensor, block)
        self._read(tensor, block, depth, row, layers_start(count), done)
        open_block(row, count, self.ends[tensor.first + block], depth, SHIFTS[DTYPES[tensor.dtype]])

    def _read(
        self,
        tensor: LayeredTensor,
        block: int,
        depth: int,
        row: NDArray[np.uint8],
        place: int,
        done: int | None = None,
    ) -> None:
        """Read the first layers of a block to byte `place` of a row (see `RangeReader.read_row`), and check them."""
        record = tensor.first + block
        offset, nbytes = int(self._offsets[record]), int(self.read_bytes[record, depth - 1])
        if depth > DRAFTS:
            offset += int(self.read_bytes[record, DRAFTS - 1])
        try:
            if done is None:
                self.reader.read_row(row, place, offset, nbytes)
            else:
                self.reader.finish_row(row, place, offset, nbytes, done)
        except CheckpointError as error:
            raise CatalogError(f"layers of {tensor.name!r}, block {block}: {error}; {_REBUILD}") from error
        if not self._is_sound(record, depth, row[place:]):
            first = 1 if depth <= DRAFTS else DRAFTS + 1
            layer = next(d for d in range(first, depth + 1) if not self._is_sound(record, d, row[place:]))
            raise CatalogError(
                f"layer {layer} of {tensor.name!r}, block {block}, is damaged in {self.path}; {_REBUILD}"
            )

    def _is_sound(self, record: int, depth: int, layers: NDArray[np.uint8]) -> bool:
        checked = layers[: self._checked[record, depth - 1]]
        found: bool = checksum_of(checked) == self._checksums[record, depth - 1]
        return found

    def restore(self, tensor: LayeredTensor, block: int, base: NDArray[np.float32] | None) -> NDArray[np.uint8]:
        """The elements of a block as the expert had them, bit by bit: uint8.

        Args:
            tensor: which.
            block: which of its blocks.
            base: float32, [elements]; the same block of the base, where the tensor is a delta.

        Raises:
            CatalogError: a layer is damaged.
        """
        nbytes = int(self.ends[tensor.first + block, -1] - self.ends[tensor.first + block, DRAFTS - 1])
        if not tensor.is_delta:
            (whole,) = page_aligned(1, nbytes)
            self._read(tensor, block, DEPTH, whole, 0)
            elements: NDArray[np.uint8] = whole[:nbytes]
            return elements
        assert base is not None
        count, dtype = self.count(tensor, block), DTYPES[tensor.dtype]
        (row,) = page_aligned(1, opened_bytes(count, nbytes))
        self.open_block(tensor, block, DEPTH, row)
        values = np.empty(count, np.float32)
        decode_block(row, base, count, values)
        return exact_elements(values, dtype)

    def close(self) -> None:
        """Close the file."""
        self.reader.close()


_REBUILD = "delete it and build it again: deltaworks analyze --layers --force"


def exact_elements(values: NDArray[np.float32], dtype: DType) -> NDArray[np.uint8]:
    """The elements (uint8) that decode to `values`; of NaNs too, which rounding would quieten."""
    if dtype is F32:
        return values.view(np.uint8)
    if dtype is BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    elements = encode_reference(values, dtype)
    if dtype in (F16, F8_E5M2):
        nan = np.isnan(values)
        bits = values.view(np.uint32)[nan]
        halves = (bits >> 16 & 0x8000 | bits >> 13 & 0x3FF | 0x7C00).astype(np.uint16)
        if dtype is F16:
            elements.view(np.uint16)[nan] = halves
        else:
            elements[nan] = halves >> 8
    return elements


def is_layered(expert: DType, base: DType) -> bool:
    """Whether a delta between elements of these types has layers."""
    return expert in SHIFTS and base in SHIFTS
