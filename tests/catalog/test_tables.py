import os
from pathlib import Path

import numpy as np
import pytest
from families import random_tensors, tuned, write_model

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.statistics import CUT_DENSITIES
from deltaworks.catalog.statistics_file import read_statistics
from deltaworks.catalog.store import TABLE, Catalog
from deltaworks.catalog.tables import read_table
from deltaworks.catalog.tidy import find_waste
from deltaworks.errors import CatalogError

SHAPES = {"a.weight": (97, 131), "b.weight": (64, 64), "c.weight": (5,), "d": (0,)}
BLOCK = 4096


@pytest.fixture
def statistics(catalog: Catalog, tmp_path: Path) -> Path:
    """The statistics of one expert."""
    made = random_tensors(0, SHAPES)
    base = register(catalog, "base", str(write_model(tmp_path / "base", made)))
    expert = register(catalog, "expert", str(write_model(tmp_path / "expert", tuned(1, made))), "base")
    analyze(catalog, expert, base, block_size=BLOCK)
    return catalog.statistics_file(expert.fingerprint, base.fingerprint)


def test_says_what_the_statistics_say(statistics: Path) -> None:
    for _ in range(2):  # unpacked, then mapped
        table = read_table(statistics)
        assert table.block_size == BLOCK
        assert list(table.rows) == list(SHAPES)
        for tensor in read_statistics(statistics):
            rows = table.rows[tensor.name]
            assert rows.stop - rows.start == len(tensor.blocks)
            values = np.array([b.values for b in tensor.blocks])
            for i, name in ((1, "changed"), (3, "delta_square"), (4, "base_square"), (5, "base_delta")):
                np.testing.assert_array_equal(getattr(table, name)[rows], values[:, i])
            np.testing.assert_array_equal(table.sketch[rows], [b.sketch for b in tensor.blocks])
            np.testing.assert_array_equal(table.sample[rows], [b.sample for b in tensor.blocks])
        assert statistics.with_suffix(TABLE).is_file()


def test_finds_the_cuts_that_are_there(statistics: Path) -> None:
    cuts, size = read_table(statistics).cuts, 97 * 131
    wanted = [("a.weight", max(1, int(d * size))) for d in CUT_DENSITIES] + [("b.weight", 40), ("c.weight", 2)]
    assert all(cut is not None and len(cut) == 4 for cut in cuts.find(tuple(wanted)))
    assert cuts.find((("b.weight", 64 * 64), ("d", 1), ("a.weight", 1), ("c.weight", 5))) == [None] * 4
    assert cuts.find(()) == []


def test_is_made_again_where_statistics_changed_or_it_is_damaged(statistics: Path) -> None:
    before, kept = read_table(statistics), statistics.with_suffix(TABLE)
    good = kept.read_bytes()
    for damaged in (b"", b"x" * 100, good[:-20], good[: len(good) // 2]):
        kept.write_bytes(damaged)
        np.testing.assert_array_equal(read_table(statistics).sample, before.sample)
        assert kept.read_bytes() == good
    os.utime(statistics, ns=(1, 1))
    read_table(statistics)
    assert kept.read_bytes() != good
    statistics.write_bytes(b"x")
    with pytest.raises(CatalogError, match="analyze the expert again"):
        read_table(statistics)
    statistics.unlink()
    with pytest.raises(CatalogError, match="analyze the expert again"):
        read_table(statistics)


def test_statistics_are_enough_where_nothing_can_be_written(statistics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", _full)
    assert len(read_table(statistics).changed) == 7
    assert sorted(p.name for p in statistics.parent.iterdir()) == [statistics.name]


def _full(fd: int) -> None:
    raise OSError(28, os.strerror(28))


def test_goes_with_its_model(catalog: Catalog, statistics: Path) -> None:
    read_table(statistics)
    assert not find_waste(catalog)
    kept = [statistics, statistics.with_suffix(TABLE)]
    moved = [path.rename(path.with_stem(f"{'0' * 24}-{'1' * 24}")) for path in kept]
    assert {w.path for w in find_waste(catalog)} == set(moved)
