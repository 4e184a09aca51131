"""Writes safetensors shards whose headers are known before the first block; blocks land in any order."""

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE
from deltaworks.checkpoints.dtypes import DType
from deltaworks.checkpoints.header import write_header
from deltaworks.checkpoints.transfer import write_all
from deltaworks.errors import DeltaworksError


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written: name, element type, shape."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return self.dtype.nbytes(self.count)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One output file: its name, the bytes before the data, each tensor's offset, its size."""

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    offsets: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)


def plan_shards(tensors: Iterable[OutputTensor], shard_bytes: int) -> list[ShardLayout]:
    """Deal tensors, in order, to files of at most `shard_bytes` of data; a larger tensor gets a file of its own.

    Inside a file, tensors that fill whole pages come first, so that they begin at one; then those of wider elements, so
    that every one is aligned to its element.
    """
    groups: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    layouts = []
    for number, group in enumerate(groups, 1):
        group.sort(key=lambda t: (t.nbytes % PAGE != 0, -t.dtype.bits))
        header, offsets = write_header([(t.name, t.dtype, t.shape) for t in group])
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        layouts.append(
            ShardLayout(name, header, tuple(group), {t.name: o for t, o in zip(group, offsets, strict=True)})
        )
    return layouts


def storage_error(path: Path, error: OSError) -> DeltaworksError:
    """The failure to report for an `error` met while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DeltaworksError(f"no space left for {path}; free some and run the same command again")
    return DeltaworksError(f"cannot write {path}: {error.strerror}")


class ShardWriter:
    """One open output file; blocks land in any order and from any thread.

    Space for all of it is taken at once, so a full disk is met before any work. Whole pages are written around the
    page cache where the file system can, which costs a tenth of the processor time.
    """

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path = path
        self.layout = layout
        self._hasher = blake3(layout.header)
        self._hashed = len(layout.header)
        self._fd = self._direct_fd = -1
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            _allocate(self._fd, layout.nbytes)
            write_all(self._fd, layout.header, 0)
        except OSError as error:
            self.close()
            raise storage_error(path, error) from error
        with suppress(OSError, AttributeError):  # the file system cannot, or the system has no such flag
            self._direct_fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)

    def place(self, tensor: str, start_byte: int) -> int:
        """The byte of a row of `page_aligned` from which on `write` takes data fastest."""
        return (self.layout.offsets[tensor] + start_byte) % PAGE

    def write(self, tensor: str, start_byte: int, data: NDArray[np.uint8]) -> None:
        """Write `data` (uint8, contiguous) to `tensor`, `start_byte` after its first byte."""
        position = self.layout.offsets[tensor] + start_byte
        # Only whole pages can go around the cache; where data lie askew in memory, that is for the system to find.
        lead, end = -position % PAGE, (position + len(data)) // PAGE * PAGE - position
        try:
            if self._direct_fd >= 0 and lead < end and self._write_direct(data[lead:end].data, position + lead):
                write_all(self._fd, data[:lead].data, position)
                write_all(self._fd, data[end:].data, position + end)
            else:
                write_all(self._fd, data.data, position)
        except OSError as error:
            raise storage_error(self.path, error) from error

    def _write_direct(self, view: memoryview, position: int) -> bool:
        """Write whole pages around the page cache; False where they cannot all go this way."""
        while view:
            try:
                done = os.pwrite(self._direct_fd, view, position)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return False
                raise
            if done == 0 or done % PAGE:
                return False
            view, position = view[done:], position + done
        return True

    def hash(self, tensor: str, start_byte: int, data: NDArray[np.uint8]) -> None:
        """Add `data` to the hash of the file; they must come in the order of the file."""
        assert self._hashed == self.layout.offsets[tensor] + start_byte, "blocks are hashed out of order"
        self._hasher.update(data.data)
        self._hashed += len(data)

    def finish(self) -> str:
        """Flush to the device and close; returns the BLAKE3 of what was written, in hex."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise storage_error(self.path, error) from error
        finally:
            self.close()
        return self._hasher.hexdigest()

    def close(self) -> None:
        """Close without a flush."""
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1


def _allocate(fd: int, nbytes: int) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)
            return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    os.ftruncate(fd, nbytes)


def fsync_folder(path: Path) -> None:
    """Flush the entries of a folder to the device."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
