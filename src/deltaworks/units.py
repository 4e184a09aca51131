"""Amounts of data and times as people write and read them."""

import re
from typing import Final

from deltaworks.errors import UserError, one_line, quoted

_UNITS = {"": 1} | {u: 1000 ** (i + 1) for i, u in enumerate("kmgt")}
_UNITS |= {f"{u}i": 1024 ** (i + 1) for i, u in enumerate("kmgt")}
TOO_MANY_BYTES: Final = 1 << 62
"""More than any storage holds."""


def parse_bytes(text: str, where: str = "") -> int:
    """A number of bytes, written like ``500MB``, ``2GiB`` or ``1000B``.

    Args:
        text: the amount.
        where: the option or key that holds it, for messages.

    Raises:
        UserError: it is not an amount, has no unit, is less than one byte, or more than any storage holds.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgt]i?)b?|b)\s*", text.lower())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count < 1:
        problem = (
            f"{one_line(text.strip())} needs a unit"
            if lacks_unit(text)
            else f"{quoted(text)} is not an amount of bytes"
        )
        raise UserError(f"{where}{': ' if where else ''}{problem}; write it like 500MB or 2GiB")
    if count >= TOO_MANY_BYTES:
        raise UserError(
            f"{where}{': ' if where else ''}{one_line(text.strip())} is more than any storage holds; give fewer bytes"
        )
    return count


def lacks_unit(text: str) -> bool:
    """Whether an amount is a plain number, such as ``25``, ``-1`` or ``1e9``: neither a share nor bytes."""
    return re.fullmatch(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\s*", text) is not None


def format_bytes(nbytes: float) -> str:
    """An amount of data in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def format_error(error: float) -> str:
    """A relative error with four decimals; ``exact`` for zero, and never zeros alone for another."""
    if error == 0:
        return "exact"
    return f"{error:.4f}" if error >= 0.00005 else f"{error:.0e}"


def format_time(milliseconds: float | None) -> str:
    """A duration; a dash where there is none."""
    if milliseconds is None:
        return "-"
    if milliseconds < 100:
        return f"{milliseconds:.1f} ms"
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:,.1f} s"
