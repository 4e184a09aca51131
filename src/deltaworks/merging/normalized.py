"""Check that weights and their sum are representable in float32, in which merges are calculated."""

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
    """Check that a parameter's value for a tensor is in the range of float32, and return it.

    Raises:
        RecipeError: it is too large.
    """
    if abs(value) > LARGEST:
        raise RecipeError(
            f"{name}: {value:g} at tensor {quoted(tensor)} is more than a float32 holds, in which merges are calculated"
        )
    return value


def check_sum(weights: Sequence[float], tensor: str) -> None:
    """Check that weights can be divided by their sum in float32, or that the sum is exactly zero there too.

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
    """Scale weights of which only the proportions count, where all are tiny or all are huge, by a power of two.

    The proportions stay the same, and the weights keep their digits in float32. All others are returned unchanged.
    """
    exponent = math.frexp(max(map(abs, weights), default=0.0))[1]
    return tuple(weights) if abs(exponent) <= _ORDINARY else tuple(math.ldexp(w, -exponent) for w in weights)
