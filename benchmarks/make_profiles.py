"""Make the profiles that ship with the package: tables from the shared measurements, then `deltaworks profile`.

    python benchmarks/make_profiles.py TABLES [--into DIR] [--only NAME] [--leave-out FAMILY]...

TABLES gets one folder of tables for each profile, in the format of docs/profiles.md.
"""

import argparse
import csv
import json
import random
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from serving_runs import DATA, PORTS, family, published_runs, run_of, workload_content

CPU_DATA = DATA.parent / "vllm-cpu"
H100 = {"llama-3.1-8b-h100-64gb": ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct", 131_072, 0.990),
        "qwen-2.5-7b-h100-64gb": ("qwen-2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct", 32_768, 0.957)}  # fmt: skip
"""Profiles by name: the data's model, the model's name, KV tokens of one request of full length, and the share of the
nominal output that completed requests generated."""

CPU = "tiny-llama-cpu"
SCALES = {
    "step.decode_prefill": 5e-5, "step.eager": 3, "step.lora": 2, "step.adapter": 0.2, "step.adapter_rank": 0.012,
    "step.lora_decode": 0.02, "step.lora_prefill": 0.03, "step.adapter_token": 0.0001, "step.slot_token": 0.0001,
    "step.small_slot": 0.03, "step.small_adapter": 0.1, "scheduler.skipped": 0.0003,
    "loading.slot": 4, "front_end.request": 5, "front_end.first_request": 80, "front_end.label_set": 0.015,
}  # fmt: skip
CPU_SCALES = {"step.slot_token": 0.01, "step.lora_decode_rank": 0.005, "loading.slot": 1}
RUNS, MAX_RPS = 80, 80.0
"""Recorded runs that each profile is made to agree with; with more requests a second most are only dropped."""


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    with (folder / f"{name}.csv").open("w", newline="") as file:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_runs(folder: Path, runs: list[dict[str, Any]]) -> None:
    (folder / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))


def h100_tables(folder: Path, name: str, left_out: set[str]) -> None:
    data, model, least, share = H100[name]
    own = [r for r in rows_of(DATA / "calibration" / "step_latency_no_lora.csv") if r["model"] == data]
    steps = []
    for row in own:
        if row["step_ms_median"] and row["phase"] == "decode":
            batch = int(float(row["running_max"]))
            context = batch * (int(row["output_len"]) // 2 + 1)
            steps.append({"step_ms": row["step_ms_median"], "decode": batch, "context": context})
        elif row["step_ms_mean"] and row["phase"] == "prefill":
            steps.append({"step_ms": row["step_ms_mean"], "prefill": row["tokens_per_step_mean"]})
    for row in rows_of(DATA / "calibration" / "lora_latency_overhead.csv"):
        if row["model"] == data and row["kind"] == "lora" and row["itl_median_ms"]:
            batch = int(float(row["max_num_seqs"]))
            adapters = row["adapters_in_batch_mean"] or row["adapters_in_batch_expected"]
            steps.append({
                "step_ms": row["itl_median_ms"], "decode": batch, "context": batch * (int(row["output_len"]) // 2 + 1),
                "adapters": adapters, "slots": row["max_loras"], "max_rank": row["max_lora_rank"],
            })  # fmt: skip
    write(folder, "steps", steps)
    cache = [r for r in rows_of(DATA / "calibration" / "kv_cache_capacity.csv") if r["model"] == data]
    write(folder, "kv_cache", [
        {"slots": r["max_loras"], "max_rank": r["max_lora_rank"], "kv_tokens": r["kv_cache_tokens"]} for r in cache
    ])  # fmt: skip
    write(folder, "scheduler", [
        {"scheduler_ms": r["scheduler_ms_median"], "running": r["running_max"], "skipped": 0}
        for r in own if r["phase"] == "decode" and r["scheduler_ms_median"]
    ])  # fmt: skip
    loads = []
    for row in rows_of(DATA / "calibration" / "adapter_loading.csv"):
        if row["model"] == data:
            loads.append(
                {"load_ms": row["memory_load_serving_median_ms"], "source": "memory", "rank": row["adapter_rank"]}
            )
            loads.append({"load_ms": row["disk_load_median_ms"], "source": "disk", "rank": row["adapter_rank"]})
    write(folder, "loads", loads)
    eligible = [r for r in published_runs(data) if r["failed"] == "False"
                and float(r["total_rate_rps_nominal"]) <= MAX_RPS]  # fmt: skip
    # Shuffled before families are left out, so that fits that leave out different ones share most of their runs.
    random.Random(0).shuffle(eligible)
    runs = []
    for row in [r for r in eligible if family(r) not in left_out][:RUNS]:
        asked = run_of(row)
        runs.append({
            "id": row["run_id"], "workload": workload_content(row), "slots": asked.configuration.slots,
            "max_rank": asked.configuration.max_rank, "served": asked.configuration.served,
            "client_max_outstanding": PORTS, "measured": asked.measured,
        })  # fmt: skip
    write_runs(folder, runs)
    note = f"arXiv 2508.08343's published measurements of {data} on vLLM 0.8.5, one H100 of 64 GB"
    about = {
        "name": name, "engine": "vLLM 0.8.5 (V1)", "model": model, "gpu": "NVIDIA H100 64GB",
        "server": {
            "max_num_seqs": 2048, "max_num_batched_tokens": 2048, "block_size": 16, "max_model_len": least
        },
        "front_end": {"request": 4.0, "first_request": 250.0, "label_set": 0.025, "scrape_period_s": 2.0,
                      "merge_batch": 128},
        "least_kv_tokens": least, "graph_tokens": 512, "small_tokens": 128, "output_share": share, "calibrate": SCALES,
        "sources": {
            "kv_cache": f"{note}: KV capacity by slots and rank", "loading": f"{note}: adapter loading",
            "scheduler": f"{note}: scheduler time of the decode sweeps",
            "step": f"{note}: decode sweeps, prefill bursts and LoRA sweeps at rank 8; then {len(runs)} hour-long runs",
            "front_end": f"{note}: {len(runs)} hour-long runs, metrics read every 2 s",
            "output_share": f"{note}: completed tokens of runs with a short queue, over nominal ones",
        },
    }  # fmt: skip
    (folder / "about.yaml").write_text(yaml.safe_dump(about, sort_keys=False))


def json_rows(*names: str) -> list[dict[str, Any]]:
    return [json.loads(line) for name in names for line in (CPU_DATA / "profile" / name).read_text().splitlines()]


def cpu_tables(folder: Path) -> None:
    decoded: dict[Any, list[float]] = defaultdict(list)
    for row in json_rows("steps2.jsonl"):
        if row["ok"] and row["tag"].startswith("lora_"):
            decoded[row["tag"], row["n"], row["distinct"], row["n_in"], row["n_out"]].append(row["client_itl_mean_ms"])
    steps = []
    for (tag, batch, distinct, n_in, n_out), times in decoded.items():
        lora = "max" in tag
        rank = int(tag.split("_r")[1].split("max")[0]) if lora else 0
        steps.append({"step_ms": statistics.median(times), "decode": batch, "context": batch * (n_in + n_out // 2),
                      "adapters": distinct if lora else 0, "slots": 0, "max_rank": rank})  # fmt: skip
    write(folder, "steps", steps)
    first: dict[Any, list[float]] = defaultdict(list)
    for row in json_rows("prefill.jsonl"):
        if row["ok"] and row["n_in"] <= 128:
            first[row["model"], row["n_in"]].append(row["ttft_med_ms"])
    write(folder, "first_tokens", [
        {"ttft_ms": statistics.median(times), "prefill": n_in, "adapters": int(model != "base"), "max_rank": 32}
        for (model, n_in), times in first.items()
    ])  # fmt: skip
    loads = [{"load_ms": r["diff_med_ms"], "source": "memory", "rank": r["rank"]}
             for r in json_rows("swap2.jsonl") if r["ok"] and r["tag"] == "cpucache"]  # fmt: skip
    same: dict[Any, list[float]] = defaultdict(list)
    for row in json_rows("swap.jsonl"):
        if row["ok"] and row["tag"] == "ml1_disk":
            same[row["rank"], row["pattern"]].append(row["ttft_med_ms"])
    for rank in (8, 16, 32):
        both = statistics.median(same[rank, "rot12"]) - statistics.median(same[rank, "same"])
        memory = statistics.median([r["load_ms"] for r in loads if r["rank"] == rank and r["source"] == "memory"])
        loads.append({"load_ms": max(both - memory, 0.1), "source": "disk", "rank": rank})
    write(folder, "loads", loads)
    write(folder, "kv_cache", [{"slots": s, "max_rank": r, "kv_tokens": 32768} for s, r in ((1, 8), (4, 32), (16, 32))])
    runs = []
    for row in json_rows("starve.jsonl"):
        if not row["ok"] or "cpucache" not in row["tag"]:
            continue
        slots = int(row["tag"][2:].split("_")[0])
        lengths = {"prompt_tokens": row["n_in"], "output_tokens": row["n_out"]}
        each = [{"time": 0.0, "adapter": f"a{i % row['A']}", **lengths} for i in range(row["nreq"])]
        workload = {"duration": row["makespan"] * 4, "requests": each}
        runs.append({"id": f"{row['tag']}/{row['A']}", "workload": workload, "slots": slots, "max_rank": 32,
                     "served": 48, "measured": {"itl_ms": row["itl_mean_ms"]}})  # fmt: skip
    write_runs(folder, runs)
    about = {
        "name": CPU, "engine": "vLLM 0.32.0 (V1, CPU)", "model": "a random Llama of 32 M parameters", "gpu": "one core",
        "server": {
            "max_num_seqs": 32, "max_num_batched_tokens": 1024, "block_size": 128, "max_model_len": 1024
        },
        "front_end": {"scrape_period_s": 0.0}, "calibrate": CPU_SCALES,
        "sources": dict.fromkeys(("step", "kv_cache", "loading", "front_end"), "micro-benchmarks of a live server"),
    }  # fmt: skip
    (folder / "about.yaml").write_text(yaml.safe_dump(about, sort_keys=False))


def make_tables(folder: Path, name: str, left_out: set[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if name == CPU:
        cpu_tables(folder)
    else:
        h100_tables(folder, name, left_out)


def main() -> None:
    from deltaworks.serving.fit import fit_profile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--into", type=Path, default=Path("src/deltaworks/serving/profiles"))
    parser.add_argument("--only", action="append", choices=[*H100, CPU])
    parser.add_argument("--leave-out", action="append", default=[], help="a family of workloads not to look at")
    options = parser.parse_args()
    for name in options.only or [*H100, CPU]:
        make_tables(options.tables / name, name, set(options.leave_out))
        done = 0

        def progress(more: int, name: str = name) -> None:
            nonlocal done
            done += more
            sys.stderr.write(f"\r{name}: {done} runs of the twin")

        profile = fit_profile(options.tables / name, progress)
        options.into.mkdir(parents=True, exist_ok=True)
        (options.into / f"{name}.json").write_text(json.dumps(profile.to_json(), indent=2) + "\n")
        sys.stderr.write(f"\r{name}: {json.dumps(profile.residuals)}\n")


if __name__ == "__main__":
    main()
