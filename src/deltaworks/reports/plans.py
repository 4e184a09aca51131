"""What commands tell of plans, as plain data."""

from typing import Any

from deltaworks.merging.plan import Plan
from deltaworks.merging.summary import by_layer, by_module


def plan_facts(plan: Plan) -> dict[str, Any]:
    """A plan in a screenful: what is read from whom, how much, and what that loses."""
    operations: dict[str, int] = {}
    for tensor in plan.tensors:
        operations[tensor.operation.kind] = operations.get(tensor.operation.kind, 0) + 1
    return {
        "plan_digest": plan.digest,
        "method": plan.method,
        "seed": plan.seed,
        "budget_bytes": plan.budget_bytes,
        "fair": plan.fair,
        "balanced": plan.balanced,
        "expert_bytes": plan.expert_bytes,
        "expert_bytes_planned": plan.expert_bytes_planned,
        "predicted_error": plan.predicted_error,
        "error_bound": plan.error_bound,
        "reads_nothing": plan.reads_nothing,
        "read_cost": plan.read_cost and {"request_s": plan.read_cost[0], "bytes_per_s": plan.read_cost[1]},
        "predicted_read_s": plan.predicted_read_s,
        "parameters": sum(t.count for t in plan.tensors),
        "tensors": len(plan.tensors),
        "operations": operations,
        "accounting": list(plan.accounting),
        "notes": list(plan.notes),
        "models": [m._asdict() for m in plan.models],
        "layers": by_layer(plan),
        "modules": by_module(plan),
    }
