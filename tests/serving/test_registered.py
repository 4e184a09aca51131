"""Adapters of a workload that the catalog knows."""

import json
from pathlib import Path

import pytest
from families import random_tensors, write_model

from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.serving.registered import Registered, registered_adapters


def adapter(folder: Path, base: str | None) -> str:
    write_model(folder, random_tensors(0, {"base_model.model.q.lora_A.weight": (4, 8)}))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    named = {} if base is None else {"base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(named))
    return str(folder)


def test_what_the_catalog_knows_of_adapters(tmp_path: Path) -> None:
    base = write_model(tmp_path / "My-Base", random_tensors(0, {"a.weight": (4, 8)}))
    with Catalog(tmp_path / "catalog") as catalog:
        register(catalog, "base", str(base))
        register(catalog, "legal", adapter(tmp_path / "legal", "org/model"))
        register(catalog, "shop", adapter(tmp_path / "shop", None), "base")
        register(catalog, "plain", adapter(tmp_path / "plain", None))
        register(catalog, "unasked", adapter(tmp_path / "unasked", "org/other"))
    found = registered_adapters(tmp_path / "catalog", {"legal", "shop", "plain", "base", "nobody"})
    assert found.paths == {name: str(tmp_path / name) for name in ("legal", "shop", "plain")}
    assert found.bases == {"legal": {"org/model"}, "shop": {str(base)}, "plain": set()}
    assert registered_adapters(tmp_path / "nowhere", {"legal"}) == Registered({}, {})


@pytest.mark.parametrize(
    ("source", "folder", "path"),
    [
        pytest.param("./adapters/a", "adapters/a", "", id="relative path"),
        pytest.param("adapters/a", "adapters/a", "", id="relative path that reads like a hub id"),
        pytest.param("org/x", "hub/models--org--x/snapshots/0123", "org/x", id="hub id"),
        pytest.param("hf://org/x", "hub/models--org--x/snapshots/0123", "org/x", id="hub id with its scheme"),
        pytest.param("org/x@v2", "hub/models--org--x/snapshots/4567", "", id="revision, which vLLM does not take"),
    ],
)
def test_servers_load_an_adapter_by_a_hub_id_or_an_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, folder: str, path: str
) -> None:
    (tmp_path / folder).parent.mkdir(parents=True)
    adapter(tmp_path / folder, None)
    monkeypatch.setattr("deltaworks.catalog.register.resolve_source", lambda *_: tmp_path / folder)
    with Catalog(tmp_path / "catalog") as catalog:
        register(catalog, "a", source)
    assert registered_adapters(tmp_path / "catalog", {"a"}).paths == {"a": path or str(tmp_path / folder)}


def test_adapters_of_other_models_are_noted() -> None:
    found = Registered({}, {"a": {"org/Model"}, "b": {"/models/other"}, "c": {"org/third"}, "d": set()})
    (note,) = found.notes("mirror/model")
    assert note.startswith("the catalog has b as an adapter for /models/other, and 1 more for other models;")
    assert Registered({}, {"a": {"/my/model/"}, "d": set()}).notes("org/Model") == []
