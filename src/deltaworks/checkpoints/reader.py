"""Reads byte ranges and counts every byte where it is read."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE, cached_bytes
from deltaworks.checkpoints.descriptors import OpenFile
from deltaworks.checkpoints.transfer import reads
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
        self._direct: OpenFile | None = None
        self._opened_direct: OpenFile | None = None
        self._asks = False
        try:
            self._file = OpenFile(path)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        try:
            if direct:
                self._open_direct(self.size if wanted is None else wanted)
        except BaseException:
            self.close()
            raise

    def _open_direct(self, wanted: int) -> None:
        # Asking before every read is for files of which a part is cached.
        with self._file.descriptor() as fd:
            self._asks = bool(cached_bytes(fd, 0, wanted))
        with suppress(OSError, AttributeError):  # the file system cannot, or the system has no such flag
            self._direct = self._opened_direct = OpenFile(self.path, os.O_DIRECT)
            # What is left for the page cache is ends of ranges, a page each: nothing beyond will be wanted.
            self._file.read_randomly()

    @property
    def goes_direct(self) -> bool:
        """Whether what the page cache lacks is read around it."""
        return self._direct is not None

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self._file.size

    def read_into(self, buffer: NDArray[np.uint8], offset: int) -> None:
        """Fill `buffer` (uint8, contiguous) from `offset`.

        Raises:
            CheckpointError: the file ends before the buffer is full, or the device fails.
            BudgetError: the counter has a limit, and this would exceed it.
        """
        self._counter.reserve(len(buffer))
        self._read(self._file, buffer.data, offset)

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
        direct = self._direct
        if direct is None or lead >= end or askew or self._is_cached(offset, nbytes):
            self._read(self._file, part.data, offset)
            return
        try:
            if self._counter.is_limited:
                self._read(direct, part[lead:end].data, offset + lead)
                self._read(self._file, part[:lead].data, offset)
                self._read(self._file, part[end:].data, offset + end)
            else:
                before = offset % PAGE
                whole = row[place - before : place + -(-(offset + nbytes) // PAGE) * PAGE - offset]
                self._read(direct, whole.data, offset - before, (before, before + nbytes))
        except _UnalignedError:
            self._direct = None
            self._read(self._file, part.data, offset)

    def announce(self, place: int, offset: int, nbytes: int) -> "Announced":
        """Announce a read that others do, to byte `place` of a row of `page_aligned`.

        What they read they report to `count`, and what they could not they leave to `finish_row`.

        Returns:
            What it is best read from, until that is released.

        Raises:
            BudgetError: see `read_into`.
            CheckpointError: the file cannot be opened again.
        """
        self._counter.reserve(nbytes)
        askew, direct = (place | offset | nbytes) % PAGE, self._direct
        return self._announced(self._file if askew or direct is None or self._is_cached(offset, nbytes) else direct)

    def announce_cached(self, nbytes: int) -> "Announced":
        """The same for a read through the page cache, to anywhere."""
        self._counter.reserve(nbytes)
        return self._announced(self._file)

    def _announced(self, file: OpenFile) -> "Announced":
        try:
            return Announced(file.try_acquire(), file)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def count(self, nbytes: int) -> None:
        """Take note of bytes that were read from a descriptor of `announce`."""
        self._counter.add(nbytes)

    def finish_row(self, row: NDArray[np.uint8], place: int, offset: int, nbytes: int, done: int) -> None:
        """Read what is left of an announced read of which `done` bytes are there; see `read_row`."""
        self._read(self._file, row[place + done : place + nbytes].data, offset + done)

    def _is_cached(self, offset: int, nbytes: int) -> bool:
        if not self._asks:
            return False
        with self._file.descriptor() as fd:
            return (cached_bytes(fd, offset, nbytes) or 0) >= nbytes

    def _read(self, file: OpenFile, view: memoryview, offset: int, wanted: tuple[int, int] | None = None) -> None:
        """Fill a view, or at least the part of it from one byte to another; only that is counted."""
        try:
            with file.descriptor() as fd:
                self._fill(fd, view, offset, wanted or (0, len(view)), is_direct=file is self._opened_direct)
        except _UnalignedError:
            raise
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error

    def _fill(self, fd: int, view: memoryview, offset: int, wanted: tuple[int, int], *, is_direct: bool) -> None:
        first, last = wanted
        done = 0
        try:
            for got in reads(fd, view, offset, last):
                self._counter.add(max(0, min(done + got, last) - max(done, first)))
                done += got
                if is_direct and got % PAGE:
                    break  # around the page cache, only the end of the file is not a multiple of a page
        except OSError as error:
            if error.errno == errno.EINVAL and is_direct and not done:
                raise _UnalignedError from error
            raise
        if done < last:
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
        self._file.close()
        if self._opened_direct is not None:
            self._opened_direct.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Announced(NamedTuple):
    """What an announced read is read from.

    Attributes:
        fd: the descriptor; -1 where all that may be open are in use. Reading then fails, and is left to `finish_row`.
        file: the open file.
    """

    fd: int
    file: OpenFile

    def release(self) -> None:
        """End the use of the descriptor."""
        if self.fd >= 0:
            self.file.release()


class _UnalignedError(OSError):
    """The device wants reads aligned otherwise."""
