"""profile, simulate: what a server costs, and what it would do."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltaworks.cli.options import AsJson, CatalogPath, ProfileName, Quiet, ReplaceFile, Threads, print_json
from deltaworks.units import format_time
from deltaworks.wording import counted, listed

if TYPE_CHECKING:
    from deltaworks.serving.profile import Profile

_PROFILES = " [default: the profile's]"


def attach(app: typer.Typer) -> None:
    """Add the commands of this group."""
    app.command(rich_help_panel="Place")(simulate)
    app.command(rich_help_panel="Place")(profile)


def simulate(
    workload: Annotated[
        Path | None,
        typer.Argument(metavar="WORKLOAD", help="A YAML or JSON file: adapters, rates, lengths.", show_default=False),
    ] = None,
    *,
    profile: ProfileName,
    slots: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Adapter slots, vLLM's --max-loras.", show_default=False)
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="R",
            help="vLLM's --max-lora-rank: 1, 8, 16, 32, 64, 128, 256, 320 or 512. [default: the least that holds every"
            " adapter]",
            show_default=False,
        ),
    ] = None,
    served: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Adapters in host memory, vLLM's --max-cpu-loras; at least as many as slots. [default: all of the"
            " workload; vLLM's own default is as many as slots]",
            show_default=False,
        ),
    ] = None,
    client_max_outstanding: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Requests a load generator can have open; it drops the others.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Answer many: one {"id", "workload", "slots", "max_rank", "served", "client_max_outstanding"} a line'
            " (the last three optional), answered by one JSON line each; - reads standard input. --slots, --max-rank,"
            " --served and --client-max-outstanding are for lines that do not set them.",
            show_default=False,
        ),
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="KV tokens, where you know better than the profile.", show_default=False),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help=f"vLLM's --block-size.{_PROFILES}", show_default=False),
    ] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help=f"vLLM's --max-num-seqs.{_PROFILES}", show_default=False),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help=f"vLLM's --max-num-batched-tokens.{_PROFILES}", show_default=False),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help=f"Tokens of a prompt and its answer at most, vLLM's --max-model-len.{_PROFILES}",
            show_default=False,
        ),
    ] = None,
    scrape_period: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="S",
            help=f"Seconds between readings of /metrics, which stall the server; 0 for never.{_PROFILES}",
            show_default=False,
        ),
    ] = None,
    threads: Threads = None,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Say what a vLLM server would do with a workload of LoRA adapters: throughput, TTFT, ITL, who starves."""
    del catalog  # every command takes it; this one needs nothing of it
    from deltaworks.cli.progress import make_counter
    from deltaworks.errors import WorkloadError
    from deltaworks.serving.batch import LIMITS
    from deltaworks.serving.profile import find_profile, with_flags

    chosen = with_flags(
        find_profile(profile), kv_tokens=kv_tokens, block_size=block_size, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len,
        scrape_period_s=scrape_period,
    )  # fmt: skip
    if batch is not None:
        if workload is not None:
            raise WorkloadError("--batch names workloads in its lines; give no WORKLOAD")
        given = zip(LIMITS, (slots, max_rank, served, client_max_outstanding), strict=True)
        defaults = {key: value for key, value in given if value is not None}
        _batch(batch, chosen, threads, defaults, quiet=quiet)
        return
    if workload is None or slots is None:
        raise WorkloadError("give a WORKLOAD and --slots N, or --batch FILE.jsonl")
    from deltaworks.serving.document import assumed_note
    from deltaworks.serving.model_length import check_lengths
    from deltaworks.serving.simulate import Configuration
    from deltaworks.serving.simulate import simulate as run
    from deltaworks.serving.workload import read_workload

    asked = read_workload(workload)
    check_lengths(asked, [chosen])
    with make_counter("simulated", 1, "twin.run", quiet=quiet):
        answer = run(asked, chosen, Configuration(slots, max_rank, served, client_max_outstanding))
    answer["notes"] += [assumed_note(chosen)] if chosen.assumed else []
    if as_json:
        print_json(answer)
    else:
        _answer(answer, chosen.name, slots)


def _batch(path: Path, profile: "Profile", threads: int | None, defaults: dict[str, int], *, quiet: bool) -> None:
    """Answer a batch line by line as answers come."""
    from deltaworks.cli.progress import make_counter
    from deltaworks.documents import read_bytes
    from deltaworks.errors import WorkloadError
    from deltaworks.serving.batch import BATCH_BYTES, answer_lines, answer_text

    # A pipe is what a shell gives for <(...).
    piped = sys.stdin.buffer if str(path) == "-" else path.open("rb") if path.is_fifo() else None
    if piped is not None:
        content = piped.read(BATCH_BYTES + 1)
        if len(content) > BATCH_BYTES:
            raise WorkloadError(f"{path}: has more than {BATCH_BYTES:,} bytes, which is the most; give it in parts")
    else:
        content = read_bytes(path, "a batch", WorkloadError, BATCH_BYTES)
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    folder = Path() if str(path) == "-" else path.parent
    failed, total = 0, sum(bool(line.strip()) for line in lines)
    if not total:
        raise WorkloadError(f"{path}: there are no questions in it; write one JSON object a line")
    with make_counter("simulated", total, "twin.run", quiet=quiet) as done:
        for answer in answer_lines(lines, folder, profile, threads, defaults):
            sys.stdout.write(answer_text(answer) + "\n")
            failed += "error" in answer
            done(1)
    if failed:
        raise WorkloadError(
            f"{failed:,} of {counted(total, 'line')} could not be answered; each says why in its `error`"
        )


def _answer(answer: dict[str, Any], profile: str, slots: int) -> None:
    if answer["memory_error"]:
        typer.echo(f"{profile} with {counted(slots, 'slot')}: out of memory, the server does not start")
        return
    # Those with the most waiting requests first.
    starved = sorted(answer["starved_adapters"], key=lambda name: -answer["adapters"][name]["waiting"])
    server = f"{profile} with {counted(slots, 'slot')}, {answer['kv_tokens']:,} KV tokens"
    unjudged = answer["unjudged_adapters"]
    asked = sum(a["arrived"] > 0 for a in answer["adapters"].values())
    if starved:
        typer.echo(f"STARVED: {listed(starved)} ({len(starved):,} of {asked:,} that ask); {server}\n")
    elif unjudged:
        others = "" if len(unjudged) == asked else "; the others are not starved"
        typer.echo(
            f"CANNOT BE JUDGED: {listed(unjudged)} ({len(unjudged):,} of {asked:,} that ask), the run ends before any"
            f" of their requests is served; {server}{others}\n"
        )
    else:
        typer.echo(f"{server}: not starved\n")
    spreads = {"TTFT": answer["ttft_ms"], "ITL": answer["itl_ms"], "TPOT": answer["tpot_ms"]}
    through = f"{answer['throughput_tps']:,.0f} of {answer['offered_tps']:,.0f} tokens/s offered"
    split = f"input {answer['input_throughput_tps']:,.0f}, output {answer['output_throughput_tps']:,.0f}"
    rows = [
        ("throughput", f"{through} ({split})"),
        *((label, _spread(values)) for label, values in spreads.items()),
        ("requests", ", ".join(f"{count:,} {what}" for what, count in answer["requests"].items() if count)),
        ("running", f"{answer['running_mean']:.1f} on average; {answer['waiting_mean']:.1f} waiting"),
        (
            "events",
            f"{counted(answer['preemptions'], 'preemption')}, {counted(answer['adapter_loads'], 'adapter load')}",
        ),
    ]
    if answer["ttft_ms"] != answer["ttft_completed_ms"]:
        rows.insert(2, ("  completed", _spread(answer["ttft_completed_ms"])))
    rows += [("behind", _behind(name, answer["adapters"][name])) for name in starved[:5]]
    for label, value in rows:
        typer.echo(f"{label:<12}{value}")
    for note in answer["notes"]:
        typer.echo(f"\nnote: {note}")


def _behind(name: str, adapter: dict[str, Any]) -> str:
    """What an adapter got, and what of it waits."""
    said = f"{listed([name])} got {adapter['served_share']:.0%} of its tokens"
    if adapter["waiting"]:
        said += f"; {counted(adapter['waiting'], 'request waits', 'requests wait')}, the oldest for"
        said += f" {format_time(1000 * adapter['oldest_wait_s'])}"
    return said


def _spread(values: dict[str, float | None]) -> str:
    if values["mean"] is None:
        return "nobody was served"
    return "   ".join(f"{key} {format_time(value or 0.0)}" for key, value in values.items())


def profile(
    table: Annotated[
        Path,
        typer.Option("--table", metavar="DIR", help="A folder of measurement tables, see docs/profiles.md."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="P", help="Where to write the profile.")],
    force: ReplaceFile = False,
    catalog: CatalogPath = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Fit a profile of one engine, model and GPU from measurement tables."""
    import json

    from deltaworks.catalog.store import default_path
    from deltaworks.cli.progress import make_counter
    from deltaworks.outputs import check_apart, check_file, write_file
    from deltaworks.serving.fit import fit_profile

    tables = sorted(table.iterdir()) if table.is_dir() else ()
    check_apart(output, [("the catalog", catalog or default_path()), *(("the input", file) for file in tables)])
    check_file(output, "kv_cache", force=force)
    with make_counter("agreeing with recorded runs; runs of the twin", None, "twin.run", quiet=quiet) as done:
        fitted = fit_profile(table, done)
    write_file(output, json.dumps(fitted.to_json(), indent=2) + "\n")
    if as_json:
        print_json(fitted.to_json() | {"output": str(output)})
        return
    typer.echo(f"{fitted.name}: {fitted.model} on {fitted.gpu}, {fitted.engine}; written to {output}\n")
    for cost, found in fitted.residuals.items():
        if isinstance(found, dict) and "rows" in found:
            off = found.get("mean_relative_error")
            said = "   not checked: as many costs as rows" if off is None else f"{off:>9.1%} off on average"
            typer.echo(f"{cost:<20}{found['rows']:>5} {'row ' if found['rows'] == 1 else 'rows'}{said}")
    if unused := fitted.residuals.get("unused_columns"):
        typer.echo(f"\nnote: columns that are not used: {', '.join(unused)}")
    if files := fitted.residuals.get("unused_files"):
        typer.echo(f"\nnote: files that are not used: {', '.join(files)}")
    if fitted.assumed:
        typer.echo("\nNot determined by the tables, so assumed (mostly to be 0):")
    for reason in dict.fromkeys(fitted.assumed.values()):
        names = ", ".join(name for name, why in fitted.assumed.items() if why == reason)
        typer.echo(f"  {names}: {reason}")
