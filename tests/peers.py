"""Runs mergekit 0.1.5 in its own environment."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

DRIVER = """
import json, logging, sys
logging.disable(logging.WARNING)
import torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for recipe, out, seed in json.load(sys.stdin):
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=seed)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(recipe)), out, options)
"""


@cache
def mergekit_python() -> str:
    """The interpreter that has mergekit, or a skip with the reason."""
    default = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
    python = os.environ.get("MERGEKIT_PYTHON") or (str(default) if default.exists() else None)
    if python is None:
        pytest.skip("mergekit is not installed; `make parity` installs it in an environment of its own")
    found = subprocess.run(
        [python, "-c", "from importlib.metadata import version; print(version('mergekit'))"],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.stdout.strip() != "0.1.5":
        pytest.skip(f"{python} has mergekit {found.stdout.strip() or 'not installed'}; parity is with 0.1.5")
    return python


def run_mergekit(merges: list[tuple[str, Path, int]]) -> None:
    """Run recipes (text, output folder, seed) one after another in one process."""
    python = mergekit_python()
    work = json.dumps([[recipe, str(out), seed] for recipe, out, seed in merges])
    done = subprocess.run([python, "-c", DRIVER], input=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@cache
def transformers_python(version: str) -> str:
    """The interpreter that has transformers of a major version, or a skip with the reason.

    That of version 5 is mergekit's; that of version 4 has an environment of its own.
    """
    root = Path(__file__).parents[1]
    default, variable = {
        "4": (root / ".venv-peers-4" / "bin" / "python", "TRANSFORMERS_4_PYTHON"),
        "5": (root / ".venv-peers" / "bin" / "python", "MERGEKIT_PYTHON"),
    }[version]
    python = os.environ.get(variable) or (str(default) if default.exists() else None)
    if python is None:
        pytest.skip(f"transformers {version} is not installed; `make real` installs it in an environment of its own")
    found = subprocess.run(
        [python, "-c", "from importlib.metadata import version; print(version('transformers'))"],
        capture_output=True,
        text=True,
        check=False,
    )
    if not found.stdout.startswith(f"{version}."):
        pytest.skip(f"{python} has transformers {found.stdout.strip() or 'not installed'}; version {version} is needed")
    return python
