"""Parse I/O budgets."""

import re
from dataclasses import dataclass

from deltaworks.errors import UserError, one_line, quoted
from deltaworks.units import lacks_unit, parse_bytes


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be read from experts: a share of all their bytes, or a number of bytes."""

    share: float | None = None
    nbytes: int | None = None

    def of(self, expert_bytes: int) -> int:
        """In bytes, for experts of so many bytes in all."""
        return int(self.share * expert_bytes) if self.share is not None else self.nbytes or 0


def parse_budget(text: str, where: str = "budget") -> Budget:
    """Parse a budget such as ``25%``, ``2GiB`` or ``500000B``.

    Args:
        text: the budget.
        where: the option or key that holds it, for messages.

    Raises:
        UserError: it is neither a share nor an amount of bytes, or a number without a unit, which could be either.
    """
    if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text):
        if float(match[1]) > 100:
            raise UserError(f"{where}: {quoted(text.strip())} is more than the experts hold; 100% reads everything")
        return Budget(share=float(match[1]) / 100)
    if lacks_unit(text):
        raise UserError(f"{where}: {one_line(text.strip())} needs a unit{_suggestion(text.strip())}")
    try:
        return Budget(nbytes=parse_bytes(text))
    except UserError as error:
        raise UserError(
            f"{where}: {quoted(text)} is not a budget; write a share like 25%, or an amount like 2GiB"
        ) from error


def _suggestion(number: str) -> str:
    """The end of a message about a number without a unit: what may have been meant."""
    if re.fullmatch(r"\d{1,15}(?:\.\d{1,15})?", number) and float(number) <= 100:
        share = f"{100 * float(number):g}%" if 0 < float(number) < 1 else f"{number}%"
        return f": {share} or {number}B?"
    return "; write a share like 25%, or an amount like 2GiB"
