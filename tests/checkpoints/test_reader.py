from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from deltaworks.checkpoints.reader import ByteCounter, RangeReader
from deltaworks.errors import CheckpointError


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
