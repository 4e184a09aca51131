import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaworks.checkpoints.cached import PAGE, cached_bytes
from deltaworks.checkpoints.reader import ByteCounter, RangeReader, page_aligned
from deltaworks.checkpoints.transfer import reads
from deltaworks.errors import BudgetError, CheckpointError


def test_every_byte_is_counted_once(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    (tmp_path / "f").write_bytes(content.tobytes())
    counter = ByteCounter()
    with RangeReader(tmp_path / "f", counter) as reader, ThreadPoolExecutor(4) as pool:

        def part(i: int) -> bool:
            out = np.empty(4099, np.uint8)
            reader.read_into(out, i * 4099)
            return bool((out == content[i * 4099 : (i + 1) * 4099]).all())

        assert all(pool.map(part, range(200)))
    assert counter.value == 200 * 4099


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(10))
    counter = ByteCounter()
    with RangeReader(tmp_path / "f", counter) as reader, pytest.raises(CheckpointError, match="ends at byte 10"):
        reader.read_into(np.empty(8, np.uint8), 5)
    assert counter.value == 5


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        RangeReader(tmp_path / "f", ByteCounter())


def uncached(path: Path, content: NDArray[np.uint8]) -> Path:
    """A file of which the page cache holds nothing, as far as the file system goes along."""
    path.write_bytes(content.tobytes())
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@pytest.mark.parametrize("limit", [None, 1 << 30])
@pytest.mark.parametrize("is_cached", [False, True])
def test_rows_hold_what_the_file_holds_however_it_is_read(tmp_path: Path, limit: int | None, is_cached: bool) -> None:
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, 50 * PAGE + 123, dtype=np.uint8)
    path = uncached(tmp_path / "f", content)
    if is_cached:
        path.read_bytes()
    counter = ByteCounter(limit)
    asked = 0
    with RangeReader(path, counter, direct=True) as reader:
        for _ in range(200):
            offset = int(rng.integers(0, len(content)))
            nbytes = int(rng.integers(0, len(content) - offset + 1))
            place = offset % PAGE if rng.random() < 0.8 else int(rng.integers(0, PAGE))
            (row,) = page_aligned(1, nbytes + 2 * PAGE)
            reader.read_row(row, place, offset, nbytes)
            np.testing.assert_array_equal(row[place : place + nbytes], content[offset : offset + nbytes])
            asked += nbytes
    assert counter.value == asked


def test_within_a_limit_nothing_around_a_range_is_read(tmp_path: Path) -> None:
    content = np.full(8 * PAGE, 7, np.uint8)
    counter = ByteCounter(3 * PAGE)
    with RangeReader(uncached(tmp_path / "f", content), counter, direct=True) as reader:
        (row,) = page_aligned(1, 8 * PAGE)
        row[:] = 0
        reader.read_row(row, 100, 100, 3 * PAGE)
        assert row.sum() == 7 * 3 * PAGE
        with pytest.raises(BudgetError):
            reader.read_row(row, 0, 0, 1)


def test_a_file_cut_short_is_noticed_around_the_page_cache_too(tmp_path: Path) -> None:
    path = uncached(tmp_path / "f", np.zeros(4 * PAGE + 10, np.uint8))
    for limit in (None, 1 << 30):
        with RangeReader(path, ByteCounter(limit), direct=True) as reader:
            (row,) = page_aligned(1, 8 * PAGE)
            with pytest.raises(CheckpointError, match=f"ends at byte {4 * PAGE + 10}"):
                reader.read_row(row, 0, 0, 6 * PAGE)


@pytest.mark.parametrize("limit", [None, 1 << 30])
def test_two_threads_meet_a_device_that_wants_other_alignment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    """Another thread gives up reading around the page cache while this one is about to do so."""
    content = np.random.default_rng(0).integers(0, 256, 4 * PAGE, dtype=np.uint8)

    def refuses(fd: int, view: memoryview, offset: int, wanted: int) -> Iterator[int]:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return reads(fd, view, offset, wanted)

    def is_cached(self: RangeReader, *_: int) -> bool:
        self._direct = None
        return False

    with RangeReader(uncached(tmp_path / "f", content), ByteCounter(limit), direct=True) as reader:
        monkeypatch.setattr("deltaworks.checkpoints.reader.reads", refuses)
        monkeypatch.setattr(RangeReader, "_is_cached", is_cached)
        (row,) = page_aligned(1, 4 * PAGE)
        reader.read_row(row, 0, 0, 4 * PAGE)
        np.testing.assert_array_equal(row, content)


def test_what_the_page_cache_holds(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(10 * PAGE))
    with path.open("rb") as file:
        assert cached_bytes(file.fileno(), 0, 10 * PAGE) in (10 * PAGE, None)
        assert cached_bytes(file.fileno(), 0, 1) in (mmap.PAGESIZE, None)
