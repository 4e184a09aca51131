from pathlib import Path

import numpy as np
import pytest

from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.checkpoints.together import RowRange, read_together
from deltaworks.errors import BudgetError, CheckpointError


def test_every_range_lands_in_its_row_and_is_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    contents = [rng.integers(0, 256, 5000, dtype=np.uint8) for _ in range(3)]
    counters = [ByteCounter() for _ in contents]
    readers, ranges, asked = [], [], [0, 0, 0]
    raw, wanted = np.zeros((40, 700), np.uint8), np.zeros((40, 700), np.uint8)
    for k, content in enumerate(contents):
        (tmp_path / f"f{k}").write_bytes(content.tobytes())
        readers.append(RangeReader(tmp_path / f"f{k}", counters[k]))
    for row in range(40):
        k = row % 3
        offset, nbytes, place = (int(rng.integers(0, most)) for most in (4400, 600, 100))
        ranges.append(RowRange(readers[k], offset, nbytes, row, place))
        wanted[row, place : place + nbytes] = contents[k][offset : offset + nbytes]
        asked[k] += nbytes
    read_together([], raw)
    read_together(ranges, raw)
    np.testing.assert_array_equal(raw, wanted)
    assert [c.value for c in counters] == asked
    for reader in readers:
        reader.close()


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    for name, size in (("whole", 100), ("short", 50)):
        (tmp_path / name).write_bytes(bytes(size))
    counter, raw = ByteCounter(), np.zeros((2, 100), np.uint8)
    with RangeReader(tmp_path / "whole", counter) as whole, RangeReader(tmp_path / "short", counter) as short:
        with pytest.raises(CheckpointError, match="short ends at byte 50"):
            read_together([RowRange(whole, 0, 100, 0, 0), RowRange(short, 10, 90, 1, 0)], raw)
        assert counter.value == 100 + 40
        short.close()
        with pytest.raises(CheckpointError, match=r"cannot read .*short"):
            read_together([RowRange(short, 0, 10, 1, 0)], raw)


def test_nothing_is_read_beyond_a_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes([1] * 100))
    counter, raw = ByteCounter(150), np.zeros((2, 100), np.uint8)
    with RangeReader(tmp_path / "f", counter) as reader, pytest.raises(BudgetError):
        read_together([RowRange(reader, 0, 100, row, 0) for row in range(2)], raw)
    assert not raw.any()
    assert counter.value == 0
