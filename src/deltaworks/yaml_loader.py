"""YAML 1.1 as PyYAML reads it, within bounds; but dates stay text, and 1e-5 is a number."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from deltaworks.bounds import MAX_DEPTH, MAX_DIGITS, MAX_NODES, SURROGATE, TOO_DEEP, RefusedError
from deltaworks.errors import one_line, quoted

_OCTAL = re.compile(r"[-+]?0[0-7_]+")


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds; each document takes a loader of its own."""

    def __init__(self, text: str, *, finite: bool) -> None:
        super().__init__(text)
        self._finite = finite
        self._depth = 0
        self._nodes = 0
        self._deepest = 0
        # By anchor: how many nodes it stands for, and how many levels of collections lie below it.
        self._extents: dict[str, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, counting nodes and levels as if every alias were written out."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        anchor, is_alias = getattr(event, "anchor", None), isinstance(event, yaml.AliasEvent)
        if is_alias and anchor in self.anchors and anchor not in self._extents:
            raise yaml.composer.ComposerError(None, None, f"the alias {quoted(anchor)} holds itself", event.start_mark)
        nodes, height = 1, -1 if isinstance(event, yaml.ScalarEvent) else 0
        if is_alias:
            nodes, height = self._extents.get(str(anchor), (nodes, height))
        before, deepest = self._nodes, self._deepest
        self._nodes += nodes
        self._depth += 1
        self._deepest = self._depth + height
        if self._nodes > MAX_NODES:
            problem = f"with its aliases expanded it has more than {MAX_NODES:,} values; write it as JSON"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        if self._deepest > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, TOO_DEEP, event.start_mark)
        node = super().compose_node(parent, index)
        if anchor is not None and not is_alias:
            self._extents[str(anchor)] = self._nodes - before, self._deepest - self._depth
        self._depth -= 1
        self._deepest = max(self._deepest, deepest)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value; a tag that does not fit it is a mistake with a place."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as failure:
            text = quoted(node.value, 60) if isinstance(node.value, str) else "a mapping or list"
            kind = node.tag.rpartition(":")[2]
            reason = str(failure) if isinstance(failure, RefusedError) else f"is not a valid {one_line(kind)}"
            raise yaml.constructor.ConstructorError(None, None, f"{text} {reason}", node.start_mark) from None

    def text(self, node: yaml.ScalarNode) -> str:
        """Text, with pairs of surrogate escapes combined as JSON combines them."""
        value = str(self.construct_scalar(node))
        if SURROGATE.search(value):
            try:
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                problem = f"the text {quoted(value)} has half of a surrogate pair"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        return value

    def whole(self, node: yaml.ScalarNode) -> int:
        """A whole number of bounded length."""
        if len(digits := node.value.lstrip("+-")) > MAX_DIGITS:
            raise RefusedError(f"has {len(digits):,} digits; at most {MAX_DIGITS} are read")
        if _OCTAL.fullmatch(node.value) and self.construct_yaml_int(node):
            raise RefusedError("is an octal number in YAML; write it without the leading zero, or in quotes")
        return self.construct_yaml_int(node)

    def number(self, node: yaml.ScalarNode) -> float:
        """A number, finite where that is asked for."""
        value = self.construct_yaml_float(node)
        if self._finite and not abs(value) < float("inf"):
            raise RefusedError("is not a finite number")
        return value

    def mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        """A mapping in which no key is given twice, of which YAML would silently keep the last."""
        if not isinstance(node, yaml.MappingNode):
            raise TypeError
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            merges = key_node.tag == "tag:yaml.org,2002:merge"
            key = key_node.tag if merges else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{quoted(key)} cannot be a key; keys are text or numbers", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {quoted(key_node.value)} is given twice", key_node.start_mark
                )
            seen.add(key)
        # Only now: a key merged in by << may be set again, which is its use.
        self.flatten_mapping(node)
        return self.construct_mapping(node, deep=True)

    def sequence(self, node: yaml.SequenceNode) -> list[Any]:
        """A list."""
        return self.construct_sequence(node, deep=True)


_TAG = "tag:yaml.org,2002:"
Loader.yaml_constructors = {
    f"{_TAG}null": yaml.SafeLoader.construct_yaml_null,
    f"{_TAG}bool": yaml.SafeLoader.construct_yaml_bool,
    f"{_TAG}int": Loader.whole,
    f"{_TAG}float": Loader.number,
    f"{_TAG}str": Loader.text,
    f"{_TAG}seq": Loader.sequence,
    f"{_TAG}map": Loader.mapping,
    None: yaml.SafeLoader.construct_undefined,
}
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def explained(failure: yaml.MarkedYAMLError, text: str) -> str:
    """A YAML error in one sentence with its line; a tab, which is what people cannot see, is named."""
    marks = [mark.line for mark in (failure.problem_mark, failure.context_mark) if mark is not None]
    if not marks:
        return f"it is not valid YAML: {one_line(str(failure.problem))}"
    lines = text.splitlines()
    for index in range(min(marks), min(max(marks), len(lines) - 1, min(marks) + 1000) + 1):
        blank = lines[index][: len(lines[index]) - len(lines[index].lstrip())]
        if "\t" in blank:
            return f"line {index + 1} begins with a tab; YAML indents with spaces"
    problem = " ".join(str(failure.problem).split())
    context = f"{' '.join(failure.context.split())}: " if failure.context else ""
    return f"line {marks[0] + 1}: {one_line(context + problem, 300)}"
