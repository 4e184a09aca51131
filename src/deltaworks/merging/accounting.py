"""Account for every tensor of every input of a merge: merged, copied, or left out."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltaworks.catalog.models import Model
from deltaworks.checkpoints.tensor_names import is_recomputed
from deltaworks.errors import CheckpointError, quoted
from deltaworks.merging.plan import Plan, PlannedTensor

BUFFER = "buffers that loaders compute"
NOT_SELECTED = "not selected by the slices"
STANDS_IN = "stands in for blocks of experts that are not read"


def account_for(
    references: Sequence[str],
    models: Mapping[str, Model],
    tensors: Sequence[PlannedTensor],
    *,
    is_sliced: bool,
    unmerged: set[str],
) -> tuple[dict[str, Any], ...]:
    """Account for the tensors of each input of a plan.

    Args:
        references: the inputs, in the order of the plan.
        models: the model behind every reference.
        tensors: what the plan writes.
        is_sliced: whether the recipe chooses layers one by one.
        unmerged: references of models that the recipe does not merge.

    Returns:
        One row per input: `name`, how many `tensors` it has, how many are `merged` and how many only `copied`, and
        `left_out`, the names of the others by the reason why they are left out. The numbers add up. Where a model
        holds no head and its embeddings stand in for it, `substituted` names them by the name of the head.

    Raises:
        CheckpointError: a tensor would be dropped without a reason.
    """
    merged: list[set[str]] = [set() for _ in references]
    copied: list[set[str]] = [set() for _ in references]
    for tensor in tensors:
        for place, name in tensor.inputs:
            (merged if tensor.operation.calculates else copied)[place].add(name)
    rows = []
    for place, reference in enumerate(references):
        model = models[reference]
        held = model.checkpoint.tensors
        substituted = {
            name: info.name
            for name in sorted((merged[place] | copied[place]) - held.keys())
            if (info := model.checkpoint.find(name)) is not None
        }
        left_out: dict[str, list[str]] = {}
        for name, info in held.items():
            if name in merged[place] or name in copied[place]:
                continue
            reason = (
                STANDS_IN
                if reference in unmerged
                else BUFFER
                if is_recomputed(info)
                else NOT_SELECTED
                if is_sliced
                else None
            )
            if reason is None:
                raise CheckpointError(f"{model.name} has the tensor {quoted(name)}, which the merge does not use")
            left_out.setdefault(reason, []).append(name)
        rows.append(
            {
                "name": model.name,
                "tensors": len(held),
                # A tied head that a model leaves out is taken from its embeddings, and is not a tensor of its own.
                "merged": len(merged[place] & held.keys()),
                "copied": len((copied[place] - merged[place]) & held.keys()),
                "left_out": left_out,
                **({"substituted": substituted} if substituted else {}),
            }
        )
    return tuple(rows)


def plan_notes(plan: Plan) -> list[str]:
    """What a plan leaves out of its inputs for another reason than that the recipe does not ask for it."""
    notes = []
    for row in plan.accounting:
        if names := row["left_out"].get(BUFFER):
            buffers, are = ("1 buffer", "is") if len(names) == 1 else (f"{len(names)} buffers", "are")
            notes.append(f"{buffers} of {row['name']} that loaders compute {are} left out, first {names[0]}")
    return notes


def account_text(row: Mapping[str, Any]) -> str:
    """A row of `account_for` in words."""
    parts = [f"{row['merged']} merged"] if row["merged"] else []
    parts += [f"{row['copied']} copied"] if row["copied"] else []
    for reason, names in row["left_out"].items():
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        parts.append(f"{len(names)} left out ({reason}{f': {listed}' if reason == BUFFER else ''})")
    parts += [f"{name} taken from {other}" for name, other in row.get("substituted", {}).items()]
    return ", ".join(parts) or "none"
