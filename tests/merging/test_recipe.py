import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deltaworks.errors import RecipeError
from deltaworks.merging.methods import METHODS
from deltaworks.merging.parameters import parse_setting
from deltaworks.merging.recipe import load_recipe, parse_recipe

GOOD = """
merge_method: ties
base_model: base
dtype: float32
out_dtype: bfloat16
models:
  - model: base
  - model: a
    parameters: {weight: 0.5, density: 0.4}
  - model: b
    parameters:
      weight: [0, 1e-3, 1]
      density:
        - {filter: mlp, value: 0.2}
        - value: 0.5
parameters:
  normalize: true
  int8_mask: true
x-mine: {anything: goes}
"""


def test_a_recipe_as_mergekit_reads_it() -> None:
    recipe = parse_recipe(GOOD)
    assert recipe.method is METHODS["ties"]
    assert recipe.models() == ["base", "a", "b"]
    assert recipe.out_dtype is not None
    assert recipe.out_dtype.name == "BF16"
    assert not recipe.is_sliced
    assert recipe.warnings == ()
    assert recipe.slices[0].inputs[2].parameters["weight"].at("x", 0.25) == pytest.approx(0.0005)
    assert recipe.slices[0].inputs[2].parameters["density"].at("layers.0.mlp.up", 0.5) == 0.2


def test_the_base_is_added_where_it_is_not_listed() -> None:
    recipe = parse_recipe("{merge_method: slerp, base_model: a, models: [{model: b}], parameters: {t: 0.5}}")
    assert [i.model for i in recipe.slices[0].inputs] == ["b", "a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("merge_method: ties", "merge_method: tise"), r"'tise' is not known; did you mean 'ties'\?"),
        (("merge_method: ties", "x-method: ties"), "merge_method: missing"),
        (("base_model: base", "duration: 5"), "unknown key 'duration'; known are .*, x-deltaworks$"),
        (("base_model: base", "base_modle: base"), r"unknown key 'base_modle'; did you mean 'base_model'\?"),
        (("base_model: base", ""), "base_model: missing; ties merges deltas"),
        (
            ("density: 0.4}", "densty: 0.4}"),
            r"models\[1\].parameters: unknown parameter 'densty'; did you mean 'density'",
        ),
        (("normalize: true", "normalise: true"), "did you mean 'normalize'"),
        (("weight: 0.5,", "weight: much,"), r"models\[1\].parameters.weight: expected a number, not 'much'"),
        (("weight: 0.5,", "weight: .nan,"), "expected a number"),
        (("weight: 0.5,", "weight: true,"), "expected a number"),
        (("density: 0.4}", "density: 1.4}"), "a density is a share from 0 to 1"),
        (("normalize: true", "normalize: perhaps"), "expected true or false"),
        (("[0, 1e-3, 1]", "[]"), "an empty list has no value"),
        (("{filter: mlp, value: 0.2}", "{filtr: mlp, value: 0.2}"), "a choice by tensor name is written"),
        (("{filter: mlp, value: 0.2}", "{filter: 3, value: 0.2}"), "a filter is a part of a tensor's name"),
        (("- model: a", "- modle: a"), r"unknown key 'models\[1\].modle'; did you mean 'model'"),
        (("- model: a", "- model: b"), "'b' stands twice"),
        (("- model: a", "- model: a+lora"), "applies an adapter to a model"),
        (("- model: a", "- model: [a]"), r"models\[1\].model: expected a path"),
        (("dtype: float32", "dtype: float23"), "dtype: unknown dtype 'float23'"),
        (("dtype: float32", "dtype: 32"), "dtype: expected text"),
        (("dtype: float32", "dtype: float32\ndtype: float16"), "the key 'dtype' is given twice"),
        (("models:", "models: 5\nmodules:"), "modules: not supported"),
        (("models:", "slices: []\nmodels:"), "either models or slices"),
        (("x-mine", "tokenizer: {tokens: {a: {}}}\nx-mine"), "changing the vocabulary in a merge is not done here"),
    ],
)
def test_a_wrong_recipe_names_the_key(change: tuple[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(GOOD.replace(*change, 1))


@pytest.mark.parametrize("text", ["", "5", "[1]", "a: [", "\t:"])
def test_not_even_a_mapping(text: str) -> None:
    with pytest.raises(RecipeError):
        parse_recipe(text)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.yml")
    (tmp_path / "bad.yml").write_bytes(b"\xff\xfd\x00")
    with pytest.raises(RecipeError, match="not text in UTF-8"):
        load_recipe(tmp_path / "bad.yml")


KEYS = [
    "merge_method",
    "models",
    "slices",
    "sources",
    "model",
    "layer_range",
    "base_model",
    "parameters",
    "weight",
    "density",
    "t",
    "filter",
    "value",
    "dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
    "path",
    "odd",
    "x-mine",
]
keys = st.sampled_from(KEYS)
words = st.sampled_from(["ties", "linear", "a", "1e-3", ""])
scalars = st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | words
trees = st.recursive(scalars, lambda s: st.lists(s, max_size=3) | st.dictionaries(keys, s, max_size=4), max_leaves=20)


@given(st.dictionaries(keys, trees, max_size=5), st.sampled_from(["ties", "linear", "slerp", None]), trees)
def test_nonsense_is_refused_in_words(content: dict[str, Any], method: str | None, models: Any) -> None:
    """Whatever a recipe holds, it is read or refused with a RecipeError."""
    if method is not None:
        content |= {"merge_method": method, "base_model": "base", "models": [{"model": "a", "parameters": models}]}
        content.pop("slices", None)
    with contextlib.suppress(RecipeError):
        parse_recipe(yaml.safe_dump(content))


def test_anchors_and_merge_keys() -> None:
    text = """
merge_method: ties
base_model: base
models:
  - model: a
    parameters: &usual {weight: 0.5, density: 0.4}
  - model: b
    parameters: {<<: *usual, weight: 0.9}
"""
    b = parse_recipe(text).slices[0].inputs[1].parameters
    assert b["weight"].at("x", 0) == 0.9
    assert b["density"].at("x", 0) == 0.4


def test_what_has_no_effect_is_said() -> None:
    recipe = parse_recipe(GOOD.replace("int8_mask: true", "t: 0.5").replace("density: 0.4}", "normalize: true}"))
    assert recipe.warnings == (
        "parameters.t: not a parameter of ties; it has no effect",
        "models[1].parameters.normalize: belongs to all models; move it to the top-level parameters",
    )


def sliced(method: str, *sources: str, base: str = "") -> str:
    return f"{{merge_method: {method}, {base}slices: [{{sources: [{', '.join(sources)}]}}]}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{merge_method: slerp, base_model: a, models: [{model: b}, {model: c}]}", "slerp takes 2 models"),
        ("{merge_method: passthrough, models: [{model: b}, {model: c}]}", "passthrough takes 1 model,"),
        (
            sliced(
                "slerp", "{model: b, layer_range: [0, 2]}", "{model: c, layer_range: [0, 2]}", base="base_model: a, "
            ),
            "the base model 'a' must be one of the sources",
        ),
        (sliced("passthrough", "{model: b}"), "layer_range: expected"),
        (sliced("passthrough", "{model: b, layer_range: [2, 2]}"), "layer_range: expected"),
        (
            sliced("linear", "{model: b, layer_range: [0, 2]}", "{model: c, layer_range: [0, 1]}"),
            "different numbers of layers",
        ),
    ],
)
def test_numbers_of_models(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text)


def test_gradients() -> None:
    setting = parse_setting([0, 1, 0.5], float, "t")
    assert [setting.at("x", p) for p in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 0.75, 0.5]
    switch = parse_setting([True, False], bool, "normalize")
    assert [switch.at("x", p) for p in (0, 0.9, 1)] == [True, True, False]
    chosen = parse_setting([{"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 7}], float, "w")
    assert chosen.at("a.mlp.b", 0.5) == 0.5
    assert chosen.at("other", 0.5) == 7
    assert parse_setting({"filter": "mlp", "value": 1}, float, "w").at("other", 0) is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("lora: {path: b}", r"models\[0\].model.lora: {'path': 'b'} applies an adapter to a model"),
        ("override_architecture: X", r"models\[0\].model.override_architecture: 'X' reads a model as another"),
        ("typo: 1", r"unknown key 'models\[0\].model.typo'"),
    ],
)
def test_nothing_beside_a_model_is_dropped(more: str, message: str) -> None:
    text = f"merge_method: passthrough\nmodels:\n- model: {{model: {{path: a}}, {more}}}\n"
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text)
    assert parse_recipe(text.replace(more, "lora: null")).models() == ["a"]
