"""Find models that contribute nothing to a merge, and merges whose result would be the base model, or zero."""

from collections.abc import Sequence
from dataclasses import dataclass

from deltaworks.merging.methods.operation import Operation
from deltaworks.merging.plan import Plan


@dataclass(frozen=True, slots=True)
class Effect:
    """What the models of a plan contribute to it.

    Attributes:
        notes: one for each model that contributes nothing.
        no_effect: why the whole merge has no effect; None where it has one.
    """

    notes: tuple[str, ...]
    no_effect: str | None


def effect_of(plan: Plan, base: int | None, equal: frozenset[int]) -> Effect:
    """Find models that contribute nothing to a merge.

    Args:
        plan: the plan.
        base: the place of the recipe's base model; None where it has none.
        equal: places of the models that are known to hold the same weights as the base.
    """
    if plan.method == "passthrough":
        return Effect((), None)
    tensors = [t for t in plan.tensors if t.operation.calculates]
    named, used = set[int](), set[int]()
    for tensor in tensors:
        for k, source in enumerate(tensor.inputs):
            named.add(source.model)
            if source.model not in used and tensor.operation.depends_on(k):
                used.add(source.model)
    idle = [p for p in sorted(named - used) if plan.models[p].role != "base" and p != base]
    notes = tuple(
        f"{plan.models[p].name} has no part in the merge: its weight, or what else scales it, is 0 in every tensor"
        for p in idle
    )
    if tensors and all(t.operation.is_zero for t in tensors):
        return Effect(notes, "every weight is 0, so every element of the merge would be 0; give weights")
    if (
        base is not None
        and any(len(t.inputs) > 1 for t in tensors)  # a merge of the base alone may be intended
        and all(_gives_base(t.operation, [i.model for i in t.inputs], base, equal) for t in tensors)
    ):
        return Effect(
            notes,
            f"the merge would be {plan.models[base].name} itself, as every other model has no weight in it or holds"
            " the same weights; check the weights and the models of the recipe",
        )
    return Effect(notes, None)


def _gives_base(operation: Operation, places: Sequence[int], base: int, equal: frozenset[int]) -> bool:
    """Whether the result of an operation equals the base."""
    if base not in places:
        return False
    return all(p == base or p in equal or not operation.depends_on(k) for k, p in enumerate(places)) and (
        operation.keeps_equal_inputs
    )
