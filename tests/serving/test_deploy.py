"""The files that run a placement, and the file that records it."""

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltaworks.errors import UserError
from deltaworks.serving import deploy
from deltaworks.serving.document import read_placement, with_traces
from deltaworks.serving.profile import KvCache, Profile, StepTime

PROFILE = Profile("p", "vLLM 0.11.2 (V1)", "org/model", "g", KvCache(1e5), StepTime(5))


def gpu(index: int, adapters: list[tuple[str, float]]) -> dict[str, Any]:
    listed = [{"name": name, "share": share, "rank": 8, "rate": share} for name, share in adapters]
    return {
        "id": f"gpu-{index}",
        "type": "p",
        "adapters": listed,
        "max_loras": 4,
        "max_cpu_loras": 9,
        "max_lora_rank": 16,
    }


GPUS = [gpu(0, [("hot", 0.25), ("it's $odd", 1.0)]), gpu(1, [("hot", 0.75)])]
FILES = deploy.files({"gpus": GPUS}, {"p": PROFILE}, {"hot": "org/hot"})


def test_commands_hold_what_was_placed() -> None:
    words = deploy.command(GPUS[0], PROFILE, {"hot": "org/hot"}, 8000)
    flags = dict(itertools.pairwise(words))
    assert words[:3] == ["vllm", "serve", "org/model"]
    assert flags["--max-loras"] == "4"
    assert flags["--max-cpu-loras"] == "9"
    assert flags["--max-lora-rank"] == "16"
    assert words[words.index("--lora-modules") + 1 :] == ["hot=org/hot", "it's $odd=$ADAPTERS/it's $odd"]


def test_the_script_is_shell_and_quotes_names(tmp_path: Path) -> None:
    (tmp_path / "serve.sh").write_text(FILES["serve.sh"])
    (tmp_path / "vllm").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (tmp_path / "vllm").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ADAPTERS": "/a b"}

    def start(name: str) -> subprocess.CompletedProcess[str]:
        words = ["bash", str(tmp_path / "serve.sh"), name]
        return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)

    done, wrong = start("gpu-0"), start("gpu-7")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["hot=org/hot", "it's $odd=/a b/it's $odd"]
    assert wrong.returncode == 2
    assert "no server called gpu-7" in wrong.stderr


def test_every_request_has_a_way() -> None:
    routes = json.loads(FILES["routes.json"])
    assert set(routes) == {"hot", "it's $odd"}
    assert [target["server"] for target in routes["hot"]] == ["gpu-0", "gpu-1"]
    assert all(sum(target["share"] for target in targets) == pytest.approx(1.0) for targets in routes.values())
    models = yaml.safe_load(FILES["litellm.yaml"])["model_list"]
    weights = [m["litellm_params"]["weight"] for m in models if m["model_name"] == "hot"]
    assert weights == [250, 750]
    assert {m["litellm_params"]["api_base"] for m in models} == {"http://localhost:8000/v1", "http://localhost:8001/v1"}


def test_compose_and_kubernetes_agree_on_the_servers() -> None:
    services = yaml.safe_load(FILES["compose.yaml"])["services"]
    documents = list(yaml.safe_load_all(FILES["kubernetes.yaml"]))
    assert list(services) == ["gpu-0", "gpu-1"]
    assert [d["kind"] for d in documents] == ["Deployment", "Service"] * 2
    for index, service in enumerate(services.values()):
        assert service["image"] == "${VLLM_IMAGE:-vllm/vllm-openai:v0.11.2}"
        container = documents[2 * index]["spec"]["template"]["spec"]["containers"][0]
        assert container["command"] == ["vllm", "serve"]
        assert container["args"] == service["command"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}
        labels = documents[2 * index]["spec"]["template"]["metadata"]["labels"]
        assert documents[2 * index + 1]["spec"]["selector"] == labels


@pytest.mark.parametrize(("text", "said"), [
    ("{", "cannot be read as a placement"), ("[]", "is no placement of version 1"), ('{"schema": 9}', "version 1"),
    ('{"schema": 1, "gpus": [{}], "workload": {}, "profiles": {}}', "duration is missing"),
    (('{"schema": 1, "gpus": [{}], "workload": {"duration": 1, "lengths": {"distribution": "fixed", "input_mean": 9,'
     ' "output_mean": 9}, "adapters": [{"name": "a", "rank": 8, "rate": 1}]}, "profiles": {}}'), "is damaged"),
])  # fmt: skip
def test_damaged_placements_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "placement.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_placement(tmp_path)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "t.csv"
    with pytest.raises(FileNotFoundError):
        deploy.write(out, {"a.txt": "1"}, {"t.csv": trace})
    assert list(tmp_path.iterdir()) == []
    trace.write_text("x")
    deploy.write(out, {"a.txt": "1", "b.sh": "2"}, {"t.csv": trace})
    assert sorted(path.name for path in out.iterdir()) == ["a.txt", "b.sh", "t.csv"]
    (out / "mine").write_text("kept")
    deploy.write(out, {"a.txt": "3"}, {"t.csv": out / "t.csv"})
    assert {path.name: path.read_text() for path in out.iterdir()} == {
        "a.txt": "3",
        "b.sh": "2",
        "t.csv": "x",
        "mine": "kept",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "t.csv"]


def test_traces_of_one_name_do_not_meet(tmp_path: Path) -> None:
    content = {"requests": "one/t.csv", "lengths": {"path": "two/t.csv"}, "adapters": [{"name": "path"}]}
    moved, traces = with_traces(content, tmp_path)
    assert moved == {"requests": "t.csv", "lengths": {"path": "t-2.csv"}, "adapters": [{"name": "path"}]}
    assert traces == {"t.csv": tmp_path / "one" / "t.csv", "t-2.csv": tmp_path / "two" / "t.csv"}
