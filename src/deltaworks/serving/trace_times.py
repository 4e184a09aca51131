"""When the requests of a trace came: dates, epoch times and times since the start, in any unit, as seconds."""

import math
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np

from deltaworks.errors import WorkloadError, quoted
from deltaworks.serving.arrays import F64, I64

UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
"""Units of time that a trace may be in, and how many of them make a second."""

_NANOSECOND = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_SINCE, _EPOCH_UNTIL = 6e8, 5e9
"""Seconds since 1970 that are taken for a date: from 1989 to 2128. As a time since the start they would be twenty years
or more."""

_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d)(?::(\d\d)(?:[.,](\d+))?)?\s*(?:(Z|UTC)|([+-])(\d\d):?(\d\d)?)?",
    re.ASCII | re.IGNORECASE,
)


def instant(raw: Any) -> int | float:
    """A time as it stands in a trace.

    Args:
        raw: A number, a number as text, a `datetime`, or a date in ISO 8601 with any number of digits after the second.

    Returns:
        A float for a number, and an int for a date: nanoseconds since 1970. A date without an offset is in UTC,
        whatever the time zone of the machine.

    Raises:
        ValueError: it is not a time.
    """
    if isinstance(raw, datetime):
        since = (raw if raw.tzinfo else raw.replace(tzinfo=UTC)) - _EPOCH
        return _bounded(since // timedelta(microseconds=1) * 1000, raw)
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        raise ValueError(f"{quoted(raw)} is not a time")  # noqa: TRY004  # one error for all that is not a time
    match = _DATE.fullmatch(raw.strip()) if isinstance(raw, str) else None
    if match is None:
        return _number_or_date(raw)
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    offset = timedelta(hours=int(match[10] or 0), minutes=int(match[11] or 0)) * (-1 if match[9] == "-" else 1)
    try:
        whole = datetime(year, month, day, hour, minute, second, tzinfo=timezone(offset)) - _EPOCH
    except ValueError as error:
        raise ValueError(f"{quoted(raw)} is not a time: {error}") from None
    fraction = int((match[7] or "").ljust(9, "0")[:9])
    return _bounded(whole // timedelta(seconds=1) * _NANOSECOND + fraction, raw)


def _bounded(nanoseconds: int, raw: Any) -> int:
    """A date's nanoseconds since 1970 if an int64 holds them."""
    if abs(nanoseconds) >= 1 << 63:
        raise ValueError(f"{quoted(str(raw))} is not a time from the year 1678 to 2261")
    return nanoseconds


def _number_or_date(raw: str | float) -> int | float:
    """A number, or a date in one of the rarer forms of ISO 8601, as `instant` gives them."""
    try:
        value = float(raw)
    except OverflowError:
        value = math.inf
    except ValueError:
        try:
            return instant(datetime.fromisoformat(str(raw).strip()))
        except ValueError:
            raise ValueError(f"{quoted(raw)} is not a time") from None
    if not math.isfinite(value):
        raise ValueError(f"{quoted(raw)} is not a time")
    return value


def seconds(values: F64, unit: str, *, shifted: bool) -> F64:
    """Numbers in a unit as seconds, from the first request on where they count from 1970 or where ``shifted``.

    Args:
        values: (n,) float64.
        unit: One of `UNITS`.
        shifted: Whether the first request is at 0 in any case.
    """
    first = float(values.min())
    start = first if shifted or first >= _EPOCH_SINCE * UNITS[unit] else 0.0
    return np.asarray((values - start) / UNITS[unit])


def from_dates(nanoseconds: I64) -> F64:
    """Dates, as `instant` gives them, as seconds since the first, (n,) float64."""
    return np.asarray((nanoseconds - nanoseconds.min()) / _NANOSECOND)


def epoch_unit(values: F64) -> str | None:
    """The unit of numbers that count from 1970, by their magnitude; None for times since some start."""
    first = float(values.min())
    return next((u for u, n in UNITS.items() if _EPOCH_SINCE * n <= first < _EPOCH_UNTIL * n), None)


def guess_unit(values: F64, where: str) -> tuple[str, str | None]:
    """The unit of a column that some tools write in seconds and others in milliseconds.

    Mooncake's traces have whole milliseconds; vLLM's timed traces have the same columns in seconds. Fractions are of
    seconds. Whole numbers are milliseconds if that makes a trace of a minute or more, or of round seconds, and if in
    seconds the requests would be rarer than one in five seconds.

    Args:
        values: (n,) float64.
        where: What to call the trace in errors.

    Returns:
        The unit, and what to remark on it where it was guessed.

    Raises:
        WorkloadError: it may be either.
    """
    unit = epoch_unit(values)
    span = float(np.ptp(values))
    if unit is not None:
        return unit, None
    if span == 0:
        note = f"{where}: its only time, {values[0]:g}, is taken to be in milliseconds; say unit: s if it is in seconds"
        return "ms", note if values[0] else None
    rare = values.size - 1 <= 0.2 * span
    if (values != np.floor(values)).any():
        if not rare or span < 60_000:
            return "s", None
    elif rare and (span >= 60_000 or not (values % 1000).any()):
        return "ms", (
            f"{where}: its times are taken to be in milliseconds, which makes {span / 1000:,.0f} s; say unit: s if they"
            " are in seconds"
        )
    raise WorkloadError(
        f"{where}: its times, which span {span:g}, may be in seconds or in milliseconds; say which, as in"
        " requests: {path: FILE, unit: s}"
    )
