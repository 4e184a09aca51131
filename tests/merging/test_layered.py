"""Merges that read layers: all of them to the same bytes as merges that read experts, some of them within a budget."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import random_tensors, recipe, shapes, tuned, write_model
from merges import METHODS, merge
from shell import Shell

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.catalog.tidy import find_waste, layers_of, remove
from deltaworks.errors import CatalogError, ChangedError, CheckpointError, PlanError
from deltaworks.layers.cells import DEPTH
from deltaworks.merging.budget import Budget
from deltaworks.merging.difference import difference
from deltaworks.merging.layered import layers_loss
from deltaworks.merging.measured_error import measure_error
from deltaworks.merging.plan import Plan, load_plan, save_plan
from deltaworks.merging.prepare import MergeOptions, plan_inputs, prepare_plan
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.selection import Ranking, choose, rank_layers
from deltaworks.merging.snapshot import layer_files, run_plan


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


def planned(catalog: Catalog, text: str, share: float, **options: Any) -> Plan:
    return prepare_plan(catalog, parse_recipe(text), MergeOptions(budget=Budget(share=share), **options))


def true_error(catalog: Catalog, plan: Plan) -> float:
    models = plan_inputs(catalog, plan)
    return measure_error(plan, models, layers=layer_files(catalog, plan, models, everywhere=False)).relative


FIXED = ("linear", "task_arithmetic")


@pytest.mark.parametrize("method", METHODS)
def test_layers_reach_further_within_a_budget(catalog: Catalog, family: Path, method: str) -> None:
    text = recipe(method, family, **METHODS[method])
    before = 1.0
    for share in (0.06, 0.12, 0.25, 0.4):
        plan, blocks = planned(catalog, text, share), planned(catalog, text, share, layers=False)
        assert plan.expert_bytes_planned <= share * plan.expert_bytes
        error = true_error(catalog, plan)
        assert error == 0 or error < true_error(catalog, blocks)
        assert error <= before * 1.02
        before = error
        if method in FIXED:
            assert plan.predicted_error == pytest.approx(error, rel=0.08)
            assert error <= (plan.error_bound or np.inf)
        assert any(t.depths for t in plan.tensors)
        assert not any(t.depths for t in blocks.tensors)
    exact = planned(catalog, text, 0.75)
    assert exact.predicted_error == true_error(catalog, exact) == 0
    assert exact.expert_bytes_planned < 0.7 * exact.expert_bytes


@pytest.mark.parametrize("method", METHODS)
def test_what_is_read_of_layers_is_what_was_planned(catalog: Catalog, family: Path, method: str) -> None:
    plan = planned(catalog, recipe(method, family, **METHODS[method]), 0.2)
    save_plan(plan, family / "plan.json")
    again = load_plan(family / "plan.json")
    assert again == plan
    for threads in (1, 3):
        out = family / f"out{threads}"
        result = run_plan(catalog, again, plan_inputs(catalog, again), out, MergeOptions(threads=threads))
        # Ties that were left to a pass over the magnitudes may not need all that was planned.
        assert 0 < result.expert_bytes_read <= plan.expert_bytes_planned
    assert tensors(family / "out1") == tensors(family / "out3")
    full = merge(catalog, recipe(method, family, **METHODS[method]), family / "full")
    assert full.output_bytes_written == sum(len(t) for t in tensors(family / "out1").values())


def test_every_block_has_a_layer_before_large_ones_have_two(catalog: Catalog, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = ("large", "small")
    base = {n: rng.normal(0, 0.02, (64, 512)).astype(np.float32) for n in names}
    expert = {
        n: base[n] + rng.normal(0, s, base[n].shape).astype(np.float32) for n, s in zip(names, (2, 1), strict=True)
    }
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "expert", expert)
    against = register(catalog, "base", str(tmp_path / "base"))
    analyze(catalog, register(catalog, "expert", str(tmp_path / "expert"), "base"), against, layers=True)
    text = f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\nmodels: [{{model: {tmp_path}/expert}}]\n"
    text += "parameters: {weight: 1}\n"
    plan = planned(catalog, text, 1.06 / 32)
    # By squares a second layer of the large takes off more than a first of the small.
    assert [[run[2] for run in t.depths[-1] or ()] for t in plan.tensors] == [[1], [1]]
    assert plan.predicted_error == pytest.approx(true_error(catalog, plan), rel=0.01)


def test_a_budget_for_all_layers_makes_the_full_merge(catalog: Catalog, family: Path) -> None:
    text = recipe("ties", family, **METHODS["ties"])
    merge(catalog, text, family / "full")
    merge(catalog, text, family / "layered", MergeOptions(budget=Budget(share=0.75)))
    assert tensors(family / "full") == tensors(family / "layered")


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_for_everything_is_planned_as_if_chosen(
    catalog: Catalog, family: Path, monkeypatch: pytest.MonkeyPatch, method: str, layers: bool
) -> None:
    text = recipe(method, family, **METHODS[method])
    plan = planned(catalog, text, 1.0, layers=layers)
    monkeypatch.setattr("deltaworks.merging.candidate.Candidate.whole_bytes", 1 << 60)
    assert planned(catalog, text, 1.0, layers=layers) == plan


def test_two_plans_that_read_to_different_depths(catalog: Catalog, family: Path) -> None:
    text = recipe("task_arithmetic", family, **METHODS["task_arithmetic"])
    few, many, all_ = (planned(catalog, text, share) for share in (0.1, 0.3, 0.75))
    rows = difference(few, many)["reads"]
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["deeper_b"] <= row["both"]
        assert row["layers"]
    of_all = difference(few, all_)["reads"]
    for row, other in zip(rows, of_all, strict=True):
        assert row["both"] + row["only_a"] == other["both"]
        assert other["only_a"] == other["deeper_a"] == 0
    assert all(not row["layers"] for row in difference(few, few)["reads"])


def test_some_experts_without_layers(catalog: Catalog, family: Path) -> None:
    (model,) = [m for m in catalog.models() if m.name == "expert1"]
    remove(layers_of(catalog, [model]))
    plan = planned(catalog, recipe("task_arithmetic", family, **METHODS["task_arithmetic"]), 0.3)
    assert plan.predicted_error == pytest.approx(true_error(catalog, plan), rel=0.08)
    kinds = {i.model: d is not None for t in plan.tensors if t.depths for i, d in zip(t.inputs, t.depths, strict=True)}
    assert [kinds[i] for i, m in enumerate(plan.models) if m.role != "base"] == [True, False, True]
    run_plan(catalog, plan, plan_inputs(catalog, plan), family / "out")


def test_plans_for_layers_that_are_gone_are_refused(catalog: Catalog, family: Path) -> None:
    plan = planned(catalog, recipe("task_arithmetic", family, **METHODS["task_arithmetic"]), 0.2)
    models = plan_inputs(catalog, plan)
    for expert in models:
        if expert.name == "expert1":
            analyze(catalog, expert, models[0], layers=True, block_size=8192, force=True)
    with pytest.raises(PlanError, match="layers of expert1 were built anew"):
        run_plan(catalog, plan, models, family / "out")
    remove(layers_of(catalog, [m for m in models if m.name == "expert2"]))
    with pytest.raises(PlanError, match="deltaworks analyze expert2 --layers"):
        run_plan(catalog, plan, models, family / "out")
    assert not (family / "out").exists()


@pytest.mark.parametrize("method", METHODS)
def test_experts_that_are_gone_come_from_their_layers(catalog: Catalog, family: Path, method: str) -> None:
    text = recipe(method, family, **METHODS[method])
    (family / "expert0" / "tokenizer.json").write_text("{}")
    merge(catalog, text, family / "before")
    within = planned(catalog, text, 0.2)
    run_plan(catalog, within, plan_inputs(catalog, within), family / "within")
    for i in range(3):
        shutil.rmtree(family / f"expert{i}")
    merge(catalog, text, family / "after")
    assert tensors(family / "before") == tensors(family / "after")
    again = planned(catalog, text, 0.2)
    run_plan(catalog, again, plan_inputs(catalog, again), family / "again")
    assert tensors(family / "within") == tensors(family / "again")
    assert true_error(catalog, again) == true_error(catalog, within)
    with pytest.raises(CheckpointError, match="from its layers only"):
        planned(catalog, text, 0.2, layers=False)


def test_an_expert_that_is_gone_without_layers_is_missed(catalog: Catalog, family: Path) -> None:
    (model,) = [m for m in catalog.models() if m.name == "expert1"]
    remove(layers_of(catalog, [model]))
    shutil.rmtree(family / "expert1")
    with pytest.raises((ChangedError, CheckpointError), match="expert1"):
        merge(catalog, recipe("linear", family, **METHODS["linear"]), family / "out")
    shutil.rmtree(family / "expert2")
    with pytest.raises(CatalogError, match="all there is of it"):
        layers_of(catalog, [m for m in catalog.models() if m.name == "expert2"])


def test_layers_are_dropped_and_built_again(catalog: Catalog, family: Path) -> None:
    shell = Shell(family)
    layers = sorted((catalog.path / "layers").glob("*.layers"))
    (catalog.path / "layers" / f".{'0' * 24}-{'1' * 24}.layers.4194303").write_bytes(b"x")
    (catalog.path / "statistics" / f"{'0' * 24}-{'1' * 24}.parquet").write_bytes(b"x")
    assert {w.why for w in find_waste(catalog)} == {"left half-written", "of a model that is registered no longer"}
    would = shell.json("gc", "--layers", "--dry-run")
    assert would["bytes"] > sum(p.stat().st_size for p in layers)
    assert all(p.is_file() for p in layers)
    shell.run("gc", "expert0")
    assert not find_waste(catalog)
    assert len([p for p in layers if p.is_file()]) == 2
    freed = shell.run("gc", "--layers").stdout
    assert "layers of expert1" in freed
    assert not list((catalog.path / "layers").iterdir())
    shell.run("analyze", "--all")
    shutil.rmtree(family / "expert2")
    assert shell.json("gc", "--layers", "--dry-run")["kept"] == ["expert2"]
    assert "all there is of it" in shell.error("gc", "expert2")
    assert all(p.is_file() for p in layers)
    assert "bits a parameter" in shell.run("show", "expert0").stdout


def test_experts_on_slow_storage_are_read_from_layers(catalog: Catalog, family: Path) -> None:
    text = recipe("linear", family, **METHODS["linear"])
    near = merge(catalog, text, family / "near")
    catalog.save_storage(str(family.stat().st_dev), 0.03, 1e8)
    far = merge(catalog, text, family / "far")
    assert far.expert_bytes_read < 0.75 * near.expert_bytes_read
    assert tensors(family / "near") == tensors(family / "far")
    originals = merge(catalog, text, family / "originals", MergeOptions(layers=False))
    assert originals.expert_bytes_read == near.expert_bytes_read


def test_a_plan_tells_bits_by_layer_and_module(family: Path) -> None:
    (family / "r.yml").write_text(recipe("linear", family, **METHODS["linear"]))
    shell = Shell(family)
    facts = shell.json("plan", "r.yml", "--budget", "20%")
    shown = shell.run("show", "plan.json").stdout
    assert "Read of each expert, bits a parameter" in shown
    assert "self_attn.q_proj" in shown
    modules = {row["module"]: row["bits"] for row in facts["modules"]}
    assert all(0 <= bits <= 16 for row in modules.values() for bits in row)
    plain = shell.run("plan", "r.yml", "--budget", "20%", "--no-layers", "--force")
    assert plain.stdout.startswith("planned")
    assert "bits a parameter" not in shell.run("show", "plan.json").stdout


def test_ranked_layers_account_for_what_is_left() -> None:
    rng = np.random.default_rng(0)
    places, experts, size = 7, 4, 40
    deltas = rng.standard_normal((experts, DEPTH + 1, size)) * 0.5 ** np.arange(DEPTH + 1)[None, :, None]
    deltas[:, DEPTH] = 0
    deltas[1] = -deltas[0] + 0.1 * deltas[1]
    flat = deltas.reshape(-1, size)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    unit = np.divide(flat, norms, out=np.zeros_like(flat), where=norms > 0)
    cosine = (unit @ unit.T).reshape(experts, DEPTH + 1, experts, DEPTH + 1)
    part = norms.reshape(1, experts, DEPTH + 1) * np.exp(rng.standard_normal((places, experts, 1)))
    cost = np.cumsum(rng.integers(1, 9, (places, experts, DEPTH + 1)), axis=2)
    cost[:, :, 0] = 0
    cost[:, 2, 1:DEPTH] = -1
    cost[3, 1, 1:] = [-1] * (DEPTH - 1) + [0]
    part[3, 1] = 0
    ranking = Ranking.empty(places, experts, DEPTH)
    rank_layers(cost, part, cosine, *(getattr(ranking, k) for k in ("order", "depth", "end", "cost", "gain")))
    before = np.inf
    for budget in range(0, int(cost[:, :, -1].sum()) + 1, 3):
        (chosen,) = choose([ranking], budget)
        depths = np.where(cost[:, :, -1] > 0, chosen.depths, 0)
        spent = np.take_along_axis(cost, depths[:, :, None].astype(np.int64), 2)
        assert spent.min() >= 0
        assert spent.sum() <= budget
        assert chosen.lost == pytest.approx(layers_loss(part, cosine, depths), abs=1e-9)
        assert chosen.lost <= before + 1e-9
        before = chosen.lost
    (everything,) = choose([ranking], int(cost[:, :, -1].sum()))
    assert (everything.depths[cost[:, :, -1] > 0] == DEPTH).all()
