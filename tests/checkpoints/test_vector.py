"""Vectors of bytes, and lookups, against NumPy; other vectors are seen through in tests of the kernels made of them."""

from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from deltaworks.checkpoints.byte_vector import (
    bytes_above,
    bytes_where,
    from_pairs,
    less_one,
    lookup_bytes,
    shifted_sum,
    splat_bytes,
    sums_of_eight,
    widened,
)
from deltaworks.checkpoints.jit import inlined, inner, kernel
from deltaworks.checkpoints.memory_vector import (
    load,
    load_at,
    load_bytes,
    load_each,
    load_floats,
    load_packed,
    room,
    store,
    store_packed,
)
from deltaworks.checkpoints.vector import LANES, bits, splat, unpacked

LOWER, UPPER = np.uint64(0x8877665544332211), np.uint64(0xFF0FEEDDCCBBAA99)
TABLE = np.array([LOWER, UPPER]).view(np.uint8)


@inlined
def _spread(found: Any, out: NDArray[np.uint16]) -> None:
    a, b, c, d = widened(found)
    store(out, 0, a)
    store(out, LANES, b)
    store(out, 2 * LANES, c)
    store(out, 3 * LANES, d)


@kernel
def _all_of_them(
    x: NDArray[np.uint8],
    y: NDArray[np.uint8],
    mask: np.uint64,
    out: NDArray[np.uint16],
    stored: NDArray[np.uint8],
    words: NDArray[np.uint64],
) -> None:
    """Every operation on bytes `x` and `y` (below sixteen)."""
    a, b = load_bytes(x, 0), load_bytes(y, 0)
    _spread(a, out[0])
    _spread(a | b, out[1])
    _spread(a + b, out[2])
    _spread(bytes_where(mask, a), out[3])
    _spread(bytes_where(mask, np.uint8(7)), out[4])
    _spread(less_one(b), out[5])
    _spread(lookup_bytes((LOWER, UPPER), b), out[6])
    _spread((b - a) & splat_bytes(np.uint8(31)), out[7])
    _spread(shifted_sum(a, less_one(b), b), out[8])
    _spread(shifted_sum(shifted_sum(a, b, a), b, b), out[9])
    _spread(from_pairs(LOWER, UPPER), out[10])
    store(stored, 3, a)
    store(words, 0, sums_of_eight(b))
    words[8] = bytes_above(a, np.uint8(9))


def test_bytes() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, 64).astype(np.uint8), rng.integers(0, 16, 64).astype(np.uint8)
    y[:2] = 0, 15
    out, stored, words = np.zeros((11, 64), np.uint16), np.zeros(70, np.uint8), np.zeros(9, np.uint64)
    mask = np.unpackbits(x[:8], bitorder="little").astype(bool)
    _all_of_them(x, y, x[:8].view(np.uint64)[0], out, stored, words)
    wide, less = x.astype(np.uint16), np.maximum(y, 1).astype(np.uint16) - 1
    pairs = np.unpackbits(TABLE, bitorder="little").reshape(64, 2)
    expected = [
        x,
        x | y,
        x + y,
        np.where(mask, x, 0),
        np.where(mask, 7, 0),
        less,
        TABLE[y],
        (y - x) & 31,
        (wide << less) + y,
        (((wide << y) + x) << y) + y,
        pairs[:, 0] + 2 * pairs[:, 1],
    ]
    np.testing.assert_array_equal(out, np.array(expected, np.uint16))
    np.testing.assert_array_equal(stored, np.pad(x, 3))
    np.testing.assert_array_equal(words[:8], y.reshape(8, 8).sum(axis=1))
    np.testing.assert_array_equal(np.unpackbits(words[8:].view(np.uint8), bitorder="little"), x > 9)


@kernel
def _pack(x: NDArray[np.float32], masks: NDArray[np.uint32], packed: NDArray[np.float32]) -> int:
    at = 0
    for i, mask in enumerate(masks):
        store_packed(packed, at, load_at(x, i * LANES), unpacked(mask))
        for lane in range(LANES):
            at += mask >> np.uint32(lane) & np.uint32(1)
    return at


@kernel
def _unpack(packed: NDArray[np.float32], masks: NDArray[np.uint32], out: NDArray[np.float32]) -> None:
    at = 0
    for i, mask in enumerate(masks):
        store(out, i * LANES, load_packed(packed, at, unpacked(mask)))
        for lane in range(LANES):
            at += mask >> np.uint32(lane) & np.uint32(1)


def test_lanes_are_packed_and_come_back() -> None:
    rng = np.random.default_rng(2)
    masks = np.array([0, 0xFFFF, 1, 0x8000, *rng.integers(0, 1 << 16, 20)], np.uint32)
    x = rng.normal(size=len(masks) * LANES).astype(np.float32)
    packed, out = np.full(len(x) + LANES, np.nan, np.float32), np.empty_like(x)
    chosen = np.unpackbits(masks.astype("<u2").view(np.uint8), bitorder="little").astype(bool)
    assert _pack(x, masks, packed) == chosen.sum()
    np.testing.assert_array_equal(packed[: chosen.sum()], x[chosen])
    _unpack(packed, masks, out)
    np.testing.assert_array_equal(out[chosen], x[chosen])


@kernel
def _narrow(
    x: NDArray[np.uint32],
    whole: NDArray[np.uint32],
    halves: NDArray[np.uint16],
    least: NDArray[np.uint8],
    raw: NDArray[np.uint8],
    floats: NDArray[np.float32],
) -> None:
    store(whole, 1, load_at(x, 1) + splat(np.uint32(1)))
    store(halves, 1, load_at(x, 0))
    store(least, 1, load_at(x, 0))
    store(whole, 1 + LANES, load_at(halves, 1))
    store(whole, 1 + 2 * LANES, load_at(least, 1))
    store(floats, 0, load_floats(raw, 5))


def test_numbers_of_any_width_are_stored_and_loaded() -> None:
    rng = np.random.default_rng(3)
    x, raw = rng.integers(0, 1 << 32, LANES + 1).astype(np.uint32), rng.normal(size=LANES).astype(np.float32)
    whole, halves = np.zeros(4 * LANES, np.uint32), np.zeros(2 * LANES, np.uint16)
    least = np.zeros(2 * LANES, np.uint8)
    floats = np.zeros(LANES, np.float32)
    _narrow(x, whole, halves, least, np.pad(raw.view(np.uint8), 5), floats)
    lower = x[:LANES]
    np.testing.assert_array_equal(
        whole[1 : 1 + 3 * LANES], np.concatenate([x[1:] + np.uint32(1), lower & 0xFFFF, lower & 0xFF])
    )
    np.testing.assert_array_equal(floats, raw)


_words = room(types.uint64, 5)


@inner
def _sum(values: NDArray[np.uint64]) -> int:
    own, other = _words(), _words()
    for i in range(5):
        own[i], other[i] = values[i], np.uint64(0)
    return int(own.sum() + other.sum()) + len(own)


@kernel
def _sum_of(values: NDArray[np.uint64]) -> int:
    return _sum(values)


def test_room() -> None:
    assert _sum_of(np.arange(5, dtype=np.uint64)) == 15


@kernel
def _each(table: NDArray[np.float32], index: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    store(out, 0, load_each(table, bits(load(index, 0, 0)) >> splat(np.uint32(16))))


def test_load_each() -> None:
    rng = np.random.default_rng(1)
    table, out = rng.random(60_000, np.float32), np.empty(LANES, np.float32)
    index = rng.integers(0, len(table), LANES).astype(np.uint16)
    index[:3] = 0, 59_999, 0
    _each(table, index[None], out)
    np.testing.assert_array_equal(out, table[index])
