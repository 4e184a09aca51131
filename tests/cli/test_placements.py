"""place, advise and surrogate as a user runs them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from shell import Shell

from deltaworks.serving.profile import find_profile

LENGTHS = {"distribution": "sharegpt", "input_mean": 222.7, "output_mean": 196.1}
WORKLOAD = {
    "duration": 300, "lengths": LENGTHS,
    "adapters": [{"name": "shop", "count": 40, "rank": 16, "rate": 0.1}, {"name": "star", "rank": 8, "rate": 70}],
}  # fmt: skip
P = ("--profile", "llama-3.1-8b-h100-64gb")


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    root = tmp_path_factory.mktemp("placements")
    (root / "w.json").write_text(json.dumps(WORKLOAD))
    return Shell(root)


@pytest.fixture(scope="module")
def placed(shell: Shell) -> Any:
    return shell.json("place", "w.json", *P, "-o", "out", "--compare")


def test_a_placement_is_written_and_can_be_checked(shell: Shell, placed: Any) -> None:
    out = shell.root / "out"
    assert {path.name for path in out.iterdir()} == {
        "placement.json", "index.html", "serve.sh", "compose.yaml", "kubernetes.yaml", "routes.json", "litellm.yaml",
        "routes.compose.json", "litellm.compose.yaml", "routes.kubernetes.json", "litellm.kubernetes.yaml",
    }  # fmt: skip
    assert placed["verified"]
    assert placed["gpu_count"] == len(placed["gpus"]) >= placed["lower_bound"] >= 1
    shares: dict[str, float] = {}
    for gpu in placed["gpus"]:
        assert gpu["type"] == P[1]
        assert gpu["max_loras"] <= gpu["max_cpu_loras"]
        assert not gpu["predicted"]["starved"]
        for adapter in gpu["adapters"]:
            shares[adapter["name"]] = shares.get(adapter["name"], 0.0) + adapter["share"]
        asked = [{"name": a["name"], "rank": a["rank"], "rate": a["rate"]} for a in gpu["adapters"]]
        (shell.root / "part.json").write_text(json.dumps(WORKLOAD | {"adapters": asked}))
        flags = ("--slots", gpu["max_loras"], "--served", gpu["max_cpu_loras"], "--max-rank", gpu["max_lora_rank"])
        answer = shell.json("simulate", "part.json", *P, *flags)
        # A split adapter has its share of the requests there, and requests of its own at that rate here.
        whole = all(adapter["share"] == 1 for adapter in gpu["adapters"])
        assert answer["throughput_tps"] == pytest.approx(
            gpu["predicted"]["throughput_tps"], rel=1e-6 if whole else 0.03
        )
    assert len(shares) == 41
    everything = shell.json("simulate", "w.json", *P, "--slots", 41)
    for count in ("offered_tps", "offered_output_tps"):
        assert sum(gpu["predicted"][count] for gpu in placed["gpus"]) == pytest.approx(everything[count], rel=1e-9)
    assert all(share == pytest.approx(1.0) for share in shares.values())
    page = (out / "index.html").read_text()
    assert f"{placed['gpu_count']} GPUs for 41 adapters" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_simple_ways_stand_beside_ours(placed: Any) -> None:
    for row in placed["compared"].values():
        assert row["gpus"] is None or row["starved"] or row["memory_errors"] or row["gpus"] >= placed["gpu_count"]


def test_the_terminal_says_what_matters(shell: Shell) -> None:
    text = shell.run("place", "w.json", *P, "--slo", "ttft_p99=5s").stdout
    assert "GPUs for 41 adapters" in text.splitlines()[0]
    assert "accepted by the twin" in text.splitlines()[0]
    assert "gpu-0" in text


@pytest.mark.parametrize(("rate", "flags", "headline", "page"), [
    pytest.param(0.1, ("--objective", "latency", "--gpus", 9),
                 "4 GPUs, of 9 given, for 4 adapters (with the lowest p99 TTFT that was found); accepted by the twin",
                 "sees no adapter starved", id="more GPUs than adapters"),
    pytest.param(0, (), "1 GPU for 4 adapters; NOT tried by the twin, because no request arrives",
                 "NOT tried by the digital twin", id="every rate is 0"),
    pytest.param(0.1, (), "1 GPU for 4 adapters (as few as can be); accepted by the twin", "sees no adapter starved",
                 id="one GPU is enough"),
])  # fmt: skip
def test_the_headline_says_what_was_found_and_tried(
    shell: Shell, rate: float, flags: tuple[Any, ...], headline: str, page: str
) -> None:
    few = [{"name": "a", "count": 4, "rank": 8, "rate": rate}]
    (shell.root / "few.json").write_text(json.dumps(WORKLOAD | {"duration": 600, "adapters": few}))
    text = shell.run("place", "few.json", *P, *flags, "-o", "few", "--force").stdout
    assert text.splitlines()[0] == headline
    written = (shell.root / "few" / "index.html").read_text()
    assert page in written
    assert ("lower bound" in written) == ("--gpus" not in flags)


def test_a_placement_is_kept_when_the_workload_changes(shell: Shell, placed: Any) -> None:
    more = WORKLOAD["adapters"] + [{"name": "zz", "rank": 16, "rate": 0.1}]  # type: ignore[operator]
    (shell.root / "w2.json").write_text(json.dumps(WORKLOAD | {"adapters": more}))
    found = shell.json("place", "w2.json", "--from", "out")
    assert [move["adapter"] for move in found["moves"]] == ["zz"]
    text = shell.run("place", "--from", "out").stdout
    assert "0 adapters move, 0 are new" in text
    assert placed["gpu_count"] == found["gpu_count"]


@pytest.mark.parametrize(
    ("flags", "headroom", "slo", "noted"),
    [
        ((), 0.2, {"ttft_p99": 30_000.0}, 2),
        (("--headroom", "10%"), 0.1, {"ttft_p99": 30_000.0}, 1),
        (("--slo", "itl_mean=1s"), 0.2, {"itl_mean": 1000.0}, 1),
        (("--slo", "none", "--headroom", "0"), 0.0, {}, 0),
    ],
)
def test_headroom_and_goals_of_the_old_placement_are_kept(
    shell: Shell, flags: tuple[str, ...], headroom: float, slo: dict[str, float], noted: int
) -> None:
    (shell.root / "one.json").write_text(json.dumps(WORKLOAD | {"adapters": [{"name": "a", "rank": 8, "rate": 0.1}]}))
    if not (shell.root / "goals").exists():
        shell.run("place", "one.json", *P, "--headroom", "20%", "--slo", "ttft_p99=30s", "-o", "goals")
    found = shell.json("place", "--from", "goals", *flags)
    assert (found["headroom"], found["slo"]) == (headroom, slo)
    assert sum("old placement" in note for note in found["notes"]) == noted


def test_traces_travel_with_the_placement(shell: Shell) -> None:
    rows = [{"time": i / 9, "adapter": f"a{i % 5}", "prompt_tokens": 50, "output_tokens": 20} for i in range(500)]
    folder = shell.root / "traces"
    folder.mkdir()
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "w.json").write_text(json.dumps({"requests": {"path": "t.jsonl"}, "duration": 60}))
    shell.run("place", "traces/w.json", *P, "-o", "traced", "--what-if")
    assert (shell.root / "traced" / "t.jsonl").is_file()
    assert "0 adapters move" in shell.run("place", "--from", "traced").stdout


def test_a_placement_is_not_replaced_by_another_unasked(shell: Shell, placed: Any) -> None:
    before = (shell.root / "out" / "placement.json").read_bytes()
    (shell.root / "small.json").write_text(json.dumps(WORKLOAD | {"adapters": [{"name": "a", "rank": 8, "rate": 0.1}]}))
    shutil.copytree(shell.root / "out", shell.root / "copy-1")
    said = shell.error("place", "small.json", *P, "-o", "out", "--quiet")
    assert f"out: holds a placement of 41 adapters on {placed['gpu_count']} GPUs; add --force to replace it" in said
    assert "add --force" in shell.error("place", "small.json", "--from", "copy-1", "-o", "out", "--quiet")
    assert (shell.root / "out" / "placement.json").read_bytes() == before
    shutil.copytree(shell.root / "out", shell.root / "copy-2")
    shell.run("place", "small.json", *P, "-o", "copy-2", "--force")
    assert json.loads((shell.root / "copy-2" / "placement.json").read_text())["adapter_count"] == 1
    shell.run("place", "--from", "copy-2", "-o", "copy-2")  # how a placement is updated
    (shell.root / "copy-2" / "placement.json").write_text("{")
    assert "copy-2: holds a placement; add --force" in shell.error("place", "small.json", *P, "-o", "copy-2")


def test_an_idle_gpu_of_an_old_placement_is_dropped(shell: Shell, placed: Any) -> None:
    shutil.copytree(shell.root / "out", shell.root / "idle")
    old = json.loads((shell.root / "idle" / "placement.json").read_text())
    old["gpus"].append(old["gpus"][0] | {"id": "spare", "adapters": []})
    (shell.root / "idle" / "placement.json").write_text(json.dumps(old))
    found = shell.json("place", "--from", "idle")
    assert "spare of the old placement serves nothing; it is dropped" in found["notes"]
    assert [gpu["id"] for gpu in found["gpus"]] == [gpu["id"] for gpu in placed["gpus"]]


def test_odd_names_are_deployed_or_refused_before_anything_is_computed(shell: Shell) -> None:
    names = ["a=b", "team/legal v2", "$HOME", "org/model@v1", "\U0001f9a5", "--flag", "<script>"]
    listed = [{"name": name, "rank": 8, "rate": 0.1} for name in names]
    (shell.root / "odd.json").write_text(json.dumps(WORKLOAD | {"adapters": listed}))
    shell.run("place", "odd.json", *P, "-o", "odd")
    assert set(json.loads((shell.root / "odd" / "routes.json").read_text())) == set(names)
    page = (shell.root / "odd" / "index.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    for name, said in (("meta-llama/Llama-3.1-8B-Instruct", "the base model"), ("../../etc/x", "..")):
        other = [*listed, {"name": name, "rank": 8, "rate": 0.1}]
        (shell.root / "bad.json").write_text(json.dumps(WORKLOAD | {"adapters": other}))
        assert said in shell.error("place", "bad.json", *P, "-o", "bad")
        assert not (shell.root / "bad").exists()


def test_advice(shell: Shell) -> None:
    found = shell.json("advise", *P, "--rank", 32, "--rate", 1.0)
    assert found["best"]["adapters"] == max(row["adapters"] for row in found["slots"])
    assert set(found["overheads"]) == {"memory", "model", "loading", "scheduler"}
    text = shell.run("advise", *P, "--rank", 32, "--rate", 1.0).stdout
    assert "<- most" in text
    assert "KV tokens" in text


def test_advice_says_what_waits_and_what_was_assumed(shell: Shell) -> None:
    profile = find_profile("llama-3.1-8b-h100-64gb")
    unread = replace(profile, name="mine", assumed={"step.lora": "no step shows it"})
    (shell.root / "mine.json").write_text(json.dumps(unread.to_json()))
    asked = ("--profile", "mine.json", "--rank", 8, "--rate", 0.5, "--headroom", "0")
    found = shell.json("advise", *asked)
    text = shell.run("advise", *asked).stdout
    assumed = "1 cost of mine was not measured but assumed (step.lora)"
    assert [note.startswith(assumed) for note in found["notes"]][-1]
    assert f"note: {assumed}" in text
    p99 = found["best"]["ttft_p99_ms"]
    assert bool(found["waits"]) == (p99 > 10_000)
    assert text.splitlines()[0].endswith(found["waits"])
    assert f"note: {assumed}" in shell.run("simulate", "w.json", *asked[:2], "--slots", 8).stdout
    limited = shell.json("advise", *asked, "--slo", "ttft_p99=100s")
    assert limited["waits"] == ""


def test_the_rules_can_be_read(shell: Shell) -> None:
    text = shell.run("surrogate", "show", *P).stdout
    assert "is it starved?" in text
    assert "if utilisation" in text
    assert shell.json("surrogate", "show", *P)["accuracy"]["trees"]["throughput_leaves"] <= 64


@pytest.mark.parametrize(("arguments", "said"), [
    (("place", *P), "give a WORKLOAD"),
    (("place", "w.json"), "--profile P"),
    (("place", "w.json", *P, "--headroom", "x"), "write a share like 10%"),
    (("place", "w.json", *P, "--headroom", "10"), "write a share like 10%"),
    (("place", "w.json", *P, "--slo", "ttft_p98=1s"), "did you mean 'ttft_p99'"),
    (("place", "w.json", *P, "--slo", "ttft_p99=1s", "--slo", "ttft_p99=2s"), "ttft_p99 is limited twice"),
    (("place", "w.json", "--profile", 300 * "x"), "unknown profile 'xxx"),
    (("place", "w.json", *P, "--objective", "latency"), "go together"),
    (("place", "w.json", *P, "--price", "lama-3.1-8b-h100-64gb=2"), "did you mean 'llama-3.1-8b-h100-64gb'"),
    (("place", "w.json", *P, "--price", "2"), "write it like"),
    (("place", "w.json", *P, *2 * ("--price", "llama-3.1-8b-h100-64gb=2")), "--price gives two prices for llama-3.1"),
    (("place", "w.json", *P, "--slo", "none", "--slo", "ttft_p99=1s"), "--slo none drops every limit; give it"),
    (("place", "w.json", *P, "-o", "taken"), "is not a placement"),
    (("place", "--from", "nowhere"), "cannot be read as a placement"),
    (("place", "w.json", *P, "--profile", "qwen-2.5-7b-h100-64gb"), "adapters of one base model cannot be served on"),
    (("place", "w.json", *P, "--profile", "qwen-2.5-7b-h100-64gb", "--what-if"), "give profiles of one model"),
    (("place", "w.json", *P, *P), "two of the profiles are called 'llama-3.1-8b-h100-64gb'"),
    (("advise", *P, "--rank", "8", "--rate", "1", "--input-mean", "1e7"), "rejects prompts of 131,072 tokens"),
    (("advise", *P, "--rank", "9999", "--rate", "1"), "vLLM serves ranks up to 512"),
    (("advise", *P, "--rank", "8", "--rate", "500"), "cannot serve even one adapter"),
])  # fmt: skip
def test_mistakes_are_told(shell: Shell, arguments: tuple[str, ...], said: str) -> None:
    taken: Path = shell.root / "taken"
    taken.mkdir(exist_ok=True)
    (taken / "file").write_text("")
    assert said in shell.error(*arguments, "--quiet")
