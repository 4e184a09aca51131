"""Files that run a placement: vLLM commands, compose, Kubernetes, a static routing map, a LiteLLM router's config."""

import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deltaworks.serving.profile import Profile

FIRST_PORT = 8000


def command(gpu: Mapping[str, Any], profile: Profile, paths: Mapping[str, str], port: int) -> list[str]:
    """The `vllm serve` command of a GPU, word by word; adapters are loaded at the start.

    Args:
        gpu: As in placement.json.
        profile: Of its type.
        paths: Of adapters by name; others are expected under ``$ADAPTERS``.
        port: To listen on.
    """
    flags = profile.server
    words = [
        "vllm", "serve", profile.model, "--port", str(port), "--enable-lora",
        "--max-loras", str(gpu["max_loras"]), "--max-cpu-loras", str(gpu["max_cpu_loras"]),
        "--max-lora-rank", str(gpu["max_lora_rank"]), "--max-num-seqs", str(flags.max_num_seqs),
        "--max-num-batched-tokens", str(flags.max_num_batched_tokens), "--block-size", str(flags.block_size),
    ]  # fmt: skip
    if gpu["adapters"]:
        words.append("--lora-modules")
        names = [adapter["name"] for adapter in gpu["adapters"]]
        words += [f"{name}={paths.get(name, f'$ADAPTERS/{name}')}" for name in names]
    return words


def files(placement: Mapping[str, Any], profiles: Mapping[str, Profile], paths: Mapping[str, str]) -> dict[str, str]:
    """Every file to deploy a placement with, by its name in the folder.

    Args:
        placement: As in placement.json.
        profiles: The types of GPU, by name.
        paths: Of adapters by name, as far as they are known.
    """
    gpus = placement["gpus"]
    return {
        "serve.sh": script(gpus, profiles, paths),
        "compose.yaml": compose(gpus, profiles, paths),
        "kubernetes.yaml": kubernetes(gpus, profiles, paths),
        "routes.json": json.dumps(routes(gpus), indent=1) + "\n",
        "litellm.yaml": litellm(gpus),
    }


def script(gpus: list[Any], profiles: Mapping[str, Profile], paths: Mapping[str, str]) -> str:
    """A shell script that starts one server, or all on one machine."""
    lines = [
        "#!/usr/bin/env bash",
        "# Starts the servers of this placement: `serve.sh gpu-0` one, `serve.sh` all, each on its own GPU.",
        "# Adapters are looked for under $ADAPTERS, a folder for each.",
        "set -euo pipefail",
        'export ADAPTERS="${ADAPTERS:-./adapters}"',
        "",
        'start() { case "$1" in',
    ]
    for index, gpu in enumerate(gpus):
        words = command(gpu, profiles[gpu["type"]], paths, FIRST_PORT + index)
        lines.append(f'  {gpu["id"]}) export CUDA_VISIBLE_DEVICES="${{DEVICE:-{index}}}"')
        lines.append("    exec " + " ".join(map(_quoted, words)) + " ;;")
    lines += [
        '  *) echo "no server called $1" >&2; exit 2 ;;',
        "esac; }",
        "",
        'if [ $# -gt 0 ]; then start "$1"; fi',
        f'for gpu in {" ".join(gpu["id"] for gpu in gpus)}; do (start "$gpu") & done',
        "wait",
    ]
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    """A word for a shell, in which ``$ADAPTERS`` still stands for its value."""
    name, mark, path = word.partition("=$ADAPTERS/")
    return shlex.quote(name) + '="$ADAPTERS"/' + shlex.quote(path) if mark else shlex.quote(word)


def image(profile: Profile) -> str:
    """The image of vLLM's project for the engine of a profile."""
    found = re.search(r"\d+\.\d+\.\d+", profile.engine)
    return f"vllm/vllm-openai:v{found[0]}" if found else "vllm/vllm-openai:latest"


def compose(gpus: list[Any], profiles: Mapping[str, Profile], paths: Mapping[str, str]) -> str:
    """A compose file with a service for each GPU."""
    services = {}
    for index, gpu in enumerate(gpus):
        profile = profiles[gpu["type"]]
        devices = [{"driver": "nvidia", "device_ids": [str(index)], "capabilities": ["gpu"]}]
        services[gpu["id"]] = {
            "image": f"${{VLLM_IMAGE:-{image(profile)}}}",
            "command": _contained(gpu, profile, paths, FIRST_PORT)[2:],
            "ports": [f"{FIRST_PORT + index}:{FIRST_PORT}"],
            "environment": {"HF_TOKEN": "${HF_TOKEN:-}"},
            "volumes": ["${ADAPTERS:-./adapters}:/adapters:ro"],
            "ipc": "host",
            "deploy": {"resources": {"reservations": {"devices": devices}}},
        }
    return _yaml({"services": services})


def _contained(gpu: Mapping[str, Any], profile: Profile, paths: Mapping[str, str], port: int) -> list[str]:
    """The command in a container, where adapters lie under /adapters unless they have a hub id."""
    remote = {name: path for name, path in paths.items() if not path.startswith("/")}
    return [w.replace("=$ADAPTERS/", "=/adapters/") for w in command(gpu, profile, remote, port)]


def kubernetes(gpus: list[Any], profiles: Mapping[str, Profile], paths: Mapping[str, str]) -> str:
    """A Deployment and a Service for each GPU; adapters come from a claim called ``lora-adapters``."""
    documents = []
    for gpu in gpus:
        profile = profiles[gpu["type"]]
        labels = {"app.kubernetes.io/name": "vllm", "app.kubernetes.io/instance": gpu["id"]}
        words = _contained(gpu, profile, paths, FIRST_PORT)
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
        documents.append(
            {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "metadata": {"name": f"vllm-{gpu['id']}", "labels": labels},
                "spec": {
                    "replicas": 1,
                    "strategy": {"type": "Recreate"},
                    "selector": {"matchLabels": labels},
                    "template": {
                        "metadata": {"labels": labels},
                        "spec": {"containers": [container], "volumes": volumes},
                    },
                },
            }
        )
        documents.append(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": f"vllm-{gpu['id']}", "labels": labels},
                "spec": {"selector": labels, "ports": [{"name": "http", "port": FIRST_PORT, "targetPort": "http"}]},
            }
        )
    return "---\n".join(_yaml(document) for document in documents)


def routes(gpus: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """Where the requests of every adapter go: servers and shares that sum to one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for index, gpu in enumerate(gpus):
        for adapter in gpu["adapters"]:
            target = {"server": gpu["id"], "url": _url(index), "share": adapter["share"]}
            found.setdefault(adapter["name"], []).append(target)
    return dict(sorted(found.items()))


def litellm(gpus: list[Any]) -> str:
    """A LiteLLM router's config: one deployment for each adapter on each GPU, weighted by its share."""
    models = [
        {
            "model_name": name,
            "litellm_params": {
                "model": f"hosted_vllm/{name}",
                "api_base": f"{target['url']}/v1",
                "weight": round(1000 * target["share"]),
            },
        }
        for name, targets in routes(gpus).items()
        for target in targets
    ]
    return _yaml({"model_list": models, "router_settings": {"routing_strategy": "simple-shuffle"}})


def _url(index: int) -> str:
    return f"http://localhost:{FIRST_PORT + index}"


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
