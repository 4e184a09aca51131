"""Find models that contribute nothing to a merge, and merges whose result would be the base model, or zero."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

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


def effect_of(plan: Plan, base: int | None, groups: Sequence[Collection[int]] = ()) -> Effect:
    """Find models that contribute nothing to a merge.

    Args:
        plan: the plan.
        base: the place of the recipe's base model; None where it has none.
        groups: places of models that are known to hold the same weights, group by group.
    """
    if plan.method == "passthrough":
        return Effect((), None)
    tensors = [t for t in plan.tensors if t.operation.calculates]
    named, used, scaled = set[int](), set[int](), set[int]()
    is_zero, is_base = True, base is not None and any(len(t.inputs) > 1 for t in tensors)
    equal = {p for group in groups if base in group for p in group} | {base}
    for tensor in tensors:
        places = [source.model for source in tensor.inputs]
        depends = {k for k in range(len(places)) if tensor.operation.depends_on(k)}
        scaled |= {places[k] for k in depends}
        for group in groups:
            equals = [k for k in sorted(depends) if places[k] in group]
            if len(equals) > 1 and tensor.operation.cancels(equals):
                depends -= set(equals)
        named.update(places)
        used |= {places[k] for k in depends}
        is_zero = is_zero and (tensor.operation.is_zero or not depends)
        # A merge of the base alone may be intended, so one tensor at least has more inputs.
        is_base = (
            is_base
            and base in places
            and all(places[k] in equal for k in depends)
            and tensor.operation.keeps_equal_inputs
        )
    experts = [p for p in sorted(named) if plan.models[p].role != "base" and p != base]
    notes = tuple(
        f"{plan.models[p].name} has no part in the merge: its weight, or what else scales it, is 0 in every tensor"
        for p in experts
        if p not in scaled
    ) + tuple(
        f"{plan.models[p].name} has no part in the merge: models that hold the same weights cancel it out in every"
        " tensor"
        for p in experts
        if p in scaled - used
    )
    if tensors and is_zero:
        return Effect(
            notes,
            "every weight is 0, or cancels out against those of models that hold the same, so every element of the"
            " merge would be 0; give weights",
        )
    if base is not None and is_base:
        return Effect(
            notes,
            f"the merge would be {plan.models[base].name} itself, as every other model has no weight in it, holds"
            " the same weights or is cancelled out by a model that holds the same; check the weights and the models of"
            " the recipe",
        )
    return Effect(notes, None)
