"""A plan in a table: what each layer and each expert gets, and why."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deltaworks.checkpoints.tensor_names import LAYER, is_embeddings

if TYPE_CHECKING:
    from deltaworks.merging.plan import Plan, PlannedTensor


def layer_of(tensor: str) -> str:
    """What a tensor is told under: its layer's number; outside the layers, its own name."""
    match = LAYER.fullmatch(tensor)
    return match["index"] if match else tensor.removesuffix(".weight").removeprefix("model.")


def module_of(tensor: str) -> str:
    """The kind of a tensor: its name inside a layer; outside the layers, its own name."""
    match = LAYER.fullmatch(tensor)
    return match["rest"][1:].removesuffix(".weight") if match else layer_of(tensor)


def by_layer(plan: "Plan") -> list[dict[str, Any]]:
    """What is read of each layer.

    Returns:
        Embeddings first, layers by number, then the rest: `layer`; `weight`, its share of the merged delta's squared
        norm; `error`, its predicted relative error; both None where there are no statistics; `read`, for each expert
        the share of its elements that is read, None for one that has no part in the layer; and where the plan reads
        layers of deltas `bits`, for each expert the bits read a parameter, likewise.
    """
    return _by(plan, "layer", layer_of)


def by_module(plan: "Plan") -> list[dict[str, Any]]:
    """What is read of each kind of tensor over all layers, by its name inside a layer, `module`; see `by_layer`."""
    return _by(plan, "module", module_of)


def _by(plan: "Plan", what: str, of: Callable[[str], str]) -> list[dict[str, Any]]:
    experts = [i for i, m in enumerate(plan.models) if m.role != "base"]
    total = math.fsum((t.norm or 0.0) ** 2 for t in plan.tensors)
    has_layers = any(t.depths for t in plan.tensors)
    groups: dict[str, list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        groups.setdefault(of(tensor.name), []).append(tensor)
    rows = []
    for name, tensors in sorted(groups.items(), key=lambda item: _place(item[0])):
        squares = math.fsum((t.norm or 0.0) ** 2 for t in tensors)
        lost = math.fsum(((t.norm or 0.0) * (t.error or 0.0)) ** 2 for t in tensors)
        known = all(t.norm is not None for t in tensors)
        rows.append(
            {
                what: name,
                "weight": round(squares / total, 6) if known and total else None,
                # Six digits, not six decimals: an error that is not zero must not be told as zero.
                "error": float(f"{math.sqrt(lost / squares):.6g}") if known and squares else 0.0 if known else None,
                "read": _shares(plan, tensors, experts),
                **({"bits": _bits(plan, tensors, experts)} if has_layers else {}),
            }
        )
    return rows


def _place(layer: str) -> tuple[int, int]:
    if layer.isdecimal():
        return 1, int(layer)
    return (0, 0) if is_embeddings(f"{layer}.weight") or layer.endswith(("wpe", "embeddings")) else (2, 0)


def _shares(plan: "Plan", tensors: "list[PlannedTensor]", models: list[int]) -> list[float | None]:
    return _per_parameter(tensors, models, lambda tensor, k: elements_read(tensor, k, plan.block_size), 6)


def _bits(plan: "Plan", tensors: "list[PlannedTensor]", models: list[int]) -> list[float | None]:
    def bits(tensor: "PlannedTensor", k: int) -> int:
        # What is read as it is has the type of the output, as good as always.
        return 8 * (
            tensor.nbytes[k] if tensor.nbytes else tensor.dtype.nbytes(elements_read(tensor, k, plan.block_size))
        )

    return _per_parameter(tensors, models, bits, 4)


def _per_parameter(
    tensors: "list[PlannedTensor]", models: list[int], of: "Callable[[PlannedTensor, int], int]", digits: int
) -> list[float | None]:
    """What is taken of each model a parameter of it, where `of` tells it of an input; None where it has no part."""
    held, taken = dict.fromkeys(models, 0), dict.fromkeys(models, 0)
    for tensor in tensors:
        for k, source in enumerate(tensor.inputs):
            if source.model in held:
                held[source.model] += tensor.count
                taken[source.model] += of(tensor, k)
    return [round(taken[m] / held[m], digits) if held[m] else None for m in models]


def elements_read(tensor: "PlannedTensor", k: int, block_size: int) -> int:
    """How many elements of its input `k` a planned tensor reads."""
    reads = tensor.reads[k] if tensor.reads else None
    if reads is None:
        return tensor.count
    return sum(min(b * block_size, tensor.count) - a * block_size for a, b in reads)
