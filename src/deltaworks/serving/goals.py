"""Latency goals such as ``ttft_p99=2s``: how they are written, and whether an answer of the twin keeps them."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from deltaworks.errors import PlacementError, did_you_mean, quoted

GOALS = ("ttft", "itl", "tpot")
"""Quantities that can be limited."""


@dataclass(frozen=True)
class Goal:
    """A limit on a latency, like ``ttft_p99=2s``.

    Attributes:
        quantity: One of `GOALS`.
        statistic: ``mean``, ``p50`` or ``p99``.
        limit_ms: Milliseconds.
    """

    quantity: str
    statistic: str
    limit_ms: float

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.quantity}_{self.statistic}"

    def value(self, answer: dict[str, Any]) -> float | None:
        """What an answer of `simulate` says of it, milliseconds; None where nothing was observed."""
        found: float | None = answer[f"{self.quantity}_ms"][self.statistic]
        return found

    def met(self, answer: dict[str, Any]) -> bool:
        """Whether an answer of `simulate` keeps to it."""
        value = self.value(answer)
        if value is not None:
            return bool(value <= self.limit_ms)
        # Nothing was observed. That proves nothing, unless nobody asked for anything that could be.
        asked = answer["requests"]["arrived"]
        single = answer["offered_output_tps"] * answer["duration_s"] <= asked + 0.5
        return not asked or (self.quantity != "ttft" and single)


def parse_goal(text: str) -> Goal:
    """A goal from ``ttft_p99=2s``, ``itl_mean=50ms``.

    Raises:
        PlacementError: it is not a goal.
    """
    match = re.fullmatch(r"\s*(\w+?)_(\w+)\s*=\s*([0-9.]+)\s*(ms|s)\s*", text)
    if match is None:
        raise PlacementError(f"{text!r} is not a latency goal; write it like ttft_p99=2s or itl_mean=50ms")
    quantity, statistic, value, unit = match.groups()
    check = goal_of(f"{quantity}_{statistic}", 1.0)
    try:
        limit = float(value) * (1000 if unit == "s" else 1)
    except ValueError:
        raise PlacementError(f"{text!r}: {value!r} is not a number") from None
    if not 0 < limit < float("inf"):
        raise PlacementError(f"{quoted(text)}: a latency must be above 0 and finite")
    return replace(check, limit_ms=limit)


def goal_of(name: str, limit_ms: float) -> Goal:
    """A goal from its name, like ``ttft_p99``, and its limit in milliseconds.

    Raises:
        PlacementError: there is no such latency.
    """
    known = {f"{q}_{s}": (q, s) for q in GOALS for s in ("mean", "p50", "p99")}
    if name not in known:
        hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
        raise PlacementError(f"unknown latency {quoted(name)}{hint}")
    return Goal(*known[name], limit_ms)


def parse_goals(listed: Iterable[str]) -> tuple[Goal, ...]:
    """Goals from texts such as ``ttft_p99=2s``.

    Raises:
        PlacementError: one is not a goal, or a latency is limited twice.
    """
    goals = [parse_goal(text) for text in listed]
    for index, goal in enumerate(goals):
        if goal.name in {other.name for other in goals[:index]}:
            raise PlacementError(f"{goal.name} is limited twice; give one limit for each latency")
    return tuple(goals)
