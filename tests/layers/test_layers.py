"""Layers give back every bit, say how far they are from it at every depth, and are found out where they are damaged."""

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import TILE, decode_reference, encode_reference
from deltaworks.checkpoints.dtypes import BF16, F16, F32, F64, DType
from deltaworks.checkpoints.reader import ByteCounter, page_aligned
from deltaworks.checkpoints.sketch import BUCKETS, SAMPLES, sample_places, signs, sketch_reference
from deltaworks.checkpoints.vector import LANES
from deltaworks.errors import CatalogError
from deltaworks.layers.bitstream import gather, gather_reference, scatter, scatter_reference
from deltaworks.layers.cells import CENTRES, DEPTH, DRAFTS, EDGES, GROUP, MEANS, RANGES, SHARES, STEPS, WAYS
from deltaworks.layers.decode import add_drafts, add_tile, decode_block
from deltaworks.layers.encode import Residuals, encode_block, most_bytes
from deltaworks.layers.file import SHIFTS, LayeredTensor, LayerFile, exact_elements, is_layered
from deltaworks.layers.opened import layers_start, open_block, opened_bytes
from deltaworks.layers.reading import BlockReader, LayerInput
from deltaworks.layers.trellis import CODES, LENGTHS, find_path, told_reference
from deltaworks.layers.writer import LayerWriter

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def padded(raw: Bytes) -> Bytes:
    out = np.zeros(-(-len(raw) // 8) * 8, np.uint8)
    out[: len(raw)] = raw
    return out


def layers_of(
    base: Bytes, base_type: DType, expert: Bytes, expert_type: DType, count: int, first: int = 0
) -> tuple[Bytes, NDArray[np.int64], NDArray[np.float64], Residuals]:
    room = most_bytes(count)
    out, scratch = np.full(room, 0xA5, np.uint8), np.full((2, room), 0x5A, np.uint8)
    ends, left = np.zeros(DEPTH, np.int64), np.zeros(DEPTH + 1)
    codes, shift = (base_type.code, expert_type.code), SHIFTS[expert_type]
    sketches, samples = (np.full((DEPTH - 1, n), np.nan, np.float32) for n in (BUCKETS, SAMPLES))
    residuals = Residuals(first, signs(), sample_places(3, count), sketches, samples)
    encode_block(padded(base), codes[0], padded(expert), codes[1], count, shift, scratch, out, ends, left, residuals)
    assert (np.diff(ends) >= 0).all()
    assert ends[-1] <= room
    return out[: ends[-1]], ends, left, residuals


def opened(layers: Bytes, ends: NDArray[np.int64], depth: int, count: int, shift: int) -> Bytes:
    own = layers[: ends[depth - 1]] if depth <= DRAFTS else layers[ends[DRAFTS - 1] : ends[depth - 1]]
    row = np.full(opened_bytes(count, len(own)), 0x77, np.uint8)
    row[layers_start(count) : layers_start(count) + len(own)] = own
    open_block(row, count, ends, depth, shift)
    return row


def told(layers: Bytes, ends: NDArray[np.int64], depth: int, base: Floats, shift: int) -> Floats:
    out = np.empty(len(base), np.float32)
    decode_block(opened(layers, ends, depth, len(base), shift), base, len(base), out)
    return out


def check(base: Bytes, base_type: DType, expert: Bytes, expert_type: DType) -> list[float]:
    """Round trip; returns relative errors by depth."""
    count = len(expert) * 8 // expert_type.bits
    layers, ends, left, residuals = layers_of(base, base_type, expert, expert_type, count, 3 * 8192)
    b, x = decode_reference(base, base_type), decode_reference(expert, expert_type)
    with np.errstate(all="ignore"):
        delta = (x - b).astype(np.float64)
        finite = np.isfinite(delta)
        errors = []
        if finite.all() and np.square(delta).sum() < 1e30:
            assert left[0] == pytest.approx(np.square(delta).sum(), rel=1e-5, abs=1e-34)
        for depth in range(1, DEPTH + 1):
            got = told(layers, ends, depth, b, SHIFTS[expert_type])
            missed = float(np.square((x.astype(np.float64) - got)[finite]).sum())
            whole = float(np.square(delta[finite]).sum())
            # Blocks that hold what is not finite are never weighed by what layers leave.
            if finite.all() and whole < 1e30:
                # What is told is added to the base, and rounded.
                rounding = 1e-17 + 2.0**-23 * float(np.linalg.norm(np.maximum(np.abs(b), np.abs(x)).astype(np.float64)))
                assert np.sqrt(left[depth]) == pytest.approx(np.sqrt(missed), rel=1e-3, abs=rounding)
                if depth < DEPTH and count:
                    rest, norm = x - got, np.sqrt(missed)
                    sample, sketch = residuals.samples[depth - 1], residuals.sketches[depth - 1]
                    off = pytest.approx(rest[residuals.places], rel=1e-3, abs=1e-3 * norm + rounding)
                    assert sample == off
                    wanted = sketch_reference(rest, residuals.first)
                    assert sketch == pytest.approx(wanted, rel=1e-3, abs=1e-3 * norm + np.sqrt(count) * rounding)
            errors.append(float(np.sqrt(missed / whole)) if whole else 0.0)
    assert left[-1] == 0
    np.testing.assert_array_equal(exact_elements(got, expert_type), expert)
    return errors


def fine_tune(
    count: int, rng: np.random.Generator, *, unchanged: float = 0.0, scale: float = 0.05
) -> tuple[Floats, Floats]:
    base = rng.normal(0, 0.02, count).astype(np.float32)
    delta = rng.normal(0, 0.02 * scale, count) * (rng.random(count) >= unchanged)
    return base, (base + delta).astype(np.float32)


@pytest.mark.parametrize("expert_type", SHIFTS, ids=lambda t: t.name)
@pytest.mark.parametrize("base_type", [BF16, F32], ids=lambda t: t.name)
@pytest.mark.parametrize("unchanged", [0.0, 0.5, 0.97, 1.0])
def test_every_bit_comes_back(expert_type: DType, base_type: DType, unchanged: float) -> None:
    rng = np.random.default_rng(1)
    for count in (0, 1, 15, 16, 127, 128, 255, 257, TILE - 1, TILE, 3 * TILE + 77):
        b, x = fine_tune(count, rng, unchanged=unchanged)
        base = encode_reference(b, base_type)
        expert = encode_reference(np.where(x == b, decode_reference(base, base_type), x), expert_type)
        check(base, base_type, expert, expert_type)


@given(st.data())
def test_any_bits_come_back(data: st.DataObject) -> None:
    base_type = data.draw(st.sampled_from([BF16, F16, F32]))
    expert_type = data.draw(st.sampled_from(list(SHIFTS)))
    count = data.draw(st.integers(0, 600))
    seed = data.draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, count * base_type.bits // 8, np.uint8)
    expert = rng.integers(0, 256, count * expert_type.bits // 8, np.uint8)
    if base_type is expert_type and count and data.draw(st.booleans()):
        same = rng.random(count) < data.draw(st.sampled_from([0.3, 0.9]))
        wide = np.repeat(same, base_type.bits // 8)
        expert = np.where(wide, base, expert)
    check(base, base_type, expert, expert_type)


@given(
    hnp.arrays(np.uint16, st.integers(1, 300), elements=st.integers(0, 2**16 - 1)),
    st.sampled_from([0.0, 1e-41, 3e-39, 1e-30, 1.0, 3e38, np.inf, np.nan]),
)
def test_strange_numbers_beside_common_ones_come_back(patterns: NDArray[np.uint16], strange: float) -> None:
    base = patterns.view(np.uint8)
    x = decode_reference(base, BF16).copy()
    with np.errstate(all="ignore"):
        x[::7] = strange
        x[1::7] = -x[1::7]
        x[2::7] *= np.float32(1.01)
        check(base, BF16, encode_reference(x, BF16), BF16)


@pytest.mark.parametrize("size", [1e-37, 1e-20, 0.001, 3.0, 1e37])
def test_layer_one_tells_the_mean_of_each_even_group(size: float) -> None:
    rng = np.random.default_rng(0)
    # From the largest mean down by a third of an octave; the last two groups are too small beside it.
    means = np.float64(size) * np.array([*(2.0 ** (-i / 3) for i in range(11)), 2.0**-9, 2.0**-12])
    base = np.zeros(len(means) * GROUP, np.float32)
    expert = (rng.choice([-1.0, 1.0], len(base)) * np.repeat(means, GROUP)).astype(np.float32)
    layers, ends, *_ = layers_of(base.view(np.uint8), F32, expert.view(np.uint8), F32, len(base))
    got = told(layers, ends, 1, base, 0).reshape(len(means), GROUP)
    near = np.abs(got[:11]) / means[:11, None] / (np.abs(CODES[1]).mean() * LENGTHS[0])
    assert near.max() < 2 ** (1 / 8) * 1.03
    assert near.min() > 2 ** (-1 / 8) / 1.03
    assert (np.sign(got[:11]) == np.sign(expert.reshape(got.shape)[:11])).all()
    assert not got[11:].any()


@pytest.mark.parametrize("count", [0, 1, 17, GROUP, 1000, TILE, 2 * TILE + 300])
@pytest.mark.parametrize("unchanged", [0.0, 0.5])
def test_drafts_tell_what_the_reference_says(count: int, unchanged: float) -> None:
    rng = np.random.default_rng(count)
    delta = rng.normal(size=count) * (rng.random(count) >= unchanged)
    delta[:300] = np.copysign(1.0, delta[:300])
    b, x = np.zeros(count, np.float32), delta.astype(np.float32)
    layers, ends, *_ = layers_of(b.view(np.uint8), F32, x.view(np.uint8), F32, count)
    groups, tile = -(-count // GROUP), TILE // GROUP
    codes = np.unpackbits(layers[2 : 2 + -(-groups // 2)].reshape(-1, 1), axis=1, bitorder="little").reshape(-1, 4)
    means = MEANS[(codes[:groups] << np.arange(4)).sum(axis=1)] * 2.0 ** (layers[:2].view(np.int16)[0] / STEPS)
    even = np.unpackbits(layers[2 + -(-groups // 2) :][: -(-groups // 8)], bitorder="little")[:groups].astype(bool)
    assert even[: count >= 300 and 300 // GROUP].all()
    wanted = np.zeros(groups * GROUP)
    for layer in range(DRAFTS):
        first = int(ends[0]) if layer else int(ends[0]) - groups * LANES
        for g in range(0, groups, tile):
            n = min(tile, groups - g)
            packed = layers[first + g * LANES : first + (g + n) * LANES]
            wanted[g * GROUP : (g + n) * GROUP] += told_reference(packed, n, even[g : g + n], CODES[2 * layer :])
        own = wanted * np.repeat(means, GROUP) * LENGTHS[layer]
        np.testing.assert_allclose(told(layers, ends, 1 + layer, b, 0), own[:count], rtol=1e-5, atol=1e-6)


def best_of_all(values: Floats, codes: Floats) -> float:
    """The least squared distance of any path through one lane, by trying all."""
    every = np.arange(1 << len(values))[:, None] >> np.arange(len(values)) & 1
    path = np.pad(every, ((0, 0), (3, 0)))
    window = sum(path[:, k : k + len(values)] << k for k in range(4))
    return float(np.square(codes[np.asarray(window)] - values).sum(axis=1).min())


@given(st.integers(0, 2**32), st.integers(0, DRAFTS - 1))
def test_no_path_is_nearer_than_the_one_that_is_found(seed: int, layer: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.zeros((1, TILE), np.float32)
    values[0, : 8 * LANES] = rng.normal(size=8 * LANES)
    before, even = values.copy(), rng.integers(0, 2, 1, np.uint8)
    out = np.zeros(64, np.uint8)
    codes = CODES[2 * layer : 2 * layer + 2]
    find_path(values, 1, codes, even, 0, out, 3, np.empty(TILE, np.uint16))
    told = told_reference(out[3 : 3 + LANES], 1, even.astype(bool), codes)
    np.testing.assert_array_equal(values[0, :GROUP], before[0, :GROUP] - told)
    for lane in range(0, LANES, 5):
        own = values[0, lane:GROUP:LANES].astype(np.float64)
        least = best_of_all(before[0, lane:GROUP:LANES], codes[even[0]])
        assert np.square(own).sum() == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("unchanged", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("count", [TILE, TILE - 1, 1000, 130, 1])
@pytest.mark.parametrize("strange", [False, True])
@pytest.mark.parametrize("kind", [BF16, F32], ids=lambda t: t.name)
def test_exact_layers_are_added_as_they_would_be_decoded(
    unchanged: float, count: int, strange: bool, kind: DType
) -> None:
    rng = np.random.default_rng(3)
    first, last = fine_tune(count, rng, unchanged=unchanged)
    last[256:384] = first[256:384]
    if strange:
        last[:130:13] = np.inf
    base, expert = encode_reference(first, BF16), encode_reference(last, kind)
    layers, ends, *_ = layers_of(base, BF16, expert, kind, count)
    b = np.zeros((1, TILE), np.float32)
    b[0, :count] = decode_reference(base, BF16)
    for depth in range(1, DEPTH + 1):
        row = opened(layers, ends, depth, count, SHIFTS[kind])
        before = rng.normal(size=(1, TILE)).astype(np.float32)
        sums, weight = before.copy(), np.float32(-0.7)
        assert add_tile(row, b, 0, count, weight, sums) == (depth > DRAFTS)
        delta = told(layers, ends, depth, b[0, :count], SHIFTS[kind]) - b[0, :count]
        expected = before[0, :count] + delta * weight if depth > DRAFTS else before[0, :count]
        np.testing.assert_array_equal(sums[0, :count], expected)


@pytest.mark.parametrize("count", [TILE, TILE - 1, 1000, 130, 1])
def test_drafts_of_several_experts_are_added_at_once(count: int) -> None:
    rng = np.random.default_rng(4)
    b = np.zeros((1, TILE), np.float32)
    b[0, :count] = rng.normal(0, 0.02, count)
    expected = before = rng.normal(size=(1, TILE)).astype(np.float32)
    rows, weights = np.full((5, opened_bytes(count, 4096)), 0x33, np.uint8), np.array([0.3, -1.7, 1.0], np.float32)
    which = np.array([4, 0, 2])
    for k, depth in enumerate((1, 2, 2)):
        delta = rng.normal(0, 0.01, count) * (rng.random(count) < 0.8)
        delta[200:400] = np.copysign(0.01, delta[200:400])
        expert = (b[0, :count] + delta).astype(np.float32)
        own = np.ascontiguousarray(b[0, :count])
        layers, ends, *_ = layers_of(own.view(np.uint8), F32, expert.view(np.uint8), F32, count)
        row = opened(layers, ends, depth, count, 0)
        rows[which[k], : len(row)] = row
        got = told(layers, ends, depth, own, 0) - own
        expected = expected + weights[k] * np.pad(got, (0, TILE - count))
    sums = before.copy()
    add_drafts(rows.reshape(-1), rows.shape[1], which, weights.copy(), 3, 0, count, np.empty((3, 4), np.int64), sums)
    # They are not rounded to what the base and they add up to.
    np.testing.assert_allclose(sums[0, :count], expected[0, :count], rtol=0, atol=2e-6)


def test_what_each_depth_leaves() -> None:
    b, x = fine_tune(1 << 16, np.random.default_rng(0))
    errors = check(encode_reference(b, BF16), BF16, encode_reference(x, BF16), BF16)
    # A Gaussian's bounds are 0.5 and 0.25. Drafts are longer than what is nearest: 0.56 and 0.31.
    assert errors[:5] == pytest.approx([0.588, 0.316, 0.2, 0.109, 0.028], rel=0.03)
    assert errors[-1] == 0.0


def test_an_exact_block_of_a_fine_tune_takes_half_of_its_bytes() -> None:
    b, x = fine_tune(1 << 16, np.random.default_rng(0), scale=0.03)
    _, ends, _, _ = layers_of(encode_reference(b, BF16), BF16, encode_reference(x, BF16), BF16, len(b))
    bits = 8 * (ends - np.where(np.arange(DEPTH) < DRAFTS, 0, ends[DRAFTS - 1])) / len(b)
    assert bits[:4] == pytest.approx([1.04, 2.04, 3.06, 4.06], abs=0.02)
    assert bits[-1] < 8
    b, x = fine_tune(1 << 16, np.random.default_rng(0), scale=0.03, unchanged=0.95)
    _, ends, _, _ = layers_of(encode_reference(b, BF16), BF16, encode_reference(x, BF16), BF16, len(b))
    assert 8 * (ends[-1] - ends[DRAFTS - 1]) / len(b) < 1.5


def test_groups_that_did_not_change_stay_as_they_are() -> None:
    b, x = fine_tune(TILE, np.random.default_rng(0))
    x[GROUP : 2 * GROUP] = b[GROUP : 2 * GROUP]
    base, expert = encode_reference(b, BF16), encode_reference(x, BF16)
    layers, ends, _, _ = layers_of(base, BF16, expert, BF16, TILE)
    before = decode_reference(base, BF16)
    for depth in range(1, DEPTH + 1):
        got = told(layers, ends, depth, before, 16)
        np.testing.assert_array_equal(got[GROUP : 2 * GROUP], before[GROUP : 2 * GROUP])


def test_the_centres_are_those_of_a_normal_group() -> None:
    rng = np.random.default_rng(0)
    values = np.abs(rng.normal(size=(20_000, GROUP)))
    whole = EDGES[:, 8].astype(np.float64)
    fits = whole[:, None] * 2.0 ** np.ceil(np.log2(values.max(axis=1) / whole[:, None]))
    way, unit = fits.argmin(axis=0), fits.min(axis=0) / whole[fits.argmin(axis=0)]
    scaled = values / unit[:, None]
    cell = (scaled[:, :, None] >= EDGES[way][:, None, 1:8]).sum(axis=2)
    for w in range(WAYS):
        own, at = scaled[way == w].ravel(), cell[way == w].ravel()
        for depth in (3, 4):
            halves = at >> (4 - depth)
            means = [own[halves == i].mean() for i in range(1 << (depth - 1))]
            first = (1 << (depth - 1)) - 4
            assert CENTRES[w, first:][: len(means)] == pytest.approx(means, rel=0.03)
            assert SHARES[w, first] == pytest.approx((halves == 0).mean(), rel=0.03)


def test_ranges_ascend() -> None:
    assert (np.diff(RANGES) > 0).all()


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_bits_are_spread_and_gathered(source: int, where: int) -> None:
    s, w = np.uint64(source), np.uint64(where)
    places = [i for i in range(64) if where >> i & 1]
    expected = sum((source >> k & 1) << i for k, i in enumerate(places))
    assert int(scatter_reference(s, w)) == expected
    assert int(gather_reference(np.uint64(expected), w)) == source & ((1 << len(places)) - 1)
    assert _scatter(s, w) == expected
    assert _gather(np.uint64(expected), w) == source & ((1 << len(places)) - 1)


def _compiled(function: Any) -> Any:
    import numba

    @numba.njit
    def call(source: np.uint64, where: np.uint64) -> np.uint64:
        return function(source, where)  # type: ignore[no-any-return]

    return call


_scatter, _gather = _compiled(scatter), _compiled(gather)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[Path, LayeredTensor, Floats, Bytes]:
    """A file with one tensor of two blocks."""
    b, x = fine_tune(4096 + 500, np.random.default_rng(3))
    base, expert = encode_reference(b, BF16), encode_reference(x, BF16)
    tensor = LayeredTensor("w", "BF16", (len(b),), is_delta=True, first=0, blocks=2, residual=0)
    writer = LayerWriter(tmp_path / "x.layers", 2, 1, 4096)
    for block in range(2):
        own = slice(2 * 4096 * block, 2 * 4096 * (block + 1))
        layers, ends, left, _ = layers_of(base[own], BF16, expert[own], BF16, len(expert[own]) // 2)
        writer.add(block, layers, ends, left)
    writer.add_residual(0, np.eye(DEPTH - 1, BUCKETS) * 3, np.ones((DEPTH - 1, SAMPLES), np.float32))
    assert not (tmp_path / "x.layers").exists()
    writer.commit([tensor], {"block_size": 4096})
    writer.abandon()
    assert [p.name for p in tmp_path.iterdir()] == ["x.layers"]
    return tmp_path / "x.layers", tensor, decode_reference(base, BF16), expert


def restored(path: Path, tensor: LayeredTensor, base: Floats) -> Bytes:
    file = LayerFile(path, ByteCounter())
    np.testing.assert_array_equal(file.residuals["sketch"], [np.eye(DEPTH - 1, BUCKETS)])
    for i in range(2):
        file.open_block(file.tensors[tensor.name], i, DRAFTS, np.zeros(opened_bytes(4096, 10_000), np.uint8))
    parts = [file.restore(file.tensors[tensor.name], i, base[4096 * i : 4096 * (i + 1)]) for i in range(2)]
    file.close()
    return np.concatenate(parts)


def test_a_file_gives_back_what_was_written(stored: tuple[Path, LayeredTensor, Floats, Bytes]) -> None:
    path, tensor, base, expert = stored
    np.testing.assert_array_equal(restored(path, tensor, base), expert)
    counter = ByteCounter()
    file = LayerFile(path, counter)
    row = np.zeros(opened_bytes(4096, 10_000), np.uint8)
    file.open_block(tensor, 0, 1, row)
    assert counter.value == file.index[0]["ends"][0]
    file.close()


def test_a_flipped_bit_is_found_wherever_it_is(stored: tuple[Path, LayeredTensor, Floats, Bytes]) -> None:
    path, tensor, base, _ = stored
    sound = path.read_bytes()
    ends = LayerFile(path, ByteCounter()).index["ends"]
    places = {0: None, 8: (1, 0), 8 + int(ends[0, 2]): (4, 0), int(8 + ends[0, 6]): (1, 1), len(sound) - 30: None}
    rng = np.random.default_rng(0)
    places |= {int(p): places.get(int(p)) for p in rng.integers(8, len(sound), 200)}
    for place, what in places.items():
        damaged = bytearray(sound)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        message = f"layer {what[0]} of 'w', block {what[1]}" if what else "damaged|cut off"
        with pytest.raises(CatalogError, match=message):
            restored(path, tensor, base)


def opened_together(file: LayerFile, tensor: LayeredTensor, depths: list[list[int]], base: Floats) -> list[Floats]:
    """What so many layers of each block tell, block by block, where several inputs are read at once."""
    reader = BlockReader([LayerInput(file, tensor, np.array(own)) for own in depths])
    raw, told = page_aligned(len(depths) + 1, max(reader.opened)), []
    for block in range(2):
        reader.open(block, range(len(depths)), raw, np.arange(len(depths), 0, -1))
        part = base[4096 * block : 4096 * (block + 1)]
        for row in range(len(depths), 0, -1):
            told.append(np.empty_like(part))
            decode_block(raw[row], part, len(part), told[-1])
    return told


def test_several_inputs_are_opened_together(stored: tuple[Path, LayeredTensor, Floats, Bytes]) -> None:
    path, tensor, base, expert = stored
    depths = [[3, DEPTH], [DEPTH, 1], [5, 4]]
    counter = ByteCounter()
    file = LayerFile(path, counter)
    told = opened_together(file, tensor, depths, base)
    read = (file.read_bytes[tensor.first + block, own[block] - 1] for own in depths for block in range(2))
    assert counter.value == sum(read)
    for own, (block, k) in zip(told, itertools.product(range(2), range(3)), strict=True):
        row, one = np.zeros(opened_bytes(4096, 10_000), np.uint8), np.empty_like(own)
        file.open_block(tensor, block, depths[k][block], row)
        decode_block(row, base[4096 * block : 4096 * (block + 1)], len(one), one)
        np.testing.assert_array_equal(own, one)
    np.testing.assert_array_equal(encode_reference(told[1], BF16), expert[: 2 * 4096])
    file.close()


def test_what_is_wrong_with_one_of_several_is_named(stored: tuple[Path, LayeredTensor, Floats, Bytes]) -> None:
    path, tensor, base, _ = stored
    sound = path.read_bytes()
    place = 8 + int(LayerFile(path, ByteCounter()).index["ends"][0, 2])
    path.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
    file = LayerFile(path, ByteCounter())
    opened_together(file, tensor, [[3, 1], [2, 7]], base)
    with pytest.raises(CatalogError, match="layer 4 of 'w', block 0"):
        opened_together(file, tensor, [[3, 1], [4, 7]], base)
    file.close()


def test_a_file_that_is_cut_off_while_it_is_read(stored: tuple[Path, LayeredTensor, Floats, Bytes]) -> None:
    path, tensor, base, _ = stored
    file = LayerFile(path, ByteCounter())
    os.truncate(path, 8 + int(file.index["ends"][0, 1]))
    with pytest.raises(CatalogError, match="ends at byte"):
        opened_together(file, tensor, [[2, 1], [3, 1]], base)
    file.close()


@pytest.mark.parametrize("kept", [0, 7, 60, 0.5, -1])
def test_a_file_that_was_cut_off_is_refused(stored: tuple[Path, LayeredTensor, Floats, Bytes], kept: float) -> None:
    path, *_ = stored
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(CatalogError, match="cut off"):
        LayerFile(path, ByteCounter())


def test_layers_of_an_older_version_say_so(stored: tuple[Path, LayeredTensor, Floats, Bytes]) -> None:
    path, *_ = stored
    path.write_bytes(path.read_bytes().replace(b'{"version":5', b'{"version":3'))
    with pytest.raises(CatalogError, match=r"version 3, not 5; .*analyze --layers"):
        LayerFile(path, ByteCounter())


def test_an_abandoned_file_leaves_nothing(tmp_path: Path) -> None:
    writer = LayerWriter(tmp_path / "x.layers", 1, 0, 4096)
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_doubles_have_no_layers() -> None:
    assert is_layered(BF16, F32)
    assert not is_layered(F64, BF16)
    assert not is_layered(BF16, F64)
