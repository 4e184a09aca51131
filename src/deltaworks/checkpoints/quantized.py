"""Detect quantized checkpoints: weights that are meaningless without their scales, tables or bit layout."""

from collections.abc import Iterator, Mapping
from typing import Any

from deltaworks.checkpoints.checkpoint import Checkpoint
from deltaworks.checkpoints.header import TensorInfo
from deltaworks.errors import CheckpointError

QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
"""Keys of `config.json` that say how weights are quantized; the last is MLX's."""

_BITS = ("bits", "w_bit", "wbits", "num_bits", "nbits", "weight_bits")
_METHODS = (
    (".quant_state.bitsandbytes", "bitsandbytes", 4),
    (".absmax", "bitsandbytes", 4),
    (".SCB", "bitsandbytes", 8),
    (".g_idx", "GPTQ", None),
    (".qweight", "GPTQ or AWQ", None),
    ("_packed", "compressed-tensors", None),
    ("_blocks", "MXFP4", 4),
    (".W_q", "HQQ", None),
    (".codebooks", "AQLM", None),
    (".weight_scales", "EETQ", 8),
    (".biases", "MLX", None),
)
"""By a piece of a tensor's name: the method, and its bits where it has one width alone; the first that fits counts."""
_BUFFERS = (
    "position_ids",
    "token_type_ids",
    "_index",
    "_indices",
    "mask",
    "num_batches_tracked",
    "attn.bias",
    "attention.bias",
)
"""Suffixes of integer tensors that are not weights."""
_NEVER_PACKED = {"BOOL", "I64", "U64", "C64"}
"""Types in which nothing is packed, unless it is called a weight."""


def quantization(checkpoint: Checkpoint) -> str | None:
    """How a model's weights are quantized, such as ``bitsandbytes, 4 bit``; None where they are plain numbers.

    Detection uses the tensors: packed integers, 4 and 6 bit types, and 8-bit floats with scales or other small tensors
    of their own beside them; or 8-bit floats that the configuration declares to be quantized. Plain weights under a
    configuration that was left over from a quantized model are plain, and so are 8-bit floats without scales.
    """
    tensors = checkpoint.tensors
    found = next(_quantized(tensors, has_config=has_quantization_config(checkpoint.config)), None)
    if found is None:
        return None
    method, bits = next(_declared(checkpoint.config), (None, None))
    named, usual = next(((m, b) for mark, m, b in _METHODS if any(mark in n for n in tensors)), (None, None))
    method, bits = method or named, bits or usual
    if method is None:
        method = "8-bit floats with scales" if found.dtype.is_float else f"packed integers, {found.dtype.name}"
    return method if bits is None else f"{method}, {bits} bit"


def check_not_quantized(name: str, checkpoint: Checkpoint) -> None:
    """Refuse a quantized model, called `name`, where its weights are to be calculated with.

    Raises:
        CheckpointError: it is quantized.
    """
    how = quantization(checkpoint)
    if how is not None:
        raise CheckpointError(f"{name} is quantized ({how}); merge the unquantized model")


def has_quantization_config(config: Mapping[str, Any]) -> bool:
    """Whether a model's configuration says how its weights are quantized, at the top or in a nested configuration."""
    return next(_configs(config), None) is not None


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what it says of quantization, for weights that are plain."""
    return {
        key: without_quantization(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


def _configs(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            if key in QUANTIZATION_KEYS and value:
                yield value
            else:
                yield from _configs(value)


def _quantized(tensors: Mapping[str, TensorInfo], *, has_config: bool) -> Iterator[TensorInfo]:
    """The tensors that are quantized weights."""
    scaled = {scope for t in tensors.values() if t.dtype.bits > 8 for scope in _scope_of_scale(t.name)}
    scaled |= _accompanied(tensors)
    for tensor in tensors.values():
        bits, parent = tensor.dtype.bits, tensor.name.rpartition(".")[0]
        if tensor.dtype.is_float:
            if bits <= 8 and len(tensor.shape) >= 2 and (has_config or tensor.name in scaled or parent in scaled):
                yield tensor
        elif bits < 8 or tensor.dtype.name == "F8_E8M0" or _is_packed(tensor):
            yield tensor


def _scope_of_scale(name: str) -> tuple[str, ...]:
    """What a scale is the scale of: the module that holds it, and the tensor that its name continues; else nothing."""
    parent, _, leaf = name.rpartition(".")
    # A learned scale of logits stands beside whole projections, and is the scale of none.
    if "scale" not in leaf.lower() or leaf.startswith("logit") or not parent:
        return ()
    stem = name[: name.lower().rindex("scale")].rstrip("._q")
    return parent, stem


def _accompanied(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """The names of 8-bit floats beside which a small tensor of wider floats is named after them or their module.

    Whatever the small tensor is called (``weight_s``, ``weight.absmax``, ``step``), the floats mean nothing without it.
    Only biases are something else.
    """
    owners: dict[str, list[TensorInfo]] = {}
    for tensor in tensors.values():
        if tensor.dtype.is_float and tensor.dtype.bits <= 8 and len(tensor.shape) >= 2:
            for stem in {tensor.name, tensor.name.removesuffix("weight").rstrip("._")}:
                owners.setdefault(stem, []).append(tensor)
    found = set()
    for other in tensors.values() if owners else ():
        if not other.dtype.is_float or other.dtype.bits <= 8 or "bias" in other.name.rpartition(".")[2]:
            continue
        for cut, separator in enumerate(other.name):
            if separator in "._":
                stem, rest = other.name[:cut], other.name[cut + 1 :]
                found |= {
                    owner.name
                    for owner in owners.get(stem, ())
                    # A module may hold others; what continues the name of a tensor is all about that.
                    if 2 * other.count <= owner.count and (stem == owner.name or "." not in rest)
                }
    return found


def _is_packed(tensor: TensorInfo) -> bool:
    """Whether a tensor of integers holds weights; buffers, such as positions and masks, do not."""
    leaf = tensor.name.rpartition(".")[2]
    if not tensor.shape or tensor.name.endswith(_BUFFERS):
        return False
    return "weight" in leaf or (len(tensor.shape) > 1 and tensor.dtype.name not in _NEVER_PACKED)


def _declared(config: Mapping[str, Any]) -> Iterator[tuple[str | None, int | None]]:
    """The methods and bits that a configuration declares."""
    for found in _configs(config):
        method = found.get("quant_method") or found.get("quant_algo") or found.get("format")
        yield method if isinstance(method, str) and len(method) < 40 else None, next(_bits(found), None)


def _bits(config: Mapping[str, Any]) -> Iterator[int]:
    yield from (4 for key in ("load_in_4bit", "_load_in_4bit") if config.get(key) is True)
    yield from (8 for key in ("load_in_8bit", "_load_in_8bit") if config.get(key) is True)
    for key in _BITS:
        if type(value := config.get(key)) is int and 0 < value < 32:
            yield value
    for value in config.values():
        if isinstance(value, dict):
            yield from _bits(value)
