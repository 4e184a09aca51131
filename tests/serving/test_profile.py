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
from deltaworks.serving.tables import TABLES, _meant
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


def test_built_in_profiles_know_the_length_of_their_model() -> None:
    lengths = {name: find_profile(name).server.max_model_len for name in built_in_profiles()}
    assert lengths == {"llama-3.1-8b-h100-64gb": 131072, "qwen-2.5-7b-h100-64gb": 32768, "tiny-llama-cpu": 1024}


def test_a_length_changes_no_surrogate() -> None:
    limited = replace(PROFILE, server=replace(PROFILE.server, max_model_len=1500))
    assert limited.digest == PROFILE.digest != with_flags(PROFILE, block_size=32).digest


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
    for flags, said in (
        ({"max_num_seqs": 600}, "max_num_seqs 600 is more than max_num_batched_tokens 512"),
        ({"max_num_seqs": 10**12}, "max_num_seqs: expected a number of at most 131,072"),
        ({"block_size": 0}, "block_size: expected a number of at least 1"),
        ({"kv_tokens": 10**30}, "kv_tokens: expected a number of at most"),
        ({"scrape_period_s": float("nan")}, "scrape_period_s: expected a number of at least 0, not nan"),
        ({"scrape_period_s": float("inf")}, "scrape_period_s: expected a number of at most"),
        ({"scrape_period_s": 1e-9}, "scrape_period_s: expected 0 for never, or at least 0.01 s"),
    ):
        with pytest.raises(ProfileError, match=said):
            with_flags(PROFILE, **flags)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schema": 7}, "not a profile of version 1"),
        ({"stpe": {}}, "unknown key 'stpe'; did you mean 'step'"),
        ({"step": {}}, "step.base: is missing"),
        ({"step": {"base": -1}}, "step.base: expected a number of at least 0"),
        ({"step": {"base": 1, "decodes": 2}}, "unknown key 'decodes'; did you mean 'decode'"),
        ({"server": {"max_num_seqs": 600, "max_num_batched_tokens": 512}}, "at most max_num_batched_tokens"),
        ({"gpu": ""}, "gpu: expected a text"),
        ({"residuals": []}, "residuals: expected keys and values"),
        ({"sources": 5}, "sources: expected keys and values"),
        ({"assumed": "x"}, "assumed: expected keys and values"),
        ({"output_share": float("nan")}, "output_share: expected a number"),
        ({"output_share": 1e15}, "output_share: expected a number of at most 100"),
        ({"step": {"base": float("inf")}}, "step.base: expected a number of at most"),
        ({"step": {"base": 10**400}}, "step.base: expected a number of at most"),
        ({"server": {"block_size": 10**12}}, "block_size: expected a number of at most 65,536"),
        ({"front_end": {"scrape_period_s": 1e-300}}, "scrape_period_s: expected 0 for never, or at least 0.01 s"),
        ({"server": {"block_size": 10}}, "server: block_size 10 is not one that vLLM takes"),
        ({"server": {"max_model_len": 0}}, "server: max_model_len must be at least 1"),
        ({"server": {"max_model_len": 1.5}}, "server.max_model_len: expected a whole number"),
        ({"server": {"max_num_seqs": None}}, "server.max_num_seqs: expected a number"),
    ],
)
def test_a_mistake_is_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        parse_profile(PROFILE.to_json() | changed, "p")


def test_a_profile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"unknown profile .*; built-in profiles are llama"):
        find_profile("nothing")
    (tmp_path / "p.json").write_text("{")
    for text in ("{", '{"name": 1, "name": 2}', 5000 * "[", '{"step": ' + 5000 * "9" + "}", "[NaN]", "\ufeff"):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(ProfileError, match=r"p.json: cannot be read as a profile"):
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
               "context": int(rng.integers(100, 9000)), "adapters": int(rng.integers(0, 2) * rng.integers(1, 9)),
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
    done: list[int] = []
    known: dict[tuple[str, str], list[float]] = {}
    kept = [replace(run, key=str(i)) for i, run in enumerate(runs)]
    again = calibrate(PROFILE, kept, {"step.adapter": 0.2}, rounds=5, progress=done.append, known=known)
    assert again == found
    before = len(known)
    assert calibrate(PROFILE, kept, {"step.adapter": 0.2}, rounds=5, known=known) == found
    assert len(known) == before <= sum(done)
    shorter = replace(PROFILE, server=replace(PROFILE.server, max_model_len=500))
    calibrate(shorter, kept[:1], {}, passes=0, known=known)
    assert len(known) == before + 1, "the length of the model changes what the twin answers"
    lines = [{"workload": WORKLOAD, "slots": r.configuration.slots, "measured": r.measured} for r in runs]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables(tmp_path, PROFILE, calibrate={"step.adapter": 0.2})
    fitted = fit_profile(tmp_path)
    assert fitted.step.adapter == pytest.approx(0.8, rel=0.05)
    assert fitted.residuals["calibrated"]["runs"] == 3


STEPS = "step_ms,decode,prefill,context,adapters,slots,max_rank\n"


@pytest.mark.parametrize(
    ("name", "text", "assumed"),
    [
        (
            "steps",
            STEPS + "20,10,0,900,1,9,16\n25,20,0,95,2,9,16\n33,20,90,980,4,9,16\n40,64,0,900,6,9,16\n50,80,0,1,9,9,16",
            {"step.slot": "do not tell it from other costs: slots is 9 and max_rank is 16 in every row"},
        ),
        (
            "steps",
            "step_ms,decode\n10,1\n11,5\n13,9\n",
            {"step.context": "steps.csv has no column 'context'", "step.adapter": "has no column 'adapters'"},
        ),
        ("kv_cache", "slots,max_rank,kv_tokens\n4,16,98400\n8,16,96800\n", {"kv_cache.per_slot": "max_rank is 16"}),
        ("kv_cache", "slots,max_rank,kv_tokens\n4,8,98400\n4,16,96800\n", {"kv_cache.per_slot": "slots is 4"}),
        ("kv_cache", "slots,kv_tokens\n4,98400\n8,96800\n9,96000\n", {"kv_cache.per_slot_rank": "max_rank is 0"}),
        ("loads", "load_ms,source,rank\n5,memory,8\n6,memory,8\n", {"loading.slot_rank": "every row from memory has",
                                                                     "loading.disk": "no row is from disk"}),
        ("loads", None, {"loading.disk_rank": "there is no loads.csv"}),
        ("scheduler", None, {"scheduler.skipped": "there is no scheduler.csv"}),
        ("scheduler", "scheduler_ms,running,skipped\n0.1,5,0\n0.1,5,0\n0.11,9,0\n",
         {"scheduler.skipped": "the rows do not determine it"}),
    ],
)  # fmt: skip
def test_costs_that_tables_do_not_determine_are_marked(
    tmp_path: Path, name: str, text: str | None, assumed: dict[str, str]
) -> None:
    tables(tmp_path, PROFILE)
    if text is None:
        (tmp_path / f"{name}.csv").unlink()
    else:
        (tmp_path / f"{name}.csv").write_text(text)
    fitted = fit_profile(tmp_path)
    for cost, why in assumed.items():
        assert why in fitted.assumed[cost]
        part, _, key = cost.partition(".")
        assert getattr(getattr(fitted, part), key) == 0
    assert parse_profile(json.loads(json.dumps(fitted.to_json())), "p") == fitted


def test_nothing_is_assumed_where_tables_determine_everything(tmp_path: Path) -> None:
    tables(tmp_path, PROFILE)
    fitted = fit_profile(tmp_path)
    assert fitted.assumed == {}
    assert fitted.residuals["step"]["costs"] == 17  # all but the two that small_tokens would bring in


def test_a_steep_loss_of_kv_tokens_is_found(tmp_path: Path) -> None:
    tables(tmp_path, PROFILE)
    (tmp_path / "kv_cache.csv").write_text("slots,max_rank,kv_tokens\n50,16,50000\n75,16,30000\n100,16,10000\n")
    fitted = fit_profile(tmp_path)
    assert [fitted.kv_tokens(s, 16) for s in (50, 75, 100)] == pytest.approx([50_000, 30_000, 10_000], abs=20)


def test_as_many_costs_as_rows_prove_nothing(tmp_path: Path) -> None:
    tables(tmp_path, PROFILE)
    (tmp_path / "kv_cache.csv").write_text("slots,max_rank,kv_tokens\n1,8,90000\n8,8,83000\n8,16,80000\n")
    (tmp_path / "steps.csv").write_text("step_ms,decode\n10,1\n15,50\n")
    residuals = fit_profile(tmp_path).residuals
    for cost, count in (("kv_cache", 3), ("step", 2), ("load_from_disk", 2)):
        assert residuals[cost]["rows"] == residuals[cost]["costs"] == count
        assert "mean_relative_error" not in residuals[cost]
    assert "mean_relative_error" in residuals["scheduler"]


def test_columns_that_mean_nothing_are_named(tmp_path: Path) -> None:
    tables(tmp_path, PROFILE)
    head, *rest = (tmp_path / "kv_cache.csv").read_text().splitlines()
    (tmp_path / "kv_cache.csv").write_text("\n".join([f"{head},host", *(f"{line},h1" for line in rest)]))
    assert fit_profile(tmp_path).residuals["unused_columns"] == ["kv_cache.host"]


def test_files_that_nothing_reads_are_named(tmp_path: Path) -> None:
    tables(tmp_path, PROFILE)
    (tmp_path / "runs.jsonl").write_text(
        json.dumps({"workload": "w.json", "slots": 4, "measured": {"itl_ms": 9}}) + "\n"
    )
    (tmp_path / "w.json").write_text(json.dumps(WORKLOAD))
    for name in ("step.csv", "load.jsonl", "notes.txt"):
        (tmp_path / name).write_text("")
    assert fit_profile(tmp_path).residuals["unused_files"] == ["load.jsonl", "step.csv"]


@pytest.mark.parametrize(
    ("column", "said"),
    [("notes", ""), ("comment", ""), ("host", ""), ("ctx", "context"), ("slot", "slots"), ("adapter", "adapters")],
)
def test_only_names_that_are_nearly_a_column_are_taken_for_mistakes(column: str, said: str) -> None:
    assert _meant(column, TABLES["steps"]) == (f"; did you mean {said!r}?" if said else "")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "steps.csv",
            "step_ms,decode,ctx,adapter\n5,3,1,1\n",
            r"unknown columns: 'ctx' \(did you mean 'context'\?\), 'adapter' \(did you mean 'adapters'\?\)",
        ),
        ("kv_cache.csv", "slots,rank,kv_tokens\n5,8,9\n", r"'rank' \(did you mean 'max_rank'\?\)"),
        ("kv_cache.csv", "slots,max_rank\n5,8\n", "there is no column 'kv_tokens'"),
        (
            "kv_cache.csv",
            "slots,max_rank,kv_tokens\n4,16,150000\n",
            "do not determine how many KV tokens a slot takes: slots is 4 and max_rank is 16 in every row; add",
        ),
        ("steps.csv", "step_ms,decode\n5,3\n6,3\n", "what a decoding request costs: decode is 3 in every row; add"),
        ("steps.csv", "step_ms,decode\nnan,3\n", "row 1: step_ms: expected a number from 0 to 1e.15, not 'nan'"),
        ("steps.csv", "step_ms,decode\n5,-3\n", "row 1: decode: expected a number from 0"),
        ("steps.csv", "step_ms,step_ms\n5,3\n", "the column 'step_ms' is given twice"),
        ("steps.csv", "", "steps.csv: there are no rows in it"),
        ("steps.csv", "step_ms,decode\n", "steps.csv: there are no rows in it"),
        ("steps.csv", "step_ms;decode\n5;3\n", "its columns are separated by semicolons"),
        ("steps.jsonl", '{"step_ms": 5, "decode": 3}', r"there are both steps.csv and steps.jsonl in it; remove one"),
        (
            "steps.csv",
            "step_ms,decode,adapters,slots,max_rank\n5,3,2,2,8\n6,99,99,4,8\n",
            "row 2: 99 adapters cannot be in a batch of a server with 4 slots",
        ),
        (
            "kv_cache.csv",
            "slots,max_rank,kv_tokens\n1,8,900\n2,7,800\n",
            "row 2: max_rank: vLLM does not take a maximum rank of 7",
        ),
        (
            "kv_cache.csv",
            "slots,max_rank,kv_tokens\n4,8,90000\n8,8,95000\n",
            "row 2: 95000 KV tokens with 8 slots contradict the 90000 of row 1",
        ),
        (
            "about.yaml",
            "{name: p, engine: e, model: m, gpu: g, least_kv_tokens: 10000000}",
            "about.yaml: least_kv_tokens is 10,000,000, and .*kv_cache.csv has servers that started with fewer",
        ),
        ("about.yaml", "{name: p, engine: e, model: m, gpu: g, server: {x: 1}}", "about.yaml: server: unknown key 'x'"),
        ("steps.csv", "step_ms,decode\n12,5,1\n", "line 2 has 3 values for 2 columns"),
        ("scheduler.csv", "scheduler_ms,running\n0,3\n", "scheduler_ms must be above 0 in every row"),
        ("loads.csv", "load_ms,source,rank\n5,tape,8\n", "row 1: source: expected memory or disk, not 'tape'"),
        ("about.yaml", "name: p\nname: q\n", "line 2: the key 'name' is given twice"),
        (
            "about.yaml",
            "{name: p, engine: e, model: m, gpu: g, calibrate: {step.adaptr: 1}}",
            "calibrate: unknown key 'step.adaptr'; did you mean 'step.adapter'",
        ),
        ("about.yaml", "{name: p, engine: e, model: m, gpu: g, calibrate: [1]}", "calibrate: expected keys and values"),
        ("about.yaml", "{name: p, engine: e, model: m, gpu: g, sources: 5}", "sources: expected keys and values"),
        ("runs.jsonl", "[1]\n", r"/runs.jsonl: line 1: expected keys and values, not \[1\]"),
        (
            "runs.jsonl",
            '\n{"slots": 2, "workload": {}, "measured": {"itl_ms": 0}}\n',
            "line 2: measured.itl_ms",
        ),
        (
            "runs.jsonl",
            '{"slots": {}, "workload": {}, "measured": {"itl_ms": 1}}\n',
            "line 1: slots: expected",
        ),
        ("about.yaml", None, "about.yaml: does not exist; it must name the engine"),
        ("about.yaml", '{"nmae": 1}', "unknown key 'nmae'; did you mean 'name'"),
        ("steps.csv", None, "there is no steps.csv"),
        ("steps.csv", "milliseconds,decode\n5,3\n", "there is no column 'step_ms'"),
        ("steps.csv", "step_ms,decode\nfive,3\n", "row 1: step_ms: expected a number, not 'five'"),
        (
            "steps.csv",
            "step_ms,decode\n0,3\n",
            r"steps.csv: row 1: every step must take longer than its scheduling, \d",
        ),
        ("kv_cache.csv", "slots,max_rank,kv_tokens\n5,8,\n", "no row has kv_tokens"),
        ("runs.jsonl", '{"slots": 2}\n', "^[^:]*: line 1: 'measured'"),
        ("runs.jsonl", '{"slots": 2,}\n', "^[^:]*: line 1: is not valid JSON: .*: column 13$"),
        ("runs.jsonl", '{"slots": 2, "workload": 5, "measured": {"itl_ms": 1}}', "^[^:]*: line 1: expected keys"),
        ("runs.jsonl", '{"slots": 2, "max_rnak": 8}\n', "unknown key 'max_rnak'; did you mean 'max_rank'"),
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
