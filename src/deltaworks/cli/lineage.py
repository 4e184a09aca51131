"""lineage: where a merged model came from, and what was made from a model."""

from typing import Annotated, Any

import typer

from deltaworks.cli.options import AsJson, CatalogPath, Quiet, print_json
from deltaworks.units import format_bytes, format_error
from deltaworks.wording import counted


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Catalog")(lineage)


def lineage(
    what: Annotated[str, typer.Argument(metavar="NAME|OUT", help="A catalog name, or a merged model's folder.")],
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a merged model was made from, or what was made from a model.

    For a merged model: its recipe, plan and budget, every expert with the blocks it gave, and what was made from it in
    turn. For a model of the catalog: every merged model that it is part of, and how much each would change without it.
    """
    del quiet  # every command takes it; this one reports no progress
    from deltaworks.catalog.register import find_model
    from deltaworks.catalog.store import Catalog
    from deltaworks.merging.lineage import model_lineage, snapshot_lineage
    from deltaworks.merging.stored import find_snapshot
    from deltaworks.merging.unfinished import enter_finished

    with Catalog.to_read(catalog) as opened:
        enter_finished(opened)
        found = find_snapshot(opened, what) if opened.find(what) is None else None
        if found is not None:
            facts, show = snapshot_lineage(opened, *found), _snapshot
        else:
            facts, show = model_lineage(opened, find_model(opened, what)), _model
    if as_json:
        print_json(facts)
    else:
        show(facts)


def _snapshot(facts: dict[str, Any]) -> None:
    when = f" on {facts['committed_at']} UTC" if facts["committed_at"] else ""
    budget = "no budget" if facts["budget_bytes"] is None else f"a budget of {format_bytes(facts['budget_bytes'])}"
    typer.echo(f"{facts['snapshot']}{_gone(facts['present'])}, made{when} by {facts['method']} with {budget}")
    typer.echo(f"plan {facts['plan_digest']}, predicted error {format_error(facts['predicted_error'])}\n")
    for row in facts["inputs"]:
        origin = f", itself a merge: {row['snapshot']}{_gone(row['snapshot_present'])}" if row["snapshot"] else ""
        if row["role"] == "base":
            typer.echo(f"  base    {row['name']} ({row['fingerprint'][:12]}){origin}")
        else:
            typer.echo(f"  expert  {row['name']} ({row['fingerprint'][:12]}){origin}: {_taken(row)}")
    if facts["used_by"]:
        users = [f"{path}{_gone(path not in facts['used_by_gone'])}" for path in facts["used_by"]]
        typer.echo(f"\nused by {', '.join(users)}")
    if facts["recipe"]:
        typer.echo("\nrecipe:\n" + "\n".join(f"  {line}" for line in facts["recipe"].rstrip().splitlines()))


def _model(facts: dict[str, Any]) -> None:
    of = f" of {facts['base']}" if facts["base"] else ""
    origin = f", a merge: {facts['snapshot']}{_gone(facts['snapshot_present'])}" if facts["snapshot"] else ""
    typer.echo(f"{facts['name']}, {facts['kind']}{of} ({facts['fingerprint'][:12]}){origin}")
    if facts["experts"]:
        typer.echo(f"experts: {', '.join(facts['experts'])}")
    if not facts["used_by"]:
        typer.echo("nothing was made from it")
        return
    typer.echo("\nmade from it; removing it would leave these without a source:")
    for row in facts["used_by"]:
        notes = _gone(row["present"])
        notes += "" if row["is_current"] else f" (from what {facts['name']} held before)"
        part = "as the base" if row["role"] == "base" else _taken(row)
        typer.echo(f"  {row['snapshot']}{notes}, {row['method']}, {part}")


def _gone(is_present: bool) -> str:
    return "" if is_present else " (gone)"


def _taken(row: dict[str, Any]) -> str:
    """What a merge took of an expert, and what that makes up."""
    if "elements" not in row:
        return "its plan is gone"
    share = row["elements_read"] / max(1, row["elements"])
    text = f"{format_bytes(row['bytes_planned'] or 0)} read, {share:.1%} of it, in {counted(row['tensors'], 'tensor')}"
    text += f" ({_spans(row['layers'])})" if row["layers"] else ""
    if row["change_without"] is not None:
        text += f"; without it the merge would change by {row['change_without']:.1%}"
    return text


def _spans(layers: list[str]) -> str:
    """Layers as people name them: numbers in a row as one span, then the tensors outside the layers."""
    numbers = {int(layer) for layer in layers if layer.isdecimal()}
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    ends = sorted(n for n in numbers if n + 1 not in numbers)
    spans = [str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True)]
    named = [layer for layer in layers if not layer.isdecimal()]
    return ", ".join([*([f"layers {', '.join(spans)}"] if spans else []), *named])
