"""What `verify` vouches for: every file, every member that can be recomputed, and nothing beside that loads instead."""

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import recipe, write_family
from merges import merge
from shell import Shell

from deltaworks.catalog.store import Catalog
from deltaworks.errors import OutputError, VerificationError
from deltaworks.merging.budget import parse_budget
from deltaworks.merging.manifest import DIGEST, MANIFEST, PLAN, is_inside, manifest_digest, read_manifest
from deltaworks.merging.prepare import MergeOptions
from deltaworks.merging.snapshot import verify


@pytest.fixture
def out(catalog: Catalog, tmp_path: Path) -> Path:
    write_family(tmp_path / "family")
    text = recipe("ties", tmp_path / "family", parameters="weight: 1, density: 0.4")
    merge(catalog, text, tmp_path / "out", MergeOptions(shard_bytes=9000, budget=parse_budget("60%")))
    return tmp_path / "out"


def edit(out: Path, change: Callable[[dict[str, Any]], Any], *, digest: bool = True) -> None:
    """Change the manifest, and have its digest match, or leave it out as older versions do."""
    content = json.loads((out / MANIFEST).read_text())
    change(content)
    content.pop(DIGEST, None)
    if digest:
        content[DIGEST] = manifest_digest(content)
    (out / MANIFEST).write_text(json.dumps(content))


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda m: m.update({key: value})


def _input(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda m: m["inputs"][1].update({key: value})


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "fingerprint": (_set("fingerprint", "0" * 64), "the fingerprint is not that of the shards"),
    "plan digest": (_set("plan_digest", "0" * 64), "plan_digest is not what"),
    "method": (_set("method", "linear"), "method is not what"),
    "seed": (_set("seed", 5), "seed is not what"),
    "budget": (_set("budget_bytes", 7), "budget_bytes is not what"),
    "no budget": (_set("budget_bytes", None), "budget_bytes is not what"),
    "expert bytes": (_set("expert_bytes", 1), "expert_bytes is not what"),
    "planned bytes": (_set("expert_bytes_planned", 0), "expert_bytes_planned is not what"),
    "bytes read": (_set("expert_bytes_read", 1 << 40), "is more than the budget"),
    "error": (_set("predicted_error", 0.0), "predicted_error is not what"),
    "bound": (_set("error_bound", 9.5), "error_bound is not what"),
    "an input's fingerprint": (_input("fingerprint", "1" * 64), "inputs is not what"),
    "an input's role": (_input("role", "base"), "inputs is not what"),
    "an input less": (lambda m: m["inputs"].pop(), "inputs is not what"),
    "no inputs": (_set("inputs", []), "it lists no inputs"),
    "no shards": (_set("shards", []), "it lists no weights"),
    "a shard less": (lambda m: m["shards"].pop(), "is not listed, and a loader may read it"),
    "a shard's size": (lambda m: m["shards"][0].update(bytes=1), "has another size"),
    "no files": (_set("files", {}), f"it does not list {PLAN}"),
    "no plan": (lambda m: m["files"].pop(PLAN), f"it does not list {PLAN}"),
    "no tokenizer": (lambda m: m["files"].pop("tokenizer.json"), r"tokenizer\.json is not listed"),
    "notes": (_set("notes", ["all is well"]), "notes is not what"),
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("digest", [True, False])
def test_an_edited_manifest(out: Path, name: str, digest: bool) -> None:
    change, message = EDITS[name]
    assert verify(out)["has_digest"]
    edit(out, change, digest=digest)
    with pytest.raises(VerificationError, match=message):
        verify(out)


def test_what_nothing_else_tells_is_under_the_digest(out: Path) -> None:
    content = json.loads((out / MANIFEST).read_text())
    content["versions"]["numpy"] = "0.1"
    (out / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(VerificationError, match=r"deltaworks\.json was edited"):
        verify(out)


def test_an_older_manifest_has_no_digest(out: Path, tmp_path: Path) -> None:
    edit(out, lambda m: [m.pop(k) for k in ("notes", "accounting", "fingerprint")], digest=False)
    assert verify(out)["has_digest"] is False
    assert "older version" in Shell(tmp_path).run("verify", "out").stdout


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "adapter_config.json", "tokenizer.model", "modeling_x.py", "x.gguf",
     "model.safetensors.index.json.bak", "additional_chat_templates/tool.jinja", "added_tokens.json",
     "hf_quant_config.json", "quantize_config.json", "quant_config.json", "params.json"],
)  # fmt: skip
def test_a_file_beside_that_a_loader_would_read(out: Path, name: str) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    if name.endswith(".bak"):
        assert verify(out)["unknown"] == [name]
        return
    with pytest.raises(VerificationError, match=f"{name} is not listed, and a loader may read it"):
        verify(out)


def test_a_listed_file_that_is_a_link_out_of_the_folder(out: Path, tmp_path: Path) -> None:
    (out / "README.md").rename(tmp_path / "README.md")
    (out / "README.md").symlink_to(tmp_path / "README.md")
    with pytest.raises(VerificationError, match="outside of the model"):
        verify(out)
    (out / "README.md").unlink()
    os.mkfifo(out / "README.md")
    with pytest.raises(VerificationError, match="is a named pipe"):
        verify(out)


@pytest.mark.parametrize("member", ["fingerprint", "notes", "accounting"])
def test_a_manifest_with_a_digest_has_every_member(out: Path, member: str) -> None:
    edit(out, lambda m: m.pop(member))
    with pytest.raises(OutputError, match=f"is malformed: it lacks '{member}'"):
        verify(out)


MALFORMED: list[Callable[[dict[str, Any]], Any]] = [
    lambda m: m["files"].update({"../../etc/passwd": "0"}),
    lambda m: m["files"].update({"/etc/passwd": "0"}),
    lambda m: m["files"].update({"a/../../b": "0"}),
    lambda m: m["files"].update({"": "0"}),
    lambda m: m["files"].update({"x" * 10_000: 7}),
    lambda m: m["shards"][0].update(file="../x.safetensors"),
    lambda m: m.update(shards=[{}]),
    lambda m: m.update(shards=[7]),
    lambda m: m.update(shards={}),
    lambda m: m.update(files=[]),
    lambda m: m.update(inputs=[None]),
    lambda m: m.update(inputs=[{"name": "x"}]),
    lambda m: m["inputs"][0].pop("bytes_planned"),
    lambda m: m.update(accounting=[7]),
    lambda m: m["accounting"][0].pop("merged"),
    lambda m: m["accounting"][0].update(left_out={"a reason": "x"}),
    lambda m: m["accounting"][0].update(left_out={"a reason": [7]}),
    lambda m: m["accounting"][0].update(substituted={"lm_head.weight": 7}),
    lambda m: m.update(seed="0"),
    lambda m: m.update(predicted_error=None),
    lambda m: m.update(budget_bytes=True),
    lambda m: [m.pop(k) for k in list(m) if k != "deltaworks_manifest"],
    lambda m: m.update(deltaworks_manifest=99),
]


@pytest.mark.parametrize("change", MALFORMED)
def test_a_malformed_manifest_is_one_sentence(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(out, change)
    for read in (verify, read_manifest):
        with pytest.raises(OutputError, match=r"deltaworks\.json") as caught:
            read(out)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "[" * 5000, '{"deltaworks_manifest": 1}', "\ud800", "9" * 5000, "null"])
def test_and_so_it_is_in_every_command(out: Path, tmp_path: Path, content: str) -> None:
    (out / MANIFEST).write_text(content, errors="surrogatepass")
    for command in ("verify", "lineage", "show"):
        assert MANIFEST in Shell(tmp_path).error(command, "out")


def test_names_inside_of_a_folder() -> None:
    assert all(map(is_inside, ("a", "a/b", ".hidden", "a b", "ü")))
    assert not any(map(is_inside, ("", ".", "..", "/a", "a/../b", "a//b", "./a", "a/", "a\0b")))


@pytest.mark.parametrize(
    "change", ["PRAGMA user_version = 99", "UPDATE snapshots SET manifest = 'x'", "DROP TABLE snapshots"]
)
def test_a_catalog_that_cannot_be_used_fails_no_verification(out: Path, tmp_path: Path, change: str) -> None:
    """Nor does it hide that an output exists."""
    with Catalog(tmp_path / "catalog") as catalog:
        catalog.save_snapshot(tmp_path / "other", "d" * 64, {"inputs": []})
    with sqlite3.connect(tmp_path / "catalog" / "catalog.sqlite") as db:
        db.execute(change)
    db.close()
    shell = Shell(tmp_path)
    done = shell.run("verify", "out", "--json", "-q")
    assert json.loads(done.stdout)["verified"]
    assert "out is verified, but it was not entered in the catalog: " in done.stderr
    assert str(tmp_path / "catalog") in done.stderr
    (tmp_path / "recipe.yml").write_text((out / "mergekit_config.yml").read_text())
    assert "out exists" in shell.error("merge", "recipe.yml", "out")


def test_a_manifest_may_be_as_large_as_a_plan(out: Path) -> None:
    content = json.loads((out / MANIFEST).read_text())
    content["notes"] = ["x" * (65 << 20)]
    (out / MANIFEST).write_text(json.dumps(content))
    assert read_manifest(out)["notes"] == content["notes"]
