"""Files beside the weights: custom code only where it is trusted, templates, tokenizers and licences always."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import CONFIG, recipe, write_family
from merges import merge

from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.sidecars import sidecar_names
from deltaworks.errors import CheckpointError, quoted
from deltaworks.merging.manifest import read_manifest
from deltaworks.merging.prepare import MergeOptions, prepare_plan
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.snapshot import verify

AUTO_MAP = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
CODE = {
    "configuration_x.py": "",
    "modeling_x.py": "from .configuration_x import XConfig\nfrom .layers_x import Layer\nimport torch\n",
    "layers_x.py": "from . import kernels_x\n",
    "kernels_x.py": "raise SystemExit('run')",
    "tokenization_x.py": "",
    "train.py": "",
}
TRUST = MergeOptions(trust_remote_code=True)


@pytest.fixture
def family(tmp_path: Path) -> Path:
    write_family(tmp_path / "family")
    base = tmp_path / "family" / "base"
    (base / "config.json").write_text(json.dumps(CONFIG | {"auto_map": AUTO_MAP, "part": {"auto_map": AUTO_MAP}}))
    (base / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}, "kept": 1})
    )
    for name, text in CODE.items():
        (base / name).write_text(text)
    return tmp_path / "family"


def text(family: Path) -> str:
    return recipe("task_arithmetic", family, parameters="weight: 0.5")


def test_code_that_is_not_trusted_is_neither_copied_nor_named(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    result = merge(catalog, text(family), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"kept": 1}
    (note,) = result.notes
    assert "base names custom code ('configuration_x', 'modeling_x', 'tokenization_x'), which is not copied" in note


def test_trusted_code_is_copied_with_what_it_imports(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    result = merge(catalog, text(family), tmp_path / "out", TRUST)
    found = {p.name: p.read_text() for p in (tmp_path / "out").glob("*.py")}
    assert found == {name: code for name, code in CODE.items() if name != "train.py"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert "auto_map" in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert result.notes == ()
    assert found.keys() < read_manifest(tmp_path / "out")["files"].keys()
    assert verify(tmp_path / "out")["unknown"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "gone_x.XModel"}}, r"base names custom code in gone_x.py, and .* has no such file"),
        ({"auto_map": {"AutoModel": "modeling_x"}}, "names custom code as 'modeling_x'; expected a module"),
        ({"auto_map": {"AutoModel": "modeling_x."}}, "names custom code as 'modeling_x.'; expected a module"),
        ({"auto_map": {"AutoModel": ""}}, "names custom code as ''; expected a module"),
        ({"auto_map": {"AutoModel": "../../etc.X"}}, "names custom code as '../../etc.X'; expected a module"),
    ],
)
def test_code_that_cannot_be_copied(
    catalog: Catalog, tmp_path: Path, family: Path, change: dict[str, Any], message: str
) -> None:
    (family / "base" / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(CheckpointError, match=message):
        merge(catalog, text(family), tmp_path / "out", TRUST)
    merge(catalog, text(family), tmp_path / "out")


MALFORMED: list[Any] = [
    {"auto_map": 5},
    {"auto_map": True},
    {"auto_map": "modeling_x.XForCausalLM"},
    {"auto_map": [1]},
    {"auto_map": [["modeling_x.XForCausalLM"], 1]},
    {"auto_map": {"AutoModel": 5}},
    {"auto_map": {"AutoModel": [["modeling_x.XForCausalLM"]]}},
    {"auto_map": {"AutoModel": {"impl": "modeling_x.XForCausalLM"}}},
    {"custom_pipelines": ["modeling_x.Pipeline"]},
    {"custom_pipelines": {"one": "modeling_x.Pipeline"}},
    {"custom_pipelines": {"one": {"impl": 5}}},
]


@pytest.mark.parametrize("options", [None, TRUST], ids=["untrusted", "trusted"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("change", MALFORMED, ids=str)
def test_what_names_code_in_no_known_way_is_noted_and_left_out(
    catalog: Catalog, tmp_path: Path, family: Path, file: str, change: Any, options: MergeOptions | None
) -> None:
    (family / "base" / "config.json").write_text(json.dumps(CONFIG))
    (family / "base" / "tokenizer_config.json").write_text("{}")
    (family / "base" / file).write_text(json.dumps((CONFIG if file == "config.json" else {}) | {"part": change}))
    result = merge(catalog, text(family), tmp_path / "out", options)
    ((key, value),) = change.items()
    said = f"{key} in {file} of base is {quoted(value)}, which names no classes; the output leaves it out"
    assert result.notes == (said,)
    assert key not in (tmp_path / "out" / file).read_text()
    assert not list((tmp_path / "out").glob("*.py"))


def test_the_pair_of_an_early_tokenizer_is_followed(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    (family / "base" / "config.json").write_text(json.dumps(CONFIG))
    (family / "base" / "tokenizer_config.json").write_text('{"auto_map": ["tokenization_x.XTokenizer", null]}')
    result = merge(catalog, text(family), tmp_path / "out", TRUST)
    assert ([p.name for p in (tmp_path / "out").glob("*.py")], result.notes) == (["tokenization_x.py"], ())


IMPORTS: list[tuple[str, str, set[str]]] = [
    ("modeling_x.py", "from .layers_x import Layer", {"layers_x.py"}),
    ("modeling_x.py", "    from .layers_x import(Layer)", {"layers_x.py"}),
    ("modeling_x.py", "from . import layers_x as own, kernels_x", {"layers_x.py", "kernels_x.py"}),
    ("modeling_x.py", "from .import layers_x", {"layers_x.py"}),
    ("modeling_x.py", "from . import (  # both\n    layers_x,\n    kernels_x,\n)", {"layers_x.py", "kernels_x.py"}),
    ("modeling_x.py", "from . import layers_x, \\\n    kernels_x", {"layers_x.py", "kernels_x.py"}),
    ("modeling_x.py", "from .parts.inner import a", {"parts/inner.py"}),
    ("modeling_x.py", "from .parts import inner", {"parts/inner.py", "parts/__init__.py"}),
    ("parts/inner.py", "from ..layers_x import a", {"layers_x.py"}),
    ("parts/inner.py", "from .. import layers_x, kernels_x", {"layers_x.py", "kernels_x.py"}),
    ("parts/inner.py", "from .other import a", {"parts/other.py"}),
    ("parts/inner.py", "from ...layers_x import a", set()),
    ("modeling_x.py", "from ..layers_x import a", set()),
    ("modeling_x.py", "from layers_x import a\nimport kernels_x  # from .layers_x import b", set()),
]


@pytest.mark.parametrize(("file", "code", "expected"), IMPORTS)
def test_relative_imports_are_followed(
    catalog: Catalog, tmp_path: Path, family: Path, file: str, code: str, expected: set[str]
) -> None:
    base = family / "base"
    (base / "parts").mkdir()
    for name in ("layers_x.py", "kernels_x.py", "parts/__init__.py", "parts/inner.py", "parts/other.py"):
        (base / name).write_text("")
    (base / file).write_text(code)
    named = {"auto_map": {"AutoModel": f"{file.removesuffix('.py').replace('/', '.')}.X"}}
    (base / "config.json").write_text(json.dumps(CONFIG | named))
    (base / "tokenizer_config.json").write_text("{}")
    merge(catalog, text(family), tmp_path / "out", TRUST)
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.py")} == expected | {file}


@pytest.mark.parametrize(
    "line",
    ["\n", " ", "from ", "from .", ".", "from . import (", "from . import (a\n", "#", "\\\n", "from .a" + " " * 99],
)
def test_looking_for_imports_takes_time_linear_in_the_size_of_a_file(
    catalog: Catalog, tmp_path: Path, family: Path, line: str
) -> None:
    # With quadratic time, each of these would take hours.
    (family / "base" / "modeling_x.py").write_text(line * ((1 << 20) // len(line)))
    plan = prepare_plan(catalog, parse_recipe(text(family)), TRUST)
    assert plan.code is not None


def test_code_in_another_repository_is_only_named(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    there = {"auto_map": {"AutoModel": "org/name--modeling_x.XModel"}}
    (family / "base" / "config.json").write_text(json.dumps(CONFIG | there))
    (family / "base" / "tokenizer_config.json").write_text("{}")
    merge(catalog, text(family), tmp_path / "out", TRUST)
    assert not list((tmp_path / "out").glob("*.py"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == there["auto_map"]


def test_code_that_links_out_of_the_model_is_refused(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    (tmp_path / "secret.py").write_text("")
    (family / "base" / "modeling_x.py").unlink()
    (family / "base" / "modeling_x.py").symlink_to(tmp_path / "secret.py")
    with pytest.raises(CheckpointError, match="outside of the model"):
        merge(catalog, text(family), tmp_path / "out", TRUST)


SIDECARS = [
    "additional_chat_templates/tool_use.jinja", "tekken.json", "sentencepiece.bpe.model", "tokenizer.model.v3",
    "source.spm", "target.spm", "qwen.tiktoken", "LICENSE", "LICENSE.txt", "licence.md", "NOTICE", "USE_POLICY.md",
]  # fmt: skip


def test_templates_tokenizers_and_licences_are_copied(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    for name in (*SIDECARS, "notes.txt", "licensed_data.bin", "tokenizer_x.py"):
        (family / "base" / name).parent.mkdir(exist_ok=True)
        (family / "base" / name).write_text("{}")
    merge(catalog, text(family), tmp_path / "out")
    files = read_manifest(tmp_path / "out")["files"]
    assert set(SIDECARS) < files.keys()
    assert not {"notes.txt", "licensed_data.bin", "tokenizer_x.py"} & files.keys()
    assert all((tmp_path / "out" / name).read_text() == "{}" for name in SIDECARS)
    assert verify(tmp_path / "out")["unknown"] == []


def test_templates_in_a_cache_of_the_hub_are_links_to_blobs(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / "abc" / "additional_chat_templates"
    folder.mkdir(parents=True)
    blob = tmp_path / "models--org--name" / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_text("{{ tools }}")
    (folder / "tool_use.jinja").symlink_to(blob)
    assert sidecar_names(folder.parent) == ["additional_chat_templates/tool_use.jinja"]
    (folder / "other.jinja").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="outside of the model"):
        sidecar_names(folder.parent)


@pytest.mark.parametrize("name", [*SIDECARS, "modeling_x.py", "model.safetensors", "config.json", "merges.txt"])
def test_the_hub_is_asked_for_what_is_copied(name: str) -> None:
    from fnmatch import fnmatchcase

    from deltaworks.checkpoints.hub import FILES

    assert any(fnmatchcase(name, pattern) for pattern in FILES)
