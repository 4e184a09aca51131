"""Executing within a budget: sound, exact at 100%; an omitted block reads as the base's."""

import errno
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
from budgets import enter, prepared, tensors_of, weights, write_family
from families import BF16, random_tensors, read_model, recipe, tuned, write_model
from hypothesis import given, settings
from hypothesis import strategies as st
from merges import METHODS, merge
from merges import block as block_of
from numpy.typing import NDArray

from deltaworks.catalog.models import Model
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.codec import TILE
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.checkpoints.source import Source
from deltaworks.errors import BudgetError, DeltaworksError
from deltaworks.merging.budget import Budget, parse_budget
from deltaworks.merging.plan import Plan, PlannedTensor
from deltaworks.merging.prepare import MergeOptions, plan_inputs, prepare_plan
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.snapshot import run_plan


@pytest.fixture
def family(catalog: Catalog, tmp_path: Path) -> Path:
    root = write_family(tmp_path / "family")
    enter(catalog, root)
    return root


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
    budgets = ["5%", "10%", "25%", "50%", "70000B"]
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
    block = block_of(rows, codes, 0, tensor.count, scratch, np.zeros(size * 8, np.uint8), tensor.dtype.code)
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
    if share == 0 and method not in ("linear", "slerp", "passthrough"):
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
        if method not in ("linear", "passthrough"):
            merged = read_model(root / "none")
            for name, tensor in models["base"].items():
                assert (merged[name] == tensor.astype(np.float32)).all(), name


# Stopped and resumed


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


def test_a_full_disk_between_two_passes_is_told(
    catalog: Catalog, tmp_path: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltaworks.merging import execute, stream

    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(execute, "_HELD_BYTES", 0)
    monkeypatch.setattr(stream.tempfile, "TemporaryFile", full)  # type: ignore[attr-defined]
    options = MergeOptions(budget=Budget(share=1.0))
    with pytest.raises(DeltaworksError, match="no space left"):
        merge(catalog, recipe("slerp", family, **METHODS["slerp"]), tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


# The laws, for any family


@settings(max_examples=12)
@given(st.data())
def test_the_laws_of_a_budget(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Sound, deterministic, monotone, exact at 100%, and equal to the base at nothing."""
    root = tmp_path_factory.mktemp("laws")
    seed = data.draw(st.integers(0, 999))
    dtype = np.dtype(data.draw(st.sampled_from([BF16, np.float16, np.float32])))
    rng = np.random.default_rng(seed)
    shapes = {f"model.layers.{i}.w.weight": (int(rng.integers(1, 90)), int(rng.integers(1, 300))) for i in range(3)}
    base = random_tensors(seed, shapes, dtype)
    write_model(root / "base", base, int(rng.integers(1, 4)))
    for i in range(3):
        write_model(root / f"expert{i}", tuned(seed + i + 1, base, 0.01, dtype), int(rng.integers(1, 4)))
    method = data.draw(st.sampled_from(list(METHODS)))
    text = recipe(method, root, dtypes="dtype: float32", **METHODS[method])
    shares = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=4)))
    plans: list[list[Plan]] = []
    for i in range(2):
        with Catalog(root / f"catalog{i}") as catalog:
            enter(catalog, root)
            found, full = prepared(catalog, text)
            plans.append([found.within(full, Budget(share=s)) for s in (*shares, 1.0)])
    assert [p.digest for p in plans[0]] == [p.digest for p in plans[1]]
    errors = [p.predicted_error for p in plans[0]]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0
    with Catalog(root / "catalog0") as catalog:
        for i, plan in enumerate(plans[0]):
            result = run_plan(catalog, plan, plan_inputs(catalog, plan), root / f"out{i}")
            assert result.expert_bytes_read == plan.expert_bytes_planned <= (plan.budget_bytes or 0)
            assert plan.budget_bytes == int((*shares, 1.0)[i] * plan.expert_bytes)
        merge(catalog, text, root / "full")
        assert weights(root / "full") == weights(root / f"out{len(shares)}")
        nothing = prepare_plan(catalog, parse_recipe(text), MergeOptions(budget=Budget(share=0.0)))
        if method not in ("linear", "passthrough"):
            run_plan(catalog, nothing, plan_inputs(catalog, nothing), root / "nothing")
            merged = read_model(root / "nothing")
            assert all((merged[n] == base[n].astype(np.float32)).all() for n in base)
