"""Small trees: what they say, and how they are written."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltaworks.serving.tree import Tree, merged, parse_tree

NAMES = ["a", "b", "c"]
leaf = st.floats(0, 1).map(lambda v: round(v, 3))
trees = st.recursive(
    leaf,
    lambda inner: st.builds(
        lambda feature, bound, then, other: {"feature": feature, "up_to": bound, "then": then, "else": other},
        st.sampled_from(NAMES), st.floats(-2, 2), inner, inner,
    ),
    max_leaves=20,
)  # fmt: skip


def said(node: object, row: np.ndarray) -> float:
    while isinstance(node, dict):
        node = node["then"] if row[NAMES.index(node["feature"])] <= node["up_to"] else node["else"]
    assert isinstance(node, float)
    return node


@given(trees, st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_walking_follows_the_conditions(content: object, values: list[float]) -> None:
    row, tree = np.array(values), parse_tree(content, NAMES)
    assert tree.to_json(NAMES) == content
    assert tree.predict(row) == said(content, row)
    assert tree.predict_all(row[None])[0] == said(content, row)
    assert merged(tree).predict(row) == said(content, row)
    assert merged(tree).leaves <= tree.leaves


def test_rules_can_be_read() -> None:
    content = {
        "feature": "a",
        "up_to": 0.5,
        "then": 1.0,
        "else": {"feature": "b", "up_to": 2.0, "then": 0.0, "else": 1.0},
    }
    tree = parse_tree(content, NAMES)
    assert tree.rules(NAMES, {1.0: "yes", 0.0: "no"}) == [
        "if a <= 0.5: yes",
        "if a > 0.5:",
        "  if b <= 2: no",
        "  if b > 2: yes",
    ]
    assert tree.rules(NAMES)[0] == "if a <= 0.5: 1"


def test_twins_become_one() -> None:
    content = {
        "feature": "a",
        "up_to": 0.5,
        "then": 1.0,
        "else": {"feature": "b", "up_to": 2.0, "then": 1.0, "else": 1.0},
    }
    assert merged(parse_tree(content, NAMES)).leaves == 1
    assert Tree(np.array([-1]), np.zeros(1), np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1)).leaves == 1
