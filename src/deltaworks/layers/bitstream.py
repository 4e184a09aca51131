"""Bits of elements that take part, packed one after the other, inside compiled kernels."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import inlined, kernel
from deltaworks.checkpoints.vector import machine_has

EVEN, ODD = np.uint64(0x5555555555555555), np.uint64(0xAAAAAAAAAAAAAAAA)
"""Every other bit, from the lowest on and from the next."""
SLACK = 16
"""Bytes that a buffer must have beyond its last bit."""


def _instruction(name: str) -> Any:
    kind = types.uint64

    @intrinsic
    def call(context: Any, source: Any, where: Any) -> Any:
        del context, source, where

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            del context, signature
            word = ir.IntType(64)
            function = cgutils.get_or_insert_function(  # type: ignore[no-untyped-call]
                builder.module, ir.FunctionType(word, [word, word]), f"llvm.x86.bmi.{name}.64"
            )
            return builder.call(function, values)

        return kind(kind, kind), generate

    return call


@kernel
def scatter_reference(source: np.uint64, where: np.uint64) -> np.uint64:
    """The lowest bits of `source`, one to each set bit of `where`, from the lowest up (Intel's PDEP)."""
    result, left = np.uint64(0), where
    while left:
        lowest = left & (~left + np.uint64(1))
        if source & np.uint64(1):
            result |= lowest
        source >>= np.uint64(1)
        left ^= lowest
    return result


@kernel
def gather_reference(source: np.uint64, where: np.uint64) -> np.uint64:
    """The bits of `source` at the set bits of `where`, packed from the lowest up (Intel's PEXT)."""
    result, place, left = np.uint64(0), np.uint64(0), where
    while left:
        lowest = left & (~left + np.uint64(1))
        if source & lowest:
            result |= np.uint64(1) << place
        place += np.uint64(1)
        left ^= lowest
    return result


_IS_FAST = machine_has("bmi2")
scatter: Any = _instruction("pdep") if _IS_FAST else scatter_reference
gather: Any = _instruction("pext") if _IS_FAST else gather_reference


def _loading(bits: int, kind: Any) -> Any:
    @intrinsic
    def load(context: Any, buffer: Any, place: Any) -> Any:
        del context, buffer, place

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            struct = context.make_array(signature.args[0])(context, builder, values[0])
            word = ir.IntType(bits)
            at = builder.bitcast(builder.gep(struct.data, [values[1]]), word.as_pointer())
            value = builder.load(at, align=1)
            return value if bits == kind.bitwidth else builder.sext(value, ir.IntType(kind.bitwidth))

        return kind(types.Array(types.uint8, 1, "C"), types.intp), generate

    return load


def _storing(bits: int, kind: Any) -> Any:
    @intrinsic
    def store(context: Any, buffer: Any, place: Any, value: Any) -> Any:
        del context, buffer, place, value

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            struct = context.make_array(signature.args[0])(context, builder, values[0])
            word = ir.IntType(bits)
            at = builder.bitcast(builder.gep(struct.data, [values[1]]), word.as_pointer())
            builder.store(builder.trunc(values[2], word) if values[2].type != word else values[2], at, align=1)
            return context.get_dummy_value()

        return types.void(types.Array(types.uint8, 1, "C"), types.intp, kind), generate

    return store


@intrinsic
def _count_ones(context: Any, x: Any) -> Any:
    del context

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        del context, signature
        ones = builder.ctpop(values[0])
        return ones if x is types.uint64 else builder.zext(ones, ir.IntType(64))

    return types.int64(x), generate


_word: Any = _loading(64, types.uint64)
int_at: Any = _loading(32, types.int64)
"""``int_at(buffer, place)``: the int32 in four bytes of uint8 from a place on, as int64. Bytes viewed as numbers take a
call."""
_set_word: Any = _storing(64, types.uint64)
put_half: Any = _storing(16, types.uint32)
"""``put_half(buffer, place, x)``: the lower sixteen bits of a uint32 to two bytes."""
count_ones: Any = _count_ones
"""How many bits of a uint32 or uint64 are set, as int64."""


@inlined
def whole_bits(buffer: NDArray[np.uint8], bit: int) -> np.uint64:
    """The 64 bits of `buffer` from place `bit`, the first of a byte, on."""
    return _word(buffer, bit >> 3)  # type: ignore[no-any-return]


@inlined
def some_bits(buffer: NDArray[np.uint8], bit: int | np.uint64) -> np.uint64:
    """At least 57 bits of `buffer` from place `bit` on, and zeros."""
    return _word(buffer, bit >> 3) >> np.uint64(bit & 7)  # type: ignore[no-any-return]


@inlined
def next_word(buffer: NDArray[np.uint8], bit: int | np.uint64) -> np.uint64:
    """The 64 bits of `buffer` from place `bit` on."""
    # In halves: shifts across two words take AMD's processors ten times as long.
    at, above = bit >> 3, np.uint64(bit & 7)
    lower = _word(buffer, at) >> above & np.uint64(0xFFFFFFFF)
    upper = _word(buffer, at + 4) >> above << np.uint64(32)
    return lower | upper  # type: ignore[no-any-return]


@inlined
def take_word(buffer: NDArray[np.uint8], bit: int | np.uint64, where: np.uint64) -> np.uint64:
    """The next bits from place `bit`, one to each set bit of `where`."""
    return scatter(next_word(buffer, bit), where)  # type: ignore[no-any-return]


@inlined
def put(buffer: NDArray[np.uint8], bit: int, source: np.uint64, where: np.uint64) -> None:
    """The inverse of `take` and `take_word`; the bits from place `bit` on are zero before."""
    at, above = bit >> 3, np.uint64(bit & 7)
    packed = gather(source, where)
    _set_word(buffer, at, _word(buffer, at) | packed << above)
    beyond = packed >> np.uint64(1) >> (np.uint64(63) - above)
    if beyond:
        _set_word(buffer, at + 8, _word(buffer, at + 8) | beyond)


@inlined
def lanes_below(count: int) -> np.uint64:
    """A set bit for each of the first `count` of sixty-four lanes."""
    return np.uint64(0xFFFFFFFFFFFFFFFF) if count >= 64 else np.uint64((1 << count) - 1)


@inlined
def interleaved(even: np.uint64, odd: np.uint64) -> np.uint64:
    """The lower thirty-two bits of two numbers, in turn."""
    return scatter(even, EVEN) | scatter(odd, ODD)  # type: ignore[no-any-return]
