"""show: what a name, a plan or a snapshot is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaworks.cli.options import AsJson, CatalogPath, Quiet, print_json
from deltaworks.units import format_bytes, format_error
from deltaworks.wording import counted

if TYPE_CHECKING:
    from deltaworks.catalog.store import Catalog


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Catalog")(show)


def show(
    what: Annotated[
        str, typer.Argument(metavar="NAME|PLAN|OUT", help="A catalog name, a plan file, or a merged model.")
    ],
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Show what is known of a registered model, a plan file or a merged model."""
    del quiet  # every command takes it; this one reports no progress
    # Plans take kernels, which are slow to import: here only where there is one.
    from deltaworks.catalog.register import find_model
    from deltaworks.catalog.store import Catalog
    from deltaworks.merging.manifest import MANIFEST, holds_snapshot, read_manifest
    from deltaworks.merging.unfinished import enter_finished
    from deltaworks.reports.facts import analysis_facts, model_facts

    path = Path(what)
    with Catalog.to_read(catalog) as opened:
        enter_finished(opened)
        if opened.find(what) is None and path.is_file():
            from deltaworks.merging.plan import load_plan
            from deltaworks.reports.plans import plan_facts

            kind, facts = "plan", plan_facts(load_plan(path))
        elif opened.find(what) is None and (path / MANIFEST).is_file():
            kind, facts = "snapshot", read_manifest(path) | {"present": True}
        elif opened.find(what) is None and (known := _recorded(opened, path)) and not holds_snapshot(path):
            kind, facts = "snapshot", known | {"present": False}
        else:
            model = find_model(opened, what)
            kind, facts = "model", model_facts(model) | {"analysis": analysis_facts(opened, model)}
    if as_json:
        print_json(facts)
    else:
        {"plan": _plan, "snapshot": _snapshot, "model": _model}[kind](facts)


def _recorded(catalog: "Catalog", path: Path) -> dict[str, Any] | None:
    """The manifest that the catalog has of the merged model in a folder."""
    return next((m for p, _, m, _ in catalog.snapshots() if p == path.resolve()), None)


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
        ("parameters", f"{facts['parameters']:,} in {counted(facts['tensors'], 'tensor')}"),
        ("types", ", ".join(f"{name} {count:,}" for name, count in facts["dtypes"].items())),
        ("size", f"{format_bytes(facts['bytes'])} in {counted(facts['files'], 'file')}"),
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
            ("layers", _kept(analysis["layers_bytes"], facts)),
        ]
    elif facts["kind"] == "expert":
        rows.append(("analysis", f"none yet; run: deltaworks analyze {facts['name']}"))
    _lines(rows)


def _kept(nbytes: int | None, facts: dict[str, Any]) -> str:
    if nbytes is None:
        return f"none; merges within a budget gain from them: deltaworks analyze {facts['name']} --layers"
    return f"{format_bytes(nbytes)}, {8 * nbytes / max(1, facts['parameters']):.2f} bits a parameter, to the last bit"


def _inputs(models: list[dict[str, Any]]) -> None:
    number = 0
    for m in models:
        number += m["role"] != "base"
        label = str(number) if m["role"] != "base" else ""
        read = f"{format_bytes(m['bytes_planned'])} read" if m["role"] != "base" else ""
        typer.echo(
            f"{label:>3} {m['role']:<7}{m['name']:<24}{format_bytes(m['nbytes']):>10} {read:>14}"
            f"  {m['fingerprint'][:12]}  {m['reference']}"
        )


def _accounting(facts: dict[str, Any]) -> None:
    """What becomes of every tensor of each input, and what there is to note; plans of earlier versions have neither."""
    from deltaworks.merging.accounting import account_text

    if rows := facts.get("accounting"):
        typer.echo("\nTensors of each input\n")
        for row in rows:
            typer.echo(f"    {row['name']:<24}{row['tensors']:>6}: {account_text(row)}")
    for note in facts.get("notes", ()):
        typer.echo(f"note: {note}")


def _plan(facts: dict[str, Any]) -> None:
    share = facts["expert_bytes_planned"] / max(1, facts["expert_bytes"])
    rows = [
        ("plan", facts["plan_digest"]),
        ("method", f"{facts['method']} (seed {facts['seed']})"),
        ("output", f"{counted(facts['parameters'], 'parameter')} in {counted(facts['tensors'], 'tensor')}"),
        ("operations", ", ".join(f"{n} {kind}" for kind, n in facts["operations"].items())),
    ]
    budget = facts["budget_bytes"]
    goals = "".join(f", {goal}" for goal in ("fair", "balanced") if facts[goal])
    rows.append(("budget", "none" if budget is None else format_bytes(budget) + goals))
    experts = format_bytes(facts["expert_bytes"])
    nothing = "; nothing of any expert, so the result is the base model" if facts["reads_nothing"] else ""
    read = format_bytes(facts["expert_bytes_planned"])
    rows.append(("reads", f"{read} of {experts} from experts ({share:.1%}){nothing}"))
    if facts["read_cost"]:
        cost = facts["read_cost"]
        price = f"{cost['request_s'] * 1000:.2g} ms a request and {format_bytes(cost['bytes_per_s'])}/s"
        rows.append(("reading", f"{facts['predicted_read_s']:.3g} s, base included, at {price}"))
    rows.append(("error", error_text(facts)))
    _lines(rows)
    typer.echo("")
    _inputs(facts["models"])
    _accounting(facts)
    if budget is not None:
        _table(facts, "layer")
        if any("bits" in row for row in facts["modules"]):
            _table(facts, "module")


def error_text(facts: dict[str, Any]) -> str:
    """What a plan says of its error."""
    if facts["budget_bytes"] is None or facts["expert_bytes_planned"] == 0 == facts["expert_bytes"]:
        return "none: everything is read"
    if facts["predicted_error"] == 0:
        return "exact: the same result as reading everything"
    text = f"{format_error(facts['predicted_error'])} predicted, relative to the full merge's distance from the base"
    return text + (f"; at most {format_error(facts['error_bound'])}" if facts["error_bound"] else "")


_BANDS = 20


def _table(facts: dict[str, Any], what: str) -> None:
    """A table of what is read: a row a layer, a few layers, or a kind of tensor; a column an expert."""
    experts = [m for m in facts["models"] if m["role"] != "base"]
    numbers = "".join(f"{i:>6}" for i in range(1, len(experts) + 1))
    rows = facts[f"{what}s"]
    cell = "bits" if any("bits" in row for row in rows) else "read"
    unit, form = ("bits a parameter", "6.2f") if cell == "bits" else ("%", "6.0%")
    typer.echo(f"\nRead of each expert, {unit}; weight is the share of the merge's change that is there\n")
    typer.echo(f"{what:<28}weight  error{numbers}")
    for band in _bands(rows, what):
        label = band[0][what] if len(band) == 1 else f"{band[0][what]} to {band[-1][what]}"
        weights = [r["weight"] or 0.0 for r in band]
        lost = sum(w * (r["error"] or 0.0) ** 2 for w, r in zip(weights, band, strict=True))
        error = (lost / sum(weights)) ** 0.5 if sum(weights) else 0.0
        cells = []
        for e in range(len(experts)):
            read = [r[cell][e] for r in band if r[cell][e] is not None]
            cells.append(f"{sum(read) / len(read):>{form}}" if read else "     -")
        typer.echo(f"{label[:27]:<28}{sum(weights):>6.1%}  {_short(error):>5}{''.join(cells)}")


def _short(error: float) -> str:
    """An error in a column of five characters."""
    return "exact" if error == 0 else "<0.01" if error < 0.005 else f"{error:.2f}"


def _bands(rows: list[dict[str, Any]], what: str) -> list[list[dict[str, Any]]]:
    """Rows of a table that fits a screen: layers of a deep model go together, two or more at a time."""
    size = -(-len(rows) // _BANDS)
    bands: list[list[dict[str, Any]]] = []
    for row in rows:
        numbered = row[what].isdecimal()
        if bands and numbered and bands[-1][-1][what].isdecimal() and len(bands[-1]) < size:
            bands[-1].append(row)
        else:
            bands.append([row])
    return bands


def _snapshot(facts: dict[str, Any]) -> None:
    total = sum(s["bytes"] for s in facts["shards"])
    _lines(
        [
            ("snapshot of plan", facts["plan_digest"]),
            *([] if facts["present"] else [("folder", "gone; this is what the catalog recorded of it")]),
            ("method", f"{facts['method']} (seed {facts['seed']})"),
            ("weights", f"{format_bytes(total)} in {counted(len(facts['shards']), 'file')}"),
            ("read from experts", format_bytes(facts["expert_bytes_read"])),
            ("read from the base", format_bytes(facts["base_bytes_read"])),
            ("error", error_text(facts)),
            ("made with", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())),
        ]
    )
    _inputs(facts["inputs"])
    _accounting(facts)
