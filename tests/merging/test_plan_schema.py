"""Plan files are checked before they are used."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from families import recipe, write_family

from deltaworks.catalog.store import Catalog
from deltaworks.errors import PlanError
from deltaworks.merging.plan_schema import check_plan
from deltaworks.merging.prepare import prepare_plan
from deltaworks.merging.recipe import parse_recipe


@pytest.fixture
def content(catalog: Catalog, tmp_path: Path) -> dict[str, Any]:
    """A plan by task arithmetic, as a file holds it."""
    write_family(tmp_path, 2)
    text = recipe("task_arithmetic", tmp_path, listed=("expert0", "expert1"), parameters="weight: 0.5")
    found: dict[str, Any] = json.loads(json.dumps(prepare_plan(catalog, parse_recipe(text)).to_json()))
    check_plan(found)
    return found


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "1", None, True])
@pytest.mark.parametrize("key", ["lambda", "weights"])
def test_numbers_of_operations_are_finite(content: dict[str, Any], key: str, value: object) -> None:
    place = next(i for i, t in enumerate(content["tensors"]) if t["operation"] == "delta")
    tensor = content["tensors"][place]
    tensor[key] = [0.5, value] if key == "weights" else value
    with pytest.raises(PlanError, match=rf"tensors\[{place}\]\.{key}.*expected a finite number"):
        check_plan(content)


@pytest.mark.parametrize("value", [-1, -1e-9, math.inf, math.nan])
@pytest.mark.parametrize("key", ["predicted_error", "error_bound", "predicted_read_s"])
def test_errors_and_times_are_finite_and_not_negative(content: dict[str, Any], key: str, value: float) -> None:
    with pytest.raises(PlanError, match=f"{key}: expected a finite number that is not negative, not "):
        check_plan(content | {key: value})


@pytest.mark.parametrize("shape", [[1] * 65, [1 << 40] * 200_000])
def test_a_tensor_has_few_dimensions(content: dict[str, Any], shape: list[int]) -> None:
    # The product of the longer one would take minutes.
    content["tensors"][0]["shape"] = shape
    with pytest.raises(PlanError, match=rf"\.shape: expected at most 64 dimensions, not {len(shape)}"):
        check_plan(content)
