"""demo: a merge that can be seen to work, in under a minute."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaworks.cli.options import AsJson, CatalogPath, Quiet, print_json

if TYPE_CHECKING:
    from deltaworks.reports.demo import DemoRow


def attach(app: typer.Typer) -> None:
    """Add the command."""
    app.command(rich_help_panel="Start here")(demo)


def demo(
    family: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Another family: base/, experts beside it, eval/DOMAIN.npy.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Keep the merged models here.", show_default=False)
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, metavar="N", help="Windows of 256 tokens to judge by, of each domain.")
    ] = 16,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge a small real family by several methods and show the loss of every model on every domain.

    The family is one base model and five experts, each fine-tuned on one kind of text. The catalog used is a
    throw-away one.
    """
    from deltaworks.cli.progress import make_progress
    from deltaworks.reports.demo import family_folder, run_demo

    del catalog  # every command takes it; the demo leaves the user's alone
    folder = family or family_folder()
    rows: list[DemoRow] = []

    def each(row: "DemoRow") -> None:
        rows.append(row)
        if as_json:
            return
        if len(rows) == 1:
            typer.echo("Loss on held-out text, nats a token (lower is better); * beats the base on the mean\n")
            typer.echo(f"{'':<22}" + "".join(f"{d:>11}" for d in row.losses) + f"{'mean':>11}")
        if row.kind != rows[-2].kind if len(rows) > 1 else False:
            typer.echo("")
        star = " *" if row.mean < rows[0].mean else ""
        cells = "".join(f"{v:>11.3f}" for v in row.losses.values())
        typer.echo(f"{row.kind:<7}{row.name:<15}{cells}{row.mean:>11.3f}{star}")

    run_demo(folder, out, windows, make_progress(quiet=quiet), each)
    if as_json:
        print_json(
            {
                "family": str(folder),
                "models": [
                    {
                        "name": r.name,
                        "kind": r.kind,
                        "losses": r.losses,
                        "mean": r.mean,
                        "merge": r.merge and r.merge.to_json(),
                    }
                    for r in rows
                ],
            }
        )
        return
    best = min(rows, key=lambda r: r.mean)
    expert = min((r for r in rows if r.kind == "expert"), key=lambda r: r.mean)
    typer.echo(
        f"\nEach expert is best at its own kind of text and pays for it on the others. {best.name} has the lowest mean,"
        f" {best.mean:.3f}, against {rows[0].mean:.3f} of the base and {expert.mean:.3f} of the best expert."
    )
    kept = out or Path("OUT")
    typer.echo(
        f"Next: deltaworks merge RECIPE.yml {kept if out is None else kept / 'mine'}   (RECIPE is mergekit YAML)"
    )
