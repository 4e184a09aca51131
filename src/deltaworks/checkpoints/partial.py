"""Temporary files that are renamed into place.

Their names are unique per process, and they are locked while they are written.
"""

import errno
import fcntl
import os
import re
from functools import cache
from pathlib import Path

from blake3 import blake3

_PARTIAL = re.compile(r"\..+\.(?P<process>\d+)(?P<place>-[0-9a-f]{8})?")


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
