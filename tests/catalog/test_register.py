import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import BF16, random_tensors, shapes, tuned, write_family, write_model

from deltaworks.catalog.models import Kind
from deltaworks.catalog.register import check_unchanged, ensure_registered, find_model, register
from deltaworks.catalog.store import Catalog
from deltaworks.errors import CatalogError, ChangedError, CheckpointError


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_kinds_are_detected(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path, 1)
    adapter = write_model(tmp_path / "lora", random_tensors(0, {"base_model.model.q.lora_A.weight": (4, 8)}))
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    assert register(catalog, "b", str(tmp_path / "base")).kind is Kind.BASE
    assert register(catalog, "e", str(tmp_path / "expert0"), "b").kind is Kind.EXPERT
    assert register(catalog, "a", str(adapter), "b").kind is Kind.ADAPTER
    assert catalog.names() == ["b", "e", "a"]
    assert catalog.models()[1] == catalog.find("e")


def test_an_adapter_beside_weights(catalog: Catalog, tmp_path: Path) -> None:
    """Loaders of an adapter do not look at model files in its folder."""
    adapter = write_model(tmp_path / "lora", random_tensors(0, {"base_model.model.q.lora_A.weight": (4, 8)}))
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    write_model(adapter, random_tensors(0, shapes()))
    model = register(catalog, "a", str(adapter))
    assert model.kind is Kind.ADAPTER
    assert check_unchanged(catalog, model) == model


def test_the_fingerprint_is_of_contents(catalog: Catalog, tmp_path: Path) -> None:
    tensors = random_tensors(0, shapes())
    one = register(catalog, "one", str(write_model(tmp_path / "one", tensors)))
    copy = register(catalog, "copy", str(write_model(tmp_path / "copy", tensors)))
    flip(tmp_path / "copy" / "model.safetensors")
    changed = register(catalog, "copy", str(tmp_path / "copy"))
    assert one.fingerprint == copy.fingerprint != changed.fingerprint


def test_a_name_means_one_folder(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path, 1)
    register(catalog, "m", str(tmp_path / "base"))
    register(catalog, "m", str(tmp_path / "base"))
    with pytest.raises(CatalogError, match="the name 'm' is taken"):
        register(catalog, "m", str(tmp_path / "expert0"))
    register(catalog, "m", str(tmp_path / "expert0"), replace_existing=True)
    assert find_model(catalog, "m").path == tmp_path / "expert0"


@pytest.mark.parametrize("name", ["", "a/b", "-x", "a b", "../x"])
def test_names_are_plain(catalog: Catalog, tmp_path: Path, name: str) -> None:
    with pytest.raises(CatalogError, match="cannot be a name"):
        register(catalog, name, str(tmp_path))


def test_an_expert_of_another_base(catalog: Catalog, tmp_path: Path) -> None:
    base = random_tensors(0, shapes())
    write_model(tmp_path / "base", base)
    wider = {n: np.zeros((*v.shape[:-1], v.shape[-1] + 1), BF16) for n, v in base.items()}
    fewer = {n: v for n, v in base.items() if "layers.2" not in n}
    more = base | {"model.layers.3.input_layernorm.weight": base["model.norm.weight"]}
    for name, tensors, message in (
        ("wider", wider, r"'lm_head.weight' is \[131, 24\] in base and \[131, 25\] in wider"),
        ("fewer", fewer, "base has 9 tensors that fewer lacks"),
        ("more", more, "more has 1 tensor that base lacks"),
    ):
        with pytest.raises(CheckpointError, match=message):
            register(catalog, name, str(write_model(tmp_path / name, tensors)), str(tmp_path / "base"))
    assert catalog.names() == ["base"]


def test_references_are_names_or_paths(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_family(tmp_path, 2)
    monkeypatch.chdir(tmp_path)
    named = register(catalog, "mine", "base")
    assert ensure_registered(catalog, "base") == named
    assert ensure_registered(catalog, str(tmp_path / "base")) == named
    assert ensure_registered(catalog, "mine") == named
    assert ensure_registered(catalog, "expert0", "mine").name == "expert0"
    (tmp_path / "other").mkdir()
    (tmp_path / "expert1").rename(tmp_path / "other" / "base")
    assert ensure_registered(catalog, "other/base").name == "base"
    (tmp_path / "third" / "base").parent.mkdir()
    write_model(tmp_path / "third" / "base", random_tensors(9, shapes()))
    assert ensure_registered(catalog, "third/base").name == "base-2"
    assert ensure_registered(catalog, "third/base", relative_to=tmp_path).name == "base-2"


def test_typos_are_answered(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path, 1)
    register(catalog, "llama-base", str(tmp_path / "base"))
    with pytest.raises(CatalogError, match="did you mean 'llama-base'"):
        find_model(catalog, "lama-base")
    with pytest.raises(CheckpointError, match="did you mean the registered 'llama-base'"):
        ensure_registered(catalog, "llama-bass")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        pytest.param("x" * 300, "cannot be looked up as a model folder: File name too long", id="too long"),
        pytest.param("~nobody-at-all/x", "cannot be looked up as a model folder: Could not", id="no such home"),
        pytest.param("a\0b", r"no folder 'a\\x00b'", id="null character"),
    ],
)
def test_references_that_no_folder_has(catalog: Catalog, reference: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        ensure_registered(catalog, reference)
    assert len(str(caught.value)) < 400


def test_a_changed_model_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path, 1)
    model = register(catalog, "b", str(tmp_path / "base"))
    file = tmp_path / "base" / "model-00002-of-00002.safetensors"
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ChangedError, match=r"model-00002-of-00002.safetensors changed.*deltaworks register b"):
        check_unchanged(catalog, model)
    flip(file)
    assert check_unchanged(catalog, model).fingerprint == model.fingerprint
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(ChangedError, match="changed"):
        check_unchanged(catalog, find_model(catalog, "b"))
    file.unlink()
    with pytest.raises(ChangedError, match="is gone"):
        check_unchanged(catalog, find_model(catalog, "b"))


def test_touching_a_model_changes_nothing(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path, 1)
    model = register(catalog, "b", str(tmp_path / "base"))
    os.utime(tmp_path / "base" / "model-00001-of-00002.safetensors")
    again = check_unchanged(catalog, model)
    assert again.fingerprint == model.fingerprint
    assert again.checkpoint.shards != model.checkpoint.shards
    assert find_model(catalog, "b") == again


def test_a_configuration_may_change(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path, 1)
    model = register(catalog, "b", str(tmp_path / "base"))
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama", "rope_theta": 5}')
    assert check_unchanged(catalog, model).checkpoint.config["rope_theta"] == 5
    assert find_model(catalog, "b").checkpoint.config["rope_theta"] == 5


def test_a_model_that_is_still_being_written(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaworks.catalog import register as registering
    from deltaworks.catalog.fingerprint import hash_files

    write_family(tmp_path, 1)

    def meddle(*arguments: Any) -> list[str]:
        digests = hash_files(*arguments)
        os.utime(tmp_path / "base" / "model-00001-of-00002.safetensors")
        return digests

    monkeypatch.setattr(registering, "hash_files", meddle)
    with pytest.raises(ChangedError, match="changed while it was being read"):
        register(catalog, "b", str(tmp_path / "base"))
    assert catalog.names() == []


def test_a_name_that_is_also_a_folder(catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_family(tmp_path, 1)
    register(catalog, "expert0", str(tmp_path / "base"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CatalogError, match=r"is a registered name .* write ./expert0 if you mean the folder"):
        ensure_registered(catalog, "expert0")
    assert ensure_registered(catalog, "./expert0").path == tmp_path / "expert0"


def test_an_expert_may_leave_a_tied_head_out(catalog: Catalog, tmp_path: Path) -> None:
    base = random_tensors(0, shapes())
    expert = tuned(1, base)
    del expert["lm_head.weight"]
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "expert", expert)
    assert register(catalog, "e", str(tmp_path / "expert"), str(tmp_path / "base")).base == "base"
