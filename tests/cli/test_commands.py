"""Every command as a user runs it: exit codes, one JSON document, errors in one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import recipe, write_family


class Shell:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = os.environ | {"DELTAWORKS_CATALOG": str(root / "catalog"), "COLUMNS": "200"}

    def run(
        self, *arguments: object, code: int = 0, extra: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "deltaworks.cli.main", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=self.root,
            env=self.environment | (extra or {}),
            check=False,
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def error(self, *arguments: object, code: int = 2) -> str:
        done = self.run(*arguments, code=code)
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        return done.stderr


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
    before = {"plan_digest", "budget_bytes", "expert_bytes", "expert_bytes_planned", "predicted_error", "output"}
    after = {"expert_bytes_read", "base_bytes_read", "output_bytes_written", "measured_error", "wall_s"}
    assert before < planned.keys()
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


def test_mistakes_exit_with_two(shell: Shell, tmp_path: Path) -> None:
    shell.run("register", "b", "base")
    assert "did you mean 'b'" in shell.error("show", "bb")
    assert "no folder 'nowhere'" in shell.error("register", "x", "nowhere")
    assert "the name 'b' is taken" in shell.error("register", "b", "expert0")
    assert "is no expert of a registered base" in shell.error("analyze", "b")
    assert "name the experts" in shell.error("analyze")
    assert "cannot read the recipe" in shell.error("merge", "none.yml", "out")
    assert "is not an amount of bytes" in shell.error("merge", "ties.yml", "out", "--shard-size", "big")
    assert "power of two" in shell.error("merge", "ties.yml", "out", "--block-size", "5000")
    (tmp_path / "typo.yml").write_text((tmp_path / "ties.yml").read_text().replace("density", "densty"))
    assert "did you mean 'density'" in shell.error("merge", "typo.yml", "out")
    assert "base exists; choose another" in shell.error("merge", "ties.yml", "base")
    assert "is no snapshot" in shell.error("verify", "base")
    assert "cannot read the plan" in shell.error("run", "none.json", "out")
    assert not (tmp_path / "out").exists()
    assert shell.run("frobnicate", code=2).stdout == ""
    assert shell.run("merge", code=2).stdout == ""


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
import sys, time
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
