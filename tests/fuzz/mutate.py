"""Mutations of documents: of their values, of their text and of their bytes, all from one random generator."""

import json
import random
from copy import deepcopy
from typing import Any

import yaml

ODD_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 255, 2**31, 2**32, 2**53, -(2**63), 2**64, 10**30, 0.0, -0.0, 0.5, -1.5, 1e-320,
    1e308, float("inf"), float("-inf"), float("nan"), "", " ", "a", "0", "1e-3", "25%", "nan", "../../x", "/dev/zero",
    "\0", "\ud800", "\U0001f98a", "\u202e", "x" * 300, "x" * 5000, "-", "~", "true", "2024-13-45", "=1", "{{ x }}",
    [], {}, [None], [[]], [0], [1, 2, 3],
    [0, -1], [1e400], {"": None}, {"a": {}}, [{}], {"model": None}, [["a", 1]], "ab" * 32, "BF16", "base",
]  # fmt: skip
"""Values that some reader did not expect."""

TOKENS = [
    "&a [*a]", "*a", "<<: *a", "!!python/object:os.system x", "!!binary x", "? [a]", "- ", "{", "}", "[", "]", ":", ",",
    "#", "|", ">", '"', "'", "\t", "\n", "\r", "\0", "\x85", "\ufeff", "---\n", "...\n", "%YAML 9\n", "0x" + "f" * 200,
    "9" * 5000, "1e999", ".inf", ".nan", "NaN", "Infinity", "2024-13-45", "1:99", "0o9", "\\ud800", "null", "[" * 200,
    "{a: " * 200, "- " * 300, '{"a":' * 300,
]  # fmt: skip
"""Pieces of text that are special in JSON or YAML."""

_LAUGHS = "".join(f"x-{i}: &l{i} [{', '.join([f'*l{i - 1}' if i else 'ha'] * 10)}]\n" for i in range(10))


def mutate_value(value: Any, rng: random.Random) -> Any:
    """A copy of a tree of JSON values with one to four places changed."""
    tree = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        tree = _change(tree, rng)
    return tree


def _change(tree: Any, rng: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []
    _collect(tree, places)
    if not places or rng.random() < 0.02:
        return _odd(rng)
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind <= 3:
        holder[key] = _odd(rng)
    elif kind == 4:
        del holder[key]
    elif kind == 5:
        holder[key] = _nudge(holder[key], rng)
    elif kind == 6:
        other, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) else None
    elif isinstance(holder, dict):
        holder[rng.choice(["x", "", "x-y", "model", "weight", str(key) + "s"])] = holder[key]
    else:
        holder.insert(rng.randrange(len(holder) + 1), holder[key])
    return tree


def _odd(rng: random.Random) -> Any:
    return deepcopy(rng.choice(ODD_VALUES))  # a later change must not reach the table


def _collect(value: Any, places: list[tuple[Any, Any]]) -> None:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        places.append((value, key))
        _collect(value[key], places)


def _nudge(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool) or value is None:
        return _odd(rng)
    if isinstance(value, int):
        return value + rng.choice((-1, 1, -value, 2**31, 2**63))
    if isinstance(value, float):
        return value * rng.choice((-1.0, 0.0, 1e30, 1e-30, 2.0))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice(("", "x", "\0", ".", "/", "\ud800", "é")) + value[at + 1 :]
    return [value, value] if rng.random() < 0.5 else {"x": value}


def as_json(value: Any, rng: random.Random) -> bytes:
    """A tree as JSON, in one of the ways that writers have."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, 1)))
    return text.encode(errors="surrogatepass")


def as_yaml(value: Any, rng: random.Random) -> bytes:
    """A tree as YAML, in one of the ways that writers have; bombs of aliases now and then."""
    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=rng.choice((None, True, False)))
    if rng.random() < 0.03:
        text = _LAUGHS + text + rng.choice(("", "models: *l9\n", "x-z: *l9\n"))
    return text.encode(errors="surrogatepass")


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """A text with one to five edits: bits flipped, pieces cut, doubled or swapped, special pieces put in."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(6)
        if kind == 0 and content:
            at %= len(content)
            content = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[at + rng.choice((1, 2, 8, 64, 100_000)) :]
        elif kind == 2:
            content = content[:at] + content[max(0, at - rng.randrange(1, 200)) : at] + content[at:]
        elif kind == 3:
            content = content[:at] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5))) + content[at:]
        else:
            content = content[:at] + rng.choice(TOKENS).encode(errors="surrogatepass") + content[at:]
    return content
