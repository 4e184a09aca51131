"""Files that are open for reading, of which no more hold a descriptor at once than the process may have.

A family of 64 experts of 30 files each has more files than most systems let a process open. Those that were not used
for longest give their descriptors back, and get new ones when they are read again.
"""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deltaworks.errors import CheckpointError

_LEAST = 8


def raise_limit() -> None:
    """Let this process open as many files as the system allows it."""
    with suppress(ImportError, OSError, ValueError):
        import resource  # noqa: PLC0415  # not on every system

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _most() -> int:
    """How many descriptors may be held: most that are allowed; the rest is for outputs, the catalog and whatever else.

    The limit may change while the process runs, so it is asked for.
    """
    try:
        import resource  # noqa: PLC0415  # not on every system
    except ImportError:
        return 512
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else max(_LEAST, soft * 5 // 8 - 16)


class OpenFile:
    """A file that is open for reading; threads may share it.

    Args:
        path: the file.
        flags: for opening it, besides those for reading.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.path, self.size = path, 0
        self._flags, self._random, self._is_closed = flags, False, False
        self._state: tuple[int, ...] | None = None
        _POOL.acquire(self)
        _POOL.release(self)

    def open(self) -> int:
        """A new descriptor; for the pool.

        Raises:
            OSError: it cannot be opened.
            CheckpointError: another file stands there by now.
        """
        if self._is_closed:
            raise OSError(errno.EBADF, "the file is closed")
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | self._flags)
        found = os.fstat(fd)
        state = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        if self._state not in (None, state):
            os.close(fd)
            raise CheckpointError(f"{self.path} changed while it was being read; run the same command again")
        self._state, self.size = state, found.st_size
        if self._random:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fd

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """Its descriptor, which stays open inside.

        Raises:
            OSError, CheckpointError: it was given back, and the file cannot be opened again.
        """
        fd = _POOL.acquire(self)
        try:
            yield fd
        finally:
            _POOL.release(self)

    def try_acquire(self) -> int:
        """Its descriptor, which stays open until `release`; -1 where too many others are in use.

        Raises:
            OSError, CheckpointError: it was given back, and the file cannot be opened again.
        """
        return _POOL.acquire(self, waits=False)

    def release(self) -> None:
        """End the use of what `try_acquire` gave."""
        _POOL.release(self)

    def read_randomly(self) -> None:
        """Tell the system that the file will be read here and there."""
        self._random = True
        with self.descriptor() as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def close(self) -> None:
        """Give the descriptor back for good; reading afterwards is an error."""
        self._is_closed = True
        _POOL.close(self)


class _Pool:
    """Who has a descriptor, the one used longest ago first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[OpenFile, int] = OrderedDict()
        self._pins: dict[OpenFile, int] = {}

    def acquire(self, file: OpenFile, *, waits: bool = True) -> int:
        """A descriptor of a file, in use until `release`.

        One thread that must have one gets it, even where all that may be held are in use: it needs no more than that
        one, so it is soon given back. Only those that can do without get -1 then.
        """
        with self._lock:
            fd = self._open.get(file)
            if fd is None:
                self._make_room(_most())
                if not waits and len(self._open) >= _most():
                    return -1
                try:
                    fd = file.open()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE):
                        raise
                    self._make_room(len(self._open) // 2)  # others opened more than was left for them
                    fd = file.open()
                self._open[file] = fd
            else:
                self._open.move_to_end(file)
            self._pins[file] = self._pins.get(file, 0) + 1
            return fd

    def _make_room(self, most: int) -> None:
        """Take descriptors from files that are not in use, until there are fewer than so many."""
        if len(self._open) < most:
            return
        for idle in [f for f in self._open if not self._pins.get(f)]:
            os.close(self._open.pop(idle))
            if len(self._open) < most:
                return

    def release(self, file: OpenFile) -> None:
        """End a use."""
        with self._lock:
            if self._pins.get(file, 0) > 0:
                self._pins[file] -= 1

    def close(self, file: OpenFile) -> None:
        """Close a file for good."""
        with self._lock:
            self._pins.pop(file, None)
            fd = self._open.pop(file, None)
            if fd is not None:
                os.close(fd)


_POOL = _Pool()
