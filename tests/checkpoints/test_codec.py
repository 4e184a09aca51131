import numpy as np
import pytest
from numpy.typing import NDArray

from deltaworks.checkpoints.codec import decode, decode_reference, encode, encode_reference
from deltaworks.checkpoints.dtypes import BY_CODE, FLOATS, DType, float_dtype, promote
from deltaworks.checkpoints.vector import fma_reference
from deltaworks.errors import UserError

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def patterns(dtype: DType) -> NDArray[np.uint8]:
    """Every bit pattern of a narrow type, a million random ones of a wide one."""
    if dtype.bits <= 16:
        return np.arange(1 << dtype.bits, dtype=UNSIGNED[dtype.bits]).view(np.uint8)
    return np.random.default_rng(0).integers(0, 256, (1 << 20) * dtype.bits // 8, dtype=np.uint8)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_decode_parity(dtype: DType) -> None:
    raw = patterns(dtype)
    count = raw.size * 8 // dtype.bits
    out = np.empty(count, np.float32)
    decode(raw, dtype.code, 0, count, out)
    with np.errstate(all="ignore"):
        expected = decode_reference(raw, dtype)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(np.signbit(out), np.signbit(expected))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.name)
def test_encode_parity(dtype: DType) -> None:
    """Random bits, values at and around every halfway point of the type, and what overflows it."""
    rng = np.random.default_rng(1)
    with np.errstate(all="ignore"):
        exact = decode_reference(patterns(dtype)[: 1 << 19], dtype)
        halfway = np.concatenate([exact[:-1] * np.float32(0.5) + exact[1:] * np.float32(0.5), exact])
        around = [halfway, *(np.nextafter(halfway, np.float32(end)) for end in (np.inf, -np.inf))]
    anything = rng.integers(0, 1 << 32, 1 << 18, dtype=np.uint32).view(np.float32)
    spread = (rng.standard_normal(1 << 18) * np.exp2(rng.integers(-40, 20, 1 << 18))).astype(np.float32)
    values = np.concatenate([anything, spread, *around]).astype(np.float32)
    values = np.concatenate([values, np.zeros(-len(values) % 8, np.float32)])
    out = np.empty(len(values) * dtype.bits // 8, np.uint8)
    wrong = encode(values, len(values), dtype.code, out, 0)
    expected = encode_reference(values, dtype)
    kind = UNSIGNED[dtype.bits]
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(out.view(kind)[finite], expected.view(kind)[finite])
    with np.errstate(all="ignore"):
        again = decode_reference(out, dtype)
        assert np.isnan(again[~finite]).all()
        if dtype.bits != 64:
            assert wrong == np.count_nonzero(~np.isfinite(again))


def test_decode_and_encode_a_part() -> None:
    raw = np.arange(64, dtype=np.uint16).view(np.uint8)
    tile = np.empty(8, np.float32)
    decode(raw, 0, 24, 8, tile)
    np.testing.assert_array_equal(tile, decode_reference(raw, FLOATS[0])[24:32])
    out = np.zeros_like(raw)
    encode(tile, 8, 0, out, 24)
    np.testing.assert_array_equal(out.view(np.uint16)[24:32], np.arange(24, 32))
    assert not out.view(np.uint16)[:24].any()
    assert not out.view(np.uint16)[32:].any()


def test_fma_rounds_once() -> None:
    """A case where rounding the product first gives another sum."""
    x = np.array([1 + 2**-12], np.float32)
    got = fma_reference(np.float32(1 + 2**-12), x, np.array([-1.0], np.float32))
    assert got[0] == np.float32(2**-11 + 2**-24)
    assert np.float32(x[0] * x[0]) - np.float32(1) != got[0]


def test_float_dtype_names() -> None:
    assert float_dtype("bfloat16") == float_dtype("torch.bfloat16") == float_dtype("BF16")
    with pytest.raises(UserError, match="bfloat16, float16"):
        float_dtype("bf61")


def test_promotion_is_torchs() -> None:
    bf16, f16, f32, f64, e4m3, e5m2 = FLOATS
    assert promote(bf16, f16) == f32
    assert promote(f16, f64) == f64
    assert promote(e4m3, bf16) == bf16
    assert promote(e4m3, e5m2) == bf16


def test_codes_name_their_types() -> None:
    values = np.array([1.5, -2.0], np.float32)
    for code, dtype in BY_CODE.items():
        assert dtype.code == code
        assert len(encode_reference(values, dtype)) == 2 * dtype.bits // 8
