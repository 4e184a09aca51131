"""Weights that float32 cannot tell apart from their sum: a clear error, or the right result."""

from pathlib import Path

import numpy as np
import pytest
from families import read_model, recipe, write_family
from merges import merge

from deltaworks.catalog.store import Catalog
from deltaworks.errors import RecipeError
from deltaworks.merging.normalized import check_range, check_sum, normalizable, rescaled
from deltaworks.merging.prepare import prepare_plan
from deltaworks.merging.recipe import parse_recipe


@pytest.mark.parametrize(
    "weights", [(1.0, 1.0), (0.3, -0.1), (1e-20, 3e-20), (1e20, 1e-20), (1.0, 1e-40), (-1.0, -2.0), (1.0, -0.99)]
)
def test_ordinary_weights_stay_as_they_are(weights: tuple[float, ...]) -> None:
    assert normalizable(weights, "t") == weights


@pytest.mark.parametrize("scale", [1e-40, 1e-320, 1e-45, 1e37])
def test_proportions_of_tiny_and_huge_weights_stay(scale: float) -> None:
    weights = normalizable((scale, scale, 2 * scale), "t")
    assert [w / weights[0] for w in weights] == [1.0, 1.0, 2.0]
    assert 1e-3 < weights[0] < 1e3
    assert rescaled((0.0, 0.0)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, -1.0), "sum to zero"),
        ((0.0, 0.0), "sum to zero"),
        ((1e-40, -1e-40), "sum to zero"),
        ((0.1, 0.2, -0.3), "nearly cancel"),
        ((1.0, 1e-9, -1.0), "nearly cancel"),
        ((1.0, -0.9999), "nearly cancel"),
        ((1e-40, -0.9999e-40), "nearly cancel"),
    ],
)
def test_weights_that_cancel_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        normalizable(weights, "t")


def test_a_sum_of_nothing_divides_nothing() -> None:
    check_sum((1.0, -1.0), "t")
    check_sum((0.0, 0.0), "t")
    check_sum((), "t")
    with pytest.raises(RecipeError, match="nearly cancel"):
        check_sum((0.1, 0.2, -0.3), "t")
    with pytest.raises(RecipeError, match="nearly cancel"):
        check_sum((16777217.0, 1.0, -16777218.0), "t")


@pytest.mark.parametrize("value", [3.5e38, -1e39, 1e300])
def test_values_beyond_float32_are_refused(value: float) -> None:
    assert check_range(3.4e38, "weight", "t") == 3.4e38
    with pytest.raises(RecipeError, match=r"weight: .* at tensor 't' is more than a float32 holds"):
        check_range(value, "weight", "t")


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_only_the_proportions_of_normalized_weights_count(catalog: Catalog, tmp_path: Path, method: str) -> None:
    write_family(tmp_path)
    merged = []
    for i, weight in enumerate((1.0, 2.0**-140, 1e-40, 1e-320)):
        weights = {"expert0": f"weight: {weight}", "expert1": f"weight: {weight}", "expert2": f"weight: {2 * weight}"}
        text = recipe(method, tmp_path, weights, base=method == "ties", dtypes="dtype: float32")
        merge(catalog, text, tmp_path / f"out{i}")
        merged.append(read_model(tmp_path / f"out{i}"))
    for name, values in merged[0].items():
        np.testing.assert_array_equal(merged[1][name], values)
        np.testing.assert_allclose(merged[2][name], values, rtol=1e-4, atol=1e-6)
        # A weight of 1e-320 has three digits of its own.
        np.testing.assert_allclose(merged[3][name], values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("parameters", ["weight: 1, lambda: 1e39", "weight: 1e39", "weight: [1, -1e300]"])
def test_parameters_beyond_float32_are_refused_at_plan_time(catalog: Catalog, tmp_path: Path, parameters: str) -> None:
    write_family(tmp_path)
    with pytest.raises(RecipeError, match="more than a float32 holds"):
        prepare_plan(catalog, parse_recipe(recipe("task_arithmetic", tmp_path, parameters=parameters)))
