"""Temporary files that are renamed into place.

Their names are unique per process, and they are locked while they are written.
"""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

from blake3 import blake3

_PARTIAL = re.compile(r"\..+\.(?P<process>\d+)(?P<place>-[0-9a-f]{8})?")
_ATTEMPTS, _PAUSE_S = 100, 0.01


def partial_path(path: Path) -> Path:
    """Where this process writes what will be at `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}-{_place()}")


def lock(fd: int) -> bool:
    """Lock an open file or folder until its descriptor is closed, if the file system supports locks.

    Returns:
        Whether it is locked. Without locks nobody can tell that a file is abandoned, so none is taken for that.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise
        return False
    return True


def open_partial(path: Path, flags: int = os.O_WRONLY) -> int:
    """Make an empty partial file, and lock it.

    A process that looks for abandoned files may hold the lock for an instant, or delete the file before it is locked;
    then it is made again.

    Args:
        path: from `partial_path`.
        flags: for opening it, such as `os.O_RDWR`.

    Returns:
        Its descriptor, which holds the lock.

    Raises:
        BlockingIOError: it is being written already.
        OSError: it cannot be made.
    """
    for attempt in range(_ATTEMPTS):
        fd = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            lock(fd)
            if _is_at(fd, path):
                os.ftruncate(fd, 0)
                return fd
        except BlockingIOError:
            if attempt == _ATTEMPTS - 1:
                os.close(fd)
                raise
            time.sleep(_PAUSE_S)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise BlockingIOError(errno.EAGAIN, "the file is deleted again and again", str(path))


@contextmanager
def replacing(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file that takes its name only when all of it is on the device.

    Args:
        path: Its name; a file that is there is replaced.
        partial: Where it is written, from `partial_path`; None for `partial_path` of ``path``.

    Yields:
        The file, open for writing. If the block raises, it is deleted, and what was at ``path`` stays.
    """
    partial = partial or partial_path(path)
    try:
        with os.fdopen(open_partial(partial), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove_abandoned(path: Path) -> bool:
    """Delete a partial file if nobody writes it; returns whether it was deleted.

    The lock is held meanwhile, so that no process can begin to write the file that is deleted.

    Raises:
        OSError: it cannot be deleted.
    """
    found = _PARTIAL.fullmatch(path.name)
    if found is None or not is_abandoned(path):
        return False
    if found["place"] is None:
        path.unlink(missing_ok=True)
        return True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        if not lock(fd) or not _is_at(fd, path):
            return False
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _is_at(fd: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def is_partial(path: Path) -> bool:
    """Whether a file is one on its way to its name."""
    return _PARTIAL.fullmatch(path.name) is not None


def is_abandoned(path: Path) -> bool:
    """Whether nobody writes a partial file any more.

    A process ID is not enough, because other hosts and containers have their own; the lock decides. Files of earlier
    versions had no lock.
    """
    found = _PARTIAL.fullmatch(path.name)
    if found is None:
        return False
    if found["place"] is None:
        return not _is_running(int(found["process"]))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@cache
def _place() -> str:
    """Identifies the PID namespace: host, boot and container."""
    parts = [os.uname().nodename]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        path = Path(source)
        if path.is_symlink():
            parts.append(str(path.readlink()))
        elif path.is_file():
            parts.append(path.read_text())
    return blake3("\0".join(parts).encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
