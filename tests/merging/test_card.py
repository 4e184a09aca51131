"""The card of a merged model shows names and notes as they are, whatever they hold."""

from dataclasses import replace
from pathlib import Path

import pytest
from families import recipe, write_family

from deltaworks.catalog.store import Catalog
from deltaworks.merging.card import model_card
from deltaworks.merging.plan import Plan
from deltaworks.merging.prepare import prepare_plan
from deltaworks.merging.recipe import parse_recipe


@pytest.fixture
def plan(catalog: Catalog, tmp_path: Path) -> Plan:
    write_family(tmp_path, 2)
    text = recipe("linear", tmp_path, base=False, listed=("expert0", "expert1"), parameters="weight: 0.5")
    return prepare_plan(catalog, parse_recipe(text))


NOTES = [
    ("num_attention_heads is 8, not 4", "num_attention_heads is 8, not 4"),
    ("a|b, **x** and `y`", r"a\|b, \*\*x\*\* and \`y\`"),
    ("__init__ and _x_", r"\_\_init\_\_ and \_x\_"),
    ("[text](https://example.com)", r"\[text\](https://example.com)"),
    ("<b> & > are plain", "&lt;b&gt; &amp; &gt; are plain"),
    ("> is plain", "&gt; is plain"),
    ("# no heading", r"\# no heading"),
    ("12. no list", r"12\. no list"),
    ("one\nline", "one line"),
    ("a\\b", r"a\\b"),
]


@pytest.mark.parametrize(("note", "expected"), NOTES)
def test_notes_are_shown_as_they_are(plan: Plan, note: str, expected: str) -> None:
    assert f"Notes:\n\n- {expected}\n\n" in model_card(replace(plan, notes=(note,)), "out")


def test_names_are_shown_as_they_are(plan: Plan) -> None:
    models = (plan.models[0]._replace(name="a|b*c"), *plan.models[1:])
    card = model_card(replace(plan, models=models), "*out*")
    assert "\n# \\*out\\*\n" in card
    assert "\n| a\\|b\\*c | " in card


def test_a_recipe_with_backticks_stays_in_its_block(plan: Plan) -> None:
    card = model_card(replace(plan, recipe="a: |\n  ```\n  text\n  ```\n"), "out")
    assert "\n````yaml\na: |\n  ```\n  text\n  ```\n````\n" in card
