"""Elements to float32 and back, a tile at a time, inside compiled kernels.

`decode` and `encode` are the kernels; `decode_reference` and `encode_reference` say the same with NumPy and
ml_dtypes, and the tests hold the two equal on every bit pattern. Encoding rounds to nearest even, as PyTorch does:
beyond the largest finite value BF16, F16 and F8_E5M2 become infinity and F8_E4M3, which has none, becomes NaN.
"""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, DType
from deltaworks.checkpoints.jit import inner
from deltaworks.checkpoints.memory_vector import load, store
from deltaworks.checkpoints.vector import LANES, MAGNITUDE, NOT_FINITE, bits, lanes_set, power_of_two, select, splat

TILE = 2048
"""Elements a kernel works on at once: a few float32 tiles fit in the first-level cache."""

_BF16, _F16, _F32, _F64, _E4M3, _E5M2 = (d.code for d in (BF16, F16, F32, F64, F8_E4M3, F8_E5M2))

_NUMPY = {
    BF16: np.dtype(ml_dtypes.bfloat16),
    F16: np.dtype(np.float16),
    F32: np.dtype(np.float32),
    F64: np.dtype(np.float64),
    F8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    F8_E5M2: np.dtype(ml_dtypes.float8_e5m2),
}


def decode_reference(raw: NDArray[np.uint8], dtype: DType) -> NDArray[np.float32]:
    """The elements in `raw` (uint8 bytes) as float32."""
    values: NDArray[np.float32] = raw.view(_NUMPY[dtype]).astype(np.float32)
    return values


def encode_reference(values: NDArray[np.float32], dtype: DType) -> NDArray[np.uint8]:
    """The bytes of `values` rounded to `dtype`."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(values.astype(_NUMPY[dtype])).view(np.uint8)


@inner
def decode(raw: NDArray[np.uint8], code: int, start: int, count: int, out: NDArray[np.float32]) -> None:
    """Write elements `start` to `start + count` of `raw` (uint8, a multiple of 8 bytes) to `out` as float32."""
    # Slices first: inside a loop, an index with an offset would be checked for being negative, which stops SIMD.
    bits = out.view(np.uint32)[:count]
    values = out[:count]
    if code == _BF16:
        bf16 = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            bits[i] = np.uint32(bf16[i]) << np.uint32(16)
    elif code == _F32:
        f32 = raw.view(np.uint32)[start : start + count]
        for i in range(count):
            bits[i] = f32[i]
    elif code == _F64:
        f64 = raw.view(np.float64)[start : start + count]
        for i in range(count):
            values[i] = np.float32(f64[i])
    elif code == _E4M3:
        bytes_ = raw[start : start + count]
        for i in range(count):
            byte = np.uint32(bytes_[i])
            sign = (byte & np.uint32(0x80)) << np.uint32(24)
            bits[i] = (byte & np.uint32(0x7F)) << np.uint32(20)
            values[i] = values[i] * np.float32(2.0**120)
            if (byte & np.uint32(0x7F)) == np.uint32(0x7F):
                bits[i] = np.uint32(0x7FC00000)
            bits[i] |= sign
    elif code == _F16:
        f16 = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            _widen_half(np.uint32(f16[i]), i, bits, values)
    else:  # F8_E5M2 is the upper byte of F16
        bytes_ = raw[start : start + count]
        for i in range(count):
            _widen_half(np.uint32(bytes_[i]) << np.uint32(8), i, bits, values)


@inner
def _widen_half(half: np.uint32, i: int, bits: NDArray[np.uint32], values: NDArray[np.float32]) -> None:
    """Write the F16 number with the bits `half` to place `i`, seen as bits and as values."""
    bits[i] = (half & np.uint32(0x7FFF)) << np.uint32(13)
    values[i] = values[i] * np.float32(2.0**112)
    if (half & np.uint32(0x7C00)) == np.uint32(0x7C00):
        bits[i] |= np.uint32(0x7F800000)
    bits[i] |= (half & np.uint32(0x8000)) << np.uint32(16)


@inner
def encode(values: NDArray[np.float32], count: int, code: int, raw: NDArray[np.uint8], start: int) -> int:
    """Write `count` float32 `values`, rounded, to `raw` (uint8, a multiple of 8 bytes) from element `start`.

    Returns:
        How many of the written elements are NaN or infinite.
    """
    patterns = values.view(np.uint32)[:count]
    wrong = np.uint32(0)
    one, zero = np.uint32(1), np.uint32(0)
    if code == _BF16:
        bf16 = raw.view(np.uint16)[start : start + count]
        whole = count - count % LANES
        wrong += _encode_bf16(values, whole, bf16)
        for i in range(whole, count):
            b = patterns[i]
            r = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & one)) >> np.uint32(16)
            nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            r = ((b >> np.uint32(16)) | np.uint32(0x0040)) if nan else r
            wrong += one if (r & np.uint32(0x7F80)) == np.uint32(0x7F80) else zero
            bf16[i] = np.uint16(r)
    elif code == _F32:
        f32 = raw.view(np.uint32)[start : start + count]
        for i in range(count):
            b = patterns[i]
            wrong += one if (b & np.uint32(0x7F800000)) == np.uint32(0x7F800000) else zero
            f32[i] = b
    elif code == _F64:
        f64 = raw.view(np.float64)[start : start + count]
        for i in range(count):
            wrong += one if (patterns[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000) else zero
            f64[i] = np.float64(values[i])
    elif code == _E4M3:
        bytes_ = raw[start : start + count]
        for i in range(count):
            small = _round_small(patterns[i], 4, 3, np.uint32(0x7E), np.uint32(0x7F), np.uint32(0x7F))
            wrong += one if small == np.uint32(0x7F) else zero
            bytes_[i] = np.uint8(small | ((patterns[i] >> np.uint32(24)) & np.uint32(0x80)))
    elif code == _E5M2:
        bytes_ = raw[start : start + count]
        for i in range(count):
            small = _round_small(patterns[i], 5, 2, np.uint32(0x7B), np.uint32(0x7C), np.uint32(0x7E))
            wrong += one if small >= np.uint32(0x7C) else zero
            bytes_[i] = np.uint8(small | ((patterns[i] >> np.uint32(24)) & np.uint32(0x80)))
    else:
        f16 = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            small = _round_small(patterns[i], 5, 10, np.uint32(0x7BFF), np.uint32(0x7C00), np.uint32(0x7E00))
            wrong += one if small >= np.uint32(0x7C00) else zero
            f16[i] = np.uint16(small | ((patterns[i] >> np.uint32(16)) & np.uint32(0x8000)))
    return int(wrong)


@inner
def _encode_bf16(values: NDArray[np.float32], whole: int, out: NDArray[np.uint16]) -> np.uint32:
    """The first `whole` (a multiple of LANES) of `values` as BF16; returns how many of them are not finite."""
    wrong, table = 0, values.reshape(1, values.size)
    below_half, one, sixteen = splat(np.uint32(0x7FFF)), splat(np.uint32(1)), splat(np.uint32(16))
    exponent, quiet = splat(np.uint32(0x7F80)), splat(np.uint32(0x40))
    magnitude, not_finite = splat(MAGNITUDE), splat(NOT_FINITE)
    for i in range(0, whole, LANES):
        b = bits(load(table, 0, i))
        upper = b >> sixteen
        rounded = (b + below_half + (upper & one)) >> sixteen
        rounded = select((b & magnitude) > not_finite, upper | quiet, rounded)
        wrong += lanes_set((rounded & exponent) == exponent)
        store(out, i, rounded)
    return np.uint32(wrong)


@inner
def _round_small(
    bits: np.uint32, exponent_bits: int, mantissa_bits: int, largest: np.uint32, overflow: np.uint32, nan: np.uint32
) -> np.uint32:
    """Magnitude code of a float32 (given by its bits) in a narrower IEEE-like format, rounded to nearest even."""
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude > np.uint32(0x7F800000):
        return nan
    bias = (1 << (exponent_bits - 1)) - 1
    shift = np.uint32(23 - mantissa_bits)
    smallest_normal = np.uint32((127 - bias + 1) << 23)
    if magnitude >= smallest_normal:
        r = magnitude - np.uint32((127 - bias) << 23)
        r = (r + (np.uint32(1) << (shift - np.uint32(1))) - np.uint32(1) + ((r >> shift) & np.uint32(1))) >> shift
        return overflow if r > largest else r
    # Below the smallest normal the spacing is constant, a power of two.
    exponent = np.int64(magnitude >> np.uint32(23))
    mantissa = (magnitude & np.uint32(0x7FFFFF)) | np.uint32(exponent > 0) << np.uint32(23)
    steps = np.float64(mantissa) * power_of_two(max(exponent, np.int64(1)) - 150 - (1 - bias - mantissa_bits))
    return np.uint32(np.rint(steps))
