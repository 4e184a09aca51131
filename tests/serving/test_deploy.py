"""The files that run a placement, and the file that records it."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from deltaworks.errors import PlacementError, UserError
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


ODD = [
    "a=b", "--flag", "-O3", "{x}", "a,b", "$HOME", "$$", "$(HOME)", "${HOME:-x}", "`id`", "it's \"quoted\"",
    "\U0001f9a5", "caf\u00e9", "team/legal v2", "org/model@v1", "a=$ADAPTERS/b", "back\\slash", "?", "~", "#x", "null",
    "1e3", "- x: y", "{{ x }}", "%s", "a;b&c|d>e", "!important", "</details><b>", "  two  ", "x" * 255,
]  # fmt: skip
"""Names that some file needs quoted or escaped."""

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


LIVING = "echo $$; exec tail -f /dev/null"
"""A server that prints its process id and runs until it is stopped."""


@pytest.mark.parametrize(
    ("server", "ended", "number", "status"),
    [
        pytest.param(LIVING, "script", signal.SIGTERM, 143, id="the script is ended"),
        pytest.param(LIVING, "server", signal.SIGKILL, 137, id="a server is killed"),
        pytest.param(LIVING, "server", signal.SIGTERM, 143, id="a server is ended"),
        pytest.param("echo $$; exit 3", "", None, 3, id="every server fails at the start"),
        pytest.param("echo $$; case $4 in 8000) exit 3; esac; exec tail -f /dev/null", "", None, 3, id="one fails"),
        pytest.param("echo $$; case $4 in 8001) exit 3; esac", "", None, 3, id="one fails and the other is done"),
        pytest.param("echo $$", "", None, 0, id="every server is done"),
    ],
)
def test_the_servers_of_the_script_end_together(
    tmp_path: Path, server: str, ended: str, number: signal.Signals | None, status: int
) -> None:
    (tmp_path / "serve.sh").write_text(FILES["serve.sh"])
    (tmp_path / "vllm").write_text(f"#!/bin/sh\n{server}\n")
    (tmp_path / "vllm").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    words = ["bash", str(tmp_path / "serve.sh")]
    script = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        assert script.stdout
        if number:
            servers = [int(script.stdout.readline()) for _ in GPUS]
            os.kill(servers[0] if ended == "server" else script.pid, number)
        # The servers hold the other end of the pipe, so this returns only when all of them have ended.
        _, said = script.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
        script.communicate()
    assert script.returncode == status
    assert (f"ended with status {status}" in said) == (status != 0 and ended != "script")


def vllm_modules(words: list[str]) -> dict[str, str]:
    """Adapters as vLLM's parser reads the words after ``--lora-modules``."""
    found = {}
    for word in words:
        assert not word.startswith("-"), "argparse takes it for a flag"
        if "=" in word and "," not in word:
            name, path = word.split("=")  # vLLM 0.8.5 takes no second one
        else:
            name, path = json.loads(word).values()
        found[name] = path
    return found


def escapes_undone(word: str) -> str:
    """A word as compose and Kubernetes read it, where nothing is left that they would replace."""
    assert re.fullmatch(r"(?:[^$]|\$\$)*", word), word
    return word.replace("$$", "$")


def test_odd_names_reach_vllm_from_every_file(tmp_path: Path) -> None:
    placement = {"gpus": [gpu(0, [(name, 1.0) for name in ODD])]}
    remote = {"?": "org/a,b", "a,b": "/models/one=two", "~": "/it's $HOME"}
    files = deploy.files(placement, {"p": PROFILE}, remote)
    expected = {name: remote.get(name, f"/my adapters/{name}") for name in ODD}
    (tmp_path / "serve.sh").write_text(files["serve.sh"], encoding="utf-8")
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    (tmp_path / "vllm").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$@\"\n")
    (tmp_path / "vllm").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ADAPTERS": "/my adapters", "PYTHONUTF8": "1"}
    subprocess.run(["bash", "-n", "serve.sh"], cwd=tmp_path, check=True)
    done = subprocess.run(["bash", "serve.sh", "gpu-0"], cwd=tmp_path, env=environment, capture_output=True, check=True)
    words = json.loads(done.stdout)
    assert vllm_modules(words[words.index("--lora-modules") + 1 :]) == expected
    inside = {n: p if n == "?" else f"/adapters/{n}" for n, p in expected.items()}
    service = yaml.safe_load(files["compose.yaml"])["services"]["gpu-0"]["command"]
    pod = next(yaml.safe_load_all(files["kubernetes.yaml"]))["spec"]["template"]["spec"]["containers"][0]["args"]
    for listed in (service, pod):
        words = [escapes_undone(word) for word in listed]
        assert vllm_modules(words[words.index("--lora-modules") + 1 :]) == inside
    assert set(json.loads(files["routes.json"])) == set(ODD)
    models = yaml.safe_load(files["litellm.yaml"])["model_list"]
    assert sorted(m["model_name"] for m in models) == sorted(ODD)
    assert all(m["litellm_params"]["model"] == f"hosted_vllm/{m['model_name']}" for m in models)


@pytest.mark.parametrize("folder", ["/a=b", "/a,b", '/a"b', "/a\\b", "/a\nb"])
def test_the_script_refuses_folders_that_vllm_would_misread(tmp_path: Path, folder: str) -> None:
    (tmp_path / "serve.sh").write_text(FILES["serve.sh"])
    done = subprocess.run(
        ["bash", "serve.sh"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "ADAPTERS": folder}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ADAPTERS must be a path without")


@pytest.mark.parametrize(("name", "said"), [
    ("", "more than spaces"), ("  ", "more than spaces"), ("a\nb", "control character"), ("a\0b", "control character"),
    ("a\x1b[31m", "control character"), ("a\x7f", "control character"), ("a\u0085b", "control character"),
    ("a\u2028b", "control character"), ("\ud83e", "control character"), ("x" * 256, "takes 256 bytes"),
    ("\U0001f9a5" * 64, "takes 256 bytes"), ("org/model", "the name of the base model"), ("../../etc/x", "'..'"),
    ("..", "'..'"), (".", "'.'"), ("a/../b", "'..'"), ("a//b", "is empty"), ("a/", "is empty"), ("a/./b", "'.'"),
    ("/etc/x", "begins with '/'"), ("*", "a pattern"), ("a-*", "a pattern"),
    ("os.environ/HOME", "environment variable"),
], ids=ascii)  # fmt: skip
def test_names_that_cannot_be_deployed_are_refused(name: str, said: str) -> None:
    with pytest.raises(PlacementError) as caught:
        deploy.files({"gpus": [gpu(0, [("a", 1.0), (name, 1.0)])]}, {"p": PROFILE}, {})
    assert re.fullmatch(r"adapter ['\"].*['\"] cannot be deployed: .*; give it another name", str(caught.value))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 250


def test_an_adapter_of_a_hub_needs_no_folder() -> None:
    files = deploy.files({"gpus": [gpu(0, [("../x", 1.0)])]}, {"p": PROFILE}, {"../x": "org/x"})
    assert "../x=org/x" in yaml.safe_load(files["compose.yaml"])["services"]["gpu-0"]["command"]


def test_every_request_has_a_way() -> None:
    routes = json.loads(FILES["routes.json"])
    assert set(routes) == {"hot", "it's $odd"}
    assert [target["server"] for target in routes["hot"]] == ["gpu-0", "gpu-1"]
    assert all(sum(target["share"] for target in targets) == pytest.approx(1.0) for targets in routes.values())
    models = yaml.safe_load(FILES["litellm.yaml"])["model_list"]
    weights = [m["litellm_params"]["weight"] for m in models if m["model_name"] == "hot"]
    assert weights == [250, 750]


@pytest.mark.parametrize("target", ["", ".compose", ".kubernetes"])
def test_routes_lead_to_the_servers_of_their_target(target: str) -> None:
    services = yaml.safe_load(FILES["compose.yaml"])["services"]
    documents = list(yaml.safe_load_all(FILES["kubernetes.yaml"]))
    reached = {
        # The script listens where compose publishes its services.
        "": [f"http://localhost:{service['ports'][0].partition(':')[0]}" for service in services.values()],
        ".compose": [f"http://{name}:{service['ports'][0].partition(':')[2]}" for name, service in services.items()],
        ".kubernetes": [
            f"http://{d['metadata']['name']}:{d['spec']['ports'][0]['port']}"
            for d in documents
            if d["kind"] == "Service"
        ],
    }[target]
    routes = json.loads(FILES[f"routes{target}.json"])
    assert [t["url"] for t in routes["hot"]] == reached
    assert [t["url"] for t in routes["it's $odd"]] == reached[:1]
    models = yaml.safe_load(FILES[f"litellm{target}.yaml"])["model_list"]
    bases = [m["litellm_params"]["api_base"] for m in models if m["model_name"] == "hot"]
    assert bases == [f"{url}/v1" for url in reached]
    assert re.findall(r"exec vllm .* --port (\d+)", FILES["serve.sh"]) == ["8000", "8001"]


def test_compose_and_kubernetes_agree_on_the_servers() -> None:
    services = yaml.safe_load(FILES["compose.yaml"])["services"]
    documents = list(yaml.safe_load_all(FILES["kubernetes.yaml"]))
    assert list(services) == ["gpu-0", "gpu-1"]
    assert yaml.safe_load(FILES["compose.yaml"])["volumes"] == {"huggingface": {}}
    assert [d["kind"] for d in documents] == ["Deployment", "Service"] * 2
    for index, service in enumerate(services.values()):
        assert service["image"] == "${VLLM_IMAGE:-vllm/vllm-openai:v0.11.2}"
        container = documents[2 * index]["spec"]["template"]["spec"]["containers"][0]
        assert container["command"] == service["entrypoint"] == ["vllm", "serve"]
        assert container["args"] == service["command"]
        assert service["restart"] == "unless-stopped"
        assert f"huggingface:{service['environment']['HF_HOME']}" in service["volumes"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}
        labels = documents[2 * index]["spec"]["template"]["metadata"]["labels"]
        assert documents[2 * index + 1]["spec"]["selector"] == labels


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (500, False), (None, False)])
def test_the_health_check_of_compose_asks_the_server(status: int | None, is_healthy: bool) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if status and self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    service = yaml.safe_load(FILES["compose.yaml"])["services"]["gpu-0"]
    how, *command = service["healthcheck"]["test"]
    assert how == "CMD"
    assert "http://localhost:8000/health" in command[-1]
    with HTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command[-1] = command[-1].replace(":8000", f":{server.server_port}")
        if status is None:
            server.shutdown()
            server.server_close()
        done = subprocess.run([sys.executable, *command[1:]], capture_output=True, check=False)
        server.shutdown()
    assert (done.returncode == 0) == is_healthy


@pytest.mark.parametrize(("types", "expected"), [
    pytest.param("pq", ["g", "NVIDIA-L40S-48-GB"], id="both are used"),
    pytest.param("qq", ["NVIDIA-L40S-48-GB", "NVIDIA-L40S-48-GB"], id="one is used"),
])  # fmt: skip
def test_pods_select_their_nodes_where_there_are_several_types(types: str, expected: list[str]) -> None:
    other = replace(PROFILE, name="q", gpu="NVIDIA L40S (48 GB)")
    placed = [gpu | {"type": kind} for gpu, kind in zip(GPUS, types, strict=True)]
    documents = yaml.safe_load_all(deploy.kubernetes(placed, {"p": PROFILE, "q": other}, {}))
    selectors = [d["spec"]["template"]["spec"]["nodeSelector"] for d in documents if d["kind"] == "Deployment"]
    assert selectors == [{"nvidia.com/gpu.product": product} for product in expected]


def test_node_labels_are_valid() -> None:
    other = replace(PROFILE, gpu="NVIDIA L40S (48 GB)")
    assert "nodeSelector" not in FILES["kubernetes.yaml"]
    labels = deploy.node_labels({"p": replace(PROFILE, gpu="_" * 99), "q": replace(PROFILE, gpu="x " * 99), "#": other})
    assert all(re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", value) for value in labels.values())


@pytest.mark.parametrize(("text", "said"), [
    ("{", "cannot be read as a placement"), ("[]", "is not a placement of version 1"), ('{"schema": 9}', "version 1"),
    ('{"schema": 1, "gpus": [{}], "workload": {}, "profiles": {}}', "duration is missing"),
    (('{"schema": 1, "gpus": [{}], "workload": {"duration": 1, "lengths": {"distribution": "fixed", "input_mean": 9,'
     ' "output_mean": 9}, "adapters": [{"name": "a", "rank": 8, "rate": 1}]}, "profiles": {}}'), "is damaged"),
])  # fmt: skip
def test_damaged_placements_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "placement.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_placement(tmp_path)


def recorded(**changed: Any) -> dict[str, Any]:
    """A placement of two adapters on two GPUs, as its file holds it; keys like ``gpus.0.id`` change one value."""
    adapters = [{"name": "hot", "rank": 8, "rate": 1}, {"name": "cold", "rank": 16, "rate": 1}]
    lengths = {"distribution": "fixed", "input_mean": 9, "output_mean": 9}
    content = {
        "schema": 1,
        "gpus": [gpu(0, [("hot", 0.25), ("cold", 1.0)]), gpu(1, [("hot", 0.75)])],
        "workload": {"duration": 1, "lengths": lengths, "adapters": adapters},
        "profiles": {"p": PROFILE.to_json()},
        "prices": {"p": 2.5},
    }
    for path, value in changed.items():
        at: Any = content
        *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
        for step in steps:
            at = at[step]
        at[last] = value
    return content


def test_a_recorded_placement_is_read(tmp_path: Path) -> None:
    idle = gpu(7, [])
    (tmp_path / "placement.json").write_text(json.dumps(recorded() | {"gpus": [*recorded()["gpus"], idle]}))
    found = read_placement(tmp_path)
    assert found.gpus == (("gpu-0", "p", {"hot": 0.25, "cold": 1.0}, 4), ("gpu-1", "p", {"hot": 0.75}, 4))
    assert found.idle == ("gpu-7",)
    assert found.prices == {"p": 2.5}
    assert found.profiles == {"p": PROFILE}


@pytest.mark.parametrize(("key", "value", "said"), [
    ("gpus", {}, "gpus: expected a list"),
    ("gpus", [], "gpus: shares of adapter 'cold' add up to 0, not 1"),
    ("gpus.0", "x", r"gpus\[0\]: expected keys and values"),
    ("gpus.0.id", 7, r"gpus\[0\].id: expected a text"),
    ("gpus.1.id", "gpu-0", r"gpus\[1\].id: two GPUs are called 'gpu-0'"),
    ("gpus.0.id", "a b", r"gpus\[0\].id: 'a b' is not an id"),
    ("gpus.0.id", "$(id)", "is not an id"),
    ("gpus.0.id", "x" * 59, "is not an id"),
    ("gpus.0.id", "gpu-", "is not an id"),
    ("gpus.0.type", "q", r"gpus\[0\].type: there is no profile 'q'"),
    ("gpus.0.type", None, r"gpus\[0\].type: expected a text"),
    ("gpus.0.max_loras", 0, r"gpus\[0\].max_loras: expected a number of at least 1"),
    ("gpus.0.max_loras", 1.5, "max_loras: expected a whole number"),
    ("gpus.0.max_loras", 1e400, "placement.json: .*"),
    ("gpus.0.max_cpu_loras", 3, "max_cpu_loras: expected a number of at least 4"),
    ("gpus.0.max_lora_rank", 24, "vLLM does not take a maximum rank of 24"),
    ("gpus.0.max_lora_rank", 8, "max_lora_rank: 8 is less than rank 16 of 'cold'"),
    ("gpus.0.adapters", "hot", r"gpus\[0\].adapters: expected a list"),
    ("gpus.0.adapters.0", 5, r"gpus\[0\].adapters\[0\]: expected keys and values"),
    ("gpus.0.adapters.0.name", "hott", r"the workload has no adapter 'hott'; did you mean 'hot'"),
    ("gpus.0.adapters.0.name", "cold", "'cold' is on this GPU twice"),
    ("gpus.0.adapters.0.share", 0.2, "shares of adapter 'hot' add up to 0.95, not 1"),
    ("gpus.0.adapters.0.share", 0.25001, "shares of adapter 'hot' add up to 1.00001, not 1"),
    ("gpus.0.adapters.0.share", 0, "share: expected a number above 0"),
    ("gpus.0.adapters.0.share", -0.25, "share: expected a number above 0"),
    ("gpus.0.adapters.0.share", 1.25, "share: expected at most 1"),
    ("gpus.0.adapters.0.share", True, "share: expected a number above 0"),
    ("gpus.0.adapters.0.share", "1", "share: expected a number above 0"),
    ("gpus.0.adapters.0.share", float("nan"), "placement.json: .*"),
    ("profiles", [], "profiles: expected keys and values"),
    ("profiles", {"q": PROFILE.to_json()}, "profiles.'q': is called 'p'"),
    ("profiles.p", 3, "profiles.p: expected keys and values"),
    ("prices", 3, "prices: expected keys and values"),
    ("prices", {"q": 3}, "prices: expected one for each of p"),
    ("prices.p", 0, "prices.p: expected a number above 0"),
    ("headroom", 11, "headroom: expected a number of at most 10"),
    ("slo", {"ttft": 5}, "unknown latency 'ttft'"),
    ("slo", {"ttft_p99": 0}, "slo.ttft_p99: expected a number above 0"),
    ("workload.adapters.0.rate", -1, r"workload: adapters\[0\].rate: expected a number"),
    ("workload", None, "placement.json: workload"),
])  # fmt: skip
def test_damage_to_a_recorded_placement_is_named(tmp_path: Path, key: str, value: Any, said: str) -> None:
    (tmp_path / "placement.json").write_text(json.dumps(recorded(**{key: value})))
    with pytest.raises(UserError, match=said) as caught:
        read_placement(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'placement.json'}: ")
    assert "\n" not in str(caught.value)


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "placement.json").write_text('{"schema": 1, "gpus": ' + "[" * 50_000 + "]" * 50_000 + "}")
    with pytest.raises(PlacementError, match="cannot be read as a placement"):
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


@pytest.mark.parametrize(
    ("content", "moved", "copied"),
    [
        pytest.param(
            {"requests": "routes.json"}, {"requests": "routes-2.json"}, {"routes-2.json"}, id="generated name"
        ),
        pytest.param(
            {"requests": [{"time": 1, "path": "x", "requests": "y"}]},
            {"requests": [{"time": 1, "path": "x", "requests": "y"}]},
            set(),
            id="inline requests with such columns",
        ),
        pytest.param(
            {"adapters": [{"name": "a", "lengths": {"path": "l.csv"}}]},
            {"adapters": [{"name": "a", "lengths": {"path": "l.csv"}}]},
            {"l.csv"},
            id="lengths of an adapter",
        ),
    ],
)
def test_only_files_that_a_workload_names_are_copied(
    tmp_path: Path, content: dict[str, Any], moved: dict[str, Any], copied: set[str]
) -> None:
    found, traces = with_traces(content, tmp_path, {"routes.json", "serve.sh"})
    assert found == moved
    assert set(traces) == copied


def test_traces_of_one_name_do_not_meet(tmp_path: Path) -> None:
    content = {"requests": "one/t.csv", "lengths": {"path": "two/t.csv"}, "adapters": [{"name": "path"}]}
    moved, traces = with_traces(content, tmp_path)
    assert moved == {"requests": "t.csv", "lengths": {"path": "t-2.csv"}, "adapters": [{"name": "path"}]}
    assert traces == {"t.csv": tmp_path / "one" / "t.csv", "t-2.csv": tmp_path / "two" / "t.csv"}
