"""Files that run a placement: vLLM commands, compose, Kubernetes, routing maps, configs of a LiteLLM router."""

import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from deltaworks.serving.names import check_names, doubled, is_hub_id, lora_module, shell_module
from deltaworks.serving.profile import Profile

FIRST_PORT = 8000
NODE_LABEL = "nvidia.com/gpu.product"
"""The node label that tells GPU types apart in Kubernetes, as NVIDIA's GPU feature discovery sets it."""

_TARGETS: dict[str, Callable[[int, str], str]] = {
    "": lambda index, _: f"http://localhost:{FIRST_PORT + index}",
    ".compose": lambda _, gpu: f"http://{gpu}:{FIRST_PORT}",
    ".kubernetes": lambda _, gpu: f"http://{_service(gpu)}:{FIRST_PORT}",
}
"""Where a server is reached, from its number and its id, by what the names of routing files have before their suffix.

The first is this machine: serve.sh listens there, and compose.yaml publishes the same ports.
"""


def command(
    gpu: Mapping[str, Any], profile: Profile, paths: Mapping[str, str], port: int, folder: str = "$ADAPTERS"
) -> list[str]:
    """The `vllm serve` command of a GPU, word by word; adapters are loaded at the start.

    Args:
        gpu: As in placement.json.
        profile: Of its type.
        paths: Of adapters by name; others are expected in ``folder``.
        port: To listen on.
        folder: Of adapters, each in a folder of its name.
    """
    words = _server(gpu, profile, port)
    names = [adapter["name"] for adapter in gpu["adapters"]]
    return words + [lora_module(name, paths.get(name, f"{folder}/{name}")) for name in names]


def _server(gpu: Mapping[str, Any], profile: Profile, port: int) -> list[str]:
    """The command without its adapters; the last word is the flag that they follow."""
    flags = profile.server
    words = [
        "vllm", "serve", profile.model, "--port", str(port), "--enable-lora",
        "--max-loras", str(gpu["max_loras"]), "--max-cpu-loras", str(gpu["max_cpu_loras"]),
        "--max-lora-rank", str(gpu["max_lora_rank"]), "--max-num-seqs", str(flags.max_num_seqs),
        "--max-num-batched-tokens", str(flags.max_num_batched_tokens), "--block-size", str(flags.block_size),
    ]  # fmt: skip
    if flags.max_model_len is not None:
        words += ["--max-model-len", str(flags.max_model_len)]
    if gpu["adapters"]:
        words.append("--lora-modules")
    return words


def files(placement: Mapping[str, Any], profiles: Mapping[str, Profile], paths: Mapping[str, str]) -> dict[str, str]:
    """Every file to deploy a placement with, by its name in the folder.

    Args:
        placement: As in placement.json.
        profiles: The types of GPU that there are, by name, with those that the placement does not use.
        paths: Of adapters by name, as far as they are known.

    Raises:
        PlacementError: an adapter's name cannot be deployed.
    """
    gpus = placement["gpus"]
    names = {adapter["name"]: None for gpu in gpus for adapter in gpu["adapters"]}
    check_names(names, paths, {profiles[gpu["type"]].model for gpu in gpus})
    found = {
        "serve.sh": script(gpus, profiles, paths),
        "compose.yaml": compose(gpus, profiles, paths),
        "kubernetes.yaml": kubernetes(gpus, profiles, paths),
    }
    for target in _TARGETS:
        found[f"routes{target}.json"] = json.dumps(routes(gpus, target), indent=1) + "\n"
        found[f"litellm{target}.yaml"] = litellm(gpus, target)
    return found


def script(gpus: list[Any], profiles: Mapping[str, Profile], paths: Mapping[str, str]) -> str:
    """A bash script that starts one server, or all on one machine.

    With all of them, the script stops every server when it is ended by a signal, or as soon as one server fails; it
    exits with the status of that server.
    """
    lines = [
        "#!/usr/bin/env bash",
        "# Starts the servers of this placement: `serve.sh gpu-0` one, `serve.sh` all, each on its own GPU.",
        "# Adapters are looked for under $ADAPTERS, a folder for each.",
        "set -euo pipefail",
        'export ADAPTERS="${ADAPTERS:-./adapters}"',
        "# vLLM reads these characters in --lora-modules as marks of its own.",
        'case "$ADAPTERS" in *[=,\\"\\\\[:cntrl:]]*)',
        "  echo 'ADAPTERS must be a path without = , \" \\ and control characters' >&2; exit 2 ;;",
        "esac",
        "",
        'start() { case "$1" in',
    ]
    for index, gpu in enumerate(gpus):
        words = [shlex.quote(word) for word in _server(gpu, profiles[gpu["type"]], FIRST_PORT + index)]
        words += [shell_module(adapter["name"], paths.get(adapter["name"])) for adapter in gpu["adapters"]]
        lines.append(f'  {gpu["id"]}) export CUDA_VISIBLE_DEVICES="${{DEVICE:-{index}}}"')
        lines.append("    exec " + " ".join(words) + " ;;")
    lines += [
        '  *) echo "no server called $1" >&2; exit 2 ;;',
        "esac; }",
        "",
        'if [ $# -gt 0 ]; then start "$1"; fi',
        "# However this script ends, no server outlives it; it fails as soon as one of them does.",
        "stop() { kill $(jobs -rp) 2>/dev/null || :; wait || :; }",
        "trap stop EXIT",
        "trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM",
        f"gpus=({' '.join(gpu['id'] for gpu in gpus)}) pids=()",
        'for gpu in "${gpus[@]}"; do (start "$gpu") & pids+=($!); done',
        "status=0",
        "# Polled: `wait -n` misses a server that ends before it is called, and does not say which one ended.",
        'while [ "$status" = 0 ] && [ "${#pids[@]}" -gt 0 ]; do',
        '  for i in "${!pids[@]}"; do',
        '    if kill -0 "${pids[i]}" 2>/dev/null; then continue; fi',
        '    wait "${pids[i]}" || { status=$?; echo "${gpus[i]} ended with status $status; all servers stop" >&2; }',
        "    unset 'pids[i]'",
        "  done",
        "  sleep 0.2",
        "done",
        'exit "$status"',
    ]
    return "\n".join(lines) + "\n"


def image(profile: Profile) -> str:
    """The image of vLLM's project for the engine of a profile."""
    found = re.search(r"\d+\.\d+\.\d+", profile.engine)
    return f"vllm/vllm-openai:v{found[0]}" if found else "vllm/vllm-openai:latest"


_CACHE = "huggingface"
"""The volume of a compose project that keeps what its servers fetch from the hub."""

_HEALTH_CHECK = {
    # Not every image of vLLM has curl.
    "test": [
        "CMD", "python3", "-c",
        f"import urllib.request; urllib.request.urlopen('http://localhost:{FIRST_PORT}/health', timeout=5)",
    ],
    "interval": "10s", "timeout": "10s", "retries": 3,
    # As long as the startup probe in Kubernetes waits: a server may have to fetch its model first.
    "start_period": "900s",
}  # fmt: skip


def compose(gpus: list[Any], profiles: Mapping[str, Profile], paths: Mapping[str, str]) -> str:
    """A compose file with a service for each GPU."""
    services = {}
    for index, gpu in enumerate(gpus):
        profile = profiles[gpu["type"]]
        words = _contained(gpu, profile, paths)
        devices = [{"driver": "nvidia", "device_ids": [str(index)], "capabilities": ["gpu"]}]
        services[gpu["id"]] = {
            "image": f"${{VLLM_IMAGE:-{image(profile)}}}",
            # Images of vLLM differ in their entry points, and not all of them take the model as `vllm serve` does.
            "entrypoint": words[:2],
            "command": words[2:],
            "ports": [f"{FIRST_PORT + index}:{FIRST_PORT}"],
            "environment": {"HF_TOKEN": "${HF_TOKEN:-}", "HF_HOME": f"/{_CACHE}"},
            "volumes": ["${ADAPTERS:-./adapters}:/adapters:ro", f"{_CACHE}:/{_CACHE}"],
            "ipc": "host",
            "restart": "unless-stopped",
            "healthcheck": _HEALTH_CHECK,
            "deploy": {"resources": {"reservations": {"devices": devices}}},
        }
    return _yaml({"services": services, "volumes": {_CACHE: {}}})


def _contained(gpu: Mapping[str, Any], profile: Profile, paths: Mapping[str, str]) -> list[str]:
    """The command in a container, escaped for its file; adapters without a hub id lie under /adapters there."""
    remote = {name: path for name, path in paths.items() if is_hub_id(path)}
    return [doubled(word) for word in command(gpu, profile, remote, FIRST_PORT, "/adapters")]


def _service(gpu: str) -> str:
    """What a GPU's Deployment and Service are called in Kubernetes."""
    return f"vllm-{gpu}"


def node_labels(profiles: Mapping[str, Profile]) -> dict[str, str]:
    """For each type of GPU the value of `NODE_LABEL`: its product, as far as a label may hold it.

    Args:
        profiles: The types of GPU, by name.
    """
    values = {}
    for name, profile in profiles.items():
        value = re.sub(r"[^A-Za-z0-9_.]+", "-", profile.gpu)[:63].strip("-_.")
        values[name] = value or re.sub(r"[^A-Za-z0-9_.]+", "-", name)[:63].strip("-_.") or "unknown"
    return values


def kubernetes(gpus: list[Any], profiles: Mapping[str, Profile], paths: Mapping[str, str]) -> str:
    """A Deployment and a Service for each GPU; adapters come from a claim called ``lora-adapters``.

    Where there are several types of GPU, even if the placement uses one of them only, a node selector keeps every pod
    on nodes of its own.
    """
    products = node_labels(profiles)
    head = _SELECTED if len(profiles) > 1 else ""
    documents = []
    for gpu in gpus:
        profile = profiles[gpu["type"]]
        labels = {"app.kubernetes.io/name": "vllm", "app.kubernetes.io/instance": gpu["id"]}
        words = _contained(gpu, profile, paths)
        probe = {"httpGet": {"path": "/health", "port": FIRST_PORT}}
        container = {
            "name": "vllm",
            "image": image(profile),
            "command": words[:2],
            "args": words[2:],
            "ports": [{"name": "http", "containerPort": FIRST_PORT}],
            "env": [{
                "name": "HF_TOKEN",
                "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}},
            }],
            "resources": {"limits": {"nvidia.com/gpu": "1"}},
            "startupProbe": {**probe, "periodSeconds": 10, "failureThreshold": 90},
            "readinessProbe": {**probe, "periodSeconds": 5},
            "volumeMounts": [
                {"name": "adapters", "mountPath": "/adapters", "readOnly": True},
                {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108  # where NCCL and PyTorch want it
            ],
        }  # fmt: skip
        volumes = [
            {"name": "adapters", "persistentVolumeClaim": {"claimName": "lora-adapters", "readOnly": True}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ]
        pod: dict[str, Any] = {"containers": [container], "volumes": volumes}
        if len(profiles) > 1:
            pod = {"nodeSelector": {NODE_LABEL: products[gpu["type"]]}, **pod}
        documents.append(
            {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": _service(gpu["id"]), "labels": labels},
                "spec": {
                    "replicas": 1,
                    "strategy": {"type": "Recreate"},
                    "selector": {"matchLabels": labels},
                    "template": {"metadata": {"labels": labels}, "spec": pod},
                },
            }
        )
        documents.append(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": _service(gpu["id"]), "labels": labels},
                "spec": {"selector": labels, "ports": [{"name": "http", "port": FIRST_PORT, "targetPort": "http"}]},
            }
        )
    return head + "---\n".join(_yaml(document) for document in documents)


_SELECTED = f"""\
# There are several types of GPU, so every pod has a selector for nodes with the label {NODE_LABEL}, which
# NVIDIA's GPU feature discovery sets. Its values here are those of the profiles; adapt them to your nodes:
#   kubectl get nodes -L {NODE_LABEL}
"""


def routes(gpus: list[Any], target: str = "") -> dict[str, list[dict[str, Any]]]:
    """Where the requests of every adapter go: servers and shares that sum to one.

    Args:
        gpus: As in placement.json.
        target: Where the router runs, one of `_TARGETS`.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for index, gpu in enumerate(gpus):
        for adapter in gpu["adapters"]:
            url = _TARGETS[target](index, gpu["id"])
            found.setdefault(adapter["name"], []).append({"server": gpu["id"], "url": url, "share": adapter["share"]})
    return dict(sorted(found.items()))


def litellm(gpus: list[Any], target: str = "") -> str:
    """A LiteLLM router's config: one deployment for each adapter on each GPU, weighted by its share.

    Args:
        gpus: As in placement.json.
        target: Where the router runs, one of `_TARGETS`.
    """
    models = [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"hosted_vllm/{name}",
                "api_base": f"{server['url']}/v1",
                "weight": max(round(1000 * server["share"]), 1),
            },
        }
        for name, servers in routes(gpus, target).items()
        for server in servers
    ]
    return _yaml({"model_list": models, "router_settings": {"routing_strategy": "simple-shuffle"}})


def _yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=4096)


def write(folder: Path, contents: Mapping[str, str], copies: Mapping[str, Path] | None = None) -> None:
    """Write files into a folder; scripts can be run.

    A new folder appears with all of them or not at all; in one that is there, each file is replaced at once, in order.

    Args:
        folder: Where.
        contents: Texts by the names of their files.
        copies: Files to be copied, by the names of the copies.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, source in (copies or {}).items():
            shutil.copyfile(source, partial / name)
        for name, text in contents.items():
            (partial / name).write_text(text, encoding="utf-8")
            if name.endswith(".sh"):
                (partial / name).chmod(0o755)
        if not folder.exists() or not any(folder.iterdir()):
            partial.chmod(0o755)
            partial.replace(folder)
            return
        for name in (*(copies or {}), *contents):
            (partial / name).replace(folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
