"""Reads byte ranges and counts every byte where it is read."""

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.errors import BudgetError, CheckpointError


class ByteCounter:
    """A sum of bytes that many threads may add to.

    Args:
        limit: the most that may be read; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._lock = threading.Lock()
        self._limit = limit
        self._value = self._reserved = 0

    def reserve(self, count: int) -> None:
        """Announce a read of `count` bytes.

        Raises:
            BudgetError: it would go beyond the limit; nothing must be read.
        """
        with self._lock:
            if self._limit is not None and self._reserved + count > self._limit:
                raise BudgetError(
                    f"a read of {count:,} bytes would exceed the budget of {self._limit:,} bytes, of which"
                    f" {self._reserved:,} are spent; nothing was committed: please report this plan"
                )
            self._reserved += count

    def add(self, count: int) -> None:
        """Add `count` bytes."""
        with self._lock:
            self._value += count

    @property
    def value(self) -> int:
        """The sum so far."""
        return self._value


class RangeReader:
    """Positioned reads of one file; safe to share between threads.

    Every byte that the operating system returned is added to `counter`, whoever asked for it.

    Args:
        path: the file.
        counter: see above.
        sequential: the file will be read from end to end, so that the system may read ahead.
    """

    def __init__(self, path: Path, counter: ByteCounter, *, sequential: bool = False) -> None:
        self.path = path
        self._counter = counter
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        if sequential and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self._fd).st_size

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` (uint8, contiguous) from `offset`.

        Raises:
            CheckpointError: the file ends before the buffer is full, or the device fails.
        """
        view = buffer.data
        done = 0
        self._counter.reserve(len(view))
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
            if got == 0:
                raise CheckpointError(
                    f"{self.path} ends at byte {offset + done}, inside a tensor; it was cut short: fetch it again"
                )
            self._counter.add(got)
            done += got

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`."""
        buffer = np.empty(length, np.uint8)
        self.read_into(buffer, offset)
        return buffer.tobytes()

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
