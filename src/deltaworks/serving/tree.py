"""Small decision trees: as arrays that a compiled kernel walks, and as rules that a person reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import kernel
from deltaworks.serving.arrays import F64, I64

_LEAF = -1


@dataclass(frozen=True)
class Tree:
    """A binary decision tree of n nodes; the first is the root.

    Attributes:
        feature: The feature that a node asks for, -1 for a leaf, (n,) int64.
        threshold: Up to which the left child is next, (n,) float64.
        left: (n,) int64.
        right: (n,) int64.
        value: What a leaf says, (n,) float64.
    """

    feature: I64
    threshold: F64
    left: I64
    right: I64
    value: F64

    @property
    def leaves(self) -> int:
        """How many leaves there are."""
        return int((self.feature == _LEAF).sum())

    def predict(self, features: F64) -> float:
        """What it says of one row, (features,) float64."""
        return walk(self.feature, self.threshold, self.left, self.right, self.value, features)

    def predict_all(self, rows: F64) -> F64:
        """What it says of many, (rows, features) float64 -> (rows,) float64."""
        return walk_all(self.feature, self.threshold, self.left, self.right, self.value, rows)

    def to_json(self, names: Sequence[str]) -> Any:
        """Nested: a leaf is a number, another node ``{"feature", "up_to", "then", "else"}``."""
        return self._node(0, names)

    def _node(self, at: int, names: Sequence[str]) -> Any:
        if self.feature[at] == _LEAF:
            return float(self.value[at])
        return {
            "feature": names[self.feature[at]],
            "up_to": float(self.threshold[at]),
            "then": self._node(int(self.left[at]), names),
            "else": self._node(int(self.right[at]), names),
        }

    def rules(self, names: Sequence[str], said: Mapping[float, str] | None = None) -> list[str]:
        """The tree as indented lines, a condition or an answer each.

        Args:
            names: Of the features.
            said: How to write a leaf's value; numbers to three digits otherwise.
        """
        lines: list[str] = []

        def write(at: int, depth: int, before: str) -> None:
            if self.feature[at] == _LEAF:
                value = float(self.value[at])
                lines.append("  " * depth + before + ((said or {}).get(value) or f"{value:.3g}"))
                return
            name, bound = names[self.feature[at]], f"{self.threshold[at]:.4g}"
            for child, condition in ((self.left[at], f"{name} <= {bound}"), (self.right[at], f"{name} > {bound}")):
                if self.feature[child] == _LEAF:
                    write(int(child), depth, f"{before}if {condition}: ")
                else:
                    lines.append("  " * depth + f"{before}if {condition}:")
                    write(int(child), depth + 1, "")

        write(0, 0, "")
        return lines


def parse_tree(content: Any, names: Sequence[str]) -> Tree:
    """The tree that `Tree.to_json` wrote.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    places = {name: i for i, name in enumerate(names)}
    feature: list[int] = []
    threshold: list[float] = []
    children: list[tuple[int, int]] = []
    value: list[float] = []

    def read(node: Any) -> int:
        at = len(feature)
        feature.append(_LEAF)
        threshold.append(0.0)
        children.append((0, 0))
        value.append(0.0)
        if isinstance(node, Mapping):
            feature[at], threshold[at] = places[node["feature"]], float(node["up_to"])
            left = read(node["then"])
            children[at] = left, read(node["else"])
        else:
            value[at] = float(node)
        return at

    read(content)
    sides = np.array(children, np.int64)
    return Tree(
        np.array(feature, np.int64), np.array(threshold), np.ascontiguousarray(sides[:, 0]),
        np.ascontiguousarray(sides[:, 1]), np.array(value),
    )  # fmt: skip


def merged(tree: Tree) -> Tree:
    """The same answers from fewer leaves: two leaves of one parent that say the same become one."""

    def simple(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        then, other = simple(node["then"]), simple(node["else"])
        return then if not isinstance(then, dict) and then == other else {**node, "then": then, "else": other}

    names = [str(i) for i in range(int(tree.feature.max(initial=0)) + 1)]
    return parse_tree(simple(tree.to_json(names)), names)


@kernel
def walk(feature: I64, threshold: F64, left: I64, right: I64, value: F64, row: F64) -> float:
    """The value of the leaf that a row, (features,) float64, falls into; the first five are as in `Tree`."""
    at = 0
    while feature[at] >= 0:
        at = left[at] if row[feature[at]] <= threshold[at] else right[at]
    return float(value[at])


@kernel
def walk_all(feature: I64, threshold: F64, left: I64, right: I64, value: F64, rows: NDArray[np.float64]) -> F64:
    """`walk` for (rows, features) float64 -> (rows,) float64."""
    found = np.empty(rows.shape[0])
    for i in range(rows.shape[0]):
        found[i] = walk(feature, threshold, left, right, value, rows[i])
    return found
