"""The models of a recipe are found and checked, each against its base once."""

from pathlib import Path

import pytest
from families import random_tensors, recipe, shapes, write_family, write_model

from deltaworks.catalog.models import Model
from deltaworks.catalog.register import check_matching_tensors, register
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.checkpoint import Checkpoint
from deltaworks.errors import CheckpointError, RecipeError
from deltaworks.merging import inputs
from deltaworks.merging.budget import parse_budget
from deltaworks.merging.prepare import MergeOptions, prepare_plan
from deltaworks.merging.recipe import parse_recipe

EXPERTS = ("expert0", "expert1")


@pytest.mark.parametrize(
    ("method", "base"),
    [("task_arithmetic", None), ("linear", None), ("linear", "base"), ("linear", "path"), ("linear", "expert0")],
)
@pytest.mark.parametrize("budget", ["60%", None])
def test_every_expert_is_checked_against_its_base_once(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, base: str | None, budget: str | None
) -> None:
    write_family(tmp_path, 2)
    for name in ("base", *EXPERTS):
        register(catalog, name, str(tmp_path / name), None if name == "base" else "base")
    checked: list[tuple[str, str]] = []
    check = check_matching_tensors

    def record(name: str, expert: Checkpoint, base: Model) -> None:
        checked.append((name, base.name))
        check(name, expert, base)

    monkeypatch.setattr(inputs, "check_matching_tensors", record)
    text = recipe(method, tmp_path, base=method != "linear", listed=EXPERTS, parameters="weight: 0.5")
    options = MergeOptions(
        budget=parse_budget(budget) if budget else None, base=str(tmp_path / "base") if base == "path" else base
    )
    prepare_plan(catalog, parse_recipe(text), options)
    against = "expert0" if base == "expert0" else "base"
    # Without a budget, the base that experts are registered with is of no use to a recipe that names none.
    expected = [] if method == "linear" and base is None and budget is None else EXPERTS
    assert sorted(checked) == [(name, against) for name in expected if name != against]


@pytest.mark.parametrize("budget", ["60%", None])
def test_a_registered_model_with_other_tensors_is_refused(catalog: Catalog, tmp_path: Path, budget: str | None) -> None:
    write_family(tmp_path, 2)
    names = shapes()
    names.pop("model.norm.weight")
    write_model(tmp_path / "expert1", random_tensors(3, names), 2)
    register(catalog, "expert1", str(tmp_path / "expert1"))
    text = recipe("task_arithmetic", tmp_path, listed=EXPERTS, parameters="weight: 0.5")
    with pytest.raises(CheckpointError, match=r"expert1 is not a fine-tune of base: .*model\.norm\.weight"):
        prepare_plan(catalog, parse_recipe(text), MergeOptions(budget=parse_budget(budget) if budget else None))


def test_an_expert_with_several_bases_has_none_that_is_known(catalog: Catalog, tmp_path: Path) -> None:
    write_family(tmp_path, 2)
    slices = "".join(
        f"- base_model: {tmp_path}/{base}\n  sources:\n"
        + "".join(
            f"  - {{model: {tmp_path}/{name}, layer_range: [{layer}, {layer + 1}], parameters: {{weight: 0.5}}}}\n"
            for name in (base, "expert0")
        )
        for layer, base in enumerate(("base", "expert1", "base"))
    )
    made = parse_recipe(f"merge_method: task_arithmetic\nslices:\n{slices}")
    assert {m.name: m.base for m in prepare_plan(catalog, made).models}["expert0"] is None
    with pytest.raises(RecipeError, match=r"expert0 is merged against .*/base in one slice and .*/expert1 in another"):
        prepare_plan(catalog, made, MergeOptions(budget=parse_budget("50%")))
