"""JSON and YAML documents from files that anybody may have written, read within bounds.

Whatever a file holds, reading it gives plain values (mappings with text or other scalar keys, lists, text, numbers,
booleans, None) or raises the error class that the caller names, with one sentence that says where and why. Refused
are: files that are no regular files, or too large; text that is not UTF-8; nesting deeper than `MAX_DEPTH`; keys given
twice; numbers of more than `MAX_DIGITS` digits, or NaN and infinity; halves of surrogate pairs; and YAML aliases that
expand to more than `MAX_NODES` values.
"""

import json
import os
import re
import stat
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from deltaworks.errors import DeltaworksError, quoted

DOCUMENT_BYTES = 64 << 20
"""The largest JSON document that is read, unless the caller has a limit of its own."""
YAML_BYTES = 8 << 20
"""The largest YAML document that is read: about a minute's work for the parser. Larger ones should be JSON."""
MAX_DEPTH = 100
"""Mappings and lists within each other, at most."""
MAX_NODES = 1_000_000
"""Values in a YAML document, at most, an alias counting as all that it stands for."""
MAX_DIGITS = 100
"""Digits of a whole number, at most."""

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_bytes(path: Path, what: str, error: type[DeltaworksError], limit: int = DOCUMENT_BYTES) -> bytes:
    """All bytes of a regular file.

    Args:
        path: The file.
        what: What it should be, for errors, such as ``a workload``.
        error: The class of errors to raise.
        limit: The most bytes that it may have.

    Raises:
        DeltaworksError: as ``error``: it is missing, unreadable, too large, or no regular file.
    """
    start = f"{path}: cannot be read as {what}"
    try:
        _check_regular(path.stat(), start, error)
        # Without O_NONBLOCK a named pipe that has taken the file's place since would hang here.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            _check_regular(found, start, error)
            content = file.read(limit + 1) if found.st_size <= limit else b""
    except OSError as failure:
        raise error(f"{start}: {failure.strerror or failure}") from None
    except ValueError as failure:  # a name with a null character, or with half a surrogate pair
        raise error(f"{quoted(str(path))}: cannot be read as {what}: no file can be called so: {failure}") from None
    if found.st_size > limit or len(content) > limit:
        raise error(f"{start}: it has more than {limit:,} bytes, which is the most that is read")
    return content


def read_text(path: Path, what: str, error: type[DeltaworksError], limit: int = DOCUMENT_BYTES) -> str:
    """The text of a regular file in UTF-8, without a byte order mark.

    Raises:
        DeltaworksError: as `read_bytes`, or the file is not UTF-8; the line is named.
    """
    return decoded(read_bytes(path, what, error, limit), str(path), what, error)


def load_json(path: Path, what: str, error: type[DeltaworksError], limit: int = DOCUMENT_BYTES) -> Any:
    """What a JSON file holds; see `read_bytes` for the arguments and `parse_json` for what is refused."""
    return parse_json(read_bytes(path, what, error, limit), str(path), what, error)


def load_yaml(path: Path, what: str, error: type[DeltaworksError], limit: int = YAML_BYTES) -> Any:
    """What a YAML file holds; see `read_bytes` for the arguments and `parse_yaml` for what is refused."""
    return parse_yaml(read_bytes(path, what, error, limit), str(path), what, error)


def load_document(path: Path, what: str, error: type[DeltaworksError], limit: int = DOCUMENT_BYTES) -> Any:
    """What a YAML or JSON file holds: JSON is read by a JSON parser.

    A file is JSON where its name ends in ``.json``, and where it is valid JSON: YAML reads JSON as well, but not all
    of it alike.
    """
    content, where = read_bytes(path, what, error, limit), str(path)
    text = decoded(content, where, what, error)
    if path.suffix.lower() == ".json":
        return parse_json(text, where, what, error)
    if text.lstrip()[:1] in ("{", "["):
        try:
            return _from_json(text)
        except json.JSONDecodeError:
            pass  # flow style, which YAML has in common with JSON
        except _RefusedError as refused:
            raise error(f"{where}: cannot be read as {what}: {refused}") from None
    return parse_yaml(text, where, what, error)


def decoded(content: bytes, where: str, what: str, error: type[DeltaworksError]) -> str:
    """Bytes in UTF-8 as text, without a byte order mark.

    Raises:
        DeltaworksError: as ``error``: they are not UTF-8; the line is named.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = content.count(b"\n", 0, failure.start) + 1
        raise error(f"{where}: cannot be read as {what}: line {line} is not text in UTF-8") from None


def parse_json(
    content: bytes | str, where: str, what: str, error: type[DeltaworksError], *, finite: bool = True
) -> Any:
    """What a JSON document holds.

    Args:
        content: The document.
        where: Its name in errors, such as the path of its file.
        what: What it should be, for errors, such as ``a workload``.
        error: The class of errors to raise.
        finite: Whether to refuse NaN, infinity and numbers that are too large for a float64.

    Raises:
        DeltaworksError: as ``error``: it is no JSON, or beyond one of the bounds of this module.
    """
    text = decoded(content, where, what, error) if isinstance(content, bytes) else content
    try:
        return _from_json(text, finite=finite)
    except json.JSONDecodeError as failure:
        raise error(
            f"{where}: cannot be read as {what}: line {failure.lineno}, column {failure.colno} is not valid JSON:"
            f" {failure.msg}"
        ) from None
    except _RefusedError as refused:
        raise error(f"{where}: cannot be read as {what}: {refused}") from None


def parse_yaml(
    content: bytes | str, where: str, what: str, error: type[DeltaworksError], *, finite: bool = True
) -> Any:
    """What a YAML document holds; the arguments are those of `parse_json`.

    It is YAML 1.1 as PyYAML reads it, but for what surprises people: numbers such as ``1e-5`` are numbers, dates stay
    text, and tags other than those of plain values are unknown.

    Raises:
        DeltaworksError: as ``error``: it is no YAML, or beyond one of the bounds of this module; the line is named.
    """
    text = decoded(content, where, what, error) if isinstance(content, bytes) else content
    start = f"{where}: cannot be read as {what}"
    if len(text) > YAML_BYTES:
        raise error(f"{start}: it has more than {YAML_BYTES:,} characters of YAML; write it as JSON")
    loader: _Loader | None = None
    try:
        loader = _Loader(text, finite=finite)
        return loader.get_single_data()
    except yaml.reader.ReaderError as failure:
        line = text.count("\n", 0, failure.position) + 1
        character = quoted(text[failure.position])
        raise error(f"{start}: line {line} has the character {character}, which YAML does not allow") from None
    except yaml.MarkedYAMLError as failure:
        raise error(f"{start}: {_explained(failure, text)}") from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError) as failure:
        raise error(f"{start}: it is not valid YAML: {quoted(str(failure))}") from None
    finally:
        if loader is not None:
            loader.dispose()


class _RefusedError(ValueError):
    """JSON that is well formed and beyond a bound."""


def _check_regular(found: os.stat_result, start: str, error: type[DeltaworksError]) -> None:
    if stat.S_ISREG(found.st_mode):
        return
    kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, device or socket"
    raise error(f"{start}: it is {kind}, not a file")


# JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"the key {quoted(key)} is given twice")
            seen.add(key)
    return found


def _constant(text: str) -> float:
    raise _RefusedError(f"{text} is not a number that JSON allows")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise _RefusedError(f"the number {quoted(text)[1:-1]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _RefusedError(f"a whole number has {len(text.lstrip('-')):,} digits; at most {MAX_DIGITS} are read")
    return int(text)


_DIGITS = re.compile(rf"\d{{{MAX_DIGITS}}}")
_EXPONENT = re.compile(r"[eE]\+?\d\d|\d{300}")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)
_CAREFUL_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite, parse_int=_whole
)
_ANY_FLOAT_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole)


def _from_json(text: str, *, finite: bool = True) -> Any:
    """The value in a JSON text; `json.JSONDecodeError` where there is none, and `_RefusedError` beyond a bound."""
    # Looking at every number costs more than looking for a suspicious one first.
    careful = _DIGITS.search(text) or _EXPONENT.search(text)
    decoder = (_CAREFUL_DECODER if careful else _DECODER) if finite else _ANY_FLOAT_DECODER
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise _RefusedError(_TOO_DEEP) from None
    escaped = "\\u" in text
    if escaped or text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value, escaped=escaped)
    return value


_TOO_DEEP = f"its values are nested more than {MAX_DEPTH} deep"


def _check_depth(value: Any, *, escaped: bool) -> None:
    """Refuse nesting that is too deep and, where the text has escapes, halves of surrogate pairs."""
    level = [value]
    for depth in range(MAX_DEPTH + 1):
        if not level:
            return
        if depth == MAX_DEPTH and any(isinstance(v, dict | list) for v in level):
            raise _RefusedError(_TOO_DEEP)
        if escaped:
            for text in _texts(level):
                if _SURROGATE.search(text):
                    raise _RefusedError(f"the text {quoted(text)} has half of a surrogate pair")
        level = [
            child
            for v in level
            if isinstance(v, dict | list)
            for child in (v.values() if isinstance(v, dict) else v)
            if escaped or isinstance(child, dict | list)
        ]


def _texts(values: list[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value


# YAML


class _Loader(yaml.SafeLoader):
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
            raise yaml.composer.ComposerError(None, None, _TOO_DEEP, event.start_mark)
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
        except (ValueError, LookupError, TypeError, AttributeError) as failure:
            text = quoted(node.value, 60) if isinstance(node.value, str) else "a mapping or list"
            kind = node.tag.rpartition(":")[2]
            reason = str(failure) if isinstance(failure, _RefusedError) else f"is no value of the type {quoted(kind)}"
            raise yaml.constructor.ConstructorError(None, None, f"{text} {reason}", node.start_mark) from None

    def text(self, node: yaml.ScalarNode) -> str:
        """Text, with pairs of surrogate escapes combined as JSON combines them."""
        value = str(self.construct_scalar(node))
        if _SURROGATE.search(value):
            try:
                return value.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError:
                problem = f"the text {quoted(value)} has half of a surrogate pair"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None
        return value

    def whole(self, node: yaml.ScalarNode) -> int:
        """A whole number of bounded length."""
        if len(node.value) > MAX_DIGITS:
            raise _RefusedError(f"has {len(node.value):,} digits; at most {MAX_DIGITS} are read")
        return self.construct_yaml_int(node)

    def number(self, node: yaml.ScalarNode) -> float:
        """A number, finite where that is asked for."""
        value = self.construct_yaml_float(node)
        if self._finite and not abs(value) < float("inf"):
            raise _RefusedError("is not a finite number")
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
_Loader.yaml_constructors = {
    f"{_TAG}null": yaml.SafeLoader.construct_yaml_null,
    f"{_TAG}bool": yaml.SafeLoader.construct_yaml_bool,
    f"{_TAG}int": _Loader.whole,
    f"{_TAG}float": _Loader.number,
    f"{_TAG}str": _Loader.text,
    f"{_TAG}seq": _Loader.sequence,
    f"{_TAG}map": _Loader.mapping,
    None: yaml.SafeLoader.construct_undefined,
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}float", re.compile(r"[-+]?(?:\.\d+|\d+(?:\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _explained(failure: yaml.MarkedYAMLError, text: str) -> str:
    """A YAML error in one sentence with its line; a tab, which is what people cannot see, is named."""
    marks = [mark.line for mark in (failure.problem_mark, failure.context_mark) if mark is not None]
    if not marks:
        return f"it is not valid YAML: {quoted(str(failure.problem))[1:-1]}"
    lines = text.splitlines()
    for index in range(min(marks), min(max(marks), len(lines) - 1, min(marks) + 1000) + 1):
        blank = lines[index][: len(lines[index]) - len(lines[index].lstrip())]
        if "\t" in blank:
            return f"line {index + 1} begins with a tab; YAML indents with spaces"
    problem = " ".join(str(failure.problem).split())
    context = f"{' '.join(failure.context.split())}: " if failure.context else ""
    return f"line {marks[0] + 1}: {quoted(context + problem, 300)[1:-1]}"
