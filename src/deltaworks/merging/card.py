"""The README of a merged model, in the form the Hugging Face hub reads."""

import re
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
    rows = "\n".join(f"| {_escaped(m.name)} | {m.role} | `{m.fingerprint[:16]}` |" for m in plan.models)
    recipe = plan.recipe.strip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {_escaped(name)}

A merge of {len(plan.models)} models by `{plan.method}`, made with deltaworks{_budget(plan)}.

| model | role | fingerprint |
|---|---|---|
{rows}
{_notes(plan)}
`deltaworks.json` names every input and the hash of every file; `deltaworks verify` checks them, and
`deltaworks run deltaworks_plan.json OUT` makes the same bytes again.

{fence}yaml
{recipe}
{fence}
"""


_MARKDOWN = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])|^[#+=-]|^\d+(?=[.)])")
"""What Markdown takes for markup; it leaves underscores inside of words alone."""


def _escaped(text: str) -> str:
    """Text on one line of Markdown that is shown as it is."""
    line = " ".join(text.split())
    return escape(_MARKDOWN.sub(lambda m: f"{m[0]}\\" if m[0].isdigit() else f"\\{m[0]}", line), quote=False)


def _notes(plan: Plan) -> str:
    if not plan.notes:
        return ""
    return "\nNotes:\n\n" + "".join(f"- {_escaped(note)}\n" for note in plan.notes)


def _budget(plan: Plan) -> str:
    if plan.budget_bytes is None:
        return ""
    share = plan.expert_bytes_planned / max(1, plan.expert_bytes)
    error = "exact" if plan.predicted_error == 0 else f"predicted relative error {format_error(plan.predicted_error)}"
    return f" from {share:.1%} of the experts' bytes ({error})"
