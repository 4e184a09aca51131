"""Vectors of bytes, and lookups, against NumPy; other vectors are seen through in tests of the kernels made of them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.byte_vector import (
    bytes_above,
    bytes_where,
    from_words,
    less_one,
    lookup_bytes,
    narrowed,
    shifted_sum,
    widened,
    words_of,
)
from deltaworks.checkpoints.jit import inlined, kernel
from deltaworks.checkpoints.vector import LANES, bits, load, load_each, splat, store

LOWER, UPPER = np.uint64(0x8877665544332211), np.uint64(0xFF0FEEDDCCBBAA99)
TABLE = np.array([LOWER, UPPER]).view(np.uint8)


@inlined
def _vector(values: NDArray[np.uint64]) -> Any:
    return from_words((values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7]))


@inlined
def _spread(found: Any, out: NDArray[np.uint16]) -> None:
    a, b, c, d = widened(found)
    store(out, 0, a)
    store(out, LANES, b)
    store(out, 2 * LANES, c)
    store(out, 3 * LANES, d)


@kernel
def _all_of_them(
    x: NDArray[np.uint64], y: NDArray[np.uint64], out: NDArray[np.uint16], words: NDArray[np.uint64]
) -> None:
    """Every operation on bytes `x` and `y` (below sixteen)."""
    a, b = _vector(x), _vector(y)
    _spread(a, out[0])
    _spread(a | b, out[1])
    _spread(a + b, out[2])
    _spread(bytes_where(x[0], a), out[3])
    _spread(bytes_where(x[0], np.uint8(7)), out[4])
    _spread(less_one(b), out[5])
    _spread(lookup_bytes((LOWER, UPPER), b), out[6])
    _spread(narrowed(widened(a)), out[7])
    _spread(shifted_sum(a, less_one(b), b), out[8])
    _spread(shifted_sum(shifted_sum(a, b, a), b, b), out[9])
    words[8] = bytes_above(a, np.uint8(9))
    words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7] = words_of(a)


def test_bytes() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, 64).astype(np.uint8), rng.integers(0, 16, 64).astype(np.uint8)
    y[:2] = 0, 15
    out, words = np.zeros((10, 64), np.uint16), np.zeros(9, np.uint64)
    _all_of_them(x.view(np.uint64), y.view(np.uint64), out, words)
    mask = np.unpackbits(x[:8], bitorder="little").astype(bool)
    wide, less = x.astype(np.uint16), np.maximum(y, 1).astype(np.uint16) - 1
    expected = [
        x,
        x | y,
        x + y,
        np.where(mask, x, 0),
        np.where(mask, 7, 0),
        less,
        TABLE[y],
        x,
        (wide << less) + y,
        (((wide << y) + x) << y) + y,
    ]
    np.testing.assert_array_equal(out, np.array(expected, np.uint16))
    np.testing.assert_array_equal(words[:8], x.view(np.uint64))
    np.testing.assert_array_equal(np.unpackbits(words[8:].view(np.uint8), bitorder="little"), x > 9)


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
