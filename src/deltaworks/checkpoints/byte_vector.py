"""Sixty-four bytes at a time, inside compiled kernels: what `deltaworks.checkpoints.vector` is for elements.

=========  ==============================
U8         sixty-four uint8; ``| +``
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
_PAIR, _EIGHTHS = (types.UniTuple(types.uint64, n) for n in (2, 8))  # type: ignore[no-untyped-call]


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


def _narrowed(builder: ir.IRBuilder, value: Any) -> Any:
    parts = [builder.trunc(builder.extract_value(value, i), _SIXTEEN) for i in range(4)]
    return _joined(builder, _joined(builder, *parts[:2]), _joined(builder, *parts[2:]))


def _bytes_where(builder: ir.IRBuilder, mask: Any, value: Any) -> Any:
    chosen = builder.bitcast(mask, ir.VectorType(ir.IntType(1), U8.ir.count))
    kept = value if value.type == U8.ir else spread(builder, value, U8.ir.count)
    return builder.select(chosen, kept, ir.Constant(U8.ir, None))


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


def _words_of(builder: ir.IRBuilder, value: Any) -> Any:
    words = builder.bitcast(value, U64.ir)
    places = [ir.Constant(ir.IntType(32), i) for i in range(U64.ir.count)]
    return cgutils.pack_array(builder, [builder.extract_element(words, i) for i in places])  # type: ignore[no-untyped-call]


def _from_words(builder: ir.IRBuilder, value: Any) -> Any:
    words = ir.Constant(U64.ir, ir.Undefined)
    for i in range(U64.ir.count):
        words = builder.insert_element(words, builder.extract_value(value, i), ir.Constant(ir.IntType(32), i))
    return builder.bitcast(words, U8.ir)


define(operator.or_, (U8, U8), U8, builder_method("or_"))
define(operator.add, (U8, U8), U8, builder_method("add"))
define(bytes_where, (types.uint64, types.uint8), U8, _bytes_where)
define(bytes_where, (types.uint64, U8), U8, _bytes_where)
define(bytes_above, (U8, types.uint8), types.uint64, _bytes_above)
define(lookup_bytes, (_PAIR, U8), U8, _lookup_bytes)
define(less_one, (U8,), U8, _less_one)
define(widened, (U8,), _QUARTERS, _as_quarters)
define(widened, (U16,), _QUARTERS, _as_quarters)
define(narrowed, (_QUARTERS,), U8, _narrowed)
define(shifted_sum, (U8, U8, U8), U16, _shifted_sum)
define(shifted_sum, (U16, U8, U8), U16, _shifted_sum)
define(words_of, (U8,), _EIGHTHS, _words_of)
define(from_words, (_EIGHTHS,), U8, _from_words)
