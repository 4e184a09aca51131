"""Sixteen elements at a time, inside compiled kernels.

A compiler vectorises a loop only where it can prove that it may, and the loops of merges, which choose, compare and
add in many rows at once, are past what it proves. So kernels say it: a vector is a value with operators, `load` and
`store` move it, and LLVM maps it to whatever the machine has (one AVX-512 register, two of AVX2, four of NEON).

The functions here exist for compiled kernels alone: Numba puts LLVM's instructions in their place, and called from
Python they raise NotImplementedError. Every operation is IEEE arithmetic, lane by lane, so a kernel gives the same bits
on every machine. Types:

=========  ==========================================================================
F32        float32; ``+ - * /``, ``> < >= !=`` (false where one is NaN, but ``!=``)
F64        float64; ``+ - *``
U32        uint32; ``+ - * & | ^ << >>``, comparisons
U64        only eight uint64, thirty-two numbers of sixteen bits to `bits_below`; ``* >>`` with a scalar, ``^``
U8         sixty-four uint8; ``| +``
U16        sixty-four uint16
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
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable
from numpy.typing import NDArray

LANES = 16


def machine_has(feature: str) -> bool:
    """Whether kernels are compiled for a machine with a feature, as LLVM names it, such as ``avx512f``."""
    chosen = os.environ.get("NUMBA_CPU_FEATURES")
    if chosen is not None:
        return f"+{feature}" in chosen.split(",")
    # For a machine that is named, as opposed to this one, Numba assumes what its name implies.
    return not os.environ.get("NUMBA_CPU_NAME") and bool(llvm.get_host_cpu_features().get(feature))


class _Vector(types.Type):
    """Numba's type of so many values."""

    def __init__(self, name: str, element: ir.Type, lanes: int = LANES) -> None:
        self.ir: Final = ir.VectorType(element, lanes)
        super().__init__(name=f"{name}x{lanes}")


F32 = _Vector("float32", ir.FloatType())
F64 = _Vector("float64", ir.DoubleType())
U32 = _Vector("uint32", ir.IntType(32))
U64 = _Vector("uint64", ir.IntType(64), 8)
U8 = _Vector("uint8", ir.IntType(8), 4 * LANES)
U16 = _Vector("uint16", ir.IntType(16), 4 * LANES)
MASK = _Vector("bool", ir.IntType(1))
_HALVES = ir.VectorType(ir.IntType(16), LANES)
_CHANCES = ir.VectorType(ir.IntType(16), 32)
_QUARTERS = types.UniTuple(U32, 4)  # type: ignore[no-untyped-call]
_PAIR, _EIGHTHS = (types.UniTuple(types.uint64, n) for n in (2, 8))  # type: ignore[no-untyped-call]
_OF = {types.float32: F32, types.float64: F64, types.uint32: U32}


@register_model(_Vector)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Vector) -> None:
        super().__init__(manager, kind, kind.ir)  # type: ignore[no-untyped-call]


def _define(function: Callable[..., Any], kinds: tuple[Any, ...], result: Any, generate: Callable[..., Any]) -> None:
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


def _builder(name: str, *leading: Any) -> Callable[..., Any]:
    """What calls a method of LLVM's builder."""
    return lambda builder, *values: getattr(builder, name)(*leading, *values)


def _call(name: str, result: ir.Type) -> Callable[..., Any]:
    """What calls one of LLVM's own functions."""

    def generate(builder: ir.IRBuilder, *values: Any) -> Any:
        kind = ir.FunctionType(result, [v.type for v in values])
        function = cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]
        return builder.call(function, values)

    return generate


def _splat(builder: ir.IRBuilder, value: Any, lanes: int = LANES) -> Any:
    kind = ir.VectorType(value.type, lanes)
    index = ir.IntType(32)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(index, 0))
    places = ir.Constant(ir.VectorType(index, lanes), [0] * lanes)
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), places)


def _with_scalar(name: str) -> Callable[..., Any]:
    """What calls a method of LLVM's builder with a vector and a scalar."""
    return lambda builder, x, y: getattr(builder, name)(x, _splat(builder, y, x.type.count))


def _ramp(builder: ir.IRBuilder, start: Any, step: Any) -> Any:
    lanes = U64.ir.count
    counts = ir.Constant(U64.ir, list(range(lanes)))
    return builder.add(_splat(builder, start, lanes), builder.mul(_splat(builder, step, lanes), counts))


def _bits_below(builder: ir.IRBuilder, x: Any, limit: Any) -> Any:
    highest = builder.trunc(builder.sub(limit, ir.Constant(limit.type, 1)), _CHANCES.element)
    below = builder.icmp_unsigned("<=", builder.bitcast(x, _CHANCES), _splat(builder, highest, _CHANCES.count))
    none = ir.Constant(limit.type, 0)
    return builder.select(builder.icmp_unsigned("==", limit, none), none, builder.bitcast(below, limit.type))


for _kind in (F32, F64):
    for _function, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
        _define(_function, (_kind, _kind), _kind, _builder(_name))
_define(operator.truediv, (F32, F32), F32, _builder("fdiv"))
for _function, _name in (
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.mul, "mul"),
    (operator.lshift, "shl"),
    (operator.rshift, "lshr"),
):
    _define(_function, (U32, U32), U32, _builder(_name))
for _function, _name in ((operator.mul, "mul"), (operator.rshift, "lshr")):
    _define(_function, (U64, types.uint64), U64, _with_scalar(_name))
_define(operator.or_, (U8, U8), U8, _builder("or_"))
_define(operator.add, (U8, U8), U8, _builder("add"))
for _kind in (U32, U64, MASK):
    for _function, _name in ((operator.and_, "and_"), (operator.or_, "or_"), (operator.xor, "xor")):
        _define(_function, (_kind, _kind), _kind, _builder(_name))
for _function, _name in ((operator.gt, ">"), (operator.lt, "<"), (operator.ge, ">="), (operator.le, "<=")):
    _define(_function, (F32, F32), MASK, _builder("fcmp_ordered", _name))
    _define(_function, (U32, U32), MASK, _builder("icmp_unsigned", _name))
_define(operator.ne, (F32, F32), MASK, _builder("fcmp_unordered", "!="))
_define(operator.eq, (U32, U32), MASK, _builder("icmp_unsigned", "=="))
_define(operator.ne, (U32, U32), MASK, _builder("icmp_unsigned", "!="))


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


def bytes_where(mask: Any, x: Any) -> Any:
    """U8 that is `x` (U8 or uint8) where `mask` (uint64, the first lane in the lowest bit) is set, else zero."""
    raise NotImplementedError


def bytes_above(x: Any, limit: Any) -> Any:
    """Which lanes of U8 are more than a uint8, as uint64."""
    raise NotImplementedError


def less_one(x: Any) -> Any:
    """U8 less one, zero where it is zero."""
    raise NotImplementedError


def lookup_bytes(table: Any, index: Any) -> Any:
    """The bytes of `table` (sixteen uint8 as two uint64) that the lanes of U8 `index`, all below sixteen, name."""
    raise NotImplementedError


def widened(x: Any) -> Any:
    """The lanes of U8 or U16, in order, as four U32."""
    raise NotImplementedError


def narrowed(x: Any) -> Any:
    """U8 of the lowest bytes of four U32: the inverse of `widened`."""
    raise NotImplementedError


def shifted_sum(x: Any, shift: Any, y: Any) -> Any:
    """``(x << shift) + y`` as U16, of U8 or U16 and two U8; shifts are below sixteen."""
    raise NotImplementedError


def words_of(x: Any) -> Any:
    """U8 as eight uint64, the first lane in the lowest byte of the first."""
    raise NotImplementedError


def from_words(x: Any) -> Any:
    """The inverse of `words_of`."""
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


def _lookup(builder: ir.IRBuilder, table: Any, index: Any) -> Any:
    if machine_has("avx512f"):
        return _call("llvm.x86.avx512.permvar.sf.512", F32.ir)(builder, table, index)
    kept = cgutils.alloca_once_value(builder, table)  # type: ignore[no-untyped-call]
    elements = builder.bitcast(kept, ir.FloatType().as_pointer())
    found = ir.Constant(F32.ir, ir.Undefined)
    places = builder.and_(index, ir.Constant(U32.ir, [LANES - 1] * LANES))
    for lane in range(LANES):
        at = ir.Constant(ir.IntType(32), lane)
        value = builder.load(builder.gep(elements, [builder.extract_element(places, at)]))
        found = builder.insert_element(found, value, at)
    return found


def _less_one(builder: ir.IRBuilder, value: Any) -> Any:
    one = ir.Constant(U8.ir, [1] * U8.ir.count)
    return _call(f"llvm.usub.sat.v{U8.ir.count}i8", U8.ir)(builder, value, one)


def _slice(builder: ir.IRBuilder, value: Any, first: int, lanes: int) -> Any:
    places = ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(first, first + lanes)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), places)


def _joined(builder: ir.IRBuilder, first: Any, second: Any) -> Any:
    lanes = 2 * first.type.count
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(lanes))))


def _as_quarters(builder: ir.IRBuilder, value: Any) -> Any:
    quarters = [builder.zext(_slice(builder, value, i, LANES), U32.ir) for i in range(0, U8.ir.count, LANES)]
    return cgutils.pack_array(builder, quarters)  # type: ignore[no-untyped-call]


def _narrowed(builder: ir.IRBuilder, value: Any) -> Any:
    parts = [builder.trunc(builder.extract_value(value, i), _BYTES) for i in range(4)]
    return _joined(builder, _joined(builder, *parts[:2]), _joined(builder, *parts[2:]))


def _bytes_where(builder: ir.IRBuilder, mask: Any, value: Any) -> Any:
    chosen = builder.bitcast(mask, ir.VectorType(ir.IntType(1), U8.ir.count))
    kept = value if value.type == U8.ir else _splat(builder, value, U8.ir.count)
    return builder.select(chosen, kept, ir.Constant(U8.ir, None))


def _bytes_above(builder: ir.IRBuilder, value: Any, limit: Any) -> Any:
    above = builder.icmp_unsigned(">", value, _splat(builder, limit, U8.ir.count))
    return builder.bitcast(above, ir.IntType(64))


def _lookup_bytes(builder: ir.IRBuilder, table: Any, index: Any) -> Any:
    row = ir.Constant(_WORDS, ir.Undefined)
    for half in (0, 1):
        row = builder.insert_element(row, builder.extract_value(table, half), ir.Constant(ir.IntType(32), half))
    row = builder.bitcast(row, _BYTES)
    if machine_has("avx512bw"):
        rows = _joined(builder, _joined(builder, row, row), _joined(builder, row, row))
        return _call("llvm.x86.avx512.pshuf.b.512", U8.ir)(builder, rows, index)
    if machine_has("ssse3"):
        find = _call("llvm.x86.ssse3.pshuf.b.128", _BYTES)
        parts = [find(builder, row, _slice(builder, index, i, LANES)) for i in range(0, U8.ir.count, LANES)]
        return _joined(builder, _joined(builder, *parts[:2]), _joined(builder, *parts[2:]))
    found = ir.Constant(U8.ir, ir.Undefined)
    for lane in range(U8.ir.count):
        at = ir.Constant(ir.IntType(32), lane)
        found = builder.insert_element(found, builder.extract_element(row, builder.extract_element(index, at)), at)
    return found


def _shifted_sum(builder: ir.IRBuilder, value: Any, shift: Any, addend: Any) -> Any:
    wide = value if value.type == U16.ir else builder.zext(value, U16.ir)
    return builder.add(builder.shl(wide, builder.zext(shift, U16.ir)), builder.zext(addend, U16.ir))


def _words_of(builder: ir.IRBuilder, value: Any) -> Any:
    words = builder.bitcast(value, U64.ir)
    places = [ir.Constant(ir.IntType(32), i) for i in range(U64.ir.count)]
    return cgutils.pack_array(builder, [builder.extract_element(words, i) for i in places])  # type: ignore[no-untyped-call]


def _from_words(builder: ir.IRBuilder, value: Any) -> Any:
    words = ir.Constant(U64.ir, ir.Undefined)
    for i in range(U64.ir.count):
        words = builder.insert_element(words, builder.extract_value(value, i), ir.Constant(ir.IntType(32), i))
    return builder.bitcast(words, U8.ir)


for _scalar, _kind in _OF.items():
    _define(splat, (_scalar,), _kind, _splat)
    _define(select, (MASK, _kind, _kind), _kind, _builder("select"))
_define(bits, (F32,), U32, lambda b, x: b.bitcast(x, U32.ir))
_define(lookup, (F32, U32), F32, _lookup)
_define(lanes, (), U32, lambda _: ir.Constant(U32.ir, list(range(LANES))))
_define(lower_bytes, (U32,), types.uint64, lambda b, x: _bytes(b, x, 0))
_define(upper_bytes, (U32,), types.uint64, lambda b, x: _bytes(b, x, 1))
_define(from_bytes, (types.uint64, types.uint64), U32, _from_bytes)
_define(bytes_where, (types.uint64, types.uint8), U8, _bytes_where)
_define(bytes_where, (types.uint64, U8), U8, _bytes_where)
_define(bytes_above, (U8, types.uint8), types.uint64, _bytes_above)
_define(lookup_bytes, (_PAIR, U8), U8, _lookup_bytes)
_define(less_one, (U8,), U8, _less_one)
_define(widened, (U8,), _QUARTERS, _as_quarters)
_define(widened, (U16,), _QUARTERS, _as_quarters)
_define(narrowed, (_QUARTERS,), U8, _narrowed)
_define(shifted_sum, (U8, U8, U8), U16, _shifted_sum)
_define(shifted_sum, (U16, U8, U8), U16, _shifted_sum)
_define(words_of, (U8,), _EIGHTHS, _words_of)
_define(from_words, (_EIGHTHS,), U8, _from_words)
_define(floats, (U32,), F32, lambda b, x: b.bitcast(x, F32.ir))
_define(
    leading_zeros,
    (U32,),
    U32,
    lambda b, x: _call(f"llvm.ctlz.v{LANES}i32", U32.ir)(b, x, ir.Constant(ir.IntType(1), 0)),
)
_define(packed, (MASK,), types.uint32, lambda b, x: b.zext(b.bitcast(x, ir.IntType(LANES)), ir.IntType(32)))
_define(unpacked, (types.uint32,), MASK, lambda b, x: b.bitcast(b.trunc(x, ir.IntType(LANES)), MASK.ir))
_define(power_of_two, (types.int64,), types.float64, _power_of_two)
_define(widen, (F32,), F64, lambda b, x: b.fpext(x, F64.ir))
_define(narrow, (F64,), F32, lambda b, x: b.fptrunc(x, F32.ir))
_define(fma, (F32, F32, F32), F32, _call(f"llvm.fma.v{LANES}f32", F32.ir))
_define(maximum, (U32, U32), U32, lambda b, x, y: b.select(b.icmp_unsigned(">", x, y), x, y))
_define(minimum, (U32, U32), U32, lambda b, x, y: b.select(b.icmp_unsigned("<", x, y), x, y))
_define(largest, (U32,), types.uint32, _call(f"llvm.vector.reduce.umax.v{LANES}i32", ir.IntType(32)))
_define(
    lanes_set,
    (MASK,),
    types.int64,
    lambda b, x: b.zext(b.ctpop(b.bitcast(x, ir.IntType(LANES))), ir.IntType(64)),
)
_define(sum_in_order, (F64,), types.float64, _sum_in_order)
_define(ramp, (types.uint64, types.uint64), U64, _ramp)
_define(bits_below, (U64, types.uint32), types.uint32, _bits_below)


def _address(context: Any, builder: ir.IRBuilder, array: Any, values: Sequence[Any], to: ir.Type) -> Any:
    """A pointer to elements of a contiguous array, of which `values` are its own, the row where it has any, a place."""
    struct = context.make_array(array)(context, builder, values[0])
    place = values[-1]
    if array.ndim == 2:
        width = cgutils.unpack_tuple(builder, struct.shape, 2)[1]  # type: ignore[no-untyped-call]
        place = builder.add(builder.mul(values[1], width), place)
    return builder.bitcast(builder.gep(struct.data, [place]), to.as_pointer())


@intrinsic
def _load(context: Any, array: Any, row: Any, place: Any) -> Any:
    del context, row, place

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
        if array.dtype == types.float32:
            return builder.load(_address(context, builder, signature.args[0], values, F32.ir), align=4)
        raw = builder.load(_address(context, builder, signature.args[0], values, _HALVES), align=2)
        upper = builder.shl(builder.zext(raw, U32.ir), ir.Constant(U32.ir, [16] * LANES))
        return builder.bitcast(upper, F32.ir)

    return F32(array, types.intp, types.intp), generate


@intrinsic
def _store(context: Any, array: Any, place: Any, value: Any) -> Any:
    del context, place

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
        data, to = values[2], F32.ir
        if value is U32:
            data, to = builder.trunc(data, _HALVES), _HALVES
        builder.store(data, _address(context, builder, signature.args[0], values[:2], to), align=2)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


load: Any = _load
"""``load(table, row, place)``: F32 from a contiguous table ([rows, elements]) of float32, or of BF16 as uint16."""
store: Any = _store
"""``store(array, place, x)``: F32 to a float32 array, or the lower halves of U32 to a uint16 array (one dimension)."""

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
