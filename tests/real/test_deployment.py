"""Generated files beside those who must read them: vLLM's own argument parser, and the Kubernetes schemas.

`VLLM_PYTHON` is the Python of an environment with vLLM, `KUBERNETES_PYTHON` of one with kubernetes-validate.
"""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_server import judge, workload

from deltaworks.serving import deploy
from deltaworks.serving.document import describe
from deltaworks.serving.placement import place
from deltaworks.serving.profile import Profile

pytestmark = pytest.mark.real

PARSE = """
import json, sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
found = make_arg_parser(FlexibleArgumentParser()).parse_args(json.load(sys.stdin))
validate_parsed_serve_args(found)
modules = {m.name: m.path for m in found.lora_modules}
print(json.dumps([found.max_loras, found.max_cpu_loras, int(found.max_lora_rank), found.enable_lora, modules]))
"""


def placed() -> tuple[dict[str, Any], dict[str, Profile]]:
    odd = [{"name": name, "rank": 8, "rate": 0.1} for name in ("a=b", "--flag", "x,y", "it's $HOME", "\U0001f9a5")]
    groups = [{"name": "a", "count": 100, "rank": 8, "rate": 1.0}, {"name": "b", "count": 9, "rank": 32, "rate": 3}]
    asked = workload([*groups, *odd])
    asker = judge(asked)
    found = place(asker)
    assert len(found.gpus) > 1
    return describe(asker, found, {}, {}, None), {p.name: p for p in asker.profiles}


def test_vllm_parses_every_command() -> None:
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON names no Python with vLLM")
    document, profiles = placed()
    for gpu in document["gpus"]:
        words = deploy.command(gpu, profiles[gpu["type"]], {"a-00": "org/a-00"}, 8000)
        environment = os.environ | {"VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [python, "-c", PARSE],
            input=json.dumps(words[2:]),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        slots, host, rank, enabled, modules = json.loads(done.stdout.splitlines()[-1])
        assert (slots, host, rank) == (gpu["max_loras"], gpu["max_cpu_loras"], gpu["max_lora_rank"])
        assert enabled
        assert set(modules) == {adapter["name"] for adapter in gpu["adapters"]}


def test_kubernetes_files_pass_the_schemas(tmp_path: Path) -> None:
    python = os.environ.get("KUBERNETES_PYTHON")
    if not python:
        pytest.skip("KUBERNETES_PYTHON names no Python with kubernetes-validate")
    document, profiles = placed()
    # A second type of GPU, so that pods have node selectors.
    document["gpus"][-1]["type"] = "other"
    other = replace(profiles["small"], name="other", gpu="NVIDIA L40S (48 GB)")
    deploy.write(tmp_path, deploy.files(document, profiles | {"other": other}, {}))
    command = [python, "-m", "kubernetes_validate", "--strict", str(tmp_path / "kubernetes.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("passed") == 2 * len(document["gpus"])
