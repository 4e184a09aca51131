"""Reads many ranges through the page cache in one go.

Where the cache holds them, what Python does for each, and waiting for the GIL after each, takes longer than copying it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import inner, kernel
from deltaworks.checkpoints.reader import Announced, RangeReader

_pread: Any = types.ExternalFunction("pread", types.intp(types.intc, types.intp, types.intp, types.intp))


class RowRange(NamedTuple):
    """A range of a file, and the row it is wanted in.

    Attributes:
        reader: the open file.
        offset, nbytes: where the range begins, and its size.
        row, place: which row, and the byte of it from which on.
    """

    reader: RangeReader
    offset: int
    nbytes: int
    row: int
    place: int


def read_together(ranges: Sequence[RowRange], raw: NDArray[np.uint8]) -> None:
    """Fill parts of `raw` (uint8, [rows, bytes]) with ranges of files.

    Raises:
        CheckpointError: a file ends before its range does, or a device fails.
        BudgetError: a counter has a limit, and this would exceed it; then nothing is read.
    """
    if not ranges:
        return
    places, got = np.array([r[1:] for r in ranges]), np.empty(len(ranges), np.int64)
    announced: list[Announced] = []
    try:
        announced.extend(r.reader.announce_cached(r.nbytes) for r in ranges)
        _read_ranges(np.array([a.fd for a in announced]), places, raw, got)
    finally:
        for one in announced:
            one.release()
    for own, done in zip(ranges, np.maximum(got, 0).tolist(), strict=True):
        own.reader.count(done)
        if done < own.nbytes:
            # What was cut short is taken up again; whatever is wrong is found and named.
            own.reader.finish_row(raw[own.row], own.place, own.offset, own.nbytes, done)


@kernel
def _read_ranges(
    fds: NDArray[np.int64], places: NDArray[np.int64], raw: NDArray[np.uint8], got: NDArray[np.int64]
) -> None:
    """Read ranges; `places` (int64, [ranges, 4]) is the rest of each `RowRange`, `got` what `read_bytes` returned."""
    for k in range(len(fds)):
        offset, nbytes, row, place = places[k]
        got[k] = read_bytes(fds[k], offset, raw[row, place : place + nbytes])


@inner
def read_bytes(fd: int, offset: int, out: NDArray[np.uint8]) -> int:
    """Read from an open file to `out` (uint8, contiguous); returns how many bytes, -1 after a failure."""
    got: int = _pread(np.int32(fd), np.intp(out.ctypes.data), len(out), offset)
    return got
