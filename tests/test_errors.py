"""What messages quote of values that were read from outside: one line, whatever is in them."""

from typing import Any

import pytest

from deltaworks.errors import did_you_mean, one_line, quoted


def laugh(levels: int) -> list[Any]:
    """A list whose text would take ten to the power of `levels`, in a few hundred bytes."""
    values: list[Any] = ["lol"] * 10
    for _ in range(levels):
        values = [values] * 10
    return values


def endless() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


@pytest.mark.parametrize(
    "value",
    [
        laugh(30),
        endless(),
        {"key": laugh(30)},
        "x" * 10_000_000,
        "a\nb\x00\ud800",
        10**5000,
        -(16**100_000),
        {i: i for i in range(100_000)},
        b"\xff" * 1000,
        float("nan"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_quotation_is_one_short_line(value: Any) -> None:
    text = quoted(value)
    assert len(text) <= 120
    assert text.isprintable()


@pytest.mark.parametrize(("value", "said"), [
    ("abc", "'abc'"), (7, "7"), (2**63, "9223372036854775808"), (-1.5, "-1.5"), ([1, "a"], "[1, 'a']"),
    ({"a": 1}, "{'a': 1}"), (None, "null"), (True, "true"), (False, "false"),
])  # fmt: skip
def test_a_short_value_is_quoted_as_yaml_and_json_write_it(value: Any, said: str) -> None:
    assert quoted(value) == said


@pytest.mark.parametrize(
    ("text", "width", "line"),
    [
        ("a\n  b\tc", 120, "a b c"),
        ('it\'s "so".', 120, 'it\'s "so".'),
        ("nul \x00", 120, "nul \\x00"),
        ("x" * 300, 300, "x" * 300),
        ("x" * 301, 300, "x" * 297 + "..."),
        ("x" * 10_000_000, 120, "x" * 117 + "..."),
        (" " * 1000 + "x", 120, "..."),
    ],
)
def test_a_message_is_included_as_one_line(text: str, width: int, line: str) -> None:
    assert one_line(text, width) == line


def test_only_short_names_are_guessed() -> None:
    assert did_you_mean("densty", ["density"]) == "; did you mean 'density'?"
    assert did_you_mean("densty" * 1_000_000, ["density"]) == ""
    assert did_you_mean(7, ["7"]) == ""
