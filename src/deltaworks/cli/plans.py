"""diff, sweep: plans beside each other."""

from pathlib import Path
from typing import Annotated, Any

import typer

from deltaworks.cli.merges import (
    AllowMismatch,
    Balanced,
    Fair,
    RecipeFile,
    Seed,
    ShardSize,
    StandIn,
    TrustCode,
    check_plan_file,
)
from deltaworks.cli.options import AsJson, BlockSize, CatalogPath, Quiet, ReplaceFile, Threads, print_json
from deltaworks.units import format_bytes, format_error
from deltaworks.wording import counted

_PLAN = "A plan file, a merged model's folder, or the first characters of a plan's digest."


def attach(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command(rich_help_panel="Merge")(sweep)
    app.command(rich_help_panel="Merge")(diff)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=_PLAN)],
    b: Annotated[str, typer.Argument(metavar="B", help=_PLAN)],
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Tell what differs between two plans: settings, models, tensors, and the blocks that only one of them reads."""
    del quiet  # every command takes it; this one reports no progress
    from deltaworks.catalog.store import Catalog
    from deltaworks.merging.difference import difference
    from deltaworks.merging.stored import find_plan

    with Catalog(catalog) as opened:
        found = difference(find_plan(opened, a), find_plan(opened, b))
    if as_json:
        print_json(found)
    else:
        _difference(found)


def _difference(found: dict[str, Any]) -> None:
    if found["same"]:
        typer.echo(f"the same plan, {found['a']}")
        return
    typer.echo(f"a {found['a']}\nb {found['b']}\n")
    for row in found["settings"]:
        if row["name"] == "recipe":
            typer.echo("recipe: differs")
        else:
            typer.echo(f"{row['name']}: {row['a']} -> {row['b']}")
    for what in ("models", "tensors"):
        for how, names in found[what].items():
            if names:
                listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                label = {"only_a": "only in a", "only_b": "only in b", "operation": "made another way"}.get(how, how)
                typer.echo(f"{what} {label}: {listed}")
    changed = [r for r in found["reads"] if r["layers"]]
    columns = {"both": "both", "only_a": "only a", "only_b": "only b"}
    if any(r["deeper_a"] or r["deeper_b"] for r in changed):
        columns |= {"deeper_a": "deeper in a", "deeper_b": "deeper in b"}
    if changed:
        heads = "".join(f"{title:>14}" for title in columns.values())
        typer.echo(f"\n{'elements read of':<26}{heads}  layers that differ")
    for row in changed:
        layers = ", ".join(row["layers"][:6]) + (
            f" and {len(row['layers']) - 6} more" if len(row["layers"]) > 6 else ""
        )
        counts = "".join(f"{row[column]:>14,}" for column in columns)
        typer.echo(f"  {row['name']:<24}{counts}  {layers}")


def sweep(
    recipe: RecipeFile,
    axes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=V,V",
            help="A parameter and its values, like density=0.1,0.2; for one model, expert:weight=0.5,1. Repeat for a"
            " grid.",
            show_default=False,
        ),
    ] = None,
    weight: Annotated[str | None, typer.Option(metavar="V,V", help="Short for --set weight=V,V.")] = None,
    density: Annotated[str | None, typer.Option(metavar="V,V", help="Short for --set density=V,V.")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="B,B", help="Budgets, like 5%,25%,2GiB. [default: the recipe's, or none]")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write every plan to this folder.", show_default=False),
    ] = None,
    base: StandIn = None,
    fair: Fair = None,
    balanced: Balanced = None,
    shard_size: ShardSize = "5GB",
    seed: Seed = 0,
    trust_remote_code: TrustCode = False,
    allow_mismatch: AllowMismatch = False,
    block_size: BlockSize = None,
    threads: Threads = None,
    force: ReplaceFile = False,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Plan a grid of variations of RECIPE: parameters by budgets, all over the same statistics.

    Every plan is kept in the catalog and, with -o, in a file that `deltaworks run` executes.
    """
    from deltaworks.catalog.store import Catalog
    from deltaworks.cli.progress import make_progress
    from deltaworks.merging.budget import parse_budget
    from deltaworks.merging.plan import save_plan
    from deltaworks.merging.prepare import MergeOptions
    from deltaworks.merging.recipe import load_recipe
    from deltaworks.merging.sweep import parse_axis, sweep
    from deltaworks.outputs import check_file
    from deltaworks.units import parse_bytes

    texts = [*(axes or ()), *(f"{n}={v}" for n, v in (("weight", weight), ("density", density)) if v is not None)]
    budgets = [b.strip() for b in (budget or "").split(",") if b.strip()]
    for one in budgets:
        parse_budget(one, "--budget")
    options = MergeOptions(
        parse_bytes(shard_size, "--shard-size"),
        seed,
        block_size,
        threads,
        base=base,
        fair=fair,
        balanced=balanced,
        trust_remote_code=trust_remote_code,
        allow_mismatch=allow_mismatch,
    )
    for there in sorted(folder.glob("plan-[0-9]*.json")) if folder is not None else ():
        check_file(there, "deltaworks_plan", force=force)
    rows: list[dict[str, Any]] = []
    progress = make_progress(quiet=quiet)
    with Catalog(catalog) as opened:
        variations = sweep(
            opened,
            load_recipe(recipe).text,
            [parse_axis(t) for t in texts],
            budgets,
            options,
            relative_to=recipe.parent,
            progress=progress,
        )
        for number, found in enumerate(variations, 1):
            file = None
            if folder is not None:
                file = folder / f"plan-{number:03}.json"
                check_plan_file(file, opened, recipe, found.plan)
                save_plan(found.plan, file)
            rows.append(
                {
                    "settings": found.settings,
                    "plan_digest": found.plan.digest,
                    "expert_bytes": found.plan.expert_bytes,
                    "expert_bytes_planned": found.plan.expert_bytes_planned,
                    "reads_nothing": found.plan.reads_nothing,
                    "predicted_error": found.plan.predicted_error,
                    "error_bound": found.plan.error_bound,
                    "predicted_read_s": found.plan.predicted_read_s,
                    "plan_s": round(found.plan_s, 6),
                    "file": file and str(file),
                }
            )
            if not as_json:
                _row(rows, folder)
        if nothing := sum(row["reads_nothing"] for row in rows):
            progress.note(
                f"{nothing:,} of {counted(len(rows), 'plan')} read nothing of any expert, so the result is the base"
                " model; give a larger budget"
            )
    if as_json:
        print_json({"plans": rows})


def _row(rows: list[dict[str, Any]], folder: Path | None) -> None:
    row = rows[-1]
    names = list(row["settings"])
    if len(rows) == 1:
        typer.echo("".join(f"{n:>16}" for n in names) + f"{'reads':>12}{'error':>9}{'planned in':>12}  plan")
    cells = "".join(f"{v!s:>16}" for v in row["settings"].values())
    reads, took = format_bytes(row["expert_bytes_planned"]), f"{row['plan_s'] * 1000:.0f} ms"
    plan = row["file"] if folder else row["plan_digest"][:12]
    typer.echo(f"{cells}{reads:>12}{format_error(row['predicted_error']):>9}{took:>12}  {plan}")
