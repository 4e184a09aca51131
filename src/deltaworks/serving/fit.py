"""Fit a profile from measurement tables; `docs/profiles.md` describes them."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import nnls

from deltaworks.errors import ProfileError, WorkloadError
from deltaworks.serving.calibrate import SPREAD, Known, Run, calibrate
from deltaworks.serving.profile import (
    FrontEnd,
    KvCache,
    LoadTime,
    Profile,
    SchedulerTime,
    StepTime,
    parse_profile,
)  # fmt: skip
from deltaworks.serving.schema import check_keys, number, whole
from deltaworks.serving.server import F64
from deltaworks.serving.simulate import Configuration
from deltaworks.serving.workload import workload_from

ABOUT = ("name", "engine", "model", "gpu", "server", "front_end", "least_kv_tokens", "graph_tokens", "small_tokens",
         "output_share", "calibrate", "sources")  # fmt: skip
"""Keys of a folder's `about.yaml`."""

TABLES = {
    "steps": ("step_ms", "decode", "prefill", "context", "adapters", "slots", "max_rank", "skipped"),
    "kv_cache": ("slots", "max_rank", "kv_tokens"),
    "scheduler": ("scheduler_ms", "running", "skipped"),
    "loads": ("load_ms", "source", "rank"),
    "first_tokens": ("ttft_ms", "prefill", "adapters", "slots", "max_rank"),
}
"""The tables of a folder, and their columns; others are ignored."""

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
    about = _about(folder)
    tables = {name: _table(folder, name, columns) for name, columns in TABLES.items()}
    for name in ("steps", "kv_cache"):
        if not tables[name]:
            raise ProfileError(f"{folder}: there is no {name}.csv (or .jsonl) in it; a profile needs one")
    sizes = {
        name: whole(about.get(name, getattr(StepTime, name)), f"{folder}: {name}")
        for name in ("graph_tokens", "small_tokens")
    }
    residuals: dict[str, Any] = {}
    scheduler = _scheduler(tables["scheduler"], residuals)
    step, request_ms = _steps(tables["steps"], tables["first_tokens"], sizes, scheduler, residuals)
    front = check_keys(about.get("front_end", {}), list(FrontEnd.__annotations__), f"{folder}: front_end")
    given = {k: about[k] for k in ("name", "engine", "model", "gpu", "output_share") if k in about}
    profile = parse_profile(
        {
            "schema": 1,
            **given,
            "server": about.get("server", {}),
            "front_end": {"request": request_ms, **front},
            "kv_cache": vars(_kv_cache(tables["kv_cache"], about, folder, residuals)),
            "step": vars(step),
            "scheduler": vars(scheduler),
            "loading": vars(_loads(tables["loads"], residuals)),
            "sources": dict(about.get("sources", {})),
        },
        str(folder),
    )
    runs = _runs(folder)
    scales = {n: number(v, f"{folder}: calibrate.{n}", above=True) for n, v in about.get("calibrate", {}).items()}
    if runs and scales:
        try:
            profile = calibrate(profile, runs, scales, progress=progress, known=known)
        except AttributeError as error:
            raise ProfileError(f"{folder}: about.yaml: calibrate: there is no such cost: {error}") from None
        residuals["calibrated"] = {"runs": len(runs), "costs": list(scales)}
    return rounded(replace(profile, residuals=residuals))


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
    path = folder / "about.yaml"
    try:
        return check_keys(yaml.safe_load(path.read_text(encoding="utf-8")), ABOUT, str(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"{path}: cannot be read; it names the engine, model and GPU: {error}") from None
    except WorkloadError as error:
        raise ProfileError(str(error)) from None


def _table(folder: Path, name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a table, numbers as floats, missing columns as 0; none where there is no such file."""
    path = next((p for p in (folder / f"{name}.csv", folder / f"{name}.jsonl") if p.is_file()), None)
    if path is None:
        return []
    try:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                raw: list[dict[str, Any]] = list(csv.DictReader(file))
        else:
            raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ProfileError(f"{path}: cannot be read: {error}") from None
    rows = []
    for index, row in enumerate(raw, 1):
        try:
            rows.append({c: row.get(c) if c == "source" else float(row.get(c) or "nan") if c == columns[-1] and
                         name == "kv_cache" else float(row.get(c) or 0.0) for c in columns})  # fmt: skip
        except (TypeError, ValueError, AttributeError) as error:
            raise ProfileError(f"{path}: row {index}: {error}") from None
    if raw and columns[0] not in raw[0]:
        raise ProfileError(f"{path}: there is no column {columns[0]!r}; expected are {', '.join(columns)}")
    return rows


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


def _steps(
    steps: list[dict[str, Any]], first: list[dict[str, Any]], sizes: dict[str, int], scheduler: SchedulerTime,
    residuals: dict[str, Any],
) -> tuple[StepTime, float]:  # fmt: skip
    """The model's time in a step; from first tokens of single requests also what the front end adds."""
    rows = [{**r, "first": 0.0} for r in steps]
    rows += [{**dict.fromkeys(TABLES["steps"], 0.0), **r, "step_ms": r["ttft_ms"], "first": 1.0} for r in first]
    present = [n for n in STEP_TERMS if any(STEP_TERMS[n]({**r, **sizes}) for r in rows)]
    spent = [scheduler.step + scheduler.running * r["decode"] + scheduler.skipped * r["skipped"] for r in rows]
    measured = np.array([r["step_ms"] for r in rows]) - np.array(spent)
    if (measured <= 0).any():
        raise ProfileError("steps: every step must take longer than its scheduling")
    fits = []
    for names in (_independent(present, rows, sizes), present):
        terms = np.array([[*(STEP_TERMS[n]({**r, **sizes}) for n in names), r["first"]] for r in rows])
        fits.append((names, *relative_fit(terms, measured)))
    # Costs are at least 0, so fewer terms may fit worse even if the rows do not tell them apart.
    names, found, error = fits[0] if fits[0][2] <= 1.1 * fits[1][2] + 1e-9 else fits[1]
    residuals["step"] = {"rows": len(rows), "mean_relative_error": error}
    return StepTime(**sizes, **dict(zip(names, found.tolist(), strict=False))), float(found[-1])


def _independent(names: list[str], rows: list[dict[str, Any]], sizes: dict[str, int]) -> list[str]:
    """The terms that the rows tell apart; of those that they do not, the first."""
    kept: list[str] = []
    for name in names:
        terms = np.array([[STEP_TERMS[n]({**r, **sizes}) for n in [*kept, name]] for r in rows])
        if np.linalg.matrix_rank(terms / np.linalg.norm(terms, axis=0), tol=1e-3 * len(rows) ** 0.5) > len(kept):
            kept.append(name)
    return kept


def _kv_cache(rows: list[dict[str, Any]], about: Mapping[str, Any], folder: Path, residuals: dict[str, Any]) -> KvCache:
    """KV tokens left: a plane over slots, and slots times rank."""
    started = [r for r in rows if r["kv_tokens"] > 0]
    if not started:
        raise ProfileError(f"{folder}: kv_cache: no row has kv_tokens")
    slots, ranks = (np.array([r[k] for r in started]) for k in ("slots", "max_rank"))
    tokens = np.array([r["kv_tokens"] for r in started])
    top = float(tokens.max()) * 1.5
    # What is left of a generous total is fitted, so that costs a slot stay nonnegative.
    terms = np.stack([np.ones_like(tokens), slots, slots * ranks], axis=1) / tokens[:, None]
    found, _ = nnls(terms, (top - tokens) / tokens)
    total, per_slot, per_slot_rank = top - found[0], found[1], found[2]
    fitted = total - slots * (per_slot + per_slot_rank * ranks)
    residuals["kv_cache"] = {
        "rows": len(started), "mean_relative_error": float(np.abs(fitted / tokens - 1).mean()),
        "failed": len(rows) - len(started),
    }  # fmt: skip
    least = whole(about.get("least_kv_tokens", 1), f"{folder}: least_kv_tokens", 1)
    return KvCache(float(total), float(per_slot), float(per_slot_rank), least)


def _scheduler(rows: list[dict[str, Any]], residuals: dict[str, Any]) -> SchedulerTime:
    if not rows:
        return SchedulerTime()
    terms = np.array([[1.0, r["running"], r["skipped"]] for r in rows])
    found, error = relative_fit(terms, np.array([r["scheduler_ms"] for r in rows]))
    residuals["scheduler"] = {"rows": len(rows), "mean_relative_error": error}
    return SchedulerTime(*map(float, found))


def _loads(rows: list[dict[str, Any]], residuals: dict[str, Any]) -> LoadTime:
    fits: dict[str, float] = {}
    for source, name in (("memory", "slot"), ("disk", "disk")):
        own = [r for r in rows if r["source"] == source]
        if own:
            terms = np.array([[1.0, r["rank"]] for r in own])
            found, error = relative_fit(terms, np.array([r["load_ms"] for r in own]))
            fits |= {name: float(found[0]), f"{name}_rank": float(found[1])}
            residuals[f"load_from_{source}"] = {"rows": len(own), "mean_relative_error": error}
    return LoadTime(**fits)


def _runs(folder: Path) -> list[Run]:
    """The recorded runs of a folder: one a line, as `--batch` takes them, with ``measured``."""
    path = folder / "runs.jsonl"
    if not path.is_file():
        return []
    runs = []
    for index, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}: line {index}"
        try:
            raw = json.loads(line)
            measured = check_keys(raw["measured"], list(SPREAD), f"{where}: measured")
            asked = Configuration(
                raw["slots"], raw.get("max_rank"), raw.get("served"), raw.get("client_max_outstanding")
            )  # fmt: skip
            runs.append(Run(workload_from(raw["workload"], folder, where), asked, dict(measured), line))
        except (json.JSONDecodeError, KeyError, TypeError, WorkloadError) as error:
            raise ProfileError(f"{where}: {error}") from None
    return runs
