"""Models are compared by what the catalog knows of them, else by a small sample that is counted."""

from pathlib import Path

import numpy as np
import pytest
from families import Array, random_tensors, recipe, tuned, write_model

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.models import Model
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.checkpoints.reader import ByteCounter
from deltaworks.errors import RecipeError
from deltaworks.merging import similarity
from deltaworks.merging.budget import parse_budget
from deltaworks.merging.plan import Plan
from deltaworks.merging.prepare import MergeOptions, prepare_plan
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.similarity import Sample

MATRIX = "model.layers.0.mlp.up_proj.weight"
BASE = random_tensors(0, {MATRIX: (512, 512), "model.norm.weight": (64,)})
SAMPLED = 2 * (4096 + 64)
"""Bytes that are read of each model, in BF16."""


def one_changed(tensors: dict[str, Array]) -> dict[str, Array]:
    """The same with another first element, which is in no sample."""
    changed = {n: v.copy() for n, v in tensors.items()}
    changed[MATRIX][0, 0] += 1
    return changed


MODELS: dict[str, dict[str, Array]] = {
    "base": BASE,
    "expert": tuned(1, BASE),
    "copy": tuned(1, BASE),
    "wide": {n: v.astype(np.float32) for n, v in BASE.items()},
    "nearly": one_changed(BASE),
    "also": one_changed(tuned(1, BASE)),
}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    for name, tensors in MODELS.items():
        write_model(tmp_path / name, tensors, 2 if name == "copy" else 1)  # other files, so another fingerprint
    return tmp_path


def planned(
    catalog: Catalog, family: Path, method: str, listed: tuple[str, ...], budget: str | None = None, **more: str
) -> Plan:
    parameters = more.get("parameters", "weight: 0.5" + (", density: 0.5" if method == "ties" else ""))
    text = recipe(method, family, base=method != "linear", listed=listed, parameters=parameters)
    base = str(family / "base") if budget else None
    options = MergeOptions(budget=parse_budget(budget) if budget else None, base=base)
    return prepare_plan(catalog, parse_recipe(text), options)


def analyzed(catalog: Catalog, family: Path, *names: str) -> None:
    base = register(catalog, "base", str(family / "base"))
    for name in names:
        analyze(catalog, register(catalog, name, str(family / name), "base"), base)


SAMPLES_EQUAL = "sampled elements are equal"
LIKELY = f"probably holds the same weights as base, so its delta is 0: {SAMPLES_EQUAL}"
PROVEN = "holds the same weights as base, so its delta is 0"
COUNTED = "hold the same weights, so their weights in the merge add up"
CASES: list[tuple[str, tuple[str, ...], list[str], list[str]]] = [
    # What is noted of new models, and of analyzed ones.
    ("task_arithmetic", ("expert", "wide"), [f"wide {LIKELY}"], [f"wide {PROVEN}"]),
    ("task_arithmetic", ("expert", "nearly"), [f"nearly {LIKELY}"], []),
    ("task_arithmetic", ("expert", "copy"), [f"expert and copy probably {COUNTED}: {SAMPLES_EQUAL}"],
     [f"expert and copy {COUNTED}"]),
    ("linear", ("expert", "copy"), [f"expert and copy probably {COUNTED}: {SAMPLES_EQUAL}"],
     [f"expert and copy {COUNTED}"]),
    ("linear", ("expert", "also"), [f"expert and also probably {COUNTED}: {SAMPLES_EQUAL}"], []),
    ("linear", ("expert", "wide"), [], []),
]  # fmt: skip


@pytest.mark.parametrize(("method", "listed", "new", "known"), CASES)
def test_what_samples_and_analyses_tell(
    catalog: Catalog, family: Path, method: str, listed: tuple[str, ...], new: list[str], known: list[str]
) -> None:
    plan = planned(catalog, family, method, listed)
    assert list(plan.notes) == new
    assert plan.sampled_bytes == sum(
        SAMPLED * (2 if name == "wide" else 1) for name in (*listed, *(["base"] if method != "linear" else []))
    )
    analyzed(catalog, family, *listed)
    plan = planned(catalog, family, method, listed)
    assert list(plan.notes) == known
    assert plan.sampled_bytes == 0


@pytest.mark.parametrize(("method", "budget"), [("ties", None), ("ties", "60%"), ("linear", "60%"), ("slerp", "60%")])
@pytest.mark.parametrize("is_new", [True, False])
def test_nothing_is_sampled_where_analyses_answer_or_a_budget_forbids_it(
    catalog: Catalog, family: Path, monkeypatch: pytest.MonkeyPatch, method: str, budget: str | None, *, is_new: bool
) -> None:
    def refuse(model: Model, counter: ByteCounter) -> None:
        raise AssertionError(f"{model.name} is read")

    if not is_new:
        analyzed(catalog, family, "expert", "copy")
    monkeypatch.setattr(similarity, "Source", refuse)
    listed = ("expert",) if method == "slerp" else ("expert", "copy")
    parameters = {"parameters": "t: 0.5"} if method == "slerp" else {}
    assert planned(catalog, family, method, listed, budget, **parameters).sampled_bytes == 0


def test_a_merge_is_refused_as_its_base_on_proof_only(catalog: Catalog, family: Path) -> None:
    plan = planned(catalog, family, "task_arithmetic", ("wide",))
    assert plan.notes == (f"wide {LIKELY}",)
    analyzed(catalog, family, "wide")
    with pytest.raises(RecipeError, match="the merge would be base itself"):
        planned(catalog, family, "task_arithmetic", ("wide",))


def test_models_that_are_known_to_differ_are_not_likely_to_be_equal(catalog: Catalog, family: Path) -> None:
    analyzed(catalog, family, "nearly")
    plan = planned(catalog, family, "task_arithmetic", ("nearly", "expert"))
    assert plan.notes == ()
    assert plan.sampled_bytes == 3 * SAMPLED


@pytest.mark.parametrize(("size", "is_whole"), [(131072, True), (131080, False)])
def test_a_model_as_small_as_a_sample_is_read_whole(
    catalog: Catalog, tmp_path: Path, size: int, *, is_whole: bool
) -> None:
    write_model(tmp_path / "small", random_tensors(0, {"a": (size // 8, 8)}))
    counter = ByteCounter()
    sample = Sample(register(catalog, "small", str(tmp_path / "small")), counter)
    assert sample.is_whole is is_whole
    assert counter.value == 2 * (size if is_whole else 4096)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_with_numbers_that_are_not_finite_are_equal_to_none(
    catalog: Catalog, tmp_path: Path, value: float
) -> None:
    tensors = random_tensors(0, {"a": (8, 8)})
    tensors["a"][0, 0] = value
    write_model(tmp_path / "small", tensors)
    assert Sample(register(catalog, "small", str(tmp_path / "small")), ByteCounter()).digest is None
