"""Writes safetensors shards whose headers are known before the first block; blocks land in any order."""

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.dtypes import DType
from deltaworks.checkpoints.header import write_header
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

    Inside a file, tensors of wider elements come first, so that every one is aligned to its element.
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
        group.sort(key=lambda t: -t.dtype.bits)
        header, offsets = write_header([(t.name, t.dtype, t.shape) for t in group])
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        layouts.append(
            ShardLayout(name, header, tuple(group), {t.name: o for t, o in zip(group, offsets, strict=True)})
        )
    return layouts


def storage_error(path: Path, error: OSError) -> DeltaworksError:
    """The failure to report for an `error` met while writing `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DeltaworksError(f"no space left for {path}; free some and run the same command again: it resumes")
    return DeltaworksError(f"cannot write {path}: {error.strerror}")


class ShardWriter:
    """One open output file. Space for all of it is taken at once, so a full disk is met before any work."""

    def __init__(self, path: Path, layout: ShardLayout) -> None:
        self.path = path
        self.layout = layout
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            _allocate(self._fd, layout.nbytes)
            os.pwrite(self._fd, layout.header, 0)
        except OSError as error:
            raise storage_error(path, error) from error

    def write(self, tensor: str, start_byte: int, data: NDArray[np.uint8]) -> None:
        """Write `data` (uint8, contiguous) to `tensor`, `start_byte` after its first byte."""
        view = data.data
        position = self.layout.offsets[tensor] + start_byte
        while view:
            try:
                done = os.pwrite(self._fd, view, position)
            except OSError as error:
                raise storage_error(self.path, error) from error
            view, position = view[done:], position + done

    def finish(self) -> None:
        """Flush to the device and close."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise storage_error(self.path, error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Close without a flush."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


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
