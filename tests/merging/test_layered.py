"""Merges that read layers write the same bytes as merges that read experts."""

import json
from pathlib import Path

import numpy as np
import pytest
from families import random_tensors, recipe, shapes, tuned, write_model
from merges import METHODS, merge
from shell import Shell

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.errors import CatalogError
from deltaworks.merging.prepare import MergeOptions


@pytest.fixture
def family(catalog: Catalog, tmp_path: Path) -> Path:
    """Base and experts, with layers of all."""
    config = {"hidden_size": 64, "intermediate_size": 150, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300}
    base = random_tensors(0, shapes(config)) | {"model.counts": np.arange(9, dtype=np.int64)}
    write_model(tmp_path / "base", base)
    against = register(catalog, "base", str(tmp_path / "base"))
    for i in range(3):
        expert = tuned(i + 1, base, scale=0.003) | {"model.counts": np.arange(9, dtype=np.int64)}
        write_model(tmp_path / f"expert{i}", expert, shards=i + 1)
        analyze(catalog, register(catalog, f"expert{i}", str(tmp_path / f"expert{i}"), "base"), against, layers=True)
    return tmp_path


def tensors(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(out.glob("*.safetensors"))}


@pytest.mark.parametrize("method", METHODS)
def test_layers_merge_to_the_same_bytes(catalog: Catalog, family: Path, method: str) -> None:
    text = recipe(method, family, **METHODS[method])
    plain = merge(catalog, text, family / "plain")
    layered = merge(catalog, text, family / "layered", MergeOptions(layers=True))
    assert tensors(family / "plain") == tensors(family / "layered")
    if method != "slerp":
        assert 0 < layered.expert_bytes_read < 0.75 * plain.expert_bytes_read


def test_damaged_layers_fail_the_merge(catalog: Catalog, family: Path) -> None:
    for path in (catalog.path / "layers").glob("*.layers"):
        content = bytearray(path.read_bytes())
        content[2000] ^= 4
        path.write_bytes(content)
    with pytest.raises(CatalogError, match="is damaged"):
        merge(
            catalog,
            recipe("task_arithmetic", family, **METHODS["task_arithmetic"]),
            family / "out",
            MergeOptions(layers=True),
        )
    assert not (family / "out").exists()


def test_the_command_reads_layers(family: Path) -> None:
    (family / "r.yml").write_text(recipe("linear", family, **METHODS["linear"]))
    shell = Shell(family)
    plain = json.loads(shell.run("merge", "r.yml", "plain", "--json").stdout)
    layered = json.loads(shell.run("merge", "r.yml", "layered", "--layers", "--json").stdout)
    assert layered["expert_bytes_read"] < 0.75 * plain["expert_bytes_read"]
    assert layered["base_bytes_read"] > 0
    assert tensors(family / "plain") == tensors(family / "layered")
