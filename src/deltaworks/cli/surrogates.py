"""surrogate: the learned model of a profile, and its distilled trees."""

from pathlib import Path
from typing import Annotated, Any

import typer

from deltaworks.cli.options import AsJson, CatalogPath, ProfileName, Quiet, ReplaceFile, print_json
from deltaworks.wording import counted

group = typer.Typer(help="The learned model of a server: train it, or read its distilled trees as rules.")


def attach(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.add_typer(group, name="surrogate", rich_help_panel="Place", no_args_is_help=True)


@group.command()
def train(
    *,
    profile: ProfileName,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Also write it here. [default: into the catalog alone]"),
    ] = None,
    force: ReplaceFile = False,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Learn what the twin says of a profile: minutes on two cores. A training that was stopped goes on where it was."""
    from deltaworks.catalog.store import Catalog
    from deltaworks.cli.progress import make_counter
    from deltaworks.errors import ProfileError
    from deltaworks.outputs import check_apart, check_file
    from deltaworks.serving.profile import find_profile
    from deltaworks.serving.surrogate import save_surrogate

    try:
        from deltaworks.serving import training
    except ImportError:
        raise ProfileError(
            "training needs scikit-learn; install it in a checkout of deltaworks with: pip install '.[train]'"
        ) from None

    chosen = find_profile(profile)
    with Catalog(catalog) as opened:
        if output is not None:
            check_apart(output, [("the catalog", opened.path), ("the input", Path(profile))])
            check_file(output, "profile_digest", force=force)
        total = training.TRAINING + training.UNSEEN + training.DISTILLED
        with make_counter(f"runs of the twin for {chosen.name}", total, "twin.run", quiet=quiet) as done:
            trained = training.train(chosen, opened.twin_runs(chosen.digest), done)
        kept = opened.surrogates / f"{chosen.digest}.json"
        save_surrogate(trained, kept)
    if output is not None:
        save_surrogate(trained, output)
    if as_json:
        print_json(trained.to_json() | {"output": str(output or kept)})
        return
    typer.echo(f"{chosen.name}: written to {output or kept}\n")
    _accuracy(trained.accuracy)


@group.command()
def show(*, profile: ProfileName, catalog: CatalogPath = None, quiet: Quiet = False, as_json: AsJson = False) -> None:
    """Print a surrogate's trees as rules, what each feature means, and how far off they are."""
    del quiet  # every command takes it; this one reports no progress
    from deltaworks.catalog.store import default_path
    from deltaworks.errors import ProfileError
    from deltaworks.serving.estimate import FEATURES
    from deltaworks.serving.profile import find_profile
    from deltaworks.serving.surrogate import STARVED, find_surrogate

    chosen = find_profile(profile)
    found = find_surrogate(chosen, (catalog or default_path()) / "surrogates")
    if found is None:
        raise ProfileError(f"{chosen.name} has no surrogate yet; run: deltaworks surrogate train --profile {profile}")
    if as_json:
        print_json(found.to_json())
        return
    names = list(FEATURES)
    typer.echo(f"{chosen.name}\n")
    _accuracy(found.accuracy)
    typer.echo("\nfeatures")
    for name, meaning in FEATURES.items():
        typer.echo(f"  {name:<18}{meaning}")
    typer.echo("\nis it starved?")
    typer.echo("\n".join(f"  {line}" for line in found.starvation.rules(names, STARVED)))
    typer.echo("\nwhat share of the offered tokens gets through?")
    typer.echo("\n".join(f"  {line}" for line in found.throughput.rules(names)))


def _accuracy(found: dict[str, Any]) -> None:
    runs, starved = found["unseen_runs"], found["unseen_starved"]
    typer.echo(f"on {counted(runs, 'run')} of the twin that no training saw ({starved:,} of them starved):")
    typer.echo(f"  {'':<10}{'throughput, SMAPE':>18}{'starvation, macro-F1':>22}{'leaves':>12}")
    for name in ("learned", "trees"):
        row = found[name]
        leaves = f"{row['throughput_leaves']} and {row['starvation_leaves']}" if "throughput_leaves" in row else ""
        typer.echo(f"  {name:<10}{row['throughput_smape']:>17.2f}%{row['starvation_macro_f1']:>22.3f}{leaves:>12}")
