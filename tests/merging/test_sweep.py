"""Recipes whose parameters a sweep sets."""

import pytest

from deltaworks.errors import UserError
from deltaworks.merging.recipe import parse_recipe
from deltaworks.merging.sweep import parse_axis, vary


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        pytest.param("density=0.1, 1e-3", ("density", [0.1, 0.001]), id="numbers"),
        pytest.param("m:normalize=true", ("m:normalize", [True]), id="one model"),
    ],
)
def test_axes(text: str, axis: object) -> None:
    assert parse_axis(text) == axis


@pytest.mark.parametrize("text", ["density", "density=", "=1", "density=[", "density=.nan", "density=a: b: c"])
def test_what_is_not_an_axis(text: str) -> None:
    with pytest.raises(UserError, match="axis of a grid"):
        parse_axis(text)


@pytest.mark.parametrize("name", ["2024-01-01T10:00:00", "2024-01-01", "=", "m"])
def test_models_keep_their_names(name: str) -> None:
    text = f"merge_method: linear\nmodels:\n- {{model: {name}, parameters: {{weight: 1}}}}\n"
    varied = parse_recipe(vary(text, {f"{name}:weight": 2}))
    assert varied.models() == parse_recipe(text).models() == [name]
    assert varied.slices[0].inputs[0].parameters["weight"].at("t", 0.0) == 2
