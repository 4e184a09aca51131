"""Every tensor of every input is used, or left out for a reason that is told, or the merge is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import BF16, CONFIG, Array, random_tensors, read_model, recipe, shapes, tuned, write_model
from merges import merge

from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.errors import CheckpointError
from deltaworks.merging.accounting import BUFFER, NOT_SELECTED, STANDS_IN, account_text
from deltaworks.merging.budget import parse_budget
from deltaworks.merging.manifest import read_manifest
from deltaworks.merging.plan import Plan, load_plan
from deltaworks.merging.prepare import MergeOptions, prepare_plan
from deltaworks.merging.recipe import parse_recipe

BASE = random_tensors(0, shapes())
BIASES = {f"model.layers.{i}.self_attn.q_proj.bias": np.ones(24, BF16) for i in range(3)}
THIRD = "model.layers.2."
FREQUENCIES = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)}
MASK = {"model.layers.0.attn.bias": np.ones((1, 1, 4, 4), np.float32)}


def write(root: Path, extra: dict[str, dict[str, Array]], without: dict[str, str] | None = None) -> None:
    """A base and two experts, with tensors added or taken away."""
    for seed, name in enumerate(("base", "expert0", "expert1")):
        tensors = BASE if name == "base" else tuned(seed, BASE)
        prefix = (without or {}).get(name)
        tensors = {n: v for n, v in tensors.items() if prefix is None or not n.startswith(prefix)}
        write_model(root / name, tensors | extra.get(name, {}))


def text(root: Path, method: str, listed: tuple[str, ...] = ("expert0", "expert1")) -> str:
    base = method != "linear"
    return recipe(method, root, base=base, listed=listed, parameters="t: 0.5" if method == "slerp" else "weight: 0.5")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp"])
@pytest.mark.parametrize("history", ["none", "one registered", "all registered"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("extra", "without", "message"),
    [
        (
            {"expert1": BIASES},
            {},
            "expert1 has 3 tensors that {other} lacks, first model.layers.0.self_attn.q_proj.bias",
        ),
        (
            {},
            {"expert1": THIRD},
            "{other} has 9 tensors that expert1 lacks, first model.layers.2.input_layernorm.weight",
        ),
    ],
)
def test_what_only_one_model_has_is_refused_whatever_was_known(
    catalog: Catalog,
    tmp_path: Path,
    method: str,
    history: str,
    swapped: bool,
    extra: dict[str, Any],
    without: dict[str, str],
    message: str,
) -> None:
    write(tmp_path, extra, without)
    for name in {"none": (), "one registered": ("expert1",), "all registered": ("base", "expert0", "expert1")}[history]:
        register(catalog, name, str(tmp_path / name))
    listed = ("expert1",) if method == "slerp" else ("expert1", "expert0") if swapped else ("expert0", "expert1")
    other = "expert0" if method == "linear" else "base"
    with pytest.raises(CheckpointError, match=message.format(other=other)):
        prepare_plan(catalog, parse_recipe(text(tmp_path, method, listed)))


def test_a_budget_refuses_the_same(catalog: Catalog, tmp_path: Path) -> None:
    write(tmp_path, {"expert1": BIASES})
    options = MergeOptions(budget=parse_budget("50%"))
    with pytest.raises(CheckpointError, match="expert1 has 3 tensors that base lacks"):
        prepare_plan(catalog, parse_recipe(text(tmp_path, "task_arithmetic")), options)


@pytest.mark.parametrize("budget", [None, "50%"])
@pytest.mark.parametrize("holders", [("base",), ("expert1",), ("base", "expert0")])
@pytest.mark.parametrize("buffers", [FREQUENCIES, MASK])
def test_buffers_of_some_models_are_left_out(
    catalog: Catalog, tmp_path: Path, buffers: dict[str, Array], holders: tuple[str, ...], budget: str | None
) -> None:
    write(tmp_path, dict.fromkeys(holders, buffers))
    options = MergeOptions(budget=parse_budget(budget) if budget else None)
    result = merge(catalog, text(tmp_path, "task_arithmetic"), tmp_path / "out", options)
    assert read_model(tmp_path / "out").keys() == BASE.keys()
    rows = {r["name"]: r for r in read_manifest(tmp_path / "out")["accounting"]}
    for name, row in rows.items():
        assert row["left_out"] == ({BUFFER: list(buffers)} if name in holders else {})
    count = "1 buffer" if len(buffers) == 1 else f"{len(buffers)} buffers"
    assert [n.partition(" that")[0] for n in result.notes] == [f"{count} of {name}" for name in rows if name in holders]
    assert all(note in (tmp_path / "out" / "README.md").read_text() for note in result.notes)
    assert load_plan(tmp_path / "out" / "deltaworks_plan.json").notes == result.notes


def test_buffers_that_all_models_have_are_merged(catalog: Catalog, tmp_path: Path) -> None:
    write(tmp_path, dict.fromkeys(("base", "expert0", "expert1"), FREQUENCIES))
    result = merge(catalog, text(tmp_path, "task_arithmetic"), tmp_path / "out")
    assert read_model(tmp_path / "out").keys() == BASE.keys() | FREQUENCIES.keys()
    assert result.notes == ()


def add_up(plan: Plan) -> dict[str, dict[str, Any]]:
    for row in plan.accounting:
        assert row["merged"] + row["copied"] + sum(map(len, row["left_out"].values())) == row["tensors"]
    return {r["name"]: r for r in plan.accounting}


def test_layers_that_slices_do_not_take(catalog: Catalog, tmp_path: Path) -> None:
    write(tmp_path, {})
    sources = [
        f"sources: [{{model: {tmp_path}/expert{e}, layer_range: [{a}, {b}]}}]" for e, a, b in ((0, 0, 2), (1, 1, 2))
    ]
    plan = prepare_plan(
        catalog, parse_recipe("merge_method: passthrough\nslices:\n" + "".join(f"- {s}\n" for s in sources))
    )
    rows = add_up(plan)
    assert len(rows["expert0"]["left_out"][NOT_SELECTED]) == 9 + 2  # its last layer, and the last slice's norm and head
    assert rows["expert1"]["copied"] == 9 + 2
    assert "left out (not selected by the slices)" in account_text(rows["expert1"])


@pytest.mark.parametrize("absent", [("base", "expert0"), ("expert0",)])
def test_a_layer_without_tensors(catalog: Catalog, tmp_path: Path, absent: tuple[str, ...]) -> None:
    """Where no model holds any, the output holds none; where one does, the other lacks them."""
    for name in ("base", "expert0"):
        kept = {n: v for n, v in BASE.items() if name not in absent or "layers.1." not in n}
        write_model(tmp_path / name, kept)
    inputs = "".join(
        f"  - {{model: {tmp_path}/{name}, layer_range: [0, 3], parameters: {{weight: 0.5}}}}\n"
        for name in ("base", "expert0")
    )
    recipe = parse_recipe(f"merge_method: linear\nslices:\n- sources:\n{inputs}")
    if len(absent) == 1:
        with pytest.raises(CheckpointError, match="layer 1 of base has 9 tensors that layer 1 of expert0 lacks"):
            prepare_plan(catalog, recipe)
    else:
        names = {t.name for t in prepare_plan(catalog, recipe).tensors}
        assert names == {n for n in BASE if "layers.1." not in n}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            ((0, 2), (1, 3)),
            "layer 1 of expert1 has 1 tensor that layer 0 of expert0 lacks, first self_attn.q_proj.bias",
        ),
        (
            ((1, 3), (0, 2)),
            "layer 0 of expert1 has 1 tensor that layer 1 of expert0 lacks, first self_attn.q_proj.bias",
        ),
    ],
)
def test_slices_drop_nothing_of_the_layers_they_take(
    catalog: Catalog, tmp_path: Path, layers: tuple[tuple[int, int], ...], message: str
) -> None:
    write(tmp_path, {"expert1": BIASES})
    inputs = "".join(
        f"  - {{model: {tmp_path}/expert{e}, layer_range: {list(r)}, parameters: {{weight: 0.5}}}}\n"
        for e, r in enumerate(layers)
    )
    with pytest.raises(CheckpointError, match=message):
        prepare_plan(catalog, parse_recipe(f"merge_method: linear\nslices:\n- sources:\n{inputs}"))


def test_slices_drop_nothing_outside_layers(catalog: Catalog, tmp_path: Path) -> None:
    write(tmp_path, {"expert1": {"model.extra.weight": np.ones(3, BF16)}})
    inputs = "".join(f"- sources: [{{model: {tmp_path}/expert{e}, layer_range: [0, 2]}}]\n" for e in (0, 1))
    with pytest.raises(CheckpointError, match="expert1 has 1 tensor that expert0 lacks"):
        prepare_plan(catalog, parse_recipe(f"merge_method: passthrough\nslices:\n{inputs}"))


def test_integers_are_copied_and_a_stand_in_is_accounted_for(catalog: Catalog, tmp_path: Path) -> None:
    steps = {"model.steps": np.arange(3)}
    write(tmp_path, dict.fromkeys(("base", "expert0", "expert1"), steps))
    options = MergeOptions(budget=parse_budget("50%"), base=str(tmp_path / "base"))
    rows = add_up(prepare_plan(catalog, parse_recipe(text(tmp_path, "linear")), options))
    assert rows["expert0"] == {
        "name": "expert0",
        "tensors": len(BASE) + 1,
        "merged": len(BASE),
        "copied": 1,
        "left_out": {},
    }
    assert rows["base"]["left_out"].keys() == {STANDS_IN}


def test_a_plan_of_an_earlier_version_is_still_read(catalog: Catalog, tmp_path: Path) -> None:
    """What was added to plans since is not a part of the digest of a plan that lacks it."""
    from dataclasses import replace

    from deltaworks.merging.plan import save_plan

    write(tmp_path, {})
    old = replace(prepare_plan(catalog, parse_recipe(text(tmp_path, "linear"))), accounting=(), notes=(), code=None)
    save_plan(old, tmp_path / "plan.json")
    assert not {"accounting", "notes", "code"} & json.loads((tmp_path / "plan.json").read_text()).keys()
    assert load_plan(tmp_path / "plan.json").accounting == ()


@pytest.mark.parametrize("order", [("text", "wide"), ("wide", "text")])
def test_another_prefix_is_named(catalog: Catalog, tmp_path: Path, order: tuple[str, ...]) -> None:
    write_model(tmp_path / "text", BASE)
    write_model(tmp_path / "wide", {f"language_model.{n}": v for n, v in tuned(1, BASE).items()}, config=CONFIG)
    with pytest.raises(CheckpointError, match="wide has the same tensors as text under"):
        merge(catalog, text(tmp_path, "linear", order), tmp_path / "out")
