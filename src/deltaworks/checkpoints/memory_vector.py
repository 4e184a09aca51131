"""Between vectors and memory, inside compiled kernels; see `deltaworks.checkpoints.vector`."""

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from deltaworks.checkpoints.byte_vector import U8
from deltaworks.checkpoints.vector import F32, LANES, MASK, U32, Vector, llvm_function, machine_has

_HALVES = ir.VectorType(ir.IntType(16), LANES)
_PLACE = ir.IntType(64)


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
def _load_each(context: Any, array: Any, index: Any) -> Any:
    del context, index

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
        word = ir.IntType(32)
        start = _address(context, builder, signature.args[0], (values[0], ir.Constant(_PLACE, 0)), ir.FloatType())
        if machine_has("avx512f"):
            every, scale = ir.Constant(MASK.ir, [1] * LANES), ir.Constant(word, 4)
            kept, first = ir.Constant(F32.ir, ir.Undefined), builder.bitcast(start, ir.IntType(8).as_pointer())
            gather = llvm_function("llvm.x86.avx512.mask.gather.dps.512", F32.ir)
            return gather(builder, kept, first, values[1], every, scale)
        found = ir.Constant(F32.ir, ir.Undefined)
        for lane in range(LANES):
            at = ir.Constant(word, lane)
            place = builder.zext(builder.extract_element(values[1], at), _PLACE)
            found = builder.insert_element(found, builder.load(builder.gep(start, [place])), at)
        return found

    return F32(array, U32), generate


@intrinsic
def _load_at(context: Any, array: Any, place: Any) -> Any:
    del context, place
    kind = F32 if array.dtype == types.float32 else U32

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
        stored = F32.ir if kind is F32 else ir.VectorType(ir.IntType(array.dtype.bitwidth), LANES)
        value = builder.load(_address(context, builder, signature.args[0], values, stored), align=1)
        return value if stored == kind.ir else builder.zext(value, kind.ir)

    return kind(array, types.intp), generate


def _loading(kind: Vector) -> Any:
    @intrinsic
    def load_any(context: Any, array: Any, place: Any) -> Any:
        del context, place

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
            return builder.load(_address(context, builder, signature.args[0], values, kind.ir), align=1)

        return kind(array, types.intp), generate

    return load_any


@intrinsic
def _store(context: Any, array: Any, place: Any, value: Any) -> Any:
    del context, place

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
        data, to = values[2], value.ir
        if value is U32 and array.dtype.bitwidth < U32.ir.element.width:
            to = ir.VectorType(ir.IntType(array.dtype.bitwidth), LANES)
            data = builder.trunc(data, to)
        builder.store(data, _address(context, builder, signature.args[0], values[:2], to), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@intrinsic
def _store_packed(context: Any, array: Any, place: Any, value: Any, mask: Any) -> Any:
    del context, place, mask

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
        own, place, value, mask = values
        if machine_has("avx512f"):
            # To memory, the instruction that packs takes ten times as long on some machines.
            none = ir.Constant(F32.ir, None)
            packed = llvm_function(f"llvm.x86.avx512.mask.compress.v{LANES}f32", F32.ir)(builder, value, none, mask)
            builder.store(packed, _address(context, builder, signature.args[0], (own, place), F32.ir), align=1)
        else:
            for lane in range(LANES):
                at = ir.Constant(ir.IntType(32), lane)
                to = _address(context, builder, signature.args[0], (own, place), ir.FloatType())
                builder.store(builder.extract_element(value, at), to, align=1)
                place = builder.add(place, builder.zext(builder.extract_element(mask, at), _PLACE))
        return context.get_dummy_value()

    return types.void(array, types.intp, value, MASK), generate


@intrinsic
def _load_packed(context: Any, array: Any, place: Any, mask: Any) -> Any:
    del context, place, mask

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
        own, place, mask = values
        if machine_has("avx512f"):
            stored = builder.load(_address(context, builder, signature.args[0], (own, place), F32.ir), align=1)
            none = ir.Constant(F32.ir, None)
            return llvm_function(f"llvm.x86.avx512.mask.expand.v{LANES}f32", F32.ir)(builder, stored, none, mask)
        found = ir.Constant(F32.ir, ir.Undefined)
        for lane in range(LANES):
            at = ir.Constant(ir.IntType(32), lane)
            of = _address(context, builder, signature.args[0], (own, place), ir.FloatType())
            found = builder.insert_element(found, builder.load(of, align=1), at)
            place = builder.add(place, builder.zext(builder.extract_element(mask, at), _PLACE))
        return found

    return F32(array, types.intp, MASK), generate


@intrinsic
def _prefetch(context: Any, array: Any, row: Any, place: Any) -> Any:
    del context, row, place

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
        byte, word = ir.IntType(8), ir.IntType(32)
        address = _address(context, builder, signature.args[0], values, byte)
        kind = ir.FunctionType(ir.VoidType(), [byte.as_pointer(), word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")  # type: ignore[no-untyped-call]
        reads, keep, data = (ir.Constant(word, n) for n in (0, 3, 1))
        builder.call(function, (address, reads, keep, data))
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp), generate


def room(kind: Any, count: int) -> Any:
    """What gives a kernel an array on its own stack, [count], to be of use until it returns; it begins at a line.

    Args:
        kind: Numba's type of the elements.
        count: how many.
    """
    array_type, nbytes = types.Array(kind, 1, "C"), kind.bitwidth // 8

    @intrinsic
    def make(context: Any) -> Any:
        del context

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
            from numba.np.arrayobj import populate_array  # noqa: PLC0415  # slow to import, needed to compile alone

            del signature, values
            byte, word = ir.IntType(8), ir.IntType(64)
            with builder.goto_entry_block():
                at = builder.alloca(ir.ArrayType(byte, count * nbytes))
            at.align = 64
            array = context.make_array(array_type)(context, builder)
            shape, strides = (
                cgutils.pack_array(builder, [ir.Constant(word, n)])  # type: ignore[no-untyped-call]
                for n in (count, nbytes)
            )
            data = builder.bitcast(at, array.data.type)
            populate_array(array, data, shape, strides, ir.Constant(word, nbytes), meminfo=None)  # type: ignore[no-untyped-call]
            return array._getvalue()  # noqa: SLF001

        return array_type(), generate

    return make


load: Any = _load
"""``load(table, row, place)``: F32 from a contiguous table ([rows, elements]) of float32, or of BF16 as uint16."""
prefetch: Any = _prefetch
"""``prefetch(table, row, place)``: begin to bring to the cache what will be loaded from there; it may lie outside."""
load_each: Any = _load_each
"""``load_each(array, index)``: F32 of the elements of float32, in one dimension, that each U32 names."""
load_at: Any = _load_at
"""``load_at(array, place)``, in one dimension: F32 from float32, U32 from uint8, uint16 or uint32."""
load_floats: Any = _loading(F32)
"""``load_floats(array, place)``: F32 from the bytes, uint8, from a place on."""
load_bytes: Any = _loading(U8)
"""``load_bytes(array, place)``: U8 from a place of an array of one dimension."""
store: Any = _store
"""``store(array, place, x)``, in one dimension: F32 to float32, the lower bits of U32 to uint8, uint16 or uint32, all
of U64 and U8 to any array."""
store_packed: Any = _store_packed
"""``store_packed(array, place, x, mask)``: the lanes of F32 where `mask` is set, one after the other, to float32 in one
dimension; what follows them, to sixteen in all, is anything."""
load_packed: Any = _load_packed
"""``load_packed(array, place, mask)``: the inverse, from as many elements as lanes are set; other lanes are anything.
There must be sixteen to load."""
