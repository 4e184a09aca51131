"""Sixteen elements at a time, inside compiled kernels.

A compiler vectorises a loop only where it can prove that it may, and the loops of merges, which choose, compare and
add in many rows at once, are past what it proves. So kernels say it: a vector is a value with operators, which `load`
and `store` of `memory_vector` move, and LLVM maps it to whatever the machine has (one AVX-512 register, two of AVX2,
four of NEON).

The functions here exist for compiled kernels alone: Numba puts LLVM's instructions in their place, and called from
Python they raise NotImplementedError. Every operation is IEEE arithmetic, lane by lane, so a kernel gives the same bits
on every machine. Types:

=========  ==========================================================================
F32        float32; ``+ - * /``, ``> < >= !=`` (false where one is NaN, but ``!=``)
F64        float64; ``+ - *``
U32        uint32; ``+ - * & | ^ << >>``, comparisons
U64        only eight uint64, thirty-two numbers of sixteen bits to `bits_below`; ``* >>`` with a scalar, ``^``
MASK       the results of comparisons; ``& | ^``
=========  ==========================================================================
"""

import operator
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import lower_builtin, models, register_model, type_callable
from numpy.typing import NDArray

LANES = 16


def machine_has(feature: str) -> bool:
    """Whether kernels are compiled for a machine with a feature, as LLVM names it, such as ``avx512f``."""
    chosen = os.environ.get("NUMBA_CPU_FEATURES")
    if chosen is not None:
        return f"+{feature}" in chosen.split(",")
    # For a machine that is named, as opposed to this one, Numba assumes what its name implies.
    return not os.environ.get("NUMBA_CPU_NAME") and bool(llvm.get_host_cpu_features().get(feature))


class Vector(types.Type):
    """Numba's type of so many values."""

    def __init__(self, name: str, element: ir.Type, lanes: int = LANES) -> None:
        self.ir: Final = ir.VectorType(element, lanes)
        super().__init__(name=f"{name}x{lanes}")


F32 = Vector("float32", ir.FloatType())
F64 = Vector("float64", ir.DoubleType())
U32 = Vector("uint32", ir.IntType(32))
U64 = Vector("uint64", ir.IntType(64), 8)
MASK = Vector("bool", ir.IntType(1))
_CHANCES = ir.VectorType(ir.IntType(16), 32)
_OF = {types.float32: F32, types.float64: F64, types.uint32: U32}


@register_model(Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.ir)  # type: ignore[no-untyped-call]


def define(function: Callable[..., Any], kinds: tuple[Any, ...], result: Any, generate: Callable[..., Any]) -> None:
    """Teach Numba what a function or an operator makes of arguments of these kinds: ``generate(builder, *values)``."""

    @type_callable(function)
    def resolve(_: Any) -> Any:
        # Numba looks at the number of parameters, so it cannot be any.
        return (
            lambda: result,
            lambda x: result if (x,) == kinds else None,
            lambda x, y: result if (x, y) == kinds else None,
            lambda x, y, z: result if (x, y, z) == kinds else None,
        )[len(kinds)]

    @lower_builtin(function, *kinds)  # type: ignore[no-untyped-call, untyped-decorator]
    def lower(_: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
        del signature
        return generate(builder, *values)


def builder_method(name: str, *leading: Any) -> Callable[..., Any]:
    """What calls a method of LLVM's builder."""
    return lambda builder, *values: getattr(builder, name)(*leading, *values)


def llvm_function(name: str, result: ir.Type) -> Callable[..., Any]:
    """What calls one of LLVM's own functions."""

    def generate(builder: ir.IRBuilder, *values: Any) -> Any:
        kind = ir.FunctionType(result, [v.type for v in values])
        function = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        return builder.call(function, values)

    return generate


def spread(builder: ir.IRBuilder, value: Any, lanes: int = LANES) -> Any:
    """A vector of so many times one value."""
    kind = ir.VectorType(value.type, lanes)
    index = ir.IntType(32)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(index, 0))
    places = ir.Constant(ir.VectorType(index, lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), places)


def _with_scalar(name: str) -> Callable[..., Any]:
    """What calls a method of LLVM's builder with a vector and a scalar."""
    return lambda builder, x, y: getattr(builder, name)(x, spread(builder, y, x.type.count))


def _ramp(builder: ir.IRBuilder, start: Any, step: Any) -> Any:
    lanes = U64.ir.count
    counts = ir.Constant(U64.ir, list(range(lanes)))
    return builder.add(spread(builder, start, lanes), builder.mul(spread(builder, step, lanes), counts))


def _bits_below(builder: ir.IRBuilder, x: Any, limit: Any) -> Any:
    highest = builder.trunc(builder.sub(limit, ir.Constant(limit.type, 1)), _CHANCES.element)
    below = builder.icmp_unsigned("<=", builder.bitcast(x, _CHANCES), spread(builder, highest, _CHANCES.count))
    none = ir.Constant(limit.type, 0)
    return builder.select(builder.icmp_unsigned("==", limit, none), none, builder.bitcast(below, limit.type))


for _kind in (F32, F64):
    for _function, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
        define(_function, (_kind, _kind), _kind, builder_method(_name))
define(operator.truediv, (F32, F32), F32, builder_method("fdiv"))
for _function, _name in (
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.mul, "mul"),
    (operator.lshift, "shl"),
    (operator.rshift, "lshr"),
):
    define(_function, (U32, U32), U32, builder_method(_name))
for _function, _name in ((operator.mul, "mul"), (operator.rshift, "lshr")):
    define(_function, (U64, types.uint64), U64, _with_scalar(_name))
for _kind in (U32, U64, MASK):
    for _function, _name in ((operator.and_, "and_"), (operator.or_, "or_"), (operator.xor, "xor")):
        define(_function, (_kind, _kind), _kind, builder_method(_name))
for _function, _name in ((operator.gt, ">"), (operator.lt, "<"), (operator.ge, ">="), (operator.le, "<=")):
    define(_function, (F32, F32), MASK, builder_method("fcmp_ordered", _name))
    define(_function, (U32, U32), MASK, builder_method("icmp_unsigned", _name))
define(operator.ne, (F32, F32), MASK, builder_method("fcmp_unordered", "!="))
define(operator.eq, (U32, U32), MASK, builder_method("icmp_unsigned", "=="))
define(operator.ne, (U32, U32), MASK, builder_method("icmp_unsigned", "!="))


def splat(x: Any) -> Any:
    """A vector of sixteen `x` (float32, float64 or uint32)."""
    raise NotImplementedError


def select(mask: Any, x: Any, y: Any) -> Any:
    """`x` where `mask` is set, else `y`."""
    raise NotImplementedError


def bits(x: Any) -> Any:
    """The bit patterns of F32 as U32."""
    raise NotImplementedError


def floats(x: Any) -> Any:
    """The F32 of which U32 are the bit patterns."""
    raise NotImplementedError


def widen(x: Any) -> Any:
    """F32 as F64, exactly."""
    raise NotImplementedError


def narrow(x: Any) -> Any:
    """F64 rounded to F32."""
    raise NotImplementedError


def fma(x: Any, y: Any, z: Any) -> Any:
    """``x * y + z`` in F32, rounded once (IEEE 754 fusedMultiplyAdd)."""
    raise NotImplementedError


def maximum(x: Any, y: Any) -> Any:
    """The larger of U32, lane by lane."""
    raise NotImplementedError


def minimum(x: Any, y: Any) -> Any:
    """The smaller of U32, lane by lane."""
    raise NotImplementedError


def largest(x: Any) -> Any:
    """The largest lane of U32, as uint32."""
    raise NotImplementedError


def leading_zeros(x: Any) -> Any:
    """How many of the upper bits of each U32 are zero; 32 for zero."""
    raise NotImplementedError


def packed(mask: Any) -> Any:
    """The lanes of a mask as the lower sixteen bits of a uint32, the first lane in the lowest."""
    raise NotImplementedError


def unpacked(x: Any) -> Any:
    """The inverse of `packed`; upper bits do not matter."""
    raise NotImplementedError


def lanes() -> Any:
    """U32 that counts from 0 to 15."""
    raise NotImplementedError


def lower_bytes(x: Any) -> Any:
    """The lowest bytes of the first eight U32 as one uint64, the first in the lowest byte."""
    raise NotImplementedError


def upper_bytes(x: Any) -> Any:
    """The lowest bytes of the last eight U32 as one uint64."""
    raise NotImplementedError


def from_bytes(lower: Any, upper: Any) -> Any:
    """The U32 whose lowest bytes are those of two uint64."""
    raise NotImplementedError


def lookup(table: Any, index: Any) -> Any:
    """The lanes of F32 `table` that the lower four bits of each U32 `index` name."""
    raise NotImplementedError


def lanes_set(mask: Any) -> Any:
    """How many lanes are set, as int64."""
    raise NotImplementedError


def sum_in_order(x: Any) -> Any:
    """The sum of the lanes of F64, as float64: from the first to the last, starting at zero."""
    raise NotImplementedError


def ramp(x: Any, step: Any) -> Any:
    """U64 that counts up from `x` by `step` (both uint64)."""
    raise NotImplementedError


def bits_below(x: Any, limit: Any) -> Any:
    """Which of the thirty-two uint16 that U64 consists of, the lower first, are less than a uint32 up to 65536.

    A bit each, as uint32.
    """
    raise NotImplementedError


def trailing_zeros(x: Any) -> Any:
    """The place of the lowest bit that is set of an int64 other than zero."""
    raise NotImplementedError


def power_of_two(exponent: Any) -> Any:
    """Two to the power of an int64 from -1022 to 1023, as float64."""
    raise NotImplementedError


def _power_of_two(builder: ir.IRBuilder, exponent: Any) -> Any:
    word = ir.IntType(64)
    pattern = builder.shl(builder.add(exponent, ir.Constant(word, 1023)), ir.Constant(word, 52))
    return builder.bitcast(pattern, ir.DoubleType())


def _sum_in_order(builder: ir.IRBuilder, value: Any) -> Any:
    total = ir.Constant(ir.DoubleType(), 0.0)
    for lane in range(LANES):
        total = builder.fadd(total, builder.extract_element(value, ir.Constant(ir.IntType(32), lane)))
    return total


_BYTES = ir.VectorType(ir.IntType(8), LANES)
_WORDS = ir.VectorType(ir.IntType(64), 2)


def _bytes(builder: ir.IRBuilder, value: Any, half: int) -> Any:
    words = builder.bitcast(builder.trunc(value, _BYTES), _WORDS)
    return builder.extract_element(words, ir.Constant(ir.IntType(32), half))


def _from_bytes(builder: ir.IRBuilder, lower: Any, upper: Any) -> Any:
    words = ir.Constant(_WORDS, ir.Undefined)
    for half, value in enumerate((lower, upper)):
        words = builder.insert_element(words, value, ir.Constant(ir.IntType(32), half))
    return builder.zext(builder.bitcast(words, _BYTES), U32.ir)


def _lookup_by_halves(builder: ir.IRBuilder, table: Any, index: Any) -> Any:
    def half(value: Any, first: int) -> Any:
        places = ir.Constant(ir.VectorType(ir.IntType(32), LANES // 2), list(range(first, first + LANES // 2)))
        return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), places)

    lower, upper = half(table, 0), half(table, LANES // 2)
    find, found = llvm_function("llvm.x86.avx2.permps", lower.type), []
    for first in (0, LANES // 2):
        own = half(index, first)
        bit = ir.Constant(own.type, [LANES // 2] * (LANES // 2))
        is_upper = builder.icmp_unsigned("==", builder.and_(own, bit), bit)
        found.append(builder.select(is_upper, find(builder, upper, own), find(builder, lower, own)))
    every = ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(range(LANES)))
    return builder.shuffle_vector(*found, every)


def _lookup(builder: ir.IRBuilder, table: Any, index: Any) -> Any:
    if machine_has("avx512f"):
        return llvm_function("llvm.x86.avx512.permvar.sf.512", F32.ir)(builder, table, index)
    if machine_has("avx2"):
        return _lookup_by_halves(builder, table, index)
    kept = cgutils.alloca_once_value(builder, table)  # type: ignore[no-untyped-call]
    elements = builder.bitcast(kept, ir.FloatType().as_pointer())
    found = ir.Constant(F32.ir, ir.Undefined)
    places = builder.and_(index, ir.Constant(U32.ir, [LANES - 1] * LANES))
    for lane in range(LANES):
        at = ir.Constant(ir.IntType(32), lane)
        value = builder.load(builder.gep(elements, [builder.extract_element(places, at)]))
        found = builder.insert_element(found, value, at)
    return found


for _scalar, _kind in _OF.items():
    define(splat, (_scalar,), _kind, spread)
    define(select, (MASK, _kind, _kind), _kind, builder_method("select"))
define(bits, (F32,), U32, lambda b, x: b.bitcast(x, U32.ir))
define(lookup, (F32, U32), F32, _lookup)
define(lanes, (), U32, lambda _: ir.Constant(U32.ir, list(range(LANES))))
define(lower_bytes, (U32,), types.uint64, lambda b, x: _bytes(b, x, 0))
define(upper_bytes, (U32,), types.uint64, lambda b, x: _bytes(b, x, 1))
define(from_bytes, (types.uint64, types.uint64), U32, _from_bytes)
define(floats, (U32,), F32, lambda b, x: b.bitcast(x, F32.ir))
define(
    leading_zeros,
    (U32,),
    U32,
    lambda b, x: llvm_function(f"llvm.ctlz.v{LANES}i32", U32.ir)(b, x, ir.Constant(ir.IntType(1), 0)),
)
define(packed, (MASK,), types.uint32, lambda b, x: b.zext(b.bitcast(x, ir.IntType(LANES)), ir.IntType(32)))
define(unpacked, (types.uint32,), MASK, lambda b, x: b.bitcast(b.trunc(x, ir.IntType(LANES)), MASK.ir))
define(trailing_zeros, (types.int64,), types.int64, lambda b, x: b.cttz(x, ir.Constant(ir.IntType(1), 1)))
define(power_of_two, (types.int64,), types.float64, _power_of_two)
define(widen, (F32,), F64, lambda b, x: b.fpext(x, F64.ir))
define(narrow, (F64,), F32, lambda b, x: b.fptrunc(x, F32.ir))
define(fma, (F32, F32, F32), F32, llvm_function(f"llvm.fma.v{LANES}f32", F32.ir))
define(maximum, (U32, U32), U32, lambda b, x, y: b.select(b.icmp_unsigned(">", x, y), x, y))
define(minimum, (U32, U32), U32, lambda b, x, y: b.select(b.icmp_unsigned("<", x, y), x, y))
define(largest, (U32,), types.uint32, llvm_function(f"llvm.vector.reduce.umax.v{LANES}i32", ir.IntType(32)))
define(
    lanes_set,
    (MASK,),
    types.int64,
    lambda b, x: b.zext(b.ctpop(b.bitcast(x, ir.IntType(LANES))), ir.IntType(64)),
)
define(sum_in_order, (F64,), types.float64, _sum_in_order)
define(ramp, (types.uint64, types.uint64), U64, _ramp)
define(bits_below, (U64, types.uint32), types.uint32, _bits_below)


ZERO, ONE = np.float32(0.0), np.float32(1.0)
MAGNITUDE = np.uint32(0x7FFFFFFF)
"""Mask of the bits of a float32 without its sign."""
NOT_FINITE = np.uint32(0x7F800000)
"""The smallest magnitude, as bits, that is infinite or NaN."""


def fma_reference(first: np.float32, second: NDArray[np.float32], addend: NDArray[np.float32]) -> NDArray[np.float32]:
    """`fma` with NumPy: the product is exact in float64, and the sum is rounded to odd so that rounding twice is safe.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Transactions on Computers 2008.
    """
    product = np.float64(first) * second.astype(np.float64)
    other = addend.astype(np.float64)
    total = product + other
    part = total - product
    error = (product - (total - part)) + (other - part)
    inexact = (error != 0) & (total.view(np.int64) & 1 == 0)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)
