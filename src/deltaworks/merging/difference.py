"""What differs between two plans."""

from collections.abc import Iterable
from typing import Any

from deltaworks.layers.cells import DEPTH
from deltaworks.merging.plan import Plan, PlannedTensor
from deltaworks.merging.summary import layer_of

_SETTINGS = (
    "method",
    "seed",
    "budget_bytes",
    "fair",
    "balanced",
    "block_size",
    "predicted_error",
    "error_bound",
    "expert_bytes",
    "expert_bytes_planned",
    "shard_bytes",
    "chat_template",
    "recipe",
)

_Run = tuple[int, int, int]
"""The first element, the one after the last, and how many layers of their delta are read."""


def difference(a: Plan, b: Plan) -> dict[str, Any]:
    """Compare two plans.

    Returns:
        `same`; `settings`, [`name`, `a`, `b`] of each that differs; `models`: names in `only_a`, `only_b`, and those
        that `changed`; `tensors`: names in `only_a`, `only_b`, and those made by another `operation`; `reads`: for each
        expert of both, the elements that are read in `both`, in `only_a` and in `only_b`, those of `both` of which one
        reads more layers of the delta (`deeper_a`, `deeper_b`), and the model's `layers` in which they differ.
    """
    names = [{m.name: m.fingerprint for m in plan.models} for plan in (a, b)]
    tensors = [{t.name: t for t in plan.tensors} for plan in (a, b)]
    common = [n for n in tensors[0] if n in tensors[1]]
    return {
        "a": a.digest,
        "b": b.digest,
        "same": a.digest == b.digest,
        "settings": [
            {"name": s, "a": getattr(a, s), "b": getattr(b, s)} for s in _SETTINGS if getattr(a, s) != getattr(b, s)
        ],
        "models": {
            "only_a": [n for n in names[0] if n not in names[1]],
            "only_b": [n for n in names[1] if n not in names[0]],
            "changed": [n for n in names[0] if n in names[1] and names[0][n] != names[1][n]],
        },
        "tensors": {
            "only_a": [n for n in tensors[0] if n not in tensors[1]],
            "only_b": [n for n in tensors[1] if n not in tensors[0]],
            "operation": [n for n in common if not _made_alike(tensors[0][n], tensors[1][n])],
        },
        "reads": [
            _reads(a, b, name, common)
            for name in names[0]
            if name in names[1] and next(m for m in a.models if m.name == name).role != "base"
        ],
    }


def _made_alike(a: PlannedTensor, b: PlannedTensor) -> bool:
    return (a.operation, a.dtype, a.shape) == (b.operation, b.dtype, b.shape)


def _reads(a: Plan, b: Plan, name: str, tensors: list[str]) -> dict[str, Any]:
    found = dict.fromkeys(("both", "only_a", "only_b", "deeper_a", "deeper_b"), 0)
    layers: dict[str, None] = {}
    own = [_elements(plan, name) for plan in (a, b)]
    for tensor in tensors:
        first, second = (o.get(tensor, []) for o in own)
        both, deeper_a, deeper_b = _overlap(first, second)
        only_a, only_b = (sum(last - start for start, last, _ in runs) - both for runs in (first, second))
        for what, count in zip(found, (both, only_a, only_b, deeper_a, deeper_b), strict=True):
            found[what] += count
        if only_a or only_b or deeper_a or deeper_b:
            layers[layer_of(tensor)] = None
    return {"name": name, **found, "layers": list(layers)}


def _elements(plan: Plan, name: str) -> dict[str, list[_Run]]:
    """The elements that a plan reads of a model, by output tensor."""
    place = next(i for i, m in enumerate(plan.models) if m.name == name)
    found = {}
    for tensor in plan.tensors:
        for k, source in enumerate(tensor.inputs):
            if source.model == place:
                runs: Iterable[_Run]
                depths = tensor.depths[k] if tensor.depths else None
                reads = tensor.reads[k] if tensor.reads else None
                if depths is not None:
                    runs = depths
                elif reads is not None:
                    runs = ((first, last, DEPTH) for first, last in reads)
                else:
                    runs = ((0, -(-tensor.count // plan.block_size), DEPTH),)
                found[tensor.name] = [
                    (first * plan.block_size, min(last * plan.block_size, tensor.count), depth)
                    for first, last, depth in runs
                ]
    return found


def _overlap(a: list[_Run], b: list[_Run]) -> tuple[int, int, int]:
    """Elements in both, and how many of them have more layers in the one and in the other."""
    both = deeper_a = deeper_b = i = j = 0
    while i < len(a) and j < len(b):
        shared = max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        both += shared
        deeper_a += shared if a[i][2] > b[j][2] else 0
        deeper_b += shared if a[i][2] < b[j][2] else 0
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return both, deeper_a, deeper_b
