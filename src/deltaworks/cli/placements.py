"""place, advise: how many GPUs, and what goes where."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from deltaworks.cli.options import AsJson, CatalogPath, ProfileName, Quiet, Threads, print_json
from deltaworks.units import format_time
from deltaworks.wording import counted, listed

if TYPE_CHECKING:
    from deltaworks.serving.document import Recorded
    from deltaworks.serving.goals import Goal
    from deltaworks.serving.profile import Profile

_HEADROOM = 0.1
"""The headroom where none is given, a share."""


def attach(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command(rich_help_panel="Place")(place)
    app.command(rich_help_panel="Place")(advise)


def place(
    workload: Annotated[
        Path | None,
        typer.Argument(
            metavar="WORKLOAD",
            help="A YAML or JSON file: adapters, rates, lengths. [default: that of --from]",
            show_default=False,
        ),
    ] = None,
    *,
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            metavar="P",
            help="A built-in profile or a file of one; several for several types of GPU. [default: those of --from]",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for placement.json, a page, and files that run."),
    ] = None,
    objective: Annotated[
        Literal["gpus", "latency"],
        typer.Option(help="Fewest (or cheapest) GPUs, or the lowest p99 TTFT on --gpus of them."),
    ] = "gpus",
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, metavar="N", help="How many GPUs there are, for --objective latency.", show_default=False
        ),
    ] = None,
    headroom: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="How much more traffic every GPU must be able to take. [default: 10%, or that of --from]",
            show_default=False,
        ),
    ] = None,
    slo: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GOAL",
            help="A latency to keep, like ttft_p99=2s or itl_mean=50ms; may be given several times; none for no"
            " limit. [default: those of --from]",
            show_default=False,
        ),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="P=PRICE", help="Price of a GPU of a profile: cheapest instead of fewest.", show_default=False
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also say what simpler ways would need.")] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="Small cases: prove the number of GPUs (needs the extra `exact`).")
    ] = False,
    old: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="OLD", help="An earlier placement: move as few adapters as can be.", show_default=False
        ),
    ] = None,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Also answer: one more adapter, twice the traffic, another GPU, rank.")
    ] = False,
    catalog: CatalogPath = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another placement in the output folder.")] = False,
    threads: Threads = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Place LoRA adapters on the fewest GPUs without starvation, checked by the digital twin on every GPU.

    The output folder holds placement.json, index.html, serve.sh, compose.yaml, kubernetes.yaml, and for each of the
    last three routes and a LiteLLM config (routes.json, litellm.yaml; routes.compose.json and so on).
    """
    from deltaworks.catalog.store import default_path
    from deltaworks.cli.progress import make_steps
    from deltaworks.errors import PlacementError
    from deltaworks.outputs import check_apart
    from deltaworks.serving.document import describe, read_placement
    from deltaworks.serving.judge import Demand, Judge
    from deltaworks.serving.names import check_names
    from deltaworks.serving.placement import place as place_fewest
    from deltaworks.serving.placement import place_on
    from deltaworks.serving.registered import registered_adapters
    from deltaworks.serving.surrogate import find_surrogate
    from deltaworks.serving.workload import parse_workload, read_content

    recorded = read_placement(old) if old is not None else None
    if workload is None and recorded is None:
        raise PlacementError("give a WORKLOAD, or an earlier placement with --from")
    profiles = _profiles(profile, recorded)
    prices = _prices(price, profiles, recorded)
    if (objective == "latency") != (gpus is not None):
        raise PlacementError("--objective latency and --gpus N go together")
    if objective == "latency" and (len(profiles) > 1 or recorded):
        raise PlacementError("--objective latency is for one type of GPU, and not for --from")
    if output is not None:
        check_apart(output, [("the catalog", catalog or default_path())])
        _check_output(output, old, force=force)
    if workload is not None:
        content, folder = read_content(workload), workload.parent
        asked = parse_workload(content, folder, str(workload))
    else:
        assert recorded is not None
        assert old is not None
        content, folder, asked = recorded.content["workload"], old if old.is_dir() else old.parent, recorded.workload
    registered = registered_adapters(catalog, {adapter.name for adapter in asked.adapters})
    if output is not None:
        check_names((a.name for a in asked.adapters), registered.paths, {p.model for p in profiles})
    demand = Demand(asked, *_required(headroom, slo, recorded))
    surrogates = [find_surrogate(p, _surrogates(catalog)) for p in profiles]
    judge = Judge(demand, profiles, surrogates, threads)
    told = make_steps("twin.run", quiet=quiet)
    listed = None if prices is None else [prices[p.name] for p in profiles]
    extra: dict[str, Any] = {}
    ids = None
    if recorded is not None and objective == "gpus":
        from deltaworks.serving.change import change

        changed = change(judge, recorded, listed, told)
        placement, ids = changed.placement, changed.ids
        extra["moves"] = changed.moves
        extra["fresh_gpu_count"] = len(changed.fresh.gpus)
    elif objective == "latency":
        placement = place_on(judge, [0] * (gpus or 1), told)
    else:
        placement = place_fewest(judge, listed, told)
    wanted = {"objective": objective} if gpus is None else {"objective": objective, "gpus_given": gpus}
    document = describe(judge, placement, content, wanted, prices, ids) | extra
    if gpus is not None and (unused := gpus - len(placement.gpus)):
        document["notes"].append(
            f"{unused:,} of the {gpus:,} GPUs given {'is' if unused == 1 else 'are'} left out, because nothing that was"
            " tried with more GPUs has a lower p99 TTFT on the worst of them"
        )
    if recorded is not None:
        document["notes"] += [f"{idle} of the old placement serves nothing; it is dropped" for idle in recorded.idle]
        if headroom is None and recorded.headroom != _HEADROOM:
            document["notes"].append(f"the headroom of {recorded.headroom:.4g} is that of the old placement")
        if not slo and recorded.goals:
            kept = ", ".join(f"{goal.name}={goal.limit_ms:g}ms" for goal in recorded.goals)
            document["notes"].append(f"{kept} is kept from the old placement; --slo none drops it")
    document["notes"] += registered.notes(profiles[0].model)
    if compare:
        told("simpler ways")
        from deltaworks.serving.baselines import compare as compare_ways

        document["compared"] = compare_ways(judge, placement.gpus[0].kind, len(placement.gpus))
    if exact:
        document["exact"] = _exact(judge, len(placement.gpus))
    if what_if:
        from deltaworks.serving.what_if import what_if as answers

        document["what_if"] = answers(judge, placement, told)
    if output is not None:
        _write(output, document, {p.name: p for p in profiles}, content, folder, registered.paths)
    if as_json:
        print_json({k: v for k, v in document.items() if k not in ("workload", "profiles")})
    else:
        _placement(document, output)


def _required(
    headroom: str | None, slo: list[str] | None, recorded: "Recorded | None"
) -> "tuple[float, tuple[Goal, ...]]":
    """The headroom and the goals: as given, else those of an earlier placement, else a headroom of 10% and no goal."""
    from deltaworks.errors import PlacementError
    from deltaworks.serving.goals import parse_goals

    kept = (_HEADROOM, ()) if recorded is None else (recorded.headroom, recorded.goals)
    share = kept[0] if headroom is None else _share(headroom)
    if not slo:
        return share, kept[1]
    if set(slo) == {"none"}:
        return share, ()
    if "none" in slo:
        raise PlacementError("--slo none drops every limit; give it alone, or leave it out")
    return share, parse_goals(slo)


def _profiles(named: list[str] | None, recorded: "Recorded | None") -> "list[Profile]":
    from deltaworks.errors import PlacementError
    from deltaworks.serving.profile import check_one_model, find_profile

    if named:
        found = [find_profile(name) for name in named]
        twice = next((p.name for i, p in enumerate(found) if p.name in [q.name for q in found[:i]]), None)
        if twice is not None:
            raise PlacementError(f"two of the profiles are called {twice!r}; every type of GPU needs a name of its own")
        check_one_model(found)
        return found
    if recorded is None:
        raise PlacementError("give the type of GPU with --profile P")
    return list(recorded.profiles.values())


def _prices(given: list[str] | None, profiles: "list[Profile]", recorded: "Recorded | None") -> dict[str, float] | None:
    """Prices by the profile's name; a profile may be priced by its name or by the file that was given."""
    from deltaworks.errors import PlacementError, did_you_mean
    from deltaworks.serving.profile import find_profile

    if not given:
        return recorded.prices if recorded is not None else None
    names = [p.name for p in profiles]
    found: dict[str, float] = {}
    for text in given:
        name, mark, amount = text.rpartition("=")
        try:
            value = float(amount)
        except ValueError:
            value = -1.0
        if not mark or not 0 < value < float("inf"):
            raise PlacementError(f"--price {text!r}: write it like {names[0]}=2.5")
        known = name if name in names else find_profile(name).name if Path(name).is_file() else name
        if known not in names:
            raise PlacementError(f"--price {text!r}: no --profile is called {name!r}{did_you_mean(name, names)}")
        if known in found:
            raise PlacementError(f"--price gives two prices for {known}; give one")
        found[known] = value
    missing = [name for name in names if name not in found]
    if missing:
        raise PlacementError(f"{missing[0]} has no price; give one with --price {missing[0]}=2.5")
    return found


def _share(text: str) -> float:
    from deltaworks.errors import PlacementError, quoted
    from deltaworks.serving.judge import MAX_HEADROOM

    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_HEADROOM or (value > 1 and not text.endswith("%")):
        # Who writes 10 means 10%, not ten times the traffic more.
        raise PlacementError(f"--headroom {quoted(text)}: write a share like 10% or 0.1; shares above 1 need the %")
    return value


def _surrogates(catalog: Path | None) -> Path:
    from deltaworks.catalog.store import default_path

    return (catalog or default_path()) / "surrogates"


def _check_output(folder: Path, old: Path | None, *, force: bool) -> None:
    """Check an output folder: it is new, empty, or holds a placement that is to be replaced.

    Args:
        folder: It.
        old: The placement of ``--from``, whose own folder may be written to.
        force: Whether any placement may be replaced.
    """
    from deltaworks.documents import load_json
    from deltaworks.errors import OutputError
    from deltaworks.serving.document import FILE

    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / FILE).is_file():
        raise OutputError(f"{folder}: exists and is not a placement; choose another folder with -o")
    updated = old is not None and (old if old.is_dir() else old.parent).resolve() == folder.resolve()
    if updated or force:
        return
    try:
        held = load_json(folder / FILE, "a placement", OutputError)
        about = f" of {counted(held['adapter_count'], 'adapter')} on {counted(held['gpu_count'], 'GPU')}"
    except (OutputError, KeyError, TypeError, ValueError):
        about = ""  # a damaged one is somebody's as well
    raise OutputError(f"{folder}: holds a placement{about}; add --force to replace it, or choose another with -o")


def _write(
    folder: Path,
    document: dict[str, Any],
    profiles: "dict[str, Profile]",
    content: Any,
    origin: Path,
    paths: dict[str, str],
) -> None:
    import json

    from deltaworks.reports.placement import placement_page
    from deltaworks.serving import deploy
    from deltaworks.serving.document import FILE, with_traces

    generated = deploy.files(document, profiles, paths)
    document["workload"], traces = with_traces(content, origin, {*generated, "index.html", FILE})
    deploy.write(
        folder,
        {
            **generated,
            "index.html": placement_page(document),
            FILE: json.dumps(document, indent=1, ensure_ascii=False) + "\n",
        },
        traces,
    )


def _exact(judge: Any, found: int) -> dict[str, Any]:
    from deltaworks.errors import PlacementError

    try:
        from deltaworks.serving.exact import fewest_gpus
    except ImportError:
        raise PlacementError(
            "--exact needs OR-Tools; install it in a checkout of deltaworks with: pip install '.[exact]'"
        ) from None
    return {"gpus": fewest_gpus(judge, 0, found)}


def _headline(document: dict[str, Any]) -> str:
    """How many GPUs, whether fewer could do, and what the twin says of them."""
    count, given, untried = document["gpu_count"], document.get("gpus_given"), document["untried"]
    said = counted(count, "GPU") + ("" if given in (None, count) else f", of {given:,} given,")
    said += f" for {counted(document['adapter_count'], 'adapter')}"
    if document["gap"] is None:
        said += " (with the lowest p99 TTFT that was found)"
    elif len(untried) < count:
        least = f"at least {counted(document['lower_bound'], 'is', 'are')} needed"
        said += f" ({'as few as can be' if document['gap'] <= 0 else least})"
    said += f", price {document['price']:g}" if "price" in document else ""
    if len(untried) == count:
        said += "; NOT tried by the twin, because no request arrives"
    elif document["verified"] is False:
        said += "; NOT accepted by the twin"
    else:
        said += "; accepted by the twin"
        said += f" but for {listed(untried)}, where no request arrives to try" if untried else ""
    return f"{said}; {document['waits']}" if document["waits"] else said


def _placement(document: dict[str, Any], output: Path | None) -> None:
    count = document["gpu_count"]
    typer.echo(f"{_headline(document)}\n")
    head = f"{'gpu':<8}{'type':<26}{'adapters':>9}{'slots':>7}{'rank':>6}{'tokens/s':>10}{'TTFT p50':>11}{'p99':>10}"
    typer.echo(head + f"{'ITL':>10}")
    for gpu in document["gpus"]:
        said = gpu["predicted"]
        typer.echo(
            f"{gpu['id']:<8}{gpu['type']:<26}{len(gpu['adapters']):>9,}{gpu['max_loras']:>7}{gpu['max_lora_rank']:>6}"
            f"{said['throughput_tps']:>10,.0f}{format_time(said['ttft_ms']['p50']):>11}{format_time(said['ttft_ms']['p99']):>10}"
            f"{format_time(said['itl_ms']['mean']):>10}"
        )
    if "moves" in document:
        moves = document["moves"]
        new = sum(not move["from"] for move in moves)
        gone = sum(not move["to"] for move in moves)
        typer.echo(f"\n{_moved(len(moves) - new - gone, new, gone)}" + (":" if moves else ""))
        for move in moves[:20]:
            places = f"{', '.join(move['from']) or 'nowhere'} -> {', '.join(move['to']) or 'nowhere'}"
            typer.echo(f"  {move['adapter']:<24} {places:<24} {move['why']}")
        if len(moves) > 20:
            typer.echo(f"  and {len(moves) - 20} more; placement.json has them all")
        if document["fresh_gpu_count"] < count:
            typer.echo(f"placed anew, {document['fresh_gpu_count']} would do")
    if "compared" in document:
        _compared(document["compared"], count)
    if "exact" in document:
        proven = document["exact"]["gpus"]
        whole = "more with whole adapters" if proven is None else str(proven)
        typer.echo(f"\nproven fewest with whole adapters: {whole}")
    for answer in document.get("what_if", []):
        typer.echo(f"\nif {answer['question']}: {answer['answer']}", nl=False)
    if "what_if" in document:
        typer.echo("")
    for note in document["notes"]:
        typer.echo(f"\nnote: {note}")
    if output is not None:
        typer.echo(f"\nwritten to {output}: placement.json, index.html, serve.sh, compose.yaml, kubernetes.yaml, ...")


def _moved(moved: int, new: int, gone: int) -> str:
    """How many adapters move, are new, and are no longer served."""
    said = f"{counted(moved, 'adapter moves', 'adapters move')}, {counted(new, 'is', 'are')} new"
    return said + (f", {counted(gone, 'is', 'are')} no longer served" if gone else "")


def _compared(ways: dict[str, Any], ours: int) -> None:
    from deltaworks.reports.placement import FAILURES

    typer.echo(f"\n{'other ways':<28}{'GPUs':>6}")
    for name, row in ways.items():
        bad = [f"{row[key]} {label}" for key, label in FAILURES.items() if row[key]]
        if row["gpus"] is None:
            bad = [f"some GPU starves, up to {counted(2 * ours, 'GPU')}"]
        gpus = "-" if row["gpus"] is None else str(row["gpus"])
        typer.echo(f"  {name:<26}{gpus:>6}{'  ' + ', '.join(bad) if bad else ''}")


def advise(
    *,
    profile: ProfileName,
    rank: Annotated[int, typer.Option("--rank", min=1, metavar="R", help="Rank of the adapters.")],
    rate: Annotated[float, typer.Option("--rate", metavar="r", help="Requests/s of each adapter.")],
    input_mean: Annotated[float, typer.Option(metavar="N", help="Mean prompt tokens.")] = 222.7,
    output_mean: Annotated[float, typer.Option(metavar="N", help="Mean output tokens.")] = 196.1,
    headroom: Annotated[str, typer.Option(metavar="SHARE", help="How much more traffic they must stand.")] = "10%",
    slo: Annotated[
        list[str] | None,
        typer.Option(metavar="GOAL", help="A latency to keep, like ttft_p99=2s.", show_default=False),
    ] = None,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say how many adapters of a rank and a rate fit on one GPU, with how many slots, and what they cost there."""
    del catalog  # every command takes it; this one needs nothing of it
    from deltaworks.cli.progress import make_counter
    from deltaworks.errors import PlacementError
    from deltaworks.serving.advice import alike, best_row, capacities, overheads
    from deltaworks.serving.document import PATIENCE_NOTE, assumed_note, headline_waits
    from deltaworks.serving.goals import parse_goals
    from deltaworks.serving.judge import SLOTS
    from deltaworks.serving.profile import find_profile

    chosen = find_profile(profile)
    lengths = {"distribution": "sharegpt", "input_mean": input_mean, "output_mean": output_mean}
    one = alike(rank, rate, lengths)
    goals = parse_goals(slo or ())
    with make_counter("numbers of slots", len(SLOTS), "twin.run", quiet=quiet) as done:
        rows = capacities(chosen, one, _share(headroom), goals, done)
    if not rows:
        raise PlacementError(
            f"{chosen.name} cannot serve even one adapter of rank {rank} at {rate:g} requests/s; a lower --rate, less"
            " --headroom or a looser --slo may do"
        )
    best = best_row(rows)
    costs = overheads(chosen, rank, best["slots"])
    waits = headline_waits([{"ttft_ms": {"p50": best["ttft_p50_ms"], "p99": best["ttft_p99_ms"]}}], goals)
    notes = ([PATIENCE_NOTE] if waits else []) + ([assumed_note(chosen)] if chosen.assumed else [])
    if as_json:
        print_json({
            "profile": chosen.name, "rank": rank, "rate": rate, "best": best, "waits": waits, "slots": rows,
            "overheads": costs, "notes": notes,
        })  # fmt: skip
        return
    at_least = "at least " if best["adapters_is_lower_bound"] else ""
    typer.echo(
        f"{chosen.name}: {at_least}{counted(best['adapters'], 'adapter')} of rank {rank} at {rate:g} requests/s"
        f" {'fits' if best['adapters'] == 1 and not at_least else 'fit'} on one GPU,"
        f" with --max-loras {best['slots']}{f'; {waits}' if waits else ''}\n"
    )
    typer.echo(f"{'slots':>6}{'adapters':>10}{'tokens/s':>10}{'TTFT p99':>11}{'ITL':>9}{'KV tokens':>11}")
    for row in rows:
        bar = "#" * max(round(40 * row["adapters"] / best["adapters"]), 1)
        typer.echo(
            f"{row['slots']:>6}{row['adapters']:>10,}{row['throughput_tps']:>10,.0f}{format_time(row['ttft_p99_ms']):>11}"
            f"{format_time(row['itl_mean_ms']):>9}{row['kv_tokens']:>11,}  {bar}{' <- most' if row is best else ''}"
        )
    typer.echo("\nwhat adapters cost there")
    for name, sentence in costs.items():
        typer.echo(f"  {name:<11}{sentence}")
    for note in notes:
        typer.echo(f"\nnote: {note}")
