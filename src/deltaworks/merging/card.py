"""The README of a merged model, in the form the Hugging Face hub reads."""

from html import escape
from pathlib import Path

import yaml

from deltaworks.checkpoints.hub import HUB_ID
from deltaworks.merging.plan import Plan
from deltaworks.units import format_error


def model_card(plan: Plan, name: str) -> str:
    """The card of the model that `plan` makes, called `name`."""
    on_hub = [m.reference for m in plan.models if HUB_ID.fullmatch(m.reference) and not Path(m.reference).exists()]
    front: dict[str, object] = {"library_name": "transformers", "tags": ["merge", "deltaworks"]}
    if on_hub:
        front = {"base_model": on_hub, "base_model_relation": "merge"} | front
    rows = "\n".join(f"| {m.name} | {m.role} | `{m.fingerprint[:16]}` |" for m in plan.models)
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {name}

A merge of {len(plan.models)} models by `{plan.method}`, made with deltaworks{_budget(plan)}.

| model | role | fingerprint |
|---|---|---|
{rows}
{_notes(plan)}
`deltaworks.json` names every input and the hash of every file; `deltaworks verify` checks them, and
`deltaworks run deltaworks_plan.json OUT` makes the same bytes again.

```yaml
{plan.recipe.strip()}
```
"""


def _notes(plan: Plan) -> str:
    if not plan.notes:
        return ""
    return "\nNotes:\n\n" + "".join(f"- {escape(note, quote=False)}\n" for note in plan.notes)


def _budget(plan: Plan) -> str:
    if plan.budget_bytes is None:
        return ""
    share = plan.expert_bytes_planned / max(1, plan.expert_bytes)
    error = "exact" if plan.predicted_error == 0 else f"predicted relative error {format_error(plan.predicted_error)}"
    return f" from {share:.1%} of the experts' bytes ({error})"
