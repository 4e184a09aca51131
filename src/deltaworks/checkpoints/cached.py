"""What of a file the page cache holds."""

import ctypes
import mmap
import sys

PAGE = 4096
"""Bytes to which reads and writes around the page cache are aligned; no common device asks for more."""

_CACHESTAT = 451
"""Number of the system call cachestat (Linux 6.5), the same on every architecture but Alpha."""


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("nbytes", ctypes.c_uint64))


class _State(ctypes.Structure):
    _fields_ = tuple((n, ctypes.c_uint64) for n in ("cached", "dirty", "writeback", "evicted", "recently_evicted"))


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def cached_bytes(fd: int, offset: int, nbytes: int) -> int | None:
    """How much of a range of an open file is in memory, in whole pages; None where the system does not tell."""
    state = _State()
    span = _Range(offset, nbytes)
    if _libc is None or _libc.syscall(_CACHESTAT, fd, ctypes.byref(span), ctypes.byref(state), 0):
        return None
    return int(state.cached) * mmap.PAGESIZE
