"""A model's weight files, open for reading blocks of tensors."""

import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE, cached_bytes
from deltaworks.checkpoints.checkpoint import Checkpoint
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.checkpoints.reader import ByteCounter, RangeReader

_SAMPLE = 1 << 20
_SAMPLES = 32
"""Of each file, at most so many pieces of so many bytes are looked up in the page cache."""


class _HasCheckpoint(Protocol):
    @property
    def checkpoint(self) -> Checkpoint: ...


def place_in_row(tensor: TensorInfo) -> int:
    """The byte of a row to which a tensor's blocks are best read: where they lie in their pages.

    It is the same for all blocks, as those are multiples of a page.
    """
    place, bits = tensor.offset % PAGE, tensor.dtype.bits
    return 0 if bits % 8 or place * 8 % bits else place


def are_cached(models: Iterable[_HasCheckpoint]) -> bool:
    """Whether the page cache holds most of the weight files of some models; see `files_are_cached`."""
    return files_are_cached(m.checkpoint.path / s.name for m in models for s in m.checkpoint.shards)


def files_are_cached(paths: Iterable[Path]) -> bool:
    """Whether the page cache holds most of some files, by samples: looking through all pages of a GB takes 12 ms.

    Then they are best read through it, which brings in the rest; else around it, but for what is there.
    """
    found = total = 0
    for path in paths:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            for start in range(0, size, max(_SAMPLE, size // _SAMPLES)):
                sample = min(_SAMPLE, size - start)
                found += min(sample, cached_bytes(file.fileno(), start, sample) or 0)
                total += sample
    return found * 2 > total


class Source:
    """The open weight files of one model; safe to share between threads.

    Args:
        model: anything with a checkpoint.
        counter: every byte read is added to it.
        direct: what the page cache does not hold may be read around it.

    Raises:
        CheckpointError: a file cannot be opened.
    """

    def __init__(self, model: _HasCheckpoint, counter: ByteCounter, *, direct: bool = False) -> None:
        path = model.checkpoint.path
        self._files: dict[str, RangeReader] = {}
        try:
            for shard in model.checkpoint.shards:
                self._files[shard.name] = RangeReader(path / shard.name, counter, direct=direct)
        except BaseException:
            self.close()
            raise

    def read(self, tensor: TensorInfo, start: int, count: int, out: NDArray[np.uint8]) -> None:
        """Read elements `start` to `start + count` of `tensor` into the front of `out` (uint8)."""
        nbytes = tensor.dtype.nbytes(count)
        self._files[tensor.file].read_into(out[:nbytes], tensor.offset + tensor.dtype.nbytes(start))

    def read_row(self, tensor: TensorInfo, start: int, count: int, row: NDArray[np.uint8], place: int) -> None:
        """Read elements `start` to `start + count` to byte `place` of `row`; see `RangeReader.read_row`."""
        offset = tensor.offset + tensor.dtype.nbytes(start)
        self._files[tensor.file].read_row(row, place, offset, tensor.dtype.nbytes(count))

    def reader(self, tensor: TensorInfo) -> RangeReader:
        """The open file that holds `tensor`."""
        return self._files[tensor.file]

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
