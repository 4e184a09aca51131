"""JSON and YAML documents from files that anybody may have written, read within bounds.

Whatever a file holds, reading it gives plain values (mappings with text or other scalar keys, lists, text, numbers,
booleans, None) or raises the error class that the caller names, with one sentence that says where and why. Refused
are: anything but regular files; files that are too large; text that is not UTF-8; keys given twice; NaN, infinity and
halves of surrogate pairs; and what is beyond `deltaworks.bounds`: nesting, digits, and what YAML aliases expand to.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from deltaworks.bounds import MAX_DEPTH, MAX_DIGITS, SURROGATE, TOO_DEEP, RefusedError
from deltaworks.errors import DeltaworksError, one_line, plain, quoted
from deltaworks.regular_files import other_kind
from deltaworks.yaml_loader import Loader, explained

DOCUMENT_BYTES = 64 << 20
"""The largest JSON document that is read, unless the caller has a limit of its own."""
YAML_BYTES = 8 << 20
"""The largest YAML document that is read: about a minute's work for the parser. Larger ones should be JSON."""


_LONGEST_PATH = 1000


def read_bytes(path: Path, what: str, error: type[DeltaworksError], limit: int = DOCUMENT_BYTES) -> bytes:
    """All bytes of a regular file.

    Args:
        path: The file.
        what: What it should be, for errors, such as ``a workload``.
        error: The class of errors to raise.
        limit: The most bytes that it may have.

    Raises:
        DeltaworksError: as ``error``: it is missing, unreadable, too large, or not a regular file.
    """
    start = f"{plain(str(path), _LONGEST_PATH)}: cannot be read as {what}"
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
        raise error(f"{quoted(str(path))}: cannot be read as {what}: the file name is invalid: {failure}") from None
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
        except json.JSONDecodeError as failure:
            # Flow style, which YAML has in common with JSON, unless it is too long for YAML.
            if len(text) > YAML_BYTES:
                raise error(_invalid_json(where, what, failure)) from None
        except RefusedError as refused:
            raise error(f"{where}: cannot be read as {what}: {refused}") from None
    return parse_yaml(text, where, what, error)


_OTHER_BYTES = {
    b"\x1f\x8b": "compressed by gzip; decompress it first",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard; decompress it first",
    b"PK\x03\x04": "a ZIP archive, or a workbook; take the file out of it, or save it as text",
    b"\xff\xfe": "text in UTF-16; save it in UTF-8",
    b"\xfe\xff": "text in UTF-16; save it in UTF-8",
}
"""What bytes that are not UTF-8 are, by how they begin."""


def decoded(content: bytes, where: str, what: str, error: type[DeltaworksError]) -> str:
    """Bytes in UTF-8 as text, without a byte order mark.

    Raises:
        DeltaworksError: as ``error``: they are not UTF-8; the line is named.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        for start, kind in _OTHER_BYTES.items():
            if content.startswith(start):
                raise error(f"{where}: cannot be read as {what}: it is {kind}") from None
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
        DeltaworksError: as ``error``: it is not JSON, or beyond one of the bounds of this module.
    """
    text = decoded(content, where, what, error) if isinstance(content, bytes) else content
    try:
        return _from_json(text, finite=finite)
    except json.JSONDecodeError as failure:
        raise error(_invalid_json(where, what, failure)) from None
    except RefusedError as refused:
        raise error(f"{where}: cannot be read as {what}: {refused}") from None


def json_values(text: str, where: str, what: str, error: type[DeltaworksError]) -> Iterator[Any]:
    """The values in a JSON text that holds one a line, or several in a list, or simply one after the other.

    They are read one by one, so that a long list takes no more memory than its text. Numbers are bounded as in
    `parse_json`; depth only by what the interpreter can read.

    Raises:
        DeltaworksError: as ``error``: the text is not JSON; the line is named.
    """
    try:
        yield from _values(text)
    except json.JSONDecodeError as failure:
        raise error(_invalid_json(where, what, failure)) from None
    except RefusedError as refused:
        raise error(f"{where}: cannot be read as {what}: {refused}") from None
    except RecursionError:
        raise error(f"{where}: cannot be read as {what}: {TOO_DEEP}") from None


def _values(text: str) -> Iterator[Any]:
    at = _next(text, 0)
    listed = text[at : at + 1] == "["
    if listed:
        at = _next(text, at + 1)
    while at < len(text) and not (listed and text[at] == "]"):
        value, at = _CAREFUL_DECODER.raw_decode(text, at)
        yield value
        at = _next(text, at)
        if listed and text[at : at + 1] == ",":
            at = _next(text, at + 1)
            if text[at : at + 1] == "]":
                raise json.JSONDecodeError("Illegal trailing comma before end of array", text, at)
        elif listed and text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
    if listed and at == len(text):
        raise json.JSONDecodeError("Expecting ']'", text, at)
    if listed and _next(text, at + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, at + 1)


_BLANK = re.compile(r"[ \t\n\r]*")


def _next(text: str, at: int) -> int:
    """Where the next value or mark begins."""
    found = _BLANK.match(text, at)
    return found.end() if found else at


def parse_yaml(
    content: bytes | str, where: str, what: str, error: type[DeltaworksError], *, finite: bool = True
) -> Any:
    """What a YAML document holds; the arguments are those of `parse_json`.

    It is YAML 1.1 as PyYAML reads it, but for what surprises people: numbers such as ``1e-5`` are numbers, dates stay
    text, and tags other than those of plain values are unknown.

    Raises:
        DeltaworksError: as ``error``: it is not YAML, or beyond one of the bounds of this module; the line is named.
    """
    text = decoded(content, where, what, error) if isinstance(content, bytes) else content
    start = f"{where}: cannot be read as {what}"
    if len(text) > YAML_BYTES:
        raise error(f"{start}: it has more than {YAML_BYTES:,} characters of YAML; write it as JSON")
    loader: Loader | None = None
    try:
        loader = Loader(text, finite=finite)
        return loader.get_single_data()
    except yaml.reader.ReaderError as failure:
        line = text.count("\n", 0, failure.position) + 1
        character = quoted(text[failure.position])
        raise error(f"{start}: line {line} has the character {character}, which YAML does not allow") from None
    except yaml.MarkedYAMLError as failure:
        raise error(f"{start}: {explained(failure, text)}") from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, TypeError, OverflowError) as failure:
        raise error(f"{start}: it is not valid YAML: {quoted(str(failure))}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _invalid_json(where: str, what: str, failure: json.JSONDecodeError) -> str:
    place = f"line {failure.lineno}, column {failure.colno}"
    return f"{where}: cannot be read as {what}: {place} is not valid JSON: {failure.msg}"


def _check_regular(found: os.stat_result, start: str, error: type[DeltaworksError]) -> None:
    if (kind := other_kind(found.st_mode)) is not None:
        raise error(f"{start}: it is {kind}, not a file")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise RefusedError(f"the key {quoted(key)} is given twice")
            seen.add(key)
    return found


def _constant(text: str) -> float:
    raise RefusedError(f"{text} is not a number that JSON allows")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise RefusedError(f"the number {one_line(text)} is too large")
    return value


def _whole(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise RefusedError(f"a whole number has {len(text.lstrip('-')):,} digits; at most {MAX_DIGITS} are read")
    return int(text)


_DIGITS = re.compile(rf"\d{{{MAX_DIGITS}}}")
_EXPONENT = re.compile(r"[eE]\+?\d\d|\d{300}")
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_constant)
_CAREFUL_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_constant, parse_float=_finite, parse_int=_whole
)
_ANY_FLOAT_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_whole)


def _from_json(text: str, *, finite: bool = True) -> Any:
    """The value in a JSON text; `json.JSONDecodeError` where there is none, and `RefusedError` beyond a bound."""
    # Use the slow per-number checks only if the text contains a long or large number.
    careful = _DIGITS.search(text) or _EXPONENT.search(text)
    decoder = (_CAREFUL_DECODER if careful else _DECODER) if finite else _ANY_FLOAT_DECODER
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise RefusedError(TOO_DEEP) from None
    escaped = "\\u" in text
    if escaped or text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value, escaped=escaped)
    return value


def _check_depth(value: Any, *, escaped: bool) -> None:
    """Refuse nesting that is too deep and, where the text has escapes, halves of surrogate pairs."""
    level = [value]
    for depth in range(MAX_DEPTH + 1):
        if not level:
            return
        if depth == MAX_DEPTH and any(isinstance(v, dict | list) for v in level):
            raise RefusedError(TOO_DEEP)
        if escaped:
            for text in _strings(level):
                if SURROGATE.search(text):
                    raise RefusedError(f"the text {quoted(text)} has half of a surrogate pair")
        level = [
            child
            for v in level
            if isinstance(v, dict | list)
            for child in (v.values() if isinstance(v, dict) else v)
            if escaped or isinstance(child, dict | list)
        ]


def _strings(values: list[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value
