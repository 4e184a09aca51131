"""Reads byte ranges and counts every byte where it is read."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE, cached_bytes
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
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit is not None

    @property
    def value(self) -> int:
        """The sum so far."""
        return self._value


def page_aligned(rows: int, nbytes: int) -> NDArray[np.uint8]:
    """Uninitialised uint8, [rows, nbytes or a little more], of which every row begins at a page."""
    width = -(-nbytes // PAGE) * PAGE
    whole = np.empty(rows * width + PAGE, np.uint8)
    start = -whole.ctypes.data % PAGE
    return whole[start : start + rows * width].reshape(rows, width)


class RangeReader:
    """Positioned reads of one file; safe to share between threads.

    Every byte that the operating system returned is added to `counter`, whoever asked for it.

    Args:
        path: the file.
        counter: see above.
        direct: what the page cache does not hold may be read around it, where the file system can: a file that is
            read once then costs a tenth of the processor time, and pushes nobody's pages out.
        wanted: how much of the file may be read; None for all of it.
    """

    def __init__(self, path: Path, counter: ByteCounter, *, direct: bool = False, wanted: int | None = None) -> None:
        self.path = path
        self._counter = counter
        self._direct_fd, self._goes_direct, self._asks = -1, False, False
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        if direct:
            self._open_direct(self.size if wanted is None else wanted)

    def _open_direct(self, wanted: int) -> None:
        # Asking before every read is for files of which a part is cached.
        self._asks = bool(cached_bytes(self._fd, 0, wanted))
        with suppress(OSError, AttributeError):  # the file system cannot, or the system has no such flag
            self._direct_fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
            # What is left for the page cache is ends of ranges, a page each: nothing beyond will be wanted.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)
        self._goes_direct = self._direct_fd >= 0

    @property
    def goes_direct(self) -> bool:
        """Whether what the page cache lacks is read around it."""
        return self._goes_direct

    def fileno(self) -> int:
        """The file descriptor of the open file, which goes through the page cache."""
        return self._fd

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self._fd).st_size

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` (uint8, contiguous) from `offset`.

        Raises:
            CheckpointError: the file ends before the buffer is full, or the device fails.
            BudgetError: the counter has a limit, and this would exceed it.
        """
        self._counter.reserve(len(buffer))
        self._read(self._fd, buffer.data, offset)

    def read_row(self, row: NDArray[np.uint8], place: int, offset: int, nbytes: int) -> None:
        """Fill `nbytes` of `row` from `place` on with the file's from `offset` on.

        What the page cache lacks may be read around it, where the row is of `page_aligned` and `place` lies in its page
        as `offset` does in its own. Where nothing limits what is read, that may take in the rest of the pages at both
        ends, as reading through the cache does, and set the row's bytes there; they are not counted.

        Raises:
            As `read_into`.
        """
        self._counter.reserve(nbytes)
        part = row[place : place + nbytes]
        # To the first whole page, and to the end of the last.
        lead, end = -offset % PAGE, (offset + nbytes) // PAGE * PAGE - offset
        askew = (place - offset) % PAGE
        if not self._goes_direct or lead >= end or askew or self._is_cached(offset, nbytes):
            self._read(self._fd, part.data, offset)
            return
        try:
            if self._counter.is_limited:
                self._read(self._direct_fd, part[lead:end].data, offset + lead)
                self._read(self._fd, part[:lead].data, offset)
                self._read(self._fd, part[end:].data, offset + end)
            else:
                before = offset % PAGE
                whole = row[place - before : place + -(-(offset + nbytes) // PAGE) * PAGE - offset]
                self._read(self._direct_fd, whole.data, offset - before, (before, before + nbytes))
        except _UnalignedError:
            self._goes_direct = False
            self._read(self._fd, part.data, offset)

    def announce(self, place: int, offset: int, nbytes: int) -> int:
        """Announce a read that others do, to byte `place` of a row of `page_aligned`.

        What they read they report to `count`, and what they could not they leave to `finish_row`.

        Returns:
            The file descriptor from which it is best read.

        Raises:
            BudgetError: see `read_into`.
        """
        fd = self.announce_cached(nbytes)
        askew = (place | offset | nbytes) % PAGE
        return fd if askew or not self._goes_direct or self._is_cached(offset, nbytes) else self._direct_fd

    def announce_cached(self, nbytes: int) -> int:
        """The same for a read through the page cache, to anywhere."""
        self._counter.reserve(nbytes)
        return self._fd

    def count(self, nbytes: int) -> None:
        """Take note of bytes that were read from a descriptor of `announce`."""
        self._counter.add(nbytes)

    def finish_row(self, row: NDArray[np.uint8], place: int, offset: int, nbytes: int, done: int) -> None:
        """Read what is left of an announced read of which `done` bytes are there; see `read_row`."""
        self._read(self._fd, row[place + done : place + nbytes].data, offset + done)

    def _is_cached(self, offset: int, nbytes: int) -> bool:
        return self._asks and (cached_bytes(self._fd, offset, nbytes) or 0) >= nbytes

    def _read(self, fd: int, view: memoryview, offset: int, wanted: tuple[int, int] | None = None) -> None:
        """Fill a view, or at least the part of it from one byte to another; only that is counted."""
        first, last = wanted or (0, len(view))
        done = 0
        while done < last:
            try:
                got = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                if error.errno == errno.EINVAL and fd == self._direct_fd and not done:
                    raise _UnalignedError from error
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
            self._counter.add(max(0, min(done + got, last) - max(done, first)))
            done += got
            # Around the page cache, only the end of the file is no multiple of a page.
            if got == 0 or (done < last and fd == self._direct_fd and got % PAGE):
                raise CheckpointError(
                    f"{self.path} ends at byte {offset + done}, inside a tensor; it was cut short: fetch it again"
                )

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`."""
        buffer = np.empty(length, np.uint8)
        self.read_into(buffer, offset)
        return buffer.tobytes()

    def close(self) -> None:
        """Close the file; reading afterwards is an error."""
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _UnalignedError(OSError):
    """The device wants reads aligned otherwise."""
