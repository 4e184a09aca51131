"""Budgets: sound, exact at 100%, monotone, deterministic, honest; an omitted block reads as the base's."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import BF16, Array, random_tensors, read_model, recipe, tuned, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from merges import merge
from numpy.typing import NDArray

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.models import Model
from deltaworks.catalog.register import register
from deltaworks.catalog.storage import ReadCost, fit, read_cost
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.codec import TILE, encode_reference
from deltaworks.checkpoints.dtypes import BY_CODE
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.source import Source
from deltaworks.errors import BudgetError, ChangedError, NonFiniteError, RecipeError, UserError
from deltaworks.merging.budget import Budget, parse_budget
from deltaworks.merging.contributions import Overlapping, Overlaps
from deltaworks.merging.measured_error import measure_error
from deltaworks.merging.methods.operation import Block
from deltaworks.merging.plan import Plan, PlannedTensor, load_plan, save_plan
from deltaworks.merging.prepare import MergeOptions, Prepared, plan_inputs, prepare_plan
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.selection import choose, overlapping_loss
from deltaworks.merging.snapshot import run_plan
from deltaworks.merging.weighing import Knowledge, Weighed

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"base": False, "parameters": "weight: [0.2, 0.9]"},
    "task_arithmetic": {"parameters": "weight: 0.4"},
    "ties": {"parameters": "weight: 0.7, density: [0.2, 0.6]"},
    "dare_linear": {"parameters": "weight: 0.7, density: 0.3"},
    "dare_ties": {"parameters": "weight: 0.7, density: 0.3, normalize: true"},
    "slerp": {"listed": ("expert1",), "parameters": "t: [0.3, 0.7]"},
    "passthrough": {"base": False, "listed": ("expert1",), "parameters": "scale: [{filter: other, value: 0.0}]"},
}
FIXED = ("linear", "task_arithmetic")
SHAPES = {
    "model.embed_tokens.weight": (150, 300),
    "model.layers.0.w.weight": (9, 4111),
    "model.layers.1.w.weight": (64, 128),
    "model.norm.weight": (300,),
}
SHARES = (0.05, 0.10, 0.25, 0.50)


def tensors_of(dtype: Any = BF16, experts: int = 3) -> dict[str, dict[str, Array]]:
    """A base, experts of it with deltas of different size, and blocks that never changed."""
    base = random_tensors(0, SHAPES, np.dtype(dtype))
    base["model.norm.weight"][:40] = 0
    models = {"base": base}
    for i in range(experts):
        expert = tuned(i + 1, base, 0.004 * (i + 1), np.dtype(dtype))
        flat = expert["model.embed_tokens.weight"].reshape(-1)
        flat[4096 * i : 4096 * (i + 4)] = base["model.embed_tokens.weight"].reshape(-1)[4096 * i : 4096 * (i + 4)]
        # Only the sign of zero differs: no delta, and yet other bits.
        expert["model.norm.weight"][:] = base["model.norm.weight"]
        expert["model.norm.weight"][:20] = -0.0
        models[f"expert{i}"] = expert
    return models


def write_family(root: Path, dtype: Any = BF16, experts: int = 3) -> Path:
    for i, (name, tensors) in enumerate(tensors_of(dtype, experts).items()):
        write_model(root / name, tensors, 1 + i % 3)
    return root


def enter(catalog: Catalog, root: Path, *, block_size: int = 4096) -> list[Model]:
    base = register(catalog, "base", str(root / "base"))
    experts = [register(catalog, p.name, str(p), "base") for p in sorted(root.glob("expert*"))]
    for expert in experts:
        analyze(catalog, expert, base, block_size=block_size)
    return [base, *experts]


@pytest.fixture
def family(catalog: Catalog, tmp_path: Path) -> Path:
    root = write_family(tmp_path / "family")
    enter(catalog, root)
    return root


def prepared(catalog: Catalog, text: str, **options: Any) -> tuple[Prepared, Plan]:
    parsed = parse_recipe(text)
    found = Prepared(catalog, parsed, MergeOptions(**options), weighs=True)
    return found, found.plan(parsed, None)


def weights(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.glob("*.safetensors")}


# Soundness

MERGES = """
import json, sys
from pathlib import Path
from deltaworks.catalog.store import Catalog
from deltaworks.merging.budget import parse_budget
from deltaworks.merging.prepare import MergeOptions, plan_inputs, prepare_plan
from deltaworks.merging.recipe import load_recipe
from deltaworks.merging.snapshot import run_plan
root = Path(sys.argv[1])
results = {}
for job in sorted(root.glob("jobs/*")):
    with Catalog(job / "catalog") as catalog:
        options = MergeOptions(budget=parse_budget((job / "budget").read_text()), block_size=8192)
        plan = prepare_plan(catalog, load_recipe(job / "recipe.yml"), options)
        results[job.name] = run_plan(catalog, plan, plan_inputs(catalog, plan), job / "out", options).to_json()
(root / "results.json").write_text(json.dumps(results))
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_system_sees_no_more_bytes_read_than_the_budget(tmp_path: Path) -> None:
    """Every method, sharded and single-file experts, shares and a byte count: what the kernel returned is summed up."""
    models = tensors_of()
    budgets = ["5%", "10%", "25%", "50%", "70000"]
    for method, settings_ in METHODS.items():
        for shards in (1, 3):
            job = tmp_path / f"{method}-{shards}"
            for name, tensors in models.items():
                write_model(job / name, tensors, shards)
            for budget in budgets:
                own = tmp_path / "jobs" / f"{method}-{shards}-{budget}"
                shutil.copytree(job, own)
                with Catalog(own / "catalog") as catalog:
                    enter(catalog, own)
                (own / "recipe.yml").write_text(recipe(method, own, **settings_))
                (own / "budget").write_text(budget)
    calls = "read,pread64,readv,preadv,preadv2,mmap,sendfile,copy_file_range,splice"
    trace = ["strace", "-ff", "-y", "-e", f"trace={calls}", "-o", str(tmp_path / "trace")]
    subprocess.run([*trace, sys.executable, "-c", MERGES, str(tmp_path)], check=True)
    read: dict[str, int] = {}
    call = re.compile(r"(\w+)\((.*)\) += (\d+)")
    for log in tmp_path.glob("trace.*"):
        for line in log.read_text().splitlines():
            # Every file of an expert counts, its config too; linear takes the tokenizer of the first expert.
            if (found := re.search(r"<[^>]*/jobs/([^/]+)/expert\d/(?!tokenizer|generation)[^>]*>", line)) is None:
                continue
            parsed = call.match(line)
            assert parsed is not None, line
            assert parsed[1] in ("pread64", "read", "readv", "preadv", "preadv2"), line
            read[found[1]] = read.get(found[1], 0) + int(parsed[3])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == len(METHODS) * 2 * len(budgets)
    for name, result in results.items():
        assert read.get(name, 0) <= result["budget_bytes"], name
        assert read.get(name, 0) == result["expert_bytes_read"] == result["expert_bytes_planned"], name
    assert sum(read.values()) > 0


def test_a_counter_with_a_limit_stops_the_read_before_it_happens(tmp_path: Path) -> None:
    models = tensors_of()
    write_model(tmp_path / "base", models["base"])
    with Catalog(tmp_path / "catalog") as catalog:
        model = register(catalog, "base", str(tmp_path / "base"))
    info = model.checkpoint.tensors["model.layers.1.w.weight"]
    counter = ByteCounter(limit=100)
    with Source(model, counter) as source:
        source.read(info, 0, 40, np.empty(80, np.uint8))
        with pytest.raises(BudgetError, match="exceed the budget of 100 bytes"):
            source.read(info, 0, 40, np.empty(80, np.uint8))
    assert counter.value == 80


# Exactness


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_100_percent_is_bit_equal_to_no_budget(catalog: Catalog, tmp_path: Path, method: str, dtype: Any) -> None:
    root = write_family(tmp_path / "family", dtype)
    enter(catalog, root)
    text = recipe(method, root, dtypes="dtype: float32", **METHODS[method])
    merge(catalog, text, tmp_path / "full")
    result = merge(catalog, text, tmp_path / "budgeted", MergeOptions(budget=parse_budget("100%")))
    assert weights(tmp_path / "full") == weights(tmp_path / "budgeted")
    assert result.predicted_error == 0
    assert result.expert_bytes_read == result.expert_bytes_planned < result.budget_bytes == result.expert_bytes  # type: ignore[operator]


def test_frozen_blocks_cost_nothing_and_are_never_read(catalog: Catalog, family: Path) -> None:
    found, full = prepared(catalog, recipe("linear", family, base=False, parameters="weight: 1"))
    plan = found.within(full, Budget(share=1.0))
    frozen = 3 * 4 * 4096 * 2
    headers = sum(m.nbytes - m.bytes_planned for m in full.models if m.role != "base")
    assert plan.expert_bytes - plan.expert_bytes_planned == frozen + headers
    embeddings = next(t for t in plan.tensors if t.name == "model.embed_tokens.weight")
    assert embeddings.reads[0] == ((4, 11),)
    norm = next(t for t in plan.tensors if t.name == "model.norm.weight")
    assert norm.reads == (), "a changed sign of zero is a change"


# An omitted block reads as the base's


def substituted(plan: Plan, tensor: PlannedTensor, models: Sequence[Model]) -> list[tuple[NDArray[np.uint8], int]]:
    """The whole inputs of a tensor with omitted blocks taken from the base, each with its element type's code."""
    inputs = []
    for k, source in enumerate(tensor.inputs):
        info = models[source.model].checkpoint.find(source.tensor)
        assert info is not None
        raw = np.frombuffer((models[source.model].path / info.file).read_bytes(), np.uint8)
        own = raw[info.offset : info.offset + info.nbytes].copy()
        if tensor.reads and tensor.reads[k] is not None:
            assert tensor.stand_in is not None
            base = models[tensor.stand_in.model].checkpoint.find(tensor.stand_in.tensor)
            assert base is not None
            assert base.dtype == info.dtype
            raw = np.frombuffer((models[tensor.stand_in.model].path / base.file).read_bytes(), np.uint8)
            mixed = raw[base.offset : base.offset + base.nbytes].copy()
            for a, b in tensor.reads[k] or ():
                part = slice(info.dtype.nbytes(a * plan.block_size), info.dtype.nbytes(b * plan.block_size))
                mixed[part] = own[part]
            own = mixed
        inputs.append((own, info.dtype.code))
    return inputs


def on_whole_tensors(plan: Plan, tensor: PlannedTensor, models: Sequence[Model]) -> bytes:
    inputs = substituted(plan, tensor, models)
    size = 1 << 18
    rows = np.zeros((len(inputs), size * 4), np.uint8)
    for row, (raw, _) in zip(rows, inputs, strict=True):
        row[: len(raw)] = raw
    codes = np.array([c for _, c in inputs])
    scratch = np.empty((len(inputs) + 3, TILE), np.float32)
    block = Block(rows, codes, 0, tensor.count, scratch, np.zeros(size * 8, np.uint8), tensor.dtype.code)
    operation = tensor.operation
    for _ in range(operation.passes):
        operation = operation.settle([operation.measure(block)], size)
    operation.merge(block)
    return block.out[: tensor.dtype.nbytes(tensor.count)].tobytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [BF16, np.float32])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_an_omitted_block_reads_as_the_bases(
    catalog: Catalog, tmp_path: Path, method: str, dtype: Any, share: float
) -> None:
    root = write_family(tmp_path / "family", dtype)
    enter(catalog, root)
    found, full = prepared(catalog, recipe(method, root, dtypes="dtype: float32", **METHODS[method]))
    plan = found.within(full, Budget(share=share))
    models = plan_inputs(catalog, plan)
    for i, block_size in enumerate((4096, 1 << 14, 1 << 18)):
        run_plan(catalog, plan, models, tmp_path / f"out{i}", MergeOptions(block_size=block_size))
        merged = read_model(tmp_path / f"out{i}")
        for tensor in plan.tensors:
            assert merged[tensor.name].tobytes() == on_whole_tensors(plan, tensor, models), tensor.name
    if share == 0 and method in ("task_arithmetic", "ties", "dare_ties"):
        base = read_model(root / "base")
        assert all((merged[n] == base[n].astype(np.float32)).all() for n in base)


@settings(max_examples=15)
@given(st.data())
def test_any_choice_of_blocks_is_executed_as_chosen(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("any")
    write_family(root)
    with Catalog(root / "catalog") as catalog:
        enter(catalog, root)
        method = data.draw(st.sampled_from(list(METHODS)))
        found, full = prepared(catalog, recipe(method, root, **METHODS[method]))
        plan = found.within(full, Budget(share=0.0))
        tensors = []
        for tensor in plan.tensors:
            reads: list[Any] = [None] * len(tensor.inputs)
            for k, source in enumerate(tensor.inputs):
                if plan.models[source.model].role != "base":
                    blocks = -(-tensor.count // plan.block_size)
                    mask = data.draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks))
                    edges = np.flatnonzero(np.diff([0, *map(int, mask), 0]))
                    reads[k] = tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))
            tensors.append(replace(tensor, reads=tuple(reads)))
        chosen = replace(plan, tensors=tuple(tensors), budget_bytes=None)
        models = plan_inputs(catalog, chosen)
        size = data.draw(st.sampled_from([4096, 8192, 1 << 18]))
        run_plan(
            catalog, chosen, models, root / "out", MergeOptions(block_size=size, threads=data.draw(st.integers(1, 3)))
        )
        merged = read_model(root / "out")
        for tensor in chosen.tensors:
            assert merged[tensor.name].tobytes() == on_whole_tensors(chosen, tensor, models), tensor.name


@pytest.mark.parametrize("method", METHODS)
def test_models_of_different_element_types(catalog: Catalog, tmp_path: Path, method: str) -> None:
    """An omitted block is the base's own numbers, also where the base has a wider or narrower type."""
    models = tensors_of()
    for kind, base_type, expert_type in (("wide", np.float32, BF16), ("narrow", BF16, np.float32)):
        root = tmp_path / kind
        write_model(root / "base", {n: t.astype(base_type) for n, t in models["base"].items()})
        for i in range(3):
            write_model(root / f"expert{i}", {n: t.astype(expert_type) for n, t in models[f"expert{i}"].items()})
        with Catalog(tmp_path / f"catalog-{kind}") as own:
            enter(own, root)
            text = recipe(method, root, dtypes="dtype: float32", **METHODS[method])
            full = merge(own, text, root / "full")
            whole = merge(own, text, root / "whole", MergeOptions(budget=parse_budget("100%")))
            merge(own, text, root / "none", MergeOptions(budget=Budget(share=0.0)))
            half = merge(own, text, root / "half", MergeOptions(budget=parse_budget("50%")))
        assert weights(root / "full") == weights(root / "whole")
        assert half.expert_bytes_read <= full.expert_bytes // 2
        assert whole.expert_bytes_read <= whole.expert_bytes
        if method in ("task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"):
            merged = read_model(root / "none")
            for name, tensor in models["base"].items():
                assert (merged[name] == tensor.astype(np.float32)).all(), name


# Monotone, deterministic, pure


@pytest.mark.parametrize("method", METHODS)
def test_more_budget_never_predicts_more_error(catalog: Catalog, family: Path, method: str) -> None:
    found, full = prepared(catalog, recipe(method, family, **METHODS[method]))
    total = full.expert_bytes
    plans = [found.within(full, Budget(nbytes=b)) for b in (*range(1, total, total // 150), total)]
    errors = [p.predicted_error for p in plans]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(1, abs=1e-4) or method in ("linear", "slerp", "passthrough")
    assert errors[-1] == 0
    assert all(p.expert_bytes_planned <= (p.budget_bytes or 0) for p in plans)
    assert all(p.error_bound is None or p.error_bound >= p.predicted_error for p in plans)


@st.composite
def places(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Bytes and inner products of random deltas, some alike, some opposed, some zero."""
    seed, count, experts = draw(st.integers(0, 999)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rng = np.random.default_rng(seed)
    deltas = rng.standard_normal((count, experts, 3)) * np.exp(rng.standard_normal((count, experts, 1)) * 2)
    if experts > 1 and draw(st.booleans()):
        deltas[:, 1] = -deltas[:, 0]
    deltas[rng.random((count, experts)) < 0.2] = 0
    cost = rng.integers(1, 9, (count, experts)) * draw(st.sampled_from([1, 512]))
    return np.where((deltas == 0).all(axis=2), 0, cost), deltas @ deltas.transpose(0, 2, 1)


@given(st.lists(places(), min_size=1, max_size=4), st.integers(0, 200), st.integers(0, 200))
def test_choices_are_sound_monotone_and_complete(
    tensors: list[tuple[NDArray[np.int64], NDArray[np.float64]]], first: int, second: int
) -> None:
    total = sum(int(c.sum()) for c, _ in tensors)
    rankings = [Overlapping(g, 0.0, np.zeros(c.shape), is_fixed=True).rank(c, 1) for c, g in tensors]
    losses = []
    for budget in sorted((total * first // 200, total * second // 200)):
        chosen = choose(rankings, budget)
        assert sum(int(c[x.reads].sum()) for (c, _), x in zip(tensors, chosen, strict=True)) <= budget
        losses.append(sum(x.lost for x in chosen))
        real = sum(float(overlapping_loss(g, x.reads).sum()) for (_, g), x in zip(tensors, chosen, strict=True))
        scale = sum(float(np.abs(g).sum()) for _, g in tensors)
        assert losses[-1] == pytest.approx(real, rel=1e-6, abs=1e-9 * scale + 1e-12)
    assert losses[1] <= losses[0] + 1e-9 * (losses[0] + 1)
    everything = choose(rankings, total)
    assert all((x.reads == (c > 0)).all() for (c, _), x in zip(tensors, everything, strict=True))
    assert sum(x.lost for x in everything) == 0


def test_the_best_blocks_are_chosen_where_nothing_overlaps() -> None:
    cost = np.full((6, 2), 10)
    gram = np.zeros((6, 2, 2))
    gram[:, 0, 0], gram[:, 1, 1] = [9, 1, 8, 2, 7, 3], [1, 9, 2, 8, 3, 7]
    (chosen,) = choose([Overlapping(gram, 0.0, np.zeros((6, 2)), is_fixed=True).rank(cost, 1)], 45)
    assert chosen.reads.sum() == 4
    assert (gram[chosen.reads[:, 0], 0, 0] >= 8).all()
    assert chosen.lost == gram.sum() - 9 - 9 - 8 - 8


def test_deltas_that_cancel_are_read_together_or_not_at_all() -> None:
    first = np.array([[3.0, 1.0]])
    deltas = np.concatenate([first, -first + 0.01, [[0.5, 0.5]]])[None]
    gram = deltas @ deltas.transpose(0, 2, 1)
    ranking = Overlapping(gram, 0.0, np.zeros((1, 3)), is_fixed=True).rank(np.full((1, 3), 10), 1)
    assert choose([ranking], 10)[0].reads.tolist() == [[False, False, True]]
    assert choose([ranking], 29)[0].reads.tolist() == [[False, False, True]]
    assert choose([ranking], 30)[0].reads.all()


@pytest.mark.parametrize("method", METHODS)
def test_plans_are_the_same_in_every_catalog(tmp_path: Path, method: str) -> None:
    root = write_family(tmp_path / "family")
    digests = set()
    for i in range(2):
        with Catalog(tmp_path / f"catalog{i}") as catalog:
            enter(catalog, root)
            options = MergeOptions(budget=parse_budget("25%"), threads=i + 1)
            digests.add(prepare_plan(catalog, parse_recipe(recipe(method, root, **METHODS[method])), options).digest)
    assert len(digests) == 1


def test_planning_needs_no_files(catalog: Catalog, family: Path) -> None:
    found, full = prepared(catalog, recipe("ties", family, parameters="weight: 1, density: 0.3"))
    for path in family.glob("*/*.safetensors"):
        path.unlink()
    plan = found.within(full, Budget(share=0.25))
    assert found.within(full, Budget(share=0.25)) == plan
    assert plan.digest == found.within(full, Budget(share=0.25)).digest


def test_a_plan_survives_its_file_and_runs_again_with_the_same_bytes(
    catalog: Catalog, tmp_path: Path, family: Path
) -> None:
    text = recipe("ties", family, parameters="weight: 1, density: 0.37")
    plan = prepare_plan(catalog, parse_recipe(text), MergeOptions(budget=parse_budget("20%")))
    save_plan(plan, tmp_path / "plan.json")
    loaded = load_plan(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.digest == plan.digest
    for name, one in (("a", plan), ("b", loaded)):
        run_plan(catalog, one, plan_inputs(catalog, one), tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert [row["layer"] for row in content["layers"]] == ["embed_tokens", "0", "1", "norm"]
    assert sum(row["weight"] for row in content["layers"]) == pytest.approx(1, abs=1e-5)
    assert sum(m["bytes_planned"] for m in content["models"]) == plan.expert_bytes_planned


def test_a_plan_for_files_that_changed_is_refused_by_name(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    text = recipe("task_arithmetic", family, parameters="weight: 1")
    plan = prepare_plan(catalog, parse_recipe(text), MergeOptions(budget=parse_budget("20%")))
    write_model(family / "expert1", tuned(99, tensors_of()["base"]), 3)
    with pytest.raises(ChangedError, match="expert1"):
        plan_inputs(catalog, plan)


# Honest


@pytest.mark.parametrize("method", METHODS)
def test_predictions_are_near_the_truth_and_the_bound_holds(catalog: Catalog, family: Path, method: str) -> None:
    found, full = prepared(catalog, recipe(method, family, **METHODS[method]))
    for share in SHARES:
        plan = found.within(full, Budget(share=share))
        real = measure_error(plan, plan_inputs(catalog, plan)).relative
        assert plan.predicted_error == pytest.approx(real, rel=0.05 if method in FIXED else 0.2)
        assert (plan.error_bound is not None) == (method in (*FIXED, "passthrough"))
        if plan.error_bound is not None:
            assert real <= plan.error_bound


def test_the_measured_error_is_that_of_the_outputs(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    text = recipe("ties", family, dtypes="dtype: float32", parameters="weight: 1, density: 0.3")
    merge(catalog, text, tmp_path / "full")
    options = MergeOptions(budget=parse_budget("20%"))
    result = merge(catalog, text, tmp_path / "part", options, verify_error=True)
    full, part, base = (read_model(p) for p in (tmp_path / "full", tmp_path / "part", family / "base"))
    lost = sum(float(np.square(part[n].astype(np.float64) - full[n]).sum()) for n in full)
    whole = sum(float(np.square(full[n].astype(np.float64) - base[n].astype(np.float64)).sum()) for n in full)
    assert result.measured_error == pytest.approx((lost / whole) ** 0.5, rel=1e-9)
    assert merge(catalog, text, tmp_path / "again", verify_error=True).measured_error == 0
    assert result.expert_bytes_read <= (result.budget_bytes or 0), "what verifying reads is not charged"


def test_weights_that_do_not_add_up_to_one_move_the_base(catalog: Catalog, family: Path) -> None:
    text = recipe("linear", family, base=False, parameters="weight: 0.5, normalize: false")
    found, full = prepared(catalog, text)
    plan = found.within(full, Budget(share=0.2))
    real = measure_error(plan, plan_inputs(catalog, plan)).relative
    assert plan.predicted_error == pytest.approx(real, rel=0.05)


# Fairness, storage


def test_a_fair_budget_feeds_small_experts(catalog: Catalog, family: Path) -> None:
    text = recipe("task_arithmetic", family, parameters="weight: 1")
    shares = []
    for fair in (False, True):
        plan = prepare_plan(catalog, parse_recipe(text), MergeOptions(budget=parse_budget("20%"), fair=fair))
        assert plan.fair is fair
        assert plan.expert_bytes_planned <= (plan.budget_bytes or 0)
        shares.append([m.bytes_planned for m in plan.models[1:]])
    (greedy, fair_) = shares
    assert greedy[0] < fair_[0]
    assert max(fair_) / min(fair_) < max(greedy) / max(1, min(greedy))


def test_a_balanced_budget_leaves_no_tensor_behind(catalog: Catalog, family: Path) -> None:
    found, full = prepared(catalog, recipe("task_arithmetic", family, parameters="weight: 1"))
    even, _ = prepared(catalog, recipe("task_arithmetic", family, parameters="weight: 1"), balanced=True)
    errors = []
    for one in (found, even):
        plan = one.within(full, Budget(share=0.3))
        assert plan.balanced is (one is even)
        real = measure_error(plan, plan_inputs(catalog, plan))
        assert plan.predicted_error == pytest.approx(real.relative, rel=0.1)
        errors.append(sum((t.error or 0.0) ** 2 for t in plan.tensors))
    assert errors[1] < errors[0]
    plans = [even.within(full, Budget(share=s / 40)) for s in range(41)]
    assert [p.predicted_error for p in plans] == sorted((p.predicted_error for p in plans), reverse=True)
    assert plans[-1].predicted_error == 0


def test_dear_requests_make_long_runs(catalog: Catalog, family: Path) -> None:
    found, full = prepared(catalog, recipe("task_arithmetic", family, parameters="weight: 1"))
    models = [found.models[m.reference] for m in full.models]
    deltas = found.knowledge(full).deltas

    def runs(cost: ReadCost) -> list[int]:
        plan = Weighed(full, Knowledge(models, deltas, cost, Overlaps())).within(full.expert_bytes // 3)
        assert plan.read_cost == (cost.request_s, cost.bytes_per_s)
        assert plan.predicted_read_s is not None
        return [b - a for t in plan.tensors for r in t.reads for a, b in r or ()]

    assert np.mean(runs(ReadCost(0.03, 1e8))) > np.mean(runs(ReadCost(1e-5, 1e9)))


def test_the_cost_of_reading_is_fitted_once_a_storage(catalog: Catalog, tmp_path: Path) -> None:
    cost = fit({n: 0.002 + n / 5e8 for n in (4096, 1 << 18, 1 << 21)})
    assert cost.request_s == pytest.approx(0.002)
    assert cost.bytes_per_s == pytest.approx(5e8)
    assert cost.seconds(3, 10**9) == pytest.approx(2.006)
    base = {"w.weight": np.zeros((2200, 2000), BF16)}
    write_model(tmp_path / "base", base)
    write_model(tmp_path / "expert", tuned(1, base))
    first = register(catalog, "base", str(tmp_path / "base"))
    expert = register(catalog, "expert", str(tmp_path / "expert"), "base")
    analyze(catalog, expert, first)
    measured = read_cost(catalog, expert)
    assert 0 < measured.request_s < 10
    analyze(catalog, expert, first, force=True)
    assert read_cost(catalog, expert) == measured


# What users write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("25%", Budget(share=0.25)),
        (" 7.5 % ", Budget(share=0.075)),
        ("0%", Budget(share=0.0)),
        ("2GiB", Budget(nbytes=2**31)),
        ("70000", Budget(nbytes=70000)),
    ],
)
def test_budgets_as_people_write_them(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected
    assert Budget(share=0.25).of(1001) == 250


@pytest.mark.parametrize("text", ["a lot", "-5%", "101%", "5 %%", "", "0"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UserError, match=r"budget|more than the experts hold"):
        parse_budget(text)


def test_a_recipe_may_carry_its_budget(catalog: Catalog, family: Path) -> None:
    text = recipe("task_arithmetic", family, parameters="weight: 1")
    plan = prepare_plan(catalog, parse_recipe(text + "x-deltaworks: {budget: 10%, fair: true}\n"))
    assert plan.budget_bytes == plan.expert_bytes // 10
    assert plan.fair
    over = prepare_plan(
        catalog, parse_recipe(text + "x-deltaworks: {budget: 10%}\n"), MergeOptions(budget=parse_budget("20%"))
    )
    assert over.budget_bytes == plan.expert_bytes // 5
    assert prepare_plan(catalog, parse_recipe(text + "x-deltaworks: {budget: 5000}\n")).budget_bytes == 5000


@pytest.mark.parametrize(
    ("extension", "message"),
    [
        ("{bugdet: 10%}", "did you mean 'budget'"),
        ("{budget: [1]}", "write a share like 25%"),
        ("{fair: maybe}", "true or false"),
        ("10%", "expected keys and values"),
    ],
)
def test_a_mistyped_extension_is_named(family: Path, extension: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe("task_arithmetic", family, parameters="weight: 1") + f"x-deltaworks: {extension}\n")


def test_linear_needs_to_know_the_base(catalog: Catalog, tmp_path: Path) -> None:
    root = write_family(tmp_path / "family")
    text = recipe("linear", root, base=False, parameters="weight: 1")
    with pytest.raises(RecipeError, match=r"expert0.* no known base; register the experts with --base"):
        prepare_plan(catalog, parse_recipe(text), MergeOptions(budget=parse_budget("20%")))
    named = parse_recipe(text + f"x-deltaworks: {{base: {root / 'base'}}}\n")
    plan = prepare_plan(catalog, named, MergeOptions(budget=parse_budget("20%")))
    assert [m.role for m in plan.models] == ["expert", "expert", "expert", "base"]
    given_ = prepare_plan(
        catalog, parse_recipe(text), MergeOptions(budget=parse_budget("20%"), base=str(root / "base"))
    )
    assert given_.expert_bytes_planned == plan.expert_bytes_planned


def test_slerp_of_two_experts_spares_both(catalog: Catalog, tmp_path: Path, family: Path) -> None:
    lines = ["merge_method: slerp", f"base_model: {family / 'expert0'}", "dtype: float32", "parameters: {t: 0.4}"]
    text = "\n".join([*lines, "models:", f"  - model: {family / 'expert0'}", f"  - model: {family / 'expert1'}"]) + "\n"
    result = merge(catalog, text, tmp_path / "out", MergeOptions(budget=parse_budget("30%")), verify_error=True)
    sizes = [sum(p.stat().st_size for p in (family / e).glob("*.safetensors")) for e in ("expert0", "expert1")]
    assert result.expert_bytes == sum(sizes)
    assert result.expert_bytes_read <= sum(sizes) * 0.3
    assert result.predicted_error == pytest.approx(result.measured_error, rel=0.1)
    merge(catalog, text, tmp_path / "full")
    merge(catalog, text, tmp_path / "all", MergeOptions(budget=parse_budget("100%")))
    assert weights(tmp_path / "full") == weights(tmp_path / "all")


def test_experts_in_blocks_of_different_size(catalog: Catalog, family: Path) -> None:
    base, expert, *_ = catalog.models()
    analyze(catalog, expert, base, block_size=8192, force=True)
    with pytest.raises(UserError, match=r"analyze both alike: deltaworks analyze .* --force --block-size 8192"):
        prepared(catalog, recipe("linear", family, base=False, parameters="weight: 1"))[0].within(
            prepared(catalog, recipe("linear", family, base=False, parameters="weight: 1"))[1], Budget(share=0.1)
        )


def test_nonfinite_experts_cannot_be_weighed(catalog: Catalog, tmp_path: Path) -> None:
    models = tensors_of()
    models["expert1"]["model.norm.weight"][3] = np.nan
    for name, tensors in models.items():
        write_model(tmp_path / name, tensors)
    text = recipe("task_arithmetic", tmp_path, parameters="weight: 1")
    with pytest.raises(NonFiniteError, match="expert1 has NaN"):
        prepare_plan(catalog, parse_recipe(text), MergeOptions(budget=parse_budget("20%")))


def test_integer_tensors_are_left_to_the_base(catalog: Catalog, tmp_path: Path) -> None:
    """A share of the bytes takes them from the base; the whole budget reads them, and compares them."""
    for i, (name, tensors) in enumerate(tensors_of().items()):
        write_model(tmp_path / name, tensors | {"ids": np.arange(1000, dtype=np.int64)}, 1 + i)
    text = recipe("task_arithmetic", tmp_path, parameters="weight: 1")
    for budget in ("5%", "100%"):
        merge(catalog, text, tmp_path / f"out{budget}", MergeOptions(budget=parse_budget(budget)))
        assert (read_model(tmp_path / f"out{budget}")["ids"] == np.arange(1000)).all()


def test_layers_taken_twice_and_from_elsewhere(catalog: Catalog, family: Path) -> None:
    lines = ["merge_method: passthrough", "dtype: bfloat16", "slices:"]
    lines += [f"  - sources: [{{model: {family / 'expert2'}, layer_range: {r}}}]" for r in ("[0, 2]", "[1, 2]")]
    options = MergeOptions(budget=parse_budget("60%"))
    result = merge(catalog, "\n".join(lines) + "\n", family / "out", options, verify_error=True)
    assert result.expert_bytes_read <= (result.budget_bytes or 0)
    assert result.predicted_error == pytest.approx(result.measured_error, rel=0.02)


@pytest.fixture
def half_written(catalog: Catalog, tmp_path: Path, family: Path) -> tuple[Plan, list[Model], Path]:
    text = recipe("ties", family, parameters="weight: 1, density: 0.3")
    options = MergeOptions(budget=parse_budget("40%"), shard_bytes=30_000)
    plan = prepare_plan(catalog, parse_recipe(text), options)
    return plan, plan_inputs(catalog, plan), tmp_path / "out"


def test_a_resumed_merge_keeps_to_the_budget(
    catalog: Catalog, half_written: tuple[Plan, list[Model], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaworks.merging import snapshot

    plan, models, out = half_written
    record = snapshot._Staging.record

    def stop_after(self: Any, *arguments: Any) -> None:
        record(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(snapshot._Staging, "record", stop_after)
        with pytest.raises(KeyboardInterrupt):
            run_plan(catalog, plan, models, out)
    result = run_plan(catalog, plan, models, out)
    assert result.expert_bytes_read == plan.expert_bytes_planned <= (plan.budget_bytes or 0)
    assert snapshot.verify(out)["verified"]


def test_codes_name_their_types() -> None:
    values = np.array([1.5, -2.0], np.float32)
    for code, dtype in BY_CODE.items():
        assert dtype.code == code
        assert len(encode_reference(values, dtype)) == 2 * dtype.bits // 8
