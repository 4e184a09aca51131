"""merge, plan, run, verify: many experts to one model."""

import re
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaworks.checkpoints.ahead import fetch_ahead
from deltaworks.cli.options import AsJson, BlockSize, CatalogPath, Quiet, Threads, print_json
from deltaworks.errors import DeltaworksError
from deltaworks.units import format_bytes, format_error
from deltaworks.wording import counted

if TYPE_CHECKING:
    from deltaworks.catalog.store import Catalog
    from deltaworks.merging.budget import Budget
    from deltaworks.merging.execute import StageTimes
    from deltaworks.merging.plan import Plan

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A mergekit YAML file.")]
Output = Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; must not exist.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace OUT, in one step, when the merge is complete; merge even where nothing of any expert is read.",
    ),
]
ShardSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest output file, like 5GB or 500MiB.")]
Seed = Annotated[
    int, typer.Option(metavar="N", help="Seed of DARE's and DELLA's random masks; the same seed gives the same bytes.")
]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Write NaN and infinity instead of failing.")]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="SHARE|BYTES",
        help="Most that may be read from experts: a share of all they hold, like 25%, or bytes, like 2GiB; a number"
        " needs its unit. What is not read is taken from the base. [default: the recipe's x-deltaworks.budget, else"
        " everything]",
        show_default=False,
    ),
]
StandIn = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        help="With a budget: the base model of the experts, where the recipe has no base_model.",
        show_default=False,
    ),
]
Fair = Annotated[
    bool | None,
    typer.Option(
        "--fair/--no-fair",
        help="With a budget: weigh all experts alike, so that those with small deltas are not starved.",
        show_default=False,
    ),
]
Balanced = Annotated[
    bool | None,
    typer.Option(
        "--balanced/--no-balanced",
        help="With a budget: weigh all tensors alike, rather than for the least error over all of them.",
        show_default=False,
    ),
]
VerifyError = Annotated[
    bool, typer.Option("--verify-error", help="Measure what the budget cost; reads every expert in full.")
]
Layers = Annotated[
    bool | None,
    typer.Option(
        "--layers/--no-layers",
        help="Read experts from the catalog's layers where it has them (analyze --layers), or never. With a budget they"
        " are used unless told otherwise; without one they are 38 to 46% of the bytes of BF16 weights, with the same"
        " result, for more processor time.  [default: with a budget, or from slow storage]",
        show_default=False,
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Copy custom code (*.py) that the models' configurations name; it is never run here. Otherwise the output"
        " does not name it.",
    ),
]
AllowMismatch = Annotated[
    bool,
    typer.Option(
        "--allow-mismatch",
        help="Merge models of different architectures, or with different attention-head layouts.",
    ),
]
_MODEL = re.compile(r"""^[\s-]*(?:base_)?model:[ \t]*["']?([^\s"'#]+)""", re.MULTILINE)
_BUDGET = re.compile(r"^\s*budget:", re.MULTILINE)
_FETCHED = 512 << 20
"""About what a disk reads while the program loads."""

ProfileRun = Annotated[bool, typer.Option("--profile-run", help="Print where the time went, on standard error.")]


def attach(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command(rich_help_panel="Merge")(merge)
    app.command(rich_help_panel="Merge")(plan)
    app.command(rich_help_panel="Merge")(run)
    app.command(rich_help_panel="Merge")(verify)


def merge(
    recipe: RecipeFile,
    out: Output,
    budget: BudgetText = None,
    base: StandIn = None,
    fair: Fair = None,
    balanced: Balanced = None,
    verify_error: VerifyError = False,
    shard_size: ShardSize = "5GB",
    seed: Seed = 0,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    trust_remote_code: TrustCode = False,
    allow_mismatch: AllowMismatch = False,
    block_size: BlockSize = None,
    threads: Threads = None,
    layers: Layers = None,
    profile_run: ProfileRun = False,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge as RECIPE says, and commit the result as the folder OUT.

    Models are named in the recipe by path, hub id or catalog name; those the catalog does not know are registered,
    and analyzed where the method needs it, once. OUT appears when everything is written and flushed, with a manifest
    that `verify` checks. A stopped merge leaves nothing at OUT; the same command again takes up what was finished.
    """
    if budget or not layers:  # all layers take the processor longer than the disk
        with suppress(DeltaworksError, OSError):  # whatever is wrong, the merge itself reports
            _fetch_ahead(recipe, catalog, all_models=budget is None, layers=layers)
    from deltaworks.catalog.store import Catalog
    from deltaworks.cli.progress import make_progress
    from deltaworks.merging.prepare import MergeOptions, plan_inputs, prepare_plan
    from deltaworks.merging.recipe import load_recipe
    from deltaworks.merging.snapshot import run_plan
    from deltaworks.units import parse_bytes

    progress = make_progress(quiet=quiet)
    options = MergeOptions(
        parse_bytes(shard_size, "--shard-size"),
        seed,
        block_size,
        threads,
        allow_nonfinite=allow_nonfinite,
        budget=_budget(budget),
        base=base,
        fair=fair,
        balanced=balanced,
        layers=layers,
        trust_remote_code=trust_remote_code,
        allow_mismatch=allow_mismatch,
    )
    loaded = load_recipe(recipe)
    _check_output(out, catalog, recipe, force=force)
    with Catalog(catalog) as opened:
        made = prepare_plan(opened, loaded, options, relative_to=recipe.parent, progress=progress)
        made.check_reads(force=force)
        models = plan_inputs(opened, made)  # whatever there is to say of them, planning said
        result = run_plan(opened, made, models, out, options, force=force, verify_error=verify_error, progress=progress)
    _print_result(result.to_json(), as_json=as_json)
    if profile_run:
        _print_stages(result.stages)


def plan(
    recipe: RecipeFile,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the plan goes.")] = Path(
        "plan.json"
    ),
    budget: BudgetText = None,
    base: StandIn = None,
    fair: Fair = None,
    balanced: Balanced = None,
    layers: Layers = None,
    shard_size: ShardSize = "5GB",
    seed: Seed = 0,
    trust_remote_code: TrustCode = False,
    allow_mismatch: AllowMismatch = False,
    block_size: BlockSize = None,
    threads: Threads = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Also replace a file of another kind at -o; write the plan even where it reads nothing of any expert.",
        ),
    ] = False,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Plan a merge and stop: register and analyze what is needed, and write the plan to a file.

    The plan holds everything the merge needs to know; `deltaworks run` executes it, with the same bytes as result.
    """
    from deltaworks.catalog.store import Catalog, default_path
    from deltaworks.cli.progress import make_progress
    from deltaworks.merging.plan import save_plan
    from deltaworks.merging.prepare import MergeOptions, prepare_plan
    from deltaworks.merging.recipe import load_recipe
    from deltaworks.outputs import check_apart, check_file
    from deltaworks.reports.plans import plan_facts
    from deltaworks.units import parse_bytes

    options = MergeOptions(
        parse_bytes(shard_size, "--shard-size"),
        seed,
        block_size,
        threads,
        budget=_budget(budget),
        base=base,
        fair=fair,
        balanced=balanced,
        layers=layers,
        trust_remote_code=trust_remote_code,
        allow_mismatch=allow_mismatch,
    )
    started = time.monotonic()
    loaded = load_recipe(recipe)
    check_apart(output, [("the catalog", catalog or default_path()), ("the input", recipe)])
    check_file(output, "deltaworks_plan", force=force)
    with Catalog(catalog) as opened:
        made = prepare_plan(opened, loaded, options, relative_to=recipe.parent, progress=make_progress(quiet=quiet))
        check_plan_file(output, opened, recipe, made)
    made.check_reads(force=force)
    save_plan(made, output)
    facts = plan_facts(made) | {
        "base_bytes_read": 0,
        "expert_bytes_read": 0,
        "sampled_bytes": made.sampled_bytes,
        "output_bytes_written": 0,
        "measured_error": None,
        "wall_s": round(time.monotonic() - started, 3),
        "output": str(output),
    }
    if as_json:
        print_json(facts)
    else:
        typer.echo(
            f"planned {made.method}: {counted(facts['tensors'], 'tensor')}, {format_bytes(made.expert_bytes_planned)}"
            f" of {format_bytes(made.expert_bytes)} to read from experts{_error(facts)};"
            f" written to {output} (digest {made.digest[:12]})"
        )


def run(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A file that `deltaworks plan` wrote.")],
    out: Output,
    verify_error: VerifyError = False,
    force: Force = False,
    allow_nonfinite: AllowNonfinite = False,
    block_size: BlockSize = None,
    threads: Threads = None,
    layers: Layers = None,
    profile_run: ProfileRun = False,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Execute a plan and commit the result as the folder OUT; refused where an input has changed since."""
    from deltaworks.catalog.store import Catalog
    from deltaworks.cli.progress import make_progress
    from deltaworks.merging.plan import load_plan
    from deltaworks.merging.prepare import MergeOptions, plan_inputs
    from deltaworks.merging.snapshot import run_plan

    progress = make_progress(quiet=quiet)
    loaded = load_plan(plan_file)
    options = MergeOptions(block_size=block_size, threads=threads, allow_nonfinite=allow_nonfinite, layers=layers)
    _check_output(out, catalog, plan_file, force=force)
    loaded.check_reads(force=force)
    for note in loaded.notes:
        progress.note(note)
    with Catalog(catalog) as opened:
        models = plan_inputs(opened, loaded, progress)
        result = run_plan(
            opened, loaded, models, out, options, force=force, verify_error=verify_error, progress=progress
        )
    _print_result(result.to_json(), as_json=as_json)
    if profile_run:
        _print_stages(result.stages)


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that `merge` or `run` made.")],
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Hash every file of a merged model again, and compare it with its manifest and its plan.

    Files that a loader would read and that the manifest does not list are an error. A merged model that the catalog
    does not know is entered.
    """
    from deltaworks.catalog.store import Catalog
    from deltaworks.cli.progress import make_progress
    from deltaworks.merging import snapshot
    from deltaworks.merging.unfinished import enter_finished, enter_verified
    from deltaworks.progress import warn

    progress = make_progress(quiet=quiet, computes=False)
    result = snapshot.verify(out, progress)
    try:
        with Catalog.to_read(catalog) as opened:
            enter_finished(opened)
            enter_verified(opened, out)
    except DeltaworksError as error:  # the output is verified all the same
        warn(progress, f"{out} is verified, but it was not entered in the catalog: {error}")
    if as_json:
        print_json(result)
    else:
        unknown = f"; not in the manifest: {', '.join(result['unknown'])}" if result["unknown"] else ""
        unknown += (
            "" if result["has_digest"] else "; the manifest is of an older version and does not contain its own digest"
        )
        typer.echo(
            f"{out} is what its manifest says: {counted(result['files'], 'file')},"
            f" {format_bytes(result['bytes'])}{unknown}"
        )


def check_plan_file(file: Path, catalog: "Catalog", recipe: Path, plan: "Plan") -> None:
    """Refuse to write a plan over its recipe, into a model that it merges, or into the catalog.

    Raises:
        OutputError: `file` is one of these, or lies inside.
    """
    from deltaworks.outputs import check_apart

    models = (catalog.find(planned.name) for planned in plan.models)
    inputs = (("the input", model.path) for model in models if model is not None)
    check_apart(file, [("the catalog", catalog.path), ("the input", recipe), *inputs])


def _check_output(out: Path, catalog: Path | None, source: Path, *, force: bool) -> None:
    """Refuse an output that exists, or that overlaps the catalog or the recipe or plan it is made from.

    If a merge was stopped right after it made the output, the catalog records it.
    """
    from deltaworks.catalog.store import Catalog, default_path
    from deltaworks.errors import OutputError
    from deltaworks.merging.manifest import PLAN, RECIPE
    from deltaworks.merging.snapshot import check_output
    from deltaworks.merging.unfinished import enter_finished
    from deltaworks.outputs import check_apart

    kept = [("the catalog", catalog or default_path())]
    # A merged model holds its own recipe and plan; when it is made again from one of them, that is written anew.
    if source.name not in (RECIPE, PLAN) or source.parent.resolve() != out.resolve():
        kept.append(("the input", source))
    check_apart(out, kept)
    try:
        check_output(out, force=force)
    except OutputError:
        # That the output exists is what the user must know, whatever is wrong with the catalog.
        with suppress(DeltaworksError), Catalog.to_read(catalog) as opened:
            enter_finished(opened)
        raise


def _fetch_ahead(recipe: Path, catalog: Path | None, *, all_models: bool, layers: bool | None) -> None:
    """Have what a merge is sure to read brought to memory while the program itself loads, and plans.

    That is the start of every model that the recipe names. Where not all of them are read whole, it is what planning
    reads of their statistics and layers, and the base of the first that the catalog knows.

    Raises:
        DeltaworksError, OSError: something cannot be read.
    """
    from deltaworks.documents import YAML_BYTES, read_text
    from deltaworks.errors import RecipeError

    text = read_text(recipe, "a recipe", RecipeError, YAML_BYTES)
    names = dict.fromkeys(_MODEL.findall(text))
    folders = {n: next((f for f in (recipe.parent / n, Path(n)) if f.is_dir()), None) for n in names}
    if all_models and not _BUDGET.search(text):
        starts = (f for folder in folders.values() if folder for f in sorted(folder.glob("*.safetensors"))[:1])
        fetch_ahead(dict.fromkeys(starts, 0), _FETCHED)
        return
    from deltaworks.catalog.store import Catalog, default_path, is_catalog
    from deltaworks.layers.records import index_place

    if is_catalog(catalog or default_path()):
        with Catalog(catalog) as opened:
            found = [opened.find(n) or (f and opened.find_path(f.resolve())) for n, f in folders.items()]
            known = [(m, base) for m in found if m and m.base and (base := opened.find(m.base))]
            tables = [opened.table_file(m.fingerprint, b.fingerprint) for m, b in known]
            files = [opened.layers_file(m.fingerprint, b.fingerprint) for m, b in known] if layers is not False else []
        places: dict[Path, int | None] = dict.fromkeys((table for table in tables if table.is_file()), 0)
        places |= {file: index_place(file) for file in files if file.is_file()}
        shards = [base.path / shard.name for _, base in known[:1] for shard in base.checkpoint.shards]
        places |= dict.fromkeys(shards, 0)
        fetch_ahead({file: place for file, place in places.items() if place is not None})


def _budget(text: str | None) -> "Budget | None":
    from deltaworks.merging.budget import parse_budget

    return None if text is None else parse_budget(text, "--budget")


def _print_result(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(result)
    else:
        experts, base, written = (
            format_bytes(result[which]) for which in ("expert_bytes_read", "base_bytes_read", "output_bytes_written")
        )
        where = f"merged into {result['output']} in {result['wall_s']:.1f} s"
        typer.echo(f"{where}: read {experts} from experts and {base} from the base, wrote {written}{_error(result)}")


def _print_stages(stages: "StageTimes") -> None:
    """Where the time went, a line a stage, on standard error."""
    readers = f"{stages.readers} threads" if stages.readers else "on cores"
    rows = [
        ("read", readers, stages.read_s, stages.read_waited_s, "for buffers"),
        ("compute", f"{stages.cores} threads", stages.compute_s, stages.compute_waited_s, "for what is read"),
        ("write", f"{stages.writers} threads", stages.write_s, stages.write_waited_s, "for what is computed"),
        ("hash", "1 thread", stages.hash_s, stages.commit_waited_s, "for what is written"),
        ("fsync", "the same", stages.fsync_s, 0.0, ""),
    ]
    for stage, threads, busy, waited, why in rows:
        waiting = f"{waited:9.3f} s waiting {why}" if why else ""
        typer.echo(f"{stage:<9}{threads:<12}{busy:8.3f} s at work{waiting}", err=True)


def _error(result: dict[str, Any]) -> str:
    """What a budget cost, where there is one."""
    if result["budget_bytes"] is None:
        return ""
    predicted, bound, measured = result["predicted_error"], result["error_bound"], result["measured_error"]
    text = "; exact" if predicted == 0 else f"; error {format_error(predicted)} predicted"
    text += f", at most {format_error(bound)}" if bound else ""
    return text + ("" if measured is None else f", {format_error(measured)} measured")
