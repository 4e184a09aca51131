"""Brings files to the page cache while the caller does something else. Imports nothing heavy."""

import os
import threading
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path

_PIECE = 4 << 20
_MAX_FILES = 32
"""Open at once; others may need what the system allows to be open."""


def fetch_ahead(files: Mapping[Path, int], most: int | None = None) -> None:
    """Have the system bring files to the page cache, first bytes first; nothing happens where it cannot.

    Two pieces at most are on their way at a time: what the caller itself has to read would wait behind all of them.

    Args:
        files: what to read, from which byte on; a piece of each in turn.
        most: bytes of all of them together; None for everything.
    """
    if hasattr(os, "posix_fadvise"):
        threading.Thread(target=_fetch, args=(dict(files), most), daemon=True).start()


def _fetch(files: Mapping[Path, int], most: int | None) -> None:
    with suppress(OSError), ExitStack() as stack:
        opened = [
            (stack.enter_context(path.open("rb")).fileno(), first) for path, first in islice(files.items(), _MAX_FILES)
        ]
        left = [(fd, range(first, os.fstat(fd).st_size, _PIECE)) for fd, first in opened]
        before, fetched = None, 0
        for i in range(max((len(pieces) for _, pieces in left), default=0)):
            for fd, pieces in left:
                if i >= len(pieces):
                    continue
                if most is not None and fetched >= most:
                    return
                os.posix_fadvise(fd, pieces[i], _PIECE, os.POSIX_FADV_WILLNEED)
                if before is not None:
                    os.pread(before[0], 1, before[1])
                before = fd, min(pieces[i] + _PIECE, pieces.stop) - 1
                fetched += _PIECE
