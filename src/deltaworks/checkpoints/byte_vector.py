"""Sixty-four bytes at a time, inside compiled kernels: what `deltaworks.checkpoints.vector` is for elements.

=========  ==============================
U8         sixty-four uint8; ``| & + -``
U16        sixty-four uint16
=========  ==============================

As there, LLVM's instructions take the place of these functions: called from Python they raise NotImplementedError.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from deltaworks.checkpoints.vector import (
    LANES,
    U32,
    U64,
    Vector,
    builder_method,
    define,
    llvm_function,
    machine_has,
    spread,
)

U8 = Vector("uint8", ir.IntType(8), 4 * LANES)
U16 = Vector("uint16", ir.IntType(16), 4 * LANES)
_SIXTEEN = ir.VectorType(ir.IntType(8), LANES)
_TWO_WORDS = ir.VectorType(ir.IntType(64), 2)
_QUARTERS = types.UniTuple(U32, 4)  # type: ignore[no-untyped-call]
_PAIR = types.UniTuple(types.uint64, 2)  # type: ignore[no-untyped-call]


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


def splat_bytes(x: Any) -> Any:
    """U8 of sixty-four times one uint8."""
    raise NotImplementedError


def sums_of_eight(x: Any) -> Any:
    """The sums, up to 255, of every eight lanes of U8, as U64."""
    raise NotImplementedError


def from_pairs(lower: Any, upper: Any) -> Any:
    """U8 of sixty-four numbers of two bits, of which two uint64 consist."""
    raise NotImplementedError


def widened(x: Any) -> Any:
    """The lanes of U8 or U16, in order, as four U32."""
    raise NotImplementedError


def shifted_sum(x: Any, shift: Any, y: Any) -> Any:
    """``(x << shift) + y`` as U16, of U8 or U16 and two U8; shifts are below sixteen."""
    raise NotImplementedError


def _sums_of_eight(builder: ir.IRBuilder, value: Any) -> Any:
    if machine_has("avx512bw"):
        sad = llvm_function("llvm.x86.avx512.psad.bw.512", U64.ir)
        return sad(builder, value, ir.Constant(U8.ir, None))
    ones = ir.Constant(U64.ir, [0x0101010101010101] * U64.ir.count)
    return builder.lshr(builder.mul(builder.bitcast(value, U64.ir), ones), ir.Constant(U64.ir, [56] * U64.ir.count))


def _from_pairs(builder: ir.IRBuilder, lower: Any, upper: Any) -> Any:
    words = ir.Constant(_TWO_WORDS, ir.Undefined)
    for half, value in enumerate((lower, upper)):
        words = builder.insert_element(words, value, ir.Constant(ir.IntType(32), half))
    own, lanes = builder.bitcast(words, _SIXTEEN), range(U8.ir.count)
    places = ir.Constant(ir.VectorType(ir.IntType(32), U8.ir.count), [i // 4 for i in lanes])
    spread_out = builder.shuffle_vector(own, ir.Constant(own.type, ir.Undefined), places)
    found, none = ir.Constant(U8.ir, None), ir.Constant(U8.ir, None)
    for bit in (0, 1):
        wanted = ir.Constant(U8.ir, [1 << (2 * (i % 4) + bit) for i in lanes])
        is_set = builder.icmp_unsigned("!=", builder.and_(spread_out, wanted), none)
        found = builder.or_(found, builder.select(is_set, ir.Constant(U8.ir, [1 << bit] * U8.ir.count), none))
    return found


def _less_one(builder: ir.IRBuilder, value: Any) -> Any:
    one = ir.Constant(U8.ir, [1] * U8.ir.count)
    return llvm_function(f"llvm.usub.sat.v{U8.ir.count}i8", U8.ir)(builder, value, one)


def _slice(builder: ir.IRBuilder, value: Any, first: int, lanes: int) -> Any:
    places = ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(first, first + lanes)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), places)


def _joined(builder: ir.IRBuilder, first: Any, second: Any) -> Any:
    lanes = 2 * first.type.count
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(range(lanes))))


def _as_quarters(builder: ir.IRBuilder, value: Any) -> Any:
    quarters = [builder.zext(_slice(builder, value, i, LANES), U32.ir) for i in range(0, U8.ir.count, LANES)]
    return cgutils.pack_array(builder, quarters)  # type: ignore[no-untyped-call]


def _lanes_of(builder: ir.IRBuilder, mask: Any) -> Any:
    """The bits of a uint64, a lane each."""
    lanes = range(U8.ir.count)
    if machine_has("avx512bw"):
        return builder.bitcast(mask, ir.VectorType(ir.IntType(1), len(lanes)))
    # Without masks in hardware, LLVM would go from bit to bit.
    own = builder.bitcast(mask, ir.VectorType(ir.IntType(8), len(lanes) // 8))
    places = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), [i // 8 for i in lanes])
    each = builder.shuffle_vector(own, ir.Constant(own.type, ir.Undefined), places)
    wanted = ir.Constant(U8.ir, [1 << (i % 8) for i in lanes])
    return builder.icmp_unsigned("==", builder.and_(each, wanted), wanted)


def _bytes_where(builder: ir.IRBuilder, mask: Any, value: Any) -> Any:
    kept = value if value.type == U8.ir else spread(builder, value, U8.ir.count)
    return builder.select(_lanes_of(builder, mask), kept, ir.Constant(U8.ir, None))


def _bytes_above(builder: ir.IRBuilder, value: Any, limit: Any) -> Any:
    above = builder.icmp_unsigned(">", value, spread(builder, limit, U8.ir.count))
    return builder.bitcast(above, ir.IntType(64))


def _lookup_bytes(builder: ir.IRBuilder, table: Any, index: Any) -> Any:
    row = ir.Constant(_TWO_WORDS, ir.Undefined)
    for half in (0, 1):
        row = builder.insert_element(row, builder.extract_value(table, half), ir.Constant(ir.IntType(32), half))
    row = builder.bitcast(row, _SIXTEEN)
    if machine_has("avx512bw"):
        rows = _joined(builder, _joined(builder, row, row), _joined(builder, row, row))
        return llvm_function("llvm.x86.avx512.pshuf.b.512", U8.ir)(builder, rows, index)
    if machine_has("ssse3"):
        find = llvm_function("llvm.x86.ssse3.pshuf.b.128", _SIXTEEN)
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


define(operator.or_, (U8, U8), U8, builder_method("or_"))
define(operator.add, (U8, U8), U8, builder_method("add"))
define(operator.sub, (U8, U8), U8, builder_method("sub"))
define(operator.and_, (U8, U8), U8, builder_method("and_"))
define(bytes_where, (types.uint64, types.uint8), U8, _bytes_where)
define(bytes_where, (types.uint64, U8), U8, _bytes_where)
define(bytes_above, (U8, types.uint8), types.uint64, _bytes_above)
define(lookup_bytes, (_PAIR, U8), U8, _lookup_bytes)
define(splat_bytes, (types.uint8,), U8, lambda b, x: spread(b, x, U8.ir.count))
define(sums_of_eight, (U8,), U64, _sums_of_eight)
define(from_pairs, (types.uint64, types.uint64), U8, _from_pairs)
define(less_one, (U8,), U8, _less_one)
define(widened, (U8,), _QUARTERS, _as_quarters)
define(widened, (U16,), _QUARTERS, _as_quarters)
define(shifted_sum, (U8, U8, U8), U16, _shifted_sum)
define(shifted_sum, (U16, U8, U8), U16, _shifted_sum)
