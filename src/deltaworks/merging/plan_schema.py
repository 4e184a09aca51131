"""Check the content of a plan file before it is used: types, ranges, and members that must agree."""

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deltaworks.catalog.models import Model
from deltaworks.checkpoints.dtypes import DTYPES, DType
from deltaworks.errors import PlanError, quoted
from deltaworks.layers.cells import DEPTH
from deltaworks.merging.methods import METHODS, OPERATIONS
from deltaworks.merging.methods.delta import Sparsify
from deltaworks.merging.methods.ranked_mask import LARGEST_ROWS_BLOCK, LONGEST_ROW, rows_block
from deltaworks.units import TOO_MANY_BYTES

SEEDS = range(-(1 << 63), 1 << 64)
"""Seeds that a plan may have."""
_BLOCK = 1 << 22
"""Elements of the largest block."""
_DIMENSIONS = 64
"""The most that a tensor has; bounded before its elements are counted, as that product grows with every dimension."""
_LARGEST = sys.float_info.max
"""The largest finite number."""
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"[0-9a-f]{1,16}")


def check_plan(content: Mapping[str, Any]) -> None:
    """Check that a plan file has every member of a plan, each of the right type and in range.

    Raises:
        PlanError: it does not; the message names the member.
    """
    for key in ("method", "recipe"):
        _text(content, key)
    if content["method"] not in METHODS:
        raise _wrong("method", "a merge method", content["method"])
    _whole(content, "seed", SEEDS.start, SEEDS.stop)
    for key in ("expert_bytes", "expert_bytes_planned"):
        _whole(content, key, 0, TOO_MANY_BYTES)
    _whole(content, "shard_bytes", 1, TOO_MANY_BYTES)
    _maybe(_whole, content, "budget_bytes", 0, TOO_MANY_BYTES)
    _power_of_two(content, "block_size")
    _number(content, "predicted_error", 0)
    _maybe(_number, content, "error_bound", 0)
    for key in ("fair", "balanced"):
        _flag(content, key)
    _maybe(_text, content, "chat_template")
    if not isinstance(_member(content, "config"), dict):
        raise _wrong("config", "the contents of a config.json", content["config"])
    _maybe(_number, content, "predicted_read_s", 0)
    if _member(content, "read_cost") is not None:
        for value in _list(content, "read_cost", 2):
            _check_number(value, "read_cost", 0)
    count = _check_models(content)
    _whole(content, "tokenizer", 0, count)
    _check_descriptive_members(content, count)
    names: set[str] = set()
    for i, tensor in enumerate(_list(content, "tensors")):
        where = f"tensors[{i}]"
        try:
            _check_tensor(_mapping(tensor, ""), content["models"], content["block_size"])
        except PlanError as error:
            raise PlanError(f"{_START}{where}{str(error).removeprefix(_START)}") from None
        if tensor["name"] in names:
            raise _wrong(f"{where}.name", "a name that no other tensor has", tensor["name"])
        names.add(tensor["name"])


def check_inputs(tensors: Sequence[Any], models: Sequence[Model]) -> None:
    """Make sure that the tensors a plan reads are in the models that it names, and of the shapes and types it takes.

    Args:
        tensors: the `PlannedTensor`s of a plan.
        models: its models, in its order.

    Raises:
        PlanError: one is not.
    """
    for tensor in tensors:
        for place, name in (*tensor.inputs, *([tensor.stand_in] if tensor.stand_in else [])):
            info = models[place].checkpoint.find(name)
            if info is None:
                problem = "which that model does not have"
            elif info.count != tensor.count:
                problem = f"which has {info.count:,} elements there and {tensor.count:,} in the result"
            elif info.dtype != tensor.dtype and not (info.dtype.is_float and tensor.dtype.is_float):
                problem = f"which is {info.dtype.name} there and {tensor.dtype.name} in the result"
            else:
                continue
            raise PlanError(
                f"the plan makes {quoted(tensor.name)} from {quoted(name)} of {models[place].name}, {problem};"
                " make it again"
            )


_START = "the plan is malformed: "


def _wrong(where: str, expected: str, value: object) -> PlanError:
    return PlanError(f"{_START}{where}: expected {expected}, not {quoted(value)}; make it again with deltaworks plan")


def _member(content: Mapping[str, Any], key: str, where: str = "") -> Any:
    if key not in content:
        raise PlanError(f"{_START}{where}{key}: missing; make it again with deltaworks plan")
    return content[key]


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, "keys and values", value)
    return value


def _maybe(check: Callable[..., Any], content: Mapping[str, Any], key: str, *bounds: Any) -> None:
    if _member(content, key) is not None:
        check(content, key, *bounds)


def _text(content: Mapping[str, Any], key: str, where: str = "") -> str:
    value = _member(content, key, where)
    if not isinstance(value, str):
        raise _wrong(f"{where}{key}", "text", value)
    return value


def _flag(content: Mapping[str, Any], key: str, where: str = "") -> bool:
    value = _member(content, key, where)
    if not isinstance(value, bool):
        raise _wrong(f"{where}{key}", "true or false", value)
    return value


def _whole(content: Mapping[str, Any], key: str, low: int, end: int, where: str = "") -> int:
    return _check_whole(_member(content, key, where), f"{where}{key}", low, end)


def _check_whole(value: Any, where: str, low: int, end: int) -> int:
    if type(value) is not int or not low <= value < end:
        raise _wrong(where, f"a whole number from {low:,} to {end - 1:,}", value)
    return value


def _power_of_two(content: Mapping[str, Any], key: str) -> None:
    value = _whole(content, key, 1, _BLOCK + 1)
    if value & (value - 1):
        raise _wrong(key, "a power of two", value)


def _number(
    content: Mapping[str, Any], key: str, low: float = -_LARGEST, high: float = _LARGEST, where: str = ""
) -> None:
    _check_number(_member(content, key, where), f"{where}{key}", low, high)


def _check_number(value: Any, where: str, low: float = -_LARGEST, high: float = _LARGEST) -> None:
    # Every comparison with NaN is false.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        bounds = "" if low < 0 else " that is not negative" if high == _LARGEST else f" from {low} to {high}"
        raise _wrong(where, f"a finite number{bounds}", value)


def _list(content: Mapping[str, Any], key: str, length: int | None = None, where: str = "") -> list[Any]:
    value = _member(content, key, where)
    if not isinstance(value, list):
        raise _wrong(f"{where}{key}", "a list", value)
    if length is not None and len(value) != length:
        raise PlanError(
            f"{_START}{where}{key}: expected {length} entries, not {len(value)}; make it again with deltaworks plan"
        )
    return value


def _numbers(
    content: Mapping[str, Any], key: str, length: int, low: float = -_LARGEST, high: float = _LARGEST
) -> list[Any]:
    values = _list(content, key, length, ".")
    for k, value in enumerate(values):
        _check_number(value, f".{key}[{k}]", low, high)
    return values


def _check_models(content: Mapping[str, Any]) -> int:
    """Check the models of a plan; returns how many there are."""
    models = _list(content, "models")
    if not models:
        raise _wrong("models", "at least one model", models)
    for i, model in enumerate(models):
        where = f"models[{i}]."
        _mapping(model, where)
        if unknown := set(model) - {"reference", "name", "role", "fingerprint", "nbytes", "base", "bytes_planned"}:
            raise _wrong(where.rstrip("."), "no other members than a model's", min(unknown))
        for key in ("reference", "name", "role", "fingerprint"):
            _text(model, key, where)
        if model["role"] not in ("base", "expert"):
            raise _wrong(f"{where}role", "base or expert", model["role"])
        if not _FINGERPRINT.fullmatch(model["fingerprint"]):
            raise _wrong(f"{where}fingerprint", "64 hexadecimal digits", model["fingerprint"])
        for key in ("nbytes", "bytes_planned"):
            _whole(model, key, 0, TOO_MANY_BYTES, where)
        if _member(model, "base", where) is not None and _whole(model, "base", 0, len(models), where) == i:
            raise _wrong(f"{where}base", "the place of another model", i)
    for key, of in (("expert_bytes", "nbytes"), ("expert_bytes_planned", "bytes_planned")):
        total = sum(m[of] for m in models if m["role"] == "expert")
        if content[key] != total:
            raise _wrong(key, f"{total:,}, the sum over its experts", content[key])
    if content["budget_bytes"] is not None and content["expert_bytes_planned"] > content["budget_bytes"]:
        raise _wrong("expert_bytes_planned", "no more than the budget", content["expert_bytes_planned"])
    return len(models)


def _check_descriptive_members(content: Mapping[str, Any], models: int) -> None:
    """Check the descriptive members: notes, the account of every model's tensors, and custom code."""
    for i, note in enumerate(_list(content, "notes") if "notes" in content else ()):
        if not isinstance(note, str):
            raise _wrong(f"notes[{i}]", "text", note)
    for i, row in enumerate(_list(content, "accounting") if "accounting" in content else ()):
        where = f"accounting[{i}]."
        _text(_mapping(row, where), "name", where)
        for key in ("tensors", "merged", "copied"):
            _whole(row, key, 0, TOO_MANY_BYTES, where)
        for reason, names in _mapping(_member(row, "left_out", where), f"{where}left_out").items():
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise _wrong(f"{where}left_out[{quoted(reason, 40)}]", "a list of names", names)
        for name, other in _mapping(row.get("substituted", {}), f"{where}substituted").items():
            if not isinstance(other, str):
                raise _wrong(f"{where}substituted[{quoted(name, 40)}]", "the name of a tensor", other)
    for i, entry in enumerate(_list(content, "code") if content.get("code") is not None else ()):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            raise _wrong(f"code[{i}]", "a model's place and a file", entry)
        _check_whole(entry[0], f"code[{i}]", 0, models)


def _check_tensor(tensor: Mapping[str, Any], models: Sequence[Mapping[str, Any]], block_size: int) -> None:
    if not _text(tensor, "name", "."):
        raise _wrong(".name", "a name", "")
    dtype = DTYPES.get(_text(tensor, "dtype", "."))
    if dtype is None:
        raise _wrong(".dtype", "an element type", tensor["dtype"])
    shape = _list(tensor, "shape", None, ".")
    if len(shape) > _DIMENSIONS:
        raise _wrong(".shape", f"at most {_DIMENSIONS} dimensions", len(shape))
    for n in shape:
        _check_whole(n, ".shape", 0, TOO_MANY_BYTES)
    count = math.prod(shape)
    if count >= TOO_MANY_BYTES // 64:
        raise _wrong(".shape", "a shape that fits into a file", shape)
    inputs = _list(tensor, "inputs", None, ".")
    if not inputs:
        raise _wrong(".inputs", "at least one tensor to read", inputs)
    for k, source in enumerate(inputs):
        _check_source(source, f".inputs[{k}]", len(models))
    if "stand_in" in tensor:
        _check_source(tensor["stand_in"], ".stand_in", len(models))
    for key in ("error", "norm"):
        if tensor.get(key) is not None:
            _number(tensor, key, 0, _LARGEST, ".")
    if _text(tensor, "operation", ".") not in OPERATIONS:
        raise _wrong(".operation", f"one of {', '.join(OPERATIONS)}", tensor["operation"])
    _check_reads(tensor, len(inputs), -(-count // block_size))
    _OPERATIONS[tensor["operation"]](tensor, len(inputs), dtype, count)


def _check_source(source: Any, where: str, models: int) -> None:
    if not isinstance(source, list) or len(source) != 2 or not isinstance(source[1], str):
        raise _wrong(where, "a model's place and the name of a tensor", source)
    _check_whole(source[0], where, 0, models)


def _check_reads(tensor: Mapping[str, Any], inputs: int, blocks: int) -> None:
    """Which blocks are read, and to which depth."""
    for key, width in (("reads", 2), ("depths", 3)):
        for k, runs in enumerate(_list(tensor, key, inputs, ".") if tensor.get(key) else ()):
            if runs is None:
                continue
            where, end = f".{key}[{k}]", 0
            if not isinstance(runs, list):
                raise _wrong(where, "runs of blocks", runs)
            for run in runs:
                if not isinstance(run, list) or len(run) != width:
                    raise _wrong(where, "a run of blocks", run)
                _check_whole(run[0], where, end, blocks)
                end = _check_whole(run[1], where, run[0] + 1, blocks + 1)
                for depth in run[2:]:
                    _check_whole(depth, where, 0, DEPTH + 1)
    if tensor.get("depths"):
        for value in _list(tensor, "nbytes", inputs, "."):
            _check_whole(value, ".nbytes", 0, TOO_MANY_BYTES)
    leaves_out = any(r is not None for key in ("reads", "depths") for r in tensor.get(key) or ())
    if leaves_out and "stand_in" not in tensor:
        raise PlanError(f"{_START}.stand_in: missing, though not all is read; make it again with deltaworks plan")


def _check_copy(tensor: Mapping[str, Any], inputs: int, dtype: DType, count: int) -> None:
    del inputs, count
    if _whole(tensor, "element_bits", 1, 129, ".") != dtype.bits:
        raise _wrong(".element_bits", f"the {dtype.bits} of {dtype.name}", tensor["element_bits"])


def _check_weighted(tensor: Mapping[str, Any], inputs: int, dtype: DType, count: int) -> None:
    del count
    _check_float(dtype)
    _numbers(tensor, "weights", inputs)
    _flag(tensor, "normalize", ".")


def _check_slerp(tensor: Mapping[str, Any], inputs: int, dtype: DType, count: int) -> None:
    del count
    _check_float(dtype)
    if inputs != 2:
        raise _wrong(".inputs", "two tensors to interpolate", inputs)
    _number(tensor, "t", where=".")


def _check_selected(tensor: Mapping[str, Any], inputs: int, dtype: DType, count: int) -> None:
    del count
    _check_float(dtype)
    if _whole(tensor, "experts", 0, 1 << 31, ".") != inputs - 1:
        raise _wrong(".experts", f"{inputs - 1}, one less than inputs", tensor["experts"])
    _number(tensor, "select_topk", 0, 1, ".")


def _check_delta(tensor: Mapping[str, Any], inputs: int, dtype: DType, count: int) -> None:
    _check_float(dtype)
    experts = inputs - 1
    _numbers(tensor, "weights", experts)
    for key in ("consensus", "normalize"):
        _flag(tensor, key, ".")
    _number(tensor, "lambda", where=".")
    how = tensor.get("sparsify", Sparsify.NONE.value)
    if how not in [s.value for s in Sparsify]:
        raise _wrong(".sparsify", f"one of {', '.join(Sparsify)}", how)
    sparsify = Sparsify(how)
    if sparsify is Sparsify.NONE:
        return
    densities = _numbers(tensor, "densities", experts, 0, 1)
    _flag(tensor, "rescale", ".")
    if sparsify.trims:
        _check_cuts(tensor, "cuts", experts, count)
        for k, (density, cut) in enumerate(zip(densities, tensor["cuts"], strict=True)):
            if 0 < density < 1 and cut is None:
                raise _wrong(f".cuts[{k}]", f"the cut of the density {density}", cut)
    if sparsify is Sparsify.OUTLIERS:
        _numbers(tensor, "gammas", experts, 0, 1)
        _check_cuts(tensor, "tops", experts, count)
    if sparsify.draws:
        for k, key in enumerate(_list(tensor, "keys", experts, ".")):
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise _wrong(f".keys[{k}]", "up to 16 hexadecimal digits", key)
    if sparsify is Sparsify.RANKS:
        _numbers(tensor, "epsilons", experts, 0, 1)
        row = _whole(tensor, "row", 1, LONGEST_ROW + 1, ".")
        if rows_block(row) > LARGEST_ROWS_BLOCK:
            raise _wrong(".row", "the length of a row that can be ranked", row)


def _check_cuts(tensor: Mapping[str, Any], key: str, experts: int, count: int) -> None:
    """Cuts as `pack_cut` packs them."""
    for k, cut in enumerate(_list(tensor, key, experts, ".")):
        where = f".{key}[{k}]"
        if cut is None:
            continue
        if not isinstance(cut, list) or len(cut) != 4:
            raise _wrong(where, "a cut of four numbers", cut)
        for value in cut:
            _check_whole(value, where, -1, 1 << 62)
        first, start, third, fourth = cut
        if start == -1:
            good = 0 <= first < 1 << 16 and 1 <= third <= fourth <= count
        else:
            good = 0 <= first < 1 << 32 and 0 <= third <= count and 1 <= fourth <= _BLOCK
        if not good:
            raise _wrong(where, "a cut inside the tensor", cut)


def _check_float(dtype: DType) -> None:
    if not dtype.is_float:
        raise _wrong(".dtype", "a type of floats, which alone can be merged", dtype.name)


_OPERATIONS: dict[str, Callable[[Mapping[str, Any], int, DType, int], None]] = {
    "copy": _check_copy,
    "weighted": _check_weighted,
    "slerp": _check_slerp,
    "sce": _check_selected,
    "delta": _check_delta,
}
