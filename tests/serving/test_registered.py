"""Adapters of a workload that the catalog knows."""

import json
from pathlib import Path

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


def test_adapters_of_other_models_are_noted() -> None:
    found = Registered({}, {"a": {"org/Model"}, "b": {"/models/other"}, "c": {"org/third"}, "d": set()})
    (note,) = found.notes("mirror/model")
    assert note.startswith("the catalog has b as an adapter for /models/other, and 1 more for other models;")
    assert Registered({}, {"a": {"/my/model/"}, "d": set()}).notes("org/Model") == []
