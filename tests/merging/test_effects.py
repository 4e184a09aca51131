"""Merges that would change nothing, or mix what does not belong together, say so."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import Array, random_tensors, recipe, shapes, tuned, write_model
from merges import merge

from deltaworks.catalog.analyze import analyze
from deltaworks.catalog.register import register
from deltaworks.catalog.store import Catalog
from deltaworks.errors import RecipeError
from deltaworks.merging.budget import parse_budget
from deltaworks.merging.manifest import PLAN, read_manifest
from deltaworks.merging.methods.delta import DeltaSum, Sparsify
from deltaworks.merging.methods.operation import Operation
from deltaworks.merging.methods.sce import SelectedSum
from deltaworks.merging.methods.spherical import Slerp
from deltaworks.merging.methods.weighted import WeightedSum
from deltaworks.merging.plan import load_plan
from deltaworks.merging.prepare import MergeOptions
from deltaworks.merging.snapshot import verify

BASE = random_tensors(0, shapes())
MODELS: dict[str, dict[str, Array]] = {
    "base": BASE,
    "expert0": tuned(1, BASE),
    "expert1": tuned(2, BASE),
    "copy": tuned(1, BASE),
    "same": BASE,
    "wide": {n: v.astype(np.float32) for n, v in BASE.items()},
    "alien": {n: -v for n, v in BASE.items()},  # as far away as no fine-tune
}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    for name, tensors in MODELS.items():
        # Copies in other files have other fingerprints.
        write_model(tmp_path / name, tensors, 2 if name in ("copy", "same") else 1)
    return tmp_path


IDLE = "expert0 has no part in the merge: its weight"
PLAIN = ("expert0", "expert1")
NOTES: list[tuple[str, tuple[str, ...], dict[str, str], str, list[str]]] = [
    ("task_arithmetic", PLAIN, {}, "weight: 0.5", []),
    ("ties", PLAIN, {}, "weight: 0.5, density: 0.5", []),
    ("linear", PLAIN, {}, "weight: 0.5", []),
    ("task_arithmetic", ("expert0", "same"), {}, "weight: 0.5", ["same holds the same weights as base, so"]),
    ("ties", ("expert0", "wide"), {}, "weight: 0.5, density: 0.5", ["wide holds the same weights as base"]),
    ("task_arithmetic", ("expert0", "copy"), {}, "weight: 0.5", ["expert0 and copy hold the same weights, so"]),
    ("linear", ("expert0", "copy", "expert1"), {}, "weight: 0.5", ["expert0 and copy hold the same weights"]),
    ("task_arithmetic", PLAIN, {"expert0": "weight: 0.0", "expert1": "weight: 1"}, "", [IDLE]),
    ("linear", PLAIN, {"expert0": "weight: 0.0", "expert1": "weight: 1"}, "", [IDLE]),
    ("ties", PLAIN, {"expert0": "weight: 1, density: 0", "expert1": "weight: 1"}, "", [IDLE]),
    ("task_arithmetic", ("expert0", "alien"), {}, "weight: 0.5", ["alien differs from base by"]),
    ("linear", ("expert0", "alien"), {}, "weight: 0.5", ["alien differs from expert0 by"]),
]  # fmt: skip


@pytest.mark.parametrize("history", ["new", "analyzed", "budget"])
@pytest.mark.parametrize(("method", "listed", "own", "parameters", "expected"), NOTES)
def test_silent_failures_are_named(
    catalog: Catalog,
    family: Path,
    history: str,
    method: str,
    listed: tuple[str, ...],
    own: dict[str, str],
    parameters: str,
    expected: list[str],
) -> None:
    if history == "analyzed":
        base = register(catalog, "base", str(family / "base"))
        for name in listed:
            analyze(catalog, register(catalog, name, str(family / name), "base"), base)
    text = recipe(method, family, own, base=method != "linear", listed=listed, parameters=parameters)
    options = MergeOptions(budget=parse_budget("60%"), base=str(family / "base")) if history == "budget" else None
    if history != "new" and "from expert0" in str(expected):
        expected = ["alien differs from base by"]  # whose base is known now
    result = merge(catalog, text, family / "out", options)
    assert len(result.notes) == len(expected)
    assert all(note.startswith(start) for note, start in zip(result.notes, expected, strict=True))
    assert read_manifest(family / "out")["notes"] == list(result.notes)
    assert load_plan(family / "out" / PLAN).notes == result.notes
    assert all(note in (family / "out" / "README.md").read_text() for note in result.notes)


UP, DOWN = "weight: 0.7, density: 0.5", "weight: -0.7, density: 0.5"


@pytest.mark.parametrize(
    ("method", "copies", "message"),
    [
        ("task_arithmetic", ("weight: 1", "weight: -1"), "the merge would be base itself"),
        ("task_arithmetic", ("weight: 0.1", "weight: -0.1"), "the merge would be base itself"),
        ("breadcrumbs", (UP, DOWN), "the merge would be base itself"),
        ("linear", ("weight: 1", "weight: -1"), "every weight is 0, or cancels out"),
        ("task_arithmetic", ("weight: 1", "weight: -0.5"), None),
        ("breadcrumbs", (UP, "weight: -0.7, density: 0.4"), None),
        ("ties", (UP, DOWN), None),  # elected elements of one sign stay
        ("dare_linear", (UP, DOWN), None),  # which elements stay is drawn for each
    ],
)
def test_copies_that_cancel_out(
    catalog: Catalog, family: Path, method: str, copies: tuple[str, str], message: str | None
) -> None:
    own = dict(zip(("expert0", "copy"), copies, strict=True))
    settings = "normalize: false" if method == "linear" else ""
    text = recipe(method, family, own, base=method != "linear", listed=tuple(own), parameters=settings)
    if message is None:
        assert len(merge(catalog, text, family / "out").notes) == 1
        return
    with pytest.raises(RecipeError, match=message):
        merge(catalog, text, family / "out")
    own["expert1"] = "weight: 0.3, density: 0.5" if "density" in copies[0] else "weight: 0.3"
    text = recipe(method, family, own, base=method != "linear", listed=tuple(own), parameters=settings)
    notes = merge(catalog, text, family / "out").notes
    assert notes[0] == "expert0 and copy hold the same weights, so their weights in the merge add up"
    assert [n.split(" in every")[0] for n in notes[1:]] == [
        f"{name} has no part in the merge: models that hold the same weights cancel it out"
        for name in ("expert0", "copy")
    ]


@pytest.mark.parametrize(("weight", "equal"), [("1.0e-30", True), ("0.5", False)])
def test_an_output_that_equals_the_base_is_noted(catalog: Catalog, family: Path, weight: str, equal: bool) -> None:
    text = recipe("task_arithmetic", family, listed=("expert0",), parameters=f"weight: {weight}")
    result = merge(catalog, text, family / "out")
    note = "the output equals base: every element is that of the base after rounding; check the weights"
    assert result.notes == ((note,) if equal else ())
    assert result.equals_base is equal
    assert read_manifest(family / "out")["equals_base"] is equal
    assert verify(family / "out")["verified"]


@pytest.mark.parametrize(
    ("method", "listed", "parameters", "message"),
    [
        ("task_arithmetic", PLAIN, "weight: 0", "the merge would be base itself"),
        ("ties", PLAIN, "weight: 1, lambda: 0", "the merge would be base itself"),
        ("dare_linear", PLAIN, "weight: 1, density: 0", "the merge would be base itself"),
        ("sce", PLAIN, "select_topk: 0", "the merge would be base itself"),
        ("task_arithmetic", ("same", "wide"), "weight: 1", "the merge would be base itself"),
        ("slerp", ("expert0",), "t: 0", "the merge would be base itself"),
        ("slerp", ("same",), "t: 0.5", "the merge would be base itself"),
        ("linear", PLAIN, "weight: 0, normalize: false", "every weight is 0"),
    ],
)
def test_a_merge_that_would_be_its_base_is_refused(
    catalog: Catalog, family: Path, method: str, listed: tuple[str, ...], parameters: str, message: str
) -> None:
    text = recipe(method, family, base=method != "linear", listed=listed, parameters=parameters)
    with pytest.raises(RecipeError, match=message):
        merge(catalog, text, family / "out")


def test_a_model_that_differs_in_one_element_is_no_copy(catalog: Catalog, family: Path) -> None:
    tensors: dict[str, Any] = {n: v.copy() for n, v in BASE.items()}
    tensors["model.norm.weight"][-1] += 1
    write_model(family / "same", tensors, 2)
    text = recipe("task_arithmetic", family, listed=("expert0", "same"), parameters="weight: 0.5")
    assert merge(catalog, text, family / "out").notes == ()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_told_elsewhere(catalog: Catalog, family: Path, value: float) -> None:
    for name, row in (("base", 0), ("expert0", slice(None))):
        tensors = {n: v.copy() for n, v in MODELS[name].items()}
        for tensor in tensors.values():
            tensor[row] = value
        write_model(family / name, tensors)
    text = recipe("task_arithmetic", family, listed=PLAIN, parameters="weight: 0.5")
    merge(catalog, text, family / "out", MergeOptions(allow_nonfinite=True))


def delta(weights: tuple[float, ...], *, densities: tuple[float, ...] = (1.0, 1.0), scale: float = 1.0) -> DeltaSum:
    return DeltaSum(weights, densities, Sparsify.MAGNITUDE, False, False, False, scale)


OPERATIONS: list[tuple[Operation, list[bool], bool, bool]] = [
    # Whether it depends on each input, is zero, and keeps equal inputs.
    (WeightedSum((0.5, 0.5), normalize=True), [True, True], False, True),
    (WeightedSum((2.0, 1.0), normalize=False), [True, True], False, False),
    (WeightedSum((1.0, 0.0), normalize=False), [True, False], False, True),
    (WeightedSum((0.0, 0.0), normalize=False), [False, False], True, False),
    (Slerp(0.0), [True, False], False, True),
    (Slerp(0.25), [True, True], False, True),
    (Slerp(1.0), [False, True], False, True),
    (SelectedSum(2, 0.0), [True, False, False], False, True),
    (SelectedSum(2, 1.0), [True, True, True], False, True),
    (delta((0.5, 0.0)), [True, True, False], False, True),
    (delta((0.5, 0.5), densities=(1.0, 0.0)), [True, True, False], False, True),
    (delta((0.5, 0.5), scale=0.0), [True, False, False], False, True),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "depends", "is_zero", "keeps"), OPERATIONS)
def test_what_operations_depend_on(operation: Operation, depends: list[bool], *, is_zero: bool, keeps: bool) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(64).astype(np.float32) for _ in depends]
    merged = operation.reference(inputs)
    for k, expected in enumerate(depends):
        assert operation.depends_on(k) is expected
        changed = [x + (i == k) * rng.standard_normal(64).astype(np.float32) for i, x in enumerate(inputs)]
        assert (not np.array_equal(operation.reference(changed), merged)) is expected
    assert operation.is_zero is is_zero
    assert bool(merged.any()) is not is_zero
    assert operation.keeps_equal_inputs is keeps
    equal = operation.reference([inputs[0]] * len(inputs))
    assert np.allclose(equal, inputs[0], rtol=1e-5) is keeps
