"""Every command as a user runs it: exit codes, one JSON document, errors in one sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import recipe, write_family
from shell import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    write_family(tmp_path)
    (tmp_path / "ties.yml").write_text(recipe("ties", tmp_path, parameters="weight: 1, density: 0.4"))
    return Shell(tmp_path)


def test_a_day_of_work(shell: Shell, tmp_path: Path) -> None:
    assert "is empty" in shell.run("list").stdout
    assert shell.json("register", "b", "base")["kind"] == "base"
    facts = shell.json("register", "e0", "expert0", "--base", "b")
    assert facts["kind"] == "expert"
    assert facts["base"] == "b"
    assert "none yet; run: deltaworks analyze e0" in shell.run("show", "e0").stdout
    (summary,) = shell.json("analyze", "e0")["analyses"]
    assert 0 < summary["relative_norm"] < 1
    assert "of the base's" in shell.run("show", "e0").stdout
    assert shell.json("analyze", "--all")["analyses"][0] == summary
    planned = shell.json("plan", "ties.yml", "-o", "plan.json")
    merged = shell.json("run", "plan.json", "out")
    direct = shell.json("merge", "ties.yml", "out2")
    before = {
        "plan_digest",
        "budget_bytes",
        "expert_bytes",
        "expert_bytes_planned",
        "predicted_error",
        "error_bound",
        "output",
        "notes",
    }
    after = {
        "expert_bytes_read",
        "base_bytes_read",
        "output_bytes_written",
        "measured_error",
        "wall_s",
        "stages",
        "equals_base",
    }
    after.add("sampled_bytes")
    assert before < planned.keys()
    assert planned["sampled_bytes"] == merged["sampled_bytes"] == 0  # analyses answer how TIES's models compare
    assert before | after == merged.keys() == direct.keys()
    assert planned["plan_digest"] == merged["plan_digest"] == direct["plan_digest"]
    assert shell.json("verify", "out")["verified"] is True
    assert shell.json("show", "plan.json")["plan_digest"] == planned["plan_digest"]
    assert shell.json("show", "out")["plan_digest"] == planned["plan_digest"]
    assert "ties (seed 0)" in shell.run("show", "plan.json").stdout
    assert "read from the base" in shell.run("show", "out").stdout
    listed = shell.json("list")
    assert {m["name"] for m in listed["models"]} == {"b", "e0", "expert1", "expert2"}
    assert {Path(s["path"]).name for s in listed["snapshots"]} == {"out", "out2"}
    assert "expert2" in shell.run("list").stdout


def test_where_the_time_went(shell: Shell) -> None:
    done = shell.run("merge", "ties.yml", "out", "--profile-run", "--quiet", "--json")
    stages = json.loads(done.stdout)["stages"]
    assert min(stages[f"{stage}_s"] for stage in ("read", "compute", "write")) > 0
    assert stages["fsync_s"] > 0 < stages["hash_s"]
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["read", "compute", "write", "hash", "fsync"]


def test_mistakes_exit_with_two(shell: Shell, tmp_path: Path) -> None:
    shell.run("register", "b", "base")
    assert "did you mean 'b'" in shell.error("show", "bb")
    assert "no folder 'nowhere'" in shell.error("register", "x", "nowhere")
    assert "the name 'b' is taken" in shell.error("register", "b", "expert0")
    assert "is not an expert of a registered base" in shell.error("analyze", "b")
    assert "name the experts" in shell.error("analyze")
    assert "none.yml: cannot be read as a recipe" in shell.error("merge", "none.yml", "out")
    assert "is not an amount of bytes" in shell.error("merge", "ties.yml", "out", "--shard-size", "big")
    assert "--shard-size: 5 needs a unit" in shell.error("merge", "ties.yml", "out", "--shard-size", "5")
    assert "--layers-limit: 5 needs a unit" in shell.error("analyze", "--all", "--layers", "--layers-limit", "5")
    assert "power of two" in shell.error("merge", "ties.yml", "out", "--block-size", "5000")
    (tmp_path / "typo.yml").write_text((tmp_path / "ties.yml").read_text().replace("density", "densty"))
    assert "did you mean 'density'" in shell.error("merge", "typo.yml", "out")
    (tmp_path / "long.yml").write_text((tmp_path / "ties.yml").read_text().replace("expert0", "x" * 300))
    assert "File name too long" in shell.error("merge", "long.yml", "out")
    assert "--seed 0x10000000000000000: a seed is" in shell.error("plan", "ties.yml", "--seed", str(1 << 64))
    assert "base exists; choose another" in shell.error("merge", "ties.yml", "base")
    assert "is not a snapshot" in shell.error("verify", "base")
    assert "none.json: cannot be read as a plan" in shell.error("run", "none.json", "out")
    assert not (tmp_path / "out").exists()
    assert shell.run("frobnicate", code=2).stdout == ""
    assert shell.run("merge", code=2).stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        ("merge", "ties.yml", "catalog", "--force"),
        ("merge", "ties.yml", "catalog"),
        ("merge", "ties.yml", "catalog/new"),
        ("merge", "ties.yml", ".", "--force"),
        ("merge", "ties.yml", "ties.yml", "--force"),
        ("merge", "ties.yml", "expert1", "--force"),
        ("merge", "mergekit_config.yml", ".", "--force", "--catalog", "other/catalog"),
        ("run", "plan.json", "catalog", "--force"),
        ("run", "plan.json", "catalog/new"),
        ("run", "plan.json", "plan.json", "--force"),
        ("plan", "ties.yml", "-o", "ties.yml"),
        ("plan", "ties.yml", "-o", "hard.yml"),
        ("plan", "ties.yml", "-o", "catalog/catalog.sqlite"),
        ("plan", "ties.yml", "-o", "base/config.json", "--force"),
        ("sweep", "plan-001.json", "-o", ".", "--force"),
        ("sweep", "ties.yml", "-o", "catalog/plans"),
        ("sweep", "ties.yml", "-o", "expert0"),
        ("place", "w.json", "--profile", "tiny-llama-cpu", "-o", "catalog/placed"),
        ("profile", "--table", "table", "-o", "table/steps.csv"),
        ("profile", "--table", "table", "-o", "catalog/catalog.sqlite"),
    ],
)
def test_inputs_and_the_catalog_are_never_replaced(shell: Shell, tmp_path: Path, command: tuple[str, ...]) -> None:
    shell.run("register", "b", "base", "-q")
    text = (tmp_path / "ties.yml").read_text()
    (tmp_path / "mergekit_config.yml").write_text(text)
    (tmp_path / "plan-001.json").write_text(text)
    (tmp_path / "hard.yml").hardlink_to(tmp_path / "ties.yml")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "steps.csv").write_text("")
    (tmp_path / "w.json").write_text("{}")
    if command[0] == "run":
        shell.run("plan", "ties.yml", "-q")
    kept = [p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "statistics" and "sqlite" not in p.name]
    before = {p: p.read_bytes() for p in kept}
    assert "overlap; choose another place" in shell.error(*command, "-q")
    assert {p: p.read_bytes() for p in kept} == before
    assert "b" in {model["name"] for model in shell.json("list")["models"]}


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("plan", "ties.yml", "-o", "mine.txt"), "mine.txt"),
        (("plan", "ties.yml"), "plan.json"),
        (("sweep", "ties.yml", "-o", "."), "plan-003.json"),
        (("profile", "--table", "table", "-o", "mine.txt"), "mine.txt"),
        (("surrogate", "train", "--profile", "tiny-llama-cpu", "-o", "mine.txt"), "mine.txt"),
    ],
)
def test_other_files_are_replaced_on_demand_only(
    shell: Shell, tmp_path: Path, command: tuple[str, ...], file: str
) -> None:
    (tmp_path / "table").mkdir()
    (tmp_path / file).write_text("notes")
    assert f"{file}: exists and is something else; add --force to replace it" in shell.error(*command, "-q")
    assert (tmp_path / file).read_text() == "notes"
    if command[0] == "plan":
        shell.run(*command, "--force", "-q")
        assert "deltaworks_plan" in (tmp_path / file).read_text()
        shell.run(*command, "--budget", "50%", "-q")
        assert json.loads((tmp_path / file).read_text())["budget_bytes"] is not None


def test_a_merged_model_is_made_again_from_its_own_recipe_and_plan(shell: Shell, tmp_path: Path) -> None:
    shell.run("merge", "ties.yml", "out", "-q")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    shell.run("merge", "out/mergekit_config.yml", "out", "--force", "-q")
    shell.run("run", "out/deltaworks_plan.json", "out", "--force", "-q")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert shell.json("verify", "out")["verified"]


def test_a_recipe_that_is_no_regular_file_is_refused_at_once(shell: Shell, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/zero"):
        assert "cannot be read as a recipe" in shell.error("merge", name, "out")


def test_failures_exit_with_one(shell: Shell, tmp_path: Path) -> None:
    shell.run("merge", "ties.yml", "out", "--quiet")
    (tmp_path / "out" / "config.json").write_text("{}")
    assert "config.json differs" in shell.error("verify", "out", code=1)


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").exists(), reason="needs a folder nobody can write")
def test_places_that_cannot_be_written(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "as a catalog" in shell.error("list", "--catalog", "file/catalog")
    assert "cannot write" in shell.error("merge", "ties.yml", "file/out", code=1)
    assert "file/plan.json" in shell.error("plan", "ties.yml", "-o", "file/plan.json", code=1)


def test_standard_output_is_the_result_alone(shell: Shell) -> None:
    done = shell.run("merge", "ties.yml", "out", "--json")
    json.loads(done.stdout)
    quiet = shell.run("merge", "ties.yml", "out2", "--json", "--quiet")
    assert quiet.stderr == ""


def test_an_interrupt_exits_with_130(shell: Shell) -> None:
    import signal
    import time

    code = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background ignores it
import deltaworks.catalog.store as store, deltaworks.cli.main as cli
def wait(*_):
    print("ready", flush=True)
    time.sleep(60)
store.Catalog.__init__ = wait
sys.argv = ["deltaworks", "show", "x"]
cli.main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=shell.environment,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    process.stdout.close()
    assert process.stderr is not None
    process.stderr.close()


def test_a_hub_id_comes_from_the_cache_offline(shell: Shell, tmp_path: Path) -> None:
    """The cache as huggingface_hub lays it out: blobs, a snapshot of links, and a ref."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--acme--tiny"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    for i, file in enumerate((tmp_path / "base").iterdir()):
        file.rename(repo / "blobs" / str(i))
        (repo / "snapshots" / commit / file.name).symlink_to(repo / "blobs" / str(i))
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    for name, source in (("a", "acme/tiny"), ("b", f"acme/tiny@{commit}"), ("c", "hf://acme/tiny@main")):
        facts = json.loads(shell.run("register", name, source, "--json", extra=offline).stdout)
        assert facts["path"] == str(repo / "snapshots" / commit)
    done = shell.run("register", "d", "acme/other", code=2, extra=offline)
    assert "neither a folder here nor in the hub's cache" in done.stderr


def test_help_teaches(shell: Shell) -> None:
    whole = shell.run("--help").stdout
    for command in ("merge", "plan", "run", "verify", "register", "analyze", "list", "show", "demo"):
        assert command in whole
        text = shell.run(command, "--help").stdout
        assert "--catalog" in text
        assert "--json" in text


def test_a_merge_within_a_budget(shell: Shell, tmp_path: Path) -> None:
    planned = shell.json("plan", "ties.yml", "-o", "plan.json", "--budget", "30%")
    assert planned["budget_bytes"] == int(planned["expert_bytes"] * 0.3)
    assert 0 < planned["expert_bytes_planned"] <= planned["budget_bytes"]
    assert 0 < planned["predicted_error"] < 1
    merged = shell.json("merge", "ties.yml", "out", "--budget", "30%", "--verify-error")
    assert merged["plan_digest"] == planned["plan_digest"]
    assert merged["expert_bytes_read"] == planned["expert_bytes_planned"]
    assert 0 < merged["measured_error"] < 1
    text = shell.run("run", "plan.json", "out2", "--verify-error").stdout
    assert "predicted" in text
    assert f"{merged['measured_error']:.4f} measured" in text
    shown = shell.run("show", "plan.json").stdout
    assert "weight is the share of the merge's change" in shown
    assert [line.split()[0] for line in shown.splitlines()[-6:]] == ["embed_tokens", "0", "1", "2", "norm", "lm_head"]
    assert "predicted, relative to the full merge's distance from the base" in shell.run("show", "out").stdout
    assert "more than the experts hold" in shell.error("merge", "ties.yml", "out3", "--budget", "120%")
    assert "is not a budget" in shell.error("plan", "ties.yml", "--budget", "some")


@pytest.mark.parametrize("command", [("merge", "ties.yml", "out"), ("plan", "ties.yml"), ("sweep", "ties.yml")])
def test_a_budget_needs_a_unit(shell: Shell, command: tuple[str, ...]) -> None:
    assert "--budget: 25 needs a unit: 25% or 25B?" in shell.error(*command, "--budget", "25")


def test_a_plan_that_reads_nothing_is_made_on_demand_only(shell: Shell) -> None:
    nothing = "reads nothing of any expert"
    for command in (("merge", "ties.yml", "out"), ("plan", "ties.yml", "-o", "plan.json")):
        assert nothing in shell.error(*command, "--budget", "25B", "-q")
        assert not (shell.root / command[-1]).exists()
    shell.run("plan", "ties.yml", "-o", "plan.json", "--budget", "25B", "--force")
    assert "the result is the base model" in shell.run("show", "plan.json").stdout
    assert nothing in shell.error("run", "plan.json", "out")
    assert shell.json("run", "plan.json", "out", "--force")["expert_bytes_read"] == 0
    told = shell.run("sweep", "ties.yml", "--budget", "25B,50%")
    assert "1 of 2 plans read nothing of any expert" in told.stderr
    assert [row["reads_nothing"] for row in shell.json("sweep", "ties.yml", "--budget", "25B,50%")["plans"]] == [
        True,
        False,
    ]


def test_exact_is_said_where_it_is(shell: Shell) -> None:
    shell.run("plan", "ties.yml", "-o", "plan.json", "--budget", "100%")
    assert "error       exact" in shell.run("show", "plan.json").stdout
    merged = shell.run("merge", "ties.yml", "out", "--budget", "100%", "--verify-error").stdout
    assert "; exact, exact measured" in merged
    assert shell.run("sweep", "ties.yml", "--budget", "100%").stdout.splitlines()[-1].split()[3] == "exact"
    for text in (merged, shell.run("lineage", "out").stdout, shell.run("show", "out").stdout):
        assert "exact" in text
        assert "0.0000" not in text


def test_a_linear_budget_names_the_base(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "linear.yml").write_text(recipe("linear", tmp_path, base=False, parameters="weight: 1"))
    assert "register the experts with --base" in shell.error("merge", "linear.yml", "out", "--budget", "30%")
    merged = shell.json("merge", "linear.yml", "out", "--budget", "30%", "--base", "base", "--verify-error")
    assert merged["measured_error"] <= merged["error_bound"]
    assert merged["base_bytes_read"] > 0


def test_two_plans_beside_each_other(shell: Shell, tmp_path: Path) -> None:
    for name, budget in (("a", "20%"), ("b", "60%")):
        shell.run("plan", "ties.yml", "-o", f"{name}.json", "--budget", budget)
    found = shell.json("diff", "a.json", "b.json")
    assert not found["same"]
    assert {"budget_bytes", "predicted_error"} <= {s["name"] for s in found["settings"]}
    assert found["tensors"] == {"only_a": [], "only_b": [], "operation": []}
    assert sum(r["only_b"] for r in found["reads"]) > 0
    assert "only b" in shell.run("diff", "a.json", "b.json").stdout
    digest = json.loads((tmp_path / "a.json").read_text())["digest"]
    assert shell.json("diff", "a.json", digest[:10])["same"]
    shell.run("run", "a.json", "out")
    assert "the same plan" in shell.run("diff", "out", "a.json").stdout
    assert "is not a plan file" in shell.error("diff", "a.json", "c.json")


def test_where_a_model_came_from_and_where_it_went(shell: Shell, tmp_path: Path) -> None:
    merged = shell.json("merge", "ties.yml", "out", "--budget", "50%")
    came = shell.json("lineage", "out")
    assert came["plan_digest"] == merged["plan_digest"]
    assert came["recipe"] == (tmp_path / "ties.yml").read_text()
    assert [i["role"] for i in came["inputs"]] == ["base", "expert", "expert", "expert"]
    experts = came["inputs"][1:]
    assert sum(i["bytes_planned"] for i in experts) == merged["expert_bytes_read"]
    assert all(0 < i["elements_read"] <= i["elements"] for i in experts)
    assert all(0 < i["change_without"] < 1 for i in experts)
    went = shell.json("lineage", "expert1")
    (row,) = went["used_by"]
    assert row["snapshot"] == str(tmp_path / "out")
    assert row["change_without"] == experts[1]["change_without"]
    assert row["present"]
    assert row["is_current"]
    assert "without it the merge would change by" in shell.run("lineage", "expert1").stdout
    assert all(len(i["blocks"]) == i["tensors"] for i in experts)
    assert all(runs is None or runs for i in experts for runs in i["blocks"].values())
    assert "(layers 0 to 2, " in shell.run("lineage", "out").stdout
    # Blocks of another size say nothing of this plan's.
    shell.run("analyze", "expert0", "--force", "--block-size", "8192")
    assert {i["change_without"] for i in shell.json("lineage", "out")["inputs"]} == {None}
    shell.run("analyze", "expert0", "--force", "--block-size", "4096")
    assert shell.json("lineage", "out") == came
    # A merge of a merge: both directions are known.
    shell.run("register", "first", "out", "--base", "base")
    (tmp_path / "second.yml").write_text(
        recipe("task_arithmetic", tmp_path, parameters="weight: 0.5", listed=("out", "expert2"))
    )
    shell.run("merge", "second.yml", "out2")
    again = shell.json("lineage", "out2")
    assert {i["name"]: i["snapshot"] for i in again["inputs"]}["first"] == str(tmp_path / "out")
    assert shell.json("lineage", "out")["used_by"] == [str(tmp_path / "out2")]
    assert "itself a merge" in shell.run("lineage", "out2").stdout
    assert "used by" in shell.run("lineage", "out").stdout
    assert shell.json("lineage", "base")["experts"] == ["expert0", "expert1", "expert2", "first"]
    assert "did you mean 'expert1'" in shell.error("lineage", "expert11")
    shutil.rmtree(tmp_path / "out2")
    assert "(gone)" in shell.run("lineage", "expert2").stdout
    assert shell.json("lineage", "out2")["plan_digest"] == again["plan_digest"]


def test_a_sweep_plans_every_point_of_a_grid(shell: Shell, tmp_path: Path) -> None:
    grid = ("sweep", "ties.yml", "--density", "0.2,0.6", "--set", "expert1:weight=0.5,2", "--budget", "20%,60%")
    plans = shell.json(*grid, "-o", "plans")["plans"]
    assert [p["settings"] for p in plans] == [
        {"expert1:weight": w, "density": d, "budget": b} for w in (0.5, 2) for d in (0.2, 0.6) for b in ("20%", "60%")
    ]
    assert len({p["plan_digest"] for p in plans}) == 8
    assert all(p["expert_bytes_planned"] <= 0.6 * p["expert_bytes"] for p in plans)
    ran = shell.json("run", plans[3]["file"], "out")
    assert ran["plan_digest"] == plans[3]["plan_digest"]
    weights = {row["name"]: row for row in json.loads(Path(tmp_path / plans[4]["file"]).read_text())["tensors"]}
    assert weights["model.norm.weight"]["weights"] == [1.0, 2.0, 1.0]
    assert weights["model.norm.weight"]["densities"] == [0.2, 0.2, 0.2]
    text = shell.run(*grid).stdout
    assert len(text.splitlines()) == 9
    assert "is not an axis" in shell.error("sweep", "ties.yml", "--set", "density")
    assert "cannot be read as an axis" in shell.error("sweep", "ties.yml", "--set", "density=[")
    assert "no model 'expert9'" in shell.error("sweep", "ties.yml", "--set", "expert9:weight=1")
    assert "unknown parameter 'densty'" in shell.error("sweep", "ties.yml", "--set", "densty=1")


def commands() -> list[tuple[str, Any]]:
    """Every command by its full name, those of groups too."""
    from typer.main import get_command

    from deltaworks.cli.main import app

    found: list[tuple[str, Any]] = []

    def walk(name: str, command: Any) -> None:
        if hasattr(command, "commands"):
            for key, own in command.commands.items():
                walk(f"{name} {key}".strip(), own)
        else:
            found.append((name, command))

    walk("", get_command(app))
    return found


def test_every_command_takes_the_common_options() -> None:
    assert {"merge", "simulate", "surrogate show", "list", "gc"} <= {name for name, _ in commands()}
    for name, command in commands():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--catalog", "--quiet", "-q"} <= options, name
