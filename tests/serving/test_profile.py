"""Profiles: what files may say, and fits that find costs again."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaworks.errors import ProfileError, WorkloadError
from deltaworks.serving.calibrate import Run, calibrate
from deltaworks.serving.fit import STEP_TERMS, fit_profile
from deltaworks.serving.profile import (
    FrontEnd,
    KvCache,
    LoadTime,
    Profile,
    SchedulerTime,
    ServerFlags,
    StepTime,
    allowed_rank,
    built_in_profiles,
    find_profile,
    parse_profile,
    with_flags,
)  # fmt: skip
from deltaworks.serving.simulate import Configuration, simulate
from deltaworks.serving.workload import parse_workload

PROFILE = Profile(
    "p", "vLLM", "m", "g", KvCache(100_000, 50, 10, 2000),
    StepTime(12, 0.02, 0.03, 5e-5, 3, 128, lora=1, adapter=0.4, lora_decode=0.01, lora_prefill=0.02,
             decode_prefill=2e-5),
    ServerFlags(64, 512, 16), SchedulerTime(0.1, 0.002, 0.0003), LoadTime(5, 0.1, 40, 2), FrontEnd(4, 200, 0.02, 2, 32),
)  # fmt: skip


def test_a_profile_is_its_file() -> None:
    assert parse_profile(json.loads(json.dumps(PROFILE.to_json())), "p") == PROFILE


@pytest.mark.parametrize("name", built_in_profiles())
def test_built_in_profiles_are_sound(name: str) -> None:
    profile = find_profile(name)
    assert profile.name == name
    assert profile.step.base > 0
    assert set(profile.sources) >= {"kv_cache", "step", "loading", "front_end"}
    assert profile.residuals["step"]["mean_relative_error"] < 0.05


def test_kv_tokens_fall_with_slots_and_rank() -> None:
    assert PROFILE.kv_tokens(10, 8) == (100_000 - 10 * (50 + 80)) // 16 * 16
    assert PROFILE.kv_tokens(500, 64) < 0


def test_ranks_are_those_of_vllm() -> None:
    assert [allowed_rank(r) for r in (1, 8, 9, 33, 300)] == [8, 8, 16, 64, 320]
    with pytest.raises(WorkloadError, match="up to 512, not 513"):
        allowed_rank(513)


def test_other_flags() -> None:
    changed = with_flags(PROFILE, kv_tokens=640, block_size=32, max_num_seqs=None)
    assert changed.kv_tokens(999, 512) == 640
    assert changed.server == ServerFlags(64, 512, 32)
    with pytest.raises(ProfileError, match="max_num_seqs 600 is more than max_num_batched_tokens 512"):
        with_flags(PROFILE, max_num_seqs=600)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schema": 7}, "no profile of version 1"),
        ({"stpe": {}}, "unknown key 'stpe'; did you mean 'step'"),
        ({"step": {}}, "step.base: is missing"),
        ({"step": {"base": -1}}, "step.base: expected a number of at least 0"),
        ({"step": {"base": 1, "decodes": 2}}, "unknown key 'decodes'; did you mean 'decode'"),
        ({"server": {"max_num_seqs": 600, "max_num_batched_tokens": 512}}, "at most max_num_batched_tokens"),
        ({"gpu": ""}, "gpu: expected a text"),
    ],
)
def test_a_mistake_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        parse_profile(PROFILE.to_json() | changed, "p")


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no such profile; built in are llama"):
        find_profile("nothing")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(ProfileError, match="cannot be read as a profile"):
        find_profile(str(tmp_path / "p.json"))


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def tables(folder: Path, profile: Profile, **about: Any) -> None:
    """The tables that a server with exactly these costs would give."""
    rng = np.random.default_rng(0)
    steps = []
    for _ in range(200):
        row = {"decode": int(rng.integers(1, 200)), "prefill": int(rng.integers(0, 2) * rng.integers(1, 400)),
               "context": int(rng.integers(100, 9000)), "adapters": int(rng.integers(0, 2) * rng.integers(1, 30)),
               "slots": int(rng.choice([8, 32])), "max_rank": int(rng.choice([8, 16])), "skipped": 0}  # fmt: skip
        sizes = {"graph_tokens": profile.step.graph_tokens, "small_tokens": 0}
        model = sum(getattr(profile.step, n) * term({**row, **sizes}) for n, term in STEP_TERMS.items())
        row["step_ms"] = model + profile.scheduler.step + profile.scheduler.running * row["decode"]
        steps.append(row)
    write(folder, "steps", steps)
    write(folder, "kv_cache", [
        {"slots": s, "max_rank": r, "kv_tokens": max(profile.kv_cache.tokens - s * (50 + 10 * r), 0) or ""}
        for s in (1, 8, 64, 500) for r in (8, 16, 32)
    ])  # fmt: skip
    write(folder, "scheduler", [
        {"scheduler_ms": 0.1 + 0.002 * b + 0.0003 * w, "running": b, "skipped": w} for b in (1, 50) for w in (0, 9000)
    ])  # fmt: skip
    write(folder, "loads", [
        {"load_ms": (5 + 0.1 * r) if source == "memory" else (40 + 2 * r), "source": source, "rank": r}
        for source in ("memory", "disk") for r in (8, 32)
    ])  # fmt: skip
    given = {"name": "p", "engine": "vLLM", "model": "m", "gpu": "g", "graph_tokens": 128, "least_kv_tokens": 2000,
             "server": vars(profile.server), "front_end": vars(profile.front_end)}  # fmt: skip
    (folder / "about.yaml").write_text(json.dumps(given | about))


def test_tables_give_the_costs_back(tmp_path: Path) -> None:
    tables(tmp_path, PROFILE)
    fitted = fit_profile(tmp_path)
    assert fitted.kv_cache.tokens == pytest.approx(100_000)
    assert fitted.kv_cache.per_slot_rank == pytest.approx(10)
    assert vars(fitted.loading) == pytest.approx(vars(PROFILE.loading))
    assert vars(fitted.scheduler) == pytest.approx(vars(PROFILE.scheduler))
    for name in ("base", "decode", "prefill", "context", "decode_prefill", "eager", "adapter"):
        assert getattr(fitted.step, name) == pytest.approx(getattr(PROFILE.step, name), rel=1e-5), name
    assert fitted.residuals["step"]["mean_relative_error"] < 1e-9
    assert fitted.kv_tokens(8, 16) == (100_000 - 8 * (50 + 160)) // 16 * 16


WORKLOAD = {"duration": 120, "lengths": {"distribution": "fixed", "input_mean": 100, "output_mean": 60},
            "adapters": [{"count": 6, "rank": 8, "rate": 1.2}]}  # fmt: skip


def test_runs_move_the_costs_that_they_show(tmp_path: Path) -> None:
    true = replace(PROFILE, step=replace(PROFILE.step, adapter=0.8))
    asked = parse_workload(WORKLOAD, tmp_path)
    runs = []
    for slots in (2, 4, 6):
        answer = simulate(asked, true, Configuration(slots))
        runs.append(Run(asked, Configuration(slots), {"itl_ms": answer["itl_ms"]["mean"]}))
    found = calibrate(PROFILE, runs, {"step.adapter": 0.2}, rounds=5)
    assert found.step.adapter == pytest.approx(0.8, rel=0.02)
    lines = [{"workload": WORKLOAD, "slots": r.configuration.slots, "measured": r.measured} for r in runs]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables(tmp_path, PROFILE, calibrate={"step.adapter": 0.2})
    fitted = fit_profile(tmp_path)
    assert fitted.step.adapter == pytest.approx(0.8, rel=0.05)
    assert fitted.residuals["calibrated"]["runs"] == 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("about.yaml", None, "about.yaml: cannot be read; it names the engine"),
        ("about.yaml", '{"nmae": 1}', "unknown key 'nmae'; did you mean 'name'"),
        ("steps.csv", None, "there is no steps.csv"),
        ("steps.csv", "milliseconds,decode\n5,3\n", "there is no column 'step_ms'"),
        ("steps.csv", "step_ms,decode\nfive,3\n", "row 1: could not convert"),
        ("steps.csv", "step_ms,decode\n0,3\n", "every step must take longer"),
        ("kv_cache.csv", "slots,max_rank,kv_tokens\n5,8,\n", "no row has kv_tokens"),
        ("runs.jsonl", '{"slots": 2}\n', "line 1: 'measured'"),
        (
            "runs.jsonl",
            '{"slots": 2, "workload": {}, "measured": {"itl": 3}}\n',
            "unknown key 'itl'; did you mean 'itl_ms'",
        ),
    ],
)
def test_a_mistake_in_a_table_is_named(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    tables(tmp_path, PROFILE)
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(ProfileError, match=said):
        fit_profile(tmp_path)
