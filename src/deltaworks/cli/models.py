"""register, analyze, list: what is in the catalog."""

from typing import Annotated

import typer

from deltaworks.cli.options import AsJson, BlockSize, CatalogPath, Quiet, Threads, print_json
from deltaworks.units import format_bytes, parse_bytes
from deltaworks.wording import counted


def attach(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command(rich_help_panel="Catalog")(register)
    app.command(rich_help_panel="Catalog")(analyze)
    app.command("list", rich_help_panel="Catalog")(list_)
    app.command(rich_help_panel="Catalog")(gc)


def register(
    name: Annotated[str, typer.Argument(help="Name in the catalog.")],
    path: Annotated[str, typer.Argument(metavar="PATH", help="A model folder, or a hub id `org/name[@revision]`.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="The base model an expert was tuned from: a name, a folder or a hub id."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let NAME mean another folder from now on.")] = False,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Enter a base model, an expert or a LoRA adapter in the catalog; the kind is detected.

    Every weight file is read once and hashed, so that later changes are noticed. Registering a name again accepts
    what the folder holds now.
    """
    from deltaworks.catalog import register as registering
    from deltaworks.catalog.store import Catalog
    from deltaworks.cli.progress import make_progress
    from deltaworks.reports.facts import model_facts

    with Catalog(catalog) as opened:
        model = registering.register(
            opened,
            name,
            path,
            base,
            replace_existing=replace,
            progress=make_progress(quiet=quiet, computes=False),
        )
    facts = model_facts(model)
    if as_json:
        print_json(facts)
    else:
        typer.echo(
            f"registered {model.name}: {model.kind.value}, {facts['parameters']:,} parameters,"
            f" {format_bytes(facts['bytes'])}, fingerprint {model.fingerprint[:12]}"
        )


def analyze(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Experts to analyze.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All registered experts.")] = False,
    base: Annotated[
        str | None, typer.Option(metavar="BASE", help="Analyze against this base instead of the one registered with.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Measure again what the catalog has.")] = False,
    layers: Annotated[
        bool | None,
        typer.Option(
            "--layers/--no-layers",
            help="Keep each expert as well, as layers over its base: 53 to 61% of its bytes in BF16, to the last bit."
            " Merges within a budget then read the layers that matter most.  [default: where they take less than half"
            " of the disk that is left]",
            show_default=False,
        ),
    ] = None,
    layers_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The most that all layers in the catalog may take together.  [default: the disk]",
            show_default=False,
        ),
    ] = None,
    block_size: BlockSize = None,
    threads: Threads = None,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure each expert's delta against its base in one pass, so that merges need not rescan it.

    `merge` does this where it must; do it ahead to keep it out of the first merge.
    """
    from deltaworks.catalog import analyze as analyzing
    from deltaworks.catalog.layering import check_room
    from deltaworks.catalog.models import Kind
    from deltaworks.catalog.register import base_of, check_unchanged, find_model
    from deltaworks.catalog.store import Catalog
    from deltaworks.cli.progress import make_progress
    from deltaworks.errors import UserError

    if bool(names) == every:
        raise UserError("name the experts to analyze, or give --all")
    limit = parse_bytes(layers_limit, "--layers-limit") if layers_limit else None
    progress = make_progress(quiet=quiet)
    results = []
    with Catalog(catalog) as opened:
        chosen = [find_model(opened, n) for n in names or ()] or [m for m in opened.models() if m.kind is Kind.EXPERT]
        if not chosen:
            raise UserError(
                "the catalog holds no experts; register one with: deltaworks register NAME PATH --base BASE"
            )
        pairs = [(model, base_of(opened, model, base, progress=progress)) for model in chosen]
        without = [m for m, b in pairs if force or not opened.layers_file(m.fingerprint, b.fingerprint).is_file()]
        if without and layers is not False:
            try:
                progress.note(check_room(opened, without, limit, share=1.0 if layers else 0.5))
            except UserError as error:
                if layers:
                    raise
                progress.note(f"no layers: {error}")
                layers = False
        for model, against in pairs:
            summary = analyzing.analyze(
                opened,
                check_unchanged(opened, model, progress),
                against,
                block_size=block_size,
                threads=threads,
                force=force,
                layers=layers is not False,
                progress=progress,
            )
            results.append({"expert": model.name, "base": against.name, **summary})
            if not as_json:
                wrong = (
                    f", NaN or infinity in {counted(len(summary['nonfinite']), 'tensor')}"
                    if summary["nonfinite"]
                    else ""
                )
                typer.echo(
                    f"{model.name}: differs from {against.name} by {summary['relative_norm']:.2%} of its norm,"
                    f" {summary['zeros'] / max(1, summary['elements']):.1%} of elements untouched{wrong}"
                )
    if as_json:
        print_json({"analyses": results})


def gc(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Experts whose layers are deleted as well.", show_default=False),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also delete the layers of all experts.")] = False,
    unregistered: Annotated[
        bool,
        typer.Option(
            "--unregistered",
            help="Also delete layers whose expert or base is no longer registered. If the folder of such an expert is"
            " gone, its layers are the last copy of it.",
        ),
    ] = False,
    plans: Annotated[
        bool, typer.Option("--plans", help="Also delete plans that no recorded merged model uses.")
    ] = False,
    gone: Annotated[
        bool,
        typer.Option(
            "--gone",
            help="Also delete the records of merged models whose folders are gone, unless one that is there was made"
            " from them.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be deleted, and delete nothing.")] = False,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Delete what the catalog no longer needs.

    That is statistics of models that are no longer registered, what killed processes and failed merges left, and
    damaged rows of the catalog. Layers, plans and records are deleted only on request: the layers of the experts NAME
    or of all experts (--layers), which `deltaworks analyze NAME --layers` builds again; layers whose expert or base is
    no longer registered (--unregistered); records of merged models whose folders are gone (--gone); and plans that no
    recorded merged model uses (--plans).
    """
    del quiet  # every command takes it; this one reports no progress
    from deltaworks.catalog.models import Kind
    from deltaworks.catalog.register import find_model, untouched
    from deltaworks.catalog.store import Catalog
    from deltaworks.catalog.tidy import find_unregistered_layers, find_waste, layers_of, remove
    from deltaworks.merging.gone import find_gone
    from deltaworks.merging.unfinished import enter_finished, find_unfinished, remove_unfinished

    with Catalog(catalog) as opened:
        rows = opened.damaged() if dry_run else opened.drop_damaged()
        enter_finished(opened)
        chosen = [find_model(opened, n) for n in names or ()]
        spared: list[str] = []
        if layers and not chosen:
            experts = [m for m in opened.models() if m.kind is Kind.EXPERT]
            chosen = [m for m in experts if untouched(m)]
            spared = [m.name for m in experts if m not in chosen and opened.kept_files(m.fingerprint)]
        # What belongs to a model whose row is lost stays, until it is registered again or the next time.
        is_model_lost = any(row.startswith("models(") for row in rows)
        waste, kept_layers = [], []
        if not is_model_lost:
            found = [*find_waste(opened, unregistered_layers=unregistered), *layers_of(opened, chosen)]
            going = {w.path: w for w in found}  # layers may be both unregistered and of an expert that was named
            waste = list(going.values())
            kept_layers = [w for w in find_unregistered_layers(opened) if w.path not in going]
        stopped, unused = find_unfinished(opened), list[tuple[str, int]]()
        # A row that is lost may have been what needs another one.
        lost = [] if rows else find_gone(opened)
        forgotten = [g.path for g in lost if gone and g.needed_by is None]
        if not dry_run:
            opened.drop_snapshots(forgotten)
        if plans:
            unused = opened.unused_plans(forgotten) if dry_run else opened.drop_unused_plans()
        nbytes = sum(w.nbytes for w in (*waste, *stopped)) + sum(n for _, n in unused)
        if not dry_run:
            remove(waste)
            remove_unfinished(opened, stopped)
        waste += stopped
    if as_json:
        print_json(
            {
                "removed": [] if dry_run else [str(w.path) for w in waste],
                "found": [{"path": str(w.path), "bytes": w.nbytes, "why": w.why} for w in waste],
                "bytes": nbytes,
                "kept": spared,
                "unregistered_layers": [{"path": str(w.path), "bytes": w.nbytes} for w in kept_layers],
                "damaged_rows": rows,
                "plans": [digest for digest, _ in unused],
                "gone": [
                    {"path": str(g.path), "needed_by": g.needed_by, "dropped": g.path in forgotten and not dry_run}
                    for g in lost
                ],
            }
        )
        return
    for row in rows:
        typer.echo(f"{'row':>10}  {row}  damaged")
    for w in waste:
        typer.echo(f"{format_bytes(w.nbytes):>10}  {w.path.name}  {w.why}")
    for path in forgotten:
        typer.echo(f"{'record':>10}  {path}  a merged model that is gone")
    for digest, size in unused:
        typer.echo(f"{format_bytes(size):>10}  plan {digest[:12]}  that no merged model was made by")
    for g in lost:
        if g.needed_by is not None:
            typer.echo(f"{'kept':>10}  record of {g.path}, which is gone, as {g.needed_by} comes from it")
        elif g.path not in forgotten:
            typer.echo(f"{'kept':>10}  record of {g.path}, which is gone; drop it with --gone")
    for name in spared:
        typer.echo(f"{'kept':>10}  layers of {name}, which are all there is of it: its weight files are gone")
    for w in kept_layers:
        if w.path.suffix == ".layers":
            typer.echo(
                f"{'kept':>10}  {w.path.name}, whose expert or base is no longer registered; it may be the last copy of"
                " that expert: register the models again, or delete it with --unregistered"
            )
    plans_too = f" and {counted(len(unused), 'plan')}" if unused else ""
    typer.echo(
        f"{'would free' if dry_run else 'freed'} {format_bytes(nbytes)} in {counted(len(waste), 'file')}{plans_too}"
    )


def list_(catalog: CatalogPath = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """List what the catalog holds: models, analyses, merged snapshots."""
    del quiet  # every command takes it; this one reports no progress
    from rich.console import Console
    from rich.table import Table

    from deltaworks.catalog.store import Catalog
    from deltaworks.merging.unfinished import enter_finished
    from deltaworks.reports.facts import catalog_facts

    with Catalog.to_read(catalog) as opened:
        enter_finished(opened)
        facts = catalog_facts(opened)
    if as_json:
        print_json(facts)
        return
    if not facts["models"] and not facts["snapshots"]:
        typer.echo(f"the catalog at {facts['catalog']} is empty; start with: deltaworks register NAME PATH")
        return
    console = Console()
    table = Table("name", "kind", "base", "parameters", "size", "analyzed", "path", box=None, pad_edge=False)
    for m in facts["models"]:
        analyzed = "" if m["kind"] != "expert" else "yes" if m["analyzed"] else "no"
        table.add_row(
            m["name"],
            m["kind"],
            m["base"] or "",
            f"{m['parameters']:,}",
            format_bytes(m["bytes"]),
            analyzed,
            m["path"] if m["present"] else f"{m['path']} (gone)",
        )
    console.print(table)
    for s in facts["snapshots"]:
        gone = "" if s["present"] else ", gone"
        console.print(
            f"snapshot {s['path']} (plan {s['plan_digest'][:12]}, {s['committed_at']}{gone})", highlight=False
        )
