"""place, advise and surrogate as a user runs them."""

import json
from pathlib import Path
from typing import Any

import pytest
from shell import Shell

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


def test_a_placement_is_kept_when_the_workload_changes(shell: Shell, placed: Any) -> None:
    more = WORKLOAD["adapters"] + [{"name": "zz", "rank": 16, "rate": 0.1}]  # type: ignore[operator]
    (shell.root / "w2.json").write_text(json.dumps(WORKLOAD | {"adapters": more}))
    found = shell.json("place", "w2.json", "--from", "out")
    assert [move["adapter"] for move in found["moves"]] == ["zz"]
    text = shell.run("place", "--from", "out").stdout
    assert "0 adapters move, 0 are new" in text
    assert placed["gpu_count"] == found["gpu_count"]


def test_traces_travel_with_the_placement(shell: Shell) -> None:
    rows = [{"time": i / 9, "adapter": f"a{i % 5}", "prompt_tokens": 50, "output_tokens": 20} for i in range(500)]
    folder = shell.root / "traces"
    folder.mkdir()
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "w.json").write_text(json.dumps({"requests": {"path": "t.jsonl"}, "duration": 60}))
    shell.run("place", "traces/w.json", *P, "-o", "traced", "--what-if")
    assert (shell.root / "traced" / "t.jsonl").is_file()
    assert "0 adapters move" in shell.run("place", "--from", "traced").stdout


def test_advice(shell: Shell) -> None:
    found = shell.json("advise", *P, "--rank", 32, "--rate", 1.0)
    assert found["best"]["adapters"] == max(row["adapters"] for row in found["slots"])
    assert set(found["overheads"]) == {"memory", "model", "loading", "scheduler"}
    text = shell.run("advise", *P, "--rank", 32, "--rate", 1.0).stdout
    assert "<- most" in text
    assert "KV tokens" in text


def test_the_rules_can_be_read(shell: Shell) -> None:
    text = shell.run("surrogate", "show", *P).stdout
    assert "is it starved?" in text
    assert "if utilisation" in text
    assert shell.json("surrogate", "show", *P)["accuracy"]["trees"]["throughput_leaves"] <= 64


@pytest.mark.parametrize(("arguments", "said"), [
    (("place", *P), "give a WORKLOAD"),
    (("place", "w.json"), "--profile P"),
    (("place", "w.json", *P, "--headroom", "x"), "write a share like 10%"),
    (("place", "w.json", *P, "--slo", "ttft_p98=1s"), "did you mean 'ttft_p99'"),
    (("place", "w.json", *P, "--objective", "latency"), "go together"),
    (("place", "w.json", *P, "--price", "lama-3.1-8b-h100-64gb=2"), "did you mean 'llama-3.1-8b-h100-64gb'"),
    (("place", "w.json", *P, "--price", "2"), "write it like"),
    (("place", "w.json", *P, "-o", "taken"), "is no placement"),
    (("place", "--from", "nowhere"), "cannot be read as a placement"),
    (("advise", *P, "--rank", "9999", "--rate", "1"), "vLLM serves ranks up to 512"),
    (("advise", *P, "--rank", "8", "--rate", "500"), "cannot serve even one adapter"),
])  # fmt: skip
def test_mistakes_are_told(shell: Shell, arguments: tuple[str, ...], said: str) -> None:
    taken: Path = shell.root / "taken"
    taken.mkdir(exist_ok=True)
    (taken / "file").write_text("")
    assert said in shell.error(*arguments, "--quiet")
