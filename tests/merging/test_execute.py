"""Whole merges: exact, whatever the threads, block sizes and shards."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import BF16, CONFIG, Array, random_tensors, read_model, recipe, shapes, tuned, write_family, write_model
from merges import METHODS, merge, raw_tensors, whole_tensor_bytes

from deltaworks.catalog.store import Catalog
from deltaworks.errors import CheckpointError, NonFiniteError, RecipeError, UserError
from deltaworks.merging.budget import Budget
from deltaworks.merging.manifest import read_manifest
from deltaworks.merging.prepare import MergeOptions, plan_inputs, prepare_plan
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.snapshot import run_plan, verify

BIG = {"model.embed_tokens.weight": (700, 300), "model.layers.0.w.weight": (9, 4111), "model.norm.weight": (300,)}


def files(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.glob("*.safetensors")}


@pytest.fixture
def big_family(tmp_path: Path) -> Path:
    """Tensors of many 4 Ki blocks, with every delta rounded so that ties abound."""
    base = random_tensors(0, BIG)
    write_model(tmp_path / "base", base, 2)
    for i in range(3):
        write_model(tmp_path / f"expert{i}", tuned(i + 1, base, 0.003 * (i + 1)), i + 1)
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_equals_whole_tensors(catalog: Catalog, tmp_path: Path, method: str) -> None:
    write_family(tmp_path)
    text = recipe(method, tmp_path, **METHODS[method])
    plan = prepare_plan(catalog, parse_recipe(text))
    run_plan(catalog, plan, plan_inputs(catalog, plan), tmp_path / "out")
    merged = read_model(tmp_path / "out")
    whole = whole_tensor_bytes(catalog, plan)
    assert merged.keys() == whole.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == BF16
        assert tensor.tobytes() == whole[name].tobytes(), name


@pytest.mark.parametrize("method", METHODS)
def test_bytes_hang_on_nothing_but_the_inputs(
    tmp_path: Path, big_family: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = recipe(method, big_family, **METHODS[method])
    results: list[dict[str, bytes]] = []
    for i, (threads, block_size) in enumerate([(1, 4096), (2, 4096), (2, 1 << 14), (1, 1 << 18), (3, 1 << 22)]):
        # No block stays in memory between passes, or a few, or all.
        monkeypatch.setattr("deltaworks.merging.execute._HELD_BYTES", i * 300_000)
        with Catalog(tmp_path / f"catalog{i}") as catalog:
            merge(catalog, text, tmp_path / f"out{i}", MergeOptions(block_size=block_size, threads=threads, seed=5))
        results.append(files(tmp_path / f"out{i}"))
    assert all(r == results[0] for r in results[1:])


@pytest.mark.parametrize("method", METHODS)
def test_shards_change_no_tensor(tmp_path: Path, method: str) -> None:
    models = write_family(tmp_path / "one", shards=1)
    size = sum(t.nbytes for t in models["base"].values())
    expected: dict[str, bytes] = {}
    for shards in range(1, 10):
        root = tmp_path / str(shards)
        for name, tensors in models.items():
            write_model(root / name, tensors, shards)
        options = MergeOptions(shard_bytes=-(-size // shards) + 500)
        with Catalog(root / "catalog") as own:
            merge(own, recipe(method, root, **METHODS[method]), root / "out", options)
        merged = {name: t.tobytes() for name, t in read_model(root / "out").items()}
        expected = expected or merged
        assert merged == expected


@pytest.mark.parametrize("held", [0, 300_000, 64 << 20])
@pytest.mark.parametrize("method", METHODS)
def test_within_a_budget_reads_each_expert_byte_once_whatever_the_passes(
    catalog: Catalog, tmp_path: Path, big_family: Path, method: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaworks.merging.execute._HELD_BYTES", held)
    text = recipe(method, big_family, **METHODS[method])
    options = MergeOptions(block_size=4096)
    full = merge(catalog, text, tmp_path / "full", options)
    base = str(tmp_path / "base") if method in ("linear", "passthrough") else None
    result = merge(catalog, text, tmp_path / "out", replace(options, budget=Budget(share=1.0), base=base))
    assert result.expert_bytes_read == result.expert_bytes_planned
    assert result.expert_bytes_planned <= full.expert_bytes_planned <= result.expert_bytes
    assert full.expert_bytes_planned <= full.expert_bytes_read <= 3 * full.expert_bytes_planned
    assert files(tmp_path / "out") == files(tmp_path / "full")
    weights = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert result.output_bytes_written == weights


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_writes_the_type_asked_for(catalog: Catalog, tmp_path: Path, dtype: str) -> None:
    write_family(tmp_path)
    text = recipe("task_arithmetic", tmp_path, dtypes=f"dtype: {dtype}", parameters="weight: 0.3")
    plan = prepare_plan(catalog, parse_recipe(text))
    run_plan(catalog, plan, plan_inputs(catalog, plan), tmp_path / "out")
    assert plan.config["torch_dtype"] == dtype
    whole = whole_tensor_bytes(catalog, plan)
    assert raw_tensors(tmp_path / "out") == {name: values.tobytes() for name, values in whole.items()}


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_reads_every_type(catalog: Catalog, tmp_path: Path, dtype: Any, method: str) -> None:
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype) if isinstance(dtype, str) else dtype)
    base = random_tensors(0, shapes(), kind)
    write_model(tmp_path / "base", base)
    for i in range(3):
        write_model(tmp_path / f"expert{i}", tuned(i + 1, base, 0.02, kind))
    text = recipe(method, tmp_path, dtypes="", **METHODS[method])
    plan = prepare_plan(catalog, parse_recipe(text))
    run_plan(catalog, plan, plan_inputs(catalog, plan), tmp_path / "out")
    whole = whole_tensor_bytes(catalog, plan)
    bits = kind.itemsize * 8
    assert all(t.dtype.bits == bits for t in plan.tensors), "the type of the inputs is kept"
    assert raw_tensors(tmp_path / "out") == {name: values.tobytes() for name, values in whole.items()}


def with_integers(root: Path, experts: int = 2, differ: bool = False) -> None:
    base: dict[str, Array] = dict(random_tensors(0, shapes()))
    buffer = np.arange(11, dtype=np.int64)
    write_model(root / "base", base | {"position_ids": buffer, "flags": np.ones(3, bool)})
    for i in range(experts):
        changed = buffer + 1 if differ and i == 1 else buffer
        write_model(root / f"expert{i}", tuned(i + 1, base) | {"position_ids": changed, "flags": np.ones(3, bool)})


def test_integers_pass_through(catalog: Catalog, tmp_path: Path) -> None:
    with_integers(tmp_path)
    listed = ("expert0", "expert1")
    merge(catalog, recipe("ties", tmp_path, listed=listed, parameters="weight: 1, density: 0.5"), tmp_path / "out")
    merged = read_model(tmp_path / "out")
    np.testing.assert_array_equal(merged["position_ids"], np.arange(11))
    assert merged["position_ids"].dtype == np.int64
    assert merged["flags"].dtype == bool


def test_integers_that_differ_cannot_be_merged(catalog: Catalog, tmp_path: Path) -> None:
    with_integers(tmp_path, differ=True)
    text = recipe("ties", tmp_path, listed=("expert0", "expert1"), parameters="weight: 1")
    with pytest.raises(CheckpointError, match=r"tensor 'position_ids': an integer tensor differs"):
        merge(catalog, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_family_stays_tied(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path, head=False)
    merge(catalog, recipe("ties", tmp_path, parameters="weight: 1, density: 0.5"), tmp_path / "out")
    assert "lm_head.weight" not in read_model(tmp_path / "out")


@pytest.mark.parametrize("says_tied", [True, False, None])
@pytest.mark.parametrize("lacking", [("expert0",), ("expert0", "expert1")])
def test_a_missing_head_is_accounted_for(
    catalog: Catalog, tmp_path: Path, says_tied: bool | None, lacking: tuple[str, ...]
) -> None:
    config = {k: v for k, v in CONFIG.items() if k != "tie_word_embeddings"}
    config |= {} if says_tied is None else {"tie_word_embeddings": says_tied}
    for seed, name in enumerate(("expert0", "expert1")):
        tensors = random_tensors(seed, shapes(head=name not in lacking))
        write_model(tmp_path / name, tensors, config=config)
    text = recipe("linear", tmp_path, base=False, listed=("expert0", "expert1"), parameters="weight: 1")
    result = merge(catalog, text, tmp_path / "out")
    row = read_manifest(tmp_path / "out")["accounting"][0]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    has_head = len(lacking) == 1
    assert row.get("substituted") == ({"lm_head.weight": "model.embed_tokens.weight"} if has_head else None)
    assert written["tie_word_embeddings"] is not has_head
    about = [note for note in result.notes if "says that its head is its own" in note]
    assert len(about) == (says_tied is False)
    end = "its embeddings stand in for it" if has_head else "the output says that its head is tied to its embeddings"
    assert all(note.endswith(end) for note in about)
    assert verify(tmp_path / "out")["verified"]


def test_one_untied_expert_unties_the_merge(catalog: Catalog, tmp_path: Path) -> None:
    """The head that only one expert has is merged against the embeddings, which stand for it elsewhere."""
    models = write_family(tmp_path, 2, head=False)
    head = tuned(9, {"lm_head.weight": models["base"]["model.embed_tokens.weight"]}, 0.02)
    write_model(tmp_path / "expert0", models["expert0"] | head, 2)
    text = recipe("ties", tmp_path, listed=("expert0", "expert1"), parameters="weight: 1, density: 0.4")
    plan = prepare_plan(catalog, parse_recipe(text))
    run_plan(catalog, plan, plan_inputs(catalog, plan), tmp_path / "out")
    merged = read_model(tmp_path / "out")
    assert merged["lm_head.weight"].tobytes() == whole_tensor_bytes(catalog, plan)["lm_head.weight"].tobytes()
    assert plan.config["tie_word_embeddings"] is False


def test_quantized_weights_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    tensors: dict[str, Array] = {"w.weight": np.ones((4, 4), np.int8), "w.weight_scale": np.ones(4, np.float32)}
    for name in ("base", "expert0"):
        write_model(tmp_path / name, tensors)
    with pytest.raises(CheckpointError, match=r"base is quantized \(packed integers, I8\)"):
        merge(catalog, recipe("ties", tmp_path, listed=("expert0",), parameters="weight: 1"), tmp_path / "out")


def test_an_expert_of_another_base(catalog: Catalog, tmp_path: Path) -> None:
    from deltaworks.catalog.register import register

    write_family(tmp_path)
    write_model(tmp_path / "other", random_tensors(5, shapes()))
    register(catalog, "expert0", str(tmp_path / "expert0"), str(tmp_path / "other"))
    text = recipe("task_arithmetic", tmp_path, listed=("expert0",), parameters="weight: 1")
    with pytest.raises(RecipeError, match=r"expert0 is registered as an expert of other, and .* against base"):
        merge(catalog, text, tmp_path / "out")
    merge(catalog, text.replace(f"{tmp_path}/base", f"{tmp_path}/other"), tmp_path / "out")
    # What only a recipe said binds nobody.
    merge(catalog, recipe("ties", tmp_path, listed=("expert1",), parameters="weight: 1"), tmp_path / "out2")
    merge(catalog, recipe("ties", tmp_path, listed=("expert1",), parameters="weight: 1").replace("/base", "/other"),
          tmp_path / "out3")  # fmt: skip


def test_models_that_do_not_fit(catalog: Catalog, tmp_path: Path) -> None:
    base = random_tensors(0, shapes())
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "expert0", {n: v for n, v in base.items() if "o_proj" not in n})
    wide = base | {"lm_head.weight": np.zeros((140, 24), BF16)}
    write_model(tmp_path / "expert1", wide)
    with pytest.raises(CheckpointError, match="base has 3 tensors that expert0 lacks"):
        merge(catalog, recipe("ties", tmp_path, listed=("expert0",), parameters="weight: 1"), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is \[131, 24\] in base and \[140, 24\] in expert1.*align their vocab"):
        merge(catalog, recipe("linear", tmp_path, base=False, listed=("base", "expert1"), parameters="weight: 1"),
              tmp_path / "out")  # fmt: skip


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_nan_is_named_and_nothing_is_written(catalog: Catalog, tmp_path: Path, method: str) -> None:
    models = write_family(tmp_path)
    models["expert2"]["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write_model(tmp_path / "expert2", models["expert2"], 2)
    linear = method == "linear"
    parameters = "weight: 1" if linear else "weight: 1, density: 0.5"
    text = recipe(method, tmp_path, parameters=parameters, base=not linear)
    with pytest.raises(NonFiniteError, match=r"expert2 h.* 'model.layers.1.mlp.up_proj.weight'"):
        merge(catalog, text, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_is_written_only_when_asked(catalog: Catalog, tmp_path: Path) -> None:
    models = write_family(tmp_path)
    models["expert2"]["model.norm.weight"][3] = np.inf
    write_model(tmp_path / "expert2", models["expert2"], 2)
    text = recipe("linear", tmp_path, base=False, parameters="weight: 1")
    merge(catalog, text, tmp_path / "out", MergeOptions(allow_nonfinite=True))
    assert np.isinf(read_model(tmp_path / "out")["model.norm.weight"][3])


def test_overflow_is_no_silent_infinity(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path)
    text = recipe("linear", tmp_path, base=False, dtypes="dtype: float16", parameters="weight: 90000, normalize: false")
    with pytest.raises(NonFiniteError, match="overflows float16"):
        merge(catalog, text, tmp_path / "out")


def test_layers_are_stacked(catalog: Catalog, tmp_path: Path) -> None:
    models = write_family(tmp_path)
    text = f"""
merge_method: passthrough
slices:
  - sources: [{{model: {tmp_path}/expert0, layer_range: [0, 2]}}]
  - sources: [{{model: {tmp_path}/expert1, layer_range: [1, 3]}}]
"""
    merge(catalog, text, tmp_path / "out")
    merged = read_model(tmp_path / "out")
    for out, (name, layer) in enumerate([("expert0", 0), ("expert0", 1), ("expert1", 1), ("expert1", 2)]):
        for rest in ("mlp.up_proj.weight", "input_layernorm.weight"):
            expected = models[name][f"model.layers.{layer}.{rest}"]
            assert merged[f"model.layers.{out}.{rest}"].tobytes() == expected.tobytes()
    assert merged["model.embed_tokens.weight"].tobytes() == models["expert0"]["model.embed_tokens.weight"].tobytes()
    assert merged["model.norm.weight"].tobytes() == models["expert1"]["model.norm.weight"].tobytes()
    import json

    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_slices_over_all_layers_are_models(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path)
    whole = recipe("slerp", tmp_path, listed=("expert0",), parameters="t: [0, 1]")
    sliced = f"""
merge_method: slerp
base_model: {tmp_path}/base
dtype: float32
out_dtype: bfloat16
slices:
  - sources: [{{model: {tmp_path}/base, layer_range: [0, 3]}}, {{model: {tmp_path}/expert0, layer_range: [0, 3]}}]
parameters: {{t: [0, 1]}}
"""
    merge(catalog, whole, tmp_path / "a")
    merge(catalog, sliced, tmp_path / "b")
    a, b = read_model(tmp_path / "a"), read_model(tmp_path / "b")
    assert {n: t.tobytes() for n, t in a.items()} == {n: t.tobytes() for n, t in b.items()}


def test_layers_that_are_not_there(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path)
    text = f"{{merge_method: passthrough, slices: [{{sources: [{{model: {tmp_path}/base, layer_range: [1, 7]}}]}}]}}"
    with pytest.raises(RecipeError, match="it has 3 layers"):
        merge(catalog, text, tmp_path / "out")


def test_one_model_under_two_names(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path)
    (tmp_path / "twin").symlink_to(tmp_path / "expert0")
    with pytest.raises(RecipeError, match="are the same model"):
        merge(catalog, recipe("linear", tmp_path, base=False, listed=("expert0", "twin"), parameters="weight: 1"),
              tmp_path / "out")  # fmt: skip


def test_missing_weights_are_named(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path)
    text = recipe("ties", tmp_path, {"expert0": "weight: 1", "expert1": "weight: 1"})
    with pytest.raises(RecipeError, match=r"no value for the parameter 'weight' of .*expert2"):
        merge(catalog, text, tmp_path / "out")
    text = recipe("linear", tmp_path, {"expert0": "weight: 1", "expert1": "weight: -1"}, base=False,
                  listed=("expert0", "expert1"))  # fmt: skip
    with pytest.raises(RecipeError, match="sum to zero"):
        merge(catalog, text, tmp_path / "out2")


def test_chances_that_leave_nothing_to_chance_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path)
    for parameters in ("density: 0.1", "density: 0.9", "density: 0.5, epsilon: 0.5", "density: 0.5, epsilon: -0.1"):
        with pytest.raises(RecipeError, match=r"epsilon: chances run from .* at tensor"):
            merge(catalog, recipe("della", tmp_path, parameters=f"weight: 1, {parameters}"), tmp_path / "out")
    text = recipe("della", tmp_path, parameters="weight: 1, density: [{filter: mlp, value: 0}, {value: 1}], epsilon: 3")
    merge(catalog, text, tmp_path / "out")


def test_rows_that_no_block_holds_whole_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    base = random_tensors(0, {"model.layers.0.w.weight": (3, 20_011)})
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "expert1", tuned(1, base, 0.01))
    for density, reason in ((0.5, "20,011 is so odd a number"), (1.0, None)):
        text = recipe("della", tmp_path, listed=("expert1",), parameters=f"weight: 1, density: {density}")
        with pytest.raises(RecipeError, match=reason) if reason else nullcontext():
            merge(catalog, text, tmp_path / "out")


def test_same_seed_same_bytes(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path)
    text = recipe("dare_ties", tmp_path, parameters="weight: 0.5, density: 0.4")
    for i, seed in enumerate((3, 3, 4)):
        merge(catalog, text, tmp_path / f"out{i}", MergeOptions(seed=seed))
    assert files(tmp_path / "out0") == files(tmp_path / "out1") != files(tmp_path / "out2")


def test_block_sizes_are_checked(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path)
    text = recipe("linear", tmp_path, base=False, parameters="weight: 1")
    with pytest.raises(UserError, match="power of two"):
        merge(catalog, text, tmp_path / "out", MergeOptions(block_size=5000))


def test_a_merge_of_no_experts_is_the_base(catalog: Catalog, tmp_path: Path) -> None:
    models = write_family(tmp_path)
    merge(catalog, recipe("ties", tmp_path, listed=("base",), parameters="weight: 1"), tmp_path / "out")
    merged = read_model(tmp_path / "out")
    assert all(merged[n].tobytes() == t.tobytes() for n, t in models["base"].items())


def test_plans_are_pure(catalog: Catalog, tmp_path: Path) -> None:
    """The planner needs rows alone: the files may be gone."""
    from deltaworks.merging.planner import make_plan

    write_family(tmp_path)
    parsed = parse_recipe(recipe("dare_ties", tmp_path, parameters="weight: 0.5, density: 0.4"))
    plan = prepare_plan(catalog, parsed)
    models = {m.reference: catalog.find(m.name) for m in plan.models}
    for path in tmp_path.glob("*/*.safetensors"):
        path.unlink()
    bases = {m.reference: plan.models[0].reference for m in plan.models[1:]}
    again = make_plan(parsed, {k: v for k, v in models.items() if v is not None}, lambda _: [], bases=bases)
    assert again == plan
    assert again.digest == plan.digest
    assert replace(plan, seed=1).digest != plan.digest


def test_configs_without_layers_or_type(catalog: Catalog, tmp_path: Path) -> None:
    """A model without config.json merges too; nothing is invented for it."""
    base = random_tensors(0, {"conv.weight": (3, 4, 5), "bias": (7,)})
    write_model(tmp_path / "base", base, config=None)
    for i in range(3):
        write_model(tmp_path / f"expert{i}", tuned(i, base), config=None)
    merge(catalog, recipe("ties", tmp_path, parameters="weight: 1, density: 0.5"), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    assert CONFIG["num_hidden_layers"] == 3
