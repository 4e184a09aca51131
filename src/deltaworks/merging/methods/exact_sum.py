"""Sums that are correctly rounded, so that the order of what is added cannot matter.

A float64 is an integer times 2^-1074; a kernel adds such integers up in digits of 32 bits (Kulisch's long accumulator),
and Python's integers, which have no limit, do the rest.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deltaworks.checkpoints.jit import inner

_SMALLEST = 1074
"""The least float64 above zero is two to the power of minus so much."""

_FRACTION, _DIGIT = 52, 32
"""Bits of a float64's fraction, and of a digit."""

_DIGITS = (2046 + _FRACTION) // _DIGIT + 3

_MAX_VALUES = 1 << 29
"""Values to one accumulator: each adds less than 2^33 to a digit, an int64."""


def exact_sums(parts: Sequence[NDArray[np.float64]]) -> list[float]:
    """Column sums of partial sums ([tiles, columns] each), correctly rounded, as `math.fsum` rounds them.

    Raises:
        OverflowError: a sum of finite values is none.
    """
    values = np.concatenate(parts)
    if not np.isfinite(values).all():
        return [math.fsum(column.tolist()) for column in values.T]
    totals = [0] * values.shape[1]
    for first in range(0, len(values), _MAX_VALUES):
        digits = np.zeros((values.shape[1], _DIGITS), np.int64)
        _add_up(values[first : first + _MAX_VALUES].view(np.int64), digits)
        for k, own in enumerate(digits.tolist()):
            totals[k] += sum(digit << (_DIGIT * i) for i, digit in enumerate(own) if digit)
    return [total / (1 << _SMALLEST) for total in totals]


@inner
def _add_up(patterns: NDArray[np.int64], digits: NDArray[np.int64]) -> None:
    """Add float64, given as their bits ([values, columns]), to the digits of their columns' sums."""
    for i in range(patterns.shape[0]):
        for k in range(patterns.shape[1]):
            pattern = patterns[i, k]
            power = (pattern >> _FRACTION) & 2047
            significand = pattern & ((1 << _FRACTION) - 1)
            if power:
                significand |= 1 << _FRACTION
                power -= 1
            digit, shift = power // _DIGIT, power % _DIGIT
            lower, upper = (significand & 0xFFFFFFFF) << shift, (significand >> _DIGIT) << shift
            sign = -1 if pattern < 0 else 1
            digits[k, digit] += sign * (lower & 0xFFFFFFFF)
            digits[k, digit + 1] += sign * ((lower >> _DIGIT & 0xFFFFFFFF) + (upper & 0xFFFFFFFF))
            digits[k, digit + 2] += sign * (upper >> _DIGIT)
