"""Brings files to the page cache while the caller does something else. Imports nothing heavy."""

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

_PIECE = 4 << 20


def fetch_ahead(files: Sequence[Path], most: int | None = None) -> None:
    """Have the system bring files to the page cache, their starts first; nothing happens where it cannot.

    Two pieces at most are on their way at a time: what the caller itself has to read would wait behind all of them.

    Args:
        files: what to read, a piece of each in turn.
        most: bytes of all of them together; None for everything.
    """
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=_fetch, args=(list(files), most), daemon=True).start()


def _fetch(files: Sequence[Path], most: int | None) -> None:
    with suppress(OSError), ExitStack() as stack:
        opened = [stack.enter_context(path.open("rb")).fileno() for path in files]
        sizes = [os.fstat(fd).st_size for fd in opened]
        before, fetched = None, 0
        for start in range(0, max(sizes, default=0), _PIECE):
            for fd, size in zip(opened, sizes, strict=True):
                if start >= size:
                    continue
                if most is not None and fetched >= most:
                    return
                os.posix_fadvise(fd, start, _PIECE, os.POSIX_FADV_WILLNEED)
                if before is not None:
                    os.pread(before[0], 1, before[1])
                before = fd, min(start + _PIECE, size) - 1
                fetched += _PIECE
