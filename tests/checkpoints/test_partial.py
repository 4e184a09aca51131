"""Partial files and the processes that look for abandoned ones at the same time."""

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest

from deltaworks.checkpoints.partial import is_abandoned, open_partial, partial_path, remove_abandoned


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return partial_path(tmp_path / "file.parquet")


def test_a_file_that_is_written_is_not_removed(path: Path) -> None:
    fd = open_partial(path)
    assert not is_abandoned(path)
    assert not remove_abandoned(path)
    assert path.is_file()
    os.close(fd)
    assert remove_abandoned(path)
    assert not path.exists()
    assert not remove_abandoned(path)


def test_what_was_left_there_is_emptied(path: Path) -> None:
    path.write_text("left by a process that died")
    os.close(open_partial(path))
    assert path.read_bytes() == b""


def test_a_lock_that_is_held_for_an_instant_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks whether the file is abandoned holds its lock."""
    other = os.open(path, os.O_RDONLY | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr(time, "sleep", lambda _: fcntl.flock(other, fcntl.LOCK_UN))
    fd = open_partial(path)
    assert not is_abandoned(path)
    os.close(fd)
    os.close(other)


def test_a_file_that_is_written_already_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    fd = open_partial(path)
    with pytest.raises(BlockingIOError):
        open_partial(path)
    os.close(fd)


def test_a_file_that_is_removed_before_it_is_locked_is_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = fcntl.flock, list[int]()

    def unlink_first(fd: int, how: int) -> None:
        if not calls:
            path.unlink()
        calls.append(fd)
        whole(fd, how)

    monkeypatch.setattr(fcntl, "flock", unlink_first)
    fd = open_partial(path)
    os.write(fd, b"content")
    assert path.read_bytes() == b"content"
    os.close(fd)


def test_without_locks_nothing_is_abandoned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    os.close(open_partial(path))
    assert not is_abandoned(path)
    assert not remove_abandoned(path)
    assert path.is_file()
