"""Kernels against their NumPy references: bit by bit, whatever the types, block sizes and parameters."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from merges import block as block_of
from merges import drained
from numpy.typing import NDArray

from deltaworks.catalog.histogram import BINS, Cut, Interval, count_magnitudes, kept_elements, place_cuts, ranks_between
from deltaworks.catalog.statistics import add_up
from deltaworks.checkpoints.codec import TILE, decode_reference, encode_reference
from deltaworks.checkpoints.dtypes import BF16, F16, F32, FLOATS, DType
from deltaworks.checkpoints.vector import LANES
from deltaworks.errors import CheckpointError
from deltaworks.merging.methods import OPERATIONS
from deltaworks.merging.methods.copying import Copy
from deltaworks.merging.methods.delta import DeltaSum, Sparsify, lower_bits_reference
from deltaworks.merging.methods.delta_kernels import collect_lower_bits
from deltaworks.merging.methods.operation import Operation
from deltaworks.merging.methods.random_mask import (
    draw_masks,
    random_key,
    random_mask_reference,
    round_density,
    split_density,
)
from deltaworks.merging.methods.ranked_mask import chances, draw_ranked_masks, ranked_mask_reference
from deltaworks.merging.methods.sce import SelectedSum
from deltaworks.merging.methods.spherical import Slerp
from deltaworks.merging.methods.weighted import WeightedSum

CUT_BLOCK = 4096


def stream(
    operation: Operation, raws: Sequence[NDArray[np.uint8]], dtypes: Sequence[DType], out: DType, size: int
) -> Any:
    """Run an operation as the executor does, in blocks of `CUT_BLOCK * size` elements or more, last block first."""

    def run(block_size: int) -> tuple[NDArray[np.uint8], int]:
        blocks = []
        for start in reversed(range(0, max(1, len(raws[0]) * 8 // dtypes[0].bits), block_size)):
            count = min(block_size, len(raws[0]) * 8 // dtypes[0].bits - start)
            rows = np.zeros((len(raws), block_size * 8), np.uint8)
            for row, raw, dtype in zip(rows, raws, dtypes, strict=True):
                part = raw[dtype.nbytes(start) : dtype.nbytes(start + count)]
                row[: len(part)] = part
            scratch = np.full((len(raws) + 3, TILE), np.nan, np.float32)
            codes = np.array([d.code for d in dtypes])
            blocks.append(block_of(rows, codes, start, count, scratch, np.zeros(block_size * 8, np.uint8), out.code))
        settled = operation
        for _ in range(operation.passes):
            settled = settled.settle([settled.measure(b) for b in reversed(blocks)], block_size)
        assert settled.passes == 0
        wrong = sum(settled.merge(b) for b in blocks)
        return np.concatenate([b.out[: out.nbytes(b.count)] for b in reversed(blocks)]), wrong

    return run(-(-CUT_BLOCK * size // operation.alignment) * operation.alignment)


def inputs(seed: int, size: int, dtypes: Sequence[DType], spread: float) -> list[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(size)
    raws = []
    for dtype in dtypes:
        delta = rng.standard_normal(size) * np.exp(rng.standard_normal(size)) * spread
        delta[rng.random(size) < 0.2] = 0
        raws.append(encode_reference((base + delta).astype(np.float32), dtype))
    return raws


def expected(operation: Operation, raws: Sequence[NDArray[np.uint8]], dtypes: Sequence[DType], out: DType) -> Any:
    values = [decode_reference(r, d) for r, d in zip(raws, dtypes, strict=True)]
    return encode_reference(operation.reference(values), out)


def cut_for(base: NDArray[np.float32], expert: NDArray[np.float32], keep: int) -> Cut | Interval:
    """A cut from histograms."""
    delta = expert - base
    blocks = []
    for start in range(0, len(delta), CUT_BLOCK):
        dense = np.zeros(BINS, np.uint32)
        part = delta[start : start + CUT_BLOCK].copy()
        count_magnitudes(part, len(part), dense)
        blocks.append(drained(dense))
    (cut,) = place_cuts(add_up(blocks), blocks, CUT_BLOCK, len(delta), [keep])
    return cut


dtype_lists = st.lists(st.sampled_from([BF16, BF16, F16, F32]), min_size=2, max_size=5)
sizes = st.sampled_from([0, 1, 5, 2047, 2048, 2049, 4096, 5000, 9000])


@given(
    st.integers(0, 99), sizes, dtype_lists, st.sampled_from(FLOATS), st.integers(1, 3), st.booleans(), st.data()
)  # fmt: skip
def test_weighted_sums(
    seed: int, size: int, dtypes: list[DType], out: DType, blocks: int, normalize: bool, data: st.DataObject
) -> None:
    weights = tuple(data.draw(st.floats(0.1, 2)) for _ in dtypes)
    operation = WeightedSum(weights, normalize)
    raws = inputs(seed, size, dtypes, 0.1)
    got, _ = stream(operation, raws, dtypes, out, blocks)
    np.testing.assert_array_equal(got, expected(operation, raws, dtypes, out))


@given(st.integers(0, 99), sizes, st.floats(0, 1), st.sampled_from([1e-3, 0.1, 3.0]), st.integers(1, 3))
def test_slerp(seed: int, size: int, t: float, spread: float, blocks: int) -> None:
    operation = Slerp(t)
    raws = inputs(seed, size, [BF16, F16], spread)
    got, _ = stream(operation, raws, [BF16, F16], BF16, blocks)
    np.testing.assert_array_equal(got, expected(operation, raws, [BF16, F16], BF16))


def test_slerp_ends_and_opposites() -> None:
    a = encode_reference(np.arange(1, 9, dtype=np.float32), F32)
    b = encode_reference(np.arange(8, 0, -1, dtype=np.float32), F32)
    for t, end in ((0.0, a), (1.0, b)):
        np.testing.assert_array_equal(stream(Slerp(t), [a, b], [F32, F32], F32, 1)[0], end)
    minus = encode_reference(-np.arange(1, 9, dtype=np.float32), F32)
    got, _ = stream(Slerp(0.25), [a, minus], [F32, F32], F32, 1)
    np.testing.assert_array_equal(decode_reference(got, F32), np.arange(1, 9, dtype=np.float32) * np.float32(0.5))
    zero = np.zeros(32, np.uint8)
    assert not stream(Slerp(0.5), [zero, zero], [F32, F32], F32, 1)[0].any()


@given(
    st.integers(0, 99),
    sizes,
    dtype_lists,
    st.sampled_from(list(Sparsify)),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from([1.0, 0.7, -2.0]),
    st.sampled_from([0.003, 0.3]),
    st.integers(1, 3),
    st.data(),
)
def test_delta_sums(
    seed: int,
    size: int,
    dtypes: list[DType],
    sparsify: Sparsify,
    switches: tuple[bool, bool, bool],
    scale: float,
    spread: float,
    blocks: int,
    data: st.DataObject,
) -> None:
    raws = inputs(seed, size, dtypes, spread)
    values = [decode_reference(r, d) for r, d in zip(raws, dtypes, strict=True)]
    experts = len(dtypes) - 1
    densities = tuple(data.draw(st.sampled_from([0.0, 0.1, 0.37, 0.5, 0.99, 1.0])) for _ in range(experts))
    gammas = tuple(data.draw(st.sampled_from([0.0, 0.01, 0.3])) for _ in range(experts))
    epsilons = tuple(data.draw(st.sampled_from([0.0, 0.3, 0.999])) * min(d, 1 - d) for d in densities)
    ranks = [(0, kept_elements(d, size)) for d in densities]
    if sparsify is Sparsify.OUTLIERS:
        ranks = [ranks_between(d, g, size) for d, g in zip(densities, gammas, strict=True)]
        densities = tuple(0.0 if a == b else d for d, (a, b) in zip(densities, ranks, strict=True))
    operation = DeltaSum(
        weights=tuple(data.draw(st.sampled_from([1.0, 0.3, -0.5, 1 / 3])) for _ in range(experts)),
        densities=densities,
        sparsify=sparsify,
        rescale=switches[0],
        consensus=switches[1],
        normalize=switches[2],
        scale=scale,
        cuts=tuple(
            cut_for(values[0], x, end) if 0 < d < 1 and size else Cut(0, 0, 0, 1)
            for x, d, (_, end) in zip(values[1:], densities, ranks, strict=True)
        ),
        keys=tuple(random_key(seed, k, "t") for k in range(experts)),
        gammas=gammas,
        tops=tuple(
            cut_for(values[0], x, first) if 0 < d < 1 and first else None
            for x, d, (first, _) in zip(values[1:], densities, ranks, strict=True)
        ),
        epsilons=epsilons,
        row=data.draw(st.sampled_from([1, 2, 40, 640, 4096, 5000])),
    )
    got, _ = stream(operation, raws, dtypes, BF16, blocks)
    np.testing.assert_array_equal(got, expected(operation, raws, dtypes, BF16))
    again = OPERATIONS[operation.kind].from_json(operation.to_json())
    np.testing.assert_array_equal(stream(again, raws, dtypes, BF16, 1)[0], got)


def test_ties_keep_the_lowest_indices() -> None:
    """All deltas equal: of a quarter kept, the first quarter stays."""
    base = encode_reference(np.zeros(9000, np.float32), BF16)
    ones = np.ones(9000, np.float32)
    keep = kept_elements(0.25, 9000)
    cut = cut_for(np.zeros(9000, np.float32), ones, keep)
    operation = DeltaSum((1.0,), (0.25,), Sparsify.MAGNITUDE, False, True, True, 1.0, (cut,))
    for blocks in (1, 2, 3):
        got, _ = stream(operation, [base, encode_reference(ones, BF16)], [BF16, BF16], F32, blocks)
        np.testing.assert_array_equal(decode_reference(got, F32), (np.arange(9000) < keep).astype(np.float32))


@pytest.mark.parametrize(("gamma", "density"), [(0.0, 0.25), (0.1, 0.25), (0.4, 0.6), (0.9, 0.5), (0.5, 0.001)])
def test_outliers_go_and_of_equals_the_lowest_indices(gamma: float, density: float) -> None:
    """Of deltas that are all equal, a stretch in the middle stays, wherever blocks begin and end."""
    first, end = ranks_between(density, gamma, 9000)
    assert end - first == int(density * 9000)
    assert first == min(int(gamma * 9000), 9000 - (end - first))
    base, ones = np.zeros(9000, np.float32), np.ones(9000, np.float32)
    tops = (cut_for(base, ones, first) if first else None,)
    operation = DeltaSum(
        (1.0,), (density,), Sparsify.OUTLIERS, False, True, True, 1.0, (cut_for(base, ones, end),),
        gammas=(gamma,), tops=tops,
    )  # fmt: skip
    raws = [encode_reference(x, BF16) for x in (base, ones)]
    for blocks in (1, 2, 3):
        got, _ = stream(operation, raws, [BF16, BF16], F32, blocks)
        places = np.arange(9000)
        np.testing.assert_array_equal(decode_reference(got, F32), ((places >= first) & (places < end)).astype("f4"))


def test_elected_signs_and_weights_by_hand() -> None:
    """The example of section 3 of the TIES paper's kind: the larger total wins, the others are left out."""
    base = encode_reference(np.zeros(8, np.float32), F32)
    a = encode_reference(np.array([1, 1, -1, 0, 2, 0, 0, 0], np.float32), F32)
    b = encode_reference(np.array([3, -2, 1, 0, -2, 0, 0, 0], np.float32), F32)
    operation = DeltaSum((1.0, 1.0), (1.0, 1.0), Sparsify.NONE, False, True, True, 1.0)
    got, _ = stream(operation, [base, a, b], [F32] * 3, F32, 1)
    np.testing.assert_array_equal(decode_reference(got, F32)[:5], [2, -2, 1, 0, 2])


@given(
    st.integers(0, 99),
    sizes,
    dtype_lists,
    st.sampled_from([0.0, 0.01, 0.37, 0.5, 0.99, 1.0]),
    st.sampled_from([1e-4, 0.003, 0.3]),
    st.integers(1, 3),
)
def test_sce(seed: int, size: int, dtypes: list[DType], topk: float, spread: float, blocks: int) -> None:
    raws = inputs(seed, size, dtypes, spread)
    operation = SelectedSum(len(dtypes) - 1, topk)
    got, _ = stream(operation, raws, dtypes, BF16, blocks)
    np.testing.assert_array_equal(got, expected(operation, raws, dtypes, BF16))
    again = OPERATIONS[operation.kind].from_json(operation.to_json())
    np.testing.assert_array_equal(stream(again, raws, dtypes, BF16, 1)[0], got)


@pytest.mark.parametrize("topk", [0.25, 0.6, 0.999])
def test_sce_selects_the_lowest_indices_of_equals(topk: float) -> None:
    """All variances equal, and one place in nine has none: of what is left, the first share is selected."""
    base, ones = np.zeros(9000, np.float32), np.where(np.arange(9000) % 9, np.float32(1), np.float32(0))
    raws = [encode_reference(x, BF16) for x in (base, ones, base)]
    selected = np.flatnonzero(ones)[: int(topk * 8000)]
    for blocks in (1, 2, 3):
        got, _ = stream(SelectedSum(2, topk), raws, [BF16] * 3, F32, blocks)
        np.testing.assert_array_equal(np.flatnonzero(decode_reference(got, F32)), selected)


def test_sce_by_hand() -> None:
    """Select: both agree on the second element. Calculate: by 8 and 4 of 12. Erase: the signs of the sums stay."""
    base = encode_reference(np.zeros(4, np.float32), F32)
    a = encode_reference(np.array([2, 5, -2, 2], np.float32), F32)
    b = encode_reference(np.array([0, 5, 2, 0], np.float32), F32)
    got, _ = stream(SelectedSum(2, 0.99999), [base, a, b], [F32] * 3, F32, 1)
    np.testing.assert_array_equal(decode_reference(got, F32), [2, 0, 2, 0])
    got, _ = stream(SelectedSum(2, 1.0), [base, a, b], [F32] * 3, F32, 1)
    np.testing.assert_allclose(decode_reference(got, F32), [2, 5, 2, 2], rtol=1e-6)
    c = encode_reference(np.array([4, 3, 4, 0], np.float32), F32)
    got, _ = stream(SelectedSum(3, 1.0), [base, a, b, c], [F32] * 4, F32, 1)
    a_, b_, c_ = 37 / 107, 29 / 107, 41 / 107
    wanted = [(2 * a_ + 4 * c_) / (a_ + c_), 5 * a_ + 5 * b_ + 3 * c_, (2 * b_ + 4 * c_) / (b_ + c_), 2]
    np.testing.assert_allclose(decode_reference(got, F32), wanted, rtol=1e-6)


def test_random_streams_look_random() -> None:
    size = 1 << 20
    for density in (0.05, 0.3, 0.9):
        kept = np.stack([random_mask_reference(random_key(0, k, "t"), density, np.arange(size)) for k in range(4)])
        # Four standard deviations, of shares and of correlations.
        assert np.abs(kept.mean(axis=1) - density).max() < 4 * np.sqrt(density * (1 - density) / size)
        signs = (kept - density) / np.sqrt(density * (1 - density))
        together = signs @ signs.T / size
        assert np.abs(together - np.diag(np.diag(together))).max() < 4 / np.sqrt(size), "experts are independent"
        for lag in (1, 2, 16, 17, 1024, 4096):
            assert abs((signs[0, lag:] * signs[0, :-lag]).mean()) < 4 / np.sqrt(size - lag), "so are neighbours"
        runs = kept[0].reshape(-1, 64).sum(axis=1)
        assert abs(runs.var() / (64 * density * (1 - density)) - 1) < 4 * np.sqrt(2 / len(runs)), "and stretches"
    assert random_key(0, 0, "t") != random_key(1, 0, "t") != random_key(1, 0, "u")


def test_random_masks_are_finer_than_their_sixteen_bits() -> None:
    """One and a half units of 2^-16 are not one or two."""
    size, density = 1 << 24, 1.5 / 65536
    kept = random_mask_reference(random_key(0, 0, "t"), density, np.arange(size))
    assert abs(np.count_nonzero(kept) - density * size) < 4 * np.sqrt(density * size)
    assert split_density(0.5) == (1 << 15, 0)
    assert split_density(density) == (1, 1 << 63)


@settings(max_examples=50, deadline=None)
@given(key=st.integers(0, 2**64 - 1), density=st.floats(0, 1), start=st.integers(0, 2**40), count=st.integers(1, TILE))
def test_kernels_draw_the_same_masks(key: int, density: float, start: int, count: int) -> None:
    start *= TILE
    units = np.array(split_density(density), np.uint64)
    masks = np.zeros((3, TILE // LANES + 4), np.uint16)
    state: Any = np.uint64(key)
    draw_masks(state, round_density(state, units, start), start, count, masks, 1, 2)
    wanted = random_mask_reference(key, density, start + np.arange(TILE))
    drawn = np.unpackbits(masks[1, 2:].view(np.uint8), bitorder="little")
    np.testing.assert_array_equal(drawn[:count], wanted[:count])
    untouched = -(-count // 32) * 32
    assert not drawn[untouched:].any()
    assert not masks[[0, 2]].any()
    assert not masks[1, :2].any()


@settings(max_examples=50, deadline=None)
@given(
    key=st.integers(0, 2**64 - 1),
    row=st.sampled_from([1, 2, 31, 100, 129, 1000, 2048, 3000, 9000]),
    rows=st.integers(1, 9),
    kind=st.sampled_from(["spread", "few", "equal", "far", "wrong"]),
    density=st.floats(0.01, 0.99),
    share=st.floats(0, 0.9999),
    dtype=st.sampled_from([BF16, F16, F32]),
)
def test_kernels_draw_the_same_ranked_masks(
    key: int, row: int, rows: int, kind: str, density: float, share: float, dtype: DType
) -> None:
    rng = np.random.default_rng(key % 97)
    count = max(1, row * rows - 1)
    delta = rng.standard_normal(count)
    if kind == "few":
        delta = np.round(delta)
    elif kind == "equal":
        delta = np.where(rng.random(count) < 0.9, 0.25, delta)
    elif kind == "far":
        delta = np.exp(4 * delta)
    elif kind == "wrong":
        delta[rng.random(count) < 0.1] = np.inf
        delta[rng.random(count) < 0.1] = np.nan
    raws = [encode_reference(x.astype(np.float32), dtype) for x in (np.zeros(count), delta)]
    buffers = np.zeros((2, len(raws[0]) + 8), np.uint8)
    buffers[:, : len(raws[0])] = raws
    scratch, masks = np.full((5, TILE), np.nan, np.float32), np.zeros((1, 2 * -(-count // 32)), np.uint16)
    block = block_of(buffers, np.array([dtype.code] * 2), 0, count, scratch, np.zeros(8, np.uint8), dtype.code)
    chance = chances(density, share * min(density, 1 - density))
    lines, limits = np.array([chance[:2]], np.float32), np.array([chance[2:]], np.int64)
    keys = np.array([key], np.uint64)
    draw_ranked_masks(block.inputs, 0, count, row, keys, lines, limits, scratch, masks)
    drawn = np.unpackbits(masks[0].view(np.uint8), bitorder="little")[:count]
    moved = decode_reference(raws[1], dtype) - decode_reference(raws[0], dtype)
    wanted = ranked_mask_reference(key, chance, row, moved)
    np.testing.assert_array_equal(drawn[moved != 0], wanted[moved != 0])


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.15), (0.3, 0.0), (0.1, 0.0999), (0.9, 0.05)])
def test_chances_rise_with_ranks(density: float, epsilon: float) -> None:
    """A hundred elements of different size in a row: each stays as often as its rank says."""
    row, rows = 100, 20_000
    delta = np.random.default_rng(0).permuted(np.tile(np.arange(1, row + 1, dtype=np.float32), (rows, 1)), axis=1)
    kept = ranked_mask_reference(random_key(0, 0, "t"), chances(density, epsilon), row, delta.ravel())
    share = np.bincount(delta.ravel()[kept].astype(np.int64) - 1, minlength=row) / rows
    wanted = density - epsilon + 2 * epsilon * np.arange(row) / (row - 1)
    assert np.abs(share - wanted).max() < 4.5 * np.sqrt(0.25 / rows)
    assert abs(share.mean() - density) < 4 * np.sqrt(0.25 / rows / row)


def test_equals_share_their_ranks_and_chances_end_at_nothing_and_everything() -> None:
    """However many are equal, each stays with the chance of the middle; so does an only one."""
    key, size = random_key(0, 0, "t"), 1 << 18
    for row in (1, 2, 1000):
        for delta in (np.ones(size, np.float32), np.where(np.arange(size) % 2, 1, -1).astype(np.float32)):
            kept = ranked_mask_reference(key, chances(0.3, 0.25), row, delta)
            assert abs(kept.mean() - 0.3) < 4 * np.sqrt(0.21 / size)
    assert ranked_mask_reference(key, chances(1.0, 0.15), 100, delta).all()
    assert not ranked_mask_reference(key, chances(0.0, 0.15), 100, delta).any()


def test_what_is_not_finite_is_counted() -> None:
    raw = encode_reference(np.array([1, np.nan, np.inf, 3e38, 0, 0, 0, 0], np.float32), F32)
    _, wrong = stream(WeightedSum((2.0,), False), [raw], [F32], F32, 1)
    assert wrong == 3


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize(("consensus", "normalize"), [(False, False), (False, True), (True, False), (True, True)])
def test_where_no_expert_is_read_the_base_stays(scale: float, *, consensus: bool, normalize: bool) -> None:
    base = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.uint8)
    rows = np.stack([base, np.zeros_like(base)])
    operation = DeltaSum((0.5,), (1.0,), Sparsify.NONE, False, consensus, normalize, scale)
    scratch, out = np.full((5, TILE), np.nan, np.float32), np.zeros_like(base)
    block = block_of(rows, np.array([BF16.code] * 2), 0, 1 << 16, scratch, out, BF16.code)
    block.inputs.present[1] = False
    wrong = operation.merge(block)
    values = decode_reference(base, BF16)
    finite = np.isfinite(values)
    merged = encode_reference(operation.reference([values[finite]] * 2), BF16)
    np.testing.assert_array_equal(out.view(np.uint16)[finite], merged.view(np.uint16))
    assert not np.isfinite(decode_reference(out, BF16)[~finite]).any()
    assert wrong > 0
    block.inputs.rows[0].view(np.uint16)[~finite] = 0
    assert operation.merge(block) == 0


def test_copies_must_agree() -> None:
    a, b = np.arange(16, dtype=np.uint8), np.arange(16, dtype=np.uint8)
    block = block_of(
        np.stack([a, b]), np.array([-1, -1]), 0, 16, np.empty((5, TILE), np.float32), np.empty(16, np.uint8), -1
    )
    Copy(8).merge(block)
    np.testing.assert_array_equal(block.out, a)
    block.inputs.rows[1, 3] ^= 1
    with pytest.raises(CheckpointError, match="integers cannot be averaged"):
        Copy(8).merge(block)


def test_lower_bits_parity() -> None:
    rng = np.random.default_rng(0)
    base, expert = (rng.standard_normal(5000, np.float32) for _ in range(2))
    upper = int(np.abs(expert - base).view(np.uint32)[17] >> 16)
    wanted = lower_bits_reference(base, expert, upper)
    found = np.empty(5000, np.uint16)
    rows = np.stack([np.pad(x, (0, 8)).view(np.uint8) for x in (base, expert)])
    codes = np.array([F32.code, F32.code])
    block = block_of(rows, codes, 0, 5000, np.empty((5, TILE), np.float32), np.empty(0, np.uint8), -1)
    count = collect_lower_bits(block.inputs, 1, 5000, upper, block.scratch, found)
    assert count == len(wanted) > 0
    np.testing.assert_array_equal(found[:count], wanted)
