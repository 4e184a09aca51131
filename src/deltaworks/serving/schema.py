"""Reading keys and values that people wrote: every error names the key and says what was expected."""

from collections.abc import Collection, Mapping
from typing import Any

from deltaworks.errors import WorkloadError, did_you_mean


def check_keys(raw: Any, known: Collection[str], where: str) -> Mapping[str, Any]:
    """A mapping with no key but the known ones.

    Raises:
        WorkloadError: it is no mapping, or it has a key that is not known; a close one is suggested.
    """
    if not isinstance(raw, Mapping):
        raise WorkloadError(f"{where}: expected keys and values, not {raw!r}")
    for key in raw:
        if key not in known:
            hint = did_you_mean(key, known) or f"; known are {', '.join(known)}"
            raise WorkloadError(f"{where}: unknown key {str(key)!r}{hint}")
    return raw


def number(raw: Any, where: str, least: float = 0.0, above: bool = False) -> float:
    """A finite number, at least (or above) a least one.

    Raises:
        WorkloadError: it is no such number.
    """
    fine = isinstance(raw, (int, float)) and not isinstance(raw, bool) and abs(raw) < float("inf")
    if not fine or raw < least or (above and raw == least):
        raise WorkloadError(f"{where}: expected a number {'above' if above else 'of at least'} {least:g}, not {raw!r}")
    return float(raw)


def whole(raw: Any, where: str, least: int = 0) -> int:
    """A whole number, at least a least one.

    Raises:
        WorkloadError: it is no such number.
    """
    if number(raw, where, least) != int(raw):
        raise WorkloadError(f"{where}: expected a whole number, not {raw!r}")
    return int(raw)


def text(raw: Any, where: str) -> str:
    """A text that is not empty.

    Raises:
        WorkloadError: it is none.
    """
    if not isinstance(raw, str) or not raw:
        raise WorkloadError(f"{where}: expected a text, not {raw!r}")
    return raw
