"""Fit a profile from measurement tables; `docs/profiles.md` describes them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from deltaworks.documents import load_yaml, read_text
from deltaworks.errors import ProfileError, WorkloadError
from deltaworks.serving import batch
from deltaworks.serving.arrays import F64
from deltaworks.serving.calibrate import SPREAD, Known, Run, calibrate
from deltaworks.serving.profile import (
    PARTS,
    FrontEnd,
    KvCache,
    LoadTime,
    Profile,
    SchedulerTime,
    StepTime,
    parse_profile,
)  # fmt: skip
from deltaworks.serving.schema import check_keys, number, whole
from deltaworks.serving.simulate import MOST, Configuration
from deltaworks.serving.tables import ABOUT_FILE, RUNS_FILE, TABLES, Table, read_table, unknown_files
from deltaworks.serving.workload import workload_from

ABOUT = ("name", "engine", "model", "gpu", "server", "front_end", "least_kv_tokens", "graph_tokens", "small_tokens",
         "output_share", "calibrate", "sources")  # fmt: skip
"""Keys of a folder's `about.yaml`."""

_ZERO = 1e-9

STEP_TERMS: dict[str, Callable[[Mapping[str, float]], float]] = {
    "base": lambda _: 1.0,
    "decode": lambda r: r["decode"],
    "prefill": lambda r: r["prefill"],
    "context": lambda r: r["context"],
    "decode_prefill": lambda r: r["decode"] * r["prefill"],
    "eager": lambda r: float(r["decode"] + r["prefill"] > r["graph_tokens"]),
    "adapter": lambda r: r["adapters"],
    "slot_token": lambda r: (r["adapters"] > 0) * r["slots"] * (r["decode"] + r["prefill"]),
    "lora": lambda r: float(r["adapters"] > 0),
    "slot": lambda r: (r["adapters"] > 0) * r["slots"],
    "slot_rank": lambda r: (r["adapters"] > 0) * r["slots"] * r["max_rank"],
    "adapter_rank": lambda r: r["adapters"] * r["max_rank"],
    "lora_decode": lambda r: (r["adapters"] > 0) * r["decode"],
    "lora_decode_rank": lambda r: (r["adapters"] > 0) * r["decode"] * r["max_rank"],
    "lora_prefill": lambda r: (r["adapters"] > 0) * r["prefill"],
    "lora_prefill_rank": lambda r: (r["adapters"] > 0) * r["prefill"] * r["max_rank"],
    "adapter_token": lambda r: r["adapters"] * (r["decode"] + r["prefill"]),
    "small_slot": lambda r: (r["adapters"] > 0) * (r["decode"] + r["prefill"] < r["small_tokens"]) * r["slots"],
    "small_adapter": lambda r: (r["decode"] + r["prefill"] < r["small_tokens"]) * r["adapters"],
}
"""What each cost of a step is multiplied by.

Of costs that the rows cannot tell apart the first is fitted: vLLM launches its LoRA kernels for every slot, over all
tokens.
"""


def fit_profile(folder: Path, progress: Callable[[int], None] | None = None, known: Known | None = None) -> Profile:
    """Fit a profile from a folder of tables.

    Every cost is a nonnegative least-squares fit of relative errors (Lawson and Hanson, "Solving Least Squares
    Problems", 1974). Recorded runs, where there are some, then move the costs that `about.yaml` names.

    Args:
        folder: With `about.yaml`, `steps.csv`, `kv_cache.csv` and more, see `docs/profiles.md`.
        progress: Told how many more runs of the twin are done.
        known: What earlier calibrations computed, see `calibrate`.

    Raises:
        ProfileError: a table is missing or malformed (the row is named), or determines nothing.
    """
    try:
        return _fit(folder, progress, known)
    except WorkloadError as error:  # of a key or a recorded workload
        raise ProfileError(str(error)) from None


def _fit(folder: Path, progress: Callable[[int], None] | None, known: Known | None) -> Profile:
    about = _about(folder)
    tables = {name: read_table(folder, name) for name in TABLES}
    for name in ("steps", "kv_cache"):
        if not tables[name].rows and tables[name].file is not None:
            raise ProfileError(f"{tables[name].file}: there are no rows in it; a profile needs some")
        if not tables[name].rows:
            raise ProfileError(f"{folder}: there is no {name}.csv (or .jsonl) in it; a profile needs one")
    sizes = {
        name: whole(about.get(name, getattr(StepTime, name)), f"{folder / ABOUT_FILE}: {name}")
        for name in ("graph_tokens", "small_tokens")
    }
    report = _Report()
    if unused := {f"{name}.{column}": None for name, table in tables.items() for column in table.unused}:
        report.residuals["unused_columns"] = list(unused)
    recorded = folder / RUNS_FILE
    named = read_text(recorded, "recorded runs", ProfileError) if recorded.is_file() else ""
    if files := unknown_files(folder, named):
        report.residuals["unused_files"] = files
    scheduler = _scheduler(tables["scheduler"], report)
    step, request_ms = _steps(tables["steps"], tables["first_tokens"], sizes, scheduler, report)
    front = check_keys(about.get("front_end", {}), list(FrontEnd.__annotations__), f"{folder / ABOUT_FILE}: front_end")
    for name in front:
        report.assumed.pop(f"front_end.{name}", None)
    given = {k: about[k] for k in ("name", "engine", "model", "gpu", "output_share") if k in about}
    profile = parse_profile(
        {
            "schema": 1,
            **given,
            "server": about.get("server", {}),
            "front_end": {"request": request_ms, **front},
            "kv_cache": vars(_kv_cache(tables["kv_cache"], about, folder, report)),
            "step": vars(step),
            "scheduler": vars(scheduler),
            "loading": vars(_loads(tables["loads"], report)),
            "sources": about.get("sources", {}),
        },
        str(folder / ABOUT_FILE),
    )
    runs = _runs(folder)
    scales = _scales(about, str(folder / ABOUT_FILE))
    if runs and scales:
        profile = calibrate(profile, runs, scales, progress=progress, known=known)
        report.residuals["calibrated"] = {"runs": len(runs), "costs": list(scales)}
        for name in scales:
            report.assumed.pop(name, None)
    return rounded(replace(profile, residuals=report.residuals, assumed=report.assumed))


@dataclass
class _Report:
    """What is said of a fit.

    Attributes:
        residuals: How far measurements are from it, by cost.
        assumed: Costs that the tables do not determine, and why; they are taken to be 0, or split among those that
            only occur together.
    """

    residuals: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)

    def assume(self, cost: str, why: str) -> None:
        """Note a cost that is not determined."""
        self.assumed[cost] = why


def rounded(profile: Profile) -> Profile:
    """A profile with six digits of every fitted number, and none of what is left of a zero."""
    parts = {}
    for name in ("kv_cache", "step", "scheduler", "loading", "front_end"):
        part = getattr(profile, name)
        fitted = {key: value for key, value in vars(part).items() if isinstance(value, float)}
        parts[name] = replace(
            part, **{key: float(f"{value:.6g}") if value > _ZERO else 0.0 for key, value in fitted.items()}
        )
    return replace(profile, **parts)


def _about(folder: Path) -> Mapping[str, Any]:
    path = folder / ABOUT_FILE
    if not path.is_file():
        raise ProfileError(f"{path}: does not exist; it must name the engine, model and GPU")
    return check_keys(load_yaml(path, "what names the engine, model and GPU", ProfileError), ABOUT, str(path))


def _scales(about: Mapping[str, Any], where: str) -> dict[str, float]:
    """The costs that recorded runs may move, and natural moves."""
    known = [f"{name}.{key}" for name, kind in PARTS.items() for key, of in kind.__annotations__.items() if of is float]
    raw = check_keys(about.get("calibrate", {}), known, f"{where}: calibrate")
    return {name: number(value, f"{where}: calibrate.{name}", above=True) for name, value in raw.items()}


def relative_fit(terms: F64, measured: F64) -> tuple[F64, float]:
    """Nonnegative coefficients that minimise the squared relative errors, and the mean absolute one.

    Args:
        terms: (rows, terms) float64.
        measured: (rows,) float64, positive.
    """
    weighted = terms / measured[:, None]
    scale = np.linalg.norm(weighted, axis=0)
    scale[scale == 0] = 1.0
    found, _ = nnls(weighted / scale, np.ones(measured.size))
    coefficients = np.asarray(found / scale)
    return coefficients, float(np.abs(weighted @ coefficients - 1).mean())


def _fitted(names: Sequence[str], terms: F64, measured: F64, found: dict[str, Any]) -> dict[str, float]:
    """Fit the costs that the rows determine, and say which they do not.

    Args:
        names: Of the costs, those first that are to be kept where the rows do not tell two apart.
        terms: What each cost is multiplied by, (rows, costs) float64.
        measured: (rows,) float64, positive.
        found: Out: what `residuals` say of the fit.
    """
    kept = independent(terms)
    coefficients, error = relative_fit(terms[:, kept], measured)
    found |= checked(measured.size, len(kept), error)
    return {names[i]: float(c) for i, c in zip(kept, coefficients, strict=True)}


def checked(rows: int, costs: int, error: float) -> dict[str, Any]:
    """What `residuals` say of a fit: how far off it is, unless it has as many costs as rows, which proves nothing."""
    return {"rows": rows, "costs": costs} | ({"mean_relative_error": error} if rows > costs else {})


def independent(terms: F64) -> list[int]:
    """The columns of a design that its rows tell apart; of those that they do not, the first.

    Args:
        terms: (rows, columns) float64.
    """
    kept: list[int] = []
    for column in range(terms.shape[1]):
        chosen = terms[:, [*kept, column]]
        sizes = np.linalg.norm(chosen, axis=0)
        if sizes[-1] and np.linalg.matrix_rank(chosen / sizes, tol=1e-3 * terms.shape[0] ** 0.5) > len(kept):
            kept.append(column)
    return kept


def _steps(
    steps: Table, first: Table, sizes: dict[str, int], scheduler: SchedulerTime, report: _Report
) -> tuple[StepTime, float]:
    """The model's time in a step; from first tokens of single requests also what the front end adds."""
    rows = [{**r, "first": 0.0} for r in steps.rows]
    rows += [{**dict.fromkeys(TABLES["steps"], 0.0), **r, "step_ms": r["ttft_ms"], "first": 1.0} for r in first.rows]
    names = list(STEP_TERMS)
    design = np.array([[STEP_TERMS[n]({**r, **sizes}) for n in names] for r in rows])
    present = [i for i in range(len(names)) if design[:, i].any()]
    spent = [scheduler.step + scheduler.running * r["decode"] + scheduler.skipped * r["skipped"] for r in rows]
    measured = np.array([r["step_ms"] for r in rows]) - np.array(spent)
    if (measured <= 0).any():
        place = int(np.argmax(measured <= 0))
        table, row = (steps, place) if place < len(steps.rows) else (first, place - len(steps.rows))
        raise ProfileError(
            f"{table.file}: row {row + 1}: every step must take longer than its scheduling, {spent[place]:g} ms"
        )
    apart = [present[i] for i in independent(design[:, present])]
    if names.index("decode") not in apart:
        raise ProfileError(
            f"{steps.file}: its rows do not determine what a decoding request costs"
            f"{_constant(steps.rows, ('decode',))}; add steps with other numbers of them"
        )
    added = np.array([r["first"] for r in rows])[:, None]
    fits = [
        (chosen, *relative_fit(np.ascontiguousarray(np.hstack([design[:, chosen], added])), measured))
        for chosen in (apart, present)
    ]
    # Costs are at least 0, so fewer terms may fit worse even if the rows do not tell them apart.
    chosen, found, error = fits[0] if fits[0][2] <= 1.1 * fits[1][2] + 1e-9 else fits[1]
    report.residuals["step"] = checked(len(rows), len(apart) + bool(first.rows), error)
    for i, name in enumerate(names):
        if i not in apart and not _needless(name, sizes):
            report.assume(f"step.{name}", _unknown(name, steps, i in present))
    if not first.rows:
        report.assume("front_end.request", first.why_missing("ttft_ms") or "first_tokens has no rows")
    costs: dict[str, Any] = {names[i]: float(c) for i, c in zip(chosen, found, strict=False)}
    return StepTime(**sizes, **costs), float(found[-1])


def _needless(name: str, sizes: Mapping[str, int]) -> bool:
    """Whether a cost arises only beyond a size that nobody gave."""
    return (name == "eager" and sizes["graph_tokens"] == StepTime.graph_tokens) or (
        name.startswith("small_") and not sizes["small_tokens"]
    )


def _unknown(name: str, steps: Table, is_present: bool) -> str:
    """Why the steps do not determine a cost."""
    column = {"adapter": "adapters", "slot": "slots"}.get(name, name)
    if reason := steps.why_missing(column) if column in TABLES["steps"] else "":
        return reason
    if not is_present:
        return "no step shows it"
    shown = [r for r in steps.rows if r["adapters"] > 0] or steps.rows
    return f"the steps do not tell it from other costs{_constant(shown, ('slots', 'max_rank', 'adapters'))}"


def _constant(rows: Sequence[Mapping[str, float]], columns: Sequence[str]) -> str:
    """What is the same in every row, as the end of a sentence."""
    same = [c for c in columns if len({r[c] for r in rows}) == 1]
    return f": {' and '.join(f'{c} is {rows[0][c]:g}' for c in same)} in every row" if same else ""


def _kv_cache(table: Table, about: Mapping[str, Any], folder: Path, report: _Report) -> KvCache:
    """KV tokens left: a plane over slots, and slots times rank."""
    started = [r for r in table.rows if r["kv_tokens"] > 0]
    if not started:
        raise ProfileError(f"{folder}: kv_cache: no row has kv_tokens")
    slots, ranks, tokens = (np.array([r[k] for r in started]) for k in ("slots", "max_rank", "kv_tokens"))
    terms = np.stack([np.ones_like(tokens), slots, slots * ranks], axis=1)
    kept = independent(terms)
    if len(kept) == 1:
        raise ProfileError(
            f"{table.file}: its rows do not determine how many KV tokens a slot takes"
            f"{_constant(started, ('slots', 'max_rank'))}; add what vLLM logs with another --max-loras"
        )
    if len(kept) == 2:
        # Memory for adapters is a matter of slots times rank: that explains the difference, if it can.
        kept = [0, 2] if len(independent(terms[:, [0, 2]])) == 2 else [0, 1]
        name = "per_slot" if kept[1] == 2 else "per_slot_rank"
        same = _constant(started, ("slots", "max_rank"))
        report.assume(f"kv_cache.{name}", f"the rows do not tell it from other costs{same}")
    # What is left of a generous total is fitted, so that costs a slot stay nonnegative.
    top = float(tokens.max()) * 1.5
    while True:
        found, _ = nnls(terms[:, kept] / tokens[:, None], (top - tokens) / tokens)
        if found[0] > 0 or top > 1e3 * tokens.max():
            break
        top *= 4.0
    total = top - found[0]
    per_slot, per_slot_rank = (float(found[kept.index(i)]) if i in kept else 0.0 for i in (1, 2))
    fitted = total - slots * (per_slot + per_slot_rank * ranks)
    error = float(np.abs(fitted / tokens - 1).mean())
    report.residuals["kv_cache"] = checked(len(started), len(kept), error) | {"failed": len(table.rows) - len(started)}
    least = whole(about.get("least_kv_tokens", 1), f"{folder / ABOUT_FILE}: least_kv_tokens", 1)
    if least > tokens.max():
        raise ProfileError(
            f"{folder / ABOUT_FILE}: least_kv_tokens is {least:,}, and {table.file} has servers that started with fewer"
        )
    return KvCache(float(total), per_slot, per_slot_rank, least)


def _scheduler(table: Table, report: _Report) -> SchedulerTime:
    names = ("step", "running", "skipped")
    found: dict[str, float] = {}
    if table.rows:
        terms = np.array([[1.0, r["running"], r["skipped"]] for r in table.rows])
        measured = np.array([r["scheduler_ms"] for r in table.rows])
        if not measured.all():
            raise ProfileError(f"{table.file}: scheduler_ms must be above 0 in every row")
        found = _fitted(names, terms, measured, report.residuals.setdefault("scheduler", {}))
    for name in names:
        if name not in found:
            why = table.why_missing({"step": "scheduler_ms"}.get(name, name))
            report.assume(f"scheduler.{name}", why or "the rows do not determine it")
    return SchedulerTime(**found)


def _loads(table: Table, report: _Report) -> LoadTime:
    fits: dict[str, float] = {}
    for source, name in (("memory", "slot"), ("disk", "disk")):
        own = [r for r in table.rows if r["source"] == source]
        names = (name, f"{name}_rank")
        if own:
            terms = np.array([[1.0, r["rank"]] for r in own])
            measured = np.array([r["load_ms"] for r in own])
            if not measured.all():
                raise ProfileError(f"{table.file}: load_ms must be above 0 in every row")
            fits |= _fitted(names, terms, measured, report.residuals.setdefault(f"load_from_{source}", {}))
        for cost in names:
            if cost not in fits:
                missing = table.why_missing("load_ms")
                reason = f"every row from {source} has the same rank" if own else f"no row is from {source}"
                report.assume(f"loading.{cost}", missing or reason)
    return LoadTime(**fits)


def _runs(folder: Path) -> list[Run]:
    """The recorded runs of a folder: one a line, as `--batch` takes them, with ``measured``."""
    path = folder / RUNS_FILE
    if not path.is_file():
        return []
    runs = []
    text = read_text(path, "recorded runs", ProfileError)
    for index, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {index}"
        try:
            runs.append(replace(_run(line, folder, where), key=line))
        except WorkloadError as error:
            raise ProfileError(str(error)) from None
    return runs


def _run(line: str, folder: Path, where: str) -> Run:
    """A recorded run.

    Raises:
        WorkloadError: the line is not one; ``where`` is named.
    """
    raw = check_keys(batch.parse_line(line, where), (*batch.KEYS, "measured"), where)
    for key in ("measured", "workload", "slots"):
        if key not in raw:
            raise WorkloadError(f"{where}: {key!r} is missing")
    measured = {
        name: number(value, f"{where}: measured.{name}", above=True)
        for name, value in check_keys(raw["measured"], list(SPREAD), f"{where}: measured").items()
    }
    limits = {key: raw[key] for key in batch.LIMITS if raw.get(key) is not None}
    asked = Configuration(**{key: whole(value, f"{where}: {key}", 1, MOST) for key, value in limits.items()})
    return Run(workload_from(raw["workload"], folder, where), asked, measured)
