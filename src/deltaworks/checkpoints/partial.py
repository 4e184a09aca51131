"""Files on their way to their name: called so that no two processes meet, and locked while they are written."""

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


def lock(fd: int) -> None:
    """Hold the lock of a partial file until its descriptor is closed, where the file system has locks.

    Raises:
        BlockingIOError: another process writes this file.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Without locks nobody can tell that the file is abandoned either, so it is never taken for that.
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise


def is_partial(path: Path) -> bool:
    """Whether a file is one on its way to its name."""
    return _PARTIAL.fullmatch(path.name) is not None


def is_abandoned(path: Path) -> bool:
    """Whether nobody writes a partial file any more.

    A number of a process alone says little, as other hosts and containers number theirs too; the lock is what tells.
    Files of earlier versions had none.
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
    """What tells where numbers of processes mean the same: this boot of this host, this container."""
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
