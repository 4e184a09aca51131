"""Lineage: what a merged model was made from, what was made from a model, and what hangs on it."""

from pathlib import Path
from typing import Any

from deltaworks.catalog.models import Model
from deltaworks.catalog.storage import TYPICAL
from deltaworks.catalog.store import Catalog
from deltaworks.catalog.tables import read_table
from deltaworks.errors import PlanError, UserError
from deltaworks.merging.candidate import Knowledge
from deltaworks.merging.contributions import Overlaps
from deltaworks.merging.manifest import holds_snapshot
from deltaworks.merging.plan import Plan
from deltaworks.merging.stored import find_plan, plan_of_digest
from deltaworks.merging.summary import elements_read, layer_of
from deltaworks.merging.weighing import Weighed


def snapshot_lineage(catalog: Catalog, path: Path, manifest: dict[str, Any], when: str | None) -> dict[str, Any]:
    """What the merged model at `path` was made from, and what was made from it.

    Returns:
        `snapshot`, `plan_digest`, `method`, `seed`, `budget_bytes`, `expert_bytes_read`, `predicted_error`,
        `committed_at`, `recipe`, `present` (whether its folder is still there); `inputs`, a row a model with what the
        manifest says of it, what was taken of it (as `taken_of` tells), `change_without`, and `snapshot` (the merged
        model it is, if it is one) with `snapshot_present`; `used_by`, the paths of merged models that have this one
        among their inputs, and `used_by_gone`, those of them whose folders are gone.
    """
    plan = _plan_of(catalog, path, manifest["plan_digest"])
    changes = changes_without(catalog, plan) if plan else {}
    made = _by_fingerprint(catalog)
    inputs = []
    for place, model in enumerate(manifest["inputs"]):
        row = {k: model.get(k) for k in ("reference", "name", "role", "fingerprint", "nbytes", "bytes_planned")}
        row |= taken_of(plan, place) if plan and model["role"] != "base" else {}
        row["change_without"] = changes.get(place)
        row |= _origin(made, model["fingerprint"])
        inputs.append(row)
    own = manifest.get("fingerprint")
    used_by = [p for p, _, m, _ in catalog.snapshots() if own in {i["fingerprint"] for i in m["inputs"]}]
    return {
        "snapshot": str(path),
        "plan_digest": manifest["plan_digest"],
        "method": manifest["method"],
        "seed": manifest["seed"],
        "budget_bytes": manifest["budget_bytes"],
        "expert_bytes_read": manifest["expert_bytes_read"],
        "predicted_error": manifest["predicted_error"],
        "committed_at": when,
        "recipe": plan.recipe if plan else None,
        "inputs": inputs,
        "present": holds_snapshot(path),
        "used_by": [str(p) for p in used_by],
        "used_by_gone": [str(p) for p in used_by if not holds_snapshot(p)],
    }


def model_lineage(catalog: Catalog, model: Model) -> dict[str, Any]:
    """What was made from a registered model, and how much each of those merges would change without it.

    Returns:
        `name`, `kind`, `base`, `fingerprint`, `snapshot` (the merged model it is, if it is one) with
        `snapshot_present`, `experts` (of a base), and `used_by`: a row a merged model with `snapshot`, `plan_digest`,
        `method`, `role`, `bytes_planned`, the blocks taken, `change_without`, `present` (whether its
        folder is still there) and `is_current` (whether it was made from what the model holds now).
    """
    rows = []
    for path, digest, manifest, when in catalog.snapshots():
        for place, used in enumerate(manifest["inputs"]):
            if used["fingerprint"] != model.fingerprint and used["name"] != model.name:
                continue
            plan = _plan_of(catalog, path, digest)
            row = {
                "snapshot": str(path),
                "plan_digest": digest,
                "method": manifest["method"],
                "role": used["role"],
                "bytes_planned": used.get("bytes_planned"),
                "committed_at": when,
                "present": holds_snapshot(path),
                "is_current": used["fingerprint"] == model.fingerprint,
                "change_without": None,
            }
            if plan is not None and used["role"] != "base":
                row |= taken_of(plan, place)
                row["change_without"] = changes_without(catalog, plan).get(place)
            rows.append(row)
    return {
        "name": model.name,
        "kind": model.kind.value,
        "base": model.base,
        "fingerprint": model.fingerprint,
        **_origin(_by_fingerprint(catalog), model.fingerprint),
        "experts": [m.name for m in catalog.models() if m.base == model.name],
        "used_by": rows,
    }


def changes_without(catalog: Catalog, plan: Plan) -> dict[int, float]:
    """By how much a plan's merge would change if an expert read as the base, by the expert's place in the plan.

    Relative to the full merge's distance from the base. Experts of which the catalog has no statistics are left out.
    """
    models = []
    for planned in plan.models:
        model = catalog.find(planned.name)
        if model is None or model.fingerprint != planned.fingerprint:
            return {}
        models.append(model)
    deltas = {}
    for place, planned in enumerate(plan.models):
        if planned.base is not None:
            found = catalog.find_analysis(planned.fingerprint, plan.models[planned.base].fingerprint)
            # The blocks of a budget mean nothing in statistics of blocks of another size.
            if found is not None and (plan.budget_bytes is None or found[0] == plan.block_size):
                deltas[place, planned.base] = read_table(found[1])
    if not deltas:
        return {}
    try:
        return Weighed(plan, Knowledge(models, deltas, TYPICAL, Overlaps())).changes_without()
    except UserError:  # statistics that do not fit together, or a slice against other layers of the base
        return {}


def _plan_of(catalog: Catalog, path: Path, digest: str) -> Plan | None:
    try:
        plan = find_plan(catalog, str(path))
        if plan.digest == digest:
            return plan
    except PlanError:
        pass
    # The manifest may be malformed: what it calls a digest must not be looked for as a file.
    try:
        return plan_of_digest(catalog, digest)
    except PlanError:
        return None


def taken_of(plan: Plan, place: int) -> dict[str, Any]:
    """What a plan reads of a model.

    Returns:
        `elements_read` of `elements`, in how many `tensors` and which `layers`; `blocks`, of each tensor of the output
        the runs of blocks that are read, [first, after last], or None for all; `depths`, of those tensors of which
        layers are read, [first, after last, layers]; and their `block_size` in elements.
    """
    held = taken = 0
    layers: dict[str, None] = {}
    blocks: dict[str, Any] = {}
    depths: dict[str, Any] = {}
    for tensor in plan.tensors:
        for k, source in enumerate(tensor.inputs):
            if source.model == place:
                held += tensor.count
                count = elements_read(tensor, k, plan.block_size)
                taken += count
                if count:
                    layers[layer_of(tensor.name)] = None
                    blocks[tensor.name] = tensor.reads[k] if tensor.reads else None
                    if tensor.depths and tensor.depths[k] is not None:
                        depths[tensor.name] = tensor.depths[k]
    return {
        "elements": held,
        "elements_read": taken,
        "tensors": len(blocks),
        "layers": list(layers),
        "block_size": plan.block_size,
        "blocks": blocks,
        "depths": depths,
    }


def _origin(made: dict[str, Path], fingerprint: str) -> dict[str, Any]:
    path = made.get(fingerprint)
    return {"snapshot": path and str(path), "snapshot_present": path and holds_snapshot(path)}


def _by_fingerprint(catalog: Catalog) -> dict[str, Path]:
    return {m["fingerprint"]: p for p, _, m, _ in catalog.snapshots() if "fingerprint" in m}
