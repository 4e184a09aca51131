"""A pool of open files that stays within the process's descriptor limit.

A family of 64 experts of 30 files each has more files than most systems let a process open. The least recently used
files give their descriptors back, and get new ones when they are read again.
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

    Attributes:
        path: the file.
        size: of it, in bytes.
        opening: held by the pool while it opens the file.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, flags: int = 0) -> None:
        self.path, self.size = path, 0
        self._flags, self._random, self._is_closed = flags, False, False
        self._state: tuple[int, ...] | None = None
        self.opening = threading.Lock()
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

    @property
    def is_closed(self) -> bool:
        """Whether it was closed for good."""
        return self._is_closed

    def close(self) -> None:
        """Give the descriptor back for good; reading afterwards is an error."""
        self._is_closed = True
        _POOL.close(self)


class _Pool:
    """Open files in least-recently-used order.

    Files are opened outside the lock of the pool, because opening a file on a network file system may take long.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[OpenFile, int] = OrderedDict()
        self._pins: dict[OpenFile, int] = {}
        self._opening = 0

    def acquire(self, file: OpenFile, *, waits: bool = True) -> int:
        """A descriptor of a file, in use until `release`.

        A blocking request may exceed the limit by one descriptor; it needs no more than that one, so it is soon given
        back. With `waits` false, the result is -1 where all descriptors are in use.
        """
        with self._lock:
            fd = self._pin(file)
        if fd is not None:
            return fd
        with file.opening:  # threads that want the same file wait for it, and no others do
            with self._lock:
                fd = self._pin(file)
                if fd is not None:
                    return fd
                self._make_room(_most())
                if not waits and len(self._open) + self._opening >= _most():
                    return -1
                self._opening += 1
            try:
                fd = self._new(file)
            finally:
                with self._lock:
                    self._opening -= 1
                    if fd is not None:
                        self._open[file] = fd
                        self._pin(file)
        if file.is_closed:  # meanwhile, by another thread, which may not have found the descriptor
            self.close(file)
            raise OSError(errno.EBADF, "the file is closed")
        return fd

    def _pin(self, file: OpenFile) -> int | None:
        """Begin a use of a file that has a descriptor; None where it has none. With the lock held."""
        fd = self._open.get(file)
        if fd is not None:
            self._open.move_to_end(file)
            self._pins[file] = self._pins.get(file, 0) + 1
        return fd

    def _new(self, file: OpenFile) -> int:
        """A new descriptor of a file; where the process can have no more, idle files give theirs back first."""
        try:
            return file.open()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        with self._lock:
            self._make_room((len(self._open) + self._opening) // 2)  # others opened more than was left for them
        return file.open()

    def _make_room(self, most: int) -> None:
        """Take descriptors from files that are not in use, until there are fewer than so many. With the lock held."""
        for idle in [f for f in self._open if not self._pins.get(f)]:
            if len(self._open) + self._opening < most:
                return
            os.close(self._open.pop(idle))

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
