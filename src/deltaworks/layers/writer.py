"""Writes the file that holds the layers of one expert; see `deltaworks.layers.records` for what is in it."""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.partial import open_partial, partial_path
from deltaworks.checkpoints.transfer import write_all
from deltaworks.layers.cells import DEPTH, DRAFTS, FORMAT_VERSION
from deltaworks.layers.checksum import checksum_of, prefix_checksums
from deltaworks.layers.file import RESIDUAL, LayeredTensor, aligned, alignment, ends_in_part
from deltaworks.layers.records import END, INDEX, MAGIC


class LayerWriter:
    """Writes a file of layers; nothing stands under its name before `commit`. Threads may share it.

    Args:
        path: the file to appear.
        blocks: how many blocks there will be.
        residuals: how many records of residuals.
        block_size: elements a block.
    """

    def __init__(self, path: Path, blocks: int, residuals: int, block_size: int) -> None:
        self._path = path
        self._partial = partial_path(path)
        self._index = np.zeros(blocks, INDEX)
        self._residuals = np.zeros(residuals, RESIDUAL)
        self._lock = threading.Lock()
        self._unit = alignment(block_size)
        self._end = aligned(len(MAGIC), self._unit)
        self._fd = open_partial(self._partial)

    def add(self, record: int, layers: NDArray[np.uint8], ends: NDArray[np.int64], left: NDArray[np.float64]) -> None:
        """Write a block.

        Args:
            record: its place in the index.
            layers: uint8; all layers, one after the other.
            ends: int64, [DEPTH]; where each ends.
            left: float64, [DEPTH + 1]; squares that so many layers leave of the delta.
        """
        drafts, total, sums = int(ends[DRAFTS - 1]), int(ends[-1]), np.empty(DEPTH, np.uint64)
        checked = ends_in_part(ends.astype(np.int64))
        parts = layers[:drafts], layers[drafts:total]
        room = [aligned(len(p), self._unit) for p in parts]
        with self._lock:
            offset, self._end = self._end, self._end + sum(room)
        own = self._index[record]
        own["offset"], own["ends"], own["left"] = offset, ends, left
        for part, nbytes, which in zip(parts, room, (slice(DRAFTS), slice(DRAFTS, None)), strict=True):
            # Padding is under the last checksum.
            checked[which][-1] = nbytes
            prefix_checksums(part, checked[which], sums[which])
            write_all(self._fd, part.data, offset)
            write_all(self._fd, bytes(nbytes - len(part)), offset + len(part))
            offset += nbytes
        own["checksums"] = sums

    def add_raw(self, record: int, elements: NDArray[np.uint8]) -> None:
        """Write a block of a tensor that is not a delta: its elements (uint8) as they are."""
        ends = np.zeros(DEPTH, np.int64)
        ends[-1] = len(elements)
        self.add(record, elements, ends, np.zeros(DEPTH + 1))

    def add_residual(self, record: int, sketches: NDArray[np.float64], samples: NDArray[np.float32]) -> None:
        """Enter what layers leave of some blocks: sketches, [DEPTH - 1, BUCKETS], and samples, [DEPTH - 1, SAMPLES]."""
        norms = np.sqrt(np.square(sketches).sum(axis=1, keepdims=True))
        own = self._residuals[record]
        own["sketch"] = np.divide(sketches, norms, out=np.zeros_like(sketches), where=(norms > 0) & np.isfinite(norms))
        own["sample"] = samples

    def commit(self, tensors: Sequence[LayeredTensor], about: Mapping[str, Any]) -> None:
        """Write index and contents, flush them and give the file its name.

        Args:
            tensors: what the blocks are of.
            about: what else a reader should find: block size and fingerprints.
        """
        about = {"version": FORMAT_VERSION, **about, "tensors": [asdict(t) for t in tensors]}
        contents = np.frombuffer(bytearray(json.dumps(about, separators=(",", ":")).encode()), np.uint8)
        index, residuals = self._index.view(np.uint8), self._residuals.view(np.uint8)
        end = np.zeros(1, END)
        end["index"], end["blocks"] = self._end, len(self._index)
        end["residuals"] = self._end + len(index)
        end["contents"], end["contents_bytes"] = self._end + len(index) + len(residuals), len(contents)
        for what, data in (("index", index), ("residuals", residuals), ("contents", contents)):
            end[f"{what}_checksum"] = checksum_of(data)
        end["magic"] = MAGIC
        at = self._end
        for part in (index, residuals, contents, end.view(np.uint8)):
            write_all(self._fd, part.data, at)
            at += len(part)
        write_all(self._fd, MAGIC, 0)
        os.fsync(self._fd)
        self._partial.replace(self._path)

    def abandon(self) -> None:
        """Leave nothing behind; harmless after `commit`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._partial.unlink(missing_ok=True)
