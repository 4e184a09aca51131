"""Budgets as people write them."""

import re
from dataclasses import dataclass

from deltaworks.errors import UserError
from deltaworks.units import parse_bytes


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that may be read from experts: a share of all their bytes, or a number of bytes."""

    share: float | None = None
    nbytes: int | None = None

    def of(self, expert_bytes: int) -> int:
        """In bytes, for experts of so many bytes in all."""
        return int(self.share * expert_bytes) if self.share is not None else self.nbytes or 0


def parse_budget(text: str) -> Budget:
    """A budget as people write it: ``25%``, ``2GiB``, ``500000``.

    Raises:
        UserError: it is neither.
    """
    if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text):
        if float(match[1]) > 100:
            raise UserError(f"a budget of {text.strip()} is more than the experts hold; 100% reads everything")
        return Budget(share=float(match[1]) / 100)
    try:
        return Budget(nbytes=parse_bytes(text))
    except UserError as error:
        raise UserError(f"{text!r} is no budget; write a share like 25%, or an amount like 2GiB") from error
