"""show: what a name, a plan or a snapshot is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from deltaworks.cli.options import AsJson, CatalogPath, print_json
from deltaworks.units import format_bytes


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Catalog")(show)


def show(
    what: Annotated[
        str, typer.Argument(metavar="NAME|PLAN|OUT", help="A catalog name, a plan file, or a merged model.")
    ],
    catalog: CatalogPath = None,
    as_json: AsJson = False,
) -> None:
    """Show what is known of a registered model, a plan file or a merged model."""
    from deltaworks.catalog.register import find_model
    from deltaworks.catalog.store import Catalog
    from deltaworks.merging.plan import load_plan
    from deltaworks.merging.snapshot import MANIFEST, read_manifest
    from deltaworks.reports.facts import analysis_facts, model_facts, plan_facts

    path = Path(what)
    with Catalog(catalog) as opened:
        if opened.find(what) is None and path.is_file():
            kind, facts = "plan", plan_facts(load_plan(path))
        elif opened.find(what) is None and (path / MANIFEST).is_file():
            kind, facts = "snapshot", read_manifest(path)
        else:
            model = find_model(opened, what)
            kind, facts = "model", model_facts(model) | {"analysis": analysis_facts(opened, model)}
    if as_json:
        print_json(facts)
    else:
        {"plan": _plan, "snapshot": _snapshot, "model": _model}[kind](facts)


def _lines(rows: list[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        typer.echo(f"{label:<{width}}  {value}")


def _model(facts: dict[str, Any]) -> None:
    rows = [
        ("name", facts["name"]),
        ("kind", facts["kind"] + (f" of {facts['base']}" if facts["base"] else "")),
        ("path", facts["path"]),
        ("fingerprint", facts["fingerprint"]),
        ("parameters", f"{facts['parameters']:,} in {facts['tensors']} tensors"),
        ("types", ", ".join(f"{name} {count:,}" for name, count in facts["dtypes"].items())),
        ("size", f"{format_bytes(facts['bytes'])} in {facts['files']} files"),
    ]
    analysis = facts["analysis"]
    if analysis:
        rows += [
            ("delta norm", f"{analysis['relative_norm']:.2%} of the base's"),
            ("untouched", f"{analysis['zeros'] / max(1, analysis['elements']):.1%} of the elements"),
            ("not finite", ", ".join(analysis["nonfinite"]) or "nothing"),
            (
                "statistics",
                f"{format_bytes(analysis['statistics_bytes'])}, blocks of {analysis['block_size']:,} elements",
            ),
        ]
    elif facts["kind"] == "expert":
        rows.append(("analysis", f"none yet; run: deltaworks analyze {facts['name']}"))
    _lines(rows)


def _inputs(models: list[dict[str, Any]]) -> None:
    for m in models:
        size = format_bytes(m["nbytes"])
        typer.echo(f"  {m['role']:<7} {m['name']:<24} {size:>10}  {m['fingerprint'][:12]}  {m['reference']}")


def _plan(facts: dict[str, Any]) -> None:
    budget = "none" if facts["budget_bytes"] is None else format_bytes(facts["budget_bytes"])
    _lines(
        [
            ("plan", facts["plan_digest"]),
            ("method", f"{facts['method']} (seed {facts['seed']})"),
            ("output", f"{facts['parameters']:,} parameters in {facts['tensors']} tensors"),
            ("operations", ", ".join(f"{n} {kind}" for kind, n in facts["operations"].items())),
            (
                "experts",
                f"{format_bytes(facts['expert_bytes_planned'])} of {format_bytes(facts['expert_bytes'])} to read",
            ),
            ("budget", budget),
            ("error", f"{facts['predicted_error']:.4f} predicted, relative to the full merge"),
        ]
    )
    _inputs(facts["models"])


def _snapshot(facts: dict[str, Any]) -> None:
    total = sum(s["bytes"] for s in facts["shards"])
    _lines(
        [
            ("snapshot of plan", facts["plan_digest"]),
            ("method", f"{facts['method']} (seed {facts['seed']})"),
            ("weights", f"{format_bytes(total)} in {len(facts['shards'])} files"),
            ("read from experts", format_bytes(facts["expert_bytes_read"])),
            ("read from the base", format_bytes(facts["base_bytes_read"])),
            ("made with", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
        ]
    )
    _inputs(facts["inputs"])
