"""Weights that sums are divided by: whether float32, in which merges are calculated, can tell their sum."""

import math
from collections.abc import Sequence

import numpy as np

from deltaworks.errors import RecipeError, quoted

LARGEST = 3.4028234663852886e38
"""The largest float32."""
_CANCELLED = 1e-3
"""A sum of weights that is less than this share of their sizes is made of rounding: dividing by it magnifies that."""
_ORDINARY = 100
"""Exponents of two up to which products with weights neither overflow nor lose digits."""


def check_range(value: float, name: str, tensor: str) -> float:
    """A parameter's value for a tensor, which must be one of float32.

    Raises:
        RecipeError: it is too large.
    """
    if abs(value) > LARGEST:
        raise RecipeError(
            f"{name}: {value:g} at tensor {quoted(tensor)} is more than a float32 holds, in which merges are calculated"
        )
    return value


def check_sum(weights: Sequence[float], tensor: str) -> None:
    """Make sure that a sum of weights can be divided by in float32, or is zero there as it is exactly.

    Raises:
        RecipeError: the weights cancel so far that their sum is mostly rounding.
    """
    total, size = math.fsum(weights), math.fsum(map(abs, weights))
    vanishes = total == 0 and sum(map(np.float32, weights), np.float32(0)) == 0
    if abs(total) < _CANCELLED * size and not vanishes:
        raise RecipeError(
            f"the weights at tensor {quoted(tensor)} nearly cancel: they sum to {total:g} of {size:g}, so normalizing"
            " them would magnify rounding; change the weights, or set normalize: false"
        )


def normalizable(weights: Sequence[float], tensor: str) -> tuple[float, ...]:
    """Weights of an average, as float32 can take them; see `rescaled`.

    Raises:
        RecipeError: they sum to zero, or nearly; see `check_sum`.
    """
    if math.fsum(weights) == 0:
        raise RecipeError(f"the weights at tensor {quoted(tensor)} sum to zero, so they cannot be normalized")
    check_sum(weights, tensor)
    return rescaled(weights)


def rescaled(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights of which only the proportions count: those that are all tiny or all huge by a power of two nearer to one.

    That changes nothing of what they mean, and keeps their digits in float32. All others are returned as they are.
    """
    exponent = math.frexp(max(map(abs, weights), default=0.0))[1]
    return tuple(weights) if abs(exponent) <= _ORDINARY else tuple(math.ldexp(w, -exponent) for w in weights)
