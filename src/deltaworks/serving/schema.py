"""Reading keys and values that people wrote: every error names the key and says what was expected."""

from collections.abc import Collection, Mapping
from typing import Any
from unicodedata import category

from deltaworks.errors import WorkloadError, did_you_mean, quoted

MAX_NUMBER = 1e15
"""The largest number that means anything here, unless a key has a limit of its own; float64 counts to 9e15."""
MAX_TEXT = 1000
"""Characters of a name, at most."""


def instead(raw: Any) -> str:
    """The end of an error that says what was expected: what was given instead."""
    return "but nothing is given" if raw is None else f"not {quoted(raw)}"


def mapping(raw: Any, where: str) -> Mapping[Any, Any]:
    """A mapping, whatever its keys.

    Raises:
        WorkloadError: it is not a mapping.
    """
    if not isinstance(raw, Mapping):
        raise WorkloadError(f"{where}: expected keys and values, {instead(raw)}")
    return raw


def check_keys(raw: Any, known: Collection[str], where: str) -> Mapping[str, Any]:
    """A mapping with no key but the known ones.

    Raises:
        WorkloadError: it is not a mapping, or it has a key that is not known; a close one is suggested.
    """
    given = mapping(raw, where)
    for key in given:
        if key not in known:
            hint = did_you_mean(str(key), known) or f"; known are {', '.join(known)}"
            raise WorkloadError(f"{where}: unknown key {quoted(str(key))}{hint}")
    return given


def number(raw: Any, where: str, least: float = 0.0, above: bool = False, most: float = MAX_NUMBER) -> float:
    """A number within bounds.

    Args:
        raw: What should be one.
        where: What to call it in errors.
        least: The least that it may be.
        above: Whether it must be more than that.
        most: The most that it may be.

    Raises:
        WorkloadError: it is not such a number.
    """
    fine = isinstance(raw, (int, float)) and not isinstance(raw, bool)
    if not fine or not raw >= least or (above and raw == least):
        raise WorkloadError(
            f"{where}: expected a number {'above' if above else 'of at least'} {least:g}, {instead(raw)}"
        )
    if raw > most:
        raise WorkloadError(f"{where}: expected a number of at most {_plain(most)}, {instead(raw)}")
    return float(raw)


def whole(raw: Any, where: str, least: int = 0, most: float = MAX_NUMBER) -> int:
    """A whole number within bounds.

    Raises:
        WorkloadError: it is not such a number.
    """
    number(raw, where, least, most=most)
    if raw != int(raw):
        raise WorkloadError(f"{where}: expected a whole number, {instead(raw)}")
    return int(raw)


def text(raw: Any, where: str) -> str:
    """A text that is not empty, of at most `MAX_TEXT` characters.

    Raises:
        WorkloadError: it is none.
    """
    if not isinstance(raw, str) or not raw:
        raise WorkloadError(f"{where}: expected a text, {instead(raw)}")
    if len(raw) > MAX_TEXT:
        raise WorkloadError(f"{where}: a text of {len(raw):,} characters is too long; at most {MAX_TEXT:,} are taken")
    return raw


def adapter_name(raw: Any, where: str) -> str:
    """The name of an adapter: a text without control characters and line breaks.

    Raises:
        WorkloadError: it is none.
    """
    found = text(raw, where)
    if has_controls(found):
        raise WorkloadError(f"{where}: {quoted(found)} holds a control character or a line break; give it another name")
    return found


def has_controls(given: str) -> bool:
    """Whether a text holds a control character, a line break or half of a surrogate pair."""
    return any(category(character) in ("Cc", "Cs", "Zl", "Zp") for character in given)


def _plain(value: float) -> str:
    return f"{int(value):,}" if value == int(value) and value < 1e12 else f"{value:g}"
