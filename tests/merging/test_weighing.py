"""Planning within a budget: monotone, deterministic, honest, and what users write."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from budgets import enter, prepared, tensors_of, weights, write_family
from families import BF16, random_tensors, read_model, recipe, tuned, write_model
from hypothesis import given
from hypothesis import strategies as st
from merges import METHODS, merge
from numpy.typing import NDArray

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.storage import ReadCost, fit, read_cost
from deltaworks.catalog.store import Catalog
from deltaworks.errors import ChangedError, NonFiniteError, RecipeError, UserError
from deltaworks.merging.budget import Budget, parse_budget
from deltaworks.merging.candidate import Knowledge
from deltaworks.merging.contributions import Overlapping, Overlaps
from deltaworks.merging.measured_error import measure_error
from deltaworks.merging.plan import load_plan, save_plan
from deltaworks.merging.prepare import MergeOptions, plan_inputs, prepare_plan
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.selection import choose, overlapping_loss
from deltaworks.merging.snapshot import run_plan
from deltaworks.merging.weighing import Weighed

FIXED = ("linear", "task_arithmetic")
SHARES = (0.05, 0.10, 0.25, 0.50)


@pytest.fixture
def family(catalog: Catalog, tmp_path: Path) -> Path:
    root = write_family(tmp_path / "family")
    enter(catalog, root)
    return root


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


@pytest.mark.parametrize("method", METHODS)
def test_empty_tensors_are_weighed_and_merged(catalog: Catalog, tmp_path: Path, method: str) -> None:
    made = random_tensors(0, {"a.weight": (300, 131), "empty": (0,), "c.weight": (5,)})
    write_model(tmp_path / "base", made)
    for i in range(3):
        write_model(tmp_path / f"expert{i}", tuned(i + 1, made))
    enter(catalog, tmp_path)
    # Tensors outside of layers take the first value of a gradient: a t of 0 would give the base back.
    settings = METHODS[method] | ({"parameters": "t: 0.7"} if method == "slerp" else {})
    text = recipe(method, tmp_path, **settings)
    result = merge(catalog, text, tmp_path / "out", MergeOptions(budget=parse_budget("50%")))
    assert result.expert_bytes_read > 0
    assert read_model(tmp_path / "out")["empty"].size == 0


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
        ("70000B", Budget(nbytes=70000)),
    ],
)
def test_budgets_as_people_write_them(text: str, expected: Budget) -> None:
    assert parse_budget(text) == expected
    assert Budget(share=0.25).of(1001) == 250


@pytest.mark.parametrize(
    "text", ["a lot", "-5%", "101%", "5 %%", "", "0B", "9" * 400 + "%", "9" * 5000 + "B", "1e9B", "nan", "inf"]
)
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UserError, match=r"budget|more than the experts hold") as told:
        parse_budget(text)
    assert len(str(told.value)) < 250


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("25", "needs a unit: 25% or 25B?"),
        ("0", "needs a unit: 0% or 0B?"),
        (" 12.5 ", "needs a unit: 12.5% or 12.5B?"),
        ("0.25", "needs a unit: 25% or 0.25B?"),
        ("70000", "needs a unit; write a share like 25%, or an amount like 2GiB"),
        ("1e9", "needs a unit; write a share like 25%, or an amount like 2GiB"),
        ("-1", "needs a unit; write a share like 25%, or an amount like 2GiB"),
    ],
)
def test_a_number_without_a_unit_is_not_a_budget(text: str, advice: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"--budget: {text.strip()} {advice}")):
        parse_budget(text, "--budget")
    with pytest.raises(RecipeError, match=f"^x-deltaworks.budget: .* {re.escape(advice)}"):
        parse_recipe(RECIPE_WITH_BUDGET.format(text))


@pytest.mark.parametrize("value", [".nan", "-.inf", "1.0e+400"])
def test_a_budget_that_is_not_finite_is_named_once(value: str) -> None:
    with pytest.raises(RecipeError, match=r"^x-deltaworks.budget: '-?(nan|inf)' is not a budget; write a share"):
        parse_recipe(RECIPE_WITH_BUDGET.format(value))


RECIPE_WITH_BUDGET = "merge_method: linear\nmodels: [{{model: a}}]\nx-deltaworks: {{budget: {}}}\n"


def test_a_recipe_may_carry_its_budget(catalog: Catalog, family: Path) -> None:
    text = recipe("task_arithmetic", family, parameters="weight: 1")
    plan = prepare_plan(catalog, parse_recipe(text + "x-deltaworks: {budget: 10%, fair: true}\n"))
    assert plan.budget_bytes == plan.expert_bytes // 10
    assert plan.fair
    over = prepare_plan(
        catalog, parse_recipe(text + "x-deltaworks: {budget: 10%}\n"), MergeOptions(budget=parse_budget("20%"))
    )
    assert over.budget_bytes == plan.expert_bytes // 5
    assert prepare_plan(catalog, parse_recipe(text + "x-deltaworks: {budget: 5000B}\n")).budget_bytes == 5000


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
    for is_registered in (False, True):
        with pytest.raises(RecipeError, match=r"expert0.* no known base; register the experts with --base"):
            prepare_plan(catalog, parse_recipe(text), MergeOptions(budget=parse_budget("20%")))
        if not is_registered:
            # It is told before any expert is read, to be registered.
            assert catalog.names() == []
            for i in range(3):
                register(catalog, f"expert{i}", str(root / f"expert{i}"))
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
