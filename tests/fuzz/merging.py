"""Targets that merges read: recipes, model folders, plans."""

import json
import random
import shutil
import sqlite3
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from families import CONFIG, random_tensors, write_model

from deltaworks.catalog.rows import checksum, columns
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.checkpoint import open_checkpoint
from deltaworks.checkpoints.quantized import quantization
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.sidecars import chat_template, vocabulary, write_chat_template
from deltaworks.errors import DeltaworksError, VerificationError
from deltaworks.merging.card import model_card
from deltaworks.merging.execute import output_shards
from deltaworks.merging.lineage import snapshot_lineage, taken_of
from deltaworks.merging.manifest import MANIFEST, read_manifest
from deltaworks.merging.owned_folder import JOURNAL, OwnedFolder
from deltaworks.merging.plan import load_plan, save_plan
from deltaworks.merging.recipe import load_recipe
from deltaworks.merging.verify import verify
from deltaworks.reports.plans import plan_facts
from fuzz.harness import Target
from fuzz.mutate import as_json, as_yaml

TENSORS = {"model.embed_tokens.weight": (4, 2), "model.layers.0.mlp.up_proj.weight": (2, 2), "lm_head.weight": (4, 2)}


def _model(folder: Path, shards: int = 1) -> Path:
    """A valid model under `folder`, written once."""
    path = folder / f"model{shards}"
    if not path.exists():
        write_model(path, random_tensors(0, TENSORS, np.dtype(np.float32)), shards)
    return path


# Recipes

RECIPES: list[Any] = [
    {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": [0.1, 1], "density": 0.4}},
            {"model": {"model": {"path": "b", "revision": "v1"}}, "parameters": {"weight": "1e-1"}},
        ],
        "parameters": {"normalize": True, "density": [{"filter": "mlp", "value": 0.5}, {"value": 1}]},
        "dtype": "float32",
        "out_dtype": "bfloat16",
        "tokenizer": {"source": "base"},
        "chat_template": "auto",
        "x-deltaworks": {"budget": "25%", "base": "base", "fair": True},
        "x-mine": {"any": ["thing"]},
    },
    {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [
            {
                "sources": [{"model": "a", "layer_range": [0, 4]}, {"model": "b", "layer_range": [2, 6]}],
                "base_model": "a",
                "parameters": {"t": [0, 0.5, 1]},
            }
        ],
        "tokenizer_source": "union",
    },
]
RECIPE_TEXTS = [
    b"""# a recipe
merge_method: linear
dtype: float16
models: &all
  - &one
    model: ./a
    parameters: {weight: 0.5}
  - <<: *one
    model: "org/b@main"
x-others: *all
x-date: 2024-02-03
"""
]


def _read_recipe(content: bytes, folder: Path) -> None:
    file = folder / "recipe.yml"
    file.write_bytes(content)
    recipe = load_recipe(file)
    recipe.models()
    recipe.text.encode()


# Model folders


def _in_model(name: str, read: Callable[[Path], object], shards: int = 1) -> Callable[[bytes, Path], object]:
    """A reader of a model folder of which one file is replaced."""

    def replaced(content: bytes, folder: Path) -> object:
        path = _model(folder, shards)
        (path / name).write_bytes(content)
        return read(path)

    return replaced


def _open(path: Path) -> None:
    checkpoint = open_checkpoint(path, ByteCounter())
    quantization(checkpoint)
    for tensor in checkpoint.tensors.values():
        checkpoint.find(tensor.name)


def _template(path: Path) -> None:
    found = chat_template(path)
    if found is not None:
        write_chat_template(path, found)


def _index() -> Sequence[Any]:
    names = list(TENSORS)
    files = {n: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, n in enumerate(names)}
    return [{"metadata": {"total_size": 80}, "weight_map": files}]


def _header() -> Sequence[Any]:
    end, content = 0, {}
    for name, shape in TENSORS.items():
        content[name] = {
            "dtype": "F32",
            "shape": list(shape),
            "data_offsets": [end, end := end + 4 * shape[0] * shape[1]],
        }
    return [content]


def _write_header(tree: Any, rng: random.Random) -> bytes:
    text = as_json(tree, rng)
    return struct.pack("<Q", len(text)) + text + bytes(80)


# Plans


def _plan(operations: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A plan of one tensor an operation, over a base and two experts, as a file holds it."""
    experts = ("a", "b")
    models = [_planned("base", "base", None), *(_planned(name, "expert", 0) for name in experts)]
    sources = [[place, "model.layers.0.mlp.up_proj.weight"] for place in range(3)]
    tensors = [
        {"name": f"t{i}.weight", "dtype": "F32", "shape": [2, 2], "inputs": sources[: o.pop("n", 3)]} | o
        for i, o in enumerate(map(dict, operations))
    ]
    content = {
        "method": "ties", "seed": 0, "budget_bytes": None, "expert_bytes": 800, "expert_bytes_planned": 160,
        "block_size": 1, "predicted_error": 0.0, "error_bound": 0.0, "fair": False, "balanced": False,
        "models": models, "tokenizer": 0, "chat_template": None, "shard_bytes": 5000, "config": CONFIG,
        "recipe": "merge_method: ties\n", "tensors": tensors,
    }  # fmt: skip
    return (
        {"deltaworks_plan": 2, "digest": "", "read_cost": None, "predicted_read_s": None, "layers": []} | content | more
    )


def _planned(name: str, role: str, base: int | None) -> dict[str, Any]:
    size = {"nbytes": 400, "base": base, "bytes_planned": 80 if role == "expert" else 0}
    return {"reference": f"./{name}", "name": name, "role": role, "fingerprint": "ab" * 32} | size


DELTA = {"operation": "delta", "weights": [0.5, 1.0], "consensus": True, "normalize": True, "lambda": 1.0}
THIN = DELTA | {"densities": [0.5, 1.0], "rescale": False}
CUTS = [[1065353216, 1, 1, 4], None]
LAYERED = {"depths": [None, [[0, 2, 3]], None], "nbytes": [0, 40, 0]}
PLANS: list[Any] = [
    _plan(
        [
            {"operation": "copy", "element_bits": 32, "n": 1},
            {"operation": "weighted", "weights": [0.2, 0.3, 0.5], "normalize": True},
            {"operation": "slerp", "t": 0.5, "n": 2},
            {"operation": "sce", "experts": 2, "select_topk": 0.5},
            DELTA,
            THIN | {"sparsify": "magnitude", "cuts": CUTS},
            THIN | {"sparsify": "magnitude", "cuts": [[255, -1, 1, 2], None]},
            THIN | {"sparsify": "outliers", "cuts": CUTS, "tops": [None, None], "gammas": [0.1, 0.0]},
            THIN | {"sparsify": "random", "keys": ["0123456789abcdef", "f" * 16]},
            THIN | {"sparsify": "ranks", "keys": ["0" * 16, "1" * 16], "epsilons": [0.1, 0.2], "row": 2},
        ],
        notes=["a note"],
        accounting=[{"name": "a", "tensors": 3, "merged": 2, "copied": 1, "left_out": {"not selected": ["x"]}}],
        code=[[0, "modeling_x.py"]],
    ),
    _plan(
        [
            DELTA | {"reads": [None, [[0, 1], [2, 4]], []], "stand_in": [0, "t"], "error": 0.25, "norm": 1.5},
            DELTA
            | {
                "reads": [None, None, []],
                "depths": [None, [[0, 2, 3]], None],
                "nbytes": [0, 40, 0],
                "stand_in": [0, "t"],
            },
        ],
        budget_bytes=160,
        predicted_error=0.25,
        error_bound=None,
        read_cost=[0.001, 1e9],
        predicted_read_s=0.5,
    ),
]
_UNHASHED = {"deltaworks_plan", "digest", "read_cost", "predicted_read_s", "layers"}


def _signed(tree: Any) -> Any:
    """A plan with the digest that its content has now."""
    if isinstance(tree, dict):
        text = _canonical({k: v for k, v in tree.items() if k not in _UNHASHED})
        tree["digest"] = blake3(text.encode(errors="surrogatepass")).hexdigest()
    return tree


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _read_plan(content: bytes, folder: Path) -> None:
    file = folder / "plan.json"
    file.write_bytes(content)
    plan = load_plan(file)
    plan_facts(plan)
    model_card(plan, "out")
    plan.check_reads(force=True)
    output_shards(plan)
    for place in range(len(plan.models)):
        taken_of(plan, place)
    save_plan(plan, folder / "again.json")
    assert load_plan(folder / "again.json") == plan


QUANTIZED = {"quant_method": "gptq", "bits": 4, "config_groups": {"a": {"weights": {"num_bits": 4}}}}
TOKENIZERS: list[Any] = [
    {
        "added_tokens": [{"id": 2, "content": "<s>", "special": True}],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
    },
    {"added_tokens": None, "model": {"type": "Unigram", "vocab": [["a", -1.5], ["b", -2.0]]}},
]

# Snapshots and the catalog

MANIFEST_SEED = {
    "deltaworks_manifest": 1, "plan_digest": "ab" * 32, "method": "ties", "seed": 0,
    "inputs": [
        {"reference": "./base", "name": "base", "role": "base", "fingerprint": "cd" * 32, "nbytes": 400,
         "bytes_planned": 0},
        {"reference": "./a", "name": "a", "role": "expert", "fingerprint": "ef" * 32, "nbytes": 400,
         "bytes_planned": 80},
    ],
    "fingerprint": "12" * 32, "shards": [{"file": "model.safetensors", "bytes": 4, "blake3": "34" * 32}],
    "files": {"config.json": "56" * 32}, "budget_bytes": None, "expert_bytes": 400, "expert_bytes_planned": 80,
    "predicted_error": 0.0, "error_bound": None, "expert_bytes_read": 80, "base_bytes_read": 80,
    "versions": {"deltaworks": "0.1.0"},
}  # fmt: skip


JOURNAL_SEED = {
    "deltaworks_staging": 1, "plan": "ab" * 32, "files": ["config.json", "model.safetensors"],
    "shards": {"model.safetensors": "cd" * 32}, "expert_bytes": {"model.safetensors": 80},
}  # fmt: skip


def _read_manifest(content: bytes, folder: Path) -> None:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    (out / MANIFEST).write_bytes(content)
    (out / "config.json").write_text("{}")
    manifest = read_manifest(out)
    with Catalog(folder / "catalog") as catalog:
        snapshot_lineage(catalog, out, manifest, None)
    with suppress(VerificationError):  # its files are none of those that the manifest lists
        verify(out)


def _read_journal(content: bytes, folder: Path) -> None:
    staging = folder / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    (staging / JOURNAL).write_bytes(content)
    OwnedFolder(staging).close()


ROWS = {
    "config": [CONFIG, None],
    "shards": [{"name": "model.safetensors", "size": 80, "mtime_ns": 1, "ctime_ns": 1, "inode": 7}],
    "tensors": [["a.weight", "F32", [2, 2], "model.safetensors", 64, 16]],
    "manifest": MANIFEST_SEED,
    "summary": {"nonfinite": [], "elements": 4, "zeros": 0, "relative_norm": 0.1},
    "cut": [1065353216, 0, 1, 4],
    "kind": "base",
}
"""What columns of the catalog hold; each is replaced by a mutation, under a checksum that fits."""
_ROW = {
    "models": ("m", "base", "m", "/m", None, 0, "ab" * 32, "shards", "tensors", "config"),
    "snapshots": ("/out", "ab" * 32, "manifest"),
    "analyses": ("ab" * 32, "cd" * 32, 4096, "x.parquet", "summary"),
    "cuts": ("ab" * 32, "cd" * 32, "t", 2, "cut"),
}


def _read_rows(content: bytes, folder: Path) -> None:
    text = content.decode(errors="replace")
    with Catalog(folder / "rows") as catalog:
        (folder / "rows" / "statistics" / "x.parquet").touch()
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            tree = None
        cells = {k: json.dumps(v) for k, v in tree.items()} if isinstance(tree, dict) else dict.fromkeys(ROWS, text)
        if tree:
            cells["kind"] = str(tree.get("kind")) if isinstance(tree, dict) else "base"
        with sqlite3.connect(catalog.database) as db:
            for table, row in _ROW.items():
                values = [cells.get(v, "null") if isinstance(v, str) and v in ROWS else v for v in row]
                values = [v.encode(errors="replace").decode() if isinstance(v, str) else v for v in values]
                marks = ", ".join("?" * (len(values) + 1))
                db.execute(f"DELETE FROM {table}")
                db.execute(
                    f"INSERT INTO {table}({columns(table)}) VALUES ({marks})", (*values, checksum(table, values))
                )
        db.close()
        refused = None
        for read in (
            catalog.models,
            catalog.snapshots,
            lambda: catalog.find_analysis("ab" * 32, "cd" * 32),
            lambda: catalog.find_cuts("ab" * 32, "cd" * 32),
        ):
            try:
                read()
            except DeltaworksError as error:
                refused = error
        if refused is not None:
            raise refused


TARGETS = [
    Target("recipe", lambda: RECIPES, _read_recipe, as_yaml),
    Target("recipe-text", lambda: RECIPE_TEXTS, _read_recipe),
    Target("plan", lambda: PLANS, _read_plan, finish=_signed),
    Target("config", lambda: [CONFIG, CONFIG | {"text_config": CONFIG | {"quantization_config": QUANTIZED}}],
           _in_model("config.json", _open)),
    Target("index", _index, _in_model("model.safetensors.index.json", _open, shards=2)),
    Target("header", _header, _in_model("model.safetensors", _open), _write_header),
    Target("tokenizer", lambda: TOKENIZERS, _in_model("tokenizer.json", vocabulary)),
    Target("template", lambda: [{"chat_template": "{{ messages }}", "model_max_length": 8}],
           _in_model("tokenizer_config.json", _template)),
    Target("template-text", lambda: ["{% for m in messages %}{{ m }}\nü{% endfor %}".encode()],
           _in_model("chat_template.jinja", _template)),
    Target("manifest", lambda: [MANIFEST_SEED], _read_manifest),
    Target("journal", lambda: [JOURNAL_SEED], _read_journal),
    Target("catalog-rows", lambda: [ROWS], _read_rows),
]  # fmt: skip
