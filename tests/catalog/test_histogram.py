import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from merges import drained

from deltaworks.catalog.histogram import (
    BINS,
    Cut,
    Interval,
    bins_reference,
    count_magnitudes,
    kept_elements,
    place_cuts,
    surviving_energy,
)
from deltaworks.catalog.statistics import add_up

BLOCK = 64


def delta_of(seed: int, size: int, kind: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(size, np.float32)
    if kind == "bfloat16":
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    if kind == "ties":
        values = np.round(values * 3) / np.float32(8)
    return values


def test_counts_agree_with_numpy() -> None:
    values = np.concatenate(
        [np.random.default_rng(0).integers(0, 0x7F800001, 9999, dtype=np.uint32).view(np.float32), [-0.0, 0.0, -1.0]]
    ).astype(np.float32)
    found = np.zeros(BINS, np.uint32)
    count_magnitudes(values, len(values), found)
    np.testing.assert_array_equal(found, np.bincount(bins_reference(values), minlength=BINS))


@given(st.integers(0, 1000), st.integers(1, 500), st.sampled_from(["float32", "bfloat16", "ties"]), st.data())
def test_a_cut_keeps_exactly_as_many_lowest_index_first(seed: int, size: int, kind: str, data: st.DataObject) -> None:
    delta = delta_of(seed, size, kind)
    keep = data.draw(st.integers(1, size))
    blocks = []
    for start in range(0, size, BLOCK):
        dense = np.zeros(BINS, np.uint32)
        count_magnitudes(delta[start : start + BLOCK].copy(), len(delta[start : start + BLOCK]), dense)
        blocks.append(drained(dense))
    (cut,) = place_cuts(add_up(blocks), blocks, BLOCK, size, [keep])
    bits = np.abs(delta).view(np.uint32)
    if isinstance(cut, Interval):
        assert kind == "float32"
        inside = np.sort(np.abs(delta)[bins_reference(delta) == cut.bin])[::-1]
        assert inside[cut.rank - 1] == np.sort(np.abs(delta))[::-1][keep - 1]
        assert cut.rank < len(inside) == cut.total
        return
    expected = np.zeros(size, bool)
    expected[np.argsort(-np.abs(delta), kind="stable")[:keep]] = True
    expected &= delta != 0
    np.testing.assert_array_equal(applied(cut, bits) & (delta != 0), expected)


def applied(cut: Cut, bits: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """The elements a cut keeps, in the plainest way."""
    kept = bits > cut.threshold
    left = cut.quota
    for i in np.flatnonzero(bits == cut.threshold):
        if i < cut.start:
            kept[i] = True
        elif left:
            kept[i] = True
            left -= 1
    return kept


@given(st.integers(0, 1000), st.integers(1, 500), st.sampled_from(["float32", "bfloat16", "ties"]))
def test_the_energy_that_survives_is_that_of_the_largest(seed: int, size: int, kind: str) -> None:
    delta = delta_of(seed, size, kind)
    blocks = []
    for start in range(0, size, BLOCK):
        dense = np.zeros(BINS, np.uint32)
        count_magnitudes(delta[start : start + BLOCK].copy(), len(delta[start : start + BLOCK]), dense)
        blocks.append(drained(dense))
    densities = (0.1, 0.5, 0.9)
    found = surviving_energy(add_up(blocks), blocks, size, densities)
    assert found.shape == (len(blocks), 3)
    squares = np.sort(np.square(delta.astype(np.float64)))[::-1]
    for i, density in enumerate(densities):
        exact = squares[: kept_elements(density, size)].sum()
        # A bin is at most 1/128 wide, relative to the magnitudes in it.
        np.testing.assert_allclose(found[:, i].sum(), exact, rtol=0.02, atol=1e-12)
