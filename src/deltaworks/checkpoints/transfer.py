"""Positioned reads and writes that are completed, whatever the system transfers at once.

One call of the system may transfer less than it was asked for: near the end of a device, on a network file system, or
where a signal arrives. Every read and write of this package that bypasses Python's buffered files comes through here or
through `RangeReader`.
"""

import errno
import os
from collections.abc import Iterator
from typing import Any


def read_available(fd: int, buffer: Any, offset: int) -> int:
    """Fill a buffer from an open file, or as much of it as the file has.

    Args:
        fd: the descriptor.
        buffer: anything writable with contiguous bytes.
        offset: position in the file.

    Returns:
        The number of bytes read; less than the size of the buffer only where the file ends.

    Raises:
        OSError: the device fails.
    """
    view = memoryview(buffer).cast("B")
    return sum(reads(fd, view, offset, len(view)))


def reads(fd: int, view: memoryview, offset: int, wanted: int) -> Iterator[int]:
    """Fill the first bytes of a view from an open file, one call of the system after the other.

    Args:
        fd: the descriptor.
        view: of bytes; a call may fill more of it than is wanted.
        offset: position in the file.
        wanted: how many bytes must be there in the end.

    Yields:
        The bytes that a call read, until enough are there or the file ends.

    Raises:
        OSError: the device fails.
    """
    done = 0
    while done < wanted and (got := os.preadv(fd, [view[done:]], offset + done)):
        done += got
        yield got


def write_all(fd: int, data: Any, offset: int) -> None:
    """Write all of some bytes to an open file.

    Args:
        fd: the descriptor.
        data: anything with contiguous bytes.
        offset: position in the file.

    Raises:
        OSError: the device fails, or takes no more bytes.
    """
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        if done == 0:
            raise OSError(errno.EIO, "the device takes no more bytes")
        view, offset = view[done:], offset + done
