"""Elements to float32 and back, a tile at a time, inside compiled kernels.

`decode` and `encode` are the kernels; `decode_reference` and `encode_reference` say the same with NumPy and
ml_dtypes, and the tests hold the two equal on every bit pattern. Encoding rounds to nearest even, as PyTorch does:
beyond the largest finite value BF16, F16 and F8_E5M2 become infinity and F8_E4M3, which has none, becomes NaN.
"""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, DType
from deltaworks.checkpoints.jit import kernel

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


@kernel
def decode(raw: NDArray[np.uint8], code: int, start: int, count: int, out: NDArray[np.float32]) -> None:
    """Write elements `start` to `start + count` of `raw` (uint8, a multiple of 8 bytes) to `out` as float32."""
    bits = out.view(np.uint32)
    if code == _BF16:
        bf16 = raw.view(np.uint16)
        for i in range(count):
            bits[i] = np.uint32(bf16[start + i]) << np.uint32(16)
    elif code == _F32:
        f32 = raw.view(np.uint32)
        for i in range(count):
            bits[i] = f32[start + i]
    elif code == _F64:
        f64 = raw.view(np.float64)
        for i in range(count):
            out[i] = np.float32(f64[start + i])
    elif code == _E4M3:
        for i in range(count):
            byte = np.uint32(raw[start + i])
            sign = (byte & np.uint32(0x80)) << np.uint32(24)
            bits[i] = (byte & np.uint32(0x7F)) << np.uint32(20)
            out[i] = out[i] * np.float32(2.0**120)
            if (byte & np.uint32(0x7F)) == np.uint32(0x7F):
                bits[i] = np.uint32(0x7FC00000)
            bits[i] |= sign
    else:  # F16, and F8_E5M2, which is its upper byte
        halves = raw.view(np.uint16)
        for i in range(count):
            half = np.uint32(halves[start + i]) if code == _F16 else np.uint32(raw[start + i]) << np.uint32(8)
            sign = (half & np.uint32(0x8000)) << np.uint32(16)
            bits[i] = (half & np.uint32(0x7FFF)) << np.uint32(13)
            out[i] = out[i] * np.float32(2.0**112)
            if (half & np.uint32(0x7C00)) == np.uint32(0x7C00):
                bits[i] |= np.uint32(0x7F800000)
            bits[i] |= sign


@kernel
def encode(values: NDArray[np.float32], count: int, code: int, raw: NDArray[np.uint8], start: int) -> int:
    """Write `count` float32 `values`, rounded, to `raw` (uint8, a multiple of 8 bytes) from element `start`.

    Returns:
        How many of the written elements are NaN or infinite.
    """
    bits = values.view(np.uint32)
    wrong = 0
    if code == _BF16:
        bf16 = raw.view(np.uint16)
        for i in range(count):
            b = bits[i]
            r = (b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            nan = (b & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            r = ((b >> np.uint32(16)) | np.uint32(0x0040)) if nan else r
            wrong += 1 if (r & np.uint32(0x7F80)) == np.uint32(0x7F80) else 0
            bf16[start + i] = np.uint16(r)
    elif code == _F32:
        f32 = raw.view(np.uint32)
        for i in range(count):
            b = bits[i]
            wrong += 1 if (b & np.uint32(0x7F800000)) == np.uint32(0x7F800000) else 0
            f32[start + i] = b
    elif code == _F64:
        f64 = raw.view(np.float64)
        for i in range(count):
            wrong += 1 if (bits[i] & np.uint32(0x7F800000)) == np.uint32(0x7F800000) else 0
            f64[start + i] = np.float64(values[i])
    elif code == _E4M3:
        for i in range(count):
            small = _round_small(bits[i], 4, 3, np.uint32(0x7E), np.uint32(0x7F), np.uint32(0x7F))
            wrong += 1 if small == np.uint32(0x7F) else 0
            raw[start + i] = np.uint8(small | ((bits[i] >> np.uint32(24)) & np.uint32(0x80)))
    elif code == _E5M2:
        for i in range(count):
            small = _round_small(bits[i], 5, 2, np.uint32(0x7B), np.uint32(0x7C), np.uint32(0x7E))
            wrong += 1 if small >= np.uint32(0x7C) else 0
            raw[start + i] = np.uint8(small | ((bits[i] >> np.uint32(24)) & np.uint32(0x80)))
    else:
        f16 = raw.view(np.uint16)
        for i in range(count):
            small = _round_small(bits[i], 5, 10, np.uint32(0x7BFF), np.uint32(0x7C00), np.uint32(0x7E00))
            wrong += 1 if small >= np.uint32(0x7C00) else 0
            f16[start + i] = np.uint16(small | ((bits[i] >> np.uint32(16)) & np.uint32(0x8000)))
    return wrong


@kernel
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
    # Below the smallest normal the spacing is constant: a power of two below it, found without a branch on bits.
    spacing = np.float64(2.0) ** (1 - bias - mantissa_bits)
    scratch = np.empty(1, np.uint32)
    scratch[0] = magnitude
    steps = np.float64(scratch.view(np.float32)[0]) / spacing
    return np.uint32(np.rint(steps))
